//! Another program in this process's place, and the way back.
//!
//! ```text
//! edged --take-over STATE,OLD[,REASON] ...      numbers of descriptors
//! ```
//! `STATE` is what [`super::carried`] describes, `OLD` the program that ran before, `REASON` why the one that was to take over
//! gave up. All stands in the arguments, so that even a program that cannot read the state finds the way back.

use std::{
    ffi::{CString, OsString},
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::ffi::OsStringExt,
    },
};

use super::carried::{self, contents, is_open, keep};
use crate::notify::Environment;

/// The internal first argument.
pub const ARGUMENT: &str = "--take-over";
/// Most bytes of a reason.
const REASON: usize = 4096;

/// What a program that takes over was passed.
#[derive(Debug)]
pub(super) struct Passed {
    state: RawFd,
    old: RawFd,
    /// Why this program runs again.
    pub(super) came_back: Option<String>,
    /// Everything that was open at first.
    open: Vec<RawFd>,
}

impl Passed {
    /// From the argument behind [`ARGUMENT`]; to be called before anything is opened. `None`: edged did not write it.
    pub(super) fn new(numbers: &str) -> Option<Self> {
        let mut numbers = numbers
            .split(',')
            .map(|number| number.parse().ok().filter(|raw| is_open(*raw)));
        let (state, old) = (numbers.next()??, numbers.next()??);
        let came_back = match numbers.next() {
            None => None,
            Some(raw) => {
                // SAFETY: just found open, passed to this process and known to nobody else in it.
                let memory = unsafe { OwnedFd::from_raw_fd(raw?) };
                let reason = contents(memory.as_fd(), REASON as u64).ok()?;
                Some(String::from_utf8_lossy(&reason).into_owned())
            }
        };
        Some(Self {
            state,
            old,
            came_back,
            open: open_descriptors(),
        })
    }

    /// The state.
    pub(super) fn state(&self) -> BorrowedFd<'_> {
        // SAFETY: found open by `new`, and closed by nobody before `close`.
        unsafe { BorrowedFd::borrow_raw(self.state) }
    }

    /// The program that ran before gets everything that was passed, and `reason`. Returns only if that fails.
    pub(super) fn go_back(&self, reason: &str, environment: &Environment) -> String {
        let bytes = reason.as_bytes();
        let bytes = bytes.get(..bytes.len().min(REASON)).unwrap_or_default();
        let memory = match carried::memory("edged-reason", bytes) {
            Ok(memory) => memory,
            Err(error) => return format!("there is no way back: {error}"),
        };
        // SAFETY: found open by `new`, and closed by nobody before `close`.
        let passed: Vec<_> = self
            .open
            .iter()
            .map(|raw| unsafe { BorrowedFd::borrow_raw(*raw) })
            .collect();
        // SAFETY: as above.
        let old = unsafe { BorrowedFd::borrow_raw(self.old) };
        let keep: Vec<_> = passed.into_iter().chain([memory.as_fd()]).collect();
        let numbers = [self.state, self.old, memory.as_raw_fd()];
        format!("there is no way back: {}", exec(old, &numbers, environment, &keep))
    }

    /// Closes what leads back.
    pub(super) fn close(self) {
        for raw in [self.state, self.old] {
            // SAFETY: passed to this process, known to nobody else in it, and `self` ends with it.
            drop(unsafe { OwnedFd::from_raw_fd(raw) });
        }
    }
}

/// Runs `program` in this process's place with [`ARGUMENT`] and `numbers`; of all descriptors it gets `keep` and the
/// standard three. Returns only if that fails, and then everything is as before.
///
/// To be called on the main thread, which is the one that goes on: workers end with the thread that started them.
pub(super) fn exec(
    program: BorrowedFd<'_>,
    numbers: &[RawFd],
    environment: &Environment,
    kept: &[BorrowedFd<'_>],
) -> io::Error {
    let numbers: Vec<String> = numbers.iter().map(ToString::to_string).collect();
    let (arguments, variables) = match (
        strings(arguments(path(program), std::env::args_os(), &numbers.join(","))),
        strings(variables(environment)),
    ) {
        (Ok(arguments), Ok(variables)) => (arguments, variables),
        (Err(error), _) | (_, Err(error)) => return error,
    };
    let set = |flag| kept.iter().try_for_each(|descriptor| keep(*descriptor, flag));
    if let Err(error) = set(true) {
        let _ = set(false);
        return error;
    }
    // A signal in the moment in which nobody handles it would end the daemon; so it waits for the next one's handlers.
    block_signals(true);
    let pointers = |strings: &[CString]| -> Vec<*const libc::c_char> {
        strings
            .iter()
            .map(|string| string.as_ptr())
            .chain([std::ptr::null()])
            .collect()
    };
    let (argv, envp) = (pointers(&arguments), pointers(&variables));
    // SAFETY: both lists end with a null pointer, and the strings they point to live until after the call.
    unsafe { libc::fexecve(program.as_raw_fd(), argv.as_ptr(), envp.as_ptr()) };
    let error = io::Error::last_os_error();
    block_signals(false);
    let _ = set(false);
    error
}

/// Has the signals that steer the daemon wait, or come.
pub(super) fn block_signals(block: bool) {
    let how = if block { libc::SIG_BLOCK } else { libc::SIG_UNBLOCK };
    // SAFETY: the set is made by sigemptyset before it is used, and only this thread's mask changes.
    unsafe {
        let mut set = std::mem::MaybeUninit::uninit();
        libc::sigemptyset(set.as_mut_ptr());
        for signal in [libc::SIGHUP, libc::SIGTERM, libc::SIGINT] {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        libc::pthread_sigmask(how, set.as_ptr(), std::ptr::null_mut());
    }
}

/// Where `program` lies, for `ps`.
fn path(program: BorrowedFd<'_>) -> OsString {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", program.as_raw_fd()));
    link.map_or_else(|_| "edged".into(), Into::into)
}

/// As this process was started, so that `ps` shows it, with what is internal in front.
fn arguments(program: OsString, own: impl IntoIterator<Item = OsString>, numbers: &str) -> Vec<OsString> {
    let mut own = own.into_iter().skip(1).peekable();
    let mut arguments = vec![program, ARGUMENT.into(), numbers.into()];
    if own.next_if(|argument| argument == ARGUMENT).is_some() {
        own.next();
    }
    arguments.extend(own);
    arguments
}

/// This process's environment, with what was taken out of it at start.
fn variables(environment: &Environment) -> impl Iterator<Item = OsString> {
    let taken = environment
        .variables()
        .into_iter()
        .map(|(name, value)| (name.into(), value));
    std::env::vars_os().chain(taken).map(|(name, value)| {
        let mut variable: OsString = name;
        variable.push("=");
        variable.push(value);
        variable
    })
}

fn strings(all: impl IntoIterator<Item = OsString>) -> io::Result<Vec<CString>> {
    let all = all.into_iter().map(|one| CString::new(one.into_vec()));
    all.collect::<Result<_, _>>().map_err(io::Error::other)
}

/// Every descriptor but the standard three.
fn open_descriptors() -> Vec<RawFd> {
    let entries = std::fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    let numbers: Vec<RawFd> = entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    // The directory itself was one of them.
    numbers.into_iter().filter(|raw| is_open(*raw)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_stay_as_they_were_however_often_it_is_replaced() {
        let text = |arguments: &[&str], numbers| {
            let own = arguments.iter().map(OsString::from);
            let made = super::arguments("/opt/edged".into(), own, numbers);
            made.iter()
                .map(|one| one.to_string_lossy().into_owned())
                .collect::<Vec<_>>()
                .join(" ")
        };
        let first = text(&["/usr/bin/edged", "--config", "x", "--state", "y"], "5,6");
        assert_eq!(first, "/opt/edged --take-over 5,6 --config x --state y");
        let parts: Vec<_> = first.split(' ').collect();
        assert_eq!(
            text(&parts, "7,8,9"),
            "/opt/edged --take-over 7,8,9 --config x --state y"
        );
        assert_eq!(text(&[], "5,6"), "/opt/edged --take-over 5,6");
    }

    #[test]
    fn numbers_that_were_not_passed_are_refused() {
        let null: OwnedFd = std::fs::File::open("/dev/null").expect("/dev/null").into();
        let raw = null.as_raw_fd();
        for wrong in ["", "5", "x,y", "1,2", "-1,-1", "2000000000,2000000001"] {
            assert!(Passed::new(wrong).is_none(), "{wrong}");
        }
        let passed = Passed::new(&format!("{raw},{raw}")).expect("open");
        assert!(passed.came_back.is_none() && passed.open.contains(&raw));
        // The reason must be in sealed memory.
        let other = null.try_clone().expect("a copy");
        assert!(Passed::new(&format!("{raw},{raw},{}", std::os::fd::IntoRawFd::into_raw_fd(other))).is_none());
        let reason = carried::memory("reason", b"the store is locked").expect("memory");
        let passed =
            Passed::new(&format!("{raw},{raw},{}", std::os::fd::IntoRawFd::into_raw_fd(reason))).expect("open");
        assert_eq!(passed.came_back.as_deref(), Some("the store is locked"));
    }

    #[test]
    fn a_program_that_cannot_be_run_leaves_everything_as_it_was() {
        let null: OwnedFd = std::fs::File::open("/dev/null").expect("/dev/null").into();
        let error = exec(null.as_fd(), &[], &Environment::default(), &[null.as_fd()]);
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        let flags = rustix::io::fcntl_getfd(&null).expect("open");
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    }
}

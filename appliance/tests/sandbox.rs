//! What a worker can no longer do. The test starts itself again; the child enters the sandbox and tries.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{IoSlice, IoSliceMut, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::PathBuf,
    process::{Command, Stdio},
};

use appliance::{sandbox, worker::Role};
use rustix::{
    io::Errno,
    net::{AddressFamily, SocketType},
    process::{Pid, Signal},
};

/// The role for the child; without it this process is the parent.
const ROLE: &str = "EDGED_TEST_ROLE";
/// A TCP address that the parent listens on, a file that it keeps open, and the socket of a connection it made.
const PEER: &str = "EDGED_TEST_PEER";
const KEY: &str = "EDGED_TEST_KEY";

#[test]
fn the_balancer_reaches_backends_and_nothing_else() {
    let found = try_out("lb");
    refused(&found, COMMON_REFUSED);
    refused(
        &found,
        &[
            "tcp bind",
            "mptcp socket",
            "raw socket",
            "netlink socket",
            "packet socket",
        ],
    );
    allowed(&found, COMMON_ALLOWED);
    allowed(&found, &["tcp connect", "udp bind", "pipe and splice", "memory file"]);
    confirmed(&found, "64810");
}

#[test]
fn the_metrics_page_only_answers() {
    let found = try_out("web");
    refused(&found, COMMON_REFUSED);
    refused(
        &found,
        &[
            "tcp socket",
            "udp socket",
            "tcp connect",
            "tcp bind",
            "udp bind",
            "pipe and splice",
        ],
    );
    allowed(&found, COMMON_ALLOWED);
    confirmed(&found, "64811");
}

const COMMON_REFUSED: &[&str] = &[
    "read a key file",
    "read /proc/PARENT/mem",
    "read /proc/PARENT/environ",
    "list /",
    "write a file",
    "stat a file",
    "unix socket",
    "socket pair",
    "listen",
    "execve",
    "fork",
    "user namespace",
    "ptrace",
    "process_vm_readv",
    "pidfd_open",
    "kill the parent",
    "tgkill the parent",
    "signal by descriptor owner",
    "raise a limit",
    "mount",
    "bpf",
    "io_uring",
    "userfaultfd",
    "keyctl",
    "executable memory",
    "executable protection",
    "become root",
    "be dumpable again",
    "attach a socket filter",
];

const COMMON_ALLOWED: &[&str] = &[
    "thread",
    "accept",
    "talk",
    "epoll",
    "random",
    "nonblocking",
    "keepalive",
    "parallelism",
];

fn refused(found: &BTreeMap<String, String>, names: &[&str]) {
    for name in names {
        let result = found.get(*name).unwrap_or_else(|| panic!("{name} was not tried"));
        assert!(result.starts_with("refused"), "{name}: {result}");
    }
}

fn allowed(found: &BTreeMap<String, String>, names: &[&str]) {
    for name in names {
        let result = found.get(*name).unwrap_or_else(|| panic!("{name} was not tried"));
        assert_eq!(result, "done", "{name}");
    }
}

fn confirmed(found: &BTreeMap<String, String>, uid: &str) {
    for (line, wanted) in [
        ("CapEff", "0"),
        ("CapPrm", "0"),
        ("CapInh", "0"),
        ("CapAmb", "0"),
        ("NoNewPrivs", "1"),
        ("Seccomp", "2"),
    ] {
        let value = &found[line];
        assert_eq!(
            value.trim_start_matches('0'),
            wanted.trim_start_matches('0'),
            "{line}: {value}"
        );
    }
    assert_eq!(found["core limit"], "0");
    if rustix::process::geteuid().is_root() {
        assert_eq!(found["uid"], uid, "root's children change their user");
        assert_eq!(found["CapBnd"].trim_start_matches('0'), "");
    } else {
        eprintln!("SKIPPED: not root, so the change of user id was not tried");
    }
    if found["landlock"] == "Missing" {
        eprintln!("SKIPPED: this kernel has no Landlock; what it would refuse was refused by seccomp");
    }
}

/// Starts the child and reads what it found: `name<TAB>result` lines.
fn try_out(role: &str) -> BTreeMap<String, String> {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
    let key = std::env::temp_dir().join(format!("edged-test-key-{}-{role}", std::process::id()));
    std::fs::write(&key, "a secret").expect("written");
    let mut child = Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", "--nocapture", "--test-threads=1", "child"])
        .env(ROLE, role)
        .env(PEER, listener.local_addr().expect("an address").to_string())
        .env(KEY, &key)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("started");
    let mut output = String::new();
    child
        .stdout
        .take()
        .expect("piped")
        .read_to_string(&mut output)
        .expect("read");
    let _ = std::fs::remove_file(key);
    let found: BTreeMap<String, String> = output
        .lines()
        .filter_map(|line| line.split_once('\t'))
        .map(|(name, result)| (name.to_owned(), result.to_owned()))
        .collect();
    assert!(found.contains_key("end"), "the child did not get to its end: {output}");
    let _ = child.wait();
    found
}

/// Not a test of its own: what the child does.
#[test]
fn child() {
    let Some(role) = std::env::var(ROLE).ok().and_then(|role| role.parse::<Role>().ok()) else {
        return;
    };
    // The harness runs tests in threads; a process that the kernel restricts thread by thread needs a first one that
    // is the only one that matters, and everything here happens on it.
    attempt(role);
    std::io::stdout().flush().expect("told");
    std::process::exit(0);
}

fn attempt(role: Role) {
    let parent = rustix::process::getppid().expect("a parent");
    let peer: SocketAddr = std::env::var(PEER).expect("set").parse().expect("an address");
    let key = PathBuf::from(std::env::var(KEY).expect("set"));
    let before = Before::new();
    let entered = sandbox::enter(role, parent).expect("entered");
    // The harness has begun a line.
    println!();
    say("landlock", &format!("{:?}", entered.landlock));
    say("uid", &entered.uid.to_string());
    let mut status = vec![0; 16 << 10];
    let length = rustix::io::pread(&before.status, &mut status, 0).expect("read");
    for line in String::from_utf8_lossy(&status[..length]).lines() {
        if let Some((name, value)) = line.split_once(":\t") {
            say(name, value);
        }
    }
    say(
        "core limit",
        &format!(
            "{}",
            rustix::process::getrlimit(rustix::process::Resource::Core)
                .current
                .unwrap_or(1)
        ),
    );
    files(&key, parent);
    sockets(peer, &before);
    processes(parent, &before);
    kernel();
    allowed_things(before);
    say("end", "done");
}

/// What exists before the sandbox.
struct Before {
    status: File,
    pair: (UnixStream, UnixStream),
    listener: TcpListener,
    client: TcpStream,
    bound: OwnedFd,
    memory: OwnedFd,
}

impl Before {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
        let client = TcpStream::connect(listener.local_addr().expect("an address")).expect("connected");
        // A thread's own status: the child's test thread is not the first one.
        let status = File::open("/proc/thread-self/status").expect("opened");
        let bound = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).expect("a socket");
        rustix::net::bind(&bound, &SocketAddr::from(([127, 0, 0, 1], 0))).expect("bound");
        let memory = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).expect("memory");
        Self {
            status,
            pair: UnixStream::pair().expect("a pair"),
            listener,
            client,
            bound,
            memory,
        }
    }
}

fn files(key: &PathBuf, parent: Pid) {
    let number = parent.as_raw_nonzero();
    attempt_to("read a key file", || {
        let _done = File::open(key)?;
        Ok(())
    });
    attempt_to("read /proc/PARENT/mem", || {
        let _done = File::open(format!("/proc/{number}/mem"))?;
        Ok(())
    });
    attempt_to("read /proc/PARENT/environ", || {
        let _done = File::open(format!("/proc/{number}/environ"))?;
        Ok(())
    });
    attempt_to("list /", || {
        let _done = std::fs::read_dir("/")?;
        Ok(())
    });
    attempt_to("write a file", || {
        std::fs::write("/tmp/edged-test-should-not-exist", "x")
    });
    attempt_to("stat a file", || {
        let _done = std::fs::metadata(key)?;
        Ok(())
    });
}

fn sockets(peer: SocketAddr, before: &Before) {
    let socket = |family, kind, protocol: Option<u32>| {
        let protocol = protocol
            .and_then(std::num::NonZeroU32::new)
            .map(rustix::net::Protocol::from_raw);
        rustix::net::socket(family, kind, protocol)
    };
    attempt_to("unix socket", || {
        let _done = socket(AddressFamily::UNIX, SocketType::STREAM, None)?;
        Ok(())
    });
    attempt_to("socket pair", || {
        let _done = UnixStream::pair()?;
        Ok(())
    });
    attempt_to("tcp socket", || {
        let _done = socket(AddressFamily::INET6, SocketType::STREAM, None)?;
        Ok(())
    });
    attempt_to("udp socket", || {
        let _done = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
        Ok(())
    });
    attempt_to("mptcp socket", || {
        let _done = socket(AddressFamily::INET, SocketType::STREAM, Some(262))?;
        Ok(())
    });
    attempt_to("raw socket", || {
        let _done = socket(AddressFamily::INET, SocketType::RAW, Some(1))?;
        Ok(())
    });
    attempt_to("netlink socket", || {
        let _done = socket(AddressFamily::NETLINK, SocketType::RAW, None)?;
        Ok(())
    });
    attempt_to("packet socket", || {
        let _done = socket(AddressFamily::PACKET, SocketType::DGRAM, None)?;
        Ok(())
    });
    attempt_to("listen", || Ok(rustix::net::listen(&before.bound, 1)?));
    attempt_to("tcp connect", || {
        let _done = TcpStream::connect(peer)?;
        Ok(())
    });
    attempt_to("tcp bind", || {
        let socket = socket(AddressFamily::INET, SocketType::STREAM, None)?;
        Ok(rustix::net::bind(&socket, &SocketAddr::from(([127, 0, 0, 1], 0)))?)
    });
    attempt_to("udp bind", || {
        let _done = UdpSocket::bind("127.0.0.1:0")?;
        Ok(())
    });
    attempt_to("attach a socket filter", || {
        let program = [libc::sock_filter {
            code: 6,
            jt: 0,
            jf: 0,
            k: 0,
        }];
        let program = libc::sock_fprog {
            len: 1,
            filter: program.as_ptr().cast_mut(),
        };
        // SAFETY: the option's value is a program that lives through the call.
        result(unsafe {
            libc::setsockopt(
                std::os::fd::AsRawFd::as_raw_fd(&before.client),
                libc::SOL_SOCKET,
                libc::SO_ATTACH_FILTER,
                (&raw const program).cast(),
                size_of::<libc::sock_fprog>() as libc::socklen_t,
            )
        })
    });
}

fn processes(parent: Pid, before: &Before) {
    let number = parent.as_raw_nonzero().get();
    attempt_to("execve", || {
        // By the call itself: Command would fail to make its pipes first.
        let path = c"/bin/true";
        let arguments = [path.as_ptr(), std::ptr::null()];
        // SAFETY: strings and array end with zeros; the call returns only if it was refused.
        result(unsafe { libc::execv(path.as_ptr(), arguments.as_ptr()) })
    });
    attempt_to("fork", || {
        // SAFETY: the child, should there be one, ends at once.
        let child = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
        if child == 0 {
            // SAFETY: ends this copy without running anything.
            unsafe { libc::_exit(0) };
        }
        result(child as i32)
    });
    // SAFETY (this and the following): plain numbers or valid pointers; none of the calls gets past the filter.
    attempt_to("user namespace", || {
        // SAFETY: the call takes numbers and pointers to live values only, and is meant to be refused.
        result(unsafe { libc::unshare(libc::CLONE_NEWUSER) })
    });
    attempt_to("ptrace", || {
        // SAFETY: the call takes numbers and pointers to live values only, and is meant to be refused.
        result(unsafe { libc::ptrace(libc::PTRACE_ATTACH, number, 0, 0) } as i32)
    });
    attempt_to("process_vm_readv", || {
        let mut buffer = [0_u8; 8];
        let local = libc::iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: buffer.len(),
        };
        let remote = libc::iovec {
            iov_base: std::ptr::without_provenance_mut(0x1000),
            iov_len: buffer.len(),
        };
        // SAFETY: the local buffer lives through the call.
        match unsafe { libc::process_vm_readv(number, &raw const local, 1, &raw const remote, 1, 0) } {
            -1 if Errno::from_io_error(&std::io::Error::last_os_error()) == Some(Errno::FAULT) => Ok(()),
            other => result(other as i32),
        }
    });
    attempt_to("pidfd_open", || {
        let _done = rustix::process::pidfd_open(parent, rustix::process::PidfdFlags::empty())?;
        Ok(())
    });
    // A signal that would do no harm; that it may not be sent is what matters.
    attempt_to("kill the parent", || Ok(rustix::process::test_kill_process(parent)?));
    // SAFETY: signal 0 only asks.
    attempt_to("tgkill the parent", || {
        // SAFETY: the call takes numbers and pointers to live values only, and is meant to be refused.
        result(unsafe { libc::syscall(libc::SYS_tgkill, number, number, 0) } as i32)
    });
    attempt_to("signal by descriptor owner", || {
        let descriptor = std::os::fd::AsRawFd::as_raw_fd(&before.client);
        // SAFETY: plain numbers.
        result(unsafe { libc::fcntl(descriptor, libc::F_SETOWN, number) })
    });
    attempt_to("raise a limit", || {
        let limit = rustix::process::Rlimit {
            current: Some(0),
            maximum: Some(0),
        };
        Ok(rustix::process::setrlimit(rustix::process::Resource::Core, limit)?)
    });
    attempt_to("become root", || {
        Ok(rustix::thread::set_thread_res_uid(
            rustix::process::Uid::ROOT,
            None,
            None,
        )?)
    });
    attempt_to("be dumpable again", || {
        Ok(rustix::process::set_dumpable_behavior(
            rustix::process::DumpableBehavior::Dumpable,
        )?)
    });
    let _ = Signal::KILL;
}

fn kernel() {
    // SAFETY: plain numbers and null pointers; none of the calls gets past the filter.
    attempt_to("mount", || {
        // SAFETY: the call takes numbers and pointers to live values only, and is meant to be refused.
        result(unsafe {
            libc::mount(
                std::ptr::null(),
                c"/".as_ptr(),
                std::ptr::null(),
                libc::MS_REMOUNT,
                std::ptr::null(),
            )
        })
    });
    for (name, call) in [
        ("bpf", libc::SYS_bpf),
        ("io_uring", libc::SYS_io_uring_setup),
        ("userfaultfd", libc::SYS_userfaultfd),
        ("keyctl", libc::SYS_keyctl),
    ] {
        // SAFETY: as above.
        attempt_to(name, || result(unsafe { libc::syscall(call, 0, 0, 0, 0, 0) } as i32));
    }
    let map = |protection| {
        // SAFETY: a new anonymous mapping, used by nobody.
        unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                4096,
                protection,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        }
    };
    attempt_to("executable memory", || {
        result(if map(libc::PROT_READ | libc::PROT_EXEC) == libc::MAP_FAILED {
            -1
        } else {
            0
        })
    });
    attempt_to("executable protection", || {
        let memory = map(libc::PROT_READ | libc::PROT_WRITE);
        assert_ne!(memory, libc::MAP_FAILED);
        // SAFETY: the mapping just made.
        result(unsafe { libc::mprotect(memory, 4096, libc::PROT_READ | libc::PROT_EXEC) })
    });
}

fn allowed_things(before: Before) {
    attempt_to("thread", || {
        std::thread::Builder::new()
            .name("test".into())
            .spawn(|| ())?
            .join()
            .map_err(|_| std::io::Error::other("panic"))
    });
    attempt_to("accept", || {
        let _done = before.listener.accept()?;
        Ok(())
    });
    attempt_to("talk", || {
        let (mut a, mut b) = (&before.pair.0, &before.pair.1);
        a.write_all(b"x")?;
        b.read_exact(&mut [0])
    });
    attempt_to("epoll", || {
        let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC)?;
        let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC)?;
        let data = rustix::event::epoll::EventData::new_u64(1);
        Ok(rustix::event::epoll::add(
            &epoll,
            &event,
            data,
            rustix::event::epoll::EventFlags::IN,
        )?)
    });
    attempt_to("random", || {
        rustix::rand::getrandom(&mut [0_u8; 8], rustix::rand::GetRandomFlags::empty())
            .map(|_| ())
            .map_err(Into::into)
    });
    attempt_to("nonblocking", || before.client.set_nonblocking(true));
    attempt_to("keepalive", || {
        Ok(rustix::net::sockopt::set_socket_keepalive(&before.client, true)?)
    });
    attempt_to("parallelism", || std::thread::available_parallelism().map(|_| ()));
    attempt_to("memory file", || {
        rustix::io::pwrite(&before.memory, b"x", 0)?;
        let _ = rustix::io::pread(&before.memory, &mut [0_u8; 1], 0)?;
        Ok(rustix::fs::ftruncate(&before.memory, 4096)?)
    });
    attempt_to("pipe and splice", || {
        let (out, into) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        rustix::io::writev(&into, &[IoSlice::new(b"through")])?;
        let flags = rustix::pipe::SpliceFlags::empty();
        rustix::pipe::splice(out.as_fd(), None, before.pair.0.as_fd(), None, 7, flags)?;
        let mut buffer = [0; 7];
        rustix::io::readv(&before.pair.1, &mut [IoSliceMut::new(&mut buffer)])?;
        Ok(())
    });
}

fn attempt_to(name: &str, what: impl FnOnce() -> std::io::Result<()>) {
    match what() {
        Ok(()) => say(name, "done"),
        Err(error) => match Errno::from_io_error(&error) {
            Some(Errno::PERM | Errno::ACCESS) => say(name, "refused"),
            _ => say(name, &format!("failed: {error}")),
        },
    }
}

fn result(returned: i32) -> std::io::Result<()> {
    if returned < 0 {
        Err(std::io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn say(name: &str, result: &str) {
    println!("{name}\t{result}");
}

//! How long the machine itself held everybody up, for promises of a few milliseconds.
//!
//! A shared machine stands still now and then, for hundreds of milliseconds, and whoever is measured meanwhile is late by no
//! fault of his own. A [`Witness`] sees that: it does nothing but sleep, on every core, and notes how late it wakes up.
//! [`Witness::held_up`] is what has to be forgiven, to those who were under way at that time and to nobody else: on a quiet
//! machine a bound is as tight as it is written. What is late nevertheless, and only that, [`again`] measures once more if
//! the machine was noisy.

use std::{
    fmt,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// How long a witness sleeps each time.
const NAP: Duration = Duration::from_millis(5);
/// What timers and a core's queue take at any time; less is not noted.
const USUAL: Duration = Duration::from_millis(3);
/// With no longer stall than this the machine counts as quiet, and what is late on it is late by its own fault.
const QUIET: Duration = Duration::from_millis(50);
/// How often something is measured on a noisy machine.
const TRIES: usize = 3;

/// A thread on each core that notes when and for how long it was held up, until dropped.
#[derive(Debug)]
pub struct Witness {
    stop: Arc<AtomicBool>,
    cores: Vec<Core>,
}

#[derive(Debug, Default)]
struct Core {
    stalls: Arc<Mutex<Vec<Stall>>>,
    thread: Option<thread::JoinHandle<()>>,
}

#[derive(Clone, Copy, Debug)]
struct Stall {
    from: Instant,
    length: Duration,
}

/// That something was late, and the longest stall meanwhile.
#[derive(Debug)]
struct Late(String, Duration);

impl Witness {
    /// Starts to watch every core that this process may use.
    ///
    /// # Errors
    ///
    /// If the kernel does not say which these are.
    pub fn start() -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let usable = sched_getaffinity(None)?;
        let cores = (0..CpuSet::MAX_CPU).filter(|core| usable.is_set(*core));
        let cores = cores.map(|core| Core::watch(core, Arc::clone(&stop))).collect();
        Ok(Self { stop, cores })
    }

    /// What those who were under way between these two are to be forgiven: each stall they met, and as much again for the
    /// work that had piled up behind it, which also those meet who come just after it.
    pub fn held_up(&self, from: Instant, until: Instant) -> Duration {
        let met = |stall: &&Stall| stall.from <= until && stall.from + 2 * stall.length >= from;
        let forgiven = |core: &Core| core.stalls().iter().filter(met).map(|stall| 2 * stall.length).sum();
        self.cores.iter().map(forgiven).max().unwrap_or_default()
    }

    /// Fails with `fault`, which tells what was late, if `in_time` is false.
    ///
    /// # Errors
    ///
    /// Then, in a way that [`again`] knows.
    pub fn ensure(&self, in_time: bool, fault: impl fmt::Display) -> Result<()> {
        if in_time {
            return Ok(());
        }
        let longest = |core: &Core| core.stalls().iter().map(|stall| stall.length).max();
        let longest = self.cores.iter().filter_map(longest).max();
        bail!(Late(fault.to_string(), longest.unwrap_or_default()))
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.cores.iter_mut().filter_map(|core| core.thread.take()) {
            let _ = thread.join();
        }
    }
}

impl Core {
    fn watch(number: usize, stop: Arc<AtomicBool>) -> Self {
        let mut core = Self::default();
        let stalls = Arc::clone(&core.stalls);
        core.thread = Some(thread::spawn(move || {
            let mut only = CpuSet::new();
            only.set(number);
            // If it may not stay there, it still sees a machine that stands still as a whole.
            let _ = sched_setaffinity(None, &only);
            while !stop.load(Ordering::Relaxed) {
                let from = Instant::now() + NAP;
                thread::sleep(NAP);
                let length = from.elapsed();
                if length > USUAL {
                    let mut stalls = stalls.lock().expect("no panic while it is held");
                    stalls.push(Stall { from, length });
                }
            }
        }));
        core
    }

    fn stalls(&self) -> Vec<Stall> {
        self.stalls.lock().expect("no panic while it is held").clone()
    }
}

/// Runs `scenario`, which has its own [`Witness`], and runs it again, three times in all, if something was late while the
/// machine was noisy.
///
/// # Errors
///
/// What the scenario says; that something was late only if this was on a quiet machine or the last time.
pub fn again(scenario: impl Fn() -> Result<()>) -> Result<()> {
    for _ in 1..TRIES {
        match scenario() {
            Err(error) if error.downcast_ref::<Late>().is_some_and(|late| late.1 > QUIET) => {
                println!("measured again: {error:#}");
            }
            result => return result,
        }
    }
    scenario()
}

impl fmt::Display for Late {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "late, and the machine stood still for at most {:.1?}: {}",
            self.1, self.0
        )
    }
}

impl std::error::Error for Late {}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// Two cores, of which one was held up for 200 ms in the second second and for 10 ms in the fourth.
    fn witness(begin: Instant) -> Witness {
        let core = |stalls: &[(u64, u64)]| {
            let stall = |(from, length): &(u64, u64)| Stall {
                from: begin + Duration::from_millis(*from),
                length: Duration::from_millis(*length),
            };
            Core {
                stalls: Arc::new(Mutex::new(stalls.iter().map(stall).collect())),
                thread: None,
            }
        };
        Witness {
            stop: Arc::default(),
            cores: vec![core(&[(1000, 200), (3000, 10)]), core(&[(1000, 40)])],
        }
    }

    #[test]
    fn a_stall_is_forgiven_to_those_who_met_it_and_to_nobody_else() {
        let begin = Instant::now();
        let witness = witness(begin);
        for (from, until, forgiven) in [
            (0, 990, 0),
            (0, 1010, 400),
            (1100, 1150, 400),
            (1350, 1360, 400),
            (1450, 2900, 0),
            (0, 4000, 420),
            (3015, 3016, 20),
        ] {
            let at = |ms| begin + Duration::from_millis(ms);
            let held_up = witness.held_up(at(from), at(until));
            assert_eq!(held_up, Duration::from_millis(forgiven), "{from} to {until}");
        }
    }

    #[test]
    fn only_what_is_late_on_a_noisy_machine_is_measured_again() {
        let noisy = witness(Instant::now());
        let quiet = Witness {
            stop: Arc::default(),
            cores: Vec::new(),
        };
        let run = |scenario: &dyn Fn(u32) -> Result<()>| {
            let count = Cell::new(0);
            let result = again(|| {
                count.set(count.get() + 1);
                scenario(count.get())
            });
            (count.get(), result.is_ok())
        };
        assert_eq!(run(&|_| noisy.ensure(false, "late")), (3, false));
        assert_eq!(run(&|count| noisy.ensure(count == 2, "late")), (2, true));
        assert_eq!(run(&|_| quiet.ensure(false, "late")), (1, false));
        assert_eq!(run(&|_| bail!("broken")), (1, false));
    }
}

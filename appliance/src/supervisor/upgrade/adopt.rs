//! The new program's side: everything that was passed becomes its own, or it goes back to the one that ran before.

use std::{
    os::fd::OwnedFd,
    process::ExitCode,
    sync::{Arc, Mutex},
    time::Instant,
};

use tokio::sync::mpsc;

use super::{
    carried::{Carried, instant_of},
    exec::{self, Passed},
};
use crate::{
    api::Op,
    config::{self, Loaded},
    handover, log,
    notify::{Environment, Notify},
    supervisor::{
        Control, House, Options, Signals, boot,
        change::Now,
        end_on_panic,
        keeper::Running,
        lock,
        opening::{self, Sockets},
        runtime, serve,
        tun::{Tun, Tuns},
        vault::Vault,
    },
    worker::Role,
};

/// Takes the place of the program that ran in this process before. `numbers` is the argument behind
/// [`exec::ARGUMENT`].
pub fn take_over(numbers: Option<&str>, environment: Environment) -> ExitCode {
    let environment = Arc::new(environment);
    let Some(passed) = numbers.and_then(Passed::new) else {
        eprintln!(
            "edged: {} is how edged goes on as another program; to upgrade: edgectl upgrade BINARY",
            exec::ARGUMENT
        );
        return ExitCode::from(2);
    };
    // execveat(2) names the process after the descriptor.
    let _ = rustix::thread::set_name(c"edged");
    log::start("edged", &config::Log::default());
    // Nothing is open yet but what was passed, so that the way back is short even from a panic.
    let read = std::panic::catch_unwind(|| {
        let carried = Carried::read(passed.state())?;
        let loaded = config::load(&carried.config.text, &carried.config.origin).map_err(|faulty| faulty.to_string())?;
        Ok::<_, String>((carried, loaded))
    });
    let read = read.unwrap_or_else(|_| Err("it panicked; see the log: journalctl -u edged".into()));
    let (carried, loaded) = match read {
        Ok(read) => read,
        Err(why) => return go_back(&passed, &why, &environment),
    };
    end_on_panic();
    let runtime = match runtime() {
        Ok(runtime) => runtime,
        Err(error) => return go_back(&passed, &format!("it cannot start: {error}"), &environment),
    };
    let ended = runtime.block_on(async {
        let (ops, asked) = mpsc::channel(64);
        let adopted = async {
            let signals = Signals::new().map_err(|error| format!("signals cannot be received: {error}"))?;
            let house = adopt(
                &carried,
                loaded,
                Arc::clone(&environment),
                ops,
                passed.came_back.is_some(),
            )
            .await?;
            Ok::<_, String>((house, signals))
        };
        let (house, signals) = match adopted.await {
            Ok(adopted) => adopted,
            Err(why) => return Err(go_back(&passed, &why, &environment)),
        };
        // From here on there is no way back, and no need for one.
        exec::block_signals(false);
        let (came_back, began) = (passed.came_back.clone(), instant_of(carried.began_ms));
        passed.close();
        carried.close();
        let reverts = {
            let now = lock(&house.now);
            now.reverts.map(|at| (at, now.generation))
        };
        if let Some((at, generation)) = reverts {
            house.revert_after(at.saturating_duration_since(Instant::now()), generation);
        }
        let first = tokio::spawn(Arc::clone(&house).finish_upgrade(began, came_back));
        serve(house, asked, signals, first).await;
        Ok(())
    });
    boot::end_runtime(runtime);
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(code) => code,
    }
}

/// Returns only if there is no way back.
fn go_back(passed: &Passed, why: &str, environment: &Environment) -> ExitCode {
    tracing::error!("this program cannot take over: {why}");
    let why = if passed.came_back.is_some() {
        // From the one to the other for ever would help nobody.
        "the program that ran before cannot take over again either".to_owned()
    } else {
        passed.go_back(why, environment)
    };
    tracing::error!("{why}; edged ends, and is started again by its unit; sessions are lost");
    ExitCode::FAILURE
}

/// Everything that was passed, as a running house. If it fails, nothing was said to anyone, and nothing heard.
async fn adopt(
    carried: &Carried,
    loaded: Loaded,
    environment: Arc<Environment>,
    ops: mpsc::Sender<Op>,
    came_back: bool,
) -> Result<Arc<House>, String> {
    log::change(&loaded.config.log);
    let mut held = Sockets::new();
    for (place, copies) in &carried.listeners {
        let copies: Result<Vec<Arc<OwnedFd>>, String> =
            copies.iter().map(|raw| carried.copy(*raw).map(Arc::new)).collect();
        held.insert(*place, copies?);
    }
    let mut tuns = Tuns::new();
    for tun in &carried.tuns {
        let queues: Result<Vec<Arc<OwnedFd>>, String> =
            tun.queues.iter().map(|raw| carried.copy(*raw).map(Arc::new)).collect();
        let held = Tun {
            queues: queues?,
            offloads: tun.offloads,
            routes: tun.routes.clone(),
            memory: carried.copy(tun.memory).map(Arc::new)?,
        };
        tuns.insert(tun.name.clone(), held);
    }
    let opened = opening::open(&loaded, carried.threads, &held, &tuns)?;
    let control = Control::new(carried.copy(carried.control)?, carried.control_path.clone());
    let memory = carried.memory.map(|raw| carried.copy(raw).map(Arc::new)).transpose()?;
    let vault = if carried.store {
        // One that only the other program can read would cost drains and history.
        Vault::open_or_fail(&carried.state_directory)?
    } else {
        Vault::open(&carried.state_directory)
    };
    if !came_back && handover::test_die().is_some_and(|at| at == "adopt") {
        return Err("a test wants it to".into());
    }
    let kept = vault.kept().await;
    let notify = Notify::new(&environment);
    let config = &carried.config;
    let house = Arc::new(House {
        options: Options {
            config: carried.config_file.clone(),
            state: carried.state_directory.clone(),
        },
        environment,
        started: instant_of(carried.started_ms),
        notify,
        vault: Arc::new(vault),
        workers: Mutex::default(),
        now: Mutex::new(Now {
            loaded,
            revision: config.revision,
            confirmed: config.confirmed.clone(),
            opened: Arc::new(opened),
            reverts: config.reverts_ms.map(instant_of),
            generation: config.generation,
            last_error: config.last_error.clone(),
        }),
        change: tokio::sync::Mutex::default(),
        gate: tokio::sync::RwLock::default(),
        threads: carried.threads,
        ops,
        state: memory,
        lock: carried.copy(carried.lock)?.into(),
        control,
        upgrade: Mutex::new(Some(carried.upgrade.clone())),
        upgrading: Arc::default(),
    });
    let opened = Arc::clone(&lock(&house.now).opened);
    let mut running = Vec::new();
    for worker in &carried.workers {
        let spec = opened.spec(worker.role).cloned();
        let spec = spec.ok_or_else(|| format!("worker {} runs and is not wanted", worker.role))?;
        let was = Running {
            pid: worker.pid,
            channel: carried.copy(worker.channel)?,
            build: worker.build.clone(),
            pings: worker.pings,
            next: worker.next,
            since: instant_of(worker.since_ms),
            restarts: worker.restarts,
            last_end: worker.last_end.clone(),
            owed: worker.owed.clone(),
        };
        running.push((worker.role, spec, was));
    }
    // No task runs before the next await, so that all of this or nothing has happened.
    for (role, spec, was) in running {
        house
            .adopt_worker(role, spec, was, kept.clone())
            .map_err(|error| format!("worker {role} cannot be looked after: {error}"))?;
    }
    house
        .control
        .serve(&house.ops)
        .map_err(|error| format!("the control socket cannot be served: {error}"))?;
    house.notify.alive();
    house.store_sockets(&held, &opened.sockets());
    house.forget_sockets(&held, &opened.sockets());
    for role in Role::ALL {
        let runs = lock(&house.workers).contains_key(&role);
        if let (Some(spec), false) = (opened.spec(role), runs) {
            drop(house.start_worker(role, spec.clone()).await);
        }
    }
    tracing::info!(build = %crate::build::own(), pid = std::process::id(), "took over");
    Ok(house)
}

//! Puts a configuration into effect, or changes nothing.
//!
//! ```text
//! load -> open -> lb takes it over -> the others do    -> store keeps it -> it is the running one
//!   \------\-----------\--------------------\-------------------\-> back to the one before, and why
//! ```

use std::{
    os::fd::AsFd,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    House, bad_request, could_not, lock,
    opening::{self, Opened, Sockets},
    tun,
};
use crate::{
    api::{Applied, Refusal},
    config::{self, Loaded},
    log, notify,
    worker::Role,
};

/// Wait before a revert that failed is tried again.
const AGAIN: Duration = Duration::from_secs(5);
/// For a worker that did not run before to get ready.
const FIRST_START: Duration = Duration::from_secs(5);

/// The configuration in effect.
pub(super) struct Now {
    pub(super) loaded: Loaded,
    /// The confirmed one's number in the history; 0 = none was kept.
    pub(super) revision: u64,
    /// The text of the confirmed one.
    pub(super) confirmed: String,
    pub(super) opened: Arc<Opened>,
    /// When it is taken back, unless it is confirmed.
    pub(super) reverts: Option<Instant>,
    /// Counts changes, so that a timer knows whether it still means the running one.
    pub(super) generation: u64,
    pub(super) last_error: Option<String>,
}

impl Now {
    /// Its number in the history, or the one it gets when it is confirmed.
    pub(super) fn number(&self) -> u64 {
        self.revision + u64::from(self.reverts.is_some())
    }

    /// Seconds until it is taken back.
    pub(super) fn reverts_in(&self) -> Option<u64> {
        self.reverts
            .map(|at| at.saturating_duration_since(Instant::now()).as_secs())
    }
}

/// Who wants a configuration, and from where.
pub(super) struct Origin {
    pub(super) author: String,
    pub(super) origin: String,
}

/// What becomes of a configuration that works.
enum Keep {
    /// Confirmed at once.
    Confirm,
    /// Taken back after this time.
    Until(Duration),
    /// It is the confirmed one already.
    Confirmed,
}

impl House {
    /// SIGHUP: the file, put into effect and confirmed.
    pub(super) async fn reload_file(self: Arc<Self>) {
        self.notify.reloading();
        let path = self.options.config.clone();
        let origin = Origin {
            author: "SIGHUP".into(),
            origin: path.display().to_string(),
        };
        // On a thread that may wait: the file may lie on a disk that hangs.
        let text = tokio::task::spawn_blocking(move || opening::read_config(&path));
        let text = text.await.unwrap_or_else(|error| Err(error.to_string()));
        match text {
            // Told and kept by `apply`.
            Ok(text) => drop(self.apply(text, origin, None).await),
            Err(message) => self.failed(&message, &origin),
        }
        self.notify.ready();
        self.tell_status();
    }

    /// Puts `text` into effect; without `confirm` for good, with it until that time is over.
    pub(super) async fn apply(
        self: &Arc<Self>,
        text: String,
        origin: Origin,
        confirm: Option<Duration>,
    ) -> Result<Applied, Refusal> {
        let _one_at_a_time = self.change.lock().await;
        self.apply_locked(text, origin, confirm.map_or(Keep::Confirm, Keep::Until))
            .await
    }

    /// Keeps what was applied with a deadline.
    pub(super) async fn confirm(self: &Arc<Self>, author: &str) -> Result<Applied, Refusal> {
        let _one_at_a_time = self.change.lock().await;
        let (text, origin) = {
            let now = lock(&self.now);
            if now.reverts.is_none() {
                return Err(bad_request(format!(
                    "there is nothing to confirm: configuration {} is confirmed; to apply one with a deadline: edgectl config apply --confirm 60s",
                    now.revision
                )));
            }
            (now.loaded.text.clone(), now.loaded.origin.clone())
        };
        self.keep_confirmed(
            text,
            &Origin {
                author: author.into(),
                origin,
            },
        )
        .await?;
        self.tell_status();
        Ok(self.applied(false))
    }

    /// Puts an earlier configuration into effect and confirms it.
    pub(super) async fn roll_back(self: &Arc<Self>, revision: Option<u64>, author: String) -> Result<Applied, Refusal> {
        let _one_at_a_time = self.change.lock().await;
        let (running, unconfirmed) = {
            let now = lock(&self.now);
            (now.revision, now.reverts.is_some())
        };
        let wanted = match revision {
            Some(wanted) => wanted,
            // What runs is not confirmed: the one before it is the confirmed one.
            None if unconfirmed => running,
            None => {
                let history = self.vault.call(|store| store.history()).await.map_err(could_not)?;
                let before = history
                    .iter()
                    .map(|revision| revision.revision)
                    .filter(|number| *number < running)
                    .max();
                before.ok_or_else(|| {
                    bad_request(format!(
                        "there is no configuration before {running}; see them: edgectl config history"
                    ))
                })?
            }
        };
        let found = self
            .vault
            .call(move |store| store.revision(wanted))
            .await
            .map_err(could_not)?;
        let found = found.ok_or_else(|| {
            bad_request(format!(
                "there is no configuration {wanted} any more; see them: edgectl config history"
            ))
        })?;
        let origin = Origin {
            author,
            origin: format!("configuration {wanted}"),
        };
        self.apply_locked(found.text, origin, Keep::Confirm).await
    }

    /// The deadline of generation `generation`.
    async fn revert(self: Arc<Self>, after: Duration, generation: u64) {
        tokio::time::sleep(after).await;
        loop {
            let guard = self.change.lock().await;
            let (text, revision) = {
                let now = lock(&self.now);
                if now.generation != generation || now.reverts.is_none() {
                    return;
                }
                (now.confirmed.clone(), now.revision)
            };
            tracing::warn!(
                revision,
                "nobody confirmed the configuration in time; going back to the confirmed one"
            );
            let origin = Origin {
                author: "deadline".into(),
                origin: format!("configuration {revision}"),
            };
            if self.apply_locked(text, origin, Keep::Confirmed).await.is_ok() {
                return self.tell_status();
            }
            drop(guard);
            tokio::time::sleep(AGAIN).await;
        }
    }

    pub(super) fn revert_after(self: &Arc<Self>, time: Duration, generation: u64) {
        tokio::spawn(Arc::clone(self).revert(time, generation));
    }

    async fn apply_locked(self: &Arc<Self>, text: String, origin: Origin, keep: Keep) -> Result<Applied, Refusal> {
        let result = self.try_apply(text, &origin, keep).await;
        match &result {
            Ok(_) => lock(&self.now).last_error = None,
            Err(refusal) => self.failed(&refusal.message, &origin),
        }
        self.tell_status();
        result
    }

    fn failed(&self, message: &str, origin: &Origin) {
        tracing::error!(
            author = origin.author,
            origin = origin.origin,
            "configuration refused; the one before goes on serving"
        );
        log::error_lines(message);
        lock(&self.now).last_error = Some(message.to_owned());
    }

    async fn try_apply(self: &Arc<Self>, text: String, origin: &Origin, keep: Keep) -> Result<Applied, Refusal> {
        let mut loaded = config::load(&text, &origin.origin).map_err(|faulty| bad_request(faulty.to_string()))?;
        let (before, old, unconfirmed) = {
            let now = lock(&self.now);
            (Arc::clone(&now.opened), now.loaded.clone(), now.reverts.is_some())
        };
        let opened = opening::open(&loaded, self.threads, &before.sockets(), &before.tuns()).map_err(bad_request)?;
        let opened = unchanged_specs(opened, &before, &old.text, &loaded.text);
        let same_text = loaded.text == old.text;
        // A file that it names may have changed all the same.
        let keep = if same_text && !unconfirmed && lock(&self.now).revision > 0 {
            Keep::Confirmed
        } else {
            keep
        };
        if same_text && opened == *before {
            match keep {
                Keep::Confirm if unconfirmed || lock(&self.now).revision == 0 => {
                    self.keep_confirmed(text, origin).await?
                }
                _ => tracing::info!(author = origin.author, "configuration unchanged"),
            }
            return Ok(self.applied(true));
        }
        loaded.warnings.extend(at_restart(&loaded, &old));
        // In the manager's store before the workers take over: a supervisor that dies in between loses nothing.
        self.store_sockets(&before.sockets(), &opened.sockets());
        let done = self.hand_over(&before, &opened).await;
        let kept = match (done, &keep) {
            (Ok(()), Keep::Confirm) => self.keep_confirmed_text(&text, origin).await.map(Some),
            (Ok(()), _) => Ok(None),
            (Err(message), _) => Err(message),
        };
        let revision = match kept {
            Ok(revision) => revision,
            Err(message) => {
                // Also what only half of the workers took over.
                if let Err(error) = self.hand_over(&opened, &before).await {
                    tracing::error!(
                        error,
                        "a worker did not go back to the configuration before; it is started again with it"
                    );
                }
                self.forget_sockets(&opened.sockets(), &before.sockets());
                tun::settle(&opened.tuns(), &before.tuns());
                return Err(could_not(message));
            }
        };
        let (sockets, tuns) = (opened.sockets(), opened.tuns());
        let deadline = {
            let mut now = lock(&self.now);
            log::change(&loaded.config.log);
            now.generation += 1;
            now.opened = Arc::new(opened);
            now.loaded = loaded;
            now.reverts = None;
            match keep {
                Keep::Until(time) => now.reverts = Some(Instant::now() + time),
                Keep::Confirm => now.confirmed = text,
                Keep::Confirmed => {}
            }
            if let Some(revision) = revision {
                now.revision = revision;
            }
            if let Keep::Until(time) = keep {
                Some((time, now.generation))
            } else {
                None
            }
        };
        self.forget_sockets(&before.sockets(), &sockets);
        tun::settle(&before.tuns(), &tuns);
        if let Some((time, generation)) = deadline {
            self.revert_after(time, generation);
        }
        let now = lock(&self.now);
        tracing::info!(
            author = origin.author,
            origin = origin.origin,
            revision = now.number(),
            reverts_in_s = now.reverts_in(),
            "configuration in effect"
        );
        drop(now);
        Ok(self.applied(false))
    }

    /// Gives every worker that is concerned the configuration `to` instead of `from`.
    async fn hand_over(&self, from: &Opened, to: &Opened) -> Result<(), String> {
        for role in Role::ALL {
            let keeper = lock(&self.workers).get(&role).cloned();
            match (to.spec(role), keeper) {
                (Some(spec), Some(_)) if from.spec(role) == Some(spec) => {}
                (Some(spec), Some(keeper)) => keeper
                    .reload(spec.clone())
                    .await
                    .map_err(|error| refused(role, &error))?,
                (Some(spec), None) => {
                    let ready = self.start_worker(role, spec.clone()).await;
                    let ready = tokio::time::timeout(FIRST_START, ready).await;
                    ready
                        .map_err(|_| refused(role, "it does not get ready; see its lines in the log"))?
                        .map_err(|_| refused(role, "it ended"))?;
                }
                (None, Some(keeper)) => {
                    keeper.stop(Duration::ZERO).await;
                    lock(&self.workers).remove(&role);
                }
                (None, None) => {}
            }
        }
        Ok(())
    }

    async fn keep_confirmed_text(&self, text: &str, origin: &Origin) -> Result<u64, String> {
        let (text, author, from) = (text.to_owned(), origin.author.clone(), origin.origin.clone());
        let kept = self
            .vault
            .call(move |store| store.confirm_config(&text, &author, &from))
            .await;
        kept.map(|revision| revision.revision)
            .map_err(|error| format!("the configuration could not be kept, so it is not in effect: {error}"))
    }

    /// Confirms what runs already.
    async fn keep_confirmed(&self, text: String, origin: &Origin) -> Result<(), Refusal> {
        let revision = self.keep_confirmed_text(&text, origin).await.map_err(could_not)?;
        let mut now = lock(&self.now);
        (now.revision, now.confirmed, now.reverts) = (revision, text, None);
        now.generation += 1;
        tracing::info!(author = origin.author, revision, "configuration confirmed");
        Ok(())
    }

    fn applied(&self, unchanged: bool) -> Applied {
        let now = lock(&self.now);
        Applied {
            revision: now.number(),
            unchanged,
            reverts_in_seconds: now.reverts_in(),
            warnings: now.loaded.warnings.clone(),
        }
    }

    /// Has the manager keep what is new in `to`.
    pub(super) fn store_sockets(&self, from: &Sockets, to: &Sockets) {
        for (place, copies) in to.iter().filter(|(place, _)| !from.contains_key(place)) {
            let copies: Vec<_> = copies.iter().map(|copy| copy.as_fd()).collect();
            self.notify.store(&notify::name_of(*place), &copies);
        }
    }

    /// Has the manager close what is no longer in `to`.
    pub(super) fn forget_sockets(&self, from: &Sockets, to: &Sockets) {
        for place in from.keys().filter(|place| !to.contains_key(place)) {
            self.notify.remove(&notify::name_of(*place));
        }
    }
}

fn refused(role: Role, error: &str) -> String {
    format!("worker {role} did not take the configuration over: {error}")
}

/// Leaves a worker alone whose part of the configuration is the same: its spec keeps the text it runs on.
fn unchanged_specs(mut opened: Opened, before: &Opened, old: &str, new: &str) -> Opened {
    let same = |paths: &[&[&str]]| {
        let (Ok(old), Ok(new)) = (old.parse::<toml::Table>(), new.parse::<toml::Table>()) else {
            return false;
        };
        paths.iter().all(|path| part(&old, path) == part(&new, path))
    };
    if same(&[&["lb"], &["log"]]) {
        opened.lb.text = Arc::clone(&before.lb.text);
    }
    if let (Some(dns64), Some(was)) = (&mut opened.dns64, &before.dns64)
        && same(&[&["dns64"], &["log"]])
    {
        dns64.text = Arc::clone(&was.text);
    }
    if let (Some(nat64), Some(was)) = (&mut opened.nat64, &before.nat64)
        && same(&[&["nat64"], &["log"]])
    {
        nat64.text = Arc::clone(&was.text);
    }
    if let (Some(web), Some(was)) = (&mut opened.web, &before.web)
        && same(&[&["control", "metrics"], &["control", "metrics_token_file"], &["log"]])
    {
        web.text = Arc::clone(&was.text);
    }
    opened
}

fn part<'a>(table: &'a toml::Table, path: &[&str]) -> Option<&'a toml::Value> {
    let (first, rest) = path.split_first()?;
    rest.iter().try_fold(table.get(*first)?, |value, key| value.get(key))
}

/// What cannot change while the daemon runs, as warnings.
fn at_restart(new: &Loaded, old: &Loaded) -> Vec<String> {
    let mut warnings = Vec::new();
    let mut warn = |span, key: &str| {
        let message = format!("{key} changes when edged is restarted");
        warnings.push(config::render(
            &new.text,
            &new.origin,
            span,
            &message,
            "restart it when it suits: systemctl restart edged",
        ));
    };
    if new.config.control.socket.value != old.config.control.socket.value {
        warn(new.config.control.socket.span.clone(), "control.socket");
    }
    let threads = |loaded: &Loaded| loaded.config.lb.threads.as_ref().map(|at| at.value);
    if threads(new) != threads(old) {
        warn(
            new.config.lb.threads.as_ref().map_or(0..0, |at| at.span.clone()),
            "lb.threads",
        );
    }
    warnings
}

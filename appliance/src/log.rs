//! Log lines to stderr: one event, one line, one write.
//!
//! | where stderr goes | text | json |
//! |---|---|---|
//! | the journal | `<6>lb: message key=value` | `<6>{...}` |
//! | elsewhere | `2026-01-01T00:00:00.000Z INFO lb: message key=value` | `{...}` |
//!
//! What others sent may be in a field; control characters are escaped, so that no line can be forged and no terminal
//! steered. Level and format can be changed while running.

use std::{
    fmt::{self, Write as _},
    io::Write as _,
    os::fd::AsFd,
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::SystemTime,
};

use serde_json::{Map, Value};
use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
    level_filters::LevelFilter,
};
use tracing_subscriber::{Layer, Registry, filter::Targets, layer::Context, layer::SubscriberExt, reload};

use crate::config::{Format, Log};

static JSON: AtomicBool = AtomicBool::new(false);
static FILTER: OnceLock<reload::Handle<Targets, Registry>> = OnceLock::new();

/// Starts logging for this process; `role` stands at the head of each line.
pub fn start(role: &'static str, log: &Log) {
    if FILTER.get().is_some() {
        return change(log);
    }
    let (filter, handle) = reload::Layer::new(targets(log));
    let lines = Lines {
        role,
        journal: to_journal(),
    };
    if FILTER.set(handle).is_ok() {
        JSON.store(log.format == Format::Json, Ordering::Relaxed);
        // Only a second start could fail here, and that one has returned above.
        let _ = tracing::subscriber::set_global_default(tracing_subscriber::registry().with(filter).with(lines));
    }
}

/// Puts another `[log]` section into effect.
pub fn change(log: &Log) {
    JSON.store(log.format == Format::Json, Ordering::Relaxed);
    if let Some(filter) = FILTER.get() {
        // Fails only when the subscriber is gone, and with it every reader of the level.
        let _ = filter.modify(|filter| *filter = targets(log));
    }
}

/// Logs a message of several lines, such as a configuration fault with its place, line by line.
pub fn error_lines(message: &str) {
    for line in message.lines() {
        tracing::error!("{line}");
    }
}

/// An error with its causes: `a: because of b: because of c`.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let _ = write!(text, ": {cause}");
        source = cause.source();
    }
    text
}

/// Our own crates at the configured level; libraries only when something is wrong.
fn targets(log: &Log) -> Targets {
    let level = match log.level {
        crate::config::Level::Error => LevelFilter::ERROR,
        crate::config::Level::Warn => LevelFilter::WARN,
        crate::config::Level::Info => LevelFilter::INFO,
        crate::config::Level::Debug => LevelFilter::DEBUG,
        crate::config::Level::Trace => LevelFilter::TRACE,
    };
    let targets = Targets::new().with_default(level.min(LevelFilter::WARN));
    targets
        .with_target("appliance", level)
        .with_target("edged", level)
        .with_target("lb", level)
}

/// Whether stderr is the journal: JOURNAL_STREAM names the device and inode it had when the unit started
/// (systemd.exec(5)); after a redirection they differ.
fn to_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else {
        return false;
    };
    let Ok(found) = rustix::fs::fstat(std::io::stderr().as_fd()) else {
        return false;
    };
    stream == format!("{}:{}", found.st_dev, found.st_ino)
}

struct Lines {
    role: &'static str,
    journal: bool,
}

impl<S: Subscriber> Layer<S> for Lines {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let json = JSON.load(Ordering::Relaxed);
        let line = self.line(event, json, SystemTime::now());
        // A log that cannot be written must not end what it reports on.
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
}

impl Lines {
    fn line(&self, event: &Event<'_>, json: bool, now: SystemTime) -> String {
        let level = *event.metadata().level();
        let mut fields = Fields::default();
        event.record(&mut fields);
        let mut line = String::new();
        if self.journal {
            let _ = write!(line, "<{}>", priority(level));
        }
        let time = humantime::format_rfc3339_millis(now);
        if json {
            let mut object = Map::new();
            object.insert("time".into(), Value::String(time.to_string()));
            object.insert("level".into(), Value::String(level.to_string().to_lowercase()));
            object.insert("role".into(), Value::String(self.role.into()));
            object.insert("message".into(), Value::String(fields.message));
            for (name, value) in fields.others {
                object.entry(name).or_insert(value);
            }
            line.push_str(&Value::Object(object).to_string());
        } else {
            if !self.journal {
                let _ = write!(line, "{time} {level:<5} ");
            }
            let _ = write!(line, "{}: ", self.role);
            escape(&fields.message, &mut line);
            for (name, value) in fields.others {
                let _ = write!(line, " {name}=");
                match value {
                    Value::String(text) if text.is_empty() || text.contains([' ', '"', '=']) => {
                        line.push('"');
                        escape(&text.replace('\\', "\\\\").replace('"', "\\\""), &mut line);
                        line.push('"');
                    }
                    Value::String(text) => escape(&text, &mut line),
                    other => {
                        let _ = write!(line, "{other}");
                    }
                }
            }
        }
        line.push('\n');
        line
    }
}

/// Priorities of sd-daemon(3).
fn priority(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        _ => 7,
    }
}

fn escape(text: &str, line: &mut String) {
    for c in text.chars() {
        // Unicode's own controls too: U+2028 breaks lines, U+202E turns text around.
        if c.is_control() || matches!(c, '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}') {
            let _ = write!(line, "{}", c.escape_default());
        } else {
            line.push(c);
        }
    }
}

#[derive(Default)]
struct Fields {
    message: String,
    others: Vec<(String, Value)>,
}

impl Fields {
    fn put(&mut self, field: &Field, value: Value) {
        match (field.name(), value) {
            ("message", Value::String(text)) => self.message = text,
            ("message", other) => self.message = other.to_string(),
            (name, value) => self.others.push((name.trim_start_matches("r#").to_owned(), value)),
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, Value::String(format!("{value:?}")));
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, Value::String(value.to_owned()));
    }
    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.put(field, Value::String(chain(value)));
    }
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value.into());
    }
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value.into());
    }
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, value.into());
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value.into());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    /// What `Lines` would have written.
    struct Kept(Lines, bool, Arc<Mutex<Vec<String>>>);

    impl<S: Subscriber> Layer<S> for Kept {
        fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
            self.2
                .lock()
                .expect("not poisoned")
                .push(self.0.line(event, self.1, SystemTime::UNIX_EPOCH));
        }
    }

    fn logged(journal: bool, json: bool, what: impl FnOnce()) -> Vec<String> {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let kept = Kept(Lines { role: "lb", journal }, json, Arc::clone(&lines));
        tracing::subscriber::with_default(tracing_subscriber::registry().with(kept), what);
        lines.lock().expect("not poisoned").clone()
    }

    #[test]
    fn a_line_cannot_be_forged_by_what_it_reports() {
        let lines = logged(false, false, || {
            tracing::warn!(name = "a\n<3>edged: b", esc = "\x1b[2J", "gone\r\nINFO all is well")
        });
        assert_eq!(
            lines,
            ["1970-01-01T00:00:00.000Z WARN  lb: gone\\r\\nINFO all is well name=\"a\\n<3>edged: b\" esc=\\u{1b}[2J\n"]
        );
    }

    #[test]
    fn the_journal_gets_a_priority_and_no_time() {
        let lines = logged(true, false, || tracing::error!(code = 7, "it ended"));
        assert_eq!(lines, ["<3>lb: it ended code=7\n"]);
    }

    #[test]
    fn json_is_one_object_per_line() {
        let lines = logged(false, true, || tracing::info!(sessions = 3, who = "a\nb", "drained"));
        assert_eq!(lines.len(), 1);
        assert_eq!(lines[0].matches('\n').count(), 1);
        let value: Value = serde_json::from_str(&lines[0]).expect("json");
        assert_eq!(
            (&value["message"], &value["sessions"], &value["who"]),
            (&"drained".into(), &3.into(), &"a\nb".into())
        );
        assert_eq!((&value["role"], &value["level"]), (&"lb".into(), &"info".into()));
    }
}

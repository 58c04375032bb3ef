//! From text to [`Loaded`] or [`Faulty`].

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::SocketAddr,
    ops::Range,
};

use serde::Deserialize;
use settings::{At, Fault};
use toml::de::{DeArray, DeTable, DeValue};

use super::{Config, Report, VERSION, report};

/// Faults shown at once; past these the operator has enough to do.
const MOST: usize = 20;
/// The kernel's limit on a socket path (unix(7): sun_path has 108 bytes, one of them the final zero).
const SOCKET_PATH: usize = 107;

/// A configuration that can be put into effect.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The typed configuration.
    pub config: Config,
    /// The text it was read from; the spans in `config` point into it.
    pub text: String,
    /// Where the text came from, as messages name it.
    pub origin: String,
    /// What the operator should know although it works, rendered.
    pub warnings: Vec<String>,
    /// The same, taken apart.
    pub reports: Vec<Report>,
}

/// A text that is no configuration, and every reason why.
#[derive(Clone, Debug)]
pub struct Faulty {
    /// In the order of the file.
    pub faults: Vec<Report>,
    /// Warnings that were found beside them.
    pub warnings: Vec<Report>,
}

/// The secrets a configuration refers to.
#[derive(Clone, Default)]
pub struct Secrets {
    /// Of `[control] metrics_token_file`.
    pub metrics_token: Option<Vec<u8>>,
}

/// Never shows a secret.
impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Secrets")
            .field("metrics_token", &self.metrics_token.as_ref().map(|_| "***"))
            .finish()
    }
}

impl fmt::Display for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, report) in self.faults.iter().chain(&self.warnings).enumerate() {
            let gap = if index > 0 { "\n\n" } else { "" };
            write!(f, "{gap}{report}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Faulty {}

/// Reads and checks the whole configuration; `origin` is how messages name the file.
///
/// # Errors
///
/// [`Faulty`] with every fault that could be found: of the syntax, else of keys and values, else of what they mean.
pub fn load(text: &str, origin: &str) -> Result<Loaded, Faulty> {
    let (table, errors) = DeTable::parse_recoverable(text);
    let mut found = Found {
        shown: mask(text, table.get_ref()),
        origin,
        faults: Vec::new(),
        warnings: Vec::new(),
    };
    if !errors.is_empty() {
        for error in errors.iter().take(MOST) {
            found.syntax(error);
        }
        return Err(found.faulty());
    }
    found.version(table.get_ref(), text);
    found.inline_secrets(table.get_ref());
    let Some(config) = found.typed(table) else {
        return Err(found.faulty());
    };
    if !found.faults.is_empty() {
        return Err(found.faulty());
    }
    found.across(&config);
    for fault in config.lb.check() {
        found.fault(fault);
    }
    for fault in config.dns64.iter().flat_map(dns64::Config::check) {
        found.fault(fault);
    }
    for fault in config.nat64.iter().flat_map(dns64::nat64::Config::check) {
        found.fault(fault);
    }
    if !found.faults.is_empty() {
        return Err(found.faulty());
    }
    found.warnings.sort_by_key(|report| (report.line, report.column));
    let warnings = found.warnings.iter().map(ToString::to_string).collect();
    Ok(Loaded {
        config,
        text: text.to_owned(),
        origin: origin.to_owned(),
        warnings,
        reports: found.warnings,
    })
}

impl Loaded {
    /// Shows `message` at `span` of this configuration, as its own faults are shown.
    pub fn render(&self, span: Range<usize>, message: &str, help: &str) -> String {
        report::render(&self.text, &self.origin, span, message, help)
    }
}

/// Faults and warnings on their way into a [`Loaded`] or a [`Faulty`].
struct Found<'a> {
    /// The text with inline secrets masked: the only one that is ever shown.
    shown: String,
    origin: &'a str,
    faults: Vec<Report>,
    warnings: Vec<Report>,
}

impl Found<'_> {
    fn faulty(mut self) -> Faulty {
        self.faults.sort_by_key(|report| (report.line, report.column));
        self.faults.truncate(MOST);
        Faulty {
            faults: self.faults,
            warnings: self.warnings,
        }
    }

    fn error(&mut self, span: Range<usize>, message: &str, help: &str) {
        self.faults
            .push(Report::new(&self.shown, self.origin, span, message, help));
    }

    fn fault(&mut self, fault: Fault) {
        let report = Report::new(&self.shown, self.origin, fault.span, &fault.message, &fault.help);
        if fault.warning {
            self.warnings.push(report.into_warning())
        } else {
            self.faults.push(report)
        }
    }

    fn syntax(&mut self, error: &toml::de::Error) {
        let span = error.span().unwrap_or(0..0);
        // `0..0` would mean "nowhere", but a syntax error has its place even there.
        let span = if span == (0..0) { 0..1 } else { span };
        let message = error.message().replace('`', "\"");
        let help = syntax_help(&self.shown, &span, &message);
        // What the parser says of one slip may come in several parts; the first names the cause.
        let line = |at: usize| self.shown[..at.min(self.shown.len())].matches('\n').count() + 1;
        if self.faults.iter().any(|fault| fault.line == Some(line(span.start))) {
            return;
        }
        self.error(span, &message, &help);
    }

    fn version(&mut self, table: &DeTable<'_>, text: &str) {
        let Some((_, value)) = entry(table, "version") else {
            let first = text.find(|c: char| !c.is_whitespace()).unwrap_or(0);
            let line = text[first..].find('\n').map_or(text.len(), |at| first + at);
            let message = "the file does not say which format it has";
            return self.error(
                first..line.max(first + 1),
                message,
                "write this as the first line: version = 1",
            );
        };
        let span = value.span();
        let (found, known) = match value.get_ref() {
            DeValue::Integer(number) => {
                let number = i64::from_str_radix(number.as_str(), number.radix());
                (
                    number
                        .as_ref()
                        .map_or_else(|_| "this number".to_owned(), ToString::to_string),
                    number == Ok(VERSION),
                )
            }
            _ => (self.shown.get(span.clone()).unwrap_or_default().to_owned(), false),
        };
        if !known {
            let help = "write version = 1; for a file of a later release, install that release";
            self.error(
                span,
                &format!("version {found} is unknown to this release of edged, which reads version {VERSION}"),
                help,
            );
        }
    }

    /// Refuses keys that ask for a secret in the text: the text is kept in a history, shown and copied.
    fn inline_secrets(&mut self, table: &DeTable<'_>) {
        for (path, key, _) in secrets(table) {
            let name = path.last().map_or("", String::as_str);
            let message = format!(
                "\"{name}\" would put a secret into the configuration, which is kept in the history and shown to readers"
            );
            let known = if path.first().is_some_and(|section| section == "control") {
                "metrics_token_file"
            } else {
                &format!("{name}_file")
            };
            let help = format!(
                "secrets are given by reference: write it to a file of mode 0600 and name that: {known} = \"/etc/edged/{name}\""
            );
            self.error(key, &message, &help);
        }
    }

    /// Reads the typed configuration. A fault's key is taken out and the rest read again, so that all are found.
    fn typed(&mut self, mut table: serde_spanned::Spanned<DeTable<'_>>) -> Option<Config> {
        // Reported already, each with more to say than serde has.
        let mut expected = BTreeSet::from(["version".to_owned()]);
        for (_, key, _) in secrets(table.get_ref()) {
            take(table.get_mut(), &key);
        }
        if let Some((key, _)) = entry(table.get_ref(), "version")
            && !self.faults.is_empty()
        {
            let span = key.span();
            take(table.get_mut(), &span);
        }
        loop {
            let error = match Config::deserialize(toml::Deserializer::from(table.clone())) {
                Ok(config) => return Some(config),
                Err(error) => error,
            };
            let span = error.span().unwrap_or(0..0);
            let wrong = Wrong::of(error.message());
            match &wrong {
                // It is missing because it was taken out, or because it is the key that was misspelt.
                Wrong::Missing(field) if expected.contains(field) => {}
                _ => {
                    let place = place(table.get_ref(), &span);
                    let (message, help, near) = wrong.explain(&self.shown, &span, &place);
                    expected.extend(near);
                    self.error(wrong.span(&self.shown, span.clone()), &message, &help);
                }
            }
            let name = take(table.get_mut(), &span)?;
            expected.insert(name);
            if self.faults.len() >= MOST {
                return None;
            }
        }
    }

    /// What no section can see alone.
    fn across(&mut self, config: &Config) {
        let control = &config.control;
        let mut taken: BTreeMap<SocketAddr, String> = BTreeMap::new();
        for at in &config.lb.health {
            taken.insert(at.value, "the balancer's health endpoint".into());
        }
        for frontend in &config.lb.frontend {
            for at in &frontend.listen {
                taken.insert(at.value, format!("frontend \"{}\"", frontend.name.value));
            }
        }
        for at in config.dns64.iter().flat_map(|dns64| &dns64.listen) {
            if let Some(owner) = taken.insert(at.value, "the resolver".into()) {
                self.error(
                    at.span.clone(),
                    &format!("{} is already the listener of {owner}", at.value),
                    "give each listener an address and port of its own",
                );
            }
        }
        self.one_prefix(config);
        for at in &control.metrics {
            self.metrics(at, &mut taken, control.metrics_token_file.is_some());
        }
        let socket = &control.socket;
        if !socket.is_absolute() {
            self.error(
                socket.span.clone(),
                "the control socket needs an absolute path: edgectl may run anywhere",
                "write socket = \"/run/edged/edged.sock\"",
            );
        } else if socket.as_os_str().len() > SOCKET_PATH {
            self.error(
                socket.span.clone(),
                "the kernel takes socket paths of at most 107 bytes",
                "write socket = \"/run/edged/edged.sock\"",
            );
        }
        if let Some(at) = control.metrics_token_file.as_ref().filter(|at| !at.is_absolute()) {
            self.error(
                at.span.clone(),
                "a secret file needs an absolute path",
                "write metrics_token_file = \"/etc/edged/metrics-token\"",
            );
        }
    }

    /// The translator must understand the addresses that the resolver makes.
    fn one_prefix(&mut self, config: &Config) {
        let (Some(dns64), Some(nat64)) = (&config.dns64, &config.nat64) else {
            return;
        };
        let Some(prefix) = nat64.prefix() else { return };
        let served: Vec<dns64::Pref64> = dns64.rules().mappings.iter().map(|mapping| mapping.prefix).collect();
        if !served.contains(&prefix) {
            let served: Vec<String> = served.iter().map(|prefix| format!("\"{prefix}\"")).collect();
            let help = match served.is_empty() {
                true => format!("write prefixes = [\"{prefix}\"] in [dns64], or prefix = \"none\" here"),
                false => format!(
                    "write prefix = {}, or add this one to dns64.prefixes",
                    served.join(" or ")
                ),
            };
            let message = format!("the resolver makes no addresses under {prefix}, so nobody would come here");
            self.error(nat64.prefix.span.clone(), &message, &help);
        }
    }

    fn metrics(&mut self, at: &At<SocketAddr>, taken: &mut BTreeMap<SocketAddr, String>, token: bool) {
        if at.port() == 0 {
            self.error(
                at.span.clone(),
                "port 0 would listen somewhere nobody knows",
                "write metrics = [\"[::1]:9464\"]",
            );
        }
        let owner = taken.insert(at.value, "metrics".into());
        if let Some(owner) = owner {
            // The default is written nowhere; the message has to say how to change it.
            let help = if at.span.is_empty() {
                "metrics listen there unless [control] metrics says otherwise: move one of the two"
            } else {
                "give each listener an address and port of its own"
            };
            self.error(
                at.span.clone(),
                &format!("{} is already the listener of {owner}", at.value),
                help,
            );
        }
        if !at.ip().to_canonical().is_loopback() {
            let effect = if token {
                "the token and the metrics cross the network in the clear"
            } else {
                "whoever reaches it can read every metric"
            };
            let report = Report::new(
                &self.shown,
                self.origin,
                at.span.clone(),
                &format!("metrics on {}: {effect}", at.value),
                "listen on [::1]:9464, or make sure that only the monitoring network reaches this address",
            );
            self.warnings.push(report.into_warning());
        }
    }
}

/// A message of serde, taken apart.
enum Wrong {
    Key(String, Vec<String>),
    Variant(String, Vec<String>),
    Missing(String),
    Other(String),
}

impl Wrong {
    fn of(message: &str) -> Self {
        let named = |prefix: &str| {
            let rest = message.strip_prefix(prefix)?;
            let (name, list) = rest
                .rsplit_once("`, expected ")
                .or_else(|| rest.rsplit_once("`, there are no "))?;
            let expected = list.split('`').skip(1).step_by(2).map(str::to_owned).collect();
            Some((name.to_owned(), expected))
        };
        if let Some((name, expected)) = named("unknown field `") {
            return Self::Key(name, expected);
        }
        if let Some((name, expected)) = named("unknown variant `") {
            return Self::Variant(name, expected);
        }
        match message
            .strip_prefix("missing field `")
            .and_then(|rest| rest.strip_suffix('`'))
        {
            Some(name) => Self::Missing(name.to_owned()),
            None => Self::Other(message.to_owned()),
        }
    }

    /// Message, help, and the key that was probably meant.
    fn explain(&self, text: &str, span: &Range<usize>, place: &[String]) -> (String, String, Option<String>) {
        match self {
            Self::Key(name, expected) => {
                let near = nearest(name, expected);
                let help = match near {
                    Some(near) => format!("did you mean \"{near}\"?"),
                    None if place.is_empty() => format!("a file has: {}", expected.join(", ")),
                    None => format!("[{}] has: {}", place.join("."), expected.join(", ")),
                };
                (format!("unknown key \"{name}\""), help, near.map(str::to_owned))
            }
            Self::Variant(name, expected) => {
                let list = || {
                    expected
                        .iter()
                        .map(|one| format!("\"{one}\""))
                        .collect::<Vec<_>>()
                        .join(", ")
                };
                let help = nearest(name, expected).map_or_else(
                    || format!("write one of {}", list()),
                    |near| format!("did you mean \"{near}\"? there are {}", list()),
                );
                let what = place.last().map_or("value", String::as_str);
                (format!("unknown {what} \"{name}\""), help, None)
            }
            Self::Missing(name) => {
                let whole = place.join(".");
                (
                    format!("[{whole}] has no \"{name}\""),
                    format!("add {name} = {}", example(name)),
                    None,
                )
            }
            Self::Other(message) => {
                let value = text.get(span.clone()).unwrap_or_default().trim();
                let (message, help) = other(message, value);
                (message, help, None)
            }
        }
    }

    /// A missing key is shown at the head of its table, not over all its lines.
    fn span(&self, text: &str, span: Range<usize>) -> Range<usize> {
        let first = text
            .get(span.clone())
            .and_then(|words| words.find('\n'))
            .map_or(span.end, |at| span.start + at);
        span.start..first.max(span.start + 1)
    }
}

/// Says in the operator's words what a value is and what it should be.
fn other(message: &str, value: &str) -> (String, String) {
    if message == "invalid socket address syntax" {
        let help = if value.contains(':') {
            "write ADDRESS:PORT, an IPv6 address in brackets: \"[::1]:9464\""
        } else {
            "write ADDRESS:PORT, such as \"127.0.0.1:9464\" or \"[::1]:9464\""
        };
        return (format!("{value} is no address with a port"), help.into());
    }
    if let Some((got, wanted)) = message
        .strip_prefix("invalid type: ")
        .and_then(|rest| rest.split_once(", expected "))
    {
        let got = got.split_whitespace().next().unwrap_or(got);
        let (kind, help) = match wanted {
            "a string" | "path string" | "socket address" => ("text", "put it in quotes"),
            "a boolean" => ("true or false", "write it without quotes"),
            "a sequence" => ("a list", "write it in brackets: [\"...\"]"),
            w if w.starts_with(['u', 'i']) && w[1..].bytes().all(|b| b.is_ascii_digit()) => {
                ("a whole number", "write it without quotes")
            }
            w if w.starts_with("struct ") => ("a table", "write { key = value }, or a [section] of its own"),
            w => (w, ""),
        };
        let got = match got {
            "integer" => "a whole number",
            "floating" => "a decimal number",
            "map" => "a table",
            "sequence" => "a list",
            "boolean" => "true or false",
            _ => "text",
        };
        return (format!("this is {got}, where {kind} is needed"), help.into());
    }
    if let Some((got, wanted)) = message
        .strip_prefix("invalid value: ")
        .and_then(|rest| rest.split_once(", expected "))
    {
        let most = match wanted {
            "u8" => Some(u64::from(u8::MAX)),
            "u16" => Some(u64::from(u16::MAX)),
            "u32" => Some(u64::from(u32::MAX)),
            _ => None,
        };
        let help = most.map_or_else(
            || format!("write {wanted}"),
            |most| format!("write a whole number from 0 to {most}"),
        );
        return (
            format!("{} is out of range", got.replace("integer ", "").replace('`', "")),
            help,
        );
    }
    // The sections' own messages give cause and remedy in one line.
    match message.split_once("; ") {
        Some((cause, help)) => (cause.to_owned(), help.to_owned()),
        None => (message.to_owned(), String::new()),
    }
}

fn example(key: &str) -> &'static str {
    match key {
        "name" => "\"api\"",
        "listen" => "[\"[::1]:16443\", \"127.0.0.1:16443\"]",
        "backends" => "[\"[fd00::11]:6443\"]",
        "kind" => "\"tcp\"",
        "address" => "\"[fd00::11]:6443\"",
        "version" => "1",
        _ => "...",
    }
}

fn syntax_help(text: &str, span: &Range<usize>, message: &str) -> String {
    let rest = text.get(span.start..).unwrap_or_default();
    let line_start = text
        .get(..span.start)
        .unwrap_or_default()
        .rfind('\n')
        .map_or(0, |at| at + 1);
    let line = text[line_start..].lines().next().unwrap_or_default();
    if message.starts_with("duplicate key") {
        return "a key stands once in its table; remove one of the two".into();
    }
    let value = line.split_once('=').map_or("", |(_, value)| value.trim());
    let bare = value.starts_with(|c: char| c.is_ascii_alphabetic())
        && !value.starts_with("true")
        && !value.starts_with("false");
    if bare || value.starts_with(|c: char| c.is_ascii_digit()) && value.contains([':', '.']) && !value.contains('"') {
        let value = value.split_once('#').map_or(value, |(value, _)| value.trim());
        return format!("text, addresses and durations stand in quotes: \"{value}\"");
    }
    if line.contains(':') && !line.contains('=') {
        return "this file is TOML, not YAML: write key = value, and sections as [name]".into();
    }
    if message.contains(" string, expected") {
        return "a quote is opened and not closed: text ends with the quote it began with, on the same line".into();
    }
    if rest.trim().is_empty() || message.contains("unclosed") {
        "something opened before is not closed: a quote, a bracket or a brace".into()
    } else {
        String::new()
    }
}

/// The one of `list` that `word` was probably meant to be.
pub(crate) fn nearest<'a, S: AsRef<str>>(word: &str, list: &'a [S]) -> Option<&'a str> {
    let plain = |word: &str| word.to_lowercase().replace(['-', '_'], "");
    let word = plain(word);
    list.iter()
        .map(|one| (strsim::jaro_winkler(&word, &plain(one.as_ref())), one.as_ref()))
        .filter(|(score, _)| *score >= 0.8)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, one)| one)
}

type Entry<'a, 'i> = (
    &'a serde_spanned::Spanned<toml::de::DeString<'i>>,
    &'a serde_spanned::Spanned<DeValue<'i>>,
);

fn entry<'a, 'i>(table: &'a DeTable<'i>, name: &str) -> Option<Entry<'a, 'i>> {
    table.iter().find(|(key, _)| key.get_ref().as_ref() == name)
}

/// Keys that ask for a secret itself: their path, their span and their value's.
fn secrets(table: &DeTable<'_>) -> Vec<(Vec<String>, Range<usize>, Range<usize>)> {
    let mut found = Vec::new();
    visit(table, &mut Vec::new(), &mut |path, key, value| {
        let name = path.last().map_or("", String::as_str).to_lowercase().replace('-', "_");
        let words = [
            "password",
            "passphrase",
            "token",
            "private_key",
            "secret",
            "psk",
            "preshared_key",
        ];
        if words
            .iter()
            .any(|word| name == *word || name.ends_with(&format!("_{word}")))
            && !value.get_ref().is_table()
        {
            found.push((path.to_vec(), key, value.span()));
        }
    });
    found
}

/// `text` with the values of inline secrets starred out, byte for byte, so that no message shows one.
fn mask(text: &str, table: &DeTable<'_>) -> String {
    let mut bytes = text.as_bytes().to_vec();
    for (_, _, value) in secrets(table) {
        if let Some(bytes) = bytes.get_mut(value) {
            bytes
                .iter_mut()
                .filter(|byte| **byte != b'\n')
                .for_each(|byte| *byte = b'*');
        }
    }
    String::from_utf8(bytes).unwrap_or_default()
}

type Each<'a> = dyn FnMut(&[String], Range<usize>, &serde_spanned::Spanned<DeValue<'_>>) + 'a;

/// Calls `each` with the path, the key's span and the value of every key, tables and arrays entered.
fn visit(table: &DeTable<'_>, path: &mut Vec<String>, each: &mut Each<'_>) {
    for (key, value) in table {
        path.push(key.get_ref().to_string());
        each(path, key.span(), value);
        visit_value(value.get_ref(), path, each);
        path.pop();
    }
}

fn visit_value(value: &DeValue<'_>, path: &mut Vec<String>, each: &mut Each<'_>) {
    match value {
        DeValue::Table(table) => visit(table, path, each),
        DeValue::Array(array) => array.iter().for_each(|value| visit_value(value.get_ref(), path, each)),
        _ => {}
    }
}

/// The names of the tables around `span`, its own included if it is a value's; without array indices.
fn place(table: &DeTable<'_>, span: &Range<usize>) -> Vec<String> {
    let mut best: Vec<String> = Vec::new();
    visit(table, &mut Vec::new(), &mut |path, key, value| {
        if key == *span {
            best = path[..path.len() - 1].to_vec();
        } else if value.span() == *span || holds(value.get_ref(), span) {
            best = path.to_vec();
        }
    });
    best
}

fn holds(value: &DeValue<'_>, span: &Range<usize>) -> bool {
    matches!(value, DeValue::Array(array) if array.iter().any(|value| value.span() == *span || holds(value.get_ref(), span)))
}

/// Takes the key or value at `span` out of the table and returns the key's name; `None` if there is none.
///
/// The innermost goes: an array of tables has the span of its first element.
fn take(table: &mut DeTable<'_>, span: &Range<usize>) -> Option<String> {
    let inner = table.iter_mut().find_map(|(key, value)| {
        take_value(value.get_mut(), span).map(|name| name.unwrap_or_else(|| key.get_ref().to_string()))
    });
    if inner.is_some() {
        return inner;
    }
    let at = table
        .iter()
        .find(|(key, value)| key.span() == *span || value.span() == *span);
    let key = at.map(|(key, _)| key.clone())?;
    table.remove(&key);
    Some(key.into_inner().into_owned())
}

/// As [`take`]; `Some(None)` if the value was an element of an array.
fn take_value(value: &mut DeValue<'_>, span: &Range<usize>) -> Option<Option<String>> {
    match value {
        DeValue::Table(table) => take(table, span).map(Some),
        DeValue::Array(array) => {
            if let Some(name) = array.iter_mut().find_map(|value| take_value(value.get_mut(), span)) {
                return Some(name);
            }
            let index = array.iter().position(|value| value.span() == *span)?;
            let kept = std::mem::replace(array, DeArray::new()).into_iter().enumerate();
            *array = kept
                .filter(|(at, _)| *at != index)
                .map(|(_, value)| value)
                .collect::<DeArray<'_>>();
            Some(None)
        }
        _ => None,
    }
}

//! How `edgectl` writes: colours on a terminal only, aligned tables, numbers for people.

use std::{
    fmt::Write as _,
    io::{IsTerminal, Write as _},
    time::Duration,
};

use lb::status::State;

/// Where output goes and how.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Out {
    pub(crate) json: bool,
    pub(crate) colour: bool,
}

/// The colours in use; words always say the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ink {
    Plain,
    Bold,
    Dim,
    Good,
    Warn,
    Bad,
}

/// One cell of a table.
#[derive(Clone, Debug)]
pub(crate) struct Cell {
    text: String,
    ink: Ink,
}

/// Columns as wide as their widest cell; the last one ragged.
#[derive(Debug, Default)]
pub(crate) struct Table {
    rows: Vec<Vec<Cell>>,
}

impl Out {
    /// Colours only for a person: a terminal, and no wish to the contrary (no-color.org).
    pub(crate) fn new(json: bool) -> Self {
        let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
        Self {
            json,
            colour: !json && !unwanted && !dumb && std::io::stdout().is_terminal(),
        }
    }

    pub(crate) fn ink(self, ink: Ink, text: &str) -> String {
        let code = match ink {
            Ink::Plain => "",
            Ink::Bold => "1",
            Ink::Dim => "2",
            Ink::Good => "32",
            Ink::Warn => "33",
            Ink::Bad => "31",
        };
        if self.colour && !code.is_empty() {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }

    /// Writes to stdout. A reader that has gone (`| head`) is no error.
    pub(crate) fn print(self, text: &str) {
        let _ = self.write(text);
    }

    /// As [`Out::print`]; `false` if the reader has gone.
    pub(crate) fn write(self, text: &str) -> bool {
        let mut stdout = std::io::stdout().lock();
        let end = if text.ends_with('\n') { "" } else { "\n" };
        stdout
            .write_all(text.as_bytes())
            .and_then(|()| stdout.write_all(end.as_bytes()))
            .and_then(|()| stdout.flush())
            .is_ok()
    }

    pub(crate) fn print_json(self, value: &serde_json::Value) {
        self.print(&serde_json::to_string_pretty(value).unwrap_or_default());
    }

    /// A rendered fault with its first line bold and its caret red.
    pub(crate) fn report(self, text: &str) -> String {
        if !self.colour {
            return text.to_owned();
        }
        let mut shown = Vec::new();
        let mut head = true;
        for line in text.lines() {
            let trimmed = line.trim_start();
            let caret = trimmed
                .strip_prefix("| ")
                .is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|b| b == b' ' || b == b'^'));
            shown.push(match () {
                () if head && !trimmed.is_empty() => self.ink(Ink::Bold, line),
                () if caret => self.ink(Ink::Bad, line),
                () if trimmed.starts_with("= ") => self.ink(Ink::Good, line),
                () => line.to_owned(),
            });
            head = trimmed.is_empty();
        }
        shown.join("\n")
    }
}

impl Cell {
    pub(crate) fn new(text: impl AsRef<str>) -> Self {
        Self::inked(text, Ink::Plain)
    }

    pub(crate) fn inked(text: impl AsRef<str>, ink: Ink) -> Self {
        Self {
            text: clean(text.as_ref()),
            ink,
        }
    }
}

impl<T: AsRef<str>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self::new(text)
    }
}

impl Table {
    pub(crate) fn new(head: &[&str]) -> Self {
        Self {
            rows: vec![head.iter().map(|title| Cell::inked(title, Ink::Dim)).collect()],
        }
    }

    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = Cell>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// `indent` spaces before each line.
    pub(crate) fn show(&self, out: Out, indent: usize) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            self.rows
                .iter()
                .filter_map(|row| row.get(column))
                .map(|cell| cell.text.chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = " ".repeat(indent);
            let last = row.iter().rposition(|cell| !cell.text.is_empty()).unwrap_or(0);
            for (column, cell) in row.iter().enumerate().take(last + 1) {
                line.push_str(&out.ink(cell.ink, &cell.text));
                if column < last {
                    let pad = widths[column].saturating_sub(cell.text.chars().count()) + 2;
                    line.push_str(&" ".repeat(pad));
                }
            }
            let _ = writeln!(text, "{line}");
        }
        text
    }
}

/// The colour of a backend's state.
pub(crate) fn ink_of(state: State) -> Ink {
    match state {
        State::Healthy => Ink::Good,
        State::Drained | State::NotReady | State::Probing => Ink::Warn,
        State::Down | State::Banned | State::Unresolved => Ink::Bad,
    }
}

/// `4 s`, `3 min 12 s`, `5 h 3 min`, `12 d 4 h`: two units are enough.
pub(crate) fn duration(seconds: u64) -> String {
    let two = |big: u64, big_unit: &str, small: u64, small_unit: &str| {
        if small == 0 {
            format!("{big} {big_unit}")
        } else {
            format!("{big} {big_unit} {small} {small_unit}")
        }
    };
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => two(seconds / 60, "min", seconds % 60, "s"),
        3600..86_400 => two(seconds / 3600, "h", seconds % 3600 / 60, "min"),
        _ => two(seconds / 86_400, "d", seconds % 86_400 / 3600, "h"),
    }
}

/// As [`duration`], with milliseconds below ten seconds.
pub(crate) fn millis(ms: u64) -> String {
    match ms {
        0..1000 => format!("{ms} ms"),
        1000..10_000 => format!("{}.{} s", ms / 1000, ms % 1000 / 100),
        _ => duration(Duration::from_millis(ms).as_secs()),
    }
}

/// Exact up to five digits, then `123k`, `4.5M`.
pub(crate) fn count(number: u64) -> String {
    scaled(number, 1000, 100_000, &["", "k", "M", "G", "T", "P", "E"])
}

/// `512 B`, `1.2 KiB`, `3.4 GiB`.
pub(crate) fn bytes(number: u64) -> String {
    scaled(
        number,
        1024,
        1024,
        &[" B", " KiB", " MiB", " GiB", " TiB", " PiB", " EiB"],
    )
}

fn scaled(number: u64, base: u64, exact_below: u64, units: &[&str]) -> String {
    if number < exact_below {
        return format!("{number}{}", units[0]);
    }
    let (mut whole, mut tenths, mut unit) = (number, 0, 0);
    while whole >= base && unit + 1 < units.len() {
        tenths = whole % base * 10 / base;
        whole /= base;
        unit += 1;
    }
    if whole < 10 {
        format!("{whole}.{tenths}{}", units[unit])
    } else {
        format!("{whole}{}", units[unit])
    }
}

/// `1 backend`, `2 backends`.
pub(crate) fn plural(number: usize, thing: &str) -> String {
    if number == 1 {
        format!("1 {thing}")
    } else {
        format!("{number} {thing}s")
    }
}

/// Names come from files and networks: nothing in them may steer the terminal.
pub(crate) fn clean(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_for_people() {
        assert_eq!(
            [0, 59, 60, 61, 3600, 11_520, 90_000].map(duration),
            ["0 s", "59 s", "1 min", "1 min 1 s", "1 h", "3 h 12 min", "1 d 1 h"]
        );
        assert_eq!([7, 1500, 12_000].map(millis), ["7 ms", "1.5 s", "12 s"]);
        assert_eq!(
            [0, 99_999, 123_456, 1_500_000, u64::MAX].map(count),
            ["0", "99999", "123k", "1.5M", "18E"]
        );
        assert_eq!(
            [0, 1023, 1536, 10 << 30, u64::MAX].map(bytes),
            ["0 B", "1023 B", "1.5 KiB", "10 GiB", "15 EiB"]
        );
    }

    #[test]
    fn a_table_is_aligned_and_escape_sequences_are_not_passed_on() {
        let mut table = Table::new(&["NAME", "STATE"]);
        table.row(["a\x1b[31m".into(), Cell::inked("up", Ink::Good)]);
        table.row(["longer".into(), "".into()]);
        let plain = Out {
            json: false,
            colour: false,
        };
        assert_eq!(table.show(plain, 1), " NAME    STATE\n a\u{fffd}[31m  up\n longer\n");
    }
}

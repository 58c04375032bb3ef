//! A fault as an operator reads it: file:line:column, the line, a caret under the words, the remedy.

use std::{fmt, ops::Range};

use serde::Serialize;

/// Columns of a source line that are shown; the part around the fault if the line is longer.
const WIDTH: usize = 100;
const TAB: usize = 4;

/// One fault or warning, ready to be shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The file as it was named.
    pub file: String,
    /// From 1; `None` if no line is at fault (a default, the file as a whole).
    pub line: Option<usize>,
    /// In characters, from 1.
    pub column: Option<usize>,
    /// Cause and effect.
    pub message: String,
    /// What to do about it; may be empty.
    pub help: String,
    /// A warning lets the configuration through.
    pub warning: bool,
    /// The line with tabs widened and long ends cut off, and the columns the caret covers.
    #[serde(skip)]
    snippet: Option<(String, Range<usize>)>,
}

/// Shows `message` at `span` of `text`, which was read from `origin`, as [`Report`] prints it.
///
/// An empty `span` at 0 is a value that is written nowhere (a default): no line is shown. A span that does not fit
/// `text` is cut to it.
pub fn render(text: &str, origin: &str, span: Range<usize>, message: &str, help: &str) -> String {
    Report::new(text, origin, span, message, help).to_string()
}

impl Report {
    /// As [`render`], not yet printed.
    pub fn new(text: &str, origin: &str, span: Range<usize>, message: &str, help: &str) -> Self {
        let mut report = Self {
            file: clean(origin),
            line: None,
            column: None,
            message: clean(message),
            help: clean(help),
            warning: false,
            snippet: None,
        };
        if span == (0..0) {
            return report;
        }
        let start = floor(text, span.start);
        let end = floor(text, span.end.max(start));
        let line_start = text[..start].rfind('\n').map_or(0, |at| at + 1);
        let line_end = text[start..].find('\n').map_or(text.len(), |at| start + at);
        let line = text[line_start..line_end].trim_end_matches('\r');
        report.line = Some(text[..start].matches('\n').count() + 1);
        report.column = Some(text[line_start..start].chars().count() + 1);
        report.snippet = Some(snippet(
            line,
            start - line_start,
            end.min(line_start + line.len()).saturating_sub(line_start),
        ));
        report
    }

    /// The same as a warning.
    #[must_use]
    pub fn into_warning(mut self) -> Self {
        self.warning = true;
        self
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.file)?;
        if let (Some(line), Some(column)) = (self.line, self.column) {
            write!(f, ":{line}:{column}")?;
        }
        let kind = if self.warning { "warning: " } else { "" };
        write!(f, ": {kind}{}", self.message)?;
        let mut gutter = 2;
        if let (Some(line), Some((source, caret))) = (self.line, &self.snippet) {
            gutter = line.to_string().len();
            let (blank, carets) = (" ".repeat(caret.start), "^".repeat(caret.len().max(1)));
            write!(
                f,
                "\n{:gutter$} |\n{line} | {source}\n{:gutter$} | {blank}{carets}",
                "", ""
            )?;
        }
        for line in self.help.lines() {
            write!(f, "\n{:gutter$} = {line}", "")?;
        }
        Ok(())
    }
}

/// `line` as shown, and the columns that bytes `start..end` of it cover.
fn snippet(line: &str, start: usize, end: usize) -> (String, Range<usize>) {
    let mut shown: Vec<char> = Vec::with_capacity(line.len());
    let (mut from, mut to) = (None, None);
    for (at, c) in line.char_indices() {
        if at >= start {
            from.get_or_insert(shown.len());
        }
        if at >= end {
            to.get_or_insert(shown.len());
        }
        match c {
            '\t' => shown.resize((shown.len() / TAB + 1) * TAB, ' '),
            // A control character of the file must not steer the terminal.
            c if c.is_control() => shown.push('\u{fffd}'),
            c => shown.push(c),
        }
    }
    let from = from.unwrap_or(shown.len());
    let to = to.unwrap_or(shown.len()).max(from);
    if shown.len() <= WIDTH {
        return (shown.into_iter().collect(), from..to);
    }
    // A third of the width before the fault is context enough.
    let cut = from.saturating_sub(WIDTH / 3).min(shown.len() - WIDTH);
    let last = (cut + WIDTH).min(shown.len());
    let (head, tail) = (
        if cut > 0 { "... " } else { "" },
        if last < shown.len() { " ..." } else { "" },
    );
    let middle: String = shown[cut..last].iter().collect();
    let shift = head.len();
    (
        format!("{head}{middle}{tail}"),
        from - cut + shift..to.min(last) - cut + shift,
    )
}

/// The last character boundary of `text` that is not after `at`.
fn floor(text: &str, at: usize) -> usize {
    let mut at = at.min(text.len());
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

/// Without what would steer a terminal; line breaks stay.
fn clean(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() && c != '\n' { '\u{fffd}' } else { c })
        .collect()
}

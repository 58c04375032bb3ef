//! A configuration file: every text is a configuration or gets messages that point into it; differences are told of any
//! two texts.

use std::ops::Range;

use serde::Deserialize;

use crate::appliance::config;

/// `[lb]` alone, to see the spans that messages are made of.
#[derive(Deserialize)]
struct File {
    #[serde(default)]
    lb: lb::Config,
}

/// `bytes` are the content of the file; behind a zero byte, that of the file before.
pub fn run(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else { return };
    let (text, before) = text.split_once('\0').unwrap_or((text, ""));
    match config::load(text, "edged.toml") {
        Ok(loaded) => {
            reports(&loaded.reports, text);
            for need in lb::needs(&loaded.config.lb, 4) {
                inside(&need.span, text);
                let _ = loaded.render(need.span, "cannot be opened", "try another");
            }
        }
        Err(faulty) => {
            assert!(!faulty.faults.is_empty(), "refused without a reason");
            reports(&faulty.faults, text);
            reports(&faulty.warnings, text);
            assert!(!faulty.to_string().is_empty());
        }
    }
    let _ = config::changes(before, text);
    let _ = config::unified(before, text, "before", "after");
    if let Ok(file) = toml::from_str::<File>(text) {
        for fault in file.lb.check() {
            inside(&fault.span, text);
            assert!(!fault.message.is_empty());
        }
        for need in lb::needs(&file.lb, 4) {
            inside(&need.span, text);
        }
    }
}

fn reports(reports: &[config::Report], text: &str) {
    let lines = text.matches('\n').count() + 1;
    for report in reports {
        assert!(report.line.is_none_or(|line| (1..=lines).contains(&line)), "{report:?}");
        assert!(
            !report.message.is_empty() && !report.to_string().is_empty(),
            "{report:?}"
        );
    }
}

/// A span of whole characters of `text`.
fn inside(span: &Range<usize>, text: &str) {
    assert!(text.get(span.clone()).is_some(), "{span:?} of {} bytes", text.len());
}

//! The metrics page: its text to the letter, and that it is what the format allows.

mod common;

use std::collections::{BTreeMap, BTreeSet};

use appliance::metrics::render;

/// `BLESS=1 cargo test` writes the golden page anew; read the difference before it is committed.
#[test]
fn the_page_is_as_published() {
    let page = render(&common::status());
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/metrics.txt"), &page).expect("written");
    }
    let golden = include_str!("golden/metrics.txt");
    for (number, (is, should)) in page.lines().zip(golden.lines()).enumerate() {
        assert_eq!(is, should, "line {}", number + 1);
    }
    assert_eq!(page.lines().count(), golden.lines().count());
}

#[test]
fn every_line_is_valid_and_no_series_comes_twice() {
    let mut status = common::status();
    check(&render(&status));
    // Names that the configuration would refuse cannot break the page either.
    let lb = status.lb.as_mut().expect("a balancer");
    lb.frontends[0].name = "a\"b\\c\nd{}=,é".into();
    status.version = "\\\n\"".into();
    let dns = status.dns.as_mut().expect("a resolver");
    dns.upstreams[1].domain = "a\"b\\c\nd{}=,é".into();
    dns.resolved.push(("\\\"\n".into(), 1));
    // The same server twice is one series.
    let twice = dns.upstreams[0].servers[0].clone();
    dns.upstreams[0].servers.push(twice);
    check(&render(&status));
    // While the balancer is away the rest is told.
    status.lb = None;
    status.dns = None;
    let page = render(&status);
    check(&page);
    assert!(!page.contains("edge_lb_") && !page.contains("edge_dns_"));
}

/// A strict reader of the Prometheus text format 0.0.4.
fn check(page: &str) {
    assert!(page.ends_with('\n') && !page.contains('\r'));
    let (mut helped, mut types, mut series) = (BTreeSet::new(), BTreeMap::new(), BTreeSet::new());
    let mut current = String::new();
    let mut buckets: BTreeMap<String, Vec<(String, f64)>> = BTreeMap::new();
    let mut counts = BTreeMap::new();
    for line in page.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, text) = rest.split_once(' ').expect("a name and a text");
            assert!(is_name(name) && !text.is_empty(), "{line}");
            assert!(helped.insert(name.to_owned()), "HELP once: {line}");
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').expect("a name and a type");
            assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
            assert!(helped.contains(name), "HELP before TYPE: {line}");
            assert!(
                types.insert(name.to_owned(), kind.to_owned()).is_none(),
                "TYPE once: {line}"
            );
            assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
            current = name.to_owned();
        } else {
            let (name, labels, value) = sample(line);
            assert!(series.insert((name.clone(), labels.clone())), "series once: {line}");
            let family = match types.get(&current).map(String::as_str) {
                Some("histogram") => name
                    .strip_suffix("_bucket")
                    .or_else(|| name.strip_suffix("_sum"))
                    .or_else(|| name.strip_suffix("_count"))
                    .unwrap_or(&name),
                _ => &name,
            };
            assert_eq!(family, current, "a family is one block: {line}");
            let without_le: Vec<_> = labels.iter().filter(|(label, _)| label != "le").collect();
            let key = format!("{family}{without_le:?}");
            if name.ends_with("_bucket") {
                let le = labels
                    .iter()
                    .find(|(label, _)| label == "le")
                    .expect("a bucket has le")
                    .1
                    .clone();
                buckets.entry(key).or_default().push((le, value));
            } else if name.ends_with("_count") {
                counts.insert(key, value);
            }
        }
    }
    for (key, buckets) in &buckets {
        let bounds: Vec<f64> = buckets
            .iter()
            .map(|(le, _)| {
                if le == "+Inf" {
                    f64::INFINITY
                } else {
                    le.parse().expect("a number")
                }
            })
            .collect();
        assert!(
            bounds.is_sorted_by(|a, b| a < b) && bounds.last() == Some(&f64::INFINITY),
            "{key}: {bounds:?}"
        );
        assert!(buckets.is_sorted_by(|a, b| a.1 <= b.1), "{key}: cumulative");
        assert_eq!(
            buckets.last().map(|bucket| bucket.1),
            counts.get(key).copied(),
            "{key}: +Inf is the count"
        );
    }
    assert_eq!(buckets.len(), counts.len());
}

fn is_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == ':')
}

fn sample(line: &str) -> (String, Vec<(String, String)>, f64) {
    let end = line.find(['{', ' ']).unwrap_or_else(|| panic!("no value: {line}"));
    let (name, mut rest) = line.split_at(end);
    assert!(is_name(name), "{line}");
    let mut labels = Vec::new();
    if let Some(inner) = rest.strip_prefix('{') {
        rest = inner;
        loop {
            let (label, after) = rest.split_once("=\"").unwrap_or_else(|| panic!("no label: {line}"));
            assert!(is_name(label) && !label.contains(':'), "{line}");
            let mut value = String::new();
            let mut chars = after.char_indices();
            let end = loop {
                match chars.next().unwrap_or_else(|| panic!("unclosed: {line}")) {
                    (at, '"') => break at + 1,
                    (_, '\\') => match chars.next().map(|(_, c)| c) {
                        Some('n') => value.push('\n'),
                        Some(c @ ('\\' | '"')) => value.push(c),
                        other => panic!("escape {other:?}: {line}"),
                    },
                    (_, c) => value.push(c),
                }
            };
            labels.push((label.to_owned(), value));
            rest = &after[end..];
            match rest.strip_prefix(',') {
                Some(more) => rest = more,
                None => {
                    rest = rest.strip_prefix('}').unwrap_or_else(|| panic!("unclosed: {line}"));
                    break;
                }
            }
        }
    }
    let value = rest.strip_prefix(' ').unwrap_or_else(|| panic!("no value: {line}"));
    (
        name.to_owned(),
        labels,
        value.parse().unwrap_or_else(|_| panic!("no number: {line}")),
    )
}

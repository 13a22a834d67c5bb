//! What the documentation names exists.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use lapsed::metrics::{Exposition, Metrics};
use lapsed::store::accounts::TokenCounts;
use lapsed::store::outbox::Waiting;

/// The names of functions in the files of integration tests, as `file::function`, or `directory::function` for its `mod.rs`,
/// and of the modules of tests that a macro makes there. What no test uses, the compiler refuses.
fn functions() -> BTreeSet<String> {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(tests).expect("the tests") {
        let path = entry.expect("a name").path();
        let file = path.file_stem().expect("a name").to_string_lossy().into_owned();
        let source = if path.is_dir() { path.join("mod.rs") } else { path };
        if source.extension().is_some_and(|extension| extension == "rs") && source.exists() {
            for line in fs::read_to_string(&source).expect("a file").lines() {
                let bare = line.strip_prefix("async ").unwrap_or(line);
                let function = bare.strip_prefix("fn ").and_then(|rest| rest.split_once(['(', '<']));
                let made = line.strip_prefix("        mod ").and_then(|rest| rest.split_once(" {"));
                if let Some((name, _)) = function.or(made) {
                    names.insert(format!("{file}::{name}"));
                }
            }
        }
    }
    names
}

#[test]
fn every_guarantee_names_a_test_that_exists() {
    let functions = functions();
    let guarantees = include_str!("../docs/guarantees.md");
    let mut named = 0;
    let mut bare = Vec::new();
    for section in guarantees.split("\n**").skip(1) {
        let (sentence, rest) = section.split_once("**").expect("a sentence in bold");
        let mut here = 0;
        // Every second part stands between backticks.
        for name in rest.split('`').skip(1).step_by(2).filter(|name| name.contains("::")) {
            assert!(functions.contains(name), "no test is called {name}");
            here += 1;
        }
        if here == 0 {
            bare.push(sentence);
        }
        named += here;
    }
    assert!(bare.is_empty(), "guarantees that no test shows: {bare:?}");
    assert!(named > 40, "the tests are named in the form that this test reads: {named}");
}

/// The names in a text that look like those of our metrics.
fn metrics_named(text: &str) -> BTreeSet<&str> {
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    words.filter(|word| word.starts_with("lapsed_")).collect()
}

#[test]
fn alerts_and_panels_ask_for_metrics_that_exist_and_every_alert_is_explained() {
    let rules = include_str!("../config/prometheus/lapsed.rules.yml");
    let dashboard = include_str!("../config/grafana/lapsed.json");
    let operations = include_str!("../docs/operations.md");
    let metrics = Metrics::new(&[]);
    let now = chrono::DateTime::UNIX_EPOCH;
    metrics.stored(TokenCounts::default(), 0, now);
    metrics.waiting(&Waiting::default(), now);
    metrics.coverage(0, 0, now);
    metrics.pass("expire", std::time::Duration::ZERO);
    metrics.job("expire", Some(now), chrono::TimeDelta::zero());
    let exposition = metrics.text(Exposition::OpenMetrics);
    let mut exposed = BTreeSet::new();
    let mut families = BTreeSet::new();
    for line in exposition.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
        let (name, kind) = line.split_once(' ').expect("a type");
        let suffixes: &[&str] = match kind {
            "counter" => &["_total"],
            "histogram" => &["_bucket", "_sum", "_count"],
            "info" => &["_info"],
            "gauge" => &[""],
            other => panic!("{name} is a {other}"),
        };
        exposed.extend(suffixes.iter().map(|suffix| format!("{name}{suffix}")));
        families.insert(if kind == "histogram" { name.to_owned() } else { format!("{name}{}", suffixes[0]) });
    }
    for (file, text, least) in [("the rules", rules, 8), ("the dashboard", dashboard, 12)] {
        let named = metrics_named(text);
        let unknown: Vec<_> = named.iter().filter(|name| !exposed.contains(**name)).collect();
        assert!(unknown.is_empty(), "{file} ask for {unknown:?}; there is {exposed:?}");
        assert!(named.len() >= least, "{file} name metrics in the form that this test reads: {named:?}");
    }
    let panels: serde_json::Value = serde_json::from_str(dashboard).expect("JSON");
    assert!(panels["panels"].as_array().is_some_and(|panels| panels.len() > 10));

    let rows = operations.lines().filter_map(|line| line.strip_prefix("| `lapsed_"));
    let table: BTreeSet<String> =
        rows.filter_map(|row| Some(format!("lapsed_{}", row.split(['`', '{']).next()?))).collect();
    assert_eq!(table, families, "the table in docs/operations.md has the metrics that there are");
    let alerts: BTreeSet<&str> = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    assert!(alerts.len() >= 8, "{alerts:?}");
    for alert in &alerts {
        let heading = format!("### {alert}\n\n");
        let (_, paragraph) =
            operations.split_once(&heading).unwrap_or_else(|| panic!("nothing says what {alert} means"));
        let paragraph = paragraph.split("\n\n").next().expect("a paragraph");
        assert!(paragraph.len() > 150 && !paragraph.starts_with('#'), "{alert}: {paragraph}");
    }
    for name in operations.lines().filter_map(|line| line.strip_prefix("### ")) {
        assert!(!name.starts_with("Lapsed") || alerts.contains(name), "there is no alert {name}");
    }
}

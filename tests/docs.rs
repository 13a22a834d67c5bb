//! What the documentation names exists.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use lapsed::metrics::{Exposition, Metrics};
use lapsed::store::accounts::TokenCounts;
use lapsed::store::outbox::Waiting;

/// The tests in the files of integration tests, as `file::test`, or `directory::test` for its `mod.rs`: functions that an attribute
/// says is one, and what is named where a macro is called that makes tests, as `on_every_back_end!` does; of such a macro also the
/// modules that it puts them into.
fn tests() -> BTreeSet<String> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let mut sources = Vec::new();
    for entry in fs::read_dir(directory).expect("the tests") {
        let path = entry.expect("a name").path();
        let file = path.file_stem().expect("a name").to_string_lossy().into_owned();
        let source = if path.is_dir() { path.join("mod.rs") } else { path };
        if source.extension().is_some_and(|extension| extension == "rs") && source.exists() {
            sources.push((file, fs::read_to_string(&source).expect("a file")));
        }
    }
    let makers: BTreeSet<&str> = sources.iter().flat_map(|(_, source)| makers(source)).collect();
    let mut names = BTreeSet::new();
    for (file, source) in &sources {
        let found = attributed(source).into_iter().chain(made(source, &makers));
        names.extend(found.map(|name| format!("{file}::{name}")));
    }
    names
}

fn is_attribute(line: &str) -> bool {
    line.starts_with("#[test]") || line.starts_with("#[tokio::test")
}

/// The functions that follow an attribute which makes them tests, other attributes and comments between.
fn attributed(source: &str) -> Vec<&str> {
    let (mut names, mut is_test) = (Vec::new(), false);
    for line in source.lines() {
        let bare = line.strip_prefix("async ").unwrap_or(line);
        let function = bare.strip_prefix("fn ").and_then(|rest| rest.split_once(['(', '<']));
        names.extend(function.filter(|_| is_test).map(|(name, _)| name));
        is_test = is_attribute(line) || (is_test && (line.starts_with("#[") || line.starts_with("//")));
    }
    names
}

/// The macros that a file defines and that make tests.
fn makers(source: &str) -> Vec<&str> {
    let defined = source.split("macro_rules! ").skip(1).filter_map(|rest| rest.split_once(" {"));
    let makes = |body: &str| body.split("\n}\n").next().is_some_and(|body| body.contains("::test]"));
    defined.filter(|(_, body)| makes(body)).map(|(name, _)| name).collect()
}

/// What is named where one of these macros is called, and the modules that one which is defined here makes.
fn made<'a>(source: &'a str, makers: &BTreeSet<&str>) -> Vec<&'a str> {
    let mut names = Vec::new();
    for maker in makers {
        let call = format!("\n{maker}!(");
        let calls = source.split(&call).skip(1).filter_map(|rest| rest.split_once(");"));
        let words = calls.flat_map(|(named, _)| named.split([',', ':', '\n', ' ']));
        names.extend(words.filter(|word| !word.is_empty()));
        let defined =
            source.split_once(&format!("macro_rules! {maker} {{")).and_then(|(_, rest)| rest.split_once("\n}\n"));
        let modules = defined.iter().flat_map(|(body, _)| body.split("mod ").skip(1));
        names.extend(modules.filter_map(|rest| rest.split_once(" {")).map(|(name, _)| name));
    }
    names
}

#[test]
fn only_tests_are_taken_for_tests() {
    let tests = tests();
    for (name, is_one) in [
        ("docs::only_tests_are_taken_for_tests", true),
        ("docs::attributed", false),
        ("corrections::it_joins_the_next_mail", true),
        ("corrections::noted", false),
        ("crashes::cut_on_postgres", true),
        ("races::expire_comes_before_an_edit", true),
        ("daemon::the_demo_tells_the_truth", true),
        ("kills::work_off", false),
    ] {
        assert_eq!(tests.contains(name), is_one, "{name}");
    }
    assert!(tests.len() > 300, "{}", tests.len());
}

#[test]
fn every_guarantee_names_a_test_that_exists() {
    let tests = tests();
    let guarantees = include_str!("../docs/guarantees.md");
    let mut named = 0;
    let mut bare = Vec::new();
    for section in guarantees.split("\n**").skip(1) {
        let (sentence, rest) = section.split_once("**").expect("a sentence in bold");
        let mut here = 0;
        // Every second part stands between backticks.
        for name in rest.split('`').skip(1).step_by(2).filter(|name| name.contains("::")) {
            // Where it stands once for each back end, the name goes on.
            let on_back_ends = format!("{name}_on_");
            let is_test = tests.contains(name) || tests.iter().any(|test| test.starts_with(&on_back_ends));
            assert!(is_test, "no test is called {name}");
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

//! What the documentation names exists.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// The names of functions in the files of integration tests, as `file::function`, or `directory::function` for its `mod.rs`.
fn functions() -> BTreeSet<String> {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(tests).expect("the tests") {
        let path = entry.expect("a name").path();
        let file = path.file_stem().expect("a name").to_string_lossy().into_owned();
        let source = if path.is_dir() { path.join("mod.rs") } else { path };
        if source.extension().is_some_and(|extension| extension == "rs") && source.exists() {
            for line in fs::read_to_string(&source).expect("a file").lines() {
                let line = line.strip_prefix("async ").unwrap_or(line);
                if let Some((name, _)) = line.strip_prefix("fn ").and_then(|rest| rest.split_once(['(', '<'])) {
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

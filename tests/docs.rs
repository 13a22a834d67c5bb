//! What the documentation names exists.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// The names of functions in the files of integration tests, as `file::function`.
fn functions() -> BTreeSet<String> {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(tests).expect("the tests") {
        let path = entry.expect("a name").path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            let file = path.file_stem().expect("a name").to_string_lossy().into_owned();
            for line in fs::read_to_string(&path).expect("a file").lines() {
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
        for line in rest.lines().filter_map(|line| line.strip_prefix("- `")) {
            let (name, _) = line.split_once('`').expect("a name in backticks");
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

//! The templates that are part of the program: `config/templates`.

use super::{File, Tree};

/// The style sheet that is written into the HTML.
pub(super) const STYLE: &str = "style.css";

/// What is said of a token, in words.
pub(super) const WORDS: &str = "words.txt";

/// What phrases call the instant that they put into words.
pub(super) const AT: &str = "at";

/// The words of a calendar's entry.
pub(super) const EVENT: &str = "event.txt";

macro_rules! files {
    ($($place:literal),+ $(,)?) => {
        &[$(($place, include_str!(concat!("../../../config/templates/", $place)))),+]
    };
}

/// Each file's place in the tree, and its source.
const FILES: &[(&str, &str)] = files![
    "alert/body.html",
    "alert/body.txt",
    "alert/subject.txt",
    "changed/body.html",
    "changed/body.txt",
    "changed/subject.txt",
    "corrected.html",
    "corrected.txt",
    "correction/body.html",
    "correction/body.txt",
    "correction/subject.txt",
    "dark.css",
    "escalation/body.html",
    "escalation/body.txt",
    "escalation/subject.txt",
    "event.txt",
    "expired/body.html",
    "expired/body.txt",
    "expired/subject.txt",
    "layout.html",
    "phrases/ago.txt",
    "phrases/date.txt",
    "phrases/day.txt",
    "phrases/kind.txt",
    "phrases/left.txt",
    "phrases/moment.txt",
    "phrases/scopes.txt",
    "phrases/span.txt",
    "phrases/used.txt",
    "phrases/why.txt",
    "reminder/body.html",
    "reminder/body.txt",
    "reminder/subject.txt",
    "style.css",
    "test/body.html",
    "test/body.txt",
    "test/subject.txt",
    "token.html",
    "token.txt",
    "tokens.html",
    "tokens.txt",
    "words.txt",
    "de/alert/body.html",
    "de/alert/body.txt",
    "de/alert/subject.txt",
    "de/changed/body.html",
    "de/changed/body.txt",
    "de/changed/subject.txt",
    "de/corrected.html",
    "de/corrected.txt",
    "de/correction/body.html",
    "de/correction/body.txt",
    "de/correction/subject.txt",
    "de/escalation/body.html",
    "de/escalation/body.txt",
    "de/escalation/subject.txt",
    "de/event.txt",
    "de/expired/body.html",
    "de/expired/body.txt",
    "de/expired/subject.txt",
    "de/phrases/ago.txt",
    "de/phrases/date.txt",
    "de/phrases/day.txt",
    "de/phrases/kind.txt",
    "de/phrases/moment.txt",
    "de/phrases/scopes.txt",
    "de/phrases/span.txt",
    "de/phrases/used.txt",
    "de/phrases/why.txt",
    "de/reminder/body.html",
    "de/reminder/body.txt",
    "de/reminder/subject.txt",
    "de/test/body.html",
    "de/test/body.txt",
    "de/test/subject.txt",
    "de/token.html",
    "de/token.txt",
    "de/tokens.html",
    "de/tokens.txt",
];

/// All of them.
pub(super) fn tree() -> Tree {
    FILES.iter().map(|(place, source)| ((*place).to_owned(), File { source: (*source).into(), path: None })).collect()
}

/// What a language's files are called.
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    FILES.iter().map(|(place, _)| *place).filter(|place| super::divided(place).0.is_empty())
}

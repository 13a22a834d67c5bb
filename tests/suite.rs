//! All integration tests in one program but those of `explain.rs`, which must listen to its databases alone. In one
//! program they run side by side, and those that wait cost nothing.

#[macro_use]
mod support;

mod bounces;
mod browser;
mod cli;
mod corrections;
mod crashes;
mod daemon;
mod delivery;
mod docs;
mod dry_run;
mod endings;
mod everyday;
mod guards;
mod harness;
mod hiccups;
mod imports;
mod keeping;
mod kills;
mod logs;
mod mails;
mod model;
mod moved_deadlines;
mod outbox;
mod outcomes;
mod pipeline;
mod planning;
mod policies;
mod postfix;
mod races;
mod reload;
mod schedules;
mod silence;
mod unwritable;
mod use_of_tokens;
mod waiting;
mod watchers;
mod watching;
mod wrong_turns;

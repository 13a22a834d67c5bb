//! `lapsed`: the expiry daemon for API tokens.
//!
//! It stands beside a store of tokens, marks them invalid when their time is up, and mails their owners early enough
//! that nobody's pipeline breaks.
//!
//! ```text
//!           cron ticks / start-up / nudges                                              service, schedule
//!                       |
//!  tokens --expire--> tokens(expired) + reminders(lead 0)          one transaction per batch
//!  tokens --remind--> reminders(lead 30d, 7d, 1d) + open message   one transaction per batch
//!  messages --deliver: claim (lease) | recheck | render | SMTP | record-->  sent / retry / failed / cancelled
//!  everything old --purge--> gone, after its retention                                  jobs
//! ```
//!
//! The modules follow the data. A module knows those above it in this list and none below:
//!
//! - [`config`] and [`schedule`]: what operators asked for, checked before anything starts.
//! - [`clock`]: the only place that asks what time it is; everywhere else, time is an argument.
//! - [`token`]: the words of the domain, as plain data.
//! - [`policy`]: which reminders are owed, and when. [`correction`]: what is told because what was said no longer holds.
//!   [`digest`]: when a message about them may go. [`policies`]: which tokens follow
//!   rules of their own. [`change`]: what may be done to a token. All are pure.
//! - [`store`]: SQLite and PostgreSQL behind one contract; the only code that speaks SQL.
//! - [`verify`](mod@verify): the gate, which asks the store and the clock at every call.
//! - [`mail`]: from a message to what the mail server answered, and what that means.
//! - [`jobs`]: one step function each, which tests call directly. [`bounce`]: what is done about a mail that came back.
//! - [`metrics`] and [`health`]: what the jobs reported, and whether they keep to their schedules. [`http`]: where it is read.
//! - [`service`]: the loops around the jobs, start and stop.
//! - [`cli`]: one file per command. [`telemetry`]: logs.

#![deny(unsafe_code)]

pub mod config;
pub mod schedule;
pub mod clock;
pub mod token;
pub mod policy;
pub mod correction;
pub mod digest;
pub mod policies;
pub mod change;
pub mod expires;
pub mod store;
pub mod verify;
pub mod import;
pub mod mail;
pub mod jobs;
pub mod coverage;
pub mod forecast;
pub mod escalation;
pub mod bounce;
pub mod metrics;
pub mod health;
pub mod http;
pub mod service;
pub mod cli;
pub mod telemetry;

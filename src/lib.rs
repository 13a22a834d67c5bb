//! `lapsed`: the expiry daemon for API tokens.

pub mod config;
pub mod clock;
pub mod schedule;
pub mod token;
pub mod policy;
pub mod change;
pub mod store;
pub mod mail;
pub mod jobs;
pub mod service;
pub mod cli;
pub mod telemetry;

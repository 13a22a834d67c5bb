//! What integration tests stand on: a database of their own, and two kinds of SMTP server.
//!
//! `tests/run` starts or finds the real servers and names them in the environment. Without it these helpers panic:
//! a test that cannot run is a failure, never a silent success. Each value cleans up after itself when it is dropped,
//! also when the test panics.
#![allow(dead_code)] // each test file uses a part

use std::fmt;

/// Tests that tell each of these stories, generic functions of the test file, on each back end. The file imports the back
/// ends by name.
#[allow(unused_macros)]
macro_rules! on_every_back_end {
    ($($story:ident),+ $(,)?) => {
        mod sqlite {
            $(#[tokio::test] async fn $story() { super::$story::<super::OnSqlite>().await; })+
        }
        mod postgres {
            $(#[tokio::test] async fn $story() { super::$story::<super::OnPostgres>().await; })+
        }
        mod partitioned {
            $(#[tokio::test] async fn $story() { super::$story::<super::OnPartitions>().await; })+
        }
    };
}

pub mod backend;
pub mod cli;
pub mod cluster;
pub mod deaths;
pub mod many;
pub mod plans;
pub mod postgres;
pub mod proxy;
pub mod queue;
pub mod smtp;
pub mod smtp_script;
pub mod supervisor;
pub mod trace;
pub mod world;

/// A message as an SMTP server took it: what the envelope said, and the content.
#[derive(Clone, PartialEq, Eq)]
pub struct Stored {
    /// The address of MAIL FROM, without brackets and parameters; empty for the null sender.
    pub mail_from: String,
    /// The addresses of the accepted RCPT TO commands, in their order.
    pub rcpt_to: Vec<String>,
    /// Header and body, with CRLF line ends, dots unstuffed, without the final dot.
    pub data: Vec<u8>,
}

impl fmt::Debug for Stored {
    /// As text, line by line: this is what a failed assertion prints.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "MAIL {:?} RCPT {:?}", self.mail_from, self.rcpt_to)?;
        self.data.split_inclusive(|&byte| byte == b'\n').try_for_each(|line| writeln!(f, "  {}", line.escape_ascii()))
    }
}

/// The value of an environment variable that `tests/run` sets.
///
/// # Panics
/// When it is unset, saying what to run.
pub fn from_environment(name: &str, provides: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: run tests/run, which {provides}"))
}

/// A name that no other test, process or run uses: `prefix` and 16 hexadecimal digits.
fn unique_name(prefix: &str) -> String {
    let random: u64 = rand::random();
    format!("{prefix}{random:016x}")
}

/// The address in the argument of MAIL or RCPT: `FROM:<a@b> SIZE=1` or `<a@b>` give `a@b`.
fn address_of(argument: &str) -> String {
    let address =
        argument.split_once('<').and_then(|(_, rest)| rest.split_once('>')).map_or(argument, |(address, _)| address);
    address.trim().to_owned()
}

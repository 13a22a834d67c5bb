//! Settings: what an operator may decide, read once at the start.
//!
//! Guarantees that [`Settings`] are complete and fit together, and that whoever got something wrong is told everything
//! at once: the key, the value, where it came from, and what would be right. Relies on `config/lapsed.toml`, which is
//! built in, being both the defaults and the list of the keys that exist. Reading has no effect, so there is nothing
//! for a crash to undo.
//!
//! Three layers, the later winning: the built-in file, then the file of `--config` or else
//! `/etc/lapsed/lapsed.toml`, then the environment (`LAPSED__MAIL__SMTP__HOST`; lists separated by commas).

mod check;
mod duration;
mod layers;
mod reader;
mod smtp;
mod store_url;

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use chrono::TimeDelta;
use lettre::Address;
use lettre::message::Mailbox;

pub use duration::{format_duration, parse_duration};
pub use reader::Invalid;
pub use smtp::{Login, Proof, Relay, Smtp, Timeouts, Tls};
pub use store_url::StoreUrl;

use crate::digest::{Digest, Window};
use crate::policies::Match;
use crate::schedule::Cron;
use crate::token;
use reader::Reader;

/// The file that is read where no other is named, if it exists.
pub const SYSTEM_FILE: &str = "/etc/lapsed/lapsed.toml";

/// Everything that can be configured.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Where everything is kept.
    pub store: Store,
    /// When each job looks for work.
    pub schedule: Schedule,
    /// Which reminders are owed.
    pub reminders: Reminders,
    /// When messages about them may go.
    pub digest: Digest,
    /// How mail leaves, and what it says of us.
    pub mail: Mail,
    /// How much may happen in an hour.
    pub guard: Guard,
    /// How long records are kept.
    pub retention: Retention,
    /// Where the daemon answers those who watch it.
    pub http: Http,
    /// What is logged.
    pub log: Log,
}

/// `[store]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Store {
    /// From `url_file` where that is set, else from `url`.
    pub url: StoreUrl,
}

/// `[schedule]`: when each job looks for work, besides being woken.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    /// Marks tokens whose deadline has passed.
    pub expire: Cron,
    /// Writes the reminders that have fallen due.
    pub remind: Cron,
    /// Sends mail.
    pub deliver: Cron,
    /// Deletes what is older than its retention.
    pub purge: Cron,
    /// Compares all reminders that are owed with the ledger.
    pub reconcile: Cron,
}

/// `[reminders]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reminders {
    /// How long before the deadline: positive whole seconds, the longest first, each once.
    pub lead_times: Vec<TimeDelta>,
    /// Whether owners are told at the deadline.
    pub expired_notice: bool,
    /// The age from which an expired notice is recorded and not sent; not negative.
    pub stale_after: TimeDelta,
    /// Whether nobody is told of tokens that nobody uses.
    pub skip_unused: bool,
    /// Policies for groups of tokens; the first that fits counts.
    pub policies: Vec<PolicyFor>,
}

/// `[[reminders.policy]]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicyFor {
    /// For which tokens; not for all.
    pub matches: Match,
    /// How long before the deadline, as in [`Reminders`]; `None`: as for the others.
    pub lead_times: Option<Vec<TimeDelta>>,
    /// When mail may go that is not urgent; `None`: as for the others.
    pub window: Option<Window>,
    /// Who is told besides those who are told anyway.
    pub contacts: Vec<token::Address>,
}

/// `[mail]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mail {
    /// How mail leaves; [`Settings::require_mail`] says whether it is set.
    pub transport: Option<Transport>,
    /// The sender.
    pub from: Option<Mailbox>,
    /// Where answers go, if not to the sender.
    pub reply_to: Option<Mailbox>,
    /// Who hears of what could not be delivered.
    pub fallback_to: Option<Address>,
    /// How long after its first attempt a message is tried again; positive.
    pub give_up_after: TimeDelta,
    /// An `http` or `https` URL with the placeholders `{token_id}`, `{owner_id}`, `{external_id}`, and no others.
    pub manage_url: Option<String>,
    /// A directory with templates in the place of the built-in ones; it exists.
    pub templates: Option<PathBuf>,
    /// Where bounces come back to, if not to the sender.
    pub bounce: Option<Bounce>,
}

/// `[mail.bounce]`: each message's bounces come to an address of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bounce {
    /// What the addresses are made from; fit for a [`crate::mail::return_path::ReturnPath`].
    pub mailbox: Address,
    /// A file that holds the key which they are signed with.
    pub key_file: PathBuf,
}

/// `mail.transport`, with the section that it chooses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Transport {
    /// Files in a directory.
    Maildir {
        /// The Maildir; it may not exist yet.
        path: PathBuf,
    },
    /// A mail server.
    Smtp(Box<Smtp>),
}

/// `[guard]`: how much may happen in an hour.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guard {
    /// Messages that are opened.
    pub messages_per_hour: Limit,
    /// Tokens that are marked as expired.
    pub expired_per_hour: Limit,
}

/// How much of something may happen in an hour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// As much as there is.
    None,
    /// So much.
    PerHour(u64),
    /// 10,000, or a tenth of what there is, whichever is more.
    Auto,
}

/// `[retention]`: how long each kind of record is kept; all positive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Retention {
    /// Rows of the ledger, after the deadline that they speak of: none is needed to decide anything then.
    pub reminders: TimeDelta,
    /// Messages that were sent or given up.
    pub messages: TimeDelta,
    /// Tokens that expired, were revoked or were replaced.
    pub ended_tokens: TimeDelta,
}

/// `[http]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Http {
    /// `None`: nowhere, unless systemd passes a socket.
    pub listen: Option<SocketAddr>,
}

/// `[log]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Log {
    /// What [`crate::telemetry::init`] takes.
    pub level: String,
    /// In which form, and where to.
    pub format: LogFormat,
}

/// In which form the log is written, and where to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Lines for people, on stderr.
    Text,
    /// One JSON object a line, on stderr.
    Json,
    /// To systemd's journal, with fields, where `lapsed run` logs; to stderr where there is none.
    Journald,
}

impl Settings {
    /// How mail leaves, and the sender: what the daemon cannot do without, and other commands can.
    ///
    /// # Errors
    /// Each of the two that is not set, with the line to write.
    pub fn require_mail(&self) -> Result<(&Transport, &Mailbox), Invalid> {
        let missing = |key: &str, example: &str| {
            let name = key.rsplit('.').next().unwrap_or(key);
            format!(
                "{key} is not set, and `lapsed run` needs it: write {name} = \"{example}\" under [mail] in the \
                 configuration file, or set the environment variable {}",
                layers::variable(key)
            )
        };
        match (&self.mail.transport, &self.mail.from) {
            (Some(transport), Some(from)) => Ok((transport, from)),
            (transport, from) => {
                let mut problems = Vec::new();
                if transport.is_none() {
                    problems.push(missing("mail.transport", "smtp"));
                }
                if from.is_none() {
                    problems.push(missing("mail.from", "Tokens <tokens@example.org>"));
                }
                Err(Invalid { problems })
            }
        }
    }
}

impl Bounce {
    /// How long the local part of the mailbox may be, in bytes: a mail server need not take more than 64 (RFC 5321, section
    /// 4.5.3.1.1), and what is added has 50.
    pub const LONGEST: usize = 14;
}

/// The file that is read: what `--config` named, or [`SYSTEM_FILE`].
pub fn file(named: Option<&Path>) -> &Path {
    named.unwrap_or(Path::new(SYSTEM_FILE))
}

/// Reads the settings of this process. `file` is what `--config` named; without it, [`SYSTEM_FILE`] is read if it
/// exists.
///
/// # Errors
/// Everything that is wrong: a file that cannot be read or is not TOML, unknown keys, impossible values.
pub fn load(file: Option<&Path>) -> Result<Settings, Invalid> {
    load_from(file, Path::new(SYSTEM_FILE), std::env::vars_os())
}

/// [`load`] with everything that it takes from its surroundings as an argument.
fn load_from(
    file: Option<&Path>,
    system_file: &Path,
    environment: impl IntoIterator<Item = (OsString, OsString)>,
) -> Result<Settings, Invalid> {
    load_values(file, system_file, environment).map(|(settings, _)| settings)
}

/// The settings, and the values that they were made from.
fn load_values(
    file: Option<&Path>,
    system_file: &Path,
    environment: impl IntoIterator<Item = (OsString, OsString)>,
) -> Result<(Settings, layers::Values), Invalid> {
    let mut problems = Vec::new();
    match layers::merged(file, system_file, environment, &mut problems) {
        Some(values) => {
            let mut reader = Reader::new(values.clone(), problems);
            let settings = check::settings(&mut reader);
            reader.finish(settings).map(|settings| (settings, values))
        }
        None => Err(Invalid { problems }),
    }
}

/// A key of the configuration, as it is in force.
#[derive(Debug, Clone)]
pub struct InForce {
    /// The dotted key.
    pub key: String,
    /// Its value as the file would have it, with passwords masked.
    pub text: String,
    /// Its value for programs, of the same type wherever it came from, with passwords masked.
    pub value: serde_json::Value,
    /// Where it came from.
    pub origin: String,
}

/// The settings, and every key with its value and where it came from, of one reading.
///
/// # Errors
/// As [`load`].
pub fn load_with_origins(file: Option<&Path>) -> Result<(Settings, Vec<InForce>), Invalid> {
    let (settings, values) = load_values(file, Path::new(SYSTEM_FILE), std::env::vars_os())?;
    let mut problems = Vec::new();
    let defaults = layers::merged(None, Path::new(""), [], &mut problems).ok_or(Invalid { problems })?;
    let in_force = values
        .into_iter()
        .map(|(key, value)| InForce {
            text: reader::in_force(&key, &value),
            value: reader::as_json(&key, &value, defaults.get(&key).unwrap_or(&value)),
            origin: value.origin().unwrap_or("unknown origin").to_owned(),
            key,
        })
        .collect();
    Ok((settings, in_force))
}

#[cfg(test)]
mod tests;

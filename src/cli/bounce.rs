//! `lapsed bounce`

use std::collections::HashMap;

use clap::Args;
use tokio::io::AsyncReadExt;

use super::{Failure, Outcome, output, run};
use crate::bounce::{About, Done, about, take};
use crate::clock::Clock;
use crate::config::{self, Settings};
use crate::mail::dsn::{self, Unreadable};
use crate::mail::return_path::ReturnPath;
use crate::store::Store;

/// The exit statuses of sysexits.h by which a mail system knows what to do with what it piped.
mod status {
    /// EX_DATAERR: not a notification.
    pub(super) const DATA: u8 = 65;
    /// EX_NOUSER: no such message.
    pub(super) const NO_USER: u8 = 67;
    /// EX_TEMPFAIL: keep it, and try again.
    pub(super) const TEMPORARY: u8 = 75;
    /// EX_NOPERM: not signed by us.
    pub(super) const NO_PERMISSION: u8 = 77;
}

/// The variables in which Postfix and Exim tell a command for whom a mail came.
const RECIPIENT: [&str; 2] = ["ORIGINAL_RECIPIENT", "RECIPIENT"];

/// The fewest characters that a key for signatures has.
const SHORTEST_KEY: usize = 16;

/// `lapsed bounce`
#[derive(Debug, Args)]
#[command(after_long_help = "\
Exit status, as sysexits.h has it, so that a mail system does the right thing with what it pipes here:
  0   it is recorded; or there is nothing to do: a delay, a success, an automatic answer
  65  this is not a delivery status notification (RFC 3464), or does not say about which message
  67  there is no such message; it may have been purged
  75  the store or the configuration cannot be used, or the message is being sent at this moment: try again later
  77  the address that it came to was not signed by this installation

The address comes from --recipient, else from the environment (ORIGINAL_RECIPIENT, RECIPIENT), else from the header.")]
pub struct Bounce {
    /// The address that the bounce was sent to, where the mail system does not say so in the environment or the header
    #[arg(long, value_name = "ADDR")]
    recipient: Option<String>,
}

impl Bounce {
    pub(super) async fn run<S: Store>(self, store: &S, clock: &impl Clock, settings: &Settings) -> Outcome {
        let return_path = settings.mail.bounce.as_ref().map(return_path).transpose()?;
        let notification = match dsn::read(&mail().await?) {
            Ok(notification) => notification,
            Err(why @ Unreadable::AutomaticAnswer) => return nothing_to_do(&why.to_string()),
            Err(why) => return ends(status::DATA, why.to_string()),
        };
        let came_to = match self.recipient {
            Some(address) => vec![address],
            None => RECIPIENT.iter().filter_map(|name| std::env::var(name).ok()).collect(),
        };
        let message = match about(&notification, &came_to, return_path.as_ref()) {
            About::Message(message) => message,
            About::Forged => {
                let why = "the address that this came to does not name a message, or was not signed with the key of \
                           mail.bounce.key_file";
                return ends(status::NO_PERMISSION, why.to_owned());
            }
            About::Nothing => {
                let why = "the returned mail has no Message-ID of lapsed: nobody knows which message this is about";
                return ends(status::DATA, why.to_owned());
            }
        };
        let mut rows = vec![("message", message.to_string())];
        let mut named = HashMap::new();
        for address in settings.reminders.policies.iter().flat_map(|policy| &policy.contacts) {
            if let Some(contact) = store.find_contact(address).await? {
                named.insert(address.clone(), contact.id);
            }
        }
        let groups = run::groups(settings, |address| named.get(address).copied());
        match take(store, message, &notification, &groups, clock.now()).await? {
            Done::Unknown => {
                let why = format!("there is no message {message}; it may have been purged, or sent from another store");
                return ends(status::NO_USER, why);
            }
            Done::TooEarly => {
                let why = format!("what became of message {message} is not written yet");
                return ends(status::TEMPORARY, why);
            }
            Done::Nothing => return nothing_to_do("the mail was delivered, or is still being tried"),
            Done::Known { suppressed } => rows.extend([("state", "as it was".to_owned()), address(suppressed)]),
            Done::Failed { suppressed, reminders, escalated } => rows.extend([
                ("state", "failed".to_owned()),
                address(suppressed),
                ("reminders", format!("{reminders}, of which the fallback is told {escalated}")),
            ]),
        }
        output::print(&output::facts(&rows))?;
        Ok(())
    }
}

fn address(suppressed: bool) -> (&'static str, String) {
    ("address", if suppressed { "suppressed" } else { "not to blame" }.to_owned())
}

fn nothing_to_do(why: &str) -> Outcome {
    output::print(&format!("nothing to do: {why}\n"))?;
    Ok(())
}

fn ends(status: u8, why: String) -> Outcome {
    Err(Failure::Status(status, why))
}

/// What is on standard input, as far as it is needed. The rest is read all the same: a mail system takes a command that does
/// not read everything for a broken one.
async fn mail() -> std::io::Result<Vec<u8>> {
    let (mut input, mut mail) = (tokio::io::stdin(), Vec::new());
    (&mut input).take(dsn::MAX_READ).read_to_end(&mut mail).await?;
    tokio::io::copy(&mut input, &mut tokio::io::sink()).await?;
    Ok(mail)
}

/// The return paths of `[mail.bounce]`.
///
/// # Errors
/// When the key cannot be read, or is none.
pub(super) fn return_path(bounce: &config::Bounce) -> Result<ReturnPath, Failure> {
    let wrong = |why: String| Failure::Usage(format!("mail.bounce.key_file = {:?}: {why}", bounce.key_file));
    let key = std::fs::read(&bounce.key_file).map_err(|error| wrong(format!("cannot be read: {error}")))?;
    let key = key.trim_ascii();
    if key.len() < SHORTEST_KEY {
        return Err(wrong(format!(
            "a key has {SHORTEST_KEY} characters or more; make one with `openssl rand -hex 32`"
        )));
    }
    Ok(ReturnPath::new(bounce.mailbox.clone(), key))
}

/// What a failure means to the mail system that pipes a notification here: whatever it is, somebody may set it right, and the
/// notification must not be lost meanwhile.
pub(super) fn try_again(failure: Failure) -> Failure {
    match failure {
        Failure::Status(..) => failure,
        Failure::Usage(why) => Failure::Status(status::TEMPORARY, why),
        Failure::Failed(error) => Failure::Status(status::TEMPORARY, format!("{error:#}")),
        Failure::NotValid => Failure::Status(status::TEMPORARY, "failed".to_owned()),
    }
}

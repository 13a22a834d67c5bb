//! `lapsed mail`: what owners would read, and whether it arrives.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use chrono::TimeDelta;
use clap::{Args, ValueEnum};

use super::{Failure, Outcome, lookup, output};
use crate::clock::{Clock, Timestamp};
use crate::config::{Settings, Transport as Way};
use crate::correction::{Overtaken as Why, withdrawn};
use crate::mail::compose::{Composed, Composer};
use crate::mail::letter::{Alert, Change, Content, Item, Kind, Letter, Overtaken};
use crate::mail::maildir::Maildir;
use crate::mail::outcome::Happened;
use crate::mail::sample;
use crate::mail::smtp::Smtp;
use crate::mail::templates::Templates;
use crate::mail::transport::Transport;
use crate::policy::{Lead, Reason};
use crate::store::Store;
use crate::token::{Address, Contact, MessageId, Token, text};

/// How long a mail server may take for a test.
const PATIENCE: Duration = Duration::from_secs(60);

/// Which mail.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum MailKind {
    /// Tokens that expire soon
    #[default]
    Reminder,
    /// A token that has expired
    Expired,
    /// A token whose deadline somebody else moved
    Changed,
    /// Tokens of which something was said that no longer holds
    Correction,
    /// What the fallback is told of owners that could not be
    Escalation,
    /// What the fallback is told of mails that a guard holds
    Held,
    /// What the fallback is told of tokens that wait to be marked
    Expiry,
    /// What `lapsed mail test` sends
    Test,
}

impl MailKind {
    /// The same about made-up tokens.
    fn sample(self, now: Timestamp) -> Content {
        sample::content(
            match self {
                Self::Reminder => Kind::Reminder,
                Self::Expired => Kind::Expired,
                Self::Changed => Kind::Changed,
                Self::Correction => Kind::Correction,
                Self::Escalation => Kind::Escalation,
                Self::Held => Kind::Alert,
                Self::Expiry => return Content::Alert(Alert::Expiry { tokens: 12_345 }),
                Self::Test => Kind::Test,
            },
            now,
        )
    }
}

/// Which part of a mail.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Part {
    /// The subject and the text
    #[default]
    Text,
    /// The HTML alone, for a browser
    Html,
    /// The calendar files
    Ics,
    /// All of it, as it is sent (RFC 5322)
    Eml,
}

/// `lapsed mail preview`
#[derive(Debug, Args)]
pub struct Preview {
    /// Which mail
    #[arg(long, value_enum, default_value_t)]
    kind: MailKind,
    /// About this token: its id, or the digits that lists print
    #[arg(long, value_name = "ID")]
    token: Option<String>,
    /// About made-up tokens: the default
    #[arg(long, conflicts_with = "token")]
    sample: bool,
    /// Which part of it
    #[arg(long, value_enum, default_value_t)]
    part: Part,
    /// In this language, such as `de`; without it, as the reader has it
    #[arg(long, value_name = "TAG", value_parser = text::locale)]
    locale: Option<String>,
    /// Write all parts into files of a new directory, and show the HTML in a browser
    #[arg(long, conflicts_with = "part")]
    open: bool,
}

impl Preview {
    /// Whether it is about a token of the store.
    pub(super) fn needs_store(&self) -> bool {
        self.token.is_some()
    }

    pub(super) async fn run<S: Store>(self, store: &S, clock: &impl Clock, settings: &Settings) -> Outcome {
        let now = clock.now();
        match &self.token {
            Some(text) => {
                let letter = about(store, text, self.kind, now).await?;
                self.show(letter, now, settings)
            }
            None => self.run_sample(clock, settings),
        }
    }

    /// About made-up tokens.
    pub(super) fn run_sample(self, clock: &impl Clock, settings: &Settings) -> Outcome {
        let now = clock.now();
        let letter = letter(sample_contact("owner@example.org")?, self.kind.sample(now), now);
        self.show(letter, now, settings)
    }

    fn show(self, mut letter: Letter, now: Timestamp, settings: &Settings) -> Outcome {
        if self.locale.is_some() {
            letter.to.locale = self.locale;
        }
        let composer = composer(settings)?;
        if self.open {
            return open(&composer, &letter, now);
        }
        let written = || composer.write(&letter, now).context("the mail cannot be made");
        let shown = match self.part {
            Part::Eml => {
                let composed = composer.compose(&letter, now).context("the mail cannot be made")?;
                String::from_utf8_lossy(&composed.bytes).into_owned()
            }
            Part::Html => written()?.html,
            Part::Ics => {
                let calendars = composer.calendars(&letter, now).context("the mail cannot be made")?;
                if calendars.is_empty() {
                    return Err(anyhow::anyhow!("this mail has no calendar file: no deadline in it lies ahead").into());
                }
                calendars.into_iter().map(|calendar| calendar.text).collect()
            }
            Part::Text => {
                let written = written()?;
                format!("Subject: {}\n\n{}", written.subject, written.text)
            }
        };
        output::print(&format!("{}\n", shown.trim_end_matches('\n')))?;
        Ok(())
    }
}

/// A letter about one token, as if it were due.
async fn about<S: Store>(store: &S, text: &str, kind: MailKind, now: Timestamp) -> Result<Letter, Failure> {
    let token = lookup::token(store, text).await?;
    if token.expires_at.is_none() && kind != MailKind::Correction {
        return Err(anyhow::anyhow!("token {text} never expires: there is no mail about it").into());
    }
    let owner = lookup::owner_of(store, &token).await?;
    let contact = store.contacts_of(owner.id).await?.into_iter().next();
    let contact = contact.map_or_else(|| sample_contact("owner@example.org"), Ok)?;
    let change = Change { before: token.expires_at.map(|at| at - TimeDelta::days(30)) };
    let why = withdrawn(&token).unwrap_or(Why::Replaced);
    let overtaken = Overtaken { told: token.expires_at.unwrap_or(now + TimeDelta::days(7)), why };
    let item = Item {
        token,
        owner,
        lead: Lead::EXPIRED,
        escalation: (kind == MailKind::Escalation).then_some(Reason::NoContact),
        change: (kind == MailKind::Changed).then_some(change),
        overtaken: (kind == MailKind::Correction).then_some(overtaken),
    };
    let content = match kind {
        MailKind::Reminder | MailKind::Changed | MailKind::Correction | MailKind::Escalation => {
            Content::Reminders(vec![item])
        }
        MailKind::Test => Content::Test(vec![item]),
        MailKind::Expired => {
            let expires_at = item.token.expires_at.filter(|at| *at <= now).or(Some(now));
            Content::Reminders(vec![Item { token: Token { expires_at, ..item.token }, ..item }])
        }
        MailKind::Held | MailKind::Expiry => {
            return Err(Failure::Usage("a mail of this kind is about no token: leave out --token".to_owned()));
        }
    };
    Ok(letter(contact, content, now))
}

/// Writes a mail's parts into a new directory, and asks the desktop to show the HTML.
fn open(composer: &Composer, letter: &Letter, now: Timestamp) -> Outcome {
    let written = composer.write(letter, now).context("the mail cannot be made")?;
    let composed = composer.compose(letter, now).context("the mail cannot be made")?;
    let calendars = composer.calendars(letter, now).context("the mail cannot be made")?;
    let directory =
        tempfile::Builder::new().prefix("lapsed-mail-").tempdir().context("no directory can be made")?.keep();
    let put = |name: &str, bytes: &[u8]| -> anyhow::Result<PathBuf> {
        let path = directory.join(name);
        std::fs::write(&path, bytes).with_context(|| format!("{} cannot be written", path.display()))?;
        output::print(&format!("{}\n", path.display()))?;
        Ok(path)
    };
    put("mail.eml", &composed.bytes)?;
    put("mail.txt", format!("Subject: {}\n\n{}\n", written.subject, written.text).as_bytes())?;
    for calendar in calendars {
        put(calendar.name, calendar.text.as_bytes())?;
    }
    show(&put("mail.html", written.html.as_bytes())?);
    Ok(())
}

/// Has the desktop show a file. Where there is none, its path is on the screen.
fn show(path: &Path) {
    let program = if cfg!(target_os = "macos") { "open" } else { "xdg-open" };
    let mut command = Command::new(program);
    command.arg(path).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    match command.status() {
        Ok(status) if status.success() => {}
        Ok(_) | Err(_) => output::say(&format!("{program} could not show it: open mail.html in a browser.")),
    }
}

/// `lapsed mail test`
#[derive(Debug, Args)]
pub struct Test {
    /// Where a mail about made-up tokens is sent
    #[arg(value_name = "ADDR", value_parser = Address::parse)]
    address: Address,
}

impl Test {
    pub(super) async fn run(self, clock: &impl Clock, settings: &Settings) -> Outcome {
        let now = clock.now();
        let (way, _) = settings.require_mail().map_err(|error| Failure::Usage(error.to_string()))?;
        let letter = letter(sample::contact(self.address.clone()), MailKind::Test.sample(now), now);
        let composed = composer(settings)?.compose(&letter, now).context("the mail cannot be made")?;
        let mut transport = match way {
            Way::Maildir { path } => Transport::Maildir(Maildir::new(path.clone())),
            Way::Smtp(smtp) => Transport::Smtp(Box::new(Smtp::new(*smtp.clone()))),
        };
        let happened = tokio::time::timeout(PATIENCE, send(&mut transport, letter.message, &composed)).await;
        match happened {
            Ok(Happened::Accepted { reply }) => {
                let rows = [("sent to", self.address.to_string()), ("the answer", reply)];
                output::print(&output::facts(&rows))?;
                output::say(
                    "That it was taken does not mean that it arrives: look into the mailbox, and among the spam.",
                );
                Ok(())
            }
            Ok(other) => Err(anyhow::anyhow!("the mail was not taken: {}", other.reply()).into()),
            Err(_) => Err(anyhow::anyhow!("the mail server does not answer within {PATIENCE:?}").into()),
        }
    }
}

async fn send(transport: &mut Transport, id: MessageId, composed: &Composed) -> Happened {
    match transport.ready().await {
        Ok(()) => transport.send(id, composed, async || true).await,
        Err(happened) => happened,
    }
}

/// What makes mails by these settings.
///
/// # Errors
/// When the operator's templates or the link cannot be used.
pub(super) fn composer(settings: &Settings) -> Result<Composer, Failure> {
    let mail = &settings.mail;
    let from = match &mail.from {
        Some(from) => from.clone(),
        None => "tokens@example.org".parse().context("a sender")?,
    };
    let composer = Composer::new(from, mail.reply_to.clone(), mail.manage_url.clone());
    let composer = composer.map_err(|error| Failure::Usage(error.to_string()))?;
    Ok(match &mail.templates {
        Some(directory) => composer.with_templates(templates(directory)?),
        None => composer,
    })
}

/// An operator's templates.
///
/// # Errors
/// All that is wrong with them.
pub(super) fn templates(directory: &Path) -> Result<Templates, Failure> {
    Templates::load(directory).map_err(|error| Failure::Usage(format!("mail.templates: {error}")))
}

fn letter(to: Contact, content: Content, now: Timestamp) -> Letter {
    Letter { message: MessageId::new(to.id.bucket(), now), to, content }
}

fn sample_contact(address: &str) -> anyhow::Result<Contact> {
    let address = Address::parse(address).map_err(|problem| anyhow::anyhow!("{address}: {problem}"))?;
    Ok(sample::contact(address))
}

//! `lapsed mail`: what owners would read, and whether it arrives.

use std::time::Duration;

use anyhow::Context as _;
use chrono::TimeDelta;
use clap::{Args, ValueEnum};

use super::{Failure, Outcome, lookup, output};
use crate::clock::{Clock, Timestamp};
use crate::config::{Settings, Transport as Way};
use crate::mail::compose::{Alert, Composed, Composer, Content, Item, Letter};
use crate::mail::maildir::Maildir;
use crate::mail::outcome::Happened;
use crate::mail::smtp::Smtp;
use crate::mail::transport::Transport;
use crate::policy::Lead;
use crate::store::Store;
use crate::token::{Address, Bucket, Contact, ContactId, Kind, MessageId, Owner, OwnerId, Secret, Token};

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
    /// What the fallback is told of owners that could not be
    Escalation,
    /// What the fallback is told of mails that a guard holds
    Held,
}

/// Which part of a mail.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Part {
    /// The subject and the text
    #[default]
    Text,
    /// The HTML alone, for a browser
    Html,
    /// All of it, as it is sent (RFC 5322)
    Eml,
}

/// `lapsed mail preview`
#[derive(Debug, Args)]
pub struct Preview {
    /// Which mail
    #[arg(long, value_enum, default_value_t)]
    kind: MailKind,
    /// About this token: its id, or the digits that lists print; without it, about made-up ones
    #[arg(long, value_name = "ID")]
    token: Option<String>,
    /// Which part of it
    #[arg(long, value_enum, default_value_t)]
    part: Part,
}

impl Preview {
    pub(super) async fn run<S: Store>(self, store: &S, clock: &impl Clock, settings: &Settings) -> Outcome {
        let now = clock.now();
        let to = sample_contact("owner@example.org", now)?;
        let letter = match &self.token {
            Some(text) => {
                let token = lookup::token(store, text).await?;
                if token.expires_at.is_none() {
                    return Err(anyhow::anyhow!("token {text} never expires: there is no mail about it").into());
                }
                let owner = lookup::owner_of(store, &token).await?;
                let contact = store.contacts_of(owner.id).await?.into_iter().next().unwrap_or(to);
                let escalation =
                    (self.kind == MailKind::Escalation).then(|| "the owner has no contact that takes mail".into());
                let item = Item { token, owner, lead: Lead::EXPIRED, escalation };
                letter(contact, Content::Reminders(vec![item]), now)
            }
            None => letter(to, sample(self.kind, now), now),
        };
        let composer = composer(settings)?;
        let shown = match self.part {
            Part::Eml => {
                let composed = composer.compose(&letter, now).context("the mail cannot be made")?;
                String::from_utf8_lossy(&composed.bytes).into_owned()
            }
            part => {
                let written = composer.write(&letter, now).context("the mail cannot be made")?;
                match part {
                    Part::Html => written.html,
                    Part::Text | Part::Eml => format!("Subject: {}\n\n{}", written.subject, written.text),
                }
            }
        };
        output::print(&format!("{}\n", shown.trim_end_matches('\n')))?;
        Ok(())
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
        let letter = letter(sample_contact(self.address.as_str(), now)?, sample(MailKind::Reminder, now), now);
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

fn composer(settings: &Settings) -> Result<Composer, Failure> {
    let mail = &settings.mail;
    let from = match &mail.from {
        Some(from) => from.clone(),
        None => "tokens@example.org".parse().context("a sender")?,
    };
    let composer = Composer::new(from, mail.reply_to.clone(), mail.manage_url.clone());
    composer.map_err(|error| Failure::Usage(error.to_string()))
}

fn letter(to: Contact, content: Content, now: Timestamp) -> Letter {
    Letter { message: MessageId::new(to.id.bucket(), now), to, content }
}

fn sample_contact(address: &str, now: Timestamp) -> anyhow::Result<Contact> {
    let address = Address::parse(address).map_err(|problem| anyhow::anyhow!("{address}: {problem}"))?;
    let id = ContactId::new(address.bucket(), now);
    Ok(Contact { id, address, time_zone: None, locale: None, suppressed: None })
}

/// Made-up tokens.
fn sample(kind: MailKind, now: Timestamp) -> Content {
    let owner = Owner {
        id: OwnerId::new(Bucket::of("example"), now),
        key: "platform-team".to_owned(),
        name: "Platform team".to_owned(),
        time_zone: chrono_tz::Europe::Berlin,
        locale: "en".to_owned(),
    };
    let item = |description: &str, expires_in: TimeDelta| {
        let token = Token {
            expires_at: Some(now + expires_in),
            scopes: vec!["repo:read".to_owned(), "deploy".to_owned()],
            created_at: now - TimeDelta::days(83),
            ..Token::new(owner.id, Kind::Additional, description, now).with_secret(&Secret::generate(owner.id.bucket()))
        };
        Item { token, owner: owner.clone(), lead: Lead::new(TimeDelta::days(7)), escalation: None }
    };
    match kind {
        MailKind::Reminder => Content::Reminders(vec![
            item("deploy key (CI)", TimeDelta::days(7)),
            item("mirror, nightly", TimeDelta::days(8)),
        ]),
        MailKind::Expired => Content::Reminders(vec![item("deploy key (CI)", -TimeDelta::minutes(5))]),
        MailKind::Escalation => Content::Reminders(vec![Item {
            escalation: Some("the owner has no contact that takes mail".to_owned()),
            ..item("deploy key (CI)", TimeDelta::days(1))
        }]),
        MailKind::Held => Content::Alert(Alert::Held {
            messages: 12_345,
            since: now - TimeDelta::minutes(2),
            next_deadline: Some(now + TimeDelta::days(3)),
            urgent: false,
        }),
    }
}

//! `lapsed run --once --dry-run`: what a run would do now.

use std::collections::HashMap;

use uuid::Uuid;

use super::{fallback, named_by_policies, retention, rules, terms};
use crate::cli::listing::{self, Fields, FormatArg, Listing};
use crate::cli::{Outcome, output};
use crate::clock::{Clock, Timestamp};
use crate::config::Settings;
use crate::jobs::dry_run::{Orders, Would};
use crate::mail::when;
use crate::policy::Lead;
use crate::service;
use crate::store::Store;
use crate::store::accounts::ReminderState;
use crate::store::outbox::MessageKind;
use crate::store::planning::NewReminder;
use crate::token::{Address, ContactId, Owner, Token, TokenId};

/// How many lines a table has at most: people read no more, and programs take another format.
const LINES: u64 = 200;

/// The names of the fields for programs.
const FIELDS: [&str; 9] =
    ["action", "token", "owner", "description", "expires_at", "lead_seconds", "to", "reminders", "state"];

/// Prints it, a line for each token, row of the ledger and message; the counts follow, in the words of `run --once`.
pub(super) async fn run<S: Store>(store: &S, clock: &impl Clock, settings: &Settings, format: FormatArg) -> Outcome {
    let now = clock.now();
    // Whom the store does not know yet gets an id for as long as this takes.
    let mut newcomers: Vec<(ContactId, Address)> = Vec::new();
    let mut named: HashMap<Address, ContactId> = HashMap::new();
    let fallback = fallback(settings)?;
    for address in named_by_policies(settings).chain(&fallback) {
        if named.contains_key(address) {
            continue;
        }
        let id = match store.find_contact(address).await? {
            Some(contact) => contact.id,
            None => {
                let id = ContactId::new(address.bucket(), now);
                newcomers.push((id, address.clone()));
                id
            }
        };
        named.insert(address.clone(), id);
    }
    let fallback = fallback.and_then(|address| named.get(&address).copied());
    let rules = rules::<S>(settings, fallback, |address| named.get(address).copied());
    let orders = Orders {
        rules: &rules,
        terms: &terms(settings, &rules),
        retention: retention(settings),
        newcomers: &newcomers,
        plans: true,
        reconciles: false,
    };
    let header = &["WOULD", "TOKEN", "OWNER", "DESCRIPTION", "EXPIRES", "WHAT"];
    let mut lines =
        Lines { listing: Listing::new(format, header, &FIELDS)?, format, now, newcomers: &newcomers, all: 0 };
    let visit = async |would: Would| lines.print(store, would).await;
    let report = service::dry_run(store, now, &settings.schedule, orders, visit).await?;
    let Lines { listing, all, .. } = lines;
    listing.end("Nothing would be expired, written or sent.")?;
    if format.is_table() && all > LINES {
        output::say(&format!("... and {} lines more, which --format csv has", all - LINES));
    }
    output::say("Nothing was done. A run now would end with:");
    output::say(output::facts(&report.lines).trim_end());
    if let Some(why) = report.wrong_clock {
        output::say(&format!("Nothing would be planned: {why}."));
    }
    if report.guarded {
        output::say("A guard would keep something back: see the [guard] section of the configuration.");
    }
    Ok(())
}

/// Tokens with their owners.
type Known = HashMap<TokenId, (Token, Owner)>;

struct Lines<'a> {
    listing: Listing,
    format: FormatArg,
    now: Timestamp,
    newcomers: &'a [(ContactId, Address)],
    /// How many there would be.
    all: u64,
}

impl Lines<'_> {
    async fn print<S: Store>(&mut self, store: &S, would: Would) -> anyhow::Result<()> {
        if self.format.is_table() && self.all >= LINES {
            self.all += match would {
                Would::Expire(tokens) => tokens.len() as u64,
                Would::Write(reminders) => reminders.len() as u64,
                Would::Send(..) => 1,
            };
            return Ok(());
        }
        match would {
            Would::Expire(tokens) => {
                let known = tokens_with_owners(store, tokens.iter().map(|token| token.id)).await?;
                for token in tokens {
                    self.line(&Line { action: "expire", token: known.get(&token.id), ..Line::default() })?;
                }
            }
            Would::Write(reminders) => {
                let known = tokens_with_owners(store, reminders.iter().map(|reminder| reminder.token)).await?;
                let addresses = self.addresses(store, reminders.iter().filter_map(|r| r.contact)).await?;
                for reminder in &reminders {
                    let to = reminder.contact.and_then(|contact| addresses.get(&contact));
                    let token = known.get(&reminder.token);
                    self.line(&Line { action: "remind", token, to, reminder: Some(reminder), ..Line::default() })?;
                }
            }
            Would::Send(kind, contact, reminders) => {
                let (to, message) = (Some(&contact.address), Some((kind, reminders)));
                self.line(&Line { action: "send", to, message, ..Line::default() })?;
            }
        }
        Ok(())
    }

    fn line(&mut self, line: &Line<'_>) -> anyhow::Result<()> {
        self.all += 1;
        if self.format.is_table() && self.all > LINES {
            return Ok(());
        }
        self.listing.row(|| line.fields(), || line.cells(self.now))
    }

    async fn addresses<S: Store>(
        &self,
        store: &S,
        contacts: impl Iterator<Item = ContactId>,
    ) -> anyhow::Result<HashMap<ContactId, Address>> {
        let mut contacts: Vec<ContactId> = contacts.collect();
        contacts.sort_unstable();
        contacts.dedup();
        let known = store.contacts(&contacts).await?.into_values().map(|contact| (contact.id, contact.address));
        Ok(known.chain(self.newcomers.iter().cloned()).collect())
    }
}

/// Something that would be done.
#[derive(Default)]
struct Line<'a> {
    action: &'static str,
    token: Option<&'a (Token, Owner)>,
    reminder: Option<&'a NewReminder>,
    to: Option<&'a Address>,
    message: Option<(MessageKind, u64)>,
}

impl Line<'_> {
    fn fields(&self) -> Fields {
        let token = self.token.map(|(token, _)| token);
        let text = |text: Option<String>| text.map_or(serde_json::Value::Null, Into::into);
        vec![
            ("action", self.action.into()),
            ("token", text(token.map(|token| token.id.to_string()))),
            ("owner", text(self.token.map(|(_, owner)| owner.key.clone()))),
            ("description", text(token.map(|token| token.description.clone()))),
            ("expires_at", listing::instant(token.and_then(|token| token.expires_at))),
            ("lead_seconds", self.reminder.map_or(serde_json::Value::Null, |r| r.lead.seconds().into())),
            ("to", text(self.to.map(ToString::to_string))),
            ("reminders", self.message.map_or(serde_json::Value::Null, |(_, reminders)| reminders.into())),
            ("state", text(self.state())),
        ]
    }

    /// The state that the row of the ledger would have; the kind of the message.
    fn state(&self) -> Option<String> {
        let kind = self.message.map(|(kind, _)| kind.to_string());
        self.reminder.map(|reminder| reminder.state.to_string()).or(kind)
    }

    fn cells(&self, now: Timestamp) -> Vec<String> {
        let token = self.token.map(|(token, _)| token);
        let zone = self.token.map_or(chrono_tz::UTC, |(_, owner)| owner.time_zone);
        let expires = token.and_then(|token| token.expires_at);
        vec![
            self.action.to_owned(),
            token.map(|token| token.id.short()).unwrap_or_default(),
            self.token.map(|(_, owner)| owner.key.clone()).unwrap_or_default(),
            token.map(|token| token.description.clone()).unwrap_or_default(),
            expires.map(|at| when::day_phrase(at, now, zone).to_string()).unwrap_or_default(),
            self.in_words(),
        ]
    }

    fn in_words(&self) -> String {
        let to = self.to.map(ToString::to_string).unwrap_or_default();
        match (self.reminder, self.message) {
            (Some(reminder), _) => {
                let lead = match reminder.lead {
                    Lead::EXPIRED => "expired notice".to_owned(),
                    Lead::CHANGED => "word of the new deadline".to_owned(),
                    lead => format!("{lead} reminder"),
                };
                match (reminder.state, reminder.reason) {
                    (ReminderState::Pending, None) => format!("{lead} to {to}"),
                    (ReminderState::Pending, Some(why)) => format!("{lead} to {to}: {why}"),
                    (state, Some(why)) => format!("{lead} {state}: {why}"),
                    (state, None) => format!("{lead} {state}"),
                }
            }
            (None, Some((MessageKind::Reminders, 1))) => format!("a mail to {to} with 1 reminder"),
            (None, Some((MessageKind::Reminders, n))) => format!("a mail to {to} with {n} reminders"),
            (None, Some((MessageKind::Escalations, n))) => {
                format!("a mail to {to} with {n} that others could not be told")
            }
            (None, Some(_)) => format!("an alert to {to}"),
            (None, None) => "is marked expired".to_owned(),
        }
    }
}

async fn tokens_with_owners<S: Store>(store: &S, ids: impl Iterator<Item = TokenId>) -> anyhow::Result<Known> {
    // Whom they are told does not matter here.
    let nobody = ContactId::from(Uuid::nil());
    let mut asked: Vec<_> = ids.map(|id| (nobody, id)).collect();
    asked.sort_unstable();
    asked.dedup();
    Ok(store.facts(&asked).await?.remove(&nobody).map(|facts| facts.tokens).unwrap_or_default())
}

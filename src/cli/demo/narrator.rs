//! Tells what happens in the demo: each line comes from a difference between two reads of the store.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::ControlFlow;

use crate::cli::output;
use crate::clock::Timestamp;
use crate::policy::Lead;
use crate::store::Accounts;
use crate::store::accounts::{ReminderRecord, ReminderState, TokenFilter, TokenOrder};
use crate::token::{Address, MessageId, NotValid, Status, Token, TokenId};

/// Names a ledger row: token, generation, lead, address.
type Key = (TokenId, i32, Lead, Option<Address>);

/// Remembers what was read, and tells what is new.
pub(super) struct Narrator {
    begin: Timestamp,
    statuses: HashMap<TokenId, Status>,
    reminders: HashMap<Key, ReminderRecord>,
    digests: Vec<MessageId>,
}

/// What happened to several reminders at once: tokens of which owners, to whom.
#[derive(Default)]
struct Group {
    owners: Vec<String>,
    descriptions: Vec<String>,
}

impl Group {
    fn add(&mut self, owner: &str, token: &Token) {
        if !self.owners.iter().any(|known| known == owner) {
            self.owners.push(owner.to_owned());
        }
        self.descriptions.push(format!("\"{}\"", token.description));
    }

    fn what(&self) -> String {
        let owners = self.owners.join(" and ");
        match self.descriptions.as_slice() {
            [one] => format!("{one} of {owners}"),
            many => format!("{} tokens of {owners}", many.len()),
        }
    }
}

impl Narrator {
    pub(super) fn new(begin: Timestamp) -> Self {
        Self { begin, statuses: HashMap::new(), reminders: HashMap::new(), digests: Vec::new() }
    }

    /// Prints a line: how long the demo has run, what happened, and to what.
    pub(super) fn line(&self, now: Timestamp, what: &str, text: &str) -> anyhow::Result<()> {
        let colour = match what {
            "mailed" => "32",
            "expired" | "refused" => "31",
            "cancelled" | "superseded" | "unreachable" => "33",
            _ => "36",
        };
        let seconds = (now - self.begin).num_seconds();
        output::print(&format!("{seconds:>4}s  \x1b[{colour}m{what:<11}\x1b[0m  {text}\n"))
    }

    /// Reads the store and tells what is new in it.
    pub(super) async fn look(&mut self, store: &impl Accounts, now: Timestamp) -> anyhow::Result<()> {
        let mut expired: Vec<String> = Vec::new();
        let mut planned: BTreeMap<(Lead, String), Group> = BTreeMap::new();
        let mut mailed: BTreeMap<(Option<MessageId>, String), Group> = BTreeMap::new();
        let mut unsaid: Vec<(ReminderState, String)> = Vec::new();
        let mut tokens = Vec::new();
        store
            .each_token(&TokenFilter::default(), TokenOrder::Created, now, |token, owner| {
                tokens.push((token, owner));
                ControlFlow::Continue(())
            })
            .await?;
        let mut read = Vec::new();
        for (token, owner) in tokens {
            let history = store.history(token.id).await?;
            read.push((token, owner, history));
        }
        // A mail that was recorded between two of these reads is told at the next look, as one.
        let in_flight: HashSet<MessageId> = read
            .iter()
            .flat_map(|(_, _, history)| history)
            .filter(|reminder| reminder.state == ReminderState::Pending)
            .filter_map(|reminder| reminder.message)
            .collect();
        for (token, owner, history) in read {
            let name = format!("{owner}'s \"{}\"", token.description);
            let before = self.statuses.insert(token.id, token.status);
            if token.status == Status::Expired && before == Some(Status::Active) {
                expired.push(name.clone());
            }
            for reminder in history {
                if reminder.state != ReminderState::Pending
                    && reminder.message.is_some_and(|message| in_flight.contains(&message))
                {
                    continue;
                }
                let key = (token.id, reminder.generation, reminder.lead, reminder.address.clone());
                let before = self.reminders.insert(key, reminder.clone()).map(|known| known.state);
                if before == Some(reminder.state) {
                    continue;
                }
                let to = reminder.address.as_ref().map_or("nobody", Address::as_str).to_owned();
                let why = reminder.reason.as_deref().unwrap_or_default();
                match reminder.state {
                    ReminderState::Pending => planned.entry((reminder.lead, to)).or_default().add(&owner, &token),
                    ReminderState::Sent => mailed.entry((reminder.message, to)).or_default().add(&owner, &token),
                    state => unsaid.push((state, format!("{} of {name}: {why}", kind(reminder.lead)))),
                }
            }
        }
        if !expired.is_empty() {
            self.line(now, "expired", &expired.join(", "))?;
        }
        for ((lead, to), group) in planned {
            self.line(now, "planned", &format!("{} to {to}: {}", kind(lead), group.what()))?;
        }
        for (state, text) in unsaid {
            self.line(now, state.as_str(), &text)?;
        }
        for ((message, to), group) in mailed {
            let one = if group.descriptions.len() > 1 { "one mail about " } else { "" };
            self.line(now, "mailed", &format!("{to}: {one}{}", group.what()))?;
            if group.descriptions.len() > 1 {
                self.digests.extend(message);
            }
        }
        Ok(())
    }

    /// Tells how a verification went.
    pub(super) fn verified(&self, now: Timestamp, name: &str, said: Result<(), NotValid>) -> anyhow::Result<()> {
        match said {
            Ok(()) => self.line(now, "verified", &format!("{name} is valid")),
            Err(why) => self.line(now, "refused", &format!("{name} is not valid any more: {why}")),
        }
    }

    /// Tells what an owner did.
    pub(super) fn rotated(&self, now: Timestamp, name: &str) -> anyhow::Result<()> {
        self.line(now, "rotated", &format!("{name}, while a reminder about it waits to be sent"))
    }

    /// Whether a reminder about this token waits to be sent.
    pub(super) fn is_pending(&self, token: TokenId, lead: i64) -> bool {
        self.reminders.iter().any(|((id, _, key, _), reminder)| {
            *id == token && key.seconds() == lead && reminder.state == ReminderState::Pending
        })
    }

    /// Whether nothing waits to be sent, but for what the fallback hears of tomorrow: it gets one mail a day.
    pub(super) fn is_quiet(&self) -> bool {
        let waits = |reminder: &ReminderRecord| reminder.state == ReminderState::Pending && !reminder.escalation;
        !self.reminders.values().any(waits)
    }

    /// The first message that spoke of several tokens.
    pub(super) fn first_digest(&self) -> Option<MessageId> {
        self.digests.first().copied()
    }

    /// How many reminders there are, by state.
    pub(super) fn reminder_counts(&self) -> Vec<(String, u64)> {
        let mut counts: BTreeMap<ReminderState, u64> = BTreeMap::new();
        for reminder in self.reminders.values() {
            *counts.entry(reminder.state).or_default() += 1;
        }
        counts.into_iter().map(|(state, count)| (state.to_string(), count)).collect()
    }
}

fn kind(lead: Lead) -> String {
    if lead == Lead::EXPIRED { "expired notice".into() } else { format!("{lead} reminder") }
}

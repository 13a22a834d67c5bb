//! `lapsed outbox`: the messages that wait, that failed, and that a guard holds.

use std::ops::ControlFlow;

use chrono_tz::Tz;
use clap::{ArgGroup, Args, ValueEnum};

use super::listing::{Fields, FormatArg, Listing};
use super::{Outcome, listing, lookup, output};
use crate::clock::{Clock, Timestamp};
use crate::mail::when;
use crate::store::messages::{CarriedRecord, MessageFilter, MessageRecord, Which};
use crate::store::outbox::{MessageKind, MessageState};
use crate::store::{Result as StoreResult, Store};
use crate::token::{Address, Bucket};

/// How often something is tried that another process was in the way of.
const TRIES: u32 = 10;

/// `lapsed outbox list`
#[derive(Debug, Args)]
pub struct List {
    /// Only messages in these states (repeat it, or separate them by commas); without it, those that wait and those
    /// that failed
    #[arg(long, value_enum, value_delimiter = ',', value_name = "STATE")]
    state: Vec<State>,
    /// Messages that were sent and cancelled, too
    #[arg(long, conflicts_with = "state")]
    all: bool,
    /// Only messages to this address
    #[arg(long, value_name = "ADDR", value_parser = Address::parse)]
    to: Option<Address>,
    #[command(flatten)]
    format: FormatArg,
}

/// What has become of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum State {
    /// Never tried yet; collects what becomes due
    Open,
    /// Held by a guard
    Held,
    /// Being sent
    Sending,
    /// To be tried again
    Retry,
    /// A mail server took it
    Sent,
    /// Given up
    Failed,
    /// Had nothing left to say, or was cancelled
    Cancelled,
}

impl From<State> for MessageState {
    fn from(state: State) -> Self {
        match state {
            State::Open => Self::Open,
            State::Held => Self::Held,
            State::Sending => Self::Sending,
            State::Retry => Self::Retry,
            State::Sent => Self::Sent,
            State::Failed => Self::Failed,
            State::Cancelled => Self::Cancelled,
        }
    }
}

impl List {
    pub(super) async fn run<S: Store>(self, store: &S, clock: &impl Clock) -> Outcome {
        let now = clock.now();
        let states = match (self.state.is_empty(), self.all) {
            (false, _) => self.state.into_iter().map(MessageState::from).collect(),
            (true, true) => Vec::new(),
            (true, false) => vec![
                MessageState::Open,
                MessageState::Held,
                MessageState::Sending,
                MessageState::Retry,
                MessageState::Failed,
            ],
        };
        let only_some = !self.all;
        let mut listing =
            Listing::new(self.format, &["MESSAGE", "STATE", "TO", "SAYS", "NEXT", "LAST REPLY"], &FIELDS)?;
        let mut result = Ok(());
        let contact = match &self.to {
            Some(address) => match store.find_contact(address).await? {
                Some(contact) => Some(contact.id),
                None => return Err(anyhow::anyhow!("{address} is not a contact").into()),
            },
            None => None,
        };
        let filter = MessageFilter { states, contact };
        let visit = |message: MessageRecord| {
            result = listing.row(|| fields(&message), || cells(&message, now));
            if result.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        };
        store.each_message(&filter, visit).await?;
        result?;
        listing.end(if only_some { "No such message waits or has failed." } else { "There is no message." })?;
        Ok(())
    }
}

/// The names of [`fields`].
const FIELDS: [&str; 14] = [
    "id",
    "kind",
    "state",
    "to",
    "reminders",
    "attempts",
    "unknown_outcomes",
    "lost_claims",
    "created_at",
    "first_claimed_at",
    "not_before",
    "lease_until",
    "finished_at",
    "last_reply",
];

fn fields(message: &MessageRecord) -> Fields {
    let at = |is: bool| listing::instant(is.then_some(message.not_before));
    let state = message.state;
    vec![
        ("id", message.id.to_string().into()),
        ("kind", message.kind.as_str().into()),
        ("state", state.as_str().into()),
        ("to", message.address.as_ref().map(Address::as_str).into()),
        ("reminders", message.pending.into()),
        ("attempts", message.attempts.into()),
        ("unknown_outcomes", message.unknown_outcomes.into()),
        ("lost_claims", message.lost_claims.into()),
        ("created_at", listing::instant(Some(message.created_at))),
        ("first_claimed_at", listing::instant(message.claimed_at)),
        ("not_before", at(matches!(state, MessageState::Open | MessageState::Retry))),
        ("lease_until", at(state == MessageState::Sending)),
        ("finished_at", listing::instant(message.finished_at)),
        ("last_reply", message.last_reply.clone().into()),
    ]
}

fn cells(message: &MessageRecord, now: Timestamp) -> Vec<String> {
    vec![
        message.id.short(),
        message.state.to_string(),
        to(message),
        says(message),
        next(message, now),
        message.last_reply.clone().unwrap_or_default(),
    ]
}

fn to(message: &MessageRecord) -> String {
    message.address.as_ref().map_or_else(|| "a contact that is gone".to_owned(), ToString::to_string)
}

/// What a message would say, in a few words.
fn says(message: &MessageRecord) -> String {
    match (message.kind, message.pending) {
        (MessageKind::Held | MessageKind::HeldUrgent, _) => "alert: mails are held".into(),
        (MessageKind::Expiry, _) => "alert: tokens wait to be marked".into(),
        (_, 0) => String::new(),
        (MessageKind::Reminders, 1) => "1 reminder".into(),
        (MessageKind::Reminders, n) => format!("{n} reminders"),
        (MessageKind::Escalations, 1) => "1 escalation".into(),
        (MessageKind::Escalations, n) => format!("{n} escalations"),
    }
}

/// What happens to a message next, and when.
fn next(message: &MessageRecord, now: Timestamp) -> String {
    let at = message.not_before;
    let seconds = (at - now).num_seconds();
    let due = if seconds <= 0 { "now".to_owned() } else { format!("in {}", span(seconds)) };
    match message.state {
        MessageState::Open => format!("first try {due}"),
        MessageState::Retry => format!("try {} {due}", message.attempts.saturating_add(1)),
        MessageState::Sending if seconds > 0 => format!("is being sent; lease ends {due}"),
        MessageState::Sending => "to be taken over".into(),
        MessageState::Held => format!("first deadline {}", when::day_phrase(at, now, Tz::UTC)),
        MessageState::Sent | MessageState::Failed | MessageState::Cancelled => {
            let ended = message.finished_at.map_or(0, |ended| (now - ended).num_seconds());
            format!("ended {} ago", span(ended.max(0)))
        }
    }
}

fn span(seconds: i64) -> String {
    match seconds {
        s if s >= 2 * 86_400 => format!("{} days", s / 86_400),
        s if s >= 2 * 3_600 => format!("{} h", s / 3_600),
        s if s >= 120 => format!("{} min", s / 60),
        s => format!("{s} s"),
    }
}

/// `lapsed outbox show`
#[derive(Debug, Args)]
pub struct Show {
    /// Which: its id, or the last digits of it as `lapsed outbox list` prints them
    message: String,
}

impl Show {
    pub(super) async fn run<S: Store>(self, store: &S, clock: &impl Clock) -> Outcome {
        let now = clock.now();
        let message = lookup::message(store, &self.message).await?;
        let carried = store.carried(&message).await?;
        let instant = |at| output::instant(at, Tz::UTC);
        let mut rows = vec![
            ("message", message.id.to_string()),
            ("kind", message.kind.to_string()),
            ("state", message.state.to_string()),
            ("to", to(&message)),
            ("opened", instant(message.created_at)),
        ];
        if message.finished_at.is_none() {
            rows.push(("next", next(&message, now)));
        }
        rows.extend(message.claimed_at.map(|at| ("first tried", instant(at))));
        if message.attempts > 0 {
            rows.push(("attempts", message.attempts.to_string()));
        }
        if message.unknown_outcomes > 0 {
            rows.push(("unknown", format!("{} may have delivered it", counted(message.unknown_outcomes, "attempt"))));
        }
        if message.lost_claims > 0 {
            rows.push(("lost", format!("{} never said what became of it", counted(message.lost_claims, "claim"))));
        }
        rows.extend(message.finished_at.map(|at| ("ended", instant(at))));
        rows.extend(message.last_reply.clone().map(|reply| ("last reply", reply)));
        let mut text = output::facts(&rows);
        if !carried.is_empty() {
            text.push('\n');
            let cells = carried.iter().map(carried_cells).collect();
            text.push_str(&output::table(&["TOKEN", "DESCRIPTION", "LEAD", "DEADLINE", "STATE", "WHY"], cells));
        }
        output::print(&text)?;
        Ok(())
    }
}

fn carried_cells(record: &CarriedRecord) -> Vec<String> {
    vec![
        record.token.short(),
        record.description.clone().unwrap_or_else(|| "(gone)".into()),
        record.lead.to_string(),
        output::instant(record.deadline, Tz::UTC),
        record.state.to_string(),
        record.reason.clone().unwrap_or_default(),
    ]
}

/// `lapsed outbox release`
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("which").required(true).args(["messages", "all"]))]
pub struct Release {
    /// Which: ids, or the last digits of them
    #[arg(value_name = "MESSAGE")]
    messages: Vec<String>,
    /// All that are held
    #[arg(long, alias = "held")]
    all: bool,
}

impl Release {
    pub(super) async fn run<S: Store>(self, store: &S, clock: &impl Clock) -> Outcome {
        let allowed = |message: &MessageRecord| match message.state {
            MessageState::Held => Ok(()),
            _ => Err("only a message that a guard holds can be released"),
        };
        let released =
            each(store, &self.messages, allowed, async |bucket, which| store.release(bucket, which, clock.now()).await);
        say("released", "No message is held.", released.await?)
    }
}

/// `lapsed outbox cancel`
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("which").required(true).args(["messages", "held"]))]
pub struct Cancel {
    /// Which: ids, or the last digits of them
    #[arg(value_name = "MESSAGE")]
    messages: Vec<String>,
    /// All that a guard holds
    #[arg(long)]
    held: bool,
}

impl Cancel {
    pub(super) async fn run<S: Store>(self, store: &S, clock: &impl Clock) -> Outcome {
        let allowed = |message: &MessageRecord| match message.state {
            MessageState::Open | MessageState::Held | MessageState::Retry => Ok(()),
            MessageState::Sending => Err("it is being sent now; if it has to be tried again, it can be cancelled then"),
            MessageState::Sent => Err("it was sent already"),
            MessageState::Failed | MessageState::Cancelled => Err("it will not be sent anyway"),
        };
        let cancelled =
            each(store, &self.messages, allowed, async |bucket, which| store.cancel(bucket, which, clock.now()).await);
        say("cancelled", "No message is held.", cancelled.await?)
    }
}

/// `lapsed outbox retry`
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("which").required(true).args(["messages", "failed"]))]
pub struct Retry {
    /// Which: ids, or the last digits of them
    #[arg(value_name = "MESSAGE")]
    messages: Vec<String>,
    /// All that failed, unless their contact is suppressed
    #[arg(long)]
    failed: bool,
}

impl Retry {
    pub(super) async fn run<S: Store>(self, store: &S, clock: &impl Clock) -> Outcome {
        for text in &self.messages {
            let message = lookup::message(store, text).await?;
            let Some(address) = &message.address else { continue };
            let contact = store.find_contact(address).await?;
            if contact.is_some_and(|contact| contact.suppressed.is_some()) {
                return Err(anyhow::anyhow!(
                    "{text} cannot be tried again: {address} takes no mail; if it does now, run \
                     `lapsed owner contact unsuppress {address}` first"
                )
                .into());
            }
        }
        let allowed = |message: &MessageRecord| match message.state {
            MessageState::Failed | MessageState::Retry => Ok(()),
            MessageState::Open => Err("it has not been tried yet"),
            MessageState::Held => Err("a guard holds it: `lapsed outbox release` lets it go"),
            MessageState::Sending => Err("it is being sent now"),
            MessageState::Sent => Err("it was sent already"),
            MessageState::Cancelled => Err("it had nothing left to say, or was cancelled"),
        };
        let retried =
            each(store, &self.messages, allowed, async |bucket, which| store.retry(bucket, which, clock.now()).await);
        say("to be tried again", "No message has failed whose contact takes mail.", retried.await?)
    }
}

/// Does something with the messages that are named, once all of them are known and allowed; with all, where none is named.
async fn each<S: Store>(
    store: &S,
    names: &[String],
    allowed: impl Fn(&MessageRecord) -> Result<(), &'static str>,
    act: impl AsyncFn(Bucket, Which) -> StoreResult<u64>,
) -> anyhow::Result<u64> {
    let mut targets = Vec::new();
    for name in names {
        let message = lookup::message(store, name).await?;
        allowed(&message).map_err(|why| anyhow::anyhow!("message {name} is {}: {why}", message.state))?;
        targets.push((message.id.bucket(), Which::One(message.id)));
    }
    if names.is_empty() {
        targets.extend((0..=u8::MAX).map(|number| (Bucket::from_number(number), Which::All)));
    }
    let mut count = 0;
    for (bucket, which) in targets {
        let mut tries = 0;
        count += loop {
            match act(bucket, which).await {
                Err(error) if error.is_transient() && tries < TRIES => tries += 1,
                answer => break answer?,
            }
        };
    }
    Ok(count)
}

/// `1 message`, `2 messages`.
fn counted(count: impl Into<i128>, what: &str) -> String {
    let count = count.into();
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

/// Says how many messages it was, or `none` where it was none.
fn say(done: &str, none: &str, count: u64) -> Outcome {
    if count == 0 {
        output::say(none);
    } else {
        output::print(&output::facts(&[(done, counted(count, "message"))]))?;
    }
    Ok(())
}

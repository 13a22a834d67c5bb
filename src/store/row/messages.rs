//! Rows of messages, and of what they carry.

use std::collections::HashMap;

use uuid::Uuid;

use super::{At, ContactRow, broken, word};
use crate::clock::Timestamp;
use crate::policy::{Claimed, Lead, Reason};
use crate::store::foresight::{Alerted, Queued};
use crate::store::messages::{CarriedRecord, MessageRecord};
use crate::store::outbox::{ClaimedMessage, ClaimedReminder, MessageKind, MessageState};
use crate::store::planning::NewReminder;
use crate::store::reports::LedgerRow;
use crate::store::{Error, Result};
use crate::token::{Address, ContactId, MessageId};

row! {
    /// A message that was claimed a moment ago.
    pub(in crate::store) struct ClaimRow {
        pub(in crate::store) id: Uuid,
        pub(in crate::store) contact_id: Uuid,
        kind: String,
        pub(in crate::store) lease_epoch: i32,
        attempts: i32,
        lost_claims: i32,
        created_at: At,
        claimed_at: At,
    }
}

impl ClaimRow {
    /// Whether it takes reminders that are escalated, or those that are not; `None` where it takes none: a retry says the
    /// same or less.
    pub(in crate::store) fn takes(&self) -> Option<bool> {
        let kind = self.kind.parse::<MessageKind>().ok().filter(|kind| kind.carries() && self.lease_epoch == 1);
        kind.map(|kind| kind == MessageKind::Escalations)
    }
}

row! {
    /// The same with its contact, where there is one.
    pub(in crate::store) struct ClaimAndContactRow {
        ..claim: ClaimRow,
        address: Option<String>,
        time_zone: Option<String>,
        locale: Option<String>,
        suppressed_at: Option<At>,
        suppressed_why: Option<String>,
    }
}

impl ClaimAndContactRow {
    /// The two apart.
    pub(in crate::store) fn split(self) -> (ClaimRow, Option<ContactRow>) {
        let Self { claim, address, time_zone, locale, suppressed_at, suppressed_why } = self;
        let id = claim.contact_id;
        let contact =
            address.map(|address| ContactRow { id, address, time_zone, locale, suppressed_at, suppressed_why });
        (claim, contact)
    }
}

row! {
    /// What a claimed message carries.
    pub(in crate::store) struct CarriedRow {
        message_id: Uuid,
        token_id: Uuid,
        generation: i32,
        lead: i64,
        deadline: At,
        escalation: bool,
        reason: Option<String>,
        tightest: i64,
    }
}

/// What a claim brought: messages to send, and those that cannot be read.
pub(in crate::store) struct Claims {
    pub(in crate::store) messages: Vec<ClaimedMessage>,
    pub(in crate::store) broken: Vec<BrokenMessage>,
}

/// A message that cannot be read, why, and the reminders in it that can.
pub(in crate::store) struct BrokenMessage {
    pub(in crate::store) id: Uuid,
    pub(in crate::store) problem: String,
    pub(in crate::store) reminders: Vec<ClaimedReminder>,
}

impl BrokenMessage {
    /// What the fallback is told in its place.
    pub(in crate::store) fn escalations(&self, fallback: ContactId) -> Vec<NewReminder> {
        let escalated = |reminder: &&ClaimedReminder| !reminder.escalation && !reminder.claimed.lead.corrects();
        let carried = self.reminders.iter().filter(escalated);
        carried.map(|reminder| reminder.escalated(fallback, Some(Reason::Undeliverable))).collect()
    }
}

/// Puts claimed messages together from their three kinds of rows. One that cannot be read (its contact is gone, say)
/// must not hold up the others.
pub(in crate::store) fn claimed(
    claims: Vec<ClaimRow>,
    contacts: Vec<ContactRow>,
    carried: Vec<CarriedRow>,
    holder: Uuid,
    lease_until: Timestamp,
) -> Claims {
    let mut carried_by: HashMap<Uuid, Vec<CarriedRow>> = HashMap::new();
    for row in carried {
        carried_by.entry(row.message_id).or_default().push(row);
    }
    // Several messages may go to one contact: one that is new, and one that is tried again.
    let contacts: HashMap<Uuid, ContactRow> = contacts.into_iter().map(|row| (row.id, row)).collect();
    let mut result = Claims { messages: Vec::new(), broken: Vec::new() };
    for claim in claims {
        let id = claim.id;
        let contact = contacts.get(&claim.contact_id).cloned();
        let carried = carried_by.remove(&id).unwrap_or_default().into_iter().map(ClaimedReminder::try_from);
        let (reminders, unreadable): (Vec<_>, Vec<_>) = carried.partition(Result::is_ok);
        let reminders: Vec<ClaimedReminder> = reminders.into_iter().flatten().collect();
        let read = match unreadable.into_iter().find_map(Result::err) {
            Some(error) => Err(error),
            None => message(claim, contact, reminders.clone(), holder, lease_until),
        };
        match read {
            Ok(message) => result.messages.push(message),
            Err(error) => {
                tracing::error!(message_id = %id, %error, "gave up a message that cannot be read");
                result.broken.push(BrokenMessage { id, problem: error.to_string(), reminders });
            }
        }
    }
    result
}

fn message(
    claim: ClaimRow,
    contact: Option<ContactRow>,
    reminders: Vec<ClaimedReminder>,
    holder: Uuid,
    lease_until: Timestamp,
) -> Result<ClaimedMessage> {
    let contact = contact.ok_or_else(|| broken("messages", "contact_id", claim.id, "there is no such contact"))?;
    Ok(ClaimedMessage {
        id: claim.id.into(),
        kind: word("messages", "kind", claim.id, &claim.kind)?,
        contact: contact.try_into()?,
        holder,
        epoch: claim.lease_epoch,
        lease_until,
        attempts: claim.attempts,
        lost_claims: claim.lost_claims,
        created_at: claim.created_at.0,
        first_claimed_at: claim.claimed_at.0,
        reminders,
    })
}

impl TryFrom<CarriedRow> for ClaimedReminder {
    type Error = Error;

    fn try_from(row: CarriedRow) -> Result<Self> {
        let reason = row.reason.as_deref().map(|text| word("reminders", "reason", row.token_id, text));
        Ok(Self {
            token: row.token_id.into(),
            claimed: Claimed {
                lead: Lead::from_seconds(row.lead),
                generation: row.generation,
                tightest: Lead::from_seconds(row.tightest),
            },
            expires_at: row.deadline.0,
            escalation: row.escalation,
            reason: reason.transpose()?,
        })
    }
}

/// A message state and how many there are.
pub(in crate::store) fn message_count((state, count): (String, i64)) -> Result<(MessageState, u64)> {
    let state = word("messages", "state", Uuid::nil(), &state)?;
    Ok((state, u64::try_from(count).unwrap_or_default()))
}

/// The state of a message.
pub(in crate::store) fn message_state(id: MessageId, state: &str) -> Result<MessageState> {
    word("messages", "state", id.uuid(), state)
}

row! {
    /// A message that waits.
    pub(in crate::store) struct QueuedRow {
        id: Uuid,
        contact_id: Uuid,
        kind: String,
        state: String,
        not_before: At,
    }
}

impl TryFrom<QueuedRow> for Queued {
    type Error = Error;

    fn try_from(row: QueuedRow) -> Result<Self> {
        Ok(Self {
            id: row.id.into(),
            contact: row.contact_id.into(),
            kind: word("messages", "kind", row.id, &row.kind)?,
            state: word("messages", "state", row.id, &row.state)?,
            not_before: row.not_before.0,
        })
    }
}

/// What a contact was sent as the fallback.
pub(in crate::store) fn alerted(
    fallback: ContactId,
    (kind, opened_at, claimed_at, is_open): (String, At, Option<At>, bool),
) -> Result<Alerted> {
    let kind = word("messages", "kind", fallback.uuid(), &kind)?;
    Ok(Alerted { kind, opened_at: opened_at.0, claimed_at: claimed_at.map(|at| at.0), is_open })
}

row! {
    /// A message as operators see it.
    pub(in crate::store) struct MessageRow {
        id: Uuid,
        kind: String,
        state: String,
        contact_id: Uuid,
        address: Option<String>,
        created_at: At,
        claimed_at: Option<At>,
        not_before: At,
        finished_at: Option<At>,
        attempts: i32,
        unknown_outcomes: i32,
        lost_claims: i32,
        last_reply: Option<String>,
        pending: i64,
    }
}

impl TryFrom<MessageRow> for MessageRecord {
    type Error = Error;

    fn try_from(row: MessageRow) -> Result<Self> {
        Ok(Self {
            id: row.id.into(),
            kind: word("messages", "kind", row.id, &row.kind)?,
            state: word("messages", "state", row.id, &row.state)?,
            contact: row.contact_id.into(),
            address: row.address.map(Address::from_store),
            created_at: row.created_at.0,
            claimed_at: row.claimed_at.map(|at| at.0),
            not_before: row.not_before.0,
            finished_at: row.finished_at.map(|at| at.0),
            attempts: row.attempts,
            unknown_outcomes: row.unknown_outcomes,
            lost_claims: row.lost_claims,
            last_reply: row.last_reply,
            pending: row.pending.unsigned_abs(),
        })
    }
}

row! {
    /// A row of the ledger, as reports need it.
    pub(in crate::store) struct ReportRow {
        token_id: Uuid,
        generation: i32,
        lead: i64,
        state: String,
        reason: Option<String>,
        escalation: bool,
        settled_at: Option<At>,
    }
}

impl TryFrom<ReportRow> for LedgerRow {
    type Error = Error;

    fn try_from(row: ReportRow) -> Result<Self> {
        Ok(Self {
            token: row.token_id.into(),
            generation: row.generation,
            lead: Lead::from_seconds(row.lead),
            state: word("reminders", "state", row.token_id, &row.state)?,
            reason: row.reason,
            escalation: row.escalation,
            settled_at: row.settled_at.map(|at| at.0),
        })
    }
}

row! {
    /// A reminder that a message carries, as operators see it.
    pub(in crate::store) struct ContentRow {
        token_id: Uuid,
        lead: i64,
        deadline: At,
        state: String,
        reason: Option<String>,
    }
}

impl TryFrom<ContentRow> for CarriedRecord {
    type Error = Error;

    fn try_from(row: ContentRow) -> Result<Self> {
        Ok(Self {
            token: row.token_id.into(),
            description: None,
            lead: Lead::from_seconds(row.lead),
            deadline: row.deadline.0,
            state: word("reminders", "state", row.token_id, &row.state)?,
            reason: row.reason,
        })
    }
}

//! Rows of the ledger and the messages that they need, on SQLite.

use std::collections::HashSet;

use sqlx::{Sqlite as Lite, Transaction};
use uuid::Uuid;

use super::json::{hex, json};
use crate::clock::Timestamp;
use crate::store::Result;
use crate::store::guards::{COUNT, minute};
use crate::store::needed::{Inserted, Needed, Wanted, first_deadlines, in_key_order};
use crate::store::needed::{LAST_DIGEST, next_digest};
use crate::store::outbox::MessageKind;
use crate::store::planning::{NewReminder, Written};
use crate::store::row::At;
use crate::token::{ContactId, MessageId};

/// Writes reminders that the ledger does not have yet, and opens the messages that they need.
pub(super) async fn write_reminders(
    tx: &mut Transaction<'_, Lite>,
    reminders: &[NewReminder],
    now: Timestamp,
    may_open: Option<u64>,
) -> Result<Written> {
    if reminders.is_empty() {
        return Ok(Written::default());
    }
    let rows = json(in_key_order(reminders).into_iter().map(|r| {
        (
            r.bucket().column(),
            hex(r.token.uuid()),
            r.generation,
            r.lead.seconds(),
            hex(r.contact_column()),
            r.expires_at.timestamp(),
            r.state.as_str(),
            r.reason.map(|reason| reason.as_str()),
            i32::from(r.escalation),
        )
    }));
    let inserted: Vec<Inserted> = sqlx::query_as(
        "INSERT INTO reminders \
             (bucket, token_id, generation, lead, contact_id, deadline, state, reason, escalation, created_at, settled_at) \
         SELECT n.value ->> 0, UNHEX(n.value ->> 1), n.value ->> 2, n.value ->> 3, UNHEX(n.value ->> 4), \
                n.value ->> 5, n.value ->> 6, n.value ->> 7, n.value ->> 8, \
                $2, CASE WHEN n.value ->> 6 = 'pending' THEN NULL ELSE $2 END \
         FROM json_each($1) AS n \
         WHERE TRUE \
         ON CONFLICT DO NOTHING \
         RETURNING contact_id, state, escalation, token_id, lead",
    )
    .bind(rows)
    .bind(At(now))
    .fetch_all(&mut **tx)
    .await?;

    let needed = Needed::new(reminders, &inserted, now);
    let reminded = needed.reminded.clone();
    let mut written = Written { pending: needed.pending, reminded, ..Written::default() };
    written.settled = inserted.len() as u64 - written.pending;
    let held = match may_open {
        Some(most) if needed.reminders.len() as u64 > most => {
            let open = with_open(tx, &needed.reminders).await?;
            needed.beyond(most, &open)
        }
        _ => Vec::new(),
    };
    for (contact, not_before) in &needed.escalations {
        let last: (Option<At>,) = sqlx::query_as(LAST_DIGEST)
            .bind(contact.bucket().column())
            .bind(contact.uuid())
            .fetch_one(&mut **tx)
            .await?;
        let not_before = next_digest(last.0.map(|at| at.0), now, *not_before);
        open_messages(tx, &[(*contact, not_before)], MessageKind::Escalations, now).await?;
    }
    let to_open = needed.all_but(&held);
    written.opened = open_messages(tx, &to_open, MessageKind::Reminders, now).await?;
    hold_messages(tx, &held, reminders, now).await?;
    written.held = held.len() as u64;
    Ok(written)
}

/// Those of these contacts that have a message that collects.
async fn with_open(tx: &mut Transaction<'_, Lite>, contacts: &[Wanted]) -> Result<HashSet<Uuid>> {
    // Index messages_open.
    let open: Vec<(Uuid,)> = sqlx::query_as(
        "SELECT m.contact_id \
         FROM json_each($1) AS n \
         CROSS JOIN messages m ON m.bucket = n.value ->> 0 AND m.contact_id = UNHEX(n.value ->> 1) \
         WHERE m.state = 'open' AND m.kind = 'reminders'",
    )
    .bind(json(contacts.iter().map(|(contact, _)| (contact.bucket().column(), hex(contact.uuid())))))
    .fetch_all(&mut **tx)
    .await?;
    Ok(open.into_iter().map(|(id,)| id).collect())
}

/// Opens a message for each contact that has none open. Returns how many are new.
pub(super) async fn open_messages(
    tx: &mut Transaction<'_, Lite>,
    wanted: &[Wanted],
    kind: MessageKind,
    now: Timestamp,
) -> Result<u64> {
    if wanted.is_empty() {
        return Ok(0);
    }
    let ids: Vec<Uuid> = wanted.iter().map(|(contact, _)| MessageId::new(contact.bucket(), now).uuid()).collect();
    let rows = json(wanted.iter().zip(&ids).map(|((contact, not_before), id)| {
        (contact.bucket().column(), hex(*id), hex(contact.uuid()), not_before.timestamp())
    }));
    let open: Vec<(Uuid,)> = sqlx::query_as(
        "INSERT INTO messages \
             (bucket, id, contact_id, kind, state, not_before, attempts, lease_epoch, created_at) \
         SELECT n.value ->> 0, UNHEX(n.value ->> 1), UNHEX(n.value ->> 2), $3, 'open', n.value ->> 3, 0, 0, $2 \
         FROM json_each($1) AS n \
         WHERE TRUE \
         ON CONFLICT (bucket, contact_id, kind) WHERE state = 'open' DO UPDATE \
         SET not_before = MIN(messages.not_before, excluded.not_before) \
         RETURNING id",
    )
    .bind(rows)
    .bind(At(now))
    .bind(kind.as_str())
    .fetch_all(&mut **tx)
    .await?;
    let new: HashSet<Uuid> = ids.into_iter().collect();
    Ok(open.iter().filter(|(id,)| new.contains(id)).count() as u64)
}

/// Keeps back what was written for these contacts, in a held message each: what is held is attached to it at once, so
/// that no other message of the contact takes it along.
async fn hold_messages(
    tx: &mut Transaction<'_, Lite>,
    contacts: &[ContactId],
    reminders: &[NewReminder],
    now: Timestamp,
) -> Result<()> {
    if contacts.is_empty() {
        return Ok(());
    }
    let deadlines = first_deadlines(contacts, reminders, now);
    let rows = json(contacts.iter().zip(deadlines).map(|(contact, deadline)| {
        let bucket = contact.bucket();
        (bucket.column(), hex(MessageId::new(bucket, now).uuid()), hex(contact.uuid()), deadline.timestamp())
    }));
    let held: Vec<(Uuid, Uuid)> = sqlx::query_as(
        "INSERT INTO messages \
             (bucket, id, contact_id, state, not_before, attempts, lease_epoch, created_at) \
         SELECT n.value ->> 0, UNHEX(n.value ->> 1), UNHEX(n.value ->> 2), 'held', n.value ->> 3, 0, 0, $2 \
         FROM json_each($1) AS n \
         WHERE TRUE \
         ON CONFLICT (bucket, contact_id) WHERE state = 'held' DO UPDATE \
         SET not_before = MIN(messages.not_before, excluded.not_before) \
         RETURNING id, contact_id",
    )
    .bind(rows)
    .bind(At(now))
    .fetch_all(&mut **tx)
    .await?;
    // Index reminders_pending.
    sqlx::query(
        "UPDATE reminders AS r SET message_id = UNHEX(m.value ->> 1) \
         FROM json_each($1) AS m \
         WHERE r.bucket = m.value ->> 0 AND r.contact_id = UNHEX(m.value ->> 2) AND r.state = 'pending' \
           AND r.message_id IS NULL AND NOT r.escalation",
    )
    .bind(json(held.iter().map(|(id, contact)| (ContactId::from(*contact).bucket().column(), hex(*id), hex(*contact)))))
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Counts what a job did in this minute, for the guards.
pub(super) async fn count(tx: &mut Transaction<'_, Lite>, name: &str, amount: u64, now: Timestamp) -> Result<()> {
    if amount > 0 {
        let amount = i64::try_from(amount).unwrap_or(i64::MAX);
        sqlx::query(COUNT).bind(name).bind(At(minute(now))).bind(amount).execute(&mut **tx).await?;
    }
    Ok(())
}

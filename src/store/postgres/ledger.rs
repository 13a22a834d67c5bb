//! Rows of the ledger and the messages that they need, on PostgreSQL.

use std::collections::HashSet;

use sqlx::{Postgres as Pg, Transaction};
use uuid::Uuid;

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
    tx: &mut Transaction<'_, Pg>,
    reminders: &[NewReminder],
    now: Timestamp,
    may_open: Option<u64>,
) -> Result<Written> {
    if reminders.is_empty() {
        return Ok(Written::default());
    }
    let rows = in_key_order(reminders);
    let inserted: Vec<Inserted> = sqlx::query_as(
        "INSERT INTO reminders \
             (bucket, token_id, generation, lead, contact_id, deadline, state, reason, escalation, created_at, settled_at) \
         SELECT n.bucket, n.token_id, n.generation, n.lead, n.contact_id, n.deadline, n.state, n.reason, n.escalation, \
                $10, CASE WHEN n.state = 'pending' THEN NULL ELSE $10 END \
         FROM UNNEST($1::smallint[], $2::uuid[], $3::integer[], $4::bigint[], $5::uuid[], $6::timestamptz[], \
                     $7::text[], $8::text[], $9::boolean[]) \
             AS n (bucket, token_id, generation, lead, contact_id, deadline, state, reason, escalation) \
         ON CONFLICT DO NOTHING \
         RETURNING contact_id, state, escalation, token_id, lead",
    )
    .bind(rows.iter().map(|r| r.bucket().column()).collect::<Vec<_>>())
    .bind(rows.iter().map(|r| r.token.uuid()).collect::<Vec<_>>())
    .bind(rows.iter().map(|r| r.generation).collect::<Vec<_>>())
    .bind(rows.iter().map(|r| r.lead.seconds()).collect::<Vec<_>>())
    .bind(rows.iter().map(|r| r.contact_column()).collect::<Vec<_>>())
    .bind(rows.iter().map(|r| r.expires_at).collect::<Vec<_>>())
    .bind(rows.iter().map(|r| r.state.as_str()).collect::<Vec<_>>())
    .bind(rows.iter().map(|r| r.reason.map(|reason| reason.as_str())).collect::<Vec<_>>())
    .bind(rows.iter().map(|r| r.escalation).collect::<Vec<_>>())
    .bind(now)
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
async fn with_open(tx: &mut Transaction<'_, Pg>, contacts: &[Wanted]) -> Result<HashSet<Uuid>> {
    // Index messages_open.
    let open: Vec<(Uuid,)> = sqlx::query_as(
        "SELECT m.contact_id \
         FROM UNNEST($1::smallint[], $2::uuid[]) AS n (bucket, contact_id) \
         JOIN messages m ON m.bucket = n.bucket AND m.contact_id = n.contact_id \
         WHERE m.state = 'open' AND m.kind = 'reminders'",
    )
    .bind(contacts.iter().map(|(c, _)| c.bucket().column()).collect::<Vec<_>>())
    .bind(contacts.iter().map(|(c, _)| c.uuid()).collect::<Vec<_>>())
    .fetch_all(&mut **tx)
    .await?;
    Ok(open.into_iter().map(|(id,)| id).collect())
}

/// Opens a message for each contact, or locks the one that is open: a claim that holds it comes first, and then it is
/// no longer open; one that comes later finds what this transaction wrote. Returns how many are new.
pub(super) async fn open_messages(
    tx: &mut Transaction<'_, Pg>,
    wanted: &[Wanted],
    kind: MessageKind,
    now: Timestamp,
) -> Result<u64> {
    if wanted.is_empty() {
        return Ok(0);
    }
    let ids: Vec<Uuid> = wanted.iter().map(|(c, _)| MessageId::new(c.bucket(), now).uuid()).collect();
    let open: Vec<(Uuid,)> = sqlx::query_as(
        "INSERT INTO messages \
             (bucket, id, contact_id, kind, state, not_before, attempts, lease_epoch, created_at) \
         SELECT n.bucket, n.id, n.contact_id, $6, 'open', n.not_before, 0, 0, $5 \
         FROM UNNEST($1::smallint[], $2::uuid[], $3::uuid[], $4::timestamptz[]) AS n (bucket, id, contact_id, not_before) \
         ON CONFLICT (bucket, contact_id, kind) WHERE state = 'open' DO UPDATE \
         SET not_before = LEAST(messages.not_before, excluded.not_before) \
         RETURNING id",
    )
    .bind(wanted.iter().map(|(c, _)| c.bucket().column()).collect::<Vec<_>>())
    .bind(&ids)
    .bind(wanted.iter().map(|(c, _)| c.uuid()).collect::<Vec<_>>())
    .bind(wanted.iter().map(|(_, not_before)| *not_before).collect::<Vec<_>>())
    .bind(now)
    .bind(kind.as_str())
    .fetch_all(&mut **tx)
    .await?;
    let new: HashSet<Uuid> = ids.into_iter().collect();
    Ok(open.iter().filter(|(id,)| new.contains(id)).count() as u64)
}

/// Keeps back what was written for these contacts, in a held message each: what is held is attached to it at once, so
/// that no other message of the contact takes it along.
async fn hold_messages(
    tx: &mut Transaction<'_, Pg>,
    contacts: &[ContactId],
    reminders: &[NewReminder],
    now: Timestamp,
) -> Result<()> {
    if contacts.is_empty() {
        return Ok(());
    }
    let deadlines = first_deadlines(contacts, reminders, now);
    let held: Vec<(Uuid, Uuid)> = sqlx::query_as(
        "INSERT INTO messages \
             (bucket, id, contact_id, state, not_before, attempts, lease_epoch, created_at) \
         SELECT n.bucket, n.id, n.contact_id, 'held', n.deadline, 0, 0, $5 \
         FROM UNNEST($1::smallint[], $2::uuid[], $3::uuid[], $4::timestamptz[]) AS n (bucket, id, contact_id, deadline) \
         ON CONFLICT (bucket, contact_id) WHERE state = 'held' DO UPDATE \
         SET not_before = LEAST(messages.not_before, excluded.not_before) \
         RETURNING id, contact_id",
    )
    .bind(contacts.iter().map(|c| c.bucket().column()).collect::<Vec<_>>())
    .bind(contacts.iter().map(|c| MessageId::new(c.bucket(), now).uuid()).collect::<Vec<_>>())
    .bind(contacts.iter().map(|c| c.uuid()).collect::<Vec<_>>())
    .bind(deadlines)
    .bind(now)
    .fetch_all(&mut **tx)
    .await?;
    // Index reminders_pending.
    sqlx::query(
        "UPDATE reminders r SET message_id = m.id \
         FROM UNNEST($1::smallint[], $2::uuid[], $3::uuid[]) AS m (bucket, id, contact_id) \
         WHERE r.bucket = m.bucket AND r.contact_id = m.contact_id AND r.state = 'pending' AND r.message_id IS NULL \
           AND NOT r.escalation",
    )
    .bind(held.iter().map(|(_, contact)| ContactId::from(*contact).bucket().column()).collect::<Vec<_>>())
    .bind(held.iter().map(|(id, _)| *id).collect::<Vec<_>>())
    .bind(held.iter().map(|(_, contact)| *contact).collect::<Vec<_>>())
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Counts what a job did in this minute, for the guards.
pub(super) async fn count(tx: &mut Transaction<'_, Pg>, name: &str, amount: u64, now: Timestamp) -> Result<()> {
    if amount > 0 {
        let amount = i64::try_from(amount).unwrap_or(i64::MAX);
        sqlx::query(COUNT).bind(name).bind(minute(now)).bind(amount).execute(&mut **tx).await?;
    }
    Ok(())
}

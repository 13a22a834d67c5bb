//! The outbox on SQLite: the same as on PostgreSQL; a transaction that writes is alone, so nothing needs locking.

use std::collections::HashSet;

use sqlx::{Sqlite as Lite, Transaction};
use uuid::Uuid;

use super::Sqlite;
use super::json::{hex, json};
use super::ledger::{open_messages, write_reminders};
use crate::clock::Timestamp;
use crate::store::Result;
use crate::store::outbox::{
    ClaimedMessage, DETACH, FALLBACK, GIVE_UP_MESSAGE, GIVE_UP_REMINDERS, LAST_SENT, MAILS_DUE, MESSAGE_COUNTS,
    MessageCount, MessageKind, OLDEST_WAITING, Outbox, QUEUE, Queue, RENEW, Record, SUPPRESS, put_off,
};
use crate::store::row::{self, At, CarriedRow, ClaimRow, ContactRow};
use crate::token::{Bucket, MessageId, SYSTEM_OWNER_KEY};

impl Outbox for Sqlite {
    async fn queue(&self, now: Timestamp) -> Result<Queue> {
        let rows: Vec<(i64, Option<At>)> = sqlx::query_as(QUEUE).fetch_all(&self.readers).await?;
        let earliest = rows.into_iter().filter_map(|(bucket, at)| at.map(|at| (bucket, at.0)));
        Ok(Queue::from_earliest(earliest, now))
    }

    async fn claim(
        &self,
        buckets: &[Bucket],
        holder: Uuid,
        now: Timestamp,
        lease_until: Timestamp,
        limit: u32,
    ) -> Result<Vec<ClaimedMessage>> {
        let mut tx = self.begin().await?;
        // Index messages_queue.
        let due: Vec<(Uuid,)> = sqlx::query_as(
            "SELECT id FROM messages \
             WHERE bucket IN (SELECT value FROM json_each($1)) \
               AND state IN ('open', 'retry', 'sending') AND not_before <= $2 \
             ORDER BY bucket, not_before \
             LIMIT $3",
        )
        .bind(json(buckets.iter().map(|bucket| bucket.column())))
        .bind(At(now))
        .bind(i64::from(limit))
        .fetch_all(&mut *tx)
        .await?;
        if due.is_empty() {
            return Ok(Vec::new());
        }
        // On its own: SQLite expects a subquery with a bound limit to be long, and prepares for that by reading the whole table.
        let claims: Vec<ClaimRow> = sqlx::query_as(
            "UPDATE messages AS m \
             SET state = 'sending', not_before = $4, lease_holder = $3, lease_epoch = m.lease_epoch + 1, \
                 claimed_at = COALESCE(m.claimed_at, $2), \
                 lost_claims = m.lost_claims + CASE WHEN m.state = 'sending' THEN 1 ELSE 0 END \
             FROM json_each($1) AS d \
             WHERE m.bucket = d.value ->> 0 AND m.id = UNHEX(d.value ->> 1) \
             RETURNING id, contact_id, kind, lease_epoch, attempts, lost_claims, created_at, claimed_at",
        )
        .bind(json(due.iter().map(|(id,)| (MessageId::from(*id).bucket().column(), hex(*id)))))
        .bind(At(now))
        .bind(holder)
        .bind(At(lease_until))
        .fetch_all(&mut *tx)
        .await?;
        let bucket = |claim: &ClaimRow| MessageId::from(claim.id).bucket().column();
        // Index reminders_pending.
        let takers: Vec<(&ClaimRow, bool)> =
            claims.iter().filter_map(|claim| claim.takes().map(|escalated| (claim, escalated))).collect();
        if !takers.is_empty() {
            sqlx::query(
                "UPDATE reminders AS r INDEXED BY reminders_pending \
                 SET message_id = UNHEX(m.value ->> 1) \
                 FROM json_each($1) AS m \
                 WHERE r.bucket = m.value ->> 0 AND r.contact_id = UNHEX(m.value ->> 2) AND r.state = 'pending' \
                   AND r.message_id IS NULL AND r.escalation = m.value ->> 3",
            )
            .bind(json(takers.iter().map(|(claim, escalated)| {
                (bucket(claim), hex(claim.id), hex(claim.contact_id), i32::from(*escalated))
            })))
            .execute(&mut *tx)
            .await?;
        }
        let claimed = json(claims.iter().map(|claim| (bucket(claim), hex(claim.id), hex(claim.contact_id))));
        let carried: Vec<CarriedRow> = sqlx::query_as(
            "SELECT r.message_id, r.token_id, r.generation, r.lead, r.deadline, r.escalation, r.reason, \
                    ( \
                        SELECT MIN(o.lead) FROM reminders o \
                        WHERE o.bucket = r.bucket AND o.token_id = r.token_id AND o.generation = r.generation \
                          AND o.contact_id = r.contact_id AND o.state IN ('pending', 'sent') \
                    ) AS tightest \
             FROM json_each($1) AS m \
             CROSS JOIN reminders r INDEXED BY reminders_pending \
                 ON r.bucket = m.value ->> 0 AND r.contact_id = UNHEX(m.value ->> 2) \
             WHERE r.state = 'pending' AND r.message_id = UNHEX(m.value ->> 1)",
        )
        .bind(&claimed)
        .fetch_all(&mut *tx)
        .await?;
        let contacts: Vec<ContactRow> = sqlx::query_as(
            "SELECT c.id, c.address, c.time_zone, c.locale, c.suppressed_at, c.suppressed_why \
             FROM json_each($1) AS m \
             CROSS JOIN contacts c ON c.bucket = m.value ->> 0 AND c.id = UNHEX(m.value ->> 2)",
        )
        .bind(&claimed)
        .fetch_all(&mut *tx)
        .await?;
        let claimed = row::claimed(claims, contacts, carried, holder, lease_until);
        for broken in &claimed.broken {
            for statement in [GIVE_UP_MESSAGE, GIVE_UP_REMINDERS] {
                let query = sqlx::query(statement).bind(MessageId::from(broken.id).bucket().column()).bind(broken.id);
                let query = if statement == GIVE_UP_MESSAGE { query.bind(&broken.problem) } else { query };
                query.bind(At(now)).execute(&mut *tx).await?;
            }
            let fallback: Option<(Uuid,)> = sqlx::query_as(FALLBACK)
                .bind(Bucket::of(SYSTEM_OWNER_KEY).column())
                .bind(SYSTEM_OWNER_KEY)
                .fetch_optional(&mut *tx)
                .await?;
            if let Some((fallback,)) = fallback {
                write_reminders(&mut tx, &broken.escalations(fallback.into()), now, None).await?;
            }
        }
        tx.commit().await?;
        Ok(claimed.messages)
    }

    async fn renew(&self, message: &ClaimedMessage, lease_until: Timestamp) -> Result<bool> {
        let renewed = sqlx::query(RENEW)
            .bind(message.id.bucket().column())
            .bind(message.id.uuid())
            .bind(message.holder)
            .bind(message.epoch)
            .bind(At(lease_until))
            .execute(&self.writer)
            .await?;
        Ok(renewed.rows_affected() == 1)
    }

    async fn record(&self, outcomes: &[(&ClaimedMessage, &Record)], now: Timestamp) -> Result<Vec<bool>> {
        let mut tx = self.begin().await?;
        let recorded = finish(&mut tx, outcomes, now).await?;
        let ours: Vec<_> = outcomes.iter().filter(|(message, _)| recorded.contains(&message.id.uuid())).collect();
        settle(&mut tx, &ours, now).await?;
        let escalations: Vec<_> = ours.iter().flat_map(|(_, record)| record.escalations.iter().cloned()).collect();
        write_reminders(&mut tx, &escalations, now, None).await?;
        for (message, at) in put_off(outcomes, &recorded) {
            let (bucket, contact) = (message.id.bucket().column(), message.contact.id);
            let detach = sqlx::query(DETACH).bind(bucket).bind(message.id.uuid()).bind(contact.uuid());
            detach.execute(&mut *tx).await?;
            open_messages(&mut tx, &[(contact, at)], MessageKind::Reminders, now).await?;
        }
        tx.commit().await?;
        Ok(outcomes.iter().map(|(message, _)| recorded.contains(&message.id.uuid())).collect())
    }

    async fn suppress(&self, message: &ClaimedMessage, reply: &str, now: Timestamp) -> Result<()> {
        sqlx::query(SUPPRESS)
            .bind(message.id.bucket().column())
            .bind(message.contact.id.uuid())
            .bind(At(now))
            .bind(reply)
            .bind(message.id.uuid())
            .bind(message.holder)
            .bind(message.epoch)
            .execute(&self.writer)
            .await?;
        Ok(())
    }

    async fn oldest_waiting(&self) -> Result<Option<Timestamp>> {
        let (oldest,): (Option<At>,) = sqlx::query_as(OLDEST_WAITING).fetch_one(&self.readers).await?;
        Ok(oldest.map(|at| at.0))
    }

    async fn mails_due(&self, now: Timestamp, most: u32) -> Result<u32> {
        let query = sqlx::query_as(MAILS_DUE).bind(At(now)).bind(i64::from(most));
        let (due,): (i64,) = query.fetch_one(&self.readers).await?;
        Ok(u32::try_from(due).unwrap_or(most))
    }

    async fn last_sent(&self) -> Result<Option<Timestamp>> {
        let last: Option<(At,)> = sqlx::query_as(LAST_SENT).fetch_optional(&self.readers).await?;
        Ok(last.map(|(at,)| at.0))
    }

    async fn message_counts(&self) -> Result<Vec<MessageCount>> {
        let rows: Vec<(String, i64)> = sqlx::query_as(MESSAGE_COUNTS).fetch_all(&self.readers).await?;
        rows.into_iter().map(row::message_count).collect()
    }
}

/// Ends the messages that are still their holders', and gives their ids.
async fn finish(
    tx: &mut Transaction<'_, Lite>,
    outcomes: &[(&ClaimedMessage, &Record)],
    now: Timestamp,
) -> Result<HashSet<Uuid>> {
    let rows = json(outcomes.iter().map(|(message, record)| {
        let delivery = &record.delivery;
        let (not_before, finished_at) = delivery.instants(now);
        (
            hex(message.id.uuid()),
            hex(message.holder),
            message.epoch,
            delivery.state().as_str(),
            not_before.timestamp(),
            delivery.attempts(),
            delivery.unknown_outcomes(),
            delivery.reply(),
            finished_at.map(|at| at.timestamp()),
            message.id.bucket().column(),
        )
    }));
    let recorded: Vec<(Uuid,)> = sqlx::query_as(
        "UPDATE messages AS m \
         SET state = n.value ->> 3, not_before = n.value ->> 4, attempts = m.attempts + (n.value ->> 5), \
             unknown_outcomes = m.unknown_outcomes + (n.value ->> 6), \
             last_reply = COALESCE(n.value ->> 7, m.last_reply), lease_holder = NULL, finished_at = n.value ->> 8 \
         FROM json_each($1) AS n \
         WHERE m.bucket = n.value ->> 9 AND m.id = UNHEX(n.value ->> 0) AND +m.state = 'sending' \
           AND m.lease_holder = UNHEX(n.value ->> 1) AND m.lease_epoch = n.value ->> 2 \
         RETURNING id",
    )
    .bind(rows)
    .fetch_all(&mut **tx)
    .await?;
    Ok(recorded.into_iter().map(|(id,)| id).collect())
}

/// Says of reminders what has become of them.
async fn settle(
    tx: &mut Transaction<'_, Lite>,
    outcomes: &[&(&ClaimedMessage, &Record)],
    now: Timestamp,
) -> Result<()> {
    let settled: Vec<_> =
        outcomes.iter().flat_map(|(message, record)| record.settled.iter().map(move |s| (*message, s))).collect();
    if settled.is_empty() {
        return Ok(());
    }
    let rows = json(settled.iter().map(|(message, s)| {
        let reason = s.reason.map(|reason| reason.as_str());
        let (contact, id) = (hex(message.contact.id.uuid()), hex(message.id.uuid()));
        let claimed = s.claimed;
        let (generation, lead) = (claimed.generation, claimed.lead.seconds());
        (hex(s.token.uuid()), generation, lead, contact, id, s.state.as_str(), reason, message.id.bucket().column())
    }));
    // Primary key: the plus keeps SQLite from reading all that is settled anew for each of the contact's pending rows.
    sqlx::query(
        "UPDATE reminders AS r \
         SET state = s.value ->> 5, reason = COALESCE(s.value ->> 6, r.reason), settled_at = $2 \
         FROM json_each($1) AS s \
         WHERE r.bucket = s.value ->> 7 AND r.token_id = UNHEX(s.value ->> 0) AND r.generation = s.value ->> 1 \
           AND r.lead = s.value ->> 2 AND r.contact_id = UNHEX(s.value ->> 3) AND +r.state = 'pending' \
           AND r.message_id = UNHEX(s.value ->> 4)",
    )
    .bind(rows)
    .bind(At(now))
    .execute(&mut **tx)
    .await?;
    Ok(())
}

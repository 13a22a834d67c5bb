//! The outbox on PostgreSQL: a claim locks a few rows of one bucket, skipping those that another process holds.

use std::collections::HashSet;

use sqlx::{Connection, PgConnection};
use uuid::Uuid;

use super::Postgres;
use super::ledger::{open_messages, write_reminders};
use crate::clock::Timestamp;
use crate::store::Result;
use crate::store::outbox::{
    ClaimedMessage, DETACH, Delivery, FALLBACK, GIVE_UP_MESSAGE, GIVE_UP_REMINDERS, LAST_SENT, MAILS_DUE,
    MESSAGE_COUNTS, MessageCount, MessageKind, OLDEST_WAITING, Outbox, QUEUE, Queue, RENEW, Record, SUPPRESS, put_off,
};
use crate::store::row::{self, At, CarriedRow, ClaimAndContactRow, ClaimRow};
use crate::token::{Bucket, SYSTEM_OWNER_KEY};

impl Outbox for Postgres {
    async fn queue(&self, now: Timestamp) -> Result<Queue> {
        self.within(async move {
            let mut connection = self.acquire_reader().await?;
            let rows: Vec<(i32, Option<At>)> = sqlx::query_as(QUEUE).fetch_all(&mut *connection).await?;
            self.keep_reader(connection);
            let earliest = rows.into_iter().filter_map(|(bucket, at)| at.map(|at| (i64::from(bucket), at.0)));
            Ok(Queue::from_earliest(earliest, now))
        })
        .await
    }

    async fn mails_due(&self, now: Timestamp, most: u32) -> Result<u32> {
        self.within(async move {
            let query = sqlx::query_as(MAILS_DUE).bind(At(now)).bind(i64::from(most));
            let (due,): (i64,) = query.fetch_one(&self.pool()).await?;
            Ok(u32::try_from(due).unwrap_or(most))
        })
        .await
    }

    async fn claim(
        &self,
        buckets: &[Bucket],
        holder: Uuid,
        now: Timestamp,
        lease_until: Timestamp,
        limit: u32,
    ) -> Result<Vec<ClaimedMessage>> {
        self.within(async move {
            let Some(bucket) = buckets.first().map(|bucket| bucket.column()) else { return Ok(Vec::new()) };
            let mut line = self.lines.take().await?;
            let mut tx = line.begin().await?;
            // Index messages_queue. Two statements: what a planner commits while this one waits is seen by the next.
            let rows: Vec<ClaimAndContactRow> = sqlx::query_as(
                "WITH claimed AS ( \
                 UPDATE messages \
                 SET state = 'sending', not_before = $4, lease_holder = $3, lease_epoch = lease_epoch + 1, \
                     claimed_at = COALESCE(claimed_at, $2), \
                     lost_claims = lost_claims + CASE WHEN state = 'sending' THEN 1 ELSE 0 END \
                 WHERE bucket = $1 AND id = ANY(ARRAY( \
                     SELECT id FROM messages \
                     WHERE bucket = $1 AND state IN ('open', 'retry', 'sending') AND not_before <= $2 \
                     ORDER BY not_before \
                     LIMIT $5 \
                     FOR UPDATE SKIP LOCKED \
                 )) \
                 RETURNING id, contact_id, kind, lease_epoch, attempts, lost_claims, created_at, claimed_at \
             ) \
             SELECT m.id, m.contact_id, m.kind, m.lease_epoch, m.attempts, m.lost_claims, m.created_at, m.claimed_at, \
                    c.address, c.time_zone, c.locale, c.suppressed_at, c.suppressed_why \
             FROM claimed m \
             LEFT JOIN contacts c ON c.bucket = $1 AND c.id = m.contact_id",
            )
            .bind(bucket)
            .bind(now)
            .bind(holder)
            .bind(lease_until)
            .bind(i64::from(limit))
            .fetch_all(&mut *tx)
            .await?;
            if rows.is_empty() {
                tx.rollback().await?;
                self.lines.put_back(line);
                return Ok(Vec::new());
            }
            let (claims, contacts): (Vec<ClaimRow>, Vec<_>) = rows.into_iter().map(ClaimAndContactRow::split).unzip();
            let takers: Vec<(&ClaimRow, bool)> =
                claims.iter().filter_map(|claim| claim.takes().map(|escalated| (claim, escalated))).collect();
            let mut carried: Vec<CarriedRow> = Vec::new();
            if !takers.is_empty() {
                let rows: Vec<CarriedRow> = sqlx::query_as(ATTACH)
                    .bind(bucket)
                    .bind(takers.iter().map(|(claim, _)| claim.id).collect::<Vec<_>>())
                    .bind(takers.iter().map(|(claim, _)| claim.contact_id).collect::<Vec<_>>())
                    .bind(takers.iter().map(|(_, escalated)| *escalated).collect::<Vec<_>>())
                    .fetch_all(&mut *tx)
                    .await?;
                carried.extend(rows);
            }
            let others: Vec<&ClaimRow> = claims.iter().filter(|claim| claim.takes().is_none()).collect();
            if !others.is_empty() {
                let rows: Vec<CarriedRow> = sqlx::query_as(CARRIED)
                    .bind(bucket)
                    .bind(others.iter().map(|claim| claim.id).collect::<Vec<_>>())
                    .bind(others.iter().map(|claim| claim.contact_id).collect::<Vec<_>>())
                    .fetch_all(&mut *tx)
                    .await?;
                carried.extend(rows);
            }
            let contacts = contacts.into_iter().flatten().collect();
            let claimed = row::claimed(claims, contacts, carried, holder, lease_until);
            for broken in &claimed.broken {
                for statement in [GIVE_UP_MESSAGE, GIVE_UP_REMINDERS] {
                    let query = sqlx::query(statement).bind(bucket).bind(broken.id);
                    let query = if statement == GIVE_UP_MESSAGE { query.bind(&broken.problem) } else { query };
                    query.bind(now).execute(&mut *tx).await?;
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
            self.lines.put_back(line);
            Ok(claimed.messages)
        })
        .await
    }

    async fn renew(&self, message: &ClaimedMessage, lease_until: Timestamp) -> Result<bool> {
        self.within(async move {
            let renewed = sqlx::query(RENEW)
                .bind(message.id.bucket().column())
                .bind(message.id.uuid())
                .bind(message.holder)
                .bind(message.epoch)
                .bind(lease_until)
                .execute(&self.pool())
                .await?;
            Ok(renewed.rows_affected() == 1)
        })
        .await
    }

    async fn record(&self, outcomes: &[(&ClaimedMessage, &Record)], now: Timestamp) -> Result<Vec<bool>> {
        self.within(async move {
            let Some((first, _)) = outcomes.first() else { return Ok(Vec::new()) };
            let bucket = first.id.bucket().column();
            let escalated = outcomes.iter().any(|(_, record)| {
                !record.escalations.is_empty() || matches!(record.delivery, Delivery::PutOff { .. })
            });
            let mut line = self.lines.take().await?;
            let recorded = if escalated {
                let mut tx = line.begin().await?;
                let recorded = finish(&mut tx, bucket, outcomes, now).await?;
                let ours = outcomes.iter().filter(|(message, _)| recorded.contains(&message.id.uuid()));
                let escalations: Vec<_> = ours.flat_map(|(_, record)| record.escalations.iter().cloned()).collect();
                write_reminders(&mut tx, &escalations, now, None).await?;
                for (message, at) in put_off(outcomes, &recorded) {
                    let contact = message.contact.id;
                    let detach = sqlx::query(DETACH).bind(bucket).bind(message.id.uuid()).bind(contact.uuid());
                    detach.execute(&mut *tx).await?;
                    open_messages(&mut tx, &[(contact, at)], MessageKind::Reminders, now).await?;
                }
                tx.commit().await?;
                recorded
            } else {
                // One statement, which is a transaction of its own.
                finish(&mut line, bucket, outcomes, now).await?
            };
            self.lines.put_back(line);
            Ok(outcomes.iter().map(|(message, _)| recorded.contains(&message.id.uuid())).collect())
        })
        .await
    }

    async fn suppress(&self, message: &ClaimedMessage, reply: &str, now: Timestamp) -> Result<()> {
        self.within(async move {
            sqlx::query(SUPPRESS)
                .bind(message.id.bucket().column())
                .bind(message.contact.id.uuid())
                .bind(now)
                .bind(reply)
                .bind(message.id.uuid())
                .bind(message.holder)
                .bind(message.epoch)
                .execute(&self.pool())
                .await?;
            Ok(())
        })
        .await
    }

    async fn oldest_waiting(&self) -> Result<Option<Timestamp>> {
        self.within(async move {
            let (oldest,): (Option<At>,) = sqlx::query_as(OLDEST_WAITING).fetch_one(&self.pool()).await?;
            Ok(oldest.map(|at| at.0))
        })
        .await
    }

    async fn last_sent(&self) -> Result<Option<Timestamp>> {
        self.within(async move {
            let last: Option<(At,)> = sqlx::query_as(LAST_SENT).fetch_optional(&self.pool()).await?;
            Ok(last.map(|(at,)| at.0))
        })
        .await
    }

    async fn message_counts(&self) -> Result<Vec<MessageCount>> {
        self.within(async move {
            let rows: Vec<(String, i64)> = sqlx::query_as(MESSAGE_COUNTS).fetch_all(&self.pool()).await?;
            rows.into_iter().map(row::message_count).collect()
        })
        .await
    }
}

/// What a planner wrote for the contacts of messages that are claimed for the first time goes with them. Index
/// reminders_pending.
const ATTACH: &str = "UPDATE reminders r SET message_id = m.id \
     FROM UNNEST($2::uuid[], $3::uuid[], $4::boolean[]) AS m (id, contact_id, escalated) \
     WHERE r.bucket = $1 AND r.contact_id = m.contact_id AND r.state = 'pending' AND r.message_id IS NULL \
       AND r.escalation = m.escalated \
     RETURNING r.message_id, r.token_id, r.generation, r.lead, r.deadline, r.escalation, r.reason, \
         ( \
             SELECT MIN(o.lead) FROM reminders o \
             WHERE o.bucket = r.bucket AND o.token_id = r.token_id AND o.generation = r.generation \
               AND o.contact_id = r.contact_id AND o.state IN ('pending', 'sent') \
         ) AS tightest";

/// What goes with messages that were claimed before. Index reminders_pending.
const CARRIED: &str = "SELECT r.message_id, r.token_id, r.generation, r.lead, r.deadline, r.escalation, r.reason, \
         ( \
             SELECT MIN(o.lead) FROM reminders o \
             WHERE o.bucket = r.bucket AND o.token_id = r.token_id AND o.generation = r.generation \
               AND o.contact_id = r.contact_id AND o.state IN ('pending', 'sent') \
         ) AS tightest \
     FROM reminders r \
     WHERE r.bucket = $1 AND r.message_id = ANY($2) AND r.contact_id = ANY($3) AND r.state = 'pending'";

/// Ends the messages that are still their holders', says of their reminders what has become of them, and gives the
/// messages' ids.
///
/// The primary keys serve it. The empty text keeps the planner from the indexes of what waits, which look small to it and
/// hold what was claimed and sent before, until they are vacuumed.
async fn finish(
    connection: &mut PgConnection,
    bucket: i16,
    outcomes: &[(&ClaimedMessage, &Record)],
    now: Timestamp,
) -> Result<HashSet<Uuid>> {
    let instants = || outcomes.iter().map(|(_, record)| record.delivery.instants(now));
    let settled: Vec<_> =
        outcomes.iter().flat_map(|(message, record)| record.settled.iter().map(move |s| (*message, s))).collect();
    let recorded: Vec<(Uuid,)> = sqlx::query_as(
        "WITH recorded AS ( \
             UPDATE messages m \
             SET state = n.state, not_before = n.not_before, attempts = m.attempts + n.attempts, \
                 unknown_outcomes = m.unknown_outcomes + n.unknown_outcomes, \
                 last_reply = COALESCE(n.reply, m.last_reply), lease_holder = NULL, finished_at = n.finished_at \
             FROM UNNEST($2::uuid[], $3::uuid[], $4::integer[], $5::text[], $6::timestamptz[], $7::integer[], \
                         $8::integer[], $9::text[], $10::timestamptz[]) \
                 AS n (id, holder, epoch, state, not_before, attempts, unknown_outcomes, reply, finished_at) \
             WHERE m.bucket = $1 AND m.id = n.id AND m.state || '' = 'sending' AND m.lease_holder = n.holder \
               AND m.lease_epoch = n.epoch \
             RETURNING m.id \
         ), settled AS ( \
             UPDATE reminders r SET state = s.state, reason = COALESCE(s.reason, r.reason), settled_at = $18 \
             FROM UNNEST($11::uuid[], $12::integer[], $13::bigint[], $14::uuid[], $15::uuid[], $16::text[], \
                         $17::text[]) \
                 AS s (token_id, generation, lead, contact_id, message_id, state, reason) \
             JOIN recorded ON recorded.id = s.message_id \
             WHERE r.bucket = $1 AND r.token_id = s.token_id AND r.generation = s.generation AND r.lead = s.lead \
               AND r.contact_id = s.contact_id AND r.state || '' = 'pending' AND r.message_id = s.message_id \
         ) \
         SELECT id FROM recorded",
    )
    .bind(bucket)
    .bind(outcomes.iter().map(|(message, _)| message.id.uuid()).collect::<Vec<_>>())
    .bind(outcomes.iter().map(|(message, _)| message.holder).collect::<Vec<_>>())
    .bind(outcomes.iter().map(|(message, _)| message.epoch).collect::<Vec<_>>())
    .bind(outcomes.iter().map(|(_, record)| record.delivery.state().as_str()).collect::<Vec<_>>())
    .bind(instants().map(|(not_before, _)| not_before).collect::<Vec<_>>())
    .bind(outcomes.iter().map(|(_, record)| record.delivery.attempts()).collect::<Vec<_>>())
    .bind(outcomes.iter().map(|(_, record)| record.delivery.unknown_outcomes()).collect::<Vec<_>>())
    .bind(outcomes.iter().map(|(_, record)| record.delivery.reply()).collect::<Vec<_>>())
    .bind(instants().map(|(_, finished_at)| finished_at).collect::<Vec<_>>())
    .bind(settled.iter().map(|(_, s)| s.token.uuid()).collect::<Vec<_>>())
    .bind(settled.iter().map(|(_, s)| s.claimed.generation).collect::<Vec<_>>())
    .bind(settled.iter().map(|(_, s)| s.claimed.lead.seconds()).collect::<Vec<_>>())
    .bind(settled.iter().map(|(message, _)| message.contact.id.uuid()).collect::<Vec<_>>())
    .bind(settled.iter().map(|(message, _)| message.id.uuid()).collect::<Vec<_>>())
    .bind(settled.iter().map(|(_, s)| s.state.as_str()).collect::<Vec<_>>())
    .bind(settled.iter().map(|(_, s)| s.reason.map(|reason| reason.as_str())).collect::<Vec<_>>())
    .bind(now)
    .fetch_all(connection)
    .await?;
    Ok(recorded.into_iter().map(|(id,)| id).collect())
}

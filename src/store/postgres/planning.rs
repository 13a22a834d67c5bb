//! Planning on PostgreSQL: pages come from partial indexes, and each batch is written with a handful of statements.

use std::collections::{HashMap, HashSet};

use chrono::{DateTime, Utc};
use sqlx::{Postgres as Pg, Transaction};
use uuid::Uuid;

use super::{Postgres, hold};
use crate::clock::Timestamp;
use crate::policy::Lead;
use crate::store::Result;
use crate::store::accounts::ReminderState;
use crate::store::jobs::Lease;
use crate::store::planning::{
    Candidate, Cutoffs, Decided, Facts, NewReminder, Planning, Progress, Purged, Watermark, Written,
};
use crate::store::row::{self, At, CandidateRow, FactRow, token_columns};
use crate::token::{Bucket, ContactId, MessageId, OwnerId, SYSTEM_OWNER_KEY, TokenId};

/// The bucket, id, generation and deadline of each candidate, as arrays.
type Guards = (Vec<i16>, Vec<Uuid>, Vec<i32>, Vec<DateTime<Utc>>);

fn guards(candidates: &[Candidate]) -> Guards {
    let mut guards = Guards::default();
    for candidate in candidates {
        guards.0.push(candidate.id.bucket().column());
        guards.1.push(candidate.id.uuid());
        guards.2.push(candidate.generation);
        guards.3.push(candidate.deadline.expires_at);
    }
    guards
}

/// Writes reminders that the ledger does not have yet, and opens the messages that they need.
pub(super) async fn write_reminders(
    tx: &mut Transaction<'_, Pg>,
    reminders: &[NewReminder],
    now: Timestamp,
    not_before: Timestamp,
) -> Result<Written> {
    if reminders.is_empty() {
        return Ok(Written::default());
    }
    let inserted: Vec<(Uuid, String)> = sqlx::query_as(
        "INSERT INTO reminders \
             (bucket, token_id, generation, lead, contact_id, deadline, state, reason, escalation, created_at, settled_at) \
         SELECT n.bucket, n.token_id, n.generation, n.lead, n.contact_id, n.deadline, n.state, n.reason, n.escalation, \
                $10, CASE WHEN n.state = 'pending' THEN NULL ELSE $10 END \
         FROM UNNEST($1::smallint[], $2::uuid[], $3::integer[], $4::bigint[], $5::uuid[], $6::timestamptz[], \
                     $7::text[], $8::text[], $9::boolean[]) \
             AS n (bucket, token_id, generation, lead, contact_id, deadline, state, reason, escalation) \
         ON CONFLICT DO NOTHING \
         RETURNING contact_id, state",
    )
    .bind(reminders.iter().map(|r| r.bucket().column()).collect::<Vec<_>>())
    .bind(reminders.iter().map(|r| r.token.uuid()).collect::<Vec<_>>())
    .bind(reminders.iter().map(|r| r.generation).collect::<Vec<_>>())
    .bind(reminders.iter().map(|r| r.lead.seconds()).collect::<Vec<_>>())
    .bind(reminders.iter().map(NewReminder::contact_column).collect::<Vec<_>>())
    .bind(reminders.iter().map(|r| r.expires_at).collect::<Vec<_>>())
    .bind(reminders.iter().map(|r| r.state.as_str()).collect::<Vec<_>>())
    .bind(reminders.iter().map(|r| r.reason.map(|reason| reason.as_str())).collect::<Vec<_>>())
    .bind(reminders.iter().map(|r| r.escalation).collect::<Vec<_>>())
    .bind(now)
    .fetch_all(&mut **tx)
    .await?;

    let mut contacts: Vec<ContactId> = inserted
        .iter()
        .filter(|(_, state)| state == ReminderState::Pending.as_str())
        .map(|(contact, _)| ContactId::from(*contact))
        .collect();
    let pending = contacts.len() as u64;
    // In one order, so that two planners that open messages of the same contacts never wait for each other in a circle.
    contacts.sort_unstable_by_key(|contact| (contact.bucket(), *contact));
    contacts.dedup();
    open_messages(tx, &contacts, now, not_before).await?;
    Ok(Written { tokens: 0, pending, settled: inserted.len() as u64 - pending })
}

/// Opens a message for each contact, or locks the one that is open: a claim that holds it comes first, and then it is
/// no longer open; one that comes later finds what this transaction wrote.
async fn open_messages(
    tx: &mut Transaction<'_, Pg>,
    contacts: &[ContactId],
    now: Timestamp,
    not_before: Timestamp,
) -> Result<()> {
    if contacts.is_empty() {
        return Ok(());
    }
    sqlx::query(
        "INSERT INTO messages \
             (bucket, id, contact_id, state, not_before, attempts, lease_epoch, created_at) \
         SELECT n.bucket, n.id, n.contact_id, 'open', $4, 0, 0, $5 \
         FROM UNNEST($1::smallint[], $2::uuid[], $3::uuid[]) AS n (bucket, id, contact_id) \
         ON CONFLICT (bucket, contact_id) WHERE state = 'open' DO UPDATE \
         SET not_before = LEAST(messages.not_before, excluded.not_before)",
    )
    .bind(contacts.iter().map(|c| c.bucket().column()).collect::<Vec<_>>())
    .bind(contacts.iter().map(|c| MessageId::new(c.bucket(), now).uuid()).collect::<Vec<_>>())
    .bind(contacts.iter().map(|c| c.uuid()).collect::<Vec<_>>())
    .bind(not_before)
    .bind(now)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Writes up to where a lead has been dealt with.
async fn move_watermark(tx: &mut Transaction<'_, Pg>, lead: Lead, watermark: Watermark) -> Result<()> {
    sqlx::query(
        "INSERT INTO watermarks (bucket, lead, instant, token_id) VALUES (0, $1, $2, $3) \
         ON CONFLICT (bucket, lead) DO UPDATE \
         SET instant = excluded.instant, token_id = excluded.token_id",
    )
    .bind(lead.seconds())
    .bind(watermark.instant)
    .bind(watermark.token)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

impl Planning for Postgres {
    async fn overdue(&self, now: Timestamp, limit: u32) -> Result<Vec<Candidate>> {
        // Index tokens_unplanned.
        let rows: Vec<CandidateRow> = sqlx::query_as(
            "SELECT id, owner_id, expires_at, deadline_set_at, generation, replaced_by \
             FROM tokens \
             WHERE unplanned AND status = 'active' AND expires_at <= $1 \
             ORDER BY expires_at, id \
             LIMIT $2",
        )
        .bind(now)
        .bind(i64::from(limit))
        .fetch_all(&self.pool)
        .await?;
        row::all(rows)
    }

    async fn expire(&self, lease: &Lease, decided: Decided<'_>, reached: Option<Watermark>) -> Result<Written> {
        let mut tx = self.begin().await?;
        hold(&mut tx, lease, decided.now).await?;
        let (buckets, ids, generations, deadlines) = guards(decided.looked_at);
        let expired: Vec<(Uuid,)> = sqlx::query_as(
            "UPDATE tokens t SET status = 'expired', ended_at = d.expires_at, unplanned = FALSE \
             FROM UNNEST($1::smallint[], $2::uuid[], $3::integer[], $4::timestamptz[]) \
                 AS d (bucket, id, generation, expires_at) \
             WHERE t.bucket = d.bucket AND t.id = d.id AND t.status = 'active' \
               AND t.generation = d.generation AND t.expires_at = d.expires_at \
             RETURNING t.id",
        )
        .bind(buckets)
        .bind(ids)
        .bind(generations)
        .bind(deadlines)
        .fetch_all(&mut *tx)
        .await?;
        let mut reminders = decided.reminders;
        if expired.len() < decided.looked_at.len() {
            let expired: HashSet<Uuid> = expired.iter().map(|(id,)| *id).collect();
            reminders.retain(|reminder| expired.contains(&reminder.token.uuid()));
        }
        let written = write_reminders(&mut tx, &reminders, decided.now, decided.not_before).await?;
        if let Some(reached) = reached {
            move_watermark(&mut tx, Lead::EXPIRED, reached).await?;
        }
        tx.commit().await?;
        Ok(Written { tokens: expired.len() as u64, ..written })
    }

    async fn revive(&self, lease: &Lease, now: Timestamp, limit: u32) -> Result<u64> {
        // Index tokens_ended: an expired token ended at its deadline, so those that end in the future come last.
        let ids: Vec<(Uuid,)> = sqlx::query_as(
            "SELECT id FROM tokens \
             WHERE ended_at > $1 AND status = 'expired' AND expires_at > $1 \
             ORDER BY ended_at DESC \
             LIMIT $2",
        )
        .bind(now)
        .bind(i64::from(limit))
        .fetch_all(&self.pool)
        .await?;
        if ids.is_empty() {
            return Ok(0);
        }
        let mut tx = self.begin().await?;
        hold(&mut tx, lease, now).await?;
        let revived = sqlx::query(
            "UPDATE tokens t \
             SET status = 'active', ended_at = NULL, generation = t.generation + 1, unplanned = TRUE \
             FROM UNNEST($1::smallint[], $2::uuid[]) AS d (bucket, id) \
             WHERE t.bucket = d.bucket AND t.id = d.id AND t.status = 'expired' AND t.expires_at > $3",
        )
        .bind(ids.iter().map(|(id,)| TokenId::from(*id).bucket().column()).collect::<Vec<_>>())
        .bind(ids.iter().map(|(id,)| *id).collect::<Vec<_>>())
        .bind(now)
        .execute(&mut *tx)
        .await?;
        tx.commit().await?;
        Ok(revived.rows_affected())
    }

    async fn unplanned(&self, now: Timestamp, limit: u32) -> Result<Vec<Candidate>> {
        // Index tokens_unplanned.
        let rows: Vec<CandidateRow> = sqlx::query_as(
            "SELECT id, owner_id, expires_at, deadline_set_at, generation, replaced_by \
             FROM tokens \
             WHERE unplanned AND status = 'active' AND expires_at > $1 \
             ORDER BY expires_at, id \
             LIMIT $2",
        )
        .bind(now)
        .bind(i64::from(limit))
        .fetch_all(&self.pool)
        .await?;
        row::all(rows)
    }

    async fn crossing(&self, lead: Lead, from: Watermark, now: Timestamp, limit: u32) -> Result<Vec<Candidate>> {
        // Index tokens_deadline. The lead is added here and not in SQL, so that both ends are constants to the planner.
        let rows: Vec<CandidateRow> = sqlx::query_as(
            "SELECT id, owner_id, expires_at, deadline_set_at, generation, replaced_by \
             FROM tokens \
             WHERE status = 'active' AND expires_at IS NOT NULL \
               AND (expires_at, id) > ($1, $2) AND expires_at <= $3 \
             ORDER BY expires_at, id \
             LIMIT $4",
        )
        .bind(lead.deadline_for(from.instant))
        .bind(from.token)
        .bind(lead.deadline_for(now))
        .bind(i64::from(limit))
        .fetch_all(&self.pool)
        .await?;
        row::all(rows)
    }

    async fn reachable(&self, owners: &[OwnerId]) -> Result<HashMap<OwnerId, Vec<ContactId>>> {
        let links: Vec<(Uuid, Uuid)> = sqlx::query_as(
            "SELECT oc.owner_id, oc.contact_id \
             FROM UNNEST($1::smallint[], $2::uuid[]) AS o (bucket, id) \
             JOIN owner_contacts oc ON oc.bucket = o.bucket AND oc.owner_id = o.id",
        )
        .bind(owners.iter().map(|owner| owner.bucket().column()).collect::<Vec<_>>())
        .bind(owners.iter().map(|owner| owner.uuid()).collect::<Vec<_>>())
        .fetch_all(&self.pool)
        .await?;
        let contacts: HashSet<Uuid> = links.iter().map(|(_, contact)| *contact).collect();
        let taking: Vec<(Uuid,)> = sqlx::query_as(
            "SELECT c.id \
             FROM UNNEST($1::smallint[], $2::uuid[]) AS n (bucket, id) \
             JOIN contacts c ON c.bucket = n.bucket AND c.id = n.id \
             WHERE c.suppressed_at IS NULL",
        )
        .bind(contacts.iter().map(|id| ContactId::from(*id).bucket().column()).collect::<Vec<_>>())
        .bind(contacts.iter().copied().collect::<Vec<_>>())
        .fetch_all(&self.pool)
        .await?;
        let taking: HashSet<Uuid> = taking.into_iter().map(|(id,)| id).collect();
        let mut reachable: HashMap<OwnerId, Vec<ContactId>> = HashMap::new();
        for (owner, contact) in links.into_iter().filter(|(_, contact)| taking.contains(contact)) {
            reachable.entry(owner.into()).or_default().push(contact.into());
        }
        Ok(reachable)
    }

    async fn plan(&self, lease: &Lease, decided: Decided<'_>, progress: Progress) -> Result<Written> {
        let mut tx = self.begin().await?;
        hold(&mut tx, lease, decided.now).await?;
        let (buckets, ids, generations, deadlines) = guards(decided.looked_at);
        let mut written = Written::default();
        if !decided.reminders.is_empty() {
            let unchanged: Vec<(Uuid,)> = sqlx::query_as(
                "SELECT t.id \
                 FROM UNNEST($1::smallint[], $2::uuid[], $3::integer[], $4::timestamptz[]) \
                     AS d (bucket, id, generation, expires_at) \
                 JOIN tokens t ON t.bucket = d.bucket AND t.id = d.id \
                 WHERE t.status = 'active' AND t.generation = d.generation AND t.expires_at = d.expires_at",
            )
            .bind(&buckets)
            .bind(&ids)
            .bind(&generations)
            .bind(&deadlines)
            .fetch_all(&mut *tx)
            .await?;
            let unchanged: HashSet<Uuid> = unchanged.into_iter().map(|(id,)| id).collect();
            let mut reminders = decided.reminders;
            reminders.retain(|reminder| unchanged.contains(&reminder.token.uuid()));
            written = write_reminders(&mut tx, &reminders, decided.now, decided.not_before).await?;
        }
        match progress {
            Progress::Planned => {
                let cleared = sqlx::query(
                    "UPDATE tokens t SET unplanned = FALSE \
                     FROM UNNEST($1::smallint[], $2::uuid[], $3::integer[], $4::timestamptz[]) \
                         AS d (bucket, id, generation, expires_at) \
                     WHERE t.bucket = d.bucket AND t.id = d.id AND t.unplanned \
                       AND t.generation = d.generation AND t.expires_at = d.expires_at",
                )
                .bind(&buckets)
                .bind(&ids)
                .bind(&generations)
                .bind(&deadlines)
                .execute(&mut *tx)
                .await?;
                written.tokens = cleared.rows_affected();
            }
            Progress::Reached(lead, watermark) => {
                move_watermark(&mut tx, lead, watermark).await?;
            }
        }
        tx.commit().await?;
        Ok(written)
    }

    async fn watermarks(&self) -> Result<HashMap<Lead, Watermark>> {
        let rows: Vec<(i64, At, Uuid)> =
            sqlx::query_as("SELECT lead, instant, token_id FROM watermarks WHERE bucket = 0")
                .fetch_all(&self.pool)
                .await?;
        Ok(rows
            .into_iter()
            .map(|(lead, instant, token)| (Lead::from_seconds(lead), Watermark { instant: instant.0, token }))
            .collect())
    }

    async fn keep_watermarks(&self, lease: &Lease, leads: &[Lead], now: Timestamp) -> Result<()> {
        let mut tx = self.begin().await?;
        hold(&mut tx, lease, now).await?;
        sqlx::query("DELETE FROM watermarks WHERE bucket = 0 AND lead <> ALL($1)")
            .bind(leads.iter().map(|lead| lead.seconds()).collect::<Vec<_>>())
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;
        Ok(())
    }

    async fn facts(&self, asked: &[(ContactId, TokenId)]) -> Result<HashMap<ContactId, Facts>> {
        // Everything by primary key: an address may speak for thousands of owners, and only those of the tokens matter.
        let rows: Vec<FactRow> = sqlx::query_as(concat!(
            "SELECT ",
            token_columns!(),
            ", o.key AS owner_key, o.name AS owner_name, o.time_zone AS owner_time_zone, o.locale AS owner_locale, \
             n.contact_id, \
             EXISTS ( \
                 SELECT 1 FROM owner_contacts oc \
                 WHERE oc.bucket = t.bucket AND oc.owner_id = t.owner_id AND oc.contact_id = n.contact_id \
             ) AS speaks_for, \
             ( \
                 SELECT oc.contact_id \
                 FROM owners s \
                 JOIN owner_contacts oc ON oc.bucket = s.bucket AND oc.owner_id = s.id \
                 WHERE s.bucket = $4 AND s.key = $5 \
                 LIMIT 1 \
             ) AS fallback \
             FROM UNNEST($1::smallint[], $2::uuid[], $3::uuid[]) AS n (bucket, id, contact_id) \
             JOIN tokens t ON t.bucket = n.bucket AND t.id = n.id \
             JOIN owners o ON o.bucket = t.bucket AND o.id = t.owner_id"
        ))
        .bind(asked.iter().map(|(_, token)| token.bucket().column()).collect::<Vec<_>>())
        .bind(asked.iter().map(|(_, token)| token.uuid()).collect::<Vec<_>>())
        .bind(asked.iter().map(|(contact, _)| contact.uuid()).collect::<Vec<_>>())
        .bind(Bucket::of(SYSTEM_OWNER_KEY).column())
        .bind(SYSTEM_OWNER_KEY)
        .fetch_all(&self.pool)
        .await?;
        Ok(row::facts(rows))
    }

    async fn purge(&self, lease: &Lease, cutoffs: Cutoffs, now: Timestamp, limit: u32) -> Result<Purged> {
        let mut tx = self.begin().await?;
        hold(&mut tx, lease, now).await?;
        let limit = i64::from(limit);
        // Index reminders_deadline. A pending row still has a message to go with.
        let reminders = sqlx::query(
            "DELETE FROM reminders r \
             USING ( \
                 SELECT bucket, token_id, generation, lead, contact_id \
                 FROM reminders \
                 WHERE deadline < $1 AND state <> 'pending' \
                 ORDER BY deadline \
                 LIMIT $2 \
             ) AS old \
             WHERE r.bucket = old.bucket AND r.token_id = old.token_id AND r.generation = old.generation \
               AND r.lead = old.lead AND r.contact_id = old.contact_id",
        )
        .bind(cutoffs.reminders)
        .bind(limit)
        .execute(&mut *tx)
        .await?;
        // Index messages_finished.
        let messages = sqlx::query(
            "DELETE FROM messages m \
             USING (SELECT bucket, id FROM messages WHERE finished_at < $1 ORDER BY finished_at LIMIT $2) AS old \
             WHERE m.bucket = old.bucket AND m.id = old.id",
        )
        .bind(cutoffs.messages)
        .bind(limit)
        .execute(&mut *tx)
        .await?;
        // Index tokens_ended.
        let tokens = sqlx::query(
            "DELETE FROM tokens t \
             USING ( \
                 SELECT bucket, id FROM tokens \
                 WHERE ended_at < $1 AND (kind <> 'primary' OR replaced_by IS NOT NULL) \
                 ORDER BY ended_at \
                 LIMIT $2 \
             ) AS old \
             WHERE t.bucket = old.bucket AND t.id = old.id AND t.ended_at < $1",
        )
        .bind(cutoffs.ended_tokens)
        .bind(limit)
        .execute(&mut *tx)
        .await?;
        tx.commit().await?;
        Ok(Purged {
            reminders: reminders.rows_affected(),
            messages: messages.rows_affected(),
            tokens: tokens.rows_affected(),
        })
    }
}

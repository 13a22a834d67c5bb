//! Planning on PostgreSQL: pages come from partial indexes, and each batch is written with a handful of statements.

use std::collections::HashMap;

use chrono::{DateTime, Utc};
use sqlx::{Postgres as Pg, Transaction};
use uuid::Uuid;

use super::ledger::{count, write_reminders};
use super::{Postgres, hold};
use crate::clock::Timestamp;
use crate::policy::Lead;
use crate::store::Result;
use crate::store::common_planning::common_planning;
use crate::store::guards::EXPIRED;
use crate::store::jobs::Lease;
use crate::store::planning::{
    ADOPT, Candidate, Decided, FORGET_WATERMARKS, MOVE_WATERMARK, NEXT_DEADLINE, POLICIES, Planning, Progress,
    Watermark, Written, only_of,
};
use crate::store::row::{self, At, CandidateRow, candidate_columns};
use crate::token::TokenId;

/// In the order of the table's key: neighbours in its pages one after the other.
fn in_key_order(candidates: &[Candidate]) -> Vec<&Candidate> {
    let mut candidates: Vec<&Candidate> = candidates.iter().collect();
    candidates.sort_unstable_by_key(|candidate| (candidate.id.bucket(), candidate.id));
    candidates
}

/// The bucket, id, generation and deadline of each candidate, as arrays.
type Guards = (Vec<i16>, Vec<Uuid>, Vec<i32>, Vec<DateTime<Utc>>);

fn guards(candidates: &[&Candidate]) -> Guards {
    let mut guards = Guards::default();
    for candidate in candidates {
        guards.0.push(candidate.id.bucket().column());
        guards.1.push(candidate.id.uuid());
        guards.2.push(candidate.generation);
        guards.3.push(candidate.deadline.expires_at);
    }
    guards
}

/// Writes up to where a lead has been dealt with.
async fn move_watermark(tx: &mut Transaction<'_, Pg>, lead: Lead, watermark: Watermark) -> Result<()> {
    sqlx::query(MOVE_WATERMARK)
        .bind(lead.seconds())
        .bind(watermark.instant)
        .bind(watermark.token)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

impl Planning for Postgres {
    common_planning!();

    async fn expire(&self, lease: &Lease, decided: Decided<'_>, reached: Option<Watermark>) -> Result<Written> {
        self.within(async move {
            let mut tx = self.begin().await?;
            hold(&mut tx, lease, decided.now).await?;
            let (buckets, ids, generations, deadlines) = guards(&in_key_order(decided.looked_at));
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
                reminders = only_of(&expired, reminders);
            }
            let Decided { now, may_open, .. } = decided;
            let written = write_reminders(&mut tx, &reminders, now, may_open).await?;
            if let Some(reached) = reached {
                move_watermark(&mut tx, Lead::EXPIRED, reached).await?;
            }
            count(&mut tx, EXPIRED, expired.len() as u64, now).await?;
            count(&mut tx, lease.job, written.opened, now).await?;
            tx.commit().await?;
            Ok(Written { tokens: expired.len() as u64, ..written })
        })
        .await
    }

    async fn revive(&self, lease: &Lease, now: Timestamp, limit: u32) -> Result<u64> {
        self.within(async move {
            // Index tokens_ended: an expired token ended at its deadline, so those that end in the future come last.
            let ids: Vec<(Uuid,)> = sqlx::query_as(
                "SELECT id FROM tokens \
             WHERE ended_at > $1 AND status = 'expired' AND expires_at > $1 \
             ORDER BY ended_at DESC \
             LIMIT $2",
            )
            .bind(now)
            .bind(i64::from(limit))
            .fetch_all(&self.pool())
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
        })
        .await
    }

    async fn plan(&self, lease: &Lease, decided: Decided<'_>, progress: Progress) -> Result<Written> {
        self.within(async move {
            let mut tx = self.begin().await?;
            hold(&mut tx, lease, decided.now).await?;
            let looked_at = in_key_order(decided.looked_at);
            let (buckets, ids, generations, deadlines) = guards(&looked_at);
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
                let reminders = only_of(&unchanged, decided.reminders);
                let Decided { now, may_open, .. } = decided;
                written = write_reminders(&mut tx, &reminders, now, may_open).await?;
                count(&mut tx, lease.job, written.opened, now).await?;
            }
            match progress {
                Progress::Planned => {
                    let descriptions = looked_at.iter().map(|c| c.traits.as_ref().map(|t| t.description.as_str()));
                    let cleared = sqlx::query(
                        "UPDATE tokens t SET unplanned = FALSE \
                     FROM UNNEST($1::smallint[], $2::uuid[], $3::integer[], $4::timestamptz[], $5::text[]) \
                         AS d (bucket, id, generation, expires_at, description) \
                     WHERE t.bucket = d.bucket AND t.id = d.id AND t.unplanned \
                       AND t.generation = d.generation AND t.expires_at = d.expires_at \
                       AND t.description = COALESCE(d.description, t.description)",
                    )
                    .bind(&buckets)
                    .bind(&ids)
                    .bind(&generations)
                    .bind(&deadlines)
                    .bind(descriptions.collect::<Vec<_>>())
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
        })
        .await
    }

    async fn keep_watermarks(&self, lease: &Lease, leads: &[Lead], now: Timestamp) -> Result<()> {
        self.within(async move {
            let mut tx = self.begin().await?;
            hold(&mut tx, lease, now).await?;
            sqlx::query("DELETE FROM watermarks WHERE bucket = 0 AND lead <> ALL($1)")
                .bind(leads.iter().map(|lead| lead.seconds()).collect::<Vec<_>>())
                .execute(&mut *tx)
                .await?;
            tx.commit().await?;
            Ok(())
        })
        .await
    }
}

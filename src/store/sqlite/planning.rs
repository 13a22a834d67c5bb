//! Planning on SQLite: the same statements as on PostgreSQL, with JSON in the place of arrays.

use std::collections::HashMap;

use sqlx::{Sqlite as Lite, Transaction};
use uuid::Uuid;

use super::json::{hex, json};
use super::ledger::{count, write_reminders};
use super::{Sqlite, hold};
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

/// The bucket, id, generation, deadline and, where that matters, description of each candidate, in the order of the table,
/// which is that of its pages.
fn guards(candidates: &[Candidate]) -> String {
    let mut candidates: Vec<&Candidate> = candidates.iter().collect();
    candidates.sort_unstable_by_key(|candidate| (candidate.id.bucket(), candidate.id));
    json(candidates.into_iter().map(|c| {
        let description = c.traits.as_ref().map(|traits| traits.description.as_str());
        (c.id.bucket().column(), hex(c.id.uuid()), c.generation, c.deadline.expires_at.timestamp(), description)
    }))
}

/// Writes up to where a lead has been dealt with.
async fn move_watermark(tx: &mut Transaction<'_, Lite>, lead: Lead, watermark: Watermark) -> Result<()> {
    sqlx::query(MOVE_WATERMARK)
        .bind(lead.seconds())
        .bind(At(watermark.instant))
        .bind(watermark.token)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

impl Planning for Sqlite {
    common_planning!();

    async fn expire(&self, lease: &Lease, decided: Decided<'_>, reached: Option<Watermark>) -> Result<Written> {
        let mut tx = self.begin().await?;
        hold(&mut tx, lease, decided.now).await?;
        let expired: Vec<(Uuid,)> = sqlx::query_as(
            "UPDATE tokens AS t SET status = 'expired', ended_at = t.expires_at, unplanned = 0 \
             FROM json_each($1) AS d \
             WHERE t.bucket = d.value ->> 0 AND t.id = UNHEX(d.value ->> 1) AND t.status = 'active' \
               AND t.generation = d.value ->> 2 AND t.expires_at = d.value ->> 3 \
             RETURNING id",
        )
        .bind(guards(decided.looked_at))
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
    }

    async fn revive(&self, lease: &Lease, now: Timestamp, limit: u32) -> Result<u64> {
        // Index tokens_ended: an expired token ended at its deadline, so those that end in the future come last.
        let ids: Vec<(Uuid,)> = sqlx::query_as(
            "SELECT id FROM tokens \
             WHERE ended_at > $1 AND status = 'expired' AND expires_at > $1 \
             ORDER BY ended_at DESC \
             LIMIT $2",
        )
        .bind(At(now))
        .bind(i64::from(limit))
        .fetch_all(&self.readers)
        .await?;
        if ids.is_empty() {
            return Ok(0);
        }
        let mut tx = self.begin().await?;
        hold(&mut tx, lease, now).await?;
        let revived = sqlx::query(
            "UPDATE tokens AS t \
             SET status = 'active', ended_at = NULL, generation = t.generation + 1, unplanned = 1 \
             FROM json_each($1) AS d \
             WHERE t.bucket = d.value ->> 0 AND t.id = UNHEX(d.value ->> 1) AND t.status = 'expired' \
               AND t.expires_at > $2",
        )
        .bind(json(ids.iter().map(|(id,)| (TokenId::from(*id).bucket().column(), hex(*id)))))
        .bind(At(now))
        .execute(&mut *tx)
        .await?;
        tx.commit().await?;
        Ok(revived.rows_affected())
    }

    async fn plan(&self, lease: &Lease, decided: Decided<'_>, progress: Progress) -> Result<Written> {
        let mut tx = self.begin().await?;
        hold(&mut tx, lease, decided.now).await?;
        let guards = guards(decided.looked_at);
        let mut written = Written::default();
        if !decided.reminders.is_empty() {
            let unchanged: Vec<(Uuid,)> = sqlx::query_as(
                "SELECT t.id \
                 FROM json_each($1) AS d \
                 CROSS JOIN tokens t ON t.bucket = d.value ->> 0 AND t.id = UNHEX(d.value ->> 1) \
                 WHERE t.status = 'active' AND t.generation = d.value ->> 2 AND t.expires_at = d.value ->> 3",
            )
            .bind(&guards)
            .fetch_all(&mut *tx)
            .await?;
            let reminders = only_of(&unchanged, decided.reminders);
            let Decided { now, may_open, .. } = decided;
            written = write_reminders(&mut tx, &reminders, now, may_open).await?;
            count(&mut tx, lease.job, written.opened, now).await?;
        }
        match progress {
            Progress::Planned => {
                let cleared = sqlx::query(
                    "UPDATE tokens AS t SET unplanned = 0 \
                     FROM json_each($1) AS d \
                     WHERE t.bucket = d.value ->> 0 AND t.id = UNHEX(d.value ->> 1) AND t.unplanned \
                       AND t.generation = d.value ->> 2 AND t.expires_at = d.value ->> 3 \
                       AND t.description = COALESCE(d.value ->> 4, t.description)",
                )
                .bind(&guards)
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

    async fn keep_watermarks(&self, lease: &Lease, leads: &[Lead], now: Timestamp) -> Result<()> {
        let mut tx = self.begin().await?;
        hold(&mut tx, lease, now).await?;
        sqlx::query("DELETE FROM watermarks WHERE bucket = 0 AND lead NOT IN (SELECT value FROM json_each($1))")
            .bind(json(leads.iter().map(|lead| lead.seconds())))
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;
        Ok(())
    }
}

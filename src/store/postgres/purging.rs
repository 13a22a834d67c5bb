//! Purging on PostgreSQL: each old row is found along an index and deleted by its key; a commit need not wait for the disk,
//! as what a crash brings back is removed again.

use super::{Postgres, hold};
use crate::clock::Timestamp;
use crate::store::Result;
use crate::store::guards::FORGET_COUNTS;
use crate::store::jobs::Lease;
use crate::store::purging::{Cutoffs, Purged, Purging};

impl Purging for Postgres {
    async fn purge(&self, lease: &Lease, cutoffs: Cutoffs, now: Timestamp, limit: u32) -> Result<Purged> {
        self.within(async move {
            let mut tx = self.begin_relaxed().await?;
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
            sqlx::query(FORGET_COUNTS).bind(cutoffs.guard_counts).execute(&mut *tx).await?;
            tx.commit().await?;
            Ok(Purged {
                reminders: reminders.rows_affected(),
                messages: messages.rows_affected(),
                tokens: tokens.rows_affected(),
            })
        })
        .await
    }
}

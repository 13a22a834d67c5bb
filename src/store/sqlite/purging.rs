//! Purging on SQLite: each old row is found along an index and deleted by its key.

use super::{Sqlite, hold};
use crate::clock::Timestamp;
use crate::store::Result;
use crate::store::guards::FORGET_COUNTS;
use crate::store::jobs::Lease;
use crate::store::purging::{Cutoffs, Purged, Purging};
use crate::store::row::At;

impl Purging for Sqlite {
    async fn purge(&self, lease: &Lease, cutoffs: Cutoffs, now: Timestamp, limit: u32) -> Result<Purged> {
        let mut tx = self.begin().await?;
        hold(&mut tx, lease, now).await?;
        let limit = i64::from(limit);
        // Index reminders_deadline. A pending row still has a message to go with.
        let reminders = sqlx::query(
            "DELETE FROM reminders \
             WHERE (bucket, token_id, generation, lead, contact_id) IN ( \
                 SELECT bucket, token_id, generation, lead, contact_id \
                 FROM reminders \
                 WHERE deadline < $1 AND state <> 'pending' \
                 ORDER BY deadline \
                 LIMIT $2 \
             )",
        )
        .bind(At(cutoffs.reminders))
        .bind(limit)
        .execute(&mut *tx)
        .await?;
        // Index messages_finished.
        let messages = sqlx::query(
            "DELETE FROM messages \
             WHERE (bucket, id) IN ( \
                 SELECT bucket, id FROM messages WHERE finished_at < $1 ORDER BY finished_at LIMIT $2 \
             )",
        )
        .bind(At(cutoffs.messages))
        .bind(limit)
        .execute(&mut *tx)
        .await?;
        // Index tokens_ended.
        let tokens = sqlx::query(
            "DELETE FROM tokens \
             WHERE (bucket, id) IN ( \
                 SELECT bucket, id FROM tokens \
                 WHERE ended_at < $1 AND (kind <> 'primary' OR replaced_by IS NOT NULL) \
                 ORDER BY ended_at \
                 LIMIT $2 \
             )",
        )
        .bind(At(cutoffs.ended_tokens))
        .bind(limit)
        .execute(&mut *tx)
        .await?;
        sqlx::query(FORGET_COUNTS).bind(At(cutoffs.guard_counts)).execute(&mut *tx).await?;
        tx.commit().await?;
        Ok(Purged {
            reminders: reminders.rows_affected(),
            messages: messages.rows_affected(),
            tokens: tokens.rows_affected(),
        })
    }
}

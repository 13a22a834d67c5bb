//! Corrections on PostgreSQL: rows travel as arrays.

use std::collections::HashMap;

use uuid::Uuid;

use super::ledger::{count, write_reminders};
use super::{Postgres, hold};
use crate::clock::Timestamp;
use crate::correction::Told;
use crate::store::Result;
use crate::store::corrections::{Corrected, Corrections, ToldRow, by_contact_and_token, common_corrections};
use crate::store::jobs::Lease;
use crate::store::planning::{Written, only_of};
use crate::store::row::{self, TokenRow, token_columns};
use crate::token::{ContactId, Token, TokenId};

impl Corrections for Postgres {
    common_corrections!();

    async fn told(
        &self,
        asked: &[(ContactId, TokenId)],
        now: Timestamp,
    ) -> Result<HashMap<(ContactId, TokenId), Vec<Told>>> {
        self.within(async move {
            // The primary keys; of reminders by bucket and token.
            let rows: Vec<ToldRow> = sqlx::query_as(
                "SELECT r.contact_id, r.token_id, r.generation, r.lead, r.deadline, r.settled_at, \
                        r.message_id \
                 FROM UNNEST($1::smallint[], $2::uuid[], $3::uuid[]) AS n (bucket, token_id, contact_id) \
                 JOIN reminders r ON r.bucket = n.bucket AND r.token_id = n.token_id AND r.contact_id = n.contact_id \
                 WHERE r.deadline > $4 AND r.lead > 0 AND NOT r.escalation \
                   AND (r.state = 'sent' OR r.state IN ('pending', 'cancelled') AND EXISTS ( \
                       SELECT 1 FROM messages m WHERE m.bucket = r.bucket AND m.id = r.message_id \
                         AND (r.state = 'pending' AND m.state = 'sending' OR m.unknown_outcomes > 0 OR m.lost_claims > 0) \
                   ))",
            )
            .bind(asked.iter().map(|(contact, _)| contact.bucket().column()).collect::<Vec<_>>())
            .bind(asked.iter().map(|(_, token)| token.uuid()).collect::<Vec<_>>())
            .bind(asked.iter().map(|(contact, _)| contact.uuid()).collect::<Vec<_>>())
            .bind(now)
            .fetch_all(&self.pool())
            .await?;
            Ok(by_contact_and_token(rows))
        })
        .await
    }

    async fn correct(&self, lease: &Lease, decided: Corrected<'_>) -> Result<Written> {
        self.within(async move {
            let Corrected { now, looked_at, reminders, may_open } = decided;
            let mut tx = self.begin().await?;
            hold(&mut tx, lease, now).await?;
            let cleared: Vec<(Uuid,)> = sqlx::query_as(
                "UPDATE tokens t SET uncorrected = FALSE \
                 FROM UNNEST($1::smallint[], $2::uuid[], $3::integer[], $4::timestamptz[], $5::text[], \
                             $6::timestamptz[]) AS d (bucket, id, generation, expires_at, status, last_used_at) \
                 WHERE t.bucket = d.bucket AND t.id = d.id AND t.generation = d.generation \
                   AND t.expires_at IS NOT DISTINCT FROM d.expires_at AND t.status = d.status \
                   AND t.last_used_at IS NOT DISTINCT FROM d.last_used_at \
                 RETURNING t.id",
            )
            .bind(looked_at.iter().map(|t| t.id.bucket().column()).collect::<Vec<_>>())
            .bind(looked_at.iter().map(|t| t.id.uuid()).collect::<Vec<_>>())
            .bind(looked_at.iter().map(|t| t.generation).collect::<Vec<_>>())
            .bind(looked_at.iter().map(|t| t.expires_at).collect::<Vec<_>>())
            .bind(looked_at.iter().map(|t| t.status.as_str()).collect::<Vec<_>>())
            .bind(looked_at.iter().map(|t| t.last_used_at).collect::<Vec<_>>())
            .fetch_all(&mut *tx)
            .await?;
            let reminders = only_of(&cleared, reminders);
            let written = write_reminders(&mut tx, &reminders, now, may_open).await?;
            count(&mut tx, lease.job, written.opened, now).await?;
            tx.commit().await?;
            Ok(Written { tokens: cleared.len() as u64, ..written })
        })
        .await
    }
}

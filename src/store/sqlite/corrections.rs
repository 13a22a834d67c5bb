//! Corrections on SQLite: rows travel as JSON.

use std::collections::HashMap;

use uuid::Uuid;

use super::json::{hex, json};
use super::ledger::{count, write_reminders};
use super::{Sqlite, hold};
use crate::clock::Timestamp;
use crate::correction::Told;
use crate::store::Result;
use crate::store::corrections::{Corrected, Corrections, ToldRow, by_contact_and_token, common_corrections};
use crate::store::jobs::Lease;
use crate::store::planning::{Written, only_of};
use crate::store::row::{self, At, TokenRow, token_columns};
use crate::token::{ContactId, Token, TokenId};

impl Corrections for Sqlite {
    common_corrections!();

    async fn told(
        &self,
        asked: &[(ContactId, TokenId)],
        now: Timestamp,
    ) -> Result<HashMap<(ContactId, TokenId), Vec<Told>>> {
        let asked = asked.iter().map(|(c, t)| (c.bucket().column(), hex(t.uuid()), hex(c.uuid())));
        // The primary keys; of reminders by bucket and token.
        let rows: Vec<ToldRow> = sqlx::query_as(
            "SELECT r.contact_id, r.token_id, r.generation, r.lead, r.deadline, r.settled_at, r.message_id \
             FROM json_each($1) AS n \
             CROSS JOIN reminders r ON r.bucket = n.value ->> 0 AND r.token_id = UNHEX(n.value ->> 1) \
               AND r.contact_id = UNHEX(n.value ->> 2) \
             WHERE r.deadline > $2 AND r.lead > 0 AND NOT r.escalation \
               AND (r.state = 'sent' OR r.state IN ('pending', 'cancelled') AND EXISTS ( \
                   SELECT 1 FROM messages m WHERE m.bucket = r.bucket AND m.id = r.message_id \
                     AND (r.state = 'pending' AND m.state = 'sending' OR m.unknown_outcomes > 0 OR m.lost_claims > 0) \
               ))",
        )
        .bind(json(asked))
        .bind(At(now))
        .fetch_all(&self.readers)
        .await?;
        Ok(by_contact_and_token(rows))
    }

    async fn correct(&self, lease: &Lease, decided: Corrected<'_>) -> Result<Written> {
        let Corrected { now, looked_at, reminders, may_open } = decided;
        let mut tx = self.begin().await?;
        hold(&mut tx, lease, now).await?;
        let guards = looked_at.iter().map(|t| {
            let at = t.expires_at.map(|at| at.timestamp());
            (
                t.id.bucket().column(),
                hex(t.id.uuid()),
                t.generation,
                at,
                t.status.as_str(),
                t.last_used_at.map(|at| at.timestamp()),
            )
        });
        let cleared: Vec<(Uuid,)> = sqlx::query_as(
            "UPDATE tokens AS t SET uncorrected = 0 \
             FROM json_each($1) AS d \
             WHERE t.bucket = d.value ->> 0 AND t.id = UNHEX(d.value ->> 1) AND t.generation = d.value ->> 2 \
               AND t.expires_at IS d.value ->> 3 AND t.status = d.value ->> 4 AND t.last_used_at IS d.value ->> 5 \
             RETURNING id",
        )
        .bind(json(guards))
        .fetch_all(&mut *tx)
        .await?;
        let reminders = only_of(&cleared, reminders);
        let written = write_reminders(&mut tx, &reminders, now, may_open).await?;
        count(&mut tx, lease.job, written.opened, now).await?;
        tx.commit().await?;
        Ok(Written { tokens: cleared.len() as u64, ..written })
    }
}

//! Who is told of tokens, on PostgreSQL: what is asked about travels as arrays.

use std::collections::HashMap;

use chrono_tz::Tz;
use uuid::Uuid;

use super::Postgres;
use crate::clock::Timestamp;
use crate::policies::Traits;
use crate::store::Result;
use crate::store::recipients::{Addressee, Facts, Recipients, fact_columns};
use crate::store::row::{self, At, FactRow, TraitsRow, token_columns};
use crate::token::{Bucket, ContactId, OwnerId, SYSTEM_OWNER_KEY, TokenId};

/// Locks contacts of a bucket in the order of their addresses, which is that of whoever makes or changes several of them: none of
/// them waits for another in a circle. The primary key finds them.
const LOCK_CONTACTS: &str = "SELECT id, mailed_at FROM contacts \
     WHERE bucket = $1 AND id = ANY($2) \
     ORDER BY address \
     FOR UPDATE";

/// Remembers that these contacts are sent reminders now.
const MAILED: &str = "UPDATE contacts SET mailed_at = $3 WHERE bucket = $1 AND id = ANY($2)";

impl Recipients for Postgres {
    async fn speakers(&self, owners: &[OwnerId]) -> Result<HashMap<OwnerId, Vec<ContactId>>> {
        self.within(async move {
            let rows: Vec<(Uuid, Uuid)> = sqlx::query_as(
                "SELECT oc.owner_id, oc.contact_id \
             FROM UNNEST($1::smallint[], $2::uuid[]) AS o (bucket, id) \
             JOIN owner_contacts oc ON oc.bucket = o.bucket AND oc.owner_id = o.id",
            )
            .bind(owners.iter().map(|owner| owner.bucket().column()).collect::<Vec<_>>())
            .bind(owners.iter().map(|owner| owner.uuid()).collect::<Vec<_>>())
            .fetch_all(&self.pool())
            .await?;
            Ok(row::grouped(rows))
        })
        .await
    }

    async fn watchers(&self, tokens: &[TokenId]) -> Result<HashMap<TokenId, Vec<ContactId>>> {
        self.within(async move {
            let rows: Vec<(Uuid, Uuid)> = sqlx::query_as(
                "SELECT tc.token_id, tc.contact_id \
             FROM UNNEST($1::smallint[], $2::uuid[]) AS n (bucket, id) \
             JOIN token_contacts tc ON tc.bucket = n.bucket AND tc.token_id = n.id",
            )
            .bind(tokens.iter().map(|token| token.bucket().column()).collect::<Vec<_>>())
            .bind(tokens.iter().map(|token| token.uuid()).collect::<Vec<_>>())
            .fetch_all(&self.pool())
            .await?;
            Ok(row::grouped(rows))
        })
        .await
    }

    async fn addressees(&self, contacts: &[ContactId]) -> Result<HashMap<ContactId, Addressee>> {
        self.within(async move {
            let rows: Vec<(Uuid, Option<String>, Option<At>)> = sqlx::query_as(
                "SELECT c.id, c.time_zone, c.mailed_at \
             FROM UNNEST($1::smallint[], $2::uuid[]) AS n (bucket, id) \
             JOIN contacts c ON c.bucket = n.bucket AND c.id = n.id \
             WHERE c.suppressed_at IS NULL",
            )
            .bind(contacts.iter().map(|contact| contact.bucket().column()).collect::<Vec<_>>())
            .bind(contacts.iter().map(|contact| contact.uuid()).collect::<Vec<_>>())
            .fetch_all(&self.pool())
            .await?;
            Ok(row::addressees(rows))
        })
        .await
    }

    async fn zones(&self, owners: &[OwnerId]) -> Result<HashMap<OwnerId, Tz>> {
        self.within(async move {
            let rows: Vec<(Uuid, String)> = sqlx::query_as(
                "SELECT w.id, w.time_zone \
             FROM UNNEST($1::smallint[], $2::uuid[]) AS o (bucket, id) \
             JOIN owners w ON w.bucket = o.bucket AND w.id = o.id",
            )
            .bind(owners.iter().map(|owner| owner.bucket().column()).collect::<Vec<_>>())
            .bind(owners.iter().map(|owner| owner.uuid()).collect::<Vec<_>>())
            .fetch_all(&self.pool())
            .await?;
            Ok(rows.into_iter().filter_map(|(owner, zone)| Some((owner.into(), zone.parse().ok()?))).collect())
        })
        .await
    }

    async fn mailed_before(
        &self,
        contacts: &[ContactId],
        since: Timestamp,
        now: Timestamp,
    ) -> Result<HashMap<ContactId, Timestamp>> {
        let Some(first) = contacts.first() else { return Ok(HashMap::new()) };
        self.within(async move {
            let bucket = first.bucket().column();
            let mut tx = self.begin().await?;
            let rows: Vec<(Uuid, Option<At>)> = sqlx::query_as(LOCK_CONTACTS)
                .bind(bucket)
                .bind(contacts.iter().map(|contact| contact.uuid()).collect::<Vec<_>>())
                .fetch_all(&mut *tx)
                .await?;
            let (before, free) = row::mailed_since(rows, since, now);
            sqlx::query(MAILED).bind(bucket).bind(free).bind(now).execute(&mut *tx).await?;
            tx.commit().await?;
            Ok(before)
        })
        .await
    }

    async fn mailed(&self, contacts: &[ContactId], now: Timestamp) -> Result<()> {
        let Some(first) = contacts.first() else { return Ok(()) };
        self.within(async move {
            let (bucket, ids) = (first.bucket().column(), contacts.iter().map(|contact| contact.uuid()));
            let ids: Vec<Uuid> = ids.collect();
            let mut tx = self.begin().await?;
            sqlx::query(LOCK_CONTACTS).bind(bucket).bind(&ids).execute(&mut *tx).await?;
            sqlx::query(MAILED).bind(bucket).bind(ids).bind(now).execute(&mut *tx).await?;
            tx.commit().await?;
            Ok(())
        })
        .await
    }

    async fn traits(&self, tokens: &[TokenId]) -> Result<HashMap<TokenId, Traits>> {
        self.within(async move {
            let rows: Vec<TraitsRow> = sqlx::query_as(
                "SELECT t.id, t.kind, t.scopes, t.description, w.key AS owner_key \
             FROM UNNEST($1::smallint[], $2::uuid[]) AS n (bucket, id) \
             JOIN tokens t ON t.bucket = n.bucket AND t.id = n.id \
             JOIN owners w ON w.bucket = t.bucket AND w.id = t.owner_id",
            )
            .bind(tokens.iter().map(|token| token.bucket().column()).collect::<Vec<_>>())
            .bind(tokens.iter().map(|token| token.uuid()).collect::<Vec<_>>())
            .fetch_all(&self.pool())
            .await?;
            rows.into_iter().map(TryInto::try_into).collect()
        })
        .await
    }

    async fn facts(&self, asked: &[(ContactId, TokenId)]) -> Result<HashMap<ContactId, Facts>> {
        self.within(async move {
            let mut line = self.lines.take().await?;
            // Everything by primary key: an address may speak for thousands of owners, and only those of the tokens matter.
            let rows: Vec<FactRow> = sqlx::query_as(concat!(
                "SELECT ",
                token_columns!(),
                fact_columns!(bucket = "$4", key = "$5"),
                " FROM UNNEST($1::smallint[], $2::uuid[], $3::uuid[]) AS n (bucket, id, contact_id) \
             JOIN tokens t ON t.bucket = n.bucket AND t.id = n.id \
             JOIN owners o ON o.bucket = t.bucket AND o.id = t.owner_id"
            ))
            .bind(asked.iter().map(|(_, token)| token.bucket().column()).collect::<Vec<_>>())
            .bind(asked.iter().map(|(_, token)| token.uuid()).collect::<Vec<_>>())
            .bind(asked.iter().map(|(contact, _)| contact.uuid()).collect::<Vec<_>>())
            .bind(Bucket::of(SYSTEM_OWNER_KEY).column())
            .bind(SYSTEM_OWNER_KEY)
            .fetch_all(&mut line)
            .await?;
            self.lines.put_back(line);
            Ok(row::facts(rows))
        })
        .await
    }
}

//! Who is told of tokens, on SQLite: what is asked about travels as JSON.

use std::collections::HashMap;

use chrono_tz::Tz;
use uuid::Uuid;

use super::Sqlite;
use super::json::{hex, json};
use crate::clock::Timestamp;
use crate::policies::Traits;
use crate::store::Result;
use crate::store::recipients::{Addressee, Facts, Recipients, fact_columns};
use crate::store::row::{self, At, FactRow, TraitsRow, token_columns};
use crate::token::{Bucket, ContactId, OwnerId, SYSTEM_OWNER_KEY, TokenId};

/// Remembers that these contacts are sent reminders now.
const MAILED: &str = "UPDATE contacts AS c SET mailed_at = $2 \
     FROM json_each($1) AS n WHERE c.bucket = n.value ->> 0 AND c.id = UNHEX(n.value ->> 1)";

impl Recipients for Sqlite {
    async fn speakers(&self, owners: &[OwnerId]) -> Result<HashMap<OwnerId, Vec<ContactId>>> {
        let rows: Vec<(Uuid, Uuid)> = sqlx::query_as(
            "SELECT oc.owner_id, oc.contact_id \
             FROM json_each($1) AS o \
             CROSS JOIN owner_contacts oc ON oc.bucket = o.value ->> 0 AND oc.owner_id = UNHEX(o.value ->> 1)",
        )
        .bind(json(owners.iter().map(|owner| (owner.bucket().column(), hex(owner.uuid())))))
        .fetch_all(&self.readers)
        .await?;
        Ok(row::grouped(rows))
    }

    async fn watchers(&self, tokens: &[TokenId]) -> Result<HashMap<TokenId, Vec<ContactId>>> {
        let rows: Vec<(Uuid, Uuid)> = sqlx::query_as(
            "SELECT tc.token_id, tc.contact_id \
             FROM json_each($1) AS n \
             CROSS JOIN token_contacts tc ON tc.bucket = n.value ->> 0 AND tc.token_id = UNHEX(n.value ->> 1)",
        )
        .bind(json(tokens.iter().map(|token| (token.bucket().column(), hex(token.uuid())))))
        .fetch_all(&self.readers)
        .await?;
        Ok(row::grouped(rows))
    }

    async fn addressees(&self, contacts: &[ContactId]) -> Result<HashMap<ContactId, Addressee>> {
        let rows: Vec<(Uuid, Option<String>, Option<At>)> = sqlx::query_as(
            "SELECT c.id, c.time_zone, c.mailed_at \
             FROM json_each($1) AS n \
             CROSS JOIN contacts c ON c.bucket = n.value ->> 0 AND c.id = UNHEX(n.value ->> 1) \
             WHERE c.suppressed_at IS NULL",
        )
        .bind(json(contacts.iter().map(|contact| (contact.bucket().column(), hex(contact.uuid())))))
        .fetch_all(&self.readers)
        .await?;
        Ok(row::addressees(rows))
    }

    async fn zones(&self, owners: &[OwnerId]) -> Result<HashMap<OwnerId, Tz>> {
        let rows: Vec<(Uuid, String)> = sqlx::query_as(
            "SELECT w.id, w.time_zone \
             FROM json_each($1) AS o \
             CROSS JOIN owners w ON w.bucket = o.value ->> 0 AND w.id = UNHEX(o.value ->> 1)",
        )
        .bind(json(owners.iter().map(|owner| (owner.bucket().column(), hex(owner.uuid())))))
        .fetch_all(&self.readers)
        .await?;
        Ok(rows.into_iter().filter_map(|(owner, zone)| Some((owner.into(), zone.parse().ok()?))).collect())
    }

    async fn mailed_before(
        &self,
        contacts: &[ContactId],
        since: Timestamp,
        now: Timestamp,
    ) -> Result<HashMap<ContactId, Timestamp>> {
        if contacts.is_empty() {
            return Ok(HashMap::new());
        }
        let mut tx = self.begin().await?;
        let rows: Vec<(Uuid, Option<At>)> = sqlx::query_as(
            "SELECT c.id, c.mailed_at \
             FROM json_each($1) AS n \
             CROSS JOIN contacts c ON c.bucket = n.value ->> 0 AND c.id = UNHEX(n.value ->> 1)",
        )
        .bind(json(contacts.iter().map(|contact| (contact.bucket().column(), hex(contact.uuid())))))
        .fetch_all(&mut *tx)
        .await?;
        let (before, free) = row::mailed_since(rows, since, now);
        let free = free.into_iter().map(|id| (ContactId::from(id).bucket().column(), hex(id)));
        sqlx::query(MAILED).bind(json(free)).bind(At(now)).execute(&mut *tx).await?;
        tx.commit().await?;
        Ok(before)
    }

    async fn mailed(&self, contacts: &[ContactId], now: Timestamp) -> Result<()> {
        if !contacts.is_empty() {
            let ids = json(contacts.iter().map(|contact| (contact.bucket().column(), hex(contact.uuid()))));
            sqlx::query(MAILED).bind(ids).bind(At(now)).execute(&self.writer).await?;
        }
        Ok(())
    }

    async fn traits(&self, tokens: &[TokenId]) -> Result<HashMap<TokenId, Traits>> {
        let rows: Vec<TraitsRow> = sqlx::query_as(
            "SELECT t.id, t.kind, t.scopes, t.description, w.key AS owner_key \
             FROM json_each($1) AS n \
             CROSS JOIN tokens t ON t.bucket = n.value ->> 0 AND t.id = UNHEX(n.value ->> 1) \
             JOIN owners w ON w.bucket = t.bucket AND w.id = t.owner_id",
        )
        .bind(json(tokens.iter().map(|token| (token.bucket().column(), hex(token.uuid())))))
        .fetch_all(&self.readers)
        .await?;
        rows.into_iter().map(TryInto::try_into).collect()
    }

    async fn facts(&self, asked: &[(ContactId, TokenId)]) -> Result<HashMap<ContactId, Facts>> {
        // Everything by primary key: an address may speak for thousands of owners, and only those of the tokens matter.
        let rows: Vec<FactRow> = sqlx::query_as(concat!(
            "SELECT ",
            token_columns!(),
            fact_columns!(bucket = "$2", key = "$3"),
            " FROM ( \
                 SELECT value ->> 0 AS bucket, UNHEX(value ->> 1) AS id, UNHEX(value ->> 2) AS contact_id \
                 FROM json_each($1) \
             ) AS n \
             CROSS JOIN tokens t ON t.bucket = n.bucket AND t.id = n.id \
             JOIN owners o ON o.bucket = t.bucket AND o.id = t.owner_id"
        ))
        .bind(json(
            asked.iter().map(|(contact, token)| (token.bucket().column(), hex(token.uuid()), hex(contact.uuid()))),
        ))
        .bind(Bucket::of(SYSTEM_OWNER_KEY).column())
        .bind(SYSTEM_OWNER_KEY)
        .fetch_all(&self.readers)
        .await?;
        Ok(row::facts(rows))
    }
}

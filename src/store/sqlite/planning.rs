//! Planning on SQLite: the same statements as on PostgreSQL, with JSON in the place of arrays.

use std::collections::{HashMap, HashSet};

use chrono_tz::Tz;
use serde::Serialize;
use sqlx::{Sqlite as Lite, Transaction};
use uuid::Uuid;

use super::ledger::{count, write_reminders};
use super::{Sqlite, hold};
use crate::clock::Timestamp;
use crate::policies::Traits;
use crate::policy::Lead;
use crate::store::Result;
use crate::store::jobs::Lease;
use crate::store::outbox::MessageKind;
use crate::store::planning::{
    ADOPT, ALERT, Addressee, COUNTED, Candidate, Counted, Cutoffs, Decided, EXPIRED, FORGET_COUNTS, FORGET_WATERMARKS,
    Facts, HELD, Held, HeldRow, NEXT_DEADLINE, POLICIES, Planning, Progress, Purged, Watermark, Written,
};
use crate::store::row::{self, At, CandidateRow, FactRow, TraitsRow, token_columns};
use crate::token::{Bucket, ContactId, MessageId, OwnerId, SYSTEM_OWNER_KEY, TokenId};

/// Rows for `json_each`: SQLite's way to bind many at once. Ids travel as hexadecimal digits.
pub(super) fn json<T: Serialize>(rows: impl IntoIterator<Item = T>) -> String {
    let rows: Vec<T> = rows.into_iter().collect();
    // Numbers, texts and tuples of them always serialise.
    serde_json::to_string(&rows).unwrap_or_default()
}

pub(super) fn hex(id: Uuid) -> String {
    id.simple().to_string()
}

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
    sqlx::query(
        "INSERT INTO watermarks (bucket, lead, instant, token_id) VALUES (0, $1, $2, $3) \
         ON CONFLICT (bucket, lead) DO UPDATE \
         SET instant = excluded.instant, token_id = excluded.token_id",
    )
    .bind(lead.seconds())
    .bind(At(watermark.instant))
    .bind(watermark.token)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Remembers that these contacts are sent reminders now.
const MAILED: &str = "UPDATE contacts SET mailed_at = $3 \
     WHERE bucket = $1 AND id IN (SELECT UNHEX(value) FROM json_each($2))";

impl Planning for Sqlite {
    async fn overdue(&self, now: Timestamp, limit: u32) -> Result<Vec<Candidate>> {
        // Index tokens_unplanned.
        let rows: Vec<CandidateRow> = sqlx::query_as(
            "SELECT id, owner_id, expires_at, moved_from, deadline_set_at, generation, secret_hash IS NOT NULL AS issued, last_used_at, \
                    replaced_by \
             FROM tokens \
             WHERE unplanned AND status = 'active' AND expires_at <= $1 \
             ORDER BY expires_at, id \
             LIMIT $2",
        )
        .bind(At(now))
        .bind(i64::from(limit))
        .fetch_all(&self.readers)
        .await?;
        row::all(rows)
    }

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
            let expired: HashSet<Uuid> = expired.iter().map(|(id,)| *id).collect();
            reminders.retain(|reminder| expired.contains(&reminder.token.uuid()));
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

    async fn unplanned(&self, now: Timestamp, limit: u32) -> Result<Vec<Candidate>> {
        // Index tokens_unplanned.
        let rows: Vec<CandidateRow> = sqlx::query_as(
            "SELECT id, owner_id, expires_at, moved_from, deadline_set_at, generation, secret_hash IS NOT NULL AS issued, last_used_at, \
                    replaced_by \
             FROM tokens \
             WHERE unplanned AND status = 'active' AND expires_at > $1 \
             ORDER BY expires_at, id \
             LIMIT $2",
        )
        .bind(At(now))
        .bind(i64::from(limit))
        .fetch_all(&self.readers)
        .await?;
        row::all(rows)
    }

    async fn crossing(&self, lead: Lead, from: Watermark, now: Timestamp, limit: u32) -> Result<Vec<Candidate>> {
        // Index tokens_deadline.
        let rows: Vec<CandidateRow> = sqlx::query_as(
            "SELECT id, owner_id, expires_at, moved_from, deadline_set_at, generation, secret_hash IS NOT NULL AS issued, last_used_at, \
                    replaced_by \
             FROM tokens \
             WHERE status = 'active' AND expires_at IS NOT NULL \
               AND (expires_at, id) > ($1, $2) AND expires_at <= $3 \
             ORDER BY expires_at, id \
             LIMIT $4",
        )
        .bind(At(lead.deadline_for(from.instant)))
        .bind(from.token)
        .bind(At(lead.deadline_for(now)))
        .bind(i64::from(limit))
        .fetch_all(&self.readers)
        .await?;
        row::all(rows)
    }

    async fn next_deadline(&self, now: Timestamp) -> Result<Option<Timestamp>> {
        let (next,): (Option<At>,) = sqlx::query_as(NEXT_DEADLINE).bind(At(now)).fetch_one(&self.readers).await?;
        Ok(next.map(|at| at.0))
    }

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
        let Some(first) = contacts.first() else { return Ok(HashMap::new()) };
        let bucket = first.bucket().column();
        let mut tx = self.begin().await?;
        let rows: Vec<(Uuid, Option<At>)> = sqlx::query_as(
            "SELECT id, mailed_at FROM contacts \
             WHERE bucket = $1 AND id IN (SELECT UNHEX(value) FROM json_each($2))",
        )
        .bind(bucket)
        .bind(json(contacts.iter().map(|contact| hex(contact.uuid()))))
        .fetch_all(&mut *tx)
        .await?;
        let (before, free) = row::mailed_since(rows, since, now);
        sqlx::query(MAILED).bind(bucket).bind(json(free.into_iter().map(hex))).bind(At(now)).execute(&mut *tx).await?;
        tx.commit().await?;
        Ok(before)
    }

    async fn mailed(&self, contacts: &[ContactId], now: Timestamp) -> Result<()> {
        let Some(first) = contacts.first() else { return Ok(()) };
        let ids = json(contacts.iter().map(|contact| hex(contact.uuid())));
        sqlx::query(MAILED).bind(first.bucket().column()).bind(ids).bind(At(now)).execute(&self.writer).await?;
        Ok(())
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
            let unchanged: HashSet<Uuid> = unchanged.into_iter().map(|(id,)| id).collect();
            let mut reminders = decided.reminders;
            reminders.retain(|reminder| unchanged.contains(&reminder.token.uuid()));
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

    async fn counted(&self, since: Timestamp, now: Timestamp) -> Result<Counted> {
        let rows: Vec<(String, i64)> =
            sqlx::query_as(COUNTED).bind(At(since)).bind(At(now)).fetch_all(&self.readers).await?;
        Ok(Counted::from_rows(rows))
    }

    async fn contact_count(&self) -> Result<u64> {
        let mut tx = self.begin_long_read().await?;
        let (count,): (i64,) = sqlx::query_as("SELECT COUNT(*) FROM contacts").fetch_one(&mut *tx).await?;
        Ok(count.unsigned_abs())
    }

    async fn held(&self, now: Timestamp) -> Result<Option<Held>> {
        let row: HeldRow = sqlx::query_as(HELD).bind(At(now)).fetch_one(&self.readers).await?;
        Ok(Held::from_row(row))
    }

    async fn overdue_count(&self, now: Timestamp) -> Result<u64> {
        // Index tokens_deadline.
        let (count,): (i64,) = sqlx::query_as(
            "SELECT COUNT(*) FROM tokens WHERE status = 'active' AND expires_at IS NOT NULL AND expires_at <= $1",
        )
        .bind(At(now))
        .fetch_one(&self.readers)
        .await?;
        Ok(count.unsigned_abs())
    }

    async fn alert(
        &self,
        contact: ContactId,
        kind: MessageKind,
        unless_since: Timestamp,
        now: Timestamp,
    ) -> Result<bool> {
        let bucket = contact.bucket();
        let opened = sqlx::query(ALERT)
            .bind(bucket.column())
            .bind(MessageId::new(bucket, now).uuid())
            .bind(contact.uuid())
            .bind(kind.as_str())
            .bind(At(now))
            .bind(At(unless_since))
            .execute(&self.writer)
            .await?;
        Ok(opened.rows_affected() > 0)
    }

    async fn watermarks(&self) -> Result<HashMap<Lead, Watermark>> {
        let rows: Vec<(i64, At, Uuid)> =
            sqlx::query_as("SELECT lead, instant, token_id FROM watermarks WHERE bucket = 0")
                .fetch_all(&self.readers)
                .await?;
        Ok(rows
            .into_iter()
            .map(|(lead, instant, token)| (Lead::from_seconds(lead), Watermark { instant: instant.0, token }))
            .collect())
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

    async fn adopt_policies(&self, lease: &Lease, fingerprint: Option<&str>, now: Timestamp) -> Result<bool> {
        let known: Option<(Option<String>,)> =
            sqlx::query_as(POLICIES).bind(lease.job).fetch_optional(&self.readers).await?;
        if known.is_some_and(|(known,)| known.as_deref() == fingerprint) {
            return Ok(false);
        }
        let mut tx = self.begin().await?;
        hold(&mut tx, lease, now).await?;
        let adopted = sqlx::query(ADOPT).bind(lease.job).bind(fingerprint).execute(&mut *tx).await?.rows_affected() > 0;
        if adopted {
            sqlx::query(FORGET_WATERMARKS).execute(&mut *tx).await?;
        }
        tx.commit().await?;
        Ok(adopted)
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
             EXISTS ( \
                 SELECT 1 FROM token_contacts tc \
                 WHERE tc.bucket = t.bucket AND tc.token_id = t.id AND tc.contact_id = n.contact_id \
             ) AS watches, \
             ( \
                 SELECT oc.contact_id \
                 FROM owners s \
                 JOIN owner_contacts oc ON oc.bucket = s.bucket AND oc.owner_id = s.id \
                 WHERE s.bucket = $2 AND s.key = $3 \
                 LIMIT 1 \
             ) AS fallback \
             FROM ( \
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

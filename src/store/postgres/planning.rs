//! Planning on PostgreSQL: pages come from partial indexes, and each batch is written with a handful of statements.

use std::collections::{HashMap, HashSet};

use chrono::{DateTime, Utc};
use chrono_tz::Tz;
use sqlx::{Postgres as Pg, Transaction};
use uuid::Uuid;

use super::ledger::{count, write_reminders};
use super::{Postgres, hold};
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

/// Locks contacts of a bucket in the order of their addresses, which is that of whoever makes or changes several of them: none of
/// them waits for another in a circle. The primary key finds them.
const LOCK_CONTACTS: &str = "SELECT id, mailed_at FROM contacts \
     WHERE bucket = $1 AND id = ANY($2) \
     ORDER BY address \
     FOR UPDATE";

/// Remembers that these contacts are sent reminders now.
const MAILED: &str = "UPDATE contacts SET mailed_at = $3 WHERE bucket = $1 AND id = ANY($2)";

impl Planning for Postgres {
    async fn overdue(&self, now: Timestamp, limit: u32) -> Result<Vec<Candidate>> {
        self.within(async move {
            // Index tokens_unplanned.
            let rows: Vec<CandidateRow> = sqlx::query_as(
                "SELECT id, owner_id, expires_at, moved_from, deadline_set_at, generation, secret_hash IS NOT NULL AS issued, last_used_at, \
                    replaced_by \
             FROM tokens \
             WHERE unplanned AND status = 'active' AND expires_at <= $1 \
             ORDER BY expires_at, id \
             LIMIT $2",
            )
            .bind(now)
            .bind(i64::from(limit))
            .fetch_all(&self.pool())
            .await?;
            row::all(rows)
        })
        .await
    }

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

    async fn unplanned(&self, now: Timestamp, limit: u32) -> Result<Vec<Candidate>> {
        self.within(async move {
            // Index tokens_unplanned.
            let rows: Vec<CandidateRow> = sqlx::query_as(
                "SELECT id, owner_id, expires_at, moved_from, deadline_set_at, generation, secret_hash IS NOT NULL AS issued, last_used_at, \
                    replaced_by \
             FROM tokens \
             WHERE unplanned AND status = 'active' AND expires_at > $1 \
             ORDER BY expires_at, id \
             LIMIT $2",
            )
            .bind(now)
            .bind(i64::from(limit))
            .fetch_all(&self.pool())
            .await?;
            row::all(rows)
        })
        .await
    }

    async fn crossing(&self, lead: Lead, from: Watermark, now: Timestamp, limit: u32) -> Result<Vec<Candidate>> {
        self.within(async move {
            // Index tokens_deadline. The lead is added here and not in SQL, so that both ends are constants to the planner.
            let rows: Vec<CandidateRow> = sqlx::query_as(
                "SELECT id, owner_id, expires_at, moved_from, deadline_set_at, generation, secret_hash IS NOT NULL AS issued, last_used_at, \
                    replaced_by \
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
            .fetch_all(&self.pool())
            .await?;
            row::all(rows)
        })
        .await
    }

    async fn next_deadline(&self, now: Timestamp) -> Result<Option<Timestamp>> {
        self.within(async move {
            let (next,): (Option<At>,) = sqlx::query_as(NEXT_DEADLINE).bind(At(now)).fetch_one(&self.pool()).await?;
            Ok(next.map(|at| at.0))
        })
        .await
    }

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
                let unchanged: HashSet<Uuid> = unchanged.into_iter().map(|(id,)| id).collect();
                let mut reminders = decided.reminders;
                reminders.retain(|reminder| unchanged.contains(&reminder.token.uuid()));
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

    async fn counted(&self, since: Timestamp, now: Timestamp) -> Result<Counted> {
        self.within(async move {
            let rows: Vec<(String, i64)> =
                sqlx::query_as(COUNTED).bind(At(since)).bind(At(now)).fetch_all(&self.pool()).await?;
            Ok(Counted::from_rows(rows))
        })
        .await
    }

    async fn contact_count(&self) -> Result<u64> {
        let mut tx = self.begin_long_read().await?;
        let (count,): (i64,) = sqlx::query_as("SELECT COUNT(*) FROM contacts").fetch_one(&mut *tx).await?;
        Ok(count.unsigned_abs())
    }

    async fn held(&self, now: Timestamp) -> Result<Option<Held>> {
        self.within(async move {
            let row: HeldRow = sqlx::query_as(HELD).bind(At(now)).fetch_one(&self.pool()).await?;
            Ok(Held::from_row(row))
        })
        .await
    }

    async fn overdue_count(&self, now: Timestamp) -> Result<u64> {
        self.within(async move {
            // Index tokens_deadline.
            let (count,): (i64,) = sqlx::query_as(
                "SELECT COUNT(*) FROM tokens WHERE status = 'active' AND expires_at IS NOT NULL AND expires_at <= $1",
            )
            .bind(At(now))
            .fetch_one(&self.pool())
            .await?;
            Ok(count.unsigned_abs())
        })
        .await
    }

    async fn alert(
        &self,
        contact: ContactId,
        kind: MessageKind,
        unless_since: Timestamp,
        now: Timestamp,
    ) -> Result<bool> {
        self.within(async move {
            let bucket = contact.bucket();
            let opened = sqlx::query(ALERT)
                .bind(bucket.column())
                .bind(MessageId::new(bucket, now).uuid())
                .bind(contact.uuid())
                .bind(kind.as_str())
                .bind(At(now))
                .bind(At(unless_since))
                .execute(&self.pool())
                .await?;
            Ok(opened.rows_affected() > 0)
        })
        .await
    }

    async fn watermarks(&self) -> Result<HashMap<Lead, Watermark>> {
        self.within(async move {
            let rows: Vec<(i64, At, Uuid)> =
                sqlx::query_as("SELECT lead, instant, token_id FROM watermarks WHERE bucket = 0")
                    .fetch_all(&self.pool())
                    .await?;
            Ok(rows
                .into_iter()
                .map(|(lead, instant, token)| (Lead::from_seconds(lead), Watermark { instant: instant.0, token }))
                .collect())
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

    async fn adopt_policies(&self, lease: &Lease, fingerprint: Option<&str>, now: Timestamp) -> Result<bool> {
        self.within(async move {
            let known: Option<(Option<String>,)> =
                sqlx::query_as(POLICIES).bind(lease.job).fetch_optional(&self.pool()).await?;
            if known.is_some_and(|(known,)| known.as_deref() == fingerprint) {
                return Ok(false);
            }
            let mut tx = self.begin().await?;
            hold(&mut tx, lease, now).await?;
            let adopted = sqlx::query(ADOPT).bind(lease.job).bind(fingerprint).execute(&mut *tx).await?;
            let adopted = adopted.rows_affected() > 0;
            if adopted {
                sqlx::query(FORGET_WATERMARKS).execute(&mut *tx).await?;
            }
            tx.commit().await?;
            Ok(adopted)
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

    async fn facts(&self, asked: &[(ContactId, TokenId)]) -> Result<HashMap<ContactId, Facts>> {
        self.within(async move {
            let mut line = self.lines.take().await?;
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
            .fetch_all(&mut line)
            .await?;
            self.lines.put_back(line);
            Ok(row::facts(rows))
        })
        .await
    }

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

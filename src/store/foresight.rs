//! What a run would find and do, asked without writing anything: for a dry run.

use std::collections::HashMap;
use std::future::Future;

use futures_util::TryStreamExt;
use sqlx::QueryBuilder;
use uuid::Uuid;

use super::outbox::{ClaimedMessage, MessageKind, MessageState};
use super::planning::{Candidate, NewReminder, Watermark};
use super::purging::{Cutoffs, Purged};
use super::row::{self, At, CandidateRow, CarriedRow, ClaimRow, ContactRow, QueuedRow, candidate_columns};
use super::{Postgres, Result, Sqlite};
use crate::clock::Timestamp;
use crate::policy::Lead;
use crate::token::{Contact, ContactId, MessageId};

/// How many rows are asked for in one statement.
const AT_ONCE: usize = 500;

/// What the ledger has of a token's deadline for a contact.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InLedger {
    /// Whether it has the reminder itself.
    pub is_there: bool,
    /// The shortest lead that is to be sent, or was.
    pub tightest: Option<Lead>,
}

/// A message that waits, without what it says.
#[derive(Clone, Copy, Debug)]
pub struct Queued {
    /// Which message.
    pub id: MessageId,
    /// To whom.
    pub contact: ContactId,
    /// What it is for.
    pub kind: MessageKind,
    /// Open, held, in retry or being sent.
    pub state: MessageState,
    /// From when on it may be claimed; while it is being sent, when its lease ends.
    pub not_before: Timestamp,
}

/// What the fallback was sent of a kind.
#[derive(Clone, Copy, Debug)]
pub struct Alerted {
    /// Of which kind.
    pub kind: MessageKind,
    /// When the last one was opened.
    pub opened_at: Timestamp,
    /// When one was last claimed for the first time.
    pub claimed_at: Option<Timestamp>,
    /// Whether one is open.
    pub is_open: bool,
}

/// What a dry run asks besides what the jobs ask.
pub trait Foresight {
    /// Active tokens that are marked unplanned, whose deadline comes after the watermark and at or before `until`, earliest first.
    ///
    /// # Errors
    /// When the store fails.
    fn marked(
        &self,
        from: Watermark,
        until: Timestamp,
        limit: u32,
    ) -> impl Future<Output = Result<Vec<Candidate>>> + Send;

    /// What the ledger has of each of these.
    ///
    /// # Errors
    /// When the store fails.
    fn in_ledger(&self, reminders: &[NewReminder]) -> impl Future<Output = Result<Vec<InLedger>>> + Send;

    /// Hands each message that waits, those that are held among them, to `visit`.
    ///
    /// # Errors
    /// When the store fails.
    fn each_queued(&self, visit: impl FnMut(Queued) + Send) -> impl Future<Output = Result<()>> + Send;

    /// These messages as they would be, were they claimed now. Those that cannot be read are left out.
    ///
    /// # Errors
    /// When the store fails.
    fn would_claim(
        &self,
        messages: &[MessageId],
        now: Timestamp,
    ) -> impl Future<Output = Result<Vec<ClaimedMessage>>> + Send;

    /// What this contact was sent as the fallback, by kind.
    ///
    /// # Errors
    /// When the store fails.
    fn alerted(&self, fallback: ContactId) -> impl Future<Output = Result<Vec<Alerted>>> + Send;

    /// These contacts, as far as there are such.
    ///
    /// # Errors
    /// When the store fails.
    fn contacts(&self, ids: &[ContactId]) -> impl Future<Output = Result<HashMap<ContactId, Contact>>> + Send;

    /// How many rows are old enough to go, counting as ended the tokens whose deadline has passed. Counts them: not for the hot path.
    ///
    /// # Errors
    /// When the store fails.
    fn purgeable(&self, cutoffs: Cutoffs) -> impl Future<Output = Result<Purged>> + Send;
}

/// Implements [`Foresight`] for a back end, in the words that both understand.
macro_rules! foresight_operations {
    ($store:ty, $database:ty) => {
        impl Foresight for $store {
            async fn marked(&self, from: Watermark, until: Timestamp, limit: u32) -> Result<Vec<Candidate>> {
                // Index tokens_unplanned.
                let rows: Vec<CandidateRow> = sqlx::query_as(concat!(
                    "SELECT ",
                    candidate_columns!(),
                    " FROM tokens \
                     WHERE unplanned AND status = 'active' AND (expires_at, id) > ($1, $2) AND expires_at <= $3 \
                     ORDER BY expires_at, id \
                     LIMIT $4"
                ))
                .bind(At(from.instant))
                .bind(from.token)
                .bind(At(until))
                .bind(i64::from(limit))
                .fetch_all(&self.reader())
                .await?;
                row::all(rows)
            }

            async fn in_ledger(&self, reminders: &[NewReminder]) -> Result<Vec<InLedger>> {
                type Deadline = (Uuid, i32, Uuid);
                let mut known: HashMap<Deadline, Vec<(i64, bool)>> = HashMap::new();
                for some in reminders.chunks(AT_ONCE) {
                    // The primary key serves it.
                    let mut query = QueryBuilder::<$database>::new(
                        "SELECT token_id, generation, contact_id, lead, state IN ('pending', 'sent') AS speaks \
                         FROM reminders \
                         WHERE (bucket, token_id, generation, contact_id) IN (",
                    );
                    query.push_values(some, |mut row, r| {
                        row.push_bind(r.bucket().column()).push_bind(r.token.uuid()).push_bind(r.generation);
                        row.push_bind(r.contact_column());
                    });
                    query.push(")");
                    let rows: Vec<(Uuid, i32, Uuid, i64, bool)> =
                        query.build_query_as().fetch_all(&self.reader()).await?;
                    for (token, generation, contact, lead, speaks) in rows {
                        known.entry((token, generation, contact)).or_default().push((lead, speaks));
                    }
                }
                let of = |r: &NewReminder| {
                    let rows = known.get(&(r.token.uuid(), r.generation, r.contact_column()));
                    let rows = || rows.into_iter().flatten();
                    let tightest = rows().filter(|(_, speaks)| *speaks).map(|(lead, _)| *lead).min();
                    InLedger {
                        is_there: rows().any(|(lead, _)| *lead == r.lead.seconds()),
                        tightest: tightest.map(Lead::from_seconds),
                    }
                };
                Ok(reminders.iter().map(of).collect())
            }

            async fn each_queued(&self, mut visit: impl FnMut(Queued) + Send) -> Result<()> {
                let mut tx = self.begin_long_read().await?;
                // Indexes messages_queue and messages_held_deadline, and nothing else.
                let mut rows = sqlx::query_as::<_, QueuedRow>(
                    "SELECT id, contact_id, kind, state, not_before FROM messages \
                     WHERE state IN ('open', 'retry', 'sending') \
                     UNION ALL \
                     SELECT id, contact_id, kind, state, not_before FROM messages WHERE state = 'held'",
                )
                .fetch(&mut *tx);
                while let Some(row) = rows.try_next().await? {
                    visit(row.try_into()?);
                }
                Ok(())
            }

            async fn would_claim(&self, messages: &[MessageId], now: Timestamp) -> Result<Vec<ClaimedMessage>> {
                let mut claimed = Vec::new();
                for some in messages.chunks(AT_ONCE) {
                    // The primary keys serve it, and the index reminders_pending.
                    let mut query = QueryBuilder::<$database>::new(
                        "SELECT id, contact_id, kind, lease_epoch + 1 AS lease_epoch, attempts, \
                                lost_claims + CASE WHEN state = 'sending' THEN 1 ELSE 0 END AS lost_claims, \
                                created_at, COALESCE(claimed_at, ",
                    );
                    query.push_bind(At(now)).push(") AS claimed_at FROM messages WHERE (bucket, id) IN (");
                    let ids = |query: &mut QueryBuilder<$database>| {
                        query.push_values(some, |mut row, id| {
                            row.push_bind(id.bucket().column()).push_bind(id.uuid());
                        });
                        query.push(")");
                    };
                    ids(&mut query);
                    let claims: Vec<ClaimRow> = query.build_query_as().fetch_all(&self.reader()).await?;
                    let mut query = QueryBuilder::<$database>::new(
                        "SELECT m.id AS message_id, r.token_id, r.generation, r.lead, r.deadline, r.escalation, r.reason, \
                                ( \
                                    SELECT MIN(o.lead) FROM reminders o \
                                    WHERE o.bucket = r.bucket AND o.token_id = r.token_id \
                                      AND o.generation = r.generation AND o.contact_id = r.contact_id \
                                      AND o.state IN ('pending', 'sent') \
                                ) AS tightest \
                         FROM messages m \
                         JOIN reminders r ON r.bucket = m.bucket AND r.contact_id = m.contact_id \
                         WHERE r.state = 'pending' AND ( \
                             r.message_id = m.id \
                             OR (r.message_id IS NULL AND m.state = 'open' AND m.kind IN ('reminders', 'escalations') \
                                 AND r.escalation = (m.kind = 'escalations')) \
                         ) AND (m.bucket, m.id) IN (",
                    );
                    ids(&mut query);
                    let carried: Vec<CarriedRow> = query.build_query_as().fetch_all(&self.reader()).await?;
                    let mut query = QueryBuilder::<$database>::new(
                        "SELECT id, address, time_zone, locale, suppressed_at, suppressed_why \
                         FROM contacts WHERE (bucket, id) IN (SELECT bucket, contact_id FROM messages WHERE (bucket, id) IN (",
                    );
                    ids(&mut query);
                    query.push(")");
                    let contacts: Vec<ContactRow> = query.build_query_as().fetch_all(&self.reader()).await?;
                    claimed.extend(row::claimed(claims, contacts, carried, Uuid::nil(), now).messages);
                }
                Ok(claimed)
            }

            async fn alerted(&self, fallback: ContactId) -> Result<Vec<Alerted>> {
                // Index messages_to_fallback.
                let rows: Vec<(String, At, Option<At>, bool)> = sqlx::query_as(
                    "SELECT kind, MAX(created_at), MAX(claimed_at), MAX(CASE WHEN state = 'open' THEN 1 ELSE 0 END) = 1 \
                     FROM messages \
                     WHERE bucket = $1 AND contact_id = $2 AND kind <> 'reminders' \
                     GROUP BY kind",
                )
                .bind(fallback.bucket().column())
                .bind(fallback.uuid())
                .fetch_all(&self.reader())
                .await?;
                rows.into_iter().map(|row| row::alerted(fallback, row)).collect()
            }

            async fn contacts(&self, ids: &[ContactId]) -> Result<HashMap<ContactId, Contact>> {
                let mut contacts = HashMap::new();
                for some in ids.chunks(AT_ONCE) {
                    let mut query = QueryBuilder::<$database>::new(
                        "SELECT id, address, time_zone, locale, suppressed_at, suppressed_why \
                         FROM contacts WHERE (bucket, id) IN (",
                    );
                    query.push_values(some, |mut row, contact| {
                        row.push_bind(contact.bucket().column()).push_bind(contact.uuid());
                    });
                    query.push(")");
                    let rows: Vec<ContactRow> = query.build_query_as().fetch_all(&self.reader()).await?;
                    let found: Vec<Contact> = row::all(rows)?;
                    contacts.extend(found.into_iter().map(|contact| (contact.id, contact)));
                }
                Ok(contacts)
            }

            async fn purgeable(&self, cutoffs: Cutoffs) -> Result<Purged> {
                let mut tx = self.begin_long_read().await?;
                // Indexes reminders_deadline, messages_finished, tokens_ended and tokens_deadline.
                let (reminders, messages, ended, passed): (i64, i64, i64, i64) = sqlx::query_as(
                    "SELECT (SELECT COUNT(*) FROM reminders WHERE deadline < $1 AND state <> 'pending'), \
                            (SELECT COUNT(*) FROM messages WHERE finished_at < $2), \
                            (SELECT COUNT(*) FROM tokens \
                             WHERE ended_at < $3 AND (kind <> 'primary' OR replaced_by IS NOT NULL)), \
                            (SELECT COUNT(*) FROM tokens \
                             WHERE status = 'active' AND expires_at IS NOT NULL AND expires_at < $3 \
                               AND (kind <> 'primary' OR replaced_by IS NOT NULL))",
                )
                .bind(At(cutoffs.reminders))
                .bind(At(cutoffs.messages))
                .bind(At(cutoffs.ended_tokens))
                .fetch_one(&mut *tx)
                .await?;
                let tokens = ended.unsigned_abs() + passed.unsigned_abs();
                Ok(Purged { reminders: reminders.unsigned_abs(), messages: messages.unsigned_abs(), tokens })
            }
        }
    };
}

foresight_operations!(Sqlite, sqlx::Sqlite);
foresight_operations!(Postgres, sqlx::Postgres);

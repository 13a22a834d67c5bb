//! What was written about deadlines, for those who want to know afterwards how it went.

use std::collections::HashSet;
use std::future::Future;
use std::ops::ControlFlow;

use super::Result;
use super::accounts::ReminderState;
use super::outbox::Waiting;
use crate::clock::Timestamp;
use crate::forecast::Ahead;
use crate::policies::Traits;
use crate::policy::Lead;
use crate::token::{ContactId, Token, TokenId};

/// A row of the ledger, as reports need it.
#[derive(Clone, Debug)]
pub struct LedgerRow {
    /// Which token.
    pub token: TokenId,
    /// Which of its deadlines.
    pub generation: i32,
    /// How long before it.
    pub lead: Lead,
    /// What has become of it.
    pub state: ReminderState,
    /// Why it was not sent.
    pub reason: Option<String>,
    /// Whether the fallback was told in the place of the owner.
    pub escalation: bool,
    /// When it was sent or given up.
    pub settled_at: Option<Timestamp>,
}

/// What reports and metrics ask.
pub trait Reports {
    /// The messages that wait, without those that are held: [`Guards::held`](super::Guards::held) tells of these. Costs
    /// what waits, not what exists.
    ///
    /// # Errors
    /// When the store fails.
    fn waiting(&self) -> impl Future<Output = Result<Waiting>> + Send;

    /// How many contacts get no mail. Counts them all: not for the hot path.
    ///
    /// # Errors
    /// When the store fails.
    fn suppressed_count(&self) -> impl Future<Output = Result<u64>> + Send;

    /// Hands the tokens whose deadline lies after `since` and not after `until`, and has passed, to `visit`, one by one in no
    /// order, each with the key of its owner: those that were marked as expired, and those that will be. Those that were
    /// revoked or replaced are none of them.
    ///
    /// # Errors
    /// When the store fails.
    fn each_expired(
        &self,
        since: Timestamp,
        until: Timestamp,
        visit: impl FnMut(Token, String) + Send,
    ) -> impl Future<Output = Result<()>> + Send;

    /// Hands each active token whose deadline lies after `from` and not after `until` to `visit`, the earliest first, with the
    /// contacts that speak for its owner or watch it, whether or not they take mail, and, where `described`, with what policies match
    /// it by.
    ///
    /// # Errors
    /// When the store fails.
    fn each_ahead(
        &self,
        from: Timestamp,
        until: Timestamp,
        described: bool,
        visit: impl FnMut(Ahead, Option<Traits>, &[ContactId]) + Send,
    ) -> impl Future<Output = Result<()>> + Send;

    /// The contacts that get no mail. Reads all contacts: not for the hot path.
    ///
    /// # Errors
    /// When the store fails.
    fn suppressed(&self) -> impl Future<Output = Result<HashSet<ContactId>>> + Send;

    /// Hands what was written about deadlines after `since`, up to `until`, to `visit`, one by one, until it says stop.
    ///
    /// # Errors
    /// When the store fails.
    fn each_ledger_row(
        &self,
        since: Timestamp,
        until: Timestamp,
        visit: impl FnMut(LedgerRow) -> ControlFlow<()> + Send,
    ) -> impl Future<Output = Result<()>> + Send;
}

/// The tokens ahead, once for each contact. Index tokens_deadline.
macro_rules! ahead {
    ($columns:literal, $joins:literal) => {
        concat!(
            "SELECT t.id, t.expires_at, t.deadline_set_at, t.generation, t.secret_hash IS NOT NULL AS issued, t.last_used_at, \
                    t.replaced_by, oc.contact_id AS speaker, tc.contact_id AS watcher",
            $columns,
            " FROM tokens t \
             LEFT JOIN owner_contacts oc ON oc.bucket = t.bucket AND oc.owner_id = t.owner_id \
             LEFT JOIN token_contacts tc ON tc.bucket = t.bucket AND tc.token_id = t.id ",
            $joins,
            " WHERE t.status = 'active' AND t.expires_at IS NOT NULL AND t.expires_at > $1 AND t.expires_at <= $2 \
             ORDER BY t.expires_at, t.id"
        )
    };
}
pub(super) use ahead;

/// Implements [`Reports`] for a back end that has `begin_long_read()`; `scanning` is what makes room in memory for what is read again
/// and again while much of the store is read.
macro_rules! report_operations {
    ($store:ty, scanning = $scanning:literal) => {
        impl Reports for $store {
            async fn waiting(&self) -> Result<Waiting> {
                let mut tx = self.begin_long_read().await?;
                let rows: Vec<(String, i64, Option<At>)> = sqlx::query_as(WAITING).fetch_all(&mut *tx).await?;
                let rows = rows.into_iter().map(|(state, count, oldest)| (state, count, oldest.map(|at| at.0)));
                Ok(Waiting::from_rows(rows))
            }

            async fn suppressed_count(&self) -> Result<u64> {
                let mut tx = self.begin_long_read().await?;
                let (count,): (i64,) = sqlx::query_as("SELECT COUNT(suppressed_at) FROM contacts")
                    .fetch_one(&mut *tx)
                    .await?;
                Ok(count.unsigned_abs())
            }

            async fn each_expired(
                &self,
                since: Timestamp,
                until: Timestamp,
                mut visit: impl FnMut(Token, String) + Send,
            ) -> Result<()> {
                let mut tx = self.begin_long_read().await?;
                // Indexes tokens_ended, as an expired token ended at its deadline, and tokens_deadline.
                for statement in [
                    concat!(
                        "SELECT ",
                        token_columns!(),
                        ", o.key AS owner_key \
                         FROM tokens t \
                         JOIN owners o ON o.bucket = t.bucket AND o.id = t.owner_id \
                         WHERE t.ended_at > $1 AND t.ended_at <= $2 AND t.status = 'expired' AND t.replaced_by IS NULL"
                    ),
                    concat!(
                        "SELECT ",
                        token_columns!(),
                        ", o.key AS owner_key \
                         FROM tokens t \
                         JOIN owners o ON o.bucket = t.bucket AND o.id = t.owner_id \
                         WHERE t.status = 'active' AND t.expires_at IS NOT NULL \
                           AND t.expires_at > $1 AND t.expires_at <= $2 AND t.replaced_by IS NULL"
                    ),
                ] {
                    let query = sqlx::query_as::<_, ListedRow>(statement).bind(At(since)).bind(At(until));
                    let mut rows = query.fetch(&mut *tx);
                    while let Some(row) = rows.try_next().await? {
                        let (token, owner_key) = row.try_into()?;
                        visit(token, owner_key);
                    }
                }
                Ok(())
            }

            async fn each_ahead(
                &self,
                from: Timestamp,
                until: Timestamp,
                described: bool,
                mut visit: impl FnMut(Ahead, Option<Traits>, &[ContactId]) + Send,
            ) -> Result<()> {
                let statement = if described {
                    ahead!(
                        ", t.kind, t.scopes, t.description, w.key AS owner_key",
                        "JOIN owners w ON w.bucket = t.bucket AND w.id = t.owner_id"
                    )
                } else {
                    ahead!("", "")
                };
                let mut tx = self.begin_long_read().await?;
                sqlx::raw_sql($scanning).execute(&mut *tx).await?;
                let mut rows = sqlx::query(statement).bind(At(from)).bind(At(until)).fetch(&mut *tx);
                let mut last: Option<(Ahead, Option<Traits>, Vec<ContactId>)> = None;
                while let Some(row) = rows.try_next().await? {
                    let ahead = AheadRow::from_row(&row)?;
                    let contacts = [ahead.speaker, ahead.watcher].into_iter().flatten().map(ContactId::from);
                    match &mut last {
                        Some((token, _, known)) if token.token == TokenId::from(ahead.id) => known.extend(contacts),
                        _ => {
                            let traits = match described {
                                true => Some(<(TokenId, Traits)>::try_from(TraitsRow::from_row(&row)?)?.1),
                                false => None,
                            };
                            let next = (Ahead::from(&ahead), traits, contacts.collect());
                            if let Some((token, traits, known)) = last.replace(next) {
                                visit(token, traits, &known);
                            }
                        }
                    }
                }
                if let Some((token, traits, known)) = last {
                    visit(token, traits, &known);
                }
                Ok(())
            }

            async fn suppressed(&self) -> Result<HashSet<ContactId>> {
                let mut tx = self.begin_long_read().await?;
                let rows: Vec<(Uuid,)> = sqlx::query_as("SELECT id FROM contacts WHERE suppressed_at IS NOT NULL")
                    .fetch_all(&mut *tx)
                    .await?;
                Ok(rows.into_iter().map(|(id,)| id.into()).collect())
            }

            async fn each_ledger_row(
                &self,
                since: Timestamp,
                until: Timestamp,
                mut visit: impl FnMut(LedgerRow) -> ControlFlow<()> + Send,
            ) -> Result<()> {
                let mut tx = self.begin_long_read().await?;
                // Index reminders_deadline.
                let mut rows = sqlx::query_as::<_, ReportRow>(
                    "SELECT token_id, generation, lead, state, reason, escalation, settled_at \
                     FROM reminders \
                     WHERE deadline > $1 AND deadline <= $2",
                )
                .bind(At(since))
                .bind(At(until))
                .fetch(&mut *tx);
                while let Some(row) = rows.try_next().await? {
                    if visit(row.try_into()?).is_break() {
                        break;
                    }
                }
                Ok(())
            }
        }
    };
}
pub(super) use report_operations;

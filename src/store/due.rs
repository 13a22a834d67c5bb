//! Whether anything is due: all that a pass which finds nothing asks, in one statement for each job.
//!
//! A plain read, without a lease: what it finds is read again by the step that does it. What becomes due after it is the
//! next pass's.

use std::collections::{HashMap, HashSet};
use std::future::Future;

use super::Result;
use super::planning::Watermark;
use super::purging::Cutoffs;
use super::row::At;
use crate::clock::Timestamp;
use crate::policy::Lead;

/// What `expire` would find.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ToExpire {
    /// Tokens that are marked unplanned are past their deadline.
    pub marked: bool,
    /// Tokens were expired before their deadline.
    pub too_early: bool,
    /// Up to where deadlines have been dealt with.
    pub watermark: Option<Watermark>,
    /// Deadlines after the watermark have passed.
    pub crossed: bool,
}

impl ToExpire {
    /// Whether the watermark lies in the future: a wrong clock set it.
    pub fn is_ahead(&self, now: Timestamp) -> bool {
        self.watermark.is_some_and(|watermark| watermark.instant > now)
    }

    /// The watermark, where it can be believed.
    pub fn known(&self, now: Timestamp) -> Option<Watermark> {
        self.watermark.filter(|_| !self.is_ahead(now))
    }

    /// Whether a pass finds nothing to do. Where there is no watermark it sets one.
    pub fn is_nothing(&self, now: Timestamp) -> bool {
        !self.marked && !self.too_early && !self.crossed && self.known(now).is_some()
    }
}

/// What `remind` would find.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ToRemind {
    /// Tokens whose deadline lies ahead are marked unplanned.
    pub marked: bool,
    /// Contacts may have been told of a deadline that no longer holds.
    pub uncorrected: bool,
    /// A guard holds messages.
    pub held: bool,
    /// When the last reconcile pass began.
    pub reconciled_at: Option<Timestamp>,
    /// By which policies `remind` planned last.
    pub policies: Option<String>,
    /// How far each lead has been dealt with; lead 0 is the watermark of `expire`.
    pub watermarks: HashMap<Lead, Watermark>,
    /// The leads that tokens have crossed since.
    pub crossed: HashSet<Lead>,
}

impl ToRemind {
    /// The watermark of a lead, where it can be believed: one that lies in the future was set by a wrong clock.
    pub fn known(&self, lead: Lead, now: Timestamp) -> Option<Watermark> {
        self.watermarks.get(&lead).copied().filter(|watermark| watermark.instant <= now)
    }

    /// Whether there are watermarks of leads that are not among these, lead 0 aside.
    pub fn has_others(&self, leads: &[Lead]) -> bool {
        self.watermarks.keys().any(|lead| *lead != Lead::EXPIRED && !leads.contains(lead))
    }

    /// Whether a pass with these leads, by the same policies as the last one, finds nothing to do.
    pub fn is_nothing(&self, leads: &[Lead], now: Timestamp) -> bool {
        let quiet = |lead: &Lead| self.known(*lead, now).is_some() && !self.crossed.contains(lead);
        !self.marked && !self.uncorrected && !self.held && !self.has_others(leads) && leads.iter().all(quiet)
    }
}

/// Asking what is due.
pub trait Due {
    /// What a pass of `expire` would find.
    ///
    /// # Errors
    /// When the store fails.
    fn to_expire(&self, now: Timestamp) -> impl Future<Output = Result<ToExpire>> + Send;

    /// What a pass of `remind` would find.
    ///
    /// # Errors
    /// When the store fails.
    fn to_remind(&self, now: Timestamp) -> impl Future<Output = Result<ToRemind>> + Send;

    /// Whether anything is old enough to go.
    ///
    /// # Errors
    /// When the store fails.
    fn to_purge(&self, cutoffs: Cutoffs) -> impl Future<Output = Result<bool>> + Send;
}

/// A row of the answer about `expire`.
pub(super) type ToExpireRow = (Option<At>, Option<uuid::Uuid>, bool, bool, bool);

impl From<ToExpireRow> for ToExpire {
    fn from((instant, token, marked, too_early, crossed): ToExpireRow) -> Self {
        let watermark = instant.zip(token).map(|(instant, token)| Watermark { instant: instant.0, token });
        Self { marked, too_early, watermark, crossed }
    }
}

/// A row of the answer about `remind`, one for each watermark: lead, instant, token, whether tokens have crossed it, and
/// what all rows say alike.
pub(super) type ToRemindRow =
    (Option<i64>, Option<At>, Option<uuid::Uuid>, bool, bool, bool, bool, Option<At>, Option<String>);

impl FromIterator<ToRemindRow> for ToRemind {
    fn from_iter<I: IntoIterator<Item = ToRemindRow>>(rows: I) -> Self {
        let mut due = Self::default();
        for (lead, instant, token, crossed, marked, uncorrected, held, reconciled_at, policies) in rows {
            (due.marked, due.held, due.reconciled_at) = (marked, held, reconciled_at.map(|at| at.0));
            (due.uncorrected, due.policies) = (uncorrected, policies);
            let Some(((lead, instant), token)) = lead.zip(instant).zip(token) else { continue };
            let lead = Lead::from_seconds(lead);
            due.watermarks.insert(lead, Watermark { instant: instant.0, token });
            if crossed {
                due.crossed.insert(lead);
            }
        }
        due
    }
}

/// Implements [`Due`] for a back end that has `acquire_reader()` and `keep_reader()`; `lead` is how it says the lead of a
/// watermark as a span of time.
///
/// Each probe is a scalar subquery with an order, which only its index gives without reading more: from an EXISTS
/// PostgreSQL drops the order, and may read a table from end to end where it expects to be lucky.
macro_rules! due_operations {
    ($store:ty, lead = $lead:literal) => {
        impl Due for $store {
            async fn to_expire(&self, now: Timestamp) -> Result<ToExpire> {
                self.within(async move {
                    let mut connection = self.acquire_reader().await?;
                    // Indexes tokens_unplanned, tokens_ended and tokens_deadline. An expired token ended at its deadline, so
                    // those that end in the future come last.
                    let row: ToExpireRow = sqlx::query_as(
                        "SELECT watermarks.instant, watermarks.token_id, \
                            (SELECT 1 FROM tokens \
                             WHERE unplanned AND status = 'active' AND expires_at <= $1 \
                             ORDER BY expires_at, id LIMIT 1) IS NOT NULL AS marked, \
                            (SELECT 1 FROM tokens \
                             WHERE ended_at > $1 AND status = 'expired' AND expires_at > $1 \
                             ORDER BY ended_at DESC LIMIT 1) IS NOT NULL AS too_early, \
                            (SELECT 1 FROM tokens \
                             WHERE status = 'active' AND expires_at IS NOT NULL \
                               AND (expires_at, id) > (watermarks.instant, watermarks.token_id) AND expires_at <= $1 \
                             ORDER BY expires_at, id LIMIT 1) IS NOT NULL AS crossed \
                         FROM (SELECT 0 AS bucket) AS one \
                         LEFT JOIN watermarks ON watermarks.bucket = one.bucket AND watermarks.lead = 0",
                    )
                    .bind(At(now))
                    .fetch_one(&mut *connection)
                    .await?;
                    self.keep_reader(connection);
                    Ok(row.into())
                })
                .await
            }

            async fn to_remind(&self, now: Timestamp) -> Result<ToRemind> {
                self.within(async move {
                    let mut connection = self.acquire_reader().await?;
                    // Indexes tokens_deadline, tokens_unplanned, tokens_uncorrected and messages_held_deadline.
                    let rows: Vec<ToRemindRow> = sqlx::query_as(concat!(
                        "SELECT watermarks.lead, watermarks.instant, watermarks.token_id, \
                            (SELECT 1 FROM tokens \
                             WHERE watermarks.lead > 0 AND status = 'active' AND expires_at IS NOT NULL \
                               AND (expires_at, id) > (watermarks.instant + ",
                        $lead,
                        ", watermarks.token_id) AND expires_at <= $1 + ",
                        $lead,
                        " ORDER BY expires_at, id LIMIT 1) IS NOT NULL AS crossed, \
                            (SELECT 1 FROM tokens \
                             WHERE unplanned AND status = 'active' AND expires_at > $1 \
                             ORDER BY expires_at, id LIMIT 1) IS NOT NULL AS marked, \
                            (SELECT 1 FROM tokens WHERE uncorrected ORDER BY id LIMIT 1) IS NOT NULL AS uncorrected, \
                            (SELECT 1 FROM messages WHERE state = 'held' ORDER BY not_before LIMIT 1) IS NOT NULL AS held, \
                            (SELECT finished_at FROM jobs WHERE bucket = 0 AND name = $2) AS reconciled_at, \
                            (SELECT policies FROM jobs WHERE bucket = 0 AND name = 'remind') AS policies \
                         FROM (SELECT 0 AS bucket) AS one \
                         LEFT JOIN watermarks ON watermarks.bucket = one.bucket"
                    ))
                    .bind(At(now))
                    .bind(RECONCILE)
                    .fetch_all(&mut *connection)
                    .await?;
                    self.keep_reader(connection);
                    Ok(rows.into_iter().collect())
                })
                .await
            }

            async fn to_purge(&self, cutoffs: Cutoffs) -> Result<bool> {
                self.within(async move {
                    let mut connection = self.acquire_reader().await?;
                    // Indexes reminders_deadline, messages_finished, tokens_ended and the primary key of guard_counts.
                    let (due,): (bool,) = sqlx::query_as(
                        "SELECT (SELECT 1 FROM reminders \
                             WHERE deadline < $1 AND state <> 'pending' \
                             ORDER BY deadline LIMIT 1) IS NOT NULL \
                         OR (SELECT 1 FROM messages \
                             WHERE finished_at < $2 \
                             ORDER BY finished_at LIMIT 1) IS NOT NULL \
                         OR (SELECT 1 FROM tokens \
                             WHERE ended_at < $3 AND (kind <> 'primary' OR replaced_by IS NOT NULL) \
                             ORDER BY ended_at LIMIT 1) IS NOT NULL \
                         OR (SELECT 1 FROM guard_counts \
                             WHERE bucket = 0 AND minute < $4 \
                             ORDER BY minute LIMIT 1) IS NOT NULL AS due",
                    )
                    .bind(At(cutoffs.reminders))
                    .bind(At(cutoffs.messages))
                    .bind(At(cutoffs.ended_tokens))
                    .bind(At(cutoffs.guard_counts))
                    .fetch_one(&mut *connection)
                    .await?;
                    self.keep_reader(connection);
                    Ok(due)
                })
                .await
            }
        }
    };
}
pub(super) use due_operations;

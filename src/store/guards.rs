//! What guards count, what they hold back, and how somebody is told of it: the same on both back ends.
//!
//! What is counted is written in the transaction that did it, by the minute, so that every process and every pass counts in the
//! same hour, and a crash counts nothing that was not done. An alert is a message of its own, opened once for its time.

use std::future::Future;

use chrono::TimeDelta;

use super::Result;
use super::outbox::MessageKind;
use super::row::At;
use crate::clock::Timestamp;
use crate::token::ContactId;

/// What jobs did within a span of time, by the minute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// Messages that were opened.
    pub messages: u64,
    /// Tokens that were marked expired.
    pub expired: u64,
}

/// What a guard keeps back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// How many messages.
    pub messages: u64,
    /// When the first of them was.
    pub since: Timestamp,
    /// When the last of them was.
    pub latest: Timestamp,
    /// The next deadline that they speak of, where one lies ahead.
    pub next_deadline: Option<Timestamp>,
}

/// The minute that an instant belongs to.
pub(super) fn minute(at: Timestamp) -> Timestamp {
    at - TimeDelta::seconds(at.timestamp().rem_euclid(60))
}

/// The name under which expired tokens are counted; messages are under the name of the job that opened them.
pub(super) const EXPIRED: &str = "expired";

/// Counts what a job did in this minute.
pub(super) const COUNT: &str = "INSERT INTO guard_counts (bucket, name, minute, amount) VALUES (0, $1, $2, $3) \
     ON CONFLICT (bucket, minute, name) DO UPDATE SET amount = guard_counts.amount + excluded.amount";

/// What was counted within a span of minutes.
pub(super) const COUNTED: &str = "SELECT name, CAST(SUM(amount) AS BIGINT) FROM guard_counts \
     WHERE bucket = 0 AND minute > $1 AND minute <= $2 \
     GROUP BY name";

/// Forgets what was counted long ago.
pub(super) const FORGET_COUNTS: &str = "DELETE FROM guard_counts WHERE bucket = 0 AND minute < $1";

/// What is held: how much, since when, and the next deadline. Index messages_held_deadline.
pub(super) const HELD: &str = "SELECT COUNT(*), MIN(created_at), MAX(created_at), \
            (SELECT MIN(not_before) FROM messages WHERE state = 'held' AND not_before > $1) \
     FROM messages WHERE state = 'held'";

/// Opens an alert, unless one of its kind was opened since. Index messages_to_fallback.
pub(super) const ALERT: &str = "INSERT INTO messages \
         (bucket, id, contact_id, kind, state, not_before, attempts, lease_epoch, created_at) \
     SELECT $1, $2, $3, $4, 'open', $5, 0, 0, $5 \
     WHERE NOT EXISTS ( \
         SELECT 1 FROM messages \
         WHERE bucket = $1 AND contact_id = $3 AND kind = $4 AND kind <> 'reminders' AND created_at >= $6 \
     ) \
     ON CONFLICT DO NOTHING";

impl Counted {
    /// Adds up what the rows of [`COUNTED`] say.
    pub(super) fn from_rows(rows: impl IntoIterator<Item = (String, i64)>) -> Self {
        let mut counted = Self::default();
        for (name, amount) in rows {
            let amount = u64::try_from(amount).unwrap_or_default();
            if name == EXPIRED {
                counted.expired += amount;
            } else {
                counted.messages += amount;
            }
        }
        counted
    }
}

/// The columns of [`HELD`].
pub(super) type HeldRow = (i64, Option<At>, Option<At>, Option<At>);

impl Held {
    /// From the row of [`HELD`]; `None` where nothing is held.
    pub(super) fn from_row(row: HeldRow) -> Option<Self> {
        let (messages, since, latest, next_deadline) = row;
        let messages = u64::try_from(messages).unwrap_or_default();
        let (since, latest) = (since?.0, latest?.0);
        Some(Self { messages, since, latest, next_deadline: next_deadline.map(|at| at.0) })
    }
}

/// Asking what was done and what is held, and telling of it.
pub trait Guards {
    /// What jobs did in the minutes after `since`, up to the one of `now`.
    ///
    /// # Errors
    /// When the store fails.
    fn counted(&self, since: Timestamp, now: Timestamp) -> impl Future<Output = Result<Counted>> + Send;

    /// How many contacts there are. Counts them: not for the hot path.
    ///
    /// # Errors
    /// When the store fails.
    fn contact_count(&self) -> impl Future<Output = Result<u64>> + Send;

    /// What is held; `None` where nothing is.
    ///
    /// # Errors
    /// When the store fails.
    fn held(&self, now: Timestamp) -> impl Future<Output = Result<Option<Held>>> + Send;

    /// How many active tokens are past their deadline.
    ///
    /// # Errors
    /// When the store fails.
    fn overdue_count(&self, now: Timestamp) -> impl Future<Output = Result<u64>> + Send;

    /// Opens an alert for a contact, unless one of this kind was opened since then. Returns whether it did.
    ///
    /// # Errors
    /// When the store fails.
    fn alert(
        &self,
        contact: ContactId,
        kind: MessageKind,
        unless_since: Timestamp,
        now: Timestamp,
    ) -> impl Future<Output = Result<bool>> + Send;
}

/// Implements [`Guards`] for a back end that has `within()`, `reader()`, `writer()` and `begin_long_read()`.
macro_rules! guard_operations {
    ($store:ty) => {
        impl Guards for $store {
            async fn counted(&self, since: Timestamp, now: Timestamp) -> Result<Counted> {
                self.within(async move {
                    let rows: Vec<(String, i64)> =
                        sqlx::query_as(COUNTED).bind(At(since)).bind(At(now)).fetch_all(&self.reader()).await?;
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
                    let row: HeldRow = sqlx::query_as(HELD).bind(At(now)).fetch_one(&self.reader()).await?;
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
                    .fetch_one(&self.reader())
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
                        .execute(&self.writer())
                        .await?;
                    Ok(opened.rows_affected() > 0)
                })
                .await
            }
        }
    };
}
pub(super) use guard_operations;

//! What was written about deadlines, for those who want to know afterwards how it went.

use std::future::Future;
use std::ops::ControlFlow;

use super::Result;
use super::accounts::ReminderState;
use crate::clock::Timestamp;
use crate::policy::Lead;
use crate::token::TokenId;

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

/// Reading the ledger.
pub trait Reports {
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

/// Implements [`Reports`] for a back end that has `begin_long_read()`.
macro_rules! report_operations {
    ($store:ty) => {
        impl Reports for $store {
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

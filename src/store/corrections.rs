//! What `remind` does about deadlines that contacts were told of and that no longer hold.
//!
//! Whoever changes a token so that this may be marks it in the same transaction; a pass reads the marked ones, decides with
//! [`crate::correction`], and takes the mark off together with what it writes. A crash in between leaves the mark.

use std::collections::HashMap;
use std::future::Future;

use uuid::Uuid;

use super::Result;
use super::jobs::Lease;
use super::planning::{NewReminder, Written};
use super::row::At;
use crate::clock::Timestamp;
use crate::correction::Told;
use crate::policy::Lead;
use crate::token::{ContactId, Token, TokenId};

/// What was decided about marked tokens.
#[derive(Debug)]
pub struct Corrected<'a> {
    /// The instant of the decision.
    pub now: Timestamp,
    /// The tokens that were looked at. What is decided about one that has changed since is not written, and its mark stays.
    pub looked_at: &'a [Token],
    /// The rows for the ledger.
    pub reminders: Vec<NewReminder>,
    /// How many messages may be opened; what needs more is held. `None`: any number.
    pub may_open: Option<u64>,
}

/// Correcting what was said.
pub trait Corrections {
    /// Tokens whose contacts may have been told of a deadline that no longer holds, in the order of their ids, after this one.
    ///
    /// # Errors
    /// When the store fails.
    fn uncorrected(&self, after: Uuid, limit: u32) -> impl Future<Output = Result<Vec<Token>>> + Send;

    /// What these contacts were told of these tokens' deadlines that lie ahead, or are being told by a message that is on its way, or
    /// that may have arrived: not what was escalated to them.
    ///
    /// # Errors
    /// When the store fails.
    fn told(
        &self,
        asked: &[(ContactId, TokenId)],
        now: Timestamp,
    ) -> impl Future<Output = Result<HashMap<(ContactId, TokenId), Vec<Told>>>> + Send;

    /// Writes what was decided, and takes the marks off.
    ///
    /// # Errors
    /// [`Error::LostLease`](super::Error::LostLease), with nothing written.
    fn correct(&self, lease: &Lease, decided: Corrected<'_>) -> impl Future<Output = Result<Written>> + Send;
}

/// A row of what contacts were told: contact, token, generation, lead, deadline, when it was settled, and its message.
pub(super) type ToldRow = (Uuid, Uuid, i32, i64, At, Option<At>, Option<Uuid>);

/// Rows of what contacts were told, by contact and token.
pub(super) fn by_contact_and_token(rows: Vec<ToldRow>) -> HashMap<(ContactId, TokenId), Vec<Told>> {
    let mut all: HashMap<(ContactId, TokenId), Vec<Told>> = HashMap::new();
    for (contact, token, generation, lead, deadline, settled_at, message) in rows {
        let sent_at = settled_at.map(|at| at.0);
        let (lead, message) = (Lead::from_seconds(lead), message.map(Into::into));
        let told = Told { generation, lead, deadline: deadline.0, sent_at, message };
        all.entry((contact.into(), token.into())).or_default().push(told);
    }
    all
}

/// Functions of [`Corrections`] for a back end that has `within()` and `reader()`.
macro_rules! common_corrections {
    () => {
        async fn uncorrected(&self, after: Uuid, limit: u32) -> Result<Vec<Token>> {
            self.within(async move {
                // Index tokens_uncorrected.
                let rows: Vec<TokenRow> = sqlx::query_as(concat!(
                    "SELECT ",
                    token_columns!(),
                    " FROM tokens t WHERE t.uncorrected AND t.id > $1 ORDER BY t.id LIMIT $2"
                ))
                .bind(after)
                .bind(i64::from(limit))
                .fetch_all(&self.reader())
                .await?;
                row::all(rows)
            })
            .await
        }
    };
}
pub(super) use common_corrections;

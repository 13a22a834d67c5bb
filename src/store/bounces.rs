//! What is done about a mail that came back after a server had taken it.
//!
//! A message that bounced is written as failed, with what it carried, as a refusal would have been; its reminders are read by
//! its contact's bucket, without an index of their own: bounces are few.

use std::future::Future;

use super::Result;
use super::outbox::{ClaimedReminder, MessageState};
use super::planning::NewReminder;
use crate::clock::Timestamp;
use crate::token::{Contact, ContactId, MessageId};

/// A message that was handed over, or was to be.
#[derive(Clone, Debug)]
pub struct Posted {
    /// Which message.
    pub id: MessageId,
    /// What has become of it, as far as is known.
    pub state: MessageState,
    /// To whom.
    pub contact: Contact,
    /// The reminders that were sent with it.
    pub sent: Vec<ClaimedReminder>,
}

/// Messages that came back.
pub trait Bounces {
    /// A message; `None` where there is none with this id, or none any more.
    ///
    /// # Errors
    /// When the store fails.
    fn posted(&self, id: MessageId) -> impl Future<Output = Result<Option<Posted>>> + Send;

    /// The contact takes no mail from now on, because of this reply. One that is suppressed already stays so.
    ///
    /// # Errors
    /// When the store fails, with nothing written.
    fn suppress_contact(
        &self,
        contact: ContactId,
        reply: &str,
        now: Timestamp,
    ) -> impl Future<Output = Result<()>> + Send;

    /// A message that was sent has failed, with the reminders that it carried, for this reply; and the fallback is told.
    /// `false`, with nothing written, where it is not `sent` any more: somebody else has heard of it.
    ///
    /// # Errors
    /// When the store fails, with nothing written.
    fn came_back(
        &self,
        message: MessageId,
        reply: &str,
        escalations: &[NewReminder],
        now: Timestamp,
    ) -> impl Future<Output = Result<bool>> + Send;

    /// Whether one of these contacts is told of the same as this reminder says, or is about to be.
    ///
    /// # Errors
    /// When the store fails.
    fn is_told(&self, reminder: &ClaimedReminder, contacts: &[ContactId]) -> impl Future<Output = Result<bool>> + Send;

    /// Who hears of what owners could not be told, as a daemon last set it.
    ///
    /// # Errors
    /// When the store fails.
    fn fallback(&self) -> impl Future<Output = Result<Option<ContactId>>> + Send;
}

/// Implements [`Bounces`] for a back end that has `begin()`, `reader()`, `writer()`, `contact()` and `write_reminders()`.
macro_rules! bounce_operations {
    ($store:ty) => {
        impl Bounces for $store {
            async fn posted(&self, id: MessageId) -> Result<Option<Posted>> {
                let found: Option<(Uuid, String)> =
                    sqlx::query_as("SELECT contact_id, state FROM messages WHERE bucket = $1 AND id = $2")
                        .bind(id.bucket().column())
                        .bind(id.uuid())
                        .fetch_optional(&self.reader())
                        .await?;
                let Some((contact_id, state)) = found else { return Ok(None) };
                let Some(contact) = contact(&self.reader(), contact_id.into()).await? else { return Ok(None) };
                let rows: Vec<CarriedRow> = sqlx::query_as(
                    "SELECT message_id, token_id, generation, lead, deadline, escalation, reason, lead AS tightest \
                     FROM reminders \
                     WHERE bucket = $1 AND message_id = $2 AND state = 'sent'",
                )
                .bind(id.bucket().column())
                .bind(id.uuid())
                .fetch_all(&self.reader())
                .await?;
                Ok(Some(Posted { id, state: row::message_state(id, &state)?, contact, sent: row::all(rows)? }))
            }

            async fn suppress_contact(&self, contact: ContactId, reply: &str, now: Timestamp) -> Result<()> {
                sqlx::query(
                    "UPDATE contacts SET suppressed_at = $3, suppressed_why = $4 \
                     WHERE bucket = $1 AND id = $2 AND suppressed_at IS NULL",
                )
                .bind(contact.bucket().column())
                .bind(contact.uuid())
                .bind(At(now))
                .bind(reply)
                .execute(&self.writer())
                .await?;
                Ok(())
            }

            async fn came_back(
                &self,
                message: MessageId,
                reply: &str,
                escalations: &[NewReminder],
                now: Timestamp,
            ) -> Result<bool> {
                let bucket = message.bucket().column();
                let mut tx = self.begin().await?;
                let failed = sqlx::query(
                    "UPDATE messages SET state = 'failed', last_reply = $3, finished_at = $4 \
                     WHERE bucket = $1 AND id = $2 AND state = 'sent'",
                )
                .bind(bucket)
                .bind(message.uuid())
                .bind(reply)
                .bind(At(now))
                .execute(&mut *tx)
                .await?;
                if failed.rows_affected() == 0 {
                    return Ok(false);
                }
                sqlx::query(
                    "UPDATE reminders SET state = 'failed', reason = $3, settled_at = $4 \
                     WHERE bucket = $1 AND message_id = $2 AND state = 'sent'",
                )
                .bind(bucket)
                .bind(message.uuid())
                .bind(Reason::Undeliverable.as_str())
                .bind(At(now))
                .execute(&mut *tx)
                .await?;
                write_reminders(&mut tx, escalations, now, None).await?;
                tx.commit().await?;
                Ok(true)
            }

            async fn is_told(&self, reminder: &ClaimedReminder, contacts: &[ContactId]) -> Result<bool> {
                for contact in contacts {
                    let told: Option<(i32,)> = sqlx::query_as(
                        "SELECT 1 FROM reminders \
                         WHERE bucket = $1 AND token_id = $2 AND generation = $3 AND lead = $4 AND contact_id = $5 \
                           AND state IN ('pending', 'sent')",
                    )
                    .bind(contact.bucket().column())
                    .bind(reminder.token.uuid())
                    .bind(reminder.claimed.generation)
                    .bind(reminder.claimed.lead.seconds())
                    .bind(contact.uuid())
                    .fetch_optional(&self.reader())
                    .await?;
                    if told.is_some() {
                        return Ok(true);
                    }
                }
                Ok(false)
            }

            async fn fallback(&self) -> Result<Option<ContactId>> {
                let found: Option<(Uuid,)> = sqlx::query_as(FALLBACK)
                .bind(Bucket::of(SYSTEM_OWNER_KEY).column())
                .bind(SYSTEM_OWNER_KEY)
                .fetch_optional(&self.reader())
                .await?;
                Ok(found.map(|(id,)| id.into()))
            }
        }
    };
}
pub(super) use bounce_operations;

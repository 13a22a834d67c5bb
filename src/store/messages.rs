//! What operators do with the outbox: look at it, try again, cancel, and let go what a guard holds.

use std::future::Future;
use std::ops::ControlFlow;

use super::Result;
use super::accounts::ReminderState;
use super::outbox::{MessageKind, MessageState};
use crate::clock::Timestamp;
use crate::policy::Lead;
use crate::token::{Address, Bucket, Contact, ContactId, IdRef, MessageId, TokenId};

/// A message as `lapsed outbox` prints it.
#[derive(Clone, Debug)]
pub struct MessageRecord {
    /// Which message.
    pub id: MessageId,
    /// What it is for.
    pub kind: MessageKind,
    /// What has become of it.
    pub state: MessageState,
    /// To whom.
    pub contact: ContactId,
    /// Where it goes; `None` where the contact is gone.
    pub address: Option<Address>,
    /// When it was opened.
    pub created_at: Timestamp,
    /// When it was first claimed.
    pub claimed_at: Option<Timestamp>,
    /// From when on it may be claimed; while it is being sent, when its lease ends; while it is held, the first deadline
    /// that it speaks of.
    pub not_before: Timestamp,
    /// When it was sent, given up or cancelled.
    pub finished_at: Option<Timestamp>,
    /// How often it was tried.
    pub attempts: i32,
    /// How often nobody knew whether it had been delivered.
    pub unknown_outcomes: i32,
    /// How often whoever had claimed it never said what became of it.
    pub lost_claims: i32,
    /// What the mail server said last.
    pub last_reply: Option<String>,
    /// How many reminders it would say now.
    pub pending: u64,
}

/// A reminder that a message carries, or would.
#[derive(Clone, Debug)]
pub struct CarriedRecord {
    /// Which token.
    pub token: TokenId,
    /// What the token is for; `None` where it is gone.
    pub description: Option<String>,
    /// How long before the deadline.
    pub lead: Lead,
    /// The deadline that it speaks of.
    pub deadline: Timestamp,
    /// What has become of it.
    pub state: ReminderState,
    /// Why it was not sent, or why it is escalated.
    pub reason: Option<String>,
}

/// Which messages to list.
#[derive(Clone, Debug, Default)]
pub struct MessageFilter {
    /// Only those in one of these states; empty: in any.
    pub states: Vec<MessageState>,
    /// Only those to this contact.
    pub contact: Option<ContactId>,
}

/// Which messages of a bucket something is done with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// All that are in the state that it is done with.
    All,
    /// This one.
    One(MessageId),
}

impl Which {
    /// As a statement has it: whether all, and else which.
    pub(super) fn columns(self) -> (bool, uuid::Uuid) {
        match self {
            Self::All => (true, uuid::Uuid::nil()),
            Self::One(id) => (false, id.uuid()),
        }
    }
}

/// The outbox as operators handle it. Each call is about one bucket, in one transaction.
pub trait Messages {
    /// Hands messages to `visit`, the oldest first, until it says stop. Memory does not grow with their number.
    ///
    /// # Errors
    /// When the store fails.
    fn each_message(
        &self,
        filter: &MessageFilter,
        visit: impl FnMut(MessageRecord) -> ControlFlow<()> + Send,
    ) -> impl Future<Output = Result<()>> + Send;

    /// The messages whose id this is, or ends so.
    ///
    /// # Errors
    /// When the store fails.
    fn find_messages(&self, id: &IdRef) -> impl Future<Output = Result<Vec<MessageRecord>>> + Send;

    /// What a message carries, or would, were it claimed now.
    ///
    /// # Errors
    /// When the store fails.
    fn carried(&self, message: &MessageRecord) -> impl Future<Output = Result<Vec<CarriedRecord>>> + Send;

    /// Lets held messages go: they are sent as if they had been opened now, and checked once more before. One whose
    /// contact has a message that collects joins that. Returns how many were held.
    ///
    /// # Errors
    /// When the store fails, with nothing written.
    fn release(&self, bucket: Bucket, which: Which, now: Timestamp) -> impl Future<Output = Result<u64>> + Send;

    /// Cancels messages and what they carry: all that are held, or one that is not being sent and not finished. What is
    /// not yet due is forgotten, and so becomes due when it does. Returns how many were cancelled.
    ///
    /// # Errors
    /// When the store fails, with nothing written.
    fn cancel(&self, bucket: Bucket, which: Which, now: Timestamp) -> impl Future<Output = Result<u64>> + Send;

    /// Tries messages again now, and for as long as new ones: all that failed, or one that failed or waits to be tried
    /// again. Those whose contact is suppressed stay as they are. Returns how many there are to try.
    ///
    /// # Errors
    /// When the store fails, with nothing written.
    fn retry(&self, bucket: Bucket, which: Which, now: Timestamp) -> impl Future<Output = Result<u64>> + Send;

    /// The contact with this address.
    ///
    /// # Errors
    /// When the store fails.
    fn find_contact(&self, address: &Address) -> impl Future<Output = Result<Option<Contact>>> + Send;

    /// A contact takes mail again.
    ///
    /// # Errors
    /// When the store fails.
    fn unsuppress(&self, contact: ContactId) -> impl Future<Output = Result<()>> + Send;
}

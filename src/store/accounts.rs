//! What people do: owners, contacts and tokens are made, changed, listed and verified.

use std::future::Future;
use std::ops::ControlFlow;

use chrono_tz::Tz;

use super::Result;
use crate::change::{Changed, Refused};
use crate::clock::Timestamp;
use crate::policy::Lead;
use crate::token::{
    Address, Bucket, Contact, ContactId, IdRef, MessageId, Owner, OwnerId, SecretHash, Status, Token, TokenId, words,
};

/// A contact to be made or found by its address.
#[derive(Clone, Debug)]
pub struct NewContact {
    /// Where its mail goes.
    pub address: Address,
    /// Overrides the owner's zone. Without it, a contact that exists keeps its own.
    pub time_zone: Option<Tz>,
    /// Overrides the owner's locale. Without it, a contact that exists keeps its own.
    pub locale: Option<String>,
}

impl From<Address> for NewContact {
    fn from(address: Address) -> Self {
        Self { address, time_zone: None, locale: None }
    }
}

/// How an owner is named.
#[derive(Clone, Debug)]
pub enum OwnerRef {
    /// By its key.
    Key(String),
    /// By its id.
    Id(IdRef),
    /// By the address of one of its contacts.
    Address(Address),
}

/// What has become of a reminder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ReminderState {
    /// To be sent.
    Pending,
    /// A mail server took it.
    Sent,
    /// A tighter one speaks.
    Superseded,
    /// It was no longer true.
    Cancelled,
    /// Nobody could be told.
    Unreachable,
    /// It came too late to be of use.
    Stale,
    /// Its mail could not be delivered.
    Failed,
}

words!(ReminderState {
    Pending => "pending",
    Sent => "sent",
    Superseded => "superseded",
    Cancelled => "cancelled",
    Unreachable => "unreachable",
    Stale => "stale",
    Failed => "failed",
});

/// A row of the ledger, as `lapsed token show` prints it.
#[derive(Clone, Debug)]
pub struct ReminderRecord {
    /// Which of the token's deadlines.
    pub generation: i32,
    /// How long before it.
    pub lead: Lead,
    /// The deadline that it spoke of.
    pub deadline: Timestamp,
    /// What has become of it.
    pub state: ReminderState,
    /// Why it was not sent.
    pub reason: Option<String>,
    /// Whether it told the fallback what an owner could not be told.
    pub escalation: bool,
    /// To whom; `None` where the owner had no contact, or the contact is gone.
    pub address: Option<Address>,
    /// When it was written.
    pub created_at: Timestamp,
    /// When it was sent or given up.
    pub settled_at: Option<Timestamp>,
    /// The message that carried it.
    pub message: Option<MessageId>,
}

/// Owners, contacts and tokens.
pub trait Accounts {
    /// Adds an owner with its contacts and, where it has one, its primary token.
    ///
    /// # Errors
    /// [`Error::Exists`](super::Error::Exists) when the key is taken.
    fn add_owner(
        &self,
        owner: &Owner,
        contacts: &[NewContact],
        primary: Option<(&Token, &SecretHash)>,
        now: Timestamp,
    ) -> impl Future<Output = Result<()>> + Send;

    /// The owners that a reference fits; more than one when an address speaks for several, or a short id is ambiguous.
    ///
    /// # Errors
    /// When the store fails.
    fn find_owners(&self, by: &OwnerRef) -> impl Future<Output = Result<Vec<Owner>>> + Send;

    /// Who speaks for an owner.
    ///
    /// # Errors
    /// When the store fails.
    fn contacts_of(&self, owner: OwnerId) -> impl Future<Output = Result<Vec<Contact>>> + Send;

    /// Lets a contact speak for an owner. Doing it twice changes nothing.
    ///
    /// # Errors
    /// When the store fails.
    fn link_contact(
        &self,
        owner: OwnerId,
        contact: &NewContact,
        now: Timestamp,
    ) -> impl Future<Output = Result<ContactId>> + Send;

    /// The contact with this address, which is made where there is none.
    ///
    /// # Errors
    /// When the store fails.
    fn make_contact(&self, contact: &NewContact, now: Timestamp) -> impl Future<Output = Result<ContactId>> + Send;

    /// A contact speaks for an owner no longer. What is pending is cancelled when its message is claimed.
    ///
    /// # Errors
    /// When the store fails.
    fn unlink_contact(&self, owner: OwnerId, contact: ContactId) -> impl Future<Output = Result<()>> + Send;

    /// Makes this address, and no other, the fallback that escalations go to; `None`: nobody.
    ///
    /// # Errors
    /// When the store fails.
    fn set_fallback(
        &self,
        address: Option<&Address>,
        now: Timestamp,
    ) -> impl Future<Output = Result<Option<ContactId>>> + Send;

    /// Adds a token; one without a secret is only watched.
    ///
    /// # Errors
    /// [`Error::Exists`](super::Error::Exists) when the owner has such a primary or external id already,
    /// [`Error::Missing`](super::Error::Missing) when there is no such owner.
    fn add_token(&self, token: &Token, secret: Option<&SecretHash>) -> impl Future<Output = Result<()>> + Send {
        self.add_watched_token(token, secret, &[], token.created_at)
    }

    /// The same with contacts that are told of it besides those of its owner.
    ///
    /// # Errors
    /// As [`Accounts::add_token`], with nothing written.
    fn add_watched_token(
        &self,
        token: &Token,
        secret: Option<&SecretHash>,
        watchers: &[NewContact],
        now: Timestamp,
    ) -> impl Future<Output = Result<()>> + Send;

    /// From now on these contacts are told of a token besides those of its owner: of what is due now, too. Doing it twice
    /// changes nothing.
    ///
    /// # Errors
    /// [`Error::Missing`](super::Error::Missing), with nothing written.
    fn watch_token(
        &self,
        token: TokenId,
        watchers: &[NewContact],
        now: Timestamp,
    ) -> impl Future<Output = Result<()>> + Send;

    /// A contact is no longer told of a token, unless it speaks for the owner. What is pending is cancelled when its message
    /// is claimed. Returns whether it had been.
    ///
    /// # Errors
    /// When the store fails.
    fn unwatch_token(&self, token: TokenId, contact: ContactId) -> impl Future<Output = Result<bool>> + Send;

    /// Who is told of a token besides the contacts of its owner.
    ///
    /// # Errors
    /// When the store fails.
    fn watchers_of(&self, token: TokenId) -> impl Future<Output = Result<Vec<Contact>>> + Send;

    /// Gives an owner that came with an import its primary token, and these contacts.
    ///
    /// # Errors
    /// [`Error::Exists`](super::Error::Exists) when it has a primary token, with nothing written.
    fn add_primary(
        &self,
        primary: &Token,
        secret: &SecretHash,
        contacts: &[NewContact],
        now: Timestamp,
    ) -> impl Future<Output = Result<()>> + Send;

    /// The tokens whose id this is, or ends so.
    ///
    /// # Errors
    /// When the store fails.
    fn find_tokens(&self, id: &IdRef) -> impl Future<Output = Result<Vec<Token>>> + Send;

    /// Changes a token: locks it, lets `decide` say what it becomes, and writes that, all in one transaction.
    ///
    /// # Errors
    /// [`Error::Missing`](super::Error::Missing), or what `decide` refuses.
    fn change_token(
        &self,
        id: TokenId,
        decide: impl FnOnce(&Token) -> std::result::Result<Changed, Refused> + Send,
    ) -> impl Future<Output = Result<Changed>> + Send;

    /// Hands tokens and their owners' keys to `visit`, one by one, until it says stop. Memory does not grow with their
    /// number.
    ///
    /// # Errors
    /// When the store fails.
    fn each_token(
        &self,
        filter: &TokenFilter,
        order: TokenOrder,
        now: Timestamp,
        visit: impl FnMut(Token, String) -> ControlFlow<()> + Send,
    ) -> impl Future<Output = Result<()>> + Send;

    /// How many tokens there are. Counts them all: not for the hot path.
    ///
    /// # Errors
    /// When the store fails.
    fn token_counts(&self, now: Timestamp) -> impl Future<Output = Result<TokenCounts>> + Send;

    /// Hands owners to `visit`, one by one in the order of their keys, until it says stop. Memory does not grow with their
    /// number.
    ///
    /// # Errors
    /// When the store fails.
    fn each_owner(
        &self,
        now: Timestamp,
        visit: impl FnMut(OwnerSummary) -> ControlFlow<()> + Send,
    ) -> impl Future<Output = Result<()>> + Send;

    /// Keys of owners that resemble a key which no owner has, as far as the order of keys tells: in each bucket the one
    /// before it and the one after it. So many probes, however many owners there are.
    ///
    /// # Errors
    /// When the store fails.
    fn keys_near(&self, key: &str) -> impl Future<Output = Result<Vec<String>>> + Send;

    /// Changes what an owner is called.
    ///
    /// # Errors
    /// When the store fails.
    fn rename_owner(&self, owner: OwnerId, name: &str) -> impl Future<Output = Result<()>> + Send;

    /// Removes an owner, its tokens, and who speaks for it. The ledger keeps what was sent. Unless `with_active`, it is
    /// refused while tokens are active; the answer is how many are.
    ///
    /// # Errors
    /// When the store fails, with nothing removed.
    fn remove_owner(
        &self,
        owner: OwnerId,
        with_active: bool,
        now: Timestamp,
    ) -> impl Future<Output = Result<std::result::Result<(), u64>>> + Send;

    /// The token with this secret, whatever its status.
    ///
    /// # Errors
    /// When the store fails.
    fn token_by_secret(&self, bucket: Bucket, hash: &SecretHash) -> impl Future<Output = Result<Option<Token>>> + Send;

    /// Records that a token was used, unless `unless_since` or later was recorded already. One whose use `wakes` it is marked
    /// unplanned.
    ///
    /// # Errors
    /// When the store fails; the use stands all the same.
    fn record_use(
        &self,
        id: TokenId,
        now: Timestamp,
        unless_since: Timestamp,
        wakes: bool,
    ) -> impl Future<Output = Result<()>> + Send;

    /// All that the ledger has of a token, oldest deadline and widest lead first.
    ///
    /// # Errors
    /// When the store fails.
    fn history(&self, token: TokenId) -> impl Future<Output = Result<Vec<ReminderRecord>>> + Send;
}

/// An owner, and how many contacts and active tokens it has.
#[derive(Clone, Debug)]
pub struct OwnerSummary {
    /// The owner.
    pub owner: Owner,
    /// Contacts, suppressed ones too.
    pub contacts: u64,
    /// Tokens that are honoured, or would be if they had a secret.
    pub active_tokens: u64,
}

/// Which tokens to list.
#[derive(Clone, Debug, Default)]
pub struct TokenFilter {
    /// Only those of this owner.
    pub owner: Option<OwnerId>,
    /// Only those that are this now, whether or not the daemon has marked them yet.
    pub status: Option<Status>,
    /// Only those that were imported from here.
    pub source: Option<String>,
    /// Only active ones whose deadline lies before this instant.
    pub expiring_before: Option<Timestamp>,
}

/// In which order to list tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TokenOrder {
    /// Active ones first, by deadline; those that never expire after those that do.
    #[default]
    Expires,
    /// Oldest first.
    Created,
    /// Longest unused first, never used ones on top.
    Used,
    /// By the owner's key.
    Owner,
}

/// How many tokens there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TokenCounts {
    /// Active, and their deadline lies ahead.
    pub active: u64,
    /// Marked as active, but their deadline has passed: `expire` has not come to them yet.
    pub past_deadline: u64,
    /// Marked as expired.
    pub expired: u64,
    /// Revoked or replaced.
    pub revoked: u64,
}

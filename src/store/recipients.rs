//! Who is told of tokens, and what is true of these when a mail about them is written.
//!
//! Everything is found by primary key: an address may speak for thousands of owners, and only what was asked about is read.
//! When a contact was sent reminders is remembered before they are sent: a crash in between makes a contact
//! wait longer, and never mails it too soon.

use std::collections::{HashMap, HashSet};
use std::future::Future;

use chrono_tz::Tz;

use super::Result;
use crate::clock::Timestamp;
use crate::policies::Traits;
use crate::token::{ContactId, Owner, OwnerId, Token, TokenId};

/// A contact that takes mail, and what its waits depend on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Addressee {
    /// Overrides the owner's zone.
    pub time_zone: Option<Tz>,
    /// When it was last sent reminders, where that is remembered.
    pub mailed_at: Option<Timestamp>,
}

/// What is true of the tokens that a contact is to be told of, read at the moment of sending.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// The tokens that there still are, with their owners.
    pub tokens: HashMap<TokenId, (Token, Owner)>,
    /// The tokens that there are, but that cannot be read, or whose owner cannot.
    pub broken: HashSet<TokenId>,
    /// Those that the contact may hear of: it speaks for their owner, or watches them.
    pub heard: HashSet<TokenId>,
    /// Whether the contact is the fallback.
    pub is_fallback: bool,
}

/// Asking who is told of what, and what is true of it.
pub trait Recipients {
    /// Who speaks for these owners, whether or not they take mail.
    ///
    /// # Errors
    /// When the store fails.
    fn speakers(&self, owners: &[OwnerId]) -> impl Future<Output = Result<HashMap<OwnerId, Vec<ContactId>>>> + Send;

    /// Who is told of these tokens besides those who speak for their owners, whether or not they take mail.
    ///
    /// # Errors
    /// When the store fails.
    fn watchers(&self, tokens: &[TokenId]) -> impl Future<Output = Result<HashMap<TokenId, Vec<ContactId>>>> + Send;

    /// Those of these contacts that take mail.
    ///
    /// # Errors
    /// When the store fails.
    fn addressees(&self, contacts: &[ContactId]) -> impl Future<Output = Result<HashMap<ContactId, Addressee>>> + Send;

    /// The zones of these owners. One that cannot be read is left out.
    ///
    /// # Errors
    /// When the store fails.
    fn zones(&self, owners: &[OwnerId]) -> impl Future<Output = Result<HashMap<OwnerId, Tz>>> + Send;

    /// The contacts of these owners that take mail.
    ///
    /// # Errors
    /// When the store fails.
    fn reachable(&self, owners: &[OwnerId]) -> impl Future<Output = Result<HashMap<OwnerId, Vec<ContactId>>>> + Send
    where
        Self: Sync,
    {
        async move {
            let mut reachable = self.speakers(owners).await?;
            let mut contacts: Vec<ContactId> = reachable.values().flatten().copied().collect();
            contacts.sort_unstable();
            contacts.dedup();
            let taking = self.addressees(&contacts).await?;
            reachable.retain(|_, contacts| {
                contacts.retain(|contact| taking.contains_key(contact));
                !contacts.is_empty()
            });
            Ok(reachable)
        }
    }

    /// Remembers that these contacts, all of one bucket, are sent reminders now, but for those that were sent some after `since`:
    /// the answer says when.
    ///
    /// # Errors
    /// When the store fails.
    fn mailed_before(
        &self,
        contacts: &[ContactId],
        since: Timestamp,
        now: Timestamp,
    ) -> impl Future<Output = Result<HashMap<ContactId, Timestamp>>> + Send;

    /// Remembers that these contacts, all of one bucket, are sent reminders now.
    ///
    /// # Errors
    /// When the store fails.
    fn mailed(&self, contacts: &[ContactId], now: Timestamp) -> impl Future<Output = Result<()>> + Send;

    /// What policies match these tokens by.
    ///
    /// # Errors
    /// When the store fails.
    fn traits(&self, tokens: &[TokenId]) -> impl Future<Output = Result<HashMap<TokenId, Traits>>> + Send;

    /// What is true now of what messages are about to say: of each token that a contact is to be told of. A contact
    /// of which no token exists any more is not in the answer.
    ///
    /// # Errors
    /// When the store fails.
    fn facts(&self, asked: &[(ContactId, TokenId)]) -> impl Future<Output = Result<HashMap<ContactId, Facts>>> + Send;
}

/// What a message must know of a token `t` of an owner `o`, asked about for the contact `n.contact_id`, besides the columns of the
/// token; `bucket` and `key` are the parameters that say where the system owner is, whose contact is the fallback.
macro_rules! fact_columns {
    (bucket = $bucket:literal, key = $key:literal) => {
        concat!(
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
                 WHERE s.bucket = ",
            $bucket,
            " AND s.key = ",
            $key,
            " LIMIT 1 \
             ) AS fallback"
        )
    };
}
pub(super) use fact_columns;

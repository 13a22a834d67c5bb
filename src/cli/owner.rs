//! `lapsed owner`

use chrono_tz::Tz;
use clap::Args;

use super::{Outcome, output};
use crate::clock::Clock;
use crate::store::Store;
use crate::token::{Address, Bucket, Kind, Owner, OwnerId, Secret, Status, Token, TokenId, text};

/// `lapsed owner add`
#[derive(Debug, Args)]
pub struct Add {
    /// A login or slug: unique, and never changes
    #[arg(value_parser = text::key)]
    key: String,
    /// Where mails about the owner's tokens go; may be given several times
    #[arg(long = "email", value_name = "ADDR", required = true, value_parser = Address::parse)]
    emails: Vec<Address>,
    /// What the owner is called in mails [default: the key]
    #[arg(long, value_name = "TEXT", value_parser = text::name)]
    name: Option<String>,
    /// The zone in which the owner's days begin and end
    #[arg(long, value_name = "ZONE", default_value = "UTC", value_parser = text::time_zone)]
    time_zone: Tz,
    /// The language of mails
    #[arg(long, value_name = "TAG", default_value = "en", value_parser = text::locale)]
    locale: String,
}

impl Add {
    pub(super) async fn run<S: Store>(self, store: &S, clock: &impl Clock) -> Outcome {
        let now = clock.now();
        let bucket = Bucket::of(&self.key);
        let owner = Owner {
            id: OwnerId::new(bucket, now),
            name: self.name.unwrap_or_else(|| self.key.clone()),
            key: self.key,
            time_zone: self.time_zone,
            locale: self.locale,
        };
        let secret = Secret::generate(bucket);
        let primary = new_token(&owner, Kind::Primary, "primary token", &secret, now);
        let contacts: Vec<_> = self.emails.into_iter().map(Into::into).collect();
        store.add_owner(&owner, &contacts, Some((&primary, &secret.hash())), now).await?;
        output::new_token(&primary, &secret, &owner, now)?;
        Ok(())
    }
}

/// A token that is made now and never expires.
pub(super) fn new_token(
    owner: &Owner,
    kind: Kind,
    description: &str,
    secret: &Secret,
    now: crate::clock::Timestamp,
) -> Token {
    Token {
        id: TokenId::new(owner.id.bucket(), now),
        owner: owner.id,
        kind,
        description: description.to_owned(),
        scopes: Vec::new(),
        issued: true,
        external_id: None,
        hint: Some(secret.hint()),
        created_at: now,
        expires_at: None,
        deadline_set_at: now,
        generation: 0,
        unplanned: false,
        last_used_at: None,
        status: Status::Active,
        ended_at: None,
        replaced_by: None,
    }
}

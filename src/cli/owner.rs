//! `lapsed owner`

pub mod contact;

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use chrono_tz::Tz;
use clap::Args;

use super::listing::{Fields, FormatArg, Listing};
use super::{Outcome, lookup, output};
use crate::clock::{Clock, Timestamp};
use crate::store::accounts::{NewContact, OwnerRef, OwnerSummary, TokenFilter, TokenOrder};
use crate::store::{Error, Store};
use crate::token::{Address, Bucket, Kind, Owner, OwnerId, Secret, Status, Token, text};

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
        let contacts: Vec<NewContact> = self.emails.into_iter().map(Into::into).collect();
        let secret = Secret::generate(bucket);
        let primary = first_token(owner.id, &secret, now);
        match store.add_owner(&owner, &contacts, Some((&primary, &secret.hash())), now).await {
            Err(error @ Error::Exists { .. }) => {
                let found = store.find_owners(&OwnerRef::Key(owner.key)).await?;
                complete(store, found.first().ok_or(error)?, &contacts, now).await?;
            }
            added => {
                added?;
                output::new_token(&primary, &secret, &owner, now)?;
            }
        }
        Ok(())
    }
}

/// Gives an owner that an import made what it lacks: its primary token, and these contacts.
async fn complete<S: Store>(store: &S, owner: &Owner, contacts: &[NewContact], now: Timestamp) -> anyhow::Result<()> {
    let secret = Secret::generate(owner.id.bucket());
    let primary = first_token(owner.id, &secret, now);
    store.add_primary(&primary, &secret.hash(), contacts, now).await.map_err(|error| match error {
        Error::Exists { .. } => Error::Exists { what: "owner", name: owner.key.clone() },
        error => error,
    })?;
    output::new_token(&primary, &secret, owner, now)?;
    output::say(&format!("{} was imported before; now it has a primary token.", owner.key));
    Ok(())
}

/// An owner's primary token, which never expires.
pub(super) fn first_token(owner: OwnerId, secret: &Secret, now: Timestamp) -> Token {
    Token::new(owner, Kind::Primary, "primary token", now).with_secret(secret)
}

/// Whether an owner has a primary token.
pub(super) async fn has_primary<S: Store>(store: &S, owner: OwnerId, now: Timestamp) -> anyhow::Result<bool> {
    let filter = TokenFilter { owner: Some(owner), ..TokenFilter::default() };
    let mut found = false;
    store
        .each_token(&filter, TokenOrder::Created, now, |token, _| {
            found = token.kind == Kind::Primary && token.replaced_by.is_none();
            if found { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
        .await?;
    Ok(found)
}

/// `lapsed owner list`
#[derive(Debug, Args)]
pub struct List {
    #[command(flatten)]
    format: FormatArg,
}

impl List {
    pub(super) async fn run<S: Store>(self, store: &S, clock: &impl Clock) -> Outcome {
        let mut listing =
            Listing::new(self.format, &["ID", "KEY", "NAME", "TIME ZONE", "CONTACTS", "ACTIVE TOKENS"], &FIELDS)?;
        let mut written = Ok(());
        store
            .each_owner(clock.now(), |summary| {
                written = listing.row(|| fields(&summary), || row(&summary));
                if written.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
            })
            .await?;
        written?;
        listing.end("There are no owners. `lapsed owner add` makes one, `lapsed token import` many.")?;
        Ok(())
    }
}

/// The names of [`fields`].
const FIELDS: [&str; 7] = ["id", "key", "name", "time_zone", "locale", "contacts", "active_tokens"];

fn fields(summary: &OwnerSummary) -> Fields {
    let owner = &summary.owner;
    vec![
        ("id", owner.id.to_string().into()),
        ("key", owner.key.clone().into()),
        ("name", owner.name.clone().into()),
        ("time_zone", owner.time_zone.name().into()),
        ("locale", owner.locale.clone().into()),
        ("contacts", summary.contacts.into()),
        ("active_tokens", summary.active_tokens.into()),
    ]
}

fn row(summary: &OwnerSummary) -> Vec<String> {
    let owner = &summary.owner;
    let (contacts, tokens) = (summary.contacts.to_string(), summary.active_tokens.to_string());
    vec![owner.id.short(), owner.key.clone(), owner.name.clone(), owner.time_zone.name().into(), contacts, tokens]
}

/// `lapsed owner show`
#[derive(Debug, Args)]
pub struct Show {
    /// Its key or id, or the address of a contact
    owner: String,
}

impl Show {
    pub(super) async fn run<S: Store>(self, store: &S, clock: &impl Clock) -> Outcome {
        let owner = lookup::owner(store, &self.owner).await?;
        let contacts = store.contacts_of(owner.id).await?;
        let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
        let filter = TokenFilter { owner: Some(owner.id), ..TokenFilter::default() };
        let now = clock.now();
        let mut next = None;
        store
            .each_token(&filter, TokenOrder::Expires, now, |token, _| {
                let status = match (token.status, token.validity(now)) {
                    (Status::Active, Err(why)) => why.as_str(),
                    (status, _) => status.as_str(),
                };
                if next.is_none() && status == Status::Active.as_str() {
                    next = token.expires_at;
                }
                *counts.entry(status).or_default() += 1;
                ControlFlow::Continue(())
            })
            .await?;
        let tokens: Vec<String> = counts.iter().map(|(status, count)| format!("{count} {status}")).collect();
        let mut rows = vec![
            ("owner", owner.id.to_string()),
            ("key", owner.key.clone()),
            ("name", owner.name.clone()),
            ("time zone", owner.time_zone.name().to_owned()),
            ("locale", owner.locale.clone()),
            ("tokens", if tokens.is_empty() { "none".into() } else { tokens.join(", ") }),
        ];
        if next.is_some() {
            rows.push(("next deadline", output::deadline(next, now, owner.time_zone)));
        }
        if contacts.is_empty() {
            rows.push(("contact", "none: nobody can be told".into()));
        }
        rows.extend(contacts.iter().map(|contact| ("contact", contact::described(contact, owner.time_zone))));
        output::print(&output::facts(&rows))?;
        Ok(())
    }
}

/// `lapsed owner rename`
#[derive(Debug, Args)]
pub struct Rename {
    /// Its key or id, or the address of a contact
    owner: String,
    /// What the owner is called in mails from now on
    #[arg(value_parser = text::name)]
    name: String,
}

impl Rename {
    pub(super) async fn run<S: Store>(self, store: &S) -> Outcome {
        let owner = lookup::owner(store, &self.owner).await?;
        store.rename_owner(owner.id, &self.name).await?;
        output::print(&output::facts(&[("key", owner.key), ("was", owner.name), ("name", self.name)]))?;
        Ok(())
    }
}

/// `lapsed owner remove`
#[derive(Debug, Args)]
pub struct Remove {
    /// Its key or id, or the address of a contact
    owner: String,
    /// Remove its active tokens with it: their secrets are refused from now on, and nobody hears of it
    #[arg(long)]
    revoke_tokens: bool,
}

impl Remove {
    pub(super) async fn run<S: Store>(self, store: &S, clock: &impl Clock) -> Outcome {
        let owner = lookup::owner(store, &self.owner).await?;
        match store.remove_owner(owner.id, self.revoke_tokens, clock.now()).await? {
            Ok(()) => output::print(&output::facts(&[("removed", owner.key)]))?,
            Err(active) => {
                let problem =
                    format!("{} has active tokens ({active}); to end them with it, add --revoke-tokens", owner.key);
                return Err(anyhow::anyhow!(problem).into());
            }
        }
        Ok(())
    }
}

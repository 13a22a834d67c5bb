//! `lapsed token`

use std::ops::ControlFlow;

use chrono::TimeDelta;
use clap::{Args, ValueEnum};
use serde_json::Value;

use super::listing::{Fields, FormatArg, Listing};
use super::{Failure, Outcome, listing, lookup, output, owner, run};
use crate::change;
use crate::clock::{Clock, Timestamp};
use crate::config::{Settings, parse_duration};
use crate::expires::Expires;
use crate::mail::when;
use crate::policies::{Traits, group_of};
use crate::policy::{Deadline, Lead};
use crate::store::Store;
use crate::store::accounts::{NewContact, ReminderRecord, TokenFilter, TokenOrder};
use crate::token::{Address, Kind, Owner, Secret, Status, Token, text};

/// `lapsed token create`
#[derive(Debug, Args)]
pub struct Create {
    /// Whose token it is: an owner's key or id, or the address of a contact
    #[arg(long, value_name = "OWNER")]
    owner: String,
    /// What it is for, in one line
    #[arg(long, value_name = "TEXT", value_parser = text::description)]
    description: String,
    /// Its deadline: 90d, 2027-01-31 (the end of that day for the owner), 2027-01-31T09:00:00Z, or never
    #[arg(long, value_name = "WHEN", default_value = "never")]
    expires: Expires,
    /// What it may be used for; may be given several times
    #[arg(long = "scope", value_name = "SCOPE", value_parser = text::scope)]
    scopes: Vec<String>,
    /// An address that is told of this token, besides the contacts of its owner; may be given several times
    #[arg(long = "watch", value_name = "ADDR", value_parser = Address::parse)]
    watchers: Vec<Address>,
}

impl Create {
    pub(super) async fn run<S: Store>(self, store: &S, clock: &impl Clock) -> Outcome {
        let now = clock.now();
        let owner = lookup::owner(store, &self.owner).await?;
        let secret = Secret::generate(owner.id.bucket());
        // An owner that came with an import has no primary token; the first one that is issued to it here is that.
        let kind = if owner::has_primary(store, owner.id, now).await? { Kind::Additional } else { Kind::Primary };
        let mut token = Token::new(owner.id, kind, &self.description, now).with_secret(&secret);
        token.scopes = self.scopes;
        token.expires_at = resolve(&self.expires, now, &owner)?;
        change::mark_unplanned(&mut token, now);
        let watchers: Vec<NewContact> = self.watchers.into_iter().map(NewContact::from).collect();
        store.add_watched_token(&token, Some(&secret.hash()), &watchers, now).await?;
        output::new_token(&token, &secret, &owner, now)?;
        if kind == Kind::Primary {
            output::say(&format!("It is the first token issued to {}, and so its primary one.", owner.key));
        }
        Ok(())
    }
}

/// `lapsed token edit`
#[derive(Debug, Args)]
pub struct Edit {
    /// The token's id, or its last digits as lists print them
    id: String,
    /// What it is for, in one line
    #[arg(long, value_name = "TEXT", value_parser = text::description)]
    description: Option<String>,
    /// Its new deadline: 90d, 2027-01-31, 2027-01-31T09:00:00Z, or never
    #[arg(long, value_name = "WHEN")]
    expires: Option<Expires>,
    /// Do not tell the owner that the deadline was changed: they know
    #[arg(long, requires = "expires")]
    quiet: bool,
    /// An address that is told of this token, besides the contacts of its owner; may be given several times
    #[arg(long = "watch", value_name = "ADDR", value_parser = Address::parse)]
    watchers: Vec<Address>,
    /// An address that is no longer told of this token, unless it is a contact of its owner; may be given several times
    #[arg(long = "unwatch", value_name = "ADDR", value_parser = Address::parse)]
    strangers: Vec<Address>,
}

impl Edit {
    pub(super) async fn run<S: Store>(self, store: &S, clock: &impl Clock) -> Outcome {
        let edits = self.description.is_some() || self.expires.is_some();
        if !edits && self.watchers.is_empty() && self.strangers.is_empty() {
            let problem = "there is nothing to change: give --description, --expires, --watch or --unwatch";
            return Err(Failure::Usage(problem.into()));
        }
        let now = clock.now();
        let token = lookup::token(store, &self.id).await?;
        let owner = lookup::owner_of(store, &token).await?;
        let expires_at = self.expires.map(|expires| resolve(&expires, now, &owner)).transpose()?;
        let edit = change::Edit { description: self.description, expires_at, by_another: !self.quiet };
        let changed = store.change_token(token.id, |token| change::edit(token, &edit, now)).await?;
        if !self.watchers.is_empty() {
            let watchers: Vec<NewContact> = self.watchers.into_iter().map(NewContact::from).collect();
            store.watch_token(token.id, &watchers, now).await?;
        }
        for address in self.strangers {
            let removed = match store.find_contact(&address).await? {
                Some(contact) => store.unwatch_token(token.id, contact.id).await?,
                None => false,
            };
            if !removed {
                output::say(&format!("{address} does not watch this token."));
            }
        }
        let mut rows = output::token(&changed.token, &owner, now);
        rows.extend(watchers(store, &token).await?);
        output::print(&output::facts(&rows))?;
        Ok(())
    }
}

/// Who is told of a token besides the contacts of its owner, as a fact.
async fn watchers<S: Store>(store: &S, token: &Token) -> Result<Option<(&'static str, String)>, Failure> {
    let watchers = store.watchers_of(token.id).await?;
    let words: Vec<String> = watchers
        .iter()
        .map(|contact| match &contact.suppressed {
            Some(_) => format!("{} (suppressed)", contact.address),
            None => contact.address.to_string(),
        })
        .collect();
    Ok((!words.is_empty()).then(|| ("watched by", words.join(", "))))
}

/// `lapsed token rotate`
#[derive(Debug, Args)]
pub struct Rotate {
    /// The token's id, or its last digits as lists print them
    id: String,
    /// How long the old token stays valid, such as 24h; never past its own deadline [default: it ends at once]
    #[arg(long, value_name = "SPAN", value_parser = parse_duration)]
    grace: Option<TimeDelta>,
    /// The new token's deadline: 90d, 2027-01-31, 2027-01-31T09:00:00Z, or never [default: the same lifetime again]
    #[arg(long, value_name = "WHEN")]
    expires: Option<Expires>,
}

impl Rotate {
    pub(super) async fn run<S: Store>(self, store: &S, clock: &impl Clock) -> Outcome {
        let now = clock.now();
        let token = lookup::token(store, &self.id).await?;
        let owner = lookup::owner_of(store, &token).await?;
        let expires_at = self.expires.map(|expires| resolve(&expires, now, &owner)).transpose()?;
        let grace = self.grace.unwrap_or_default();
        let changed = store.change_token(token.id, |token| change::rotate(token, grace, expires_at, now)).await?;
        let old = &changed.token;
        if let Some((successor, secret)) = &changed.successor {
            output::new_token(successor, secret, &owner, now)?;
        }
        output::say(&match old.validity(now) {
            Ok(()) => {
                format!(
                    "The old token {} stays valid until {}.",
                    old.id.short(),
                    output::deadline(old.expires_at, now, owner.time_zone)
                )
            }
            Err(_) => format!("The old token {} is no longer valid.", old.id.short()),
        });
        Ok(())
    }
}

/// `lapsed token revoke`
#[derive(Debug, Args)]
pub struct Revoke {
    /// The token's id, or its last digits as lists print them
    id: String,
}

impl Revoke {
    pub(super) async fn run<S: Store>(self, store: &S, clock: &impl Clock) -> Outcome {
        let now = clock.now();
        let token = lookup::token(store, &self.id).await?;
        let owner = lookup::owner_of(store, &token).await?;
        let changed = store.change_token(token.id, |token| change::revoke(token, now)).await?;
        output::print(&output::facts(&output::token(&changed.token, &owner, now)))?;
        if !changed.token.issued {
            output::say(
                "It was issued elsewhere, and is not watched any more. Revoke it there, too, or the next import makes it active \
                 again.",
            );
        }
        Ok(())
    }
}

/// In which order to list tokens.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum Order {
    /// Active ones first, by deadline; those that never expire after those that do
    #[default]
    Expires,
    /// Oldest first
    Created,
    /// Longest unused first, never used ones on top
    Used,
    /// By the owner's key
    Owner,
}

impl From<Order> for TokenOrder {
    fn from(order: Order) -> Self {
        match order {
            Order::Expires => Self::Expires,
            Order::Created => Self::Created,
            Order::Used => Self::Used,
            Order::Owner => Self::Owner,
        }
    }
}

/// `lapsed token list`
#[derive(Debug, Args)]
pub struct List {
    /// Only the tokens of this owner: its key or id, or the address of a contact
    #[arg(long, value_name = "OWNER")]
    owner: Option<String>,
    /// Only those that are active, expired or revoked now
    #[arg(long, value_name = "STATUS", value_parser = status)]
    status: Option<Status>,
    /// Only those that were imported from this source
    #[arg(long, value_name = "NAME")]
    source: Option<String>,
    /// Only active ones that expire within this time, such as 30d
    #[arg(long, value_name = "SPAN", value_parser = parse_duration)]
    expiring_within: Option<TimeDelta>,
    /// In which order
    #[arg(long, value_enum, default_value_t)]
    sort: Order,
    #[command(flatten)]
    format: FormatArg,
}

fn status(text: &str) -> Result<Status, String> {
    text.parse().map_err(|()| "a status is active, expired or revoked".to_owned())
}

impl List {
    pub(super) async fn run<S: Store>(self, store: &S, clock: &impl Clock) -> Outcome {
        let now = clock.now();
        let owner = match &self.owner {
            Some(text) => Some(lookup::owner(store, text).await?.id),
            None => None,
        };
        let within = self.expiring_within.map(|span| now.checked_add_signed(span).unwrap_or(Timestamp::MAX_UTC));
        let filter = TokenFilter { owner, status: self.status, source: self.source.clone(), expiring_before: within };
        let mut listing =
            Listing::new(self.format, &["ID", "OWNER", "KIND", "DESCRIPTION", "STATUS", "EXPIRES (UTC)", ""], &FIELDS)?;
        let mut written = Ok(());
        store
            .each_token(&filter, self.sort.into(), now, |token, key| {
                written = listing.row(|| fields(&token, &key, now), || row(&token, &key, now));
                if written.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
            })
            .await?;
        written?;
        let filtered = self.owner.is_some() || self.status.is_some() || self.source.is_some() || within.is_some();
        listing.end(match filtered {
            true => "No token fits.",
            false => "There are no tokens. `lapsed owner add` makes an owner and its first one.",
        })?;
        Ok(())
    }
}

/// What the token is now, whether or not the daemon has marked it yet.
fn status_now(token: &Token, now: Timestamp) -> &'static str {
    match (token.status, token.validity(now)) {
        (Status::Active, Err(why)) => why.as_str(),
        (status, _) => status.as_str(),
    }
}

/// The names of [`fields`].
const FIELDS: [&str; 13] = [
    "id",
    "owner",
    "kind",
    "description",
    "scopes",
    "status",
    "expires_at",
    "created_at",
    "last_used_at",
    "ended_at",
    "replaced_by",
    "source",
    "external_id",
];

fn fields(token: &Token, owner_key: &str, now: Timestamp) -> Fields {
    let text = |text: Option<String>| text.map_or(Value::Null, Value::String);
    vec![
        ("id", token.id.to_string().into()),
        ("owner", owner_key.into()),
        ("kind", token.kind.as_str().into()),
        ("description", token.description.clone().into()),
        ("scopes", token.scopes.clone().into()),
        ("status", status_now(token, now).into()),
        ("expires_at", listing::instant(token.expires_at)),
        ("created_at", listing::instant(Some(token.created_at))),
        ("last_used_at", listing::instant(token.last_used_at)),
        ("ended_at", listing::instant(token.ended_at)),
        ("replaced_by", text(token.replaced_by.map(|id| id.to_string()))),
        ("source", text(token.source.clone())),
        ("external_id", text(token.external_id.clone())),
    ]
}

fn row(token: &Token, owner_key: &str, now: Timestamp) -> Vec<String> {
    let (at, phrase) = match token.expires_at {
        Some(at) => (at.format("%Y-%m-%d %H:%M:%S").to_string(), when::day_phrase(at, now, chrono_tz::UTC).to_string()),
        None => ("never".into(), String::new()),
    };
    let phrase = if token.status == Status::Revoked { String::new() } else { phrase };
    let (kind, status) = (token.kind.to_string(), status_now(token, now).to_owned());
    vec![token.id.short(), owner_key.to_owned(), kind, token.description.clone(), status, at, phrase]
}

/// `lapsed token show`
#[derive(Debug, Args)]
pub struct Show {
    /// The token's id, or its last digits as lists print them
    id: String,
}

impl Show {
    pub(super) async fn run<S: Store>(self, store: &S, clock: &impl Clock, settings: &Settings) -> Outcome {
        let now = clock.now();
        let token = lookup::token(store, &self.id).await?;
        let owner = lookup::owner_of(store, &token).await?;
        let history = store.history(token.id).await?;
        let mut rows = output::token(&token, &owner, now);
        rows.extend(watchers(store, &token).await?);
        rows.push(("reminders", policy(settings, &token, &owner)));
        let mut text = output::facts(&rows);
        text.push('\n');
        if history.is_empty() && token.expires_at.is_some_and(|deadline| deadline < now - settings.retention.reminders)
        {
            text.push_str("No reminder is left: retention.reminders has passed since the deadline.\n");
        } else if history.is_empty() {
            text.push_str("No reminder has been due yet.\n");
        } else {
            let rows = history.iter().map(|reminder| history_row(reminder, &token, &owner)).collect();
            text.push_str(&output::table(&["REMINDER", "DUE", "STATE", "WHEN", "TO", "WHY"], rows));
        }
        output::print(&text)?;
        Ok(())
    }
}

/// Which policy the token follows, and what that asks for.
fn policy(settings: &Settings, token: &Token, owner: &Owner) -> String {
    // No contact is looked up for this: who is told stands in the configuration.
    let groups = run::groups(settings, |_| None);
    let all = run::policy(settings);
    let found = group_of(&groups, &Traits::of(token, &owner.key));
    let leads = found.map_or(&all, |(_, group)| &group.policy).leads().iter();
    let deadline = Deadline::of(token);
    let (owed, long): (Vec<&Lead>, Vec<&Lead>) = leads.partition(|lead| deadline.is_some_and(|at| at.owes(**lead)));
    let words = |leads: &[&Lead]| leads.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let mut text = match (deadline, owed.is_empty()) {
        (None, _) => "none, as it never expires".to_owned(),
        (Some(_), true) => "none before the deadline".to_owned(),
        (Some(_), false) => words(&owed),
    };
    if deadline.is_some() && !long.is_empty() {
        text += &format!(" (not {}: longer than 80 % of its lifetime)", words(&long));
    }
    let Some((at, group)) = found else { return text };
    text += &format!(", by reminders.policy[{}] ({})", at + 1, group.matches);
    let contacts = settings.reminders.policies.get(at).map_or(&[][..], |policy| &policy.contacts);
    let contacts: Vec<&str> = contacts.iter().map(Address::as_str).collect();
    if !contacts.is_empty() {
        text += &format!(", also to {}", contacts.join(", "));
    }
    text
}

fn history_row(reminder: &ReminderRecord, token: &Token, owner: &Owner) -> Vec<String> {
    let local = |at: Timestamp| at.with_timezone(&owner.time_zone).format("%Y-%m-%d %H:%M:%S %Z").to_string();
    let mut why = reminder.reason.clone().unwrap_or_default();
    if reminder.escalation {
        why = format!("to the fallback, because {why}");
    }
    if reminder.generation != token.generation {
        let earlier = format!("for the earlier deadline {}", local(reminder.deadline));
        why = if why.is_empty() { earlier } else { format!("{why}; {earlier}") };
    }
    vec![
        reminder.lead.to_string(),
        local(if reminder.lead >= Lead::CHANGED {
            reminder.created_at
        } else {
            reminder.lead.due_at(reminder.deadline)
        }),
        reminder.state.to_string(),
        reminder.settled_at.map(local).unwrap_or_default(),
        reminder.address.as_ref().map_or("nobody", Address::as_str).to_owned(),
        why,
    ]
}

fn resolve(expires: &Expires, now: Timestamp, owner: &Owner) -> Result<Option<Timestamp>, Failure> {
    expires.resolve(now, owner.time_zone).map_err(|problem| Failure::Usage(format!("--expires: {problem}")))
}

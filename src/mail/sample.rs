//! Made-up letters: what `lapsed mail preview` and `lapsed mail test` show, and what templates are tried on.

use chrono::TimeDelta;
use minijinja::value::Value;
use uuid::Uuid;

use super::letter::{Alert, Change, Content, Item, Kind, Letter, Overtaken};
use super::manage_url::ManageUrl;
use super::templates::Language;
use super::view;
use crate::clock::Timestamp;
use crate::correction::Overtaken as Why;
use crate::policy::{Lead, Reason};
use crate::token::{self, Address, Contact, ContactId, MessageId, Owner, OwnerId, Status, Token, TokenId};

/// A made-up contact, without zone and locale of its own.
pub fn contact(address: Address) -> Contact {
    let id = ContactId::from(Uuid::from_u128(0xc0));
    Contact { id, address, time_zone: None, locale: None, suppressed: None }
}

/// A letter of this kind to a contact.
pub fn letter(kind: Kind, to: Contact, now: Timestamp) -> Letter {
    Letter { message: MessageId::new(to.id.bucket(), now), to, content: content(kind, now) }
}

/// What a letter of this kind says.
pub fn content(kind: Kind, now: Timestamp) -> Content {
    let soon = || vec![deploy_key(now, TimeDelta::days(7)), mirror(now, TimeDelta::days(8))];
    match kind {
        Kind::Reminder => Content::Reminders(soon()),
        Kind::Test => Content::Test(soon()),
        Kind::Expired => Content::Reminders(vec![deploy_key(now, -TimeDelta::minutes(5))]),
        Kind::Changed => {
            let change = Change { before: Some(now + TimeDelta::days(90)) };
            Content::Reminders(vec![Item { change: Some(change), ..deploy_key(now, TimeDelta::days(14)) }])
        }
        Kind::Correction => Content::Reminders(corrected(now)),
        Kind::Escalation => Content::Reminders(vec![
            Item { escalation: Some(Reason::NoContact), ..deploy_key(now, TimeDelta::days(1)) },
            Item { escalation: Some(Reason::Undeliverable), ..mirror(now, TimeDelta::days(1)) },
        ]),
        Kind::Alert => Content::Alert(Alert::Held {
            messages: 12_345,
            since: now - TimeDelta::minutes(2),
            next_deadline: Some(now + TimeDelta::days(3)),
            urgent: false,
        }),
    }
}

/// A token that was replaced in time, and one that was renewed.
fn corrected(now: Timestamp) -> Vec<Item> {
    let overtaken = |days, why| Some(Overtaken { told: now + TimeDelta::days(days), why });
    let key = deploy_key(now, TimeDelta::days(7));
    let replaced_by = Some(TokenId::new(key.token.id.bucket(), now - TimeDelta::hours(1)));
    let token = Token { status: Status::Revoked, replaced_by, ..key.token };
    vec![
        Item { token, overtaken: overtaken(7, Why::Replaced), ..key },
        Item { overtaken: overtaken(8, Why::Moved), ..mirror(now, TimeDelta::days(372)) },
    ]
}

/// A token that was issued here and is in use.
fn deploy_key(now: Timestamp, expires_in: TimeDelta) -> Item {
    let owner = owner();
    let token = Token {
        id: TokenId::from(Uuid::from_u128(0x0193_7b1c_52aa_7000_8000_0000_0000_a1e5)),
        issued: true,
        hint: Some("x7Qa".to_owned()),
        scopes: vec!["repo:read".to_owned(), "deploy".to_owned()],
        created_at: now - TimeDelta::days(83),
        last_used_at: Some(now - TimeDelta::hours(3)),
        expires_at: Some(now + expires_in),
        ..Token::new(owner.id, token::Kind::Additional, "deploy key (CI)", now)
    };
    Item { token, owner, lead: Lead::new(TimeDelta::days(7)), escalation: None, change: None, overtaken: None }
}

/// A token that is only watched, and that nobody has used for long.
fn mirror(now: Timestamp, expires_in: TimeDelta) -> Item {
    let owner = owner();
    let token = Token {
        id: TokenId::from(Uuid::from_u128(0x0193_7b1c_52aa_7000_8000_0000_0000_b2e5)),
        external_id: Some("gitlab-42".to_owned()),
        source: Some("gitlab".to_owned()),
        created_at: now - TimeDelta::days(340),
        last_used_at: Some(now - TimeDelta::days(125)),
        expires_at: Some(now + expires_in),
        ..Token::new(owner.id, token::Kind::Additional, "mirror, nightly", now)
    };
    Item { token, owner, lead: Lead::new(TimeDelta::days(7)), escalation: None, change: None, overtaken: None }
}

fn owner() -> Owner {
    Owner {
        id: OwnerId::from(Uuid::from_u128(0x0193_7b1c_52aa_7000_8000_0000_0000_00e5)),
        key: "platform-team".to_owned(),
        name: "Platform team".to_owned(),
        time_zone: chrono_tz::Europe::Berlin,
        locale: "en".to_owned(),
    }
}

/// What templates know of many letters of each kind, so that each of their branches is taken by one of them.
///
/// # Errors
/// When the language cannot put one of their tokens into words.
pub(super) fn known(language: &Language) -> Result<Vec<(Kind, Value)>, minijinja::Error> {
    let now = Timestamp::from_timestamp(1_800_000_000, 0).unwrap_or_default();
    let link = ManageUrl::parse("https://example.org/{token_id}").ok();
    let mut known = Vec::new();
    let Ok(address) = Address::parse("owner@example.org") else { return Ok(known) };
    let to = contact(address);
    let mut add = |kind, items: &[Item], link: Option<&ManageUrl>| -> Result<(), minijinja::Error> {
        let entries = view::entries(items, &to, now);
        known.push((kind, view::reminders(&entries, link, now, &|token| language.words(token))?.known));
        Ok(())
    };
    for kind in Kind::ALL {
        let (Content::Reminders(items) | Content::Test(items)) = content(kind, now) else { continue };
        add(kind, &items, link.as_ref())?;
        add(kind, &items.iter().take(1).cloned().collect::<Vec<_>>(), None)?;
        if kind == Kind::Reminder {
            add(kind, &items.iter().cycle().take(view::LISTED + 1).cloned().collect::<Vec<_>>(), None)?;
        }
        let moved = |days: i64| {
            let ahead = if kind == Kind::Expired { -1 } else { 1 };
            let expires_at = Some(now + TimeDelta::days(ahead * days) + TimeDelta::seconds(ahead * 90));
            items.first().map(|item| Item { token: Token { expires_at, ..item.token.clone() }, ..item.clone() })
        };
        for days in [0, 1] {
            add(kind, &moved(days).into_iter().collect::<Vec<_>>(), link.as_ref())?;
        }
        add(kind, &[2, 400].into_iter().filter_map(moved).collect::<Vec<_>>(), link.as_ref())?;
        let reasons =
            [Reason::NoContact, Reason::Suppressed, Reason::Undeliverable, Reason::Unreadable, Reason::ByHand];
        let mut odd: Vec<Item> = items.clone();
        odd.extend(reasons.map(|reason| Item { escalation: Some(reason), ..deploy_key(now, TimeDelta::days(3)) }));
        add(kind, &odd, None)?;
        let bare = |item: &Item| {
            let replaced_by = Some(item.token.id);
            let scopes = vec!["scope".to_owned(); 30];
            let token = Token { last_used_at: None, hint: None, scopes, replaced_by, ..item.token.clone() };
            Item { token, change: item.change.as_ref().map(|_| Change { before: None }), ..item.clone() }
        };
        let bare: Vec<Item> = items.iter().map(bare).collect();
        add(kind, &bare, None)?;
        let mut and_corrected = items.clone();
        and_corrected.extend(corrected(now));
        for (item, why) in corrected(now).into_iter().zip([Why::Revoked, Why::Unlimited]) {
            let overtaken = item.overtaken.map(|overtaken| Overtaken { why, ..overtaken });
            let expires_at = item.token.expires_at.filter(|_| why != Why::Unlimited);
            and_corrected.push(Item { token: Token { expires_at, ..item.token }, overtaken, ..item });
        }
        add(kind, &and_corrected, link.as_ref())?;
        if kind == Kind::Correction {
            for item in &and_corrected {
                add(kind, std::slice::from_ref(item), link.as_ref())?;
            }
        }
    }
    let held = |urgent, next_deadline| Alert::Held { messages: 2, since: now, next_deadline, urgent };
    let soon = Some(now + TimeDelta::hours(2));
    for alert in [held(false, None), held(true, soon), Alert::Expiry { tokens: 1 }, Alert::Expiry { tokens: 2 }] {
        known.push((Kind::Alert, view::alert(alert, &to, now)));
    }
    Ok(known)
}

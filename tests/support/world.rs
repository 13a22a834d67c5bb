//! A small world for a story: a store, a clock that the story moves, and short words for what happens in it.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, TimeZone, Utc};
use lapsed::change::{self, Edit};
use lapsed::clock::{Clock, ManualClock, Timestamp};
use lapsed::config::Limit;
use lapsed::digest::Digest;
use lapsed::jobs::deliver::{Delivered, Deliverer, Terms};
use lapsed::jobs::guard::Guard;
use lapsed::jobs::{Rules, expire, remind};
use lapsed::mail::compose::Composer;
use lapsed::mail::transport::{Memory, Transport};
use lapsed::policy::{Lead, Policy};
use lapsed::store::accounts::{NewContact, ReminderRecord, ReminderState, TokenFilter, TokenOrder};
use lapsed::store::jobs::Lease;
use lapsed::store::outbox::{ClaimedMessage, Delivery, Record, Settled};
use lapsed::store::planning::Written;
use lapsed::store::{Accounts, Due, Jobs, Store};
use lapsed::token::{Address, Bucket, ContactId, Kind, Owner, OwnerId, Secret, Token, TokenId};
use uuid::Uuid;

use super::backend::Backend;

/// A guard that lets everything happen.
pub fn unguarded() -> Guard {
    Guard::new(Limit::None, Limit::None)
}

pub fn days(n: i64) -> TimeDelta {
    TimeDelta::days(n)
}

pub fn lead(n: i64) -> Lead {
    Lead::new(days(n))
}

/// When every story begins.
pub fn dawn() -> Timestamp {
    Utc.with_ymd_and_hms(2027, 1, 1, 9, 0, 0).single().expect("an instant")
}

pub struct World<B: Backend> {
    pub backend: B,
    pub store: B::Store,
    pub clock: Arc<ManualClock>,
    pub rules: Rules,
    pub process: Uuid,
}

impl<B: Backend> World<B> {
    pub async fn new() -> Self {
        Self::on(B::make().await).await
    }

    /// A world on a store that is there already, or about to be made.
    pub async fn on(backend: B) -> Self {
        let store = backend.open().await;
        let policy = Policy::new([lead(30), lead(7), lead(1)], true, days(7));
        let rules = Rules {
            policy,
            fallback: None,
            digest: Digest::holding(TimeDelta::zero()),
            groups: Arc::from([]),
            skip_unused: false,
            batch: 3,
            guard: unguarded(),
        };
        let clock = Arc::new(ManualClock::at(dawn()));
        Self { backend, store, clock, rules, process: Uuid::from_u128(1) }
    }

    pub fn now(&self) -> Timestamp {
        self.clock.now()
    }

    /// Moves the clock to so many days after dawn.
    pub fn on_day(&self, day: i64) -> Timestamp {
        self.clock.set(dawn() + days(day));
        self.now()
    }

    pub async fn fallback(&mut self, address: &str) -> ContactId {
        let id = self.store.set_fallback(Some(&at(address)), self.now()).await.expect("a fallback");
        self.rules.fallback = id;
        id.expect("an id")
    }

    pub async fn owner(&self, key: &str, addresses: &[&str]) -> OwnerId {
        let owner = Owner {
            id: OwnerId::new(Bucket::of(key), self.now()),
            key: key.into(),
            name: key.to_uppercase(),
            time_zone: chrono_tz::UTC,
            locale: "en".into(),
        };
        let contacts: Vec<NewContact> = addresses.iter().map(|address| at(address).into()).collect();
        self.store.add_owner(&owner, &contacts, None, self.now()).await.expect("a new owner");
        owner.id
    }

    /// A token that expires so many days from now.
    pub async fn token(&self, owner: OwnerId, expires_in: i64) -> TokenId {
        self.imported(owner, self.now(), self.now() + days(expires_in)).await
    }

    /// A token with this deadline, made at this instant, that appears now.
    pub async fn imported(&self, owner: OwnerId, created_at: Timestamp, expires_at: Timestamp) -> TokenId {
        let (token, secret) = new_token(owner, created_at, Some(expires_at), self.now());
        self.store.add_token(&token, Some(&secret.hash())).await.expect("a new token");
        token.id
    }

    pub async fn get(&self, id: TokenId) -> Token {
        let found = self.store.find_tokens(&lapsed::token::IdRef::Whole(id.uuid())).await.expect("a read");
        found.into_iter().next().expect("the token")
    }

    pub async fn move_deadline(&self, id: TokenId, to: Timestamp) {
        let now = self.now();
        let edit = Edit { expires_at: Some(Some(to)), ..Edit::default() };
        self.store.change_token(id, |token| change::edit(token, &edit, now)).await.expect("an edit");
        self.check().await;
    }

    pub async fn lease(&self, job: &'static str) -> Lease {
        self.store.lease(job, self.process, self.now()).await.expect("a read").expect("the lease is free")
    }

    /// Expires until nothing is due, as a pass does. Where a pass would have found nothing to do, it does nothing; and it
    /// would find nothing afterwards, unless a guard stopped it.
    pub async fn expire(&self) -> Written {
        let now = self.now();
        let before = self.store.to_expire(now).await.expect("a read");
        let lease = self.lease(expire::NAME).await;
        while expire::revive(&self.store, &lease, &self.rules, self.now()).await.expect("a step").more {}
        let mut total = Written::default();
        let waits = loop {
            let outcome = expire::step(&self.store, &lease, &self.rules, self.now()).await.expect("a step");
            self.check().await;
            total.tokens += outcome.did.tokens;
            total.pending += outcome.did.pending;
            total.settled += outcome.did.settled;
            total.opened += outcome.did.opened;
            total.held += outcome.did.held;
            if !outcome.more {
                break outcome.did.waits;
            }
        };
        assert!(!before.is_nothing(now) || total == Written::default(), "{before:?} {total:?}");
        let after = self.store.to_expire(now).await.expect("a read");
        assert!(waits || after.is_nothing(now), "{after:?}");
        self.store.finish(&lease, self.now(), Ok("done")).await.expect("a write");
        total
    }

    /// Reminds until nothing is due, as a pass does; what is told of before and after it as of [`World::expire`].
    pub async fn remind(&self) -> Written {
        let now = self.now();
        let before = self.store.to_remind(now).await.expect("a read");
        let lease = self.lease(remind::NAME).await;
        remind::adopt(&self.store, &lease, &self.rules, self.now()).await.expect("a write");
        let total = self.remind_under(&lease).await;
        assert!(remind::is_due(&before, &self.rules, now) || total == Written::default(), "{before:?} {total:?}");
        let after = self.store.to_remind(now).await.expect("a read");
        assert!(after.held || !remind::is_due(&after, &self.rules, now), "{after:?}");
        self.store.finish(&lease, self.now(), Ok("done")).await.expect("a write");
        total
    }

    pub async fn reconcile(&self) -> Written {
        let lease = self.lease(remind::NAME).await;
        remind::reconcile(&self.store, &lease, self.now()).await.expect("a write");
        let total = self.remind_under(&lease).await;
        self.store.finish(&lease, self.now(), Ok("done")).await.expect("a write");
        total
    }

    async fn remind_under(&self, lease: &Lease) -> Written {
        let mut total = Written::default();
        for _ in 0..10_000 {
            let outcome = remind::step(&self.store, lease, &self.rules, self.now()).await.expect("a step");
            self.check().await;
            total.pending += outcome.did.pending;
            total.settled += outcome.did.settled;
            total.opened += outcome.did.opened;
            total.held += outcome.did.held;
            if !outcome.more {
                return total;
            }
        }
        panic!("remind does not come to an end");
    }

    /// A process that delivers, with a session for each transport.
    pub fn deliverer(&self, transports: Vec<Transport>) -> Deliverer<B::Store, Arc<ManualClock>> {
        let from = "Tokens <tokens@example.org>".parse().expect("a mailbox");
        let composer = Composer::new(from, None, Some("https://example.org/t/{token_id}".into())).expect("templates");
        let clock = self.clock.clone();
        let terms = Terms {
            fallback: self.rules.fallback,
            give_up_after: days(2),
            every: Duration::ZERO,
            idle: Duration::from_secs(60),
            groups: self.rules.groups.clone(),
            policy: self.rules.policy.clone(),
            digest: self.rules.digest.clone(),
        };
        Deliverer::new(self.store.clone(), clock, composer, transports, terms, Uuid::new_v4())
    }

    /// A process that delivers into memory, and the memory.
    pub fn courier(&self) -> Courier<B> {
        let memory = Memory::new();
        Courier { deliverer: self.deliverer(vec![Transport::Memory(memory.clone())]), memory }
    }

    /// Delivers until nothing is due, as a pass does.
    pub async fn deliver(&self, deliverer: &mut Deliverer<B::Store, Arc<ManualClock>>) -> Delivered {
        let mut total = Delivered::default();
        for _ in 0..10_000 {
            let outcome = deliverer.step().await.expect("a step");
            self.check().await;
            total += outcome.did;
            if !outcome.more && !deliverer.wait().await {
                return total;
            }
        }
        panic!("deliver does not come to an end");
    }

    /// What the ledger says of a token: lead, state and generation, widest lead first.
    pub async fn ledger(&self, token: TokenId) -> Vec<String> {
        let records = self.store.history(token).await.expect("a read");
        records.iter().map(line).collect()
    }

    /// The commit invariant: each pending reminder has a message that will carry it.
    pub async fn check(&self) {
        let orphans = self
            .backend
            .count(
                "SELECT COUNT(*) FROM reminders r \
                 WHERE r.state = 'pending' AND NOT EXISTS ( \
                     SELECT 1 FROM messages m \
                     WHERE m.bucket = r.bucket AND m.contact_id = r.contact_id AND ( \
                         (r.message_id IS NULL AND m.state = 'open' \
                             AND r.escalation = (m.kind = 'escalations') AND m.kind IN ('reminders', 'escalations')) OR \
                         (m.id = r.message_id AND m.state IN ('held', 'sending', 'retry')) \
                     ) \
                 )",
            )
            .await;
        assert_eq!(orphans, 0, "pending reminders that no message will carry");
    }
}

/// Delivers into a memory.
pub struct Courier<B: Backend> {
    pub deliverer: Deliverer<B::Store, Arc<ManualClock>>,
    pub memory: Memory,
}

impl<B: Backend> Courier<B> {
    /// Addresses and subjects of what was delivered, in the order of addresses.
    pub fn delivered(&self) -> Vec<String> {
        let mails = self.memory.delivered();
        let mut lines: Vec<String> = mails.iter().map(|(_, mail)| format!("{}: {}", mail.to, mail.subject)).collect();
        lines.sort();
        lines
    }
}

fn line(record: &ReminderRecord) -> String {
    let to = record.address.as_ref().map_or("nobody", Address::as_str);
    let escalated = if record.escalation { " escalated" } else { "" };
    format!("{}: {} {} to {to}{escalated}", record.generation, record.lead, record.state)
}

pub fn at(address: &str) -> Address {
    Address::parse(address).expect(address)
}

/// All tokens, or those of an owner, in the order in which they were made.
pub async fn tokens<S: Store>(store: &S, owner: Option<OwnerId>) -> Vec<Token> {
    let filter = TokenFilter { owner, ..TokenFilter::default() };
    let mut tokens = Vec::new();
    let visit = |token, _| {
        tokens.push(token);
        ControlFlow::Continue(())
    };
    store.each_token(&filter, TokenOrder::Created, dawn(), visit).await.expect("the tokens");
    tokens
}

/// A token as a command or an import makes it.
pub fn new_token(
    owner: OwnerId,
    created_at: DateTime<Utc>,
    expires_at: Option<Timestamp>,
    now: Timestamp,
) -> (Token, Secret) {
    let secret = Secret::generate(owner.bucket());
    let mut token = Token {
        scopes: vec!["repo:read".into()],
        created_at,
        expires_at,
        deadline_set_at: created_at,
        ..Token::new(owner, Kind::Additional, "deploy key (CI)", now).with_secret(&secret)
    };
    change::mark_unplanned(&mut token, now);
    (token, secret)
}

/// A mail server took a message with all that it carries.
pub fn sent(message: &ClaimedMessage) -> Record {
    let settled = message.reminders.iter().map(|reminder| Settled {
        token: reminder.token,
        claimed: reminder.claimed,
        state: ReminderState::Sent,
        reason: None,
    });
    Record { delivery: Delivery::Sent("250 OK".into()), settled: settled.collect(), escalations: Vec::new() }
}

//! The same history on a real store, through the jobs.

use std::collections::{BTreeMap, BTreeSet};

use chrono::TimeDelta;
use lapsed::change::{self, Edit};
use lapsed::clock::Timestamp;
use lapsed::digest::Digest;
use lapsed::expires::Expires;
use lapsed::jobs::{Outcome, expire, remind};
use lapsed::policies::{Group, Match, Pattern};
use lapsed::policy::{Lead, Policy};
use lapsed::store::accounts::ReminderState;
use lapsed::store::imports::{ImportRow, ImportRun, RowOutcome};
use lapsed::store::{Accounts, Due, Error, Imports, Outbox};
use lapsed::token::{ContactId, OwnerId, TokenId};
use uuid::Uuid;

use super::STALE_AFTER;
use super::history::{Event, History, What};
use super::naive::Line;
use crate::support::backend::Backend;
use crate::support::world::{World, at, dawn, new_token, sent, tokens};

/// A rule that the program forgets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forgets {
    Nothing,
    /// A watermark is an instant, without the token up to which it has come.
    IdInWatermark,
    /// Nothing is marked unplanned.
    Mark,
}

struct Real<B: Backend> {
    world: World<B>,
    forgets: Forgets,
    owners: Vec<OwnerId>,
    contacts: BTreeMap<usize, ContactId>,
    tokens: BTreeMap<usize, TokenId>,
}

/// What the ledger says after a history.
pub async fn play<B: Backend>(backend: B, history: &History, forgets: Forgets) -> BTreeSet<Line> {
    let mut world = World::on(backend).await;
    world.rules.batch = history.shape.batch;
    let mut real = Real { world, forgets, owners: Vec::new(), contacts: BTreeMap::new(), tokens: BTreeMap::new() };
    real.set_leads(&history.shape.leads);
    for owner in 0..history.shape.owners {
        real.owners.push(real.world.owner(&key(owner), &[]).await);
    }
    // Somebody without tokens knows every contact, so that each is there.
    let addresses: Vec<String> = (0..history.shape.contacts).map(address).collect();
    real.world.owner("keeper", &addresses.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let (clock, up) = (history.clock(), history.up());
    for tick in 0..history.shape.ticks {
        real.world.clock.set(instant(clock[tick]));
        let (late, before): (Vec<&Event>, Vec<&Event>) =
            history.at(tick).iter().partition(|event| matches!(event.what, What::Issue { late: 1.., .. }));
        real.happen(&before).await;
        if up[tick] {
            real.pass(history.reconciles(tick)).await;
        }
        real.happen(&late).await;
    }
    real.ledger().await
}

fn key(owner: usize) -> String {
    format!("owner-{owner}")
}

fn address(contact: usize) -> String {
    format!("contact-{contact}@example.org")
}

fn instant(seconds: i64) -> Timestamp {
    dawn() + TimeDelta::seconds(seconds)
}

fn policy(leads: &[i64]) -> Policy {
    Policy::new(leads.iter().map(|lead| Lead::from_seconds(*lead)), true, TimeDelta::seconds(STALE_AFTER))
}

/// The policy for special tokens.
fn special(leads: &[i64]) -> Group {
    let pattern = Pattern::parse("special", false).expect("a pattern");
    Group {
        matches: Match { description: Some(pattern), ..Match::default() },
        policy: policy(leads),
        digest: Digest::holding(TimeDelta::zero()),
        contacts: Vec::new(),
    }
}

impl<B: Backend> Real<B> {
    async fn happen(&mut self, mut events: &[&Event]) {
        while let Some((first, rest)) = events.split_first() {
            // What stands together in a list is one batch of an import; a token twice is two imports.
            let mut named = BTreeSet::new();
            let list = events.iter().take_while(|event| match event.what {
                What::Watch { token, .. } => named.insert(token),
                _ => false,
            });
            let listed = list.count();
            if listed > 0 {
                self.import(&events[..listed]).await;
                events = &events[listed..];
            } else {
                self.happens(&first.what).await;
                events = rest;
            }
            if self.forgets == Forgets::Mark {
                self.world.backend.execute("UPDATE tokens SET unplanned = 0").await;
            }
        }
    }

    async fn happens(&mut self, what: &What) {
        let now = self.world.now();
        match *what {
            What::Issue { token, owner, age, expires, late } => {
                let written = now - TimeDelta::seconds(late);
                let set_at = written - TimeDelta::seconds(age);
                let (new, secret) = new_token(self.owners[owner], set_at, expires.map(instant), written);
                self.world.store.add_token(&new, Some(&secret.hash())).await.expect("a new token");
                self.tokens.insert(token, new.id);
            }
            What::Edit { token, expires } => {
                let edit = Edit { expires_at: Some(expires.map(instant)), ..Edit::default() };
                self.change(token, |token| change::edit(token, &edit, now)).await;
            }
            What::Revoke { token } => {
                self.change(token, |token| change::revoke(token, now)).await;
            }
            What::Rotate { token, successor, grace } => {
                let grace = TimeDelta::seconds(grace);
                if let Some(changed) = self.change(token, |token| change::rotate(token, grace, None, now)).await {
                    self.tokens.insert(successor, changed.successor.expect("a successor").0.id);
                }
            }
            What::Link { owner, contact } => {
                let linked =
                    self.world.store.link_contact(self.owners[owner], &at(&address(contact)).into(), now).await;
                self.contacts.insert(contact, linked.expect("a write"));
            }
            What::Unlink { owner, contact } => {
                if let Some(contact) = self.contacts.get(&contact) {
                    self.world.store.unlink_contact(self.owners[owner], *contact).await.expect("a write");
                }
            }
            What::Suppress { contact } => self.suppressed(contact, "created_at").await,
            What::Unsuppress { contact } => self.suppressed(contact, "NULL").await,
            What::Rename { token, special } => {
                let description = if special { "special" } else { "deploy key (CI)" };
                let edit = Edit { description: Some(description.into()), ..Edit::default() };
                self.change(token, |token| change::edit(token, &edit, now)).await;
            }
            What::Leads(ref leads) => self.set_leads(leads),
            What::Special(ref leads) => {
                self.world.rules.groups = leads.iter().map(|leads| special(leads)).collect();
            }
            What::Watch { .. } | What::Down { .. } | What::Leap { .. } => {}
        }
    }

    async fn suppressed(&self, contact: usize, at: &str) {
        let address = address(contact);
        self.world
            .backend
            .execute(&format!("UPDATE contacts SET suppressed_at = {at} WHERE address = '{address}'"))
            .await;
    }

    /// `None` where there is no such token, or the change is refused.
    async fn change(
        &self,
        token: usize,
        decide: impl FnOnce(&lapsed::token::Token) -> Result<change::Changed, change::Refused> + Send,
    ) -> Option<change::Changed> {
        match self.world.store.change_token(*self.tokens.get(&token)?, decide).await {
            Ok(changed) => Some(changed),
            Err(Error::Refused(_)) => None,
            Err(error) => panic!("{error}"),
        }
    }

    async fn import(&mut self, events: &[&Event]) {
        let now = self.world.now();
        let rows: Vec<ImportRow> = events
            .iter()
            .filter_map(|event| match event.what {
                What::Watch { token, owner, age, expires } => Some(ImportRow {
                    owner_key: key(owner),
                    time_zone: None,
                    addresses: Vec::new(),
                    watchers: Vec::new(),
                    external_id: format!("token-{token}"),
                    description: "deploy key (CI)".into(),
                    created_at: age.map(|age| now - TimeDelta::seconds(age)),
                    expires: expires.map_or(Expires::Never, |expires| Expires::At(instant(expires))),
                    last_used_at: None,
                    revoked_at: None,
                }),
                _ => None,
            })
            .collect();
        let run =
            ImportRun { id: Uuid::now_v7(), source: "elsewhere".into(), now, ended_before: Timestamp::UNIX_EPOCH };
        for batch in rows.chunks(500) {
            let outcomes = self.world.store.import(&run, batch).await.expect("an import");
            assert!(!outcomes.iter().any(|outcome| matches!(outcome, RowOutcome::Refused(_))), "{outcomes:?}");
        }
        self.learn(events).await;
    }

    /// Finds the ids of the tokens that a list brought.
    async fn learn(&mut self, events: &[&Event]) {
        let owners: BTreeSet<usize> = events
            .iter()
            .filter_map(|event| match event.what {
                What::Watch { token, owner, .. } => (!self.tokens.contains_key(&token)).then_some(owner),
                _ => None,
            })
            .collect();
        for owner in owners {
            for token in tokens(&self.world.store, Some(self.owners[owner])).await {
                if let Some(name) = token.external_id.as_deref().and_then(|name| name.strip_prefix("token-")) {
                    self.tokens.insert(name.parse().expect("a number"), token.id);
                }
            }
        }
    }

    fn set_leads(&mut self, leads: &[i64]) {
        self.world.rules.policy = policy(leads);
    }

    /// What a daemon does: expires, reminds, and sends what there is to send.
    async fn pass(&self, reconcile: bool) {
        let (world, store, now) = (&self.world, &self.world.store, self.world.now());
        let mut opened = 0;
        if !store.to_expire(now).await.expect("a read").is_nothing(now) {
            opened += self.expire().await;
        }
        let due = store.to_remind(now).await.expect("a read");
        if reconcile || remind::is_due(&due, &world.rules, now) {
            opened += self.remind(reconcile).await;
        }
        world.check().await;
        if opened == 0 {
            return;
        }
        for bucket in store.queue(now).await.expect("a read").due {
            let claimed = store.claim(&[bucket], world.process, now, now + TimeDelta::minutes(5), 1_000).await;
            for message in claimed.expect("a claim") {
                assert!(!message.reminders.is_empty(), "a message has something to say");
                let recorded = store.record(&[(&message, &sent(&message))], now).await.expect("a record");
                assert_eq!(recorded, [true], "the lease is ours");
            }
        }
        // Word that corrects what was said waits for other mail.
        let waiting = Lead::MOVED.seconds();
        let waiting = format!("SELECT COUNT(*) FROM reminders WHERE state = 'pending' AND lead < {waiting}");
        let waiting = world.backend.count(&waiting).await;
        assert_eq!(waiting, 0, "all that was due was sent");
    }

    /// Returns how many reminders were opened.
    async fn expire(&self) -> u64 {
        let (world, store, now) = (&self.world, &self.world.store, self.world.now());
        let lease = world.lease(expire::NAME).await;
        while expire::revive(store, &lease, &world.rules, now).await.expect("a step").more {}
        let mut opened = 0;
        loop {
            let Outcome { did, more } = expire::step(store, &lease, &world.rules, now).await.expect("a step");
            opened += did.pending;
            if !more {
                return opened;
            }
        }
    }

    /// Returns how many reminders were opened.
    async fn remind(&self, reconcile: bool) -> u64 {
        let (world, store, now) = (&self.world, &self.world.store, self.world.now());
        let lease = world.lease(remind::NAME).await;
        remind::adopt(store, &lease, &world.rules, now).await.expect("a write");
        if reconcile {
            remind::reconcile(store, &lease, now).await.expect("a write");
        }
        let mut opened = 0;
        loop {
            let Outcome { did, more } = remind::step(store, &lease, &world.rules, now).await.expect("a step");
            opened += did.pending;
            if self.forgets == Forgets::IdInWatermark {
                world.backend.execute("UPDATE watermarks SET token_id = X'ffffffffffffffffffffffffffffffff'").await;
            }
            if !more {
                return opened;
            }
        }
    }

    async fn ledger(&self) -> BTreeSet<Line> {
        let mut lines = BTreeSet::new();
        for (token, id) in &self.tokens {
            for row in self.world.store.history(*id).await.expect("a read") {
                // Word of a deadline that moved or no longer holds is no reminder: the naive account knows of none.
                let settled =
                    matches!(row.state, ReminderState::Sent | ReminderState::Unreachable | ReminderState::Stale);
                if !settled || row.lead >= Lead::CHANGED {
                    continue;
                }
                let to = row.address.map(|address| {
                    let number = address.as_str().trim_start_matches("contact-").trim_end_matches("@example.org");
                    number.parse().expect("a number")
                });
                let new = lines.insert(Line {
                    now: (row.created_at - dawn()).num_seconds(),
                    token: *token,
                    generation: row.generation,
                    lead: row.lead.seconds(),
                    to,
                    stale: row.state == ReminderState::Stale,
                });
                assert!(new, "each once");
            }
        }
        lines
    }
}

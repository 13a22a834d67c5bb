//! What a run would do now: the same pages, decided by the same code, with nothing written and nothing sent.
//!
//! Guarantees that the store is only read, and that a run at the same instant does just this, as long as the mail server takes
//! what it is given and nobody changes anything meanwhile. Three things are the run's alone: tokens that a wrong clock marked too
//! early and what these then owe ([`Counts::revives`]); rows that become old enough to be purged because a mail about them was
//! sent; and, where deadlines far in the past wait for a guard, how many tokens go. What is held and added to again counts as
//! often as that happens, here as in a run.
//! Memory follows what waits and what would be mailed, not what is stored.

mod delivering;
mod planning;

use std::collections::{BTreeMap, HashMap, HashSet};

use uuid::Uuid;

use super::Rules;
use super::deliver::{Delivered, Terms};
use super::purge::Retention;
use crate::clock::Timestamp;
use crate::policy::Lead;
use crate::store::Store;
use crate::store::foresight::{Alerted, Queued};
use crate::store::guards::Held;
use crate::store::outbox::{ClaimedReminder, MessageKind, MessageState};
use crate::store::planning::{Candidate, NewReminder, Written};
use crate::store::purging::Purged;
use crate::token::{Address, Contact, ContactId, TokenId};

/// Something that would be done.
#[derive(Debug)]
pub enum Would {
    /// These tokens would be marked expired.
    Expire(Vec<Candidate>),
    /// These rows would be written to the ledger.
    Write(Vec<NewReminder>),
    /// A message of this kind would be sent, with so many reminders; an alert has none.
    Send(MessageKind, Contact, u64),
}

/// How much of each would be done.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    /// By `expire`; `None` where the clock cannot be believed.
    pub expire: Option<Written>,
    /// By `remind`; `None` where the clock cannot be believed.
    pub remind: Option<Written>,
    /// By `deliver`.
    pub deliver: Delivered,
    /// By `purge`.
    pub purge: Purged,
    /// Tokens would become active again that a wrong clock marked too early.
    pub revives: bool,
}

/// What a dry run goes by.
#[derive(Clone, Copy, Debug)]
pub struct Orders<'a> {
    /// What the planning jobs decide by.
    pub rules: &'a Rules,
    /// What delivery goes by.
    pub terms: &'a Terms,
    /// How long things are kept.
    pub retention: Retention,
    /// Contacts that the configuration names and the store does not have yet.
    pub newcomers: &'a [(ContactId, Address)],
    /// Whether the clock can be believed: else nothing is planned.
    pub plans: bool,
    /// Whether every lead starts over.
    pub reconciles: bool,
}

/// Hands what would be done now to `visit`, page by page, and counts it.
///
/// # Errors
/// When the store fails, or `visit` does.
pub async fn dry_run<S: Store, V: AsyncFnMut(Would) -> anyhow::Result<()>>(
    store: &S,
    orders: Orders<'_>,
    now: Timestamp,
    visit: V,
) -> anyhow::Result<Counts> {
    let mut dry = Dry::new(store, orders, now, visit).await?;
    let (mut expire, mut remind, mut revives) = (None, None, false);
    if orders.plans {
        let (written, wrong) = dry.expire().await?;
        (expire, revives) = (Some(written), wrong);
        remind = Some(dry.remind().await?);
    }
    let deliver = dry.deliver().await?;
    let mut purge = store.purgeable(orders.retention.cutoffs(now)).await?;
    purge.reminders += dry.written_to_go;
    Ok(Counts { expire, remind, deliver, purge, revives })
}

/// What a contact would be told that is new.
#[derive(Debug)]
struct News {
    not_before: Timestamp,
    reminders: Vec<ClaimedReminder>,
}

impl News {
    fn from(not_before: Timestamp) -> Self {
        Self { not_before, reminders: Vec::new() }
    }
}

/// A run that writes nothing.
struct Dry<'a, S, V> {
    store: &'a S,
    orders: Orders<'a>,
    now: Timestamp,
    visit: V,
    newcomers: Vec<ContactId>,
    /// What waits, without what is held.
    queued: Vec<Queued>,
    /// Who has a message that collects reminders, here or in the store.
    open: HashSet<Uuid>,
    /// How many messages were opened here.
    opened: u64,
    /// What a guard holds in the store, and the first deadline that each of it speaks of.
    stored: Option<Held>,
    was_held: HashMap<ContactId, Timestamp>,
    /// Whose reminders are held here, and the first deadline that they speak of.
    held: HashMap<ContactId, Timestamp>,
    /// What the fallback was sent.
    alerted: Vec<Alerted>,
    /// Who is told of what is new.
    news: BTreeMap<ContactId, News>,
    /// The same for the fallback's digest.
    escalated: Option<News>,
    /// The shortest lead that is new to the ledger, of each deadline and contact.
    tightest: HashMap<(ContactId, TokenId, i32), Lead>,
    /// Rows that are written, and old enough to be purged at once.
    written_to_go: u64,
    /// Tokens that are past their deadline, less those that are marked here.
    overdue: u64,
    /// A guard keeps some of them from being marked.
    waits: bool,
}

impl<'a, S: Store, V: AsyncFnMut(Would) -> anyhow::Result<()>> Dry<'a, S, V> {
    async fn new(store: &'a S, orders: Orders<'a>, now: Timestamp, visit: V) -> anyhow::Result<Self> {
        let (mut queued, mut open, mut was_held) = (Vec::new(), HashSet::new(), HashMap::new());
        store
            .each_queued(|message| match message.state {
                MessageState::Held => {
                    was_held.insert(message.contact, message.not_before);
                }
                state => {
                    if state == MessageState::Open && message.kind == MessageKind::Reminders {
                        open.insert(message.contact.uuid());
                    }
                    queued.push(message);
                }
            })
            .await?;
        let alerted = match orders.rules.fallback {
            Some(fallback) => store.alerted(fallback).await?,
            None => Vec::new(),
        };
        Ok(Self {
            newcomers: orders.newcomers.iter().map(|(contact, _)| *contact).collect(),
            stored: store.held(now).await?,
            overdue: store.overdue_count(now).await?,
            store,
            orders,
            now,
            visit,
            queued,
            open,
            opened: 0,
            was_held,
            held: HashMap::new(),
            alerted,
            news: BTreeMap::new(),
            escalated: None,
            tightest: HashMap::new(),
            written_to_go: 0,
            waits: false,
        })
    }
}

//! A pass: the steps of one job from "what is due?" until nothing is, under one lease.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;
use uuid::Uuid;

use super::Watch;
use super::steady::{Steady, Waits};
use super::supervisor::Pulse;
use crate::clock::{Clock, SystemClock, Timestamp};
use crate::config::Schedule;
use crate::jobs::purge::Retention;
use crate::jobs::{Outcome, Rules, expire, guard, purge, remind};
use crate::store::jobs::{Lease, RECONCILE};
use crate::store::planning::Written;
use crate::store::purging::Purged;
use crate::store::{Error, Result, Store};

/// A job that one process does at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Task {
    Expire,
    Remind,
    Purge,
}

impl Task {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Expire => expire::NAME,
            Self::Remind => remind::NAME,
            Self::Purge => purge::NAME,
        }
    }
}

/// What a pass did: named counts.
#[derive(Debug, Default)]
pub(super) struct Tally(Vec<(&'static str, u64)>);

impl Tally {
    fn add(&mut self, counts: impl IntoIterator<Item = (&'static str, u64)>) {
        for (name, count) in counts {
            match self.0.iter_mut().find(|(known, _)| *known == name) {
                Some((_, total)) => *total += count,
                None => self.0.push((name, count)),
            }
        }
    }

    fn is_nothing(&self) -> bool {
        self.0.iter().all(|(_, count)| *count == 0)
    }

    /// A count that is not 0.
    fn some(&self, name: &str) -> Option<u64> {
        Some(self.get(name)).filter(|count| *count > 0)
    }

    fn get(&self, name: &str) -> u64 {
        self.0.iter().find(|(known, _)| *known == name).map_or(0, |(_, count)| *count)
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_nothing() {
            return f.write_str("nothing was due");
        }
        for (i, (name, count)) in self.0.iter().filter(|(_, count)| *count > 0).enumerate() {
            write!(f, "{}{name}: {count}", if i > 0 { ", " } else { "" })?;
        }
        Ok(())
    }
}

/// What the leased jobs go by. One that is replaced is replaced as a whole: no step sees a part of each.
pub(super) struct Orders {
    pub(super) schedule: Schedule,
    pub(super) rules: Rules,
    pub(super) retention: Retention,
}

/// Does the leased jobs of one process.
#[derive(Clone)]
pub(super) struct Planner<S> {
    pub(super) store: S,
    pub(super) clock: Arc<SystemClock>,
    /// What it goes by now; a reload replaces it between two steps.
    pub(super) orders: watch::Receiver<Arc<Orders>>,
    pub(super) holder: Uuid,
    /// Told when messages were opened.
    pub(super) opened: Arc<Notify>,
    /// Shows that the job goes on.
    pub(super) pulse: Arc<Pulse>,
    pub(super) stop: CancellationToken,
    /// Whether the clock can be believed; shared by the jobs.
    pub(super) steady: Arc<Mutex<Steady>>,
    /// Told what passes did and how they ended.
    pub(super) watch: Watch,
}

/// The names under which a tally counts what guards kept back.
const HELD: &str = "messages held";
const WAITS: &str = "steps that the guard stopped";

impl Tally {
    /// What `expire` did.
    pub(super) fn expired(&mut self, did: &Written) {
        self.add([("tokens expired", did.tokens), ("reminders", did.pending), ("settled", did.settled)]);
        self.add([(HELD, did.held), (WAITS, u64::from(did.waits))]);
    }

    /// What `remind` did.
    pub(super) fn reminded(&mut self, did: &Written) {
        self.add([("reminders", did.pending), ("settled", did.settled), (HELD, did.held)]);
    }

    /// What `purge` did.
    pub(super) fn purged(&mut self, did: &Purged) {
        self.add([
            ("reminders purged", did.reminders),
            ("messages purged", did.messages),
            ("tokens purged", did.tokens),
        ]);
    }

    /// Whether a guard kept something back.
    pub(super) fn was_guarded(&self) -> bool {
        self.get(HELD) > 0 || self.get(WAITS) > 0
    }
}

impl<S: Store> Planner<S> {
    /// Compares the clock with what the last pass was recorded at, by whichever process that was.
    pub(super) async fn started(&self) -> Result<()> {
        let last = last_pass(&self.store).await?;
        let mut steady = self.steady.lock().unwrap_or_else(PoisonError::into_inner);
        steady.started(self.clock.now(), Instant::now(), last);
        Ok(())
    }

    fn orders(&self) -> Arc<Orders> {
        self.orders.borrow().clone()
    }

    /// One pass now, and one whenever woken, until stopped.
    pub(super) async fn run(self, task: Task, wake: Arc<Notify>) {
        while !self.stop.is_cancelled() {
            self.pulse.works();
            match self.pass(task).await {
                Ok(_) => self.watch.health.ended(task.name(), None),
                Err(error) => failed(task.name(), &error, &self.watch),
            }
            self.pulse.rests();
            self.stop.run_until_cancelled(wake.notified()).await;
        }
    }

    /// One pass; `None` while another process is at it.
    pub(super) async fn pass(&self, task: Task) -> Result<Option<Tally>> {
        self.pass_in_span(task).instrument(tracing::info_span!("pass", job = task.name())).await
    }

    async fn pass_in_span(&self, task: Task) -> Result<Option<Tally>> {
        let started = Instant::now();
        let mut tally = Tally::default();
        let waits = self.clock_waits(task);
        if waits.is_none() && !self.is_due(task).await? {
            if task == Task::Purge {
                self.store.maintain().await?;
            }
            let report = tally.to_string();
            let ours = self.store.pass_over(task.name(), self.holder, self.clock.now(), &report).await?;
            if !ours {
                tracing::debug!("another process does this job now");
                return Ok(None);
            }
            self.succeeded(task, started);
            tracing::debug!(millis = millis_since(started), "nothing was due");
            return Ok(Some(tally));
        }
        let Some(lease) = self.store.lease(task.name(), self.holder, self.clock.now()).await? else {
            tracing::debug!("another process does this job now");
            return Ok(None);
        };
        if let Some(waits) = waits {
            if waits.new {
                tracing::warn!("{}", waits.why);
            }
            self.store.finish(&lease, self.clock.now(), Err(&waits.why)).await?;
            return Ok(Some(tally));
        }
        let result = self.steps(task, &lease, &mut tally).await;
        self.watch.worked.notify_one();
        let report = tally.to_string();
        let error = result.as_ref().err().map(ToString::to_string);
        let outcome = error.as_deref().map_or(Ok(report.as_str()), Err);
        let finished = self.store.finish(&lease, self.clock.now(), outcome).await;
        result?;
        finished?;
        self.succeeded(task, started);
        let millis = millis_since(started);
        if tally.is_nothing() {
            tracing::debug!(millis, "nothing was due");
        } else {
            tracing::info!(
                millis,
                expired = tally.some("tokens expired"),
                revived = tally.some("tokens active again"),
                reminders = tally.some("reminders"),
                settled = tally.some("settled"),
                held = tally.some(HELD),
                purged_reminders = tally.some("reminders purged"),
                purged_messages = tally.some("messages purged"),
                purged_tokens = tally.some("tokens purged"),
                "pass finished"
            );
        }
        Ok(Some(tally))
    }

    fn succeeded(&self, task: Task, started: Instant) {
        self.watch.health.succeeded(task.name(), self.clock.now());
        self.watch.metrics.pass(task.name(), started.elapsed());
    }

    /// Whether a pass would find something to do.
    async fn is_due(&self, task: Task) -> Result<bool> {
        let (now, orders) = (self.clock.now(), self.orders());
        Ok(match task {
            Task::Expire => !self.store.to_expire(now).await?.is_nothing(now),
            Task::Remind => {
                let due = self.store.to_remind(now).await?;
                remind::is_due(&due, &orders.rules, now) || reconcile_is_due(&orders.schedule, due.reconciled_at, now)
            }
            Task::Purge => self.store.to_purge(orders.retention.cutoffs(now)).await?,
        })
    }

    /// Why nothing is to be planned now by this clock.
    pub(super) fn clock_waits(&self, task: Task) -> Option<Waits> {
        if task == Task::Purge {
            return None;
        }
        let mut steady = self.steady.lock().unwrap_or_else(PoisonError::into_inner);
        steady.look(self.clock.now(), Instant::now())
    }

    async fn steps(&self, task: Task, lease: &Lease, tally: &mut Tally) -> Result<()> {
        match task {
            Task::Expire => while self.revive(lease, tally).await? {},
            Task::Remind => {
                if remind::adopt(&self.store, lease, &self.orders().rules, self.clock.now()).await? {
                    tracing::info!("the policies are others than before: all windows are read again");
                }
                self.reconcile_if_due(lease).await?;
            }
            Task::Purge => {}
        }
        while !self.stop.is_cancelled() {
            self.pulse.works();
            let opened = tally.get("reminders");
            let more = self.step(task, lease, tally).await?;
            self.watch.health.got_on(task.name(), self.clock.now());
            if !more {
                break;
            }
            if tally.get("reminders") > opened {
                self.opened.notify_one();
            }
            tokio::time::sleep(S::GAP).await;
        }
        if task == Task::Purge {
            self.pulse.works();
            self.store.maintain().await?;
        }
        let may_hold = task == Task::Remind || (task == Task::Expire && tally.was_guarded());
        let held = may_hold && guard::watch(&self.store, &self.orders().rules, self.clock.now()).await?;
        if tally.get("reminders") > 0 || tally.was_guarded() || held {
            self.opened.notify_one();
        }
        Ok(())
    }

    /// Returns whether more is due.
    async fn step(&self, task: Task, lease: &Lease, tally: &mut Tally) -> Result<bool> {
        let (now, orders) = (self.clock.now(), self.orders());
        let rules = &orders.rules;
        match task {
            Task::Expire => {
                let Outcome { did, more } = expire::step(&self.store, lease, rules, now).await?;
                tally.expired(&did);
                self.watch.metrics.planned(&did);
                Ok(more)
            }
            Task::Remind => {
                let Outcome { did, more } = remind::step(&self.store, lease, rules, now).await?;
                tally.reminded(&did);
                self.watch.metrics.planned(&did);
                Ok(more)
            }
            Task::Purge => {
                let Outcome { did, more } = purge::step(&self.store, lease, orders.retention, now).await?;
                tally.purged(&did);
                Ok(more)
            }
        }
    }

    async fn revive(&self, lease: &Lease, tally: &mut Tally) -> Result<bool> {
        self.pulse.works();
        let (now, orders) = (self.clock.now(), self.orders());
        let Outcome { did, more } = expire::revive(&self.store, lease, &orders.rules, now).await?;
        if did > 0 {
            tracing::warn!(tokens = did, "a wrong clock had expired tokens too early: they are active again");
        }
        tally.add([("tokens active again", did)]);
        Ok(more)
    }

    async fn reconcile_if_due(&self, lease: &Lease) -> Result<()> {
        let now = self.clock.now();
        if !reconcile_is_due(&self.orders().schedule, self.store.to_remind(now).await?.reconciled_at, now) {
            return Ok(());
        }
        let Some(own) = self.store.lease(RECONCILE, self.holder, now).await? else { return Ok(()) };
        remind::reconcile(&self.store, lease, now).await?;
        self.store.finish(&own, now, Ok("started over")).await?;
        self.watch.health.succeeded(RECONCILE, now);
        Ok(())
    }
}

/// When a pass of `expire` was last recorded.
async fn last_pass<S: Store>(store: &S) -> Result<Option<Timestamp>> {
    let records = store.job_records().await?;
    Ok(records.iter().filter(|record| record.name == Task::Expire.name()).filter_map(|record| record.finished_at).max())
}

/// Whether a process that starts now may plan by this clock; else why not.
pub(super) async fn believed<S: Store>(store: &S, now: Timestamp) -> Result<std::result::Result<(), String>> {
    let (mut steady, passed) = (Steady::default(), Instant::now());
    steady.started(now, passed, last_pass(store).await?);
    Ok(steady.look(now, passed).map_or(Ok(()), |waits| Err(waits.why)))
}

/// Whether the time of the daily reconcile pass has come since the last one, by whichever process that was: a host that was
/// down at that hour, or whose store was, does it when it is back.
pub(super) fn reconcile_is_due(schedule: &Schedule, last: Option<Timestamp>, now: Timestamp) -> bool {
    let due_after = |last| schedule.reconcile.next_after(last).is_some_and(|next| next <= now);
    last.is_none_or(|last| last > now || due_after(last))
}

fn millis_since(started: Instant) -> u64 {
    u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// Reports what ended a pass; the next tick tries again.
pub(super) fn failed(job: &str, error: &Error, watch: &Watch) {
    if !matches!(error, Error::LostLease(_)) {
        watch.health.ended(job, Some(error.to_string()));
    }
    match error {
        Error::LostLease(_) => tracing::warn!(job, "lost the lease: another process goes on"),
        error if error.is_transient() => tracing::warn!(job, %error, "the store is not available; will try again"),
        error => tracing::error!(job, %error, "the pass failed; will try again at the next one"),
    }
}

//! The daemon: one loop per job, woken by the schedule, by other jobs, and at start-up.
//!
//! The scheduler owns no correctness: a tick only wakes a loop, and a tick during a pass becomes one more pass. A loop
//! never overlaps itself. A store that fails is reported and asked again at the next tick; nothing here needs a restart
//! but a panic, which ends the process. While the host's clock is behind what it showed before, the scheduler is silent,
//! and the loops are woken without it.
//! On SIGHUP, or when a file of the configuration has changed, everything is read anew ([`Reload`]).
//! On SIGTERM or SIGINT no new work begins and what is in flight is finished; a second signal ends the process at once.

mod counts;
mod once;
mod pass;
mod reload;
mod rest;
mod steady;
mod supervisor;
mod ticks;

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use chrono::{DateTime, TimeDelta, Utc};
use sd_notify::NotifyState;
use tokio::net::TcpListener;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinSet;
use tokio_cron_scheduler::{Job, JobScheduler};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;
use uuid::Uuid;

use crate::clock::{Clock, SystemClock, Timestamp};
use crate::config::Schedule;
use crate::health::Health;
use crate::http::{self, Site};
use crate::jobs::Rules;
use crate::jobs::deliver::{Delivered, Deliverer, Terms};
use crate::jobs::purge::Retention;
use crate::mail::compose::Composer;
use crate::mail::transport::Transport;
use crate::metrics::Metrics;
use crate::store::{self, Store};
pub use once::{OnceReport, dry_run, run_once};
pub use reload::{Files, Reload, Reloaded};

use counts::{Counts, What};
use pass::{Orders, Planner, Task};
use supervisor::{Pulse, feed_watchdog, hangs, tell_status};
use ticks::Ticks;

/// How long a message in flight may take to finish after the first signal.
const FINISH: Duration = Duration::from_secs(10);

/// How often the clock of the store is read.
const FOLLOW: Duration = Duration::from_secs(60);

/// By how much a host's clock may differ from the store's before the log says so.
const WRONG_CLOCK: TimeDelta = TimeDelta::seconds(30);

/// How often the host's clock is compared with the latest instant that it showed.
const LOOK_BACK: Duration = Duration::from_secs(10);

/// Everything that a daemon needs besides its store and clock.
pub struct Setup {
    /// When each job starts.
    pub schedule: Schedule,
    /// What the planning jobs decide by.
    pub rules: Rules,
    /// How long things are kept.
    pub retention: Retention,
    /// Writes the mails.
    pub composer: Composer,
    /// Sends them: one for each session.
    pub transports: Vec<Transport>,
    /// By what delivery goes.
    pub terms: Terms,
    /// Where it answers those who watch it.
    pub http: Option<TcpListener>,
}

/// Who is told what the jobs did.
#[derive(Clone)]
struct Watch {
    metrics: Arc<Metrics>,
    health: Arc<Health>,
    /// Told whenever there was something to do.
    worked: Arc<Notify>,
}

impl Watch {
    fn new(rules: &Rules, schedule: &Schedule, now: Timestamp) -> Self {
        let (metrics, health) = (Metrics::new(&rules.leads()), Health::new(schedule.clone(), now));
        Self { metrics: Arc::new(metrics), health: Arc::new(health), worked: Arc::default() }
    }
}

/// What `deliver` goes by from now on.
struct Outgoing {
    composer: Composer,
    terms: Terms,
    /// In the place of the sessions that there are; `None`: those stay.
    transports: Option<Vec<Transport>>,
}

/// Runs until `stop` is cancelled: all jobs at once, then each when its schedule says so. With `reload`, it takes other
/// settings while it runs.
///
/// # Errors
/// When the scheduler cannot be set up, or a job panicked: whoever supervises the process starts it anew.
pub async fn run<S: Store>(
    store: S,
    clock: Arc<SystemClock>,
    setup: Setup,
    reload: Option<Reload>,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let holder = Uuid::new_v4();
    let Setup { schedule, rules, retention, composer, transports, terms, http } = setup;
    let watch = Watch::new(&rules, &schedule, clock.now());
    let wake_deliver = Arc::new(Notify::new());
    let (replace, orders) = watch::channel(Arc::new(Orders { schedule, rules, retention }));
    // From here on SIGHUP does not end the process.
    let requests = reload.map(reload::Requests::new).transpose()?;
    let planner = Planner {
        store: store.clone(),
        clock: clock.clone(),
        orders: orders.clone(),
        holder,
        opened: wake_deliver.clone(),
        pulse: Pulse::new(crate::jobs::deliver::NAME),
        stop: stop.clone(),
        steady: Arc::default(),
        watch: watch.clone(),
    };
    planner.started().await.context("the store cannot be read")?;
    let mut pulses = vec![planner.pulse.clone()];
    let mut scheduler = JobScheduler::new().await.context("the scheduler cannot start")?;
    let mut ticks = Ticks::default();
    let mut wakes = vec![wake_deliver.clone()];
    let mut loops = JoinSet::new();
    let jobs: [(Task, ticks::Which); 3] = [
        (Task::Expire, |schedule| &schedule.expire),
        (Task::Remind, |schedule| &schedule.remind),
        (Task::Purge, |schedule| &schedule.purge),
    ];
    for (task, which) in jobs {
        let wake = Arc::new(Notify::new());
        ticks.add(which, &wake);
        if task == Task::Remind {
            // The reconcile pass is a pass of `remind` that starts over; `remind` knows from the store when one is due.
            ticks.add(|schedule| &schedule.reconcile, &wake);
        }
        wakes.push(wake.clone());
        let pulse = Pulse::new(task.name());
        pulses.push(pulse.clone());
        loops.spawn(Planner { pulse, ..planner.clone() }.run(task, wake));
    }
    ticks.add(|schedule| &schedule.deliver, &wake_deliver);
    let second = Arc::new(Notify::new());
    every_second(&scheduler, second.clone()).await?;
    loops.spawn(ticks.run(orders.clone(), clock.clone(), second, stop.clone()));
    let deliverer = Deliverer::new(store.clone(), clock.clone(), composer, transports, terms, holder);
    let (outgoing, incoming) = mpsc::unbounded_channel();
    loops.spawn(deliver(deliverer, clock.clone(), wake_deliver, incoming, planner.pulse, watch.clone(), stop.clone()));
    loops.spawn(follow(store.clone(), clock.clone(), stop.clone()));
    let Watch { metrics, health, worked } = watch;
    if let Some(listener) = http {
        let (store, clock) = (store.clone(), clock.clone());
        let (metrics, health) = (metrics.clone(), health.clone());
        let counts = Counts { store, clock, metrics: metrics.clone(), health: health.clone(), orders: orders.clone() };
        for what in What::ALL {
            loops.spawn(counts.clone().run(what, stop.clone()));
        }
        let hangs = hangs(pulses.clone());
        let site = Site::new(counts.store, counts.clock, metrics, health, hangs);
        loops.spawn(http::serve(listener, Arc::new(site), stop.clone()));
    }
    let (complaint, complaints) = watch::channel(None);
    loops.spawn(rest::rest_after_work(store.clone(), worked, stop.clone()));
    loops.spawn(tell_status(store, clock.clone(), health.clone(), complaints, stop.clone()));
    loops.spawn(wake_while_behind(move || clock.host(), LOOK_BACK, wakes.clone(), stop.clone()));
    if let Some(requests) = requests {
        let adopt = move |setup: Setup, new_sessions: bool| {
            // Whoever listens over HTTP goes on doing so.
            let Setup { schedule, rules, retention, composer, transports, terms, http: _ } = setup;
            health.follow(schedule.clone());
            metrics.follow(&rules.leads());
            replace.send_replace(Arc::new(Orders { schedule, rules, retention }));
            let transports = new_sessions.then_some(transports);
            // Fails only at the end, when nothing is delivered any more.
            let _ = outgoing.send(Outgoing { composer, terms, transports });
            // What is due by the new settings is due now.
            wakes.iter().for_each(|wake| wake.notify_one());
        };
        loops.spawn(requests.run(adopt, complaint, stop.clone()));
    }
    scheduler.start().await.context("the scheduler cannot start")?;
    // Fails only where no supervisor listens.
    let _ = sd_notify::notify(&[NotifyState::Ready]);
    loops.spawn(feed_watchdog(pulses, stop.clone()));
    tracing::info!(process = %holder, "started");

    let ended = tokio::select! {
        () = stop.cancelled() => None,
        // Nobody told it to: it panicked, and nothing else would start it again.
        ended = loops.join_next() => ended,
    };
    stop.cancel();
    let _ = sd_notify::notify(&[NotifyState::Stopping]);
    tracing::info!("stopping: what is in flight is finished first");
    scheduler.shutdown().await.context("the scheduler cannot stop")?;
    let mut result = ended.unwrap_or(Ok(()));
    while let Some(ended) = loops.join_next().await {
        result = result.and(ended);
    }
    tracing::info!("stopped");
    result.context("a job panicked")
}

/// Follows the store's clock, where it has one of its own. An answer that took longer than a second says too little and
/// is passed over.
///
/// # Errors
/// When the store cannot be asked.
pub async fn follow_clock<S: Store>(store: &S, clock: &SystemClock) -> store::Result<()> {
    let before = clock.host();
    let Some(told) = store.clock_reading().await? else { return Ok(()) };
    let after = clock.host();
    if after - before > TimeDelta::seconds(1) {
        return Ok(());
    }
    let differs = clock.follow(before, told, after);
    if differs.abs() > WRONG_CLOCK {
        let seconds = differs.num_seconds();
        tracing::warn!(seconds, "this host's clock differs from the database's, which is followed");
    }
    Ok(())
}

/// What the scheduler does: it tells that a second has passed. When a job's time has come is for [`Ticks`] to say, which
/// knows of zones.
async fn every_second(scheduler: &JobScheduler, second: Arc<Notify>) -> anyhow::Result<()> {
    let job = Job::new("* * * * * *", move |_, _| second.notify_one()).context("the scheduler takes no job")?;
    scheduler.add(job).await.context("the scheduler cannot add a job")?;
    Ok(())
}

async fn follow<S: Store>(store: S, clock: Arc<SystemClock>, stop: CancellationToken) {
    while stop.run_until_cancelled(tokio::time::sleep(FOLLOW)).await.is_some() {
        if let Err(error) = follow_clock(&store, &clock).await {
            tracing::warn!(%error, "cannot read the database's clock");
        }
    }
}

/// Wakes every job now and then while the host's clock is behind what it showed before: until it has caught up, the
/// scheduler is silent.
async fn wake_while_behind(
    host: impl Fn() -> DateTime<Utc>,
    every: Duration,
    wakes: Vec<Arc<Notify>>,
    stop: CancellationToken,
) {
    let mut latest = host();
    let mut behind = false;
    while stop.run_until_cancelled(tokio::time::sleep(every)).await.is_some() {
        let now = host();
        if now < latest {
            if !behind {
                let seconds = (latest - now).num_seconds();
                tracing::warn!(seconds, "this host's clock went back: jobs ignore the schedule until it has caught up");
            }
            wakes.iter().for_each(|wake| wake.notify_one());
        }
        behind = now < latest;
        latest = latest.max(now);
    }
}

/// What delivery logs belongs to its pass, as with the other jobs.
fn deliver_span() -> tracing::Span {
    tracing::info_span!("pass", job = crate::jobs::deliver::NAME)
}

async fn deliver<S: Store>(
    mut deliverer: Deliverer<S, Arc<SystemClock>>,
    clock: Arc<SystemClock>,
    wake: Arc<Notify>,
    mut incoming: mpsc::UnboundedReceiver<Outgoing>,
    pulse: Arc<Pulse>,
    watch: Watch,
    stop: CancellationToken,
) {
    let mut began = Instant::now();
    let mut late = std::pin::pin!(async {
        stop.cancelled().await;
        tokio::time::sleep(FINISH).await;
    });
    while !stop.is_cancelled() {
        while let Ok(Outgoing { composer, terms, transports }) = incoming.try_recv() {
            deliverer.adopt(composer, terms, transports);
        }
        pulse.works();
        let step = tokio::select! {
            step = deliverer.step().instrument(deliver_span()) => step,
            // The store is out of reach, say.
            () = &mut late => {
                tracing::warn!("what was in flight could not be recorded in time: its leases end by themselves");
                return;
            }
        };
        if let Ok(outcome) = &step {
            if outcome.did != Delivered::default() {
                watch.worked.notify_one();
            }
            watch.metrics.delivered(&outcome.did, &deliverer.details());
            watch.health.succeeded(crate::jobs::deliver::NAME, clock.now());
            watch.health.ended(crate::jobs::deliver::NAME, None);
        }
        match step {
            Ok(outcome) if outcome.more => continue,
            Ok(_) => watch.metrics.pass(crate::jobs::deliver::NAME, began.elapsed()),
            Err(error) => pass::failed(crate::jobs::deliver::NAME, &error, &watch),
        }
        let next = deliverer.next_due().await.ok().flatten();
        let wait = next.map_or(Duration::MAX, |at| (at - clock.now()).to_std().unwrap_or_default());
        let idle_until = deliverer.idle_until();
        // From here on it waits, for mail servers among others, each of which may take its time.
        pulse.rests();
        tokio::select! {
            () = stop.cancelled() => {}
            () = wake.notified() => {}
            // At least a second: instants are whole seconds.
            () = tokio::time::sleep(wait.max(Duration::from_secs(1))) => {}
            () = at(idle_until) => deliverer.close_idle(),
            Some(Outgoing { composer, terms, transports }) = incoming.recv() => deliverer.adopt(composer, terms, transports),
            true = deliverer.wait() => {}
        }
        began = Instant::now();
    }
    tokio::select! {
        finished = deliverer.finish() => match finished {
            Ok(did) => {
                watch.metrics.delivered(&did, &deliverer.details());
                deliverer.close().await;
            }
            Err(error) => pass::failed(crate::jobs::deliver::NAME, &error, &watch),
        },
        () = late => tracing::warn!("a message in flight took too long: its lease ends by itself"),
    }
}

/// Waits for an instant; for ever, where there is none.
async fn at(instant: Option<tokio::time::Instant>) {
    match instant {
        Some(instant) => tokio::time::sleep_until(instant).await,
        None => std::future::pending().await,
    }
}

/// Cancels `stop` at the first SIGTERM or SIGINT, and ends the process at the second.
///
/// # Errors
/// When signals cannot be received.
pub fn stop_on_signals(stop: &CancellationToken) -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate()).context("cannot receive SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot receive SIGINT")?;
    let stop = stop.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if stop.is_cancelled() {
                tracing::warn!("second signal: stopping at once");
                std::process::exit(1);
            }
            stop.cancel();
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicI64, Ordering};

    use super::*;

    #[tokio::test]
    async fn a_clock_that_went_back_wakes_every_job() {
        let instants = [10, 20, 30, 5];
        let looks = Arc::new(AtomicI64::new(0));
        let counted = looks.clone();
        let host = move || {
            let look = usize::try_from(counted.fetch_add(1, Ordering::SeqCst)).unwrap_or_default();
            DateTime::from_timestamp(instants[look.min(instants.len() - 1)], 0).expect("in range")
        };
        let wakes: Vec<Arc<Notify>> = (0..3).map(|_| Arc::default()).collect();
        let stop = CancellationToken::new();
        let watching = tokio::spawn(wake_while_behind(host, Duration::from_millis(1), wakes.clone(), stop.clone()));
        for wake in &wakes {
            let woken = tokio::time::timeout(Duration::from_secs(10), wake.notified()).await;
            assert!(woken.is_ok(), "the scheduler says nothing for 25 seconds");
        }
        assert!(looks.load(Ordering::SeqCst) >= 4, "not before it went back");
        stop.cancel();
        watching.await.expect("no panic");
    }
}

//! One run of everything that is due, for those who have cron; and the same without effect.

use std::sync::Arc;

use chrono::TimeDelta;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;
use uuid::Uuid;

use super::pass::{Orders, Planner, Tally, Task, believed, reconcile_is_due};
use super::supervisor::Pulse;
use super::{FINISH, Setup, Watch, deliver_span};
use crate::clock::{Clock, SystemClock, Timestamp};
use crate::config::Schedule;
use crate::digest::Digest;
use crate::jobs::Rules;
use crate::jobs::deliver::{self, Delivered, Deliverer};
use crate::jobs::dry_run::{self, Counts, Would};
use crate::policies::Group;
use crate::store::{self, Store};

/// What is said of a job that plans nothing because of the clock.
const WAITS: &str = "waits: the clock cannot be believed";

/// What `run --once` did, or would do.
#[derive(Debug)]
pub struct OnceReport {
    /// Each job and what it did, in words.
    pub lines: Vec<(&'static str, String)>,
    /// The mail server refuses everybody: messages wait.
    pub mail_refused: bool,
    /// A guard kept messages back, or tokens from being marked expired.
    pub guarded: bool,
    /// Why nothing was expired and no reminder written, where the clock cannot be believed.
    pub wrong_clock: Option<String>,
    /// It was told to stop, and may have left something undone.
    pub stopped: bool,
}

/// Runs every job until nothing is due, one after the other, or until `stop` is cancelled: then what is in flight is
/// finished. A clock that shows an earlier time than the last pass was recorded at is not believed; one that leapt ahead
/// cannot be told from a pause between two runs.
///
/// # Errors
/// When the store fails.
pub async fn run_once<S: Store>(
    store: S,
    clock: Arc<SystemClock>,
    setup: Setup,
    stop: CancellationToken,
) -> store::Result<OnceReport> {
    let Setup { schedule, mut rules, retention, composer, transports, terms, http: _ } = setup;
    let watch = Watch::new(&rules, &schedule, clock.now());
    without_hold(&mut rules);
    let (_never_replaced, orders) = watch::channel(Arc::new(Orders { schedule, rules, retention }));
    let planner = Planner {
        store: store.clone(),
        clock: clock.clone(),
        orders,
        holder: Uuid::new_v4(),
        opened: Arc::default(),
        pulse: Pulse::new("once"),
        stop: stop.clone(),
        steady: Arc::default(),
        watch,
    };
    planner.started().await?;
    let mut lines = Vec::new();
    let mut guarded = false;
    let mut wrong_clock = None;
    for task in [Task::Expire, Task::Remind] {
        let waits = planner.clock_waits(task);
        // It records that it did nothing, and when: the next run finds the clock steady.
        let tally = planner.pass(task).await?;
        if let Some(waits) = waits {
            lines.push((task.name(), WAITS.to_owned()));
            wrong_clock = Some(waits.why);
            continue;
        }
        guarded |= tally.as_ref().is_some_and(Tally::was_guarded);
        lines.push((task.name(), in_words(tally)));
    }
    let mut deliverer = Deliverer::new(store, clock, composer, transports, terms, planner.holder);
    let delivered = deliver_all(&mut deliverer, &stop).await?;
    let mail_refused = deliverer.is_paused();
    let delivered = match (mail_refused, delivered == Delivered::default()) {
        (false, _) => delivered.to_string(),
        (true, true) => "waits: mail could not be handed over".to_owned(),
        (true, false) => format!("{delivered}; the rest waits: mail could not be handed over"),
    };
    lines.push((deliver::NAME, delivered));
    deliverer.close().await;
    lines.push((Task::Purge.name(), in_words(planner.pass(Task::Purge).await?)));
    Ok(OnceReport { lines, mail_refused, guarded, wrong_clock, stopped: stop.is_cancelled() })
}

/// What [`run_once`] would do now, without writing or sending anything: each of it goes to `visit`.
///
/// # Errors
/// When the store fails, or `visit` does.
pub async fn dry_run<S: Store>(
    store: &S,
    now: Timestamp,
    schedule: &Schedule,
    orders: dry_run::Orders<'_>,
    visit: impl AsyncFnMut(Would) -> anyhow::Result<()>,
) -> anyhow::Result<OnceReport> {
    let mut rules = orders.rules.clone();
    without_hold(&mut rules);
    let wrong_clock = believed(store, now).await?.err();
    let reconciles = reconcile_is_due(schedule, store.to_remind(now).await?.reconciled_at, now);
    let orders = dry_run::Orders { rules: &rules, plans: wrong_clock.is_none(), reconciles, ..orders };
    let Counts { expire, remind, deliver, purge, revives } = dry_run::dry_run(store, orders, now, visit).await?;
    let mut tallies = [Tally::default(), Tally::default(), Tally::default()];
    let planned = expire.is_some();
    tallies[0].expired(&expire.unwrap_or_default());
    tallies[1].reminded(&remind.unwrap_or_default());
    tallies[2].purged(&purge);
    let guarded = tallies.iter().any(Tally::was_guarded);
    let [mut expire, remind, purge] = tallies.map(|tally| tally.to_string());
    if revives {
        expire += "; and tokens that a wrong clock marked too early become active again, with what they then owe";
    }
    let planned = |line: String| if planned { line } else { WAITS.to_owned() };
    let lines = vec![
        (Task::Expire.name(), planned(expire)),
        (Task::Remind.name(), planned(remind)),
        (deliver::NAME, deliver.to_string()),
        (Task::Purge.name(), purge),
    ];
    Ok(OnceReport { lines, mail_refused: false, guarded, wrong_clock, stopped: false })
}

/// Everything is planned before the first mail goes out: there is nothing to wait for.
fn without_hold(rules: &mut Rules) {
    let at_once = |digest: &Digest| Digest { hold: TimeDelta::zero(), ..digest.clone() };
    rules.digest = at_once(&rules.digest);
    rules.groups = rules.groups.iter().map(|group| Group { digest: at_once(&group.digest), ..group.clone() }).collect();
}

/// What a pass did, in words.
fn in_words(tally: Option<Tally>) -> String {
    tally.map_or_else(|| "another process is at it".to_owned(), |tally| tally.to_string())
}

/// Delivers until nothing is due, and waits for the last of it. Stopped, or when the store fails, it begins nothing more and
/// finishes what is in flight.
async fn deliver_all<S: Store, C: Clock + Clone>(
    deliverer: &mut Deliverer<S, C>,
    stop: &CancellationToken,
) -> store::Result<Delivered> {
    let mut total = Delivered::default();
    let result = loop {
        if stop.is_cancelled() {
            tracing::info!("stopping: what is in flight is finished first");
            break Ok(());
        }
        match deliverer.step().instrument(deliver_span()).await {
            Ok(outcome) => {
                total += outcome.did;
                if outcome.more {
                    continue;
                }
            }
            Err(error) => break Err(error),
        }
        tokio::select! {
            () = stop.cancelled() => {}
            under_way = deliverer.wait() => if !under_way {
                return Ok(total);
            },
        }
    };
    match tokio::time::timeout(FINISH, deliverer.finish()).await {
        Ok(did) => total += did?,
        Err(_) => tracing::warn!("a message in flight took too long: its lease ends by itself"),
    }
    result.map(|()| total)
}

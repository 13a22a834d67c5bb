//! What a supervisor is told while the daemon runs: that its jobs go on (systemd's watchdog), and how things stand.
//!
//! Guarantees that one job that hangs silences the watchdog, whatever the others do, so that the process is started anew; and
//! that nothing which is waited for outside does: a mail server that takes its time, a schedule, an answer of the store for as
//! long as the store may take. Where no supervisor listens, nothing is asked of the store.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use sd_notify::NotifyState;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::clock::{Clock, SystemClock, Timestamp};
use crate::health::Health;
use crate::http::Hangs;
use crate::store::{self, Store};

/// How often the status is told anew.
const TELL: Duration = Duration::from_secs(30);

/// For how long a job is at one step that hangs, where no supervisor says: the `WatchdogSec=` of our unit.
const HANGS: Duration = Duration::from_secs(600);

/// How many mails that are due are counted at most: more are "more than".
const COUNTED: u32 = 1_000;

/// How much of an error or a complaint the status quotes, in characters.
const QUOTED: usize = 240;

/// What a job is at.
#[derive(Debug)]
pub(super) struct Pulse {
    job: &'static str,
    /// When the step began that it is at; `None` while it waits for something outside.
    since: Mutex<Option<Instant>>,
}

impl Pulse {
    /// The pulse of a job that waits.
    pub(super) fn new(job: &'static str) -> Arc<Self> {
        Arc::new(Self { job, since: Mutex::default() })
    }

    /// The job begins a step, which is to end.
    pub(super) fn works(&self) {
        self.set(Some(Instant::now()));
    }

    /// The job waits for something that may take as long as it likes.
    pub(super) fn rests(&self) {
        self.set(None);
    }

    fn set(&self, since: Option<Instant>) {
        *self.since.lock().unwrap_or_else(PoisonError::into_inner) = since;
    }

    /// For how long the job has been at one step.
    fn busy(&self, now: Instant) -> Duration {
        let since = *self.since.lock().unwrap_or_else(PoisonError::into_inner);
        since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }
}

/// The job that has been at one step for longer than that.
fn stuck(pulses: &[Arc<Pulse>], limit: Duration, now: Instant) -> Option<&'static str> {
    pulses.iter().find(|pulse| pulse.busy(now) > limit).map(|pulse| pulse.job)
}

/// Tells which job hangs, by the watchdog's interval or that of our unit.
pub(super) fn hangs(pulses: Vec<Arc<Pulse>>) -> Hangs {
    let limit = sd_notify::watchdog_enabled().unwrap_or(HANGS);
    Box::new(move || stuck(&pulses, limit, Instant::now()))
}

/// Feeds the supervisor's watchdog, where it has one, as long as no job has been at one step for longer than the watchdog's
/// own interval.
pub(super) async fn feed_watchdog(pulses: Vec<Arc<Pulse>>, stop: CancellationToken) {
    let Some(limit) = sd_notify::watchdog_enabled() else { return stop.cancelled().await };
    let mut was_stuck = None;
    loop {
        let is_stuck = stuck(&pulses, limit, Instant::now());
        match is_stuck {
            None => tell(|| sd_notify::notify(&[NotifyState::Watchdog])).await,
            Some(job) if was_stuck != is_stuck => {
                let seconds = limit.as_secs();
                tracing::error!(job, seconds, "the job hangs: the watchdog is not fed any more");
            }
            Some(_) => {}
        }
        was_stuck = is_stuck;
        // Often enough that one late call does not cost the process.
        if stop.run_until_cancelled(tokio::time::sleep(limit / 4)).await.is_none() {
            return;
        }
    }
}

/// Tells the supervisor now and then how things stand, and at once what is wrong with a new configuration.
pub(super) async fn tell_status<S: Store>(
    store: S,
    clock: Arc<SystemClock>,
    health: Arc<Health>,
    mut complaints: watch::Receiver<Option<String>>,
    stop: CancellationToken,
) {
    if std::env::var_os("NOTIFY_SOCKET").is_none() {
        return stop.cancelled().await;
    }
    loop {
        let status = match status(&store, &health, clock.now()).await {
            Ok(status) => status,
            Err(error) => quoted(&format!("the store cannot be asked: {error}")),
        };
        let complaint = complaints.borrow_and_update().clone();
        let status = complaint.map_or(status.clone(), |complaint| format!("{}; {status}", quoted(&complaint)));
        tell(move || sd_notify::notify(&[NotifyState::Status(&status)])).await;
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(TELL) => {}
            Ok(()) = complaints.changed() => {}
        }
    }
}

/// Tells the supervisor on a thread that may wait: one that does not listen must not hold up the jobs.
pub(super) async fn tell(notify: impl FnOnce() -> std::io::Result<()> + Send + 'static) {
    // Fails only where the supervisor has gone.
    let _ = tokio::task::spawn_blocking(notify).await;
}

async fn status<S: Store>(store: &S, health: &Health, now: Timestamp) -> store::Result<String> {
    let due = store.mails_due(now, COUNTED + 1).await?;
    let next = store.next_deadline(now).await?;
    let mut words = in_words(due, next, now);
    let recorded = store.job_records().await?.into_iter().filter_map(|record| Some((record.name, record.error?)));
    // A store that can be read and not written has no record of it.
    let ours = health.errors().into_iter().map(|(job, error)| (job.to_owned(), error));
    for (job, error) in recorded.chain(ours).collect::<BTreeMap<_, _>>() {
        // Writing to a String does not fail.
        let _ = write!(words, "; {job}: {}", quoted(&error));
    }
    Ok(words)
}

/// "3 mails due, next deadline 14:02 UTC".
fn in_words(due: u32, next: Option<Timestamp>, now: Timestamp) -> String {
    let due = match due {
        0 => "no mail due".to_owned(),
        1 => "1 mail due".to_owned(),
        due if due > COUNTED => format!("more than {COUNTED} mails due"),
        due => format!("{due} mails due"),
    };
    let next = match next {
        None => "no deadline ahead".to_owned(),
        Some(at) if at.date_naive() == now.date_naive() => format!("next deadline {}", at.format("%H:%M UTC")),
        Some(at) => format!("next deadline {}", at.format("%Y-%m-%d %H:%M UTC")),
    };
    format!("{due}, {next}")
}

/// One line, and not endless.
fn quoted(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(QUOTED).collect()
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;
    use crate::config::Schedule;
    use crate::schedule::Cron;

    #[test]
    fn a_job_that_hangs_is_seen_among_those_that_wait_or_go_on() {
        let pulses = [Pulse::new("expire"), Pulse::new("remind"), Pulse::new("deliver")];
        let [expire, remind, deliver] = &pulses;
        let limit = Duration::from_secs(600);
        let later = |pulse: &Arc<Pulse>, seconds| {
            pulse.works();
            stuck(&pulses, limit, Instant::now() + Duration::from_secs(seconds))
        };
        assert_eq!(stuck(&pulses, Duration::ZERO, Instant::now()), None, "all wait");
        assert_eq!(later(expire, 590), None);
        assert_eq!(later(remind, 610), Some("expire"));
        expire.rests();
        remind.rests();
        assert_eq!(later(deliver, 610), Some("deliver"));
        deliver.works();
        assert_eq!(stuck(&pulses, limit, Instant::now()), None, "the next step has begun");
    }

    #[test]
    fn the_status_is_in_words() {
        let at = |seconds: i64| DateTime::from_timestamp(1_800_000_000 + seconds, 0).expect("in range");
        assert_eq!(in_words(0, None, at(0)), "no mail due, no deadline ahead");
        assert_eq!(in_words(1, Some(at(3_600)), at(0)), "1 mail due, next deadline 09:00 UTC");
        assert_eq!(in_words(3, Some(at(86_400)), at(0)), "3 mails due, next deadline 2027-01-16 08:00 UTC");
        assert_eq!(in_words(1_001, None, at(0)), "more than 1000 mails due, no deadline ahead");
    }

    #[tokio::test]
    async fn an_error_that_could_not_be_recorded_is_told() {
        let directory = tempfile::tempdir().expect("a directory");
        let url = format!("sqlite:{}", directory.path().join("lapsed.db").display());
        let store = store::Sqlite::open(&url).await.expect("a store");
        let cron = Cron::parse("* * * * *", chrono_tz::UTC).expect("a schedule");
        let [expire, remind, deliver, purge, reconcile] = [(); 5].map(|()| cron.clone());
        let now = DateTime::from_timestamp(1_800_000_000, 0).expect("in range");
        let health = Health::new(Schedule { expire, remind, deliver, purge, reconcile }, now);
        health.ended("expire", Some("somebody else is writing\nfor minutes".into()));
        let said = status(&store, &health, now).await.expect("the store answers");
        assert_eq!(said, "no mail due, no deadline ahead; expire: somebody else is writing for minutes");
        health.ended("expire", None);
        assert_eq!(status(&store, &health, now).await.expect("the store answers"), "no mail due, no deadline ahead");
        store.close().await;
    }
}

//! What operators see in Prometheus: what the jobs did, and how things stand.
//!
//! Guarantees that no label holds an owner, a token, a contact or an address: labels are words of this program, the names of
//! jobs, and lead times. Counters count what this process did since it started; several daemons of one store add up. What
//! stands in the store (tokens, messages that wait, coverage) is what somebody set here last: reading the metrics asks the
//! store nothing.

use std::borrow::Cow;
use std::time::Duration;

use chrono::TimeDelta;
use prometheus_client::encoding::{prometheus_text, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

use crate::clock::Timestamp;
use crate::jobs::deliver::{Delivered, Details};
use crate::policy::Lead;
use crate::store::accounts::{ReminderState, TokenCounts};
use crate::store::outbox::Waiting;
use crate::store::planning::{Reminded, Written};

/// The bounds of how late tokens were marked, in seconds: the schedule looks every few seconds; whoever sees minutes was down.
const LAGS: [f64; 10] = [1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 3_600.0, 21_600.0, 86_400.0];

/// The bounds of how long passes took, in seconds: from a probe of an index to a million rows.
const DURATIONS: [f64; 10] = [0.002, 0.01, 0.05, 0.2, 1.0, 5.0, 20.0, 60.0, 300.0, 1_800.0];

/// States that a reminder can be written in or come to.
const STATES: [ReminderState; 7] = [
    ReminderState::Pending,
    ReminderState::Sent,
    ReminderState::Superseded,
    ReminderState::Cancelled,
    ReminderState::Unreachable,
    ReminderState::Stale,
    ReminderState::Failed,
];

/// The form in which metrics are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exposition {
    /// OpenMetrics 1.0.
    OpenMetrics,
    /// The text format of Prometheus, 0.0.4.
    Prometheus,
}

/// One label and its value.
type Label = [(&'static str, &'static str); 1];

/// A gauge that is absent until it is set.
type Known<N, A> = Family<[(&'static str, &'static str); 0], Gauge<N, A>>;
type Seconds = Known<f64, std::sync::atomic::AtomicU64>;

/// The metrics of one process.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    tokens: Family<Label, Gauge>,
    suppressed: Known<i64, std::sync::atomic::AtomicI64>,
    expired: Counter,
    lag: Histogram,
    reminders: Family<[(&'static str, Cow<'static, str>); 2], Counter>,
    messages: Family<Label, Counter>,
    outbox: Family<Label, Gauge>,
    oldest: Seconds,
    duration: Family<Label, Histogram, fn() -> Histogram>,
    success: Family<Label, Gauge>,
    overdue: Family<Label, Gauge>,
    replies: Family<Label, Counter>,
    coverage: Seconds,
    counted: Family<Label, Gauge>,
}

impl Metrics {
    /// Metrics that begin at zero, for reminders at these leads and others that come.
    pub fn new(leads: &[Lead]) -> Self {
        let metrics = Self {
            registry: Registry::with_prefix("lapsed"),
            tokens: Family::default(),
            suppressed: Family::default(),
            expired: Counter::default(),
            lag: Histogram::new(LAGS),
            reminders: Family::default(),
            messages: Family::default(),
            outbox: Family::default(),
            oldest: Family::default(),
            duration: Family::new_with_constructor(|| Histogram::new(DURATIONS)),
            success: Family::default(),
            overdue: Family::default(),
            replies: Family::default(),
            coverage: Family::default(),
            counted: Family::default(),
        };
        metrics.follow(leads);
        metrics.delivered(&Delivered::default(), &Details::default());
        metrics.registered()
    }

    /// There are reminders at these leads from now on; what was counted of others stays.
    pub fn follow(&self, leads: &[Lead]) {
        // What has not happened yet is 0, and not unknown: the first failure is an increase.
        for lead in leads.iter().chain([&Lead::EXPIRED]) {
            STATES.iter().for_each(|state| self.count_reminders(*lead, *state, 0));
        }
    }

    fn registered(mut self) -> Self {
        let r = &mut self.registry;
        r.register("build", "The version of this program", Info::new([("version", env!("CARGO_PKG_VERSION"))]));
        r.register("tokens", "Tokens in the store, by status", self.tokens.clone());
        let help = "Contacts that get no mail, because a mail server refused their address for good";
        r.register("suppressed_contacts", help, self.suppressed.clone());
        r.register("expired", "Tokens that were marked as expired", self.expired.clone());
        let help = "From a token's deadline until it was marked as expired; it is refused from its deadline on";
        r.register_with_unit("expiry_lag", help, Unit::Seconds, self.lag.clone());
        let help = "Reminders that came to a state, by how long before the deadline they are owed";
        r.register("reminders", help, self.reminders.clone());
        r.register("messages", "Attempts to deliver a message, by what came of it", self.messages.clone());
        r.register("outbox_messages", "Messages that wait, by state", self.outbox.clone());
        let help = "For how long the oldest message has been waiting; 0 where none waits";
        r.register_with_unit("outbox_oldest", help, Unit::Seconds, self.oldest.clone());
        r.register_with_unit("job_duration", "How long passes of a job took", Unit::Seconds, self.duration.clone());
        let help = "When a pass of a job last came to a good end, in whichever process";
        r.register_with_unit("job_last_success_timestamp", help, Unit::Seconds, self.success.clone());
        let help = "Since when a job has been due by its schedule without coming to a good end; 0 where it is on time";
        r.register_with_unit("job_overdue", help, Unit::Seconds, self.overdue.clone());
        let help = "What mail servers answered, by class; none: nothing that can be understood";
        r.register("smtp_reply", help, self.replies.clone());
        let help =
            "Of the tokens that expired within 30 days and were owed a reminder, those whose owner had one in time";
        r.register_with_unit("coverage", help, Unit::Other("ratio".to_owned()), self.coverage.clone());
        let help = "When the gauges about the store were counted last";
        r.register_with_unit("counted_timestamp", help, Unit::Seconds, self.counted.clone());
        self
    }

    /// Everything, as it is now.
    pub fn text(&self, exposition: Exposition) -> String {
        let mut text = String::new();
        // Writing to a String does not fail.
        let _ = match exposition {
            Exposition::OpenMetrics => text::encode(&mut text, &self.registry),
            Exposition::Prometheus => prometheus_text::encode(&mut text, &self.registry),
        };
        text
    }

    /// What a step of `expire` or `remind` wrote.
    pub fn planned(&self, written: &Written) {
        self.expired.inc_by(written.lags.len() as u64);
        written.lags.iter().for_each(|lag| self.lag.observe(seconds(*lag)));
        self.reminded(&written.reminded);
    }

    /// What a step of `deliver` did.
    pub fn delivered(&self, did: &Delivered, details: &Details) {
        let Delivered { sent, retried, unknown, failed, cancelled, put_off, lost } = *did;
        for (outcome, count) in [
            ("sent", sent),
            ("retry", retried.saturating_sub(unknown)),
            ("unknown", unknown),
            ("failed", failed),
            ("cancelled", cancelled),
            ("put_off", put_off),
            ("lost", lost),
        ] {
            self.messages.get_or_create(&[("outcome", outcome)]).inc_by(count);
        }
        let replies = &details.replies;
        for (class, count) in
            [("2xx", replies.accepted), ("4xx", replies.temporary), ("5xx", replies.permanent), ("none", replies.none)]
        {
            self.replies.get_or_create(&[("class", class)]).inc_by(count);
        }
        self.reminded(&details.reminded);
    }

    /// A pass of a job took so long.
    pub fn pass(&self, job: &'static str, took: Duration) {
        self.duration.get_or_create(&[("job", job)]).observe(took.as_secs_f64());
    }

    /// How a job keeps to its schedule: its last good end, and since when another one has been due.
    pub fn job(&self, job: &'static str, success: Option<Timestamp>, overdue: TimeDelta) {
        if let Some(success) = success {
            self.success.get_or_create(&[("job", job)]).set(success.timestamp());
        }
        self.overdue.get_or_create(&[("job", job)]).set(overdue.num_seconds().max(0));
    }

    /// The messages that wait.
    pub fn waiting(&self, waiting: &Waiting, now: Timestamp) {
        let Waiting { open, held, sending, retry, oldest } = waiting;
        for (state, count) in [("open", open), ("held", held), ("sending", sending), ("retry", retry)] {
            self.outbox.get_or_create(&[("state", state)]).set(gauge(*count));
        }
        let oldest = oldest.map_or(TimeDelta::zero(), |oldest| (now - oldest).max(TimeDelta::zero()));
        self.oldest.get_or_create(&[]).set(seconds(oldest));
        self.counted("outbox", now);
    }

    /// The tokens in the store, and the contacts that get no mail.
    pub fn stored(&self, tokens: TokenCounts, suppressed: u64, now: Timestamp) {
        let TokenCounts { active, past_deadline, expired, revoked } = tokens;
        for (status, count) in
            [("active", active), ("past_deadline", past_deadline), ("expired", expired), ("revoked", revoked)]
        {
            self.tokens.get_or_create(&[("status", status)]).set(gauge(count));
        }
        self.suppressed.get_or_create(&[]).set(gauge(suppressed));
        self.counted("tokens", now);
    }

    /// Of so many tokens that were owed a reminder, the owners of so many had one in time.
    pub fn coverage(&self, covered: u64, owed: u64, now: Timestamp) {
        // Where nothing was owed, nobody was left out.
        let ratio = if owed == 0 { 1.0 } else { covered as f64 / owed as f64 };
        self.coverage.get_or_create(&[]).set(ratio);
        self.counted("coverage", now);
    }

    fn counted(&self, what: &'static str, now: Timestamp) {
        self.counted.get_or_create(&[("what", what)]).set(now.timestamp());
    }

    fn reminded(&self, reminded: &Reminded) {
        reminded.iter().for_each(|(lead, state, count)| self.count_reminders(lead, state, count));
    }

    fn count_reminders(&self, lead: Lead, state: ReminderState, count: u64) {
        let labels = [("lead", Cow::Owned(lead.to_string())), ("state", Cow::Borrowed(state.as_str()))];
        self.reminders.get_or_create(&labels).inc_by(count);
    }
}

fn gauge(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// Never below zero: a clock may have gone back meanwhile.
fn seconds(span: TimeDelta) -> f64 {
    span.num_seconds().max(0) as f64
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;
    use crate::jobs::deliver::Replies;

    fn line<'t>(text: &'t str, name: &str) -> &'t str {
        text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name} in\n{text}"))
    }

    #[test]
    fn what_jobs_report_adds_up() {
        let metrics = Metrics::new(&[Lead::new(TimeDelta::days(7))]);
        let before = metrics.text(Exposition::OpenMetrics);
        assert_eq!(
            line(&before, "lapsed_messages_total{outcome=\"failed\"}"),
            "lapsed_messages_total{outcome=\"failed\"} 0"
        );
        assert!(before.contains("lapsed_reminders_total{lead=\"7d\",state=\"failed\"} 0\n"), "{before}");
        assert!(!before.contains("\nlapsed_coverage_ratio "), "nobody has counted yet: {before}");

        let mut reminded = Reminded::default();
        reminded.add(Lead::EXPIRED, ReminderState::Pending);
        let lags = vec![TimeDelta::seconds(3), TimeDelta::seconds(-1)];
        metrics.planned(&Written { reminded: reminded.clone(), lags, ..Written::default() });
        let replies = Replies { permanent: 1, ..Replies::default() };
        metrics
            .delivered(&Delivered { retried: 3, unknown: 1, ..Delivered::default() }, &Details { reminded, replies });
        metrics.pass("expire", Duration::from_millis(3));
        let now = DateTime::from_timestamp(1_800_000_000, 0).expect("in range");
        metrics.coverage(2, 3, now);
        metrics.waiting(&Waiting { held: 4, oldest: Some(now - TimeDelta::hours(1)), ..Waiting::default() }, now);
        metrics.job("purge", Some(now), TimeDelta::seconds(-5));
        let text = metrics.text(Exposition::OpenMetrics);
        for wanted in [
            "lapsed_expired_total 2",
            "lapsed_expiry_lag_seconds_bucket{le=\"1.0\"} 1",
            "lapsed_expiry_lag_seconds_bucket{le=\"5.0\"} 2",
            "lapsed_reminders_total{lead=\"expired\",state=\"pending\"} 2",
            "lapsed_messages_total{outcome=\"retry\"} 2",
            "lapsed_messages_total{outcome=\"unknown\"} 1",
            "lapsed_smtp_reply_total{class=\"5xx\"} 1",
            "lapsed_job_duration_seconds_count{job=\"expire\"} 1",
            "lapsed_outbox_messages{state=\"held\"} 4",
            "lapsed_outbox_oldest_seconds 3600.0",
            "lapsed_job_last_success_timestamp_seconds{job=\"purge\"} 1800000000",
            "lapsed_job_overdue_seconds{job=\"purge\"} 0",
            "# UNIT lapsed_coverage_ratio ratio",
        ] {
            assert!(text.lines().any(|line| line == wanted), "{wanted} in\n{text}");
        }
        assert!(line(&text, "lapsed_coverage_ratio ").starts_with("lapsed_coverage_ratio 0.66"), "{text}");
        assert!(text.ends_with("# EOF\n"), "{text}");
        assert!(!metrics.text(Exposition::Prometheus).contains("# EOF"));
    }

    #[test]
    fn where_nothing_was_owed_nobody_was_left_out() {
        let metrics = Metrics::new(&[]);
        metrics.coverage(0, 0, DateTime::UNIX_EPOCH);
        assert_eq!(line(&metrics.text(Exposition::OpenMetrics), "lapsed_coverage_ratio"), "lapsed_coverage_ratio 1.0");
    }
}

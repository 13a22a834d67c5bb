//! `lapsed status`: does it do its job?

use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::{Outcome, output};
use crate::clock::{Clock, Timestamp};
use crate::policy::Lead;
use crate::store::Store;
use crate::store::accounts::TokenCounts;
use crate::store::jobs::JobRecord;
use crate::store::outbox::MessageState;

/// How the status is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Format {
    /// For people
    #[default]
    Table,
    /// One JSON object
    Json,
}

/// `lapsed status`
#[derive(Debug, Args)]
pub struct Status {
    /// How to write it
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

impl Status {
    pub(super) async fn run<S: Store>(self, store: &S, clock: &impl Clock) -> Outcome {
        let now = clock.now();
        let tokens = named(store.token_counts(now).await?);
        let messages = store.message_counts().await?;
        let oldest = store.oldest_waiting().await?.filter(|since| *since <= now);
        let last_sent = store.last_sent().await?;
        let jobs = store.job_records().await?;
        // Not that of the deadlines themselves, which is only where `expire` goes on.
        let mut watermarks: Vec<_> =
            store.watermarks().await?.into_iter().filter(|(lead, _)| *lead != Lead::EXPIRED).collect();
        watermarks.sort_by_key(|(lead, _)| std::cmp::Reverse(*lead));
        if self.format == Format::Json {
            let tokens: serde_json::Map<String, Value> =
                tokens.iter().map(|(name, _, count)| ((*name).to_owned(), (*count).into())).collect();
            let messages: serde_json::Map<String, Value> =
                messages.iter().map(|(state, count)| (state.to_string(), (*count).into())).collect();
            let watermarks: serde_json::Map<String, Value> =
                watermarks.iter().map(|(lead, mark)| (lead.to_string(), text(Some(mark.instant)))).collect();
            let jobs: Vec<Value> = jobs.iter().map(job).collect();
            let status = json!({
                "tokens": tokens,
                "messages": messages,
                "oldest_waiting_since": text(oldest),
                "last_sent_at": text(last_sent),
                "watermarks": watermarks,
                "jobs": jobs,
            });
            output::print(&format!("{status}\n"))?;
            return Ok(());
        }
        let counts = |counts: Vec<(String, u64)>| {
            let words: Vec<String> = counts.iter().map(|(what, count)| format!("{count} {what}")).collect();
            if words.is_empty() { "none".to_owned() } else { words.join(", ") }
        };
        let waiting: u64 = messages.iter().filter(|(state, _)| is_waiting(*state)).map(|(_, count)| count).sum();
        let mut rows = vec![
            ("tokens", counts(tokens.iter().map(|(_, words, count)| ((*words).to_owned(), *count)).collect())),
            ("messages", counts(messages.iter().map(|(state, count)| (state.to_string(), *count)).collect())),
            ("waiting", waiting.to_string()),
        ];
        if let Some(oldest) = oldest {
            rows.push(("the oldest since", ago(oldest, now)));
        }
        if let Some((_, held)) = messages.iter().find(|(state, _)| *state == MessageState::Held) {
            rows.push(("held", format!("{held}, by a guard: `lapsed outbox list --state held`")));
        }
        if let Some(last_sent) = last_sent {
            rows.push(("last sent", ago(last_sent, now)));
        }
        for (lead, mark) in &watermarks {
            rows.push(("reminders done", format!("{lead} lead, up to what was due {}", ago(mark.instant, now))));
        }
        let mut text = output::facts(&rows);
        text.push('\n');
        if jobs.is_empty() {
            text.push_str("No job has run yet: `lapsed run` starts them.\n");
        } else {
            let rows = jobs.iter().map(|job| cells(job, now)).collect();
            text.push_str(&output::table(&["JOB", "LAST START", "FINISHED", "LEASE", "RESULT"], rows));
        }
        output::print(&text)?;
        Ok(())
    }
}

/// The counts that are not 0: for programs, for people, and how many.
pub(super) fn named(tokens: TokenCounts) -> Vec<(&'static str, &'static str, u64)> {
    let TokenCounts { active, past_deadline, expired, revoked } = tokens;
    let mut named = vec![
        ("active", "active", active),
        ("past_deadline", "past their deadline and not yet marked", past_deadline),
        ("expired", "expired", expired),
        ("revoked", "revoked", revoked),
    ];
    named.retain(|(.., count)| *count > 0);
    named
}

fn is_waiting(state: MessageState) -> bool {
    matches!(state, MessageState::Open | MessageState::Held | MessageState::Sending | MessageState::Retry)
}

fn text(at: Option<Timestamp>) -> Value {
    super::listing::instant(at)
}

fn job(record: &JobRecord) -> Value {
    json!({
        "name": record.name,
        "started_at": text(Some(record.started_at)),
        "finished_at": text(record.finished_at),
        "lease_until": text(Some(record.lease_until)),
        "error": record.error,
        "report": record.report,
    })
}

fn cells(record: &JobRecord, now: Timestamp) -> Vec<String> {
    let finished = record.finished_at.filter(|finished| *finished >= record.started_at);
    let lease = if record.lease_until > now { "held" } else { "free" };
    let result = match (&record.error, &record.report) {
        (Some(error), _) => format!("failed: {error}"),
        (None, Some(report)) => report.clone(),
        (None, None) => String::new(),
    };
    vec![
        record.name.clone(),
        ago(record.started_at, now),
        finished.map_or_else(|| "not yet".to_owned(), |finished| ago(finished, now)),
        lease.to_owned(),
        result,
    ]
}

/// "12 s ago", "3 h ago": the largest unit that leaves at least two.
fn ago(at: Timestamp, now: Timestamp) -> String {
    let seconds = (now - at).num_seconds();
    let (count, unit) = match seconds.abs() {
        s if s >= 2 * 86_400 => (s / 86_400, "days"),
        s if s >= 2 * 3_600 => (s / 3_600, "h"),
        s if s >= 120 => (s / 60, "min"),
        s => (s, "s"),
    };
    if seconds >= 0 { format!("{count} {unit} ago") } else { format!("in {count} {unit}") }
}

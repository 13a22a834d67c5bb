//! `lapsed demo`: a newcomer's first minute.
//!
//! A new store in a new directory, a handful of owners, deadlines that lie seconds to a minute ahead, and the real daemon
//! at work on them. What is narrated is read back from the store, five times a second; nothing is scripted but what the
//! owners themselves do: one of them verifies a token again and again, and one rotates a token in time.

mod narrator;
mod seed;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use chrono::TimeDelta;
use clap::Args;
use tokio_util::sync::CancellationToken;

use super::{Outcome, output, status};
use crate::change;
use crate::clock::{Clock, SystemClock, Timestamp};
use crate::config::{self, Limit};
use crate::digest::Digest;
use crate::jobs::Rules;
use crate::jobs::deliver::{self, Terms};
use crate::jobs::guard::Guard;
use crate::jobs::purge::Retention;
use crate::mail::compose::Composer;
use crate::mail::maildir::Maildir;
use crate::mail::smtp::Smtp;
use crate::mail::transport::Transport;
use crate::policy::{Lead, Policy};
use crate::schedule::Cron;
use crate::service::{self, Setup};
use crate::store::{Accounts, Jobs, Outbox, Sqlite, Store};
use crate::telemetry;
use crate::token::{Address, NotValid, Secret};
use narrator::Narrator;
use seed::Cast;

/// The lead times of the demo, in seconds.
const LEADS: [i64; 2] = [30, 10];

/// How long a message waits for more to say.
const HOLD: TimeDelta = TimeDelta::seconds(3);

/// How often the store is read.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// When everything that the seed makes has happened, and when the demo ends whatever has.
const LENGTH: (TimeDelta, TimeDelta) = (TimeDelta::seconds(58), TimeDelta::seconds(90));

/// `lapsed demo`
#[derive(Debug, Args)]
pub struct Demo {
    /// Send the mails to this server, without encryption, in the place of writing them to a directory
    #[arg(long, value_name = "HOST:PORT", value_parser = server)]
    smtp: Option<config::Relay>,
}

fn server(text: &str) -> Result<config::Relay, String> {
    let parsed = text.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse().ok()?)));
    let (host, port) = parsed.filter(|(host, _)| !host.is_empty()).ok_or("write HOST:PORT, such as localhost:1025")?;
    let host = host.trim_matches(['[', ']']).to_owned();
    Ok(config::Relay { host, port })
}

impl Demo {
    pub(super) async fn run(self) -> Outcome {
        telemetry::init("warn", config::LogFormat::Text);
        let directory = tempfile::Builder::new().prefix("lapsed-demo-").tempdir()?.keep();
        let mailbox = directory.join("Maildir");
        let url = format!("sqlite:{}", directory.join("lapsed.db").display());
        let store = Sqlite::open(&url).await?;
        let clock = Arc::new(SystemClock::default());
        let to = self.smtp.as_ref().map(ToString::to_string);
        introduce(&directory, to.as_deref().unwrap_or(&mailbox.display().to_string()))?;
        let transport = match self.smtp {
            Some(relay) => Transport::Smtp(Box::new(Smtp::new(config::Smtp::plain(relay.host, relay.port)))),
            None => Transport::Maildir(Maildir::new(mailbox.clone())),
        };

        let begin = clock.now();
        let cast = seed::seed(&store, begin).await?;
        let setup = setup(&store, begin, transport).await?;
        let stop = CancellationToken::new();
        service::stop_on_signals(&stop)?;
        let daemon = tokio::spawn(service::run(store.clone(), clock.clone(), setup, None, stop.clone()));

        let told = narrate(&store, &clock, &cast, begin, &stop).await;
        let interrupted = stop.is_cancelled();
        stop.cancel();
        daemon.await.context("the daemon panicked")??;
        let narrator = told?;
        if interrupted {
            output::say("\nInterrupted; the daemon stopped in good order.");
        } else if to.is_none() {
            show_a_mail(&mailbox, &narrator)?;
        }
        sum_up(&store, &narrator, clock.now()).await?;
        let unsent =
            store.job_records().await?.into_iter().find(|job| job.name == deliver::NAME).and_then(|job| job.error);
        store.close().await;
        if !interrupted {
            say_what_next(&url)?;
        }
        output::say(&format!("The directory stays until you remove it: {}", directory.display()));
        match unsent {
            Some(why) => Err(anyhow::anyhow!("not every mail could be sent: {why}").into()),
            None => Ok(()),
        }
    }
}

fn introduce(directory: &Path, mails: &str) -> anyhow::Result<()> {
    output::print(&format!(
        "lapsed watches API tokens: it reminds their owners before a deadline, and refuses them from it on.\n\
         This is the real daemon on a new store, with lead times of 30 and 10 seconds in the place of days.\n\n\
         store  {}\n\
         mails  {mails}\n\n",
        directory.join("lapsed.db").display(),
    ))
}

async fn setup(store: &Sqlite, now: Timestamp, transport: Transport) -> anyhow::Result<Setup> {
    let every_second = Cron::parse("* * * * * *", chrono_tz::UTC).map_err(anyhow::Error::msg)?;
    let fallback = store.set_fallback(Some(&Address::parse("ops@example.org")?), now).await?;
    let policy = Policy::new(LEADS.map(Lead::from_seconds), true, TimeDelta::days(7));
    let year = TimeDelta::days(365);
    Ok(Setup {
        schedule: config::Schedule {
            expire: every_second.clone(),
            remind: every_second.clone(),
            deliver: every_second.clone(),
            purge: every_second.clone(),
            reconcile: Cron::parse("0 47 2 * * *", chrono_tz::UTC).map_err(anyhow::Error::msg)?,
        },
        rules: Rules {
            policy: policy.clone(),
            digest: Digest::holding(HOLD),
            groups: Arc::from([]),
            skip_unused: false,
            fallback,
            batch: 100,
            guard: Guard::new(Limit::None, Limit::None),
        },
        terms: Terms {
            fallback,
            give_up_after: TimeDelta::days(2),
            every: Duration::ZERO,
            idle: Duration::MAX,
            groups: Arc::from([]),
            policy,
            digest: Digest::holding(HOLD),
        },
        retention: Retention { reminders: year, messages: year, ended_tokens: year },
        composer: Composer::new(
            "Token service <tokens@example.org>".parse()?,
            None,
            Some("https://example.org/t/{token_id}".into()),
        )?,
        transports: vec![transport],
        http: None,
    })
}

async fn narrate(
    store: &Sqlite,
    clock: &SystemClock,
    cast: &Cast,
    begin: Timestamp,
    stop: &CancellationToken,
) -> anyhow::Result<Narrator> {
    let mut narrator = Narrator::new(begin);
    let tokens = cast.tokens();
    let text =
        format!("{} tokens of {} owners; deadlines in 22 seconds to a year, or never", tokens.len(), cast.owners);
    narrator.line(begin, "seeded", &text)?;
    let mut verdict = None;
    let mut rotated = false;
    while !stop.is_cancelled() {
        let now = clock.now();
        narrator.look(store, now).await?;
        let said = verify(store, &cast.verified, now).await?;
        if verdict != Some(said) {
            narrator.verified(now, &cast.verified_name, said)?;
            verdict = Some(said);
        }
        if !rotated && narrator.is_pending(cast.rotated, LEADS[1]) {
            // The successor's deadline is not part of the story.
            let later = Some(Some(now + TimeDelta::days(90)));
            let change = store.change_token(cast.rotated, |token| change::rotate(token, TimeDelta::zero(), later, now));
            change.await?;
            narrator.rotated(now, &cast.rotated_name)?;
            rotated = true;
        }
        let passed = now - begin;
        if passed > LENGTH.1 || (passed > LENGTH.0 && narrator.is_quiet()) {
            break;
        }
        stop.run_until_cancelled(tokio::time::sleep(LOOK_EVERY)).await;
    }
    Ok(narrator)
}

/// What `lapsed token verify` does.
async fn verify(store: &Sqlite, secret: &Secret, now: Timestamp) -> anyhow::Result<Result<(), NotValid>> {
    let token = store.token_by_secret(secret.bucket(), &secret.hash()).await?;
    Ok(token.map_or(Err(NotValid::Unknown), |token| token.validity(now)))
}

/// Prints the first mail that speaks of several tokens, without what follows its text.
fn show_a_mail(mailbox: &Path, narrator: &Narrator) -> anyhow::Result<()> {
    let Some(message) = narrator.first_digest() else { return Ok(()) };
    let mut found: Option<PathBuf> = None;
    for entry in std::fs::read_dir(mailbox.join("new"))? {
        let path = entry?.path();
        if path.to_string_lossy().contains(&message.to_string()) {
            found = Some(path);
        }
    }
    let Some(path) = found else { return Ok(()) };
    let mail = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let lines: Vec<&str> = mail.lines().collect();
    let html = lines.iter().position(|line| line.to_ascii_lowercase().starts_with("content-type: text/html"));
    let shown = html.map_or(lines.len(), |at| at.saturating_sub(1));
    let mut text = String::from("\nOne of the mails, as it was written");
    if html.is_some() {
        text += &format!(" (its HTML and its calendar file, {} more lines, are in the file)", lines.len() - shown);
    }
    text += &format!(":\n{}\n\n", path.display());
    for line in lines.iter().take(shown) {
        text += &format!("  {line}\n");
    }
    output::print(&text)
}

async fn sum_up(store: &Sqlite, narrator: &Narrator, now: Timestamp) -> anyhow::Result<()> {
    let tokens = status::named(store.token_counts(now).await?);
    let tokens = tokens.into_iter().map(|(_, words, count)| (words.to_owned(), count)).collect();
    let words = |counts: Vec<(String, u64)>| {
        let words: Vec<String> = counts.iter().map(|(what, count)| format!("{count} {what}")).collect();
        if words.is_empty() { "none".to_owned() } else { words.join(", ") }
    };
    let messages = store.message_counts().await?.into_iter().map(|(state, count)| (state.to_string(), count)).collect();
    let rows =
        [("tokens", words(tokens)), ("reminders", words(narrator.reminder_counts())), ("messages", words(messages))];
    output::print(&format!("\nIn the store now:\n{}", output::facts(&rows)))
}

/// How this program can be called again from here.
fn program() -> String {
    let called = std::env::args_os().next().map(PathBuf::from).unwrap_or_default();
    if called.components().count() > 1 { called.display().to_string() } else { "lapsed".to_owned() }
}

fn say_what_next(url: &str) -> anyhow::Result<()> {
    let program = program();
    output::print(&format!(
        "\nLook around in it:\n\
         \x20 export LAPSED__STORE__URL={url}\n\
         \x20 {program} token list\n\
         \x20 {program} token show ID\n\
         Then make your own (without that variable, the store is lapsed.db here):\n\
         \x20 {program} owner add alice --email alice@example.org\n\
         \x20 {program} token create --owner alice --description 'deploy key' --expires 90d\n",
    ))
}

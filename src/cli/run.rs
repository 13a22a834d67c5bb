//! `lapsed run`

use std::sync::Arc;
use std::time::Duration;

use chrono::TimeDelta;
use clap::Args;
use tokio_util::sync::CancellationToken;

use super::{Failure, Outcome, bounce, output};
use crate::clock::{Clock, SystemClock};
use crate::config::{self, Settings};
use crate::http;
use crate::jobs::Rules;
use crate::jobs::deliver::Terms;
use crate::jobs::guard::Guard;
use crate::jobs::purge::Retention;
use crate::mail::maildir::Maildir;
use crate::mail::smtp::Smtp;
use crate::mail::transport::Transport;
use crate::policy::{Lead, Policy};
use crate::service::{self, Setup};
use crate::store::Store;
use crate::token::Address;

/// How long a message waits, once opened, for what the same pass still has to say.
const HOLD: TimeDelta = TimeDelta::seconds(10);

/// `lapsed run`
#[derive(Debug, Args)]
pub struct Run {
    /// Do everything that is due now, then exit
    #[arg(long)]
    once: bool,
}

impl Run {
    pub(super) async fn run<S: Store>(self, store: S, clock: Arc<SystemClock>, settings: &Settings) -> Outcome {
        let setup = setup(&store, &*clock, settings).await?;
        let leads: Vec<String> = setup.rules.policy.leads().iter().map(Lead::to_string).collect();
        tracing::info!(store = %settings.store.url, leads = leads.join(" "), "the store is open");
        if !self.once {
            let setup = Setup { http: http::listen(settings.http.listen)?, ..setup };
            let stop = CancellationToken::new();
            service::stop_on_signals(&stop)?;
            service::run(store, clock, setup, stop).await?;
            return Ok(());
        }
        let report = service::run_once(store, clock, setup).await?;
        let rows: Vec<_> = report.lines.into_iter().collect();
        output::print(&output::facts(&rows))?;
        if report.mail_refused {
            let problem = "the mail server could not be used: messages wait in the store for the next run";
            return Err(Failure::Failed(anyhow::anyhow!(problem)));
        }
        if report.guarded {
            let problem = "a guard kept something back: `lapsed status` says what, and the [guard] section of the \
                           configuration by which limits";
            return Err(Failure::Failed(anyhow::anyhow!(problem)));
        }
        Ok(())
    }
}

async fn setup<S: Store>(store: &S, clock: &impl Clock, settings: &Settings) -> Result<Setup, Failure> {
    let usage = |problem: &dyn std::fmt::Display| Failure::Usage(problem.to_string());
    let (transport, _) = settings.require_mail().map_err(|error| usage(&error))?;
    let mail = &settings.mail;
    let return_path = mail.bounce.as_ref().map(bounce::return_path).transpose()?;
    let composer = super::mail::composer(settings)?.with_return_path(return_path);
    let (transports, every, idle) = match transport {
        config::Transport::Maildir { path } => {
            (vec![Transport::Maildir(Maildir::new(path.clone()))], Duration::ZERO, Duration::MAX)
        }
        config::Transport::Smtp(smtp) => {
            let sessions = Smtp::sessions(*smtp.clone()).into_iter();
            (sessions.map(|session| Transport::Smtp(Box::new(session))).collect(), smtp.every, smtp.idle_timeout)
        }
    };
    let fallback = match &mail.fallback_to {
        Some(address) => {
            Some(Address::parse(address.as_ref()).map_err(|error| usage(&format!("mail.fallback_to: {error}")))?)
        }
        None => None,
    };
    let fallback = store.set_fallback(fallback.as_ref(), clock.now()).await?;
    let policy = policy(settings);
    let retention = Retention {
        reminders: settings.retention.reminders,
        messages: settings.retention.messages,
        ended_tokens: settings.retention.ended_tokens,
    };
    // Leads of seconds are for trying things out: a message must not wait until it is no longer true.
    let shortest = policy.leads().last().map_or(HOLD, |lead| lead.span() / 4);
    let guard = Guard::new(settings.guard.messages_per_hour, settings.guard.expired_per_hour);
    let rules = Rules { policy, fallback, hold: HOLD.min(shortest), batch: S::BATCH, guard };
    let terms = Terms { fallback, give_up_after: mail.give_up_after, every, idle };
    Ok(Setup { schedule: settings.schedule.clone(), rules, retention, composer, transports, terms, http: None })
}

/// Which reminders the configuration asks for.
pub(super) fn policy(settings: &Settings) -> Policy {
    let reminders = &settings.reminders;
    let leads = reminders.lead_times.iter().map(|span| Lead::new(*span));
    Policy::new(leads, reminders.expired_notice, reminders.stale_after)
}

//! `lapsed run`

mod dry_run;
mod reload;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use chrono::TimeDelta;
use clap::Args;
use tokio_util::sync::CancellationToken;

use super::listing::{Format, FormatArg};
use super::{Failure, Outcome, bounce, output};
use crate::clock::{Clock, SystemClock};
use crate::config::{self, InForce, Settings};
use crate::coverage;
use crate::digest::{Digest, Window};
use crate::http;
use crate::jobs::Rules;
use crate::jobs::deliver::Terms;
use crate::jobs::guard::Guard;
use crate::jobs::purge::Retention;
use crate::mail::maildir::Maildir;
use crate::mail::smtp::Smtp;
use crate::mail::transport::Transport;
use crate::policies::Group;
use crate::policy::{Lead, Policy};
use crate::service::{self, Files, Setup};
use crate::store::Store;
use crate::token::{Address, ContactId};

/// `lapsed run`
#[derive(Debug, Args)]
pub struct Run {
    /// Do everything that is due now, then exit
    #[arg(long)]
    once: bool,
    /// Print what would be done now instead of doing it: nothing is written, nothing is sent
    #[arg(long, requires = "once")]
    dry_run: bool,
    /// How to write that list
    #[arg(long, value_enum, requires = "dry_run")]
    format: Option<Format>,
    /// Where its settings came from
    #[arg(skip)]
    source: Option<Source>,
}

/// Where the settings of a process came from.
#[derive(Debug)]
struct Source {
    /// What `--config` named.
    named: Option<PathBuf>,
    /// The file, as it was before it was read.
    files: Files,
    /// What was read.
    in_force: Vec<InForce>,
}

impl Run {
    /// The files that settings come from, as they are now: to be asked before they are read.
    pub(super) fn files(named: Option<&Path>) -> Files {
        Files::seen(vec![config::file(named).to_owned()])
    }

    /// Whether it only looks.
    pub(super) fn only_looks(&self) -> bool {
        self.dry_run
    }

    /// Notes where the settings came from.
    pub(super) fn came_from(&mut self, named: Option<PathBuf>, files: Files, in_force: Vec<InForce>) {
        self.source = Some(Source { named, files, in_force });
    }

    pub(super) async fn run<S: Store>(self, store: S, clock: Arc<SystemClock>, settings: &Settings) -> Outcome {
        if self.dry_run {
            return dry_run::run(&store, &*clock, settings, FormatArg::of(self.format)).await;
        }
        let setup = setup(&store, &*clock, settings).await?;
        let leads: Vec<String> = setup.rules.leads().iter().map(Lead::to_string).collect();
        tracing::info!(store = %settings.store.url, leads = leads.join(" "), "the store is open");
        if !self.once {
            let setup = Setup { http: http::listen(settings.http.listen)?, ..setup };
            let stop = CancellationToken::new();
            service::stop_on_signals(&stop)?;
            let reload = self.source.map(|source| reload::reload(source, &store, &clock, settings));
            service::run(store, clock, setup, reload, stop).await?;
            return Ok(());
        }
        let stop = CancellationToken::new();
        service::stop_on_signals(&stop)?;
        let report = service::run_once(store, clock, setup, stop).await?;
        let rows: Vec<_> = report.lines.into_iter().collect();
        output::print(&output::facts(&rows))?;
        if report.stopped {
            let problem = "stopped by a signal: what is left is done by the next run";
            return Err(Failure::Failed(anyhow::anyhow!(problem)));
        }
        if let Some(why) = report.wrong_clock {
            return Err(Failure::Failed(anyhow::anyhow!("{why}; the next run goes on")));
        }
        if report.mail_refused {
            let problem = "no mail could be handed over: messages wait in the store for the next run";
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
    let (transport, _) = settings.require_mail().map_err(|error| Failure::Usage(error.to_string()))?;
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
    let fallback = store.set_fallback(fallback(settings)?.as_ref(), clock.now()).await?;
    let mut named = HashMap::new();
    for address in named_by_policies(settings) {
        named.insert(address.clone(), store.make_contact(&address.clone().into(), clock.now()).await?);
    }
    let rules = rules::<S>(settings, fallback, |address| named.get(address).copied());
    let terms = Terms { every, idle, ..terms(settings, &rules) };
    let schedule = settings.schedule.clone();
    Ok(Setup { schedule, rules, retention: retention(settings), composer, transports, terms, http: None })
}

/// Who hears of what nobody else could be told.
fn fallback(settings: &Settings) -> Result<Option<Address>, Failure> {
    let parse = |address: &lettre::Address| {
        Address::parse(address.as_ref()).map_err(|error| Failure::Usage(format!("mail.fallback_to: {error}")))
    };
    settings.mail.fallback_to.as_ref().map(parse).transpose()
}

fn named_by_policies(settings: &Settings) -> impl Iterator<Item = &Address> {
    settings.reminders.policies.iter().flat_map(|policy| &policy.contacts)
}

/// What the planning jobs decide by.
fn rules<S: Store>(
    settings: &Settings,
    fallback: Option<ContactId>,
    id: impl Fn(&Address) -> Option<ContactId>,
) -> Rules {
    let policy = policy(settings);
    Rules {
        digest: digest(settings, &policy, None),
        policy,
        groups: groups(settings, id).into(),
        skip_unused: settings.reminders.skip_unused,
        fallback,
        batch: S::BATCH,
        guard: Guard::new(settings.guard.messages_per_hour, settings.guard.expired_per_hour),
    }
}

/// What delivery goes by, at any rate and over any session.
fn terms(settings: &Settings, rules: &Rules) -> Terms {
    Terms {
        fallback: rules.fallback,
        give_up_after: settings.mail.give_up_after,
        every: Duration::ZERO,
        idle: Duration::MAX,
        groups: rules.groups.clone(),
        policy: rules.policy.clone(),
        digest: rules.digest.clone(),
    }
}

fn retention(settings: &Settings) -> Retention {
    let config::Retention { reminders, messages, ended_tokens } = settings.retention;
    Retention { reminders, messages, ended_tokens }
}

/// By when owners must know.
pub(super) fn coverage(settings: &Settings) -> coverage::Terms {
    let policy = policy(settings);
    // Whom a policy tells besides makes no difference to when.
    coverage::Terms::new(&policy, &digest(settings, &policy, None), groups(settings, |_| None).into())
}

/// Which reminders the configuration asks for, where no policy says anything else.
pub(super) fn policy(settings: &Settings) -> Policy {
    with_leads(settings, &settings.reminders.lead_times)
}

fn with_leads(settings: &Settings, lead_times: &[TimeDelta]) -> Policy {
    let leads = lead_times.iter().map(|span| Lead::new(*span));
    Policy::new(leads, settings.reminders.expired_notice, settings.reminders.stale_after)
}

/// When messages about the tokens of a policy may go. Leads of seconds are for trying things out: a message about what has
/// expired must not wait for minutes then.
fn digest(settings: &Settings, policy: &Policy, window: Option<Window>) -> Digest {
    let mut digest = settings.digest.clone();
    digest.hold = policy.leads().last().map_or(digest.hold, |lead| digest.hold.min(lead.span() / 4));
    digest.window = window.or(digest.window);
    digest
}

/// The policies of the configuration, with the contacts that have an id.
pub(super) fn groups(settings: &Settings, id: impl Fn(&Address) -> Option<ContactId>) -> Vec<Group> {
    let group = |configured: &config::PolicyFor| {
        let policy = with_leads(settings, configured.lead_times.as_ref().unwrap_or(&settings.reminders.lead_times));
        let contacts = configured.contacts.iter();
        Group {
            matches: configured.matches.clone(),
            digest: digest(settings, &policy, configured.window),
            policy,
            contacts: contacts.filter_map(|address| Some((id(address)?, address.clone()))).collect(),
        }
    };
    settings.reminders.policies.iter().map(group).collect()
}

//! `lapsed check`: would the daemon do its job here? One line for each thing that it needs, and what to do where it fails.
//! A warning is about something that it can do without: it does not make the command fail, so that a unit may ask before it starts.

use std::path::Path;
use std::time::Duration;

use chrono::TimeDelta;
use clap::Args;

use super::listing::{FormatArg, Listing};
use super::{Failure, Outcome};
use crate::clock::SystemClock;
use crate::config::{self, Bounce, Settings, Transport};
use crate::mail::domain::{self, Found as Domain};
use crate::mail::maildir::Maildir;
use crate::mail::smtp::Smtp;
use crate::mail::transport;
use crate::store::{self, Indexes, Postgres, Sqlite, Store};

/// How long a server may take to show that it is there: less than mail may take, so that somebody can wait for it.
const PATIENCE: Duration = Duration::from_secs(30);

/// By how much two clocks may differ.
const WRONG_CLOCK: TimeDelta = TimeDelta::seconds(30);

/// `lapsed check`
#[derive(Debug, Args)]
pub struct Check {
    #[command(flatten)]
    format: FormatArg,
}

/// What is wrong.
#[derive(Debug)]
enum Wrong {
    /// The daemon does its job all the same; somebody should look at it.
    Worth(String),
    /// The daemon cannot do its job.
    Fails(String),
}

impl Wrong {
    fn fails(problem: impl ToString) -> Self {
        Self::Fails(problem.to_string())
    }
}

/// What there is, or what is wrong with it.
type Found = Result<String, Wrong>;

/// What was found, and what it is about.
type Finding = (&'static str, Found);

impl Check {
    /// `named`: the file that the command line names.
    pub(super) async fn run(self, named: Option<&Path>, settings: &Settings) -> Outcome {
        let file = config::file(named);
        let read = match file.exists() {
            true => format!("{}: every value can be used", file.display()),
            false => format!("no file was read, as there is no {}; --config names another", file.display()),
        };
        let mut findings: Vec<Finding> = vec![("configuration", Ok(read))];
        let url = settings.store.url.expose();
        if url.starts_with("sqlite:") {
            match Sqlite::missing(url)? {
                Some(file) => findings.push(("database", not_made_yet(&file, url))),
                None => database(Sqlite::open(url).await, settings, &mut findings).await,
            }
        } else {
            database(Postgres::open(url).await, settings, &mut findings).await;
        }
        findings.extend(mail(settings).await);
        let fields = &["check", "ok", "result", "details"];
        let mut listing = Listing::new(self.format, &["CHECK", "RESULT", "DETAILS"], fields)?;
        let mut failed = 0_usize;
        for (what, found) in findings {
            let (result, details) = match found {
                Ok(details) => ("ok", details),
                Err(Wrong::Worth(details)) => ("warning", details),
                Err(Wrong::Fails(details)) => ("failed", details),
            };
            let ok = result != "failed";
            failed += usize::from(!ok);
            listing.row(
                || {
                    let details = details.clone().into();
                    vec![("check", what.into()), ("ok", ok.into()), ("result", result.into()), ("details", details)]
                },
                || vec![what.to_owned(), result.to_owned(), details.clone()],
            )?;
        }
        listing.end("")?;
        match failed {
            0 => Ok(()),
            1 => Err(Failure::Failed(anyhow::anyhow!("one check failed"))),
            n => Err(Failure::Failed(anyhow::anyhow!("{n} checks failed"))),
        }
    }
}

async fn database<S: Store>(opened: store::Result<S>, settings: &Settings, findings: &mut Vec<Finding>) {
    let store = match opened {
        Ok(store) => store,
        Err(error) => {
            findings.push(("database", Err(Wrong::Fails(format!("{error}; see store.url ({})", settings.store.url)))));
            return;
        }
    };
    let description = store.description().await;
    findings
        .push(("database", description.map(|of_it| format!("{}: {of_it}", settings.store.url)).map_err(Wrong::fails)));
    findings.push(("indexes", indexes(&store).await));
    findings.push(("clock", clock(&store).await));
    store.close().await;
}

/// A store that the daemon will make: whether it can.
fn not_made_yet(file: &Path, url: &str) -> Found {
    let directory = file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    match tempfile::tempfile_in(directory) {
        Ok(_) => Ok(format!("there is no {} yet; the daemon makes it", file.display())),
        Err(error) => Err(Wrong::Fails(format!("{} cannot be made: {error}; see store.url ({url})", file.display()))),
    }
}

async fn indexes<S: Store>(store: &S) -> Found {
    let Indexes { good, missing, unused } = store.indexes().await.map_err(Wrong::fails)?;
    if !missing.is_empty() {
        return Err(Wrong::Fails(format!(
            "{} cannot be used: restore a backup, or make it again as the migrations in the source do",
            missing.join(", ")
        )));
    }
    if !unused.is_empty() {
        let unused = unused.join(", ");
        return Err(Wrong::Worth(format!("the database's planner does not use {unused}: run ANALYZE, and try again")));
    }
    Ok(format!("all {good} are there; passes find what is due by them"))
}

async fn clock<S: Store>(store: &S) -> Found {
    let host = SystemClock::default();
    let before = host.host();
    let Some(told) = store.clock_reading().await.map_err(Wrong::fails)? else {
        return Ok("this host's counts".to_owned());
    };
    let differs = told - (before + (host.host() - before) / 2);
    let seconds = differs.num_seconds().abs();
    if differs.abs() > WRONG_CLOCK {
        return Err(Wrong::Worth(format!(
            "this host's clock differs by {seconds} s from the database's, which is followed: set one of them right"
        )));
    }
    Ok(format!("the database's counts; this host's differs by {seconds} s"))
}

/// Whether answers and bounces reach a sender's domain. What cannot be looked up here is no mistake.
async fn sender(domain: &str) -> Found {
    let ascii = idna::domain_to_ascii(domain)
        .map_err(|_| Wrong::Fails(format!("{domain} is not a domain name; see mail.from")))?;
    match domain::look_up(&ascii, &domain::name_servers()).await {
        Domain::Takes { at, says_who: true } => {
            Ok(format!("{domain} takes mail at {at}, and says who may send for it (SPF)"))
        }
        Domain::Takes { at, says_who: false } => Ok(format!(
            "{domain} takes mail at {at}; it does not say who may send for it (SPF), and some servers refuse such mail"
        )),
        Domain::Reserved => Ok(format!("not looked up: {domain} is for examples, and nobody gets its mail")),
        Domain::Unknown(why) => Ok(format!("{domain} cannot be looked up here: {why}")),
        Domain::TakesNone => {
            Err(Wrong::Worth(format!("{domain} takes no mail: answers and bounces are lost; see mail.from")))
        }
        Domain::Missing => {
            Err(Wrong::Fails(format!("there is no domain {domain}: servers refuse mail from it; see mail.from")))
        }
    }
}

async fn mail(settings: &Settings) -> Vec<Finding> {
    let (transport, from) = match settings.require_mail() {
        Ok(found) => found,
        Err(error) => return vec![("mail", Err(Wrong::fails(error)))],
    };
    let mail = &settings.mail;
    let templates = templates(settings);
    let to = mail.fallback_to.clone().unwrap_or_else(|| from.email.clone());
    let way = match transport {
        Transport::Maildir { path } => {
            let ready = transport::Transport::Maildir(Maildir::new(path.clone())).ready().await;
            ready
                .map(|()| format!("{} can be written", path.display()))
                .map_err(|happened| Wrong::fails(happened.reply()))
        }
        Transport::Smtp(options) => {
            let mut smtp = Smtp::new(*options.clone());
            let answered = tokio::time::timeout(PATIENCE, smtp.probe(from.email.clone(), to)).await;
            // Whatever it says to that changes nothing.
            let _ = tokio::time::timeout(PATIENCE, smtp.close()).await;
            match answered {
                Ok(Ok(server)) => Ok(format!("{server} takes mail from mail.from; none was sent")),
                Ok(Err(happened)) => Err(Wrong::Fails(format!("{}; see [mail.smtp]", happened.reply()))),
                Err(_) => {
                    Err(Wrong::Fails(format!("the mail server does not answer within {PATIENCE:?}; see [mail.smtp]")))
                }
            }
        }
    };
    let fallback = match &mail.fallback_to {
        Some(_) => Ok("is told of what nobody else could be told".to_owned()),
        None => Err(Wrong::Worth("nobody hears of what could not be delivered: set mail.fallback_to".to_owned())),
    };
    let mut findings = vec![("templates", templates), ("mail", way)];
    findings.extend(mail.bounce.as_ref().map(|bounce| ("bounces", bounces(bounce))));
    if matches!(transport, Transport::Smtp(_)) {
        let senders = [Some(&from.email), mail.bounce.as_ref().map(|bounce| &bounce.mailbox)];
        let mut domains: Vec<&str> = senders.into_iter().flatten().map(lettre::Address::domain).collect();
        domains.dedup();
        for domain in domains {
            findings.push(("domain", sender(domain).await));
        }
    }
    findings.push(("fallback", fallback));
    findings
}

fn problem(failure: Failure) -> String {
    match failure {
        Failure::Usage(problem) | Failure::Status(_, problem) => problem,
        Failure::Failed(error) => format!("{error:#}"),
        Failure::NotValid => String::new(),
    }
}

/// Whether return paths can be signed: without that the daemon does not start.
fn bounces(bounce: &Bounce) -> Found {
    super::bounce::return_path(bounce).map_err(|failure| Wrong::Fails(problem(failure)))?;
    Ok(format!("come back to {}, signed with the key in {}", bounce.mailbox, bounce.key_file.display()))
}

fn templates(settings: &Settings) -> Found {
    let composer = super::mail::composer(settings).map_err(|failure| Wrong::Fails(problem(failure)))?;
    let languages: Vec<&str> = composer.templates().languages().collect();
    let languages = languages.join(", ");
    Ok(match &settings.mail.templates {
        None => format!("the built-in ones, in {languages}"),
        Some(directory) => format!("the built-in ones and those of {}, in {languages}", directory.display()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_the_daemon_could_not_use_is_told() {
        let directory = tempfile::tempdir().expect("a directory");
        let key_file = directory.path().join("bounce-key");
        let bounce = Bounce { mailbox: "bounces@example.org".parse().expect("an address"), key_file: key_file.clone() };
        for (key, why) in [(None, "cannot be read"), (Some("short"), "16 characters or more")] {
            if let Some(key) = key {
                std::fs::write(&key_file, key).expect("a file");
            }
            match bounces(&bounce) {
                Err(Wrong::Fails(problem)) => {
                    assert!(problem.contains("mail.bounce.key_file") && problem.contains(why), "{problem}");
                }
                other => panic!("{key:?}: {other:?}"),
            }
        }
        std::fs::write(&key_file, "0123456789abcdef0123456789abcdef\n").expect("a file");
        let found = bounces(&bounce).expect("a good key");
        assert!(found.starts_with("come back to bounces@example.org, signed with the key in "), "{found}");
    }
}

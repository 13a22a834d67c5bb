//! The command line: argument definitions, and what each command needs before it starts.
//!
//! Results go to stdout, messages to stderr. Exit status: 0 done, 1 failed (or "not valid" for `verify`), 2 wrong usage
//! or configuration; `bounce` speaks to mail systems, in the words of sysexits.h.

mod bounce;
mod check;
mod coverage;
mod demo;
mod forecast;
mod import;
mod listing;
mod lookup;
mod mail;
mod outbox;
mod output;
mod owner;
mod run;
mod schedule;
mod show_config;
mod status;
mod store;
mod token;
mod verify;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, CommandFactory, Parser, Subcommand};

use crate::clock::SystemClock;
use crate::config::{self, LogFormat, Settings};
use crate::service;
use crate::store::{Postgres, Sqlite, Store};
use crate::telemetry;

/// How long the end of a command may wait for the store to close.
const CLOSE_WITHIN: Duration = Duration::from_millis(250);

/// Expires API tokens, and tells their owners in time.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true, max_term_width = 100)]
pub struct Arguments {
    /// Configuration file, in the place of /etc/lapsed/lapsed.toml
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show in a minute what lapsed does: a new store, the real daemon, mails in a directory
    Demo(demo::Demo),
    /// Run the daemon
    Run(run::Run),
    /// Owners and their contacts
    #[command(subcommand)]
    Owner(OwnerCommand),
    /// Tokens: create, edit, rotate, revoke, list, import, verify
    #[command(subcommand)]
    Token(TokenCommand),
    /// Messages that wait, that failed, and that a guard holds
    #[command(subcommand)]
    Outbox(OutboxCommand),
    /// What owners would read, and whether it arrives
    #[command(subcommand)]
    Mail(MailCommand),
    /// Check the configuration, the database and the mail server; nothing is sent
    Check(check::Check),
    /// Show what the coming days bring: tokens that expire, reminders, mails
    Forecast(forecast::Forecast),
    /// Show whether owners knew in time of tokens that expired, and of each that ended in silence, why
    Coverage(coverage::Coverage),
    /// Print when each job runs next
    Schedule(schedule::Schedule),
    /// Show what the jobs did last, and what waits
    Status(status::Status),
    /// The store as a whole
    #[command(subcommand)]
    Store(StoreCommand),
    /// Read a delivery status notification from standard input, as a mail system pipes it
    Bounce(bounce::Bounce),
    /// The configuration
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Print a completion script for a shell
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// Write the manual pages, one for each command, into a directory
    Man {
        /// The directory, which exists
        directory: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
enum OwnerCommand {
    /// Add an owner and its primary token, whose secret is shown once
    Add(owner::Add),
    /// List owners
    List(owner::List),
    /// Show an owner, its contacts and its next deadline
    Show(owner::Show),
    /// Change what an owner is called in mails
    Rename(owner::Rename),
    /// Remove an owner and its tokens
    Remove(owner::Remove),
    /// Who is told of an owner's deadlines
    #[command(subcommand)]
    Contact(ContactCommand),
}

#[derive(Debug, Subcommand)]
enum ContactCommand {
    /// Let an address speak for an owner; it may speak for many
    Add(owner::contact::Add),
    /// Let an address speak for an owner no longer
    Remove(owner::contact::Remove),
    /// List the contacts of an owner
    List(owner::contact::List),
    /// Send mail to an address again that a mail server had refused for good
    Unsuppress(owner::contact::Unsuppress),
}

#[derive(Debug, Subcommand)]
enum MailCommand {
    /// Print a mail, made of a token or of made-up ones; nothing is sent
    Preview(mail::Preview),
    /// Send a mail about made-up tokens, and print what the mail server answered
    Test(mail::Test),
}

#[derive(Debug, Subcommand)]
enum OutboxCommand {
    /// List messages that wait or failed, the oldest first
    List(outbox::List),
    /// Show a message and what it says
    Show(outbox::Show),
    /// Try messages again now that failed or wait to be tried again
    Retry(outbox::Retry),
    /// Drop messages; of what they say, nobody is told, unless it is not yet due
    Cancel(outbox::Cancel),
    /// Let messages go that a guard holds
    Release(outbox::Release),
}

#[derive(Debug, Subcommand)]
enum StoreCommand {
    /// Copy a SQLite store into a file while it is in use
    Backup(store::Backup),
    /// Copy a SQLite store to PostgreSQL; an interrupted copy goes on when it is repeated
    Copy(store::Copy),
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Print every key, its value, and where it came from; secrets masked
    Show(listing::FormatArg),
}

#[derive(Debug, Subcommand)]
enum TokenCommand {
    /// Create an additional token, whose secret is shown once
    Create(token::Create),
    /// Change a token's description or deadline
    Edit(token::Edit),
    /// Replace a token by a new one of the same kind, description and scopes
    Rotate(token::Rotate),
    /// End an additional token now
    Revoke(token::Revoke),
    /// List tokens, those that expire first on top
    List(token::List),
    /// Show a token and all its reminders
    Show(token::Show),
    /// Watch tokens that were issued elsewhere: import a list of them, again and again
    Import(import::Import),
    /// Check a secret, read from standard input: exit status 0 and the token, or 1 and the reason
    Verify(Verify),
}

/// `verify` has nothing to choose.
#[derive(Debug, Args)]
struct Verify {}

/// Why a command ends with a status other than 0.
#[derive(Debug)]
pub enum Failure {
    /// Wrong usage or configuration: status 2.
    Usage(String),
    /// It could not be done: status 1.
    Failed(anyhow::Error),
    /// The secret is not valid, which was said already: status 1.
    NotValid,
    /// It ends with a status of its own, for this reason.
    Status(u8, String),
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

/// What a command ends with.
pub type Outcome = Result<(), Failure>;

/// Runs the command that the arguments name.
pub fn main(arguments: Arguments) -> ExitCode {
    let is_bounce = matches!(arguments.command, Command::Bounce(_));
    match dispatch(arguments).map_err(|failure| if is_bounce { bounce::try_again(failure) } else { failure }) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::NotValid) => ExitCode::from(1),
        Err(Failure::Status(status, message)) => {
            output::complain(&message);
            ExitCode::from(status)
        }
        Err(Failure::Usage(message)) => {
            output::complain(&message);
            ExitCode::from(2)
        }
        Err(Failure::Failed(error)) if output::is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(Failure::Failed(error)) => {
            output::complain(&format!("{error:#}"));
            ExitCode::from(1)
        }
    }
}

fn dispatch(arguments: Arguments) -> Outcome {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let result = runtime.block_on(async {
        let command = match arguments.command {
            Command::Demo(demo) => return demo.run().await,
            Command::Config(ConfigCommand::Show(format)) => {
                return show_config::run(arguments.config.as_deref(), format);
            }
            Command::Completions { shell } => return completions(shell),
            Command::Man { directory } => {
                return clap_mangen::generate_to(Arguments::command(), &directory).map_err(|error| {
                    Failure::Failed(anyhow::anyhow!("cannot write into {}: {error}", directory.display()))
                });
            }
            command => command,
        };
        let files = run::Run::files(arguments.config.as_deref());
        let (settings, in_force) = config::load_with_origins(arguments.config.as_deref())
            .map_err(|error| Failure::Usage(error.to_string()))?;
        // Whoever types a command looks at the terminal.
        let format = match settings.log.format {
            LogFormat::Journald if !matches!(command, Command::Run(_)) => LogFormat::Text,
            format => format,
        };
        telemetry::init(&settings.log.level, format);
        let command = match command {
            Command::Run(mut run) => {
                let forgotten = forgotten(arguments.config.as_deref());
                settings.require_mail().map_err(|error| Failure::Usage(format!("{error}{forgotten}")))?;
                run.came_from(arguments.config, files, in_force);
                Command::Run(run)
            }
            Command::Schedule(schedule) => return schedule.run(&settings),
            Command::Check(check) => return check.run(arguments.config.as_deref(), &settings).await,
            Command::Mail(MailCommand::Test(test)) => return test.run(&SystemClock::default(), &settings).await,
            Command::Mail(MailCommand::Preview(preview)) if !preview.needs_store() => {
                return preview.run_sample(&SystemClock::default(), &settings);
            }
            Command::Store(StoreCommand::Backup(backup)) => return backup.run(&settings).await,
            Command::Store(StoreCommand::Copy(copy)) => return copy.run(&settings).await,
            command => command,
        };
        // The one place that chooses a back end.
        let url = settings.store.url.expose().to_owned();
        let looks = matches!(&command, Command::Run(run) if run.only_looks());
        if url.starts_with("sqlite:") && !command.may_make_store() {
            existing(&url)?;
        }
        match (url.starts_with("sqlite:"), looks) {
            (true, false) => command.run(Sqlite::open(&url).await?, &settings).await,
            (true, true) => command.run(Sqlite::look(&url).await?, &settings).await,
            (false, false) => command.run(Postgres::open(&url).await?, &settings).await,
            (false, true) => command.run(Postgres::look(&url).await?, &settings).await,
        }
    });
    // A read of standard input that nobody waits for any more must not keep the process.
    runtime.shutdown_background();
    result
}

/// What somebody should know who has a file here, and did not say so.
fn forgotten(named: Option<&Path>) -> String {
    let here = Path::new("lapsed.toml");
    if named.is_some() || config::file(named).exists() || !here.exists() {
        return String::new();
    }
    format!("\nNo configuration file was read. There is one here: add --config {}", here.display())
}

/// Fails where the SQLite store of this URL is not there.
fn existing(url: &str) -> Outcome {
    match Sqlite::missing(url)? {
        None => Ok(()),
        Some(file) => Err(Failure::Failed(anyhow::anyhow!(
            "there is no store {}: `lapsed run`, `lapsed owner add` and `lapsed token import` make one. Is it this directory \
             that you mean, and is --config there?",
            file.display()
        ))),
    }
}

/// Prints a completion script, made from the same definitions as the parser.
fn completions(shell: clap_complete::Shell) -> Outcome {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "lapsed", &mut script);
    output::print(&String::from_utf8_lossy(&script))?;
    Ok(())
}

impl Command {
    /// Whether a store that is not there is made: by what begins to fill one, and not by what would find an empty one.
    fn may_make_store(&self) -> bool {
        match self {
            Self::Run(run) => !run.only_looks(),
            Self::Owner(OwnerCommand::Add(_)) | Self::Token(TokenCommand::Import(_)) => true,
            _ => false,
        }
    }

    async fn run<S: Store>(self, store: S, settings: &Settings) -> Outcome {
        let clock = Arc::new(SystemClock::default());
        service::follow_clock(&store, &clock).await?;
        let result = match self {
            // These need no store of the configuration, and are dispatched before one is opened.
            Self::Demo(_)
            | Self::Mail(MailCommand::Test(_))
            | Self::Check(_)
            | Self::Schedule(_)
            | Self::Store(_)
            | Self::Config(_)
            | Self::Completions { .. }
            | Self::Man { .. } => Ok(()),
            Self::Mail(MailCommand::Preview(preview)) => preview.run(&store, &*clock, settings).await,
            Self::Forecast(forecast) => forecast.run(&store, &*clock, settings).await,
            Self::Coverage(coverage) => coverage.run(&store, &*clock, settings).await,
            Self::Status(status) => status.run(&store, &*clock).await,
            Self::Bounce(bounce) => bounce.run(&store, &*clock, settings).await,
            Self::Run(run) => run.run(store.clone(), clock, settings).await,
            Self::Owner(OwnerCommand::Add(add)) => add.run(&store, &*clock).await,
            Self::Owner(OwnerCommand::List(list)) => list.run(&store, &*clock).await,
            Self::Owner(OwnerCommand::Show(show)) => show.run(&store, &*clock).await,
            Self::Owner(OwnerCommand::Rename(rename)) => rename.run(&store).await,
            Self::Owner(OwnerCommand::Remove(remove)) => remove.run(&store, &*clock).await,
            Self::Owner(OwnerCommand::Contact(ContactCommand::Add(add))) => add.run(&store, &*clock).await,
            Self::Owner(OwnerCommand::Contact(ContactCommand::Remove(remove))) => remove.run(&store).await,
            Self::Owner(OwnerCommand::Contact(ContactCommand::List(list))) => list.run(&store).await,
            Self::Owner(OwnerCommand::Contact(ContactCommand::Unsuppress(unsuppress))) => unsuppress.run(&store).await,
            Self::Outbox(OutboxCommand::List(list)) => list.run(&store, &*clock).await,
            Self::Outbox(OutboxCommand::Show(show)) => show.run(&store, &*clock).await,
            Self::Outbox(OutboxCommand::Retry(retry)) => retry.run(&store, &*clock).await,
            Self::Outbox(OutboxCommand::Cancel(cancel)) => cancel.run(&store, &*clock).await,
            Self::Outbox(OutboxCommand::Release(release)) => release.run(&store, &*clock).await,
            Self::Token(TokenCommand::Create(create)) => create.run(&store, &*clock).await,
            Self::Token(TokenCommand::Edit(edit)) => edit.run(&store, &*clock).await,
            Self::Token(TokenCommand::Rotate(rotate)) => rotate.run(&store, &*clock).await,
            Self::Token(TokenCommand::Revoke(revoke)) => revoke.run(&store, &*clock).await,
            Self::Token(TokenCommand::List(list)) => list.run(&store, &*clock).await,
            Self::Token(TokenCommand::Show(show)) => show.run(&store, &*clock, settings).await,
            Self::Token(TokenCommand::Import(import)) => {
                import.run(&store, &*clock, settings.retention.ended_tokens).await
            }
            Self::Token(TokenCommand::Verify(Verify {})) => verify::run(&store, &*clock).await,
        };
        // What is still on its way to the disk has had its time: a use that `verify` could not record must not keep it.
        let _ = tokio::time::timeout(CLOSE_WITHIN, store.close()).await;
        result
    }
}

//! `lapsed store`: the store as a whole.

use std::io::IsTerminal;
use std::path::PathBuf;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use super::{Failure, Outcome, existing, output};
use crate::clock::{Clock, SystemClock};
use crate::config::{Settings, StoreUrl};
use crate::store::{Postgres, Sqlite, Store as _, copy};

/// `lapsed store backup`
#[derive(Debug, Args)]
pub struct Backup {
    /// The file to make; one that exists is not written over
    file: PathBuf,
}

/// `lapsed store copy`
#[derive(Debug, Args)]
pub struct Copy {
    /// The PostgreSQL database to copy to, which is empty: postgres://USER:PASSWORD@HOST/DATABASE
    #[arg(long, value_name = "URL", required_unless_present = "to_file")]
    to: Option<String>,
    /// A file that holds that URL, to keep its password out of the process list
    #[arg(long, value_name = "FILE", conflicts_with = "to")]
    to_file: Option<PathBuf>,
}

impl Backup {
    pub(super) async fn run(self, settings: &Settings) -> Outcome {
        let store = source(settings, "backup", "use pg_dump for PostgreSQL, whose copies are whole as well").await?;
        let backup = store.backup(&self.file).await?;
        store.close().await;
        output::print(&output::facts(&[
            ("backup", self.file.display().to_string()),
            ("size", format!("{} KiB", backup.bytes.div_ceil(1_024))),
            ("tokens", backup.tokens.to_string()),
            ("checked", "sound, and on the disk".to_owned()),
        ]))?;
        Ok(())
    }
}

impl Copy {
    pub(super) async fn run(self, settings: &Settings) -> Outcome {
        let usage = |why: String| Failure::Usage(why);
        let text = match (&self.to, &self.to_file) {
            (Some(url), _) => url.clone(),
            (None, Some(file)) => std::fs::read_to_string(file)
                .map_err(|error| usage(format!("--to-file {}: cannot be read: {error}", file.display())))?,
            (None, None) => return Err(usage("--to is missing".to_owned())),
        };
        let url = StoreUrl::parse(&text).map_err(|why| usage(format!("--to: the URL {why}")))?;
        if url.expose().starts_with("sqlite:") {
            let why = "--to: copies go to PostgreSQL; `lapsed store backup` copies a SQLite store to a file";
            return Err(usage(why.to_owned()));
        }
        let from = source(settings, "copy", "it is in PostgreSQL already").await?;
        let to = Postgres::open(url.expose()).await?;
        let bar = match std::io::stderr().is_terminal() {
            true => ProgressBar::new(0).with_style(style()),
            false => ProgressBar::hidden(),
        };
        let progress = |now: copy::Progress<'_>| {
            bar.set_length(now.all);
            bar.set_position(now.done);
            bar.set_message(format!("{} {}", now.what, now.table));
        };
        let copied = copy::copy(&from, &to, SystemClock::default().now(), progress).await;
        bar.finish_and_clear();
        let copied = copied?;
        from.close().await;
        to.close().await;
        let mut rows: Vec<(&str, String)> =
            copied.tables.iter().map(|(table, count)| (table.as_str(), count.to_string())).collect();
        if copied.found > 0 {
            rows.push(("found there", format!("{} of an earlier try", copied.found)));
        }
        rows.push(("compared", "each row is there, by counts and checksums".to_owned()));
        output::print(&output::facts(&rows))?;
        output::say(&format!("Now let store.url name {url}, start the daemon, and keep the SQLite file as a backup."));
        Ok(())
    }
}

/// The SQLite store of the configuration, which is there already.
async fn source(settings: &Settings, what: &str, instead: &str) -> Result<Sqlite, Failure> {
    let url = settings.store.url.expose();
    if !url.starts_with("sqlite:") {
        return Err(Failure::Usage(format!(
            "`lapsed store {what}` is for a SQLite store, and this one is {}: {instead}",
            settings.store.url
        )));
    }
    existing(url)?;
    Ok(Sqlite::open(url).await?)
}

fn style() -> ProgressStyle {
    // A template that is written here is a good one.
    ProgressStyle::with_template("{bar:30} {pos}/{len} rows, {msg}").unwrap_or_else(|_| ProgressStyle::default_bar())
}

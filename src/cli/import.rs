//! `lapsed token import`

mod rows;

use std::path::PathBuf;

use anyhow::{anyhow, bail};
use chrono::TimeDelta;
use clap::Args;
use uuid::Uuid;

use self::rows::{Count, Rows};
use super::{Outcome, output};
use crate::clock::{Clock, Timestamp};
use crate::config::format_duration;
use crate::store::imports::{Feed, ImportRun};
use crate::store::{Error, Store};
use crate::token::{Bucket, text};

/// How often a batch is tried again that met another transaction.
const TRIES: u32 = 5;

/// `--prune` ends at most this share of a source's tokens without `--force`: a hundredth times ten.
const PRUNE_PERCENT: u64 = 10;

/// `lapsed token import`
#[derive(Debug, Args)]
pub struct Import {
    /// A CSV with a header, or JSON lines; `-` reads standard input
    file: PathBuf,
    /// Where the list comes from
    #[arg(long, value_name = "NAME", default_value = "import", value_parser = text::name)]
    source: String,
    /// Import nothing at all when a row is bad
    #[arg(long)]
    strict: bool,
    /// End the tokens of this source that the list no longer has
    #[arg(long)]
    prune: bool,
    /// Prune even when more than 10 % of the source's tokens would end
    #[arg(long, requires = "prune")]
    force: bool,
}

impl Import {
    /// `keep`: how long tokens that have ended are kept.
    pub(super) async fn run<S: Store>(self, store: &S, clock: &impl Clock, keep: TimeDelta) -> Outcome {
        let now = clock.now();
        let ended_before = now.checked_sub_signed(keep).unwrap_or(Timestamp::UNIX_EPOCH);
        let run = ImportRun { id: Uuid::new_v4(), source: self.source.clone(), now, ended_before };
        let name = rows::name(&self.file);
        let mut rows = Rows::open(&self.file)?;
        let done = if self.strict {
            let imported = tokio::select! {
                imported = store.import_strictly(&run, &mut rows) => Some(imported),
                _ = tokio::signal::ctrl_c() => None,
            };
            if !matches!(imported, Some(Ok(true))) {
                rows.count.forget_written();
            }
            imported.map(|imported| imported.map(|_| ()))
        } else {
            tokio::select! {
                done = import(store, &run, &mut rows) => Some(done),
                _ = tokio::signal::ctrl_c() => None,
            }
        };
        rows.end();
        let count = std::mem::take(&mut rows.count);
        let ended = match (&rows.fatal, &done) {
            (None, Some(Ok(()))) if self.prune && count.refused == 0 => Some(prune(store, &run, self.force).await),
            _ => None,
        };
        let without_contact = match &done {
            Some(Ok(())) if count.added + count.updated + count.unchanged > 0 => {
                store.owners_without_contact(&run).await?
            }
            _ => 0,
        };
        remark(&count, without_contact, keep);
        let reported = report(&count, ended.as_ref().and_then(|ended| ended.as_ref().ok()).copied());
        match done {
            Some(done) => done?,
            None => {
                let problem = match self.strict {
                    true => "interrupted: nothing was imported",
                    false => "interrupted: what was counted above is in the store; import the list again to go on",
                };
                return Err(anyhow!(problem).into());
            }
        }
        if let Some(error) = rows.fatal {
            return Err(anyhow!("{name} {error}").into());
        }
        if let Some(Err(error)) = ended {
            return Err(error.into());
        }
        if count.refused > 0 {
            let nothing = if self.strict { "; with --strict nothing was imported" } else { "" };
            let pruned = if self.prune { "; nothing was pruned, for the list may not be complete" } else { "" };
            let bad = if count.refused == 1 { "one bad row".into() } else { format!("{} bad rows", count.refused) };
            return Err(anyhow!("{bad} in {name}{nothing}{pruned}").into());
        }
        // Last, because a reader that has gone away must not make a bad list a success.
        Ok(reported?)
    }
}

/// What somebody should know of a list that was imported.
fn remark(count: &Count, without_contact: u64, keep: TimeDelta) {
    let rows = |count: u64, one: &str, many: &str| if count == 1 { one.into() } else { format!("{count} {many}") };
    if count.long_ended > 0 {
        let rows: String = rows(count.long_ended, "one row is", "rows are");
        let keep = format_duration(keep);
        output::say(&format!("{rows} left out: the token ended longer ago than retention.ended_tokens ({keep})"));
    }
    if without_contact > 0 {
        let owners: String = rows(without_contact, "one owner has", "owners have");
        output::say(&format!(
            "{owners} no contact, so nobody can be told of their deadlines; `lapsed owner list` shows which"
        ));
    }
}

fn report(count: &Count, ended: Option<u64>) -> anyhow::Result<()> {
    let mut rows = vec![
        ("rows", count.rows.to_string()),
        ("added", count.added.to_string()),
        ("updated", count.updated.to_string()),
        ("unchanged", count.unchanged.to_string()),
        ("bad", count.refused.to_string()),
    ];
    if count.long_ended > 0 {
        rows.insert(4, ("left out", count.long_ended.to_string()));
    }
    rows.extend(ended.map(|ended| ("ended", ended.to_string())));
    output::print(&output::facts(&rows))
}

/// Imports batch by batch, each in a transaction of its own.
async fn import<S: Store>(store: &S, run: &ImportRun, rows: &mut Rows) -> Result<(), Error> {
    while let Some(batch) = rows.next().await {
        let mut tries = 0;
        let outcomes = loop {
            match store.import(run, &batch).await {
                Err(Error::Busy(_)) if tries < TRIES => tries += 1,
                answer => break answer?,
            }
        };
        rows.answer(outcomes);
    }
    Ok(())
}

/// Ends what the list no longer has.
async fn prune<S: Store>(store: &S, run: &ImportRun, force: bool) -> anyhow::Result<u64> {
    let unseen = store.unseen(run).await?;
    if !force && unseen.unseen * 100 > unseen.active * PRUNE_PERCENT {
        bail!(
            "--prune would end {} of the {} active tokens of source {:?}, more than {PRUNE_PERCENT} %: is the list \
             complete? If it is, add --force",
            unseen.unseen,
            unseen.active,
            run.source
        );
    }
    let mut ended = 0;
    for bucket in 0..=u8::MAX {
        ended += store.end_unseen(run, Bucket::from_number(bucket)).await?;
    }
    Ok(ended)
}

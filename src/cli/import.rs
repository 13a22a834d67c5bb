//! `lapsed token import`

mod rows;

use std::path::PathBuf;

use anyhow::bail;
use chrono::TimeDelta;
use clap::Args;
use futures_util::future::join_all;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use self::rows::{Count, Rows};
use super::{Outcome, output};
use crate::clock::{Clock, Timestamp};
use crate::config::format_duration;
use crate::import::ListError;
use crate::service;
use crate::store::imports::{Feed, ImportRow, ImportRun, RowOutcome};
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
        let mut rows = Rows::open(&self.file, S::BATCH)?;
        let stop = CancellationToken::new();
        service::stop_on_signals(&stop)?;
        let done = self.read(store, &run, &mut rows, &stop).await;
        rows.end();
        let count = std::mem::take(&mut rows.count);
        let complete = matches!(done, Some(Ok(()))) && rows.fatal.is_none() && count.refused == 0;
        let mut ended = None;
        let pruned = match self.prune && complete {
            true => prune(store, &run, self.force, &stop, &mut ended).await,
            false => Ok(()),
        };
        let landed = count.added + count.updated + count.unchanged > 0;
        let without_contact = if landed { store.owners_without_contact(&run).await? } else { 0 };
        remark(&count, without_contact, keep);
        let reported = report(&count, ended);
        self.verdict(done, rows.fatal, count.refused)?;
        pruned?;
        // Last, because a reader that has gone away must not make a bad list a success.
        Ok(reported?)
    }

    /// Imports what can be read of the list; `None` when it was interrupted.
    async fn read<S: Store>(
        &self,
        store: &S,
        run: &ImportRun,
        rows: &mut Rows,
        stop: &CancellationToken,
    ) -> Option<Result<(), Error>> {
        if !self.strict {
            return stop.run_until_cancelled(import(store, run, rows)).await;
        }
        let imported = stop.run_until_cancelled(store.import_strictly(run, rows)).await;
        if !matches!(imported, Some(Ok(true))) {
            rows.count.forget_written();
        }
        imported.map(|imported| imported.map(|_| ()))
    }

    /// Why the list was not imported as a whole.
    fn verdict(&self, done: Option<Result<(), Error>>, fatal: Option<ListError>, refused: u64) -> anyhow::Result<()> {
        match done {
            Some(done) => done?,
            None if self.strict => bail!("interrupted: nothing was imported"),
            None => bail!("interrupted: what was counted above is in the store; import the list again to go on"),
        }
        let name = rows::name(&self.file);
        if let Some(error) = fatal {
            bail!("{name} {error}");
        }
        if refused > 0 {
            let nothing = if self.strict { "; with --strict nothing was imported" } else { "" };
            let pruned = if self.prune { "; nothing was pruned, for the list may not be complete" } else { "" };
            let bad = if refused == 1 { "one bad row".into() } else { format!("{refused} bad rows") };
            bail!("{bad} in {name}{nothing}{pruned}");
        }
        Ok(())
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

/// Imports batch by batch: a batch in parts that have no owner in common, each in a transaction of its own.
async fn import<S: Store>(store: &S, run: &ImportRun, rows: &mut Rows) -> Result<(), Error> {
    while let Some(batch) = rows.next().await {
        let mut parts: Vec<Vec<ImportRow>> = (0..S::PARTS).map(|_| Vec::new()).collect();
        // Where each row went: the answers are told in the order of the list.
        let mut went = Vec::with_capacity(batch.len());
        for row in batch {
            let part = usize::from(Bucket::of(&row.owner_key).number()) % S::PARTS;
            went.push(part);
            if let Some(part) = parts.get_mut(part) {
                part.push(row);
            }
        }
        let imported = join_all(parts.iter().map(|part| import_part(store, run, part))).await;
        let imported: Vec<Vec<RowOutcome>> = imported.into_iter().collect::<Result<_, _>>()?;
        let mut outcomes: Vec<_> = imported.into_iter().map(Vec::into_iter).collect();
        rows.answer(went.into_iter().filter_map(|part| outcomes.get_mut(part)?.next()).collect());
        tokio::time::sleep(S::GAP).await;
    }
    Ok(())
}

/// Imports what has no owner in common with what is imported beside it.
async fn import_part<S: Store>(store: &S, run: &ImportRun, rows: &[ImportRow]) -> Result<Vec<RowOutcome>, Error> {
    let mut tries = 0;
    while !rows.is_empty() {
        match store.import(run, rows).await {
            Err(Error::Busy(_)) if tries < TRIES => tries += 1,
            answer => return answer,
        }
    }
    Ok(Vec::new())
}

/// Ends what the list no longer has, and counts it in `ended`: each bucket in a transaction of its own.
async fn prune<S: Store>(
    store: &S,
    run: &ImportRun,
    force: bool,
    stop: &CancellationToken,
    ended: &mut Option<u64>,
) -> anyhow::Result<()> {
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
    let ended = ended.insert(0);
    for bucket in 0..=u8::MAX {
        if stop.is_cancelled() {
            bail!(
                "interrupted: the list is imported, and {ended} of the {} tokens that it no longer has were ended; \
                 import it again to end the others",
                unseen.unseen
            );
        }
        *ended += store.end_unseen(run, Bucket::from_number(bucket)).await?;
    }
    Ok(())
}

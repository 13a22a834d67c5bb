//! `lapsed token import`

use std::fs::File;
use std::io::{IsTerminal, Read, stdin};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context as _, anyhow, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::sync::mpsc;
use uuid::Uuid;

use super::{Failure, Outcome, output};
use crate::clock::Clock;
use crate::import::{List, ListError};
use crate::store::imports::{Feed, ImportRow, ImportRun, RowOutcome};
use crate::store::{Error, Store};
use crate::token::{Bucket, text};

/// How many rows go to the store at once.
const BATCH: usize = 1_000;

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
    pub(super) async fn run<S: Store>(self, store: &S, clock: &impl Clock) -> Outcome {
        let run = ImportRun { id: Uuid::new_v4(), source: self.source.clone(), now: clock.now() };
        let name = name(&self.file);
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
        rows.bar.finish_and_clear();
        let count = std::mem::take(&mut rows.count);
        let ended = match (&rows.fatal, &done) {
            (None, Some(Ok(()))) if self.prune && count.refused == 0 => Some(prune(store, &run, self.force).await),
            _ => None,
        };
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

/// What people call the file.
fn name(path: &Path) -> String {
    if path == Path::new("-") { "standard input".into() } else { path.display().to_string() }
}

fn report(count: &Count, ended: Option<u64>) -> anyhow::Result<()> {
    let mut rows = vec![
        ("rows", count.rows.to_string()),
        ("added", count.added.to_string()),
        ("updated", count.updated.to_string()),
        ("unchanged", count.unchanged.to_string()),
        ("bad", count.refused.to_string()),
    ];
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

/// What became of the rows.
#[derive(Default)]
struct Count {
    rows: u64,
    added: u64,
    updated: u64,
    unchanged: u64,
    refused: u64,
}

impl Count {
    /// Nothing was written after all.
    fn forget_written(&mut self) {
        (self.added, self.updated, self.unchanged) = (0, 0, 0);
    }
}

/// Good rows with their lines, and bad ones with what is wrong.
#[derive(Default)]
struct Batch {
    good: Vec<(u64, ImportRow)>,
    bad: Vec<(u64, String)>,
}

/// The rows of a file, read by a thread of their own, a few batches ahead.
struct Rows {
    batches: mpsc::Receiver<Result<Batch, ListError>>,
    /// The lines of the rows that were given last.
    lines: Vec<u64>,
    count: Count,
    fatal: Option<ListError>,
    bar: ProgressBar,
    read: Arc<AtomicU64>,
}

impl Rows {
    fn open(path: &Path) -> Result<Self, Failure> {
        let read = Arc::new(AtomicU64::new(0));
        let (input, size): (Box<dyn Read + Send>, Option<u64>) = if path == Path::new("-") {
            (Box::new(stdin()), None)
        } else {
            let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
            let meta = file.metadata().with_context(|| format!("cannot read {}", path.display()))?;
            if meta.is_dir() {
                return Err(anyhow!("{} is a directory; name the file in it", path.display()).into());
            }
            (Box::new(file), Some(meta.len()))
        };
        let counted = Counted { inner: input, read: read.clone() };
        let list = List::open(counted).map_err(|error| anyhow!("{} {error}", name(path)))?;
        for column in list.unknown_columns() {
            output::say(&format!("column {column:?} is not known and is ignored"));
        }
        let (sender, batches) = mpsc::channel(2);
        tokio::task::spawn_blocking(move || pass_on(list, &sender));
        let bar = match size {
            Some(size) if std::io::stderr().is_terminal() => ProgressBar::new(size).with_style(style()),
            _ => ProgressBar::hidden(),
        };
        Ok(Self { batches, lines: Vec::new(), count: Count::default(), fatal: None, bar, read })
    }

    fn complain(&mut self, line: u64, problem: &str) {
        self.count.refused += 1;
        self.bar.suspend(|| output::say(&format!("line {line}: {problem}")));
    }
}

fn style() -> ProgressStyle {
    let style = ProgressStyle::with_template("{bar:40} {percent:>3} %  {bytes}  {eta} left");
    style.unwrap_or_else(|_| ProgressStyle::default_bar())
}

fn pass_on(list: List, to: &mpsc::Sender<Result<Batch, ListError>>) {
    let mut batch = Batch::default();
    for row in list {
        match row {
            Ok((line, Ok(row))) => batch.good.push((line, row)),
            Ok((line, Err(problem))) => batch.bad.push((line, problem)),
            Err(error) => {
                let _ = to.blocking_send(Ok(batch)).and_then(|()| to.blocking_send(Err(error)));
                return;
            }
        }
        if batch.good.len() + batch.bad.len() >= BATCH && to.blocking_send(Ok(std::mem::take(&mut batch))).is_err() {
            return;
        }
    }
    let _ = to.blocking_send(Ok(batch));
}

impl Feed for Rows {
    async fn next(&mut self) -> Option<Vec<ImportRow>> {
        loop {
            let batch = match self.batches.recv().await? {
                Ok(batch) => batch,
                Err(error) => {
                    self.fatal = Some(error);
                    return None;
                }
            };
            self.bar.set_position(self.read.load(Ordering::Relaxed));
            self.count.rows += (batch.good.len() + batch.bad.len()) as u64;
            for (line, problem) in &batch.bad {
                self.complain(*line, problem);
            }
            if !batch.good.is_empty() {
                let (lines, rows) = batch.good.into_iter().unzip();
                self.lines = lines;
                return Some(rows);
            }
        }
    }

    fn answer(&mut self, outcomes: Vec<RowOutcome>) {
        let lines = std::mem::take(&mut self.lines);
        for (line, outcome) in lines.into_iter().zip(outcomes) {
            match outcome {
                RowOutcome::Added => self.count.added += 1,
                RowOutcome::Updated => self.count.updated += 1,
                RowOutcome::Unchanged => self.count.unchanged += 1,
                RowOutcome::Refused(problem) => self.complain(line, &problem),
            }
        }
    }

    fn is_clean(&self) -> bool {
        self.count.refused == 0 && self.fatal.is_none()
    }
}

/// Counts what is read of a file, for the progress bar.
struct Counted<R> {
    inner: R,
    read: Arc<AtomicU64>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.read.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}

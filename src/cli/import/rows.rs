//! The rows of a list on their way to the store, and what is told of them.

use std::fs::File;
use std::io::{IsTerminal, Read, stdin};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context as _, anyhow};
use indicatif::{ProgressBar, ProgressStyle};
use tokio::sync::mpsc;

use crate::cli::{Failure, output};
use crate::import::{List, ListError, Row, column_names, meant_column};
use crate::store::imports::{Feed, ImportRow, RowOutcome};

/// How many bad rows are told one by one: a list whose columns are mixed up has nothing but bad rows.
const TOLD: u64 = 100;

/// What became of the rows.
#[derive(Default)]
pub(super) struct Count {
    pub(super) rows: u64,
    pub(super) added: u64,
    pub(super) updated: u64,
    pub(super) unchanged: u64,
    pub(super) long_ended: u64,
    pub(super) refused: u64,
}

impl Count {
    /// Nothing was written after all.
    pub(super) fn forget_written(&mut self) {
        (self.added, self.updated, self.unchanged, self.long_ended) = (0, 0, 0, 0);
    }
}

/// Rows with their lines, in the order of the list.
type Batch = Vec<(u64, Row)>;

/// The rows of a file, read by a thread of their own, a batch or two ahead.
pub(super) struct Rows {
    batches: mpsc::Receiver<Result<Batch, ListError>>,
    /// The lines of the batch that was given last, each with what is wrong where the store need not be asked.
    asked: Vec<(u64, Option<String>)>,
    pub(super) count: Count,
    /// Why the list could not be read to its end.
    pub(super) fatal: Option<ListError>,
    bar: ProgressBar,
    read: Arc<AtomicU64>,
}

/// What people call the file.
pub(super) fn name(path: &Path) -> String {
    if path == Path::new("-") { "standard input".into() } else { path.display().to_string() }
}

impl Rows {
    /// `batch`: how many rows go to the store at once.
    pub(super) fn open(path: &Path, batch: u32) -> Result<Self, Failure> {
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
            let meant = meant_column(column).map_or(String::new(), |meant| format!("; did you mean {meant}?"));
            output::say(&format!("column {column:?} is not known and is ignored{meant}"));
        }
        if !list.unknown_columns().is_empty() {
            output::say(&format!("the columns that are known: {}", column_names()));
        }
        let (sender, batches) = mpsc::channel(1);
        tokio::task::spawn_blocking(move || pass_on(list, batch as usize, &sender));
        let bar = match size {
            Some(size) if std::io::stderr().is_terminal() => ProgressBar::new(size).with_style(style()),
            _ => ProgressBar::hidden(),
        };
        Ok(Self { batches, asked: Vec::new(), count: Count::default(), fatal: None, bar, read })
    }

    /// Ends the progress bar, and says how many bad rows were not told one by one.
    pub(super) fn end(&self) {
        self.bar.finish_and_clear();
        if let Some(more @ 1..) = self.count.refused.checked_sub(TOLD) {
            output::say(&format!("... and {more} more; put these right, and import the list again to see the next"));
        }
    }

    fn complain(&mut self, line: u64, problem: &str) {
        self.count.refused += 1;
        if self.count.refused <= TOLD {
            self.bar.suspend(|| output::say(&format!("line {line}: {problem}")));
        }
    }
}

fn style() -> ProgressStyle {
    let style = ProgressStyle::with_template("{bar:40} {percent:>3} %  {bytes}  {eta} left");
    style.unwrap_or_else(|_| ProgressStyle::default_bar())
}

fn pass_on(list: List, most: usize, to: &mpsc::Sender<Result<Batch, ListError>>) {
    let mut batch = Batch::new();
    for row in list {
        match row {
            Ok(row) => batch.push(row),
            Err(error) => {
                let _ = to.blocking_send(Ok(batch)).and_then(|()| to.blocking_send(Err(error)));
                return;
            }
        }
        if batch.len() >= most && to.blocking_send(Ok(std::mem::take(&mut batch))).is_err() {
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
            self.count.rows += batch.len() as u64;
            let mut good = Vec::with_capacity(batch.len());
            self.asked.clear();
            for (line, row) in batch {
                let problem = row.map(|row| good.push(row)).err();
                self.asked.push((line, problem));
            }
            if !good.is_empty() {
                return Some(good);
            }
            self.answer(Vec::new());
        }
    }

    fn answer(&mut self, outcomes: Vec<RowOutcome>) {
        let mut outcomes = outcomes.into_iter();
        for (line, problem) in std::mem::take(&mut self.asked) {
            match problem.map(RowOutcome::Refused).or_else(|| outcomes.next()) {
                Some(RowOutcome::Added) => self.count.added += 1,
                Some(RowOutcome::Updated) => self.count.updated += 1,
                Some(RowOutcome::Unchanged) => self.count.unchanged += 1,
                Some(RowOutcome::LongEnded) => self.count.long_ended += 1,
                Some(RowOutcome::Refused(problem)) => self.complain(line, &problem),
                None => {}
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

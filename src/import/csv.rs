//! CSV (RFC 4180) with a header.

use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use csv::{ByteRecord, Reader, ReaderBuilder};

use super::fields::{COLUMNS, Fields, NEEDED, column, meant, row};
use super::{ListError, MAX_ROW, Row};

/// Makes every line end in a bare LF, because the parser counts the lines of CR LF one late; counts what is read between
/// two rows, and stops at a row that does not end.
struct Lines<R> {
    inner: R,
    since: Arc<AtomicU64>,
    /// A CR was the last of what was read: whether it ends a line, the next byte says.
    held: bool,
}

impl<R: Read> Read for Lines<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.since.load(Ordering::Relaxed) > MAX_ROW {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "a row does not end"));
        }
        loop {
            let from = usize::from(self.held);
            let Some((first, rest)) = buffer.split_first_mut().filter(|(_, rest)| !rest.is_empty()) else {
                return Err(io::Error::other("the buffer is too small"));
            };
            let count = if self.held {
                *first = b'\r';
                self.inner.read(rest)?
            } else {
                self.inner.read(buffer)?
            };
            if count == 0 {
                return Ok(usize::from(std::mem::take(&mut self.held)));
            }
            self.since.fetch_add(count as u64, Ordering::Relaxed);
            let filled = buffer.get_mut(..from + count).unwrap_or_default();
            self.held = filled.last() == Some(&b'\r');
            let kept = without_carriage_returns(filled);
            if kept > 0 {
                return Ok(kept);
            }
        }
    }
}

/// Takes away each CR that ends the buffer or stands before an LF, and returns how many bytes are left.
fn without_carriage_returns(buffer: &mut [u8]) -> usize {
    let mut kept = 0;
    for at in 0..buffer.len() {
        let ends_line = matches!(buffer.get(at + 1), None | Some(b'\n'));
        if let Some(byte) = buffer.get(at).copied().filter(|byte| *byte != b'\r' || !ends_line) {
            if let Some(place) = buffer.get_mut(kept) {
                *place = byte;
            }
            kept += 1;
        }
    }
    kept
}

/// The rows of a CSV.
pub(super) struct Records<R> {
    reader: Reader<Lines<R>>,
    since: Arc<AtomicU64>,
    /// For each column of the file, which of ours it is.
    columns: Vec<Option<usize>>,
    record: ByteRecord,
    done: bool,
}

/// What a header without this column has in its place, and what would be right.
fn instead(headers: &ByteRecord, missing: &str) -> String {
    let text = |header: &[u8]| String::from_utf8_lossy(header).trim().to_owned();
    if let Some(meant) = headers.iter().map(text).find(|header| meant(header) == Some(missing)) {
        return format!("is {meant:?} meant to be that?");
    }
    let line: String = headers.iter().map(text).collect::<Vec<_>>().join(",");
    let line: String = line.chars().filter(|c| *c == '\t' || !c.is_control()).take(80).collect();
    for (separator, name) in [(';', "semicolons"), ('\t', "tabs"), ('|', "bars")] {
        if line.split(separator).any(|part| column(part).is_some()) && line.contains(separator) {
            return format!("its first line is {line:?}: separate columns with commas, not with {name}");
        }
    }
    let needed = COLUMNS.get(..NEEDED).unwrap_or_default().join(", ");
    let others = COLUMNS.get(NEEDED..).unwrap_or_default().join(", ");
    format!(
        "its first line is {line:?}, where a CSV names its columns: {needed}, which each list needs, and as far as it has them {others}"
    )
}

impl<R: Read> Records<R> {
    /// Reads the header; also returns the names of columns that are not ours.
    pub(super) fn open(input: R) -> Result<(Self, Vec<String>), ListError> {
        let since = Arc::new(AtomicU64::new(0));
        let input = Lines { inner: input, since: since.clone(), held: false };
        let mut reader = ReaderBuilder::new().flexible(true).from_reader(input);
        let headers = reader.byte_headers().map_err(|error| fatal(error, 1))?.clone();
        let mut columns = Vec::new();
        let mut unknown = Vec::new();
        for header in &headers {
            let name = String::from_utf8_lossy(header);
            let known = column(&name);
            if let Some(at) = known
                && columns.contains(&Some(at))
            {
                return Err(ListError::ColumnTwice(COLUMNS.get(at).copied().unwrap_or_default()));
            }
            if known.is_none() {
                unknown.push(name.trim().chars().filter(|c| !c.is_control()).take(80).collect());
            }
            columns.push(known);
        }
        for (at, name) in COLUMNS.iter().enumerate().take(NEEDED) {
            if !columns.contains(&Some(at)) {
                return Err(ListError::MissingColumn { column: name, why: instead(&headers, name) });
            }
        }
        Ok((Self { reader, since, columns, record: ByteRecord::new(), done: false }, unknown))
    }

    fn fields(&self) -> Result<Fields, String> {
        if self.record.len() != self.columns.len() {
            return Err(format!(
                "it has {} fields, and the header names {} columns; is a quote or a comma missing?",
                self.record.len(),
                self.columns.len()
            ));
        }
        let mut fields = Fields::default();
        for (bytes, known) in self.record.iter().zip(&self.columns) {
            if let Some(field) = known.and_then(|at| fields.get_mut(at)) {
                *field = std::str::from_utf8(bytes).map_err(|_| "its text is not UTF-8".to_owned())?.to_owned();
            }
        }
        Ok(fields)
    }
}

impl<R: Read> Iterator for Records<R> {
    type Item = Result<(u64, Row), ListError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        self.since.store(0, Ordering::Relaxed);
        match self.reader.read_byte_record(&mut self.record) {
            Ok(true) => {
                let line = self.record.position().map_or(0, csv::Position::line);
                Some(Ok((line, self.fields().and_then(|fields| row(&fields)))))
            }
            Ok(false) => None,
            Err(error) => {
                self.done = true;
                let line = self.reader.position().line();
                Some(Err(fatal(error, line)))
            }
        }
    }
}

fn fatal(error: csv::Error, line: u64) -> ListError {
    match error.into_kind() {
        csv::ErrorKind::Io(error) if error.kind() == io::ErrorKind::FileTooLarge => ListError::EndlessRow(line),
        csv::ErrorKind::Io(error) => ListError::Io(error),
        other => ListError::Io(io::Error::other(format!("{other:?}"))),
    }
}

//! Lists of tokens that live elsewhere: CSV with a header, or JSON lines.
//!
//! [`List`] reads one row at a time, whatever the size of the file, and never gives up on a bad row: each is reported with
//! its line and the reason, and the next one is read. Only a list that cannot be read at all (no header, a column missing,
//! a row of more than a mebibyte) is an error. Arbitrary bytes never make it panic.

mod csv;
mod fields;
mod json;

use std::io::{self, BufRead, BufReader, Read};

pub use fields::{meant as meant_column, names as column_names};

use crate::store::imports::ImportRow;

/// The longest row, in bytes: beyond it, a quote is missing, or this is no list.
const MAX_ROW: u64 = 1 << 20;

/// What people take for a list, by its first bytes.
const NO_TEXT: [(&[u8], &str); 4] = [
    (b"\x1f\x8b", "compressed; unpack it first, for example with gunzip"),
    (b"PK\x03\x04", "a ZIP archive or a spreadsheet; save it as CSV first"),
    (b"\xff\xfe", "UTF-16; make it UTF-8 first, for example with iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "UTF-16; make it UTF-8 first, for example with iconv -f UTF-16 -t UTF-8"),
];

/// Why a list cannot be read, or not any further.
#[derive(Debug, thiserror::Error)]
pub enum ListError {
    /// The file, or the pipe.
    #[error("cannot be read: {0}")]
    Io(#[from] io::Error),
    /// There is nothing in it.
    #[error("is empty; the first line of a CSV names its columns: {}", fields::names())]
    Empty,
    /// A column that every list needs.
    #[error("has no column {column:?}; {why}")]
    MissingColumn {
        /// Which.
        column: &'static str,
        /// What there is in its place, and what would be right.
        why: String,
    },
    /// Not a text, as its first bytes show.
    #[error("is {0}")]
    NoText(&'static str),
    /// A column that stands there twice.
    #[error("has two columns {0:?}")]
    ColumnTwice(&'static str),
    /// A row that does not end.
    #[error("line {0}: a row of more than a mebibyte; is a closing quote missing?")]
    EndlessRow(u64),
    /// A JSON array, and not lines.
    #[error("is one JSON array; make it lines, for example with: jq -c '.[]'")]
    JsonArray,
}

/// A row, or what is wrong with it.
pub type Row = Result<ImportRow, String>;

/// A list that is being read.
pub struct List {
    rows: Box<dyn Iterator<Item = Result<(u64, Row), ListError>> + Send>,
    unknown: Vec<String>,
}

impl List {
    /// Begins to read a list; JSON lines where the first character is a brace, otherwise CSV.
    ///
    /// # Errors
    /// [`ListError`] when this is no list.
    pub fn open(input: impl Read + Send + 'static) -> Result<Self, ListError> {
        let mut input = BufReader::with_capacity(1 << 16, input);
        let begins = input.fill_buf()?;
        if let Some((_, what)) = NO_TEXT.iter().find(|(bytes, _)| begins.starts_with(bytes)) {
            return Err(ListError::NoText(what));
        }
        skip_byte_order_mark(&mut input)?;
        match first_character(&mut input)? {
            None => Err(ListError::Empty),
            Some(b'{') => Ok(Self { rows: Box::new(json::Lines::new(input)), unknown: Vec::new() }),
            Some(b'[') => Err(ListError::JsonArray),
            Some(_) => {
                let (rows, unknown) = csv::Records::open(input)?;
                Ok(Self { rows: Box::new(rows), unknown })
            }
        }
    }

    /// The columns of a CSV that mean nothing here and are ignored.
    pub fn unknown_columns(&self) -> &[String] {
        &self.unknown
    }
}

/// Each row with the number of its line, counted from 1; after an error, nothing.
impl Iterator for List {
    type Item = Result<(u64, Row), ListError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.rows.next()
    }
}

fn skip_byte_order_mark(input: &mut impl BufRead) -> io::Result<()> {
    if input.fill_buf()?.starts_with(b"\xef\xbb\xbf") {
        input.consume(3);
    }
    Ok(())
}

/// The first character that is not a space; spaces before it are skipped.
fn first_character(input: &mut impl BufRead) -> io::Result<Option<u8>> {
    loop {
        let buffer = input.fill_buf()?;
        if buffer.is_empty() {
            return Ok(None);
        }
        match buffer.iter().position(|byte| !byte.is_ascii_whitespace()) {
            Some(at) => {
                let first = buffer.get(at).copied();
                // The line breaks before the first row are counted by nobody: editors do not leave any.
                input.consume(at);
                return Ok(first);
            }
            None => {
                let all = buffer.len();
                input.consume(all);
            }
        }
    }
}

#[cfg(test)]
mod tests;

//! Lists: as a table for people, as CSV, or as JSON lines.
//!
//! CSV and JSON have the same fields under the same names, in full and in UTC (RFC 3339); they are written as they come,
//! so a list of millions needs no memory. A table is shorter, and says "in 6 days".

use std::io::{BufWriter, Write};

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::Value;

use super::output;
use crate::clock::Timestamp;

/// How a list is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people
    #[default]
    Table,
    /// One JSON object a line
    Json,
    /// With a header (RFC 4180)
    Csv,
}

/// `--format`
#[derive(Clone, Copy, Debug, Args)]
pub struct FormatArg {
    /// How to write the list
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

impl FormatArg {
    /// This one, or the default.
    pub fn of(format: Option<Format>) -> Self {
        Self { format: format.unwrap_or_default() }
    }

    /// Whether people read it.
    pub fn is_table(self) -> bool {
        self.format == Format::Table
    }
}

/// The fields of a row for programs: names, which never change, and values.
pub type Fields = Vec<(&'static str, Value)>;

/// A list that is being written.
pub struct Listing {
    format: Format,
    header: &'static [&'static str],
    rows: Vec<Vec<String>>,
    out: BufWriter<std::io::Stdout>,
}

impl Listing {
    /// A list whose table has this header, and whose CSV has these fields.
    ///
    /// # Errors
    /// When stdout cannot be written.
    pub fn new(
        format: FormatArg,
        header: &'static [&'static str],
        fields: &'static [&'static str],
    ) -> anyhow::Result<Self> {
        let out = BufWriter::new(std::io::stdout());
        let mut listing = Self { format: format.format, header, rows: Vec::new(), out };
        if format.format == Format::Csv {
            listing.csv(fields.iter().map(|name| (*name).to_owned()))?;
        }
        Ok(listing)
    }

    /// Writes a row: `fields` for programs, `cells` for people; only one of them is asked for.
    ///
    /// # Errors
    /// When stdout cannot be written.
    pub fn row(&mut self, fields: impl FnOnce() -> Fields, cells: impl FnOnce() -> Vec<String>) -> anyhow::Result<()> {
        match self.format {
            Format::Table => self.rows.push(cells()),
            Format::Json => {
                serde_json::to_writer(&mut self.out, &Object(&fields())).map_err(std::io::Error::from)?;
                self.out.write_all(b"\n")?;
            }
            Format::Csv => {
                self.csv(fields().iter().map(|(_, value)| plain(value)))?;
            }
        }
        Ok(())
    }

    /// Ends the list; `nothing` is said where there was no row.
    ///
    /// # Errors
    /// When stdout cannot be written.
    pub fn end(mut self, nothing: &str) -> anyhow::Result<()> {
        self.out.flush()?;
        if self.format != Format::Table {
            return Ok(());
        }
        if self.rows.is_empty() {
            output::say(nothing);
            return Ok(());
        }
        output::print(&output::table(self.header, self.rows))
    }

    fn csv(&mut self, cells: impl Iterator<Item = String>) -> anyhow::Result<()> {
        let mut writer = csv::Writer::from_writer(Vec::new());
        writer.write_record(cells).context("a row of CSV")?;
        let line = writer.into_inner().map_err(|error| anyhow::anyhow!("a row of CSV: {error}"))?;
        self.out.write_all(&line)?;
        Ok(())
    }
}

/// Fields in their order.
struct Object<'a>(&'a Fields);

impl Serialize for Object<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (name, value) in self.0 {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

/// A value as CSV has it: nothing for null, texts as they are, lists with spaces between.
fn plain(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Array(values) => values.iter().map(plain).collect::<Vec<_>>().join(" "),
        other => other.to_string(),
    }
}

/// An instant for programs.
pub fn instant(at: Option<Timestamp>) -> Value {
    at.map_or(Value::Null, |at| Value::String(at.format("%Y-%m-%dT%H:%M:%SZ").to_string()))
}

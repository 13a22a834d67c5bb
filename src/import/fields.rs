//! The columns of a list, and what their texts mean.

use chrono::{DateTime, NaiveDate, NaiveTime, Utc};

use crate::clock::{Timestamp, whole_seconds};
use crate::expires::Expires;
use crate::store::imports::ImportRow;
use crate::token::{Address, text};

/// Column names, in the order of [`Fields`]; those that every list needs come first.
pub(super) const COLUMNS: [&str; 10] = [
    "owner",
    "description",
    "expires_at",
    "emails",
    "watch",
    "external_id",
    "created_at",
    "last_used_at",
    "revoked_at",
    "time_zone",
];

/// How many of [`COLUMNS`] every list needs.
pub(super) const NEEDED: usize = 3;

/// The texts of a row, one for each of [`COLUMNS`]; empty where there is none.
pub(super) type Fields = [String; COLUMNS.len()];

/// The names of all columns, for people.
pub fn names() -> String {
    COLUMNS.join(", ")
}

/// The column that somebody who wrote this name may have meant.
pub fn meant(name: &str) -> Option<&'static str> {
    let name = name.trim().to_lowercase();
    let score = |column: &str| strsim::normalized_damerau_levenshtein(column, &name);
    let best = COLUMNS.into_iter().map(|column| (column, score(column))).max_by(|(_, a), (_, b)| a.total_cmp(b));
    best.filter(|(_, score)| *score >= 0.7).map(|(column, _)| column)
}

/// Which column a header means.
pub(super) fn column(header: &str) -> Option<usize> {
    let header = header.trim().to_lowercase();
    COLUMNS.iter().position(|name| *name == header)
}

/// Reads the texts of a row.
pub(super) fn row(fields: &Fields) -> Result<ImportRow, String> {
    let [owner, description, expires_at, emails, watch, external_id, created_at, last_used_at, revoked_at, time_zone] =
        fields.each_ref().map(|field| field.trim());
    let in_column = |name: &'static str| move |problem: String| format!("{name}: {problem}");
    let description = text::description(description).map_err(in_column("description"))?;
    let zone = (!time_zone.is_empty()).then(|| text::time_zone(time_zone)).transpose();
    Ok(ImportRow {
        owner_key: text::key(owner).map_err(in_column("owner"))?,
        time_zone: zone.map_err(in_column("time_zone"))?,
        addresses: addresses(emails).map_err(in_column("emails"))?,
        watchers: addresses(watch).map_err(in_column("watch"))?,
        external_id: external(external_id, &description).map_err(in_column("external_id"))?,
        expires: expires(expires_at).map_err(in_column("expires_at"))?,
        created_at: instant(created_at).map_err(in_column("created_at"))?,
        last_used_at: instant(last_used_at).map_err(in_column("last_used_at"))?,
        revoked_at: instant(revoked_at).map_err(in_column("revoked_at"))?,
        description,
    })
}

/// Several addresses.
fn addresses(text: &str) -> Result<Vec<Address>, String> {
    let addresses = text.split(';').map(str::trim).filter(|address| !address.is_empty());
    addresses.map(|address| Address::parse(address).map_err(|problem| problem.to_string())).collect()
}

/// The external id; where the list has none, the description stands for it.
fn external(text: &str, description: &str) -> Result<String, String> {
    let id = if text.is_empty() { description } else { text };
    if id.chars().any(char::is_control) || id.chars().count() > 200 {
        return Err("an external id has at most 200 characters, and no control characters".into());
    }
    Ok(id.to_owned())
}

fn expires(text: &str) -> Result<Expires, String> {
    if text.is_empty() {
        return Ok(Expires::Never);
    }
    match text.parse() {
        Ok(Expires::In(_)) | Err(_) if !text.starts_with(|c: char| c.is_ascii_digit()) || !text.contains('-') => {
            Err(format!(
                "{text:?} is not a deadline: write 2027-01-31T09:00:00Z, or 2027-01-31 for the end of that day, or \
                 nothing for never"
            ))
        }
        other => other,
    }
}

fn instant(text: &str) -> Result<Option<Timestamp>, String> {
    if text.is_empty() {
        return Ok(None);
    }
    let day = |date: NaiveDate| date.and_time(NaiveTime::MIN).and_utc();
    let instant = DateTime::parse_from_rfc3339(text)
        .map(|instant| instant.with_timezone(&Utc))
        .or_else(|_| NaiveDate::parse_from_str(text, "%Y-%m-%d").map(day));
    let instant = instant.map_err(|_| format!("{text:?} is not an instant such as 2027-01-31T09:00:00Z"))?;
    if instant < Timestamp::UNIX_EPOCH || instant.timestamp() > 253_402_300_799 {
        return Err(format!("{text} lies outside of the years 1970 to 9999"));
    }
    Ok(Some(whole_seconds(instant)))
}

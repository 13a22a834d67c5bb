//! What commands print: one form of instants, of facts, and of tables.

use std::io::{ErrorKind, Write};

use chrono_tz::Tz;
use comfy_table::{Cell, Color, ContentArrangement, Table, presets};

use crate::clock::Timestamp;
use crate::mail::clean::is_invisible;
use crate::mail::when;
use crate::token::{NEVER, Owner, Secret, Status, Token};

/// Prints a result. A reader that has gone away (`| head`) is reported as an error, which ends the command quietly.
///
/// # Errors
/// When stdout cannot be written.
pub fn print(text: &str) -> anyhow::Result<()> {
    let mut out = anstream::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}

/// Prints a message for the person at the terminal.
pub fn say(text: &str) {
    // Nothing is lost when nobody can read it.
    let _ = writeln!(anstream::stderr(), "{text}");
}

/// Prints why a command failed.
pub fn complain(text: &str) {
    say(&format!("lapsed: {text}"));
}

/// Whether a command ended because nobody reads its output any more.
pub fn is_closed_pipe(error: &anyhow::Error) -> bool {
    let io = error.chain().find_map(|cause| cause.downcast_ref::<std::io::Error>());
    io.is_some_and(|error| error.kind() == ErrorKind::BrokenPipe)
}

/// An instant in a zone, and where that is not UTC, also in UTC.
pub fn instant(at: Timestamp, zone: Tz) -> String {
    let utc = at.format("%Y-%m-%d %H:%M:%S UTC").to_string();
    if zone == chrono_tz::UTC {
        utc
    } else {
        format!("{}, {utc}", at.with_timezone(&zone).format("%Y-%m-%d %H:%M:%S %Z"))
    }
}

/// A deadline with everything that a person wants to know of it.
pub fn deadline(expires_at: Option<Timestamp>, now: Timestamp, zone: Tz) -> String {
    match expires_at {
        None => "never".into(),
        Some(at) => {
            let (day, date) = (when::day_phrase(at, now, zone), when::date_phrase(at, zone));
            format!("{day}, {date} ({})", instant(at, zone))
        }
    }
}

/// Facts below each other, aligned.
pub fn facts(rows: &[(&str, String)]) -> String {
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
    rows.iter().map(|(name, value)| format!("{name:width$}  {}\n", shown(value))).collect()
}

/// Without what would reorder or hide what stands around it on a terminal.
fn shown(text: &str) -> String {
    text.chars().filter(|c| *c == '\n' || !is_invisible(*c)).collect()
}

/// The narrowest terminal that a table is made to fit, in columns.
const NARROWEST: u16 = 40;

/// A table that fits the terminal; when piped, as wide as it must be.
pub fn table(header: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    let rows = rows.into_iter().map(|row| row.into_iter().map(cell).collect::<Vec<_>>());
    table.load_style(presets::NOTHING).set_header(header.iter().copied()).add_rows(rows);
    if std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty()) {
        table.force_no_tty();
    }
    table.column_iter_mut().for_each(|column| {
        column.set_padding((0, 2));
    });
    // A terminal that does not tell its width, or a sliver of one, gets the table as it is.
    if table.width().is_some_and(|width| width >= NARROWEST) {
        table.set_content_arrangement(ContentArrangement::Dynamic);
    }
    let mut text: String = table.lines().map(|line| format!("{}\n", line.trim_end())).collect();
    if text.is_empty() {
        text.push('\n');
    }
    text
}

/// A cell; on a terminal, what became of a token or a reminder has a colour.
fn cell(text: String) -> Cell {
    let text = shown(&text);
    let colour = match text.as_str() {
        "active" | "sent" => Color::Green,
        "expired" | "failed" | "unreachable" => Color::Red,
        "revoked" | "cancelled" | "superseded" | "stale" => Color::Yellow,
        _ => return Cell::new(text),
    };
    Cell::new(text).fg(colour)
}

/// A token and its owner, as facts.
pub fn token(token: &Token, owner: &Owner, now: Timestamp) -> Vec<(&'static str, String)> {
    let zone = owner.time_zone;
    let status = match (token.status, token.validity(now)) {
        // The daemon has not marked it yet; the clock decides.
        (Status::Active, Err(why)) => why.to_string(),
        (status, _) => status.to_string(),
    };
    let mut rows = vec![
        ("token", token.id.to_string()),
        ("owner", if owner.name == owner.key { owner.key.clone() } else { format!("{} ({})", owner.key, owner.name) }),
        ("kind", token.kind.to_string()),
        ("description", token.description.clone()),
    ];
    if !token.scopes.is_empty() {
        rows.push(("scopes", token.scopes.join(" ")));
    }
    rows.push(("status", status));
    rows.push(("expires", deadline(token.expires_at, now, zone)));
    if let Some(before) = token.moved_from {
        rows.push(("moved from", if before == NEVER { "never".into() } else { instant(before, zone) }));
    }
    rows.push(("created", instant(token.created_at, zone)));
    let unused = if token.issued { "never" } else { "not known: it was imported" };
    rows.push(("last used", token.last_used_at.map_or_else(|| unused.into(), |at| instant(at, zone))));
    if let Some(source) = &token.source {
        rows.push(("source", source.clone()));
    }
    if let Some(external_id) = &token.external_id {
        rows.push(("external id", external_id.clone()));
    }
    if let Some(at) = token.ended_at {
        rows.push(("ended", instant(at, zone)));
    }
    if let Some(successor) = token.replaced_by {
        rows.push(("replaced by", successor.to_string()));
    }
    rows
}

/// Prints a new token and its secret.
///
/// # Errors
/// When stdout cannot be written.
pub fn new_token(new: &Token, secret: &Secret, owner: &Owner, now: Timestamp) -> anyhow::Result<()> {
    let mut rows = token(new, owner, now);
    rows.retain(|(name, _)| !matches!(*name, "last used" | "created" | "status"));
    rows.push(("secret", secret.expose()));
    // Not by `?`: a reader that has gone away must not make this a success.
    print(&facts(&rows)).map_err(|error| {
        anyhow::anyhow!("token {} was made, but its secret could not be shown ({error}): rotate or revoke it", new.id)
    })?;
    say("Keep the secret now: it is not shown again.");
    Ok(())
}

//! Many rows in one bound value: SQLite's way to write and ask about them at once.

use serde::Serialize;
use uuid::Uuid;

/// Rows for `json_each`: SQLite's way to bind many at once. Ids travel as hexadecimal digits.
pub(super) fn json<T: Serialize>(rows: impl IntoIterator<Item = T>) -> String {
    let rows: Vec<T> = rows.into_iter().collect();
    // Numbers, texts and tuples of them always serialise.
    serde_json::to_string(&rows).unwrap_or_default()
}

pub(super) fn hex(id: Uuid) -> String {
    id.simple().to_string()
}

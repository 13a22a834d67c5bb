//! What is copied: the tables that PostgreSQL has, which must be those that SQLite has, and how each column is written as text.

use std::collections::BTreeSet;

use sqlx::{AssertSqlSafe, Sqlite as Lite, Transaction};

use super::JOB;
use crate::store::{Error, Postgres, Result};

/// A table that both stores have.
pub(super) struct Table {
    pub(super) name: String,
    pub(super) columns: Vec<Column>,
    /// Which columns are the primary key, in its order.
    pub(super) key: Vec<usize>,
    /// Which column is the bucket.
    pub(super) bucket: usize,
}

/// A column that both have.
pub(super) struct Column {
    name: String,
    kind: Kind,
}

/// What a column holds, by its type in PostgreSQL.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Integer(&'static str),
    Boolean,
    Text,
    Uuid,
    Bytes,
    Instant,
}

impl Kind {
    fn of(name: &str) -> Option<Self> {
        Some(match name {
            "smallint" => Self::Integer("smallint"),
            "integer" => Self::Integer("integer"),
            "bigint" => Self::Integer("bigint"),
            "boolean" => Self::Boolean,
            "text" => Self::Text,
            "uuid" => Self::Uuid,
            "bytea" => Self::Bytes,
            "timestamp with time zone" => Self::Instant,
            _ => return None,
        })
    }

    /// As text, by SQLite: ids and bytes as hexadecimal digits, instants as seconds, truth values as 0 and 1.
    fn here(self, column: &str) -> String {
        match self {
            Self::Uuid | Self::Bytes => format!("CASE WHEN {column} IS NOT NULL THEN LOWER(HEX({column})) END"),
            _ => format!("CAST({column} AS TEXT)"),
        }
    }

    /// From that text, by SQLite.
    fn read_here(self) -> &'static str {
        match self {
            Self::Uuid | Self::Bytes => "UNHEX(?)",
            Self::Text => "?",
            _ => "CAST(? AS INTEGER)",
        }
    }

    /// The same text, by PostgreSQL.
    fn there(self, column: &str) -> String {
        match self {
            Self::Uuid => format!("REPLACE({column}::text, '-', '')"),
            Self::Bytes => format!("ENCODE({column}, 'hex')"),
            Self::Instant => format!("EXTRACT(EPOCH FROM {column})::bigint::text"),
            Self::Boolean => format!("{column}::integer::text"),
            Self::Integer(_) | Self::Text => format!("{column}::text"),
        }
    }

    /// From that text, by PostgreSQL.
    fn read_there(self, text: &str) -> String {
        match self {
            Self::Uuid => format!("{text}::uuid"),
            Self::Bytes => format!("DECODE({text}, 'hex')"),
            Self::Instant => format!("TO_TIMESTAMP({text}::bigint)"),
            Self::Boolean => format!("{text}::integer::boolean"),
            Self::Integer(name) => format!("{text}::{name}"),
            Self::Text => text.to_owned(),
        }
    }
}

/// The tables of both, each after those that it refers to.
pub(super) async fn read(source: &mut Transaction<'static, Lite>, to: &Postgres) -> Result<Vec<Table>> {
    let mut target = to.begin().await?;
    let names: Vec<(String,)> = sqlx::query_as(
        "SELECT relname::text FROM pg_class \
         WHERE relkind IN ('r', 'p') AND NOT relispartition AND relnamespace = CURRENT_SCHEMA()::regnamespace \
           AND relname NOT LIKE '\\_sqlx%' \
         ORDER BY relname",
    )
    .fetch_all(&mut *target)
    .await?;
    let here: Vec<(String,)> = sqlx::query_as(
        "SELECT name FROM sqlite_schema \
         WHERE type = 'table' AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' AND name NOT LIKE '\\_sqlx%' ESCAPE '\\' \
         ORDER BY name",
    )
    .fetch_all(&mut **source)
    .await?;
    if names != here {
        return Err(differ("tables", &names, &here));
    }
    let mut tables = Vec::new();
    for (name,) in names {
        let columns: Vec<(String, String)> = sqlx::query_as(
            "SELECT attname::text, FORMAT_TYPE(atttypid, NULL) FROM pg_attribute \
             WHERE attrelid = $1::regclass AND attnum > 0 AND NOT attisdropped \
             ORDER BY attname",
        )
        .bind(&name)
        .fetch_all(&mut *target)
        .await?;
        let there: Vec<(String,)> = columns.iter().map(|(name, _)| (name.clone(),)).collect();
        let here: Vec<(String,)> = sqlx::query_as("SELECT name FROM pragma_table_info($1) ORDER BY name")
            .bind(&name)
            .fetch_all(&mut **source)
            .await?;
        if there != here {
            return Err(differ(&format!("columns of {name}"), &there, &here));
        }
        let columns = columns
            .into_iter()
            .map(|(column, kind)| match Kind::of(&kind) {
                Some(kind) => Ok(Column { name: column, kind }),
                None => Err(Error::Open(format!("the column {name}.{column} is of a type that is not copied: {kind}"))),
            })
            .collect::<Result<Vec<Column>>>()?;
        let key: Vec<(String,)> = sqlx::query_as(
            "SELECT a.attname::text \
             FROM pg_index i \
             CROSS JOIN UNNEST(i.indkey::smallint[]) WITH ORDINALITY AS k (attnum, place) \
             JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum \
             WHERE i.indrelid = $1::regclass AND i.indisprimary \
             ORDER BY k.place",
        )
        .bind(&name)
        .fetch_all(&mut *target)
        .await?;
        let place = |wanted: &str| columns.iter().position(|column| column.name == wanted);
        let key: Vec<usize> = key.iter().filter_map(|(column,)| place(column)).collect();
        let Some(bucket) = place("bucket").filter(|_| !key.is_empty()) else {
            return Err(Error::Open(format!("the table {name} has no bucket or no primary key")));
        };
        tables.push(Table { name, columns, key, bucket });
    }
    let references: Vec<(String, String)> = sqlx::query_as(
        "SELECT DISTINCT f.relname::text, t.relname::text \
         FROM pg_constraint c \
         JOIN pg_class f ON f.oid = c.conrelid \
         JOIN pg_class t ON t.oid = c.confrelid \
         WHERE c.contype = 'f' AND f.oid <> t.oid",
    )
    .fetch_all(&mut *target)
    .await?;
    Ok(in_order(tables, &references))
}

/// Those that are referred to come first.
fn in_order(mut tables: Vec<Table>, references: &[(String, String)]) -> Vec<Table> {
    let mut ordered: Vec<Table> = Vec::new();
    let mut done: BTreeSet<String> = BTreeSet::new();
    while !tables.is_empty() {
        let waits = |table: &Table| {
            references.iter().any(|(from, to)| {
                *from == table.name && !done.contains(to) && tables.iter().any(|other| other.name == *to)
            })
        };
        // In a circle of references, which there is none of, whichever comes first.
        let next = tables.iter().position(|table| !waits(table)).unwrap_or(0);
        let table = tables.remove(next);
        done.insert(table.name.clone());
        ordered.push(table);
    }
    ordered
}

fn differ(what: &str, there: &[(String,)], here: &[(String,)]) -> Error {
    let only = |these: &[(String,)], those: &[(String,)]| {
        let only: Vec<&str> = these.iter().filter(|one| !those.contains(one)).map(|(name,)| name.as_str()).collect();
        if only.is_empty() { "none".to_owned() } else { only.join(", ") }
    };
    Error::Open(format!(
        "the two stores have different {what}: only in PostgreSQL {}, only in SQLite {}",
        only(there, here),
        only(here, there)
    ))
}

impl Table {
    fn list(&self, form: impl Fn(&Column) -> String) -> String {
        self.columns.iter().map(form).collect::<Vec<_>>().join(", ")
    }

    fn key_columns(&self) -> impl Iterator<Item = &Column> {
        self.key.iter().filter_map(|at| self.columns.get(*at))
    }

    fn key_list(&self, form: impl Fn(&Column) -> String) -> String {
        self.key_columns().map(form).collect::<Vec<_>>().join(", ")
    }

    /// What is not copied: who copies.
    fn but(&self) -> String {
        if self.name == "jobs" { format!("name <> '{JOB}'") } else { "TRUE".to_owned() }
    }

    /// A page of the source by primary key; after a key, whose parts are bound in order.
    pub(super) fn page(&self, after: bool, limit: usize) -> String {
        let key = self.key_list(|column| column.name.clone());
        let from = match after {
            true => format!("({key}) > ({})", self.key_list(|column| column.kind.read_here().to_owned())),
            false => "TRUE".to_owned(),
        };
        let columns = self.list(|column| column.kind.here(&column.name));
        format!("SELECT {columns} FROM {} WHERE {} AND {from} ORDER BY {key} LIMIT {limit}", self.name, self.but())
    }

    /// Everything in the source.
    pub(super) fn all_here(&self) -> String {
        format!("SELECT {} FROM {} WHERE {}", self.list(|column| column.kind.here(&column.name)), self.name, self.but())
    }

    /// Everything in the target.
    pub(super) fn all_there(&self) -> String {
        format!(
            "SELECT {} FROM {} WHERE {}",
            self.list(|column| column.kind.there(&column.name)),
            self.name,
            self.but()
        )
    }

    /// Writes a page, bound as an array of texts for each column.
    pub(super) fn insert(&self) -> String {
        let names = self.list(|column| column.name.clone());
        let values = self.list(|column| column.kind.read_there(&format!("n.{}", column.name)));
        let arrays: Vec<String> = (1..=self.columns.len()).map(|i| format!("${i}::text[]")).collect();
        format!(
            "INSERT INTO {} ({names}) SELECT {values} FROM UNNEST({}) AS n ({names}) ON CONFLICT DO NOTHING",
            self.name,
            arrays.join(", ")
        )
    }

    pub(super) async fn count(&self, source: &mut Transaction<'static, Lite>) -> Result<u64> {
        let sql = format!("SELECT COUNT(*) FROM {} WHERE {}", self.name, self.but());
        let (count,): (i64,) = sqlx::query_as(AssertSqlSafe(sql)).fetch_one(&mut **source).await?;
        Ok(count.unsigned_abs())
    }

    pub(super) async fn count_in_target(&self, to: &Postgres) -> Result<u64> {
        let mut tx = to.begin_long_read().await?;
        let sql = format!("SELECT COUNT(*) FROM {} WHERE {}", self.name, self.but());
        let (count,): (i64,) = sqlx::query_as(AssertSqlSafe(sql)).fetch_one(&mut *tx).await?;
        Ok(count.unsigned_abs())
    }

    /// The last key that the target has. `None` where it has no row, and where the key has texts, which the two order
    /// differently: such a table is small, and begun again.
    pub(super) async fn last_in_target(&self, to: &Postgres) -> Result<Option<Vec<String>>> {
        if self.key_columns().any(|column| column.kind == Kind::Text) {
            return Ok(None);
        }
        let parts = self.key_list(|column| column.kind.there(&column.name));
        let order = self.key_list(|column| format!("{} DESC", column.name));
        let sql = format!("SELECT ARRAY[{parts}] FROM {} ORDER BY {order} LIMIT 1", self.name);
        let mut tx = to.begin_long_read().await?;
        let last: Option<(Vec<String>,)> = sqlx::query_as(AssertSqlSafe(sql)).fetch_optional(&mut *tx).await?;
        Ok(last.map(|(parts,)| parts))
    }
}

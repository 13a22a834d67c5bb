//! Rows on their way to becoming domain types. Nothing above the store sees one.
//!
//! Both back ends decode into these; [`At`] hides that SQLite keeps an instant as whole seconds in an INTEGER.

#[macro_use]
mod columns;
mod messages;
mod planning;

use std::str::FromStr;

use chrono::{DateTime, Utc};
use sqlx::encode::IsNull;
use sqlx::error::BoxDynError;
use sqlx::{Decode, Encode, Postgres, Sqlite, Type};
use uuid::Uuid;

use super::accounts::{OwnerSummary, ReminderRecord, TokenCounts};
use super::imports::Known;
use super::jobs::JobRecord;
use super::{Error, Result};
use crate::clock::Timestamp;
use crate::policy::Lead;
use crate::token::{Address, Contact, Owner, Suppressed, Token};

pub(super) use messages::{
    CarriedRow, ClaimAndContactRow, ClaimRow, ContentRow, MessageRow, QueuedRow, ReportRow, alerted, claimed,
    message_count, message_state,
};
pub(super) use planning::{
    AheadRow, CandidateRow, FactRow, TraitsRow, addressees, candidate_columns, facts, grouped, mailed_since,
};

/// An instant as either back end keeps it.
#[derive(Clone, Copy, Debug)]
pub(super) struct At(pub(super) Timestamp);

impl Type<Postgres> for At {
    fn type_info() -> sqlx::postgres::PgTypeInfo {
        <DateTime<Utc> as Type<Postgres>>::type_info()
    }
}

impl Encode<'_, Postgres> for At {
    fn encode_by_ref(&self, buffer: &mut sqlx::postgres::PgArgumentBuffer) -> std::result::Result<IsNull, BoxDynError> {
        <DateTime<Utc> as Encode<Postgres>>::encode_by_ref(&self.0, buffer)
    }
}

impl Decode<'_, Postgres> for At {
    fn decode(value: sqlx::postgres::PgValueRef<'_>) -> std::result::Result<Self, BoxDynError> {
        <DateTime<Utc> as Decode<Postgres>>::decode(value).map(Self)
    }
}

impl Type<Sqlite> for At {
    fn type_info() -> sqlx::sqlite::SqliteTypeInfo {
        <i64 as Type<Sqlite>>::type_info()
    }

    fn compatible(ty: &sqlx::sqlite::SqliteTypeInfo) -> bool {
        <i64 as Type<Sqlite>>::compatible(ty)
    }
}

impl Encode<'_, Sqlite> for At {
    fn encode_by_ref(
        &self,
        buffer: &mut sqlx::sqlite::SqliteArgumentsBuffer,
    ) -> std::result::Result<IsNull, BoxDynError> {
        <i64 as Encode<Sqlite>>::encode_by_ref(&self.0.timestamp(), buffer)
    }
}

impl Decode<'_, Sqlite> for At {
    fn decode(value: sqlx::sqlite::SqliteValueRef<'_>) -> std::result::Result<Self, BoxDynError> {
        let seconds = <i64 as Decode<Sqlite>>::decode(value)?;
        DateTime::from_timestamp(seconds, 0).map(Self).ok_or_else(|| format!("{seconds} is not an instant").into())
    }
}

/// A row that cannot be read.
fn broken(table: &'static str, column: &'static str, row: impl ToString, problem: impl ToString) -> Error {
    Error::Broken { table, column, row: row.to_string(), problem: problem.to_string() }
}

fn word<T: FromStr>(table: &'static str, column: &'static str, row: Uuid, text: &str) -> Result<T> {
    text.parse().map_err(|_| broken(table, column, row, format!("unknown value {text:?}")))
}

/// Reads all rows into what they stand for.
pub(super) fn all<R, T>(rows: Vec<R>) -> Result<Vec<T>>
where
    T: TryFrom<R, Error = Error>,
{
    rows.into_iter().map(T::try_from).collect()
}

row! {
    pub(super) struct OwnerRow {
        id: Uuid,
        key: String,
        name: String,
        time_zone: String,
        locale: String,
    }
}

impl TryFrom<OwnerRow> for Owner {
    type Error = Error;

    fn try_from(row: OwnerRow) -> Result<Self> {
        let zone = row.time_zone.parse();
        Ok(Self {
            id: row.id.into(),
            key: row.key,
            name: row.name,
            time_zone: zone.map_err(|_| broken("owners", "time_zone", row.id, "not a time zone"))?,
            locale: row.locale,
        })
    }
}

row! {
    #[derive(Clone)]
    pub(super) struct ContactRow {
        id: Uuid,
        address: String,
        time_zone: Option<String>,
        locale: Option<String>,
        suppressed_at: Option<At>,
        suppressed_why: Option<String>,
    }
}

impl TryFrom<ContactRow> for Contact {
    type Error = Error;

    fn try_from(row: ContactRow) -> Result<Self> {
        let zone = row.time_zone.map(|zone| zone.parse()).transpose();
        let suppressed =
            row.suppressed_at.map(|at| Suppressed { at: at.0, why: row.suppressed_why.unwrap_or_default() });
        Ok(Self {
            id: row.id.into(),
            address: Address::from_store(row.address),
            time_zone: zone.map_err(|_| broken("contacts", "time_zone", row.id, "not a time zone"))?,
            locale: row.locale,
            suppressed,
        })
    }
}

row! {
    pub(super) struct TokenRow {
        id: Uuid,
        owner_id: Uuid,
        kind: String,
        description: String,
        scopes: String,
        issued: bool,
        external_id: Option<String>,
        source: Option<String>,
        hint: Option<String>,
        created_at: At,
        expires_at: Option<At>,
        moved_from: Option<At>,
        deadline_set_at: At,
        generation: i32,
        unplanned: bool,
        uncorrected: bool,
        last_used_at: Option<At>,
        status: String,
        ended_at: Option<At>,
        replaced_by: Option<Uuid>,
    }
}

/// The columns of a [`TokenRow`].
macro_rules! token_columns {
    () => {
        "t.id, t.owner_id, t.kind, t.description, t.scopes, t.secret_hash IS NOT NULL AS issued, t.external_id, t.source, \
         t.hint, t.created_at, t.expires_at, t.moved_from, t.deadline_set_at, t.generation, t.unplanned, t.uncorrected, t.last_used_at, \
         t.status, t.ended_at, t.replaced_by"
    };
}
pub(super) use token_columns;

impl TryFrom<TokenRow> for Token {
    type Error = Error;

    fn try_from(row: TokenRow) -> Result<Self> {
        Ok(Self {
            id: row.id.into(),
            owner: row.owner_id.into(),
            kind: word("tokens", "kind", row.id, &row.kind)?,
            description: row.description,
            scopes: row.scopes.split_whitespace().map(str::to_owned).collect(),
            issued: row.issued,
            external_id: row.external_id,
            source: row.source,
            hint: row.hint,
            created_at: row.created_at.0,
            expires_at: row.expires_at.map(|at| at.0),
            moved_from: row.moved_from.map(|at| at.0),
            deadline_set_at: row.deadline_set_at.0,
            generation: row.generation,
            unplanned: row.unplanned,
            uncorrected: row.uncorrected,
            last_used_at: row.last_used_at.map(|at| at.0),
            status: word("tokens", "status", row.id, &row.status)?,
            ended_at: row.ended_at.map(|at| at.0),
            replaced_by: row.replaced_by.map(Into::into),
        })
    }
}

row! {
    /// A token, and its owner's key.
    pub(super) struct ListedRow {
        ..token: TokenRow,
        owner_key: String,
    }
}

impl TryFrom<ListedRow> for (Token, String) {
    type Error = Error;

    fn try_from(row: ListedRow) -> Result<Self> {
        Ok((row.token.try_into()?, row.owner_key))
    }
}

row! {
    /// An owner, and what it has.
    pub(super) struct SummaryRow {
        ..owner: OwnerRow,
        contacts: i64,
        active_tokens: i64,
    }
}

impl TryFrom<SummaryRow> for OwnerSummary {
    type Error = Error;

    fn try_from(row: SummaryRow) -> Result<Self> {
        Ok(Self {
            owner: row.owner.try_into()?,
            contacts: row.contacts.unsigned_abs(),
            active_tokens: row.active_tokens.unsigned_abs(),
        })
    }
}

row! {
    /// A token as an import finds it.
    pub(super) struct KnownRow {
        ..token: TokenRow,
        import_run: Option<Uuid>,
    }
}

impl TryFrom<KnownRow> for Known {
    type Error = Error;

    fn try_from(row: KnownRow) -> Result<Self> {
        Ok(Self { token: row.token.try_into()?, run: row.import_run })
    }
}

row! {
    /// A token, and all of its owner.
    pub(super) struct OwnedRow {
        ..token: TokenRow,
        owner_key: String,
        owner_name: String,
        owner_time_zone: String,
        owner_locale: String,
    }
}

impl TryFrom<OwnedRow> for (Token, Owner) {
    type Error = Error;

    fn try_from(row: OwnedRow) -> Result<Self> {
        let owner = OwnerRow {
            id: row.token.owner_id,
            key: row.owner_key,
            name: row.owner_name,
            time_zone: row.owner_time_zone,
            locale: row.owner_locale,
        };
        Ok((row.token.try_into()?, owner.try_into()?))
    }
}

row! {
    pub(super) struct HistoryRow {
        token_id: Uuid,
        generation: i32,
        lead: i64,
        deadline: At,
        state: String,
        reason: Option<String>,
        escalation: bool,
        address: Option<String>,
        created_at: At,
        settled_at: Option<At>,
        message_id: Option<Uuid>,
    }
}

impl TryFrom<HistoryRow> for ReminderRecord {
    type Error = Error;

    fn try_from(row: HistoryRow) -> Result<Self> {
        Ok(Self {
            generation: row.generation,
            lead: Lead::from_seconds(row.lead),
            deadline: row.deadline.0,
            state: word("reminders", "state", row.token_id, &row.state)?,
            reason: row.reason,
            escalation: row.escalation,
            address: row.address.map(Address::from_store),
            created_at: row.created_at.0,
            settled_at: row.settled_at.map(|at| at.0),
            message: row.message_id.map(Into::into),
        })
    }
}

row! {
    pub(super) struct JobRow {
        name: String,
        started_at: At,
        finished_at: Option<At>,
        error: Option<String>,
        report: Option<String>,
        lease_until: At,
    }
}

impl From<JobRow> for JobRecord {
    fn from(row: JobRow) -> Self {
        Self {
            name: row.name,
            started_at: row.started_at.0,
            finished_at: row.finished_at.map(|at| at.0),
            error: row.error,
            report: row.report,
            lease_until: row.lease_until.0,
        }
    }
}

row! {
    pub(super) struct CountsRow {
        marked_active: i64,
        past_deadline: i64,
        expired: i64,
        revoked: i64,
    }
}

impl From<CountsRow> for TokenCounts {
    fn from(row: CountsRow) -> Self {
        Self {
            active: (row.marked_active - row.past_deadline).unsigned_abs(),
            past_deadline: row.past_deadline.unsigned_abs(),
            expired: row.expired.unsigned_abs(),
            revoked: row.revoked.unsigned_abs(),
        }
    }
}

//! What can go wrong in a store, sorted by what a caller does about it.

use crate::change::Refused;

/// What went wrong in a store.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The database cannot be reached, or does not answer in time: worth another try.
    #[error("the database is not available: {0}")]
    Unavailable(sqlx::Error),
    /// Somebody else's transaction was in the way: worth another try at once.
    #[error("the database was busy: {0}")]
    Busy(sqlx::Error),
    /// The process no longer holds the lease of its job; another one goes on.
    #[error("the lease on the job {0} was lost to another process")]
    LostLease(&'static str),
    /// The change is not allowed.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// There is one already.
    #[error("{what} {name} exists already")]
    Exists {
        /// What.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// It is not there.
    #[error("there is no {what} {name}")]
    Missing {
        /// What.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// A row holds what `lapsed` never writes.
    #[error("the store holds a broken row: table {table}, column {column}, row {row}: {problem}")]
    Broken {
        /// In which table.
        table: &'static str,
        /// In which column.
        column: &'static str,
        /// Which row.
        row: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The store could not be opened or brought up to date.
    #[error("{0}")]
    Open(String),
    /// The store can be read, but not written.
    #[error("the store cannot be written: it is read-only")]
    ReadOnly,
    /// The disk is full, or the file may not grow.
    #[error("the store cannot be written: {0}")]
    Full(&'static str),
    /// The database refused a statement.
    #[error("the database refused: {0}")]
    Database(sqlx::Error),
}

/// PostgreSQL's read_only_sql_transaction.
const READ_ONLY_TRANSACTION: &str = "25006";

impl Error {
    /// Whether the same call may succeed when it is made again.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable(_) | Self::Busy(_))
    }

    /// Whether what failed is the store as a whole, and not what was asked of it: somebody will set it right, and then the
    /// same call succeeds.
    pub fn is_of_the_store(&self) -> bool {
        self.is_transient() || matches!(self, Self::ReadOnly | Self::Full(_))
    }

    /// Whether the server is one that only reads: a standby, which was the primary or will be.
    pub(super) fn is_of_a_standby(&self) -> bool {
        let Self::Unavailable(sqlx::Error::Database(error)) = self else { return false };
        error.code().as_deref() == Some(READ_ONLY_TRANSACTION)
    }
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Self {
        use sqlx::Error as E;
        match &error {
            E::Io(_) | E::Tls(_) | E::PoolTimedOut | E::PoolClosed | E::WorkerCrashed | E::Protocol(_) => {
                Self::Unavailable(error)
            }
            E::Database(db) => match db.code().as_deref() {
                // PostgreSQL's disk_full.
                Some("53100") => Self::Full("the disk is full"),
                // SQLITE_IOERR_WRITE, SQLITE_IOERR_TRUNCATE and SQLITE_IOERR_SHMSIZE.
                Some("778" | "1546" | "4874") => {
                    Self::Full("a write failed; is there a quota, or a limit to the size of files?")
                }
                // Serialization failure, deadlock, lock and statement timeout.
                Some("40001" | "40P01" | "55P03" | "57014") => Self::Busy(error),
                Some(READ_ONLY_TRANSACTION) => Self::Unavailable(error),
                // The server is shutting down, starting up, or has cut the connection (classes 57P and 08); it lacks
                // memory or connections, or its disk fails (classes 53 and 58).
                Some(code)
                    if code.len() == 5 && ["57P", "08", "53", "58"].iter().any(|class| code.starts_with(class)) =>
                {
                    Self::Unavailable(error)
                }
                code => match code.and_then(sqlite_result) {
                    // SQLITE_BUSY and SQLITE_LOCKED.
                    Some(5 | 6) => Self::Busy(error),
                    // SQLITE_READONLY.
                    Some(8) => Self::ReadOnly,
                    // SQLITE_FULL.
                    Some(13) => Self::Full("the disk is full"),
                    // SQLITE_NOMEM, SQLITE_IOERR and SQLITE_CANTOPEN: the machine lacks something, or its disk fails.
                    Some(7 | 10 | 14) => Self::Unavailable(error),
                    _ => Self::Database(error),
                },
            },
            _ => Self::Database(error),
        }
    }
}

/// The primary result code of SQLite, which each extended one has in its last byte (SQLite's documentation, "Result and Error
/// Codes"). PostgreSQL's codes are longer.
fn sqlite_result(code: &str) -> Option<u32> {
    let extended: u32 = if code.len() < 5 { code.parse().ok()? } else { return None };
    Some(extended & 0xff)
}

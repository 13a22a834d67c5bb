//! Connections that delivery keeps for itself, outside of the pool.
//!
//! The pool asks each connection that it is given back whether it is alive, and PostgreSQL plans a statement anew for its
//! arguments as long as it cannot tell that they make no difference: together that is half of what a claim costs. A line
//! asks nothing while it is in use, and keeps its plans. One that is not given back, because what was asked of it failed or
//! nobody waited for the answer, is closed, and so never comes back with a transaction open.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, Executor, PgConnection};

use super::{KEEP_PLANS, PATIENT_CONNECT, SESSION};
use crate::store::Result;

/// How many are kept that nobody uses.
const KEPT: usize = 4;

/// For how long a line is kept that nobody uses: after a longer silence, what lies between may have forgotten it.
const KEPT_FOR: Duration = Duration::from_secs(30);

/// Connections that are kept; clones share them.
#[derive(Clone, Debug)]
pub(super) struct Lines {
    options: PgConnectOptions,
    free: Arc<Mutex<Vec<(PgConnection, Instant)>>>,
}

impl Lines {
    /// Connects when one is used.
    pub(super) fn new(options: PgConnectOptions) -> Self {
        Self { options, free: Arc::default() }
    }

    /// A connection for one operation; [`Lines::put_back`] keeps it for the next.
    ///
    /// # Errors
    /// When the server cannot be reached.
    pub(super) async fn take(&self) -> Result<PgConnection> {
        match self.kept() {
            Some(line) => Ok(line),
            None => {
                tokio::time::timeout(PATIENT_CONNECT, self.connect()).await.map_err(|_| sqlx::Error::PoolTimedOut)?
            }
        }
    }

    async fn connect(&self) -> Result<PgConnection> {
        let mut line = self.options.connect().await?;
        line.execute(SESSION).await?;
        line.execute(KEEP_PLANS).await?;
        Ok(line)
    }

    /// The one that was used last, if that is not long ago.
    fn kept(&self) -> Option<PgConnection> {
        let mut free = self.free();
        free.retain(|(_, used)| used.elapsed() < KEPT_FOR);
        free.pop().map(|(line, _)| line)
    }

    /// Keeps a connection whose last answer was read, and that has no transaction open.
    pub(super) fn put_back(&self, line: PgConnection) {
        let mut free = self.free();
        if free.len() < KEPT {
            free.push((line, Instant::now()));
        }
    }

    /// Closes those that nobody uses.
    pub(super) fn hang_up(&self) {
        self.free().clear();
    }

    fn free(&self) -> MutexGuard<'_, Vec<(PgConnection, Instant)>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

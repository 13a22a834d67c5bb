//! A counter of statements at which a process can be made to die.
//!
//! What passes the statements on, the proxy before PostgreSQL or SQLite's own trace, tells it of each before it is
//! executed. What connections do for themselves (a pool's probes, a session's settings, the rollback of what was never
//! committed) is not told.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// Whether a statement is a job's, and not what a connection does for itself.
pub fn counts(sql: &str) -> bool {
    !["PRAGMA", "SET ", "ROLLBACK"].iter().any(|word| sql.trim_start().starts_with(word))
}

/// Counts the statements of an act, and stops at one.
#[derive(Default)]
pub struct Counter {
    state: Mutex<State>,
    reached: Notify,
}

#[derive(Default)]
struct State {
    counting: bool,
    stop_at: Option<usize>,
    seen: Vec<String>,
}

impl Counter {
    /// Begins anew; [`Counter::meet`] says yes at the statement of this number.
    pub fn start(&self, stop_at: Option<usize>) {
        *self.lock() = State { counting: true, stop_at, seen: Vec::new() };
    }

    /// Ends the counting. The statements, in their order.
    pub fn stop(&self) -> Vec<String> {
        std::mem::take(&mut *self.lock()).seen
    }

    /// A statement is about to be executed. Returns whether it is the one to stop at.
    pub fn meet(&self, sql: &str) -> bool {
        let mut state = self.lock();
        if !state.counting || !counts(sql) {
            return false;
        }
        state.seen.push(sql.split_whitespace().collect::<Vec<_>>().join(" "));
        let stop = state.stop_at.is_some_and(|stop_at| state.seen.len() == stop_at + 1);
        state.counting = !stop;
        stop
    }

    /// Tells that the process has come to where it dies.
    pub fn tell(&self) {
        self.reached.notify_one();
    }

    /// Returns when it has.
    pub async fn reached(&self) {
        self.reached.notified().await;
    }

    /// A panic elsewhere leaves nothing half-done here.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

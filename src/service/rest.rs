//! What work has occupied goes back to the system once there is no more of it: the pages that a store keeps at hand, and the memory
//! that the allocator keeps for the next time.
//!
//! Guarantees to wait until nobody has worked for a while, so that it costs nothing in between; relies on being told of work.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::store::Store;

/// For how long nobody must have worked.
pub(super) const QUIET: Duration = Duration::from_secs(10);

/// Gives memory back whenever it has been quiet after work.
pub(super) async fn rest_after_work<S: Store>(store: S, worked: Arc<Notify>, stop: CancellationToken) {
    while stop.run_until_cancelled(quiet_after_work(&worked, QUIET)).await.is_some() {
        if let Err(error) = store.rest().await {
            tracing::debug!(%error, "the store keeps its memory for now");
        }
        // Takes some milliseconds, in which others may work. It does not panic.
        let _ = tokio::task::spawn_blocking(trim).await;
    }
}

/// Until somebody has told of work, and then nobody for so long.
async fn quiet_after_work(worked: &Notify, quiet: Duration) {
    worked.notified().await;
    while tokio::time::timeout(quiet, worked.notified()).await.is_ok() {}
}

/// glibc gives back by itself only what lies behind the last piece in use, and thousands of freed pages lie before one.
#[cfg(target_env = "gnu")]
fn trim() {
    // SAFETY: malloc_trim(3) is safe to call from any thread at any time; it touches no memory that is in use.
    #[expect(unsafe_code, reason = "the C library has this, and Rust's own has nothing like it")]
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Other allocators are left to themselves.
#[cfg(not(target_env = "gnu"))]
fn trim() {}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_is_quiet_once_after_work() {
        let worked = Notify::new();
        let in_time = async |quiet| {
            tokio::time::timeout(Duration::from_millis(500), quiet_after_work(&worked, quiet)).await.is_ok()
        };
        assert!(!in_time(Duration::ZERO).await, "nobody has worked");
        worked.notify_one();
        assert!(in_time(Duration::from_millis(1)).await);
        assert!(!in_time(Duration::ZERO).await, "nobody has worked since");
        worked.notify_one();
        assert!(!in_time(Duration::from_secs(60)).await, "it was quiet for half a second only");
        let working = async {
            loop {
                worked.notify_one();
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            quiet = in_time(Duration::from_secs(60)) => assert!(!quiet, "somebody works all the time"),
            () = working => {}
        }
    }
}

//! Leases: which process does a job, and how its last run went.
//!
//! A lease ends by itself, so a process that died holds nothing up; one that was taken by a clock that ran ahead is not
//! waited for either. Its epoch fences every write: each leased transaction begins by renewing the lease under this
//! holder and epoch, which also locks it until the commit.

use std::future::Future;

use chrono::TimeDelta;
use uuid::Uuid;

use super::Result;
use crate::clock::Timestamp;

/// How long a job's lease lasts without a write.
pub const LEASE: TimeDelta = TimeDelta::minutes(2);

/// The name under which reconcile passes are recorded.
pub const RECONCILE: &str = "reconcile";

/// A process's right to do a job for a while.
#[derive(Clone, Debug)]
pub struct Lease {
    /// Which job.
    pub job: &'static str,
    /// Which process.
    pub holder: Uuid,
    /// Counts the holders.
    pub epoch: i64,
}

/// How a job's last run went.
#[derive(Clone, Debug)]
pub struct JobRecord {
    /// Which job.
    pub name: String,
    /// When it last started.
    pub started_at: Timestamp,
    /// When it last finished; `None` while the first run goes on.
    pub finished_at: Option<Timestamp>,
    /// What went wrong.
    pub error: Option<String>,
    /// What it did, in words.
    pub report: Option<String>,
    /// Until when somebody holds its lease.
    pub lease_until: Timestamp,
}

/// Leases and runs of jobs.
pub trait Jobs {
    /// Takes the lease of a job; `None` while another process holds it. A lease that ends later than any can at `now`
    /// is left from a wrong clock, and is taken over.
    ///
    /// # Errors
    /// When the store fails.
    fn lease(
        &self,
        job: &'static str,
        holder: Uuid,
        now: Timestamp,
    ) -> impl Future<Output = Result<Option<Lease>>> + Send;

    /// Records how a run went, and gives the lease back.
    ///
    /// # Errors
    /// When the store fails; the lease then ends by itself.
    fn finish(
        &self,
        lease: &Lease,
        now: Timestamp,
        outcome: std::result::Result<&str, &str>,
    ) -> impl Future<Output = Result<()>> + Send;

    /// Records a run that found nothing to do, unless another process holds the lease: then it returns `false`. Takes the
    /// lease and gives it back at once, so that who held it before writes nothing any more.
    ///
    /// # Errors
    /// When the store fails.
    fn pass_over(
        &self,
        job: &'static str,
        holder: Uuid,
        now: Timestamp,
        report: &str,
    ) -> impl Future<Output = Result<bool>> + Send;

    /// How the last run of each job went.
    ///
    /// # Errors
    /// When the store fails.
    fn job_records(&self) -> impl Future<Output = Result<Vec<JobRecord>>> + Send;
}

/// Implements [`Jobs`] for a back end that has `reader()`, and for what may be lost in a crash `acquire_relaxed()` and
/// `keep_relaxed()`; and gives it `hold()`.
macro_rules! job_operations {
    ($store:ty, $database:ty) => {
        impl Jobs for $store {
            async fn lease(&self, job: &'static str, holder: Uuid, now: Timestamp) -> Result<Option<Lease>> {
                self.within(async move {
                    let mut connection = self.acquire_relaxed().await?;
                    // All rows: only at the end of the statement is it committed.
                    let epoch: Vec<(i64,)> = sqlx::query_as(
                        "INSERT INTO jobs (bucket, name, holder, epoch, lease_until, started_at) \
                     VALUES (0, $1, $2, 1, $3, $4) \
                     ON CONFLICT (bucket, name) DO UPDATE \
                     SET holder = excluded.holder, epoch = jobs.epoch + 1, lease_until = excluded.lease_until, \
                         started_at = excluded.started_at \
                     WHERE jobs.lease_until <= $4 OR jobs.lease_until > $5 OR jobs.holder = $2 \
                     RETURNING epoch",
                    )
                    .bind(job)
                    .bind(holder)
                    .bind(At(now + LEASE))
                    .bind(At(now))
                    // No sound clock gives a lease that lasts so long; the epoch fences whoever took it on a wrong one.
                    .bind(At(now + LEASE * 2))
                    .fetch_all(&mut *connection)
                    .await?;
                    self.keep_relaxed(connection);
                    Ok(epoch.first().map(|(epoch,)| Lease { job, holder, epoch: *epoch }))
                })
                .await
            }

            async fn finish(
                &self,
                lease: &Lease,
                now: Timestamp,
                outcome: std::result::Result<&str, &str>,
            ) -> Result<()> {
                self.within(async move {
                    let mut connection = self.acquire_relaxed().await?;
                    sqlx::query(
                        "UPDATE jobs \
                     SET lease_until = $4, finished_at = $4, error = $5, report = COALESCE($6, report) \
                     WHERE bucket = 0 AND name = $1 AND holder = $2 AND epoch = $3",
                    )
                    .bind(lease.job)
                    .bind(lease.holder)
                    .bind(lease.epoch)
                    .bind(At(now))
                    .bind(outcome.err())
                    .bind(outcome.ok())
                    .execute(&mut *connection)
                    .await?;
                    self.keep_relaxed(connection);
                    Ok(())
                })
                .await
            }

            async fn pass_over(&self, job: &'static str, holder: Uuid, now: Timestamp, report: &str) -> Result<bool> {
                self.within(async move {
                    let mut connection = self.acquire_relaxed().await?;
                    let recorded = sqlx::query(
                        "INSERT INTO jobs (bucket, name, holder, epoch, lease_until, started_at, finished_at, report) \
                     VALUES (0, $1, $2, 1, $3, $3, $3, $4) \
                     ON CONFLICT (bucket, name) DO UPDATE \
                     SET holder = excluded.holder, epoch = jobs.epoch + 1, lease_until = excluded.lease_until, \
                         started_at = excluded.started_at, finished_at = excluded.finished_at, error = NULL, \
                         report = excluded.report \
                     WHERE jobs.lease_until <= $3 OR jobs.lease_until > $5 OR jobs.holder = $2",
                    )
                    .bind(job)
                    .bind(holder)
                    .bind(At(now))
                    .bind(report)
                    .bind(At(now + LEASE * 2))
                    .execute(&mut *connection)
                    .await?;
                    self.keep_relaxed(connection);
                    Ok(recorded.rows_affected() == 1)
                })
                .await
            }

            async fn job_records(&self) -> Result<Vec<JobRecord>> {
                self.within(async move {
                    let rows: Vec<JobRow> = sqlx::query_as(
                        "SELECT name, started_at, finished_at, error, report, lease_until \
                     FROM jobs \
                     WHERE bucket = 0 \
                     ORDER BY name",
                    )
                    .fetch_all(&self.reader())
                    .await?;
                    Ok(rows.into_iter().map(JobRecord::from).collect())
                })
                .await
            }
        }

        /// Renews a job's lease inside the transaction that relies on it, which locks it until the commit.
        async fn hold(tx: &mut Transaction<'_, $database>, lease: &Lease, now: Timestamp) -> Result<()> {
            let held = sqlx::query(
                "UPDATE jobs SET lease_until = $4 \
                 WHERE bucket = 0 AND name = $1 AND holder = $2 AND epoch = $3 AND lease_until > $5",
            )
            .bind(lease.job)
            .bind(lease.holder)
            .bind(lease.epoch)
            .bind(At(now + LEASE))
            .bind(At(now))
            .execute(&mut **tx)
            .await?;
            if held.rows_affected() == 1 { Ok(()) } else { Err(Error::LostLease(lease.job)) }
        }
    };
}
pub(super) use job_operations;

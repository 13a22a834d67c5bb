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

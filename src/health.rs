//! Whether the jobs keep to their schedules.
//!
//! A job is overdue when a run has been due for longer than [`GRACE`] and none has gone well since: because passes fail,
//! because the clock cannot be believed, or because nobody starts them. A pass that is long, and gets on, is not overdue.
//! Nothing is kept here that a restart would lose: the store tells when jobs last came to a good end, in any process.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError, RwLock};

use chrono::TimeDelta;

use crate::clock::Timestamp;
use crate::config::Schedule;
use crate::jobs::{deliver, expire, purge, remind};
use crate::schedule::Cron;
use crate::store::jobs::{JobRecord, LEASE, RECONCILE};

/// For how long a run may be due before the job counts as overdue.
pub const GRACE: TimeDelta = TimeDelta::minutes(10);

/// How a job keeps to its schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeliness {
    /// Which job.
    pub job: &'static str,
    /// When it last came to a good end, as far as is known.
    pub success: Option<Timestamp>,
    /// Since when another run has been due; zero where it is on time.
    pub due_for: TimeDelta,
}

impl Timeliness {
    /// Whether somebody should look at it.
    pub fn is_overdue(&self) -> bool {
        self.due_for > GRACE
    }
}

#[derive(Clone, Debug)]
struct Job {
    success: Option<Timestamp>,
    /// When it last got on: came to a good end, or did a step of a pass that goes on.
    got_on: Timestamp,
    /// What ended its last pass in this process.
    error: Option<String>,
}

/// What is known of the jobs of a store.
#[derive(Debug)]
pub struct Health {
    schedule: RwLock<Schedule>,
    jobs: Mutex<BTreeMap<&'static str, Job>>,
}

impl Health {
    /// Jobs that run by this schedule, of which nothing is known before this instant.
    pub fn new(schedule: Schedule, started: Timestamp) -> Self {
        let unknown = Job { success: None, got_on: started, error: None };
        let jobs = [expire::NAME, remind::NAME, deliver::NAME, purge::NAME, RECONCILE];
        Self {
            schedule: RwLock::new(schedule),
            jobs: Mutex::new(jobs.into_iter().map(|job| (job, unknown.clone())).collect()),
        }
    }

    /// The jobs run by another schedule from now on.
    pub fn follow(&self, schedule: Schedule) {
        *self.schedule.write().unwrap_or_else(PoisonError::into_inner) = schedule;
    }

    /// A pass of a job came to a good end.
    pub fn succeeded(&self, job: &str, at: Timestamp) {
        self.note(job, Some(at), at);
    }

    /// A pass of a job in this process ended: with an error, which perhaps could not be recorded, or without one, whether or not
    /// the job was another process's then.
    pub fn ended(&self, job: &str, error: Option<String>) {
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(job) = jobs.get_mut(job) {
            job.error = error;
        }
    }

    /// The jobs whose last pass in this process failed, and why.
    pub fn errors(&self) -> Vec<(&'static str, String)> {
        let jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        jobs.iter().filter_map(|(name, job)| Some((*name, job.error.clone()?))).collect()
    }

    /// A step of a pass went well.
    pub fn got_on(&self, job: &str, at: Timestamp) {
        self.note(job, None, at);
    }

    /// Takes what the store says of the jobs, whichever process ran them.
    pub fn recorded(&self, records: &[JobRecord]) {
        // What the store records under the name of `deliver` is whether it pauses: each process delivers for itself.
        for record in records.iter().filter(|record| record.name != deliver::NAME) {
            let ended = record.finished_at.filter(|_| record.error.is_none());
            if let Some(ended) = ended {
                self.note(&record.name, Some(ended), ended);
            }
            // Each write renews the lease: one that ends later than the pass's first has written something.
            let wrote = record.lease_until - LEASE;
            if record.finished_at.is_none_or(|finished| finished < record.started_at) && wrote > record.started_at {
                self.note(&record.name, None, wrote);
            }
        }
    }

    fn note(&self, job: &str, success: Option<Timestamp>, got_on: Timestamp) {
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(job) = jobs.get_mut(job) {
            job.success = job.success.max(success);
            job.got_on = job.got_on.max(got_on);
        }
    }

    /// How each job keeps to its schedule now.
    pub fn jobs(&self, now: Timestamp) -> Vec<Timeliness> {
        let schedule = self.schedule.read().unwrap_or_else(PoisonError::into_inner);
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        let mut of = |job: &'static str, cron: &Cron| {
            let known = jobs.get_mut(job)?;
            // What a clock that ran ahead has left behind is not waited for.
            known.got_on = known.got_on.min(now);
            let due = cron.next_after(known.got_on);
            let due_for = due.map_or(TimeDelta::zero(), |due| (now - due).max(TimeDelta::zero()));
            Some(Timeliness { job, success: known.success, due_for })
        };
        [
            (expire::NAME, &schedule.expire),
            (remind::NAME, &schedule.remind),
            (deliver::NAME, &schedule.deliver),
            (purge::NAME, &schedule.purge),
            (RECONCILE, &schedule.reconcile),
        ]
        .into_iter()
        .filter_map(|(job, cron)| of(job, cron))
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use chrono::{TimeZone, Utc};

    use super::*;

    fn at(hour: u32, minute: u32) -> Timestamp {
        Utc.with_ymd_and_hms(2027, 1, 31, hour, minute, 0).unwrap()
    }

    fn health() -> Health {
        let cron = |text| Cron::parse(text, chrono_tz::UTC).expect("a schedule");
        let schedule = Schedule {
            expire: cron("*/5 * * * * *"),
            remind: cron("30 * * * * *"),
            deliver: cron("*/10 * * * * *"),
            purge: cron("0 17 3 * * *"),
            reconcile: cron("0 47 2 * * *"),
        };
        Health::new(schedule, at(1, 0))
    }

    fn overdue(health: &Health, now: Timestamp) -> Vec<&'static str> {
        health.jobs(now).into_iter().filter(Timeliness::is_overdue).map(|job| job.job).collect()
    }

    fn record(started: Timestamp, finished: Option<Timestamp>, error: Option<&str>, lease: Timestamp) -> JobRecord {
        JobRecord {
            name: expire::NAME.into(),
            started_at: started,
            finished_at: finished,
            error: error.map(str::to_owned),
            report: None,
            lease_until: lease,
        }
    }

    #[test]
    fn a_job_that_never_ends_well_is_overdue_after_its_grace() {
        let health = health();
        assert_eq!(overdue(&health, at(1, 10)), [""; 0]);
        health.succeeded("deliver", at(1, 9));
        health.succeeded("remind", at(1, 9));
        assert_eq!(overdue(&health, at(1, 11)), ["expire"]);
        health.succeeded("expire", at(1, 11));
        assert_eq!(overdue(&health, at(1, 12)), [""; 0]);
    }

    #[test]
    fn a_daily_job_is_due_at_its_hour() {
        let health = health();
        let keep_up = |now| ["expire", "remind", "deliver"].map(|job| health.succeeded(job, now));
        keep_up(at(3, 27));
        health.succeeded("reconcile", at(2, 48));
        assert_eq!(overdue(&health, at(3, 27)), [""; 0]);
        keep_up(at(3, 28));
        assert_eq!(overdue(&health, at(3, 28)), ["purge"]);
        let purge = health.jobs(at(3, 28)).into_iter().find(|job| job.job == "purge").expect("known");
        assert_eq!((purge.success, purge.due_for), (None, TimeDelta::minutes(11)));
    }

    #[test]
    fn what_another_process_did_counts_and_what_failed_does_not() {
        let health = health();
        let expire = |now| health.jobs(now).into_iter().find(|job| job.job == "expire").expect("known");
        health.recorded(&[record(at(1, 19), Some(at(1, 19)), Some("it broke"), at(1, 19))]);
        assert!(expire(at(1, 20)).is_overdue());
        // It has begun, and nobody knows yet whether it gets on.
        health.recorded(&[record(at(1, 20), Some(at(1, 19)), Some("it broke"), at(1, 20) + LEASE)]);
        assert!(expire(at(1, 20)).is_overdue());
        // A long pass: it has written something since.
        health.recorded(&[record(at(1, 20), Some(at(1, 19)), None, at(1, 25) + LEASE)]);
        assert!(!expire(at(1, 26)).is_overdue());
        health.recorded(&[record(at(1, 20), Some(at(1, 40)), None, at(1, 40))]);
        assert_eq!(expire(at(1, 41)).success, Some(at(1, 40)));
    }

    #[test]
    fn an_error_holds_until_a_pass_ends_without_one() {
        let health = health();
        health.ended("expire", Some("the database is locked".into()));
        health.recorded(&[record(at(1, 1), Some(at(1, 2)), None, at(1, 2))]);
        assert_eq!(health.errors(), [("expire", "the database is locked".to_owned())], "another process did well");
        health.ended("expire", None);
        assert_eq!(health.errors(), []);
    }

    #[test]
    fn a_clock_that_went_back_does_not_hide_a_job_for_long() {
        let health = health();
        health.succeeded("expire", at(20, 0));
        assert_eq!(health.jobs(at(2, 0))[0].due_for, TimeDelta::zero());
        assert!(health.jobs(at(2, 11))[0].is_overdue());
    }
}

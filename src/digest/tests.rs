use chrono::{DateTime, TimeZone, Utc};
use chrono_tz::{Europe, TZ_VARIANTS};
use proptest::prelude::*;

use super::*;
use crate::policy::{Deadline, Decision, Lead, Policy, due_reminders, speaks_until};

fn weekdays() -> Digest {
    Digest {
        hold: TimeDelta::minutes(10),
        window: Some("mon-fri 08:00-18:00".parse().expect("a window")),
        min_interval: None,
        urgent_within: TimeDelta::hours(24),
    }
}

fn utc(day: u32, hour: u32, minute: u32) -> Timestamp {
    Utc.with_ymd_and_hms(2027, 1, day, hour, minute, 0).single().expect("an instant")
}

/// A reminder 7 days before its deadline; the next lead is a day.
fn week_ahead(now: Timestamp) -> Waiting {
    let ahead = Ahead { expires_at: now + TimeDelta::days(7), until: now + TimeDelta::days(6) };
    Waiting { now, ahead: Some(ahead), zone: chrono_tz::UTC, mailed_at: None }
}

#[test]
fn within_the_window_only_the_hold_is_waited_for() {
    // 6 January 2027 is a Wednesday.
    assert_eq!(weekdays().goes_at(week_ahead(utc(6, 12, 0))), utc(6, 12, 10));
    // The window is open, and the hold does not push the mail into the next one.
    assert_eq!(weekdays().goes_at(week_ahead(utc(6, 17, 55))), utc(6, 18, 0));
    assert_eq!(weekdays().goes_at(week_ahead(utc(6, 7, 55))), utc(6, 8, 5));
}

#[test]
fn outside_of_it_a_reminder_waits_for_the_next() {
    assert_eq!(weekdays().goes_at(week_ahead(utc(6, 18, 0))), utc(7, 8, 0));
    assert_eq!(weekdays().goes_at(week_ahead(utc(8, 18, 0))), utc(11, 8, 0), "over the weekend");
    let berlin = Waiting { zone: Europe::Berlin, ..week_ahead(utc(6, 18, 0)) };
    assert_eq!(weekdays().goes_at(berlin), utc(7, 7, 0));
}

#[test]
fn a_wait_that_would_take_half_of_what_is_left_is_not_made() {
    let friday = utc(8, 18, 0);
    // Monday 08:00 is 62 hours away.
    let ahead = |hours| Ahead { expires_at: friday + TimeDelta::days(40), until: friday + TimeDelta::hours(hours) };
    let goes_at = |hours| weekdays().goes_at(Waiting { ahead: Some(ahead(hours)), ..week_ahead(friday) });
    assert_eq!(goes_at(124), utc(11, 8, 0));
    assert_eq!(goes_at(123), utc(8, 18, 10));
}

#[test]
fn what_is_urgent_does_not_wait_and_neither_does_what_becomes_so() {
    let evening = utc(6, 20, 0);
    let left = |hours| {
        let expires_at = evening + TimeDelta::hours(hours);
        weekdays().goes_at(Waiting { ahead: Some(Ahead { expires_at, until: expires_at }), ..week_ahead(evening) })
    };
    assert_eq!(left(24), utc(6, 20, 10));
    assert_eq!(left(30), utc(7, 2, 0), "with 24 hours left, before the window opens");
    assert_eq!(left(40), utc(7, 8, 0));
    let notice = Waiting { ahead: None, ..week_ahead(evening) };
    assert_eq!(weekdays().goes_at(notice), utc(6, 20, 10));
}

#[test]
fn the_hold_shrinks_where_a_lead_is_short() {
    let now = utc(6, 12, 0);
    let ahead = Ahead { expires_at: now + TimeDelta::seconds(30), until: now + TimeDelta::seconds(22) };
    let goes_at = weekdays().goes_at(Waiting { ahead: Some(ahead), ..week_ahead(now) });
    assert_eq!(goes_at, now + TimeDelta::seconds(5));
}

#[test]
fn a_mail_waits_for_some_time_after_the_last() {
    let digest = Digest { min_interval: Some(TimeDelta::days(1)), ..weekdays() };
    let at = |now, mailed_at| digest.goes_at(Waiting { mailed_at: Some(mailed_at), ..week_ahead(now) });
    assert_eq!(at(utc(6, 12, 0), utc(6, 9, 30)), utc(7, 9, 30));
    assert_eq!(at(utc(6, 12, 0), utc(5, 11, 0)), utc(6, 12, 10), "a day has passed");
    assert_eq!(at(utc(7, 12, 0), utc(7, 11, 0)), utc(8, 11, 0));
    assert_eq!(at(utc(8, 12, 0), utc(8, 11, 0)), utc(11, 8, 0), "a day later is a Saturday");
    assert_eq!(at(utc(6, 12, 0), utc(9, 12, 0)), utc(6, 12, 10), "a clock had run ahead");
    // A week would be too long, the next morning is not.
    let weekly = Digest { min_interval: Some(TimeDelta::days(7)), ..weekdays() };
    let evening = utc(6, 20, 0);
    assert_eq!(weekly.goes_at(Waiting { mailed_at: Some(evening), ..week_ahead(evening) }), utc(7, 8, 0));
}

fn windows() -> impl Strategy<Value = Option<Window>> {
    let some = ["mon-fri 08:00-18:00", "sun 02:00-02:01", "mon,thu 23:00-24:00", "mon-sun 00:00-24:00"];
    prop::option::of(prop::sample::select(some.map(|text| text.parse().expect(text)).to_vec()))
}

proptest! {
    #[test]
    fn no_setting_makes_a_reminder_too_late(
        leads in prop::collection::vec(1i64..100 * 86_400, 1..6), life in 1i64..200 * 86_400, passed in 0i64..200 * 86_400,
        hold in 0i64..400 * 86_400, window in windows(), min_interval in prop::option::of(1i64..400 * 86_400),
        urgent_within in 0i64..400 * 86_400, mailed in prop::option::of(0i64..400 * 86_400), zone in 0..TZ_VARIANTS.len(),
    ) {
        let policy = Policy::new(leads.into_iter().map(Lead::from_seconds), true, TimeDelta::days(7));
        let set_at = DateTime::from_timestamp(1_790_000_000, 0).expect("in range");
        let deadline = Deadline { set_at, expires_at: set_at + TimeDelta::seconds(life) };
        let now = set_at + TimeDelta::seconds(passed);
        let digest = Digest {
            hold: TimeDelta::seconds(hold),
            window,
            min_interval: min_interval.map(TimeDelta::seconds),
            urgent_within: TimeDelta::seconds(urgent_within),
        };
        let due = due_reminders(&policy, deadline, now, Lead::from_seconds(i64::MAX));
        if let Some((lead, Decision::Send)) = due.first() {
            let until = speaks_until(&policy, deadline.expires_at, *lead);
            let mailed_at = mailed.map(|ago| now - TimeDelta::seconds(ago));
            let ahead = Some(Ahead { expires_at: deadline.expires_at, until });
            let goes_at = digest.goes_at(Waiting { now, ahead, zone: TZ_VARIANTS[zone], mailed_at });
            prop_assert!(now <= goes_at && goes_at < deadline.expires_at);
            for shorter in policy.leads().iter().filter(|other| *other < lead) {
                prop_assert!(goes_at < shorter.due_at(deadline.expires_at));
            }
            // It waits in vain for nothing: it goes after the hold, in the window, or when it must.
            let held = now + TimeDelta::seconds(hold.min((until - now).num_seconds() / 4));
            let open = digest.window.is_none_or(|window| {
                window.next(goes_at, TZ_VARIANTS[zone]).is_some_and(|(opens, _)| opens <= goes_at)
                    || window.next(now, TZ_VARIANTS[zone]).is_some_and(|(_, closes)| closes == goes_at)
            });
            let urgent = deadline.expires_at - goes_at <= digest.urgent_within.max(TimeDelta::zero());
            let spaced = mailed_at.zip(digest.min_interval).is_some_and(|(at, interval)| at + interval == goes_at);
            prop_assert!(goes_at == held || open || urgent || spaced, "{goes_at}");
        }
    }

    /// However often a message finds that its contact was just sent another: what it says comes in time.
    #[test]
    fn what_is_put_off_again_and_again_comes_in_time(
        left in 1i64..100 * 86_400, hold in 0i64..86_400, window in windows(), interval in 1i64..400 * 86_400,
        urgent_within in 0i64..10 * 86_400, others in prop::collection::vec(0i64..86_400, 0..40), zone in 0..TZ_VARIANTS.len(),
    ) {
        let begin = DateTime::from_timestamp(1_790_000_000, 0).expect("in range");
        let until = begin + TimeDelta::seconds(left);
        let ahead = Some(Ahead { expires_at: until + TimeDelta::days(1), until });
        let digest = Digest {
            hold: TimeDelta::seconds(hold),
            window,
            min_interval: Some(TimeDelta::seconds(interval)),
            urgent_within: TimeDelta::seconds(urgent_within),
        };
        let planned = Waiting { now: begin, ahead, zone: TZ_VARIANTS[zone], mailed_at: None };
        let mut at = digest.goes_at(planned);
        let at_claim = Digest { hold: TimeDelta::zero(), ..digest };
        for ago in others {
            let waiting = Waiting { now: at, mailed_at: Some(at - TimeDelta::seconds(ago)), ..planned };
            let next = at_claim.goes_at(waiting);
            prop_assert!(at <= next && next < until, "{at} {next} {until}");
            at = next;
        }
    }

    /// Word that others may take along goes before it is of no use.
    #[test]
    fn what_goes_alone_goes_in_time(left in 2i64..400 * 86_400, window in windows(), zone in 0..TZ_VARIANTS.len()) {
        let now = DateTime::from_timestamp(1_790_000_000, 0).expect("in range");
        let digest = Digest { window, ..weekdays() };
        let at = digest.goes_alone_at(now, now + TimeDelta::seconds(left), TZ_VARIANTS[zone]);
        let half = TimeDelta::seconds(left / 2).min(TimeDelta::days(14));
        prop_assert!(now + half <= at && at < now + TimeDelta::seconds(left), "{at}");
    }

    #[test]
    fn no_instant_breaks_it(now: i32, expires: i32, until: i32, hold: u32, mailed: i32) {
        let at = |seconds: i32| DateTime::from_timestamp(i64::from(seconds), 0).expect("in range");
        let ahead = Some(Ahead { expires_at: at(expires), until: at(until) });
        let digest = Digest { hold: TimeDelta::seconds(hold.into()), min_interval: Some(TimeDelta::MAX), ..weekdays() };
        let waiting = Waiting { now: at(now), ahead, zone: Europe::Berlin, mailed_at: Some(at(mailed)) };
        prop_assert!(digest.goes_at(waiting) >= at(now));
    }
}

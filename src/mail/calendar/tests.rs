use calcard::icalendar::{ICalendar, ICalendarComponent, ICalendarComponentType, ICalendarProperty, ICalendarValue};
use chrono::{TimeZone, Utc};
use proptest::prelude::*;
use uuid::Uuid;

use super::*;
use crate::token::{Kind, OwnerId};

fn now() -> Timestamp {
    Utc.with_ymd_and_hms(2027, 1, 24, 8, 0, 0).unwrap()
}

fn token(generation: i32) -> Token {
    let owner = OwnerId::from(Uuid::from_u128(0xa000));
    let id = Uuid::from_u128(0xb000).into();
    let expires_at = Some(now() + TimeDelta::days(7));
    Token { id, generation, expires_at, ..Token::new(owner, Kind::Additional, "deploy key", now()) }
}

fn organizer() -> lettre::Address {
    "tokens@example.org".parse().expect("an address")
}

fn publish(entries: &[Entry<'_>], organizer: &lettre::Address, now: Timestamp) -> String {
    file(Method::Publish, entries, organizer, now)
}

fn entry<'a>(token: &'a Token, hours: i64, title: &str, text: &str) -> Entry<'a> {
    let deadline = now() + TimeDelta::hours(hours);
    Entry { token, deadline, title: title.into(), text: text.into(), link: Some("https://example.org/t/1".into()) }
}

/// The entries as a program reads them that is not ours.
fn read(file: &str) -> Vec<(ICalendarComponent, ICalendarComponent)> {
    let calendar = ICalendar::parse(file).unwrap_or_else(|entry| panic!("{entry:?} in {file}"));
    let events = calendar.components.iter().filter(|it| it.component_type == ICalendarComponentType::VEvent);
    let alarm = |event: &ICalendarComponent| {
        calendar.component_by_id(*event.component_ids.first().expect("an alarm")).expect("an alarm").clone()
    };
    events.map(|event| (event.clone(), alarm(event))).collect()
}

fn text(component: &ICalendarComponent, property: &ICalendarProperty) -> String {
    let value = component.property(property).and_then(|entry| entry.values.first());
    value.and_then(ICalendarValue::as_text).unwrap_or_else(|| panic!("{property:?} of {component:?}")).to_owned()
}

fn number(component: &ICalendarComponent, property: &ICalendarProperty) -> i64 {
    let value = component.property(property).and_then(|entry| entry.values.first());
    value.and_then(ICalendarValue::as_integer).unwrap_or_else(|| panic!("{property:?} of {component:?}"))
}

fn instant_of(component: &ICalendarComponent, property: &ICalendarProperty) -> i64 {
    let value = component.property(property).and_then(|entry| entry.values.first());
    let at = value.and_then(ICalendarValue::as_partial_date_time).and_then(|at| at.to_timestamp());
    at.unwrap_or_else(|| panic!("{property:?} of {component:?}"))
}

#[test]
fn a_deadline_is_an_entry_with_an_alarm() {
    let token = token(3);
    let read = read(&publish(&[entry(&token, 24 * 7, "deploy key, expires; soon\\", "one\ntwo")], &organizer(), now()));
    let [(event, alarm)] = read.as_slice() else { panic!("one entry") };
    assert_eq!(event.uid(), Some("token-00000000-0000-0000-0000-00000000b000@example.org"));
    assert_eq!(number(event, &ICalendarProperty::Sequence), 12);
    assert!(event.has_property(&ICalendarProperty::Organizer));
    assert_eq!(text(event, &ICalendarProperty::Summary), "deploy key, expires; soon\\");
    assert_eq!(text(event, &ICalendarProperty::Description), "one\ntwo");
    assert_eq!(instant_of(event, &ICalendarProperty::Dtstart), (now() + TimeDelta::days(7)).timestamp());
    assert_eq!(instant_of(event, &ICalendarProperty::Dtstamp), now().timestamp());
    assert!(alarm.has_property(&ICalendarProperty::Trigger));
}

#[test]
fn a_changed_deadline_moves_the_entry() {
    let (before, after) = (token(0), token(1));
    let first = read(&publish(&[entry(&before, 24 * 7, "x", "")], &organizer(), now()));
    let second = read(&publish(&[entry(&after, 24 * 9, "x", "")], &organizer(), now() + TimeDelta::hours(1)));
    let (first, second) = (&first[0].0, &second[0].0);
    assert_eq!(first.uid(), second.uid());
    assert!(number(first, &ICalendarProperty::Sequence) < number(second, &ICalendarProperty::Sequence));
    assert_ne!(instant_of(first, &ICalendarProperty::Dtstart), instant_of(second, &ICalendarProperty::Dtstart));
}

#[test]
fn what_is_withdrawn_has_no_alarm() {
    let token = token(0);
    let file = file(Method::Cancel, &[entry(&token, 24 * 7, "x", "")], &organizer(), now());
    let calendar = ICalendar::parse(&file).expect("a calendar");
    assert!(calendar.components.iter().all(|it| it.component_type != ICalendarComponentType::VAlarm), "{file}");
    assert!(file.contains("\r\nMETHOD:CANCEL\r\n") && file.contains("\r\nSTATUS:CANCELLED\r\n"), "{file}");
}

#[test]
fn the_alarm_comes_a_day_before_or_an_hour_where_less_is_left() {
    let token = token(0);
    let file_in = |hours| publish(&[entry(&token, hours, "x", "")], &organizer(), now());
    assert!(file_in(25).contains("\r\nTRIGGER:-P1D\r\n"));
    assert!(file_in(24).contains("\r\nTRIGGER:-PT1H\r\n"));
}

proptest! {
    #[test]
    fn any_text_is_read_back(title in "[^\\p{C}\\p{Z}\\s]([^\\p{C}\\s]| )*", text in "([^\\p{C}\\s]|[ \n])*[a-z]") {
        let token = token(0);
        let file = publish(&[entry(&token, 48, &title, &text)], &organizer(), now());
        for line in file.split_inclusive("\r\n") {
            prop_assert!(line.len() <= LINE + 2 && line.ends_with("\r\n"), "{line:?}");
        }
        let (event, _) = &read(&file)[0];
        prop_assert_eq!(self::text(event, &ICalendarProperty::Summary), title);
        let description = self::text(event, &ICalendarProperty::Description);
        prop_assert_eq!(description.trim(), text.trim());
    }
}

use proptest::prelude::*;

use super::*;

const SOON: TimeDelta = TimeDelta::minutes(1);
const GIVE_UP_AFTER: TimeDelta = TimeDelta::days(2);

fn tried(attempt: u32, since_first_claim: TimeDelta) -> Tried {
    Tried { attempt, since_first_claim, give_up_after: GIVE_UP_AFTER, another_refused: false, jitter: 1.0 }
}

fn suppresses(code: u16, text: &str) -> bool {
    match decide(&Happened::refused(Phase::Rcpt, code, text), &tried(1, SOON)) {
        Next::Failed { suppress, .. } => suppress,
        other => panic!("{code} {text}: {other:?}"),
    }
}

#[test]
fn addresses_that_do_not_exist_are_suppressed() {
    for (code, text) in [
        (550, "5.1.1 <ann@example.org>: Recipient address rejected: User unknown in virtual mailbox table"),
        (550, "5.1.10 example.org does not accept mail (nullMX)"),
        (553, "5.1.3 bad address syntax"),
        (550, "5.2.1 The email account that you tried to reach is disabled"),
        (550, "Requested action not taken: mailbox unavailable"),
        (550, "No such user here"),
        (551, "User not local; please try <ann@example.net>"),
        (553, "Requested action not taken: mailbox name not allowed"),
    ] {
        assert!(suppresses(code, text), "{code} {text}");
    }
}

#[test]
fn what_is_not_the_addresss_fault_does_not_suppress_it() {
    for (code, text) in [
        (550, "5.7.1 Unknown sender: message refused by policy"),
        (550, "5.7.26 Unauthenticated email is not accepted"),
        (552, "5.2.2 The recipient's inbox is out of storage space"),
        (550, "5.1.8 Sender address rejected: Domain not found"),
        (554, "5.7.1 Service unavailable; client host blocked using a list"),
        (550, "Sender verify failed: no such user"),
        (550, "Administrative prohibition"),
        (550, "Invalid HELO from this user"),
        (550, "4.1.1 User unknown"),
        (550, ""),
        (554, "Transaction failed"),
        (500, "5.3.0 Error: command failed"),
        (552, "too much mail data"),
    ] {
        assert!(!suppresses(code, text), "{code} {text}");
    }
    let late = Happened::refused(Phase::Dot, 550, "5.1.1 User unknown");
    assert!(matches!(decide(&late, &tried(1, SOON)), Next::Failed { suppress: false, .. }));
}

#[test]
fn a_server_that_takes_nobodys_mail_pauses_delivery() {
    for phase in [Phase::Connect, Phase::Hello, Phase::Tls, Phase::Auth] {
        for code in [421, 450, 554] {
            let next = decide(&Happened::refused(phase, code, "go away"), &tried(9, TimeDelta::days(9)));
            assert!(matches!(next, Next::Pause { .. }), "{phase:?} {code}");
        }
        let broken = Happened::Broken { phase, error: "reset".into() };
        assert!(matches!(decide(&broken, &tried(9, TimeDelta::days(9))), Next::Pause { .. }), "{phase:?}");
    }
}

#[test]
fn a_refusal_at_mail_is_the_messages_fault_unless_it_is_not_alone() {
    let refused = Happened::refused(Phase::Mail, 552, "5.3.4 message too big");
    assert!(matches!(decide(&refused, &tried(1, SOON)), Next::Failed { suppress: false, .. }));
    let second = Tried { another_refused: true, ..tried(1, SOON) };
    assert!(matches!(decide(&refused, &second), Next::Pause { .. }));
    for (phase, code) in [(Phase::Mail, 452), (Phase::Rcpt, 552), (Phase::Dot, 552)] {
        let other = Happened::refused(phase, code, "no");
        assert_eq!(decide(&other, &second), decide(&other, &tried(1, SOON)), "{phase:?} {code}");
    }
}

#[test]
fn trouble_that_passes_is_retried_and_given_up_after_two_days() {
    let trouble = [
        Happened::refused(Phase::Mail, 421, "4.3.2 shutting down"),
        Happened::refused(Phase::Rcpt, 450, "4.2.0 greylisted"),
        Happened::refused(Phase::Data, 451, ""),
        Happened::refused(Phase::Dot, 452, "4.3.1 disk full"),
        Happened::Broken { phase: Phase::Data, error: "timeout".into() },
        Happened::Unknown { error: "reset".into() },
    ];
    for happened in trouble {
        let next = decide(&happened, &tried(3, GIVE_UP_AFTER));
        let Next::Retry { after, unknown, .. } = next else { panic!("{happened:?}: {next:?}") };
        assert_eq!(after, TimeDelta::minutes(4));
        assert_eq!(unknown, matches!(happened, Happened::Unknown { .. }));
        let late = decide(&happened, &tried(3, GIVE_UP_AFTER + TimeDelta::seconds(1)));
        assert!(matches!(late, Next::Failed { suppress: false, .. }), "{late:?}");
    }
}

#[test]
fn success_and_the_lease_are_what_they_are() {
    assert_eq!(
        decide(&Happened::accepted("2.0.0 Ok: queued as 4F2\r\n"), &tried(1, SOON)),
        Next::Sent { reply: "2.0.0 Ok: queued as 4F2".into() }
    );
    assert_eq!(decide(&Happened::LostLease, &tried(1, SOON)), Next::Abandon);
    let unbuildable = Happened::Unbuildable { error: "no template".into() };
    assert!(matches!(decide(&unbuildable, &tried(1, SOON)), Next::Failed { suppress: false, .. }));
    let deserted = Happened::Deserted { claims: 11 };
    let Next::Failed { reply, suppress: false } = decide(&deserted, &tried(1, SOON)) else { panic!("{deserted:?}") };
    assert!(reply.contains("11 times"), "{reply}");
}

#[test]
fn enhanced_codes_are_read_strictly() {
    assert_eq!(enhanced_status("5.1.10 null MX"), Some((5, 1, 10)));
    for text in ["", "5.1", "5.1.1.1 x", "3.1.1 x", "5.1.x", "5.1111.1", "192.168.0.1 blocked", "5..1", "+5.1.1"] {
        assert_eq!(enhanced_status(text), None, "{text}");
    }
}

fn anything() -> impl Strategy<Value = Happened> {
    let phase = prop::sample::select(vec![
        Phase::Connect,
        Phase::Hello,
        Phase::Tls,
        Phase::Auth,
        Phase::Mail,
        Phase::Rcpt,
        Phase::Data,
        Phase::Dot,
    ]);
    let refused = (phase.clone(), any::<u16>(), ".{0,40}");
    let enhanced = (phase.clone(), 400u16..600, (0u8..9, 0u16..9, 0u16..99));
    prop_oneof![
        ".{0,40}".prop_map(|text| Happened::accepted(&text)),
        refused.prop_map(|(phase, code, text)| Happened::refused(phase, code, &text)),
        enhanced.prop_map(|(phase, code, (a, b, c))| Happened::refused(phase, code, &format!("{a}.{b}.{c} no"))),
        (phase, ".{0,40}").prop_map(|(phase, error)| Happened::Broken { phase, error }),
        ".{0,40}".prop_map(|error| Happened::Unknown { error }),
        Just(Happened::LostLease),
        ".{0,40}".prop_map(|error| Happened::Unbuildable { error }),
        any::<u32>().prop_map(|claims| Happened::Deserted { claims }),
    ]
}

proptest! {
    #[test]
    fn everything_has_a_next(
        happened in anything(),
        attempt: u32,
        seconds in -9_000_000i64..9_000_000,
        give_up in 0i64..9_000_000,
        another_refused: bool,
        jitter: f64,
    ) {
        let (since_first_claim, give_up_after) = (TimeDelta::seconds(seconds), TimeDelta::seconds(give_up));
        let tried = Tried { attempt, since_first_claim, give_up_after, another_refused, jitter };
        let is_final = |code: u16| (500..600).contains(&code);
        match (decide(&happened, &tried), &happened) {
            (Next::Sent { reply }, Happened::Accepted { reply: said }) => prop_assert_eq!(&reply, said),
            (Next::Abandon, Happened::LostLease) => {}
            (Next::Retry { after, unknown, .. }, happened) => {
                prop_assert!(since_first_claim <= give_up_after || attempt <= 1);
                prop_assert!(after >= FIRST_RETRY / 2 && after <= LONGEST_RETRY);
                prop_assert_eq!(unknown, matches!(happened, Happened::Unknown { .. }));
                match happened {
                    Happened::Refused { phase, code, .. } => prop_assert!(*phase >= Phase::Mail && !is_final(*code)),
                    Happened::Broken { phase, .. } => prop_assert!(*phase >= Phase::Mail),
                    Happened::Unknown { .. } => {}
                    other => prop_assert!(false, "{:?}", other),
                }
            }
            (Next::Failed { suppress: true, .. }, Happened::Refused { phase: Phase::Rcpt, code: 500..600, .. }) => {}
            (Next::Failed { suppress: false, .. }, happened) => {
                let late = since_first_claim > give_up_after && attempt > 1;
                match happened {
                    Happened::Refused { phase, code, .. } => {
                        prop_assert!(*phase >= Phase::Mail && (late || is_final(*code)));
                        prop_assert!(!(another_refused && happened.refused_at_mail()));
                    }
                    Happened::Broken { phase, .. } => prop_assert!(*phase >= Phase::Mail && late),
                    Happened::Unknown { .. } => prop_assert!(late),
                    Happened::Unbuildable { .. } | Happened::Deserted { .. } => {}
                    other => prop_assert!(false, "{:?}", other),
                }
            }
            (Next::Pause { .. }, Happened::Refused { phase, .. } | Happened::Broken { phase, .. }) => {
                prop_assert!(*phase < Phase::Mail || (another_refused && happened.refused_at_mail()));
            }
            (next, happened) => prop_assert!(false, "{:?} after {:?}", next, happened),
        }
    }

    #[test]
    fn waits_grow_between_their_bounds(attempt in 1u32..40, jitter in 0.0f64..1.0) {
        let (least, wait, most) = (back_off(attempt, 0.0), back_off(attempt, jitter), back_off(attempt, 1.0));
        prop_assert!(least <= wait && wait <= most);
        prop_assert_eq!(least * 2, most);
        prop_assert!(back_off(attempt + 1, 0.0) >= least && back_off(attempt + 1, 1.0) >= most);
    }
}

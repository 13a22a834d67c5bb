//! Whatever a server says, it is read as what it is: a message counts as taken only after seven replies that say so.

use std::sync::LazyLock;

use proptest::prelude::*;
use tokio::io::AsyncReadExt;
use tokio::runtime::Runtime;

use super::*;

/// What is answered in a delivery that goes well: greeting, EHLO twice, MAIL, RCPT, DATA, the dot.
const ASKED: [Phase; 7] = [Phase::Hello, Phase::Hello, Phase::Hello, Phase::Mail, Phase::Rcpt, Phase::Data, Phase::Dot];

/// A reply: its code, and whether its first line says anything.
#[derive(Clone, Copy)]
struct Reply {
    code: u16,
    has_words: bool,
}

/// The replies in what a server says, read strictly by another reader than lettre's: up to the first that makes no sense.
fn strictly(said: &[u8]) -> Vec<Reply> {
    let mut replies = Vec::new();
    let mut begun: Option<Reply> = None;
    for line in said.split_inclusive(|byte| *byte == b'\n') {
        let Some(line) = line.strip_suffix(b"\r\n") else { break };
        // RFC 6531, section 3.7.4.2: replies are UTF-8 at the most.
        if std::str::from_utf8(line).is_err() {
            break;
        }
        // RFC 5321, section 4.2: the first digit is 2 to 5, the second 0 to 5.
        let Some(&[first @ b'2'..=b'5', second @ b'0'..=b'5', third @ b'0'..=b'9']) = line.first_chunk() else { break };
        let code = [first, second, third].iter().fold(0, |code, digit| 10 * code + u16::from(digit - b'0'));
        if begun.is_some_and(|begun| begun.code != code) {
            break;
        }
        let has_words = line.get(4..).is_some_and(|text| !text.trim_ascii().is_empty());
        let reply = begun.unwrap_or(Reply { code, has_words });
        if line.get(3) == Some(&b'-') {
            begun = Some(reply);
        } else {
            begun = None;
            replies.push(reply);
        }
    }
    replies
}

fn reply(good: &'static str) -> impl Strategy<Value = Vec<u8>> {
    let text = "[ -~]{0,20}";
    prop_oneof![
        12 => Just(good.as_bytes().to_vec()),
        1 => (200u16..600, text).prop_map(|(code, text)| format!("{code} {text}\r\n").into_bytes()),
        1 => (200u16..600, text, text).prop_map(|(code, one, two)| format!("{code}-{one}\r\n{code} {two}\r\n").into_bytes()),
        1 => (200u16..600, 200u16..600).prop_map(|(one, two)| format!("{one}-x\r\n{two} y\r\n").into_bytes()),
        1 => prop::collection::vec(any::<u8>(), 0..40),
        1 => Just(good.trim_end().as_bytes().to_vec()),
        1 => Just([good, good].concat().into_bytes()),
        1 => Just(Vec::new()),
    ]
}

fn replies() -> impl Strategy<Value = Vec<u8>> {
    let offers = prop_oneof![
        reply("250-mx.example.org\r\n250-PIPELINING\r\n250 SIZE 1000000\r\n"),
        reply("250-mx.example.org\r\n250 8BITMIME\r\n"),
    ];
    let ok = || reply("250 2.0.0 ok\r\n");
    let all = (reply("220 mx ESMTP\r\n"), reply("250 mx\r\n"), offers, ok(), ok(), reply("354 go\r\n"), ok());
    all.prop_map(|(a, b, c, d, e, f, g)| [a, b, c, d, e, f, g].concat())
}

/// Delivers a mail to a server that says all of this at once and hangs up when it has been read.
async fn deliver(said: Vec<u8>) -> Happened {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let server = tokio::spawn(async move {
        let (mut socket, _) = listener.accept().await.expect("a connection");
        // The client may be gone after the first words.
        let _ = socket.write_all(&said).await;
        let _ = socket.shutdown().await;
        let _ = socket.read_to_end(&mut Vec::new()).await;
    });
    let mut smtp = Smtp::new(config::Smtp { timeouts: short(), ..config::Smtp::plain("127.0.0.1", port) });
    let happened = smtp.send(&mail(), || async { true }).await;
    drop(smtp);
    server.await.expect("no panic");
    happened
}

#[tokio::test]
async fn an_answer_to_ehlo_that_names_no_server_lets_nobody_in() {
    for unnamed in ["200 \r\n", "250-\r\n250 SIZE\r\n", "250    \r\n"] {
        let said = format!("220 mx ESMTP\r\n{unnamed}250 mx\r\n250 ok\r\n250 ok\r\n354 go\r\n250 ok\r\n");
        let happened = deliver(said.into_bytes()).await;
        assert!(matches!(happened, Happened::Broken { phase: Phase::Hello, .. }), "{unnamed:?}: {happened:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn what_is_said_is_read_as_what_it_is(said in replies()) {
        static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Runtime::new().expect("a runtime"));
        let replies = strictly(&said);
        let good = replies.iter().zip(ASKED).enumerate().take_while(|(at, (reply, phase))| match phase {
            // lettre lets 3xx pass here, which changes nothing: no message has been mentioned. The first answer to EHLO
            // must name the server (RFC 5321, section 4.1.1.1).
            Phase::Hello => (200..400).contains(&reply.code) && (*at != 1 || reply.has_words),
            Phase::Data => reply.code == 354,
            _ => (200..300).contains(&reply.code),
        });
        let good = good.count();
        match RUNTIME.block_on(deliver(said)) {
            Happened::Accepted { .. } => prop_assert_eq!(good, ASKED.len()),
            Happened::Refused { phase, code, .. } => {
                prop_assert_eq!((Some(&phase), Some(&code)), (ASKED.get(good), replies.get(good).map(|reply| &reply.code)));
            }
            Happened::Broken { phase, .. } => prop_assert!(ASKED.get(good).is_some_and(|at| phase <= *at)),
            Happened::Unknown { .. } => prop_assert_eq!(good, ASKED.len() - 1),
            other => prop_assert!(false, "{:?}", other),
        }
    }
}

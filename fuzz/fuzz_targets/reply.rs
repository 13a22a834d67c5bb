//! Arbitrary bytes as what a mail server says: the delivery ends, and counts as done only where each of seven replies can
//! have said so. Over a socket of this machine, because that is where replies come from; a thousand or two in a second.

#![no_main]

use std::sync::LazyLock;
use std::time::Duration;

use lapsed::config::{Smtp as Options, Timeouts};
use lapsed::mail::compose::Composed;
use lapsed::mail::outcome::{Happened, Tried, decide};
use lapsed::mail::smtp::Smtp;
use libfuzzer_sys::fuzz_target;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::runtime::{Builder, Runtime};

/// What lets the later phases be reached without finding the earlier ones first: so many bytes are chosen by the first.
const BEGINNINGS: [&str; 4] = [
    "",
    "220 mx\r\n250 mx\r\n250 mx\r\n",
    "220 mx\r\n250 mx\r\n250-mx\r\n250-SIZE 100000\r\n250 PIPELINING\r\n",
    "220 mx\r\n250 mx\r\n250 mx\r\n250 ok\r\n250 ok\r\n354 go\r\n",
];

static RUNTIME: LazyLock<Runtime> =
    LazyLock::new(|| Builder::new_current_thread().enable_all().build().expect("a runtime"));

async fn deliver(said: Vec<u8>) -> Happened {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let server = tokio::spawn(async move {
        let (mut socket, _) = listener.accept().await.expect("a connection");
        let _ = socket.write_all(&said).await;
        let _ = socket.shutdown().await;
        let _ = socket.read_to_end(&mut Vec::new()).await;
    });
    let second = Duration::from_secs(1);
    let timeouts = Timeouts { hello: second, mail: second, content: second, dot: second, ..Timeouts::default() };
    let mut smtp = Smtp::new(Options { timeouts, ..Options::plain("127.0.0.1", port) });
    let mail = Composed {
        from: "lapsed@example.org".parse().expect("an address"),
        to: "ann@example.org".parse().expect("an address"),
        subject: "x".into(),
        bytes: b"Subject: x\r\n\r\ny\r\n".to_vec(),
    };
    let happened = smtp.send(&mail, || async { true }).await;
    drop(smtp);
    server.await.expect("no panic");
    happened
}

fuzz_target!(|bytes: &[u8]| {
    let Some((first, rest)) = bytes.split_first() else { return };
    let beginning = BEGINNINGS[usize::from(*first) % BEGINNINGS.len()];
    let said = [beginning.as_bytes(), rest].concat();
    let lines = said.split(|byte| *byte == b'\n').count() - 1;
    let happened = RUNTIME.block_on(deliver(said));
    if let Happened::Accepted { reply } = &happened {
        assert!(lines >= 7 && reply.chars().count() <= 500, "{happened:?} after {lines} lines");
    }
    assert!(!happened.reply().contains(['\r', '\n', '\0']), "{happened:?}");
    let tried = Tried {
        attempt: 1,
        since_first_claim: chrono::TimeDelta::zero(),
        give_up_after: chrono::TimeDelta::days(2),
        another_refused: false,
        jitter: 0.5,
    };
    let _ = decide(&happened, &tried);
});

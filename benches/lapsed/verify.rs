//! `verify`, as a service calls it at each request, against `pgbench -S -M prepared`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use lapsed::clock::ManualClock;
use lapsed::token::{Bucket, Secret};
use lapsed::verify::{Verified, verify};

use crate::Sizes;
use crate::fill::{Shape, fill, now};
use crate::place::{OnPg, Place};
use crate::table::{Line, median, ratio};

/// How many ask at once.
const CALLERS: usize = 8;

/// Tokens with a secret that somebody presents.
const SECRETS: usize = 1_000;

pub async fn row(sizes: &Sizes) -> Line {
    let tokens = sizes.of(1_000_000);
    let shape = Shape { owners: tokens / 10, tokens, deadline: "86400 * 90 + i".into(), queued: 0, queued_for: 3_600 };
    let place: OnPg = fill(&shape).await;
    let secrets = Arc::new(give_secrets(&place));
    // As many rows as tokens: 100,000 for each unit of the scale.
    let scale = (tokens / 100_000).max(1).to_string();
    pgbench(&place, &["-i", "-q", "-s", &scale]);
    place.rest();
    let (mut ours, mut bare) = (Vec::new(), Vec::new());
    let seconds = if sizes.quick { 3 } else { 10 };
    for _ in 0..sizes.runs {
        let clients = CALLERS.to_string();
        let printed =
            pgbench(&place, &["-S", "-n", "-M", "prepared", "-c", &clients, "-j", "2", "-T", &seconds.to_string()]);
        let tps = printed.lines().find_map(|line| line.strip_prefix("tps = ")).and_then(|rest| rest.split(' ').next());
        bare.push(tps.and_then(|tps| tps.parse().ok()).expect("pgbench says tps"));
        ours.push(calls(&place, &secrets, Duration::from_secs(seconds)).await);
    }
    let ratios = ours.iter().zip(&bare).map(|(ours, bare): (&f64, &f64)| ours / bare);
    Line {
        what: format!("verify: {CALLERS} at once, {tokens} tokens, PostgreSQL"),
        ratio: ratio(median(ratios)),
        got: format!("{:.0} calls/s", median(ours.iter().copied())),
        against: format!("pgbench -S -M prepared: {:.0}/s", median(bare.iter().copied())),
        wanted: "0.7",
    }
}

/// Gives some tokens secrets that are known here, and says that they were used just now.
fn give_secrets(place: &OnPg) -> Vec<String> {
    let mut texts = Vec::new();
    let mut sql = String::new();
    for i in 0..SECRETS {
        // The token i belongs to the owner i, as there are more owners than secrets.
        let secret = Secret::generate(Bucket::from_number(i.to_le_bytes()[0]));
        let hash: String = secret.hash().iter().map(|byte| format!("{byte:02x}")).collect();
        let (token, used) = (crate::fill::token::<OnPg>(&i.to_string()), crate::fill::at::<OnPg>("0"));
        sql += &format!(
            "UPDATE tokens SET secret_hash = '\\x{hash}', last_used_at = {used} WHERE bucket = {} AND id = {token};",
            secret.bucket().number()
        );
        texts.push(secret.expose());
    }
    place.client(&sql);
    texts
}

/// Calls in a second.
async fn calls(place: &OnPg, secrets: &Arc<Vec<String>>, span: Duration) -> f64 {
    let store = place.open().await;
    let until = Instant::now() + span;
    let callers: Vec<_> = (0..CALLERS)
        .map(|caller| {
            let (store, secrets) = (store.clone(), secrets.clone());
            tokio::spawn(async move {
                let clock = ManualClock::at(now());
                let mut calls = 0u32;
                for text in secrets.iter().cycle().skip(caller * SECRETS / CALLERS) {
                    let secret = Secret::parse(text).expect("a secret");
                    let verified = verify(&store, &clock, &secret).await.expect("an answer");
                    assert!(matches!(verified, Verified::Valid(..)), "{verified:?}");
                    calls += 1;
                    if Instant::now() >= until {
                        break;
                    }
                }
                calls
            })
        })
        .collect();
    let mut total = 0;
    for caller in callers {
        total += caller.await.expect("no panic");
    }
    f64::from(total) / span.as_secs_f64()
}

fn pgbench(place: &OnPg, arguments: &[&str]) -> String {
    let output = place.command("pgbench").args(arguments).output().expect("pgbench starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

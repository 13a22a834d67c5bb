//! Who and what the demo begins with.

use chrono::TimeDelta;

use crate::change;
use crate::cli::owner::first_token;
use crate::clock::Timestamp;
use crate::store::Accounts;
use crate::token::{Address, Bucket, Kind, Owner, OwnerId, Secret, Token, TokenId, text};

/// Key, name, time zone, addresses, and tokens: what for, and the seconds until the deadline.
type Seed = (&'static str, &'static str, &'static str, &'static [&'static str], &'static [(&'static str, Option<i64>)]);

const DAY: i64 = 86_400;

const SEEDS: &[Seed] = &[
    (
        "alice",
        "Alice Example",
        "Europe/Berlin",
        &["alice@example.org"],
        &[("deploy key (CI)", Some(48)), ("nightly backup", Some(48)), ("laptop", Some(48)), ("phone", Some(90 * DAY))],
    ),
    (
        "bob",
        "Bob Example",
        "America/New_York",
        &["bob@example.org"],
        &[("report export", Some(22)), ("dashboard", Some(52)), ("old script", None)],
    ),
    (
        "platform-team",
        "Platform team",
        "UTC",
        &["platform@example.org", "oncall@example.org"],
        &[("image registry", Some(40)), ("terraform", Some(40)), ("staging", Some(30 * DAY))],
    ),
    (
        "ci-bot",
        "CI bot",
        "UTC",
        &["platform@example.org"],
        &[("release upload", Some(40)), ("mirror", Some(365 * DAY)), ("cache", None)],
    ),
    ("legacy-importer", "Legacy importer", "UTC", &[], &[("nobody remembers", Some(35))]),
];

/// What the demo follows.
pub(super) struct Cast {
    /// The secret that is verified again and again.
    pub(super) verified: Secret,
    /// What its token is for.
    pub(super) verified_name: String,
    /// The token that is rotated in time.
    pub(super) rotated: TokenId,
    /// What it is for.
    pub(super) rotated_name: String,
    /// How many owners there are.
    pub(super) owners: usize,
    tokens: Vec<TokenId>,
}

impl Cast {
    /// All tokens.
    pub(super) fn tokens(&self) -> &[TokenId] {
        &self.tokens
    }
}

/// Fills an empty store.
pub(super) async fn seed(store: &impl Accounts, now: Timestamp) -> anyhow::Result<Cast> {
    let mut tokens = Vec::new();
    let mut verified = None;
    let mut rotated = None;
    for (key, name, zone, addresses, wanted) in SEEDS {
        let bucket = Bucket::of(key);
        let owner = Owner {
            id: OwnerId::new(bucket, now),
            key: (*key).to_owned(),
            name: (*name).to_owned(),
            time_zone: text::time_zone(zone).map_err(anyhow::Error::msg)?,
            locale: "en".to_owned(),
        };
        let contacts = addresses.iter().map(|address| Address::parse(address).map(Into::into));
        let contacts: Vec<_> = contacts.collect::<Result<_, _>>()?;
        let secret = Secret::generate(bucket);
        let primary = first_token(owner.id, &secret, now);
        store.add_owner(&owner, &contacts, Some((&primary, &secret.hash())), now).await?;
        tokens.push(primary.id);
        for (description, seconds) in *wanted {
            let secret = Secret::generate(bucket);
            let mut token = Token::new(owner.id, Kind::Additional, description, now).with_secret(&secret);
            token.expires_at = seconds.map(|seconds| now + TimeDelta::seconds(seconds));
            change::mark_unplanned(&mut token, now);
            store.add_token(&token, Some(&secret.hash())).await?;
            tokens.push(token.id);
            let name = format!("{key}'s \"{description}\"");
            match (*key, *description) {
                ("bob", "report export") => verified = Some((secret, name)),
                ("alice", "nightly backup") => rotated = Some((token.id, name)),
                _ => {}
            }
        }
    }
    let (verified, verified_name) = verified.ok_or_else(|| anyhow::anyhow!("no token to verify"))?;
    let (rotated, rotated_name) = rotated.ok_or_else(|| anyhow::anyhow!("no token to rotate"))?;
    Ok(Cast { verified, verified_name, rotated, rotated_name, owners: SEEDS.len(), tokens })
}

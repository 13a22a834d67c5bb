//! Large stores, inserted with a few statements.
//!
//! Ids ascend in the order of creation within each bucket, as UUID v7 do; secrets' hashes are scattered over their index.
//! An owner and its contact live in different buckets.

use std::sync::LazyLock;

use lapsed::clock::{Clock, SystemClock, Timestamp};
use lapsed::store::Store;

use crate::place::Place;
use crate::support::many::Bulk;

const OWNER: u16 = 1;
const CONTACT: u16 = 2;
const MESSAGE: u16 = 3;
const TOKEN: u16 = 4;

/// What a store is filled with.
pub struct Shape {
    /// Owners, each with one contact that speaks for nobody else.
    pub owners: u64,
    /// Tokens, dealt out to the owners in turn.
    pub tokens: u64,
    /// SQL for the deadline of the token `i`, in seconds after now.
    pub deadline: String,
    /// Messages to as many contacts, each about one token.
    pub queued: u64,
    /// When they may be sent, in seconds after now.
    pub queued_for: i64,
}

/// The instant of everything that is measured: the start of this program.
pub fn now() -> Timestamp {
    static NOW: LazyLock<Timestamp> = LazyLock::new(|| SystemClock::default().now());
    *NOW
}

/// SQL for the id of the token `i`, where it is the owner `i`'s.
pub fn token<P: Place>(i: &str) -> String {
    P::Sql::id(TOKEN, i, &format!("({i} % 256)"))
}

/// SQL for the instant so many seconds after now.
pub fn at<P: Place>(seconds: &str) -> String {
    P::Sql::instant(&format!("{} + {seconds}", now().timestamp()))
}

/// Makes the tables and fills them.
pub async fn fill<P: Place>(shape: &Shape) -> P {
    let place = P::make().await;
    place.open().await.close().await; // makes the tables
    let Shape { owners, tokens, deadline, queued, queued_for } = shape;
    let of = |n: &u64| P::Sql::numbers(u32::try_from(*n).expect("fewer than 4 billion"));
    let (long_ago, later) = (at::<P>("-90 * 86400"), at::<P>(&queued_for.to_string()));
    let owner_bucket = format!("(i % {owners} % 256)");
    let contact_bucket = format!("((i % {owners} * 31 + 7) % 256)");
    let owner = P::Sql::id(OWNER, &format!("i % {owners}"), &owner_bucket);
    let contact = P::Sql::id(CONTACT, &format!("i % {owners}"), &contact_bucket);
    let token = P::Sql::id(TOKEN, "i", &owner_bucket);
    let message = P::Sql::id(MESSAGE, "i", &contact_bucket);
    let (expires_at, hash) = (at::<P>(&format!("({deadline})")), P::hash("i"));
    place
        .fill(&format!(
            "INSERT INTO owners (bucket, id, key, name, time_zone, locale, created_at) \
         SELECT {owner_bucket}, {owner}, 'owner-' || i, 'Owner ' || i, 'UTC', 'en', {long_ago} FROM {};",
            of(owners)
        ))
        .await;
    place
        .fill(&format!(
            "INSERT INTO contacts (bucket, id, address, created_at) \
         SELECT {contact_bucket}, {contact}, 'contact-' || i || '@example.org', {long_ago} FROM {};",
            of(owners)
        ))
        .await;
    place
        .fill(&format!(
            "INSERT INTO owner_contacts (bucket, owner_id, contact_id) \
         SELECT {owner_bucket}, {owner}, {contact} FROM {};",
            of(owners)
        ))
        .await;
    place
        .fill(&format!(
            "INSERT INTO tokens \
             (bucket, id, owner_id, kind, description, scopes, secret_hash, hint, created_at, expires_at, \
              deadline_set_at, generation, unplanned, status) \
         SELECT {owner_bucket}, {token}, {owner}, 'additional', 'deploy key (CI)', 'repo:read', {hash}, 'x7Qa', \
                {long_ago}, {expires_at}, {long_ago}, 0, FALSE, 'active' \
         FROM {};",
            of(tokens)
        ))
        .await;
    place
        .fill(&format!(
            "INSERT INTO messages (bucket, id, contact_id, state, not_before, attempts, lease_epoch, created_at) \
         SELECT {contact_bucket}, {message}, {contact}, 'open', {later}, 0, 0, {long_ago} FROM {};",
            of(queued)
        ))
        .await;
    place
        .fill(&format!(
            "INSERT INTO reminders \
             (bucket, token_id, generation, lead, contact_id, deadline, state, escalation, created_at) \
         SELECT {contact_bucket}, {token}, 0, 3888000, {contact}, {expires_at}, 'pending', FALSE, {long_ago} FROM {};",
            of(queued)
        ))
        .await;
    place.rest();
    place
}

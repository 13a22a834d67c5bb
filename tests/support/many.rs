//! A store as large as real ones: 100,000 tokens, reminders and messages in mixed states, most of them far from due.
//!
//! Inserted with a handful of statements, whose few differences between the back ends are what [`Bulk`] hides.

use lapsed::clock::Timestamp;
use lapsed::store::Store;
use lapsed::token::{ContactId, OwnerId, TokenId};
use uuid::Uuid;

use super::backend::{Backend, OnPartitions, OnPostgres, OnSqlite};
use super::world::dawn;

/// Tokens, and as many reminders and messages.
pub const TOKENS: u32 = 100_000;

/// Owners, and as many contacts. An owner and the contact of the same number live in the same bucket.
pub const OWNERS: u32 = 50_000;

/// How a back end says what a bulk insert needs.
pub trait Bulk: Backend {
    /// A table `g (i)` of the numbers below `n`.
    fn numbers(n: u32) -> String;
    /// The id of the row `i` of a kind, in the bucket.
    fn id(kind: u16, i: &str, bucket: &str) -> String;
    /// The instant that is so many seconds after 1970.
    fn instant(seconds: &str) -> String;
    /// 32 bytes that hold `i`.
    fn hash(i: &str) -> String;
    /// What makes a connection believe that the keys of other tables in a row exist, as they do: that is quicker.
    const TRUSTING: &str;
}

impl Bulk for OnSqlite {
    fn numbers(n: u32) -> String {
        format!(
            "(WITH RECURSIVE n (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i + 1 < {n}) SELECT i FROM n) AS g"
        )
    }

    fn id(kind: u16, i: &str, bucket: &str) -> String {
        format!("UNHEX(PRINTF('01900000%04x%018x%02x', {kind}, {i}, {bucket}))")
    }

    fn instant(seconds: &str) -> String {
        format!("({seconds})")
    }

    fn hash(i: &str) -> String {
        format!("UNHEX(PRINTF('%064x', {i}))")
    }

    const TRUSTING: &str = "PRAGMA foreign_keys = OFF;";
}

impl Bulk for OnPostgres {
    fn numbers(n: u32) -> String {
        format!("GENERATE_SERIES(0, {n} - 1) AS g (i)")
    }

    fn id(kind: u16, i: &str, bucket: &str) -> String {
        format!(
            "('01900000' || LPAD(TO_HEX({kind}), 4, '0') || LPAD(TO_HEX({i}), 18, '0') || LPAD(TO_HEX({bucket}), 2, '0'))::uuid"
        )
    }

    fn instant(seconds: &str) -> String {
        format!("TO_TIMESTAMP({seconds})")
    }

    fn hash(i: &str) -> String {
        format!("DECODE(LPAD(TO_HEX({i}), 64, '0'), 'hex')")
    }

    const TRUSTING: &str = "SET session_replication_role = replica;";
}

impl Bulk for OnPartitions {
    fn numbers(n: u32) -> String {
        OnPostgres::numbers(n)
    }

    fn id(kind: u16, i: &str, bucket: &str) -> String {
        OnPostgres::id(kind, i, bucket)
    }

    fn instant(seconds: &str) -> String {
        OnPostgres::instant(seconds)
    }

    fn hash(i: &str) -> String {
        OnPostgres::hash(i)
    }

    const TRUSTING: &str = OnPostgres::TRUSTING;
}

const OWNER: u16 = 1;
const CONTACT: u16 = 2;
const MESSAGE: u16 = 3;
const TOKEN: u16 = 4;

fn id(kind: u16, i: u32, bucket: u32) -> Uuid {
    Uuid::from_u128(0x0190_0000 << 96 | u128::from(kind) << 80 | u128::from(i) << 8 | u128::from(bucket))
}

/// The owner of this number.
pub fn owner(i: u32) -> OwnerId {
    id(OWNER, i, i % 256).into()
}

/// The contact of this number.
pub fn contact(i: u32) -> ContactId {
    id(CONTACT, i, i % 256).into()
}

/// The token of this number.
pub fn token(i: u32) -> TokenId {
    id(TOKEN, i, i % OWNERS % 256).into()
}

/// The hash of the secret of the token of this number.
pub fn secret(i: u32) -> [u8; 32] {
    let mut hash = [0; 32];
    hash[28..].copy_from_slice(&i.to_be_bytes());
    hash
}

/// The instant at which everything is due that is said to be due.
pub fn now() -> Timestamp {
    dawn()
}

/// Makes the tables, fills and analyses them.
pub async fn fill<B: Bulk>(backend: &B) {
    backend.open().await.close().await; // makes the tables
    backend.execute(B::TRUSTING).await;
    let at = |seconds: &str| B::instant(&format!("{} + {seconds}", now().timestamp()));
    let (owners, tokens) = (B::numbers(OWNERS), B::numbers(TOKENS));
    let (owner, contact) = (B::id(OWNER, "i", "i % 256"), B::id(CONTACT, "i", "i % 256"));
    let another_contact = B::id(CONTACT, "(i * 31 + 1) % 50000", "(i * 31 + 1) % 50000 % 256");
    let owner_of = B::id(OWNER, "i % 50000", "i % 50000 % 256");
    let contact_of = B::id(CONTACT, "i % 50000", "i % 50000 % 256");
    let token = B::id(TOKEN, "i", "i % 50000 % 256");
    let message = B::id(MESSAGE, "i", "i % 50000 % 256");
    let hash = B::hash("i");
    let (long_ago, never) = (at("-200 * 86400"), "NULL");
    // Of 1,000 tokens: 100 expired and 40 were revoked long ago, 60 have no deadline, 20 are past it, 20 were expired
    // by a wrong clock, 20 are unplanned, 50 stand in a window; the others are far from due.
    let class = "(i * 7919 % 1000)";
    let expires_at = format!(
        "CASE WHEN {class} < 100 THEN {} WHEN {class} < 140 THEN {} WHEN {class} < 200 THEN {never} \
              WHEN {class} < 220 THEN {} WHEN {class} < 240 THEN {} WHEN {class} < 260 THEN {} \
              WHEN {class} < 310 THEN {} ELSE {} END",
        at("-86400 * (8 + i % 300)"),
        at("86400 * (8 + i % 300)"),
        at("-1 * (i % 3600)"),
        at("86400 * 3 + i"),
        at("86400 * 10 + i"),
        at("i * 34"),
        at("86400 * 60 + i * 300"),
    );
    let ended_at = format!(
        "CASE WHEN {class} < 140 THEN {} WHEN {class} BETWEEN 220 AND 239 THEN {} ELSE NULL END",
        at("-86400 * (8 + i % 300)"),
        at("86400 * 3 + i"),
    );
    let status = format!(
        "CASE WHEN {class} < 100 OR {class} BETWEEN 220 AND 239 THEN 'expired' WHEN {class} < 140 THEN 'revoked' \
              ELSE 'active' END"
    );
    backend
        .execute(&format!(
            "INSERT INTO owners (bucket, id, key, name, time_zone, locale, created_at) \
             SELECT i % 256, {owner}, 'owner-' || i, 'Owner ' || i, 'UTC', 'en', {long_ago} FROM {owners}; \
             INSERT INTO contacts (bucket, id, address, created_at) \
             SELECT i % 256, {contact}, 'contact-' || i || '@example.org', {long_ago} FROM {owners}; \
             INSERT INTO owner_contacts (bucket, owner_id, contact_id) SELECT i % 256, {owner}, {contact} FROM {owners}; \
             INSERT INTO owner_contacts (bucket, owner_id, contact_id) \
             SELECT i % 256, {owner}, {another_contact} FROM {owners} WHERE TRUE ON CONFLICT DO NOTHING; \
             INSERT INTO tokens \
                 (bucket, id, owner_id, kind, description, scopes, secret_hash, hint, created_at, expires_at, \
                  deadline_set_at, generation, unplanned, status, ended_at) \
             SELECT i % 50000 % 256, {token}, {owner_of}, CASE WHEN i < 50000 THEN 'primary' ELSE 'additional' END, \
                    'deploy key (CI)', 'repo:read', {hash}, 'x7Qa', {long_ago}, {expires_at}, {long_ago}, 0, \
                    {class} BETWEEN 240 AND 259, {status}, {ended_at} \
             FROM {tokens}; \
             INSERT INTO token_contacts (bucket, token_id, contact_id) \
             SELECT i % 50000 % 256, {token}, {another_contact} FROM {tokens} WHERE i % 3 = 0;"
        ))
        .await;
    // The first 8,000 contacts have an open message and two reminders for it, the next 3,000 one to be tried again, and
    // 1,000 one that is or was being sent. All others were finished in the last 100 days.
    let state = "CASE WHEN i < 8000 THEN 'open' WHEN i < 11000 THEN 'retry' WHEN i < 12000 THEN 'sending' \
                      WHEN i % 20 = 0 THEN 'failed' ELSE 'sent' END";
    let (not_before, finished_at) = (at("3600 * (i / 256 % 2) - 60"), at("-86 * (i + 1)"));
    let holder = B::id(9, "1", "0");
    let attached = format!("CASE WHEN i < 8000 OR i BETWEEN 50000 AND 57999 THEN NULL ELSE {message} END");
    let pending = "(i < 12000 OR i BETWEEN 50000 AND 57999)";
    let (soon, before) = (at("86400 * 20"), at("-86400 * (1 + i % 300)"));
    backend
        .execute(&format!(
            "INSERT INTO messages \
                 (bucket, id, contact_id, state, not_before, attempts, lease_holder, lease_epoch, created_at, \
                  claimed_at, finished_at) \
             SELECT i % 50000 % 256, {message}, {contact_of}, {state}, {not_before}, 0, \
                    CASE WHEN i BETWEEN 11000 AND 11999 THEN {holder} END, CASE WHEN i < 8000 THEN 0 ELSE 1 END, \
                    {long_ago}, CASE WHEN i >= 8000 THEN {long_ago} END, CASE WHEN i >= 12000 THEN {finished_at} END \
             FROM {tokens}; \
             INSERT INTO reminders \
                 (bucket, token_id, generation, lead, contact_id, deadline, state, escalation, message_id, created_at, \
                  settled_at) \
             SELECT i % 50000 % 256, {token}, 0, 3888000, {contact_of}, CASE WHEN {pending} THEN {soon} ELSE {before} END, \
                    CASE WHEN {pending} THEN 'pending' ELSE 'sent' END, 1 = 0, {attached}, {long_ago}, \
                    CASE WHEN {pending} THEN NULL ELSE {long_ago} END \
             FROM {tokens}; \
             ANALYZE;"
        ))
        .await;
}

//! Imports on SQLite: rows travel as JSON.

use std::collections::{BTreeSet, HashMap, HashSet};

use sqlx::{Sqlite as Lite, Transaction};
use uuid::Uuid;

use super::Sqlite;
use super::json::{hex, json};
use crate::clock::Timestamp;
use crate::store::Result;
use crate::store::imports::{
    Feed, ImportRow, ImportRun, Imports, Known, Merged, RowOutcome, Unseen, addresses_of, long_ended, merge, owners_of,
    part, watching, with_watchers,
};
use crate::store::row::{self, At, KnownRow, OwnerRow, token_columns};
use crate::token::{Bucket, ContactId, Owner, OwnerId, Token};

impl Imports for Sqlite {
    async fn import(&self, run: &ImportRun, rows: &[ImportRow]) -> Result<Vec<RowOutcome>> {
        let mut tx = self.begin().await?;
        let outcomes = import_batch(&mut tx, run, rows).await?;
        tx.commit().await?;
        Ok(outcomes)
    }

    async fn import_strictly(&self, run: &ImportRun, feed: &mut impl Feed) -> Result<bool> {
        let mut tx = self.begin().await?;
        while let Some(rows) = feed.next().await {
            let outcomes = import_batch(&mut tx, run, &rows).await?;
            feed.answer(outcomes);
        }
        if feed.is_clean() {
            tx.commit().await?;
        }
        Ok(feed.is_clean())
    }

    async fn owners_without_contact(&self, run: &ImportRun) -> Result<u64> {
        let mut tx = self.begin_long_read().await?;
        let (owners,): (i64,) = sqlx::query_as(
            "SELECT COUNT(*) \
             FROM owners o \
             WHERE NOT EXISTS (SELECT 1 FROM owner_contacts c WHERE c.bucket = o.bucket AND c.owner_id = o.id) \
               AND EXISTS (SELECT 1 FROM tokens t WHERE t.bucket = o.bucket AND t.owner_id = o.id \
                           AND t.import_run = $1 AND t.status = 'active')",
        )
        .bind(run.id)
        .fetch_one(&mut *tx)
        .await?;
        Ok(owners.unsigned_abs())
    }

    async fn unseen(&self, run: &ImportRun) -> Result<Unseen> {
        let (active, unseen): (i64, i64) = sqlx::query_as(
            "SELECT COUNT(*), COUNT(*) FILTER (WHERE import_run IS NOT $2) \
             FROM tokens \
             WHERE status = 'active' AND source = $1 AND (expires_at IS NULL OR expires_at > $3)",
        )
        .bind(&run.source)
        .bind(run.id)
        .bind(At(run.now))
        .fetch_one(&self.readers)
        .await?;
        Ok(Unseen { active: active.unsigned_abs(), unseen: unseen.unsigned_abs() })
    }

    async fn end_unseen(&self, run: &ImportRun, bucket: Bucket) -> Result<u64> {
        let mut tx = self.begin().await?;
        let ended = sqlx::query(
            "UPDATE tokens \
             SET status = 'revoked', ended_at = $4, unplanned = 0, uncorrected = uncorrected OR expires_at IS NOT NULL \
             WHERE bucket = $1 AND status = 'active' AND source = $2 AND import_run IS NOT $3 \
               AND (expires_at IS NULL OR expires_at > $4)",
        )
        .bind(bucket.column())
        .bind(&run.source)
        .bind(run.id)
        .bind(At(run.now))
        .execute(&mut *tx)
        .await?;
        tx.commit().await?;
        Ok(ended.rows_affected())
    }
}

fn seconds(at: Option<Timestamp>) -> Option<i64> {
    at.map(|at| at.timestamp())
}

async fn import_batch(tx: &mut Transaction<'_, Lite>, run: &ImportRun, rows: &[ImportRow]) -> Result<Vec<RowOutcome>> {
    let (rows, taken) = part(run, rows, &long_ended_here(tx, run, rows).await?);
    let owners = make_owners(tx, run, &rows).await?;
    link_contacts(tx, run, &rows, &owners).await?;
    let known = find(tx, &rows, &owners).await?;
    let merged = merge(run, &rows, &owners, &known);
    insert(tx, run, &merged.new).await?;
    let written = update(tx, run, &merged).await?;
    watch(tx, &with_watchers(&rows, &merged.outcomes), &owners).await?;
    Ok(merged.outcomes(&written, &taken))
}

/// Which of the batch's tokens that ended too long ago to be kept are here all the same.
async fn long_ended_here(
    tx: &mut Transaction<'_, Lite>,
    run: &ImportRun,
    rows: &[ImportRow],
) -> Result<HashSet<(String, String)>> {
    let old: Vec<_> = rows.iter().filter_map(|row| long_ended(run, row)).collect();
    if old.is_empty() {
        return Ok(HashSet::new());
    }
    // Indexes owners_key and tokens_external.
    let here: Vec<(String, String)> = sqlx::query_as(
        "SELECT o.key, t.external_id \
         FROM json_each($1) AS n \
         CROSS JOIN owners o ON o.bucket = n.value ->> 0 AND o.key = n.value ->> 1 \
         CROSS JOIN tokens t ON t.bucket = o.bucket AND t.owner_id = o.id AND t.external_id = n.value ->> 2",
    )
    .bind(json(old))
    .fetch_all(&mut **tx)
    .await?;
    Ok(here.into_iter().collect())
}

/// Makes the owners that do not exist yet, and returns all, by key.
async fn make_owners(
    tx: &mut Transaction<'_, Lite>,
    run: &ImportRun,
    rows: &[&ImportRow],
) -> Result<HashMap<String, Owner>> {
    let wanted = owners_of(rows, run.now);
    let wanted = json(wanted.iter().map(|owner| {
        let (bucket, id) = (owner.id.bucket().column(), hex(owner.id.uuid()));
        (bucket, id, owner.key.as_str(), owner.time_zone.name(), owner.locale.as_str())
    }));
    sqlx::query(
        "INSERT INTO owners (bucket, id, key, name, time_zone, locale, created_at) \
         SELECT n.value ->> 0, UNHEX(n.value ->> 1), n.value ->> 2, n.value ->> 2, n.value ->> 3, n.value ->> 4, $2 \
         FROM json_each($1) AS n \
         WHERE TRUE \
         ON CONFLICT DO NOTHING",
    )
    .bind(&wanted)
    .bind(At(run.now))
    .execute(&mut **tx)
    .await?;
    let rows: Vec<OwnerRow> = sqlx::query_as(
        "SELECT o.id, o.key, o.name, o.time_zone, o.locale \
         FROM json_each($1) AS n \
         CROSS JOIN owners o ON o.bucket = n.value ->> 0 AND o.key = n.value ->> 2",
    )
    .bind(&wanted)
    .fetch_all(&mut **tx)
    .await?;
    let owners: Vec<Owner> = row::all(rows)?;
    Ok(owners.into_iter().map(|owner| (owner.key.clone(), owner)).collect())
}

/// Lets every address of the batch speak for its owner.
async fn link_contacts(
    tx: &mut Transaction<'_, Lite>,
    run: &ImportRun,
    rows: &[&ImportRow],
    owners: &HashMap<String, Owner>,
) -> Result<()> {
    let addresses = addresses_of(rows);
    if addresses.is_empty() {
        return Ok(());
    }
    let wanted = json(addresses.iter().map(|address| {
        let bucket = address.bucket();
        (bucket.column(), hex(ContactId::new(bucket, run.now).uuid()), address.as_str())
    }));
    sqlx::query(
        "INSERT INTO contacts (bucket, id, address, created_at) \
         SELECT n.value ->> 0, UNHEX(n.value ->> 1), n.value ->> 2, $2 \
         FROM json_each($1) AS n \
         WHERE TRUE \
         ON CONFLICT DO NOTHING",
    )
    .bind(&wanted)
    .bind(At(run.now))
    .execute(&mut **tx)
    .await?;
    let found: Vec<(String, Uuid)> = sqlx::query_as(
        "SELECT c.address, c.id \
         FROM json_each($1) AS n \
         CROSS JOIN contacts c ON c.bucket = n.value ->> 0 AND c.address = n.value ->> 2",
    )
    .bind(&wanted)
    .fetch_all(&mut **tx)
    .await?;
    let ids: HashMap<String, Uuid> = found.into_iter().collect();
    let mut links: BTreeSet<(i16, Uuid, Uuid)> = BTreeSet::new();
    for row in rows {
        let Some(owner) = owners.get(&row.owner_key) else { continue };
        let contacts = row.addresses.iter().filter_map(|address| ids.get(address.as_str()));
        links.extend(contacts.map(|contact| (owner.id.bucket().column(), owner.id.uuid(), *contact)));
    }
    sqlx::query(
        "INSERT INTO owner_contacts (bucket, owner_id, contact_id) \
         SELECT n.value ->> 0, UNHEX(n.value ->> 1), UNHEX(n.value ->> 2) \
         FROM json_each($1) AS n \
         WHERE TRUE \
         ON CONFLICT DO NOTHING",
    )
    .bind(json(links.iter().map(|(bucket, owner, contact)| (bucket, hex(*owner), hex(*contact)))))
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// The tokens of the batch that are there already, by owner and external id.
async fn find(
    tx: &mut Transaction<'_, Lite>,
    rows: &[&ImportRow],
    owners: &HashMap<String, Owner>,
) -> Result<HashMap<(OwnerId, String), Known>> {
    let wanted = rows.iter().filter_map(|row| {
        let owner = owners.get(&row.owner_key)?;
        Some((owner.id.bucket().column(), hex(owner.id.uuid()), row.external_id.as_str()))
    });
    // Index tokens_external.
    let rows: Vec<KnownRow> = sqlx::query_as(concat!(
        "SELECT ",
        token_columns!(),
        ", t.import_run \
         FROM json_each($1) AS n \
         CROSS JOIN tokens t ON t.bucket = n.value ->> 0 AND t.owner_id = UNHEX(n.value ->> 1) \
           AND t.external_id = n.value ->> 2"
    ))
    .bind(json(wanted))
    .fetch_all(&mut **tx)
    .await?;
    let known: Vec<Known> = row::all(rows)?;
    let key = |known: Known| known.token.external_id.clone().map(|id| ((known.token.owner, id), known));
    Ok(known.into_iter().filter_map(key).collect())
}

async fn insert(tx: &mut Transaction<'_, Lite>, run: &ImportRun, tokens: &[Token]) -> Result<()> {
    if tokens.is_empty() {
        return Ok(());
    }
    let rows = json(tokens.iter().map(|t| {
        (
            t.id.bucket().column(),
            hex(t.id.uuid()),
            hex(t.owner.uuid()),
            t.external_id.as_deref(),
            t.description.as_str(),
            t.created_at.timestamp(),
            seconds(t.expires_at),
            t.deadline_set_at.timestamp(),
            i32::from(t.unplanned),
            seconds(t.last_used_at),
            t.status.as_str(),
            seconds(t.ended_at),
        )
    }));
    sqlx::query(
        "INSERT INTO tokens \
             (bucket, id, owner_id, external_id, description, created_at, expires_at, deadline_set_at, unplanned, \
              last_used_at, status, ended_at, kind, scopes, generation, source, import_run) \
         SELECT n.value ->> 0, UNHEX(n.value ->> 1), UNHEX(n.value ->> 2), n.value ->> 3, n.value ->> 4, \
                n.value ->> 5, n.value ->> 6, n.value ->> 7, n.value ->> 8, n.value ->> 9, n.value ->> 10, \
                n.value ->> 11, 'additional', '', 0, $2, $3 \
         FROM json_each($1) AS n",
    )
    .bind(rows)
    .bind(&run.source)
    .bind(run.id)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Writes the tokens that the run has seen again, where they are still as they were read; returns which.
async fn update(tx: &mut Transaction<'_, Lite>, run: &ImportRun, merged: &Merged) -> Result<BTreeSet<Uuid>> {
    if merged.seen.is_empty() {
        return Ok(BTreeSet::new());
    }
    let rows = json(merged.seen.iter().map(|(old, new)| {
        (
            old.id.bucket().column(),
            hex(old.id.uuid()),
            old.generation,
            old.status.as_str(),
            seconds(old.expires_at),
            (
                new.description.as_str(),
                seconds(new.expires_at),
                new.deadline_set_at.timestamp(),
                new.generation,
                i32::from(new.unplanned),
                seconds(new.last_used_at),
                new.status.as_str(),
                seconds(new.ended_at),
                seconds(new.moved_from),
                i32::from(new.uncorrected),
            ),
        )
    }));
    let written: Vec<(Uuid,)> = sqlx::query_as(
        "UPDATE tokens AS t \
         SET description = n.value ->> '$[5][0]', expires_at = n.value ->> '$[5][1]', \
             deadline_set_at = n.value ->> '$[5][2]', generation = n.value ->> '$[5][3]', \
             unplanned = n.value ->> '$[5][4]', last_used_at = n.value ->> '$[5][5]', \
             status = n.value ->> '$[5][6]', ended_at = n.value ->> '$[5][7]', \
             moved_from = n.value ->> '$[5][8]', uncorrected = n.value ->> '$[5][9]', source = $2, import_run = $3 \
         FROM json_each($1) AS n \
         WHERE t.bucket = n.value ->> 0 AND t.id = UNHEX(n.value ->> 1) AND t.generation = n.value ->> 2 \
           AND t.status = n.value ->> 3 AND t.expires_at IS n.value ->> 4 \
         RETURNING id",
    )
    .bind(rows)
    .bind(&run.source)
    .bind(run.id)
    .fetch_all(&mut **tx)
    .await?;
    Ok(written.into_iter().map(|(id,)| id).collect())
}

/// Lets those watch the tokens of these rows who do not yet. They are told of what is due now.
async fn watch(tx: &mut Transaction<'_, Lite>, rows: &[&ImportRow], owners: &HashMap<String, Owner>) -> Result<()> {
    if rows.is_empty() {
        return Ok(());
    }
    let known = find(tx, rows, owners).await?;
    let watching = watching(rows, owners, &known);
    let wanted = watching.iter().map(|(token, address)| {
        (token.bucket().column(), hex(token.uuid()), address.bucket().column(), address.as_str())
    });
    // Index contacts_address.
    let added: Vec<(i16, Uuid)> = sqlx::query_as(
        "INSERT INTO token_contacts (bucket, token_id, contact_id) \
         SELECT n.value ->> 0, UNHEX(n.value ->> 1), c.id \
         FROM json_each($1) AS n \
         CROSS JOIN contacts c ON c.bucket = n.value ->> 2 AND c.address = n.value ->> 3 \
         WHERE TRUE \
         ON CONFLICT DO NOTHING \
         RETURNING bucket, token_id",
    )
    .bind(json(wanted))
    .fetch_all(&mut **tx)
    .await?;
    sqlx::query(
        "UPDATE tokens AS t SET unplanned = 1 \
         FROM json_each($1) AS n \
         WHERE t.bucket = n.value ->> 0 AND t.id = UNHEX(n.value ->> 1) AND t.status = 'active' \
           AND t.expires_at IS NOT NULL",
    )
    .bind(json(added.into_iter().map(|(bucket, token)| (bucket, hex(token)))))
    .execute(&mut **tx)
    .await?;
    Ok(())
}

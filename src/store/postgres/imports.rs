//! Imports on PostgreSQL: rows travel as arrays.

use std::collections::{BTreeSet, HashMap, HashSet};

use sqlx::{Postgres as Pg, Transaction};
use uuid::Uuid;

use super::Postgres;
use crate::store::Result;
use crate::store::imports::{
    Feed, ImportRow, ImportRun, Imports, Known, Merged, RowOutcome, Unseen, addresses_of, long_ended, merge, owners_of,
    part, watching, with_watchers,
};
use crate::store::row::{self, KnownRow, OwnerRow, token_columns};
use crate::token::{Address, Bucket, ContactId, Owner, OwnerId, Token, TokenId};

impl Imports for Postgres {
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
            "SELECT COUNT(*), COUNT(*) FILTER (WHERE import_run IS DISTINCT FROM $2) \
             FROM tokens \
             WHERE status = 'active' AND source = $1 AND (expires_at IS NULL OR expires_at > $3)",
        )
        .bind(&run.source)
        .bind(run.id)
        .bind(run.now)
        .fetch_one(&self.pool())
        .await?;
        Ok(Unseen { active: active.unsigned_abs(), unseen: unseen.unsigned_abs() })
    }

    async fn end_unseen(&self, run: &ImportRun, bucket: Bucket) -> Result<u64> {
        let ended = sqlx::query(
            "UPDATE tokens \
             SET status = 'revoked', ended_at = $4, unplanned = FALSE, \
                 uncorrected = (uncorrected OR expires_at IS NOT NULL) \
             WHERE bucket = $1 AND status = 'active' AND source = $2 AND import_run IS DISTINCT FROM $3 \
               AND (expires_at IS NULL OR expires_at > $4)",
        )
        .bind(bucket.column())
        .bind(&run.source)
        .bind(run.id)
        .bind(run.now)
        .execute(&self.pool())
        .await?;
        Ok(ended.rows_affected())
    }
}

async fn import_batch(tx: &mut Transaction<'_, Pg>, run: &ImportRun, rows: &[ImportRow]) -> Result<Vec<RowOutcome>> {
    let (rows, taken) = part(run, rows, &long_ended_here(tx, run, rows).await?);
    let (owners, made) = make_owners(tx, run, &rows).await?;
    link_contacts(tx, run, &rows, &owners).await?;
    let known = find(tx, &rows, &owners, &made).await?;
    let mut merged = merge(run, &rows, &owners, &known);
    // Neighbours in the indexes one after the other.
    merged.new.sort_unstable_by_key(|token| (token.id.bucket(), token.owner, token.id));
    insert(tx, run, &merged.new).await?;
    let written = update(tx, run, &merged).await?;
    watch(tx, &with_watchers(&rows, &merged.outcomes), &owners).await?;
    Ok(merged.outcomes(&written, &taken))
}

/// Which of the batch's tokens that ended too long ago to be kept are here all the same.
async fn long_ended_here(
    tx: &mut Transaction<'_, Pg>,
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
         FROM UNNEST($1::smallint[], $2::text[], $3::text[]) AS n (bucket, key, external_id) \
         JOIN owners o ON o.bucket = n.bucket AND o.key = n.key \
         JOIN tokens t ON t.bucket = o.bucket AND t.owner_id = o.id AND t.external_id = n.external_id",
    )
    .bind(old.iter().map(|(bucket, ..)| *bucket).collect::<Vec<_>>())
    .bind(old.iter().map(|(_, key, _)| *key).collect::<Vec<_>>())
    .bind(old.iter().map(|(.., id)| *id).collect::<Vec<_>>())
    .fetch_all(&mut **tx)
    .await?;
    Ok(here.into_iter().collect())
}

/// Makes the owners that do not exist yet, and returns all, by key, and which of them are new: these have no tokens.
async fn make_owners(
    tx: &mut Transaction<'_, Pg>,
    run: &ImportRun,
    rows: &[&ImportRow],
) -> Result<(HashMap<String, Owner>, HashSet<OwnerId>)> {
    let wanted = owners_of(rows, run.now);
    let buckets: Vec<i16> = wanted.iter().map(|owner| owner.id.bucket().column()).collect();
    let keys: Vec<&str> = wanted.iter().map(|owner| owner.key.as_str()).collect();
    let made: Vec<(Uuid,)> = sqlx::query_as(
        "INSERT INTO owners (bucket, id, key, name, time_zone, locale, created_at) \
         SELECT n.bucket, n.id, n.key, n.key, n.time_zone, n.locale, $6 \
         FROM UNNEST($1::smallint[], $2::uuid[], $3::text[], $4::text[], $5::text[]) \
             AS n (bucket, id, key, time_zone, locale) \
         ON CONFLICT DO NOTHING \
         RETURNING id",
    )
    .bind(&buckets)
    .bind(wanted.iter().map(|owner| owner.id.uuid()).collect::<Vec<_>>())
    .bind(&keys)
    .bind(wanted.iter().map(|owner| owner.time_zone.name()).collect::<Vec<_>>())
    .bind(wanted.iter().map(|owner| owner.locale.as_str()).collect::<Vec<_>>())
    .bind(run.now)
    .fetch_all(&mut **tx)
    .await?;
    let made: HashSet<OwnerId> = made.into_iter().map(|(id,)| id.into()).collect();
    let (new, old): (Vec<Owner>, Vec<Owner>) = wanted.into_iter().partition(|owner| made.contains(&owner.id));
    let mut owners: HashMap<String, Owner> = new.into_iter().map(|owner| (owner.key.clone(), owner)).collect();
    if old.is_empty() {
        return Ok((owners, made));
    }
    let rows: Vec<OwnerRow> = sqlx::query_as(
        "SELECT o.id, o.key, o.name, o.time_zone, o.locale \
         FROM UNNEST($1::smallint[], $2::text[]) AS n (bucket, key) \
         JOIN owners o ON o.bucket = n.bucket AND o.key = n.key",
    )
    .bind(old.iter().map(|owner| owner.id.bucket().column()).collect::<Vec<_>>())
    .bind(old.iter().map(|owner| owner.key.as_str()).collect::<Vec<_>>())
    .fetch_all(&mut **tx)
    .await?;
    let old: Vec<Owner> = row::all(rows)?;
    owners.extend(old.into_iter().map(|owner| (owner.key.clone(), owner)));
    Ok((owners, made))
}

/// Lets every address of the batch speak for its owner.
async fn link_contacts(
    tx: &mut Transaction<'_, Pg>,
    run: &ImportRun,
    rows: &[&ImportRow],
    owners: &HashMap<String, Owner>,
) -> Result<()> {
    let addresses = addresses_of(rows);
    if addresses.is_empty() {
        return Ok(());
    }
    let buckets: Vec<i16> = addresses.iter().map(|address| address.bucket().column()).collect();
    let texts: Vec<&str> = addresses.iter().map(|address| address.as_str()).collect();
    let made: Vec<(String, Uuid)> = sqlx::query_as(
        "INSERT INTO contacts (bucket, id, address, created_at) \
         SELECT n.bucket, n.id, n.address, $4 \
         FROM UNNEST($1::smallint[], $2::uuid[], $3::text[]) AS n (bucket, id, address) \
         ON CONFLICT DO NOTHING \
         RETURNING address, id",
    )
    .bind(&buckets)
    .bind(addresses.iter().map(|a| ContactId::new(a.bucket(), run.now).uuid()).collect::<Vec<_>>())
    .bind(&texts)
    .bind(run.now)
    .fetch_all(&mut **tx)
    .await?;
    let mut ids: HashMap<String, Uuid> = made.into_iter().collect();
    let old: Vec<&Address> = addresses.into_iter().filter(|address| !ids.contains_key(address.as_str())).collect();
    if !old.is_empty() {
        let found: Vec<(String, Uuid)> = sqlx::query_as(
            "SELECT c.address, c.id \
             FROM UNNEST($1::smallint[], $2::text[]) AS n (bucket, address) \
             JOIN contacts c ON c.bucket = n.bucket AND c.address = n.address",
        )
        .bind(old.iter().map(|address| address.bucket().column()).collect::<Vec<_>>())
        .bind(old.iter().map(|address| address.as_str()).collect::<Vec<_>>())
        .fetch_all(&mut **tx)
        .await?;
        ids.extend(found);
    }
    let mut links: BTreeSet<(i16, Uuid, Uuid)> = BTreeSet::new();
    for row in rows {
        let Some(owner) = owners.get(&row.owner_key) else { continue };
        let contacts = row.addresses.iter().filter_map(|address| ids.get(address.as_str()));
        links.extend(contacts.map(|contact| (owner.id.bucket().column(), owner.id.uuid(), *contact)));
    }
    sqlx::query(
        "INSERT INTO owner_contacts (bucket, owner_id, contact_id) \
         SELECT * FROM UNNEST($1::smallint[], $2::uuid[], $3::uuid[]) \
         ON CONFLICT DO NOTHING",
    )
    .bind(links.iter().map(|link| link.0).collect::<Vec<_>>())
    .bind(links.iter().map(|link| link.1).collect::<Vec<_>>())
    .bind(links.iter().map(|link| link.2).collect::<Vec<_>>())
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// The tokens of the batch that are there already, by owner and external id. Of owners that were made just now there are
/// none.
async fn find(
    tx: &mut Transaction<'_, Pg>,
    rows: &[&ImportRow],
    owners: &HashMap<String, Owner>,
    made: &HashSet<OwnerId>,
) -> Result<HashMap<(OwnerId, String), Known>> {
    let wanted: Vec<(OwnerId, &str)> = rows
        .iter()
        .filter_map(|row| owners.get(&row.owner_key).map(|owner| (owner.id, row.external_id.as_str())))
        .filter(|(owner, _)| !made.contains(owner))
        .collect();
    if wanted.is_empty() {
        return Ok(HashMap::new());
    }
    // Index tokens_external.
    let rows: Vec<KnownRow> = sqlx::query_as(concat!(
        "SELECT ",
        token_columns!(),
        ", t.import_run \
         FROM UNNEST($1::smallint[], $2::uuid[], $3::text[]) AS n (bucket, owner_id, external_id) \
         JOIN tokens t ON t.bucket = n.bucket AND t.owner_id = n.owner_id AND t.external_id = n.external_id"
    ))
    .bind(wanted.iter().map(|(owner, _)| owner.bucket().column()).collect::<Vec<_>>())
    .bind(wanted.iter().map(|(owner, _)| owner.uuid()).collect::<Vec<_>>())
    .bind(wanted.iter().map(|(_, external_id)| *external_id).collect::<Vec<_>>())
    .fetch_all(&mut **tx)
    .await?;
    let known: Vec<Known> = row::all(rows)?;
    let key = |known: Known| known.token.external_id.clone().map(|id| ((known.token.owner, id), known));
    Ok(known.into_iter().filter_map(key).collect())
}

async fn insert(tx: &mut Transaction<'_, Pg>, run: &ImportRun, tokens: &[Token]) -> Result<()> {
    if tokens.is_empty() {
        return Ok(());
    }
    sqlx::query(
        "INSERT INTO tokens \
             (bucket, id, owner_id, external_id, description, created_at, expires_at, deadline_set_at, unplanned, \
              last_used_at, status, ended_at, kind, scopes, generation, source, import_run) \
         SELECT n.*, 'additional', '', 0, $13, $14 \
         FROM UNNEST($1::smallint[], $2::uuid[], $3::uuid[], $4::text[], $5::text[], $6::timestamptz[], \
                     $7::timestamptz[], $8::timestamptz[], $9::boolean[], $10::timestamptz[], $11::text[], \
                     $12::timestamptz[]) AS n",
    )
    .bind(tokens.iter().map(|t| t.id.bucket().column()).collect::<Vec<_>>())
    .bind(tokens.iter().map(|t| t.id.uuid()).collect::<Vec<_>>())
    .bind(tokens.iter().map(|t| t.owner.uuid()).collect::<Vec<_>>())
    .bind(tokens.iter().map(|t| t.external_id.as_deref()).collect::<Vec<_>>())
    .bind(tokens.iter().map(|t| t.description.as_str()).collect::<Vec<_>>())
    .bind(tokens.iter().map(|t| t.created_at).collect::<Vec<_>>())
    .bind(tokens.iter().map(|t| t.expires_at).collect::<Vec<_>>())
    .bind(tokens.iter().map(|t| t.deadline_set_at).collect::<Vec<_>>())
    .bind(tokens.iter().map(|t| t.unplanned).collect::<Vec<_>>())
    .bind(tokens.iter().map(|t| t.last_used_at).collect::<Vec<_>>())
    .bind(tokens.iter().map(|t| t.status.as_str()).collect::<Vec<_>>())
    .bind(tokens.iter().map(|t| t.ended_at).collect::<Vec<_>>())
    .bind(&run.source)
    .bind(run.id)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Writes the tokens that the run has seen again, where they are still as they were read; returns which.
async fn update(tx: &mut Transaction<'_, Pg>, run: &ImportRun, merged: &Merged) -> Result<BTreeSet<Uuid>> {
    if merged.seen.is_empty() {
        return Ok(BTreeSet::new());
    }
    let (old, new): (Vec<&Token>, Vec<&Token>) = merged.seen.iter().map(|(old, new)| (old, new)).unzip();
    let written: Vec<(Uuid,)> = sqlx::query_as(
        "UPDATE tokens t \
         SET description = n.description, expires_at = n.expires_at, deadline_set_at = n.deadline_set_at, \
             generation = n.generation, unplanned = n.unplanned, last_used_at = n.last_used_at, status = n.status, \
             ended_at = n.ended_at, moved_from = n.moved_from, uncorrected = n.uncorrected, source = $14, import_run = $15 \
         FROM UNNEST($1::smallint[], $2::uuid[], $3::integer[], $4::text[], $5::timestamptz[], $6::text[], \
                     $7::timestamptz[], $8::timestamptz[], $9::integer[], $10::boolean[], $11::timestamptz[], \
                     $12::text[], $13::timestamptz[], $16::timestamptz[], $17::boolean[]) \
             AS n (bucket, id, old_generation, old_status, old_expires_at, description, expires_at, deadline_set_at, \
                   generation, unplanned, last_used_at, status, ended_at, moved_from, uncorrected) \
         WHERE t.bucket = n.bucket AND t.id = n.id AND t.generation = n.old_generation AND t.status = n.old_status \
           AND t.expires_at IS NOT DISTINCT FROM n.old_expires_at \
         RETURNING t.id",
    )
    .bind(old.iter().map(|t| t.id.bucket().column()).collect::<Vec<_>>())
    .bind(old.iter().map(|t| t.id.uuid()).collect::<Vec<_>>())
    .bind(old.iter().map(|t| t.generation).collect::<Vec<_>>())
    .bind(old.iter().map(|t| t.status.as_str()).collect::<Vec<_>>())
    .bind(old.iter().map(|t| t.expires_at).collect::<Vec<_>>())
    .bind(new.iter().map(|t| t.description.as_str()).collect::<Vec<_>>())
    .bind(new.iter().map(|t| t.expires_at).collect::<Vec<_>>())
    .bind(new.iter().map(|t| t.deadline_set_at).collect::<Vec<_>>())
    .bind(new.iter().map(|t| t.generation).collect::<Vec<_>>())
    .bind(new.iter().map(|t| t.unplanned).collect::<Vec<_>>())
    .bind(new.iter().map(|t| t.last_used_at).collect::<Vec<_>>())
    .bind(new.iter().map(|t| t.status.as_str()).collect::<Vec<_>>())
    .bind(new.iter().map(|t| t.ended_at).collect::<Vec<_>>())
    .bind(&run.source)
    .bind(run.id)
    .bind(new.iter().map(|t| t.moved_from).collect::<Vec<_>>())
    .bind(new.iter().map(|t| t.uncorrected).collect::<Vec<_>>())
    .fetch_all(&mut **tx)
    .await?;
    Ok(written.into_iter().map(|(id,)| id).collect())
}

/// Lets those watch the tokens of these rows who do not yet. They are told of what is due now.
async fn watch(tx: &mut Transaction<'_, Pg>, rows: &[&ImportRow], owners: &HashMap<String, Owner>) -> Result<()> {
    if rows.is_empty() {
        return Ok(());
    }
    let known = find(tx, rows, owners, &HashSet::new()).await?;
    let watching = watching(rows, owners, &known);
    // Index contacts_address.
    let found: Vec<(String, Uuid)> = sqlx::query_as(
        "SELECT c.address, c.id \
         FROM UNNEST($1::smallint[], $2::text[]) AS n (bucket, address) \
         JOIN contacts c ON c.bucket = n.bucket AND c.address = n.address",
    )
    .bind(watching.iter().map(|(_, address)| address.bucket().column()).collect::<Vec<_>>())
    .bind(watching.iter().map(|(_, address)| address.as_str()).collect::<Vec<_>>())
    .fetch_all(&mut **tx)
    .await?;
    let ids: HashMap<String, Uuid> = found.into_iter().collect();
    let watching: Vec<(TokenId, Uuid)> =
        watching.into_iter().filter_map(|(token, address)| Some((token, *ids.get(address.as_str())?))).collect();
    let added: Vec<(i16, Uuid)> = sqlx::query_as(
        "INSERT INTO token_contacts (bucket, token_id, contact_id) \
         SELECT * FROM UNNEST($1::smallint[], $2::uuid[], $3::uuid[]) \
         ON CONFLICT DO NOTHING \
         RETURNING bucket, token_id",
    )
    .bind(watching.iter().map(|(token, _)| token.bucket().column()).collect::<Vec<_>>())
    .bind(watching.iter().map(|(token, _)| token.uuid()).collect::<Vec<_>>())
    .bind(watching.iter().map(|(_, contact)| *contact).collect::<Vec<_>>())
    .fetch_all(&mut **tx)
    .await?;
    sqlx::query(
        "UPDATE tokens t SET unplanned = TRUE \
         FROM UNNEST($1::smallint[], $2::uuid[]) AS n (bucket, id) \
         WHERE t.bucket = n.bucket AND t.id = n.id AND t.status = 'active' AND t.expires_at IS NOT NULL",
    )
    .bind(added.iter().map(|(bucket, _)| *bucket).collect::<Vec<_>>())
    .bind(added.iter().map(|(_, token)| *token).collect::<Vec<_>>())
    .execute(&mut **tx)
    .await?;
    Ok(())
}

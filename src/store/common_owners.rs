//! Owners and their contacts, in the words that both back ends understand.
//!
//! SQLite understands `$1`, and [`At`](super::row::At) hides how it keeps instants, so one text serves both. Each change is a
//! transaction of its own. An owner is locked while it is removed: nobody gives it a token meanwhile.

/// Functions of [`Accounts`](super::Accounts) for a back end that has `begin()`, `begin_long_read()` and `reader()`; `lock` is what
/// makes a read lock its row, and `id_digits` how an id prints.
macro_rules! common_owners {
    (lock = $lock:literal, id_digits = $id_digits:literal) => {
        async fn add_owner(
            &self,
            owner: &Owner,
            contacts: &[NewContact],
            primary: Option<(&Token, &SecretHash)>,
            now: Timestamp,
        ) -> Result<()> {
            let mut tx = self.begin().await?;
            let added = sqlx::query(
                "INSERT INTO owners (bucket, id, key, name, time_zone, locale, created_at) \
                 VALUES ($1, $2, $3, $4, $5, $6, $7) \
                 ON CONFLICT DO NOTHING",
            )
            .bind(owner.id.bucket().column())
            .bind(owner.id.uuid())
            .bind(&owner.key)
            .bind(&owner.name)
            .bind(owner.time_zone.name())
            .bind(&owner.locale)
            .bind(At(now))
            .execute(&mut *tx)
            .await?;
            if added.rows_affected() == 0 {
                return Err(Error::Exists { what: "owner", name: owner.key.clone() });
            }
            link_all(&mut tx, owner.id, contacts, now).await?;
            if let Some((token, secret)) = primary {
                insert_token(&mut tx, token, Some(secret)).await?;
            }
            tx.commit().await?;
            Ok(())
        }

        async fn find_owners(&self, by: &OwnerRef) -> Result<Vec<Owner>> {
            let query = match by {
                OwnerRef::Key(key) => sqlx::query_as(
                    "SELECT o.id, o.key, o.name, o.time_zone, o.locale \
                     FROM owners o \
                     WHERE o.bucket = $1 AND o.key = $2 AND o.key <> ':system'",
                )
                .bind(Bucket::of(key).column())
                .bind(key),
                OwnerRef::Id(IdRef::Whole(id)) => sqlx::query_as(
                    "SELECT o.id, o.key, o.name, o.time_zone, o.locale \
                     FROM owners o \
                     WHERE o.bucket = $1 AND o.id = $2 AND o.key <> ':system'",
                )
                .bind(OwnerId::from(*id).bucket().column())
                .bind(*id),
                OwnerRef::Id(short @ IdRef::Short(digits)) => sqlx::query_as(concat!(
                    "SELECT o.id, o.key, o.name, o.time_zone, o.locale \
                     FROM owners o \
                     WHERE o.bucket = $1 AND ",
                    $id_digits,
                    " LIKE '%' || $2 AND o.key <> ':system' ORDER BY o.id"
                ))
                .bind(short.bucket().column())
                .bind(digits),
                OwnerRef::Address(address) => sqlx::query_as(
                    "SELECT o.id, o.key, o.name, o.time_zone, o.locale \
                     FROM owner_contacts oc \
                     JOIN owners o ON o.bucket = oc.bucket AND o.id = oc.owner_id \
                     WHERE oc.contact_id = (SELECT id FROM contacts WHERE bucket = $1 AND address = $2) \
                     AND o.key <> ':system' \
                     ORDER BY o.key",
                )
                .bind(address.bucket().column())
                .bind(address.as_str()),
            };
            let rows: Vec<OwnerRow> = query.fetch_all(&self.reader()).await?;
            row::all(rows)
        }

        async fn each_owner(
            &self,
            now: Timestamp,
            mut visit: impl FnMut(OwnerSummary) -> ControlFlow<()> + Send,
        ) -> Result<()> {
            let mut tx = self.begin_long_read().await?;
            let mut rows = sqlx::query_as::<_, SummaryRow>(
                "SELECT o.id, o.key, o.name, o.time_zone, o.locale, \
                        (SELECT COUNT(*) FROM owner_contacts c WHERE c.bucket = o.bucket AND c.owner_id = o.id) \
                            AS contacts, \
                        (SELECT COUNT(*) FROM tokens t WHERE t.bucket = o.bucket AND t.owner_id = o.id \
                         AND t.status = 'active' AND (t.expires_at IS NULL OR t.expires_at > $1)) AS active_tokens \
                 FROM owners o \
                 WHERE o.key <> ':system' \
                 ORDER BY o.key",
            )
            .bind(At(now))
            .fetch(&mut *tx);
            while let Some(row) = rows.try_next().await? {
                if visit(row.try_into()?).is_break() {
                    break;
                }
            }
            Ok(())
        }

        async fn keys_near(&self, key: &str) -> Result<Vec<String>> {
            // Index owners_key.
            let near: Vec<(Option<String>, Option<String>)> = sqlx::query_as(
                "WITH RECURSIVE buckets (bucket) AS ( \
                     SELECT 0 UNION ALL SELECT bucket + 1 FROM buckets WHERE bucket < 255 \
                 ) \
                 SELECT (SELECT MAX(o.key) FROM owners o WHERE o.bucket = b.bucket AND o.key < $1), \
                        (SELECT MIN(o.key) FROM owners o WHERE o.bucket = b.bucket AND o.key > $1) \
                 FROM buckets b",
            )
            .bind(key)
            .fetch_all(&self.reader())
            .await?;
            let near = near.into_iter().flat_map(|(before, after)| [before, after]).flatten();
            Ok(near.filter(|key| key != SYSTEM_OWNER_KEY).collect())
        }

        async fn rename_owner(&self, owner: OwnerId, name: &str) -> Result<()> {
            let mut tx = self.begin().await?;
            sqlx::query("UPDATE owners SET name = $3 WHERE bucket = $1 AND id = $2")
                .bind(owner.bucket().column())
                .bind(owner.uuid())
                .bind(name)
                .execute(&mut *tx)
                .await?;
            tx.commit().await?;
            Ok(())
        }

        async fn remove_owner(
            &self,
            owner: OwnerId,
            with_active: bool,
            now: Timestamp,
        ) -> Result<std::result::Result<(), u64>> {
            let mut tx = self.begin().await?;
            // The lock keeps a token from being added between the count and the end.
            sqlx::query(concat!("SELECT id FROM owners WHERE bucket = $1 AND id = $2", $lock))
                .bind(owner.bucket().column())
                .bind(owner.uuid())
                .fetch_optional(&mut *tx)
                .await?;
            let (active,): (i64,) = sqlx::query_as(
                "SELECT COUNT(*) FROM tokens \
                 WHERE bucket = $1 AND owner_id = $2 AND status = 'active' \
                   AND (expires_at IS NULL OR expires_at > $3)",
            )
            .bind(owner.bucket().column())
            .bind(owner.uuid())
            .bind(At(now))
            .fetch_one(&mut *tx)
            .await?;
            if active > 0 && !with_active {
                return Ok(Err(active.unsigned_abs()));
            }
            for statement in [
                "DELETE FROM tokens WHERE bucket = $1 AND owner_id = $2",
                "DELETE FROM owner_contacts WHERE bucket = $1 AND owner_id = $2",
                "DELETE FROM owners WHERE bucket = $1 AND id = $2",
            ] {
                sqlx::query(statement)
                    .bind(owner.bucket().column())
                    .bind(owner.uuid())
                    .execute(&mut *tx)
                    .await?;
            }
            tx.commit().await?;
            Ok(Ok(()))
        }

        async fn contacts_of(&self, owner: OwnerId) -> Result<Vec<Contact>> {
            let ids: Vec<(Uuid,)> = sqlx::query_as(
                "SELECT contact_id FROM owner_contacts WHERE bucket = $1 AND owner_id = $2",
            )
            .bind(owner.bucket().column())
            .bind(owner.uuid())
            .fetch_all(&self.reader())
            .await?;
            let mut contacts = Vec::with_capacity(ids.len());
            for (id,) in ids {
                contacts.extend(contact(&self.reader(), id.into()).await?);
            }
            contacts.sort_by(|a, b| a.address.cmp(&b.address));
            Ok(contacts)
        }

        async fn link_contact(&self, owner: OwnerId, contact: &NewContact, now: Timestamp) -> Result<ContactId> {
            let mut tx = self.begin().await?;
            let id = link(&mut tx, owner, contact, now).await?;
            tx.commit().await?;
            Ok(id)
        }

        async fn make_contact(&self, contact: &NewContact, now: Timestamp) -> Result<ContactId> {
            let mut tx = self.begin().await?;
            let id = known_contact(&mut tx, contact, now).await?;
            tx.commit().await?;
            Ok(id)
        }

        async fn unlink_contact(&self, owner: OwnerId, contact: ContactId) -> Result<()> {
            let mut tx = self.begin().await?;
            sqlx::query("DELETE FROM owner_contacts WHERE bucket = $1 AND owner_id = $2 AND contact_id = $3")
                .bind(owner.bucket().column())
                .bind(owner.uuid())
                .bind(contact.uuid())
                .execute(&mut *tx)
                .await?;
            tx.commit().await?;
            Ok(())
        }

        async fn set_fallback(&self, address: Option<&Address>, now: Timestamp) -> Result<Option<ContactId>> {
            let bucket = Bucket::of(SYSTEM_OWNER_KEY);
            let mut tx = self.begin().await?;
            sqlx::query(
                "INSERT INTO owners (bucket, id, key, name, time_zone, locale, created_at) \
                 VALUES ($1, $2, $3, 'lapsed', 'UTC', 'en', $4) \
                 ON CONFLICT DO NOTHING",
            )
            .bind(bucket.column())
            .bind(OwnerId::new(bucket, now).uuid())
            .bind(SYSTEM_OWNER_KEY)
            .bind(At(now))
            .execute(&mut *tx)
            .await?;
            let (owner,): (Uuid,) = sqlx::query_as("SELECT id FROM owners WHERE bucket = $1 AND key = $2")
                .bind(bucket.column())
                .bind(SYSTEM_OWNER_KEY)
                .fetch_one(&mut *tx)
                .await?;
            let contact = match address {
                Some(address) => Some(link(&mut tx, owner.into(), &address.clone().into(), now).await?),
                None => None,
            };
            sqlx::query("DELETE FROM owner_contacts WHERE bucket = $1 AND owner_id = $2 AND contact_id <> $3")
                .bind(bucket.column())
                .bind(owner)
                .bind(contact.map_or_else(Uuid::nil, ContactId::uuid))
                .execute(&mut *tx)
                .await?;
            tx.commit().await?;
            Ok(contact)
        }
    };
}
pub(super) use common_owners;

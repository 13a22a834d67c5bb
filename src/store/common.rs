//! What both back ends say in the same words: the row-at-a-time statements of [`Accounts`](super::Accounts).
//!
//! SQLite understands `$1`, and [`At`](super::row::At) hides how it keeps instants, so one text serves both. What
//! differs is given by each back end: how a transaction that writes begins, how a row is locked, and how an id prints.

/// Implements [`Accounts`](super::Accounts) for a back end that has `begin()`, `begin_long_read()`, `reader()`, for a write of one
/// statement that may be lost `relaxed_writer()`, and for what is asked most often `acquire_reader()` and `keep_reader()`.
macro_rules! common_operations {
    ($store:ty, $database:ty, lock = $lock:literal, id_digits = $id_digits:literal) => {
        impl Accounts for $store {
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

            async fn add_watched_token(
                &self,
                token: &Token,
                secret: Option<&SecretHash>,
                watchers: &[NewContact],
                now: Timestamp,
            ) -> Result<()> {
                let mut tx = self.begin().await?;
                let contacts = known_contacts(&mut tx, watchers, now).await?;
                insert_token(&mut tx, token, secret).await?;
                for contact in contacts {
                    watch(&mut tx, token.id, contact).await?;
                }
                tx.commit().await?;
                Ok(())
            }

            async fn watch_token(&self, id: TokenId, watchers: &[NewContact], now: Timestamp) -> Result<()> {
                let mut tx = self.begin().await?;
                let contacts = known_contacts(&mut tx, watchers, now).await?;
                let mut token = locked_token(&mut tx, id).await?;
                for contact in contacts {
                    watch(&mut tx, id, contact).await?;
                }
                // Who comes now is told of what is due now.
                mark_unplanned(&mut token, now);
                sqlx::query("UPDATE tokens SET unplanned = $3 WHERE bucket = $1 AND id = $2")
                    .bind(id.bucket().column())
                    .bind(id.uuid())
                    .bind(token.unplanned)
                    .execute(&mut *tx)
                    .await?;
                tx.commit().await?;
                Ok(())
            }

            async fn unwatch_token(&self, id: TokenId, contact: ContactId) -> Result<bool> {
                let mut tx = self.begin().await?;
                let removed = sqlx::query(
                    "DELETE FROM token_contacts WHERE bucket = $1 AND token_id = $2 AND contact_id = $3",
                )
                .bind(id.bucket().column())
                .bind(id.uuid())
                .bind(contact.uuid())
                .execute(&mut *tx)
                .await?;
                tx.commit().await?;
                Ok(removed.rows_affected() > 0)
            }

            async fn watchers_of(&self, id: TokenId) -> Result<Vec<Contact>> {
                let ids: Vec<(Uuid,)> =
                    sqlx::query_as("SELECT contact_id FROM token_contacts WHERE bucket = $1 AND token_id = $2")
                        .bind(id.bucket().column())
                        .bind(id.uuid())
                        .fetch_all(&self.reader())
                        .await?;
                let mut contacts = Vec::with_capacity(ids.len());
                for (id,) in ids {
                    contacts.extend(contact(&self.reader(), id.into()).await?);
                }
                contacts.sort_by(|a, b| a.address.cmp(&b.address));
                Ok(contacts)
            }

            async fn add_primary(
                &self,
                primary: &Token,
                secret: &SecretHash,
                contacts: &[NewContact],
                now: Timestamp,
            ) -> Result<()> {
                let mut tx = self.begin().await?;
                link_all(&mut tx, primary.owner, contacts, now).await?;
                insert_token(&mut tx, primary, Some(secret)).await?;
                tx.commit().await?;
                Ok(())
            }

            async fn find_tokens(&self, id: &IdRef) -> Result<Vec<Token>> {
                let query = match id {
                    IdRef::Whole(uuid) => sqlx::query_as(concat!(
                        "SELECT ",
                        token_columns!(),
                        " FROM tokens t WHERE t.bucket = $1 AND t.id = $2"
                    ))
                    .bind(id.bucket().column())
                    .bind(*uuid),
                    IdRef::Short(digits) => sqlx::query_as(concat!(
                        "SELECT ",
                        token_columns!(),
                        " FROM tokens t WHERE t.bucket = $1 AND ",
                        $id_digits,
                        " LIKE '%' || $2 ORDER BY t.id"
                    ))
                    .bind(id.bucket().column())
                    .bind(digits),
                };
                let rows: Vec<TokenRow> = query.fetch_all(&self.reader()).await?;
                row::all(rows)
            }

            async fn change_token(
                &self,
                id: TokenId,
                decide: impl FnOnce(&Token) -> std::result::Result<Changed, Refused> + Send,
            ) -> Result<Changed> {
                let mut tx = self.begin().await?;
                let changed = decide(&locked_token(&mut tx, id).await?)?;
                let token = &changed.token;
                sqlx::query(
                    "UPDATE tokens \
                     SET description = $3, expires_at = $4, deadline_set_at = $5, generation = $6, unplanned = $7, \
                         status = $8, ended_at = $9, replaced_by = $10, moved_from = $11, uncorrected = $12 \
                     WHERE bucket = $1 AND id = $2",
                )
                .bind(id.bucket().column())
                .bind(id.uuid())
                .bind(&token.description)
                .bind(token.expires_at.map(At))
                .bind(At(token.deadline_set_at))
                .bind(token.generation)
                .bind(token.unplanned)
                .bind(token.status.as_str())
                .bind(token.ended_at.map(At))
                .bind(token.replaced_by.map(TokenId::uuid))
                .bind(token.moved_from.map(At))
                .bind(token.uncorrected)
                .execute(&mut *tx)
                .await?;
                if let Some((successor, secret)) = &changed.successor {
                    insert_token(&mut tx, successor, Some(&secret.hash())).await?;
                    // Who watches the one watches the other.
                    sqlx::query(
                        "INSERT INTO token_contacts (bucket, token_id, contact_id) \
                         SELECT bucket, $3, contact_id FROM token_contacts WHERE bucket = $1 AND token_id = $2",
                    )
                    .bind(id.bucket().column())
                    .bind(id.uuid())
                    .bind(successor.id.uuid())
                    .execute(&mut *tx)
                    .await?;
                }
                tx.commit().await?;
                Ok(changed)
            }

            async fn each_token(
                &self,
                filter: &TokenFilter,
                order: TokenOrder,
                now: Timestamp,
                mut visit: impl FnMut(Token, String) -> ControlFlow<()> + Send,
            ) -> Result<()> {
                let mut query = QueryBuilder::<$database>::new(concat!(
                    "SELECT ",
                    token_columns!(),
                    ", o.key AS owner_key FROM tokens t \
                     JOIN owners o ON o.bucket = t.bucket AND o.id = t.owner_id \
                     WHERE TRUE"
                ));
                if let Some(owner) = filter.owner {
                    query.push(" AND t.bucket = ").push_bind(owner.bucket().column());
                    query.push(" AND t.owner_id = ").push_bind(owner.uuid());
                }
                if let Some(source) = &filter.source {
                    query.push(" AND t.source = ").push_bind(source.clone());
                }
                if let Some(before) = filter.expiring_before {
                    query.push(" AND t.status = 'active' AND t.expires_at < ").push_bind(At(before));
                    query.push(" AND t.expires_at > ").push_bind(At(now));
                }
                match filter.status {
                    Some(Status::Active) => {
                        query.push(" AND t.status = 'active' AND (t.expires_at IS NULL OR t.expires_at > ");
                        query.push_bind(At(now)).push(")");
                    }
                    Some(Status::Expired) => {
                        query.push(" AND (t.status = 'expired' OR t.status = 'active' AND t.expires_at <= ");
                        query.push_bind(At(now)).push(")");
                    }
                    Some(Status::Revoked) => {
                        query.push(" AND t.status = 'revoked'");
                    }
                    None => {}
                }
                match order {
                    TokenOrder::Expires => {
                        query.push(" ORDER BY t.status <> 'active' OR t.expires_at <= ").push_bind(At(now));
                        query.push(" AND t.expires_at IS NOT NULL, t.expires_at ASC NULLS LAST, o.key, t.id");
                    }
                    TokenOrder::Created => {
                        query.push(" ORDER BY t.created_at, t.id");
                    }
                    TokenOrder::Used => {
                        query.push(" ORDER BY t.last_used_at ASC NULLS FIRST, t.created_at, t.id");
                    }
                    TokenOrder::Owner => {
                        query.push(" ORDER BY o.key, t.expires_at ASC NULLS LAST, t.id");
                    }
                }
                let mut tx = self.begin_long_read().await?;
                let mut rows = query.build_query_as::<ListedRow>().fetch(&mut *tx);
                while let Some(row) = rows.try_next().await? {
                    let (token, owner_key) = row.try_into()?;
                    if visit(token, owner_key).is_break() {
                        break;
                    }
                }
                Ok(())
            }

            async fn token_counts(&self, now: Timestamp) -> Result<TokenCounts> {
                let mut tx = self.begin_long_read().await?;
                let row: CountsRow = sqlx::query_as(
                    "SELECT COUNT(*) FILTER (WHERE status = 'active') AS marked_active, \
                            COUNT(*) FILTER (WHERE status = 'active' AND expires_at <= $1) AS past_deadline, \
                            COUNT(*) FILTER (WHERE status = 'expired') AS expired, \
                            COUNT(*) FILTER (WHERE status = 'revoked') AS revoked \
                     FROM tokens",
                )
                .bind(At(now))
                .fetch_one(&mut *tx)
                .await?;
                Ok(row.into())
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

            async fn token_by_secret(&self, bucket: Bucket, hash: &SecretHash) -> Result<Option<Token>> {
                let mut connection = self.acquire_reader().await?;
                let row: Option<TokenRow> = sqlx::query_as(concat!(
                    "SELECT ",
                    token_columns!(),
                    " FROM tokens t WHERE t.bucket = $1 AND t.secret_hash = $2"
                ))
                .bind(bucket.column())
                .bind(hash.as_slice())
                .fetch_optional(&mut *connection)
                .await?;
                self.keep_reader(connection);
                row.map(Token::try_from).transpose()
            }

            async fn record_use(
                &self,
                id: TokenId,
                now: Timestamp,
                unless_since: Timestamp,
                wakes: bool,
            ) -> Result<()> {
                sqlx::query(
                    "UPDATE tokens SET last_used_at = $3, unplanned = (unplanned OR $5) \
                     WHERE bucket = $1 AND id = $2 AND (last_used_at IS NULL OR last_used_at < $4)",
                )
                .bind(id.bucket().column())
                .bind(id.uuid())
                .bind(At(now))
                .bind(At(unless_since))
                .bind(wakes)
                .execute(&self.relaxed_writer())
                .await?;
                Ok(())
            }

            async fn history(&self, token: TokenId) -> Result<Vec<ReminderRecord>> {
                // A reminder lives in its contact's bucket: 256 probes of the primary key.
                let rows: Vec<HistoryRow> = sqlx::query_as(
                    "WITH RECURSIVE buckets (bucket) AS ( \
                         SELECT 0 UNION ALL SELECT bucket + 1 FROM buckets WHERE bucket < 255 \
                     ) \
                     SELECT r.token_id, r.generation, r.lead, r.deadline, r.state, r.reason, r.escalation, c.address, \
                            r.created_at, r.settled_at, r.message_id \
                     FROM buckets b \
                     JOIN reminders r ON r.bucket = b.bucket AND r.token_id = $1 \
                     LEFT JOIN contacts c ON c.bucket = r.bucket AND c.id = r.contact_id \
                     ORDER BY r.generation, r.lead DESC, c.address",
                )
                .bind(token.uuid())
                .fetch_all(&self.reader())
                .await?;
                row::all(rows)
            }
        }
    };
}
pub(super) use common_operations;

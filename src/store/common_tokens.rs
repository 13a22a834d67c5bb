//! Tokens, who watches them, their use and their history, in the words that both back ends understand.
//!
//! A change is decided about the row that was read under a lock, and written in the same transaction: of two changes at once each
//! sees what the other did. That a token was used may be lost in a crash of the server, and is then recorded with its next use.

/// Functions of [`Accounts`](super::Accounts) for a back end that has `begin()`, `begin_long_read()`, `reader()`, for a write of one
/// statement that may be lost `relaxed_writer()`, and for what is asked most often `acquire_reader()` and `keep_reader()`. `id_digits`
/// is how an id prints.
macro_rules! common_tokens {
    ($database:ty, id_digits = $id_digits:literal) => {
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
    };
}
pub(super) use common_tokens;

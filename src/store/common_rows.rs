//! The rows that several operations of both back ends write in the same words: contacts, who speaks for whom, who watches what, and
//! tokens. All take part in a transaction that somebody else began.
//!
//! Contacts are written in the order of their buckets and addresses, by whoever writes several: none waits for another in a circle.

/// Functions for a back end; `lock` is what makes a read lock its row.
macro_rules! common_rows {
    ($database:ty, lock = $lock:literal) => {
        async fn contact(pool: &Pool<$database>, id: ContactId) -> Result<Option<Contact>> {
            let row: Option<ContactRow> = sqlx::query_as(
                "SELECT id, address, time_zone, locale, suppressed_at, suppressed_why \
                 FROM contacts \
                 WHERE bucket = $1 AND id = $2",
            )
            .bind(id.bucket().column())
            .bind(id.uuid())
            .fetch_optional(pool)
            .await?;
            row.map(Contact::try_from).transpose()
        }

        async fn link_all(
            tx: &mut Transaction<'_, $database>,
            owner: OwnerId,
            contacts: &[NewContact],
            now: Timestamp,
        ) -> Result<()> {
            // In one order, so that two owners with the same contacts never wait for each other in a circle.
            let mut contacts: Vec<&NewContact> = contacts.iter().collect();
            contacts.sort_by_key(|contact| (contact.address.bucket(), &contact.address));
            for contact in contacts {
                link(tx, owner, contact, now).await?;
            }
            Ok(())
        }

        /// The contacts with these addresses, made where there are none. In one order, so that two that need the same never
        /// wait for each other in a circle.
        async fn known_contacts(
            tx: &mut Transaction<'_, $database>,
            contacts: &[NewContact],
            now: Timestamp,
        ) -> Result<Vec<ContactId>> {
            let mut contacts: Vec<&NewContact> = contacts.iter().collect();
            contacts.sort_by_key(|contact| (contact.address.bucket(), &contact.address));
            let mut ids = Vec::with_capacity(contacts.len());
            for contact in contacts {
                ids.push(known_contact(tx, contact, now).await?);
            }
            Ok(ids)
        }

        async fn known_contact(
            tx: &mut Transaction<'_, $database>,
            contact: &NewContact,
            now: Timestamp,
        ) -> Result<ContactId> {
            let bucket = contact.address.bucket();
            let (id,): (Uuid,) = sqlx::query_as(
                "INSERT INTO contacts (bucket, id, address, time_zone, locale, created_at) \
                 VALUES ($1, $2, $3, $4, $5, $6) \
                 ON CONFLICT (bucket, address) DO UPDATE \
                 SET time_zone = COALESCE(excluded.time_zone, contacts.time_zone), \
                     locale = COALESCE(excluded.locale, contacts.locale) \
                 RETURNING id",
            )
            .bind(bucket.column())
            .bind(ContactId::new(bucket, now).uuid())
            .bind(contact.address.as_str())
            .bind(contact.time_zone.map(|zone| zone.name()))
            .bind(contact.locale.as_deref())
            .bind(At(now))
            .fetch_one(&mut **tx)
            .await?;
            Ok(id.into())
        }

        /// A token that is about to be changed, locked until then.
        async fn locked_token(tx: &mut Transaction<'_, $database>, id: TokenId) -> Result<Token> {
            let row: Option<TokenRow> = sqlx::query_as(concat!(
                "SELECT ",
                token_columns!(),
                " FROM tokens t WHERE t.bucket = $1 AND t.id = $2",
                $lock
            ))
            .bind(id.bucket().column())
            .bind(id.uuid())
            .fetch_optional(&mut **tx)
            .await?;
            row.ok_or_else(|| Error::Missing { what: "token", name: id.to_string() })?.try_into()
        }

        async fn watch(tx: &mut Transaction<'_, $database>, token: TokenId, contact: ContactId) -> Result<()> {
            sqlx::query(
                "INSERT INTO token_contacts (bucket, token_id, contact_id) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
            )
            .bind(token.bucket().column())
            .bind(token.uuid())
            .bind(contact.uuid())
            .execute(&mut **tx)
            .await?;
            Ok(())
        }

        async fn link(
            tx: &mut Transaction<'_, $database>,
            owner: OwnerId,
            contact: &NewContact,
            now: Timestamp,
        ) -> Result<ContactId> {
            let id = known_contact(tx, contact, now).await?;
            sqlx::query(
                "INSERT INTO owner_contacts (bucket, owner_id, contact_id) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
            )
            .bind(owner.bucket().column())
            .bind(owner.uuid())
            .bind(id.uuid())
            .execute(&mut **tx)
            .await?;
            Ok(id)
        }

        async fn insert_token(
            tx: &mut Transaction<'_, $database>,
            token: &Token,
            secret: Option<&SecretHash>,
        ) -> Result<()> {
            sqlx::query(
                "INSERT INTO tokens \
                     (bucket, id, owner_id, kind, description, scopes, secret_hash, external_id, hint, created_at, \
                      expires_at, deadline_set_at, generation, unplanned, last_used_at, status, ended_at, replaced_by) \
                 VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18)",
            )
            .bind(token.id.bucket().column())
            .bind(token.id.uuid())
            .bind(token.owner.uuid())
            .bind(token.kind.as_str())
            .bind(&token.description)
            .bind(token.scopes.join(" "))
            .bind(secret.map(|hash| hash.as_slice()))
            .bind(token.external_id.as_deref())
            .bind(token.hint.as_deref())
            .bind(At(token.created_at))
            .bind(token.expires_at.map(At))
            .bind(At(token.deadline_set_at))
            .bind(token.generation)
            .bind(token.unplanned)
            .bind(token.last_used_at.map(At))
            .bind(token.status.as_str())
            .bind(token.ended_at.map(At))
            .bind(token.replaced_by.map(TokenId::uuid))
            .execute(&mut **tx)
            .await
            .map_err(|error| match error.as_database_error() {
                Some(db) if db.is_unique_violation() => {
                    let what = if token.external_id.is_some() { "token with external id" } else { "primary token of" };
                    let name = token.external_id.clone().unwrap_or_else(|| token.owner.to_string());
                    Error::Exists { what, name }
                }
                Some(db) if db.is_foreign_key_violation() => {
                    Error::Missing { what: "owner", name: token.owner.to_string() }
                }
                _ => error.into(),
            })?;
            Ok(())
        }
    };
}
pub(super) use common_rows;

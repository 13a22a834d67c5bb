//! What both back ends say in the same words: the statements of [`Messages`](super::Messages).
//!
//! Whatever changes several messages marks them first, in `lease_holder`, which also locks them: what a planner adds
//! meanwhile is not touched.

/// Implements [`Messages`](super::Messages) for a back end; see [`common_owners`](super::common_owners::common_owners).
macro_rules! common_messages {
    ($store:ty, $database:ty, id_digits = $id_digits:literal, not_yet_due = $not_yet_due:literal) => {
        impl Messages for $store {
            async fn each_message(
                &self,
                filter: &MessageFilter,
                mut visit: impl FnMut(MessageRecord) -> ControlFlow<()> + Send,
            ) -> Result<()> {
                let mut query = QueryBuilder::<$database>::new(concat!(message_query!(), " WHERE TRUE"));
                if let Some(contact) = filter.contact {
                    query.push(" AND m.bucket = ").push_bind(contact.bucket().column());
                    query.push(" AND m.contact_id = ").push_bind(contact.uuid());
                }
                if !filter.states.is_empty() {
                    query.push(" AND m.state IN (");
                    let mut states = query.separated(", ");
                    for state in &filter.states {
                        states.push_bind(state.as_str());
                    }
                    query.push(")");
                }
                query.push(" ORDER BY m.created_at, m.id");
                let mut tx = self.begin_long_read().await?;
                let mut rows = query.build_query_as::<MessageRow>().fetch(&mut *tx);
                while let Some(row) = rows.try_next().await? {
                    if visit(row.try_into()?).is_break() {
                        break;
                    }
                }
                Ok(())
            }

            async fn find_messages(&self, id: &IdRef) -> Result<Vec<MessageRecord>> {
                let query = match id {
                    IdRef::Whole(uuid) => {
                        sqlx::query_as(concat!(message_query!(), " WHERE m.bucket = $1 AND m.id = $2"))
                            .bind(id.bucket().column())
                            .bind(*uuid)
                    }
                    IdRef::Short(digits) => sqlx::query_as(concat!(
                        message_query!(),
                        " WHERE m.bucket = $1 AND ",
                        $id_digits,
                        " LIKE '%' || $2 ORDER BY m.id"
                    ))
                    .bind(id.bucket().column())
                    .bind(digits),
                };
                let rows: Vec<MessageRow> = query.fetch_all(&self.reader()).await?;
                row::all(rows)
            }

            async fn carried(&self, message: &MessageRecord) -> Result<Vec<CarriedRecord>> {
                let rows: Vec<ContentRow> = sqlx::query_as(
                    "SELECT r.token_id, r.lead, r.deadline, r.state, r.reason \
                     FROM reminders r \
                     WHERE r.bucket = $1 AND r.contact_id = $2 AND ( \
                         r.message_id = $3 \
                         OR ($4 AND r.message_id IS NULL AND r.state = 'pending' AND r.escalation = $5) \
                     ) \
                     ORDER BY r.deadline, r.lead, r.token_id",
                )
                .bind(message.id.bucket().column())
                .bind(message.contact.uuid())
                .bind(message.id.uuid())
                .bind(message.state == MessageState::Open)
                .bind(message.kind == MessageKind::Escalations)
                .fetch_all(&self.reader())
                .await?;
                let mut records: Vec<CarriedRecord> = row::all(rows)?;
                for record in &mut records {
                    let description: Option<(String,)> =
                        sqlx::query_as("SELECT description FROM tokens WHERE bucket = $1 AND id = $2")
                            .bind(record.token.bucket().column())
                            .bind(record.token.uuid())
                            .fetch_optional(&self.reader())
                            .await?;
                    record.description = description.map(|(description,)| description);
                }
                Ok(records)
            }

            async fn release(&self, bucket: Bucket, which: Which, now: Timestamp) -> Result<u64> {
                let bucket = bucket.column();
                let (all, id) = which.columns();
                let mark = Uuid::new_v4();
                let mut tx = self.begin().await?;
                let marked = sqlx::query(
                    "UPDATE messages SET lease_holder = $4 WHERE bucket = $1 AND state = 'held' AND ($2 OR id = $3)",
                )
                .bind(bucket)
                .bind(all)
                .bind(id)
                .bind(mark)
                .execute(&mut *tx)
                .await?;
                sqlx::query(
                    "UPDATE reminders SET message_id = NULL \
                     WHERE bucket = $1 AND state = 'pending' AND message_id IN ( \
                         SELECT id FROM messages WHERE bucket = $1 AND state = 'held' AND lease_holder = $2 \
                     )",
                )
                .bind(bucket)
                .bind(mark)
                .execute(&mut *tx)
                .await?;
                // Where a planner opens one at this moment, this fails, and may be tried again.
                sqlx::query(
                    "UPDATE messages SET state = 'open', not_before = $3, lease_holder = NULL \
                     WHERE bucket = $1 AND state = 'held' AND lease_holder = $2 AND NOT EXISTS ( \
                         SELECT 1 FROM messages o \
                         WHERE o.bucket = $1 AND o.contact_id = messages.contact_id AND o.state = 'open' \
                           AND o.kind = 'reminders' \
                     )",
                )
                .bind(bucket)
                .bind(mark)
                .bind(At(now))
                .execute(&mut *tx)
                .await
                .map_err(|error| match error.as_database_error() {
                    Some(db) if db.is_unique_violation() => Error::Busy(error),
                    _ => error.into(),
                })?;
                // Those that are left join one that collects, which then waits for nothing more.
                sqlx::query(
                    "UPDATE messages SET not_before = $3 \
                     WHERE bucket = $1 AND state = 'open' AND kind = 'reminders' AND not_before > $3 \
                       AND contact_id IN ( \
                           SELECT contact_id FROM messages WHERE bucket = $1 AND state = 'held' AND lease_holder = $2 \
                       )",
                )
                .bind(bucket)
                .bind(mark)
                .bind(At(now))
                .execute(&mut *tx)
                .await?;
                sqlx::query("DELETE FROM messages WHERE bucket = $1 AND state = 'held' AND lease_holder = $2")
                    .bind(bucket)
                    .bind(mark)
                    .execute(&mut *tx)
                    .await?;
                tx.commit().await?;
                Ok(marked.rows_affected())
            }

            async fn cancel(&self, bucket: Bucket, which: Which, now: Timestamp) -> Result<u64> {
                let bucket = bucket.column();
                let (all, id) = which.columns();
                let mark = Uuid::new_v4();
                let mut tx = self.begin().await?;
                let marked = sqlx::query(
                    "UPDATE messages SET lease_holder = $4 \
                     WHERE bucket = $1 AND state IN ('open', 'held', 'retry') AND (($2 AND state = 'held') OR id = $3)",
                )
                .bind(bucket)
                .bind(all)
                .bind(id)
                .bind(mark)
                .execute(&mut *tx)
                .await?;
                // What an open message has collected is its own only from its first claim on.
                sqlx::query(
                    "UPDATE reminders SET message_id = $2 \
                     WHERE bucket = $1 AND state = 'pending' AND message_id IS NULL AND EXISTS ( \
                         SELECT 1 FROM messages m \
                         WHERE m.bucket = $1 AND m.id = $2 AND m.state = 'open' AND m.lease_holder = $3 \
                           AND m.contact_id = reminders.contact_id \
                           AND ((m.kind = 'escalations' AND reminders.escalation) \
                                OR (m.kind = 'reminders' AND NOT reminders.escalation)) \
                     )",
                )
                .bind(bucket)
                .bind(id)
                .bind(mark)
                .execute(&mut *tx)
                .await?;
                sqlx::query(concat!(
                    "DELETE FROM reminders \
                     WHERE bucket = $1 AND state = 'pending' AND ",
                    $not_yet_due,
                    " AND message_id IN (SELECT id FROM messages WHERE bucket = $1 AND lease_holder = $3)"
                ))
                .bind(bucket)
                .bind(At(now))
                .bind(mark)
                .execute(&mut *tx)
                .await?;
                sqlx::query(
                    "UPDATE reminders SET state = 'cancelled', reason = $4, settled_at = $2 \
                     WHERE bucket = $1 AND state = 'pending' \
                       AND message_id IN (SELECT id FROM messages WHERE bucket = $1 AND lease_holder = $3)",
                )
                .bind(bucket)
                .bind(At(now))
                .bind(mark)
                .bind(Reason::ByHand.as_str())
                .execute(&mut *tx)
                .await?;
                sqlx::query(
                    "UPDATE messages SET state = 'cancelled', not_before = $2, finished_at = $2, lease_holder = NULL \
                     WHERE bucket = $1 AND lease_holder = $3",
                )
                .bind(bucket)
                .bind(At(now))
                .bind(mark)
                .execute(&mut *tx)
                .await?;
                tx.commit().await?;
                Ok(marked.rows_affected())
            }

            async fn retry(&self, bucket: Bucket, which: Which, now: Timestamp) -> Result<u64> {
                let bucket = bucket.column();
                let (all, id) = which.columns();
                let mark = Uuid::new_v4();
                let mut tx = self.begin().await?;
                let marked = sqlx::query(
                    "UPDATE messages \
                     SET state = 'retry', not_before = $5, finished_at = NULL, claimed_at = $5, lost_claims = 0, \
                         lease_holder = $4 \
                     WHERE bucket = $1 AND ((state = 'failed' AND ($2 OR id = $3)) OR (state = 'retry' AND id = $3)) \
                       AND EXISTS ( \
                           SELECT 1 FROM contacts c \
                           WHERE c.bucket = $1 AND c.id = messages.contact_id AND c.suppressed_at IS NULL \
                       )",
                )
                .bind(bucket)
                .bind(all)
                .bind(id)
                .bind(mark)
                .bind(At(now))
                .execute(&mut *tx)
                .await?;
                sqlx::query(
                    "UPDATE reminders \
                     SET state = 'pending', settled_at = NULL, reason = CASE WHEN escalation THEN reason ELSE NULL END \
                     WHERE bucket = $1 AND state = 'failed' \
                       AND message_id IN (SELECT id FROM messages WHERE bucket = $1 AND lease_holder = $2)",
                )
                .bind(bucket)
                .bind(mark)
                .execute(&mut *tx)
                .await?;
                sqlx::query("UPDATE messages SET lease_holder = NULL WHERE bucket = $1 AND lease_holder = $2")
                    .bind(bucket)
                    .bind(mark)
                    .execute(&mut *tx)
                    .await?;
                tx.commit().await?;
                Ok(marked.rows_affected())
            }

            async fn find_contact(&self, address: &Address) -> Result<Option<Contact>> {
                let row: Option<ContactRow> = sqlx::query_as(
                    "SELECT id, address, time_zone, locale, suppressed_at, suppressed_why \
                     FROM contacts \
                     WHERE bucket = $1 AND address = $2",
                )
                .bind(address.bucket().column())
                .bind(address.as_str())
                .fetch_optional(&self.reader())
                .await?;
                row.map(Contact::try_from).transpose()
            }

            async fn unsuppress(&self, contact: ContactId) -> Result<()> {
                sqlx::query(
                    "UPDATE contacts SET suppressed_at = NULL, suppressed_why = NULL WHERE bucket = $1 AND id = $2",
                )
                .bind(contact.bucket().column())
                .bind(contact.uuid())
                .execute(&self.writer())
                .await?;
                Ok(())
            }
        }
    };
}
pub(super) use common_messages;

/// Messages with what they would say now; the columns of a [`MessageRow`](super::row::MessageRow).
macro_rules! message_query {
    () => {
        "SELECT m.id, m.kind, m.state, m.contact_id, c.address, m.created_at, m.claimed_at, m.not_before, m.finished_at, \
                m.attempts, m.unknown_outcomes, m.lost_claims, m.last_reply, \
                ( \
                    SELECT COUNT(*) FROM reminders r \
                    WHERE r.bucket = m.bucket AND r.contact_id = m.contact_id AND r.state = 'pending' AND ( \
                        r.message_id = m.id \
                        OR (r.message_id IS NULL AND m.state = 'open' AND r.escalation = (m.kind = 'escalations')) \
                    ) \
                ) AS pending \
         FROM messages m \
         LEFT JOIN contacts c ON c.bucket = m.bucket AND c.id = m.contact_id"
    };
}
pub(super) use message_query;

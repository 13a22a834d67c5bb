//! How pages of tokens that are due are found, how far leads have been dealt with, and by which policies: in the words that both
//! back ends understand. Each page comes along one partial index, in the order of the watermarks.

/// Functions of [`Planning`](super::planning::Planning) for a back end that has `within()`, `begin()`, `reader()` and `hold()`.
macro_rules! common_planning {
    () => {
        async fn overdue(&self, now: Timestamp, limit: u32) -> Result<Vec<Candidate>> {
            self.within(async move {
                // Index tokens_unplanned.
                let rows: Vec<CandidateRow> = sqlx::query_as(concat!(
                    "SELECT ",
                    candidate_columns!(),
                    " FROM tokens \
                     WHERE unplanned AND status = 'active' AND expires_at <= $1 \
                     ORDER BY expires_at, id \
                     LIMIT $2"
                ))
                .bind(At(now))
                .bind(i64::from(limit))
                .fetch_all(&self.reader())
                .await?;
                row::all(rows)
            })
            .await
        }

        async fn unplanned(&self, now: Timestamp, limit: u32) -> Result<Vec<Candidate>> {
            self.within(async move {
                // Index tokens_unplanned.
                let rows: Vec<CandidateRow> = sqlx::query_as(concat!(
                    "SELECT ",
                    candidate_columns!(),
                    " FROM tokens \
                     WHERE unplanned AND status = 'active' AND expires_at > $1 \
                     ORDER BY expires_at, id \
                     LIMIT $2"
                ))
                .bind(At(now))
                .bind(i64::from(limit))
                .fetch_all(&self.reader())
                .await?;
                row::all(rows)
            })
            .await
        }

        async fn crossing(&self, lead: Lead, from: Watermark, now: Timestamp, limit: u32) -> Result<Vec<Candidate>> {
            self.within(async move {
                // Index tokens_deadline. The lead is added here and not in SQL, so that both ends are constants to the planner.
                let rows: Vec<CandidateRow> = sqlx::query_as(concat!(
                    "SELECT ",
                    candidate_columns!(),
                    " FROM tokens \
                     WHERE status = 'active' AND expires_at IS NOT NULL \
                       AND (expires_at, id) > ($1, $2) AND expires_at <= $3 \
                     ORDER BY expires_at, id \
                     LIMIT $4"
                ))
                .bind(At(lead.deadline_for(from.instant)))
                .bind(from.token)
                .bind(At(lead.deadline_for(now)))
                .bind(i64::from(limit))
                .fetch_all(&self.reader())
                .await?;
                row::all(rows)
            })
            .await
        }

        async fn next_deadline(&self, now: Timestamp) -> Result<Option<Timestamp>> {
            self.within(async move {
                let (next,): (Option<At>,) =
                    sqlx::query_as(NEXT_DEADLINE).bind(At(now)).fetch_one(&self.reader()).await?;
                Ok(next.map(|at| at.0))
            })
            .await
        }

        async fn watermarks(&self) -> Result<HashMap<Lead, Watermark>> {
            self.within(async move {
                let rows: Vec<(i64, At, Uuid)> =
                    sqlx::query_as("SELECT lead, instant, token_id FROM watermarks WHERE bucket = 0")
                        .fetch_all(&self.reader())
                        .await?;
                Ok(rows
                    .into_iter()
                    .map(|(lead, instant, token)| (Lead::from_seconds(lead), Watermark { instant: instant.0, token }))
                    .collect())
            })
            .await
        }

        async fn adopt_policies(&self, lease: &Lease, fingerprint: Option<&str>, now: Timestamp) -> Result<bool> {
            self.within(async move {
                let known: Option<(Option<String>,)> =
                    sqlx::query_as(POLICIES).bind(lease.job).fetch_optional(&self.reader()).await?;
                if known.is_some_and(|(known,)| known.as_deref() == fingerprint) {
                    return Ok(false);
                }
                let mut tx = self.begin().await?;
                hold(&mut tx, lease, now).await?;
                let adopted = sqlx::query(ADOPT).bind(lease.job).bind(fingerprint).execute(&mut *tx).await?;
                let adopted = adopted.rows_affected() > 0;
                if adopted {
                    sqlx::query(FORGET_WATERMARKS).execute(&mut *tx).await?;
                }
                tx.commit().await?;
                Ok(adopted)
            })
            .await
        }
    };
}
pub(super) use common_planning;

//! Whether the indexes are there that the jobs rely on, and whether the database uses them.
//!
//! What there must be is read off the migrations themselves: every index that they make and do not drop again.

use std::collections::BTreeSet;

use sqlx::migrate::Migrator;

use super::outbox::{LAST_SENT, QUEUE};

/// The indexes of a store.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Indexes {
    /// How many are there, and can be used.
    pub good: usize,
    /// Those that are not: somebody dropped them, or PostgreSQL could not finish building them.
    pub missing: Vec<String>,
    /// Those that are there, and that the planner does not use where it should.
    pub unused: Vec<&'static str>,
}

/// Statements that every idle pass runs, and the index that serves each.
pub(super) const SERVED: [(&str, &str); 3] = [
    (QUEUE, "messages_queue"),
    (LAST_SENT, "messages_finished"),
    ("SELECT MIN(expires_at) FROM tokens WHERE status = 'active' AND expires_at IS NOT NULL", "tokens_deadline"),
];

/// The indexes that these migrations leave.
fn made_by(migrations: &Migrator) -> BTreeSet<String> {
    let mut made = BTreeSet::new();
    for migration in migrations.iter() {
        let sql = migration.sql.as_str();
        let code = sql.lines().map(|line| line.split("--").next().unwrap_or_default()).collect::<Vec<_>>().join(" ");
        for statement in code.split(';') {
            let words: Vec<&str> = statement.split_whitespace().collect();
            match words[..] {
                ["CREATE", "INDEX", name, ..] | ["CREATE", "UNIQUE", "INDEX", name, ..] => {
                    made.insert(name.to_owned());
                }
                ["DROP", "INDEX", name] => {
                    made.remove(name);
                }
                _ => {}
            }
        }
    }
    made
}

impl Indexes {
    /// By what is there, and how the statements above would be run, in the database's words.
    pub(super) fn new(migrations: &Migrator, there: &BTreeSet<String>, plans: &[String; 3]) -> Self {
        let made = made_by(migrations);
        let missing: Vec<String> = made.difference(there).cloned().collect();
        let unused = SERVED.iter().zip(plans).filter(|((_, index), plan)| !plan.contains(index));
        let unused = unused.map(|((_, index), _)| *index).filter(|index| there.contains(*index)).collect();
        Self { good: made.len() - missing.len(), missing, unused }
    }
}

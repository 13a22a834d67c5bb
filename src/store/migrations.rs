//! The migrations of both back ends, which are part of the program.

use std::sync::LazyLock;

use sqlx::SqlSafeStr;
use sqlx::migrate::{Migration, MigrationType, Migrator};

/// The number of each file, the words of its name, and what it says.
type Files = &'static [(i64, &'static str, &'static str)];

macro_rules! files {
    ($back_end:literal: $($number:literal $words:literal),+ $(,)?) => {
        &[$((
            $number,
            $words,
            include_str!(concat!("../../migrations/", $back_end, "/000", $number, "_", $words, ".sql")),
        )),+]
    };
}

const SQLITE_FILES: Files =
    files!["sqlite": 1 "initial", 2 "imports", 3 "outcomes", 4 "guards", 5 "when", 6 "ops", 8 "mail"];

const POSTGRES_FILES: Files =
    files!["postgres": 1 "initial", 2 "imports", 3 "outcomes", 4 "guards", 5 "when", 6 "ops", 8 "mail"];

/// Those of SQLite.
pub(super) static SQLITE: LazyLock<Migrator> = LazyLock::new(|| migrator(SQLITE_FILES));

/// Those of PostgreSQL.
pub(super) static POSTGRES: LazyLock<Migrator> = LazyLock::new(|| migrator(POSTGRES_FILES));

fn migrator(files: Files) -> Migrator {
    let migration = |(number, words, sql): &(i64, &'static str, &'static str)| {
        Migration::new(*number, words.replace('_', " ").into(), MigrationType::Simple, sql.into_sql_str(), false)
    };
    Migrator::with_migrations(files.iter().map(migration).collect())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn every_file_is_part_of_the_program() {
        for (back_end, files) in [("sqlite", SQLITE_FILES), ("postgres", POSTGRES_FILES)] {
            let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("migrations").join(back_end);
            let mut there: Vec<String> = std::fs::read_dir(directory)
                .expect("migrations")
                .map(|entry| entry.expect("a file").file_name().into_string().expect("text"))
                .collect();
            there.sort();
            let known: Vec<String> =
                files.iter().map(|(number, words, _)| format!("{number:04}_{words}.sql")).collect();
            assert_eq!(known, there, "{back_end}");
        }
    }
}

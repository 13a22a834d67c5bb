//! A copy of a SQLite store while it is in use: whole, as it is at one moment, and compact.
//!
//! Guarantees that the file which appears under its name is complete, on the disk, and a sound database; that nothing is ever
//! written over; and that whoever uses the store meanwhile goes on. A crash leaves a hidden file beside the name at most.

use std::fs::File;
use std::path::{Path, PathBuf};

use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions, Connection};

use super::{Error, Result, Sqlite};

/// What a backup holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backup {
    /// Its size, in bytes.
    pub bytes: u64,
    /// Tokens in it.
    pub tokens: u64,
}

impl Sqlite {
    /// Writes what the store holds now into a new file, and makes sure that it can be read.
    ///
    /// # Errors
    /// When there is a file of this name, it cannot be written, or what was written is not sound; no such file appears then.
    pub async fn backup(&self, to: &Path) -> Result<Backup> {
        let problem = |what: &str, error: &dyn std::fmt::Display| {
            Error::Open(format!("the backup {} cannot be {what}: {error}", to.display()))
        };
        // Before the work, for the message; the end makes sure.
        if to.symlink_metadata().is_ok() {
            return Err(Error::Open(format!("{} exists already: a backup is never written over", to.display())));
        }
        let directory =
            to.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_owned();
        // Readable by its owner alone, as the store is.
        let file = tempfile::Builder::new().prefix(".lapsed-backup-").tempfile_in(&directory);
        let file = file.map_err(|error| problem("made", &error))?;
        let path =
            file.path().to_str().ok_or_else(|| problem("made", &"its directory's name is not UTF-8"))?.to_owned();

        let mut source = self.connect().await?;
        sqlx::query("VACUUM INTO $1").bind(&path).execute(&mut source).await?;
        source.close().await?;
        let tokens = check(file.path()).await.map_err(|error| problem("read back", &error))?;
        let target: PathBuf = to.to_owned();
        let bytes = tokio::task::spawn_blocking(move || {
            file.as_file().sync_all()?;
            let file = file.persist_noclobber(&target)?;
            File::open(&directory)?.sync_all()?;
            file.metadata().map(|metadata| metadata.len())
        });
        let bytes = bytes.await.map_err(std::io::Error::other).flatten().map_err(|error| problem("kept", &error))?;
        Ok(Backup { bytes, tokens })
    }
}

/// Whether a database is sound; how many tokens it has.
async fn check(path: &Path) -> Result<u64> {
    let mut copy = SqliteConnectOptions::new().filename(path).read_only(true).connect().await?;
    let (found,): (String,) = sqlx::query_as("PRAGMA integrity_check(1)").fetch_one(&mut copy).await?;
    if found != "ok" {
        return Err(Error::Open(found));
    }
    if sqlx::query("PRAGMA foreign_key_check").fetch_optional(&mut copy).await?.is_some() {
        return Err(Error::Open("a row refers to one that is not there".to_owned()));
    }
    let (tokens,): (i64,) = sqlx::query_as("SELECT COUNT(*) FROM tokens").fetch_one(&mut copy).await?;
    copy.close().await?;
    Ok(tokens.unsigned_abs())
}

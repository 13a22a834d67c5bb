//! Delivery into a Maildir: a directory whose `new/` holds one file per message.
//!
//! Guarantees that a file in `new/` is whole and on the disk before the message counts as delivered: it is written and
//! synced in `tmp/`, renamed, and the directory is synced. Its name is made from the message's id, so a repeated delivery
//! replaces the first one while that is unread. A crash leaves at most a file in `tmp/`, which mail programs clear away
//! after 36 hours, as the format has it.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::token::MessageId;

use super::outcome::{Happened, Phase};

/// A Maildir.
#[derive(Clone, Debug)]
pub struct Maildir {
    path: PathBuf,
}

/// What went wrong with which file.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} {}: {source}", .path.display())]
pub struct MaildirError {
    what: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// Says what was done to which path when it failed.
fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> MaildirError {
    let path = path.to_owned();
    move |source| MaildirError { what, path, source }
}

/// A disk that is full and a directory that may not be written are nobody's message's fault.
impl From<MaildirError> for Happened {
    fn from(error: MaildirError) -> Self {
        Self::Broken { phase: Phase::Connect, error: error.to_string() }
    }
}

/// A message that is written and synced, but not delivered yet. Dropping it takes it back.
#[derive(Debug)]
pub(super) struct Written {
    tmp: Option<PathBuf>,
    new: PathBuf,
}

impl Maildir {
    /// The Maildir at this path; nothing is read or written yet.
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// Makes the directory and its three parts, for the user alone, where they are missing. Blocks.
    ///
    /// # Errors
    /// [`MaildirError`], which names the directory.
    pub fn create(&self) -> Result<(), MaildirError> {
        for part in ["tmp", "new", "cur"] {
            let path = self.path.join(part);
            let made = DirBuilder::new().recursive(true).mode(0o700).create(&path);
            made.map_err(failed("make the directory", &path))?;
        }
        Ok(())
    }

    /// Writes a message to `tmp/`. Blocks.
    ///
    /// # Errors
    /// [`MaildirError`], which names the file.
    pub(super) fn write(&self, id: MessageId, content: &[u8]) -> Result<Written, MaildirError> {
        let name = format!("{id}.lapsed");
        // Two processes may come to write one message, when one lost its lease: each has its own file until the rename.
        let tmp = self.path.join("tmp").join(format!("{name}.{}.{:x}", std::process::id(), rand::random::<u32>()));
        let mut options = OpenOptions::new();
        let mut file = options.write(true).create_new(true).mode(0o600).open(&tmp).map_err(failed("create", &tmp))?;
        let written = Written { tmp: Some(tmp.clone()), new: self.path.join("new").join(name) };
        file.write_all(&with_native_lines(content)).map_err(failed("write", &tmp))?;
        file.sync_all().map_err(failed("sync", &tmp))?;
        Ok(written)
    }
}

impl Written {
    /// Moves the message to `new/`. Blocks.
    ///
    /// # Errors
    /// [`MaildirError`], which names the file.
    pub(super) fn deliver(mut self) -> Result<PathBuf, MaildirError> {
        if let Some(tmp) = &self.tmp {
            fs::rename(tmp, &self.new).map_err(failed("move a message to", &self.new))?;
        }
        self.tmp = None;
        if let Some(directory) = self.new.parent() {
            File::open(directory).and_then(|file| file.sync_all()).map_err(failed("sync", directory))?;
        }
        Ok(std::mem::take(&mut self.new))
    }
}

impl Drop for Written {
    fn drop(&mut self) {
        if let Some(tmp) = &self.tmp {
            // What cannot be removed is cleared away by whoever reads the Maildir.
            let _ = fs::remove_file(tmp);
        }
    }
}

/// Lines in a Maildir end as the machine's own do, and only on the wire in CR LF.
fn with_native_lines(content: &[u8]) -> Vec<u8> {
    let mut native = Vec::with_capacity(content.len());
    let mut rest = content.iter().copied().peekable();
    while let Some(byte) = rest.next() {
        if byte != b'\r' || rest.peek() != Some(&b'\n') {
            native.push(byte);
        }
    }
    native
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;
    use crate::token::Bucket;

    fn id() -> MessageId {
        MessageId::new(Bucket::from_number(7), DateTime::from_timestamp(1_800_000_000, 0).expect("in range"))
    }

    fn names(path: &Path) -> Vec<String> {
        let entries = fs::read_dir(path).expect("a directory");
        entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn a_repeated_delivery_replaces_the_first() {
        let directory = tempfile::tempdir().expect("a directory");
        let maildir = Maildir::new(directory.path().join("deep/mail"));
        maildir.create().expect("made");
        maildir.create().expect("made again");
        let id = id();
        maildir.write(id, b"first\r\n").and_then(Written::deliver).expect("delivered");
        let path = maildir.write(id, b"second\r\n\rx\r\n").and_then(Written::deliver).expect("delivered");
        assert_eq!(names(&directory.path().join("deep/mail/new")), [format!("{id}.lapsed")]);
        assert_eq!(fs::read(path).expect("the file"), b"second\n\rx\n");
        assert!(names(&directory.path().join("deep/mail/tmp")).is_empty());
    }

    #[test]
    fn what_is_not_delivered_is_taken_back() {
        let directory = tempfile::tempdir().expect("a directory");
        let maildir = Maildir::new(directory.path().to_owned());
        maildir.create().expect("made");
        let written = maildir.write(id(), b"x").expect("written");
        assert_eq!(names(&directory.path().join("tmp")).len(), 1);
        drop(written);
        assert!(names(&directory.path().join("tmp")).is_empty());
        assert!(names(&directory.path().join("new")).is_empty());
    }

    #[test]
    fn an_error_names_the_path_and_blames_no_message() {
        let directory = tempfile::tempdir().expect("a directory");
        let in_the_way = directory.path().join("file");
        fs::write(&in_the_way, "").expect("written");
        let error = Maildir::new(in_the_way.clone()).create().expect_err("a file is no directory");
        assert!(error.to_string().starts_with(&format!("cannot make the directory {}/tmp: ", in_the_way.display())));
        let happened = Happened::from(error);
        assert!(matches!(happened, Happened::Broken { phase: Phase::Connect, .. }));
    }
}

//! Other settings while the daemon runs: asked for by SIGHUP, or by a file that has changed.
//!
//! Guarantees that settings are taken over as a whole or not at all: what is wrong with new ones is told, problem by problem,
//! and the old ones stay. Whoever is at a step finishes it by the old ones. Relies on the loader to check everything before
//! anything is taken over. Nothing is kept: a process that dies reads the files as they are when it starts again.
//!
//! Directories are watched, not files, because editors and configuration management rename a new file into place; only
//! contents that differ count, once nothing has happened for a moment.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use futures_util::future::BoxFuture;
use notify::event::{AccessKind, AccessMode};
use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use sd_notify::NotifyState;
use sha2::{Digest, Sha256};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use super::Setup;
use super::supervisor::tell;

/// For how long nothing must have happened to a file before it is read: whoever writes it may not be done.
const QUIET: Duration = Duration::from_millis(300);

/// For how long at most: one that changes all the time is read all the same.
const AT_MOST: Duration = Duration::from_secs(5);

/// Where settings come from.
pub struct Reload {
    /// The files that are watched, as they were before the settings in force were read.
    pub files: Files,
    /// Reads everything anew and checks it; otherwise, what is wrong, problem by problem.
    pub load: Load,
}

/// How settings are read anew.
pub type Load = Box<dyn FnMut() -> BoxFuture<'static, Result<Reloaded, Vec<String>>> + Send>;

/// Settings that were read anew, and are good.
pub struct Reloaded {
    /// All of them.
    pub setup: Setup,
    /// Whether how mail leaves has changed: the sessions that there are are then replaced, each once it has nothing to do.
    pub new_sessions: bool,
    /// The keys that have other values than before.
    pub changed: Vec<String>,
    /// Those of them that stay as they were until the next start.
    pub at_next_start: Vec<String>,
    /// The files that are watched from now on.
    pub files: Vec<PathBuf>,
}

/// What asks for other settings.
pub(super) struct Requests {
    load: Load,
    hangup: Signal,
    watched: Watched,
}

impl Requests {
    /// Listens from now on.
    pub(super) fn new(reload: Reload) -> anyhow::Result<Self> {
        let hangup = signal(SignalKind::hangup()).context("cannot receive SIGHUP")?;
        Ok(Self { load: reload.load, hangup, watched: Watched::new(reload.files) })
    }

    /// Reads the settings anew whenever asked, and hands good ones to `adopt`.
    pub(super) async fn run(
        mut self,
        adopt: impl Fn(Setup, bool) + Send,
        complaint: watch::Sender<Option<String>>,
        stop: CancellationToken,
    ) {
        loop {
            let asked = tokio::select! {
                () = stop.cancelled() => return,
                _ = self.hangup.recv() => {
                    self.watched.files.look();
                    true
                }
                () = self.watched.settled() => self.watched.files.look(),
            };
            if asked {
                self.reload(&adopt, &complaint).await;
            }
        }
    }

    async fn reload(&mut self, adopt: &impl Fn(Setup, bool), complaint: &watch::Sender<Option<String>>) {
        let started = Instant::now();
        tell(|| sd_notify::notify(&[NotifyState::Reloading, NotifyState::monotonic_usec_now()?])).await;
        let said = match (self.load)().await {
            Ok(Reloaded { setup, new_sessions, changed, at_next_start, files }) => {
                adopt(setup, new_sessions);
                self.watched.replace(files);
                let millis = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
                let changed = if changed.is_empty() { "nothing".to_owned() } else { changed.join(", ") };
                tracing::info!(millis, %changed, "read the configuration again");
                for key in &at_next_start {
                    tracing::warn!(%key, "cannot change while the daemon runs: it stays as it was until the next start");
                }
                let waits = at_next_start.join(", ");
                (!waits.is_empty()).then(|| format!("{waits}: changed, holds from the next start on"))
            }
            Err(problems) => {
                tracing::error!(problems = problems.len(), "the new configuration is refused, the old one stays");
                for problem in &problems {
                    tracing::error!("refused: {problem}");
                }
                let first = problems.first().map_or("", String::as_str);
                let n = problems.len();
                Some(format!("new configuration refused, the old one stays ({n} to mend, see the log): {first}"))
            }
        };
        complaint.send_replace(said);
        tell(|| sd_notify::notify(&[NotifyState::Ready])).await;
    }
}

/// Files, and what they held when they were last looked at. They may not exist.
#[derive(Debug, Default)]
pub struct Files {
    paths: Vec<PathBuf>,
    contents: [u8; 32],
}

impl Files {
    /// These files as they are now.
    pub fn seen(paths: Vec<PathBuf>) -> Self {
        let contents = contents(&paths);
        Self { paths, contents }
    }

    /// Whether they hold something else than when they were last looked at.
    fn look(&mut self) -> bool {
        let contents = contents(&self.paths);
        std::mem::replace(&mut self.contents, contents) != contents
    }
}

/// Files, and whatever happens to them.
struct Watched {
    files: Files,
    happened: Arc<Notify>,
    /// `None` where directories cannot be watched: then only signals count.
    watcher: Option<RecommendedWatcher>,
}

impl Watched {
    fn new(files: Files) -> Self {
        let mut watched = Self { files, happened: Arc::new(Notify::new()), watcher: None };
        watched.watch();
        // Something may have happened before it was watched.
        watched.happened.notify_one();
        watched
    }

    /// Watches these from now on.
    fn replace(&mut self, paths: Vec<PathBuf>) {
        if paths != self.files.paths {
            self.files = Files::seen(paths);
        }
        // Anew in any case: where they are links, they may lead elsewhere now.
        self.watch();
    }

    fn watch(&mut self) {
        self.watcher = None;
        match watcher(&self.files.paths, self.happened.clone()) {
            Ok(watcher) => self.watcher = Some(watcher),
            Err(error) => {
                tracing::warn!(%error, "the configuration cannot be watched: a change holds after SIGHUP only");
            }
        }
    }

    /// Waits until something has happened to a file, and then nothing for a moment. Nothing is lost when it is dropped: the
    /// next look compares contents.
    async fn settled(&self) {
        self.happened.notified().await;
        let since = Instant::now();
        while since.elapsed() < AT_MOST && tokio::time::timeout(QUIET, self.happened.notified()).await.is_ok() {}
    }
}

/// A digest of what the files hold; one that cannot be read counts as such.
fn contents(files: &[PathBuf]) -> [u8; 32] {
    let mut all = Sha256::new();
    for file in files {
        match std::fs::read(file) {
            Ok(bytes) => {
                all.update(b"is");
                all.update(Sha256::digest(bytes));
            }
            Err(_) => all.update(b"none"),
        }
    }
    all.finalize().into()
}

/// Watches the directories of these files, and those of what they are links to.
fn watcher(files: &[PathBuf], happened: Arc<Notify>) -> notify::Result<RecommendedWatcher> {
    let mut directories = BTreeSet::new();
    let mut names = BTreeSet::new();
    for file in files {
        let target = std::fs::canonicalize(file).ok();
        for path in [Some(file), target.as_ref()].into_iter().flatten() {
            names.extend(path.file_name().map(OsStr::to_owned));
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
            directories.insert(parent.to_owned());
        }
    }
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
        if concerns(&event, &names) {
            happened.notify_one();
        }
    })?;
    // A directory that does not exist holds no configuration yet; whoever makes it sends SIGHUP.
    for directory in directories.iter().filter(|directory| directory.is_dir()) {
        watcher.watch(directory, RecursiveMode::NonRecursive)?;
    }
    Ok(watcher)
}

/// Whether one of these files may hold something else now. Our own reading is no change. A name that begins with two dots is
/// the link that Kubernetes swaps under all files of a directory at once.
fn concerns(event: &notify::Result<Event>, names: &BTreeSet<OsString>) -> bool {
    // Events were lost.
    let Ok(event) = event else { return true };
    let read = matches!(event.kind, EventKind::Access(kind) if kind != AccessKind::Close(AccessMode::Write));
    let named = |name: &OsStr| names.contains(name) || name.as_encoded_bytes().starts_with(b"..");
    event.need_rescan() || (!read && event.paths.iter().filter_map(|path| path.file_name()).any(named))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether a change of this file is seen after this was done to it.
    async fn is_seen(files: &[PathBuf], act: impl FnOnce()) -> bool {
        let mut watched = Watched::new(Files::seen(files.to_vec()));
        watched.settled().await;
        assert!(!watched.files.look());
        act();
        tokio::time::timeout(Duration::from_secs(20), watched.settled()).await.expect("something has happened");
        watched.files.look()
    }

    #[tokio::test]
    async fn a_file_is_seen_however_it_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let write = |name: &str, text: &str| std::fs::write(path(name), text).unwrap();
        let files = [path("lapsed.toml")];
        assert!(is_seen(&files, || write("lapsed.toml", "made")).await);
        assert!(is_seen(&files, || write("lapsed.toml", "written over")).await);
        let into_place = || {
            write(".lapsed.toml.swp", "renamed into place");
            std::fs::rename(path(".lapsed.toml.swp"), path("lapsed.toml")).unwrap();
        };
        assert!(is_seen(&files, into_place).await);
        assert!(is_seen(&files, || std::fs::remove_file(path("lapsed.toml")).unwrap()).await);
    }

    #[tokio::test]
    async fn what_holds_the_same_has_not_changed() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("lapsed.toml");
        std::fs::write(&file, "the same").unwrap();
        assert!(!is_seen(std::slice::from_ref(&file), || std::fs::write(&file, "the same").unwrap()).await);
    }

    /// As Kubernetes does it: the file is a link through `..data`, which is swapped.
    #[tokio::test]
    async fn a_link_that_is_swapped_is_seen() {
        use std::os::unix::fs::symlink;
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        for version in ["..1", "..2"] {
            std::fs::create_dir(path(version)).unwrap();
            std::fs::write(path(version).join("lapsed.toml"), version).unwrap();
        }
        symlink("..1", path("..data")).unwrap();
        symlink("..data/lapsed.toml", path("lapsed.toml")).unwrap();
        let swap = || {
            symlink("..2", path("..next")).unwrap();
            std::fs::rename(path("..next"), path("..data")).unwrap();
        };
        assert!(is_seen(&[path("lapsed.toml")], swap).await);
    }

    #[test]
    fn other_files_of_the_directory_are_nobodys_business() {
        let names = BTreeSet::from([OsString::from("lapsed.toml")]);
        let written =
            |name: &str| Ok(Event::new(EventKind::Access(AccessKind::Close(AccessMode::Write))).add_path(name.into()));
        assert!(concerns(&written("/etc/lapsed/lapsed.toml"), &names));
        assert!(!concerns(&written("/etc/lapsed/lapsed.db-wal"), &names));
        let read =
            Event::new(EventKind::Access(AccessKind::Open(AccessMode::Any))).add_path("/etc/lapsed/lapsed.toml".into());
        assert!(!concerns(&Ok(read), &names));
        assert!(concerns(&Err(notify::Error::generic("lost")), &names));
    }
}

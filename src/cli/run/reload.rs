//! Reading the settings of a running daemon anew.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use sha2::{Digest, Sha256};

use super::{Source, setup};
use crate::cli::Failure;
use crate::clock::SystemClock;
use crate::config::{self, InForce, Proof, Settings, Transport};
use crate::service::{Reload, Reloaded};
use crate::store::Store;
use crate::telemetry;

/// What is chosen once, at the start: a key, or a section.
const AT_START: [&str; 3] = ["store.", "http.", "log.format"];

/// What is in force.
struct Known {
    settings: Settings,
    in_force: Vec<InForce>,
    secrets: Secrets,
}

/// How the daemon with these settings gets other ones.
pub(super) fn reload<S: Store>(source: Source, store: &S, clock: &Arc<SystemClock>, settings: &Settings) -> Reload {
    let Source { named, files, in_force } = source;
    let secrets = Secrets::of(settings);
    let known = Arc::new(Mutex::new(Known { settings: settings.clone(), in_force, secrets }));
    let (store, clock) = (store.clone(), clock.clone());
    let load = move || {
        let (store, clock, known, named) = (store.clone(), clock.clone(), known.clone(), named.clone());
        let again = async move { load(&store, &clock, &known, named.as_deref()).await };
        Box::pin(again) as futures_util::future::BoxFuture<'static, _>
    };
    Reload { files, load: Box::new(load) }
}

async fn load<S: Store>(
    store: &S,
    clock: &SystemClock,
    known: &Mutex<Known>,
    named: Option<&Path>,
) -> Result<Reloaded, Vec<String>> {
    let (mut settings, in_force) = config::load_with_origins(named).map_err(|invalid| invalid.problems)?;
    settings.require_mail().map_err(|invalid| invalid.problems)?;
    let setup = setup(store, clock, &settings).await.map_err(|failure| vec![in_words(failure)])?;
    let secrets = Secrets::of(&settings);

    let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
    let changed = changed(&known, &settings, &in_force);
    let new_sessions = settings.mail.transport != known.settings.mail.transport || secrets != known.secrets;
    if settings.log.level != known.settings.log.level {
        telemetry::set_level(&settings.log.level);
    }
    let at_next_start = changed.iter().filter(|key| AT_START.iter().any(|fixed| key.starts_with(fixed)));
    let at_next_start = at_next_start.cloned().collect();
    // What stays as it was is compared with what it is, whenever that is read again.
    settings.store = known.settings.store.clone();
    *known = Known { settings, in_force, secrets };
    Ok(Reloaded { setup, new_sessions, changed, at_next_start, files: vec![config::file(named).to_owned()] })
}

/// The keys with other values.
fn changed(known: &Known, settings: &Settings, in_force: &[InForce]) -> Vec<String> {
    let text = |list: &[InForce], key: &str| list.iter().find(|one| one.key == key).map(|one| one.text.clone());
    let mut changed: BTreeSet<String> = in_force
        .iter()
        .filter(|one| !one.key.starts_with("store.") && text(&known.in_force, &one.key).as_ref() != Some(&one.text))
        .map(|one| one.key.clone())
        .collect();
    // The URL as such, wherever it came from: its text is masked, and it may stand in another file.
    if settings.store != known.settings.store {
        changed.insert("store.url".to_owned());
    }
    changed.into_iter().collect()
}

fn in_words(failure: Failure) -> String {
    match failure {
        Failure::Usage(why) | Failure::Status(_, why) => why,
        Failure::Failed(error) => format!("{error:#}"),
        Failure::NotValid => "not valid".to_owned(),
    }
}

/// Digests of what the files hold that a mail server's account and its certificate rest on.
#[derive(PartialEq, Eq)]
struct Secrets(Vec<Option<[u8; 32]>>);

impl Secrets {
    fn of(settings: &Settings) -> Self {
        let Some(Transport::Smtp(smtp)) = &settings.mail.transport else { return Self(Vec::new()) };
        let proof = smtp.login.as_ref().map(|login| match &login.proof {
            Proof::PasswordFile(file) | Proof::TokenFile(file) => file,
        });
        let files: [Option<&PathBuf>; 2] = [proof, smtp.ca_file.as_ref()];
        let digest = |file: &PathBuf| std::fs::read(file).ok().map(|bytes| Sha256::digest(bytes).into());
        Self(files.into_iter().flatten().map(digest).collect())
    }
}

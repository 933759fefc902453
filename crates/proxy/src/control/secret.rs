//! Secrets as messages: parsed, checked, stored.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use engine::config::Name;
use engine::lower::Raw;
use engine::tls::SecretSettings;
use identity::agent::describe;
use xds::client::Rejected;

use crate::file_secrets::{Failure, Known, Stamp, may_pass, stamp};
use workers::secrets::{ROOTS, Secret, Secrets, Unreadable, WORKLOAD};

/// Whether a secret is the workload's own, in a proxy that has one.
pub(crate) fn is_own(name: &str) -> bool {
    matches!(name, WORKLOAD | ROOTS)
}

/// Secrets that name files. They are read again when one of these is replaced, as Envoy does for secrets of the
/// discovery service.
#[derive(Default)]
pub(crate) struct OfFiles {
    by_name: BTreeMap<Name, Followed>,
}

struct Followed {
    settings: SecretSettings,
    known: Known<Vec<Option<Stamp>>>,
}

impl OfFiles {
    /// Whether there is any.
    pub(crate) fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }

    /// Secrets that are new since the last look.
    pub(crate) fn look(&mut self) -> Vec<(Name, Secret)> {
        let mut changed = Vec::new();
        for (name, followed) in &mut self.by_name {
            let now = stamps(&followed.settings);
            if followed.known.is_of(&now) {
                continue;
            }
            match followed.known.note(now, read(&followed.settings)) {
                Some(Ok(secret)) => changed.push((Name::clone(name), secret)),
                Some(Err(reason)) => {
                    tracing::warn!(%name, reason, "files of a secret cannot be used; what was there before stays");
                }
                None => {}
            }
        }
        changed
    }

    /// Forgets these.
    pub(crate) fn forget(&mut self, gone: &BTreeSet<Name>) {
        self.by_name.retain(|name, _| !gone.contains(name));
    }

    /// Takes what is to be followed of a secret that was just read from files with these stamps.
    fn follow(&mut self, name: &Name, settings: SecretSettings, stamps: Vec<Option<Stamp>>) {
        if stamps.is_empty() {
            self.by_name.remove(name);
            return;
        }
        self.by_name.insert(Name::clone(name), Followed { settings, known: Known::of(stamps) });
    }
}

/// Applies an update; each secret is taken or refused whole, a refused one keeps its last good value. What `is_own`
/// says is neither taken nor given by anybody.
pub(crate) fn apply(
    secrets: &Secrets,
    of_files: &mut OfFiles,
    raws: &[Raw],
    removed: &[Name],
    is_own: impl Fn(&str) -> bool,
) -> Vec<Rejected> {
    let mut rejected = Vec::new();
    secrets.change(|store| {
        for name in removed.iter().filter(|name| !is_own(name)) {
            store.remove(name);
            of_files.by_name.remove(name);
        }
        for raw in raws {
            let taken = if is_own(&raw.name) { Err("the name is the workload's own".to_owned()) } else { take(raw) };
            match taken {
                Ok((secret, settings, stamps)) => {
                    of_files.follow(&raw.name, settings, stamps);
                    store.insert(Name::clone(&raw.name), secret);
                }
                Err(reason) => rejected.push(Rejected { name: raw.name.to_string(), reason }),
            }
        }
    });
    rejected
}

type Taken = (Secret, SecretSettings, Vec<Option<Stamp>>);

fn take(raw: &Raw) -> Result<Taken, String> {
    let settings = engine::lower::secret(&raw.body).map_err(|refused| refused.to_string())?;
    let stamps = stamps(&settings);
    let secret = read(&settings).map_err(|failure| failure.reason)?;
    Ok((secret, settings, stamps))
}

fn stamps(settings: &SecretSettings) -> Vec<Option<Stamp>> {
    settings.files().map(|path| stamp(&PathBuf::from(path))).collect()
}

fn read(settings: &SecretSettings) -> Result<Secret, Failure> {
    Secret::read(settings.clone()).map_err(|error| Failure {
        may_pass: matches!(&error, Unreadable::File(_, error) if may_pass(error)),
        reason: describe(&error),
    })
}

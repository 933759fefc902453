//! Secrets whose names say in which files of this machine they are.
//!
//! | name | secret |
//! |---|---|
//! | `file-cert:CHAIN~KEY` | a certificate chain with its key |
//! | `file-root:ROOTS` | roots |
//! | `file-root:system` | the roots of the operating system |
//!
//! A file is read when something names it, and again whenever it is replaced. What cannot be read or does not
//! fit leaves what was there before, and is told once; where nothing was, handshakes that need it fail.
//!
//! *Source*: `security.md` 5, ROT-3.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use engine::config::Name;
use identity::agent::describe;
use identity::workload::{InvalidIdentity, KeyAndChain, TrustRoots, WorkloadIdentity};
use thiserror::Error;

use crate::secrets::Secret;

/// Whether a secret of this name is one of files.
pub(crate) fn is_of_files(name: &str) -> bool {
    name.starts_with("file-")
}

/// Inode, size, modification time: a replaced or rewritten file differs in one of them.
pub(crate) type Stamp = (u64, u64, i64, i64);

/// The stamp of what a path leads to; `None` when that is nothing.
pub(crate) fn stamp(path: &Path) -> Option<Stamp> {
    let data = std::fs::metadata(path).ok()?;
    Some((data.ino(), data.size(), data.mtime(), data.mtime_nsec()))
}

/// The files that are followed.
#[derive(Debug, Default)]
pub(crate) struct FileSecrets {
    /// As they were at the last look; `None` before the first.
    known: BTreeMap<Name, Option<Vec<Option<Stamp>>>>,
}

/// What the names say.
enum Files<'a> {
    Certificate(&'a str, &'a str),
    Roots(&'a str),
    System,
}

#[derive(Debug, Error)]
enum Unreadable {
    #[error("the name is neither file-cert:CHAIN~KEY nor file-root:ROOTS")]
    Name,
    #[error("{0}")]
    File(String, #[source] std::io::Error),
    #[error(transparent)]
    Unusable(#[from] InvalidIdentity),
}

impl FileSecrets {
    /// Follows these and no others; the answer has those that nobody names any more.
    pub(crate) fn follow(&mut self, names: impl IntoIterator<Item = Name>) -> Vec<Name> {
        let mut before = std::mem::take(&mut self.known);
        for name in names {
            let known = before.remove(&name).flatten();
            self.known.insert(name, known);
        }
        before.into_keys().collect()
    }

    /// Whether there is any.
    pub(crate) fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// Secrets that are new or changed since the last look.
    pub(crate) fn look(&mut self) -> Vec<(Name, Secret)> {
        let mut changed = Vec::new();
        for (name, known) in &mut self.known {
            let files = files(name);
            let stamps = match &files {
                Some(Files::Certificate(chain, key)) => vec![stamp(Path::new(chain)), stamp(Path::new(key))],
                Some(Files::Roots(roots)) => vec![stamp(Path::new(roots))],
                Some(Files::System) | None => Vec::new(),
            };
            if known.as_ref() == Some(&stamps) {
                continue;
            }
            *known = Some(stamps);
            match read(files) {
                Ok(secret) => changed.push((Name::clone(name), secret)),
                Err(error) => {
                    tracing::warn!(%name, reason = describe(&error), "a secret in files cannot be used; what was there before stays");
                }
            }
        }
        changed
    }
}

/// A workload's own certificate, key and roots, where others provide them.
#[derive(Debug)]
pub(crate) struct IdentityFiles {
    /// Chain, key, roots.
    paths: [PathBuf; 3],
    known: Option<[Option<Stamp>; 3]>,
    generation: u64,
}

impl IdentityFiles {
    /// Follows these files: chain, key, roots.
    pub(crate) fn new(paths: [PathBuf; 3]) -> Self {
        Self { paths, known: None, generation: 0 }
    }

    /// The identity, if a file was replaced since the last look.
    ///
    /// *Errors*: what is there now is none.
    pub(crate) fn look(&mut self) -> Option<Result<WorkloadIdentity, String>> {
        let stamps = [0, 1, 2].map(|at: usize| stamp(&self.paths[at]));
        if self.known == Some(stamps) {
            return None;
        }
        self.known = Some(stamps);
        self.generation += 1;
        let read = |path: &Path| std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()));
        let [chain, key, roots] = &self.paths;
        let made = || {
            let identity = WorkloadIdentity::from_pem(&read(chain)?, &read(key)?, &read(roots)?);
            identity.map_err(|error| describe(&error))
        };
        Some(made().map(|identity| WorkloadIdentity { generation: self.generation, ..identity }))
    }
}

fn files(name: &str) -> Option<Files<'_>> {
    if let Some(pair) = name.strip_prefix("file-cert:") {
        let (chain, key) = pair.split_once('~')?;
        return Some(Files::Certificate(chain, key));
    }
    match name.strip_prefix("file-root:")? {
        "system" => Some(Files::System),
        roots => Some(Files::Roots(roots)),
    }
}

fn read(files: Option<Files<'_>>) -> Result<Secret, Unreadable> {
    let text = |path: &str| std::fs::read(path).map_err(|error| Unreadable::File(path.to_owned(), error));
    Ok(match files.ok_or(Unreadable::Name)? {
        Files::Certificate(chain, key) => {
            Secret::Certificate(Arc::new(KeyAndChain::from_pem(&text(chain)?, &text(key)?)?))
        }
        Files::Roots(roots) => Secret::Roots(Arc::new(TrustRoots::from_pem(&text(roots)?)?)),
        Files::System => Secret::Roots(Arc::new(TrustRoots::system()?)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (String, String) {
        let made = rcgen::generate_simple_self_signed(["a.example".to_owned()]).unwrap();
        (made.cert.pem(), made.signing_key.serialize_pem())
    }

    #[test]
    fn files_are_read_when_named_and_again_when_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        // Replaced as tools do it: another file under the name.
        let put = |name: &str, text: &str| {
            std::fs::write(path("new"), text).unwrap();
            std::fs::rename(path("new"), path(name)).unwrap();
        };
        let certificate: Name = format!("file-cert:{}~{}", path("chain"), path("key")).into();
        let roots: Name = format!("file-root:{}", path("chain")).into();
        let mut secrets = FileSecrets::default();
        assert!(secrets.follow([Name::clone(&certificate), Name::clone(&roots), "file-x:".into()]).is_empty());
        assert!(secrets.look().is_empty(), "nothing is there");
        let (first, second) = (pair(), pair());
        put("chain", &first.0);
        put("key", &first.1);
        let read = secrets.look();
        let names: Vec<&Name> = read.iter().map(|(name, _)| name).collect();
        assert_eq!(names, [&certificate, &roots]);
        assert!(matches!(read[0].1, Secret::Certificate(_)) && matches!(read[1].1, Secret::Roots(_)));
        assert!(secrets.look().is_empty(), "nothing changed");
        // Half of a pair is no pair: what was there stays.
        put("chain", &second.0);
        assert_eq!(secrets.look().iter().map(|(name, _)| name).collect::<Vec<_>>(), [&roots]);
        put("key", &second.1);
        assert_eq!(secrets.look().iter().map(|(name, _)| name).collect::<Vec<_>>(), [&certificate]);
        assert_eq!(secrets.follow([certificate]), [roots, "file-x:".into()]);
        assert!(secrets.look().is_empty());
    }

    #[test]
    fn an_identity_in_files_is_read_again_when_it_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let issue = |account: &str| {
            let mut parameters = rcgen::CertificateParams::default();
            let id = format!("spiffe://cluster.local/ns/shop/sa/{account}");
            parameters.subject_alt_names = vec![rcgen::SanType::URI(id.try_into().unwrap())];
            let key = rcgen::KeyPair::generate().unwrap();
            (parameters.self_signed(&key).unwrap().pem(), key.serialize_pem())
        };
        let put = |name: &str, text: &str| {
            std::fs::write(dir.path().join("new"), text).unwrap();
            std::fs::rename(dir.path().join("new"), dir.path().join(name)).unwrap();
        };
        let mut files = IdentityFiles::new(["chain", "key", "roots"].map(|name| dir.path().join(name)));
        assert!(files.look().unwrap().unwrap_err().contains("chain"));
        assert!(files.look().is_none(), "it was told");
        for (generation, account) in [(2, "first"), (3, "second")] {
            let (chain, key) = issue(account);
            put("roots", &chain);
            put("chain", &chain);
            put("key", &key);
            let identity = files.look().unwrap().unwrap();
            assert_eq!((&*identity.id.service_account, identity.generation), (account, generation));
            assert!(files.look().is_none());
        }
        put("key", &issue("first").1);
        assert!(files.look().unwrap().unwrap_err().contains("does not belong"));
    }
}

//! Secrets whose names say in which files of this machine they are.
//!
//! | name | secret |
//! |---|---|
//! | `file-cert:CHAIN~KEY` | a certificate chain with its key |
//! | `file-root:ROOTS` | roots |
//! | `file-root:system` | the roots of the operating system |
//!
//! A file is read when something names it, and again whenever it is replaced. What cannot be read or does not
//! fit leaves what was there before, and is told once; where nothing was, handshakes that need it fail. A file that
//! is there and cannot be read for now is tried again at every look.
//!
//! *Source*: `docs/parity.md`, Security 5, ROT-3.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use engine::config::Name;
use identity::agent::describe;
use identity::workload::{InvalidIdentity, KeyAndChain, TrustRoots, WorkloadIdentity};
use thiserror::Error;

use workers::secrets::{Secret, Trust};

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

/// Why what files hold cannot be had.
#[derive(Debug)]
pub(crate) struct Failure {
    /// With its causes.
    pub(crate) reason: String,
    /// Another try may end otherwise though no file was replaced.
    pub(crate) may_pass: bool,
}

/// What is known of files.
#[derive(Debug)]
pub(crate) struct Known<S> {
    /// As they were when they were read last; `None`: they are still to be read.
    stamps: Option<S>,
    /// The failure that was told last, while it may pass.
    told: Option<String>,
}

impl<S> Default for Known<S> {
    fn default() -> Self {
        Self { stamps: None, told: None }
    }
}

impl<S: PartialEq> Known<S> {
    /// That files with these stamps were read.
    pub(crate) fn of(stamps: S) -> Self {
        Self { stamps: Some(stamps), told: None }
    }

    /// Whether files with these stamps were read already.
    pub(crate) fn is_of(&self, stamps: &S) -> bool {
        self.stamps.as_ref() == Some(stamps)
    }

    /// Takes what came of reading files that had these stamps right before: what was read, or a failure to tell;
    /// `None` when that was told.
    pub(crate) fn note<T>(&mut self, stamps: S, read: Result<T, impl Into<Failure>>) -> Option<Result<T, String>> {
        let Failure { reason, may_pass } = match read {
            Ok(read) => {
                *self = Self { stamps: Some(stamps), told: None };
                return Some(Ok(read));
            }
            Err(error) => error.into(),
        };
        if !may_pass {
            *self = Self { stamps: Some(stamps), told: None };
            return Some(Err(reason));
        }
        let is_told = self.told.as_ref() == Some(&reason);
        *self = Self { stamps: None, told: Some(reason.clone()) };
        (!is_told).then_some(Err(reason))
    }
}

/// The files that are followed.
#[derive(Debug, Default)]
pub(crate) struct FileSecrets {
    known: BTreeMap<Name, Known<Vec<Option<Stamp>>>>,
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
    #[error("the roots of the operating system")]
    System(#[source] InvalidIdentity),
    #[error(transparent)]
    Unusable(#[from] InvalidIdentity),
}

/// Whether another try to read a file may end otherwise though it was not replaced: too many files are open, the disk
/// fails, somebody may not read. A file that is not there has another stamp when it is.
pub(crate) fn may_pass(error: &std::io::Error) -> bool {
    !matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::InvalidData)
}

impl From<Unreadable> for Failure {
    fn from(error: Unreadable) -> Self {
        let may_pass = match &error {
            Unreadable::File(_, error) => may_pass(error),
            // they have no stamp
            Unreadable::System(_) => true,
            Unreadable::Name | Unreadable::Unusable(_) => false,
        };
        Self { reason: describe(&error), may_pass }
    }
}

impl FileSecrets {
    /// Follows these and no others; the answer has those that nobody names any more.
    pub(crate) fn follow(&mut self, names: impl IntoIterator<Item = Name>) -> Vec<Name> {
        let mut before = std::mem::take(&mut self.known);
        for name in names {
            let known = before.remove(&name);
            self.known.entry(name).or_insert(known.unwrap_or_default());
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
            if known.is_of(&stamps) {
                continue;
            }
            match known.note(stamps, read(files)) {
                Some(Ok(secret)) => changed.push((Name::clone(name), secret)),
                Some(Err(reason)) => {
                    tracing::warn!(%name, reason, "a secret in files cannot be used; what was there before stays");
                }
                None => {}
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
    known: Known<[Option<Stamp>; 3]>,
    generation: u64,
}

impl IdentityFiles {
    /// Follows these files: chain, key, roots.
    pub(crate) fn new(paths: [PathBuf; 3]) -> Self {
        Self { paths, known: Known::default(), generation: 0 }
    }

    /// The identity, if a file was replaced since the last look, or can be read at last.
    ///
    /// *Errors*: what is there now is none, or cannot be read for now; that is told once.
    pub(crate) fn look(&mut self) -> Option<Result<WorkloadIdentity, String>> {
        let stamps = [0, 1, 2].map(|at: usize| stamp(&self.paths[at]));
        if self.known.is_of(&stamps) {
            return None;
        }
        self.generation += 1;
        let [chain, key, roots] = &self.paths;
        let made = || -> Result<WorkloadIdentity, Unreadable> {
            let identity = WorkloadIdentity::from_pem(&text(chain)?, &text(key)?, &text(roots)?)?;
            Ok(WorkloadIdentity { generation: self.generation, ..identity })
        };
        let made = made();
        self.known.note(stamps, made)
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
    Ok(match files.ok_or(Unreadable::Name)? {
        Files::Certificate(chain, key) => {
            Secret::Certificate(Arc::new(KeyAndChain::from_pem(&text(chain.as_ref())?, &text(key.as_ref())?)?))
        }
        Files::Roots(roots) => anybody(TrustRoots::from_pem(&text(roots.as_ref())?)?),
        Files::System => anybody(TrustRoots::system().map_err(Unreadable::System)?),
    })
}

/// Anybody of these roots.
fn anybody(roots: TrustRoots) -> Secret {
    Secret::Roots(Arc::new(Trust::from(Arc::new(roots))))
}

fn text(path: &Path) -> Result<Vec<u8>, Unreadable> {
    std::fs::read(path).map_err(|error| Unreadable::File(path.display().to_string(), error))
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
    fn a_failure_that_may_pass_is_told_once_and_tried_again() {
        let failed = |code: i32| Err(Unreadable::File("a".to_owned(), std::io::Error::from_raw_os_error(code)));
        let (too_many_open, not_there) = (24, 2);
        let mut known: Known<u8> = Known::default();
        // stamps, what reading gives, whether something is answered, whether it is done with
        for (stamps, read, is_answered, is_done) in [
            (1, failed(too_many_open), true, false),
            (1, failed(too_many_open), false, false),
            (1, Ok(()), true, true),
            (2, failed(too_many_open), true, false),
            (2, failed(not_there), true, true),
            (3, failed(not_there), true, true),
            (4, Err(Unreadable::Name), true, true),
        ] {
            let case = format!("{stamps}: {read:?}");
            assert!(!known.is_of(&stamps), "{case}");
            assert_eq!(known.note(stamps, read).is_some(), is_answered, "{case}");
            assert_eq!(known.is_of(&stamps), is_done, "{case}");
        }
        let dir = tempfile::tempdir().unwrap();
        let mut files = IdentityFiles::new([(); 3].map(|()| dir.path().to_owned()));
        assert!(files.look().is_some_and(|read| read.is_err()), "a folder");
        assert!(files.look().is_none(), "it was told");
        assert!(files.known.stamps.is_none(), "and is tried again");
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

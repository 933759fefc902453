//! The mesh's folder on disk: who runs it, and the admitted objects.
//!
//! `objects.json` is a header line with length and checksum, then JSON. It is replaced as a whole
//! (written beside, flushed, renamed), so that a crash leaves the old or the new one, and what was
//! being written beside it, which the next one removes; one that is cut short or changed by hand is
//! told apart and never half used.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use serde_json::Value;

const MAGIC: &str = "lateen-objects-1";
const OBJECTS: &str = "objects.json";
const LOCK: &str = "lock";

/// Why the folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Somebody else runs the mesh of this folder.
    #[error("the mesh of {} runs already (process {pid}); stop it with `lateen down`, or give another --name", folder.display())]
    InUse {
        /// The folder.
        folder: PathBuf,
        /// Who.
        pid: String,
    },
    /// The folder cannot be made or written.
    #[error("cannot use the state folder {}: {reason}; make it writable, or give another --state-dir", folder.display())]
    Folder {
        /// The folder.
        folder: PathBuf,
        /// What the system said.
        reason: io::Error,
    },
    /// Whoever owns the folder could take the keys in it away and put others in their place.
    #[error("the state folder {} belongs to another user (uid {owner}); give another --state-dir", folder.display())]
    Foreign {
        /// The folder.
        folder: PathBuf,
        /// Whose it is.
        owner: u32,
    },
    /// The folder is in use for something else, which closing it to others would break.
    #[error("the state folder {} is open to others and holds other things; give a folder of the mesh's own as --state-dir", folder.display())]
    Shared {
        /// The folder.
        folder: PathBuf,
    },
    /// The saved objects are damaged.
    #[error("{} is damaged: {reason}; remove it to start from your manifests", file.display())]
    Damaged {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The objects cannot be saved.
    #[error("cannot save {}: {reason}; nothing was changed", file.display())]
    Save {
        /// The file.
        file: PathBuf,
        /// What the system said.
        reason: io::Error,
    },
}

/// The folder, held by one process at a time.
#[derive(Debug)]
pub struct StateDir {
    folder: PathBuf,
    /// Locked while this value lives.
    _lock: File,
}

impl StateDir {
    /// Makes the folder if needed and closes it to others (0700). One that belongs to somebody else, or
    /// that others use, stays as it is.
    pub fn prepare(folder: &Path) -> Result<(), StateError> {
        let failed = |reason| StateError::Folder { folder: folder.to_owned(), reason };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
        let meta = fs::metadata(folder).map_err(failed)?;
        let user = rustix::process::geteuid().as_raw();
        if meta.uid() != user {
            return Err(StateError::Foreign { folder: folder.to_owned(), owner: meta.uid() });
        }
        if meta.permissions().mode() & 0o077 == 0 {
            return Ok(());
        }
        // Others have a `lock` too: `/run` has a folder of that name.
        let has_ours = [LOCK, OBJECTS]
            .iter()
            .any(|name| fs::symlink_metadata(folder.join(name)).is_ok_and(|meta| meta.is_file() && meta.uid() == user));
        let is_ours = has_ours || fs::read_dir(folder).map_err(failed)?.next().is_none();
        if !is_ours {
            return Err(StateError::Shared { folder: folder.to_owned() });
        }
        fs::set_permissions(folder, fs::Permissions::from_mode(0o700)).map_err(failed)
    }

    /// [Prepares](Self::prepare) the folder and takes its lock.
    pub fn open(folder: &Path) -> Result<Self, StateError> {
        let failed = |reason| StateError::Folder { folder: folder.to_owned(), reason };
        Self::prepare(folder)?;
        let mut lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(folder.join(LOCK))
            .map_err(failed)?;
        match rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut pid = String::new();
                // Who it is only makes the message better.
                drop(lock.read_to_string(&mut pid));
                let pid = if pid.trim().is_empty() { "unknown".to_owned() } else { pid.trim().to_owned() };
                return Err(StateError::InUse { folder: folder.to_owned(), pid });
            }
            Err(errno) => return Err(failed(errno.into())),
        }
        crate::tolerate(fs::remove_file(Self::unfinished(folder)));
        lock.set_len(0)
            .and_then(|()| lock.rewind())
            .and_then(|()| lock.write_all(std::process::id().to_string().as_bytes()))
            .map_err(failed)?;
        Ok(Self { folder: folder.to_owned(), _lock: lock })
    }

    /// What whoever is killed while saving leaves in `folder`.
    pub fn unfinished(folder: &Path) -> PathBuf {
        folder.join(format!("{OBJECTS}.new"))
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.folder
    }

    /// The saved value, if one was saved.
    pub fn load(&self) -> Result<Option<Value>, StateError> {
        let file = self.folder.join(OBJECTS);
        let damaged = |reason: String| StateError::Damaged { file: file.clone(), reason };
        let bytes = match fs::read(&file) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(reason) => return Err(StateError::Folder { folder: self.folder.clone(), reason }),
        };
        let end = bytes.iter().position(|b| *b == b'\n').ok_or_else(|| damaged("it has no header".to_owned()))?;
        let header = String::from_utf8_lossy(&bytes[..end]);
        let body = &bytes[end + 1..];
        let mut words = header.split(' ');
        let (Some(MAGIC), Some(length), Some(sum), None) = (words.next(), words.next(), words.next(), words.next())
        else {
            return Err(damaged("its header is not ours".to_owned()));
        };
        if length.parse() != Ok(body.len()) {
            return Err(damaged(format!("it holds {} of {length} bytes", body.len())));
        }
        if checksum(body) != sum {
            return Err(damaged("its checksum does not fit".to_owned()));
        }
        serde_json::from_slice(body).map(Some).map_err(|error| damaged(error.to_string()))
    }

    /// Replaces the saved value.
    pub fn save(&self, value: &Value) -> Result<(), StateError> {
        let file = self.folder.join(OBJECTS);
        let beside = Self::unfinished(&self.folder);
        let body = value.to_string();
        let write = || -> io::Result<()> {
            let mut out = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
            writeln!(out, "{MAGIC} {} {}", body.len(), checksum(body.as_bytes()))?;
            out.write_all(body.as_bytes())?;
            out.sync_data()?;
            fs::rename(&beside, &file)
        };
        write().map_err(|reason| {
            // What is left of it would fill a full disk further.
            drop(fs::remove_file(&beside));
            StateError::Save { file: file.clone(), reason }
        })
    }
}

fn checksum(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes);
    digest.as_ref().iter().take(16).fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a string cannot fail");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("lateen-state-{name}-{}", std::process::id()));
        drop(fs::remove_dir_all(&folder));
        folder
    }

    #[test]
    fn saves_loads_and_detects_damage() {
        let folder = folder("damage");
        let state = StateDir::open(&folder).unwrap();
        assert!(state.load().unwrap().is_none());
        let value = serde_json::json!({"objects": [1, 2, 3]});
        state.save(&value).unwrap();
        assert_eq!(state.load().unwrap(), Some(value));
        assert_eq!(fs::metadata(folder.join(OBJECTS)).unwrap().permissions().mode() & 0o777, 0o600);
        let whole = fs::read(folder.join(OBJECTS)).unwrap();
        for damaged in [&whole[..whole.len() - 3], &whole[..5], &b"{}"[..]] {
            fs::write(folder.join(OBJECTS), damaged).unwrap();
            let error = state.load().unwrap_err().to_string();
            assert!(error.contains("damaged") && error.contains("remove it"), "{error}");
        }
        let mut changed = whole;
        *changed.last_mut().unwrap() = b' ';
        fs::write(folder.join(OBJECTS), changed).unwrap();
        assert!(state.load().unwrap_err().to_string().contains("checksum"));
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn what_was_being_saved_by_a_killed_one_goes() {
        let folder = tempfile::tempdir().unwrap();
        StateDir::open(folder.path()).unwrap().save(&serde_json::json!([1])).unwrap();
        fs::write(StateDir::unfinished(folder.path()), "half").unwrap();
        let state = StateDir::open(folder.path()).unwrap();
        assert!(!StateDir::unfinished(folder.path()).exists());
        assert_eq!(state.load().unwrap(), Some(serde_json::json!([1])));
    }

    #[test]
    fn a_folder_that_others_use_stays_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let mode = || fs::metadata(folder.path()).unwrap().permissions().mode() & 0o7777;
        let open_to_all = || fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o1777)).unwrap();
        open_to_all();
        fs::write(folder.path().join("of-somebody"), "x").unwrap();
        let error = StateDir::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains("holds other things") && error.contains("--state-dir"), "{error}");
        assert_eq!(mode(), 0o1777);
        fs::remove_file(folder.path().join("of-somebody")).unwrap();
        // What has our names but is not ours says nothing.
        fs::create_dir(folder.path().join(LOCK)).unwrap();
        std::os::unix::fs::symlink("/dev/null", folder.path().join(OBJECTS)).unwrap();
        assert!(matches!(StateDir::prepare(folder.path()), Err(StateError::Shared { .. })));
        assert_eq!(mode(), 0o1777);
        fs::remove_dir(folder.path().join(LOCK)).unwrap();
        fs::remove_file(folder.path().join(OBJECTS)).unwrap();
        drop(StateDir::open(folder.path()).unwrap());
        assert_eq!(mode(), 0o700);
        // It is known by its lock from then on.
        open_to_all();
        drop(StateDir::open(folder.path()).unwrap());
        assert_eq!(mode(), 0o700);
        // As root any folder can be written; as anybody else this one is root's.
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(folder.path(), Some(65_534), None).unwrap();
            let error = StateDir::open(folder.path()).unwrap_err().to_string();
            assert!(error.contains("belongs to another user (uid 65534)"), "{error}");
        }
    }

    #[test]
    fn one_process_at_a_time() {
        let folder = folder("lock");
        let first = StateDir::open(&folder).unwrap();
        let error = StateDir::open(&folder).unwrap_err().to_string();
        assert!(error.contains(&std::process::id().to_string()), "{error}");
        drop(first);
        StateDir::open(&folder).unwrap();
        fs::remove_dir_all(&folder).unwrap();
    }
}

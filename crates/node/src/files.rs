//! Manifests as a source of objects: files, folders, standard input.
//!
//! Files act as admission does: what cannot be read or admitted leaves the last good version in
//! place. An object that is gone from its file is gone from the mesh, once a second look agrees: editors
//! empty a file, or take it away for a moment, before they write it anew. While a file cannot be read or
//! parsed, or does not tell for certain which objects it holds (a slip in a kind or in metadata), nothing is
//! gone at all: what it holds is unknown, and may be what was moved into it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use api::{Kind, Positions};
use tokio::sync::watch;
use types::{Finding, NamespacedName, ObjectRef, Severity};

use crate::state::StateError;
use crate::store::{Action, Mode, Origin, Outcome, Store, is_permanent};

/// How often files are looked at. A look is one `stat` a file.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// A manifest larger than this is refused.
const TEXT_BYTES_MAX: u64 = 32 << 20;

/// Where manifests come from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Source {
    /// A file, or a folder with all `.yaml`, `.yml` and `.json` below it.
    Path(PathBuf),
    /// A text that was read once (standard input, a pipe), with its name.
    Text(Arc<str>, Arc<str>),
}

impl Source {
    /// What a path names. A file or folder is followed, also one that is yet to come; anything else
    /// gives its text but once, and is read here and now.
    pub fn open(path: &Path) -> io::Result<Self> {
        match fs::metadata(path) {
            Ok(meta) if !meta.is_file() && !meta.is_dir() => {
                let text = read_text(File::open(path)?)?;
                Ok(Self::Text(path.display().to_string().into(), text.into()))
            }
            _ => Ok(Self::Path(path.to_owned())),
        }
    }
}

/// All that a reader gives, as text.
///
/// *Errors*: it is longer than a manifest may be (32 MiB), or not UTF-8.
pub fn read_text(from: impl Read) -> io::Result<String> {
    let mut bytes = Vec::new();
    from.take(TEXT_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > TEXT_BYTES_MAX {
        let message = format!("it is larger than {} MiB", TEXT_BYTES_MAX >> 20);
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, message));
    }
    String::from_utf8(bytes).map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "it is not UTF-8 text"))
}

/// Manifests below a path.
#[derive(Debug, Default)]
pub struct Manifests {
    /// The path itself if it is no folder; else all `.yaml`, `.yml` and `.json` below it, in order
    /// within each folder.
    pub files: Vec<PathBuf>,
    /// What cannot be looked into.
    pub unreadable: Vec<(PathBuf, io::Error)>,
}

impl Manifests {
    /// Looks for them. Links are followed, and each folder is looked into once, however many lead to
    /// it. Hidden files, links that lead nowhere, and what is neither file nor folder are left out.
    pub fn below(path: &Path) -> Self {
        let mut found = Self::default();
        match fs::metadata(path) {
            Ok(meta) if meta.is_dir() => found.folder(path, &meta, &mut BTreeSet::new()),
            Ok(_) => found.files.push(path.to_owned()),
            Err(error) => found.unreadable.push((path.to_owned(), error)),
        }
        found
    }

    fn folder(&mut self, path: &Path, meta: &fs::Metadata, seen: &mut BTreeSet<(u64, u64)>) {
        if !seen.insert((meta.dev(), meta.ino())) {
            return;
        }
        let entries = fs::read_dir(path).and_then(|entries| {
            entries.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<Vec<PathBuf>>>()
        });
        let mut entries = match entries {
            Ok(entries) => entries,
            // It vanished meanwhile: then it is not one of ours.
            Err(error) if error.kind() == io::ErrorKind::NotFound && seen.len() > 1 => return,
            Err(error) => return self.unreadable.push((path.to_owned(), error)),
        };
        entries.sort();
        for entry in entries {
            let is_hidden = entry.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
            if is_hidden {
                continue;
            }
            match fs::metadata(&entry) {
                Ok(meta) if meta.is_dir() => self.folder(&entry, &meta, seen),
                Ok(meta) if meta.is_file() && is_manifest(&entry) => self.files.push(entry),
                // A dangling link, or one that leads to itself, is not one of ours either.
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) if error.raw_os_error() == Some(libc::ELOOP) => {}
                Err(error) => self.unreadable.push((entry, error)),
            }
        }
    }
}

fn is_manifest(path: &Path) -> bool {
    path.extension().is_some_and(|extension| ["yaml", "yml", "json"].iter().any(|wanted| extension == *wanted))
}

/// What a file is told apart by: it may be replaced by one of the same size and time.
type Stamp = Option<(u64, u64, (i64, i64), (i64, i64))>;

/// What an object is known by.
type Key = (Kind, NamespacedName);

/// How objects are taken that are gone from their files.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Absence {
    /// They go.
    Counts,
    /// They go if they were gone at the look before, too.
    CountsTwice,
}

/// Keeps a store at what files say.
#[derive(Debug)]
pub struct Files {
    sources: Vec<Source>,
    store: Arc<Store>,
    seen: Mutex<BTreeMap<PathBuf, Stamp>>,
    findings: Mutex<Vec<Finding>>,
    positions: Mutex<BTreeMap<ObjectRef, Positions>>,
    /// Refused because what they replace is still ending.
    waiting: Mutex<Vec<Key>>,
    /// Gone from their files at the last look.
    absent: Mutex<BTreeSet<Key>>,
    /// How often they were read.
    rounds: watch::Sender<u64>,
}

fn lock<T>(value: &Mutex<T>) -> MutexGuard<'_, T> {
    value.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Files {
    /// Nothing is read yet.
    pub fn new(sources: Vec<Source>, store: Arc<Store>) -> Self {
        Self {
            sources,
            store,
            seen: Mutex::default(),
            findings: Mutex::default(),
            positions: Mutex::default(),
            waiting: Mutex::default(),
            absent: Mutex::default(),
            rounds: watch::Sender::new(0),
        }
    }

    /// Adds file and line to a finding about an object of these files that has none: those of its
    /// field, or of the nearest parent that was written.
    pub fn place(&self, finding: &mut Finding) {
        let (None, Some(object)) = (&finding.position, &finding.object) else { return };
        finding.position = lock(&self.positions).get(object).map(|positions| positions.at(&finding.field));
    }

    /// What there is to say about the files as they are now.
    pub fn findings(&self) -> Vec<Finding> {
        lock(&self.findings).clone()
    }

    /// Reads everything and applies it, at once. What cannot be read is a finding.
    pub fn sync(&self) -> Result<Vec<Outcome>, StateError> {
        self.take(Absence::Counts)
    }

    fn take(&self, absence: Absence) -> Result<Vec<Outcome>, StateError> {
        let (paths, mut findings) = self.paths();
        let mut texts: Vec<(Arc<str>, String)> = Vec::new();
        let mut stamps = BTreeMap::new();
        for path in paths {
            stamps.insert(path.clone(), stamp(&path));
            match read(&path) {
                Ok(text) => texts.push((path.display().to_string().into(), text)),
                Err(error) => findings.push(unreadable(&path, &error)),
            }
        }
        // What cannot be read says nothing about what was removed.
        let mut incomplete: Vec<Arc<str>> =
            findings.iter().filter_map(|f| f.position.as_ref()).map(|p| Arc::clone(&p.file)).collect();
        for source in &self.sources {
            if let Source::Text(name, text) = source {
                texts.push((Arc::clone(name), text.to_string()));
            }
        }
        let mut documents = Vec::new();
        let mut positions = BTreeMap::new();
        let mut named: BTreeMap<ObjectRef, Arc<str>> = BTreeMap::new();
        let mut refused: Vec<ObjectRef> = Vec::new();
        for (file, text) in &texts {
            let read = api::parse_documents(file, text);
            if read.is_incomplete {
                incomplete.push(Arc::clone(file));
            }
            findings.extend(read.findings);
            for api::Refused { object, .. } in read.refused {
                named.entry(object.clone()).or_insert_with(|| Arc::clone(file));
                refused.push(object);
            }
            for parsed in read.objects {
                let reference = parsed.object.reference();
                if let Some(first) = named.get(&reference) {
                    findings.push(Finding {
                        code: api::codes::DUPLICATE.into(),
                        severity: Severity::Error,
                        object: Some(reference),
                        field: "".into(),
                        position: Some(parsed.positions.start()),
                        message: format!("the object is written twice: already in {first}").into(),
                        hint: "remove or rename one of the two; the first one holds".into(),
                    });
                    continue;
                }
                named.insert(reference.clone(), Arc::clone(file));
                positions.insert(reference, parsed.positions);
                documents.push(((*parsed.object.raw).clone(), Origin::File(Arc::clone(file))));
            }
        }
        let mut outcomes = self.store.apply(documents, Mode::Apply, false)?;
        for outcome in outcomes.iter().filter(|outcome| outcome.action == Action::Refused) {
            findings.extend(outcome.findings.iter().cloned());
            refused.extend(outcome.object.clone());
        }
        let is_lost = |file: &str| incomplete.iter().any(|lost| Path::new(file).starts_with(&**lost));
        let before = std::mem::take(&mut *lock(&self.absent));
        let is_gone = |(kind, key, file): &(Kind, NamespacedName, Arc<str>)| {
            !named.contains_key(&reference(*kind, key)) && !is_lost(file)
        };
        let gone: Vec<Key> =
            self.store.of_files().into_iter().filter(is_gone).map(|(kind, key, _)| (kind, key)).collect();
        let (gone, waits): (Vec<Key>, Vec<Finding>) = match incomplete.first() {
            Some(file) => (Vec::new(), wait_for_file(file, &gone).into_iter().collect()),
            None => self.without_cascades(gone, &refused, &named),
        };
        findings.extend(waits);
        let (gone, absent): (Vec<Key>, BTreeSet<Key>) = match absence {
            Absence::Counts => (gone, BTreeSet::new()),
            Absence::CountsTwice => {
                let (gone, absent): (Vec<Key>, Vec<Key>) = gone.into_iter().partition(|one| before.contains(one));
                (gone, absent.into_iter().collect())
            }
        };
        if let Err(error) = self.store.delete_all(&gone) {
            // The next look tries again.
            lock(&self.absent).extend(gone);
            return Err(error);
        }
        if gone.iter().any(|(kind, _)| *kind == Kind::Namespace) {
            // It took along what these files still have in it: the next look brings that back.
            stamps.clear();
        }
        *lock(&self.absent) = absent;
        let objects = self.store.objects();
        let refused = outcomes.iter().filter(|outcome| outcome.action == Action::Refused);
        let ending = refused.filter_map(|outcome| outcome.object.as_ref()).filter_map(|object| {
            let (kind, key) = (Kind::parse(&object.kind)?, NamespacedName::new(&object.namespace, &object.name));
            objects.find(kind, &key)?.meta.deleted.then_some((kind, key))
        });
        *lock(&self.waiting) = ending.collect();
        outcomes.extend(gone.iter().map(|(kind, key)| Outcome {
            object: Some(reference(*kind, key)),
            action: Action::Deleted,
            findings: Vec::new(),
        }));
        *lock(&self.positions) = positions;
        for finding in &mut findings {
            self.place(finding);
        }
        *lock(&self.findings) = findings;
        *lock(&self.seen) = stamps;
        self.rounds.send_modify(|rounds| *rounds += 1);
        Ok(outcomes)
    }

    /// What of `gone` may go, and what is to say about the rest: a namespace would take along the last good
    /// version of what is `refused` now, and no file could bring it back.
    fn without_cascades(
        &self,
        gone: Vec<Key>,
        refused: &[ObjectRef],
        named: &BTreeMap<ObjectRef, Arc<str>>,
    ) -> (Vec<Key>, Vec<Finding>) {
        let objects = self.store.objects();
        let has_last_good = |object: &ObjectRef| {
            let key = NamespacedName::new(&object.namespace, &object.name);
            Kind::parse(&object.kind).and_then(|kind| objects.find(kind, &key)).is_some_and(|live| !live.meta.deleted)
        };
        let (mut going, mut waits) = (Vec::new(), Vec::new());
        for (kind, key) in gone {
            let inside = |object: &&ObjectRef| *object.namespace == *key.name && has_last_good(object);
            let takes_along = kind == Kind::Namespace && !is_permanent(kind, &key.name);
            let held = if takes_along { refused.iter().find(inside) } else { None };
            let Some(inner) = held else {
                going.push((kind, key));
                continue;
            };
            waits.push(Finding {
                code: api::codes::DUBIOUS.into(),
                severity: Severity::Warning,
                object: Some(reference(kind, &key)),
                field: "".into(),
                position: named.get(inner).map(start_of),
                message: format!("gone from its file, but stays for {inner}, whose new version is refused").into(),
                hint: "mend or remove that one, and the namespace goes".into(),
            });
        }
        (going, waits)
    }

    /// Wakes whenever the files were read: there may be new findings, also where no object changed.
    pub fn rounds(&self) -> watch::Receiver<u64> {
        self.rounds.subscribe()
    }

    /// Looks until something changed, and applies it; for ever when nothing can change. Cancel safe: a
    /// look is taken whole or not at all.
    pub async fn changed(&self) -> Result<Vec<Outcome>, StateError> {
        if !self.sources.iter().any(|source| matches!(source, Source::Path(_))) {
            return std::future::pending().await;
        }
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let (paths, _) = self.paths();
            let now: BTreeMap<PathBuf, Stamp> = paths.into_iter().map(|path| (path.clone(), stamp(&path))).collect();
            let changed = *lock(&self.seen) != now;
            if changed || self.is_to_look_twice() || self.has_room() {
                return self.take(Absence::CountsTwice);
            }
        }
    }

    fn is_to_look_twice(&self) -> bool {
        !lock(&self.absent).is_empty()
    }

    /// Whether something that was in the way of an object is gone.
    fn has_room(&self) -> bool {
        let objects = self.store.objects();
        lock(&self.waiting).iter().any(|(kind, key)| objects.find(*kind, key).is_none())
    }

    /// All files, sorted within a folder, and what cannot be looked into.
    fn paths(&self) -> (Vec<PathBuf>, Vec<Finding>) {
        let mut found = Vec::new();
        let mut findings = Vec::new();
        for source in &self.sources {
            let Source::Path(path) = source else { continue };
            let below = Manifests::below(path);
            found.extend(below.files);
            findings.extend(below.unreadable.iter().map(|(path, error)| unreadable(path, error)));
        }
        (found, findings)
    }
}

fn reference(kind: Kind, key: &NamespacedName) -> ObjectRef {
    ObjectRef::new(kind.name(), &key.namespace, &key.name)
}

fn start_of(file: &Arc<str>) -> types::Position {
    types::Position { file: Arc::clone(file), line: 0, column: 0 }
}

/// That what is gone from its file may have been moved into one that tells nothing; `None` if nothing is gone.
fn wait_for_file(file: &Arc<str>, gone: &[Key]) -> Option<Finding> {
    let ((kind, key), others) = gone.split_first()?;
    let first = reference(*kind, key);
    let all = if others.is_empty() { first.to_string() } else { format!("{first} and {} more", others.len()) };
    Some(Finding {
        code: api::codes::SYNTAX.into(),
        severity: Severity::Warning,
        object: None,
        field: "".into(),
        position: Some(start_of(file)),
        message: format!("deletions wait for this file, which may hold what is gone from others: {all}").into(),
        hint: "mend or remove it, and what is in no file goes".into(),
    })
}

fn stamp(path: &Path) -> Stamp {
    let meta = fs::metadata(path).ok()?;
    Some((meta.len(), meta.ino(), (meta.mtime(), meta.mtime_nsec()), (meta.ctime(), meta.ctime_nsec())))
}

/// The text of a regular file. Whatever stands in the place of one is not waited for.
fn read(path: &Path) -> io::Result<String> {
    let without_waiting = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    let file = OpenOptions::new().read(true).custom_flags(without_waiting).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a file"));
    }
    read_text(file)
}

fn unreadable(path: &Path, error: &io::Error) -> Finding {
    Finding {
        code: api::codes::SYNTAX.into(),
        severity: Severity::Error,
        object: None,
        field: "".into(),
        position: Some(start_of(&path.display().to_string().into())),
        message: format!("cannot be read: {error}").into(),
        hint: "objects that came from it stay as they were".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(name: &str, value: &str) -> String {
        format!("apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: {name}}}\ndata: {{k: \"{value}\"}}\n---\n")
    }

    fn value(store: &Store, name: &str) -> Option<String> {
        let objects = store.objects();
        let (_, map) = objects.get::<api::k8s::ConfigMap>("default", name)?;
        map.data.get("k").cloned()
    }

    #[tokio::test]
    async fn a_pod_comes_back_when_the_one_before_has_ended() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("pod.yaml");
        let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec: {containers: [{name: c, image: i}]}\n";
        fs::write(&file, pod).unwrap();
        let store = Arc::new(Store::in_memory());
        let files = Files::new(vec![Source::Path(file)], Arc::clone(&store));
        assert_eq!(files.sync().unwrap()[0].action, Action::Created);
        let key = NamespacedName::new("default", "p");
        store.delete(Kind::Pod, &key).unwrap();
        assert_eq!(files.sync().unwrap()[0].action, Action::Refused);
        assert!(files.findings()[0].message.contains("still ending"));
        store.remove_pod(&key);
        assert_eq!(files.changed().await.unwrap()[0].action, Action::Created);
        assert!(files.findings().is_empty());
    }

    #[test]
    fn files_are_the_truth_and_bad_edits_are_not() {
        let folder = std::env::temp_dir().join(format!("lateen-files-{}", std::process::id()));
        drop(fs::remove_dir_all(&folder));
        fs::create_dir_all(folder.join("sub")).unwrap();
        let (one, two) = (folder.join("one.yaml"), folder.join("sub/two.yml"));
        fs::write(&one, map("a", "1") + &map("b", "1")).unwrap();
        fs::write(&two, map("c", "1")).unwrap();
        fs::write(folder.join("readme.txt"), "not: [a manifest").unwrap();
        let store = Arc::new(Store::in_memory());
        let files = Files::new(vec![Source::Path(folder.clone())], Arc::clone(&store));
        assert_eq!(files.sync().unwrap().len(), 3);
        assert!(files.findings().is_empty());

        // A refused object keeps its last version; its neighbour that is gone, goes.
        fs::write(&one, map("a", "2").replace("\ndata:", "\ndota:")).unwrap();
        files.sync().unwrap();
        assert_eq!(value(&store, "a").as_deref(), Some("1"));
        assert_eq!(value(&store, "b"), None);
        assert_eq!(files.findings().len(), 1);

        // A file that is no YAML any more deletes nothing.
        fs::write(&one, "a: [1").unwrap();
        files.sync().unwrap();
        assert_eq!(value(&store, "a").as_deref(), Some("1"));

        // The same object twice: the first file holds.
        fs::write(&one, map("a", "3") + &map("c", "9")).unwrap();
        files.sync().unwrap();
        assert_eq!((value(&store, "a").as_deref(), value(&store, "c").as_deref()), (Some("3"), Some("9")));
        assert_eq!(files.findings()[0].code.as_ref(), "LAT0005");

        fs::remove_file(&one).unwrap();
        files.sync().unwrap();
        assert_eq!((value(&store, "a"), value(&store, "c").as_deref()), (None, Some("1")));
        assert!(store.objects().find(Kind::ConfigMap, &NamespacedName::new("default", "c")).is_some());
        fs::remove_dir_all(&folder).unwrap();
    }

    fn folder_with(map: &str) -> (tempfile::TempDir, PathBuf, Arc<Store>) {
        let folder = tempfile::tempdir().unwrap();
        let manifests = folder.path().join("manifests");
        fs::create_dir(&manifests).unwrap();
        fs::write(manifests.join("a.yaml"), map).unwrap();
        (folder, manifests, Arc::new(Store::in_memory()))
    }

    #[test]
    fn a_folder_that_cannot_be_read_deletes_nothing() {
        let (_folder, manifests, store) = folder_with(&map("a", "1"));
        let files = Files::new(vec![Source::Path(manifests.clone())], Arc::clone(&store));
        files.sync().unwrap();
        let mut rounds = files.rounds();
        fs::rename(&manifests, manifests.with_extension("away")).unwrap();
        files.sync().unwrap();
        assert!(rounds.has_changed().unwrap(), "there is something to say, though no object changed");
        rounds.mark_unchanged();
        assert_eq!(value(&store, "a").as_deref(), Some("1"));
        let said = files.findings()[0].to_string();
        assert!(said.starts_with(&format!("{}: cannot be read", manifests.display())), "{said}");
        fs::rename(manifests.with_extension("away"), &manifests).unwrap();
        files.sync().unwrap();
        assert!(files.findings().is_empty());
    }

    #[tokio::test]
    async fn an_object_goes_when_two_looks_miss_it() {
        let (_folder, manifests, store) = folder_with(&map("a", "1"));
        let file = manifests.join("a.yaml");
        let files = Files::new(vec![Source::Path(manifests)], Arc::clone(&store));
        files.sync().unwrap();
        // An editor empties the file before it writes.
        fs::write(&file, "").unwrap();
        files.changed().await.unwrap();
        assert_eq!(value(&store, "a").as_deref(), Some("1"));
        fs::write(&file, map("a", "2")).unwrap();
        files.changed().await.unwrap();
        assert_eq!(value(&store, "a").as_deref(), Some("2"));
        fs::remove_file(&file).unwrap();
        assert!(files.changed().await.unwrap().is_empty());
        assert_eq!(value(&store, "a").as_deref(), Some("2"));
        let outcomes = files.changed().await.unwrap();
        assert_eq!((outcomes.len(), outcomes[0].action), (1, Action::Deleted));
        assert_eq!(value(&store, "a"), None);
    }

    #[tokio::test]
    async fn what_moves_into_a_broken_file_stays() {
        let (_folder, manifests, store) = folder_with(&(map("a", "1") + &map("b", "1")));
        let (from, to) = (manifests.join("a.yaml"), manifests.join("b.yaml"));
        let files = Files::new(vec![Source::Path(manifests.clone())], Arc::clone(&store));
        files.sync().unwrap();
        // Cut from the one, and pasted into the other with a slip.
        fs::write(&from, map("b", "1")).unwrap();
        fs::write(&to, map("a", "2").replace("{name: a}", "{name: a")).unwrap();
        files.changed().await.unwrap();
        files.sync().unwrap();
        Files::new(vec![Source::Path(manifests)], Arc::clone(&store)).sync().unwrap();
        assert_eq!(value(&store, "a").as_deref(), Some("1"));
        let said = |text: &str| files.findings().iter().any(|finding| finding.to_string().contains(text));
        assert!(said(&format!("{}: deletions wait for this file", to.display())), "{:?}", files.findings());
        // Mended: it goes on from there.
        fs::write(&to, map("a", "2")).unwrap();
        files.changed().await.unwrap();
        assert_eq!(value(&store, "a").as_deref(), Some("2"));
        assert!(files.findings().is_empty(), "{:?}", files.findings());
        // What waited goes when the file holds it no more.
        fs::write(&to, "a: [1").unwrap();
        fs::write(&from, "").unwrap();
        files.changed().await.unwrap();
        assert_eq!(value(&store, "b").as_deref(), Some("1"));
        fs::write(&to, "").unwrap();
        files.changed().await.unwrap();
        assert_eq!(files.changed().await.unwrap().len(), 2);
        assert_eq!((value(&store, "a"), value(&store, "b")), (None, None));
    }

    #[tokio::test]
    async fn a_slip_in_what_names_an_object_deletes_nothing() {
        let all = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n---\n".to_owned()
            + &map("a", "1").replace("{name: a}", "{name: a, namespace: shop}");
        let item = |text: &str| format!("- {}\n", text.trim().replace('\n', "\n  "));
        let items: String = all.split("---").filter(|text| !text.trim().is_empty()).map(item).collect();
        let list = format!("apiVersion: v1\nkind: List\nitems:\n{items}");
        for (good, from, to) in [
            (&all, "ConfigMap", "ConfigMpa"),
            (&all, "Namespace", "Namespce"),
            (&all, "apiVersion: v1\nkind: Namespace", "apiVersion: v2\nkind: Namespace"),
            (&all, "{name: shop}", "{name: Shop}"),
            (&all, "{name: a,", "{name: a, labels: [x],"),
            (&all, "namespace: shop", "namespce: shop"),
            (&all, "namespace: shop", "namespace: [shop]"),
            (&list, "items:", "item:"),
            (&list, "items:", "items: {}\nothers:"),
        ] {
            let (_folder, manifests, store) = folder_with(good);
            let files = Files::new(vec![Source::Path(manifests.clone())], Arc::clone(&store));
            files.sync().unwrap();
            let both = |at: &str| {
                let objects = store.objects();
                for (kind, namespace, name) in [(Kind::Namespace, "", "shop"), (Kind::ConfigMap, "shop", "a")] {
                    let live = objects.find(kind, &NamespacedName::new(namespace, name));
                    assert!(live.is_some_and(|live| !live.meta.deleted), "{to}: {kind} {name} is gone {at}");
                }
            };
            both("before the edit");
            fs::write(manifests.join("a.yaml"), good.replace(from, to)).unwrap();
            files.changed().await.unwrap();
            files.sync().unwrap();
            both("after it");
            assert!(files.findings().iter().any(|finding| finding.severity == Severity::Error), "{to}");
            Files::new(vec![Source::Path(manifests)], Arc::clone(&store)).sync().unwrap();
            both("after a restart");
        }
    }

    #[test]
    fn a_namespace_takes_no_last_good_version_along() {
        let in_shop = map("a", "1").replace("{name: a}", "{name: a, namespace: shop}");
        let (_folder, manifests, store) = folder_with(&in_shop);
        let (file, namespace) = (manifests.join("a.yaml"), manifests.join("ns.yaml"));
        fs::write(&namespace, "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n").unwrap();
        let files = Files::new(vec![Source::Path(manifests)], Arc::clone(&store));
        files.sync().unwrap();
        fs::remove_file(&namespace).unwrap();
        let (shop, a) = (NamespacedName::new("", "shop"), NamespacedName::new("shop", "a"));
        let has = |kind: Kind, key: &NamespacedName| store.objects().find(kind, key).is_some();
        for (broken, said) in [
            (in_shop.replace("\ndata:", "\ndota:"), "stays for ConfigMap shop/a"),
            (in_shop.replace("shop}", "shop"), "deletions wait for this file"),
        ] {
            fs::write(&file, broken).unwrap();
            files.sync().unwrap();
            assert!(has(Kind::Namespace, &shop) && has(Kind::ConfigMap, &a), "{said}");
            let findings = files.findings();
            assert!(findings.iter().any(|finding| finding.message.contains(said)), "{findings:?}");
        }
        fs::remove_file(&file).unwrap();
        files.sync().unwrap();
        assert!(!has(Kind::Namespace, &shop) && !has(Kind::ConfigMap, &a));
    }

    #[test]
    fn links_in_circles_and_pipes_hold_nobody_up() {
        use std::os::unix::fs::symlink;
        let (folder, manifests, store) = folder_with(&map("a", "1"));
        for name in ["one", "two"] {
            symlink(".", manifests.join(name)).unwrap();
        }
        symlink("nowhere", manifests.join("dangling.yaml")).unwrap();
        symlink("itself.yaml", manifests.join("itself.yaml")).unwrap();
        let pipe = manifests.join("pipe.yaml");
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RUSR).unwrap();
        assert_eq!(Manifests::below(&manifests).files, [manifests.join("a.yaml")]);
        let files = Files::new(vec![Source::Path(manifests), Source::Path(pipe)], Arc::clone(&store));
        files.sync().unwrap();
        assert_eq!(value(&store, "a").as_deref(), Some("1"));
        assert!(files.findings()[0].message.contains("not a file"), "{:?}", files.findings());
        drop(folder);
    }

    #[test]
    fn a_pipe_is_read_once_and_no_further_than_a_manifest_goes() {
        let (reader, mut writer) = io::pipe().unwrap();
        io::Write::write_all(&mut writer, map("a", "1").as_bytes()).unwrap();
        drop(writer);
        let path = PathBuf::from(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&reader)));
        let source = Source::open(&path).unwrap();
        assert!(matches!(&source, Source::Text(_, text) if **text == map("a", "1")));
        let store = Arc::new(Store::in_memory());
        let files = Files::new(vec![source], Arc::clone(&store));
        for _ in 0..2 {
            files.sync().unwrap();
            assert_eq!(value(&store, "a").as_deref(), Some("1"));
        }
        let error = Source::open(Path::new("/dev/zero")).unwrap_err();
        assert!(error.to_string().contains("larger than 32 MiB"), "{error}");
    }
}

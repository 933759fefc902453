//! Manifests as a source of objects: files, folders, standard input.
//!
//! Files act as admission does: what cannot be read or admitted leaves the last good version in
//! place. An object that is gone from its file is gone from the mesh.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use api::{Kind, Positions};
use types::{Finding, NamespacedName, ObjectRef, Severity};

use crate::state::StateError;
use crate::store::{Action, Mode, Origin, Outcome, Store};

/// How often files are looked at. A look is one `stat` a file.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// A manifest larger than this is refused.
const FILE_BYTES_MAX: u64 = 32 << 20;

/// Where manifests come from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Source {
    /// A file, or a folder with all `.yaml`, `.yml` and `.json` below it.
    Path(PathBuf),
    /// A text that was read once (standard input), with its name.
    Text(Arc<str>, Arc<str>),
}

type Stamp = (u64, Option<SystemTime>);

/// Keeps a store at what files say.
#[derive(Debug)]
pub struct Files {
    sources: Vec<Source>,
    store: Arc<Store>,
    seen: Mutex<BTreeMap<PathBuf, Stamp>>,
    findings: Mutex<Vec<Finding>>,
    positions: Mutex<BTreeMap<ObjectRef, Positions>>,
    /// Refused because what they replace is still ending.
    waiting: Mutex<Vec<(Kind, NamespacedName)>>,
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
        }
    }

    /// Adds file and line to a finding about an object of these files that has none: those of its
    /// field, or of the nearest parent that was written.
    pub fn place(&self, finding: &mut Finding) {
        let (None, Some(object)) = (&finding.position, &finding.object) else { return };
        let positions = self.positions.lock().unwrap_or_else(PoisonError::into_inner);
        finding.position = positions.get(object).map(|positions| positions.at(&finding.field));
    }

    /// What there is to say about the files as they are now.
    pub fn findings(&self) -> Vec<Finding> {
        self.findings.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads everything and applies it. Reads of a folder that fail are findings.
    pub fn sync(&self) -> Result<Vec<Outcome>, StateError> {
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
        for (file, text) in &texts {
            let read = api::parse_documents(file, text);
            if read.is_incomplete {
                incomplete.push(Arc::clone(file));
            }
            findings.extend(read.findings);
            for reference in read.refused {
                named.entry(reference).or_insert_with(|| Arc::clone(file));
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
        let outcomes = self.store.apply(documents, Mode::Apply, false)?;
        for outcome in outcomes.iter().filter(|outcome| outcome.action == Action::Refused) {
            findings.extend(outcome.findings.iter().cloned());
        }
        for (kind, key, file) in self.store.of_files() {
            let reference = ObjectRef::new(kind.name(), &key.namespace, &key.name);
            if !named.contains_key(&reference) && !incomplete.contains(&file) {
                self.store.delete(kind, &key)?;
            }
        }
        let objects = self.store.objects();
        let refused = outcomes.iter().filter(|outcome| outcome.action == Action::Refused);
        let ending = refused.filter_map(|outcome| outcome.object.as_ref()).filter_map(|object| {
            let (kind, key) = (Kind::parse(&object.kind)?, NamespacedName::new(&object.namespace, &object.name));
            objects.find(kind, &key)?.meta.deleted.then_some((kind, key))
        });
        *self.waiting.lock().unwrap_or_else(PoisonError::into_inner) = ending.collect();
        *self.positions.lock().unwrap_or_else(PoisonError::into_inner) = positions;
        for finding in &mut findings {
            self.place(finding);
        }
        *self.findings.lock().unwrap_or_else(PoisonError::into_inner) = findings;
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = stamps;
        Ok(outcomes)
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
            let changed = *self.seen.lock().unwrap_or_else(PoisonError::into_inner) != now;
            if changed || self.has_room() {
                return self.sync();
            }
        }
    }

    /// Whether something that was in the way of an object is gone.
    fn has_room(&self) -> bool {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let objects = self.store.objects();
        waiting.iter().any(|(kind, key)| objects.find(*kind, key).is_none())
    }

    /// All files, sorted within a folder, and folders that cannot be read.
    fn paths(&self) -> (Vec<PathBuf>, Vec<Finding>) {
        let mut found = Vec::new();
        let mut findings = Vec::new();
        for source in &self.sources {
            let Source::Path(path) = source else { continue };
            let mut below = Vec::new();
            if let Err(error) = collect(path, true, &mut below) {
                findings.push(unreadable(path, &error));
            }
            found.extend(below);
        }
        (found, findings)
    }
}

fn collect(path: &Path, is_named: bool, out: &mut Vec<PathBuf>) -> io::Result<()> {
    let meta = std::fs::metadata(path)?;
    if meta.is_dir() {
        let mut entries =
            std::fs::read_dir(path)?.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<Vec<_>>>()?;
        entries.sort();
        for entry in entries {
            let is_hidden = entry.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
            if !is_hidden {
                // A file that vanished meanwhile, or a dangling link, is not one of ours.
                drop(collect(&entry, false, out));
            }
        }
    } else if is_named || path.extension().is_some_and(|e| e == "yaml" || e == "yml" || e == "json") {
        out.push(path.to_owned());
    }
    Ok(())
}

fn stamp(path: &Path) -> Stamp {
    std::fs::metadata(path).map_or((0, None), |meta| (meta.len(), meta.modified().ok()))
}

fn read(path: &Path) -> io::Result<String> {
    if std::fs::metadata(path)?.len() > FILE_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("larger than {} MiB", FILE_BYTES_MAX >> 20)));
    }
    std::fs::read_to_string(path)
}

fn unreadable(path: &Path, error: &io::Error) -> Finding {
    Finding {
        code: api::codes::SYNTAX.into(),
        severity: Severity::Error,
        object: None,
        field: "".into(),
        position: Some(types::Position { file: path.display().to_string().into(), line: 0, column: 0 }),
        message: format!("cannot read {}: {error}", path.display()).into(),
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
        std::fs::write(&file, pod).unwrap();
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
        drop(std::fs::remove_dir_all(&folder));
        std::fs::create_dir_all(folder.join("sub")).unwrap();
        let (one, two) = (folder.join("one.yaml"), folder.join("sub/two.yml"));
        std::fs::write(&one, map("a", "1") + &map("b", "1")).unwrap();
        std::fs::write(&two, map("c", "1")).unwrap();
        std::fs::write(folder.join("readme.txt"), "not: [a manifest").unwrap();
        let store = Arc::new(Store::in_memory());
        let files = Files::new(vec![Source::Path(folder.clone())], Arc::clone(&store));
        assert_eq!(files.sync().unwrap().len(), 3);
        assert!(files.findings().is_empty());

        // A refused object keeps its last version; its neighbour that is gone, goes.
        std::fs::write(&one, map("a", "2").replace("\ndata:", "\ndota:")).unwrap();
        files.sync().unwrap();
        assert_eq!(value(&store, "a").as_deref(), Some("1"));
        assert_eq!(value(&store, "b"), None);
        assert_eq!(files.findings().len(), 1);

        // A file that is no YAML any more deletes nothing.
        std::fs::write(&one, "a: [1").unwrap();
        files.sync().unwrap();
        assert_eq!(value(&store, "a").as_deref(), Some("1"));

        // The same object twice: the first file holds.
        std::fs::write(&one, map("a", "3") + &map("c", "9")).unwrap();
        files.sync().unwrap();
        assert_eq!((value(&store, "a").as_deref(), value(&store, "c").as_deref()), (Some("3"), Some("9")));
        assert_eq!(files.findings()[0].code.as_ref(), "LAT0005");

        std::fs::remove_file(&one).unwrap();
        files.sync().unwrap();
        assert_eq!((value(&store, "a"), value(&store, "c").as_deref()), (None, Some("1")));
        assert!(store.objects().find(Kind::ConfigMap, &NamespacedName::new("default", "c")).is_some());
        std::fs::remove_dir_all(&folder).unwrap();
    }
}

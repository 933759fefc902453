//! Objects from files and folders.
//!
//! An edit that is not admitted leaves the last admitted version of its object in place; a file
//! that cannot be read far enough deletes nothing. Of two files that name one object the first, by
//! path, wins.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use api::{Change, ConfigSet, Object};
use notify::{RecursiveMode, Watcher as _};
use tokio::sync::mpsc;
use types::{Finding, ObjectRef, Severity};

use super::{Admitted, Publisher};

/// Quiet time after the last change before files are read again.
const SETTLE: Duration = Duration::from_millis(50);
/// Files are read again at least so often: some file systems tell nothing.
const RESCAN: Duration = Duration::from_secs(30);

pub(super) async fn run(paths: Vec<PathBuf>, publisher: Publisher) {
    let (wake, mut changes) = mpsc::channel::<()>(1);
    let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        if event.is_ok_and(|event| !event.kind.is_access()) {
            // Full means that a wake-up waits already; closed, that nobody listens.
            wake.try_send(()).unwrap_or_default();
        }
    });
    let mut watcher =
        watcher.inspect_err(|error| tracing::warn!(%error, "files are not watched, only read every 30 s")).ok();
    for path in &paths {
        // A file is replaced by renaming: watch the folder it is in.
        let folder = if path.is_dir() { path.as_path() } else { path.parent().unwrap_or(Path::new(".")) };
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        if let Some(watcher) = &mut watcher
            && let Err(error) = watcher.watch(folder, RecursiveMode::Recursive)
        {
            tracing::warn!(%error, path = %folder.display(), "not watched, only read every 30 s");
        }
    }
    let mut memory = Memory::default();
    loop {
        let paths = paths.clone();
        let Ok((read, next)) = tokio::task::spawn_blocking(move || {
            let mut memory = memory;
            (memory.read(&paths), memory)
        })
        .await
        else {
            return;
        };
        memory = next;
        if let Some(admitted) = read {
            publisher.send_replace(Some(Arc::new(admitted)));
        }
        tokio::select! {
            Some(()) = changes.recv() => {}
            () = tokio::time::sleep(RESCAN) => {}
            () = publisher.closed() => return,
        }
        while tokio::time::timeout(SETTLE, changes.recv()).await.is_ok_and(|change| change.is_some()) {}
    }
}

/// What was admitted, by the file it came from.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    texts: BTreeMap<PathBuf, String>,
    files: BTreeMap<PathBuf, File>,
    version: u64,
}

#[derive(Debug, Default)]
struct File {
    objects: BTreeMap<ObjectRef, Arc<Object>>,
    findings: Vec<Finding>,
}

impl Memory {
    /// Reads everything; `None` when nothing changed.
    pub(crate) fn read(&mut self, paths: &[PathBuf]) -> Option<Admitted> {
        let mut found = BTreeSet::new();
        let mut trouble = Vec::new();
        for path in paths {
            collect(path, &mut found, &mut trouble, 0);
        }
        let mut texts = BTreeMap::new();
        for path in found {
            match std::fs::read_to_string(&path) {
                Ok(text) => {
                    texts.insert(path, text);
                }
                Err(error) => trouble.push(unreadable(&path, &error)),
            }
        }
        // What cannot be read for the moment is not taken as deleted.
        if !trouble.is_empty() {
            for (path, text) in &self.texts {
                texts.entry(path.clone()).or_insert_with(|| text.clone());
            }
        }
        if texts == self.texts && self.version > 0 && trouble.is_empty() {
            return None;
        }
        self.files.retain(|path, _| texts.contains_key(path));
        for (path, text) in &texts {
            if self.texts.get(path) != Some(text) {
                let before = self.files.remove(path).unwrap_or_default();
                self.files.insert(path.clone(), read_file(path, text, before));
            }
        }
        self.texts = texts;
        self.version += 1;
        Some(self.admitted(trouble))
    }

    fn admitted(&self, mut findings: Vec<Finding>) -> Admitted {
        let mut configs = ConfigSet::default();
        let mut seen: BTreeMap<ObjectRef, &Path> = BTreeMap::new();
        for (path, file) in &self.files {
            findings.extend(file.findings.iter().cloned());
            for (reference, object) in &file.objects {
                if let Some(first) = seen.get(reference) {
                    findings.push(Finding {
                        code: "LAT0201".into(),
                        severity: Severity::Error,
                        object: Some(reference.clone()),
                        field: "".into(),
                        position: None,
                        message: format!("also in {}, which wins over {}", first.display(), path.display()).into(),
                        hint: "keep one of them".into(),
                    });
                } else {
                    seen.insert(reference.clone(), path);
                    configs.apply(&Change::Upsert(Arc::clone(object)));
                }
            }
        }
        Admitted { configs, findings, version: self.version }
    }
}

fn read_file(path: &Path, text: &str, before: File) -> File {
    let read = api::parse_documents(&path.display().to_string(), text);
    let mut objects: BTreeMap<ObjectRef, Arc<Object>> = BTreeMap::new();
    for parsed in read.objects {
        objects.insert(parsed.object.reference(), Arc::new(parsed.object));
    }
    for (reference, object) in before.objects {
        if read.is_incomplete || read.refused.iter().any(|refused| refused.object == reference) {
            objects.entry(reference).or_insert(object);
        }
    }
    File { objects, findings: read.findings }
}

fn collect(path: &Path, found: &mut BTreeSet<PathBuf>, trouble: &mut Vec<Finding>, depth: usize) {
    /// Deeper than any sane tree; a loop of links ends here.
    const DEPTH_MAX: usize = 16;
    if depth > DEPTH_MAX {
        return;
    }
    if !path.is_dir() {
        found.insert(path.to_owned());
        return;
    }
    match std::fs::read_dir(path) {
        Ok(entries) => {
            for entry in entries.flatten() {
                let path = entry.path();
                let is_hidden = entry.file_name().to_string_lossy().starts_with('.');
                let is_ours = path.extension().is_some_and(|extension| {
                    ["yaml", "yml", "json"].iter().any(|ours| extension.eq_ignore_ascii_case(ours))
                });
                if !is_hidden && (path.is_dir() || is_ours) {
                    collect(&path, found, trouble, depth + 1);
                }
            }
        }
        Err(error) => trouble.push(unreadable(path, &error)),
    }
}

fn unreadable(path: &Path, error: &std::io::Error) -> Finding {
    Finding {
        code: "LAT0202".into(),
        severity: Severity::Error,
        object: None,
        field: "".into(),
        position: None,
        message: format!("cannot read {}: {error}", path.display()).into(),
        hint: "what was read before stays in force".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(name: &str, port: u32) -> String {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\nspec:\n  ports:\n  - port: {port}\n    name: http\n---\n"
        )
    }

    fn names(admitted: &Admitted) -> Vec<String> {
        admitted.configs.iter().map(|object| object.reference().to_string()).collect()
    }

    fn port(admitted: &Admitted, name: &str) -> u64 {
        let object = admitted.configs.iter().find(|object| &*object.meta.name == name).unwrap();
        object.raw["spec"]["ports"][0]["port"].as_u64().unwrap()
    }

    #[test]
    fn files_act_as_admission() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("mesh.yaml");
        let mut memory = Memory::default();
        let paths = [dir.path().to_owned()];
        std::fs::write(&file, service("a", 80) + &service("b", 81)).unwrap();
        let first = memory.read(&paths).unwrap();
        assert_eq!(names(&first), ["Service default/a", "Service default/b"]);
        assert!(memory.read(&paths).is_none(), "nothing changed");
        // An invalid edit of `a` keeps `a`; `b` is edited, `c` is new.
        std::fs::write(&file, service("a", 99_999) + &service("b", 82) + &service("c", 83)).unwrap();
        let second = memory.read(&paths).unwrap();
        assert_eq!(names(&second), ["Service default/a", "Service default/b", "Service default/c"]);
        assert_eq!((port(&second, "a"), port(&second, "b")), (80, 82));
        assert!(second.findings.iter().any(|finding| finding.severity == Severity::Error));
        // What cannot be read deletes nothing.
        std::fs::write(&file, "a: [\n").unwrap();
        assert_eq!(names(&memory.read(&paths).unwrap()).len(), 3);
        // A file that is gone takes its objects along.
        std::fs::remove_file(&file).unwrap();
        let last = memory.read(&paths).unwrap();
        assert!(names(&last).is_empty() && last.version > second.version);
    }

    #[test]
    fn one_object_in_two_files() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("1.yaml"), service("a", 80)).unwrap();
        std::fs::write(dir.path().join("2.yaml"), service("a", 81)).unwrap();
        let admitted = Memory::default().read(&[dir.path().to_owned()]).unwrap();
        assert_eq!(port(&admitted, "a"), 80);
        assert!(admitted.findings.iter().any(|finding| &*finding.code == "LAT0201"));
    }
}

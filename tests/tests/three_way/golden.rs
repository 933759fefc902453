//! Cases that once showed a disagreement, as the shrinker left them: every run asks them again, first.
//!
//! One file each, in a folder of its kind below `golden/`. With the variable `LATEEN_GOLDEN` a shrunk case is
//! written there; without it, it is printed with the name that it would have.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// A case with what it needs to be asked again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Golden<C> {
    /// Who once said what.
    pub(crate) why: String,
    /// Of the run, whose mesh it takes.
    pub(crate) seed: u64,
    pub(crate) case: C,
}

/// Cases of one kind.
pub(crate) struct Folder(PathBuf);

impl Folder {
    pub(crate) fn of(kind: &str) -> Self {
        Self::at(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/three_way/golden")), kind)
    }

    fn at(golden: &Path, kind: &str) -> Self {
        Self(golden.join(kind))
    }

    /// All cases, by name; `show` changes a file's text before it is read.
    pub(crate) fn all<C: DeserializeOwned>(&self, show: impl Fn(String) -> String) -> Vec<Golden<C>> {
        let files = std::fs::read_dir(&self.0).unwrap_or_else(|error| panic!("{}: {error}", self.0.display()));
        let mut files: Vec<PathBuf> = files.map(|file| file.unwrap().path()).collect();
        files.sort();
        let read = |file: &PathBuf| {
            let text = show(std::fs::read_to_string(file).unwrap());
            serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
        };
        files.iter().map(read).collect()
    }

    /// Says what the shrinker left, and writes it down where the variable asks for it.
    pub(crate) fn keep<C: Serialize>(&self, name: &str, golden: &Golden<C>, hide: impl Fn(String) -> String) {
        let text = hide(serde_json::to_string_pretty(golden).unwrap());
        let file = self.0.join(format!("{}.json", file_name(name)));
        if std::env::var_os("LATEEN_GOLDEN").is_some() {
            write(&file, &text);
            println!("# written to {}", file.display());
        } else {
            println!("# for {} (LATEEN_GOLDEN=1 writes it):\n{text}", file.display());
        }
    }
}

fn write(file: &Path, text: &str) {
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    std::fs::write(file, format!("{text}\n")).unwrap();
}

/// Letters and digits, the rest as one dash each.
fn file_name(name: &str) -> String {
    let words = name.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    words.map(str::to_ascii_lowercase).collect::<Vec<_>>().join("-")
}

#[test]
fn what_is_written_is_asked_again() {
    let dir = tempfile::tempdir().unwrap();
    let folder = Folder::at(dir.path(), "kind");
    let golden =
        Golden { why: "lateen 1, envoy 2".to_owned(), seed: 3, case: serde_json::json!({ "token": "secret" }) };
    let hidden = serde_json::to_string_pretty(&golden).unwrap().replace("secret", "@TOKEN0@");
    write(&folder.0.join(format!("{}.json", file_name("status, lateen and envoy"))), &hidden);
    assert!(dir.path().join("kind/status-lateen-and-envoy.json").exists());
    assert_eq!(folder.all(|text| text.replace("@TOKEN0@", "secret")), [golden]);
}

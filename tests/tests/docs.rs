//! The pages say what is true: their manifests are admitted, and what `explain` and `validate` print
//! for them is what the pages show.
//!
//! A block of `yaml` that begins with the comment `# NAME.yaml` is the file of that name for the
//! commands of the same page; a block marked `yaml refused` shows a mistake. A `console` block shows
//! commands after `$ ` and what each prints; run are those that need no mesh.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use testkit::lateen;

/// One fenced block.
#[derive(Debug)]
struct Block {
    /// What stands behind the fence: the language, and more.
    info: String,
    /// Line of its first line in the page.
    line: usize,
    text: String,
}

/// One command of a console block, and what the page says that it prints.
#[derive(Debug, PartialEq)]
struct Shown {
    command: String,
    prints: String,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// README and every page of `docs`.
fn pages() -> Vec<PathBuf> {
    let entries = fs::read_dir(root().join("docs")).unwrap().map(|entry| entry.unwrap().path());
    let mut pages: Vec<PathBuf> = entries.filter(|path| path.extension().is_some_and(|ext| ext == "md")).collect();
    pages.push(root().join("README.md"));
    pages.sort();
    pages
}

fn blocks(page: &str) -> Vec<Block> {
    let mut blocks = Vec::new();
    let mut open: Option<Block> = None;
    for (number, line) in page.lines().enumerate() {
        match (&mut open, line.strip_prefix("```")) {
            (None, Some(info)) => {
                open = Some(Block { info: info.trim().to_owned(), line: number + 2, text: String::new() });
            }
            (Some(_), Some(_)) => blocks.extend(open.take()),
            (Some(block), None) => block.text += &format!("{line}\n"),
            (None, None) => {}
        }
    }
    assert!(open.is_none(), "a block has no end: {open:?}");
    blocks
}

fn shown(console: &str) -> Vec<Shown> {
    let mut all: Vec<Shown> = Vec::new();
    for line in console.lines() {
        match (line.strip_prefix("$ "), all.last_mut()) {
            (Some(command), _) => all.push(Shown { command: command.to_owned(), prints: String::new() }),
            (None, Some(last)) => last.prints += &format!("{line}\n"),
            (None, None) => panic!("a console block begins with a command: {line:?}"),
        }
    }
    all
}

/// Whether a command needs no mesh, and so can be tried here.
fn is_offline(command: &str) -> bool {
    ["lateen explain -f ", "lateen validate -f "].iter().any(|start| command.starts_with(start))
}

fn run(dir: &Path, command: &str) -> Output {
    let own = lateen().parent().unwrap();
    let path = format!("{}:{}", own.display(), std::env::var("PATH").unwrap_or_default());
    Command::new("sh").args(["-c", command]).current_dir(dir).env("PATH", path).output().unwrap()
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn every_manifest_is_admitted_but_those_that_show_a_mistake() {
    let mut tried = 0;
    for page in pages() {
        let dir = tempfile::tempdir().unwrap();
        for block in blocks(&fs::read_to_string(&page).unwrap()) {
            if block.info.split(' ').next() != Some("yaml") {
                continue;
            }
            fs::write(dir.path().join("block.yaml"), &block.text).unwrap();
            let output = run(dir.path(), "lateen validate -f block.yaml");
            let said = said(&output);
            let is_refused = block.info == "yaml refused";
            let place = format!("{}:{}", page.display(), block.line);
            assert_eq!(output.status.success(), !is_refused, "{place}: {said}");
            assert_eq!(said.contains("error") || said.contains("warning"), is_refused, "{place}: {said}");
            tried += 1;
        }
    }
    assert!(tried > 15, "only {tried} manifests were found");
}

#[test]
fn commands_that_need_no_mesh_print_what_the_pages_show() {
    let mut tried = 0;
    for page in pages() {
        let dir = tempfile::tempdir().unwrap();
        let blocks = blocks(&fs::read_to_string(&page).unwrap());
        for block in &blocks {
            let name = block.text.lines().next().and_then(|line| line.strip_prefix("# "));
            if let Some(name) = name.filter(|name| {
                block.info.starts_with("yaml") && Path::new(name).extension().is_some_and(|end| end == "yaml")
            }) {
                fs::write(dir.path().join(name), &block.text).unwrap();
                // One that also lies beside the pages, to be run from there, is the same.
                if let Ok(file) = fs::read_to_string(root().join("docs").join(name)) {
                    assert_eq!(block.text, file, "{}:{}", page.display(), block.line);
                }
            }
        }
        for block in blocks.iter().filter(|block| block.info == "console") {
            for Shown { command, prints } in shown(&block.text) {
                if !is_offline(&command) {
                    continue;
                }
                let said = said(&run(dir.path(), &command));
                assert_eq!(said.trim_end(), prints.trim_end(), "{}:{}: {command}", page.display(), block.line);
                tried += 1;
            }
        }
    }
    assert!(tried > 5, "only {tried} commands were found");
}

#[test]
fn pages_are_taken_apart() {
    let page = "a\n```yaml\n# x.yaml\na: b\n```\n\n```console\n$ one\n1\n\n$ two\n```\n";
    let blocks = blocks(page);
    assert_eq!(blocks.iter().map(|b| (b.info.as_str(), b.line)).collect::<Vec<_>>(), [("yaml", 3), ("console", 8)]);
    let shown = shown(&blocks[1].text);
    assert_eq!(shown[0], Shown { command: "one".into(), prints: "1\n\n".into() });
    assert_eq!(shown[1], Shown { command: "two".into(), prints: String::new() });
}

/// Every link to a file of the tree leads to one.
#[test]
fn links_lead_somewhere() {
    let further = ["ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"].map(|name| root().join(name));
    let mut wrong = Vec::new();
    for page in pages().iter().chain(&further) {
        let text = fs::read_to_string(page).unwrap();
        for rest in text.split("](").skip(1) {
            let target = rest.split([')', '#']).next().unwrap_or_default();
            if target.is_empty() || target.contains("://") || target.starts_with("mailto:") {
                continue;
            }
            if !page.parent().unwrap().join(target).exists() {
                wrong.push(format!("{}: {target}", page.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

//! The pages say what is true: their manifests are admitted, and what `explain` and `validate` print
//! for them is what the pages show.
//!
//! A block of `yaml` that begins with the comment `# NAME.yaml` is the file of that name for the
//! commands of the same page; a block marked `yaml refused` shows a mistake. A `console` block shows
//! commands after `$ ` and what each prints. Those that need no mesh must print just that; the others are run
//! one after the other against a demo, and print it but for what differs from mesh to mesh.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use testkit::{Setup, lateen};

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

/// A shell in a folder, with `lateen` on its path.
fn shell(dir: &Path, program: &str) -> Command {
    let own = lateen().parent().unwrap();
    let path = format!("{}:{}", own.display(), std::env::var("PATH").unwrap_or_default());
    let mut command = Command::new(program);
    command.current_dir(dir).env("PATH", path).stdin(Stdio::null());
    command
}

fn run(dir: &Path, command: &str) -> Output {
    shell(dir, "sh").args(["-c", command]).output().unwrap()
}

/// The files of a page, where its commands find them.
fn write_files(dir: &Path, page: &Path, blocks: &[Block]) {
    for block in blocks {
        let name = block.text.lines().next().and_then(|line| line.strip_prefix("# "));
        if let Some(name) = name.filter(|name| {
            block.info.starts_with("yaml") && Path::new(name).extension().is_some_and(|end| end == "yaml")
        }) {
            fs::write(dir.join(name), &block.text).unwrap();
            // One that also lies beside the pages, to be run from there, is the same.
            if let Ok(file) = fs::read_to_string(root().join("docs").join(name)) {
                assert_eq!(block.text, file, "{}:{}", page.display(), block.line);
            }
        }
    }
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
        write_files(dir.path(), &page, &blocks);
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

/// Ends a mesh that a page started, whatever became of the test.
struct Down<'a>(&'a Path);

impl Drop for Down<'_> {
    fn drop(&mut self) {
        _ = run(self.0, "lateen down --name shop --state-dir shop");
    }
}

/// A command as it is typed here: other ports, another place for a second mesh, an end for what follows a log,
/// patience with a busy machine.
/// `None`: it builds or starts what runs already, or needs a program that is not everywhere.
fn typed(command: &str, http: u16, https: u16) -> Option<String> {
    if ["cargo ", "export PATH", "lateen demo", "openssl "].iter().any(|start| command.starts_with(start)) {
        return None;
    }
    let command = command.replace("--name shop", "--name shop --state-dir shop");
    let command = command.replace("lateen apply ", "lateen apply --timeout 90 ");
    let command = command.replace(":8080", &format!(":{http}")).replace(":8443", &format!(":{https}"));
    Some(if command.starts_with("lateen logs -f") {
        format!("timeout 60 grep -m 1 via_upstream < <({command} 2>/dev/null)")
    } else {
        command
    })
}

/// A line without what differs from one mesh to the next: names of pods, addresses, counts, times, widths.
fn shape(line: &str) -> String {
    let is_hash = |part: &str, length: usize| {
        part.len() == length && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
    };
    let without_hash = |word: &str| {
        let mut out: Vec<&str> = Vec::new();
        let mut parts = word.split('-').peekable();
        while let Some(part) = parts.next() {
            let end = |c: char| !c.is_ascii_alphanumeric();
            let next = parts.peek().map(|next| next.split(end).next().unwrap_or_default());
            if is_hash(part, 10) && next.is_some_and(|next| is_hash(next, 5)) {
                out.extend(parts.next().map(|next| &next[5..]));
            } else {
                out.push(part);
            }
        }
        out.join("-")
    };
    let is_number = |part: &str| part.len() > 3 && part.contains('.') && part.parse::<f64>().is_ok();
    // An access log: when and through whom is its own affair.
    let line = line.strip_prefix('[').and_then(|rest| rest.split_once("] ")).map_or(line, |(_, rest)| rest);
    let line = line.split_once(" via_upstream").map_or(line, |(before, _)| before);
    let words = line.split_whitespace().enumerate().map(|(at, word)| {
        let bare = word.trim_start_matches("0m").trim_end_matches('s');
        if is_number(bare) {
            "TIME".to_owned()
        } else if at == 0 && word.bytes().all(|b| b.is_ascii_digit()) && line.starts_with(' ') {
            "COUNT".to_owned()
        } else if let Some((_, port)) = word.strip_prefix("10.77.0.").and_then(|rest| rest.split_once(':')) {
            format!("ADDRESS:{port}")
        } else {
            word.split('/').map(without_hash).collect::<Vec<_>>().join("/")
        }
    });
    words.collect::<Vec<_>>().join(" ")
}

#[test]
fn commands_of_a_running_demo_print_what_the_pages_show() {
    let mut tried = 0;
    for page in pages() {
        let blocks = blocks(&fs::read_to_string(&page).unwrap());
        let consoles = blocks.iter().filter(|block| block.info == "console").flat_map(|block| shown(&block.text));
        let online: Vec<Shown> = consoles.filter(|shown| !is_offline(&shown.command)).collect();
        if online.is_empty() {
            continue;
        }
        let mesh = Setup::demo("pages").start();
        let dir = tempfile::tempdir().unwrap();
        let _down = Down(dir.path());
        write_files(dir.path(), &page, &blocks);
        let pair = rcgen::generate_simple_self_signed(["shop.localhost".to_owned()]).unwrap();
        fs::write(dir.path().join("cert.pem"), pair.cert.pem()).unwrap();
        fs::write(dir.path().join("key.pem"), pair.signing_key.serialize_pem()).unwrap();
        // One shell, so that a variable of one command is there for the next.
        let commands: Vec<(String, &Shown)> = online
            .iter()
            .filter_map(|shown| Some((typed(&shown.command, mesh.http.port(), mesh.https.port())?, shown)))
            .collect();
        let mut script = "exec 2>&1\n".to_owned();
        for (at, (command, _)) in commands.iter().enumerate() {
            script += &format!("echo '#### {at}'\n{command}\necho\n");
        }
        fs::write(dir.path().join("commands"), script).unwrap();
        let mut bash = shell(dir.path(), "bash");
        let output = bash.arg("commands").env("LATEEN_STATE_DIR", mesh.state_dir()).output().unwrap();
        let all = said(&output);
        for (at, (command, shown)) in commands.iter().enumerate() {
            let from = all.split_once(&format!("#### {at}\n")).map(|(_, rest)| rest);
            let printed = from.and_then(|rest| rest.split("#### ").next()).unwrap_or_default();
            let printed: Vec<String> = printed.lines().map(shape).collect();
            for line in shown.prints.lines().filter(|line| !line.trim().is_empty() && *line != "...") {
                let line = shape(&typed(line, mesh.http.port(), mesh.https.port()).unwrap_or_default());
                assert!(printed.contains(&line), "{}: {command}: {line:?} is not in {printed:#?}", page.display());
            }
            assert!(
                !shown.prints.is_empty() || !printed.iter().any(|line| line.starts_with("error")),
                "{}: {command}: {printed:#?}",
                page.display()
            );
            tried += 1;
        }
    }
    assert!(tried > 50, "only {tried} commands were found");
}

#[test]
fn lines_have_shapes() {
    for (one, other) in [
        ("1. bookinfo/reviews-v3-9gfcskxg4v-xpqhj inbound", "1. bookinfo/reviews-v3-tqtxk7r5fw-rfzsb inbound"),
        ("10.77.0.13:9080   HEALTHY   OK", "10.77.0.5:9080 HEALTHY OK"),
        ("     93 reviews-v1", "      8 reviews-v1"),
        ("504 after 0.509645 s", "504 after 0.612000 s"),
        ("real\t0m6.051s", "real\t0m6.951s"),
        ("details-v1-t8bsjkh49m-2746q.bookinfo  Kubernetes", "details-v1-82nhndwxvv-zg8dc.bookinfo Kubernetes"),
    ] {
        assert_eq!(shape(one), shape(other));
    }
    for (one, other) in [("200", "403"), ("reviews-v1", "reviews-v2"), ("10.77.0.1:80 OK", "10.77.0.1:80 FAILED")] {
        assert_ne!(shape(one), shape(other));
    }
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

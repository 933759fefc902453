//! The rules of the house that a compiler does not check.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

/// Who may depend on whom. A new edge is a change to this list, argued in its commit.
const EDGES: &[(&str, &[&str])] = &[
    ("types", &[]),
    ("api", &["types"]),
    ("telemetry", &["types"]),
    ("http1", &["types"]),
    ("capture", &["types"]),
    ("samples", &[]),
    // proto names the type URLs that types declares.
    ("proto", &["types"]),
    ("engine", &["proto", "types"]),
    ("mesh", &["api", "types"]),
    ("compile", &["mesh", "api", "proto", "types"]),
    // explain reads config dumps, which proto::json turns into messages; which fields end at a hop is http1's to say.
    ("explain", &["compile", "engine", "http1", "mesh", "api", "proto", "types"]),
    ("identity", &["proto", "types"]),
    ("xds", &["types"]),
    ("workers", &["engine", "http1", "identity", "telemetry", "types"]),
    ("proxy", &["workers", "engine", "identity", "xds", "proto", "telemetry", "types"]),
    ("node", &["api", "capture", "samples", "types"]),
    ("discovery", &["explain", "compile", "mesh", "api", "identity", "xds", "proto", "telemetry", "types"]),
];

/// Crates that nothing but programs and tests depends on: they may depend on everything.
const TOP: &[&str] = &["fuzzing", "lateen", "testkit"];

/// Crates without I/O, clock, randomness and environment.
const PURE: &[&str] = &["types", "api", "mesh", "compile", "engine", "explain", "http1"];

/// What a pure crate may not depend on, and not name.
const PURE_BANS: &[&str] = &["tokio", "hyper", "rustix", "socket2", "notify"];
const PURE_WORDS: &[&str] = &[
    "std::fs",
    "std::net::TcpStream",
    "std::net::TcpListener",
    "std::env::",
    "SystemTime::now",
    "Instant::now",
    "std::process",
];

/// Third-party crates that must not be linked.
const DENIED: &[&str] = &["ring", "openssl", "openssl-sys", "native-tls", "serde_yaml", "serde_yml", "backoff"];

/// Checks the tree; lists everything that is wrong.
pub(crate) fn check(root: &Path) -> Result<()> {
    let mut wrong = Vec::new();
    for (name, allowed) in EDGES {
        check_edges(root, name, allowed, &mut wrong)?;
    }
    for name in PURE {
        check_words(root, &root.join("crates").join(name).join("src"), &mut wrong)?;
    }
    check_dependencies(root, &mut wrong)?;
    check_tree(root, &mut wrong)?;
    if wrong.is_empty() {
        return Ok(());
    }
    bail!("tidy:\n  {}", wrong.join("\n  "));
}

/// Names in `[dependencies]` and `[build-dependencies]`.
fn dependencies(manifest: &str) -> BTreeSet<String> {
    let mut out = in_section(manifest, "dependencies");
    out.extend(in_section(manifest, "build-dependencies"));
    out
}

/// Names in a section of a manifest, whatever the target.
fn in_section(manifest: &str, section: &str) -> BTreeSet<String> {
    let mut inside = false;
    let mut out = BTreeSet::new();
    for line in manifest.lines().map(str::trim) {
        if let Some(title) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            inside = title == section || (title.starts_with("target.") && title.ends_with(&format!(".{section}")));
        } else if inside && !line.is_empty() && !line.starts_with('#') {
            let end = line.find(['.', ' ', '=']).unwrap_or(line.len());
            out.insert(line[..end].to_owned());
        }
    }
    out
}

fn check_edges(root: &Path, name: &str, allowed: &[&str], wrong: &mut Vec<String>) -> Result<()> {
    let path = root.join("crates").join(name).join("Cargo.toml");
    let manifest = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let depends = dependencies(&manifest);
    for (ours, _) in EDGES {
        if depends.contains(*ours) && !allowed.contains(ours) {
            wrong.push(format!("{name} must not depend on {ours} (xtask/src/tidy.rs lists the edges)"));
        }
    }
    for listed in allowed.iter().filter(|listed| !depends.contains(**listed)) {
        wrong.push(format!("{name} may depend on {listed} and does not: take the edge off the list"));
    }
    for only_at_the_top in ["anyhow", "clap", "lateen", "testkit"] {
        if depends.contains(only_at_the_top) {
            wrong.push(format!("{name} must not depend on {only_at_the_top}"));
        }
    }
    if PURE.contains(&name) {
        for banned in PURE_BANS.iter().filter(|banned| depends.contains(**banned)) {
            wrong.push(format!("{name} is pure and must not depend on {banned}"));
        }
    }
    Ok(())
}

fn check_words(root: &Path, folder: &Path, wrong: &mut Vec<String>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            check_words(root, &path, wrong)?;
            continue;
        }
        if path.extension().is_none_or(|extension| extension != "rs")
            || path.file_name().is_some_and(|name| name == "tests.rs" || name == "testing.rs")
        {
            continue;
        }
        let text = fs::read_to_string(&path)?;
        for (number, line) in code(&text).filter(|(_, line)| !line.trim_start().starts_with("//")) {
            for word in PURE_WORDS.iter().filter(|word| line.contains(**word)) {
                let shown = path.strip_prefix(root).unwrap_or(&path).display();
                wrong.push(format!("{shown}:{}: a pure crate names {word}", number + 1));
            }
        }
    }
    Ok(())
}

/// The numbered lines of a file, from 0, without its tests, which may do what the code may not: a module of
/// their own stands last, one in another file anywhere.
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut lines = text.lines().enumerate().peekable();
    std::iter::from_fn(move || {
        while let Some((number, line)) = lines.next() {
            if line.trim() != "#[cfg(test)]" {
                return Some((number, line));
            }
            if lines.peek().is_some_and(|(_, next)| next.starts_with("mod ") && next.ends_with('{')) {
                return None;
            }
            lines.next();
        }
        None
    })
}

/// Every crate has its place among the edges, and names what it depends on somewhere.
fn check_dependencies(root: &Path, wrong: &mut Vec<String>) -> Result<()> {
    let mut folders = vec![root.join("bench"), root.join("tests"), root.join("xtask")];
    for entry in fs::read_dir(root.join("crates"))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if !TOP.contains(&&*name) && !EDGES.iter().any(|(listed, _)| *listed == name) {
            wrong.push(format!("crates/{name} is not among the edges (xtask/src/tidy.rs lists them)"));
        }
        folders.push(entry.path());
    }
    for folder in folders {
        let manifest = fs::read_to_string(folder.join("Cargo.toml"))?;
        let mut named = BTreeSet::new();
        words(&folder, &mut named)?;
        for section in ["dependencies", "dev-dependencies", "build-dependencies"] {
            for dependency in in_section(&manifest, section) {
                if !named.contains(&dependency.replace('-', "_")) {
                    let shown = folder.strip_prefix(root).unwrap_or(&folder).display();
                    wrong.push(format!("{shown} depends on {dependency} and does not name it"));
                }
            }
        }
    }
    Ok(())
}

/// Every word of the Rust files in a folder.
fn words(folder: &Path, found: &mut BTreeSet<String>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            words(&path, found)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path)?;
            let is_word = |c: char| c.is_alphanumeric() || c == '_';
            found.extend(text.split(|c| !is_word(c)).filter(|word| !word.is_empty()).map(str::to_owned));
        }
    }
    Ok(())
}

/// Cargo.lock also lists optional crates nobody enables, so the resolved tree is asked.
fn check_tree(root: &Path, wrong: &mut Vec<String>) -> Result<()> {
    let tree = std::process::Command::new("cargo")
        .args(["tree", "--workspace", "--target", "all", "--prefix", "none", "--format", "{p}", "--locked"])
        .current_dir(root)
        .output()
        .context("running cargo tree")?;
    let text = String::from_utf8_lossy(&tree.stdout);
    if text.is_empty() {
        wrong.push(format!("cargo tree said nothing: {}", String::from_utf8_lossy(&tree.stderr).trim()));
    }
    for denied in DENIED {
        if text.lines().any(|line| line.split(' ').next() == Some(denied)) {
            wrong.push(format!("{denied} must not be in the dependency tree"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_are_no_code() {
        let text = "use a;\n#[cfg(test)]\nmod tests;\nfn code() {}\n#[cfg(test)]\nmod more {\n    fn test() {}\n}\n";
        assert_eq!(code(text).collect::<Vec<_>>(), [(0, "use a;"), (3, "fn code() {}")]);
    }

    #[test]
    fn dev_dependencies_are_free() {
        let manifest = "[dependencies]\napi.workspace = true\ntokio = { version = \"1\" }\n\n[dev-dependencies]\nanyhow.workspace = true\n";
        assert_eq!(dependencies(manifest).into_iter().collect::<Vec<_>>(), ["api", "tokio"]);
    }
}

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
    ("samples", &["types"]),
    // proto names the type URLs that types declares.
    ("proto", &["types"]),
    ("engine", &["proto", "types"]),
    ("mesh", &["api", "types"]),
    ("compile", &["mesh", "api", "proto", "types"]),
    // explain reads config dumps, which proto::json turns into messages; which fields end at a hop is http1's to say.
    ("explain", &["compile", "engine", "http1", "mesh", "api", "proto", "types"]),
    ("identity", &["proto", "telemetry", "types"]),
    ("xds", &["proto", "telemetry", "types"]),
    ("proxy", &["engine", "http1", "identity", "xds", "proto", "telemetry", "types"]),
    ("node", &["api", "capture", "samples", "telemetry", "types"]),
    ("discovery", &["explain", "compile", "mesh", "api", "identity", "xds", "proto", "telemetry", "types"]),
];

/// Crates without I/O, clock, randomness and environment.
const PURE: &[&str] = &["types", "api", "mesh", "compile", "engine", "explain", "http1"];

/// What a pure crate may not depend on, and not name.
const PURE_BANS: &[&str] = &["tokio", "hyper", "rustix", "socket2", "notify", "hickory-resolver"];
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
    check_tree(root, &mut wrong)?;
    if wrong.is_empty() {
        return Ok(());
    }
    bail!("tidy:\n  {}", wrong.join("\n  "));
}

/// Names in `[dependencies]` (not the dev ones).
fn dependencies(manifest: &str) -> BTreeSet<String> {
    let mut inside = false;
    let mut out = BTreeSet::new();
    for line in manifest.lines().map(str::trim) {
        if line.starts_with('[') {
            inside = line == "[dependencies]" || (line.starts_with("[target.") && line.ends_with(".dependencies]"));
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
        // Tests stand last in a file and may do what the code may not.
        let code = text.split("#[cfg(test)]").next().unwrap_or_default();
        for (number, line) in code.lines().enumerate().filter(|(_, line)| !line.trim_start().starts_with("//")) {
            for word in PURE_WORDS.iter().filter(|word| line.contains(**word)) {
                let shown = path.strip_prefix(root).unwrap_or(&path).display();
                wrong.push(format!("{shown}:{}: a pure crate names {word}", number + 1));
            }
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
    fn dev_dependencies_are_free() {
        let manifest = "[dependencies]\napi.workspace = true\ntokio = { version = \"1\" }\n\n[dev-dependencies]\nanyhow.workspace = true\n";
        assert_eq!(dependencies(manifest).into_iter().collect::<Vec<_>>(), ["api", "tokio"]);
    }
}

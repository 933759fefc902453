//! `docs/parity.md`: behaviour rows and the tests that show them.
//!
//! A row is `| behaviour | test |`; the test is `not yet`, or one or more names in backticks, each
//! the name of a test function somewhere in the tree.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

/// Checks that every test named in the page exists, and prints the tally.
pub(crate) fn check(root: &Path) -> Result<()> {
    let page = fs::read_to_string(root.join("docs/parity.md")).context("reading docs/parity.md")?;
    let mut tests = BTreeSet::new();
    for folder in ["crates", "tests", "xtask"] {
        collect(&root.join(folder), &mut tests)?;
    }
    let (mut shown, mut open, mut wrong) = (0, 0, Vec::new());
    for (number, line) in page.lines().enumerate() {
        let cells: Vec<&str> = line.trim().trim_matches('|').split('|').map(str::trim).collect();
        if !line.starts_with('|') || cells.len() < 2 || cells[0].starts_with("---") || cells[cells.len() - 1] == "test"
        {
            continue;
        }
        let cell = cells[cells.len() - 1];
        if cell.starts_with("not yet") {
            open += 1;
            continue;
        }
        let names: Vec<&str> = cell.split('`').skip(1).step_by(2).collect();
        if names.is_empty() {
            wrong.push(format!("docs/parity.md:{}: neither a test in backticks nor \"not yet\"", number + 1));
        }
        for name in names.iter().filter(|name| !tests.contains(**name)) {
            wrong.push(format!("docs/parity.md:{}: there is no test `{name}`", number + 1));
        }
        shown += 1;
    }
    if !wrong.is_empty() {
        bail!("parity:\n  {}", wrong.join("\n  "));
    }
    #[expect(clippy::print_stdout, reason = "a chore's answer")]
    {
        println!("parity: {shown} rows shown by tests, {open} not yet");
    }
    Ok(())
}

fn collect(folder: &Path, tests: &mut BTreeSet<String>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            if path.file_name().is_some_and(|name| name != "target") {
                collect(&path, tests)?;
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path)?;
            let mut is_test = false;
            for line in text.lines().map(str::trim) {
                if line.starts_with("#[test]") || line.starts_with("#[tokio::test") {
                    is_test = true;
                } else if is_test
                    && let Some(rest) = line.strip_prefix("fn ").or_else(|| line.strip_prefix("async fn "))
                {
                    tests.insert(rest.split('(').next().unwrap_or_default().to_owned());
                    is_test = false;
                }
            }
            // proptest writes its tests inside a macro, with #[test] before each: caught above.
        }
    }
    Ok(())
}

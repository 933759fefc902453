//! `docs/parity.md`: behaviour rows and the tests that show them.
//!
//! A row is `| § | behaviour | test |`; the test is `not yet (why)`, or one or more names in backticks,
//! each the name of a test function somewhere in the tree that is not `#[ignore]`d.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

/// Checks that every test named in the page exists and is run, keeps the page's count, and prints it.
pub(crate) fn check(root: &Path) -> Result<()> {
    let path = root.join("docs/parity.md");
    let page = fs::read_to_string(&path).context("reading docs/parity.md")?;
    let mut tests = BTreeMap::new();
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
        for name in names {
            match tests.get(name) {
                None => wrong.push(format!("docs/parity.md:{}: there is no test `{name}`", number + 1)),
                Some(false) => {
                    wrong.push(format!("docs/parity.md:{}: `{name}` is ignored, it shows nothing", number + 1));
                }
                Some(true) => {}
            }
        }
        shown += 1;
    }
    if !wrong.is_empty() {
        bail!("parity:\n  {}", wrong.join("\n  "));
    }
    let counted = counted(&page, shown, open);
    if counted != page {
        fs::write(&path, counted).context("writing docs/parity.md")?;
    }
    #[expect(clippy::print_stdout, reason = "a chore's answer")]
    {
        println!("parity: {shown} rows shown by tests, {open} not yet");
    }
    Ok(())
}

/// The page with the count of its rows in the line that begins with `Rows:`.
fn counted(page: &str, shown: usize, open: usize) -> String {
    let count = format!("Rows: {}, of which {shown} are shown by tests and {open} are not yet.", shown + open);
    let lines = page.split_inclusive('\n');
    lines.map(|line| if line.starts_with("Rows: ") { format!("{count}\n") } else { line.to_owned() }).collect()
}

/// Test functions by name, and whether one of that name is run.
fn collect(folder: &Path, tests: &mut BTreeMap<String, bool>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            if path.file_name().is_some_and(|name| name != "target") {
                collect(&path, tests)?;
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path)?;
            let (mut is_test, mut is_run) = (false, true);
            for line in text.lines().map(str::trim) {
                if line.starts_with("#[test]") || line.starts_with("#[tokio::test") {
                    (is_test, is_run) = (true, true);
                } else if is_test && line.starts_with("#[ignore") {
                    is_run = false;
                } else if is_test
                    && let line = line.strip_prefix("pub(crate) ").unwrap_or(line)
                    && let Some(rest) = line.strip_prefix("fn ").or_else(|| line.strip_prefix("async fn "))
                {
                    let name = rest.split('(').next().unwrap_or_default().to_owned();
                    *tests.entry(name).or_default() |= is_run;
                    is_test = false;
                } else if let Some(name) = case(line) {
                    tests.insert(name.to_owned(), true);
                }
            }
            // proptest writes its tests inside a macro, with #[test] before each: caught above.
        }
    }
    Ok(())
}

/// The function of a line `("name", |…| … function() …),`: a test of a target without the usual harness.
fn case(line: &str) -> Option<&str> {
    let (_, body) = line.strip_prefix("(\"")?.split_once("\", |")?;
    let (before, _) = body.split_once("()")?;
    let start = before.rfind(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).map_or(0, |at| at + 1);
    Some(&before[start..]).filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_of_a_table_are_tests() {
        assert_eq!(case("(\"reach\", |rt| rt.block_on(pods_reach_each_other())),"), Some("pods_reach_each_other"));
        assert_eq!(case("(\"kill\", |_| killed_parents_leave_nothing()),"), Some("killed_parents_leave_nothing"));
        assert_eq!(case("(\"a\", \"b\"),"), None);
    }

    #[test]
    fn the_page_counts_its_rows() {
        let page = "# P\n\nRows: 1, of which…\nrest\n";
        assert_eq!(counted(page, 2, 3), "# P\n\nRows: 5, of which 2 are shown by tests and 3 are not yet.\nrest\n");
    }
}

//! Tables, colours, answers: the only place that writes to standard output.
use std::borrow::Cow;
use std::io::{IsTerminal, Write as _};
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::Value;
use types::{Finding, Severity};

/// Whether something that was to be printed is lost.
static IS_LOST: AtomicBool = AtomicBool::new(false);

/// Prints a line.
pub(crate) fn line(text: &str) {
    told(writeln!(std::io::stdout(), "{text}"));
}

/// Prints bytes as they are.
pub(crate) fn raw(bytes: &[u8]) {
    let mut out = std::io::stdout();
    told(out.write_all(bytes).and_then(|()| out.flush()));
}

/// Says once that output is lost. A closed pipe is the reader's right.
fn told(written: std::io::Result<()>) {
    if let Err(reason) = written
        && reason.kind() != std::io::ErrorKind::BrokenPipe
        && !IS_LOST.swap(true, Ordering::Relaxed)
    {
        error(&format!("cannot write to standard output: {reason}"));
    }
}

/// Whether something that was to be printed is lost, a closed pipe apart.
pub(crate) fn is_lost() -> bool {
    IS_LOST.load(Ordering::Relaxed)
}

/// Prints an error.
pub(crate) fn error(text: &str) {
    note(&format!("{} {}", paint("error:", "1;31", std::io::stderr().is_terminal()), harmless(text)));
}

/// Prints a remark beside the answer.
pub(crate) fn note(text: &str) {
    // Nobody is left to be told that this does not work, and the mesh goes on.
    _ = writeln!(std::io::stderr(), "{text}");
}

/// Shows what is being done, on a terminal only, over what was shown before; empty: clears it.
pub(crate) fn progress(text: &str) {
    if std::io::stderr().is_terminal() {
        let text = if text.is_empty() { String::new() } else { dim(&format!("  {text} …")) };
        _ = write!(std::io::stderr(), "\r\x1b[2K{text}");
    }
}

/// What others wrote, without the letters by which it could write elsewhere on the terminal.
fn harmless(text: &str) -> Cow<'_, str> {
    let is_harmful = |c: char| c.is_control() && !matches!(c, '\n' | '\t');
    if !text.contains(is_harmful) {
        return text.into();
    }
    let shown = |c: char| if is_harmful(c) { c.escape_default().to_string() } else { c.to_string() };
    text.chars().map(shown).collect::<String>().into()
}

fn paint(text: &str, code: &str, is_terminal: bool) -> String {
    let wanted = is_terminal && std::env::var_os("NO_COLOR").is_none();
    if wanted { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
}

/// Bold on a terminal.
pub(crate) fn bold(text: &str) -> String {
    paint(text, "1", std::io::stdout().is_terminal())
}

/// Dim on a terminal.
pub(crate) fn dim(text: &str) -> String {
    paint(text, "2", std::io::stdout().is_terminal())
}

/// Green on a terminal.
pub(crate) fn green(text: &str) -> String {
    paint(text, "32", std::io::stdout().is_terminal())
}

/// Prints findings, the grave ones in colour.
pub(crate) fn findings(findings: &[Finding]) {
    let is_terminal = std::io::stderr().is_terminal();
    for finding in findings {
        let word = match finding.severity {
            Severity::Error => paint("error:", "1;31", is_terminal),
            Severity::Warning => paint("warning:", "1;33", is_terminal),
            Severity::Info => paint("info:", "1", is_terminal),
        };
        note(&format!("{word} {}", harmless(&finding.to_string())));
    }
}

/// Prints rows under a heading, columns three spaces apart, as kubectl does.
pub(crate) fn table(head: &[&str], rows: &[Vec<String>]) {
    let width = |column: usize| {
        rows.iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count())
            .chain([head[column].len()])
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let render = |cells: &mut dyn Iterator<Item = &str>| {
        let mut out = String::new();
        for (cell, width) in cells.zip(&widths) {
            out.push_str(cell);
            out.extend(std::iter::repeat_n(' ', (width + 3).saturating_sub(cell.chars().count())));
        }
        out.trim_end().to_owned()
    };
    line(&bold(&render(&mut head.iter().copied())));
    for row in rows {
        line(&render(&mut row.iter().map(String::as_str)));
    }
}

/// Prints JSON, indented.
pub(crate) fn json(value: &Value) {
    line(&serde_json::to_string_pretty(value).unwrap_or_default());
}

/// Prints YAML.
pub(crate) fn yaml(value: &Value) {
    line(api::to_yaml(value).trim_end());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_wrote_stays_in_its_line() {
        assert_eq!(harmless("a ü\n\tb"), "a ü\n\tb");
        assert_eq!(harmless("a\u{1b}[31mred\u{7}\r\u{9b}x"), "a\\u{1b}[31mred\\u{7}\\r\\u{9b}x");
    }
}

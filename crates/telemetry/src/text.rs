//! Prometheus' classic text format.
//!
//! *Source*: Prometheus exposition formats, text format 0.0.4.

use std::fmt::Write;

/// Content type of the format.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Appends `value` with `\`, `"` and line feeds escaped, as label values must be.
pub fn escape_label(out: &mut String, value: &str) {
    for character in value.chars() {
        match character {
            '\\' => out.push_str("\\\\"),
            '"' => out.push_str("\\\""),
            '\n' => out.push_str("\\n"),
            other => out.push(other),
        }
    }
}

/// Renders `pairs` as `a="1",b="2"`.
pub fn labels<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> String {
    let mut out = String::new();
    for (name, value) in pairs {
        if !out.is_empty() {
            out.push(',');
        }
        out.push_str(name);
        out.push_str("=\"");
        escape_label(&mut out, value);
        out.push('"');
    }
    out
}

/// Writes `# TYPE name kind`.
pub fn type_line(out: &mut String, name: &str, kind: &str) {
    _ = writeln!(out, "# TYPE {name} {kind}");
}

/// Writes one sample; without labels there are no braces either, as every exporter writes it.
pub fn sample(out: &mut String, name: &str, labels: &str, value: impl std::fmt::Display) {
    _ = if labels.is_empty() { writeln!(out, "{name} {value}") } else { writeln!(out, "{name}{{{labels}}} {value}") };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples() {
        let mut out = String::new();
        sample(&mut out, "plain_total", "", 1);
        sample(&mut out, "labelled_total", &labels([("a", "x\"y\\z\n"), ("b", "")]), 2.5);
        assert_eq!(out, "plain_total 1\nlabelled_total{a=\"x\\\"y\\\\z\\n\",b=\"\"} 2.5\n");
    }
}

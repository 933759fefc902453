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

/// Writes a counter of answers by the first digit of their status, from 1 to 5, as Envoy does: only of those
/// that there were.
pub fn classes<'a>(out: &mut String, name: &str, all: impl Iterator<Item = ((&'a str, &'a str), [u64; 5])>) {
    type_line(out, name, "counter");
    for (label, counts) in all {
        for (class, count) in ["1", "2", "3", "4", "5"].into_iter().zip(counts) {
            if count > 0 {
                sample(out, name, &labels([("envoy_response_code_class", class), label]), count);
            }
        }
    }
}

/// One line of the format, taken apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sample<'a> {
    /// Its name.
    pub name: &'a str,
    /// `a="1",b="2"`
    pub labels: &'a str,
    /// Its value.
    pub value: &'a str,
}

impl<'a> Sample<'a> {
    /// Reads a line that [`sample`] wrote; `None`: a comment.
    pub fn read(line: &'a str) -> Option<Self> {
        let (series, value) = line.rsplit_once(' ').filter(|_| !line.starts_with('#'))?;
        let (name, labels) = match series.split_once('{') {
            Some((name, labels)) => (name, labels.strip_suffix('}').unwrap_or(labels)),
            None => (series, ""),
        };
        Some(Self { name, labels, value })
    }

    fn label(&self, name: &str) -> Option<&'a str> {
        let at = self.labels.find(&format!("{name}=\""))?;
        let value = &self.labels[at + name.len() + 2..];
        let end = value.match_indices('"').find(|(at, _)| !value[..*at].ends_with('\\'))?.0;
        Some(&value[..end])
    }

    /// The name Envoy gives it where there are no labels: `cluster.NAME.upstream_rq_2xx`. Names that are not
    /// Envoy's keep their labels.
    pub fn dotted(&self) -> String {
        let class = self.label("envoy_response_code_class");
        let scopes = [
            ("envoy_cluster_", "cluster", "envoy_cluster_name"),
            ("envoy_http_", "http", "envoy_http_conn_manager_prefix"),
        ];
        for (prefix, scope, label) in scopes {
            let Some(rest) = self.name.strip_prefix(prefix) else { continue };
            let Some(value) = self.label(label) else { continue };
            let rest = match (rest.strip_suffix("_xx"), class) {
                (Some(rest), Some(class)) => format!("{rest}_{class}xx"),
                _ => rest.to_owned(),
            };
            let method = self.label("envoy_grpc_bridge_service").zip(self.label("envoy_grpc_bridge_method"));
            return match (rest.strip_prefix("grpc_"), method) {
                (Some(rest), Some((service, method))) => format!("{scope}.{value}.grpc.{service}.{method}.{rest}"),
                (Some(rest), None) => format!("{scope}.{value}.grpc.{rest}"),
                (None, _) => format!("{scope}.{value}.{rest}"),
            };
        }
        match self.name.strip_prefix("envoy_server_") {
            Some(rest) => format!("server.{rest}"),
            None if self.labels.is_empty() => self.name.to_owned(),
            None => format!("{}{{{}}}", self.name, self.labels),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_dots_are_those_of_envoy() {
        for (line, dotted) in [
            ("envoy_server_live 1", "server.live"),
            ("envoy_cluster_upstream_rq_total{envoy_cluster_name=\"a.b\"} 3", "cluster.a.b.upstream_rq_total"),
            (
                "envoy_cluster_upstream_rq_xx{envoy_response_code_class=\"2\",envoy_cluster_name=\"a\"} 3",
                "cluster.a.upstream_rq_2xx",
            ),
            (
                "envoy_cluster_grpc_0{envoy_grpc_bridge_service=\"a.B\",envoy_grpc_bridge_method=\"C\",envoy_cluster_name=\"x\"} 3",
                "cluster.x.grpc.a.B.C.0",
            ),
            ("envoy_cluster_grpc_success{envoy_cluster_name=\"x\"} 3", "cluster.x.grpc.success"),
            ("envoy_http_downstream_rq_total{envoy_http_conn_manager_prefix=\"in\"} 3", "http.in.downstream_rq_total"),
            ("lateen_panics_total 0", "lateen_panics_total"),
            ("istio_requests_total{a=\"b c\"} 1", "istio_requests_total{a=\"b c\"}"),
        ] {
            assert_eq!(Sample::read(line).unwrap().dotted(), dotted);
        }
        assert_eq!(Sample::read("# TYPE a counter"), None);
    }

    #[test]
    fn samples() {
        let mut out = String::new();
        sample(&mut out, "plain_total", "", 1);
        sample(&mut out, "labelled_total", &labels([("a", "x\"y\\z\n"), ("b", "")]), 2.5);
        assert_eq!(out, "plain_total 1\nlabelled_total{a=\"x\\\"y\\\\z\\n\",b=\"\"} 2.5\n");
    }
}

//! Rules that several kinds share.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration as StdDuration;

use types::HostPattern;

use super::Check;
use crate::scalar::{Duration, Percent, StringMatch};

/// Words a port's protocol may be.
const PROTOCOLS: &[&str] = &[
    "HTTP",
    "HTTP2",
    "HTTP_PROXY",
    "HTTPS",
    "GRPC",
    "GRPC-WEB",
    "TCP",
    "TLS",
    "UDP",
    "MONGO",
    "REDIS",
    "MYSQL",
    "HBONE",
    "DOUBLE-HBONE",
];

/// At least 1 ms and whole milliseconds.
pub(super) fn duration(check: &mut Check<'_>, field: &str, value: Option<Duration>) {
    if value.is_some_and(|d| d.0.is_zero()) {
        check.error(field, "duration must be at least 1ms", "leave the field out to switch it off");
    } else {
        duration_or_zero(check, field, value);
    }
}

/// Zero, or at least 1 ms; whole milliseconds.
pub(super) fn duration_or_zero(check: &mut Check<'_>, field: &str, value: Option<Duration>) {
    let Some(Duration(value)) = value else { return };
    if value.subsec_nanos() % 1_000_000 != 0 {
        check.error(field, "duration must be a whole number of milliseconds", "write it like 1500ms or 1.5s");
    } else if value > StdDuration::from_hours(100 * 365 * 24) {
        check.error(field, "duration is longer than a hundred years", "leave it out");
    }
}

pub(super) fn percent(check: &mut Check<'_>, field: &str, value: Option<Percent>) {
    let Some(Percent { value }) = value else { return };
    if !(0.0..=100.0).contains(&value) {
        check.error(
            field,
            format!("percentage {value} is not between 0 and 100"),
            "write a whole number from 0 to 100",
        );
    } else if value > 0.0 && value < 0.0001 {
        check.error(
            field,
            format!("percentage {value} is below the finest step of 0.0001"),
            "write 0, or at least 0.0001",
        );
    }
}

/// An RE2 pattern that is matched against whole values.
pub(super) fn regex(check: &mut Check<'_>, field: &str, pattern: &str) {
    if pattern.is_empty() {
        check.error(field, "regular expression is empty", "use `.*` to match everything");
    } else if pattern.len() > 1024 {
        check.error(
            field,
            format!("regular expression has {} characters, more than 1024", pattern.len()),
            "split it into several matches",
        );
    } else if let Err(message) = crate::regexes::check(pattern) {
        check.error(field, format!("{pattern:?} is not a regular expression: {message}"), "write it in RE2's syntax");
    }
}

/// A StringMatch whose empty prefix is not allowed (all but `uri`).
pub(super) fn string_match(check: &mut Check<'_>, field: &str, value: &StringMatch) {
    match value {
        StringMatch::Present | StringMatch::Exact(_) => {}
        StringMatch::Prefix(prefix) if prefix.is_empty() => {
            check.error(&format!("{field}.prefix"), "prefix is empty", "leave it out to match every value");
        }
        StringMatch::Prefix(_) => {}
        StringMatch::Regex(pattern) => regex(check, &format!("{field}.regex"), pattern),
    }
}

/// A DNS name, with `*` allowed as in HostPattern or as a partial first label (`*-foo.com`).
pub(super) fn host_with_wildcard(check: &mut Check<'_>, field: &str, host: &str) {
    if host.parse::<IpAddr>().is_ok() {
        return;
    }
    let partial = host.strip_prefix('*').filter(|rest| !rest.is_empty() && !rest.starts_with('.'));
    let result = match partial {
        Some(rest) => HostPattern::parse(rest.trim_start_matches('-')).map(|_| ()),
        None => HostPattern::parse(host).map(|_| ()),
    };
    if let Err(error) = result {
        check.error(field, error.to_string(), "write a host name, `*.suffix`, or `*`");
    }
}

/// A DNS name without `*`, or an address.
pub(super) fn host(check: &mut Check<'_>, field: &str, host: &str) {
    if host.is_empty() {
        check.error(field, "host is missing", "name a service, such as `reviews` or `reviews.shop.svc.cluster.local`");
    } else if host.parse::<IpAddr>().is_err()
        && let Err(error) = types::Hostname::parse(host)
    {
        check.error(field, error.to_string(), "write a host name");
    }
}

/// Hosts of a Gateway or Sidecar: `*`, `*.suffix`, or a name with a dot.
pub(super) fn full_host(check: &mut Check<'_>, field: &str, host: &str) {
    if host.parse::<IpAddr>().is_ok() {
        return;
    }
    match HostPattern::parse(host) {
        Err(error) => check.error(field, error.to_string(), "write a full host name, `*.suffix`, or `*`"),
        Ok(HostPattern::Exact(name)) if !name.as_str().contains('.') => {
            check.error(field, format!("short host {host:?} is not allowed here"), "write the full host name");
        }
        Ok(_) => {}
    }
}

pub(super) fn cidr(check: &mut Check<'_>, field: &str, block: &str) {
    if !is_cidr(block) {
        check.error(field, format!("{block:?} is neither an address nor a CIDR block"), "write it like 10.0.0.0/8");
    }
}

pub(super) fn is_cidr(block: &str) -> bool {
    block.parse::<ipnet::IpNet>().is_ok() || block.parse::<IpAddr>().is_ok()
}

pub(super) fn port_number(check: &mut Check<'_>, field: &str, port: u16) {
    if port == 0 {
        check.error(field, "port must be between 1 and 65535", "write the number of a port");
    }
}

pub(super) fn protocol(check: &mut Check<'_>, field: &str, protocol: &str) {
    let upper = protocol.to_ascii_uppercase();
    if protocol.is_empty() {
        check.error(field, "protocol is missing", "write HTTP, HTTPS, GRPC, HTTP2, TCP, TLS, …");
    } else if !PROTOCOLS.contains(&upper.as_str()) {
        let hint = crate::suggest::nearest(&upper, PROTOCOLS.iter().copied())
            .map_or_else(|| format!("use one of {}", PROTOCOLS.join(", ")), |near| format!("did you mean {near}?"));
        check.error(field, format!("protocol {protocol:?} is not known"), &hint);
    }
}

/// Patterns of hosts with their places. A question costs as many looks as the name has labels.
#[derive(Default)]
pub(super) struct Patterns {
    any: Option<usize>,
    /// By their text from its end, so that all below a domain stand together.
    others: BTreeMap<String, usize>,
}

impl Patterns {
    /// Of those that are patterns at all.
    pub(super) fn of(hosts: &[String]) -> Self {
        let mut all = Self::default();
        for (index, host) in hosts.iter().enumerate() {
            if let Ok(pattern) = HostPattern::parse(host) {
                all.insert(&pattern, index);
            }
        }
        all
    }

    /// Adds one; the first of the same pattern keeps its place.
    pub(super) fn insert(&mut self, pattern: &HostPattern, index: usize) {
        match text(pattern) {
            None => _ = self.any.get_or_insert(index),
            Some(text) => _ = self.others.entry(from_end(text)).or_insert(index),
        }
    }

    /// The place of one that matches every host that `pattern` matches.
    pub(super) fn covering(&self, pattern: &HostPattern) -> Option<usize> {
        let at = |text: &str| self.others.get(&from_end(text)).copied();
        self.any.or_else(|| {
            let text = text(pattern)?;
            at(text).or_else(|| text.match_indices('.').find_map(|(dot, _)| at(&text[dot..])))
        })
    }

    /// The place of one that shares a host with `pattern`.
    pub(super) fn overlapping(&self, pattern: &HostPattern) -> Option<usize> {
        self.covering(pattern).or_else(|| match pattern {
            HostPattern::Any => self.others.values().copied().min(),
            HostPattern::Suffix(suffix) => {
                let end = from_end(suffix);
                let below = self.others.range(end.clone()..).next();
                below.filter(|(other, _)| other.starts_with(&end)).map(|(_, index)| *index)
            }
            HostPattern::Exact(_) => None,
        })
    }
}

/// What hosts end with: all of it, or from a dot on; `None` for all hosts.
fn text(pattern: &HostPattern) -> Option<&str> {
    match pattern {
        HostPattern::Any => None,
        HostPattern::Exact(host) => Some(host.as_str()),
        HostPattern::Suffix(suffix) => Some(suffix),
    }
}

fn from_end(text: &str) -> String {
    text.chars().rev().collect()
}

/// `exportTo`: `.`, `*`, namespaces; `~` where allowed; `*` and `~` alone; no duplicates.
pub(super) fn export_to(check: &mut Check<'_>, values: &[String], none_is_allowed: bool) {
    let mut seen = BTreeSet::new();
    for (index, value) in values.iter().enumerate() {
        let field = format!("spec.exportTo[{index}]");
        if !seen.insert(value) {
            check.error(&field, format!("{value:?} is written twice"), "remove one of the two");
        }
        match value.as_str() {
            "." => {}
            "*" if values.len() > 1 => check.error(&field, "`*` must stand alone", "remove the other namespaces"),
            "*" => {}
            "~" if !none_is_allowed => check.error(&field, "`~` is not allowed here", "use `.` for the own namespace"),
            "~" if values.len() > 1 => check.error(&field, "`~` must stand alone", "remove the other namespaces"),
            "~" => {}
            name if is_dns_label(name) => {}
            name => check.error(&field, format!("{name:?} is not a namespace"), "use `.`, `*`, or a namespace's name"),
        }
    }
}

pub(super) fn is_dns_label(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 63
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-')
}

pub(super) fn is_dns_subdomain(text: &str) -> bool {
    text.len() <= 253
        && text.split('.').all(|label| {
            !label.is_empty()
                && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        })
}

/// A label's value, or the name part of its key.
pub(super) fn is_label_value(text: &str) -> bool {
    let edge = |b: Option<u8>| b.is_none_or(|b| b.is_ascii_alphanumeric());
    text.len() <= 63
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        && edge(text.bytes().next())
        && edge(text.bytes().last())
}

pub(super) fn is_label_key(text: &str) -> bool {
    let (prefix, name) = match text.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, text),
    };
    !name.is_empty() && is_label_value(name) && prefix.is_none_or(is_dns_subdomain)
}

/// An RFC 9110 field name.
pub(super) fn is_header_name(text: &str) -> bool {
    !text.is_empty()
        && text.bytes().all(|b| {
            b.is_ascii_alphanumeric()
                || matches!(
                    b,
                    b'!' | b'#'
                        | b'$'
                        | b'%'
                        | b'&'
                        | b'\''
                        | b'*'
                        | b'+'
                        | b'-'
                        | b'.'
                        | b'^'
                        | b'_'
                        | b'`'
                        | b'|'
                        | b'~'
                )
        })
}

/// A field value: no control characters but tab.
pub(super) fn is_header_value(text: &str) -> bool {
    text.bytes().all(|b| b == b'\t' || (b >= 0x20 && b != 0x7f))
}

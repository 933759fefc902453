//! Finds the virtual host for a host name.

use std::collections::HashMap;

use smallvec::SmallVec;

use crate::config::NameHasher;

type Map = HashMap<Box<[u8]>, usize, NameHasher>;

/// Domains of a route table, indexed.
///
/// *Source*: Envoy's search order: exact, longest suffix wildcard (`*.x`, `*-x`), longest prefix
/// wildcard (`x.*`), `*`; hosts are compared in lower case.
#[derive(Debug, Default)]
pub struct HostIndex {
    exact: Map,
    /// By length of the part after `*`, longest first.
    suffixes: Vec<(usize, Map)>,
    /// By length of the part before `*`, longest first.
    prefixes: Vec<(usize, Map)>,
    any: Option<usize>,
}

/// A domain that stands twice in one table, or is empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadDomain(pub String);

impl HostIndex {
    /// Adds `domain` for the virtual host at `index`.
    ///
    /// *Errors*: the domain is there already, or is empty, or holds `*` in the middle.
    pub fn insert(&mut self, domain: &str, index: usize) -> Result<(), BadDomain> {
        let domain = domain.to_ascii_lowercase();
        let bad = || BadDomain(domain.clone());
        let full = if domain == "*" {
            self.any.replace(index)
        } else if let Some(suffix) = domain.strip_prefix('*') {
            Self::level(&mut self.suffixes, suffix.len()).insert(suffix.as_bytes().into(), index)
        } else if let Some(prefix) = domain.strip_suffix('*') {
            Self::level(&mut self.prefixes, prefix.len()).insert(prefix.as_bytes().into(), index)
        } else if domain.is_empty() {
            return Err(bad());
        } else {
            self.exact.insert(domain.as_bytes().into(), index)
        };
        if full.is_some() { Err(bad()) } else { Ok(()) }
    }

    fn level(levels: &mut Vec<(usize, Map)>, len: usize) -> &mut Map {
        let at = levels.partition_point(|(other, _)| *other > len);
        if levels.get(at).is_none_or(|(other, _)| *other != len) {
            levels.insert(at, (len, Map::default()));
        }
        &mut levels[at].1
    }

    /// The virtual host for `host` (port removed already if it does not count).
    pub fn find(&self, host: &[u8]) -> Option<usize> {
        let mut lower: SmallVec<[u8; 128]> = SmallVec::from_slice(host);
        lower.make_ascii_lowercase();
        let host = lower.as_slice();
        if let Some(found) = self.exact.get(host) {
            return Some(*found);
        }
        for (len, map) in &self.suffixes {
            if *len < host.len()
                && let Some(found) = map.get(&host[host.len() - len..])
            {
                return Some(*found);
            }
        }
        for (len, map) in &self.prefixes {
            if *len < host.len()
                && let Some(found) = map.get(&host[..*len])
            {
                return Some(*found);
            }
        }
        self.any
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(domains: &[&str], host: &str, expect: Option<usize>) {
        let mut index = HostIndex::default();
        for (at, domain) in domains.iter().enumerate() {
            index.insert(domain, at).unwrap();
        }
        assert_eq!(index.find(host.as_bytes()), expect, "{domains:?} {host}");
    }

    #[test]
    fn search_order() {
        let domains = ["*", "*.x.com", "a.x.com", "*.com", "a.*", "*-b.x.com"];
        check(&domains, "a.x.com", Some(2));
        check(&domains, "A.X.COM", Some(2));
        check(&domains, "b.x.com", Some(1));
        check(&domains, "c.b.x.com", Some(1));
        check(&domains, "a-b.x.com", Some(5));
        check(&domains, "y.com", Some(3));
        check(&domains, "a.org", Some(4));
        check(&domains, "z.org", Some(0));
        check(&["*.x.com"], "x.com", None);
        check(&["*.x.com"], ".x.com", None);
    }

    #[test]
    fn a_domain_stands_once() {
        let mut index = HostIndex::default();
        index.insert("a.com", 0).unwrap();
        assert!(index.insert("A.com", 1).is_err());
        assert!(index.insert("", 1).is_err());
    }

    fn naive(domains: &[String], host: &str) -> Option<usize> {
        let host = host.to_ascii_lowercase();
        let rank = |domain: &str| -> Option<(u8, usize)> {
            if domain == "*" {
                return Some((0, 0));
            }
            if let Some(suffix) = domain.strip_prefix('*') {
                return (host.len() > suffix.len() && host.ends_with(suffix)).then_some((2, suffix.len()));
            }
            if let Some(prefix) = domain.strip_suffix('*') {
                return (host.len() > prefix.len() && host.starts_with(prefix)).then_some((1, prefix.len()));
            }
            (domain == host).then_some((3, 0))
        };
        let best = domains.iter().enumerate().filter_map(|(at, domain)| rank(domain).map(|rank| (rank, at)));
        best.max_by_key(|(rank, _)| *rank).map(|(_, at)| at)
    }

    proptest! {
        #[test]
        fn index_equals_naive(
            domains in proptest::collection::btree_set("[*]?[.-]?[ab](\\.[ab]){0,2}(\\.[*])?|[*]", 1..8),
            host in "[abAB](\\.[abAB-]){0,3}",
        ) {
            let domains: Vec<String> = domains
                .into_iter()
                .filter(|domain| domain.matches('*').count() <= 1)
                .collect();
            let mut index = HostIndex::default();
            for (at, domain) in domains.iter().enumerate() {
                index.insert(domain, at).unwrap();
            }
            prop_assert_eq!(index.find(host.as_bytes()), naive(&domains, &host));
        }
    }
}

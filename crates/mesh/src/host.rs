//! Host names as Istio compares them: lower-case text with at most one `*`, at the start.
//!
//! *Source*: `docs/parity.md`, Traffic 1.4 ("wildcard hosts") and 1.8 ("short hosts"). VirtualService,
//! DestinationRule and ServiceEntry hosts may hold a partial first label (`*-foo.com`), so a plain
//! string suffix decides, not whole labels.

/// Whether `host` is a wildcard.
pub fn is_wildcard(host: &str) -> bool {
    host.starts_with('*')
}

/// Whether every name that `inner` stands for is covered by `pattern`.
///
/// `*.com` covers `a.b.com` and `*.b.com`, but not `com`.
pub fn covers(pattern: &str, inner: &str) -> bool {
    let Some(suffix) = pattern.strip_prefix('*') else {
        return pattern == inner;
    };
    match inner.strip_prefix('*') {
        Some(inner_suffix) => inner_suffix.ends_with(suffix),
        None => inner.len() > suffix.len() && inner.ends_with(suffix),
    }
}

/// Whether some name is matched by both.
pub fn overlaps(a: &str, b: &str) -> bool {
    covers(a, b) || covers(b, a)
}

/// The narrower of two overlapping hosts; `None` if no name is matched by both.
pub fn intersection<'a>(a: &'a str, b: &'a str) -> Option<&'a str> {
    if covers(a, b) {
        Some(b)
    } else if covers(b, a) {
        Some(a)
    } else {
        None
    }
}

/// How narrow a host is, for "the most specific wins": exact above every wildcard, a longer
/// wildcard above a shorter one.
pub fn specificity(host: &str) -> (bool, usize) {
    (!is_wildcard(host), host.len())
}

/// Expands a host as written in an object of `namespace`: a name without any dot is a service of
/// that namespace; everything else is taken literally. Lower-cases.
pub fn expand(host: &str, namespace: &str, domain: &str) -> Box<str> {
    let host = host.trim_end_matches('.').to_ascii_lowercase();
    if host.is_empty() || host.contains('.') || host.contains(':') || is_wildcard(&host) {
        return host.into();
    }
    format!("{host}.{namespace}.svc.{domain}").into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn coverage() {
        for (pattern, inner, expect) in [
            ("a.b", "a.b", true),
            ("a.b", "b.b", false),
            ("*", "a", true),
            ("*", "*", true),
            ("*", "*.x", true),
            ("*.x", "*", false),
            ("*.com", "a.b.com", true),
            ("*.com", "com", false),
            ("*.com", ".com", false),
            ("*-foo.com", "a-foo.com", true),
            ("*-foo.com", "afoo.com", false),
            ("*.b.com", "*.com", false),
            ("*.com", "*.b.com", true),
        ] {
            assert_eq!(covers(pattern, inner), expect, "{pattern} {inner}");
        }
    }

    #[test]
    fn short_names_expand_only_without_a_dot() {
        assert_eq!(&*expand("reviews", "shop", "cluster.local"), "reviews.shop.svc.cluster.local");
        assert_eq!(&*expand("reviews.shop", "x", "cluster.local"), "reviews.shop");
        assert_eq!(&*expand("API.Example.com.", "x", "cluster.local"), "api.example.com");
        assert_eq!(&*expand("*", "x", "cluster.local"), "*");
        assert_eq!(&*expand("::1", "x", "cluster.local"), "::1");
    }

    #[test]
    fn the_narrower_one_is_the_intersection() {
        assert_eq!(intersection("*", "a.com"), Some("a.com"));
        assert_eq!(intersection("*.a.com", "*.com"), Some("*.a.com"));
        assert_eq!(intersection("a.com", "b.com"), None);
        assert!(specificity("a.b") > specificity("*.very.long.name"));
        assert!(specificity("*.long.b") > specificity("*.b"));
    }
}

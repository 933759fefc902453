//! Path normalisation, as Envoy does it, once, before anybody looks at the path.
//!
//! *Source*: Envoy `normalize_path` (Chromium's URL canonicaliser), `merge_slashes`,
//! `path_with_escaped_slashes_action`; `docs/parity.md`, Security 10.1. The query is never touched, a fragment
//! is cut off.
//!
//! **Difference, on purpose.** Decoding never makes a new escape: in `/%%32e`, where Chromium leaves
//! `/%2e` for the next decoder, the inner escape stays. So normalising twice is normalising once.

use crate::hcm::EscapedSlashes;

/// What to normalise.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Settings {
    /// Dot segments, backslashes, needless escapes.
    pub normalize: bool,
    /// `//` becomes `/`.
    pub merge_slashes: bool,
    /// `%2F` and `%5C`.
    pub escaped_slashes: EscapedSlashes,
}

/// A path after normalisation.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Normalized {
    /// As it was.
    Same,
    /// Go on with this path and query.
    Changed(Vec<u8>),
    /// Send the client to this path and query.
    Redirect(Vec<u8>),
    /// 400: the path cannot be read in one way only.
    Refused,
}

/// Normalises path and query.
pub fn normalize(path_and_query: &[u8], settings: Settings) -> Normalized {
    let end = path_and_query.iter().position(|b| *b == b'#').unwrap_or(path_and_query.len());
    let whole = &path_and_query[..end];
    let split = whole.iter().position(|b| *b == b'?').unwrap_or(whole.len());
    let (path, query) = whole.split_at(split);
    if end == path_and_query.len() && is_plain(path) {
        return Normalized::Same;
    }
    let mut path = path.to_vec();
    let mut redirect = false;
    if settings.escaped_slashes != EscapedSlashes::Keep
        && let Some(decoded) = decode_slashes(&path)
    {
        match settings.escaped_slashes {
            EscapedSlashes::Reject => return Normalized::Refused,
            EscapedSlashes::UnescapeAndRedirect => redirect = true,
            EscapedSlashes::UnescapeAndForward | EscapedSlashes::Keep => {}
        }
        path = decoded;
    }
    if settings.normalize {
        match canonical(&path) {
            Some(canonical) => path = canonical,
            None => return Normalized::Refused,
        }
    }
    if settings.merge_slashes {
        path.dedup_by(|next, before| *next == b'/' && *before == b'/');
    }
    // A fragment was the client's affair; it alone does not change where the request goes.
    path.extend_from_slice(query);
    if redirect {
        Normalized::Redirect(path)
    } else if path == path_and_query {
        Normalized::Same
    } else {
        Normalized::Changed(path)
    }
}

/// Whether no setting changes a path: it begins with a slash, and holds neither escapes nor what has
/// to be escaped, nor dots or slashes after a slash. Nearly all paths are so, and cost one look.
fn is_plain(path: &[u8]) -> bool {
    let mut before = b'x';
    path.first() == Some(&b'/')
        && path.iter().all(|&b| {
            let after_slash = before == b'/';
            before = b;
            !(must_escape(b) || matches!(b, b'%' | b'\\') || after_slash && matches!(b, b'/' | b'.'))
        })
}

/// The path with `%2F` and `%5C` decoded; `None` if there are none.
fn decode_slashes(path: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(path.len());
    let mut rest = path;
    let mut found = false;
    while let Some((&first, after)) = rest.split_first() {
        match escape(rest) {
            Some(slash @ (b'/' | b'\\')) => {
                out.push(slash);
                found = true;
                rest = &rest[3..];
            }
            _ => {
                out.push(first);
                rest = after;
            }
        }
    }
    found.then_some(out)
}

/// The byte of an escape at the beginning of `text`.
fn escape(text: &[u8]) -> Option<u8> {
    let hex = |b: u8| char::from(b).to_digit(16);
    match text {
        [b'%', high, low, ..] => u8::try_from(hex(*high)? * 16 + hex(*low)?).ok(),
        _ => None,
    }
}

/// How the canonicaliser treats a byte that stands for itself.
fn must_escape(b: u8) -> bool {
    matches!(b, 0..=0x20 | b'"' | b'#' | b'<' | b'>' | b'?' | b'^' | b'`' | b'{' | b'}' | 0x7f..)
}

fn is_unreserved(b: u8) -> bool {
    b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b'~')
}

/// A dot at the beginning of `text`, escaped or not: its length.
fn dot(text: &[u8]) -> Option<usize> {
    if text.first() == Some(&b'.') { Some(1) } else { (escape(text) == Some(b'.')).then_some(3) }
}

fn is_slash(b: u8) -> bool {
    b == b'/' || b == b'\\'
}

/// The canonical path; `None` for a NUL, escaped or not.
fn canonical(path: &[u8]) -> Option<Vec<u8>> {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    let mut out = Vec::with_capacity(path.len() + 8);
    // Where the last `%` that begins no escape stands in `out`.
    let mut bare: Option<usize> = None;
    if path.first().is_none_or(|b| !is_slash(*b)) {
        out.push(b'/');
    }
    let mut at = 0;
    while let Some(&b) = path.get(at) {
        if let Some(length) = dot(&path[at..]) {
            let after = at + length;
            if out.last() == Some(&b'/') {
                match segment_after(&path[after..]) {
                    Some((Segment::Current, taken)) => {
                        at = after + taken;
                        continue;
                    }
                    Some((Segment::Up, taken)) => {
                        up(&mut out);
                        at = after + taken;
                        continue;
                    }
                    None => {}
                }
            }
            out.push(b'.');
            at = after;
            continue;
        }
        match b {
            0 => return None,
            b'\\' => out.push(b'/'),
            b'%' => match escape(&path[at..]) {
                None => {
                    bare = Some(out.len());
                    out.push(b'%');
                }
                Some(0) => return None,
                Some(plain) => {
                    // Would it complete an escape that was none?
                    let joins = bare.is_some_and(|bare| out.get(bare) == Some(&b'%') && out.len() - bare <= 2)
                        && plain.is_ascii_hexdigit();
                    if is_unreserved(plain) && !joins {
                        out.push(plain);
                    } else {
                        out.extend_from_slice(&path[at..at + 3]);
                    }
                    at += 3;
                    continue;
                }
            },
            b if must_escape(b) => {
                out.extend_from_slice(&[b'%', HEX[usize::from(b >> 4)], HEX[usize::from(b & 15)]]);
            }
            b => out.push(b),
        }
        at += 1;
    }
    Some(out)
}

enum Segment {
    Current,
    Up,
}

/// What a dot after a slash begins, and how much more of the path belongs to it.
fn segment_after(rest: &[u8]) -> Option<(Segment, usize)> {
    let closed = |rest: &[u8]| match rest.first() {
        None => Some(0),
        Some(b) if is_slash(*b) => Some(1),
        Some(_) => None,
    };
    if let Some(slash) = closed(rest) {
        return Some((Segment::Current, slash));
    }
    let second = dot(rest)?;
    closed(&rest[second..]).map(|slash| (Segment::Up, second + slash))
}

/// Removes the last segment; the root has none.
fn up(out: &mut Vec<u8>) {
    if out.len() <= 1 {
        return;
    }
    out.pop();
    while out.len() > 1 && out.last() != Some(&b'/') {
        out.pop();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BASE: Settings = Settings { normalize: true, merge_slashes: false, escaped_slashes: EscapedSlashes::Keep };
    const NONE: Settings = Settings { normalize: false, ..BASE };
    const MERGE: Settings = Settings { merge_slashes: true, ..BASE };
    const DECODE: Settings = Settings { escaped_slashes: EscapedSlashes::UnescapeAndForward, ..MERGE };

    fn check(settings: Settings, input: &str, expect: &str) {
        let got = match normalize(input.as_bytes(), settings) {
            Normalized::Same => input.to_owned(),
            Normalized::Changed(path) => String::from_utf8(path).unwrap(),
            Normalized::Redirect(path) => format!("redirect {}", String::from_utf8(path).unwrap()),
            Normalized::Refused => "400".to_owned(),
        };
        assert_eq!(got, expect, "{input} under {settings:?}");
    }

    #[test]
    fn base() {
        for (input, expect) in [
            ("/a/../b", "/b"),
            ("/a/%2e%2e/b", "/b"),
            ("/a/.%2E/b", "/b"),
            ("/a/./b", "/a/b"),
            ("/a/.", "/a/"),
            ("/a/..", "/"),
            ("/..", "/"),
            ("/../../a", "/a"),
            ("//b", "//b"),
            ("/%2Fb", "/%2Fb"),
            ("/%2fb", "/%2fb"),
            ("/b%5c..", "/b%5c.."),
            ("/a\\b", "/a/b"),
            ("/a\\..\\b", "/b"),
            ("/%61", "/a"),
            ("/%7e%2D%5F", "/~-_"),
            ("/a.b/..c/d..", "/a.b/..c/d.."),
            ("/a%2eb", "/a.b"),
            ("/b#/..", "/b"),
            ("/b?x=/../", "/b?x=/../"),
            ("/b?x=%61#y", "/b?x=%61"),
            ("/b;v=1", "/b;v=1"),
            ("/B", "/B"),
            ("/b%20", "/b%20"),
            ("/b%0d", "/b%0d"),
            ("/b c", "/b%20c"),
            ("/é", "/%C3%A9"),
            ("/{x}^`\"<>", "/%7Bx%7D%5E%60%22%3C%3E"),
            ("/%25%32%65", "/%252e"),
            ("/%252e", "/%252e"),
            ("/%zz%", "/%zz%"),
            ("/%00", "400"),
            ("/a//../b", "/a/b"),
            ("a", "/a"),
            ("/%%32e", "/%%32e"),
            ("/%2%65", "/%2%65"),
        ] {
            check(BASE, input, expect);
        }
    }

    #[test]
    fn the_other_modes() {
        for input in ["/a/./b", "/a//b", "/a%2Fb", "/a\\b", "/%61"] {
            check(NONE, input, input);
        }
        check(NONE, "/a#b", "/a");
        check(MERGE, "/a//b///c?x=//", "/a/b/c?x=//");
        check(MERGE, "/a%2Fb", "/a%2Fb");
        check(DECODE, "/a%2Fb%5Cc%2f/d", "/a/b/c/d");
        check(DECODE, "/a%2f..%2fb", "/b");
        check(DECODE, "/a%252Fb", "/a%252Fb");
        check(Settings { escaped_slashes: EscapedSlashes::Reject, ..BASE }, "/a%5cb", "400");
        check(Settings { escaped_slashes: EscapedSlashes::Reject, ..BASE }, "/a?%5cb", "/a?%5cb");
        let redirect = Settings { escaped_slashes: EscapedSlashes::UnescapeAndRedirect, ..BASE };
        check(redirect, "/a%2f..%2fb?c", "redirect /b?c");
        check(redirect, "/a/b", "/a/b");
    }

    fn once(path: &[u8], settings: Settings) -> Option<Vec<u8>> {
        match normalize(path, settings) {
            Normalized::Same => Some(path.to_vec()),
            Normalized::Changed(path) | Normalized::Redirect(path) => Some(path),
            Normalized::Refused => None,
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        /// Normalising twice is normalising once, in every mode and for any bytes.
        #[test]
        fn idempotent(path in "/([./\\\\%a2eEfF5cC#?]|%2[eEfF]|%5[cC]|%[0-9a-f]{2}|\\PC){0,24}", mode in 0usize..4) {
            let settings = [BASE, NONE, MERGE, DECODE][mode];
            if let Some(first) = once(path.as_bytes(), settings) {
                prop_assert_eq!(once(&first, settings), Some(first.clone()), "{}", String::from_utf8_lossy(&first));
            }
        }

        /// What is taken for plain is what the long way leaves as it is.
        #[test]
        fn plain_paths_stay(path in "/?([./ab?#]|%2[eEfF]|\\PC){0,12}", mode in 0usize..4) {
            let settings = [BASE, NONE, MERGE, DECODE][mode];
            if is_plain(path.as_bytes()) {
                prop_assert_eq!(canonical(path.as_bytes()), Some(path.clone().into_bytes()));
                prop_assert_eq!(decode_slashes(path.as_bytes()), None);
                prop_assert!(!path.contains("//"));
                prop_assert_eq!(normalize(path.as_bytes(), settings), Normalized::Same);
            }
        }

        /// Nothing a policy could be tricked with is left.
        #[test]
        fn no_dot_segment_is_left(path in "/([./\\\\%a2e]|%2[eE]){0,16}") {
            if let Some(path) = once(path.as_bytes(), BASE) {
                let path = String::from_utf8(path).unwrap();
                prop_assert!(!path.contains('\\'));
                for segment in path.split('/') {
                    let plain = segment.to_ascii_lowercase().replace("%2e", ".");
                    prop_assert!(plain != "." && plain != "..", "{path}");
                }
            }
        }

        /// No bytes make it fail otherwise than by refusing.
        #[test]
        fn any_bytes(path in proptest::collection::vec(any::<u8>(), 0..40)) {
            if let Some(path) = once(&path, DECODE) {
                prop_assert!(path.first() == Some(&b'/'));
            }
        }
    }
}

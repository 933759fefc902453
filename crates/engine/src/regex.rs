//! RE2's regular expressions on Rust's linear-time engine.
//!
//! Envoy matches whole values with RE2. [`translate`] rewrites the syntax where the two differ;
//! [`Regex`] matches whole byte strings and builds its automaton on first use; [`Rewrite`] is
//! Envoy's `RegexMatchAndSubstitute`.
//!
//! **Difference from RE2, on purpose.** `.` and negated classes also match line feeds and bytes
//! that are not UTF-8, so that no byte of a path or header escapes a pattern (property 12).

use std::fmt;
use std::sync::OnceLock;

use ::regex::bytes;
use envoy_types::pb::envoy::r#type::matcher::v3 as pb;

use crate::unsupported::{Unsupported, Within as _};

/// Bytes a compiled program may take.
const PROGRAM_BYTES_MAX: usize = 8 << 20;
/// RE2's limit on a repetition count.
const REPEAT_MAX: u32 = 1000;

const DIGIT: &str = "0-9";
const WORD: &str = "0-9A-Za-z_";
const SPACE: &str = r"\t\n\x0C\r ";
const ANY: &str = r"(?:(?s:.)|(?-u:[\x80-\xFF]))";

/// Rewrites RE2's syntax as the `regex` crate's, for matching bytes in Unicode mode.
///
/// *Errors*: what RE2 itself refuses and Rust would take (`a**`, counts above 1000), and `\C`.
pub fn translate(re2: &str) -> Result<String, Unsupported> {
    let mut out = String::with_capacity(re2.len() + 16);
    let mut chars = re2.chars().peekable();
    // Whether the last item was a repetition operator.
    let mut repeated = false;
    let bad = |reason: &str| Err(Unsupported::new("regex", format!("{re2:?} {reason}")));
    while let Some(c) = chars.next() {
        let was_repeated = std::mem::take(&mut repeated);
        match c {
            '\\' => match chars.next() {
                None => return bad("ends in a backslash"),
                Some('Q') => {
                    let mut literal = String::new();
                    while let Some(c) = chars.next() {
                        if c == '\\' && chars.peek() == Some(&'E') {
                            chars.next();
                            break;
                        }
                        literal.push(c);
                    }
                    out.push_str(&::regex::escape(&literal));
                }
                Some('E') => {}
                Some('C') => return bad(r"uses \C, which is not supported"),
                Some('d') => class(&mut out, DIGIT, false),
                Some('D') => class(&mut out, DIGIT, true),
                Some('w') => class(&mut out, WORD, false),
                Some('W') => class(&mut out, WORD, true),
                Some('s') => class(&mut out, SPACE, false),
                Some('S') => class(&mut out, SPACE, true),
                Some('b') => out.push_str(r"(?-u:\b)"),
                Some('B') => out.push_str(r"(?-u:\B)"),
                Some(other) => escape(&mut out, other, &mut chars),
            },
            '.' => out.push_str(ANY),
            '[' => bracket(&mut out, &mut chars)
                .map_err(|reason| Unsupported::new("regex", format!("{re2:?} {reason}")))?,
            '*' | '+' | '?' => {
                if was_repeated && c != '?' {
                    return bad("repeats a repetition");
                }
                // A `?` after a repetition makes it lazy, once; after that it repeats it.
                repeated = !was_repeated;
                if was_repeated && matches!(chars.peek(), Some('*' | '+' | '?')) {
                    return bad("repeats a repetition");
                }
                out.push(c);
            }
            '{' => match count(&chars) {
                None => out.push_str(r"\{"),
                Some((low, high, taken)) => {
                    if was_repeated {
                        return bad("repeats a repetition");
                    }
                    if low > REPEAT_MAX || high.is_some_and(|high| high > REPEAT_MAX || high < low) {
                        return bad("repeats too often");
                    }
                    out.push('{');
                    out.extend(chars.by_ref().take(taken));
                    repeated = true;
                }
            },
            '}' => out.push_str(r"\}"),
            '(' => {
                out.push('(');
                if chars.peek() == Some(&'?') {
                    out.push('?');
                    chars.next();
                }
            }
            other => out.push(other),
        }
    }
    Ok(out)
}

/// Appends formatted text; writing to a string cannot fail.
fn put(out: &mut String, text: fmt::Arguments<'_>) {
    let written = fmt::Write::write_fmt(out, text);
    debug_assert!(written.is_ok());
}

type Chars<'a> = std::iter::Peekable<std::str::Chars<'a>>;

fn class(out: &mut String, items: &str, negated: bool) {
    if negated {
        put(out, format_args!(r"(?:[^{items}]|(?-u:[\x80-\xFF]))"));
    } else {
        put(out, format_args!("[{items}]"));
    }
}

/// An escape that both know, or a literal that only RE2 lets be escaped.
fn escape(out: &mut String, c: char, chars: &mut Chars<'_>) {
    match c {
        'x' | 'p' | 'P' | 'A' | 'z' | 'a' | 'f' | 'n' | 'r' | 't' | 'v' => {
            out.push('\\');
            out.push(c);
        }
        '0'..='7' => {
            // RE2: octal. One digit alone other than 0 is a back-reference, which neither has.
            let mut value = u32::from(c) - u32::from('0');
            for _ in 0..2 {
                match chars.peek().and_then(|next| next.to_digit(8)) {
                    Some(digit) => {
                        value = value * 8 + digit;
                        chars.next();
                    }
                    None => break,
                }
            }
            put(out, format_args!(r"\x{{{value:x}}}"));
        }
        other if other.is_ascii_alphanumeric() => {
            // Unknown to RE2; let the engine refuse it.
            out.push('\\');
            out.push(other);
        }
        other => out.push_str(&::regex::escape(other.encode_utf8(&mut [0; 4]))),
    }
}

/// `low`, `high` (`None` for open), and the characters up to and with `}`, if this is a count.
fn count(chars: &Chars<'_>) -> Option<(u32, Option<u32>, usize)> {
    let mut text = String::new();
    for c in chars.clone() {
        text.push(c);
        if c == '}' || text.len() > 12 {
            break;
        }
    }
    let body = text.strip_suffix('}')?;
    let number = |text: &str| -> Option<u32> {
        (!text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())).then(|| text.parse().unwrap_or(u32::MAX))
    };
    let (low, high) = match body.split_once(',') {
        None => (number(body)?, Some(number(body)?)),
        Some((low, "")) => (number(low)?, None),
        Some((low, high)) => (number(low)?, Some(number(high)?)),
    };
    Some((low, high, text.len()))
}

/// A bracketed class; `[` is taken already.
fn bracket(out: &mut String, chars: &mut Chars<'_>) -> Result<(), &'static str> {
    let negated = chars.next_if_eq(&'^').is_some();
    let mut items = String::new();
    let mut first = true;
    loop {
        let Some(c) = chars.next() else { return Err("has an open [") };
        match c {
            ']' if !first => break,
            '[' if chars.peek() == Some(&':') => {
                items.push('[');
                loop {
                    let Some(c) = chars.next() else { return Err("has an open [:") };
                    items.push(c);
                    if c == ':' && chars.peek() == Some(&']') {
                        chars.next();
                        items.push(']');
                        break;
                    }
                }
            }
            '\\' => match chars.next() {
                None => return Err("ends in a backslash"),
                Some('d') => items.push_str(DIGIT),
                Some('w') => items.push_str(WORD),
                Some('s') => items.push_str(SPACE),
                Some('D') => put(&mut items, format_args!("[^{DIGIT}]")),
                Some('W') => put(&mut items, format_args!("[^{WORD}]")),
                Some('S') => put(&mut items, format_args!("[^{SPACE}]")),
                Some('C') => return Err(r"uses \C, which is not supported"),
                Some(other) => escape(&mut items, other, chars),
            },
            // Literals in RE2, operators or ends in Rust.
            '[' | ']' | '&' | '~' | '^' => {
                items.push('\\');
                items.push(c);
            }
            '-' => {
                // A range only between two single characters; literal at the edges and after a class.
                let literal = first || chars.peek() == Some(&']') || ends_in_class(&items);
                items.push_str(if literal { r"\-" } else { "-" });
            }
            other => items.push(other),
        }
        first = false;
    }
    if negated {
        put(out, format_args!(r"(?:[^{items}]|(?-u:[\x80-\xFF]))"));
    } else {
        put(out, format_args!("[{items}]"));
    }
    Ok(())
}

fn ends_in_class(items: &str) -> bool {
    [DIGIT, WORD, SPACE].iter().any(|class| items.ends_with(class)) || items.ends_with(']') && !items.ends_with(r"\]")
}

/// Envoy's `RegexMatcher`: matches whole byte strings.
///
/// *Cost*: shapes that need no automaton (`.*`, `.+`, literals with `.*` at the ends) never build
/// one; others do on first use, then match in linear time.
#[derive(Debug)]
pub struct Regex {
    re2: Box<str>,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Any,
    NonEmpty,
    Exact(Box<str>),
    Prefix(Box<str>),
    Suffix(Box<str>),
    Contains(Box<str>),
    Program(Box<str>, OnceLock<Option<bytes::Regex>>),
}

impl Clone for Regex {
    fn clone(&self) -> Self {
        let kind = match &self.kind {
            Kind::Any => Kind::Any,
            Kind::NonEmpty => Kind::NonEmpty,
            Kind::Exact(text) => Kind::Exact(text.clone()),
            Kind::Prefix(text) => Kind::Prefix(text.clone()),
            Kind::Suffix(text) => Kind::Suffix(text.clone()),
            Kind::Contains(text) => Kind::Contains(text.clone()),
            Kind::Program(text, _) => Kind::Program(text.clone(), OnceLock::new()),
        };
        Self { re2: self.re2.clone(), kind }
    }
}

impl PartialEq for Regex {
    fn eq(&self, other: &Self) -> bool {
        self.re2 == other.re2
    }
}

fn compile(pattern: &str) -> Result<bytes::Regex, ::regex::Error> {
    bytes::RegexBuilder::new(pattern).size_limit(PROGRAM_BYTES_MAX).dfa_size_limit(PROGRAM_BYTES_MAX).build()
}

/// The shape of a pattern that needs no automaton.
fn simple(re2: &str) -> Option<Kind> {
    match re2 {
        ".*" => return Some(Kind::Any),
        ".+" => return Some(Kind::NonEmpty),
        _ => {}
    }
    let (open, rest) = re2.strip_prefix(".*").map_or((false, re2), |rest| (true, rest));
    let (close, middle) = rest.strip_suffix(".*").map_or((false, rest), |rest| (true, rest));
    if close && rest.strip_suffix(".*").is_some_and(|head| head.ends_with('\\')) {
        return None;
    }
    let mut literal = String::with_capacity(middle.len());
    let mut chars = middle.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => match chars.next()? {
                c if c.is_ascii_punctuation() => literal.push(c),
                _ => return None,
            },
            '.' | '+' | '*' | '?' | '(' | ')' | '|' | '[' | ']' | '{' | '}' | '^' | '$' => return None,
            c => literal.push(c),
        }
    }
    let text = literal.into_boxed_str();
    Some(match (open, close) {
        (false, false) => Kind::Exact(text),
        (false, true) => Kind::Prefix(text),
        (true, false) => Kind::Suffix(text),
        (true, true) => Kind::Contains(text),
    })
}

impl Regex {
    /// Checks `re2` whole; nothing about it can fail later.
    pub fn new(re2: &str) -> Result<Self, Unsupported> {
        let kind = match simple(re2) {
            Some(kind) => kind,
            None => {
                let pattern = format!(r"\A(?:{})\z", translate(re2)?);
                // The automaton is dropped again: most configured patterns are never used.
                compile(&pattern).map_err(|error| {
                    Unsupported::new("regex", format!("{re2:?} is not valid: {}", last_line(&error)))
                })?;
                Kind::Program(pattern.into(), OnceLock::new())
            }
        };
        Ok(Self { re2: re2.into(), kind })
    }

    /// Lowers Envoy's message.
    pub fn lower(proto: &pb::RegexMatcher) -> Result<Self, Unsupported> {
        Self::new(&proto.regex)
    }

    /// The pattern as configured.
    pub fn as_str(&self) -> &str {
        &self.re2
    }

    /// Whether the whole of `value` matches.
    pub fn is_match(&self, value: &[u8]) -> bool {
        match &self.kind {
            Kind::Any => true,
            Kind::NonEmpty => !value.is_empty(),
            Kind::Exact(text) => value == text.as_bytes(),
            Kind::Prefix(text) => value.starts_with(text.as_bytes()),
            Kind::Suffix(text) => value.ends_with(text.as_bytes()),
            Kind::Contains(text) => contains(value, text.as_bytes()),
            Kind::Program(pattern, program) => {
                program.get_or_init(|| compile(pattern).ok()).as_ref().is_some_and(|regex| regex.is_match(value))
            }
        }
    }
}

fn last_line(error: &::regex::Error) -> String {
    error.to_string().lines().last().unwrap_or_default().trim_start_matches("error: ").to_owned()
}

/// Whether `needle` occurs in `value`; an empty needle does.
pub fn contains(value: &[u8], needle: &[u8]) -> bool {
    needle.is_empty() || value.windows(needle.len()).any(|window| window == needle)
}

/// Envoy's `RegexMatchAndSubstitute`: replaces every match; `\1` to `\9` stand for groups, `\0` for
/// the match, `\\` for a backslash.
#[derive(Debug)]
pub struct Rewrite {
    pattern: Box<str>,
    program: OnceLock<Option<bytes::Regex>>,
    parts: Vec<Part>,
}

#[derive(Clone, PartialEq, Debug)]
enum Part {
    Literal(Box<[u8]>),
    Group(usize),
}

impl Rewrite {
    /// Lowers Envoy's message.
    pub fn lower(proto: &pb::RegexMatchAndSubstitute) -> Result<Self, Unsupported> {
        let re2 = &proto.pattern.as_ref().ok_or_else(|| Unsupported::missing("pattern"))?.regex;
        Self::new(re2, &proto.substitution)
    }

    /// Checks pattern and substitution.
    pub fn new(re2: &str, substitution: &str) -> Result<Self, Unsupported> {
        let pattern = translate(re2).within("pattern")?;
        let program = compile(&pattern).map_err(|error| {
            Unsupported::new("pattern.regex", format!("{re2:?} is not valid: {}", last_line(&error)))
        })?;
        let mut parts = Vec::new();
        let mut literal = Vec::new();
        let mut bytes = substitution.bytes();
        let bad = || Unsupported::new("substitution", format!("{substitution:?} is not valid"));
        while let Some(b) = bytes.next() {
            if b != b'\\' {
                literal.push(b);
                continue;
            }
            match bytes.next().ok_or_else(bad)? {
                b'\\' => literal.push(b'\\'),
                digit @ b'0'..=b'9' => {
                    if !literal.is_empty() {
                        parts.push(Part::Literal(std::mem::take(&mut literal).into()));
                    }
                    let group = usize::from(digit - b'0');
                    if group >= program.captures_len() {
                        return Err(Unsupported::new(
                            "substitution",
                            format!("refers to group {group}, which {re2:?} lacks"),
                        ));
                    }
                    parts.push(Part::Group(group));
                }
                _ => return Err(bad()),
            }
        }
        if !literal.is_empty() {
            parts.push(Part::Literal(literal.into()));
        }
        Ok(Self { pattern: pattern.into(), program: OnceLock::new(), parts })
    }

    /// `value` with every match replaced.
    pub fn apply(&self, value: &[u8]) -> Vec<u8> {
        let Some(program) = self.program.get_or_init(|| compile(&self.pattern).ok()) else { return value.to_vec() };
        program
            .replace_all(value, |found: &bytes::Captures<'_>| {
                let mut out = Vec::new();
                for part in &self.parts {
                    match part {
                        Part::Literal(bytes) => out.extend_from_slice(bytes),
                        Part::Group(group) => out.extend(found.get(*group).iter().flat_map(bytes::Match::as_bytes)),
                    }
                }
                out
            })
            .into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(re2: &str, yes: &[&[u8]], no: &[&[u8]]) {
        let regex = Regex::new(re2).unwrap();
        for value in yes {
            assert!(regex.is_match(value), "{re2:?} should match {:?}", String::from_utf8_lossy(value));
        }
        for value in no {
            assert!(!regex.is_match(value), "{re2:?} should not match {:?}", String::from_utf8_lossy(value));
        }
    }

    #[test]
    fn whole_values_only() {
        check("/a.*", &[b"/a", b"/abc"], &[b"/xa", b"x/a"]);
        check("a|b", &[b"a", b"b"], &[b"ab", b"xa", b"bx"]);
        check("GET|PUT", &[b"GET", b"PUT"], &[b"GETX", b"XPUT"]);
        check("^/(v1|v2)/.*$", &[b"/v1/", b"/v2/x"], &[b"/v3/x", b"x/v1/"]);
    }

    #[test]
    fn bytes_that_are_not_utf8() {
        check(".+", &[b"\xff", b"a\nb"], &[b""]);
        check("a.b", &[b"a\xffb", "aéb".as_bytes(), b"a\nb"], &[b"ab", b"a\xff\xffb"]);
        check("a[^/]+b", &[b"a\xff\xfeb", "aéb".as_bytes()], &[b"a/b"]);
        check(r"\W", &[b"\xff", "é".as_bytes(), b"-"], &[b"a"]);
        check("é+", &["éé".as_bytes()], &[b"\xc3"]);
    }

    #[test]
    fn ascii_classes() {
        check(r"\d+", &[b"12"], &["١".as_bytes()]);
        check(r"\w", &[b"a", b"_"], &["é".as_bytes()]);
        check(r"[\w-]+", &[b"a-b"], &[b"a b"]);
        check(r"[\w-z]", &[b"-", b"z", b"q"], &[b" "]);
        check("[a&&b]", &[b"&", b"a"], &[b"c"]);
        check("[[:alpha:]]+", &[b"ab"], &[b"a1"]);
        check("[]a]", &[b"]", b"a"], &[b"b"]);
        check(r"a\sb", &[b"a b", b"a\tb"], &[b"a\x0bb"]);
        check("(?i)abc", &[b"ABC", b"aBc"], &[b"abd"]);
    }

    #[test]
    fn literals_that_only_re2_takes() {
        check("{a}", &[b"{a}"], &[b"a"]);
        check("a{,5}", &[b"a{,5}"], &[b"aa"]);
        check("a{2,3}", &[b"aa", b"aaa"], &[b"a", b"aaaa"]);
        check(r"\Qa.b\E.", &[b"a.bx"], &[b"axbx"]);
        check(r"\-\/\_\@", &[b"-/_@"], &[b"-"]);
        check(r"spiffe://.*/ns/a\.b/.*", &[b"spiffe://x/ns/a.b/sa/c"], &[b"spiffe://x/ns/aXb/sa/c"]);
        check("a*?b??", &[b"aab", b""], &[b"c"]);
    }

    #[test]
    fn refused() {
        for re2 in ["a**", "a+*", "a{2}{3}", "a{1001}", r"\C", "(", "[a", "a\\", r"(a)\1x*\", "(?=a)", "*a", "a{3,2}"] {
            assert!(Regex::new(re2).is_err(), "{re2:?}");
        }
        assert!(Regex::new(r"((a{100}){100}){100}").is_err(), "size limit");
    }

    #[test]
    fn shapes_without_automaton() {
        for re2 in [".*", ".+", "abc", "abc.*", ".*abc", ".*/ns/legacy/.*", r"a\.b"] {
            assert!(!matches!(Regex::new(re2).unwrap().kind, Kind::Program(..)), "{re2:?}");
        }
        check(r"a\.*", &[b"a", b"a.."], &[b"ab"]);
        check(r".*a\.", &[b"xa."], &[b"xab"]);
    }

    #[test]
    fn rewrites() {
        let rewrite = |re2: &str, to: &str, path: &[u8]| Rewrite::new(re2, to).unwrap().apply(path);
        assert_eq!(rewrite(r"^/(v\d)/(.*)$", r"/\2/\1", b"/v1/x/y"), b"/x/y/v1");
        assert_eq!(rewrite("a", "b", b"/aXa"), b"/bXb");
        assert_eq!(rewrite("x", r"\\$1", b"x"), br"\$1");
        assert!(Rewrite::new("a", r"\1").is_err());
        assert!(Rewrite::new("a", r"\x").is_err());
    }
}

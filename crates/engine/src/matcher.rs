//! Envoy's matchers over bytes: strings, headers, query parameters, paths, claims, addresses.
//!
//! Values may hold any bytes (property 12). Of a repeated header each value is matched by itself, as
//! Envoy does from 1.39 on; policies look at the values joined by commas, too, so that neither form
//! hides a value from them ([`Reading`], property 11).

use std::borrow::Cow;
use std::net::IpAddr;
use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::route::v3 as route;
use envoy_types::pb::envoy::extensions::path::r#match::uri_template::v3::UriTemplateMatchConfig;
use envoy_types::pb::envoy::r#type::matcher::v3 as pb;
use ipnet::IpNet;
use serde_json::Value;
use smallvec::SmallVec;
use types::{RequestHead, ResponseHead};

use crate::regex::Regex;
use crate::unsupported::{Unsupported, Within as _, each, unpack};

/// Envoy's `StringMatcher`.
#[derive(Clone, PartialEq, Debug)]
pub enum StringMatcher {
    /// The whole value.
    Exact(Text),
    /// The value begins so.
    Prefix(Text),
    /// The value ends so.
    Suffix(Text),
    /// The value holds it.
    Contains(Text),
    /// The whole value, by pattern.
    Regex(Regex),
}

/// A literal, compared with or without regard to ASCII case.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Text {
    bytes: Box<[u8]>,
    ignore_case: bool,
}

impl Text {
    fn new(text: &str, ignore_case: bool) -> Self {
        Self { bytes: text.as_bytes().into(), ignore_case }
    }

    fn is(&self, value: &[u8]) -> bool {
        if self.ignore_case { value.eq_ignore_ascii_case(&self.bytes) } else { *value == *self.bytes }
    }
}

impl StringMatcher {
    /// Matches exactly `text`.
    pub fn exact(text: &str) -> Self {
        Self::Exact(Text::new(text, false))
    }

    /// The text, when nothing else matches.
    pub fn exact_text(&self) -> Option<&[u8]> {
        match self {
            Self::Exact(text) if !text.ignore_case => Some(&text.bytes),
            _ => None,
        }
    }

    /// Lowers Envoy's message.
    pub fn lower(proto: &pb::StringMatcher) -> Result<Self, Unsupported> {
        use pb::string_matcher::MatchPattern;
        let text = |text: &str| Text::new(text, proto.ignore_case);
        let filled = |value: &str, path: &str| {
            if value.is_empty() { Err(Unsupported::new(path, "must not be empty")) } else { Ok(text(value)) }
        };
        match proto.match_pattern.as_ref().ok_or_else(|| Unsupported::missing("match_pattern"))? {
            MatchPattern::Exact(value) => Ok(Self::Exact(text(value))),
            MatchPattern::Prefix(value) => filled(value, "prefix").map(Self::Prefix),
            MatchPattern::Suffix(value) => filled(value, "suffix").map(Self::Suffix),
            MatchPattern::Contains(value) => filled(value, "contains").map(Self::Contains),
            MatchPattern::SafeRegex(value) => Regex::lower(value).within("safe_regex").map(Self::Regex),
            MatchPattern::Custom(_) => Err(Unsupported::not_built("custom")),
        }
    }

    /// Whether `value` matches.
    pub fn matches(&self, value: &[u8]) -> bool {
        match self {
            Self::Exact(text) => text.is(value),
            Self::Prefix(text) => value.get(..text.bytes.len()).is_some_and(|head| text.is(head)),
            Self::Suffix(text) => {
                value.len().checked_sub(text.bytes.len()).is_some_and(|start| text.is(&value[start..]))
            }
            Self::Contains(text) => value.windows(text.bytes.len()).any(|window| text.is(window)),
            Self::Regex(regex) => regex.is_match(value),
        }
    }

    /// The same matcher without regard to case, where it is a literal: for names of hosts.
    #[must_use]
    pub fn ignoring_case(mut self) -> Self {
        if let Self::Exact(text) | Self::Prefix(text) | Self::Suffix(text) | Self::Contains(text) = &mut self {
            text.ignore_case = true;
        }
        self
    }
}

/// Envoy's `ListStringMatcher`: any of them.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct AnyOf(Vec<StringMatcher>);

impl AnyOf {
    /// Lowers Envoy's message.
    pub fn lower(proto: &pb::ListStringMatcher) -> Result<Self, Unsupported> {
        each(&proto.patterns, "patterns", StringMatcher::lower).map(Self)
    }

    /// Whether one matches.
    pub fn matches(&self, value: &[u8]) -> bool {
        self.0.iter().any(|matcher| matcher.matches(value))
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// How a doubtful value is read.
///
/// A rule that allows must be certain, a rule that denies need not be; inside a negation the two
/// change places.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reading {
    /// Only what certainly matches: repeated headers joined; what cannot be evaluated does not match.
    Strict,
    /// Whatever may match: repeated headers joined or any of them alone; what cannot be evaluated matches.
    Wide,
}

impl Reading {
    /// The reading inside a negation.
    #[must_use]
    pub fn inverted(self) -> Self {
        match self {
            Self::Strict => Self::Wide,
            Self::Wide => Self::Strict,
        }
    }
}

/// Envoy's `HeaderMatcher`.
#[derive(Clone, PartialEq, Debug)]
pub struct HeaderMatcher {
    /// Lower case; a pseudo-header keeps its colon.
    pub name: Box<str>,
    test: HeaderTest,
    invert: bool,
    missing_is_empty: bool,
}

#[derive(Clone, PartialEq, Debug)]
enum HeaderTest {
    Present(bool),
    String(StringMatcher),
    /// `start..end` over a decimal integer.
    Range(i64, i64),
}

impl HeaderMatcher {
    /// Lowers Envoy's message.
    #[expect(deprecated, reason = "Envoy's older fields, which control planes still write")]
    pub fn lower(proto: &route::HeaderMatcher) -> Result<Self, Unsupported> {
        use route::header_matcher::HeaderMatchSpecifier as Specifier;
        if proto.name.is_empty() {
            return Err(Unsupported::missing("name"));
        }
        let test = match &proto.header_match_specifier {
            None => HeaderTest::Present(true),
            Some(Specifier::PresentMatch(present)) => HeaderTest::Present(*present),
            Some(Specifier::StringMatch(matcher)) => {
                HeaderTest::String(StringMatcher::lower(matcher).within("string_match")?)
            }
            Some(Specifier::ExactMatch(text)) => HeaderTest::String(StringMatcher::exact(text)),
            Some(Specifier::PrefixMatch(text)) => HeaderTest::String(StringMatcher::Prefix(Text::new(text, false))),
            Some(Specifier::SuffixMatch(text)) => HeaderTest::String(StringMatcher::Suffix(Text::new(text, false))),
            Some(Specifier::ContainsMatch(text)) if !text.is_empty() => {
                HeaderTest::String(StringMatcher::Contains(Text::new(text, false)))
            }
            Some(Specifier::ContainsMatch(_)) => return Err(Unsupported::new("contains_match", "must not be empty")),
            Some(Specifier::SafeRegexMatch(regex)) => {
                HeaderTest::String(StringMatcher::Regex(Regex::lower(regex).within("safe_regex_match")?))
            }
            Some(Specifier::RangeMatch(range)) => HeaderTest::Range(range.start, range.end),
        };
        Ok(Self {
            name: proto.name.to_ascii_lowercase().into(),
            test,
            invert: proto.invert_match,
            missing_is_empty: proto.treat_missing_header_as_empty,
        })
    }

    /// The same matcher without regard to case in the value.
    #[must_use]
    pub fn ignoring_case(mut self) -> Self {
        if let HeaderTest::String(matcher) = self.test {
            self.test = HeaderTest::String(matcher.ignoring_case());
        }
        self
    }

    /// Whether the request matches: some value of a repeated header does, or for an inverted matcher
    /// none.
    ///
    /// *Source*: Envoy `envoy.reloadable_features.match_headers_individually`.
    pub fn matches(&self, head: &RequestHead) -> bool {
        // `host` is another name of `:authority`, as everywhere in Envoy; `upgrade` is no field here either
        if self.name.starts_with(':') || matches!(&*self.name, "host" | "upgrade") {
            return self.matches_value(head.header(&self.name).as_deref());
        }
        self.matches_each(head.fields.get_all(&self.name))
    }

    /// Whether the response matches.
    pub fn matches_response(&self, head: &ResponseHead) -> bool {
        if &*self.name == ":status" {
            let status = head.status.to_string();
            return self.matches_value(Some(status.as_bytes()));
        }
        self.matches_each(head.fields.get_all(&self.name))
    }

    fn matches_each<'a>(&self, values: impl Iterator<Item = &'a [u8]>) -> bool {
        let mut values = values.peekable();
        if values.peek().is_none() {
            return self.matches_value(None);
        }
        // What holds for a value is inverted once, for all of them.
        values.any(|value| self.matches_value(Some(value)) != self.invert) != self.invert
    }

    /// Whether the request matches under `reading`.
    pub fn matches_under(&self, head: &RequestHead, reading: Reading) -> bool {
        let joined = self.matches_value(head.header(&self.name).as_deref());
        let mut alone = head.fields.get_all(&self.name).map(|value| self.matches_value(Some(value)));
        match (reading, self.invert) {
            (Reading::Wide, _) => joined || alone.any(|matches| matches),
            // `not free` is certain only when no occurrence is `free`.
            (Reading::Strict, true) => joined && alone.all(|matches| matches),
            (Reading::Strict, false) => joined,
        }
    }

    /// Whether a header with this value matches; `None` for an absent header.
    pub fn matches_value(&self, value: Option<&[u8]>) -> bool {
        let holds = match (&self.test, value) {
            (HeaderTest::Present(wanted), value) => value.is_some() == *wanted,
            (test, Some(value)) => test.holds(value),
            (test, None) if self.missing_is_empty => test.holds(b""),
            // Envoy: an absent header matches neither a test nor its opposite.
            (_, None) => return false,
        };
        holds != self.invert
    }
}

impl HeaderTest {
    fn holds(&self, value: &[u8]) -> bool {
        match self {
            Self::Present(wanted) => *wanted,
            Self::String(matcher) => matcher.matches(value),
            Self::Range(start, end) => std::str::from_utf8(value)
                .ok()
                .and_then(|text| text.parse::<i64>().ok())
                .is_some_and(|number| (*start..*end).contains(&number)),
        }
    }
}

/// Envoy's `QueryParameterMatcher`: the first occurrence, not percent-decoded.
#[derive(Clone, PartialEq, Debug)]
pub struct QueryMatcher {
    name: Box<[u8]>,
    test: QueryTest,
}

#[derive(Clone, PartialEq, Debug)]
enum QueryTest {
    Present(bool),
    String(StringMatcher),
}

impl QueryMatcher {
    /// Lowers Envoy's message.
    pub fn lower(proto: &route::QueryParameterMatcher) -> Result<Self, Unsupported> {
        use route::query_parameter_matcher::QueryParameterMatchSpecifier as Specifier;
        if proto.name.is_empty() {
            return Err(Unsupported::missing("name"));
        }
        let test = match &proto.query_parameter_match_specifier {
            None => QueryTest::Present(true),
            Some(Specifier::PresentMatch(present)) => QueryTest::Present(*present),
            Some(Specifier::StringMatch(matcher)) => {
                QueryTest::String(StringMatcher::lower(matcher).within("string_match")?)
            }
        };
        Ok(Self { name: proto.name.as_bytes().into(), test })
    }

    /// Whether the query (without `?`) matches.
    pub fn matches(&self, query: Option<&[u8]>) -> bool {
        let value = query.and_then(|query| query_values(query, &self.name).next());
        match &self.test {
            QueryTest::Present(wanted) => value.is_some() == *wanted,
            QueryTest::String(matcher) => value.is_some_and(|value| matcher.matches(value)),
        }
    }
}

/// Every value of the parameter `name`, as written.
pub fn query_values<'a>(query: &'a [u8], name: &'a [u8]) -> impl Iterator<Item = &'a [u8]> + 'a {
    query.split(|b| *b == b'&').filter_map(move |pair| match pair.iter().position(|b| *b == b'=') {
        Some(at) => (&pair[..at] == name).then(|| &pair[at + 1..]),
        None => (pair == name && !name.is_empty()).then_some(&b""[..]),
    })
}

/// Envoy's `PathMatcher`: the path without query and fragment.
#[derive(Clone, PartialEq, Debug)]
pub struct PathMatcher(StringMatcher);

impl PathMatcher {
    /// Lowers Envoy's message.
    pub fn lower(proto: &pb::PathMatcher) -> Result<Self, Unsupported> {
        let Some(pb::path_matcher::Rule::Path(matcher)) = &proto.rule else { return Err(Unsupported::missing("path")) };
        StringMatcher::lower(matcher).within("path").map(Self)
    }

    /// Whether the request's path matches.
    pub fn matches(&self, head: &RequestHead) -> bool {
        self.0.matches(without_fragment(head.path_only()))
    }
}

/// The path up to a `#`.
pub fn without_fragment(path: &[u8]) -> &[u8] {
    path.iter().position(|b| *b == b'#').map_or(path, |at| &path[..at])
}

/// Envoy's `ValueMatcher` over verified JSON.
#[derive(Clone, PartialEq, Debug)]
pub enum ValueMatcher {
    /// JSON null.
    Null,
    /// A number in `start..end`.
    Range(f64, f64),
    /// Exactly this number.
    Number(f64),
    /// A string that matches.
    String(StringMatcher),
    /// Exactly this truth value.
    Bool(bool),
    /// There is a value (`true`), or none (`false`).
    Present(bool),
    /// A list, one element of which matches.
    List(Box<ValueMatcher>),
    /// One of them matches.
    Or(Vec<ValueMatcher>),
}

impl ValueMatcher {
    /// Lowers Envoy's message.
    pub fn lower(proto: &pb::ValueMatcher) -> Result<Self, Unsupported> {
        use pb::value_matcher::MatchPattern;
        Ok(match proto.match_pattern.as_ref().ok_or_else(|| Unsupported::missing("match_pattern"))? {
            MatchPattern::NullMatch(_) => Self::Null,
            MatchPattern::DoubleMatch(double) => match &double.match_pattern {
                Some(pb::double_matcher::MatchPattern::Range(range)) => Self::Range(range.start, range.end),
                Some(pb::double_matcher::MatchPattern::Exact(value)) => Self::Number(*value),
                None => return Err(Unsupported::missing("double_match")),
            },
            MatchPattern::StringMatch(matcher) => Self::String(StringMatcher::lower(matcher).within("string_match")?),
            MatchPattern::BoolMatch(wanted) => Self::Bool(*wanted),
            MatchPattern::PresentMatch(wanted) => Self::Present(*wanted),
            MatchPattern::ListMatch(list) => match &list.match_pattern {
                Some(pb::list_matcher::MatchPattern::OneOf(inner)) => {
                    Self::List(Box::new(Self::lower(inner).within("list_match.one_of")?))
                }
                None => return Err(Unsupported::missing("list_match")),
            },
            MatchPattern::OrMatch(list) => {
                Self::Or(each(&list.value_matchers, "or_match.value_matchers", Self::lower)?)
            }
        })
    }

    /// Whether `value` matches; `None` when there is none.
    pub fn matches(&self, value: Option<&Value>) -> bool {
        match (self, value) {
            (Self::Present(wanted), value) => value.is_some_and(|value| !value.is_null()) == *wanted,
            (Self::Or(list), value) => list.iter().any(|matcher| matcher.matches(value)),
            (Self::Null, Some(Value::Null)) => true,
            (Self::Range(start, end), Some(Value::Number(number))) => {
                number.as_f64().is_some_and(|number| (*start..*end).contains(&number))
            }
            (Self::Number(wanted), Some(Value::Number(number))) => number.as_f64() == Some(*wanted),
            (Self::String(matcher), Some(Value::String(text))) => matcher.matches(text.as_bytes()),
            (Self::Bool(wanted), Some(Value::Bool(value))) => wanted == value,
            (Self::List(one_of), Some(Value::Array(list))) => list.iter().any(|item| one_of.matches(Some(item))),
            _ => false,
        }
    }
}

/// Dynamic metadata of a request: what filters found out, by filter and key.
///
/// Only the engine's own filters write here, and only verified facts (property 16).
#[derive(Clone, Debug, Default)]
pub struct Metadata {
    entries: SmallVec<[Entry; 4]>,
}

#[derive(Clone, Debug)]
struct Entry {
    filter: Cow<'static, str>,
    key: Box<str>,
    value: Arc<Value>,
}

impl Metadata {
    /// Nothing known.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets `key` of `filter`, replacing what was there.
    pub fn set(&mut self, filter: impl Into<Cow<'static, str>>, key: &str, value: Arc<Value>) {
        let filter = filter.into();
        match self.entries.iter_mut().find(|entry| entry.filter == filter && &*entry.key == key) {
            Some(entry) => entry.value = value,
            None => self.entries.push(Entry { filter, key: key.into(), value }),
        }
    }

    /// The value of `key` of `filter`.
    pub fn get(&self, filter: &str, key: &str) -> Option<&Value> {
        self.entries.iter().find(|entry| entry.filter == filter && &*entry.key == key).map(|entry| &*entry.value)
    }

    /// The value at `path` below `filter`; keys step into JSON objects, by position, literally.
    pub fn at<S: AsRef<str>>(&self, filter: &str, path: &[S]) -> Option<&Value> {
        let (key, rest) = path.split_first()?;
        rest.iter().try_fold(self.get(filter, key.as_ref())?, |value, key| value.as_object()?.get(key.as_ref()))
    }

    /// All entries: filter, key, value.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str, &Value)> {
        self.entries.iter().map(|entry| (&*entry.filter, &*entry.key, &*entry.value))
    }
}

/// Envoy's `MetadataMatcher` over dynamic metadata.
#[derive(Clone, PartialEq, Debug)]
pub struct MetadataMatcher {
    filter: Box<str>,
    path: Vec<Box<str>>,
    value: ValueMatcher,
    invert: bool,
}

impl MetadataMatcher {
    /// Lowers Envoy's message.
    pub fn lower(proto: &pb::MetadataMatcher) -> Result<Self, Unsupported> {
        if proto.filter.is_empty() {
            return Err(Unsupported::missing("filter"));
        }
        if proto.path.is_empty() {
            return Err(Unsupported::missing("path"));
        }
        let path = each(&proto.path, "path", |segment| match &segment.segment {
            Some(pb::metadata_matcher::path_segment::Segment::Key(key)) if !key.is_empty() => Ok(key.as_str().into()),
            _ => Err(Unsupported::missing("key")),
        })?;
        let value = proto.value.as_ref().ok_or_else(|| Unsupported::missing("value"))?;
        Ok(Self {
            filter: proto.filter.as_str().into(),
            path,
            value: ValueMatcher::lower(value).within("value")?,
            invert: proto.invert,
        })
    }

    /// Whether the metadata matches.
    pub fn matches(&self, metadata: &Metadata) -> bool {
        self.value.matches(metadata.at(&self.filter, &self.path)) != self.invert
    }

    /// The filter whose metadata is read.
    pub fn filter(&self) -> &str {
        &self.filter
    }
}

/// A block of addresses; IPv4-mapped IPv6 addresses count as IPv4.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cidr(IpNet);

impl Cidr {
    /// Lowers Envoy's `CidrRange`; without a length it is 0, as in Envoy.
    pub fn lower(proto: &core::CidrRange) -> Result<Self, Unsupported> {
        let address: IpAddr = proto
            .address_prefix
            .parse()
            .map_err(|_| Unsupported::new("address_prefix", format!("{:?} is not an address", proto.address_prefix)))?;
        let length = proto.prefix_len.as_ref().map_or(0, |length| length.value);
        let length = u8::try_from(length).map_err(|_| Unsupported::new("prefix_len", "is too long"))?;
        let (address, length) = match address {
            IpAddr::V6(v6) if length >= 96 && v6.to_ipv4_mapped().is_some() => (address.to_canonical(), length - 96),
            _ => (address, length),
        };
        IpNet::new(address, length)
            .map(|net| Self(net.trunc()))
            .map_err(|_| Unsupported::new("prefix_len", format!("{length} is too long for {address}")))
    }

    /// Whether the block holds `address`.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.0.contains(&address.to_canonical())
    }

    /// Length of the prefix in bits.
    pub fn prefix_len(&self) -> u8 {
        self.0.prefix_len()
    }
}

/// Envoy's `uri_template` matcher: `*` is one segment that is not empty, `**` any text; an
/// operator fills a whole segment, `**` is the last one.
///
/// Unlike Envoy's, operators match every byte a path may hold (property 12).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UriTemplate {
    pieces: Vec<Piece>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Piece {
    Literal(Box<[u8]>),
    Segment,
    Rest,
}

impl UriTemplate {
    /// Lowers the typed extension.
    pub fn lower(proto: &core::TypedExtensionConfig) -> Result<Self, Unsupported> {
        let any = proto.typed_config.as_ref().ok_or_else(|| Unsupported::missing("typed_config"))?;
        Self::new(&unpack::<UriTemplateMatchConfig>(any, "typed_config")?.path_template)
            .within("typed_config.path_template")
    }

    /// Parses a template.
    pub fn new(template: &str) -> Result<Self, Unsupported> {
        let bad = |reason: &str| Unsupported::new("", format!("{template:?} {reason}"));
        let body = template.strip_prefix('/').ok_or_else(|| bad("does not begin with /"))?;
        let mut pieces = Vec::new();
        let mut literal = Vec::new();
        let mut ended = false;
        for segment in body.split('/') {
            literal.push(b'/');
            let operator = match segment.strip_prefix('{').and_then(|rest| rest.strip_suffix('}')) {
                None => segment,
                Some(inner) => match inner.split_once('=').map_or(inner, |(_, operator)| operator) {
                    operator @ ("*" | "**") => operator,
                    _ if inner.contains('=') => return Err(bad("has a variable with another operator than * or **")),
                    _ => "*",
                },
            };
            let piece = match operator {
                "*" => Piece::Segment,
                "**" => Piece::Rest,
                text if text.contains(['*', '{', '}']) => return Err(bad("has an operator inside a segment")),
                text => {
                    literal.extend_from_slice(text.as_bytes());
                    continue;
                }
            };
            if ended {
                return Err(bad("has an operator after **"));
            }
            ended = piece == Piece::Rest;
            pieces.push(Piece::Literal(std::mem::take(&mut literal).into()));
            pieces.push(piece);
        }
        if !literal.is_empty() {
            pieces.push(Piece::Literal(literal.into()));
        }
        Ok(Self { pieces })
    }

    /// Whether `path` (without query) matches.
    pub fn matches(&self, path: &[u8]) -> bool {
        let mut rest = path;
        for (index, piece) in self.pieces.iter().enumerate() {
            match piece {
                Piece::Literal(text) => match rest.strip_prefix(&**text) {
                    Some(after) => rest = after,
                    None => return false,
                },
                Piece::Segment => {
                    let end = rest.iter().position(|b| *b == b'/').unwrap_or(rest.len());
                    if end == 0 {
                        return false;
                    }
                    rest = &rest[end..];
                }
                Piece::Rest => {
                    return match self.pieces.get(index + 1) {
                        Some(Piece::Literal(tail)) => rest.ends_with(tail),
                        _ => true,
                    };
                }
            }
        }
        rest.is_empty()
    }
}

mod describe;

#[cfg(test)]
#[expect(deprecated, reason = "Envoy's older fields, which control planes still write")]
mod tests;

//! Message heads: one form for HTTP/1.1, HTTP/2 and gRPC.
//!
//! A head owns one buffer for names, one for values, and a flat, ordered list of spans into them.
//! Reading a head costs three allocations however many fields it has, an edit appends to the
//! buffers, and a cleared head keeps its memory for the next message of the connection. Names are
//! text from the moment they are stored, so that nobody has to look at them again to read them as such.
//!
//! **Invariants.** Field names are lower case (asserted in debug builds). Pseudo-fields (`:path`
//! and the like) are never in the list; they have their own places. Values are bytes: any octet
//! but CR, LF and NUL, without leading or trailing white space; the codecs enforce it (property 4).

use std::fmt;

/// The protocol a message arrived with, or leaves with.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub enum Version {
    /// HTTP/1.0
    Http10,
    /// HTTP/1.1
    #[default]
    Http11,
    /// HTTP/2
    Http2,
}

impl Version {
    /// As access logs write it (Envoy's `%PROTOCOL%`).
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http10 => "HTTP/1.0",
            Self::Http11 => "HTTP/1.1",
            Self::Http2 => "HTTP/2",
        }
    }
}

/// The scheme of a request.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Scheme {
    /// `http`
    #[default]
    Http,
    /// `https`
    Https,
}

impl Scheme {
    /// `http` or `https`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Span {
    start: u32,
    len: u32,
}

impl Span {
    #[inline]
    fn range(self) -> std::ops::Range<usize> {
        self.start as usize..(self.start + self.len) as usize
    }

    /// The span behind `before` bytes, `len` long.
    #[inline]
    fn behind(before: usize, len: usize) -> Self {
        const BOUNDED: &str = "heads are bounded far below 4 GiB by the codecs";
        Self { start: u32::try_from(before).expect(BOUNDED), len: u32::try_from(len).expect(BOUNDED) }
    }
}

#[inline]
fn store_text(buf: &mut String, text: &str) -> Span {
    let span = Span::behind(buf.len(), text.len());
    buf.push_str(text);
    span
}

#[derive(Clone, Copy)]
struct Entry {
    name: Span,
    value: Span,
}

/// An ordered list of fields (headers or trailers).
///
/// *Shape*: order of arrival; a name may occur many times; names are lower case.
/// *Cost*: lookups walk the list (heads are short); edits append; nothing is moved but list entries.
#[derive(Clone, Default)]
pub struct Fields {
    names: String,
    values: Vec<u8>,
    list: Vec<Entry>,
}

impl Fields {
    /// An empty list that allocates on first use.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty list with room for `fields` fields and `bytes` bytes of values.
    pub fn with_capacity(fields: usize, bytes: usize) -> Self {
        let mut made = Self::default();
        made.reserve(fields, bytes);
        made
    }

    /// Bytes of memory it holds, used or not.
    pub fn held(&self) -> usize {
        self.names.capacity() + self.values.capacity() + self.list.capacity() * size_of::<Entry>()
    }

    /// Makes room for `fields` fields more, and `bytes` bytes of their values.
    pub fn reserve(&mut self, fields: usize, bytes: usize) {
        // longer names make it grow once
        const NAME: usize = 16;
        self.names.reserve(fields * NAME);
        self.values.reserve(bytes);
        self.list.reserve(fields);
    }

    #[inline]
    fn name(&self, entry: &Entry) -> &str {
        &self.names[entry.name.range()]
    }

    #[inline]
    fn value(&self, span: Span) -> &[u8] {
        &self.values[span.range()]
    }

    #[inline]
    fn store(&mut self, bytes: &[u8]) -> Span {
        let span = Span::behind(self.values.len(), bytes.len());
        self.values.extend_from_slice(bytes);
        span
    }

    /// Appends a field; `name` must be lower case already.
    pub fn push(&mut self, name: &str, value: &[u8]) {
        debug_assert!(!name.bytes().any(|b| b.is_ascii_uppercase()), "field names are lower case: {name}");
        debug_assert!(!name.starts_with(':'), "pseudo-fields are not fields: {name}");
        let name = store_text(&mut self.names, name);
        let value = self.store(value);
        self.list.push(Entry { name, value });
    }

    /// Appends a field whose ASCII `name` may be in any case; it is stored lower case.
    pub fn push_any_case(&mut self, name: &str, value: &[u8]) {
        let name = store_text(&mut self.names, name);
        self.names[name.range()].make_ascii_lowercase();
        let value = self.store(value);
        self.list.push(Entry { name, value });
    }

    /// Number of fields.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether there is no field.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Bytes of all names and values.
    pub fn bytes(&self) -> usize {
        self.list.iter().map(|entry| (entry.name.len + entry.value.len) as usize).sum()
    }

    #[inline]
    fn position(&self, name: &str) -> Option<usize> {
        self.list.iter().position(|entry| self.name(entry) == name)
    }

    /// The first value of `name` (lower case).
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        self.position(name).map(|at| self.value(self.list[at].value))
    }

    /// The first value of `name`, if it is UTF-8.
    pub fn get_str(&self, name: &str) -> Option<&str> {
        self.get(name).and_then(|value| std::str::from_utf8(value).ok())
    }

    /// Whether `name` occurs.
    pub fn contains(&self, name: &str) -> bool {
        self.position(name).is_some()
    }

    /// Every value of `name`, in order.
    pub fn get_all<'a>(&'a self, name: &str) -> impl Iterator<Item = &'a [u8]> {
        self.list.iter().filter(move |entry| self.name(entry) == name).map(|entry| self.value(entry.value))
    }

    /// Every value of `name` joined by `,`: the one value that repeated headers stand for, which
    /// policies look at beside each alone (property 11). `None` if the field is absent; borrows when it occurs once.
    pub fn joined(&self, name: &str) -> Option<std::borrow::Cow<'_, [u8]>> {
        let mut values = self.get_all(name);
        let first = values.next()?;
        let Some(second) = values.next() else { return Some(first.into()) };
        let mut all = first.to_vec();
        for value in std::iter::once(second).chain(values) {
            all.push(b',');
            all.extend_from_slice(value);
        }
        Some(all.into())
    }

    /// All fields in order. Names are ASCII lower case.
    #[inline]
    pub fn iter(&self) -> impl Iterator<Item = (&str, &[u8])> + '_ {
        self.list.iter().map(|entry| (self.name(entry), self.value(entry.value)))
    }

    /// The buffer in which all values lie, among others: for a codec that copies it once instead of
    /// each value. [`Self::spans`] tells where each lies.
    pub fn buffer(&self) -> &[u8] {
        &self.values
    }

    /// All fields in order, each value by its place in [`Self::buffer`].
    pub fn spans(&self) -> impl Iterator<Item = (&str, std::ops::Range<usize>)> + '_ {
        self.list.iter().map(|entry| (self.name(entry), entry.value.range()))
    }

    /// Replaces every occurrence of `name` by one with `value`, at the place of the first.
    pub fn set(&mut self, name: &str, value: &[u8]) {
        let Some(at) = self.position(name) else { return self.push(name, value) };
        self.list[at].value = self.store(value);
        self.remove_from(at + 1, name);
    }

    /// Removes every occurrence of `name`; says whether there was one.
    pub fn remove(&mut self, name: &str) -> bool {
        let found = self.position(name);
        if let Some(at) = found {
            self.remove_from(at, name);
        }
        found.is_some()
    }

    fn remove_from(&mut self, start: usize, name: &str) {
        let names = &self.names;
        let mut index = 0;
        self.list.retain(|entry| {
            index += 1;
            index <= start || &names[entry.name.range()] != name
        });
    }

    /// Keeps the fields for which `keep(name, value)` holds.
    #[inline]
    pub fn retain(&mut self, mut keep: impl FnMut(&str, &[u8]) -> bool) {
        let (names, values) = (&self.names, &self.values);
        self.list.retain(|entry| keep(&names[entry.name.range()], &values[entry.value.range()]));
    }

    /// Forgets all fields, keeps the memory.
    pub fn clear(&mut self) {
        self.names.clear();
        self.values.clear();
        self.list.clear();
    }
}

impl fmt::Debug for Fields {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter().map(|(name, value)| (name, String::from_utf8_lossy(value)))).finish()
    }
}

impl PartialEq for Fields {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

impl<'a> FromIterator<(&'a str, &'a [u8])> for Fields {
    fn from_iter<I: IntoIterator<Item = (&'a str, &'a [u8])>>(iter: I) -> Self {
        let mut fields = Self::new();
        for (name, value) in iter {
            fields.push(name, value);
        }
        fields
    }
}

/// The head of a request.
#[derive(Clone, Default)]
pub struct RequestHead {
    /// How it arrived.
    pub version: Version,
    /// `:scheme`, or what the connection implies.
    pub scheme: Scheme,
    /// The headers, without `host` (that is the authority).
    pub fields: Fields,
    method: Span,
    authority: Span,
    path: Span,
    protocol: Option<Span>,
}

impl RequestHead {
    /// A head with method, authority and path (with query), no fields, HTTP/1.1.
    pub fn new(method: &str, authority: &str, path: &str) -> Self {
        let mut head = Self::default();
        head.set_method(method);
        head.set_authority(authority.as_bytes());
        head.set_path(path.as_bytes());
        head
    }

    /// `GET`, … exactly as sent (methods are case-sensitive).
    #[inline]
    pub fn method(&self) -> &str {
        &self.fields.names[self.method.range()]
    }

    /// Sets the method.
    pub fn set_method(&mut self, method: &str) {
        self.method = store_text(&mut self.fields.names, method);
    }

    /// `:authority` or `Host`, exactly as sent.
    #[inline]
    pub fn authority(&self) -> &[u8] {
        self.fields.value(self.authority)
    }

    /// The authority, if it is UTF-8.
    pub fn authority_str(&self) -> &str {
        std::str::from_utf8(self.authority()).unwrap_or_default()
    }

    /// Sets the authority.
    pub fn set_authority(&mut self, authority: &[u8]) {
        self.authority = self.fields.store(authority);
    }

    /// Path and query, `/a?b=c`; `*` for a server-wide OPTIONS; empty for CONNECT.
    #[inline]
    pub fn path(&self) -> &[u8] {
        self.fields.value(self.path)
    }

    /// Path without the query.
    pub fn path_only(&self) -> &[u8] {
        let path = self.path();
        path.iter().position(|b| *b == b'?').map_or(path, |at| &path[..at])
    }

    /// The query without `?`; `None` when there is no `?`.
    pub fn query(&self) -> Option<&[u8]> {
        let path = self.path();
        path.iter().position(|b| *b == b'?').map(|at| &path[at + 1..])
    }

    /// Sets path and query.
    pub fn set_path(&mut self, path: &[u8]) {
        self.path = self.fields.store(path);
    }

    /// `:protocol` of an extended CONNECT, or the `upgrade` token of HTTP/1.1.
    pub fn protocol(&self) -> Option<&[u8]> {
        self.protocol.map(|span| self.fields.value(span))
    }

    /// Whether it asks for bytes both ways in place of a body: an upgrade, or CONNECT.
    pub fn asks_for_tunnel(&self) -> bool {
        self.protocol.is_some() || self.method() == "CONNECT"
    }

    /// Sets or clears the upgrade protocol.
    pub fn set_protocol(&mut self, protocol: Option<&[u8]>) {
        self.protocol = protocol.map(|bytes| self.fields.store(bytes));
    }

    /// Value of a header or of the pseudo-header `:method`, `:path`, `:authority` (or `host`),
    /// `:scheme` (`upgrade` is what the client wants to go on with, over HTTP/2 too), every occurrence joined by `,`.
    pub fn header(&self, name: &str) -> Option<std::borrow::Cow<'_, [u8]>> {
        self.pseudo(name).map(Into::into).or_else(|| self.fields.joined(name))
    }

    /// Value of a header's first occurrence, or of a pseudo-header: what Envoy's formatters see.
    pub fn first(&self, name: &str) -> Option<&[u8]> {
        self.pseudo(name).or_else(|| self.fields.get(name))
    }

    fn pseudo(&self, name: &str) -> Option<&[u8]> {
        match name {
            ":method" => Some(self.method().as_bytes()),
            ":path" => Some(self.path()),
            ":authority" | "host" => Some(self.authority()),
            ":scheme" => Some(self.scheme.as_str().as_bytes()),
            "upgrade" => self.protocol(),
            _ => None,
        }
    }

    /// Whether the request is gRPC: `content-type` is `application/grpc` or begins with
    /// `application/grpc+` (Envoy's rule).
    pub fn is_grpc(&self) -> bool {
        self.fields.get("content-type").is_some_and(is_grpc_content_type)
    }

    /// Forgets everything, keeps the memory.
    pub fn clear(&mut self) {
        let mut fields = std::mem::take(&mut self.fields);
        fields.clear();
        *self = Self { fields, ..Self::default() };
    }
}

/// Whether a `content-type` value means gRPC.
pub fn is_grpc_content_type(value: &[u8]) -> bool {
    const GRPC: &[u8] = b"application/grpc";
    value.len() >= GRPC.len()
        && value[..GRPC.len()].eq_ignore_ascii_case(GRPC)
        && matches!(value.get(GRPC.len()), None | Some(b'+'))
}

impl fmt::Debug for RequestHead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RequestHead")
            .field("method", &self.method())
            .field("scheme", &self.scheme.as_str())
            .field("authority", &self.authority_str())
            .field("path", &String::from_utf8_lossy(self.path()))
            .field("version", &self.version)
            .field("fields", &self.fields)
            .finish_non_exhaustive()
    }
}

/// The head of a response.
#[derive(Clone, Default, PartialEq)]
pub struct ResponseHead {
    /// How it arrived.
    pub version: Version,
    /// 100 to 999.
    pub status: u16,
    /// The headers.
    pub fields: Fields,
}

impl ResponseHead {
    /// A head with `status` and no fields, HTTP/1.1.
    pub fn new(status: u16) -> Self {
        Self { version: Version::Http11, status, fields: Fields::new() }
    }

    /// Whether the response is gRPC.
    pub fn is_grpc(&self) -> bool {
        self.fields.get("content-type").is_some_and(is_grpc_content_type)
    }
}

impl fmt::Debug for ResponseHead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseHead")
            .field("status", &self.status)
            .field("version", &self.version)
            .field("fields", &self.fields)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn set_replaces_all_in_the_place_of_the_first() {
        let mut fields = Fields::new();
        fields.push("a", b"1");
        fields.push("b", b"2");
        fields.push("a", b"3");
        fields.set("a", b"4");
        let all: Vec<_> = fields.iter().collect();
        assert_eq!(all, [("a", &b"4"[..]), ("b", &b"2"[..])]);
    }

    #[test]
    fn removing_takes_all_of_a_name_and_no_other() {
        let mut fields: Fields = [("a", &b"1"[..]), ("b", b"2"), ("a", b"3"), ("c", b"4")].into_iter().collect();
        assert!(fields.remove("a"));
        assert!(!fields.remove("a"));
        assert_eq!(fields.iter().map(|(name, _)| name).collect::<Vec<_>>(), ["b", "c"]);
    }

    #[test]
    fn joined_sees_every_occurrence() {
        let mut fields = Fields::new();
        assert!(fields.joined("x").is_none());
        fields.push_any_case("X", b"1");
        fields.push("x", b"2");
        assert_eq!(&*fields.joined("x").unwrap(), b"1,2");
    }

    #[test]
    fn spans_lead_to_the_values() {
        let mut head = RequestHead::new("GET", "a", "/");
        head.fields.push("x", b"1");
        head.fields.set("x", b"22");
        head.fields.push("y", b"");
        let by_span: Vec<_> = head.fields.spans().map(|(name, span)| (name, &head.fields.buffer()[span])).collect();
        assert_eq!(by_span, head.fields.iter().collect::<Vec<_>>());
    }

    #[test]
    fn path_and_query() {
        let head = RequestHead::new("GET", "a", "/x?y=1?2");
        assert_eq!(head.path_only(), b"/x");
        assert_eq!(head.query(), Some(&b"y=1?2"[..]));
    }

    #[test]
    fn grpc_is_told_by_type() {
        assert!(is_grpc_content_type(b"application/grpc"));
        assert!(is_grpc_content_type(b"application/grpc+proto"));
        assert!(!is_grpc_content_type(b"application/grpc-web"));
    }

    #[test]
    fn a_cleared_head_is_empty() {
        let mut head = RequestHead::new("GET", "a", "/x");
        head.fields.push("a", b"1");
        head.clear();
        assert_eq!((head.method(), head.path(), head.fields.len()), ("", &b""[..], 0));
    }
}

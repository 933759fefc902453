//! Where a request carries tokens.

use percent_encoding::percent_decode;
use types::RequestHead;

use crate::matcher::query_values;

/// A place tokens are looked for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Location {
    /// A header, after a prefix.
    Header { name: Box<str>, prefix: Box<str> },
    /// A query parameter.
    Query(Box<str>),
    /// A cookie.
    Cookie(Box<str>),
}

impl Location {
    /// Every token there, in order. What does not begin with the prefix is no token; anything else
    /// that follows it belongs to the token and must be valid with it.
    pub(super) fn tokens(&self, head: &RequestHead) -> Vec<String> {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_matches([' ', '\t']).to_owned();
        match self {
            Self::Header { name, prefix } => head
                .fields
                .get_all(name)
                .filter_map(|value| value.strip_prefix(prefix.as_bytes()))
                .map(text)
                .filter(|token| !token.is_empty())
                .collect(),
            Self::Query(name) => head
                .query()
                .into_iter()
                .flat_map(|query| query_values(query, name.as_bytes()))
                .map(|value| text(&percent_decode(value).collect::<Vec<_>>()))
                .filter(|token| !token.is_empty())
                .collect(),
            Self::Cookie(name) => cookies(head)
                .filter(|(found, _)| *found == name.as_bytes())
                .map(|(_, value)| text(value.strip_prefix(b"\"").and_then(|v| v.strip_suffix(b"\"")).unwrap_or(value)))
                .filter(|token| !token.is_empty())
                .collect(),
        }
    }

    /// Takes the token away, so that it does not reach the application.
    pub(super) fn clear(&self, head: &mut RequestHead) {
        match self {
            Self::Header { name, .. } => {
                head.fields.remove(name);
            }
            Self::Query(name) => {
                let Some(query) = head.query() else { return };
                let pairs = query.split(|b| *b == b'&').filter(|pair| !pair.is_empty());
                // Names, and values with their `=`.
                let pairs = pairs.map(|pair| pair.split_at(pair.iter().position(|b| *b == b'=').unwrap_or(pair.len())));
                let mut kept: Vec<_> = pairs.filter(|(found, _)| *found != name.as_bytes()).collect();
                // As Envoy writes a query anew: in the order of names, each with its `=`. Unlike there,
                // escapes stay: what they stand for must not become a parameter of its own.
                kept.sort_by_key(|(name, _)| *name);
                let mut path = head.path_only().to_vec();
                for (number, (name, value)) in kept.into_iter().enumerate() {
                    path.push(if number == 0 { b'?' } else { b'&' });
                    path.extend_from_slice(name);
                    path.extend_from_slice(if value.is_empty() { b"=" } else { value });
                }
                head.set_path(&path);
            }
            Self::Cookie(name) => {
                let kept: Vec<_> = cookies(head)
                    .filter(|(found, _)| *found != name.as_bytes())
                    .map(|(name, value)| if name.is_empty() { value.to_vec() } else { [name, b"=", value].concat() })
                    .collect();
                head.fields.remove("cookie");
                if !kept.is_empty() {
                    head.fields.push("cookie", &kept.join(&b"; "[..]));
                }
            }
        }
    }
}

/// Names and values of all cookies; a value without a name has an empty one.
fn cookies(head: &RequestHead) -> impl Iterator<Item = (&[u8], &[u8])> {
    head.fields
        .get_all("cookie")
        .flat_map(|line| line.split(|b| *b == b';'))
        .map(<[u8]>::trim_ascii)
        .filter(|pair| !pair.is_empty())
        .map(|pair| match pair.iter().position(|b| *b == b'=') {
            Some(at) => (pair[..at].trim_ascii(), pair[at + 1..].trim_ascii()),
            None => (&b""[..], pair),
        })
}

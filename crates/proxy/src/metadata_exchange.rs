//! Peers of a byte stream tell each other who they are, ahead of the first byte.
//!
//! Only where ALPN agreed on it. Each side sends a header before its own first byte and takes the
//! other's off the front of what it reads; a stream that does not begin with one passes unchanged.
//!
//! ```text
//!   magic 0x3d230467 (4) | length (4) | google.protobuf.Any of a Struct | the stream …
//! ```
//!
//! *Source*: Istio's proxy, network filter `metadata_exchange`.

use base64::Engine as _;
use engine::config::NodeFacts;
use envoy_types::pb::google::protobuf::{Any, Struct, Value, value::Kind};
use prost::Message as _;

const MAGIC: [u8; 4] = 0x3d23_0467_u32.to_be_bytes();
/// A header that claims more is none.
const LENGTH_MAX: usize = 64 * 1024;

/// What we send.
pub(crate) fn header(node: &NodeFacts) -> Vec<u8> {
    let metadata = base64::engine::general_purpose::STANDARD.decode(node.peer_metadata.as_bytes()).unwrap_or_default();
    let metadata = Struct::decode(metadata.as_slice()).unwrap_or_default();
    let told = Struct {
        fields: [
            ("x-envoy-peer-metadata".to_owned(), Value { kind: Some(Kind::StructValue(metadata)) }),
            ("x-envoy-peer-metadata-id".to_owned(), Value { kind: Some(Kind::StringValue(node.id.to_string())) }),
        ]
        .into_iter()
        .collect(),
    };
    let any = Any { type_url: "type.googleapis.com/google.protobuf.Struct".into(), value: told.encode_to_vec() };
    let length = u32::try_from(any.encoded_len()).unwrap_or(u32::MAX);
    let mut out = MAGIC.to_vec();
    out.extend(length.to_be_bytes());
    out.extend(any.encode_to_vec());
    out
}

/// Takes a header off the front of a stream.
#[derive(Debug, Default)]
pub(crate) struct Strip {
    seen: Vec<u8>,
}

impl Strip {
    /// Takes more of the stream. `Some`: the header, if there was one, is gone; this is what follows.
    pub(crate) fn take(&mut self, bytes: &[u8]) -> Option<Vec<u8>> {
        self.seen.extend_from_slice(bytes);
        let n = self.seen.len().min(MAGIC.len());
        if self.seen[..n] != MAGIC[..n] {
            return Some(std::mem::take(&mut self.seen));
        }
        let length = self.seen.get(4..8)?.iter().fold(0, |sum, b| sum << 8 | usize::from(*b));
        if length > LENGTH_MAX {
            return Some(std::mem::take(&mut self.seen));
        }
        if self.seen.len() < 8 + length {
            return None;
        }
        let rest = self.seen.split_off(8 + length);
        self.seen = Vec::new();
        Some(rest)
    }

    /// The stream has ended: what was held back, if anything.
    pub(crate) fn end(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.seen)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_come_off_in_any_pieces() {
        let mut stream = header(&NodeFacts { id: "me".into(), ..NodeFacts::default() });
        stream.extend(b"hello");
        for piece in 1..=stream.len() {
            let mut strip = Strip::default();
            let mut rest = Vec::new();
            let mut done = false;
            for chunk in stream.chunks(piece) {
                if done {
                    rest.extend_from_slice(chunk);
                } else if let Some(more) = strip.take(chunk) {
                    done = true;
                    rest.extend(more);
                }
            }
            assert!(done && rest == b"hello", "pieces of {piece}: {rest:?}");
        }
    }

    #[test]
    fn what_is_no_header_passes() {
        assert_eq!(Strip::default().take(b"hello"), Some(b"hello".to_vec()));
        let mut strip = Strip::default();
        assert_eq!(strip.take(&MAGIC[..2]), None);
        assert_eq!(strip.end(), MAGIC[..2]);
        let mut claims = MAGIC.to_vec();
        claims.extend([0xff; 4]);
        assert_eq!(Strip::default().take(&claims), Some(claims.clone()));
    }
}

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

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use engine::config::NodeFacts;
use envoy_types::pb::google::protobuf::Any;
use prost::Message;

const MAGIC: [u8; 4] = 0x3d23_0467_u32.to_be_bytes();
/// A header that claims more is none.
const LENGTH_MAX: usize = 64 * 1024;
const STRUCT: &str = "google.protobuf.Struct";
const METADATA: &str = "x-envoy-peer-metadata";
const ID: &str = "x-envoy-peer-metadata-id";

/// A `google.protobuf.Struct` whose inner structs stay the bytes they are: whoever tells the same is
/// known again by them.
#[derive(Clone, PartialEq, Message)]
struct Told {
    #[prost(btree_map = "string, message", tag = "1")]
    fields: BTreeMap<String, ToldValue>,
}

/// A `google.protobuf.Value`, as far as it is told.
#[derive(Clone, PartialEq, Message)]
struct ToldValue {
    /// `string_value`
    #[prost(string, optional, tag = "3")]
    text: Option<String>,
    /// `struct_value`, encoded.
    #[prost(bytes = "vec", optional, tag = "5")]
    structure: Option<Vec<u8>>,
}

/// What we send.
pub(crate) fn header(node: &NodeFacts) -> Vec<u8> {
    let metadata = STANDARD.decode(node.peer_metadata.as_bytes()).unwrap_or_default();
    let told = Told {
        fields: [
            (METADATA.to_owned(), ToldValue { structure: Some(metadata), ..ToldValue::default() }),
            (ID.to_owned(), ToldValue { text: Some(node.id.to_string()), ..ToldValue::default() }),
        ]
        .into(),
    };
    let any = Any { type_url: format!("type.googleapis.com/{STRUCT}"), value: told.encode_to_vec() };
    let length = u32::try_from(any.encoded_len()).unwrap_or(u32::MAX);
    let mut out = MAGIC.to_vec();
    out.extend(length.to_be_bytes());
    out.extend(any.encode_to_vec());
    out
}

/// What a header tells: the node metadata as `x-envoy-peer-metadata` holds it. `None`: nothing that
/// can be read.
fn told(header: &[u8]) -> Option<Box<[u8]>> {
    let any = Any::decode(header).ok().filter(|any| any.type_url.rsplit('/').next() == Some(STRUCT))?;
    let metadata = Told::decode(any.value.as_slice()).ok()?.fields.remove(METADATA)?.structure?;
    Some(STANDARD.encode(metadata).into_bytes().into())
}

/// The front of a stream, once it is known.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Front {
    /// The peer's node metadata, as `x-envoy-peer-metadata` holds it, if it told any.
    pub(crate) metadata: Option<Box<[u8]>>,
    /// What follows the header.
    pub(crate) rest: Vec<u8>,
}

/// Takes a header off the front of a stream.
#[derive(Debug, Default)]
pub(crate) struct Strip {
    seen: Vec<u8>,
}

impl Strip {
    /// Takes more of the stream; `None` as long as it may be a header.
    pub(crate) fn take(&mut self, bytes: &[u8]) -> Option<Front> {
        self.seen.extend_from_slice(bytes);
        let n = self.seen.len().min(MAGIC.len());
        if self.seen[..n] != MAGIC[..n] {
            return Some(self.end());
        }
        let length = self.seen.get(4..8)?.iter().fold(0, |sum, b| sum << 8 | usize::from(*b));
        if length > LENGTH_MAX {
            return Some(self.end());
        }
        if self.seen.len() < 8 + length {
            return None;
        }
        let rest = self.seen.split_off(8 + length);
        let header = std::mem::take(&mut self.seen);
        Some(Front { metadata: told(&header[8..]), rest })
    }

    /// There is no header: what was held back, if anything.
    pub(crate) fn end(&mut self) -> Front {
        Front { metadata: None, rest: std::mem::take(&mut self.seen) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Everything that passes a [`Strip`], and what it learned.
    fn pass(stream: &[u8], piece: usize) -> Front {
        let mut strip = Some(Strip::default());
        let mut all = Front { metadata: None, rest: Vec::new() };
        for chunk in stream.chunks(piece) {
            match &mut strip {
                None => all.rest.extend_from_slice(chunk),
                Some(taking) => {
                    if let Some(front) = taking.take(chunk) {
                        (all, strip) = (front, None);
                    }
                }
            }
        }
        if let Some(mut taking) = strip {
            all = taking.end();
        }
        all
    }

    #[test]
    fn headers_come_off_in_any_pieces() {
        let metadata = STANDARD.encode([0x0a, 0x03, 0x0a, 0x01, b'x']);
        let node = NodeFacts { id: "me".into(), peer_metadata: metadata.as_str().into() };
        let mut stream = header(&node);
        assert_eq!(stream, header(&node), "equal facts are equal bytes");
        stream.extend(b"hello");
        for piece in 1..=stream.len() {
            let front = pass(&stream, piece);
            assert_eq!(front.rest, b"hello", "pieces of {piece}");
            assert_eq!(front.metadata.as_deref(), Some(metadata.as_bytes()), "pieces of {piece}");
        }
    }

    #[test]
    fn others_read_what_we_send() {
        use envoy_types::pb::google::protobuf::{Struct, Value, value::Kind};
        let text = |text: &str| Value { kind: Some(Kind::StringValue(text.into())) };
        let own = Struct { fields: [("NAMESPACE".to_owned(), text("shop"))].into() };
        let node = NodeFacts { id: "me".into(), peer_metadata: STANDARD.encode(own.encode_to_vec()).into() };
        let any = Any::decode(&header(&node)[8..]).unwrap();
        let read = Struct::decode(any.value.as_slice()).unwrap();
        assert_eq!(read.fields[METADATA].kind, Some(Kind::StructValue(own)));
        assert_eq!(read.fields[ID], text("me"));
    }

    #[test]
    fn what_is_no_header_passes() {
        let whole = |bytes: &[u8]| Front { metadata: None, rest: bytes.to_vec() };
        assert_eq!(pass(b"hello", 9), whole(b"hello"));
        assert_eq!(pass(&MAGIC[..2], 1), whole(&MAGIC[..2]));
        let mut claims = MAGIC.to_vec();
        claims.extend([0xff; 4]);
        assert_eq!(pass(&claims, 9), whole(&claims));
    }

    #[test]
    fn a_header_that_cannot_be_read_tells_nothing() {
        let with = |payload: &[u8]| {
            let mut stream = MAGIC.to_vec();
            stream.extend(u32::try_from(payload.len()).unwrap().to_be_bytes());
            stream.extend_from_slice(payload);
            stream.extend(b"hello");
            pass(&stream, 3)
        };
        let other = Any { type_url: "a/google.protobuf.Empty".into(), value: Vec::new() };
        let empty = Any { type_url: format!("a/{STRUCT}"), value: Vec::new() };
        for payload in [vec![], vec![0xff; 20], other.encode_to_vec(), empty.encode_to_vec()] {
            assert_eq!(with(&payload), Front { metadata: None, rest: b"hello".to_vec() });
        }
    }
}

//! A content hash of encoded protobuf that does not depend on the order of map entries.
//!
//! Generated messages keep maps in `HashMap`s, so that the same message encodes differently each
//! time. Equal content must give an equal version, or every compile would push everything.
//!
//! The wire does not say which fields are maps. A run of two or more fields of one number counts
//! as a map when each is a message of exactly field 1, a printable string, and field 2,
//! length-delimited, and no key comes twice. Lists that look so too (custom tags, header values)
//! differ by order in nothing that Envoy acts on; a pure reordering of them is not noticed.

use xxhash_rust::xxh64::{Xxh64, xxh64};

/// Deeper nesting than Envoy's messages have; hashed as bytes from there.
const DEPTH_MAX: usize = 64;

/// The hash of one encoded message. *Cost*: a few passes over the bytes.
pub fn hash(message: &[u8]) -> u64 {
    hash_message(message, 0).unwrap_or_else(|| xxh64(message, 1))
}

#[derive(Clone, Copy)]
enum Value<'a> {
    Scalar(u64),
    Bytes(&'a [u8]),
}

/// One field: its tag (number and wire type) and value.
type Field<'a> = (u64, Value<'a>);

fn hash_message(message: &[u8], depth: usize) -> Option<u64> {
    if depth > DEPTH_MAX {
        return None;
    }
    let fields = split(message)?;
    let mut hasher = Xxh64::new(2);
    let mut rest = fields.as_slice();
    while let Some(&(tag, _)) = rest.first() {
        let run_len = rest.iter().take_while(|field| field.0 == tag).count();
        let (run, after) = rest.split_at(run_len);
        rest = after;
        let mut hashes: Vec<u64> = run.iter().map(|(_, value)| hash_value(*value, depth)).collect();
        if is_map(run) {
            hashes.sort_unstable();
        }
        for hash in hashes {
            hasher.update(&tag.to_le_bytes());
            hasher.update(&hash.to_le_bytes());
        }
    }
    Some(hasher.digest())
}

fn hash_value(value: Value<'_>, depth: usize) -> u64 {
    match value {
        Value::Scalar(scalar) => xxh64(&scalar.to_le_bytes(), 3),
        Value::Bytes([]) => 0,
        Value::Bytes(bytes) => hash_message(bytes, depth + 1).unwrap_or_else(|| xxh64(bytes, 4)),
    }
}

fn is_map(run: &[Field<'_>]) -> bool {
    if run.len() < 2 {
        return false;
    }
    let mut keys = Vec::with_capacity(run.len());
    for (_, value) in run {
        let Value::Bytes(bytes) = value else { return false };
        let Some(fields) = split(bytes) else { return false };
        let [(10, Value::Bytes(key)), (18, Value::Bytes(_))] = fields.as_slice() else { return false };
        if key.is_empty() || !key.iter().all(|byte| (0x20..0x7f).contains(byte)) {
            return false;
        }
        keys.push(*key);
    }
    keys.sort_unstable();
    keys.windows(2).all(|pair| pair[0] != pair[1])
}

/// The fields of a message; `None` when the bytes are not one.
fn split(mut bytes: &[u8]) -> Option<Vec<Field<'_>>> {
    let mut fields = Vec::new();
    while !bytes.is_empty() {
        let tag = varint(&mut bytes)?;
        if tag >> 3 == 0 || tag >> 3 > 0x1fff_ffff {
            return None;
        }
        let value = match tag & 7 {
            0 => Value::Scalar(varint(&mut bytes)?),
            1 => Value::Scalar(u64::from_le_bytes(take(&mut bytes, 8)?.try_into().ok()?)),
            2 => {
                let len = usize::try_from(varint(&mut bytes)?).ok()?;
                Value::Bytes(take(&mut bytes, len)?)
            }
            5 => Value::Scalar(u64::from(u32::from_le_bytes(take(&mut bytes, 4)?.try_into().ok()?))),
            _ => return None,
        };
        fields.push((tag, value));
    }
    Some(fields)
}

fn take<'a>(bytes: &mut &'a [u8], len: usize) -> Option<&'a [u8]> {
    let (head, tail) = bytes.split_at_checked(len)?;
    *bytes = tail;
    Some(head)
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0_u64;
    for shift in 0..10 {
        let (&byte, tail) = bytes.split_first()?;
        *bytes = tail;
        value |= u64::from(byte & 0x7f).checked_shl(shift * 7)?;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use envoy_types::pb::envoy::config::cluster::v3::Cluster;
    use envoy_types::pb::envoy::config::core::v3::Metadata;
    use envoy_types::pb::envoy::config::route::v3::{Route, VirtualHost};
    use envoy_types::pb::google::protobuf::{Any, Struct, Value as PbValue, value::Kind};
    use prost::Message as _;

    fn cluster(name: &str, keys: &[&str]) -> Cluster {
        let text = |text: &str| PbValue { kind: Some(Kind::StringValue(text.to_owned())) };
        let fields: std::collections::HashMap<_, _> = keys.iter().map(|key| ((*key).to_owned(), text(key))).collect();
        Cluster {
            name: name.to_owned(),
            metadata: Some(Metadata {
                filter_metadata: keys
                    .iter()
                    .map(|key| ((*key).to_owned(), Struct { fields: fields.clone() }))
                    .collect(),
                ..Metadata::default()
            }),
            typed_extension_protocol_options: keys
                .iter()
                .map(|key| {
                    let value = Struct { fields: fields.clone() }.encode_to_vec();
                    ((*key).to_owned(), Any { type_url: format!("t/{key}"), value })
                })
                .collect(),
            ..Cluster::default()
        }
    }

    #[test]
    fn maps_have_no_order() {
        let keys = ["istio", "lateen", "a", "b", "c", "envoy.lb"];
        let first = cluster("x", &keys).encode_to_vec();
        let mut differently = false;
        for _ in 0..20 {
            let again = cluster("x", &keys).encode_to_vec();
            differently |= again != first;
            assert_eq!(hash(&again), hash(&first));
        }
        assert!(differently, "the case shows nothing when maps happen to encode alike");
    }

    #[test]
    fn what_differs_hashes_differently() {
        let base = hash(&cluster("x", &["a", "b"]).encode_to_vec());
        assert_ne!(base, hash(&cluster("y", &["a", "b"]).encode_to_vec()));
        assert_ne!(base, hash(&cluster("x", &["a", "c"]).encode_to_vec()));
        assert_ne!(base, hash(&cluster("x", &["a"]).encode_to_vec()));
    }

    #[test]
    fn lists_keep_their_order() {
        let host = |names: [&str; 2]| {
            VirtualHost {
                name: "host".to_owned(),
                domains: vec!["*".to_owned()],
                routes: names
                    .map(|name| Route {
                        name: name.to_owned(),
                        r#match: Some(envoy_types::pb::envoy::config::route::v3::RouteMatch {
                            path_specifier: Some(
                                envoy_types::pb::envoy::config::route::v3::route_match::PathSpecifier::Prefix(
                                    name.to_owned(),
                                ),
                            ),
                            ..Default::default()
                        }),
                        ..Route::default()
                    })
                    .to_vec(),
                ..VirtualHost::default()
            }
            .encode_to_vec()
        };
        assert_ne!(hash(&host(["/a", "/b"])), hash(&host(["/b", "/a"])));
        let domains = |list: [&str; 2]| {
            VirtualHost { domains: list.map(str::to_owned).to_vec(), ..VirtualHost::default() }.encode_to_vec()
        };
        assert_ne!(hash(&domains(["a", "b"])), hash(&domains(["b", "a"])));
    }

    #[test]
    fn bytes_that_are_no_message_hash_too() {
        for bytes in [&b"\xff\xff\xff"[..], b"\x0a\x7f", b"", b"\x0a\x02\xff\xff"] {
            assert_eq!(hash(bytes), hash(bytes));
        }
    }
}

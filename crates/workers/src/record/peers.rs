//! Peers of requests, each known by one `Arc`, so that metrics find their series by address.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use base64::Engine as _;
use engine::exchange::StreamInfo;
use envoy_types::pb::google::protobuf::{Struct, value::Kind};
use prost::Message as _;
use telemetry::peer::{Peer, UNKNOWN};
use types::Labels;

/// Peers remembered before all are forgotten.
const PEERS_MAX: usize = 2048;
/// Metadata that is longer is not looked at: no workload needs so much to say who it is, and what is
/// remembered is what peers chose to send.
const METADATA_MAX: usize = 16 * 1024;

/// Peers by what they told of themselves, under each identity they proved. Looked up with what a
/// request brings, without a copy of it.
#[derive(Default)]
struct Known {
    by_principal: HashMap<Box<str>, HashMap<Box<[u8]>, Arc<Peer>>>,
    count: usize,
}

/// The peers a worker has met.
pub(crate) struct Peers {
    own: Arc<Peer>,
    unknown: Arc<Peer>,
    headers: RefCell<Known>,
    endpoints: RefCell<Known>,
}

impl Peers {
    pub(crate) fn new(own: Arc<Peer>) -> Self {
        Self { own, unknown: Peer::unknown(), headers: RefCell::default(), endpoints: RefCell::default() }
    }

    /// Ourselves.
    pub(crate) fn own(&self) -> Arc<Peer> {
        Arc::clone(&self.own)
    }

    /// Ourselves, as a connection proves us.
    pub(crate) fn own_with_principal(&self, principal: Option<&str>) -> Arc<Peer> {
        let Some(principal) = principal else { return self.own() };
        if &*self.own.principal == principal {
            return self.own();
        }
        remember(&self.endpoints, b"\0own", principal, || {
            Some(Peer { principal: principal.into(), ..Peer::clone(&self.own) })
        })
        .unwrap_or_else(|| self.own())
    }

    /// A client, by the metadata it sent and the identity it proved.
    pub(crate) fn of_header(&self, header: Option<&[u8]>, principal: Option<&str>) -> Arc<Peer> {
        let principal = principal.unwrap_or_default();
        let header = header.filter(|header| header.len() <= METADATA_MAX).unwrap_or_default();
        if header.is_empty() && principal.is_empty() {
            return Arc::clone(&self.unknown);
        }
        remember(&self.headers, header, principal, || Some(from_metadata(header, principal)))
            .unwrap_or_else(|| Arc::clone(&self.unknown))
    }

    /// A server, by what the control plane says of its endpoint, else by the metadata it sent.
    pub(crate) fn of_endpoint(&self, info: &StreamInfo) -> Arc<Peer> {
        let endpoint = info.picked.as_ref().and_then(|picked| picked.endpoint.as_ref());
        let workload = endpoint.map_or("", |endpoint| &*endpoint.workload);
        let header = info.upstream_peer.as_deref().filter(|header| header.len() <= METADATA_MAX).unwrap_or_default();
        let principal = server_principal(info);
        if header.is_empty() && workload.is_empty() {
            return Arc::clone(&self.unknown);
        }
        if !header.is_empty() {
            return remember(&self.headers, header, principal, || Some(from_metadata(header, principal)))
                .unwrap_or_else(|| Arc::clone(&self.unknown));
        }
        remember(&self.endpoints, workload.as_bytes(), principal, || {
            Peer::from_endpoint_metadata(workload, Some(principal).filter(|p| !p.is_empty()))
        })
        .unwrap_or_else(|| Arc::clone(&self.unknown))
    }
}

/// The identity mutual TLS demanded of the server: the only SAN its cluster takes.
pub(super) fn server_principal(info: &StreamInfo) -> &str {
    let (Some(cluster), Some(picked)) = (&info.cluster, &info.picked) else { return "" };
    let tls = cluster.transport_for(picked.endpoint.as_deref()).and_then(|transport| transport.tls.as_ref());
    let sans = tls.map_or(&[][..], |tls| tls.validation.san_matchers.as_slice());
    match sans {
        [only] => only.matcher.exact_text().and_then(|text| std::str::from_utf8(text).ok()).unwrap_or_default(),
        _ => "",
    }
}

fn remember(
    known: &RefCell<Known>,
    bytes: &[u8],
    principal: &str,
    make: impl FnOnce() -> Option<Peer>,
) -> Option<Arc<Peer>> {
    let mut known = known.borrow_mut();
    if let Some(found) = known.by_principal.get(principal).and_then(|peers| peers.get(bytes)) {
        return Some(Arc::clone(found));
    }
    if known.count >= PEERS_MAX {
        *known = Known::default();
    }
    let made = Arc::new(make()?);
    known.count += 1;
    known.by_principal.entry(principal.into()).or_default().insert(bytes.into(), Arc::clone(&made));
    Some(made)
}

/// Reads `x-envoy-peer-metadata`: base64 of a `google.protobuf.Struct`.
fn from_metadata(header: &[u8], principal: &str) -> Peer {
    let decoded = base64::engine::general_purpose::STANDARD.decode(header).unwrap_or_default();
    from_struct(&Struct::decode(decoded.as_slice()).unwrap_or_default(), principal)
}

/// A peer by its node metadata.
pub(crate) fn from_struct(metadata: &Struct, principal: &str) -> Peer {
    let text = |name: &str| match metadata.fields.get(name).and_then(|value| value.kind.as_ref()) {
        Some(Kind::StringValue(text)) => text.as_str(),
        _ => "",
    };
    let mut labels = Labels::new();
    if let Some(Kind::StructValue(map)) = metadata.fields.get("LABELS").and_then(|value| value.kind.as_ref()) {
        #[expect(clippy::iter_over_hash_type, reason = "into a sorted map")]
        for (name, value) in &map.fields {
            if let Some(Kind::StringValue(text)) = &value.kind {
                labels.insert(name.clone(), text.clone());
            }
        }
    }
    let known = |text: &str| if text.is_empty() { UNKNOWN.to_owned() } else { text.to_owned() };
    let principal = known(principal);
    let workload = if text("WORKLOAD_NAME").is_empty() { text("NAME") } else { text("WORKLOAD_NAME") };
    let mut peer =
        Peer::of_workload(&known(workload), &known(text("NAMESPACE")), &principal, &known(text("CLUSTER_ID")), &labels);
    for part in [&mut peer.app, &mut peer.version] {
        if part.is_empty() {
            *part = UNKNOWN.into();
        }
    }
    peer
}

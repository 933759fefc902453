//! One request, from its head to its response, as a state machine without I/O.
//!
//! ```text
//!   start ──► Ask ──Authorized/Resolved──┐
//!     │  └──► Wait ──Elapsed─────────────┤
//!     │                                  ▼
//!     ├──► Reply                     (filters go on)
//!     ▼                                  │
//!   Forward ◄────────────────────────────┘
//!     │  ▲ └──Failed/Upstream, retriable──► Wait ──Elapsed──┐
//!     │  └──────────────────────────────────────────────────┘
//!     ├──Upstream──► Respond ──response_ended/Elapsed──► (end) / Abort
//!     └──Failed/Elapsed──► Reply
//! ```
//!
//! The exchange edits the heads in place, as Envoy does: the driver writes out what it holds.
//! What the driver owes it: call [`Exchange::request_complete`] when the request's body has ended,
//! sleep no longer than [`Exchange::deadline`] and answer [`Answer::Elapsed`] then, say with
//! [`Exchange::set_replayable`] when the retry buffer no longer holds the whole body, and drop the
//! exchange (which gives its places in all limits back) when the stream has ended.

use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use types::{Cause, Fields, RequestHead, ResponseHead};

use crate::chain::FilterChain;
use crate::cluster::{Cluster, Endpoint, TransportSocket};
use crate::config::{Name, RuntimeConfig};
use crate::facts::{ConnFacts, Now};
use crate::record::Recorder;
use crate::shared::{ClusterHeld, Held, SharedCluster, SharedHost};
use crate::worker::Worker;

pub(crate) mod attempt;
mod filters;
mod grpc;
mod machine;
mod normalize;
mod reply;
mod route_edits;
#[cfg(test)]
mod tests;

pub use machine::Exchange;

/// What every decision may read beside the request.
#[derive(Clone, Copy)]
pub struct Env<'a> {
    /// The newest configuration of the worker. An exchange keeps the one it was started with for
    /// routes, policies and clusters; endpoints are read from this one at each pick.
    pub config: &'a Rc<RuntimeConfig>,
    /// The worker's own state.
    pub worker: &'a Worker,
    /// The moment.
    pub now: Now,
}

/// What is to be done next.
#[derive(Debug)]
pub enum Step {
    /// Ask somebody, and resume with the answer.
    Ask(Question),
    /// Wait so long (a fault, a back-off), and resume with [`Answer::Elapsed`].
    Wait(Duration),
    /// Send the request as it stands to this endpoint; resume with `Upstream` or `Failed`.
    Forward(Box<Attempt>),
    /// Answer with this; nothing goes upstream any more.
    Reply(Box<LocalReply>),
    /// The response head is edited: write it and the body.
    Respond,
    /// The response has begun and cannot be finished: reset the stream or close the connection.
    Abort(Cause),
}

/// A question the exchange cannot answer by itself.
#[derive(Debug)]
pub enum Question {
    /// External authorization.
    Authorize(Box<AuthorizeQuestion>),
    /// The request's body, buffered, before anything else happens; answer with [`Answer::Body`].
    Body(BodyWanted),
    /// Addresses of a host (dynamic forwarding).
    Resolve {
        /// Name without port.
        host: Box<str>,
    },
}

/// A call to an external authorizer.
#[derive(Debug)]
pub struct AuthorizeQuestion {
    /// Where to send it; an attempt of its own (limits apply, no retries).
    pub attempt: Box<Attempt>,
    /// The request to send.
    pub head: RequestHead,
    /// Its body, complete.
    pub body: Bytes,
    /// `None`: for ever.
    pub timeout: Option<Duration>,
    /// gRPC (then body and answer are length-prefixed messages) or plain HTTP.
    pub grpc: bool,
}

/// How much of the request's body somebody needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BodyWanted {
    /// At most so many bytes.
    pub bytes_max: u32,
    /// A cut body is fine; else a larger one is refused with 413.
    pub partial: bool,
}

/// What came of a step.
#[derive(Debug)]
pub enum Answer<'a> {
    /// The wait is over, or the deadline has passed.
    Elapsed,
    /// The authorizer's answer; `Err` if it could not be had.
    Authorized(Result<AuthorizeAnswer, Cause>),
    /// What was buffered of the request's body.
    Body {
        /// The first bytes, at most as many as were wanted.
        bytes: Bytes,
        /// The body is no longer than that.
        complete: bool,
    },
    /// Addresses; empty or `Err` if there are none.
    Resolved(Result<Vec<IpAddr>, Cause>),
    /// The response head arrived. It is edited in place.
    Upstream {
        /// As received; written out as it is afterwards.
        head: &'a mut ResponseHead,
        /// Nothing follows it.
        ended: bool,
    },
    /// The attempt failed before a response head.
    Failed(Failure),
    /// Nothing moved for [`Exchange::idle_timeout`].
    Idle,
}

/// The authorizer's answer.
#[derive(Debug)]
pub struct AuthorizeAnswer {
    /// Its head.
    pub head: ResponseHead,
    /// Its body, complete.
    pub body: Bytes,
    /// Trailers of a gRPC answer.
    pub trailers: Option<Fields>,
}

/// Why an attempt failed.
#[derive(Clone, Debug, PartialEq)]
pub struct Failure {
    /// One of the upstream causes: `ConnectFailed`, `ConnectTimeout`, `UpstreamTlsFailed`,
    /// `UpstreamClosed`, `UpstreamReset`, `UpstreamRefusedStream`, `UpstreamProtocolError`,
    /// `LocalReset`, `UpstreamOverflow`.
    pub cause: Cause,
    /// Envoy's `transport failure reason`; empty if there is none.
    pub detail: Box<str>,
    /// Any byte of the request was written.
    pub request_sent: bool,
}

impl Failure {
    /// A failure without further detail, before anything was written.
    pub fn unsent(cause: Cause) -> Self {
        Self { cause, detail: "".into(), request_sent: false }
    }
}

/// Which HTTP version an attempt uses.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum UpstreamProtocol {
    /// HTTP/1.1
    Http1,
    /// HTTP/2; in plaintext with prior knowledge.
    Http2,
    /// HTTP/2 if ALPN agrees on it, else HTTP/1.1.
    Auto,
}

/// The endpoint of an attempt.
#[derive(Clone, Debug)]
pub struct Picked {
    /// Its counters; the address is inside.
    pub host: Arc<SharedHost>,
    /// What the control plane says about it; `None` for original destinations.
    pub endpoint: Option<Arc<Endpoint>>,
}

/// One try to send the request somewhere. Dropping it gives its places in the limits back.
#[derive(Debug)]
pub struct Attempt {
    /// 1 for the first.
    pub number: u32,
    /// Where to.
    pub cluster: Arc<Cluster>,
    /// The cluster's counters: the pool checks connections and pending requests against
    /// `cluster.limits` here.
    pub shared: Arc<SharedCluster>,
    /// The endpoint.
    pub picked: Picked,
    /// How bytes travel.
    pub transport: Arc<TransportSocket>,
    /// HTTP version.
    pub protocol: UpstreamProtocol,
    /// Server name to send; `None` for none.
    pub sni: Option<Arc<str>>,
    /// The certificate must be valid for this name (`auto_san_validation`).
    pub required_san: Option<Arc<str>>,
    /// ALPN list to offer.
    pub alpn: AlpnList,
    /// Until this try has a response head; counts from the end of the request. The exchange's
    /// `deadline` includes it.
    pub per_try_timeout: Option<Duration>,
    /// The request asks for an upgrade, which is allowed.
    pub upgrade: bool,
    /// Keep the body for a retry, up to so many bytes; 0: do not.
    pub replay_bytes_max: u32,
    /// Copies to send elsewhere, answers dropped (first attempt only).
    pub mirrors: Vec<Mirror>,
    #[expect(dead_code, reason = "held for its drop")]
    pub(crate) held: HeldPlaces,
}

/// Places an attempt holds in the limits; given back when it is dropped.
#[derive(Debug, Default)]
#[expect(dead_code, reason = "held for their drop")]
pub(crate) struct HeldPlaces {
    pub(crate) request: Option<ClusterHeld>,
    pub(crate) host: Option<Held<SharedHost>>,
}

/// An ALPN list: the transport's own or an override.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AlpnList {
    /// `transport.tls.alpn`
    Transport,
    /// This one.
    Override(Arc<[Box<str>]>),
}

impl AlpnList {
    /// The list in force.
    pub fn list<'a>(&'a self, transport: &'a TransportSocket) -> &'a [Box<str>] {
        match self {
            Self::Transport => transport.tls.as_ref().map_or(&[], |tls| &tls.alpn),
            Self::Override(list) => list,
        }
    }
}

/// A copy of the request for another cluster.
#[derive(Debug)]
pub struct Mirror {
    /// Where to.
    pub attempt: Box<Attempt>,
    /// Its head; the body is that of the request.
    pub head: RequestHead,
    /// Until it is given up.
    pub timeout: Option<Duration>,
}

/// An answer of the mesh itself.
#[derive(Debug)]
pub struct LocalReply {
    /// Why.
    pub cause: Cause,
    /// Complete, `content-length` included; a gRPC reply is in the head alone.
    pub head: ResponseHead,
    /// Empty for HEAD and gRPC.
    pub body: Bytes,
    /// The connection must be closed afterwards (HTTP/1).
    pub close: bool,
}

/// What is known about a request at any time: for metrics, logs and spans.
#[derive(Debug, Default)]
pub struct StreamInfo {
    /// Every cause that marked the request, in order; the flags of a log line.
    pub causes: smallvec::SmallVec<[Cause; 2]>,
    /// `%RESPONSE_CODE_DETAILS%`; empty until known.
    pub details: Details,
    /// `%CONNECTION_TERMINATION_DETAILS%`: why a policy closed the connection.
    pub termination: Details,
    /// Name of the virtual host.
    pub virtual_host: Option<Name>,
    /// Name of the route; empty for unnamed ones.
    pub route_name: Option<Name>,
    /// The decorator's operation.
    pub operation: Option<Name>,
    /// The operation is the client's, sent in `x-envoy-decorator-operation`.
    pub operation_from_peer: bool,
    /// A span is to be written.
    pub traced: bool,
    /// The route's objects.
    pub provenance: Option<Arc<crate::record::Provenance>>,
    /// The cluster of the route, whether or not anything goes there.
    pub cluster: Option<Arc<Cluster>>,
    /// The name chosen when there is no such cluster.
    pub cluster_name: Option<Name>,
    /// The endpoint of the last attempt.
    pub picked: Option<Picked>,
    /// Attempts made.
    pub attempts: u32,
    /// Sets of enforced policies that let it pass.
    pub allowed: u32,
    /// `%UPSTREAM_TRANSPORT_FAILURE_REASON%`
    pub transport_failure: Box<str>,
    /// The trusted address of the client.
    pub client_address: Option<std::net::SocketAddr>,
    /// `x-envoy-peer-metadata` of the client, if it sent one.
    pub downstream_peer: Option<Box<[u8]>>,
    /// `x-envoy-peer-metadata` of the server, if it sent one.
    pub upstream_peer: Option<Box<[u8]>>,
    /// Metadata that filters wrote (verified claims, policy ids).
    pub metadata: crate::matcher::Metadata,
    /// gRPC request.
    pub is_grpc: bool,
    /// When the attempt that answered was sent.
    pub upstream_started: Option<Instant>,
}

/// A reason in Envoy's words.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Details {
    /// Nothing yet.
    #[default]
    None,
    /// A fixed one.
    Static(&'static str),
    /// One with names in it.
    Owned(Box<str>),
}

impl Details {
    /// As text.
    pub fn as_str(&self) -> &str {
        match self {
            Self::None => "",
            Self::Static(text) => text,
            Self::Owned(text) => text,
        }
    }
}

/// What a request is started with.
pub struct Start<'a> {
    /// The chain the connection chose, or what stands there now
    /// ([`RuntimeConfig::current_chain`]). It must end in HTTP.
    pub chain: &'a Arc<FilterChain>,
    /// The connection.
    pub conn: &'a Arc<ConnFacts>,
    /// Nothing follows the head.
    pub ended: bool,
    /// Every draw comes from it.
    pub seed: u64,
    /// Listens to decisions.
    pub recorder: &'a mut dyn Recorder,
}

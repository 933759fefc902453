//! Passes the stream of a proxy next door on to the control plane.
//!
//! ```text
//!  Envoy ──requests──► Relay ──requests, own subscription──► control plane
//!  Envoy ◄─responses── Relay ◄─responses──────────────────── control plane
//!                        └──► name table, acknowledged here
//! ```
//!
//! An agent beside a foreign proxy runs this on a socket of its own: the agent holds token and
//! certificate, the proxy needs neither to get its configuration. Messages pass as they are. One
//! type, which foreign proxies do not know, is subscribed to on the same stream and kept: Istio's
//! name table. When either end goes, so does the other, and the proxy comes back by itself.
//!
//! *Source*: Istio's agent (`XDS` socket) behaves so.

use std::fmt;
use std::future::Future;

use envoy_types::pb::envoy::service::discovery::v3 as pb;
use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_server::AggregatedDiscoveryService;
use envoy_types::pb::google::protobuf::Any;
use futures_util::stream::{self, BoxStream, StreamExt as _};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Request, Response, Status, Streaming};
use types::wellknown::type_urls::NAME_TABLE;

use crate::client::{Dial, RESPONSE_BYTES_MAX};

/// Requests handed to gRPC and not yet on the wire; the proxy is not read while there are so many.
const REQUESTS_MAX: usize = 64;

/// The aggregated discovery service of somebody else.
pub struct Relay {
    dial: Box<dyn Dial>,
    names: watch::Sender<Option<Any>>,
}

impl fmt::Debug for Relay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Relay").finish_non_exhaustive()
    }
}

impl Relay {
    /// A relay to whoever `dial` reaches, and the newest name table that came (`None` until then).
    pub fn new(dial: impl Dial) -> (Self, watch::Receiver<Option<Any>>) {
        let (names, receiver) = watch::channel(None);
        (Self { dial: Box::new(dial), names }, receiver)
    }

    async fn pass<P: Passing>(
        &self,
        request: Request<Streaming<P::Request>>,
    ) -> Result<Response<BoxStream<'static, Result<P::Response, Status>>>, Status> {
        let mut inbound = request.into_inner();
        let Some(first) = inbound.message().await? else {
            return Ok(Response::new(stream::empty().boxed()));
        };
        let dialed = self.dial.dial().await.map_err(|error| Status::unavailable(error.to_string()))?;
        let client =
            AggregatedDiscoveryServiceClient::new(dialed.channel).max_decoding_message_size(RESPONSE_BYTES_MAX);
        let (requests, waiting) = mpsc::channel(REQUESTS_MAX);
        // The control plane answers a stream after its first request. The channel is empty and its
        // receiver is here: neither can fail.
        for request in [first, P::subscribe()] {
            requests.try_send(request).map_err(|error| Status::internal(error.to_string()))?;
        }
        let mut outgoing = Request::new(ReceiverStream::new(waiting));
        *outgoing.metadata_mut() = dialed.metadata;
        let upstream = P::open(client, outgoing).await?.into_inner();
        let passage = Passage::<P> { inbound, upstream, requests, names: self.names.clone() };
        let responses = stream::unfold(Some(passage), |passage| async move {
            let mut passage = passage?;
            match passage.next().await {
                Ok(Some(response)) => Some((Ok(response), Some(passage))),
                Ok(None) => None,
                Err(status) => Some((Err(status), None)),
            }
        });
        Ok(Response::new(responses.boxed()))
    }
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Relay {
    type StreamAggregatedResourcesStream = BoxStream<'static, Result<pb::DiscoveryResponse, Status>>;

    async fn stream_aggregated_resources(
        &self,
        request: Request<Streaming<pb::DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        self.pass::<World>(request).await
    }

    type DeltaAggregatedResourcesStream = BoxStream<'static, Result<pb::DeltaDiscoveryResponse, Status>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<pb::DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        self.pass::<Delta>(request).await
    }
}

/// One stream: polled by gRPC when the proxy can take a response.
struct Passage<P: Passing> {
    inbound: Streaming<P::Request>,
    upstream: Streaming<P::Response>,
    requests: mpsc::Sender<P::Request>,
    names: watch::Sender<Option<Any>>,
}

impl<P: Passing> Passage<P> {
    /// The next response for the proxy; `None` when one of the two is done.
    async fn next(&mut self) -> Result<Option<P::Response>, Status> {
        loop {
            // Both futures may be dropped without losing anything; requests first, so that an
            // answer is on its way before the next response is taken.
            tokio::select! {
                biased;
                message = self.inbound.message() => match message? {
                    Some(request) => Self::send(&self.requests, request).await?,
                    None => return Ok(None),
                },
                message = self.upstream.message() => match message? {
                    Some(response) if P::type_url(&response) == NAME_TABLE => {
                        let ack = P::acknowledge(&response);
                        if let Some(table) = P::payload(response) {
                            self.names.send_replace(Some(table));
                        }
                        Self::send(&self.requests, ack).await?;
                    }
                    Some(response) => return Ok(Some(response)),
                    None => return Ok(None),
                },
            }
        }
    }

    async fn send(requests: &mpsc::Sender<P::Request>, request: P::Request) -> Result<(), Status> {
        requests.send(request).await.map_err(|_| Status::unavailable("the control plane is gone"))
    }
}

/// What the two protocols differ in.
trait Passing: Send + 'static {
    type Request: Send + Sync + 'static;
    type Response: Send + 'static;
    /// Asks for the name table.
    fn subscribe() -> Self::Request;
    fn type_url(response: &Self::Response) -> &str;
    fn acknowledge(response: &Self::Response) -> Self::Request;
    /// The one resource of a response.
    fn payload(response: Self::Response) -> Option<Any>;
    fn open(
        client: AggregatedDiscoveryServiceClient<Channel>,
        requests: Request<ReceiverStream<Self::Request>>,
    ) -> impl Future<Output = Result<Response<Streaming<Self::Response>>, Status>> + Send;
}

struct World;

impl Passing for World {
    type Request = pb::DiscoveryRequest;
    type Response = pb::DiscoveryResponse;

    fn subscribe() -> Self::Request {
        pb::DiscoveryRequest { type_url: NAME_TABLE.into(), ..Self::Request::default() }
    }

    fn type_url(response: &Self::Response) -> &str {
        &response.type_url
    }

    fn acknowledge(response: &Self::Response) -> Self::Request {
        pb::DiscoveryRequest {
            type_url: NAME_TABLE.into(),
            version_info: response.version_info.clone(),
            response_nonce: response.nonce.clone(),
            ..Self::Request::default()
        }
    }

    fn payload(response: Self::Response) -> Option<Any> {
        response.resources.into_iter().next()
    }

    async fn open(
        mut client: AggregatedDiscoveryServiceClient<Channel>,
        requests: Request<ReceiverStream<Self::Request>>,
    ) -> Result<Response<Streaming<Self::Response>>, Status> {
        client.stream_aggregated_resources(requests).await
    }
}

struct Delta;

impl Passing for Delta {
    type Request = pb::DeltaDiscoveryRequest;
    type Response = pb::DeltaDiscoveryResponse;

    fn subscribe() -> Self::Request {
        pb::DeltaDiscoveryRequest {
            type_url: NAME_TABLE.into(),
            resource_names_subscribe: vec!["*".into()],
            ..Self::Request::default()
        }
    }

    fn type_url(response: &Self::Response) -> &str {
        &response.type_url
    }

    fn acknowledge(response: &Self::Response) -> Self::Request {
        pb::DeltaDiscoveryRequest {
            type_url: NAME_TABLE.into(),
            response_nonce: response.nonce.clone(),
            ..Self::Request::default()
        }
    }

    fn payload(response: Self::Response) -> Option<Any> {
        response.resources.into_iter().next().and_then(|resource| resource.resource)
    }

    async fn open(
        mut client: AggregatedDiscoveryServiceClient<Channel>,
        requests: Request<ReceiverStream<Self::Request>>,
    ) -> Result<Response<Streaming<Self::Response>>, Status> {
        client.delta_aggregated_resources(requests).await
    }
}

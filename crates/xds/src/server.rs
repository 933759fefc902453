//! The server side: one [`Session`] a stream, and its glue to gRPC.
//!
//! An [`Authority`] decides who may subscribe and gives each proxy a `watch` of what it should
//! have: the newest set wins, so at most one push waits and one runs per proxy. A stream is driven
//! only as fast as its client reads; nobody else waits for it.
//!
//! Start reading at [`session`].

pub mod session;

use std::fmt;
use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3::{ControlPlane, Node};
use envoy_types::pb::envoy::service::discovery::v3 as pb;
use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_server::AggregatedDiscoveryService;
use envoy_types::pb::envoy::service::secret::v3::secret_discovery_service_server::SecretDiscoveryService;
use envoy_types::pb::google::protobuf::Any;
use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream, StreamExt as _};
use tokio::sync::watch;
use tonic::{Extensions, Request, Response, Status, Streaming, metadata::MetadataMap};

use crate::client::Protocol;
use crate::resources::ResourceSet;
pub use session::{Answered, Outgoing, Progress, Refused, Session};

/// Who called, as the transport knows.
#[derive(Debug)]
pub struct Caller {
    /// What the accept loop attached: addresses, the TLS peer.
    pub extensions: Extensions,
    /// The call's metadata: `authorization`, `clusterid`.
    pub metadata: MetadataMap,
}

/// Decides about subscribers and what they get.
pub trait Authority: Send + Sync + 'static {
    /// Admits a stream by its caller and the node of its first request, or refuses it.
    fn admit(&self, caller: Caller, node: Node, protocol: Protocol) -> BoxFuture<'static, Result<Admitted, Status>>;
}

/// An admitted stream.
pub struct Admitted {
    /// What the proxy should have. `None` until it was compiled; closed when the stream should end.
    pub resources: watch::Receiver<Option<Arc<ResourceSet>>>,
    /// Told what happens; dropped when the stream ends.
    pub observer: Box<dyn Observer>,
}

impl fmt::Debug for Admitted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Admitted").finish_non_exhaustive()
    }
}

/// Watches a stream, for status pages and metrics.
pub trait Observer: Send + Sync + 'static {
    /// A response is about to go out.
    fn sent(&mut self, outgoing: &Outgoing);
    /// A request was an ack or nack.
    fn answered(&mut self, answered: &Answered);
    /// Something changed; where the stream stands now.
    fn progressed(&mut self, progress: &Progress);
    /// A request was taken: what the stream asks for now. Of interest to those who make what is asked for.
    fn subscribed(&mut self, _: &Session) {}
}

/// The aggregated discovery service over an [`Authority`].
pub struct Ads<A> {
    authority: Arc<A>,
    /// Sent as the control plane's identifier.
    identifier: Arc<str>,
}

impl<A> fmt::Debug for Ads<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ads").field("identifier", &self.identifier).finish_non_exhaustive()
    }
}

impl<A: Authority> Ads<A> {
    /// A service that asks `authority`, and calls itself `identifier` in its responses.
    pub fn new(authority: Arc<A>, identifier: &str) -> Self {
        Self { authority, identifier: identifier.into() }
    }

    async fn serve<W: Wire>(
        &self,
        request: Request<Streaming<W::Request>>,
        protocol: Protocol,
    ) -> Result<Response<BoxStream<'static, Result<W::Response, Status>>>, Status> {
        let (metadata, extensions, mut inbound) = request.into_parts();
        let caller = Caller { extensions, metadata };
        let Some(first) = inbound.message().await? else {
            return Ok(Response::new(stream::empty().boxed()));
        };
        let node =
            W::node(&first).cloned().ok_or_else(|| Status::invalid_argument("the first request carries no node"))?;
        let admitted = self.authority.admit(caller, node, protocol).await?;
        let driver = Driver::<W> {
            session: Session::new(protocol),
            inbound,
            first: Some(first),
            resources: admitted.resources,
            observer: admitted.observer,
            identifier: Arc::clone(&self.identifier),
            fresh: true,
        };
        let responses = stream::unfold(Some(driver), |driver| async move {
            let mut driver = driver?;
            match driver.next().await {
                Ok(Some(response)) => Some((Ok(response), Some(driver))),
                Ok(None) => None,
                Err(status) => Some((Err(status), None)),
            }
        });
        Ok(Response::new(responses.boxed()))
    }
}

#[tonic::async_trait]
impl<A: Authority> AggregatedDiscoveryService for Ads<A> {
    type StreamAggregatedResourcesStream = BoxStream<'static, Result<pb::DiscoveryResponse, Status>>;

    async fn stream_aggregated_resources(
        &self,
        request: Request<Streaming<pb::DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        self.serve::<World>(request, Protocol::StateOfTheWorld).await
    }

    type DeltaAggregatedResourcesStream = BoxStream<'static, Result<pb::DeltaDiscoveryResponse, Status>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<pb::DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        self.serve::<Delta>(request, Protocol::Delta).await
    }
}

/// Secrets over a stream of their own, as an agent serves them to its Envoy (`sds-grpc`).
#[tonic::async_trait]
impl<A: Authority> SecretDiscoveryService for Ads<A> {
    type StreamSecretsStream = BoxStream<'static, Result<pb::DiscoveryResponse, Status>>;

    async fn stream_secrets(
        &self,
        request: Request<Streaming<pb::DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamSecretsStream>, Status> {
        self.serve::<World>(request, Protocol::StateOfTheWorld).await
    }

    type DeltaSecretsStream = BoxStream<'static, Result<pb::DeltaDiscoveryResponse, Status>>;

    async fn delta_secrets(
        &self,
        request: Request<Streaming<pb::DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaSecretsStream>, Status> {
        self.serve::<Delta>(request, Protocol::Delta).await
    }

    async fn fetch_secrets(&self, _: Request<pb::DiscoveryRequest>) -> Result<Response<pb::DiscoveryResponse>, Status> {
        Err(Status::unimplemented("secrets are streamed"))
    }
}

/// One stream: polled by gRPC when the client can take a response.
struct Driver<W: Wire> {
    session: Session,
    inbound: Streaming<W::Request>,
    first: Option<W::Request>,
    resources: watch::Receiver<Option<Arc<ResourceSet>>>,
    observer: Box<dyn Observer>,
    identifier: Arc<str>,
    /// The present value of `resources` was not looked at yet.
    fresh: bool,
}

impl<W: Wire> Driver<W> {
    /// The next response; `None` when the client is done.
    async fn next(&mut self) -> Result<Option<W::Response>, Status> {
        loop {
            if let Some(first) = self.first.take() {
                self.take(first)?;
            }
            if std::mem::take(&mut self.fresh) {
                let current = self.resources.borrow_and_update().clone();
                if let Some(current) = current {
                    self.session.update(current);
                    self.observer.progressed(&self.session.progress());
                }
            }
            if let Some(outgoing) = self.session.next() {
                self.observer.sent(&outgoing);
                self.observer.progressed(&self.session.progress());
                return Ok(Some(W::response(outgoing, &self.identifier)));
            }
            // Both futures may be dropped without losing anything; requests come first, so that
            // an ack is counted before the next push is made.
            tokio::select! {
                biased;
                message = self.inbound.message() => match message? {
                    Some(message) => self.take(message)?,
                    None => return Ok(None),
                },
                changed = self.resources.changed() => match changed {
                    Ok(()) => self.fresh = true,
                    Err(_) => return Err(Status::unavailable("the control plane is going away")),
                },
            }
        }
    }

    fn take(&mut self, message: W::Request) -> Result<(), Status> {
        let answered =
            W::take(&mut self.session, message).map_err(|refused| Status::invalid_argument(refused.to_string()))?;
        if let Some(answered) = answered {
            self.observer.answered(&answered);
        }
        self.observer.subscribed(&self.session);
        self.observer.progressed(&self.session.progress());
        Ok(())
    }
}

trait Wire: Send + 'static {
    type Request: Send + 'static;
    type Response: Send + 'static;
    fn node(request: &Self::Request) -> Option<&Node>;
    fn take(session: &mut Session, request: Self::Request) -> Result<Option<Answered>, Refused>;
    fn response(outgoing: Outgoing, identifier: &str) -> Self::Response;
}

fn control_plane(identifier: &str) -> ControlPlane {
    ControlPlane { identifier: identifier.to_owned() }
}

struct World;

impl Wire for World {
    type Request = pb::DiscoveryRequest;
    type Response = pb::DiscoveryResponse;

    fn node(request: &Self::Request) -> Option<&Node> {
        request.node.as_ref()
    }

    fn take(session: &mut Session, request: Self::Request) -> Result<Option<Answered>, Refused> {
        session.world_request(&request)
    }

    fn response(outgoing: Outgoing, identifier: &str) -> Self::Response {
        pb::DiscoveryResponse {
            version_info: outgoing.version.into(),
            resources: outgoing.resources.iter().map(|resource| resource.any.clone()).collect(),
            type_url: outgoing.type_url.into(),
            nonce: outgoing.nonce.into(),
            control_plane: Some(control_plane(identifier)),
            ..pb::DiscoveryResponse::default()
        }
    }
}

struct Delta;

impl Wire for Delta {
    type Request = pb::DeltaDiscoveryRequest;
    type Response = pb::DeltaDiscoveryResponse;

    fn node(request: &Self::Request) -> Option<&Node> {
        request.node.as_ref()
    }

    fn take(session: &mut Session, request: Self::Request) -> Result<Option<Answered>, Refused> {
        session.delta_request(request)
    }

    fn response(outgoing: Outgoing, identifier: &str) -> Self::Response {
        let resources = outgoing.resources.iter().map(|resource| pb::Resource {
            name: resource.name.to_string(),
            version: resource.version.to_string(),
            resource: Some(Any { type_url: resource.any.type_url.clone(), value: resource.any.value.clone() }),
            ..pb::Resource::default()
        });
        pb::DeltaDiscoveryResponse {
            system_version_info: outgoing.version.into(),
            resources: resources.collect(),
            type_url: outgoing.type_url.into(),
            removed_resources: outgoing.removed.into_iter().map(String::from).collect(),
            nonce: outgoing.nonce.into(),
            control_plane: Some(control_plane(identifier)),
            ..pb::DeltaDiscoveryResponse::default()
        }
    }
}

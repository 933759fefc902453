//! The client side: an aggregated stream that reconnects, and the consumer's answers.
//!
//! ```text
//!  consumer ── subscribe, answer ──► Handle ─┐ lock        ┌─► requests ─► gRPC ─► control plane
//!                                            ├── State ◄───┤
//!  consumer ◄── Event ◄── bounded channel ◄──┴── Driver ◄──┴── responses ◄─
//! ```
//!
//! The consumer answers an [`Update`] when its workers run it; until then the next one of that
//! type is not sent. After a disconnect the driver dials again with growing pauses, and a delta
//! stream tells the server which versions are running, so that only differences come.

pub mod state;

use std::fmt;
use std::future::Future;
use std::hash::{BuildHasher, Hasher};
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::envoy::service::discovery::v3 as pb;
use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use envoy_types::pb::google::rpc;
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataMap;
use tonic::transport::Channel;

pub use state::{Names, Rejected, Update, UpdateId};
use state::{RequestOut, ResourceIn, ResponseIn, State};

/// The largest response that is taken. A mesh of ten thousand services stays well below.
pub(crate) const RESPONSE_BYTES_MAX: usize = 256 << 20;
/// Requests handed to gRPC and not yet on the wire.
const REQUESTS_MAX: usize = 64;
/// Updates handed to the consumer and not yet taken by it.
const EVENTS_MAX: usize = 4;

/// Which of the two protocols to speak.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Protocol {
    /// Only differences travel.
    #[default]
    Delta,
    /// Every response is complete.
    StateOfTheWorld,
}

/// How long to wait between attempts. The pause doubles up to the limit and is spread by half.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    /// The first pause.
    pub initial: Duration,
    /// No pause is longer.
    pub max: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { initial: Duration::from_millis(100), max: Duration::from_secs(15) }
    }
}

/// What to say to the control plane, and how.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Who we are.
    pub node: Node,
    /// Which protocol.
    pub protocol: Protocol,
    /// Pauses between attempts.
    pub backoff: Backoff,
    /// What to subscribe to from the start.
    pub subscriptions: Vec<(String, Names)>,
}

/// A connection to talk over, and the metadata of the call (`authorization`, …).
#[derive(Debug)]
pub struct Dialed {
    /// A fresh channel.
    pub channel: Channel,
    /// Metadata for the stream.
    pub metadata: MetadataMap,
}

/// Why no connection came about.
pub type DialError = Box<dyn std::error::Error + Send + Sync>;

/// The future of one attempt.
pub type Dialing = Pin<Box<dyn Future<Output = Result<Dialed, DialError>> + Send>>;

/// Makes connections: called for each attempt, so that tokens and certificates are read afresh.
pub trait Dial: Send + Sync + 'static {
    /// Connects once. *Cancel safety*: the future may be dropped at any time.
    fn dial(&self) -> Dialing;
}

impl<F> Dial for F
where
    F: Fn() -> Dialing + Send + Sync + 'static,
{
    fn dial(&self) -> Dialing {
        self()
    }
}

/// What the consumer is told, in order.
#[derive(Debug)]
pub enum Event {
    /// The stream is open.
    Connected,
    /// Resources to apply; to be answered by [`Handle::answer`].
    Update(Update),
    /// The stream, or an attempt to open one, ended. What is running stays.
    Disconnected {
        /// Why, for people.
        reason: String,
        /// Attempts in a row without success, from 1.
        attempt: u32,
        /// When the next attempt is made.
        retry_in: Duration,
    },
}

/// Subscribes and answers. Cheap to clone.
#[derive(Clone)]
pub struct Handle {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    /// Requests may be due.
    wake: Notify,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle").finish_non_exhaustive()
    }
}

impl Handle {
    /// Replaces what is subscribed of a type. Names that are no longer wanted are unsubscribed.
    pub fn subscribe(&self, type_url: &str, names: Names) {
        self.shared.state().subscribe(type_url, names);
        self.shared.wake.notify_one();
    }

    /// Accepts an update, but for the resources in `rejected`. An empty list acknowledges, any
    /// other refuses and names the culprits; what was accepted counts as running in both cases.
    pub fn answer(&self, id: &UpdateId, rejected: &[Rejected]) {
        self.shared.state().answer(id, rejected);
        self.shared.wake.notify_one();
    }

    /// Names and versions of the resources of a type that were accepted.
    pub fn running(&self, type_url: &str) -> Vec<(String, String)> {
        self.shared.state().running(type_url)
    }
}

/// Makes a client: the handle, its events, and the driver to run. The driver ends when the
/// receiver of events is dropped.
///
/// The driver's future is `Send` and may be spawned on any tokio runtime.
pub fn new<D: Dial>(options: Options, dial: D) -> (Handle, mpsc::Receiver<Event>, Driver) {
    let mut state = State::new(options.protocol);
    for (type_url, names) in options.subscriptions {
        state.subscribe(&type_url, names);
    }
    let shared = Arc::new(Shared { state: Mutex::new(state), wake: Notify::new() });
    let (sender, receiver) = mpsc::channel(EVENTS_MAX);
    let driver = Driver {
        node: options.node,
        protocol: options.protocol,
        backoff: options.backoff,
        dial: Arc::new(dial),
        shared: Arc::clone(&shared),
        events: sender,
    };
    (Handle { shared }, receiver, driver)
}

/// Owns the stream. Run it with [`Driver::run`].
pub struct Driver {
    node: Node,
    protocol: Protocol,
    backoff: Backoff,
    dial: Arc<dyn Dial>,
    shared: Arc<Shared>,
    events: mpsc::Sender<Event>,
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Driver").field("protocol", &self.protocol).finish_non_exhaustive()
    }
}

/// Why a session ended.
enum Ended {
    /// Nobody listens any more.
    Consumer,
    /// The stream broke.
    Stream(String),
}

impl Driver {
    /// Keeps the stream open until the receiver of events is dropped. *Cancel safety*: dropping
    /// the future closes the stream; nothing else is lost.
    pub async fn run(self) {
        let mut attempt = 0_u32;
        loop {
            let mut answered = false;
            let ended = match self.protocol {
                Protocol::Delta => self.session::<DeltaWire>(&mut answered).await,
                Protocol::StateOfTheWorld => self.session::<WorldWire>(&mut answered).await,
            };
            let Ended::Stream(reason) = ended else { return };
            attempt = if answered { 1 } else { attempt.saturating_add(1) };
            let retry_in = self.backoff.pause(attempt);
            tracing::debug!(reason, attempt, ?retry_in, "aggregated stream ended");
            let until = Instant::now() + retry_in;
            if self.events.send(Event::Disconnected { reason, attempt, retry_in }).await.is_err() {
                return;
            }
            tokio::select! {
                () = tokio::time::sleep_until(until) => {}
                () = self.events.closed() => return,
            }
        }
    }

    async fn session<W: Wire>(&self, answered: &mut bool) -> Ended {
        let dialed = tokio::select! {
            dialed = self.dial.dial() => dialed,
            () = self.events.closed() => return Ended::Consumer,
        };
        let dialed = match dialed {
            Ok(dialed) => dialed,
            Err(error) => return Ended::Stream(chain(&*error)),
        };
        let (requests, outgoing) = mpsc::channel(REQUESTS_MAX);
        self.shared.state().connected();
        let mut node = Some(self.node.clone());
        let mut request = tonic::Request::new(ReceiverStream::new(outgoing));
        *request.metadata_mut() = dialed.metadata;
        let mut client = AggregatedDiscoveryServiceClient::new(dialed.channel)
            .max_decoding_message_size(RESPONSE_BYTES_MAX)
            .max_encoding_message_size(usize::MAX);
        let mut opening = pin!(W::open(&mut client, request));
        // Many servers answer headers only with their first message, so requests flow meanwhile.
        let mut inbound = loop {
            self.send_due::<W>(&requests, &mut node);
            tokio::select! {
                opened = &mut opening => match opened {
                    Ok(inbound) => break inbound,
                    Err(status) => return Ended::Stream(describe(&status)),
                },
                () = self.shared.wake.notified() => {}
                () = self.events.closed() => return Ended::Consumer,
            }
        };
        if self.events.send(Event::Connected).await.is_err() {
            return Ended::Consumer;
        }
        let mut waiting: Option<Update> = None;
        loop {
            self.send_due::<W>(&requests, &mut node);
            // The next response is read only once the consumer took the one before.
            tokio::select! {
                permit = self.events.reserve(), if waiting.is_some() => match (permit, waiting.take()) {
                    (Ok(permit), Some(update)) => permit.send(Event::Update(update)),
                    _ => return Ended::Consumer,
                },
                message = inbound.message(), if waiting.is_none() => match message {
                    Ok(Some(message)) => {
                        *answered = true;
                        waiting = self.shared.state().receive(W::response(message));
                    }
                    Ok(None) => return Ended::Stream("the control plane closed the stream".to_owned()),
                    Err(status) => return Ended::Stream(describe(&status)),
                },
                () = self.shared.wake.notified() => {}
                () = self.events.closed() => return Ended::Consumer,
            }
        }
    }

    /// Hands due requests to gRPC as far as there is room; the rest goes with the next wake-up.
    fn send_due<W: Wire>(&self, requests: &mpsc::Sender<W::Request>, node: &mut Option<Node>) {
        loop {
            let permit = match requests.try_reserve() {
                Ok(permit) => permit,
                Err(mpsc::error::TrySendError::Full(())) => {
                    let shared = Arc::clone(&self.shared);
                    // Room comes when gRPC takes a request; look again then.
                    let requests = requests.clone();
                    drop(tokio::spawn(async move {
                        if requests.reserve().await.is_ok() {
                            shared.wake.notify_one();
                        }
                    }));
                    return;
                }
                Err(mpsc::error::TrySendError::Closed(())) => return,
            };
            let Some(due) = self.shared.state().next_request() else { return };
            permit.send(W::request(due, node.take()));
        }
    }
}

impl Backoff {
    fn pause(self, attempt: u32) -> Duration {
        let full = self.initial.saturating_mul(1_u32 << attempt.saturating_sub(1).min(16)).min(self.max);
        full.mul_f64(0.5 + 0.5 * spread())
    }
}

/// A number in `[0, 1)` that differs from call to call and process to process.
fn spread() -> f64 {
    let draw = std::hash::RandomState::new().build_hasher().finish();
    f64::from(u32::try_from(draw >> 32).unwrap_or(0)) / f64::from(u32::MAX)
}

fn describe(status: &tonic::Status) -> String {
    let mut text = format!("{}: {}", status.code(), status.message());
    if let Some(source) = std::error::Error::source(status) {
        text.push_str(": ");
        text.push_str(&chain(source));
    }
    text
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}

/// The two wire forms of one conversation.
trait Wire {
    type Request: Send + 'static;
    type Response: prost::Message + Default + 'static;
    fn open(
        client: &mut AggregatedDiscoveryServiceClient<Channel>,
        requests: tonic::Request<ReceiverStream<Self::Request>>,
    ) -> impl Future<Output = Result<tonic::Streaming<Self::Response>, tonic::Status>> + Send;
    fn request(due: RequestOut, node: Option<Node>) -> Self::Request;
    fn response(message: Self::Response) -> ResponseIn;
}

fn status_of(error: Option<String>) -> Option<rpc::Status> {
    error.map(|message| rpc::Status { code: tonic::Code::InvalidArgument as i32, message, details: Vec::new() })
}

struct DeltaWire;

impl Wire for DeltaWire {
    type Request = pb::DeltaDiscoveryRequest;
    type Response = pb::DeltaDiscoveryResponse;

    async fn open(
        client: &mut AggregatedDiscoveryServiceClient<Channel>,
        requests: tonic::Request<ReceiverStream<Self::Request>>,
    ) -> Result<tonic::Streaming<Self::Response>, tonic::Status> {
        client.delta_aggregated_resources(requests).await.map(tonic::Response::into_inner)
    }

    fn request(due: RequestOut, node: Option<Node>) -> Self::Request {
        pb::DeltaDiscoveryRequest {
            node,
            type_url: due.type_url,
            resource_names_subscribe: due.subscribe,
            resource_names_unsubscribe: due.unsubscribe,
            initial_resource_versions: due.running.into_iter().collect(),
            response_nonce: due.nonce,
            error_detail: status_of(due.error),
            ..pb::DeltaDiscoveryRequest::default()
        }
    }

    fn response(message: Self::Response) -> ResponseIn {
        let resources = message.resources.into_iter().map(|resource| ResourceIn {
            name: Some(resource.name),
            version: resource.version,
            any: resource.resource,
        });
        ResponseIn {
            type_url: message.type_url,
            version: message.system_version_info,
            nonce: message.nonce,
            resources: resources.collect(),
            removed: message.removed_resources,
        }
    }
}

struct WorldWire;

impl Wire for WorldWire {
    type Request = pb::DiscoveryRequest;
    type Response = pb::DiscoveryResponse;

    async fn open(
        client: &mut AggregatedDiscoveryServiceClient<Channel>,
        requests: tonic::Request<ReceiverStream<Self::Request>>,
    ) -> Result<tonic::Streaming<Self::Response>, tonic::Status> {
        client.stream_aggregated_resources(requests).await.map(tonic::Response::into_inner)
    }

    fn request(due: RequestOut, node: Option<Node>) -> Self::Request {
        pb::DiscoveryRequest {
            node,
            type_url: due.type_url,
            version_info: due.version,
            resource_names: due.names,
            response_nonce: due.nonce,
            error_detail: status_of(due.error),
            ..pb::DiscoveryRequest::default()
        }
    }

    fn response(message: Self::Response) -> ResponseIn {
        let resources =
            message.resources.into_iter().map(|any| ResourceIn { name: None, version: String::new(), any: Some(any) });
        ResponseIn {
            type_url: message.type_url,
            version: message.version_info,
            nonce: message.nonce,
            resources: resources.collect(),
            removed: Vec::new(),
        }
    }
}

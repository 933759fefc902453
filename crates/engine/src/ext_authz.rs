//! External authorization: what the authorizer is asked, and what its answer means.
//!
//! The engine asks ([`ExtAuthz::check`]), the proxy carries the call, the engine reads the answer
//! ([`ExtAuthz::answer`]). Both services of Envoy are known: plain HTTP, where the status decides,
//! and gRPC (`envoy.service.auth.v3.Authorization`).
//!
//! *Source*: Envoy, "External Authorization"; `docs/parity.md`, Security 8.10. Fields of framing and of one hop
//! never pass from an authorizer into a request or response, whatever the lists say.

use bytes::{BufMut as _, Bytes, BytesMut};
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::extensions::filters::http::ext_authz::v3 as pb;
use envoy_types::pb::envoy::service::auth::v3 as auth;
use envoy_types::pb::google::protobuf::Struct;
use prost::Message as _;
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::time::Duration;
use types::{Fields, RequestHead, ResponseHead};

use crate::config::Name;
use crate::headers::{Context, HeaderEdits};
use crate::lower::{json_struct, nothing_left};
use crate::matcher::{AnyOf, Metadata, MetadataMatcher};
use crate::route::Fraction;
use crate::unsupported::{Unsupported, Within as _, duration};

/// Envoy's time-out of a call without one.
const TIMEOUT: Duration = Duration::from_millis(200);
/// The method of the gRPC service.
const CHECK: &str = "/envoy.service.auth.v3.Authorization/Check";

/// The filter's settings.
#[derive(Debug)]
pub struct ExtAuthz {
    /// Where the authorizer is.
    pub cluster: Name,
    /// Until a call is given up; `None`: never.
    pub timeout: Option<Duration>,
    /// How much of the request's body it wants.
    pub body: Option<BodySettings>,
    /// Prefix of its statistics.
    pub stat_prefix: Box<str>,
    service: Service,
    enabled: Option<MetadataMatcher>,
    allowed: Option<AnyOf>,
    disallowed: AnyOf,
    failure_allows: bool,
    failure_header: bool,
    status_on_error: u16,
    clear_route_cache: bool,
    include_certificate: bool,
    include_server_name: bool,
    denied_body_max: usize,
}

/// How much of a body is handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BodySettings {
    /// At most so many bytes.
    pub bytes_max: u32,
    /// A cut body is fine; else a larger one is refused with 413, even if failures let pass.
    pub partial: bool,
    /// gRPC: as bytes, not as text.
    pub as_bytes: bool,
}

#[derive(Debug)]
enum Service {
    Http(Box<Http>),
    Grpc { authority: Box<str>, metadata: Vec<(Box<str>, Box<[u8]>)> },
}

#[derive(Debug)]
struct Http {
    path_prefix: Box<str>,
    path_override: Box<str>,
    add: HeaderEdits,
    to_upstream: AnyOf,
    to_upstream_append: AnyOf,
    to_client: AnyOf,
    to_client_on_success: AnyOf,
}

/// A route's override.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PerRoute {
    /// Nobody is asked.
    Disabled,
    /// Facts about the route for the authorizer.
    Settings {
        /// By name.
        context: BTreeMap<String, String>,
        /// The body stays here.
        without_body: bool,
    },
}

impl PerRoute {
    /// Lowers Envoy's message.
    pub fn lower(proto: &pb::ExtAuthzPerRoute) -> Result<Self, Unsupported> {
        use pb::ext_authz_per_route::Override;
        match proto.r#override.as_ref().ok_or_else(|| Unsupported::missing("override"))? {
            Override::Disabled(true) => Ok(Self::Disabled),
            Override::Disabled(false) => Err(Unsupported::new("disabled", "must be true")),
            Override::CheckSettings(settings) => {
                if settings.with_request_body.is_some() {
                    return Err(Unsupported::not_built("check_settings.with_request_body"));
                }
                if settings.service_override.is_some() {
                    return Err(Unsupported::not_built("check_settings.service_override"));
                }
                let context = settings.context_extensions.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
                Ok(Self::Settings { context, without_body: settings.disable_request_body_buffering })
            }
        }
    }
}

/// What a check is made from.
#[derive(Clone, Copy)]
pub struct Input<'a> {
    /// The request after normalisation.
    pub head: &'a RequestHead,
    /// Connection, facts and moment.
    pub context: Context<'a>,
    /// What was buffered of the body, if the authorizer wants any.
    pub body: Option<&'a [u8]>,
    /// The body is longer than that.
    pub partial: bool,
    /// The route's override.
    pub by_route: Option<&'a PerRoute>,
}

/// The call to make.
#[derive(Debug)]
pub struct Check {
    /// Its head.
    pub head: RequestHead,
    /// Its body, complete; a length-prefixed message for gRPC.
    pub body: Bytes,
    /// The service is gRPC.
    pub grpc: bool,
}

/// What the authorizer's answer means.
#[derive(Debug, PartialEq)]
pub enum Verdict {
    /// The request goes on, edited.
    Allow(Box<Allowance>),
    /// This is the answer.
    Deny(Box<Denial>),
    /// There is no answer that could be understood; see [`ExtAuthz::on_error`].
    Error,
}

/// How one header changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Edit {
    Set,
    Append,
    AddIfAbsent,
    SetIfPresent,
}

/// A header that changes.
type Edited = (Box<str>, Box<[u8]>, Edit);

/// Edits that come with a yes.
#[derive(Debug, Default, PartialEq)]
pub struct Allowance {
    request: Vec<Edited>,
    remove: Vec<Box<str>>,
    response: Vec<Edited>,
    query_set: Vec<(Box<str>, Box<str>)>,
    query_remove: Vec<Box<str>>,
    /// Facts for later filters, under `envoy.filters.http.ext_authz`.
    pub metadata: BTreeMap<String, Value>,
    /// The route is to be chosen again.
    pub clear_route_cache: bool,
}

/// An answer that comes with a no.
#[derive(Debug, PartialEq)]
pub struct Denial {
    /// 200 to 599.
    pub status: u16,
    /// Without fields of framing.
    pub headers: Fields,
    /// As the authorizer wrote it.
    pub body: Bytes,
}

/// What becomes of a request whose authorizer failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnError {
    /// It passes; `true`: marked by `x-envoy-auth-failure-mode-allowed`.
    Allow(bool),
    /// It is refused with this status and an empty body.
    Deny(u16),
}

/// Fields that only the proxy may write: framing, hop, and host.
fn is_ours(name: &str) -> bool {
    name.starts_with(':')
        || matches!(
            name,
            "host"
                | "content-length"
                | "transfer-encoding"
                | "connection"
                | "keep-alive"
                | "proxy-connection"
                | "upgrade"
                | "te"
                | "trailer"
        )
}

impl ExtAuthz {
    /// Lowers Envoy's message.
    pub fn lower(proto: &pb::ExtAuthz) -> Result<Self, Unsupported> {
        let mut proto = proto.clone();
        if let Some(enabled) = proto.filter_enabled.take() {
            must_be_whole(&enabled).within("filter_enabled")?;
        }
        let list = |list: Option<_>, path: &str| list.as_ref().map(AnyOf::lower).transpose().within(path);
        let status_on_error = match proto.status_on_error.take().map_or(0, |status| status.code) {
            0 => 403,
            code => u16::try_from(code)
                .ok()
                .filter(|code| (200..600).contains(code))
                .ok_or_else(|| Unsupported::new("status_on_error", format!("{code} is not a status")))?,
        };
        let (service, cluster, timeout) = match proto.services.take().ok_or_else(|| Unsupported::missing("services"))? {
            pb::ext_authz::Services::HttpService(http) => http_service(&http).within("http_service")?,
            pb::ext_authz::Services::GrpcService(grpc) => grpc_service(&grpc).within("grpc_service")?,
        };
        let body = match proto.with_request_body.take() {
            None => None,
            Some(settings) if settings.max_request_bytes == 0 => {
                return Err(Unsupported::new("with_request_body.max_request_bytes", "must be above 0"));
            }
            Some(settings) => Some(BodySettings {
                bytes_max: settings.max_request_bytes,
                partial: settings.allow_partial_message,
                as_bytes: settings.pack_as_bytes,
            }),
        };
        let enabled = proto.filter_enabled_metadata.take();
        let denied_body_max = std::mem::take(&mut proto.max_denied_response_body_bytes);
        let lowered = Self {
            cluster,
            timeout,
            body,
            stat_prefix: std::mem::take(&mut proto.stat_prefix).into(),
            service,
            enabled: enabled.as_ref().map(MetadataMatcher::lower).transpose().within("filter_enabled_metadata")?,
            allowed: list(proto.allowed_headers.take(), "allowed_headers")?,
            disallowed: list(proto.disallowed_headers.take(), "disallowed_headers")?.unwrap_or_default(),
            failure_allows: std::mem::take(&mut proto.failure_mode_allow),
            failure_header: std::mem::take(&mut proto.failure_mode_allow_header_add),
            status_on_error,
            clear_route_cache: std::mem::take(&mut proto.clear_route_cache),
            include_certificate: std::mem::take(&mut proto.include_peer_certificate),
            include_server_name: std::mem::take(&mut proto.include_tls_session),
            denied_body_max: if denied_body_max == 0 { usize::MAX } else { denied_body_max as usize },
        };
        // There is no other version.
        proto.transport_api_version = 0;
        // What the authorizer tells of the request is always taken, which is the default.
        proto.enable_dynamic_metadata_ingestion.take_if(|taken| taken.value);
        // Statistics and spans of the call.
        proto.charge_cluster_response_stats = None;
        proto.emit_filter_state_stats = false;
        proto.emit_client_span = None;
        nothing_left(&proto)?;
        Ok(lowered)
    }

    /// Whether this request is asked about at all.
    pub fn wants(&self, metadata: &Metadata, by_route: Option<&PerRoute>) -> bool {
        by_route != Some(&PerRoute::Disabled) && self.enabled.as_ref().is_none_or(|enabled| enabled.matches(metadata))
    }

    /// How much of the body to buffer before [`Self::check`].
    pub fn body_wanted(&self, by_route: Option<&PerRoute>) -> Option<BodySettings> {
        let without = matches!(by_route, Some(PerRoute::Settings { without_body: true, .. }));
        self.body.filter(|_| !without)
    }

    /// What happens when the authorizer fails.
    pub fn on_error(&self) -> OnError {
        if self.failure_allows { OnError::Allow(self.failure_header) } else { OnError::Deny(self.status_on_error) }
    }

    /// The call to make.
    pub fn check(&self, input: &Input<'_>) -> Check {
        match &self.service {
            Service::Http(http) => self.http_check(http, input),
            Service::Grpc { authority, metadata } => self.grpc_check(authority, metadata, input),
        }
    }

    fn sends(&self, name: &str, default: bool) -> bool {
        let listed = self.allowed.as_ref().map_or(default, |allowed| allowed.matches(name.as_bytes()));
        listed && !self.disallowed.matches(name.as_bytes())
    }

    fn http_check(&self, http: &Http, input: &Input<'_>) -> Check {
        let mut head = RequestHead::default();
        head.scheme = input.head.scheme;
        head.set_method(input.head.method());
        head.set_authority(input.head.authority());
        if http.path_override.is_empty() {
            head.set_path(&[http.path_prefix.as_bytes(), input.head.path()].concat());
        } else {
            head.set_path(http.path_override.as_bytes());
        }
        for (name, value) in input.head.fields.iter() {
            if !is_ours(name) && (name == "authorization" || self.sends(name, false)) {
                head.fields.push(name, value);
            }
        }
        let body = Bytes::copy_from_slice(input.body.unwrap_or_default());
        if input.body.is_some() {
            let partial: &[u8] = if input.partial { b"true" } else { b"false" };
            head.fields.set("x-envoy-auth-partial-body", partial);
        }
        http.add.apply_request(&mut head, &input.context);
        head.fields.set("content-length", body.len().to_string().as_bytes());
        Check { head, body, grpc: false }
    }

    fn grpc_check(&self, authority: &str, metadata: &[(Box<str>, Box<[u8]>)], input: &Input<'_>) -> Check {
        let message = auth::CheckRequest { attributes: Some(self.attributes(input)) }.encode_to_vec();
        let mut head = RequestHead::new("POST", authority, CHECK);
        head.fields.push("content-type", b"application/grpc");
        head.fields.push("te", b"trailers");
        for (name, value) in metadata {
            head.fields.push(name, value);
        }
        let mut body = BytesMut::with_capacity(message.len() + 5);
        body.put_u8(0);
        body.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
        body.put_slice(&message);
        Check { head, body: body.freeze(), grpc: true }
    }

    fn attributes(&self, input: &Input<'_>) -> auth::AttributeContext {
        use auth::attribute_context::{HttpRequest, Peer, Request, TlsSession};
        let head = input.head;
        let conn = input.context.conn;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let mut headers: HashMap<String, String> = HashMap::new();
        for name in [":method", ":path", ":authority", ":scheme"] {
            let value = head.header(name).unwrap_or_default();
            if self.sends(name, true) {
                headers.insert(name.to_owned(), text(&value));
            }
        }
        for (name, _) in head.fields.iter() {
            if self.sends(name, true)
                && !headers.contains_key(name)
                && let Some(value) = head.fields.joined(name)
            {
                headers.insert(name.to_owned(), text(&value));
            }
        }
        if input.body.is_some() {
            headers.insert("x-envoy-auth-partial-body".to_owned(), input.partial.to_string());
        }
        let as_bytes = self.body.is_some_and(|settings| settings.as_bytes);
        let body = input.body.unwrap_or_default();
        let length = head.fields.get_str("content-length").and_then(|length| length.parse().ok());
        let peer = conn.peer_certificate();
        let client = input.context.info.client_address.unwrap_or(conn.peer);
        let local = conn.tls.as_ref().and_then(|tls| tls.local_uri_san.as_deref());
        let wall = input.context.now.wall_nanos;
        let context = match input.by_route {
            Some(PerRoute::Settings { context, .. }) => context.iter().map(|(k, v)| (k.clone(), v.clone())).collect(),
            _ => HashMap::new(),
        };
        auth::AttributeContext {
            source: Some(Peer {
                address: Some(address(client)),
                principal: peer.and_then(|peer| peer.uri_sans.first()).map(ToString::to_string).unwrap_or_default(),
                certificate: peer
                    .filter(|_| self.include_certificate)
                    .map(|peer| peer.url_encoded_pem.to_string())
                    .unwrap_or_default(),
                ..Peer::default()
            }),
            destination: Some(Peer {
                address: Some(address(conn.local)),
                principal: local.unwrap_or_default().to_owned(),
                ..Peer::default()
            }),
            request: Some(Request {
                time: Some(envoy_types::pb::google::protobuf::Timestamp {
                    seconds: i64::try_from(wall / 1_000_000_000).unwrap_or(i64::MAX),
                    nanos: i32::try_from(wall % 1_000_000_000).unwrap_or(0),
                }),
                http: Some(HttpRequest {
                    id: head.fields.get_str("x-request-id").unwrap_or_default().to_owned(),
                    method: head.method().to_owned(),
                    headers,
                    path: text(head.path()),
                    host: text(head.authority()),
                    scheme: head.scheme.as_str().to_owned(),
                    size: length.unwrap_or(-1),
                    protocol: head.version.as_str().to_owned(),
                    body: if as_bytes { String::new() } else { text(body) },
                    raw_body: if as_bytes { body.to_vec() } else { Vec::new() },
                    ..HttpRequest::default()
                }),
            }),
            context_extensions: context,
            tls_session: conn
                .tls
                .as_ref()
                .filter(|_| self.include_server_name)
                .map(|_| TlsSession { sni: conn.server_name.as_deref().unwrap_or_default().to_owned() }),
            ..auth::AttributeContext::default()
        }
    }

    /// What an answer means. `trailers` are those of a gRPC answer.
    pub fn answer(&self, head: &ResponseHead, body: &Bytes, trailers: Option<&Fields>) -> Verdict {
        match &self.service {
            Service::Http(http) => self.http_answer(http, head, body),
            Service::Grpc { .. } => self.grpc_answer(head, body, trailers).unwrap_or(Verdict::Error),
        }
    }

    fn http_answer(&self, http: &Http, head: &ResponseHead, body: &Bytes) -> Verdict {
        if head.status >= 500 || head.status < 200 {
            return Verdict::Error;
        }
        let fields = || head.fields.iter().filter(|(name, _)| !is_ours(name));
        if head.status != 200 {
            let always = |name: &str| matches!(name, "www-authenticate" | "location");
            let all = http.to_client.is_empty();
            let headers =
                fields().filter(|(name, _)| all || always(name) || http.to_client.matches(name.as_bytes())).collect();
            return Verdict::Deny(Box::new(Denial { status: head.status, headers, body: self.cut(body) }));
        }
        let mut allowance = Allowance { clear_route_cache: self.clear_route_cache, ..Allowance::default() };
        let mut set: Vec<&str> = Vec::new();
        for (name, value) in fields() {
            let key = name.as_bytes();
            if http.to_upstream.matches(key) {
                // The first takes the place of the client's, more of the authorizer's follow it.
                let edit = if set.contains(&name) { Edit::Append } else { Edit::Set };
                set.push(name);
                allowance.request.push((name.into(), value.into(), edit));
            } else if http.to_upstream_append.matches(key) {
                allowance.request.push((name.into(), value.into(), Edit::Append));
            }
            if http.to_client_on_success.matches(key) {
                allowance.response.push((name.into(), value.into(), Edit::Append));
            }
        }
        for value in head.fields.get_all("x-envoy-auth-headers-to-remove") {
            let names = value.split(|b| *b == b',').filter_map(|name| std::str::from_utf8(name).ok());
            allowance.remove.extend(names.map(|name| name.trim().to_ascii_lowercase().into()));
        }
        allowance.remove.retain(|name| !name.is_empty() && !is_ours(name));
        Verdict::Allow(Box::new(allowance))
    }

    fn grpc_answer(&self, head: &ResponseHead, body: &Bytes, trailers: Option<&Fields>) -> Option<Verdict> {
        let status = trailers.and_then(|fields| fields.get("grpc-status")).or_else(|| head.fields.get("grpc-status"));
        if head.status != 200 || status != Some(b"0") {
            return None;
        }
        // One message, not compressed.
        let (&[0, a, b, c, d], message) = body.split_first_chunk::<5>()? else { return None };
        if u32::from_be_bytes([a, b, c, d]) as usize != message.len() {
            return None;
        }
        let response = auth::CheckResponse::decode(message).ok()?;
        let allowed = response.status.as_ref().is_some_and(|status| status.code == 0);
        let metadata = facts(response.dynamic_metadata.as_ref());
        let verdict = match (allowed, response.http_response) {
            (true, Some(auth::check_response::HttpResponse::OkResponse(ok))) => {
                Verdict::Allow(Box::new(self.allowance(&ok, metadata)?))
            }
            (true, None) => Verdict::Allow(Box::new(Allowance { metadata, ..Allowance::default() })),
            // A yes with the form of a no is neither.
            (true, Some(_)) | (false, Some(auth::check_response::HttpResponse::OkResponse(_))) => return None,
            (false, Some(auth::check_response::HttpResponse::ErrorResponse(_))) => return None,
            (false, Some(auth::check_response::HttpResponse::DeniedResponse(denied))) => {
                let status = denied.status.as_ref().map_or(0, |status| status.code);
                let status = u16::try_from(status).ok().filter(|status| (200..600).contains(status)).unwrap_or(403);
                let mut headers = Fields::new();
                for (name, value, edit) in edits(&denied.headers)? {
                    match edit {
                        Edit::Append => headers.push(&name, &value),
                        _ => headers.set(&name, &value),
                    }
                }
                let body = self.cut(&Bytes::from(denied.body));
                Verdict::Deny(Box::new(Denial { status, headers, body }))
            }
            (false, None) => {
                Verdict::Deny(Box::new(Denial { status: 403, headers: Fields::new(), body: Bytes::new() }))
            }
        };
        Some(verdict)
    }

    fn allowance(&self, ok: &auth::OkHttpResponse, mut metadata: BTreeMap<String, Value>) -> Option<Allowance> {
        if metadata.is_empty() {
            metadata = older_metadata(ok);
        }
        Some(Allowance {
            request: edits(&ok.headers)?,
            remove: ok
                .headers_to_remove
                .iter()
                .map(|name| name.to_ascii_lowercase())
                .filter(|name| !is_ours(name))
                .map(Into::into)
                .collect(),
            response: edits(&ok.response_headers_to_add)?
                .into_iter()
                .map(|(name, value, _)| (name, value, Edit::Append))
                .collect(),
            query_set: ok
                .query_parameters_to_set
                .iter()
                .map(|parameter| (parameter.key.as_str().into(), parameter.value.as_str().into()))
                .collect(),
            query_remove: ok.query_parameters_to_remove.iter().map(|name| name.as_str().into()).collect(),
            metadata,
            clear_route_cache: self.clear_route_cache,
        })
    }

    fn cut(&self, body: &Bytes) -> Bytes {
        body.slice(..body.len().min(self.denied_body_max))
    }
}

#[expect(deprecated, reason = "authorizers in the field still fill it")]
fn older_metadata(ok: &auth::OkHttpResponse) -> BTreeMap<String, Value> {
    facts(ok.dynamic_metadata.as_ref())
}

impl Allowance {
    /// Edits the request on its way upstream.
    pub fn apply(&self, head: &mut RequestHead) {
        apply(&self.request, &mut head.fields);
        for name in &self.remove {
            head.fields.remove(name);
        }
        if self.query_set.is_empty() && self.query_remove.is_empty() {
            return;
        }
        let is_edited = |pair: &[u8]| {
            let name = pair.split(|b| *b == b'=').next().unwrap_or_default();
            self.query_set
                .iter()
                .map(|(name, _)| name)
                .chain(&self.query_remove)
                .any(|edited| edited.as_bytes() == name)
        };
        let old = head.query().unwrap_or_default();
        let mut pairs: Vec<Vec<u8>> =
            old.split(|b| *b == b'&').filter(|pair| !pair.is_empty() && !is_edited(pair)).map(<[u8]>::to_vec).collect();
        let encode =
            |text: &str| percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC).to_string();
        pairs.extend(
            self.query_set.iter().map(|(name, value)| format!("{}={}", encode(name), encode(value)).into_bytes()),
        );
        let mut path = head.path_only().to_vec();
        if !pairs.is_empty() {
            path.push(b'?');
            path.extend_from_slice(&pairs.join(&b'&'));
        }
        head.set_path(&path);
    }

    /// Edits the response on its way to the client.
    pub fn apply_response(&self, head: &mut ResponseHead) {
        apply(&self.response, &mut head.fields);
    }

    /// Whether the response is to be edited.
    pub fn edits_response(&self) -> bool {
        !self.response.is_empty()
    }
}

fn apply(edits: &[Edited], fields: &mut Fields) {
    for (name, value, edit) in edits {
        let exists = fields.contains(name);
        match edit {
            Edit::Append => fields.push(name, value),
            Edit::Set => fields.set(name, value),
            Edit::AddIfAbsent if !exists => fields.push(name, value),
            Edit::SetIfPresent if exists => fields.set(name, value),
            Edit::AddIfAbsent | Edit::SetIfPresent => {}
        }
    }
}

/// Edits as the authorizer wrote them; `None` if one is no header. In these messages, unlike in
/// routes, a header without further words replaces.
#[expect(deprecated, reason = "the older field still says the same")]
fn edits(options: &[core::HeaderValueOption]) -> Option<Vec<Edited>> {
    let mut list = Vec::with_capacity(options.len());
    for option in options {
        let header = option.header.as_ref()?;
        let value = if header.raw_value.is_empty() { header.value.as_bytes() } else { &header.raw_value };
        let is_token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
        let name = header.key.to_ascii_lowercase();
        if is_ours(&name) {
            continue;
        }
        if name.is_empty() || !name.bytes().all(is_token) || value.iter().any(|b| matches!(b, b'\r' | b'\n' | 0)) {
            return None;
        }
        let edit = match (option.append.as_ref().map(|append| append.value), option.append_action) {
            (Some(true), _) => Edit::Append,
            (_, 0 | 2) => Edit::Set,
            (_, 1) => Edit::AddIfAbsent,
            (_, 3) => Edit::SetIfPresent,
            _ => return None,
        };
        list.push((name.into(), value.trim_ascii().into(), edit));
    }
    Some(list)
}

/// Facts by name.
fn facts(metadata: Option<&Struct>) -> BTreeMap<String, Value> {
    match metadata.map(json_struct) {
        Some(Value::Object(facts)) => facts.into_iter().collect(),
        _ => BTreeMap::new(),
    }
}

fn address(at: std::net::SocketAddr) -> core::Address {
    core::Address {
        address: Some(core::address::Address::SocketAddress(core::SocketAddress {
            address: at.ip().to_string(),
            port_specifier: Some(core::socket_address::PortSpecifier::PortValue(at.port().into())),
            ..core::SocketAddress::default()
        })),
    }
}

/// A share of requests would let the others pass unasked.
fn must_be_whole(enabled: &core::RuntimeFractionalPercent) -> Result<(), Unsupported> {
    let share = enabled.default_value.as_ref().map(Fraction::lower).transpose().within("default_value")?;
    if share.is_some_and(Fraction::is_whole) {
        return Ok(());
    }
    Err(Unsupported::new("", "must be 100 %: a share of requests is not supported"))
}

type Lowered = (Service, Name, Option<Duration>);

fn http_service(proto: &pb::HttpService) -> Result<Lowered, Unsupported> {
    if proto.retry_policy.is_some() {
        return Err(Unsupported::not_built("retry_policy"));
    }
    let uri = proto.server_uri.as_ref().ok_or_else(|| Unsupported::missing("server_uri"))?;
    let Some(core::http_uri::HttpUpstreamType::Cluster(cluster)) = &uri.http_upstream_type else {
        return Err(Unsupported::missing("server_uri.cluster"));
    };
    for (path, text) in [("path_prefix", &proto.path_prefix), ("path_override", &proto.path_override)] {
        if !text.is_empty() && !text.starts_with('/') {
            return Err(Unsupported::new(path, "must begin with /"));
        }
    }
    let request = proto.authorization_request.clone().unwrap_or_default();
    #[expect(deprecated, reason = "refused by its name")]
    if request.allowed_headers.is_some() {
        return Err(Unsupported::new("authorization_request.allowed_headers", "is replaced by allowed_headers"));
    }
    let add: Vec<_> = request
        .headers_to_add
        .into_iter()
        .map(|header| core::HeaderValueOption {
            header: Some(header),
            append_action: core::header_value_option::HeaderAppendAction::OverwriteIfExistsOrAdd as i32,
            ..core::HeaderValueOption::default()
        })
        .collect();
    let response = proto.authorization_response.clone().unwrap_or_default();
    if response.dynamic_metadata_from_headers.is_some() {
        return Err(Unsupported::not_built("authorization_response.dynamic_metadata_from_headers"));
    }
    let list = |list: &Option<_>, path: &str| {
        list.as_ref().map(AnyOf::lower).transpose().within(path).map(Option::unwrap_or_default)
    };
    let http = Http {
        path_prefix: proto.path_prefix.as_str().into(),
        path_override: proto.path_override.as_str().into(),
        add: HeaderEdits::lower(&add, &[]).within("authorization_request.headers_to_add")?,
        to_upstream: list(&response.allowed_upstream_headers, "authorization_response.allowed_upstream_headers")?,
        to_upstream_append: list(
            &response.allowed_upstream_headers_to_append,
            "authorization_response.allowed_upstream_headers_to_append",
        )?,
        to_client: list(&response.allowed_client_headers, "authorization_response.allowed_client_headers")?,
        to_client_on_success: list(
            &response.allowed_client_headers_on_success,
            "authorization_response.allowed_client_headers_on_success",
        )?,
    };
    let timeout = uri.timeout.as_ref().map_or(Ok(TIMEOUT), |timeout| duration(timeout, "server_uri.timeout"))?;
    Ok((Service::Http(Box::new(http)), cluster.as_str().into(), Some(timeout).filter(|timeout| !timeout.is_zero())))
}

fn grpc_service(proto: &core::GrpcService) -> Result<Lowered, Unsupported> {
    if proto.retry_policy.is_some() {
        return Err(Unsupported::not_built("retry_policy"));
    }
    let Some(core::grpc_service::TargetSpecifier::EnvoyGrpc(envoy)) = &proto.target_specifier else {
        return Err(Unsupported::new("target_specifier", "must be envoy_grpc"));
    };
    if envoy.retry_policy.is_some() {
        return Err(Unsupported::not_built("envoy_grpc.retry_policy"));
    }
    let metadata = crate::unsupported::each(&proto.initial_metadata, "initial_metadata", |header| {
        let name = header.key.to_ascii_lowercase();
        let value = if header.raw_value.is_empty() { header.value.as_bytes() } else { &header.raw_value };
        if name.is_empty() || is_ours(&name) || value.contains(&b'%') {
            return Err(Unsupported::new("", "is not a fixed header"));
        }
        Ok((name.into(), value.into()))
    })?;
    let authority = if envoy.authority.is_empty() { &envoy.cluster_name } else { &envoy.authority };
    let timeout = proto.timeout.as_ref().map_or(Ok(TIMEOUT), |timeout| duration(timeout, "timeout"))?;
    Ok((
        Service::Grpc { authority: authority.as_str().into(), metadata },
        envoy.cluster_name.as_str().into(),
        Some(timeout).filter(|timeout| !timeout.is_zero()),
    ))
}

#[cfg(test)]
mod tests;

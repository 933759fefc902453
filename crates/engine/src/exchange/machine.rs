//! The state machine.

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use smallvec::SmallVec;
use types::{Cause, RequestHead, ResponseHead, Scheme};

use super::attempt::{self, Plan};
use super::reply::{self, Edits, Spec};
use super::{Answer, Attempt, Details, Env, Failure, LocalReply, Mirror, Question, Start, Step, StreamInfo};
use super::{normalize, route_edits};
use crate::chain::{Direction, FilterChain, Terminal};
use crate::cluster::{Discovery, DnsFamily};
use crate::config::{Name, RuntimeConfig};
use crate::digits::{millis, set_number};
use crate::draw::Draw;
use crate::facts::ConnFacts;
use crate::hcm::{Hcm, RouteSource};
use crate::record::{Recorder, Stage, note};
use crate::retry::RetryPolicy;
use crate::route::{
    Action, Choice, Forward, HostRewrite, MirrorPolicy, RequireTls, Route, RouteTable, Target, VirtualHost,
    WeightedCluster,
};
use crate::shared::{ClusterHeld, Resource, SharedHost};

/// One request.
#[derive(Debug)]
pub struct Exchange {
    pub(super) config: Rc<RuntimeConfig>,
    chain: Arc<FilterChain>,
    pub(super) conn: Arc<ConnFacts>,
    pub(super) draw: Draw,
    pub(super) info: StreamInfo,
    table: Option<Arc<RouteTable>>,
    choice: Option<Choice>,
    /// Index of the weighted cluster drawn.
    weighted: Option<usize>,
    pub(super) phase: Phase,
    started: Instant,
    completed: Option<Instant>,
    is_head: bool,
    internal: bool,
    upgrade: bool,
    /// The upstream has agreed to the upgrade.
    is_tunnel: bool,
    replayable: bool,
    pub(super) filters: super::filters::Marks,
    timing: Timing,
    attempt: AttemptState,
    /// Sent with the response, made for a hash policy.
    cookie: Option<Box<str>>,
}

/// Where the exchange stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Phase {
    /// Before the filter with this index.
    Filters(usize),
    /// That filter has asked or waits.
    Paused(usize),
    /// A name is being resolved for the router.
    Resolving,
    /// An attempt is under way.
    Attempting,
    /// Between two attempts.
    BackingOff,
    /// The response has begun.
    Responding,
    /// A reply was given, or the response has ended.
    Done,
}

/// Time-outs in force once a route was found.
#[derive(Clone, Copy, Debug, Default)]
struct Timing {
    route: Option<Duration>,
    per_try: Option<Duration>,
    per_try_idle: Option<Duration>,
    /// Until the whole request is in.
    receive: Option<Duration>,
    stream_max: Option<Duration>,
    idle: Option<Duration>,
    try_started: Option<Instant>,
}

#[derive(Debug, Default)]
struct AttemptState {
    number: u32,
    retries_left: u32,
    policy: Option<Arc<RetryPolicy>>,
    hash: Option<u64>,
    tried: SmallVec<[Arc<SharedHost>; 4]>,
    tried_priorities: Vec<u32>,
    /// The place in the retry limit, from the decision to try again until something came of the try.
    retrying: Option<ClusterHeld>,
    cluster: Option<Name>,
    shared: Option<Arc<crate::shared::SharedCluster>>,
    resolved: Option<std::net::SocketAddr>,
    edited: bool,
}

/// Carries the operation's name from client to server, and back where the server names it.
const OPERATION: &str = "x-envoy-decorator-operation";

/// Headers with which internal callers steer the router; they are its own and go no further.
const STEERING: [&str; 8] = [
    "x-envoy-retry-on",
    "x-envoy-retry-grpc-on",
    "x-envoy-max-retries",
    "x-envoy-retriable-status-codes",
    "x-envoy-retriable-header-names",
    "x-envoy-hedge-on-per-try-timeout",
    "x-envoy-upstream-rq-timeout-ms",
    "x-envoy-upstream-rq-per-try-timeout-ms",
];

impl Exchange {
    /// Starts a request; `head` is as the codec read it and is edited in place.
    ///
    /// A chain that does not end in HTTP is answered with [`Cause::Internal`].
    pub fn start(env: &Env<'_>, start: Start<'_>, head: &mut RequestHead) -> (Self, Step) {
        let Start { chain, conn, ended, seed, recorder } = start;
        let mut exchange = Self {
            config: Rc::clone(env.config),
            chain: Arc::clone(chain),
            conn: Arc::clone(conn),
            draw: Draw::new(seed),
            info: StreamInfo { is_grpc: head.is_grpc(), ..StreamInfo::default() },
            table: None,
            choice: None,
            weighted: None,
            phase: Phase::Filters(0),
            started: env.now.mono,
            completed: ended.then_some(env.now.mono),
            is_head: head.method() == "HEAD",
            internal: false,
            upgrade: false,
            is_tunnel: false,
            replayable: true,
            filters: super::filters::Marks::default(),
            timing: Timing::default(),
            attempt: AttemptState::default(),
            cookie: None,
        };
        let step = exchange.begin(env, head, recorder);
        (exchange, step)
    }

    fn begin(&mut self, env: &Env<'_>, head: &mut RequestHead, recorder: &mut dyn Recorder) -> Step {
        let Terminal::Http(hcm) = &self.chain.terminal else {
            return self.reply(env, Cause::Internal, Spec::default(), head, recorder);
        };
        let hcm = Arc::clone(hcm);
        self.table = match &hcm.routes {
            RouteSource::Inline(table) => Some(Arc::clone(table)),
            RouteSource::Rds(name) => self.config.routes.get(name).cloned(),
        };
        match normalize::target(&hcm, &self.conn, head).and_then(|()| normalize::underscores(&hcm, head)) {
            Ok(()) => {}
            Err(normalize::Refused::Reply(cause)) => {
                return self.reply(env, cause, Spec::default(), head, recorder);
            }
            // gRPC clients follow no redirect.
            Err(normalize::Refused::Redirect) if self.info.is_grpc => {
                return self.reply(env, Cause::BadPath, Spec::default(), head, recorder);
            }
            Err(normalize::Refused::Redirect) => {
                let to = head.path().to_vec();
                let spec = Spec { status: Some(307), headers: vec![("location", to)], plain: true, ..Spec::default() };
                return self.reply(env, Cause::Redirect, spec, head, recorder);
            }
        }
        let wants_upgrade = head.asks_for_tunnel();
        normalize::hop_by_hop(&mut head.fields, wants_upgrade);
        let internal_only = self.table.as_ref().map_or(&[][..], |table| &table.internal_only_headers);
        let caller = normalize::sanitize(&hcm, internal_only, &self.conn, head, self.draw);
        self.internal = caller.internal;
        self.info.client_address = Some(caller.address);
        if let Some(tracing) = &hcm.tracing {
            self.info.traced = normalize::trace_decision(tracing, hcm.request_ids, head, self.draw);
        }
        self.choose_route(head, recorder);
        self.refresh_stream_limits(&hcm, head);
        if wants_upgrade && !self.upgrade_allowed(&hcm, head) {
            return self.reply(env, Cause::UpgradeRefused, Spec::default(), head, recorder);
        }
        self.upgrade = wants_upgrade;
        self.operation(&hcm, head);
        self.run_filters(env, 0, head, recorder)
    }

    /// Chooses the route, again if a filter changed what it depends on.
    pub(super) fn choose_route(&mut self, head: &RequestHead, recorder: &mut dyn Recorder) {
        self.weighted = None;
        let Some(table) = &self.table else {
            note(recorder, Stage::RouteTable, None, || ("none".to_owned(), "no route table was received".to_owned()));
            return;
        };
        self.choice = table.choose(head, &self.info.metadata, self.draw.named("route_fraction"));
        let found = self.choice.map(|choice| &table.virtual_hosts[choice.virtual_host]);
        self.info.virtual_host = found.map(|host| host.name.clone());
        note(recorder, Stage::RouteTable, Some(&table.provenance), || (table.name.to_string(), String::new()));
        note(recorder, Stage::VirtualHost, found.map(|host| &host.provenance), || {
            let name = found.map_or_else(|| "none".to_owned(), |host| host.name.to_string());
            (name, String::from_utf8_lossy(head.authority()).into_owned())
        });
        let route = self.route_of(table);
        note(recorder, Stage::Route, route.map(|route| &route.provenance), || {
            let name = route.map_or_else(|| "none".to_owned(), |route| route.name.to_string());
            (name, String::from_utf8_lossy(head.path()).into_owned())
        });
        let (name, provenance, operation) = match route {
            Some(route) => (Some(route.name.clone()), Some(Arc::clone(&route.provenance)), route.operation.clone()),
            None => (None, None, None),
        };
        let (weighted, cluster_name) = match route.map(|route| &route.action) {
            Some(Action::Forward(forward)) => {
                let weighted = weighted_index(&forward.target, self.draw);
                (weighted, cluster_name(forward, weighted, head))
            }
            Some(Action::Redirect(_) | Action::Direct(_)) | None => (None, None),
        };
        self.info.route_name = name;
        self.info.provenance = provenance;
        if !self.info.operation_from_peer {
            self.info.operation = operation;
        }
        self.weighted = weighted;
        // Whoever ends the request from here on, its log names the cluster that the route wanted.
        self.info.cluster = cluster_name.as_ref().and_then(|name| self.config.clusters.get(name).cloned());
        self.info.cluster_name = cluster_name;
    }

    /// Chooses the route anew after a filter changed what it depends on, and all that follows from it.
    pub(super) fn choose_route_again(&mut self, hcm: &Hcm, head: &mut RequestHead, recorder: &mut dyn Recorder) {
        self.choose_route(head, recorder);
        self.refresh_stream_limits(hcm, head);
        self.tell_operation(hcm, head);
    }

    fn route_of<'a>(&self, table: &'a RouteTable) -> Option<&'a Route> {
        let choice = self.choice?;
        Some(&table.virtual_hosts[choice.virtual_host].routes[choice.route?])
    }

    pub(super) fn table_and_host(&self) -> Option<(&RouteTable, &VirtualHost)> {
        let table = self.table.as_deref()?;
        Some((table, &table.virtual_hosts[self.choice?.virtual_host]))
    }

    pub(super) fn route(&self) -> Option<&Route> {
        self.route_of(self.table.as_deref()?)
    }

    pub(super) fn weighted(&self) -> Option<&WeightedCluster> {
        match &self.route()?.action {
            Action::Forward(forward) => match &forward.target {
                Target::Weighted { clusters, .. } => clusters.get(self.weighted?),
                Target::Cluster(_) | Target::Header(_) => None,
            },
            Action::Redirect(_) | Action::Direct(_) => None,
        }
    }

    pub(super) fn hcm(&self) -> Option<Arc<Hcm>> {
        match &self.chain.terminal {
            Terminal::Http(hcm) => Some(Arc::clone(hcm)),
            Terminal::Tcp(_) => None,
        }
    }

    fn upgrade_allowed(&self, hcm: &Hcm, head: &RequestHead) -> bool {
        let asked = head.protocol().unwrap_or(b"connect");
        let by_route = match self.route().map(|route| &route.action) {
            Some(Action::Forward(forward)) => {
                forward.upgrades.iter().find(|(kind, _)| kind.as_bytes().eq_ignore_ascii_case(asked))
            }
            _ => None,
        };
        by_route.map_or_else(
            || hcm.upgrades.iter().any(|kind| kind.as_bytes().eq_ignore_ascii_case(asked)),
            |(_, enabled)| *enabled,
        )
    }

    /// The decorator's operation travels from client to server.
    fn operation(&mut self, hcm: &Hcm, head: &mut RequestHead) {
        if hcm.tracing.is_none() {
            return;
        }
        if hcm.direction == Direction::Outbound {
            self.tell_operation(hcm, head);
        } else if let Some(given) = head.fields.get_str(OPERATION).map(Name::from) {
            self.info.operation = Some(given);
            self.info.operation_from_peer = true;
            head.fields.remove(OPERATION);
        }
    }

    /// Writes the route's operation into an outbound request.
    fn tell_operation(&self, hcm: &Hcm, head: &mut RequestHead) {
        if hcm.tracing.is_some()
            && hcm.direction == Direction::Outbound
            && let Some(operation) = &self.info.operation
        {
            head.fields.set(OPERATION, operation.as_bytes());
        }
    }

    pub(super) fn refresh_stream_limits(&mut self, hcm: &Hcm, head: &RequestHead) {
        self.timing.idle = hcm.timeouts.stream_idle;
        self.timing.receive = hcm.timeouts.request;
        self.timing.stream_max = hcm.timeouts.stream_duration_max;
        let Some(Action::Forward(forward)) = self.route().map(|route| &route.action) else { return };
        let (idle, duration) = (forward.idle_timeout, forward.stream_duration);
        if let Some(idle) = idle {
            self.timing.idle = idle;
        }
        if let Some(duration) = duration {
            let by_header = match (duration.grpc_timeout_max, self.info.is_grpc) {
                (Some(cap), true) => {
                    super::grpc::timeout(&head.fields).map(|asked| if cap.is_zero() { asked } else { asked.min(cap) })
                }
                _ => None,
            };
            self.timing.stream_max = by_header.or(duration.max).or(self.timing.stream_max);
        }
    }

    // ---- the router ----

    /// The last filter.
    pub(super) fn router(&mut self, env: &Env<'_>, head: &mut RequestHead, recorder: &mut dyn Recorder) -> Step {
        let Some(table) = self.table.clone() else {
            return self.reply(env, Cause::NoRoute, Spec::default(), head, recorder);
        };
        let Some(choice) = self.choice else {
            return self.reply(env, Cause::NoRoute, Spec::default(), head, recorder);
        };
        let host = &table.virtual_hosts[choice.virtual_host];
        let tls_wanted = match host.require_tls {
            RequireTls::None => false,
            RequireTls::ExternalOnly => !self.internal,
            RequireTls::All => true,
        };
        if tls_wanted && !normalize::is_https(head) {
            let spec = Spec { headers: vec![("location", reply::https_location(head))], ..Spec::default() };
            return self.reply(env, Cause::HttpsRedirect, spec, head, recorder);
        }
        let Some(route) = choice.route.map(|route| &host.routes[route]) else {
            return self.reply(env, Cause::NoRoute, Spec::default(), head, recorder);
        };
        match &route.action {
            Action::Direct(direct) => {
                let spec = Spec {
                    status: Some(direct.status),
                    body: Some(direct.body.clone()),
                    headers: reply::own_location(direct.status, head).map(|to| ("location", to)).into_iter().collect(),
                    ..Spec::default()
                };
                self.reply(env, Cause::DirectResponse, spec, head, recorder)
            }
            Action::Redirect(redirect) => {
                let spec = Spec {
                    status: Some(redirect.status),
                    headers: vec![("location", reply::location(redirect, &route.matches.path, head))],
                    ..Spec::default()
                };
                self.reply(env, Cause::Redirect, spec, head, recorder)
            }
            Action::Forward(forward) => self.forward(env, (host, route, forward), head, recorder),
        }
    }

    fn forward(
        &mut self,
        env: &Env<'_>,
        (host, route, forward): (&VirtualHost, &Route, &Forward),
        head: &mut RequestHead,
        recorder: &mut dyn Recorder,
    ) -> Step {
        let Some(name) = self.info.cluster_name.clone() else {
            return self.cluster_not_found(env, forward, head, recorder);
        };
        let Some(cluster) = self.info.cluster.clone() else {
            note(recorder, Stage::Cluster, None, || (name.to_string(), "no such cluster".to_owned()));
            return self.cluster_not_found(env, forward, head, recorder);
        };
        note(recorder, Stage::Cluster, Some(&cluster.provenance), || {
            let how = if self.weighted.is_some() { "drawn by weight" } else { "" };
            (name.to_string(), how.to_owned())
        });
        self.attempt.cluster = Some(name);
        if self.attempt.resolved.is_none() {
            let policy = forward.retry.clone().or_else(|| host.retry.clone());
            let steered = if self.internal { RetryPolicy::steered(policy.as_deref(), head) } else { None };
            self.attempt.policy = steered.map(Arc::new).or(policy);
            self.set_timeouts(forward, head);
        }
        self.attempt.retries_left = self.attempt.policy.as_ref().map_or(0, |policy| policy.retries_max);
        if matches!(cluster.discovery, Discovery::DynamicForward { .. }) && self.attempt.resolved.is_none() {
            self.phase = Phase::Resolving;
            let host = crate::route::without_port(head.authority());
            return Step::Ask(Question::Resolve { host: String::from_utf8_lossy(host).into() });
        }
        if !self.attempt.edited {
            self.attempt.edited = true;
            // Edits may tell of the attempt they are made for.
            self.info.attempts = 1;
            let mirrors = self.mirror_heads(forward, host);
            self.edit_request(forward, route, head, env.now);
            self.upstream_headers(env, host, head);
            // The key is read where the request goes on: headers that the route wrote count.
            let client = self.info.client_address.map_or(self.conn.peer.ip(), |address| address.ip());
            (self.attempt.hash, self.cookie) = attempt::hash(&forward.hash, client, head, self.draw);
            return self.try_once(env, mirrors, head, recorder);
        }
        self.try_once(env, Vec::new(), head, recorder)
    }

    fn cluster_not_found(
        &mut self,
        env: &Env<'_>,
        forward: &Forward,
        head: &mut RequestHead,
        recorder: &mut dyn Recorder,
    ) -> Step {
        let spec = Spec { status: Some(forward.not_found_status), ..Spec::default() };
        self.reply(env, Cause::ClusterNotFound, spec, head, recorder)
    }

    /// *Source*: Envoy `FilterUtility::finalTimeout`.
    fn set_timeouts(&mut self, forward: &Forward, head: &mut RequestHead) {
        let mut global = forward.timeout;
        if let (true, Some(cap)) = (self.info.is_grpc, forward.grpc_timeout_max) {
            let asked = super::grpc::timeout(&head.fields);
            // Zero is "no limit" on both sides.
            global = match (asked, cap.is_zero()) {
                (Some(asked), true) => Some(asked),
                (Some(asked), false) => Some(asked.min(cap)),
                (None, true) => None,
                (None, false) => Some(cap),
            };
        }
        let mut per_try = self.attempt.policy.as_ref().and_then(|policy| policy.per_try_timeout);
        if self.internal {
            // Zero is "no limit" here too.
            let asked = |name: &str| {
                let milliseconds = head.fields.get_str(name)?.trim().parse().ok()?;
                Some(Some(Duration::from_millis(milliseconds)).filter(|limit| !limit.is_zero()))
            };
            global = asked("x-envoy-upstream-rq-timeout-ms").unwrap_or(global);
            per_try = asked("x-envoy-upstream-rq-per-try-timeout-ms").unwrap_or(per_try);
            head.fields.retain(|name, _| !STEERING.contains(&name));
        }
        self.timing.route = global;
        self.timing.per_try_idle = self.attempt.policy.as_ref().and_then(|policy| policy.per_try_idle_timeout);
        self.timing.per_try = per_try.filter(|per_try| global.is_none_or(|global| *per_try < global));
    }

    /// Tells the upstream how long a try may take: its own limit, or what is left of the whole time.
    ///
    /// *Source*: Envoy `FilterUtility::setTimeoutHeaders`.
    fn tell_time_out(&self, now: Instant, head: &mut RequestHead) {
        let (Some(hcm), Some(Action::Forward(forward))) = (self.hcm(), self.route().map(|route| &route.action)) else {
            return;
        };
        let Some(limit) = self.timing.per_try.or(self.timing.route) else { return };
        // What filters took before the first try does not count against it here.
        let completed = self.completed.filter(|_| self.attempt.number > 1);
        let spent = completed.map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        let left = self.timing.route.map(|route| route.saturating_sub(spent).max(Duration::from_millis(1)));
        let expected = left.map_or(limit, |left| limit.min(left));
        if !hcm.suppresses_envoy_headers() {
            set_number(&mut head.fields, "x-envoy-expected-rq-timeout-ms", millis(expected));
        }
        // A gRPC server learns what is left for it; where streams have a limit of their own, the
        // client's wish stands.
        if self.info.is_grpc && forward.grpc_timeout_max.is_some() && forward.stream_duration.is_none() {
            head.fields.set("grpc-timeout", super::grpc::timeout_text(expected).as_bytes());
        }
    }

    /// Headers that tell the upstream about the attempt, and who we are.
    fn upstream_headers(&self, env: &Env<'_>, host: &VirtualHost, head: &mut RequestHead) {
        let Some(hcm) = self.hcm() else { return };
        self.tell_time_out(env.now.mono, head);
        if host.attempt_count {
            head.fields.set("x-envoy-attempt-count", b"1");
        }
        self.exchange_metadata_upstream(env, &hcm, head);
    }

    fn mirror_heads(&self, forward: &Forward, host: &VirtualHost) -> Vec<(Name, bool)> {
        let policies: &[MirrorPolicy] = match (&forward.mirrors[..], &host.mirrors[..], self.table.as_deref()) {
            ([], [], Some(table)) => &table.mirrors,
            ([], by_host, _) => by_host,
            (by_route, _, _) => by_route,
        };
        let drawn = policies.iter().enumerate().filter(|(index, policy)| {
            let draw = self.draw.numbered("mirror", *index as u64);
            policy.fraction.is_none_or(|fraction| fraction.holds(draw))
        });
        drawn.map(|(_, policy)| (policy.cluster.clone(), policy.shadow_suffix)).collect()
    }

    /// Makes the next attempt.
    fn try_once(
        &mut self,
        env: &Env<'_>,
        mirrors: Vec<(Name, bool)>,
        head: &mut RequestHead,
        recorder: &mut dyn Recorder,
    ) -> Step {
        let name = self.attempt.cluster.clone().unwrap_or_default();
        // Endpoints and host state are read afresh at each pick; a cluster gone meanwhile still
        // serves the requests that chose it.
        let found = env.config.clusters.get(&name).or_else(|| self.config.clusters.get(&name)).cloned();
        let Some(cluster) = found else {
            return self.reply(env, Cause::ClusterNotFound, Spec::default(), head, recorder);
        };
        let live = env.worker.live(env.config, &cluster, env.now.mono);
        self.attempt.number += 1;
        self.info.attempts = self.attempt.number;
        self.attempt.shared = Some(Arc::clone(&live.shared));
        if self.attempt.number > 1 {
            if self.table_and_host().is_some_and(|(_, host)| host.attempt_count) {
                set_number(&mut head.fields, "x-envoy-attempt-count", self.attempt.number.into());
            }
            self.tell_time_out(env.now.mono, head);
        }
        let hcm = self.hcm();
        let policy = self.attempt.policy.clone();
        let hashes = self.attempt.hash.is_some();
        let avoid: &[Arc<SharedHost>] = match &policy {
            Some(policy) if policy.previous_hosts && !hashes => &self.attempt.tried,
            _ => &[],
        };
        let plan = Plan {
            conn: &self.conn,
            draw: self.draw,
            number: self.attempt.number,
            head: Some(head),
            hash: self.attempt.hash,
            avoid,
            repicks_max: policy.as_ref().map_or(0, |policy| policy.repicks_max),
            avoid_priorities: avoided_priorities(policy.as_deref(), &self.attempt),
            resolved: self.attempt.resolved,
            alpn: hcm.as_deref().and_then(Hcm::alpn),
            upgrade: self.upgrade,
        };
        let (mut attempt, priority) = match attempt::make(env, &live, plan, recorder) {
            Ok(made) => made,
            Err(cause) => return self.no_attempt(env, cause, head, recorder),
        };
        self.attempt.tried.push(Arc::clone(&attempt.picked.host));
        self.attempt.tried_priorities.push(priority);
        self.info.picked = Some(attempt.picked.clone());
        self.info.cluster = Some(Arc::clone(&cluster));
        self.info.upstream_started = Some(env.now.mono);
        self.timing.try_started = Some(env.now.mono);
        attempt.per_try_timeout = self.timing.per_try;
        self.auto_host(&attempt, head);
        if self.attempt.number == 1 {
            attempt.mirrors = self.mirrors(env, mirrors, head, recorder);
        }
        if self.attempt.retries_left > 0 {
            let limits = [self.route().and_then(|route| route.replay_bytes_max), self.host_replay_max()];
            attempt.replay_bytes_max = limits.into_iter().flatten().next().unwrap_or(cluster.buffer_max);
        }
        self.phase = Phase::Attempting;
        Step::Forward(Box::new(attempt))
    }

    fn host_replay_max(&self) -> Option<u32> {
        self.table_and_host().and_then(|(_, host)| host.replay_bytes_max)
    }

    fn auto_host(&self, attempt: &Attempt, head: &mut RequestHead) {
        if let Some(Action::Forward(forward)) = self.route().map(|route| &route.action)
            && matches!(forward.host, HostRewrite::Auto)
            && let Some(endpoint) = attempt.picked.endpoint.as_ref().filter(|endpoint| !endpoint.hostname.is_empty())
        {
            route_edits::set_host(forward, head, endpoint.hostname.as_bytes());
        }
    }

    fn mirrors(
        &self,
        env: &Env<'_>,
        wanted: Vec<(Name, bool)>,
        head: &RequestHead,
        recorder: &mut dyn Recorder,
    ) -> Vec<Mirror> {
        let hcm = self.hcm();
        let mut made = Vec::with_capacity(wanted.len());
        for (index, (name, shadow_suffix)) in wanted.into_iter().enumerate() {
            let cluster = env.config.clusters.get(&name).cloned();
            note(recorder, Stage::Mirror, cluster.as_ref().map(|cluster| &cluster.provenance), || {
                (name.to_string(), if cluster.is_some() { String::new() } else { "no such cluster".to_owned() })
            });
            let Some(cluster) = cluster else { continue };
            let live = env.worker.live(env.config, &cluster, env.now.mono);
            let mut copy = head.clone();
            if shadow_suffix {
                let host = crate::route::without_port(head.authority());
                let with_suffix = [host, b"-shadow", &head.authority()[host.len()..]].concat();
                copy.set_authority(&with_suffix);
            }
            let plan = Plan {
                conn: &self.conn,
                draw: Draw::new(self.draw.numbered("mirror_pick", index as u64)),
                number: 1,
                head: Some(&copy),
                hash: self.attempt.hash,
                avoid: &[],
                repicks_max: 0,
                avoid_priorities: &[],
                resolved: None,
                alpn: hcm.as_deref().and_then(Hcm::alpn),
                upgrade: self.upgrade,
            };
            // A copy that cannot be sent is dropped: it never affects the client. Where it goes is no
            // decision about the request.
            if let Ok((attempt, _)) = attempt::make(env, &live, plan, &mut crate::record::NoRecord) {
                made.push(Mirror { attempt: Box::new(attempt), head: copy, timeout: self.timing.route });
            }
        }
        made
    }

    // ---- what came of it ----

    /// Goes on with what came of the last step; `head` is the same as before.
    pub fn resume(
        &mut self,
        env: &Env<'_>,
        answer: Answer<'_>,
        head: &mut RequestHead,
        recorder: &mut dyn Recorder,
    ) -> Step {
        match (self.phase, answer) {
            (Phase::Paused(index), answer) => self.resume_filter(env, index, answer, head, recorder),
            (Phase::Resolving, Answer::Resolved(answer)) => self.resolved(env, answer, head, recorder),
            (Phase::Attempting, Answer::Upstream { head: response, ended }) => {
                self.upstream_head(env, response, ended, head, recorder)
            }
            (Phase::Attempting, Answer::Failed(failure)) => self.failed(env, &failure, head, recorder),
            (Phase::Attempting, Answer::Elapsed) => match self.overdue(env.now.mono) {
                Some(cause) => self.timed_out(env, cause, head, recorder),
                None => Step::Wait(self.until_deadline(env.now.mono)),
            },
            (Phase::BackingOff, Answer::Elapsed) => match self.overdue(env.now.mono) {
                Some(cause) => self.timed_out(env, cause, head, recorder),
                None => self.try_once(env, Vec::new(), head, recorder),
            },
            (Phase::Responding, Answer::Elapsed) => match self.overdue(env.now.mono) {
                Some(cause) => self.abort(cause),
                None => Step::Respond,
            },
            (Phase::Attempting, Answer::Idle) if self.try_is_idle_first() => {
                self.info.details = Details::Static("upstream_per_try_idle_timeout");
                let step = self.timed_out(env, Cause::PerTryTimeout, head, recorder);
                if matches!(step, Step::Wait(_)) {
                    self.info.details = Details::None;
                }
                step
            }
            (Phase::Responding, Answer::Idle) => self.abort(Cause::StreamIdleTimeout),
            (Phase::Responding | Phase::Done, Answer::Failed(failure)) => self.abort(failure.cause),
            (Phase::Done, _) => self.abort(Cause::Internal),
            (_, Answer::Idle) => self.too_late(env, Cause::StreamIdleTimeout, head, recorder),
            // The driver answered what was not asked.
            (_, _) => self.reply(env, Cause::Internal, Spec::default(), head, recorder),
        }
    }

    fn abort(&mut self, cause: Cause) -> Step {
        self.info.causes.push(cause);
        self.phase = Phase::Done;
        Step::Abort(cause)
    }

    fn resolved(
        &mut self,
        env: &Env<'_>,
        answer: Result<Vec<std::net::IpAddr>, Cause>,
        head: &mut RequestHead,
        recorder: &mut dyn Recorder,
    ) -> Step {
        let family = match self.info.cluster.as_ref().map(|cluster| &cluster.discovery) {
            Some(Discovery::DynamicForward { family }) => *family,
            _ => DnsFamily::All,
        };
        let Some(ip) = answer.ok().and_then(|all| family.choose(&all).first().copied()) else {
            return self.reply(env, Cause::DnsFailed, Spec::default(), head, recorder);
        };
        let host = crate::route::without_port(head.authority());
        let port = head.authority().get(host.len() + 1..).and_then(|port| std::str::from_utf8(port).ok());
        let default = if head.scheme == Scheme::Https { 443 } else { 80 };
        let port = port.and_then(|port| port.parse().ok()).unwrap_or(default);
        self.attempt.resolved = Some(std::net::SocketAddr::new(ip, port));
        self.router(env, head, recorder)
    }

    fn upstream_head(
        &mut self,
        env: &Env<'_>,
        response: &mut ResponseHead,
        ended: bool,
        head: &mut RequestHead,
        recorder: &mut dyn Recorder,
    ) -> Step {
        let seen = super::grpc::effective_status(response);
        self.mark_host(env, crate::outlier::Event::Status(seen));
        let retriable =
            self.attempt.policy.as_ref().is_some_and(|policy| policy.applies_to(head) && policy.on_response(response));
        if let Some(step) = self.again(env, retriable, None, recorder) {
            return step;
        }
        self.info.details = Details::Static("via_upstream");
        self.phase = if ended { Phase::Done } else { Phase::Responding };
        let agreed = response.status == 101 || (head.method() == "CONNECT" && (200..300).contains(&response.status));
        self.is_tunnel = self.upgrade && agreed;
        if let (Some(completed), Some(hcm)) = (self.completed, self.hcm())
            && !hcm.suppresses_envoy_headers()
        {
            let waited = env.now.mono.saturating_duration_since(completed);
            set_number(&mut response.fields, "x-envoy-upstream-service-time", millis(waited));
        }
        if let Some(cookie) = self.cookie.take() {
            response.fields.push("set-cookie", cookie.as_bytes());
        }
        self.edit_response(head, response, env.now);
        self.count_attempts(response);
        self.finish_response(env, head, response);
        Step::Respond
    }

    /// Tells the client how many attempts were made, where it is to know.
    fn count_attempts(&self, response: &mut ResponseHead) {
        if let Some((_, host)) = self.table_and_host()
            && host.attempt_count_in_response
            && self.attempt.number > 0
        {
            set_number(&mut response.fields, "x-envoy-attempt-count", self.attempt.number.into());
        }
    }

    /// What every response passes on its way out, a local one too: filters and connection manager.
    fn finish_response(&mut self, env: &Env<'_>, request: &RequestHead, response: &mut ResponseHead) {
        self.encode_filters(env, request, response);
        if let Some(hcm) = self.hcm() {
            normalize::response(&hcm, request, response, &self.info, &env.worker.date(env.now), self.is_tunnel);
        }
    }

    fn failed(
        &mut self,
        env: &Env<'_>,
        failure: &Failure,
        head: &mut RequestHead,
        recorder: &mut dyn Recorder,
    ) -> Step {
        // A limit of our own, or a request that cannot be sent as it is, says nothing of the host.
        if !matches!(failure.cause, Cause::UpstreamOverflow | Cause::LocalReset) {
            self.mark_host(env, crate::outlier::Event::Local);
        }
        self.info.transport_failure.clone_from(&failure.detail);
        let retriable =
            self.attempt.policy.as_ref().is_some_and(|policy| {
                policy.applies_to(head) && policy.on_failure(failure.cause, failure.request_sent)
            });
        note(recorder, Stage::Retry, None, || {
            (failure.cause.name().to_owned(), if retriable { "may be tried again" } else { "is final" }.to_owned())
        });
        if let Some(step) = self.again(env, retriable, Some(failure), recorder) {
            return step;
        }
        self.final_failure(env, failure, head, recorder)
    }

    fn final_failure(
        &mut self,
        env: &Env<'_>,
        failure: &Failure,
        head: &mut RequestHead,
        recorder: &mut dyn Recorder,
    ) -> Step {
        let reason = failure.cause.reset_reason().unwrap_or_default().replace(' ', "_");
        let mut details = format!("{}{{{reason}}}", failure.cause.surface().details);
        if !failure.detail.is_empty() {
            details = details.replace('}', &format!("|{}}}", failure.detail.replace(' ', "_")));
        }
        self.info.details = Details::Owned(details.into());
        let body = reply::reset_body(failure.cause, self.attempt.number > 1);
        let headers = match failure.cause {
            Cause::UpstreamOverflow => vec![("x-envoy-overloaded", b"true".to_vec())],
            _ => Vec::new(),
        };
        let spec = Spec { body: Some(body), headers, ..Spec::default() };
        self.reply(env, failure.cause, spec, head, recorder)
    }

    /// No attempt could be made at all.
    fn no_attempt(&mut self, env: &Env<'_>, cause: Cause, head: &mut RequestHead, recorder: &mut dyn Recorder) -> Step {
        if cause == Cause::UpstreamOverflow {
            return self.final_failure(env, &Failure::unsent(cause), head, recorder);
        }
        self.reply(env, cause, Spec::default(), head, recorder)
    }

    /// Plans another attempt where the last one is worth repeating and anything allows it; else what came of the last
    /// one stands.
    ///
    /// *Source*: Envoy's `RetryStateImpl::shouldRetry`.
    fn again(
        &mut self,
        env: &Env<'_>,
        retriable: bool,
        failure: Option<&Failure>,
        recorder: &mut dyn Recorder,
    ) -> Option<Step> {
        // A retry that has ended leaves its place to the next one.
        self.attempt.retrying = None;
        let unsent = failure.is_some_and(|failure| !failure.request_sent);
        if !retriable || !(self.replayable || unsent) || self.upgrade_started() {
            return None;
        }
        if self.attempt.retries_left == 0 {
            if self.attempt.number > 1 {
                self.info.causes.push(Cause::RetryLimitExceeded);
            }
            return None;
        }
        let policy = self.attempt.policy.clone()?;
        // The place is taken while the answer is still there to be passed on.
        let (shared, limits) = (self.attempt.shared.as_ref()?, self.info.cluster.as_ref()?.limits);
        let Some(place) = crate::limit::take(&limits, shared, Resource::Retry) else {
            note(recorder, Stage::Retry, None, || ("no".to_owned(), "the retry limit is reached".to_owned()));
            shared.tallies.retry_overflows.count();
            self.info.causes.push(Cause::UpstreamOverflow);
            return None;
        };
        self.attempt.retrying = Some(place);
        self.attempt.retries_left -= 1;
        let wait = policy.back_off(self.attempt.number, self.draw.numbered("backoff", u64::from(self.attempt.number)));
        note(recorder, Stage::Retry, None, || ("yes".to_owned(), format!("after {} ms", wait.as_millis())));
        self.timing.try_started = None;
        self.phase = Phase::BackingOff;
        let left = self.deadline().map(|at| at.saturating_duration_since(env.now.mono));
        Some(Step::Wait(left.map_or(wait, |left| wait.min(left))))
    }

    fn upgrade_started(&self) -> bool {
        self.upgrade && self.phase == Phase::Responding
    }

    fn timed_out(&mut self, env: &Env<'_>, cause: Cause, head: &mut RequestHead, recorder: &mut dyn Recorder) -> Step {
        let is_trying = self.phase == Phase::Attempting;
        if is_trying && matches!(cause, Cause::RequestTimeout | Cause::PerTryTimeout) {
            self.mark_host(env, crate::outlier::Event::Timeout);
        }
        let retriable = cause == Cause::PerTryTimeout
            && self.attempt.policy.as_ref().is_some_and(|policy| policy.on_per_try_timeout());
        if let Some(step) = self.again(env, retriable, None, recorder) {
            return step;
        }
        self.too_late(env, cause, head, recorder)
    }

    /// The answer to a time that has passed. Where a stream's own limits end it, the status tells who was waited for:
    /// the client (408), or whoever serves its whole request (504).
    ///
    /// *Source*: what Envoy 1.40 answers.
    pub(super) fn too_late(
        &mut self,
        env: &Env<'_>,
        cause: Cause,
        head: &mut RequestHead,
        recorder: &mut dyn Recorder,
    ) -> Step {
        let is_streams = matches!(cause, Cause::StreamIdleTimeout | Cause::MaxStreamDuration);
        let status = (is_streams && self.is_complete()).then_some(504);
        self.reply(env, cause, Spec { status, ..Spec::default() }, head, recorder)
    }

    fn mark_host(&self, env: &Env<'_>, event: crate::outlier::Event) {
        let (Some(cluster), Some(shared), Some(picked)) = (&self.info.cluster, &self.attempt.shared, &self.info.picked)
        else {
            return;
        };
        if let Some(policy) = &cluster.outlier {
            let hosts = env.config.endpoints_of(cluster).map_or(1, |set| set.len());
            crate::outlier::mark(policy, shared, &picked.host, event, hosts, env.now.mono);
        }
    }

    // ---- time ----

    /// The request's body has ended: time-outs of the route begin.
    pub fn request_complete(&mut self, now: Instant) {
        self.completed.get_or_insert(now);
    }

    /// Whether the whole request is in.
    pub(super) fn is_complete(&self) -> bool {
        self.completed.is_some()
    }

    /// Says whether the retry buffer still holds the whole body; `true` until said otherwise.
    pub fn set_replayable(&mut self, replayable: bool) {
        self.replayable = replayable;
    }

    /// Every limit with its end, if it runs.
    fn ends(&self) -> [Option<(Instant, Cause)>; 4] {
        let receive = self.timing.receive.filter(|_| !self.is_complete());
        let receive = receive.map(|limit| (self.started + limit, Cause::RequestReceiveTimeout));
        let stream = self.timing.stream_max.map(|max| (self.started + max, Cause::MaxStreamDuration));
        let forwarding = matches!(self.phase, Phase::Attempting | Phase::BackingOff | Phase::Responding);
        // a tunnel lasts as long as both sides want
        let completed = self.completed.filter(|_| forwarding && !self.is_tunnel);
        let route = completed.zip(self.timing.route).map(|(at, limit)| (at + limit, Cause::RequestTimeout));
        let trying = completed.filter(|_| self.phase == Phase::Attempting).zip(self.timing.try_started);
        let per_try = trying
            .zip(self.timing.per_try)
            .map(|((completed, started), limit)| (completed.max(started) + limit, Cause::PerTryTimeout));
        [stream.filter(|_| self.phase != Phase::Done), route, per_try, receive]
    }

    /// When [`Answer::Elapsed`] is due at the latest, whatever else happens.
    pub fn deadline(&self) -> Option<Instant> {
        self.ends().into_iter().flatten().map(|(at, _)| at).min()
    }

    /// Whether an attempt on which nothing moves ends before its stream does.
    fn try_is_idle_first(&self) -> bool {
        self.timing.per_try_idle.is_some_and(|limit| self.timing.idle.is_none_or(|idle| limit < idle))
    }

    fn until_deadline(&self, now: Instant) -> Duration {
        self.deadline().map_or(Duration::from_secs(1), |at| at.saturating_duration_since(now))
    }

    pub(super) fn overdue(&self, now: Instant) -> Option<Cause> {
        self.ends().into_iter().flatten().filter(|(at, _)| *at <= now).min_by_key(|(at, _)| *at).map(|(_, cause)| cause)
    }

    /// How long nothing may move on the stream; then [`Answer::Idle`] is due.
    pub fn idle_timeout(&self) -> Option<Duration> {
        let trying = matches!(self.phase, Phase::Attempting | Phase::Responding) && self.try_is_idle_first();
        if trying { self.timing.per_try_idle } else { self.timing.idle }
    }

    /// The response has ended well.
    pub fn response_ended(&mut self) {
        self.phase = Phase::Done;
    }

    /// The response broke off after its head, or the client went away: marks the cause.
    pub fn broke(&mut self, env: &Env<'_>, cause: Cause) {
        if matches!(cause, Cause::UpstreamResetMidResponse | Cause::UpstreamClosedMidResponse) {
            self.mark_host(env, crate::outlier::Event::Local);
        }
        self.info.causes.push(cause);
        self.info.details = Details::Static(cause.surface().details);
        self.phase = Phase::Done;
    }

    /// What is known so far.
    pub fn info(&self) -> &StreamInfo {
        &self.info
    }

    /// Whether the request is a HEAD request: its response has no body.
    pub fn is_head(&self) -> bool {
        self.is_head
    }

    // ---- replies ----

    /// The client broke the protocol within its request, and has no response head yet.
    pub fn refuse(&mut self, env: &Env<'_>, cause: Cause, request: &RequestHead, recorder: &mut dyn Recorder) -> Step {
        self.reply(env, cause, Spec { close: true, ..Spec::default() }, request, recorder)
    }

    /// Ends in an answer of the mesh itself.
    pub(super) fn reply(
        &mut self,
        env: &Env<'_>,
        cause: Cause,
        spec: Spec,
        request: &RequestHead,
        recorder: &mut dyn Recorder,
    ) -> Step {
        // A try that ends in an answer of ours is no retry any more, however long the answer takes to be written.
        self.attempt.retrying = None;
        self.info.causes.push(cause);
        if self.info.details == Details::None {
            self.info.details = Details::Static(cause.surface().details);
        }
        note(recorder, Stage::Reply, self.info.provenance.as_ref(), || {
            (cause.name().to_owned(), self.info.details.as_str().to_owned())
        });
        let edit = |head: &mut ResponseHead| {
            self.edit_response(request, head, env.now);
            self.count_attempts(head);
        };
        // A route that answers by itself edits its own answer; answers of filters and of the router
        // are edited only where the route leads somewhere, and those to preflights never.
        let edits = match (self.route().map(|route| &route.action), cause) {
            (_, Cause::CorsPreflight) => Edits::None,
            (Some(Action::Forward(_)), _) => Edits::BeforeOwn(&edit),
            (Some(Action::Redirect(_)), Cause::Redirect) | (Some(Action::Direct(_)), Cause::DirectResponse) => {
                Edits::AfterOwn(&edit)
            }
            (Some(Action::Redirect(_) | Action::Direct(_)) | None, _) => Edits::None,
        };
        let LocalReply { cause, mut head, mut body, close } =
            reply::build(cause, spec, request, self.info.is_grpc, &edits);
        self.finish_response(env, request, &mut head);
        if self.is_head {
            body = Bytes::new();
        }
        self.phase = Phase::Done;
        Step::Reply(Box::new(LocalReply { cause, head, body, close }))
    }
}

fn avoided_priorities<'a>(policy: Option<&RetryPolicy>, attempt: &'a AttemptState) -> &'a [u32] {
    match policy.and_then(|policy| policy.previous_priorities) {
        // Priorities are looked at anew after so many attempts.
        Some(frequency) if frequency > 0 => {
            let seen = attempt.tried_priorities.len();
            let full = seen - seen % frequency as usize;
            &attempt.tried_priorities[..full]
        }
        _ => &[],
    }
}

/// The cluster that a route names; `weighted` is the choice drawn.
fn cluster_name(forward: &Forward, weighted: Option<usize>, head: &RequestHead) -> Option<Name> {
    match &forward.target {
        Target::Cluster(name) => Some(name.clone()),
        Target::Weighted { clusters, .. } => clusters.get(weighted?).map(|cluster| cluster.name.clone()),
        Target::Header(header) => head.fields.get_str(header).map(Name::from),
    }
}

fn weighted_index(target: &Target, draw: Draw) -> Option<usize> {
    let Target::Weighted { clusters, total } = target else { return None };
    let mut drawn = draw.below("route_weight", *total);
    clusters.iter().position(|cluster| {
        let weight = u64::from(cluster.weight);
        let here = drawn < weight;
        drawn = drawn.saturating_sub(weight);
        here
    })
}

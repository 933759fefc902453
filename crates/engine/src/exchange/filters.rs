//! The filters before the router, in configured order.

use std::sync::Arc;

use bytes::Bytes;
use types::{Cause, RequestHead, ResponseHead};

use super::attempt::{self, Plan};
use super::machine::{Exchange, Phase};
use super::reply::Spec;
use super::{Answer, AuthorizeAnswer, AuthorizeQuestion, BodyWanted, Details, Env, Question, Step};
use crate::authz::Subject;
use crate::cors::CorsPolicy;
use crate::draw::Draw;
use crate::ext_authz::{Input, OnError};
use crate::fault::Fault;
use crate::hcm::{Filter, FilterKind, Hcm};
use crate::header_mutation::{HeaderMutation, Mutations};
use crate::headers::Context;
use crate::record::{Recorder, Stage, note};
use crate::route::Override;

/// What filters remember between request and response.
#[derive(Debug, Default)]
pub(super) struct Marks {
    /// The client sent its metadata, so it gets ours.
    peer_asked: bool,
    peer_id_asked: bool,
    /// Origin to allow on the response.
    cors: Option<crate::cors::Allowed>,
    /// What external authorizers want of the response.
    allowances: Vec<crate::ext_authz::Allowance>,
    /// A fault's abort waits for its delay.
    abort_after_delay: Option<crate::fault::Abort>,
}

enum Verdict {
    Continue,
    End(Step),
}

impl Exchange {
    /// Runs the filters from `from` on.
    pub(super) fn run_filters(
        &mut self,
        env: &Env<'_>,
        from: usize,
        head: &mut RequestHead,
        recorder: &mut dyn Recorder,
    ) -> Step {
        let Some(hcm) = self.hcm() else {
            return self.reply(env, Cause::Internal, Spec::default(), head, recorder);
        };
        for index in from..hcm.filters.len() {
            let filter = &hcm.filters[index];
            if !self.is_on(filter) {
                continue;
            }
            self.phase = Phase::Filters(index);
            match self.run_filter(env, &hcm, index, head, recorder) {
                Verdict::Continue => {}
                Verdict::End(step) => return step,
            }
        }
        // The router is the last filter; lowering sees to it.
        self.reply(env, Cause::Internal, Spec::default(), head, recorder)
    }

    /// The most specific setting for the filter called `name`.
    fn setting(&self, name: &str) -> Option<&Override> {
        let (table, host) = self.table_and_host()?;
        let weighted = self.weighted().and_then(|weighted| weighted.overrides.get(name));
        weighted
            .or_else(|| self.route().and_then(|route| route.overrides.get(name)))
            .or_else(|| host.overrides.get(name))
            .or_else(|| table.overrides.get(name))
    }

    fn run_filter(
        &mut self,
        env: &Env<'_>,
        hcm: &Arc<Hcm>,
        index: usize,
        head: &mut RequestHead,
        recorder: &mut dyn Recorder,
    ) -> Verdict {
        let filter = &hcm.filters[index];
        match &filter.kind {
            FilterKind::Router(_) => Verdict::End(self.router(env, head, recorder)),
            FilterKind::MetadataExchange(settings) => {
                if settings.downstream_headers {
                    self.take_downstream_metadata(head);
                }
                Verdict::Continue
            }
            FilterKind::Alpn(_) | FilterKind::Stats(_) | FilterKind::GrpcStats(_) => Verdict::Continue,
            FilterKind::GrpcWeb => {
                let is_web = head
                    .fields
                    .get("content-type")
                    .is_some_and(|kind| kind.len() >= 20 && kind[..20].eq_ignore_ascii_case(b"application/grpc-web"));
                if is_web {
                    return Verdict::End(self.reply(env, Cause::ConfigRefused, Spec::default(), head, recorder));
                }
                Verdict::Continue
            }
            FilterKind::HeaderMutation(mutation) => {
                let context = Context::new(&self.conn, &self.info, env.now);
                for mutations in self.mutations(mutation, &filter.name) {
                    mutations.edit_request(head, &context);
                }
                Verdict::Continue
            }
            FilterKind::Rbac(rbac) => self.rbac(env, (rbac, &filter.name), head, recorder),
            FilterKind::ExtAuthz(_) => self.ext_authz(env, hcm, index, head, recorder),
            FilterKind::Jwt(jwt) => self.jwt(env, (hcm, jwt, &filter.name), head, recorder),
            FilterKind::Cors => self.cors(env, &filter.name, head, recorder),
            FilterKind::Fault(fault) => self.fault(env, (fault, &filter.name, index), head, recorder),
        }
    }

    /// The filter's own mutations and those of the route's levels, in the order they run.
    fn mutations<'a>(&'a self, filter: &'a HeaderMutation, name: &'a str) -> impl Iterator<Item = &'a Mutations> {
        let levels = match self.table_and_host() {
            None => [None; 4],
            Some((table, host)) => [
                self.weighted().and_then(|weighted| weighted.overrides.get(name)),
                self.route().and_then(|route| route.overrides.get(name)),
                host.overrides.get(name),
                table.overrides.get(name),
            ],
        };
        let specific_last = filter.most_specific_wins;
        let by_route = (0..4).filter_map(move |at| match levels[if specific_last { 3 - at } else { at }] {
            Some(Override::HeaderMutation(mutations)) => Some(&**mutations),
            _ => None,
        });
        std::iter::once(&filter.own).chain(by_route)
    }

    /// Header mutation filters that are on, in order.
    fn mutation_filters<'a>(&'a self, hcm: &'a Hcm) -> impl DoubleEndedIterator<Item = (&'a HeaderMutation, &'a str)> {
        hcm.filters.iter().filter_map(move |filter| match &filter.kind {
            FilterKind::HeaderMutation(mutation) if self.is_on(filter) => Some((&**mutation, &*filter.name)),
            _ => None,
        })
    }

    /// Edits the request's trailers on their way up.
    pub fn edit_request_trailers(&self, trailers: &mut types::Fields, request: &RequestHead, now: crate::Now) {
        let Some(hcm) = self.hcm() else { return };
        let context = Context::new(&self.conn, &self.info, now);
        for (filter, name) in self.mutation_filters(&hcm) {
            for mutations in self.mutations(filter, name) {
                mutations.edit_request_trailers(trailers, request, &context);
            }
        }
    }

    /// Edits the response's trailers on their way down.
    pub fn edit_response_trailers(
        &self,
        trailers: &mut types::Fields,
        heads: (&RequestHead, &ResponseHead),
        now: crate::Now,
    ) {
        let Some(hcm) = self.hcm() else { return };
        let context = Context::new(&self.conn, &self.info, now);
        for (filter, name) in self.mutation_filters(&hcm).rev() {
            for mutations in self.mutations(filter, name) {
                mutations.edit_response_trailers(trailers, heads, &context);
            }
        }
    }

    /// Whether a filter runs on the route that was found.
    fn is_on(&self, filter: &Filter) -> bool {
        match self.setting(&filter.name) {
            Some(Override::Disabled) => false,
            Some(_) => true,
            None => !filter.disabled,
        }
    }

    fn rbac(
        &mut self,
        env: &Env<'_>,
        (rbac, name): (&crate::authz::Rbac, &str),
        head: &mut RequestHead,
        recorder: &mut dyn Recorder,
    ) -> Verdict {
        let remote = self.info.client_address.map_or(self.conn.peer.ip(), |address| address.ip());
        let metadata = std::mem::take(&mut self.info.metadata);
        let conn = Arc::clone(&self.conn);
        let subject = Subject::request(&conn, head, remote, &metadata);
        let by_route = match self.setting(name) {
            Some(Override::Rbac(None)) => {
                self.info.metadata = metadata;
                return Verdict::Continue;
            }
            Some(Override::Rbac(Some(by_route))) => Some(&**by_route),
            _ => None,
        };
        let rules = by_route.unwrap_or(rbac);
        let outcome = rules.evaluate(&subject);
        let denied = outcome.denied().map(|verdict| verdict.details());
        let mut after = metadata.clone();
        rules.record_shadow(&outcome, &mut after);
        note(recorder, Stage::Filter, None, || match &denied {
            Some(details) => (format!("{name}: denied"), details.clone()),
            None => {
                let by = outcome.enforced.and_then(|verdict| verdict.policy).unwrap_or_default();
                (format!("{name}: allowed"), by.to_owned())
            }
        });
        self.info.allowed += u32::from(outcome.is_allowed());
        self.info.metadata = after;
        match denied {
            None => Verdict::Continue,
            Some(details) => {
                let details = format!("{}[{details}]", Cause::RbacDenied.surface().details);
                self.info.details = Details::Owned(details.into());
                Verdict::End(self.reply(env, Cause::RbacDenied, Spec::default(), head, recorder))
            }
        }
    }

    fn ext_authz(
        &mut self,
        env: &Env<'_>,
        hcm: &Arc<Hcm>,
        index: usize,
        head: &mut RequestHead,
        recorder: &mut dyn Recorder,
    ) -> Verdict {
        let filter = &hcm.filters[index];
        let FilterKind::ExtAuthz(authz) = &filter.kind else { return Verdict::Continue };
        let by_route = match self.setting(&filter.name) {
            Some(Override::ExtAuthz(by_route)) => Some(by_route),
            _ => None,
        };
        if !authz.wants(&self.info.metadata, by_route) {
            return Verdict::Continue;
        }
        let wanted = authz.body_wanted(by_route);
        if let Some(wanted) = wanted.filter(|_| !self.is_complete()) {
            self.phase = Phase::Paused(index);
            let wanted = BodyWanted { bytes_max: wanted.bytes_max, partial: wanted.partial };
            return Verdict::End(Step::Ask(Question::Body(wanted)));
        }
        let body = wanted.map(|_| Bytes::new());
        Verdict::End(self.ask_authorizer(env, (hcm, index), body.as_ref().map(|body| (body, true)), head, recorder))
    }

    /// Calls the authorizer of the filter at `index`, with what was buffered of the body.
    fn ask_authorizer(
        &mut self,
        env: &Env<'_>,
        (hcm, index): (&Arc<Hcm>, usize),
        body: Option<(&Bytes, bool)>,
        head: &mut RequestHead,
        recorder: &mut dyn Recorder,
    ) -> Step {
        let filter = &hcm.filters[index];
        let FilterKind::ExtAuthz(authz) = &filter.kind else {
            return self.reply(env, Cause::Internal, Spec::default(), head, recorder);
        };
        let by_route = match self.setting(&filter.name) {
            Some(Override::ExtAuthz(by_route)) => Some(by_route),
            _ => None,
        };
        let check = authz.check(&Input {
            head,
            context: Context::new(&self.conn, &self.info, env.now),
            body: body.map(|(bytes, _)| &bytes[..]),
            partial: body.is_some_and(|(_, complete)| !complete),
            by_route,
        });
        self.phase = Phase::Paused(index);
        let cluster = env.config.clusters.get(&authz.cluster).or_else(|| self.config.clusters.get(&authz.cluster));
        let made = cluster.cloned().ok_or(Cause::ClusterNotFound).and_then(|cluster| {
            let live = env.worker.live(env.config, &cluster, env.now.mono);
            let plan = Plan {
                conn: &self.conn,
                draw: Draw::new(self.draw.numbered("ext_authz", index as u64)),
                number: 1,
                head: Some(&check.head),
                hash: None,
                avoid: &[],
                repicks_max: 0,
                avoid_priorities: &[],
                resolved: None,
                alpn: hcm.alpn(),
                upgrade: false,
            };
            attempt::make(env, &live, plan, &mut crate::record::NoRecord).map(|(attempt, _)| attempt)
        });
        note(recorder, Stage::Filter, None, || {
            let outcome = if made.is_ok() { "asks" } else { "cannot ask" };
            (format!("{}: {outcome} {}", filter.name, authz.cluster), String::new())
        });
        match made {
            Ok(attempt) => Step::Ask(Question::Authorize(Box::new(AuthorizeQuestion {
                attempt: Box::new(attempt),
                head: check.head,
                body: check.body,
                timeout: authz.timeout,
                grpc: check.grpc,
            }))),
            Err(cause) => self.authorized(env, (hcm, index), &Err(cause), head, recorder),
        }
    }

    fn authorized(
        &mut self,
        env: &Env<'_>,
        (hcm, index): (&Arc<Hcm>, usize),
        answer: &Result<AuthorizeAnswer, Cause>,
        head: &mut RequestHead,
        recorder: &mut dyn Recorder,
    ) -> Step {
        let filter = &hcm.filters[index];
        let FilterKind::ExtAuthz(authz) = &filter.kind else {
            return self.reply(env, Cause::Internal, Spec::default(), head, recorder);
        };
        let verdict = match answer {
            Ok(answer) => authz.answer(&answer.head, &answer.body, answer.trailers.as_ref()),
            Err(_) => crate::ext_authz::Verdict::Error,
        };
        note(recorder, Stage::Filter, None, || {
            let said = match &verdict {
                crate::ext_authz::Verdict::Allow(_) => "allowed",
                crate::ext_authz::Verdict::Deny(_) => "denied",
                crate::ext_authz::Verdict::Error => "failed",
            };
            (format!("{}: {said}", filter.name), answer.as_ref().err().map(|c| c.name().to_owned()).unwrap_or_default())
        });
        match verdict {
            crate::ext_authz::Verdict::Allow(allowance) => {
                allowance.apply(head);
                for (key, value) in &allowance.metadata {
                    self.info.metadata.set("envoy.filters.http.ext_authz", key, Arc::new(value.clone()));
                }
                if allowance.clear_route_cache {
                    self.choose_route_again(hcm, head, recorder);
                }
                if allowance.edits_response() {
                    self.filters.allowances.push(*allowance);
                }
                self.run_filters(env, index + 1, head, recorder)
            }
            crate::ext_authz::Verdict::Deny(denial) => {
                let spec = Spec {
                    status: Some(denial.status),
                    body: Some(denial.body),
                    fields: Some(denial.headers),
                    ..Spec::default()
                };
                self.reply(env, Cause::ExtAuthzDenied, spec, head, recorder)
            }
            crate::ext_authz::Verdict::Error => match authz.on_error() {
                OnError::Allow(mark) => {
                    if mark {
                        head.fields.set("x-envoy-auth-failure-mode-allowed", b"true");
                    }
                    self.run_filters(env, index + 1, head, recorder)
                }
                OnError::Deny(status) => {
                    let spec = Spec { status: Some(status), ..Spec::default() };
                    self.reply(env, Cause::ExtAuthzError, spec, head, recorder)
                }
            },
        }
    }

    fn jwt(
        &mut self,
        env: &Env<'_>,
        (hcm, jwt, name): (&Hcm, &crate::jwt::JwtFilter, &str),
        head: &mut RequestHead,
        recorder: &mut dyn Recorder,
    ) -> Verdict {
        let mut metadata = std::mem::take(&mut self.info.metadata);
        let by_route = match self.setting(name) {
            Some(Override::Jwt(by_route)) => Some(by_route),
            _ => None,
        };
        let with = crate::jwt::Env { now: env.now.wall_seconds(), cache: &env.worker.tokens };
        let outcome = jwt.authenticate(head, &mut metadata, by_route, &with);
        self.info.metadata = metadata;
        note(recorder, Stage::Filter, None, || match &outcome {
            Ok(passed) => (format!("{name}: {} tokens accepted", passed.tokens), String::new()),
            Err(denied) => (format!("{name}: denied"), denied.details.clone()),
        });
        match outcome {
            Ok(passed) => {
                if passed.clear_route_cache {
                    self.choose_route_again(hcm, head, recorder);
                }
                Verdict::Continue
            }
            Err(denied) => {
                self.info.details = Details::Owned(denied.details.into());
                let challenge = denied.www_authenticate.map(String::into_bytes);
                let spec = Spec {
                    body: Some(denied.body.into()),
                    headers: challenge.map(|challenge| ("www-authenticate", challenge)).into_iter().collect(),
                    ..Spec::default()
                };
                Verdict::End(self.reply(env, denied.cause, spec, head, recorder))
            }
        }
    }

    fn cors(&mut self, env: &Env<'_>, name: &str, head: &mut RequestHead, recorder: &mut dyn Recorder) -> Verdict {
        let policy: Option<&CorsPolicy> = match self.setting(name) {
            Some(Override::Cors(policy)) => Some(policy),
            _ => None,
        };
        let Some(policy) = policy else { return Verdict::Continue };
        match policy.request(head) {
            crate::cors::Verdict::Pass(allowed) => {
                self.filters.cors = allowed;
                Verdict::Continue
            }
            crate::cors::Verdict::Preflight(headers) => {
                let spec = Spec { headers, plain: true, ..Spec::default() };
                Verdict::End(self.reply(env, Cause::CorsPreflight, spec, head, recorder))
            }
        }
    }

    fn fault(
        &mut self,
        env: &Env<'_>,
        (fault, name, index): (&Fault, &str, usize),
        head: &mut RequestHead,
        recorder: &mut dyn Recorder,
    ) -> Verdict {
        let setting = match self.setting(name) {
            Some(Override::Fault(by_route)) => by_route,
            _ => fault,
        };
        let plan = setting.decide(head, self.draw);
        if plan.delay.is_some() || plan.abort.is_some() {
            note(recorder, Stage::Filter, self.info.provenance.as_ref(), || {
                (format!("{name}: fault"), plan.to_string())
            });
        }
        if let Some(delay) = plan.delay {
            self.info.causes.push(Cause::FaultDelay);
            self.filters.abort_after_delay = plan.abort;
            self.phase = Phase::Paused(index);
            return Verdict::End(Step::Wait(delay));
        }
        match plan.abort {
            Some(abort) => Verdict::End(self.abort_by_fault(env, abort, head, recorder)),
            None => Verdict::Continue,
        }
    }

    fn abort_by_fault(
        &mut self,
        env: &Env<'_>,
        abort: crate::fault::Abort,
        head: &mut RequestHead,
        recorder: &mut dyn Recorder,
    ) -> Step {
        let spec = match abort {
            crate::fault::Abort::Http(status) => Spec { status: Some(status), ..Spec::default() },
            // Who does not speak gRPC is told in words.
            crate::fault::Abort::Grpc(code) => Spec { status: Some(200), grpc: Some(code), ..Spec::default() },
        };
        self.reply(env, Cause::FaultAbort, spec, head, recorder)
    }

    /// A filter that paused goes on.
    pub(super) fn resume_filter(
        &mut self,
        env: &Env<'_>,
        index: usize,
        answer: Answer<'_>,
        head: &mut RequestHead,
        recorder: &mut dyn Recorder,
    ) -> Step {
        let hcm = self.hcm();
        match (answer, hcm) {
            (Answer::Authorized(answer), Some(hcm)) => self.authorized(env, (&hcm, index), &answer, head, recorder),
            (Answer::Body { bytes, complete }, Some(hcm)) => {
                let FilterKind::ExtAuthz(authz) = &hcm.filters[index].kind else {
                    return self.reply(env, Cause::Internal, Spec::default(), head, recorder);
                };
                if !complete && !authz.body.is_some_and(|body| body.partial) {
                    return self.reply(env, Cause::PayloadTooLarge, Spec::default(), head, recorder);
                }
                self.ask_authorizer(env, (&hcm, index), Some((&bytes, complete)), head, recorder)
            }
            // Only a fault's delay is waited for; a time-out never stands for anybody's verdict.
            (Answer::Elapsed, Some(hcm)) if matches!(hcm.filters[index].kind, FilterKind::Fault(_)) => {
                match self.filters.abort_after_delay.take() {
                    Some(abort) => self.abort_by_fault(env, abort, head, recorder),
                    None => self.run_filters(env, index + 1, head, recorder),
                }
            }
            (Answer::Elapsed, _) => {
                let cause = self.overdue(env.now.mono).unwrap_or(Cause::RequestReceiveTimeout);
                self.too_late(env, cause, head, recorder)
            }
            (Answer::Idle, _) => self.too_late(env, Cause::StreamIdleTimeout, head, recorder),
            _ => self.reply(env, Cause::Internal, Spec::default(), head, recorder),
        }
    }

    // ---- peers tell who they are ----

    fn take_downstream_metadata(&mut self, head: &mut RequestHead) {
        self.filters.peer_asked = head.fields.contains(PEER);
        self.filters.peer_id_asked = head.fields.contains(PEER_ID);
        self.info.downstream_peer = head.fields.get(PEER).map(Into::into);
        head.fields.remove(PEER);
        head.fields.remove(PEER_ID);
    }

    /// Our metadata on its way to the server.
    pub(super) fn exchange_metadata_upstream(&self, env: &Env<'_>, hcm: &Hcm, head: &mut RequestHead) {
        let external = self.info.cluster.as_ref().is_some_and(|cluster| cluster.external);
        for filter in &hcm.filters {
            let FilterKind::MetadataExchange(settings) = &filter.kind else { continue };
            if settings.to_upstream && !(settings.skip_external && external) {
                set_own(env, &mut head.fields, true, true);
            }
        }
    }

    /// What filters do to a response, in reverse order where order matters.
    pub(super) fn encode_filters(&mut self, env: &Env<'_>, request: &RequestHead, response: &mut ResponseHead) {
        if let Some(hcm) = self.hcm() {
            let context = Context::new(&self.conn, &self.info, env.now);
            for (filter, name) in self.mutation_filters(&hcm).rev() {
                for mutations in self.mutations(filter, name) {
                    mutations.edit_response(response, request, &context);
                }
            }
        }
        for allowance in &self.filters.allowances {
            allowance.apply_response(response);
        }
        if let Some(allowed) = &self.filters.cors {
            allowed.apply(&mut response.fields);
        }
        let Some(hcm) = self.hcm() else { return };
        for filter in &hcm.filters {
            let FilterKind::MetadataExchange(settings) = &filter.kind else { continue };
            if settings.upstream_headers {
                self.info.upstream_peer = response.fields.get(PEER).map(Into::into);
                response.fields.remove(PEER);
                response.fields.remove(PEER_ID);
            }
            if settings.to_downstream {
                set_own(env, &mut response.fields, self.filters.peer_asked, self.filters.peer_id_asked);
            }
        }
    }
}

const PEER: &str = "x-envoy-peer-metadata";
const PEER_ID: &str = "x-envoy-peer-metadata-id";

fn set_own(env: &Env<'_>, fields: &mut types::Fields, metadata: bool, id: bool) {
    let node = &env.config.node;
    if metadata && !node.peer_metadata.is_empty() {
        fields.set(PEER, node.peer_metadata.as_bytes());
    }
    if id && !node.id.is_empty() {
        fields.set(PEER_ID, node.id.as_bytes());
    }
}

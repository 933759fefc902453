//! The filters before the router, in configured order.

use std::sync::Arc;

use types::{Cause, RequestHead, ResponseHead};

use super::machine::{Exchange, Phase};
use super::reply::Spec;
use super::{Answer, Details, Env, Step};
use crate::authz::Subject;
use crate::cors::CorsPolicy;
use crate::fault::Fault;
use crate::hcm::{FilterKind, Hcm};
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
            let on = match self.setting(&filter.name) {
                Some(Override::Disabled) => false,
                Some(_) => true,
                None => !filter.disabled,
            };
            if !on {
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
            FilterKind::Alpn(_) | FilterKind::Stats(_) | FilterKind::GrpcStats => Verdict::Continue,
            FilterKind::GrpcWeb => {
                let is_web = head.fields.get("content-type").is_some_and(|kind| {
                    kind.len() >= 20 && kind[..20].eq_ignore_ascii_case(b"application/grpc-web")
                });
                if is_web {
                    return Verdict::End(self.reply(env, Cause::ConfigRefused, Spec::default(), head, recorder));
                }
                Verdict::Continue
            }
            FilterKind::Rbac(rbac) => self.rbac(env, (rbac, &filter.name), head, recorder),
            FilterKind::Jwt(jwt) => self.jwt(env, (hcm, jwt, &filter.name), head, recorder),
            FilterKind::Cors => self.cors(env, &filter.name, head, recorder),
            FilterKind::Fault(fault) => self.fault(env, (fault, &filter.name, index), head, recorder),
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
            None => (format!("{name}: allowed"), String::new()),
        });
        self.info.metadata = after;
        match denied {
            None => Verdict::Continue,
            Some(details) => {
                self.info.details = Details::Owned(details.into());
                Verdict::End(self.reply(env, Cause::RbacDenied, Spec::default(), head, recorder))
            }
        }
    }

    fn jwt(
        &mut self,
        env: &Env<'_>,
        (hcm, jwt, name): (&Hcm, &crate::jwt::JwtFilter, &str),
        head: &mut RequestHead,
        recorder: &mut dyn Recorder,
    ) -> Verdict {
        let config = std::rc::Rc::clone(&self.config);
        let mut metadata = std::mem::take(&mut self.info.metadata);
        let by_route = match self.setting(name) {
            Some(Override::Jwt(by_route)) => Some(by_route),
            _ => None,
        };
        let with = crate::jwt::Env {
            now: env.now.wall_seconds(),
            remote: &config.remote_keys,
            cache: &env.worker.tokens,
        };
        let outcome = jwt.authenticate(head, &mut metadata, by_route, &with);
        self.info.metadata = metadata;
        note(recorder, Stage::Filter, None, || match &outcome {
            Ok(passed) => (format!("{name}: {} tokens accepted", passed.tokens), String::new()),
            Err(denied) => (format!("{name}: denied"), denied.details.clone()),
        });
        match outcome {
            Ok(passed) => {
                if passed.clear_route_cache {
                    self.choose_route(head, recorder);
                    self.refresh_stream_limits(hcm, head);
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

    fn cors(
        &mut self,
        env: &Env<'_>,
        name: &str,
        head: &mut RequestHead,
        recorder: &mut dyn Recorder,
    ) -> Verdict {
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
                (format!("{name}: fault"), format!("{plan:?}"))
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
            crate::fault::Abort::Grpc(code) => {
                // Exactly that code, whatever the caller's content type.
                self.info.is_grpc = true;
                Spec { status: Some(200), grpc: Some(code), ..Spec::default() }
            }
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
        match answer {
            Answer::Elapsed => match self.filters.abort_after_delay.take() {
                Some(abort) => self.abort_by_fault(env, abort, head, recorder),
                None => self.run_filters(env, index + 1, head, recorder),
            },
            Answer::Idle => self.reply(env, Cause::StreamIdleTimeout, Spec::default(), head, recorder),
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
    pub(super) fn encode_filters(&mut self, env: &Env<'_>, _request: &RequestHead, response: &mut ResponseHead) {
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

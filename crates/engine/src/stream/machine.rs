//! The state machine.

use std::rc::Rc;
use std::sync::Arc;

use types::Cause;
use xxhash_rust::xxh64::xxh64;

use super::{NetworkFilter, StreamAnswer, StreamStart, StreamStep, TcpAttempt, TcpProxy};
use crate::authz::Subject;
use crate::chain::{FilterChain, Terminal};
use crate::cluster::Discovery;
use crate::config::{Name, RuntimeConfig};
use crate::draw::Draw;
use crate::exchange::attempt::{self, Plan};
use crate::exchange::{Details, Env, StreamInfo};
use crate::facts::ConnFacts;
use crate::outlier;
use crate::record::{Recorder, Stage, note};
use crate::shared::{SharedCluster, SharedHost};

/// One connection of bytes.
#[derive(Debug)]
pub struct Stream {
    config: Rc<RuntimeConfig>,
    chain: Arc<FilterChain>,
    conn: Arc<ConnFacts>,
    draw: Draw,
    info: StreamInfo,
    cluster: Option<Name>,
    shared: Option<Arc<SharedCluster>>,
    tried: Vec<Arc<SharedHost>>,
    number: u32,
}

impl Stream {
    /// Starts a connection. A chain that does not end in TCP is closed with [`Cause::Internal`].
    pub fn start(env: &Env<'_>, start: StreamStart<'_>) -> (Self, StreamStep) {
        let StreamStart { chain, conn, seed, recorder } = start;
        let mut stream = Self {
            config: Rc::clone(env.config),
            chain: Arc::clone(chain),
            conn: Arc::clone(conn),
            draw: Draw::new(seed),
            info: StreamInfo { client_address: Some(conn.peer), ..StreamInfo::default() },
            cluster: None,
            shared: None,
            tried: Vec::new(),
            number: 0,
        };
        let step = stream.begin(env, recorder);
        (stream, step)
    }

    fn begin(&mut self, env: &Env<'_>, recorder: &mut dyn Recorder) -> StreamStep {
        let Terminal::Tcp(proxy) = &self.chain.terminal else { return self.close(Cause::Internal, recorder) };
        let proxy = Arc::clone(proxy);
        self.info.provenance = Some(Arc::clone(&self.chain.provenance));
        if let Err(cause) = admit(&self.chain, &self.conn, &mut self.info, recorder) {
            // The reason is in `info` already.
            note(recorder, Stage::Reply, None, || (cause.name().to_owned(), self.info.details.as_str().to_owned()));
            return StreamStep::Close(cause);
        }
        let name = draw_cluster(&proxy, self.draw);
        note(recorder, Stage::Cluster, None, || {
            let how = if proxy.clusters.len() > 1 { "drawn by weight" } else { "" };
            (name.to_string(), how.to_owned())
        });
        self.info.cluster_name = Some(name.clone());
        self.cluster = Some(name);
        self.connect(env, &proxy, recorder)
    }

    fn connect(&mut self, env: &Env<'_>, proxy: &TcpProxy, recorder: &mut dyn Recorder) -> StreamStep {
        let name = self.cluster.clone().unwrap_or_default();
        let found = env.config.clusters.get(&name).or_else(|| self.config.clusters.get(&name)).cloned();
        let Some(cluster) = found else { return self.close(Cause::ClusterNotFound, recorder) };
        self.info.cluster = Some(Arc::clone(&cluster));
        if matches!(cluster.discovery, Discovery::DynamicForward { .. }) {
            // A name is needed, and bytes carry none but the server name, which is not built.
            return self.close(Cause::DnsFailed, recorder);
        }
        let live = env.worker.live(env.config, &cluster, env.now.mono);
        self.shared = Some(Arc::clone(&live.shared));
        self.number += 1;
        self.info.attempts = self.number;
        let hash = proxy.hash_source_ip.then(|| xxh64(self.conn.peer.ip().to_canonical().to_string().as_bytes(), 0));
        let plan = Plan {
            conn: &self.conn,
            draw: self.draw,
            number: self.number,
            head: None,
            hash,
            avoid: if hash.is_none() { &self.tried } else { &[] },
            repicks_max: 5,
            avoid_priorities: &[],
            resolved: None,
            alpn: None,
            upgrade: false,
        };
        let attempt = match attempt::make(env, &live, plan, recorder) {
            Ok((attempt, _)) => attempt,
            Err(cause) => return self.close(cause, recorder),
        };
        self.tried.push(Arc::clone(&attempt.picked.host));
        self.info.picked = Some(attempt.picked.clone());
        self.info.upstream_started = Some(env.now.mono);
        StreamStep::Connect(Box::new(TcpAttempt { metadata_exchange: cluster.metadata_exchange, attempt }))
    }

    /// Goes on with what came of the last step.
    pub fn resume(&mut self, env: &Env<'_>, answer: StreamAnswer, recorder: &mut dyn Recorder) -> StreamStep {
        let Terminal::Tcp(proxy) = &self.chain.terminal else { return self.close(Cause::Internal, recorder) };
        let proxy = Arc::clone(proxy);
        match answer {
            StreamAnswer::Connected => {
                // A connection counts as a good answer.
                self.mark_host(env, outlier::Event::Status(200));
                StreamStep::Relay { idle_timeout: proxy.idle_timeout, duration_max: proxy.connection_duration_max }
            }
            // A limit of our own says nothing of the host, and another try would meet it again.
            StreamAnswer::Failed(Cause::UpstreamOverflow, _) => {
                // It was never called.
                self.info.picked = None;
                self.close(Cause::UpstreamOverflow, recorder)
            }
            StreamAnswer::Failed(cause, detail) => {
                self.mark_host(env, outlier::Event::Local);
                self.info.transport_failure = detail;
                if self.number < proxy.connect_attempts_max {
                    note(recorder, Stage::Retry, None, || (cause.name().to_owned(), "another try".to_owned()));
                    return self.connect(env, &proxy, recorder);
                }
                let step = self.close(cause, recorder);
                self.info.causes.push(Cause::RetryLimitExceeded);
                step
            }
            // Nothing of the sort is asked.
            StreamAnswer::Authorized(_) | StreamAnswer::Resolved(_) => self.close(Cause::Internal, recorder),
        }
    }

    /// Ends the connection. Details are of requests: a connection's line has none, unless a policy denied it.
    ///
    /// *Source*: what Envoy 1.40 writes.
    fn close(&mut self, cause: Cause, recorder: &mut dyn Recorder) -> StreamStep {
        self.info.causes.push(cause);
        note(recorder, Stage::Reply, None, || (cause.name().to_owned(), String::new()));
        StreamStep::Close(cause)
    }

    fn mark_host(&self, env: &Env<'_>, event: outlier::Event) {
        let (Some(cluster), Some(shared), Some(picked)) = (&self.info.cluster, &self.shared, &self.info.picked) else {
            return;
        };
        if let Some(policy) = &cluster.outlier {
            let hosts = env.config.endpoints_of(cluster).map_or(1, |set| set.len());
            outlier::mark(policy, shared, &picked.host, event, hosts, env.now.mono);
        }
    }

    /// The client told who it is: node metadata as `x-envoy-peer-metadata` holds it.
    pub fn met_downstream(&mut self, metadata: Box<[u8]>) {
        self.info.downstream_peer = Some(metadata);
    }

    /// The server told who it is.
    pub fn met_upstream(&mut self, metadata: Box<[u8]>) {
        self.info.upstream_peer = Some(metadata);
    }

    /// Marks why it ended.
    pub fn broke(&mut self, cause: Cause) {
        self.info.causes.push(cause);
    }

    /// What is known so far.
    pub fn info(&self) -> &StreamInfo {
        &self.info
    }
}

fn draw_cluster(proxy: &TcpProxy, draw: Draw) -> Name {
    let total = proxy.clusters.iter().map(|(_, weight)| u64::from(*weight)).sum();
    let mut drawn = draw.below("route_weight", total);
    for (name, weight) in &proxy.clusters {
        if drawn < u64::from(*weight) {
            return name.clone();
        }
        drawn -= u64::from(*weight);
    }
    proxy.clusters.first().map(|(name, _)| name.clone()).unwrap_or_default()
}

pub(super) fn admit(
    chain: &FilterChain,
    conn: &ConnFacts,
    info: &mut StreamInfo,
    recorder: &mut dyn Recorder,
) -> Result<(), Cause> {
    for filter in &chain.filters {
        let NetworkFilter::Rbac(rbac) = filter else { continue };
        let metadata = std::mem::take(&mut info.metadata);
        let subject = Subject::connection(conn, &metadata);
        let outcome = rbac.evaluate(&subject);
        let denied = outcome.denied().map(|verdict| verdict.details());
        let mut after = metadata.clone();
        rbac.record_shadow(&outcome, &mut after);
        note(recorder, Stage::Filter, Some(&chain.provenance), || match &denied {
            Some(details) => ("rbac: denied".to_owned(), details.clone()),
            None => ("rbac: allowed".to_owned(), String::new()),
        });
        info.allowed += u32::from(outcome.is_allowed());
        info.metadata = after;
        if let Some(details) = denied {
            info.causes.push(Cause::RbacDeniedConnection);
            let details = format!("{}[{details}]", Cause::RbacDeniedConnection.surface().details);
            info.termination = Details::Owned(details.into());
            return Err(Cause::RbacDeniedConnection);
        }
    }
    Ok(())
}

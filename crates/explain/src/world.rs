//! The proxies of a mesh that stands still: each compiled and lowered on first use.

use std::cell::{OnceCell, RefCell};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use compile::{Interception, ProxyKind, View};
use engine::assembly::Assembly;
use engine::config::{Name, NodeFacts};
use engine::exchange::Env;
use engine::lower::{self, Raw};
use engine::shared::SharedTable;
use engine::worker::Worker;
use engine::{Now, RuntimeConfig};
use mesh::{MeshSnapshot, Workload};
use serde_json::Value;
use types::wellknown::type_urls;
use types::{Finding, NamespacedName, SpiffeId};

use crate::call::is_router;
use crate::running::Running;
use crate::vet::{Refusal, refused};

/// Where names outside of the mesh are assumed to be.
pub(crate) const OUTSIDE: IpAddr = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 10));
/// Where clients outside of the mesh are assumed to be.
pub(crate) const CLIENT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 7)), 40_000);

/// One proxy.
pub(crate) struct Proxy {
    pub(crate) workload: Arc<Workload>,
    pub(crate) config: Rc<RuntimeConfig>,
    pub(crate) worker: Worker,
    pub(crate) identity: Option<SpiffeId>,
    /// What it said of itself; `None`: it was made from objects.
    running: Option<Running>,
    /// What the objects say it should have, made when first asked for.
    wanted: OnceCell<BTreeMap<(&'static str, String), Value>>,
}

/// Where the proxies of a world come from.
#[derive(Clone, Copy)]
pub(crate) enum Source<'a> {
    /// Compiled from the objects.
    Objects,
    /// Asked, one by one; the error says why that cannot be.
    Mesh(&'a dyn Fn(&NamespacedName) -> Result<Running, String>),
}

impl Proxy {
    pub(crate) fn env(&self, now: Now) -> Env<'_> {
        Env { config: &self.config, worker: &self.worker, now }
    }

    pub(crate) fn ip(&self) -> IpAddr {
        self.workload.ips.first().copied().unwrap_or(OUTSIDE)
    }

    /// `namespace/pod`
    pub(crate) fn name(&self) -> String {
        self.workload.key().to_string()
    }

    /// Whether it was asked, and takes no new connections.
    pub(crate) fn is_draining(&self) -> bool {
        self.running.as_ref().is_some_and(|running| !running.is_live)
    }

    /// The first of these secrets that a running proxy does not have.
    pub(crate) fn missing_secret<'a>(&self, names: &'a [Name]) -> Option<&'a Name> {
        let running = self.running.as_ref()?;
        names.iter().find(|name| !running.secrets.contains(&***name))
    }

    /// Requests of a cluster that are under way; 0 where nobody was asked.
    pub(crate) fn requests(&self, cluster: &str) -> u32 {
        let state = self.running.as_ref().and_then(|running| running.clusters.get(cluster));
        state.map_or(0, |state| state.hosts.iter().map(|host| host.requests).sum())
    }

    /// Requests of a cluster that wait for a connection; 0 where nobody was asked.
    pub(crate) fn pending(&self, cluster: &str) -> u32 {
        let state = self.running.as_ref().and_then(|running| running.clusters.get(cluster));
        state.map_or(0, |state| state.pending)
    }
}

/// All proxies, and what came up while making them.
pub(crate) struct World<'a> {
    pub(crate) snapshot: &'a MeshSnapshot,
    source: Source<'a>,
    proxies: RefCell<BTreeMap<NamespacedName, Rc<Proxy>>>,
    findings: RefCell<Vec<Finding>>,
    notes: RefCell<Vec<String>>,
}

impl<'a> World<'a> {
    pub(crate) fn new(snapshot: &'a MeshSnapshot, source: Source<'a>) -> Self {
        Self { snapshot, source, proxies: RefCell::default(), findings: RefCell::default(), notes: RefCell::default() }
    }

    /// Says something once.
    pub(crate) fn note(&self, text: String) {
        let mut notes = self.notes.borrow_mut();
        if !notes.contains(&text) {
            notes.push(text);
        }
    }

    /// Notes and findings so far.
    pub(crate) fn remarks(&self) -> (Vec<String>, Vec<Finding>) {
        (self.notes.borrow().clone(), self.findings.borrow().clone())
    }

    pub(crate) fn identity(&self, workload: &Workload) -> Option<SpiffeId> {
        let account = if workload.service_account.is_empty() { "default" } else { &workload.service_account };
        SpiffeId::new(self.snapshot.mesh_config().trust_domain(), &workload.namespace, account).ok()
    }

    /// The proxy beside a workload, or the gateway that it is.
    pub(crate) fn proxy(&self, workload: &Arc<Workload>, now: Now) -> Rc<Proxy> {
        let key = workload.key();
        if let Some(known) = self.proxies.borrow().get(&key) {
            return Rc::clone(known);
        }
        let made = Rc::new(self.build(workload, now));
        self.proxies.borrow_mut().insert(key, Rc::clone(&made));
        made
    }

    fn view(&self, workload: &Workload) -> View {
        let is_gateway = is_router(self.snapshot, workload);
        View {
            kind: if is_gateway { ProxyKind::Router } else { ProxyKind::Sidecar },
            ips: workload.ips.clone(),
            name: workload.name.clone(),
            namespace: workload.namespace.clone(),
            labels: workload.labels.clone(),
            service_account: workload.service_account.clone(),
            workload_name: workload.workload_name.clone(),
            locality: workload.locality.clone(),
            node: workload.node.clone(),
            captures_dns: !is_gateway,
            interception: Interception::Redirect,
            ..View::sidecar(&workload.namespace, &workload.name, OUTSIDE)
        }
    }

    fn build(&self, workload: &Arc<Workload>, now: Now) -> Proxy {
        let Source::Mesh(ask) = self.source else { return self.compiled(workload, now) };
        match ask(&workload.key()) {
            Ok(running) => self.running(workload, running, now),
            Err(reason) => {
                self.note(format!(
                    "the proxy of {} cannot be asked ({reason}): what the objects say stands for it",
                    workload.key()
                ));
                self.compiled(workload, now)
            }
        }
    }

    fn compiled(&self, workload: &Arc<Workload>, now: Now) -> Proxy {
        let view = self.view(workload);
        let resources = compile::compile(self.snapshot, &view);
        let mut parts: BTreeMap<&'static str, Vec<Raw>> = BTreeMap::new();
        for resource in resources.packed() {
            let raw = Raw { name: resource.name.as_str().into(), body: resource.any };
            parts.entry(resource.type_url).or_default().push(raw);
        }
        self.findings.borrow_mut().extend(resources.findings);
        let config = self.assemble(&view, |url| parts.remove(url).unwrap_or_default());
        self.proxy_with(workload, config, None, now)
    }

    fn running(&self, workload: &Arc<Workload>, running: Running, now: Now) -> Proxy {
        let view = running.view.clone().unwrap_or_else(|| self.view(workload));
        let config = self.assemble(&view, |url| running.raws(url));
        let proxy = self.proxy_with(workload, config, Some(running), now);
        let shared = proxy.worker.shared();
        for (name, state) in proxy.running.iter().flat_map(|running| &running.clusters) {
            let cluster = shared.cluster(&Name::from(name.as_str()));
            for known in &state.hosts {
                let host = cluster.host(&known.address, now.mono);
                host.ejected.store(known.ejected, Relaxed);
                if known.ejected {
                    cluster.ejected.enter();
                }
                (0..known.connections).for_each(|_| {
                    host.connections.enter();
                    cluster.connections.enter();
                });
                (0..known.requests).for_each(|_| {
                    host.requests.enter();
                    cluster.requests.enter();
                });
            }
        }
        proxy
    }

    fn proxy_with(&self, workload: &Arc<Workload>, config: RuntimeConfig, running: Option<Running>, now: Now) -> Proxy {
        Proxy {
            identity: self.identity(workload),
            workload: Arc::clone(workload),
            config: Rc::new(config),
            worker: Worker::new(Arc::new(SharedTable::new(now.mono))),
            running,
            wanted: OnceCell::new(),
        }
    }

    /// Lowers what `part` gives of each type.
    fn assemble(&self, view: &View, mut part: impl FnMut(&str) -> Vec<Raw>) -> RuntimeConfig {
        let mut assembly = Assembly::new(NodeFacts::default());
        let rejected = [
            ("cluster", assembly.apply_clusters(&part(type_urls::CLUSTER), &[])),
            ("endpoints", assembly.apply_endpoints(&part(type_urls::ENDPOINT), &[])),
            ("route table", assembly.apply_routes(&part(type_urls::ROUTE), &[])),
            ("listener", assembly.apply_listeners(&part(type_urls::LISTENER), &[])),
        ];
        let mut findings = self.findings.borrow_mut();
        for (kind, list) in rejected {
            findings.extend(list.iter().map(|rejected| refused(view, &Refusal::new(kind, rejected))));
        }
        findings.dedup();
        drop(findings);
        let resolved: Vec<_> = assembly
            .names_to_resolve()
            .map(|(name, spec)| (Name::clone(name), lower::resolved_endpoints(spec, |_| vec![OUTSIDE])))
            .collect();
        for (name, endpoints) in resolved {
            assembly.apply_resolved(&name, endpoints);
        }
        assembly.publish()
    }

    /// In what a running proxy differs from what the objects say, among the resources that a call
    /// used: kind and name of each, and why if it is known. Empty for a proxy made from objects.
    pub(crate) fn behind(&self, proxy: &Proxy, used: &[(&'static str, String)]) -> Vec<String> {
        let Some(running) = &proxy.running else { return Vec::new() };
        let Some(view) = &running.view else { return Vec::new() };
        let wanted = proxy.wanted.get_or_init(|| {
            let resources = compile::compile(self.snapshot, view).packed();
            let json =
                |resource: compile::Resource| ((resource.type_url, resource.name), proto::json::to_json(&resource.any));
            resources.into_iter().map(json).collect()
        });
        let differs = |(url, name): &(&'static str, String)| {
            let has = running.resources.get(url).and_then(|table| table.get(name));
            let (runs, wants) = (has.map(|served| &served.json), wanted.get(&(*url, name.clone())));
            let is_same = runs == wants || runs.map(without_keys) == wants.map(without_keys);
            let reason = has.and_then(|served| served.refused.as_deref());
            let why = reason.map(|reason| format!(" (it refused the newest version: {reason})")).unwrap_or_default();
            (!is_same).then(|| format!("{} {name}{why}", kind_of(url)))
        };
        used.iter().filter_map(differs).collect()
    }
}

/// Fetched keys are the control plane's to know, not the objects': two versions that differ in
/// nothing else count as one.
fn without_keys(value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            let kept = fields.iter().filter(|(name, _)| name.as_str() != "local_jwks");
            Value::Object(kept.map(|(name, value)| (name.clone(), without_keys(value))).collect())
        }
        Value::Array(items) => Value::Array(items.iter().map(without_keys).collect()),
        other => other.clone(),
    }
}

fn kind_of(url: &str) -> &'static str {
    match url {
        type_urls::LISTENER => "listener",
        type_urls::ROUTE => "route table",
        type_urls::CLUSTER => "cluster",
        type_urls::ENDPOINT => "endpoints of",
        _ => "resource",
    }
}

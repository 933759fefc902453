//! The proxies of a mesh that stands still: each compiled and lowered on first use.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;

use compile::{Interception, ProxyKind, View};
use engine::assembly::{AllSecrets, Assembly};
use engine::config::{Name, NodeFacts};
use engine::exchange::Env;
use engine::lower::{self, Raw};
use engine::shared::SharedTable;
use engine::worker::Worker;
use engine::{Now, RuntimeConfig};
use mesh::{MeshSnapshot, Workload};
use types::wellknown::type_urls;
use types::{Finding, NamespacedName, SpiffeId};

use crate::call::is_router;
use crate::vet::refused;

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
}

/// All proxies, and what came up while making them.
pub(crate) struct World<'a> {
    pub(crate) snapshot: &'a MeshSnapshot,
    pub(crate) now: Now,
    proxies: RefCell<BTreeMap<NamespacedName, Rc<Proxy>>>,
    findings: RefCell<Vec<Finding>>,
    notes: RefCell<Vec<String>>,
}

impl<'a> World<'a> {
    pub(crate) fn new(snapshot: &'a MeshSnapshot, now: Now) -> Self {
        Self { snapshot, now, proxies: RefCell::default(), findings: RefCell::default(), notes: RefCell::default() }
    }

    /// Says something once.
    pub(crate) fn note(&self, text: String) {
        let mut notes = self.notes.borrow_mut();
        if !notes.contains(&text) {
            notes.push(text);
        }
    }

    pub(crate) fn into_remarks(self) -> (Vec<String>, Vec<Finding>) {
        (self.notes.into_inner(), self.findings.into_inner())
    }

    pub(crate) fn identity(&self, workload: &Workload) -> Option<SpiffeId> {
        let account = if workload.service_account.is_empty() { "default" } else { &workload.service_account };
        SpiffeId::new(self.snapshot.mesh_config().trust_domain(), &workload.namespace, account).ok()
    }

    /// The proxy beside a workload, or the gateway that it is.
    pub(crate) fn proxy(&self, workload: &Arc<Workload>) -> Rc<Proxy> {
        let key = workload.key();
        if let Some(known) = self.proxies.borrow().get(&key) {
            return Rc::clone(known);
        }
        let made = Rc::new(self.build(workload));
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

    fn build(&self, workload: &Arc<Workload>) -> Proxy {
        let view = self.view(workload);
        let resources = compile::compile(self.snapshot, &view);
        let mut assembly = Assembly::new(NodeFacts::default());
        let mut parts: BTreeMap<&'static str, Vec<Raw>> = BTreeMap::new();
        for resource in resources.packed() {
            let raw = Raw { name: resource.name.as_str().into(), body: resource.any };
            parts.entry(resource.type_url).or_default().push(raw);
        }
        let mut findings = self.findings.borrow_mut();
        findings.extend(resources.findings);
        let mut part = |url| parts.remove(url).unwrap_or_default();
        let rejected = [
            ("cluster", assembly.apply_clusters(&part(type_urls::CLUSTER), &[])),
            ("endpoints", assembly.apply_endpoints(&part(type_urls::ENDPOINT), &[])),
            ("route table", assembly.apply_routes(&part(type_urls::ROUTE), &[])),
            ("listener", assembly.apply_listeners(&part(type_urls::LISTENER), &[])),
        ];
        for (kind, list) in rejected {
            findings.extend(list.iter().map(|rejected| refused(&view, kind, rejected)));
        }
        findings.dedup();
        drop(findings);
        if assembly.keys_to_fetch().next().is_some() {
            self.note(format!(
                "{} would fetch key sets (jwksUri), which is not done here: tokens of those issuers are refused",
                workload.key()
            ));
        }
        let resolved: Vec<_> = assembly
            .names_to_resolve()
            .map(|(name, spec)| (Name::clone(name), lower::resolved_endpoints(spec, |_| vec![OUTSIDE])))
            .collect();
        for (name, endpoints) in resolved {
            assembly.apply_resolved(&name, endpoints);
        }
        let config = Rc::new(assembly.publish(&AllSecrets));
        Proxy {
            identity: self.identity(workload),
            workload: Arc::clone(workload),
            config,
            worker: Worker::new(Arc::new(SharedTable::new(self.now.mono))),
        }
    }
}

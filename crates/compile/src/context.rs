//! What every part of one compilation shares.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::sync::Arc;

use api::mesh_config::ProxyConfig;
use api::networking as net;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::ForwardClientCertDetails;
use mesh::{DestinationRule, MeshSnapshot, Scope, Service};
use types::{Finding, Severity};

use crate::secrets::Wanted;
use crate::telemetry::Telemetry;
use crate::view::{ProxyKind, View};

/// The snapshot, the proxy, and what follows from both.
pub(crate) struct Context<'a> {
    pub(crate) snapshot: &'a MeshSnapshot,
    pub(crate) view: &'a View,
    /// What the proxy sees. For routers: all visible services, no Sidecar.
    pub(crate) scope: Scope,
    /// Access logs and tracing.
    pub(crate) telemetry: Telemetry,
    /// The mesh's trust domain, then its aliases.
    pub(crate) trust_domains: Vec<String>,
    findings: RefCell<Vec<Finding>>,
    wanted: RefCell<BTreeSet<Wanted>>,
}

/// The proxy's settings: its own, else the mesh's.
pub(crate) fn proxy_config<'a>(snapshot: &'a MeshSnapshot, view: &'a View) -> Option<&'a ProxyConfig> {
    view.proxy_config.as_deref().or(snapshot.mesh_config().default_config.as_ref())
}

/// A router sees what its namespace does; no Sidecar cuts it.
fn of_router(services: Vec<Arc<Service>>) -> Scope {
    Scope {
        sidecar: None,
        egress: Vec::new(),
        services,
        outbound_mode: net::OutboundMode::AllowAny,
        egress_proxy: None,
    }
}

impl<'a> Context<'a> {
    /// For all that the proxy sees.
    pub(crate) fn new(snapshot: &'a MeshSnapshot, view: &'a View) -> Self {
        let scope = match view.kind {
            ProxyKind::Sidecar => snapshot.sidecar_scope(&view.namespace, &view.labels),
            ProxyKind::Router => of_router(snapshot.visible_services(&view.namespace)),
        };
        Self::within(scope, snapshot, view)
    }

    /// For what the proxy sees of these hosts. Enough for their clusters, and only for these.
    pub(crate) fn of_hosts(snapshot: &'a MeshSnapshot, view: &'a View, hosts: &BTreeSet<&str>) -> Self {
        let scope = match view.kind {
            ProxyKind::Sidecar => snapshot.sidecar_scope_of(&view.namespace, &view.labels, hosts),
            ProxyKind::Router => of_router(snapshot.visible_services_of(&view.namespace, hosts)),
        };
        Self::within(scope, snapshot, view)
    }

    fn within(scope: Scope, snapshot: &'a MeshSnapshot, view: &'a View) -> Self {
        let mut findings = Vec::new();
        let telemetry = Telemetry::of(snapshot, view, &scope, &mut findings);
        Self {
            snapshot,
            view,
            scope,
            telemetry,
            trust_domains: snapshot.trust_domains().iter().map(ToString::to_string).collect(),
            findings: RefCell::new(findings),
            wanted: RefCell::default(),
        }
    }

    /// The DestinationRule that this proxy uses for a service.
    pub(crate) fn rule(&self, service: &Service) -> Option<&'a Arc<DestinationRule>> {
        self.snapshot.destination_rule(&self.view.namespace, &self.view.labels, service)
    }

    /// Whether it is a sidecar.
    pub(crate) fn is_sidecar(&self) -> bool {
        self.view.kind == ProxyKind::Sidecar
    }

    /// The service of a destination, through aliases.
    pub(crate) fn service(&self, host: &str) -> Option<&Arc<Service>> {
        let host = self.snapshot.resolve_alias(host);
        self.scope.service(host)
    }

    /// Records what does not work as written.
    pub(crate) fn find(&self, finding: Finding) {
        self.findings.borrow_mut().push(finding);
    }

    /// Records several.
    pub(crate) fn find_all(&self, findings: Vec<Finding>) {
        self.findings.borrow_mut().extend(findings);
    }

    /// A warning about an object.
    pub(crate) fn warn(&self, code: &str, object: &types::ObjectRef, field: &str, message: String, hint: &str) {
        self.find(Finding {
            code: code.into(),
            severity: Severity::Warning,
            object: Some(object.clone()),
            field: field.into(),
            position: None,
            message: message.into(),
            hint: hint.into(),
        });
    }

    /// Records that a secret is to be sent along.
    pub(crate) fn want(&self, secret: Wanted) {
        self.wanted.borrow_mut().insert(secret);
    }

    /// The secrets recorded so far, by name.
    pub(crate) fn take_wanted(&self) -> BTreeSet<Wanted> {
        self.wanted.take()
    }

    /// Everything recorded so far.
    pub(crate) fn into_findings(self) -> Vec<Finding> {
        self.findings.into_inner()
    }

    /// `gatewayTopology.numTrustedProxies`
    pub(crate) fn trusted_proxies(&self) -> u32 {
        self.topology().map_or(0, |topology| topology.num_trusted_proxies)
    }

    /// `gatewayTopology.forwardClientCertDetails`
    pub(crate) fn gateway_client_cert_details(&self) -> ForwardClientCertDetails {
        match self.topology().and_then(|topology| topology.forward_client_cert_details.as_deref()) {
            Some("SANITIZE") => ForwardClientCertDetails::Sanitize,
            Some("FORWARD_ONLY") => ForwardClientCertDetails::ForwardOnly,
            Some("APPEND_FORWARD") => ForwardClientCertDetails::AppendForward,
            Some("ALWAYS_FORWARD_ONLY") => ForwardClientCertDetails::AlwaysForwardOnly,
            _ => ForwardClientCertDetails::SanitizeSet,
        }
    }

    /// `proxyHeaders`
    pub(crate) fn proxy_headers(&self) -> Option<&'a api::mesh_config::ProxyHeaders> {
        proxy_config(self.snapshot, self.view)?.proxy_headers.as_ref()
    }

    /// Whether requests say which try they are.
    pub(crate) fn counts_attempts(&self) -> bool {
        !self.proxy_headers().is_some_and(|headers| headers.attempt_count.disabled)
    }

    fn topology(&self) -> Option<&api::mesh_config::GatewayTopology> {
        proxy_config(self.snapshot, self.view)?.gateway_topology.as_ref()
    }
}

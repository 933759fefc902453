//! The mesh at one moment, indexed.

mod reach;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use api::k8s;
use api::mesh_config::MeshConfig;
use api::networking as net;
use api::security::{AuthorizationPolicy, PeerAuthentication, RequestAuthentication};
use api::telemetry::Telemetry;
use types::{Effect, Finding, Labels, NamespacedName, ObjectRef, wellknown};

use crate::collect::Collected;
use crate::config::Config;
use crate::destination_rule::{DestinationRule, DestinationRuleIndex, RuleClient};
use crate::key_sets::{KeySets, KeySource};
use crate::policy::{ByNamespace, MtlsPolicy};
use crate::registry;
use crate::scope::{self, Scope};
use crate::service::{EndpointSet, Service, ServiceKey, Workload};
use crate::virtual_service::{NameSettings, VirtualService, VirtualServiceIndex};
use crate::workload;

pub use reach::{Reach, Reached};

/// Facts of a namespace.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Namespace {
    /// Its labels.
    pub labels: Labels,
    /// Its annotations.
    pub annotations: Labels,
}

/// All that the mesh is at one moment. Immutable; shared behind an `Arc`.
#[derive(Debug, Default)]
pub struct MeshSnapshot {
    mesh_config: Arc<MeshConfig>,
    namespaces: BTreeMap<Box<str>, Namespace>,
    services: Vec<Arc<Service>>,
    by_host: BTreeMap<Box<str>, Vec<Arc<Service>>>,
    aliases: BTreeMap<Box<str>, Box<str>>,
    endpoints: BTreeMap<ServiceKey, Arc<EndpointSet>>,
    workloads: BTreeMap<NamespacedName, Arc<Workload>>,
    by_ip: BTreeMap<IpAddr, Arc<Workload>>,
    virtual_services: VirtualServiceIndex,
    destination_rules: DestinationRuleIndex,
    gateways: Vec<Config<net::Gateway>>,
    sidecars: ByNamespace<net::Sidecar>,
    peer_authentications: ByNamespace<PeerAuthentication>,
    request_authentications: ByNamespace<RequestAuthentication>,
    authorization_policies: ByNamespace<AuthorizationPolicy>,
    telemetries: ByNamespace<Telemetry>,
    secrets: BTreeMap<NamespacedName, Config<k8s::Secret>>,
    config_maps: BTreeMap<NamespacedName, Config<k8s::ConfigMap>>,
    key_sets: Arc<KeySets>,
    effects: BTreeMap<ObjectRef, Effect>,
}

impl MeshSnapshot {
    /// Indexes everything admitted. What did not change since `prev` is shared with it.
    ///
    /// Returns the snapshot and what is odd about the objects together; single objects were
    /// checked at admission.
    pub fn next(prev: Option<&Self>, configs: &api::ConfigSet) -> (Self, Vec<Finding>) {
        let mut findings = Vec::new();
        let collected = Collected::of(configs, &mut findings);
        let mesh_config = Arc::new(collected.mesh_config);
        let domain = wellknown::DEFAULT_DOMAIN_SUFFIX;
        let services_names = NameSettings { domain, default_export_to: &mesh_config.default_service_export_to };
        let routes_names = NameSettings { domain, default_export_to: &mesh_config.default_virtual_service_export_to };
        let rules_names = NameSettings { domain, default_export_to: &mesh_config.default_destination_rule_export_to };

        let workloads: BTreeMap<_, _> = collected
            .pods
            .iter()
            .filter_map(|(meta, pod)| workload::of_pod(meta, pod))
            .map(|workload| (workload.key(), Arc::new(workload)))
            .collect();
        let namespace_annotations: BTreeMap<_, _> =
            collected.namespaces.iter().map(|(name, facts)| (name.clone(), facts.annotations.clone())).collect();
        let built = registry::build(
            &registry::Inputs {
                services: &collected.services,
                slices: &collected.slices,
                workloads: &workloads,
                service_entries: &collected.service_entries,
                workload_entries: &collected.workload_entries,
                namespace_annotations: &namespace_annotations,
                names: services_names,
            },
            &mut findings,
        );
        let services: Vec<Arc<Service>> =
            built.services.into_iter().map(|service| share_service(prev, service)).collect();
        let endpoints = built.endpoints.into_iter().map(|(key, set)| {
            let shared = share_endpoints(prev, &key, set);
            (key, shared)
        });
        let endpoints: BTreeMap<_, _> = endpoints.collect();
        let mut by_host: BTreeMap<Box<str>, Vec<Arc<Service>>> = BTreeMap::new();
        for service in &services {
            by_host.entry(service.host.clone()).or_default().push(Arc::clone(service));
        }
        let by_ip =
            workloads.values().flat_map(|workload| workload.ips.iter().map(|ip| (*ip, Arc::clone(workload)))).collect();
        let mut gateways = collected.gateways;
        gateways.sort_by(|a, b| a.age.cmp(&b.age));

        let mut snapshot = Self {
            aliases: registry::alias_targets(&services),
            virtual_services: VirtualServiceIndex::build(&collected.virtual_services, &routes_names, &mut findings),
            destination_rules: DestinationRuleIndex::build(&collected.destination_rules, &rules_names, &mut findings),
            mesh_config,
            namespaces: collected.namespaces,
            services,
            by_host,
            endpoints,
            workloads,
            by_ip,
            gateways,
            sidecars: ByNamespace::build(collected.sidecars),
            peer_authentications: ByNamespace::build(collected.peer_authentications),
            request_authentications: ByNamespace::build(collected.request_authentications),
            authorization_policies: ByNamespace::build(collected.authorization_policies),
            telemetries: ByNamespace::build(collected.telemetries),
            secrets: collected.secrets.into_iter().map(|config| (config.key(), config)).collect(),
            config_maps: collected.config_maps.into_iter().map(|config| (config.key(), config)).collect(),
            key_sets: Arc::default(),
            effects: BTreeMap::new(),
        };
        crate::analyze::analyze(&snapshot, &mut findings);
        snapshot.effects = crate::analyze::effects(&snapshot, &findings);
        (snapshot, findings)
    }

    /// The snapshot with what was fetched for its [`key_sources`](Self::key_sources).
    pub fn with_key_sets(self, key_sets: Arc<KeySets>) -> Self {
        Self { key_sets, ..self }
    }

    /// What was fetched of the keys of token issuers.
    pub fn key_sets(&self) -> &KeySets {
        &self.key_sets
    }

    /// Where keys of token issuers are to be fetched, and how long a fetch may take: the longest of
    /// the rules that share a source.
    ///
    /// *Source*: JWTRule `timeout`, 5 s by default.
    pub fn key_sources(&self) -> BTreeMap<KeySource, Duration> {
        const TIMEOUT: Duration = Duration::from_secs(5);
        let mut sources: BTreeMap<KeySource, Duration> = BTreeMap::new();
        for rule in self.request_authentications.all().flat_map(|config| &config.spec.jwt_rules) {
            if let Some(source) = KeySource::of(rule) {
                let timeout = rule.timeout.map_or(TIMEOUT, |timeout| timeout.0);
                let longest = sources.entry(source).or_default();
                *longest = timeout.max(*longest);
            }
        }
        sources
    }

    /// `meshConfig`.
    pub fn mesh_config(&self) -> &MeshConfig {
        &self.mesh_config
    }

    /// DNS domain of services.
    pub fn domain(&self) -> &'static str {
        wellknown::DEFAULT_DOMAIN_SUFFIX
    }

    /// The namespace whose objects hold for the whole mesh.
    pub fn root_namespace(&self) -> &str {
        self.mesh_config.root_namespace()
    }

    /// The trust domain and its aliases, the domain first.
    pub fn trust_domains(&self) -> Vec<types::TrustDomain> {
        let mut domains = vec![self.mesh_config.trust_domain()];
        for alias in &self.mesh_config.trust_domain_aliases {
            if !domains.contains(alias) {
                domains.push(alias.clone());
            }
        }
        domains
    }

    /// Namespaces that were declared.
    pub fn namespaces(&self) -> &BTreeMap<Box<str>, Namespace> {
        &self.namespaces
    }

    /// All services, oldest first.
    pub fn services(&self) -> &[Arc<Service>] {
        &self.services
    }

    /// Services of exactly this host, oldest first; several when namespaces declare one host.
    pub fn services_of_host(&self, host: &str) -> &[Arc<Service>] {
        self.by_host.get(host).map_or(&[], Vec::as_slice)
    }

    /// The host that an ExternalName Service's host leads to; other hosts are themselves.
    pub fn resolve_alias<'a>(&'a self, host: &'a str) -> &'a str {
        self.aliases.get(host).map_or(host, |target| &**target)
    }

    /// The endpoints behind a service.
    pub fn endpoints(&self, key: &ServiceKey) -> Arc<EndpointSet> {
        self.endpoints.get(key).cloned().unwrap_or_default()
    }

    /// Pods with an address.
    pub fn workloads(&self) -> &BTreeMap<NamespacedName, Arc<Workload>> {
        &self.workloads
    }

    /// The pod of that name.
    pub fn workload(&self, namespace: &str, name: &str) -> Option<&Arc<Workload>> {
        self.workloads.get(&NamespacedName::new(namespace, name))
    }

    /// The pod with that address.
    pub fn workload_by_ip(&self, ip: IpAddr) -> Option<&Arc<Workload>> {
        self.by_ip.get(&ip)
    }

    /// VirtualServices with names expanded and delegates merged.
    pub fn virtual_services(&self) -> &VirtualServiceIndex {
        &self.virtual_services
    }

    /// VirtualServices bound to the gateway object `namespace/name`, as a gateway pod of
    /// `pod_namespace` sees them, in merge order.
    pub fn virtual_services_for_gateway(&self, pod_namespace: &str, gateway: &str) -> Vec<Arc<VirtualService>> {
        self.virtual_services.for_gateway(pod_namespace, gateway)
    }

    /// Merged DestinationRules.
    pub fn destination_rules(&self) -> &DestinationRuleIndex {
        &self.destination_rules
    }

    /// The rule that a client of `namespace` with `labels` uses for a service.
    pub fn destination_rule(
        &self,
        namespace: &str,
        labels: &Labels,
        service: &Service,
    ) -> Option<&Arc<DestinationRule>> {
        let client = RuleClient { namespace, labels, root_namespace: self.root_namespace() };
        self.destination_rules.lookup(&client, &service.host, &service.namespace)
    }

    /// Gateways, oldest first.
    pub fn gateways(&self) -> &[Config<net::Gateway>] {
        &self.gateways
    }

    /// Gateways whose selector picks a pod with these labels, oldest first.
    pub fn gateways_for(&self, labels: &Labels) -> impl Iterator<Item = &Config<net::Gateway>> {
        self.gateways
            .iter()
            .filter(move |gateway| gateway.spec.selector.iter().all(|(key, value)| labels.get(key) == Some(value)))
    }

    /// Sidecar objects.
    pub fn sidecars(&self) -> &ByNamespace<net::Sidecar> {
        &self.sidecars
    }

    /// PeerAuthentications.
    pub fn peer_authentications(&self) -> &ByNamespace<PeerAuthentication> {
        &self.peer_authentications
    }

    /// RequestAuthentications.
    pub fn request_authentications(&self) -> &ByNamespace<RequestAuthentication> {
        &self.request_authentications
    }

    /// AuthorizationPolicies.
    pub fn authorization_policies(&self) -> &ByNamespace<AuthorizationPolicy> {
        &self.authorization_policies
    }

    /// Telemetries.
    pub fn telemetries(&self) -> &ByNamespace<Telemetry> {
        &self.telemetries
    }

    /// What a workload accepts.
    pub fn mtls_policy(&self, namespace: &str, labels: &Labels) -> MtlsPolicy {
        crate::policy::mtls_policy(&self.peer_authentications, self.root_namespace(), namespace, labels)
    }

    /// What a namespace accepts where no workload says otherwise.
    pub fn namespace_mtls(&self, namespace: &str) -> MtlsPolicy {
        crate::policy::namespace_mtls(&self.peer_authentications, self.root_namespace(), namespace)
    }

    /// The Secret of that name.
    pub fn secret(&self, namespace: &str, name: &str) -> Option<&Config<k8s::Secret>> {
        self.secrets.get(&NamespacedName::new(namespace, name))
    }

    /// The ConfigMap of that name.
    pub fn config_map(&self, namespace: &str, name: &str) -> Option<&Config<k8s::ConfigMap>> {
        self.config_maps.get(&NamespacedName::new(namespace, name))
    }

    /// The services that proxies of a namespace see, each host once, oldest first.
    pub fn visible_services(&self, namespace: &str) -> Vec<Arc<Service>> {
        scope::visible_among(&self.services, namespace)
    }

    /// What a sidecar of `namespace` with `labels` sees.
    pub fn sidecar_scope(&self, namespace: &str, labels: &Labels) -> Scope {
        scope::sidecar_scope(self, namespace, labels, self.visible_services(namespace))
    }

    /// The part of [`visible_services`](Self::visible_services) with these hosts.
    ///
    /// *Cost*: proportional to the hosts.
    pub fn visible_services_of(&self, namespace: &str, hosts: &BTreeSet<&str>) -> Vec<Arc<Service>> {
        scope::visible_among(hosts.iter().flat_map(|host| self.services_of_host(host)), namespace)
    }

    /// The part of [`sidecar_scope`](Self::sidecar_scope) with the services of these hosts.
    ///
    /// *Cost*: proportional to the hosts, and to the routes in the mesh.
    pub fn sidecar_scope_of(&self, namespace: &str, labels: &Labels, hosts: &BTreeSet<&str>) -> Scope {
        scope::sidecar_scope(self, namespace, labels, self.visible_services_of(namespace, hosts))
    }

    /// What became of each object of the mesh (not of plain Kubernetes kinds).
    pub fn effects(&self) -> &BTreeMap<ObjectRef, Effect> {
        &self.effects
    }
}

fn share_service(prev: Option<&MeshSnapshot>, service: Service) -> Arc<Service> {
    let known = prev.and_then(|prev| prev.services_of_host(&service.host).iter().find(|other| ***other == service));
    known.map_or_else(|| Arc::new(service), Arc::clone)
}

fn share_endpoints(prev: Option<&MeshSnapshot>, key: &ServiceKey, set: EndpointSet) -> Arc<EndpointSet> {
    let known = prev.and_then(|prev| prev.endpoints.get(key)).filter(|other| ***other == set);
    known.map_or_else(|| Arc::new(set), Arc::clone)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(prev: Option<&MeshSnapshot>, yaml: &str) -> (MeshSnapshot, Vec<String>) {
        let documents = api::parse_documents("case.yaml", yaml);
        assert!(documents.refused.is_empty(), "{:?}", documents.findings);
        let set = api::ConfigSet::new(documents.one_after_another());
        let (next, findings) = MeshSnapshot::next(prev, &set);
        (next, findings.iter().map(|found| format!("{} {}", found.code, found.field)).collect())
    }

    const SERVICE: &str = r"
apiVersion: v1
kind: Service
metadata: {name: a, namespace: shop}
spec: {clusterIP: 10.0.0.1, selector: {app: a}, ports: [{name: http, port: 80, targetPort: web}]}
---
apiVersion: v1
kind: Pod
metadata:
  name: a-6b7-x1
  namespace: shop
  labels: {app: a, pod-template-hash: 6b7, security.istio.io/tlsMode: istio}
  ownerReferences: [{apiVersion: apps/v1, kind: ReplicaSet, name: a-6b7, uid: u, controller: true}]
spec: {serviceAccountName: sa, containers: [{name: c, image: i, ports: [{name: web, containerPort: 8080}]}]}
status: {phase: Running, podIP: 10.1.0.1, conditions: [{type: Ready, status: 'True'}]}
---
";

    #[test]
    fn a_named_target_port_is_found_in_the_pod() {
        let (mesh, findings) = snapshot(None, SERVICE);
        assert_eq!(findings, Vec::<String>::new());
        let service = &mesh.services()[0];
        let endpoints = mesh.endpoints(&service.key());
        let [endpoint] = endpoints.port(80) else { panic!("one endpoint") };
        assert_eq!((endpoint.port, endpoint.is_tls_capable()), (8080, true));
        let workload = endpoint.workload.as_ref().unwrap();
        assert_eq!((&*workload.workload_name, &*workload.canonical_name, &*workload.service_account), ("a", "a", "sa"));
        assert_eq!(endpoints.service_accounts(), [("shop".into(), "sa".into())]);
    }

    #[test]
    fn slices_win_over_selectors_and_terminating_ones_are_left_out() {
        let slice = r"
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: a-1, namespace: shop, labels: {kubernetes.io/service-name: a}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints:
- {addresses: [10.1.0.7], conditions: {ready: false}}
- {addresses: [10.1.0.8], conditions: {ready: true}}
- {addresses: [10.1.0.9], conditions: {ready: true, terminating: true}}
";
        let (mesh, _) = snapshot(None, &format!("{SERVICE}{slice}"));
        let endpoints = mesh.endpoints(&mesh.services()[0].key());
        let found: Vec<_> = endpoints.port(80).iter().map(|of| (of.address.to_string(), of.health)).collect();
        assert_eq!(
            found,
            [("10.1.0.7".to_owned(), crate::Health::NotReady), ("10.1.0.8".to_owned(), crate::Health::Ready)]
        );
    }

    #[test]
    fn what_did_not_change_is_shared_with_the_previous_snapshot() {
        let (first, _) = snapshot(None, SERVICE);
        let entry = r"
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: e, namespace: shop}
spec: {hosts: [e.example.com], resolution: DNS, ports: [{number: 80, name: http, protocol: HTTP}]}
";
        let (second, _) = snapshot(Some(&first), &format!("{SERVICE}{entry}"));
        let (scratch, _) = snapshot(None, &format!("{SERVICE}{entry}"));
        let key = first.services()[0].key();
        assert!(Arc::ptr_eq(&first.services()[0], &second.services_of_host(&key.host)[0]));
        assert!(Arc::ptr_eq(&first.endpoints(&key), &second.endpoints(&key)));
        assert_eq!(second.services(), scratch.services());
    }

    #[test]
    fn own_namespace_then_kubernetes_then_the_oldest() {
        let yaml = format!(
            "{SERVICE}{}",
            r"
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: e, namespace: mine}
spec: {hosts: [a.shop.svc.cluster.local], resolution: STATIC, ports: [{number: 80, name: http, protocol: HTTP}]}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: hidden, namespace: shop}
spec: {hosts: [hidden.example.com], exportTo: ['.'], resolution: DNS, ports: [{number: 80, name: http, protocol: HTTP}]}
"
        );
        let (mesh, _) = snapshot(None, &yaml);
        let seen = |namespace: &str| -> Vec<String> {
            mesh.visible_services(namespace).iter().map(|of| format!("{}/{}", of.namespace, of.host)).collect()
        };
        assert_eq!(seen("mine"), ["mine/a.shop.svc.cluster.local"]);
        assert_eq!(seen("third"), ["shop/a.shop.svc.cluster.local"]);
        assert_eq!(seen("shop"), ["shop/a.shop.svc.cluster.local", "shop/hidden.example.com"]);
    }

    #[test]
    fn references_that_lead_nowhere_and_effects() {
        let yaml = format!(
            "{SERVICE}{}",
            r"
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: old, namespace: shop}
spec:
  hosts: [a]
  http:
  - route: [{destination: {host: a, subset: v9}, weight: 1}, {destination: {host: nobody}, weight: 1}]
  - route: [{destination: {host: a, port: {number: 81}}}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: young, namespace: shop}
spec: {hosts: [a], gateways: [mesh, none], http: [{route: [{destination: {host: a}}]}]}
"
        );
        let (mesh, mut findings) = snapshot(None, &yaml);
        findings.sort();
        assert_eq!(
            findings,
            [
                "IST0101 spec.gateways[1]",
                "IST0101 spec.http[0].route[0].destination.subset",
                "IST0101 spec.http[0].route[1].destination.host",
                "IST0101 spec.http[1].route[0].destination.port",
                "IST0109 spec.hosts[0]",
            ]
        );
        let young = ObjectRef::new("VirtualService", "shop", "young");
        let old = ObjectRef::new("VirtualService", "shop", "old");
        assert_eq!(mesh.effects()[&young], Effect::PartlyShadowed { by: old });
    }

    #[test]
    fn mesh_config_of_an_installed_istio() {
        let yaml = r"
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data:
  mesh: |
    outboundTrafficPolicy: {mode: REGISTRY_ONLY}
    accessLogFile: /dev/stdout
";
        let (mesh, findings) = snapshot(None, yaml);
        assert_eq!(findings, Vec::<String>::new());
        assert_eq!(mesh.mesh_config().outbound_mode(), net::OutboundMode::RegistryOnly);
        assert_eq!(mesh.mesh_config().access_log_file(), Some("/dev/stdout"));
    }
}

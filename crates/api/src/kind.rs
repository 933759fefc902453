//! Every kind we know: its group, versions and names, and whether it has an effect.

use std::fmt;

/// What we do with a kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Support {
    /// Decoded, checked, and it has an effect.
    Effective,
    /// Known by name; a finding says that it has no effect yet.
    Recognised,
}

/// One row of the table of kinds.
#[derive(Debug)]
pub struct KindInfo {
    /// The kind.
    pub kind: Kind,
    /// As written under `kind:`.
    pub name: &'static str,
    /// Empty for Kubernetes' core group.
    pub group: &'static str,
    /// Accepted versions, the one we answer with first.
    pub versions: &'static [&'static str],
    /// `virtualservices`
    pub plural: &'static str,
    /// `vs`, …
    pub short: &'static [&'static str],
    /// Whether objects live in a namespace.
    pub namespaced: bool,
    /// What we do with it.
    pub support: Support,
}

macro_rules! kinds {
    ($( $kind:ident $name:literal $group:literal [$($version:literal),*] $plural:literal [$($short:literal),*] $scope:ident $support:ident; )*) => {
        /// A kind of object, in the order of the table: what others build on comes first.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
        pub enum Kind { $(
            #[doc = concat!("`", $name, "`")]
            $kind
        ),* }

        /// Every kind, in the order of [`Kind`].
        pub const KINDS: &[KindInfo] = &[$(
            KindInfo {
                kind: Kind::$kind, name: $name, group: $group, versions: &[$($version),*], plural: $plural,
                short: &[$($short),*], namespaced: kinds!(@scope $scope), support: Support::$support,
            }
        ),*];
    };
    (@scope ns) => { true };
    (@scope cluster) => { false };
}

kinds! {
    Namespace "Namespace" "" ["v1"] "namespaces" ["ns"] cluster Effective;
    ServiceAccount "ServiceAccount" "" ["v1"] "serviceaccounts" ["sa"] ns Effective;
    ConfigMap "ConfigMap" "" ["v1"] "configmaps" ["cm"] ns Effective;
    Secret "Secret" "" ["v1"] "secrets" [] ns Effective;
    Service "Service" "" ["v1"] "services" ["svc"] ns Effective;
    EndpointSlice "EndpointSlice" "discovery.k8s.io" ["v1"] "endpointslices" [] ns Effective;
    Deployment "Deployment" "apps" ["v1"] "deployments" ["deploy"] ns Effective;
    Pod "Pod" "" ["v1"] "pods" ["po"] ns Effective;
    IstioOperator "IstioOperator" "install.istio.io" ["v1alpha1"] "istiooperators" ["iop", "io"] ns Effective;
    Gateway "Gateway" "networking.istio.io" ["v1", "v1beta1", "v1alpha3"] "gateways" ["gw"] ns Effective;
    VirtualService "VirtualService" "networking.istio.io" ["v1", "v1beta1", "v1alpha3"] "virtualservices" ["vs"] ns Effective;
    DestinationRule "DestinationRule" "networking.istio.io" ["v1", "v1beta1", "v1alpha3"] "destinationrules" ["dr"] ns Effective;
    ServiceEntry "ServiceEntry" "networking.istio.io" ["v1", "v1beta1", "v1alpha3"] "serviceentries" ["se"] ns Effective;
    WorkloadEntry "WorkloadEntry" "networking.istio.io" ["v1", "v1beta1", "v1alpha3"] "workloadentries" ["we"] ns Effective;
    Sidecar "Sidecar" "networking.istio.io" ["v1", "v1beta1", "v1alpha3"] "sidecars" [] ns Effective;
    PeerAuthentication "PeerAuthentication" "security.istio.io" ["v1", "v1beta1"] "peerauthentications" ["pa"] ns Effective;
    RequestAuthentication "RequestAuthentication" "security.istio.io" ["v1", "v1beta1"] "requestauthentications" ["ra"] ns Effective;
    AuthorizationPolicy "AuthorizationPolicy" "security.istio.io" ["v1", "v1beta1"] "authorizationpolicies" ["ap"] ns Effective;
    Telemetry "Telemetry" "telemetry.istio.io" ["v1", "v1alpha1"] "telemetries" ["telemetry"] ns Recognised;

    WorkloadGroup "WorkloadGroup" "networking.istio.io" ["v1", "v1beta1", "v1alpha3"] "workloadgroups" ["wg"] ns Recognised;
    ProxyConfig "ProxyConfig" "networking.istio.io" ["v1beta1"] "proxyconfigs" [] ns Recognised;
    EnvoyFilter "EnvoyFilter" "networking.istio.io" ["v1alpha3"] "envoyfilters" [] ns Recognised;
    WasmPlugin "WasmPlugin" "extensions.istio.io" ["v1alpha1"] "wasmplugins" [] ns Recognised;
    TrafficExtension "TrafficExtension" "extensions.istio.io" ["v1alpha1"] "trafficextensions" [] ns Recognised;

    GatewayClass "GatewayClass" "gateway.networking.k8s.io" ["v1", "v1beta1"] "gatewayclasses" ["gc"] cluster Recognised;
    KubernetesGateway "Gateway" "gateway.networking.k8s.io" ["v1", "v1beta1"] "gateways.gateway.networking.k8s.io" ["gtw"] ns Recognised;
    HttpRoute "HTTPRoute" "gateway.networking.k8s.io" ["v1", "v1beta1"] "httproutes" [] ns Recognised;
    GrpcRoute "GRPCRoute" "gateway.networking.k8s.io" ["v1"] "grpcroutes" [] ns Recognised;
    TcpRoute "TCPRoute" "gateway.networking.k8s.io" ["v1alpha2", "v1"] "tcproutes" [] ns Recognised;
    TlsRoute "TLSRoute" "gateway.networking.k8s.io" ["v1alpha2", "v1alpha3", "v1"] "tlsroutes" [] ns Recognised;
    UdpRoute "UDPRoute" "gateway.networking.k8s.io" ["v1alpha2"] "udproutes" [] ns Recognised;
    ReferenceGrant "ReferenceGrant" "gateway.networking.k8s.io" ["v1beta1", "v1"] "referencegrants" ["refgrant"] ns Recognised;
    BackendTlsPolicy "BackendTLSPolicy" "gateway.networking.k8s.io" ["v1", "v1alpha3"] "backendtlspolicies" ["btlspolicy"] ns Recognised;

    ReplicaSet "ReplicaSet" "apps" ["v1"] "replicasets" ["rs"] ns Recognised;
    StatefulSet "StatefulSet" "apps" ["v1"] "statefulsets" ["sts"] ns Recognised;
    DaemonSet "DaemonSet" "apps" ["v1"] "daemonsets" ["ds"] ns Recognised;
    Job "Job" "batch" ["v1"] "jobs" [] ns Recognised;
    CronJob "CronJob" "batch" ["v1"] "cronjobs" ["cj"] ns Recognised;
    Ingress "Ingress" "networking.k8s.io" ["v1"] "ingresses" ["ing"] ns Recognised;
    IngressClass "IngressClass" "networking.k8s.io" ["v1"] "ingressclasses" [] cluster Recognised;
    NetworkPolicy "NetworkPolicy" "networking.k8s.io" ["v1"] "networkpolicies" ["netpol"] ns Recognised;
    Endpoints "Endpoints" "" ["v1"] "endpoints" ["ep"] ns Recognised;
    Role "Role" "rbac.authorization.k8s.io" ["v1"] "roles" [] ns Recognised;
    RoleBinding "RoleBinding" "rbac.authorization.k8s.io" ["v1"] "rolebindings" [] ns Recognised;
    ClusterRole "ClusterRole" "rbac.authorization.k8s.io" ["v1"] "clusterroles" [] cluster Recognised;
    ClusterRoleBinding "ClusterRoleBinding" "rbac.authorization.k8s.io" ["v1"] "clusterrolebindings" [] cluster Recognised;
    HorizontalPodAutoscaler "HorizontalPodAutoscaler" "autoscaling" ["v2", "v1"] "horizontalpodautoscalers" ["hpa"] ns Recognised;
    PodDisruptionBudget "PodDisruptionBudget" "policy" ["v1"] "poddisruptionbudgets" ["pdb"] ns Recognised;
    PersistentVolume "PersistentVolume" "" ["v1"] "persistentvolumes" ["pv"] cluster Recognised;
    PersistentVolumeClaim "PersistentVolumeClaim" "" ["v1"] "persistentvolumeclaims" ["pvc"] ns Recognised;
    StorageClass "StorageClass" "storage.k8s.io" ["v1"] "storageclasses" ["sc"] cluster Recognised;
    LimitRange "LimitRange" "" ["v1"] "limitranges" ["limits"] ns Recognised;
    ResourceQuota "ResourceQuota" "" ["v1"] "resourcequotas" ["quota"] ns Recognised;
    PriorityClass "PriorityClass" "scheduling.k8s.io" ["v1"] "priorityclasses" ["pc"] cluster Recognised;
    Lease "Lease" "coordination.k8s.io" ["v1"] "leases" [] ns Recognised;
    CustomResourceDefinition "CustomResourceDefinition" "apiextensions.k8s.io" ["v1"] "customresourcedefinitions" ["crd", "crds"] cluster Recognised;
    MutatingWebhookConfiguration "MutatingWebhookConfiguration" "admissionregistration.k8s.io" ["v1"] "mutatingwebhookconfigurations" [] cluster Recognised;
    ValidatingWebhookConfiguration "ValidatingWebhookConfiguration" "admissionregistration.k8s.io" ["v1"] "validatingwebhookconfigurations" [] cluster Recognised;
}

impl Kind {
    /// The row of the table.
    pub fn info(self) -> &'static KindInfo {
        &KINDS[self as usize]
    }

    /// As written under `kind:`.
    pub fn name(self) -> &'static str {
        self.info().name
    }

    /// The `apiVersion` we answer with.
    pub fn api_version(self) -> String {
        let info = self.info();
        let version = info.versions.first().copied().unwrap_or("v1");
        if info.group.is_empty() { version.to_owned() } else { format!("{}/{version}", info.group) }
    }

    /// Whether objects live in a namespace.
    pub fn is_namespaced(self) -> bool {
        self.info().namespaced
    }

    /// Whether nothing about it may ever be ignored.
    pub fn is_security(self) -> bool {
        matches!(
            self,
            Self::AuthorizationPolicy | Self::PeerAuthentication | Self::RequestAuthentication | Self::Sidecar
        )
    }

    /// Finds the kind that a document names.
    pub fn find(api_version: &str, name: &str) -> Result<Self, UnknownKind> {
        let (group, version) = api_version.rsplit_once('/').unwrap_or(("", api_version));
        let mut of_name = KINDS.iter().filter(|info| info.name == name).peekable();
        if of_name.peek().is_none() {
            let near = crate::suggest::nearest(name, KINDS.iter().map(|info| info.name));
            return Err(UnknownKind::Name { api_version: api_version.to_owned(), name: name.to_owned(), near });
        }
        let accepted: Vec<&KindInfo> = of_name.collect();
        match accepted.iter().find(|info| info.group == group) {
            Some(info) if info.versions.contains(&version) => Ok(info.kind),
            _ => {
                let versions = accepted
                    .iter()
                    .flat_map(|info| {
                        info.versions.iter().map(|version| {
                            if info.group.is_empty() {
                                (*version).to_owned()
                            } else {
                                format!("{}/{version}", info.group)
                            }
                        })
                    })
                    .collect::<Vec<_>>()
                    .join(", ");
                Err(UnknownKind::Version { api_version: api_version.to_owned(), name: name.to_owned(), versions })
            }
        }
    }

    /// Finds a kind by what people type: kind, plural, singular or short name, in any case, with or
    /// without the group (`gateways.networking.istio.io`).
    pub fn parse(word: &str) -> Option<Self> {
        let word = word.to_ascii_lowercase();
        KINDS
            .iter()
            .find(|info| {
                let name = info.name.to_ascii_lowercase();
                let plural = info.plural.split('.').next().unwrap_or(info.plural);
                let bare = info.plural == word || name == word || info.short.contains(&word.as_str());
                bare || word
                    .split_once('.')
                    .is_some_and(|(first, group)| group == info.group && (first == plural || first == name))
            })
            .map(|info| info.kind)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why a document's kind is not known.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum UnknownKind {
    /// No kind of that name.
    #[error("kind {name:?} of {api_version:?} is not known")]
    Name {
        /// As written.
        api_version: String,
        /// As written.
        name: String,
        /// The kind that looks most alike.
        near: Option<&'static str>,
    },
    /// The kind exists in other groups or versions.
    #[error("kind {name:?} has no version {api_version:?}")]
    Version {
        /// As written.
        api_version: String,
        /// As written.
        name: String,
        /// Those that exist.
        versions: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_order_of_the_enum() {
        for (index, info) in KINDS.iter().enumerate() {
            assert_eq!(info.kind as usize, index);
        }
    }

    #[test]
    fn what_people_type() {
        for (word, kind) in [
            ("vs", Kind::VirtualService),
            ("VirtualServices", Kind::VirtualService),
            ("virtualservice.networking.istio.io", Kind::VirtualService),
            ("gateway", Kind::Gateway),
            ("gateways.networking.istio.io", Kind::Gateway),
            ("gateways.gateway.networking.k8s.io", Kind::KubernetesGateway),
            ("gtw", Kind::KubernetesGateway),
            ("po", Kind::Pod),
            ("deploy", Kind::Deployment),
        ] {
            assert_eq!(Kind::parse(word), Some(kind), "{word}");
        }
        assert_eq!(Kind::parse("nonsense"), None);
    }

    #[test]
    fn groups_keep_namesakes_apart() {
        assert_eq!(Kind::find("networking.istio.io/v1", "Gateway"), Ok(Kind::Gateway));
        assert_eq!(Kind::find("gateway.networking.k8s.io/v1", "Gateway"), Ok(Kind::KubernetesGateway));
        assert!(matches!(Kind::find("networking.istio.io/v2", "Gateway"), Err(UnknownKind::Version { .. })));
        assert!(matches!(
            Kind::find("networking.istio.io/v1", "VirtualServices"),
            Err(UnknownKind::Name { near: Some("VirtualService"), .. })
        ));
    }
}

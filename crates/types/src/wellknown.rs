//! Ports, labels, annotations and fixed names, each declared once.

/// The trust domain unless `meshConfig.trustDomain` says otherwise.
pub const DEFAULT_TRUST_DOMAIN: &str = "cluster.local";
/// DNS domain of services.
pub const DEFAULT_DOMAIN_SUFFIX: &str = "cluster.local";
/// Namespace whose policies hold for the whole mesh.
pub const DEFAULT_ROOT_NAMESPACE: &str = "istio-system";
/// Name by which pods of a local mesh reach what listens on the machine's loopback.
pub const HOST_NAME: &str = "host.lateen.internal";
/// Audience of the tokens that the CA accepts.
pub const TOKEN_AUDIENCE: &str = "istio-ca";

/// Fixed ports, with Istio's meaning.
pub mod ports {
    /// Proxy admin, loopback only.
    pub const PROXY_ADMIN: u16 = 15000;
    /// Redirected outbound traffic.
    pub const OUTBOUND: u16 = 15001;
    /// Redirected inbound traffic.
    pub const INBOUND: u16 = 15006;
    /// HBONE.
    pub const HBONE: u16 = 15008;
    /// xDS and CA in plaintext.
    pub const XDS_PLAINTEXT: u16 = 15010;
    /// xDS and CA over TLS.
    pub const XDS: u16 = 15012;
    /// Control-plane metrics and debug endpoints.
    pub const CONTROL_METRICS: u16 = 15014;
    /// Merged metrics and health of a pod.
    pub const MERGED_METRICS: u16 = 15020;
    /// Readiness of a proxy.
    pub const READINESS: u16 = 15021;
    /// DNS of a proxy.
    pub const DNS: u16 = 15053;
    /// Metrics of a proxy.
    pub const PROXY_METRICS: u16 = 15090;
}

/// Socket marks that tell the proxy's own connections from the application's.
pub mod marks {
    /// The proxy towards others.
    pub const PROXY: u32 = 1337;
    /// The proxy towards its own application.
    pub const PROXY_TO_APP: u32 = 1338;
}

/// Labels.
pub mod labels {
    /// Namespace label that switches injection on (`enabled`) or off (`disabled`).
    pub const INJECTION: &str = "istio-injection";
    /// Namespace and pod label that chooses a revision.
    pub const REVISION: &str = "istio.io/rev";
    /// Pod label that forces injection on or off.
    pub const INJECT: &str = "sidecar.istio.io/inject";
    /// Set by injection: the workload speaks mesh TLS.
    pub const TLS_MODE: &str = "security.istio.io/tlsMode";
    /// Canonical service name, set by injection.
    pub const CANONICAL_NAME: &str = "service.istio.io/canonical-name";
    /// Canonical revision, set by injection.
    pub const CANONICAL_REVISION: &str = "service.istio.io/canonical-revision";
    /// `app`
    pub const APP: &str = "app";
    /// `app.kubernetes.io/name`
    pub const APP_KUBERNETES: &str = "app.kubernetes.io/name";
    /// `version`
    pub const VERSION: &str = "version";
    /// `app.kubernetes.io/version`
    pub const VERSION_KUBERNETES: &str = "app.kubernetes.io/version";
    /// Region of a node or workload.
    pub const REGION: &str = "topology.kubernetes.io/region";
    /// Zone of a node or workload.
    pub const ZONE: &str = "topology.kubernetes.io/zone";
    /// Sub-zone of a node or workload.
    pub const SUB_ZONE: &str = "topology.istio.io/subzone";
    /// Locality of a workload, parts joined by `.`.
    pub const LOCALITY: &str = "istio-locality";
    /// Service a slice belongs to.
    pub const SERVICE_NAME: &str = "kubernetes.io/service-name";
    /// Set by the Deployment controller.
    pub const POD_TEMPLATE_HASH: &str = "pod-template-hash";
}

/// Annotations.
pub mod annotations {
    /// Pod annotation that forces injection on or off (older than the label).
    pub const INJECT: &str = "sidecar.istio.io/inject";
    /// `meshConfig.defaultConfig` of this pod's proxy, as YAML, over the mesh's.
    pub const PROXY_CONFIG: &str = "proxy.istio.io/config";
    /// What an injected pod got, as JSON.
    pub const STATUS: &str = "sidecar.istio.io/status";
    /// Local program that plays the pod's only container. `.NAME` appended: one container.
    pub const COMMAND: &str = "lateen.dev/command";
    /// What `kubectl rollout restart` stamps into a pod template.
    pub const RESTARTED_AT: &str = "kubectl.kubernetes.io/restartedAt";
    /// `switch`: the local mesh's pod lives in the switch (the control plane).
    pub const NETWORK: &str = "lateen.dev/network";
    /// Ports of a local gateway pod that the machine listens on for it, comma-separated.
    pub const HOST_PORTS: &str = "lateen.dev/host-ports";
    /// Injection templates of a pod, comma-separated: `sidecar` (default), `gateway`.
    pub const TEMPLATES: &str = "inject.istio.io/templates";
}

/// Type URLs of the resources that travel over ADS.
pub mod type_urls {
    /// Clusters (CDS).
    pub const CLUSTER: &str = "type.googleapis.com/envoy.config.cluster.v3.Cluster";
    /// Endpoints (EDS).
    pub const ENDPOINT: &str = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment";
    /// Listeners (LDS).
    pub const LISTENER: &str = "type.googleapis.com/envoy.config.listener.v3.Listener";
    /// Route configurations (RDS).
    pub const ROUTE: &str = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration";
    /// Secrets (SDS).
    pub const SECRET: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";
    /// Extension configurations (ECDS).
    pub const EXTENSION_CONFIG: &str = "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig";
    /// Name table (Istio's NDS).
    pub const NAME_TABLE: &str = "type.googleapis.com/istio.networking.nds.v1.NameTable";

    /// The order in which a push sends the types: what is referred to comes before what refers to
    /// it (make before break).
    pub const PUSH_ORDER: [&str; 7] = [CLUSTER, ENDPOINT, LISTENER, ROUTE, SECRET, EXTENSION_CONFIG, NAME_TABLE];

    /// `CDS`, `EDS`, … as Istio's tools call a type; the last part of the URL for others.
    pub fn short(type_url: &str) -> &str {
        match type_url {
            CLUSTER => "CDS",
            ENDPOINT => "EDS",
            LISTENER => "LDS",
            ROUTE => "RDS",
            SECRET => "SDS",
            EXTENSION_CONFIG => "ECDS",
            NAME_TABLE => "NDS",
            other => other.rsplit(['.', '/']).next().unwrap_or(other),
        }
    }
}

/// Environment variables that the local mesh's node sets for the programs it starts.
///
/// They are the contract between node and proxy, which do not see each other.
pub mod env {
    /// Listening sockets that a gateway inherits: `PORT=FD,PORT=FD`, e.g. `8080=7,8443=8`.
    ///
    /// Each descriptor is a non-blocking TCP listener of the *machine's* network. The proxy serves
    /// it beside its own socket whenever it has an xDS listener on `PORT`, with that listener's
    /// filter chains, and keeps it open while it has none (clients wait in its queue). Descriptors
    /// are inherited without close-on-exec: set it when adopting. The node keeps its own copy, so a
    /// restarted proxy finds the queue as it was.
    pub const LISTEN_FDS: &str = "LATEEN_LISTEN_FDS";
    /// Descriptor of a `SOCK_SEQPACKET` socket that hands out sockets of the machine's network: `FD`.
    ///
    /// A request is one packet of four bytes: version `1`, kind (`1` TCP, `2` UDP), family (`4` or
    /// `6`), count (1 to 16). The answer is one packet: byte 0 is `0` and the sockets ride along as
    /// `SCM_RIGHTS` (non-blocking, close-on-exec, neither bound nor connected), or byte 0 is a
    /// system error number and none do. Answers come in the order of requests. A TCP socket is
    /// connected by whoever asked; never set a mark on it. Use one for every destination outside of
    /// [`MESH_RANGES`]: the pod's own network has no way out.
    pub const HOST_SOCKETS: &str = "LATEEN_HOST_SOCKETS";
    /// Addresses inside the local mesh, as comma-separated CIDRs.
    pub const MESH_RANGES: &str = "LATEEN_MESH_RANGES";
}

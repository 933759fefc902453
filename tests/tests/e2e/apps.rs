//! What runs in the meshes of these tests.

use std::time::Duration;

use testkit::Shared;

/// Bookinfo and the mail catcher as `lateen demo` has them, and the namespaces `shop` (with
/// proxies) and `plain` (without).
pub(crate) static TRAFFIC: Shared = Shared::new("traffic", traffic);
/// The namespaces `foo` and `bar` (with proxies) and `legacy` (without).
pub(crate) static SECURITY: Shared = Shared::new("security", security);

/// The namespaces `plain` (without proxies) and `shop` (with): a few programs of this machine.
pub(crate) static NODE: Shared = Shared::new("node", node);

const DEMO: &str = include_str!("../../../crates/lateen/src/manifests/demo.yaml");

/// How long [`TRAFFIC`]'s proxies wait for the first bytes of a port that does not say its protocol.
pub(crate) const DETECTION: Duration = Duration::from_secs(3);

/// The puppet of [`TRAFFIC`], which takes spans.
pub(crate) const COLLECTOR: &str = "plain/puppet";
/// The puppet of [`SECURITY`]: authorizer, issuer, collector.
pub(crate) const PUPPET: &str = "legacy/puppet";

const TRAFFIC_CONFIG: &str = "
apiVersion: install.istio.io/v1alpha1
kind: IstioOperator
metadata: {name: mesh, namespace: istio-system}
spec:
  meshConfig:
    accessLogFile: /dev/stdout
    enableTracing: true
    protocolDetectionTimeout: @DETECTION@s
    extensionProviders:
    - name: zipkin
      zipkin: {service: puppet.plain.svc.cluster.local, port: 8000, traceContextOption: USE_B3_WITH_W3C_PROPAGATION}
";

const SECURITY_CONFIG: &str = "
apiVersion: install.istio.io/v1alpha1
kind: IstioOperator
metadata: {name: mesh, namespace: istio-system}
spec:
  meshConfig:
    accessLogFile: /dev/stdout
    defaultConfig:
      tracing: {zipkin: {address: \"puppet.legacy:8000\"}}
      gatewayTopology: {numTrustedProxies: 1}
    extensionProviders:
    - name: ask
      envoyExtAuthzHttp:
        service: puppet.legacy.svc.cluster.local
        port: 8000
        timeout: 4s
        pathPrefix: /ask
        includeRequestHeadersInCheck: [x-key]
        includeAdditionalHeadersInCheck: {x-from: mesh}
        headersToUpstreamOnAllow: [x-user]
        headersToDownstreamOnAllow: [x-checked]
        headersToDownstreamOnDeny: [x-reason]
    - name: ask-open
      envoyExtAuthzHttp:
        {service: puppet.legacy.svc.cluster.local, port: 8000, timeout: 4s, pathPrefix: /open, failOpen: true, statusOnError: \"503\"}
    - name: ask-body
      envoyExtAuthzHttp:
        service: puppet.legacy.svc.cluster.local
        port: 8000
        timeout: 30s
        pathPrefix: /body
        statusOnError: \"503\"
        includeRequestBodyInCheck: {maxRequestBytes: 16, allowPartialMessage: false}
";

fn traffic() -> String {
    // Its gateway takes every host; ours must not.
    let mut all: Vec<String> =
        DEMO.split("\n---\n").filter(|document| !document.contains("bookinfo-gateway")).map(str::to_owned).collect();
    all.push(TRAFFIC_CONFIG.replace("@DETECTION@", &DETECTION.as_secs().to_string()));
    all.push(puppet("plain"));
    all.push(namespace("shop", true));
    all.push(namespace("plain", false));
    for home in ["shop", "plain"] {
        all.push(workload(home, "curl", "v1", "curlimages/curl", None, ""));
        all.push(workload(home, "httpbin", "v1", "docker.io/kong/httpbin", Some(80), ""));
        all.push(service(home, "httpbin", "{name: http, port: 8000, targetPort: 80}"));
    }
    for (version, prefix) in [("v1", "one"), ("v2", "two")] {
        let args = format!("\"9000\", \"{prefix}\"");
        all.push(workload("shop", "echo", version, "docker.io/istio/tcp-echo-server:1.3", Some(9000), &args));
    }
    all.push(service("shop", "echo", "{name: tcp, port: 9000}"));
    all.push(workload("shop", "grpc", "v1", "lateen/grpc-echo", Some(7070), ""));
    all.push(service("shop", "grpc", "{name: grpc, port: 7070}"));
    all.push(workload("shop", "any", "v1", "lateen/any-echo", Some(9000), ""));
    all.push(service("shop", "any", "{port: 9000}"));
    // Two pods of one service: one serves, the other one listens nowhere.
    all.push(labelled("shop", "good", "flaky", "docker.io/kong/httpbin", Some(80), ""));
    all.push(labelled("shop", "dead", "flaky", "curlimages/curl", None, ""));
    all.push(service("shop", "flaky", "{name: http, port: 80}"));
    all.push(
        "
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: gateway, namespace: shop}
spec:
  selector: {istio: ingressgateway}
  servers: [{port: {number: 80, name: http, protocol: HTTP}, hosts: [\"*.shop.test\"]}]
"
        .to_owned(),
    );
    all.join("\n---\n")
}

fn node() -> String {
    let all = [
        namespace("plain", false),
        namespace("shop", true),
        workload("plain", "curl", "v1", "curlimages/curl", None, ""),
        workload("shop", "curl", "v1", "curlimages/curl", None, ""),
        workload("plain", "httpbin", "v1", "docker.io/kong/httpbin", Some(80), ""),
        service("plain", "httpbin", "{name: http, port: 8000, targetPort: 80}"),
        TWO_CONTAINERS.to_owned(),
    ];
    all.join("\n---\n")
}

const TWO_CONTAINERS: &str = "
apiVersion: apps/v1
kind: Deployment
metadata: {name: two, namespace: plain, labels: {app: two}}
spec:
  selector: {matchLabels: {app: two}}
  template:
    metadata: {labels: {app: two}}
    spec:
      containers:
      - name: left
        image: local/shell
        command: [sh, -c, 'echo left starts; while [ ! -e /tmp/go-$HOSTNAME ]; do sleep 0.1; done; echo left goes on; exec sleep infinity']
        env: [{name: SIDE, value: left}]
      - name: right
        image: local/shell
        command: [sh, -c, 'echo right starts; exec sleep infinity']
        env: [{name: SIDE, value: right}]
";

fn security() -> String {
    let mut all = vec![
        SECURITY_CONFIG.to_owned(),
        puppet("legacy"),
        namespace("foo", true),
        namespace("bar", true),
        namespace("legacy", false),
    ];
    for home in ["foo", "bar", "legacy"] {
        all.push(workload(home, "curl", "v1", "curlimages/curl", None, ""));
    }
    for home in ["foo", "legacy"] {
        all.push(workload(home, "httpbin", "v1", "docker.io/kong/httpbin", Some(80), ""));
        all.push(service(home, "httpbin", "{name: http, port: 8000, targetPort: 80}"));
    }
    all.push(workload("foo", "echo", "v1", "docker.io/istio/tcp-echo-server:1.3", Some(9000), "\"9000\", \"one\""));
    all.push(service("foo", "echo", "{name: tcp, port: 9000}"));
    all.push(
        "
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: gateway, namespace: foo}
spec:
  selector: {istio: ingressgateway}
  servers: [{port: {number: 80, name: http, protocol: HTTP}, hosts: [\"*.foo.test\"]}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: httpbin, namespace: foo}
spec:
  hosts: [httpbin.foo.test]
  gateways: [gateway]
  http: [{route: [{destination: {host: httpbin, port: {number: 8000}}}]}]
"
        .to_owned(),
    );
    all.join("\n---\n")
}

/// The puppet in a namespace without proxies.
pub(crate) fn puppet(home: &str) -> String {
    let command =
        format!("{} {} {}", testkit::mesh::puppet().display(), testkit::puppet::PORT, testkit::puppet::RAW_PORT);
    let ports = "{name: http, port: 8000}, {name: tcp-raw, port: 8001}, {name: http-raw, port: 8002, targetPort: 8001}, {name: grpc-raw, port: 8003, targetPort: 8001}";
    let workload = workload(home, "puppet", "v1", "lateen/puppet", Some(testkit::puppet::PORT), "");
    let played =
        workload.replace("version: v1}", &format!("version: v1}}, annotations: {{lateen.dev/command: \"{command}\"}}"));
    format!("{played}---\n{}", service(home, "puppet", ports))
}

pub(crate) fn namespace(name: &str, has_proxies: bool) -> String {
    let label = if has_proxies { "enabled" } else { "disabled" };
    format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, labels: {{istio-injection: {label}}}}}\n")
}

pub(crate) fn service(namespace: &str, name: &str, port: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {namespace}, labels: {{app: {name}}}}}\nspec: {{selector: {{app: {name}}}, ports: [{port}]}}\n"
    )
}

/// The deployment `NAME` (v1) or `NAME-VERSION`, with a service account of the name.
pub(crate) fn workload(
    namespace: &str,
    name: &str,
    version: &str,
    image: &str,
    port: Option<u16>,
    args: &str,
) -> String {
    let full = if version == "v1" { name.to_owned() } else { format!("{name}-{version}") };
    deployment(namespace, &full, name, version, image, port, args)
}

fn labelled(namespace: &str, name: &str, app: &str, image: &str, port: Option<u16>, args: &str) -> String {
    deployment(namespace, name, app, "v1", image, port, args)
}

fn deployment(
    namespace: &str,
    name: &str,
    app: &str,
    version: &str,
    image: &str,
    port: Option<u16>,
    args: &str,
) -> String {
    let probe = port.map_or_else(String::new, |port| {
        format!(
            ", ports: [{{containerPort: {port}}}], readinessProbe: {{tcpSocket: {{port: {port}}}, periodSeconds: 1}}"
        )
    });
    let args = if args.is_empty() { String::new() } else { format!(", args: [{args}]") };
    format!(
        "apiVersion: v1
kind: ServiceAccount
metadata: {{name: {app}, namespace: {namespace}}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {{name: {name}, namespace: {namespace}}}
spec:
  selector: {{matchLabels: {{app: {app}, deployment: {name}}}}}
  template:
    metadata: {{labels: {{app: {app}, deployment: {name}, version: {version}}}}}
    spec:
      serviceAccountName: {app}
      containers: [{{name: app, image: \"{image}\"{args}{probe}}}]
"
    )
}

/// `http:` of a VirtualService for `HOST.shop.test` at the gateway of `shop`.
pub(crate) fn virtual_service(host: &str, http: &str) -> String {
    format!(
        "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: {host}, namespace: shop}}
spec:
  hosts: [{host}.shop.test]
  gateways: [gateway]
  http:
{http}
"
    )
}

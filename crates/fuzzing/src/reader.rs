//! The reader of YAML, and what follows for objects it admits: no text ends the control plane.

use std::net::IpAddr;

use compile::{ProxyKind, View};
use mesh::MeshSnapshot;

use crate::mutate::{self, Random};

pub(crate) fn run(data: &[u8]) -> u64 {
    let text = String::from_utf8_lossy(data);
    let documents = api::parse_documents("fuzz.yaml", &text);
    let mut seen: Vec<String> =
        documents.findings.iter().map(|finding| format!("{} {:?}", finding.code, finding.field)).collect();
    let admitted = documents.objects;
    if admitted.is_empty() {
        return crate::signature(&seen);
    }
    seen.extend(admitted.iter().map(|parsed| format!("{:?}", parsed.object.kind)));
    let (mesh, findings) = mesh_with(admitted);
    seen.extend(findings.iter().map(|finding| format!("{} {:?}", finding.code, finding.field)));
    for view in views() {
        let resources = compile::compile(&mesh, &view);
        for resource in resources.packed() {
            if let Err(reason) = crate::lowering::lowers(&resource.any) {
                seen.push(reason);
            }
        }
    }
    crate::signature(&seen)
}

/// A sidecar and a gateway that what is admitted may concern.
fn views() -> [View; 2] {
    let mut sidecar = View::sidecar("shop", "client", IpAddr::from([10, 1, 0, 9]));
    sidecar.labels = [("app".to_owned(), "reviews".to_owned())].into();
    let mut gateway = View::sidecar("istio-system", "gateway", IpAddr::from([10, 1, 0, 10]));
    gateway.kind = ProxyKind::Router;
    gateway.labels = [("istio".to_owned(), "ingressgateway".to_owned())].into();
    [sidecar, gateway]
}

/// The base with younger objects.
fn mesh_with(younger: impl IntoIterator<Item = api::ParsedObject>) -> (MeshSnapshot, Vec<types::Finding>) {
    let mut documents = api::parse_documents("base.yaml", BASE);
    documents.objects.extend(younger);
    MeshSnapshot::next(None, &api::ConfigSet::new(documents.one_after_another()))
}

const BASE: &str = r"
apiVersion: v1
kind: Service
metadata: {name: reviews, namespace: shop}
spec: {clusterIP: 10.96.0.1, selector: {app: reviews}, ports: [{name: http, port: 9080}]}
---
apiVersion: v1
kind: Pod
metadata: {name: reviews-v1, namespace: shop, labels: {app: reviews, version: v1, security.istio.io/tlsMode: istio}}
spec: {serviceAccountName: reviews, containers: [{name: a, image: a}]}
status: {phase: Running, podIP: 10.1.0.1, conditions: [{type: Ready, status: 'True'}]}
";

/// Objects of most kinds, small.
pub(crate) const SEEDS: [&str; 9] = [
    r"
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: reviews, namespace: shop}
spec:
  hosts: [reviews]
  http:
  - match: [{headers: {end-user: {exact: jason}}, uri: {prefix: /x}, queryParams: {a: {regex: 'b+'}}}]
    fault: {delay: {percentage: {value: 50}, fixedDelay: 7s}, abort: {percentage: {value: 10}, httpStatus: 500}}
    route: [{destination: {host: reviews, subset: v2}}]
  - rewrite: {uri: /y, authority: z}
    timeout: 1.5s
    retries: {attempts: 3, perTryTimeout: 2s, retryOn: '5xx,reset'}
    headers: {request: {set: {a: b}, remove: [c]}}
    corsPolicy: {allowOrigins: [{exact: 'https://a'}], allowMethods: [GET], maxAge: 24h}
    mirror: {host: reviews, subset: v1}
    route: [{destination: {host: reviews, subset: v1}, weight: 90}, {destination: {host: reviews}, weight: 10}]
",
    r"
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: reviews, namespace: shop}
spec:
  host: reviews
  trafficPolicy:
    loadBalancer: {consistentHash: {httpHeaderName: x}}
    connectionPool: {tcp: {maxConnections: 1}, http: {http1MaxPendingRequests: 1, maxRequestsPerConnection: 1}}
    outlierDetection: {consecutive5xxErrors: 1, interval: 1s, baseEjectionTime: 3m, maxEjectionPercent: 100}
    tls: {mode: ISTIO_MUTUAL}
  subsets: [{name: v1, labels: {version: v1}}, {name: v2, labels: {version: v2}}]
",
    r"
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: g, namespace: istio-system}
spec:
  selector: {istio: ingressgateway}
  servers:
  - {port: {number: 80, name: http, protocol: HTTP}, hosts: ['*.example.com'], tls: {httpsRedirect: true}}
  - {port: {number: 443, name: https, protocol: HTTPS}, hosts: ['a.example.com'], tls: {mode: SIMPLE, credentialName: c}}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: v, namespace: shop}
spec: {hosts: [a.example.com], gateways: [istio-system/g], http: [{route: [{destination: {host: reviews}}]}]}
",
    r"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: shop}
spec:
  selector: {matchLabels: {app: reviews}}
  action: DENY
  rules:
  - from: [{source: {principals: ['cluster.local/ns/a/sa/b'], namespaces: [x], notIpBlocks: [10.0.0.0/8]}}]
    to: [{operation: {methods: [GET], paths: ['/a/*', '/{*}/b/{**}'], hosts: [h], ports: ['80']}}]
    when: [{key: 'request.auth.claims[group]', values: [admin]}, {key: 'request.headers[x]', notValues: ['*']}]
",
    r#"
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: r, namespace: shop}
spec:
  jwtRules:
  - {issuer: me, jwks: '{"keys":[]}', fromHeaders: [{name: x, prefix: 'Bearer '}], outputClaimToHeaders: [{header: a, claim: b.c}]}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: d, namespace: shop}
spec: {mtls: {mode: STRICT}, selector: {matchLabels: {app: reviews}}, portLevelMtls: {9080: {mode: DISABLE}}}
"#,
    r"
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: e, namespace: shop}
spec: {hosts: [e.example.com], addresses: [1.2.3.4/24], location: MESH_EXTERNAL, resolution: STATIC, ports: [{number: 80, name: http, protocol: HTTP}], endpoints: [{address: 5.6.7.8, ports: {http: 81}, weight: 3}]}
",
    r"
apiVersion: apps/v1
kind: Deployment
metadata: {name: d, namespace: shop, annotations: {lateen.dev/command: 'a b'}}
spec: {replicas: 2, selector: {matchLabels: {app: d}}, template: {metadata: {labels: {app: d}}, spec: {containers: [{name: c, image: i, env: [{name: A, valueFrom: {fieldRef: {fieldPath: metadata.name}}}], readinessProbe: {httpGet: {path: /, port: 80}}}]}}}
---
apiVersion: v1
kind: Secret
metadata: {name: s, namespace: shop}
stringData: {a: b}
data: {c: ZA==}
",
    "a: &x [1, 2]\nb: *x\nc: |\n  text\n  more\nd: >-\n  folded\ne: !!str 5\n? f\n: 'g'\n\"h\": {i: ~}\n...\n---\n",
    "apiVersion: install.istio.io/v1alpha1\nkind: IstioOperator\nmetadata: {name: mesh, namespace: istio-system}\nspec: {meshConfig: {protocolDetectionTimeout: 1s, defaultConfig: {concurrency: 1}}}\n",
];

const WORDS: [&str; 36] = [
    "\n",
    "  ",
    "- ",
    ": ",
    "{",
    "}",
    "[",
    "]",
    "'",
    "\"",
    "|",
    ">",
    "&a ",
    "*a",
    "!!",
    "#",
    "---\n",
    "~",
    "\t",
    "null",
    "-1",
    "1e99",
    "4294967296",
    "0.0.0.0/0",
    "*",
    "*.",
    ".*",
    "[",
    "(?",
    "{**}",
    "-1s",
    "1000000h",
    "\u{feff}",
    "\u{0}",
    "hosts:",
    "spec:",
];

pub(crate) fn mutated(input: &[u8], random: &mut Random) -> Vec<u8> {
    mutate::bytes(input, &WORDS, random)
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    SEEDS.map(|seed| seed.as_bytes().to_vec()).to_vec()
}

/// Resources that seeds compile to.
pub(crate) fn resources() -> Vec<compile::Resource> {
    let (mesh, _) = mesh_with(SEEDS.iter().flat_map(|seed| api::parse_documents("seed.yaml", seed).objects));
    views().iter().flat_map(|view| compile::compile(&mesh, view).packed()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_what_they_should_be() {
        for seed in SEEDS {
            let documents = api::parse_documents("seed.yaml", seed);
            assert!(seed.starts_with("a:") || !documents.objects.is_empty(), "{:?}", documents.findings);
            run(seed.as_bytes());
        }
    }
}

//! Cases: a document, and what is said about it.

use types::Severity;

use crate::{Documents, parse_documents};

fn messages(documents: &Documents, severity: Severity) -> Vec<String> {
    let of = documents.findings.iter().filter(|finding| finding.severity == severity);
    of.map(|finding| format!("{}: {}", finding.field, finding.message)).collect()
}

/// Messages of decoded types, which have one text each; all but the last say in it what to write.
const WITHOUT_HINT: [&str; 4] = [
    "is not a duration: write",
    "plain text goes into",
    "only one of `exact`, `prefix`, `regex` may be set",
    "is not a trust domain",
];

/// Errors and warnings say what to do.
fn have_remedies(documents: &Documents) {
    for finding in documents.findings.iter().filter(|finding| finding.severity != Severity::Info) {
        let is_exception = WITHOUT_HINT.iter().any(|part| finding.message.contains(part));
        assert!(is_exception || !finding.hint.is_empty(), "no remedy: {finding}");
    }
}

/// `error` must be a part of the only errors' text; empty: admitted.
fn check(text: &str, error: &str) {
    let documents = parse_documents("t.yaml", text);
    have_remedies(&documents);
    let errors = messages(&documents, Severity::Error);
    if error.is_empty() {
        assert!(errors.is_empty(), "{text}\n{errors:?}");
        assert!(!documents.objects.is_empty(), "{text}");
    } else {
        assert!(errors.iter().any(|message| message.contains(error)), "{text}\nwanted {error:?} in {errors:?}");
        assert!(documents.objects.is_empty(), "{text}");
        assert!(documents.refused.len() == 1 || documents.is_incomplete, "{text}");
        assert!(documents.findings.iter().all(|f| f.position.as_ref().is_some_and(|p| p.line > 0)));
    }
}

fn kind(api: &str, kind: &str, spec: &str) -> String {
    let spec = spec.replace('\n', "\n  ");
    format!("apiVersion: {api}\nkind: {kind}\nmetadata: {{name: x, namespace: shop}}\nspec:\n  {spec}\n")
}

fn virtual_service(spec: &str, error: &str) {
    check(&kind("networking.istio.io/v1", "VirtualService", spec), error);
}

#[test]
fn hosts_overlap_as_their_patterns_do() {
    use super::rules::Patterns;
    use types::HostPattern;
    let names = ["*", "*.com", "*.a.com", "a.com", "b.a.com", "xa.com", "com", "*.m", "*.a.org", "b"];
    for one in names {
        let patterns = Patterns::of(&[one.to_owned()]);
        let one = HostPattern::parse(one).unwrap();
        for other in names.map(|other| HostPattern::parse(other).unwrap()) {
            assert_eq!(patterns.covering(&other).is_some(), one.covers(&other), "{one} covers {other}");
            assert_eq!(patterns.overlapping(&other).is_some(), one.overlaps(&other), "{one} overlaps {other}");
        }
    }
}

#[test]
fn what_is_written_twice_is_found_among_many() {
    let many = |entry: &dyn Fn(u32) -> String| (0..30_000).map(entry).collect::<Vec<_>>().join(",");
    let hosts = many(&|index| format!("h{index}.example"));
    virtual_service(
        &format!("hosts: [{hosts}, h7.example]\nhttp: [{{route: [{{destination: {{host: a}}}}]}}]"),
        "h7.example",
    );
    let ports = many(&|index| format!("{{name: p{index}, port: {}}}", index + 1));
    check(&kind("v1", "Service", &format!("ports: [{ports}, {{name: p7, port: 30001}}]")), "used twice");
}

#[test]
fn virtual_services() {
    let to = "route: [{destination: {host: reviews}}]";
    for (spec, error) in [
        (format!("hosts: [reviews]\nhttp: [{{{to}}}]"), ""),
        (format!("hosts: ['*']\ngateways: [gw]\nhttp: [{{{to}}}]"), ""),
        (format!("hosts: ['*']\nhttp: [{{{to}}}]"), "not allowed for sidecars"),
        (format!("hosts: [a.com, '*.com']\nhttp: [{{{to}}}]"), "overlaps"),
        (format!("gateways: [gw]\nhttp: [{{{to}}}]"), "at least one host"),
        ("hosts: [a]".to_owned(), "at least one of http"),
        (format!("http: [{{{to}}}]"), ""),
        ("http: [{delegate: {name: b}}]".to_owned(), "cannot delegate again"),
        ("hosts: [a]\nhttp: [{}]".to_owned(), "one of route, redirect"),
        (format!("hosts: [a]\nhttp: [{{redirect: {{uri: /x}}, {to}}}]"), "exclude each other"),
        ("hosts: [a]\nhttp: [{redirect: {}}]".to_owned(), "redirect says nothing"),
        ("hosts: [a]\nhttp: [{redirect: {uri: /x, redirectCode: 305}}]".to_owned(), "not a redirect"),
        (
            "hosts: [a]\nhttp: [{redirect: {uri: /x}, fault: {abort: {httpStatus: 500}}}]".to_owned(),
            "cannot stand beside",
        ),
        ("hosts: [a]\nhttp: [{directResponse: {status: 100}}]".to_owned(), "not between 200"),
        ("hosts: [a]\nhttp: [{route: [{destination: {host: a}, weight: -1}]}]".to_owned(), "negative"),
        ("hosts: [a]\nhttp: [{route: [{destination: {host: a}}, {destination: {host: b}}]}]".to_owned(), "sum to 0"),
        (
            "hosts: [a]\nhttp: [{route: [{destination: {host: a}, weight: 1}, {destination: {host: b}, weight: 2}]}]"
                .to_owned(),
            "",
        ),
        (format!("hosts: [a]\nhttp: [{{timeout: 0s, {to}}}]"), "at least 1ms"),
        (format!("hosts: [a]\nhttp: [{{timeout: 5, {to}}}]"), "expected text, found the number 5"),
        (format!("hosts: [a]\nhttp: [{{timeout: 1500us, {to}}}]"), "whole number of milliseconds"),
        (format!("hosts: [a]\nhttp: [{{retries: {{attempts: 3, retryOn: '5xx,reset,503'}}, {to}}}]"), ""),
        (format!("hosts: [a]\nhttp: [{{retries: {{attempts: 3, retryOn: '5xx, reset'}}, {to}}}]"), "not a condition"),
        (format!("hosts: [a]\nhttp: [{{retries: {{attempts: 0, retryOn: 5xx}}, {to}}}]"), "disables retries"),
        (format!("hosts: [a]\nhttp: [{{match: [{{uri: {{regex: '('}}}}], {to}}}]"), "not a regular expression"),
        (format!("hosts: [a]\nhttp: [{{match: [{{uri: {{prefix: /, exact: /}}}}], {to}}}]"), "only one of"),
        (format!("hosts: [a]\nhttp: [{{match: [{{headers: {{x: {{prefix: ''}}}}}}], {to}}}]"), "prefix is empty"),
        (format!("hosts: [a]\nhttp: [{{match: [{{headers: {{x: {{}}, y:, z: {{regex: '*'}}}}}}], {to}}}]"), ""),
        (
            format!("hosts: [a]\nhttp: [{{match: [{{headers: {{'@request.auth.claims.g': {{exact: a}}}}}}], {to}}}]"),
            "gateways only",
        ),
        (
            format!(
                "hosts: [a]\ngateways: [g]\nhttp: [{{match: [{{headers: {{'@request.auth.claims.g': {{exact: a}}}}}}], {to}}}]"
            ),
            "",
        ),
        (format!("hosts: [a]\nhttp: [{{headers: {{request: {{set: {{':path': x}}}}}}, {to}}}]"), "cannot be changed"),
        (format!("hosts: [a]\nhttp: [{{headers: {{request: {{set: {{Host: x}}}}}}, {to}}}]"), ""),
        (format!("hosts: [a]\nhttp: [{{headers: {{response: {{remove: [Host]}}}}, {to}}}]"), "cannot be removed"),
        (
            format!("hosts: [a]\nhttp: [{{headers: {{request: {{set: {{x: \"a\\r\\nb: c\"}}}}}}, {to}}}]"),
            "control character",
        ),
        (format!("hosts: [a]\nhttp: [{{fault: {{}}, {to}}}]"), "needs delay or abort"),
        (
            format!("hosts: [a]\nhttp: [{{fault: {{delay: {{fixedDelay: 7s, percentage: {{value: 101}}}}}}, {to}}}]"),
            "between 0 and 100",
        ),
        (
            format!("hosts: [a]\nhttp: [{{fault: {{abort: {{grpcStatus: OOPS, percentage: {{value: 1}}}}}}, {to}}}]"),
            "gRPC status",
        ),
        (
            format!("hosts: [a]\nhttp: [{{fault: {{abort: {{httpStatus: 500, percentage: {{value: 0.5}}}}}}, {to}}}]"),
            "",
        ),
        (format!("hosts: [a]\nhttp: [{{corsPolicy: {{allowMethods: [FETCH]}}, {to}}}]"), "not an HTTP method"),
        (
            format!("hosts: [a]\nhttp: [{{mirror: {{host: b}}, mirrors: [{{destination: {{host: b}}}}], {to}}}]"),
            "exclude each other",
        ),
        (format!("hosts: [a.com]\ntls: [{{match: [{{sniHosts: [b.com]}}], {to}}}]"), "not covered"),
        (format!("hosts: [a.com]\ntls: [{{match: [{{sniHosts: [a.com]}}], {to}}}]"), ""),
        ("hosts: [a]\ntcp: [{}]".to_owned(), "at least one destination"),
        (format!("hosts: [a]\nexportTo: ['*', shop]\nhttp: [{{{to}}}]"), "must stand alone"),
        (format!("hosts: [a]\nexportTo: ['~']\nhttp: [{{{to}}}]"), "not allowed here"),
        (format!("hosts: [a]\nhttp: [{{{to}, destinaton: 1}}]"), "unknown field \"destinaton\""),
        (format!("hosts: a\nhttp: [{{{to}}}]"), "expected a list"),
    ] {
        virtual_service(&spec, error);
    }
    let shadowed = kind(
        "networking.istio.io/v1beta1",
        "VirtualService",
        &format!("hosts: [a]\nhttp:\n- {{{to}}}\n- {{match: [{{uri: {{prefix: /b}}}}], {to}}}"),
    );
    let documents = parse_documents("t.yaml", &shadowed);
    have_remedies(&documents);
    assert_eq!(documents.findings[0].code.as_ref(), "IST0130");
    assert_eq!(documents.findings[0].position.as_ref().unwrap().line, 8);
}

#[test]
fn destination_rules() {
    for (spec, error) in [
        ("host: reviews\nsubsets: [{name: v1, labels: {version: v1}}, {name: v2}]", ""),
        ("host: reviews\nsubsets: [{name: v1}, {name: v1}]", "defined twice"),
        ("host: ''\n", "host is missing"),
        ("host: a\ntrafficPolicy: {}", "trafficPolicy is empty"),
        ("host: a\ntrafficPolicy: {outlierDetection: {}}", ""),
        ("host: a\ntrafficPolicy: {connectionPool: {}}", "connectionPool is empty"),
        ("host: a\ntrafficPolicy: {portLevelSettings: [{port: {number: 80}}]}", "settings are empty"),
        ("host: a\ntrafficPolicy: {portLevelSettings: [{tls: {mode: DISABLE}}]}", "port is needed"),
        ("host: a\ntrafficPolicy: {loadBalancer: {simple: ROUND_ROBBIN}}", "is not one of"),
        ("host: a\ntrafficPolicy: {loadBalancer: {consistentHash: {httpCookie: {ttl: 0s}}}}", "no name"),
        (
            "host: a\ntrafficPolicy: {loadBalancer: {consistentHash: {useSourceIp: true, maglev: {tableSize: 100}}}}",
            "prime",
        ),
        ("host: a\ntrafficPolicy: {tls: {mode: MUTUAL}}", "MUTUAL needs"),
        ("host: a\ntrafficPolicy: {tls: {mode: ISTIO_MUTUAL, clientCertificate: /x}}", "own certificate"),
        (
            "host: a\ntrafficPolicy: {connectionPool: {tcp: {maxConnections: 1, connectTimeout: 30ms}, http: {http2MaxRequests: 1000}}}",
            "",
        ),
        (
            "host: a\ntrafficPolicy: {outlierDetection: {consecutive5xxErrors: 7, interval: 5m, baseEjectionTime: 15m}}",
            "",
        ),
        (
            "host: a\ntrafficPolicy: {loadBalancer: {localityLbSetting: {distribute: [{from: a/*, to: {b: 50}}]}}}",
            "sum to 100",
        ),
        ("host: a\nworkloadSelector: {matchLabels: {a: b}}\nexportTo: ['*']", "cannot be exported"),
    ] {
        check(&kind("networking.istio.io/v1alpha3", "DestinationRule", spec), error);
    }
}

#[test]
fn gateways() {
    let http = "port: {number: 80, name: http, protocol: HTTP}, hosts: ['*']";
    for (spec, error) in [
        (format!("selector: {{istio: ingressgateway}}\nservers: [{{{http}}}]"), ""),
        (format!("servers: [{{{http}, tls: {{httpsRedirect: true}}}}]"), ""),
        (format!("servers: [{{{http}, tls: {{mode: SIMPLE, credentialName: c}}}}]"), "only tls.httpsRedirect"),
        ("servers: []".to_owned(), "at least one server"),
        ("servers: [{port: {number: 443, name: s, protocol: HTTPS}, hosts: ['*']}]".to_owned(), "needs tls"),
        ("servers: [{port: {number: 443, name: s, protocol: HTTPS}, hosts: ['*'], tls: {mode: SIMPLE}}]".to_owned(), "needs a certificate"),
        ("servers: [{port: {number: 443, name: s, protocol: HTTPS}, hosts: ['a.com'], tls: {mode: SIMPLE, credentialName: c}}]".to_owned(), ""),
        ("servers: [{port: {number: 443, name: s, protocol: TLS}, hosts: ['a.com'], tls: {mode: PASSTHROUGH}}]".to_owned(), ""),
        ("servers: [{port: {number: 443, name: s, protocol: HTTPS}, hosts: ['a.com'], tls: {mode: ISTIO_MUTUAL, credentialName: c}}]".to_owned(), "own certificate"),
        ("servers: [{port: {number: 443, name: s, protocol: HTTPS}, hosts: ['a.com'], tls: {mode: SIMPLE, credentialName: c, minProtocolVersion: TLSV1_1}}]".to_owned(), "not supported"),
        ("servers: [{port: {number: 80, name: h, protocol: HTPP}, hosts: ['*']}]".to_owned(), "protocol \"HTPP\""),
        ("servers: [{port: {number: 80, name: h, protocol: HTTP}, hosts: [short]}]".to_owned(), "short host"),
        ("servers: [{port: {number: 70000, name: h, protocol: HTTP}, hosts: ['*']}]".to_owned(), "70000 is not between 0 and 65535"),
        (format!("servers: [{{{http}}}, {{{http}}}]"), "used twice"),
    ] {
        check(&kind("networking.istio.io/v1", "Gateway", &spec), error);
    }
}

#[test]
fn service_entries_and_sidecars() {
    let port = "ports: [{number: 80, name: http, protocol: HTTP}]";
    for (spec, error) in [
        (format!("hosts: [a.com]\nresolution: STATIC\nendpoints: [{{address: 10.0.0.1}}]\n{port}"), ""),
        (format!("hosts: [a.com]\nresolution: STATIC\nendpoints: [{{address: b.com}}]\n{port}"), "which STATIC needs"),
        (format!("hosts: [a.com]\nendpoints: [{{address: 10.0.0.1}}]\n{port}"), "takes no endpoints"),
        (format!("hosts: ['*']\n{port}"), "not allowed"),
        (format!("hosts: ['*.a.com']\nresolution: DNS\n{port}"), "cannot be resolved"),
        (format!("hosts: [a.com]\nresolution: DNS\naddresses: [10.0.0.0/8]\n{port}"), "CIDR"),
        ("hosts: [a.com]\nports: [{number: 80, name: a}, {number: 80, name: b}]".to_owned(), "listed twice"),
        ("hosts: [a.com]".to_owned(), "at least one port"),
        (
            format!(
                "hosts: [a.com]\nresolution: STATIC\nendpoints: [{{address: 10.0.0.1, ports: {{tcp: 1}}}}]\n{port}"
            ),
            "not among",
        ),
    ] {
        check(&kind("networking.istio.io/v1", "ServiceEntry", &spec), error);
    }
    for (spec, error) in [
        ("egress: [{hosts: ['./*', 'istio-system/*']}]", ""),
        ("egress: [{hosts: ['reviews']}]", "namespace/host"),
        ("egress: [{hosts: []}]", "at least one host"),
        ("outboundTrafficPolicy: {mode: REGISTRY_ONLY}", ""),
        ("workloadSelector: {labels: {a: b}}", "says nothing"),
        // A security kind's field that is not built is refused.
        ("ingress: [{port: {number: 80, protocol: HTTP, name: h}}]", ""),
        ("ingress: [{port: {number: 80, protocol: HTTP, name: h}, bind: 10.0.0.1}]", "not yet effective"),
    ] {
        check(&kind("networking.istio.io/v1", "Sidecar", spec), error);
    }
}

#[test]
fn security_kinds() {
    for (spec, error) in [
        ("mtls: {mode: STRICT}", ""),
        ("mtls: {mode: STRICTT}", "is not one of UNSET, DISABLE, PERMISSIVE, STRICT"),
        ("selector: {matchLabels: {app: a}}\nportLevelMtls: {8080: {mode: DISABLE}}", ""),
        ("portLevelMtls: {8080: {mode: DISABLE}}", "needs a selector"),
        ("selector: {matchLabels: {app: a}}\nportLevelMtls: {0: {mode: DISABLE}}", "between 1 and 65535"),
        ("selector: {matchLabels: {app: a}}\nportLevelMtls: {http: {mode: DISABLE}}", "not a port"),
    ] {
        check(&kind("security.istio.io/v1", "PeerAuthentication", spec), error);
    }
    for (spec, error) in [
        ("jwtRules: [{issuer: a, jwks: '{\"keys\": [{\"kty\": \"RSA\", \"n\": \"x\", \"e\": \"AQAB\"}]}'}]", ""),
        ("jwtRules: [{issuer: a, jwks: '{}'}]", "needs a list"),
        ("jwtRules: [{issuer: a, jwks: 'x'}]", "not JSON"),
        ("jwtRules: [{issuer: a, jwks: '{\"keys\": [{\"kty\": \"EC\", \"x\": \"x\"}]}'}]", "lacks `crv`"),
        ("jwtRules: [{}]", "issuer is needed"),
        ("jwtRules: [{issuer: a, jwksUri: 'ftp://x'}]", "http or https"),
        ("jwtRules: [{issuer: a, jwksUri: 'https://x/y'}]", ""),
        ("targetRefs: [{kind: Gateway, name: g}]", "not yet effective"),
    ] {
        check(&kind("security.istio.io/v1beta1", "RequestAuthentication", spec), error);
    }
    for (spec, error) in [
        ("{}", ""),
        ("rules: [{}]", ""),
        ("action: DENY\nrules: [{to: [{operation: {paths: [/admin*], ports: ['8080']}}]}]", ""),
        ("action: DENY", "needs rules"),
        ("action: CUSTOM\nrules: [{}]", "needs a provider"),
        ("action: DENY\nprovider: {name: x}\nrules: [{}]", "takes no provider"),
        ("action: CUSTOM\nprovider: {name: x}\nrules: [{from: [{source: {principals: ['*']}}]}]", "not known yet"),
        ("rules: [{from: []}]", "would match everything"),
        ("rules: [{from: [{source: {}}]}]", "says nothing"),
        ("rules: [{from: [{source: {principals: []}}]}]", "would not restrict"),
        ("rules: [{from: [{source: {principals: ['']}}]}]", "value is empty"),
        ("rules: [{from: [{source: {ipBlocks: [10.0.0.0/33]}}]}]", "CIDR"),
        ("rules: [{from: [{source: {serviceAccounts: [a/b/c]}}]}]", "not of the form"),
        ("rules: [{from: [{source: {serviceAccounts: [a], namespaces: [b]}}]}]", "cannot stand beside"),
        ("rules: [{to: [{operation: {ports: ['80x']}}]}]", "not a port"),
        ("rules: [{to: [{operation: {ports: [80]}}]}]", "expected text, found the number 80"),
        ("rules: [{to: [{operation: {paths: ['/a/{*}/b/{**}']}}]}]", ""),
        ("rules: [{to: [{operation: {paths: ['/a/{**}/{*}']}}]}]", "last operator"),
        ("rules: [{to: [{operation: {paths: ['/a/{x}']}}]}]", "whole operator"),
        ("rules: [{to: [{operation: {methods: ['a*b']}}]}]", "only at its beginning"),
        ("rules: [{when: [{key: 'request.headers[x]', values: [a]}]}]", ""),
        ("rules: [{when: [{key: 'request.header[x]', values: [a]}]}]", "not known"),
        ("rules: [{when: [{key: source.ip}]}]", "values or notValues"),
        ("rules: [{from: [{source: {principal: [a]}}]}]", "unknown field \"principal\""),
        ("rules: [null]", "list entry is empty"),
        ("action: denyy\nrules: [{}]", "is not one of"),
    ] {
        let text = kind("security.istio.io/v1", "AuthorizationPolicy", spec);
        check(&text, error);
    }
}

#[test]
fn denials_by_fields_of_http_alone_are_told_to_widen_on_tcp() {
    for (spec, expect) in [
        ("action: DENY\nrules: [{to: [{operation: {paths: [/admin*]}}]}]", true),
        ("action: DENY\nrules: [{to: [{operation: {notMethods: [GET]}}]}]", true),
        ("action: DENY\nrules: [{from: [{source: {notRequestPrincipals: ['*']}}]}]", true),
        ("action: DENY\nrules: [{when: [{key: 'request.headers[x]', values: [a]}]}]", true),
        (
            "action: DENY\nrules: [{to: [{operation: {hosts: [a], ports: ['80']}}, {operation: {methods: [PUT]}}]}]",
            true,
        ),
        ("action: DENY\nrules: [{to: [{operation: {paths: [/admin*], ports: ['80']}}]}]", false),
        (
            "action: DENY\nrules: [{to: [{operation: {paths: [/a]}}], when: [{key: destination.port, values: ['80']}]}]",
            false,
        ),
        ("action: DENY\nrules: [{from: [{source: {principals: ['*']}}]}]", false),
        ("action: DENY\nrules: [{}]", false),
        ("rules: [{to: [{operation: {paths: [/admin*]}}]}]", false),
    ] {
        let documents = parse_documents("t.yaml", &kind("security.istio.io/v1", "AuthorizationPolicy", spec));
        let warnings = messages(&documents, Severity::Warning);
        let is_told =
            warnings == ["spec.rules[0]: on TCP ports the HTTP fields are left out, so that the rule denies more"];
        assert_eq!(is_told, expect, "{spec}: {warnings:?}");
        assert!(is_told || warnings.is_empty(), "{spec}: {warnings:?}");
    }
}

#[test]
fn no_file_of_a_volume_leads_out_of_it() {
    let pod = |source: &str| kind("v1", "Pod", &format!("containers: [{{name: c}}]\nvolumes: [{{name: v, {source}}}]"));
    let projected = |source: &str| format!("projected: {{sources: [{source}]}}");
    for path in ["../x", "/x", "a/../../x"] {
        for (source, field) in [
            (format!("configMap: {{name: m, items: [{{key: k, path: {path}}}]}}"), "configMap.items[0].path"),
            (format!("secret: {{secretName: s, items: [{{key: k, path: {path}}}]}}"), "secret.items[0].path"),
            (
                format!("downwardAPI: {{items: [{{path: {path}, fieldRef: {{fieldPath: metadata.name}}}}]}}"),
                "downwardAPI.items[0].path",
            ),
            (
                projected(&format!("{{configMap: {{name: m, items: [{{key: k, path: {path}}}]}}}}")),
                "projected.sources[0].configMap.items[0].path",
            ),
            (
                projected(&format!("{{secret: {{name: s, items: [{{key: k, path: {path}}}]}}}}")),
                "projected.sources[0].secret.items[0].path",
            ),
            (
                projected(&format!(
                    "{{downwardAPI: {{items: [{{path: {path}, fieldRef: {{fieldPath: metadata.name}}}}]}}}}"
                )),
                "projected.sources[0].downwardAPI.items[0].path",
            ),
            (
                projected(&format!("{{serviceAccountToken: {{path: {path}}}}}")),
                "projected.sources[0].serviceAccountToken.path",
            ),
        ] {
            let text = pod(&source);
            check(&text, "is not a path below the volume");
            let fields: Vec<String> =
                parse_documents("t.yaml", &text).findings.iter().map(|finding| finding.field.to_string()).collect();
            assert_eq!(fields, [format!("spec.volumes[0].{field}")], "{source}");
            check(&text.replace(path, "a/x..y"), "");
        }
    }
    check(&pod("projected: {sources: [{serviceAccountToken: {audience: a}}]}"), "");
}

#[test]
fn a_list_holds_its_items_or_is_no_list() {
    let map = "{apiVersion: v1, kind: ConfigMap, metadata: {name: a}}";
    let list = |items: &str| parse_documents("t.yaml", &format!("apiVersion: v1\nkind: List\n{items}\n"));
    for (items, count) in [("items: []", 0), ("items:", 0), ("items: null", 0), (&*format!("items: [{map}, {map}]"), 2)]
    {
        let read = list(items);
        assert_eq!((read.objects.len(), read.findings.len(), read.is_incomplete), (count, 0, false), "{items}");
    }
    for (items, line) in [(&*format!("items: {map}"), 3), ("items: text", 3), (&*format!("item: [{map}]"), 1), ("", 1)]
    {
        let read = list(items);
        have_remedies(&read);
        assert!(read.is_incomplete && read.objects.is_empty(), "{items}");
        let finding = &read.findings[0];
        assert_eq!((&*finding.field, finding.position.as_ref().unwrap().line), ("items", line), "{items}");
    }
}

#[test]
fn an_object_is_known_only_where_nothing_that_names_it_is_wrong() {
    let map = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a, namespace: shop}\ndata: {k: [v]}\n";
    let read = |from: &str, to: &str| parse_documents("t.yaml", &map.replace(from, to));
    let known = read("", "");
    assert_eq!((known.refused.len(), known.is_incomplete), (1, false));
    assert_eq!(known.refused[0].object.to_string(), "ConfigMap shop/a");
    for (from, to) in [
        ("ConfigMap", "ConfigMpa"),
        ("apiVersion: v1", "apiVersion: v2"),
        ("kind: ConfigMap\n", ""),
        ("name: a", "nmae: a"),
        ("name: a", "name: A"),
        ("namespace: shop", "namespce: shop"),
        ("namespace: shop", "namespace: 7"),
        ("{name: a, namespace: shop}", "[a]"),
        ("{name: a,", "{name: a, labels: {a: 1},"),
    ] {
        let unknown = read(from, to);
        assert_eq!((unknown.refused.len(), unknown.is_incomplete), (0, true), "{to}");
    }
    // A kind of a group that nobody could have meant for one of ours hides no object, whatever its name.
    for (api_version, kind, is_incomplete) in [
        ("monitoring.coreos.com/v1", "ServiceMonitor", false),
        ("serving.knative.dev/v1", "Service", false),
        ("apps/v1", "Deploy", true),
        ("app/v1", "Deployment", true),
        ("security.istio.io/v1", "CronJob", true),
        ("security.istio.io/v1", "Foo", true),
    ] {
        let text = format!("apiVersion: {api_version}\nkind: {kind}\nmetadata: {{name: a}}\n");
        let read = parse_documents("t.yaml", &text);
        let found = (read.refused.len(), read.is_incomplete, read.findings.len());
        assert_eq!(found, (0, is_incomplete, 1), "{api_version} {kind}");
    }
}

#[test]
fn kubernetes_kinds() {
    let deployment = |pod: &str| {
        kind(
            "apps/v1",
            "Deployment",
            &format!(
                "selector: {{matchLabels: {{app: a}}}}\ntemplate:\n  metadata: {{labels: {{app: a}}}}\n  spec: {pod}"
            ),
        )
    };
    for (text, error) in [
        (deployment("{containers: [{name: c, image: i, ports: [{containerPort: 80}]}]}"), ""),
        (deployment("{containers: []}"), "at least one container"),
        (deployment("{containers: [{name: c}, {name: c}]}"), "defined twice"),
        (deployment("{containers: [{name: c, env: [{name: A, value: 1}]}]}"), "expected text, found the number 1"),
        (deployment("{containers: [{name: c, env: [{name: A, value: on}]}]}"), "found the boolean on"),
        (deployment("{containers: [{name: c, env: [{name: A, valueFrom: {}}]}]}"), "exactly one source"),
        (deployment("{containers: [{name: c, volumeMounts: [{name: v, mountPath: /v}]}]}"), "not defined"),
        // as the API server has it: it fails when it is asked
        (deployment("{containers: [{name: c, readinessProbe: {httpGet: {port: web}}}]}"), ""),
        (deployment("{containers: [{name: c, readinessProbe: {}}]}"), "exactly one of"),
        (
            deployment(
                "{containers: [{name: c, securityContext: {runAsUser: 1}, resources: {limits: {cpu: 1}}}], affinity: {}}",
            ),
            "",
        ),
        (deployment("{containers: [{name: c, comand: [x]}]}"), "unknown field \"comand\""),
        (deployment("{containers: [{name: c}], ephemeralContainers: []}"), ""),
        (
            kind(
                "apps/v1",
                "Deployment",
                "selector: {matchLabels: {app: b}}\ntemplate: {metadata: {labels: {app: a}}, spec: {containers: [{name: c}]}}",
            ),
            "do not match",
        ),
        (kind("v1", "Service", "selector: {app: a}\nports: [{port: 80, name: http, targetPort: web}]"), ""),
        (kind("v1", "Service", "ports: [{port: 80}, {port: 81}]"), "need names"),
        (kind("v1", "Service", "clusterIP: None\nselector: {app: a}"), ""),
        (kind("v1", "Service", "ports: [{port: 80, protocol: HTTP}]"), "is not TCP, UDP"),
        (
            "apiVersion: v1\nkind: Secret\nmetadata: {name: s}\ntype: kubernetes.io/tls\ndata: {tls.crt: YQ==}"
                .to_owned(),
            "needs tls.key",
        ),
        ("apiVersion: v1\nkind: Secret\nmetadata: {name: s}\ndata: {a: 'no base64!'}".to_owned(), "not base64"),
        ("apiVersion: v1\nkind: Secret\nmetadata: {name: s}\nstringData: {a: plain}".to_owned(), ""),
        (
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: s}\ndata: {a: \"1\", b: |\n  x\n}".to_owned(),
            "not valid YAML",
        ),
        ("apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {istio-injection: enabled}}".to_owned(), ""),
        ("apiVersion: v1\nkind: Namespace\nmetadata: {name: Shop}".to_owned(), "not a name"),
        (
            "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {version: 1.10}}".to_owned(),
            "the number 1.10",
        ),
    ] {
        if error == "not valid YAML" {
            let documents = parse_documents("t.yaml", &text);
            assert!(documents.is_incomplete && documents.has_errors());
            have_remedies(&documents);
        } else {
            check(&text, error);
        }
    }
}

#[test]
fn mesh_settings() {
    for (spec, error) in [
        (
            "profile: demo\nmeshConfig: {accessLogFile: /dev/stdout, enableAutoMtls: true, outboundTrafficPolicy: {mode: REGISTRY_ONLY}}",
            "",
        ),
        (
            "meshConfig: {extensionProviders: [{name: z, zipkin: {service: zipkin.istio-system.svc.cluster.local, port: 9411}}]}",
            "",
        ),
        (
            "meshConfig: {extensionProviders: [{name: a, envoyExtAuthzHttp: {service: a.b, port: 0}}]}",
            "between 1 and 65535",
        ),
        ("meshConfig: {trustDomain: Bad/Domain}", "trust domain"),
        ("meshConfig: {accesLogFile: x}", "unknown field \"accesLogFile\""),
        ("meshConfig: {defaultConfig: {tracing: {sampling: 1000}}}", "between 0 and 100"),
        ("meshConfig: {defaultConfig: {proxyHeaders: {server: {value: my proxy/1.0}}}}", ""),
        (
            "meshConfig: {defaultConfig: {proxyHeaders: {server: {value: \"a\\r\\nset-cookie: b\"}}}}",
            "proxyHeaders.server.value: value holds a control character",
        ),
    ] {
        check(&kind("install.istio.io/v1alpha1", "IstioOperator", spec), error);
    }
    let of_pod = |server: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata:\n  name: x\n  annotations:\n    proxy.istio.io/config: |\n      proxyHeaders: {{server: {{value: \"{server}\"}}}}\nspec: {{containers: [{{name: c, image: i}}]}}\n"
        )
    };
    check(&of_pod("mine"), "");
    check(&of_pod("a\\r\\nb: c"), "server.value holds a control character");
}

#[test]
fn documents_and_kinds() {
    let text = "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Namespace, metadata: {name: a}}\n- {apiVersion: v1, kind: ServiceAccount, metadata: {name: b}}\n";
    let documents = parse_documents("t.yaml", text);
    let names: Vec<String> = documents.objects.iter().map(|o| o.object.reference().to_string()).collect();
    assert_eq!(names, ["Namespace a", "ServiceAccount default/b"]);
    assert_eq!(documents.objects[1].positions.at("metadata.name").to_string(), "t.yaml:5:53");

    for (text, code) in [
        ("kind: Pod", "IST0106"),
        ("apiVersion: v1\nkind: Pods\nmetadata: {name: a}", "LAT0002"),
        ("apiVersion: networking.istio.io/v9\nkind: Gateway\nmetadata: {name: a}", "LAT0002"),
        ("apiVersion: v1\nkind: Namespace\nmetadata: {}", "IST0106"),
        ("- a", "LAT0001"),
        ("apiVersion: apps/v1\nkind: StatefulSet\nmetadata: {name: a}\nspec: {whatever: 1}", "LAT0003"),
        (
            "apiVersion: networking.istio.io/v1alpha3\nkind: EnvoyFilter\nmetadata: {name: a}\nspec: {configPatches: []}",
            "LAT0003",
        ),
    ] {
        let documents = parse_documents("t.yaml", text);
        assert_eq!(documents.findings[0].code.as_ref(), code, "{text}: {:?}", documents.findings);
        have_remedies(&documents);
    }
}

#[test]
fn settings_need_no_name() {
    for text in [
        "apiVersion: install.istio.io/v1alpha1\nkind: IstioOperator\nspec: {meshConfig: {accessLogFile: /dev/stdout}}\n",
        "apiVersion: install.istio.io/v1alpha1\nkind: IstioOperator\nmetadata: {name: ''}\nspec: {}\n",
    ] {
        let documents = parse_documents("t.yaml", text);
        assert!(documents.findings.is_empty(), "{:?}", documents.findings);
        let object = &documents.objects[0].object;
        assert_eq!(object.reference().to_string(), "IstioOperator default/installed-state");
        assert_eq!(crate::from_json(&object.raw).0.unwrap().reference(), object.reference(), "so it is kept");
    }
}

#[test]
fn a_finding_names_file_line_object_field_and_remedy() {
    let text = "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata:\n  name: reviews\nspec:\n  hosts:\n  - reviews\n  http:\n  - route:\n    - destination:\n        host: reviews\n      wieght: 90\n";
    let documents = parse_documents("shop.yaml", text);
    assert_eq!(
        documents.findings[0].to_string(),
        "shop.yaml:12:7: VirtualService default/reviews: spec.http[0].route[0].wieght: unknown field \"wieght\" [LAT0004] (did you mean \"weight\"?)"
    );
}

#[test]
fn json_takes_the_same_path() {
    let value = serde_json::json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"}, "spec": {"ports": [{"port": 80}]}});
    let (object, findings) = crate::from_json(&value);
    let object = object.unwrap();
    assert!(findings.is_empty());
    assert_eq!(object.raw["metadata"]["namespace"], "default");
    assert_eq!(object.typed::<crate::k8s::Service>().unwrap().spec.ports[0].port, 80);
    let (object, findings) = crate::from_json(
        &serde_json::json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"}, "spec": {"ports": "x"}}),
    );
    assert!(object.is_none() && findings[0].message.contains("expected a list"));
}

#[test]
fn sets_and_changes() {
    use std::sync::Arc;

    use crate::{Change, ConfigSet};
    let parse = |text: &str| parse_documents("t", text).objects.into_iter().map(|o| o.object).collect::<Vec<_>>();
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: NAME, namespace: NS}\nspec: {ports: [{port: 80}]}\n";
    let of = |ns: &str, name: &str| service.replace("NAME", name).replace("NS", ns);
    let before = ConfigSet::new(parse(&format!("{}---\n{}---\n{}", of("b", "x"), of("a", "w"), of("a", "x"))));
    let names: Vec<String> = before.all::<crate::k8s::Service>().map(|(o, _)| o.key().to_string()).collect();
    assert_eq!(names, ["a/w", "a/x", "b/x"]);
    assert_eq!(before.in_namespace::<crate::k8s::Service>("a").count(), 2);
    assert!(before.get::<crate::k8s::Service>("b", "x").is_some());
    let after = ConfigSet::new(parse(&format!("{}---\n{}", of("a", "x"), of("c", "z"))));
    let mut applied = before.clone();
    for gone in ["a/w", "b/x"] {
        let (namespace, name) = gone.split_once('/').unwrap();
        let object = before.get::<crate::k8s::Service>(namespace, name).unwrap().0;
        applied.apply(&Change::Delete(object.reference()));
    }
    applied.apply(&Change::Upsert(Arc::clone(after.get::<crate::k8s::Service>("c", "z").unwrap().0)));
    assert_eq!(applied, after);
}

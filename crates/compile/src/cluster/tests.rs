//! TLS towards servers outside: credentials, and the mesh's defaults.

use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{
    UpstreamTlsContext, common_tls_context::ValidationContextType,
};
use prost::Message as _;

use crate::security::test_mesh;
use crate::view::{ProxyKind, View};

const BANK: &str = "
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: bank, namespace: istio-system}
spec:
  hosts: [bank.example]
  ports: [{number: 443, name: https, protocol: HTTPS}]
  resolution: STATIC
  endpoints: [{address: 192.0.2.1}]
---
";

fn rule(namespace: &str, rest: &str, tls: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: bank, namespace: {namespace}}}\nspec: {{host: bank.example{rest}, trafficPolicy: {{tls: {{{tls}}}}}}}\n---\n"
    )
}

fn secret(namespace: &str, name: &str) -> String {
    let block = |key: &str, label: &str| {
        format!("  {key}: |\n    -----BEGIN {label}-----\n    AA==\n    -----END {label}-----\n")
    };
    let data = [block("tls.crt", "CERTIFICATE"), block("tls.key", "PRIVATE KEY"), block("ca.crt", "CERTIFICATE")];
    format!(
        "apiVersion: v1\nkind: Secret\nmetadata: {{name: {name}, namespace: {namespace}}}\nstringData:\n{}---\n",
        data.concat()
    )
}

/// How the bank is called; the secrets that are sent along; what is said.
struct Told {
    tls: Option<UpstreamTlsContext>,
    secrets: Vec<String>,
    findings: Vec<String>,
}

impl Told {
    /// `certificates roots`
    fn names(&self) -> String {
        let Some(common) = self.tls.as_ref().and_then(|tls| tls.common_tls_context.as_ref()) else {
            return "plaintext".into();
        };
        let certificates: Vec<&str> =
            common.tls_certificate_sds_secret_configs.iter().map(|secret| secret.name.as_str()).collect();
        let roots = match &common.validation_context_type {
            Some(ValidationContextType::CombinedValidationContext(combined)) => {
                combined.validation_context_sds_secret_config.as_ref().map_or("", |secret| &secret.name)
            }
            Some(ValidationContextType::ValidationContextSdsSecretConfig(secret)) => &secret.name,
            _ => "",
        };
        format!("{} {roots}", certificates.join(","))
    }
}

fn told(yaml: &str, view: &View) -> Told {
    let compiled = crate::compile(&test_mesh::snapshot(&format!("{BANK}{yaml}")), view);
    let cluster = compiled.clusters.iter().find(|cluster| cluster.name == "outbound|443||bank.example").unwrap();
    let socket = cluster.transport_socket.as_ref().and_then(|socket| socket.config_type.as_ref());
    let any = socket.map(|config| match config {
        envoy_types::pb::envoy::config::core::v3::transport_socket::ConfigType::TypedConfig(any) => any,
    });
    Told {
        tls: any.map(|any| UpstreamTlsContext::decode(any.value.as_slice()).unwrap()),
        secrets: compiled.secrets.into_iter().map(|secret| secret.name).collect(),
        findings: compiled.findings.iter().map(ToString::to_string).collect(),
    }
}

#[test]
fn a_gateways_calls_take_the_credential_of_its_own_namespace() {
    let gateway = test_mesh::view(ProxyKind::Router, "istio-system", &["istio=egressgateway"]);
    for (mode, names, secrets) in [
        ("MUTUAL", "kubernetes://c kubernetes://c-cacert", &["kubernetes://c", "kubernetes://c-cacert"][..]),
        ("SIMPLE", " kubernetes://c-cacert", &["kubernetes://c-cacert"]),
    ] {
        let rule = rule("istio-system", "", &format!("mode: {mode}, credentialName: c"));
        let told = told(&(rule + &secret("istio-system", "c")), &gateway);
        assert_eq!(told.names(), names, "{mode}");
        assert_eq!(told.secrets, secrets, "{mode}");
        assert_eq!(told.findings, Vec::<String>::new());
    }
    let missing = rule("istio-system", "", "mode: MUTUAL, credentialName: c") + &secret("shop", "c");
    let told = told(&missing, &gateway);
    assert_eq!(told.secrets, Vec::<String>::new());
    assert!(told.findings.iter().any(|it| it.contains("there is no Secret istio-system/c")), "{:?}", told.findings);
}

#[test]
fn a_sidecar_takes_a_credential_from_a_rule_that_selects_it() {
    let tls = "mode: MUTUAL, credentialName: c";
    let sidecar = test_mesh::view(ProxyKind::Sidecar, "shop", &["app=web"]);
    let selected = rule("shop", ", workloadSelector: {matchLabels: {app: web}}", tls) + &secret("shop", "c");
    let first = told(&selected, &sidecar);
    assert_eq!(first.names(), "kubernetes://c kubernetes://c-cacert");
    assert_eq!(first.secrets, ["kubernetes://c", "kubernetes://c-cacert"]);
    // Another workload is not selected, and gets no secret.
    let other = told(&selected, &test_mesh::view(ProxyKind::Sidecar, "shop", &["app=other"]));
    assert_eq!((other.names().as_str(), other.secrets.len()), ("plaintext", 0));
    // Without a selector it has no effect on sidecars, as in Istio, and that is told.
    let unselected = told(&(rule("shop", "", tls) + &secret("shop", "c")), &sidecar);
    assert_eq!((unselected.names().as_str(), unselected.secrets.len()), ("plaintext", 0));
    assert!(unselected.findings.iter().any(|it| it.contains("without workloadSelector")), "{:?}", unselected.findings);
}

#[test]
fn defaults_of_the_mesh_hold_for_calls_outside_but_for_the_least_version() {
    let defaults = "apiVersion: install.istio.io/v1alpha1
kind: IstioOperator
metadata: {name: mesh, namespace: istio-system}
spec:
  meshConfig:
    tlsDefaults: {minProtocolVersion: TLSV1_3, cipherSuites: [ECDHE-RSA-AES256-GCM-SHA384], ecdhCurves: [P-384]}
---
";
    let sidecar = test_mesh::view(ProxyKind::Sidecar, "shop", &[]);
    let bounds = |tls: &str| {
        let told = told(&(defaults.to_owned() + &rule("shop", "", tls)), &sidecar);
        let common = told.tls.unwrap().common_tls_context.unwrap();
        let params = common.tls_params.unwrap();
        (params.tls_minimum_protocol_version().as_str_name(), params.cipher_suites, params.ecdh_curves)
    };
    let (outside, inside) = (bounds("mode: SIMPLE"), bounds("mode: ISTIO_MUTUAL"));
    assert_eq!(outside, ("TLSv1_2", vec!["ECDHE-RSA-AES256-GCM-SHA384".into()], vec!["P-384".into()]));
    assert_eq!(inside, ("TLSv1_2", Vec::<String>::new(), Vec::<String>::new()));
}

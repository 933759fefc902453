//! Two proxies and mutual TLS between them.

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::listener::v3 as listener;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as tls;
use envoy_types::pb::envoy::r#type::matcher::v3 as matcher;
use prost::Message as _;

use super::bed;

fn inline(text: &str) -> core::DataSource {
    core::DataSource { specifier: Some(core::data_source::Specifier::InlineString(text.into())), ..Default::default() }
}

pub(super) struct Authority {
    certificate: rcgen::Certificate,
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
}

impl Authority {
    pub(super) fn new() -> Self {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
        let certificate = params.self_signed(&key).unwrap();
        Self { certificate, issuer: rcgen::Issuer::new(params, key) }
    }

    /// Certificate, key and roots of a workload.
    fn issue(&self, id: &str) -> (tls::TlsCertificate, tls::CertificateValidationContext) {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::default();
        params.subject_alt_names = vec![rcgen::SanType::URI(id.try_into().unwrap())];
        let leaf = params.signed_by(&key, &self.issuer).unwrap();
        let certificate = tls::TlsCertificate {
            certificate_chain: Some(inline(&leaf.pem())),
            private_key: Some(inline(&key.serialize_pem())),
            ..Default::default()
        };
        let validation = tls::CertificateValidationContext {
            trusted_ca: Some(inline(&self.certificate.pem())),
            ..Default::default()
        };
        (certificate, validation)
    }
}

fn socket(name: &str, value: Vec<u8>) -> core::TransportSocket {
    let type_url = format!("type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.{name}");
    core::TransportSocket {
        name: "envoy.transport_sockets.tls".into(),
        config_type: Some(core::transport_socket::ConfigType::TypedConfig(envoy_types::pb::google::protobuf::Any {
            type_url,
            value,
        })),
    }
}

pub(super) fn inbound(authority: &Authority, filter: listener::Filter) -> listener::Listener {
    let (certificate, validation) = authority.issue("spiffe://cluster.local/ns/shop/sa/server");
    let context = tls::DownstreamTlsContext {
        common_tls_context: Some(tls::CommonTlsContext {
            tls_certificates: vec![certificate],
            alpn_protocols: vec!["h2".into(), "http/1.1".into()],
            validation_context_type: Some(tls::common_tls_context::ValidationContextType::ValidationContext(
                validation,
            )),
            ..Default::default()
        }),
        require_client_certificate: Some(envoy_types::pb::google::protobuf::BoolValue { value: true }),
        ..Default::default()
    };
    let mut made = bed::listener("tls", filter);
    made.filter_chains[0].transport_socket = Some(socket("DownstreamTlsContext", context.encode_to_vec()));
    made
}

fn outbound(
    authority: &Authority,
    at: std::net::SocketAddr,
    wanted: &str,
    http2: bool,
) -> envoy_types::pb::envoy::config::cluster::v3::Cluster {
    let (certificate, mut validation) = authority.issue("spiffe://cluster.local/ns/shop/sa/client");
    validation.match_typed_subject_alt_names = vec![tls::SubjectAltNameMatcher {
        san_type: tls::subject_alt_name_matcher::SanType::Uri.into(),
        matcher: Some(matcher::StringMatcher {
            match_pattern: Some(matcher::string_matcher::MatchPattern::Exact(wanted.into())),
            ..Default::default()
        }),
        ..Default::default()
    }];
    let context = tls::UpstreamTlsContext {
        sni: "outbound_.80_._.server.shop.svc.cluster.local".into(),
        common_tls_context: Some(tls::CommonTlsContext {
            tls_certificates: vec![certificate],
            alpn_protocols: vec![if http2 { "h2" } else { "http/1.1" }.into()],
            validation_context_type: Some(tls::common_tls_context::ValidationContextType::ValidationContext(
                validation,
            )),
            ..Default::default()
        }),
        ..Default::default()
    };
    let mut made = bed::cluster("peer", at, http2);
    made.transport_socket = Some(socket("UpstreamTlsContext", context.encode_to_vec()));
    made
}

const REQUEST: &[u8] = b"GET /x HTTP/1.1\r\nHost: server.shop\r\nConnection: close\r\n\r\n";

async fn call(authority: &Authority, other: &Authority, wanted: &str, http2: bool) -> String {
    let app = bed::echo_heads().await;
    let manager = bed::manager(vec![bed::to_cluster("/", "app")]);
    let inbound = inbound(authority, bed::http_filter(&manager));
    let server = Box::pin(bed::start(vec![inbound], vec![bed::cluster("app", app, false)])).await;
    let manager = bed::manager(vec![bed::to_cluster("/", "peer")]);
    let cluster = outbound(other, server.at("tls"), wanted, http2);
    let client = Box::pin(bed::start(vec![bed::listener("out", bed::http_filter(&manager))], vec![cluster])).await;
    let answer = Box::pin(bed::talk(client.at("out"), REQUEST, |_| false)).await;
    client.end().await;
    server.end().await;
    answer
}

#[tokio::test]
async fn mutual_tls_carries_both_protocols() {
    let authority = Authority::new();
    for http2 in [false, true] {
        let answer = call(&authority, &authority, "spiffe://cluster.local/ns/shop/sa/server", http2).await;
        assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains("GET /x HTTP/1.1"), "{answer}");
    }
}

#[tokio::test]
async fn the_wrong_peer_is_refused_by_name_and_by_root() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    for (other, wanted) in [
        (&authority, "spiffe://cluster.local/ns/shop/sa/somebody"),
        (&stranger, "spiffe://cluster.local/ns/shop/sa/server"),
    ] {
        let answer = call(&authority, other, wanted, false).await;
        // why stands in the log alone
        assert!(answer.starts_with("HTTP/1.1 503 ") && answer.ends_with("remote connection failure"), "{answer}");
    }
}

#[tokio::test]
async fn plaintext_does_not_pass_a_chain_with_tls() {
    let authority = Authority::new();
    let app = bed::echo_heads().await;
    let manager = bed::manager(vec![bed::to_cluster("/", "app")]);
    let inbound = inbound(&authority, bed::http_filter(&manager));
    let server = Box::pin(bed::start(vec![inbound], vec![bed::cluster("app", app, false)])).await;
    let answer = Box::pin(bed::talk(server.at("tls"), REQUEST, |_| false)).await;
    assert!(!answer.contains("HTTP/1.1"), "{answer}");
    server.end().await;
}

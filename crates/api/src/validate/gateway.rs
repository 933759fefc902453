//! Gateway.

use std::collections::BTreeSet;

use super::virtual_service::labels;
use super::{Check, rules};
use crate::networking::{Gateway, Server, ServerTlsMode, ServerTlsSettings, TlsProtocol};

pub(super) fn check(check: &mut Check<'_>, spec: &Gateway) {
    if spec.servers.is_empty() {
        check.error("spec.servers", "at least one server is needed", "list ports and hosts under servers");
    }
    labels(check, "spec.selector", &spec.selector);
    if spec.selector.is_empty() {
        check.warn(
            "spec.selector",
            "an empty selector selects every gateway",
            "name the gateway's labels, such as istio: ingressgateway",
        );
    }
    let mut names = BTreeSet::new();
    for (index, server) in spec.servers.iter().enumerate() {
        let at = format!("spec.servers[{index}]");
        self::server(check, &at, server);
        if let Some(port) = &server.port
            && !port.name.is_empty()
            && !names.insert(&port.name)
        {
            check.error(
                &format!("{at}.port.name"),
                format!("port name {:?} is used twice", port.name),
                "port names must be unique",
            );
        }
    }
}

fn server(check: &mut Check<'_>, at: &str, server: &Server) {
    if server.hosts.is_empty() {
        check.error(&format!("{at}.hosts"), "at least one host is needed", "write `*` for all");
    }
    for (index, host) in server.hosts.iter().enumerate() {
        let field = format!("{at}.hosts[{index}]");
        let name = match host.split_once('/') {
            None => host.as_str(),
            Some((namespace, name)) => {
                if !(namespace == "*" || namespace == "." || rules::is_dns_label(namespace)) {
                    check.error(
                        &field,
                        format!("{namespace:?} is not a namespace"),
                        "write `*`, `.`, or a namespace's name",
                    );
                }
                name
            }
        };
        rules::full_host(check, &field, name);
    }
    check.unbuilt_if(!server.default_endpoint.is_empty(), format!("{at}.defaultEndpoint"));
    let Some(port) = &server.port else {
        check.error(&format!("{at}.port"), "port is needed", "write port: {number: 80, name: http, protocol: HTTP}");
        return;
    };
    if server.bind.starts_with("unix://") {
        if port.number != 0 {
            check.error(&format!("{at}.port.number"), "a Unix socket has no port", "write 0");
        }
        check.unbuilt(&format!("{at}.bind"));
    } else {
        rules::port_number(check, &format!("{at}.port.number"), port.number);
        if !server.bind.is_empty() && server.bind.parse::<std::net::IpAddr>().is_err() {
            check.error(
                &format!("{at}.bind"),
                format!("{:?} is not an address", server.bind),
                "write an IP address, or leave it out",
            );
        }
    }
    if port.name.is_empty() {
        check.error(&format!("{at}.port.name"), "port has no name", "give it a name, such as `http`");
    }
    if port.target_port != 0 {
        check.error(
            &format!("{at}.port.targetPort"),
            "targetPort is not allowed here",
            "the gateway's Service sets it",
        );
    }
    rules::protocol(check, &format!("{at}.port.protocol"), &port.protocol);
    let at_tls = format!("{at}.tls");
    match port.protocol.to_ascii_uppercase().as_str() {
        "HTTPS" | "TLS" => match &server.tls {
            None => {
                check.error(
                    &at_tls,
                    format!("protocol {} needs tls", port.protocol),
                    "set tls.mode and credentialName",
                );
            }
            Some(tls) => self::tls(check, &at_tls, tls),
        },
        "HTTP" | "HTTP2" | "GRPC" | "GRPC-WEB" => {
            if let Some(tls) = &server.tls {
                let redirect_only =
                    ServerTlsSettings { https_redirect: tls.https_redirect, ..ServerTlsSettings::default() };
                if *tls != redirect_only {
                    check.error(
                        &at_tls,
                        format!("protocol {} may carry only tls.httpsRedirect", port.protocol),
                        "use HTTPS to terminate TLS",
                    );
                }
            }
        }
        _ => {
            if server.tls.is_some() {
                check.error(&at_tls, format!("protocol {} does not take tls", port.protocol), "use TLS or HTTPS");
            }
        }
    }
    if matches!(port.protocol.to_ascii_uppercase().as_str(), "HTTPS" | "TLS")
        && server.tls.as_ref().is_some_and(|tls| tls.https_redirect)
    {
        check.warn(
            &format!("{at_tls}.httpsRedirect"),
            "httpsRedirect does nothing on a TLS port",
            "set it on the HTTP port",
        );
    }
}

pub(super) fn tls(check: &mut Check<'_>, at: &str, tls: &ServerTlsSettings) {
    let has_files = !tls.server_certificate.is_empty() || !tls.private_key.is_empty();
    let sources = [
        has_files,
        !tls.credential_name.is_empty(),
        !tls.credential_names.is_empty(),
        !tls.tls_certificates.is_empty(),
    ];
    let set = sources.iter().filter(|set| **set).count();
    if set > 1 {
        check.error(at, "only one source of certificates may be set", "keep credentialName, or the files");
    }
    let has_certificate_field = set > 0 || !tls.ca_certificates.is_empty() || !tls.ca_cert_credential_name.is_empty();
    match tls.mode {
        ServerTlsMode::IstioMutual if has_certificate_field => {
            check.error(at, "ISTIO_MUTUAL uses the gateway's own certificate", "remove the certificate fields");
        }
        ServerTlsMode::Passthrough | ServerTlsMode::AutoPassthrough if has_certificate_field => {
            check.warn(at, "certificates have no effect: TLS is passed through", "set mode SIMPLE to terminate it");
        }
        ServerTlsMode::Simple | ServerTlsMode::Mutual | ServerTlsMode::OptionalMutual => {
            if set == 0 {
                check.error(
                    at,
                    format!("mode {} needs a certificate", tls.mode),
                    "set credentialName, or serverCertificate and privateKey",
                );
            }
            if has_files && (tls.server_certificate.is_empty() || tls.private_key.is_empty()) {
                check.error(at, "serverCertificate and privateKey go together", "set both");
            }
            let needs_ca = matches!(tls.mode, ServerTlsMode::Mutual | ServerTlsMode::OptionalMutual);
            if needs_ca && has_files && tls.ca_certificates.is_empty() && tls.ca_cert_credential_name.is_empty() {
                check.error(
                    &format!("{at}.caCertificates"),
                    format!("mode {} needs a CA for clients", tls.mode),
                    "set caCertificates, or mode SIMPLE",
                );
            }
            if tls.mode == ServerTlsMode::Simple && has_files && !tls.ca_crl.is_empty() {
                check.error(
                    &format!("{at}.caCrl"),
                    "a revocation list needs client certificates",
                    "set mode MUTUAL, or remove caCrl",
                );
            }
        }
        _ => {}
    }
    for (name, version) in
        [("minProtocolVersion", tls.min_protocol_version), ("maxProtocolVersion", tls.max_protocol_version)]
    {
        if matches!(version, TlsProtocol::V1_0 | TlsProtocol::V1_1) {
            check.error(
                &format!("{at}.{name}"),
                format!("{version} is not supported: it is not secure"),
                "use TLSV1_2 or TLSV1_3",
            );
        }
    }
    if tls.min_protocol_version == TlsProtocol::V1_3 && tls.max_protocol_version == TlsProtocol::V1_2 {
        check.error(at, "minProtocolVersion is above maxProtocolVersion", "swap the two");
    }
    let mut suites = BTreeSet::new();
    for (index, suite) in tls.cipher_suites.iter().enumerate() {
        if !suites.insert(suite) {
            check.warn(
                &format!("{at}.cipherSuites[{index}]"),
                format!("cipher suite {suite:?} is listed twice"),
                "remove one of the two",
            );
        }
    }
    if tls.credential_names.len() > 2 || tls.tls_certificates.len() > 2 {
        check.warn(at, "only the first two certificates are used", "one RSA and one ECDSA pair are enough");
    }
    for (index, pair) in tls.tls_certificates.iter().enumerate() {
        if !pair.ca_certificates.is_empty() {
            // Left out, anybody's certificate or nobody's would do.
            check.add(
                crate::codes::NOT_EFFECTIVE,
                types::Severity::Error,
                &format!("{at}.tlsCertificates[{index}].caCertificates"),
                "caCertificates is not yet effective here",
                "name the CA for clients in tls.caCertificates",
            );
        }
    }
    for (name, set) in [
        ("caCrl", !tls.ca_crl.is_empty()),
        ("verifyCertificateSpki", !tls.verify_certificate_spki.is_empty()),
        ("verifyCertificateHash", !tls.verify_certificate_hash.is_empty()),
    ] {
        if set {
            // It restricts who may connect: to leave it out would open a door.
            check.add(
                crate::codes::NOT_EFFECTIVE,
                types::Severity::Error,
                &format!("{at}.{name}"),
                format!("{name} is not yet effective"),
                "remove it; a CA of its own under caCertificates says who may connect",
            );
        }
    }
}

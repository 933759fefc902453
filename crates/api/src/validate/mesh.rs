//! IstioOperator and meshConfig.

use std::collections::BTreeSet;

use serde_json::Value;

use super::destination_rule::{connection_pool, outlier_detection};
use super::virtual_service::retries;
use super::{Check, rules};
use crate::mesh_config::{ExtensionProvider, MeshConfig, ProxyConfig};
use crate::networking::OutboundMode;
use crate::operator::IstioOperator;

pub(super) fn operator(check: &mut Check<'_>, spec: &IstioOperator) {
    for (name, set) in [
        ("components", spec.components.is_some()),
        ("revision", !spec.revision.is_empty()),
        ("unvalidatedValues", spec.unvalidated_values.is_some()),
    ] {
        check.unbuilt_if(set, format!("spec.{name}"));
    }
    if let Some(values) = &spec.values {
        self::values(check, "spec.values", values);
    }
    if let Some(config) = &spec.mesh_config {
        mesh_config(check, "spec.meshConfig", config);
    }
}

/// Values of Istio's charts: of all of them one has an effect.
fn values(check: &mut Check<'_>, at: &str, values: &Value) {
    for (name, value) in values.as_object().into_iter().flatten() {
        let at = format!("{at}.{name}");
        if name != "sidecarInjectorWebhook" {
            check.unbuilt(&at);
            continue;
        }
        for (name, value) in value.as_object().into_iter().flatten() {
            let at = format!("{at}.{name}");
            if name != "enableNamespacesByDefault" {
                check.unbuilt(&at);
            } else if !value.is_boolean() && !value.is_null() {
                check.error(&at, format!("expected true or false, found {value}"), "write it without quotes");
            }
        }
    }
}

fn mesh_config(check: &mut Check<'_>, at: &str, config: &MeshConfig) {
    rules::duration(check, &format!("{at}.connectTimeout"), config.connect_timeout);
    rules::duration_or_zero(check, &format!("{at}.protocolDetectionTimeout"), config.protocol_detection_timeout);
    rules::duration(check, &format!("{at}.dnsRefreshRate"), config.dns_refresh_rate);
    if let Some(root) = &config.root_namespace
        && !root.is_empty()
        && !rules::is_dns_label(root)
    {
        check.error(
            &format!("{at}.rootNamespace"),
            format!("{root:?} is not a namespace"),
            "use lower-case letters, digits and `-`",
        );
    }
    for (name, policy) in [
        ("defaultHttpRetryPolicy", &config.default_http_retry_policy),
        ("defaultInboundHttpRetryPolicy", &config.default_inbound_http_retry_policy),
    ] {
        if let Some(policy) = policy {
            retries(check, &format!("{at}.{name}"), policy);
        }
    }
    if let Some(policy) = &config.default_traffic_policy {
        let at = format!("{at}.defaultTrafficPolicy");
        if let Some(pool) = &policy.connection_pool {
            connection_pool(check, &format!("{at}.connectionPool"), pool);
        }
        if let Some(outlier) = &policy.outlier_detection {
            outlier_detection(check, &format!("{at}.outlierDetection"), outlier);
        }
    }
    let mut names = BTreeSet::new();
    for (index, entry) in config.extension_providers.iter().enumerate() {
        let at = format!("{at}.extensionProviders[{index}]");
        if !names.insert(&entry.name) {
            check.error(
                &format!("{at}.name"),
                format!("provider {:?} is defined twice", entry.name),
                "rename one of the two",
            );
        }
        provider(check, &at, entry);
    }
    let sampling = config.default_config.as_ref().and_then(|c| c.tracing.as_ref()).and_then(|t| t.sampling);
    if sampling.is_some_and(|percent| !(0.0..=100.0).contains(&percent)) {
        check.error(
            &format!("{at}.defaultConfig.tracing.sampling"),
            "sampling is not between 0 and 100",
            "write a percentage from 0 to 100",
        );
    }
    check.unbuilt_if(
        config.outbound_mode() == OutboundMode::AllowAnyDynamicDns,
        format!("{at}.outboundTrafficPolicy.mode"),
    );
    for (name, set) in [
        ("configSources", config.config_sources.is_some()),
        ("caCertificates", config.ca_certificates.is_some()),
        ("certificates", config.certificates.is_some()),
        ("serviceSettings", config.service_settings.is_some()),
        ("serviceEntryVisibility", config.service_entry_visibility.is_some()),
        ("serviceScopeConfigs", config.service_scope_configs.is_some()),
        ("ca", config.ca.is_some()),
        ("discoverySelectors", !config.discovery_selectors.is_empty()),
        ("proxyHttpPort", config.proxy_http_port.is_some_and(|port| port != 0)),
        ("enableEnvoyAccessLogService", config.enable_envoy_access_log_service == Some(true)),
        ("ingressClass", config.ingress_class.is_some()),
        ("ingressService", config.ingress_service.is_some()),
        ("ingressControllerMode", config.ingress_controller_mode.is_some()),
        ("ingressSelector", config.ingress_selector.is_some()),
        ("inboundClusterStatName", config.inbound_cluster_stat_name.is_some()),
        ("outboundClusterStatName", config.outbound_cluster_stat_name.is_some()),
        ("defaultInboundHttpRetryPolicy", config.default_inbound_http_retry_policy.is_some()),
        ("hboneIdleTimeout", config.hbone_idle_timeout.is_some()),
        // What they are when they are true is what is done.
        ("enablePrometheusMerge", config.enable_prometheus_merge == Some(false)),
        ("verifyCertificateAtClient", config.verify_certificate_at_client == Some(false)),
        (
            "defaultProviders.accessLogging",
            config.default_providers.as_ref().is_some_and(|of| !of.access_logging.is_empty()),
        ),
        (
            "outboundTrafficPolicy.tls",
            config.outbound_traffic_policy.as_ref().is_some_and(|policy| policy.tls.is_some()),
        ),
        ("meshMTLS.ecdhCurves", config.mesh_mtls.as_ref().is_some_and(|tls| !tls.ecdh_curves.is_empty())),
    ] {
        check.unbuilt_if(set, format!("{at}.{name}"));
    }
    if let Some(config) = &config.default_config {
        proxy_config(check, &format!("{at}.defaultConfig"), config);
    }
}

/// What is set here and nothing reads. Where the control plane is (`discoveryAddress`) is known.
fn proxy_config(check: &mut Check<'_>, at: &str, config: &ProxyConfig) {
    for (name, set) in [
        ("configPath", config.config_path.is_some()),
        ("serviceCluster", config.service_cluster.is_some()),
        ("proxyAdminPort", config.proxy_admin_port.is_some()),
        ("controlPlaneAuthPolicy", config.control_plane_auth_policy.is_some()),
        ("customConfigFile", config.custom_config_file.is_some()),
        ("statNameLength", config.stat_name_length.is_some()),
        ("proxyBootstrapTemplatePath", config.proxy_bootstrap_template_path.is_some()),
        ("interceptionMode", config.interception_mode.is_some()),
        ("envoyAccessLogService", config.envoy_access_log_service.is_some()),
        ("envoyMetricsService", config.envoy_metrics_service.is_some()),
        ("runtimeValues", !config.runtime_values.is_empty()),
        ("statusPort", config.status_port.is_some()),
        ("extraStatTags", !config.extra_stat_tags.is_empty()),
        ("proxyStatsMatcher", config.proxy_stats_matcher.is_some()),
        ("readinessProbe", config.readiness_probe.is_some()),
        ("caCertificatesPem", !config.ca_certificates_pem.is_empty()),
        ("image", config.image.is_some()),
        ("privateKeyProvider", config.private_key_provider.is_some()),
        ("fileFlushInterval", config.file_flush_interval.is_some()),
        ("fileFlushMinSizeKb", config.file_flush_min_size_kb.is_some()),
        ("statsCompression", config.stats_compression.is_some()),
        ("statsEvictionInterval", config.stats_eviction_interval.is_some()),
        ("selector", config.selector.is_some()),
        ("environmentVariables", !config.environment_variables.is_empty()),
        (
            "gatewayTopology.proxyProtocol",
            config.gateway_topology.as_ref().is_some_and(|topology| topology.proxy_protocol.is_some()),
        ),
    ] {
        check.unbuilt_if(set, format!("{at}.{name}"));
    }
    if let Some(headers) = &config.proxy_headers {
        for (name, set) in [
            ("forwardedClientCert", headers.forwarded_client_cert.is_some()),
            ("setCurrentClientCertDetails", headers.set_current_client_cert_details.is_some()),
            ("metadataExchangeHeaders", headers.metadata_exchange_headers.is_some()),
            ("preserveHttp1HeaderCase", headers.preserve_http1_header_case),
        ] {
            check.unbuilt_if(set, format!("{at}.proxyHeaders.{name}"));
        }
        if !rules::is_header_value(&headers.server.value) {
            check.error(
                &format!("{at}.proxyHeaders.server.value"),
                "value holds a control character",
                "remove line breaks and the like",
            );
        }
    }
    let Some(tracing) = &config.tracing else { return };
    let at = format!("{at}.tracing");
    for (name, set) in [
        ("lightstep", tracing.lightstep.is_some()),
        ("datadog", tracing.datadog.is_some()),
        ("stackdriver", tracing.stackdriver.is_some()),
        ("openCensusAgent", tracing.open_census_agent.is_some()),
        ("tlsSettings", tracing.tls_settings.is_some()),
        ("enableIstioTags", tracing.enable_istio_tags == Some(false)),
    ] {
        check.unbuilt_if(set, format!("{at}.{name}"));
    }
    for (tag, source) in &tracing.custom_tags {
        check.unbuilt_if(source.formatter.is_some(), format!("{at}.customTags.{tag}.formatter"));
    }
}

fn provider(check: &mut Check<'_>, at: &str, entry: &ExtensionProvider) {
    if !rules::is_dns_label(&entry.name) {
        check.error(
            &format!("{at}.name"),
            format!("{:?} is not the name of a provider", entry.name),
            "lower-case letters, digits and `-`, 63 at most",
        );
    }
    let services = [
        ("envoyExtAuthzHttp", entry.envoy_ext_authz_http.as_ref().map(|p| (&p.service, p.port))),
        ("envoyExtAuthzGrpc", entry.envoy_ext_authz_grpc.as_ref().map(|p| (&p.service, p.port))),
        ("zipkin", entry.zipkin.as_ref().map(|p| (&p.service, p.port))),
    ];
    for (name, service) in services {
        let Some((service, port)) = service else { continue };
        let host = service.split_once('/').map_or(service.as_str(), |(_, host)| host);
        rules::host(check, &format!("{at}.{name}.service"), host);
        rules::port_number(check, &format!("{at}.{name}.port"), port);
    }
    if let Some(http) = &entry.envoy_ext_authz_http {
        let at = format!("{at}.envoyExtAuthzHttp");
        rules::duration(check, &format!("{at}.timeout"), http.timeout);
        if !http.path_prefix.is_empty() && !http.path_prefix.starts_with('/') {
            check.error(&format!("{at}.pathPrefix"), "pathPrefix must begin with /", "write a `/` before it");
        }
        for (name, list) in [
            ("headersToUpstreamOnAllow", &http.headers_to_upstream_on_allow),
            ("headersToDownstreamOnAllow", &http.headers_to_downstream_on_allow),
            ("headersToDownstreamOnDeny", &http.headers_to_downstream_on_deny),
        ] {
            for (index, header) in list.iter().enumerate() {
                if header == "*" {
                    check.error(
                        &format!("{at}.{name}[{index}]"),
                        "a bare `*` is not allowed",
                        "write `prefix*` or `*suffix`",
                    );
                }
            }
        }
    }
    let bodies = [
        ("envoyExtAuthzHttp", entry.envoy_ext_authz_http.as_ref().map(|p| &p.include_request_body_in_check)),
        ("envoyExtAuthzGrpc", entry.envoy_ext_authz_grpc.as_ref().map(|p| &p.include_request_body_in_check)),
    ];
    for (name, body) in bodies {
        if body.is_some_and(|body| body.as_ref().is_some_and(|body| body.max_request_bytes == 0)) {
            let field = format!("{at}.{name}.includeRequestBodyInCheck.maxRequestBytes");
            check.error(&field, "maxRequestBytes must be above 0", "say how much of a body is sent along");
        }
    }
    let statuses = [
        ("envoyExtAuthzHttp", entry.envoy_ext_authz_http.as_ref().map(|p| p.status_on_error.as_str())),
        ("envoyExtAuthzGrpc", entry.envoy_ext_authz_grpc.as_ref().map(|p| p.status_on_error.as_str())),
    ];
    for (name, status) in statuses {
        let Some(status) = status.filter(|status| !status.is_empty()) else { continue };
        if !status.parse::<u16>().is_ok_and(|code| (100..600).contains(&code)) {
            check.error(
                &format!("{at}.{name}.statusOnError"),
                format!("{status:?} is not a status code"),
                "write a number from 100 to 599",
            );
        }
    }
    for (name, set) in [
        ("envoyExtAuthzGrpc", entry.envoy_ext_authz_grpc.is_some()),
        ("zipkin.headers", entry.zipkin.as_ref().is_some_and(|zipkin| zipkin.headers.is_some())),
        ("envoyFileAccessLog", entry.envoy_file_access_log.is_some()),
        ("opentelemetry", entry.opentelemetry.is_some()),
        ("skywalking", entry.skywalking.is_some()),
        ("datadog", entry.datadog.is_some()),
        ("lightstep", entry.lightstep.is_some()),
        ("opencensus", entry.opencensus.is_some()),
        ("stackdriver", entry.stackdriver.is_some()),
        ("envoyHttpAls", entry.envoy_http_als.is_some()),
        ("envoyTcpAls", entry.envoy_tcp_als.is_some()),
        ("envoyOtelAls", entry.envoy_otel_als.is_some()),
        ("sds", entry.sds.is_some()),
    ] {
        check.unbuilt_if(set, format!("{at}.{name}"));
    }
}

//! Access logs and tracing of one proxy.
//!
//! Tracing is in every connection manager, also where nothing is sampled. *Source*: `docs/parity.md`, Traffic 8.3.

use std::collections::BTreeMap;
use std::sync::Arc;

use api::mesh_config::{AccessLogEncoding, CustomTag as TagConfig, MeshConfig, ProxyConfig, ZipkinProvider};
use envoy_types::pb::envoy::config::accesslog::v3::{
    AccessLog, AccessLogFilter, ResponseFlagFilter, access_log, access_log_filter,
};
use envoy_types::pb::envoy::config::core::v3::{DataSource, HttpService, HttpUri, data_source, http_uri};
use envoy_types::pb::envoy::config::trace::v3::{ZipkinConfig, tracing as trace, zipkin_config};
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager as hcm;
use envoy_types::pb::envoy::r#type::metadata::v3::{MetadataKey, MetadataKind, metadata_key, metadata_kind};
use envoy_types::pb::envoy::r#type::tracing::v3::{CustomTag, custom_tag};
use envoy_types::pb::envoy::r#type::v3::Percent;
use mesh::{MeshSnapshot, Scope, Service};
use types::{Finding, Severity};

use crate::context::{Context, proxy_config};
use crate::filter::Direction;
use crate::view::View;
use crate::wire::{self, boolean, pack, uint};

/// Istio's default text format.
const TEXT_FORMAT: &str = "[%START_TIME%] \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%\" %RESPONSE_CODE% \
%RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %CONNECTION_TERMINATION_DETAILS% \"%UPSTREAM_TRANSPORT_FAILURE_REASON%\" \
%BYTES_RECEIVED% %BYTES_SENT% %DURATION% %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% \"%REQ(X-FORWARDED-FOR)%\" \
\"%REQ(USER-AGENT)%\" \"%REQ(X-REQUEST-ID)%\" \"%REQ(:AUTHORITY)%\" \"%UPSTREAM_HOST%\" %UPSTREAM_CLUSTER_RAW% \
%UPSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_REMOTE_ADDRESS% %REQUESTED_SERVER_NAME% %ROUTE_NAME%\n";

/// Istio's default JSON fields.
const JSON_FIELDS: &[(&str, &str)] = &[
    ("authority", "%REQ(:AUTHORITY)%"),
    ("bytes_received", "%BYTES_RECEIVED%"),
    ("bytes_sent", "%BYTES_SENT%"),
    ("connection_termination_details", "%CONNECTION_TERMINATION_DETAILS%"),
    ("downstream_local_address", "%DOWNSTREAM_LOCAL_ADDRESS%"),
    ("downstream_remote_address", "%DOWNSTREAM_REMOTE_ADDRESS%"),
    ("duration", "%DURATION%"),
    ("method", "%REQ(:METHOD)%"),
    ("path", "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%"),
    ("protocol", "%PROTOCOL%"),
    ("request_id", "%REQ(X-REQUEST-ID)%"),
    ("requested_server_name", "%REQUESTED_SERVER_NAME%"),
    ("response_code", "%RESPONSE_CODE%"),
    ("response_code_details", "%RESPONSE_CODE_DETAILS%"),
    ("response_flags", "%RESPONSE_FLAGS%"),
    ("route_name", "%ROUTE_NAME%"),
    ("start_time", "%START_TIME%"),
    ("upstream_cluster", "%UPSTREAM_CLUSTER_RAW%"),
    ("upstream_host", "%UPSTREAM_HOST%"),
    ("upstream_local_address", "%UPSTREAM_LOCAL_ADDRESS%"),
    ("upstream_service_time", "%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)%"),
    ("upstream_transport_failure_reason", "%UPSTREAM_TRANSPORT_FAILURE_REASON%"),
    ("user_agent", "%REQ(USER-AGENT)%"),
    ("x_forwarded_for", "%REQ(X-FORWARDED-FOR)%"),
];

/// Percent of requests that are traced when nobody says otherwise.
const SAMPLING: f64 = 1.0;

/// What one proxy records and reports.
#[derive(Debug, Default)]
pub(crate) struct Telemetry {
    log: Option<AccessLog>,
    /// Connections that no chain takes are logged, where anything is.
    logs_unmatched: bool,
    provider: Option<Zipkin>,
    /// Percent of requests.
    sampling: f64,
    tags: BTreeMap<String, TagConfig>,
    /// Of the proxy's settings; a provider's own comes first.
    path_tag_length: Option<u32>,
}

#[derive(Debug)]
struct Zipkin {
    settings: ZipkinProvider,
    service: Arc<Service>,
}

impl Telemetry {
    pub(crate) fn of(snapshot: &MeshSnapshot, view: &View, scope: &Scope, findings: &mut Vec<Finding>) -> Self {
        let mesh = snapshot.mesh_config();
        let mut telemetry = Self {
            log: access_log(mesh),
            logs_unmatched: mesh.disable_envoy_listener_log != Some(true),
            sampling: SAMPLING,
            ..Self::default()
        };
        let own = proxy_config(snapshot, view);
        if let Some(config) = own {
            telemetry.sampling = config.trace_sampling();
        }
        if let Some(tracing) = own.and_then(|config| config.tracing.as_ref()) {
            telemetry.tags.clone_from(&tracing.custom_tags);
            telemetry.path_tag_length = tracing.max_path_tag_length;
        }
        let mut providers: Vec<String> =
            mesh.default_providers.as_ref().map(|of| of.tracing.clone()).unwrap_or_default();
        let mut is_reporting = mesh.enable_tracing();
        for config in closest_telemetries(snapshot, view) {
            for entry in &config.spec.tracing {
                if entry.matches.as_ref().is_some_and(|m| !matches!(m.mode.as_str(), "" | "CLIENT_AND_SERVER")) {
                    continue;
                }
                if !entry.providers.is_empty() {
                    providers = entry.providers.iter().map(|provider| provider.name.clone()).collect();
                }
                if let Some(percent) = entry.random_sampling_percentage {
                    telemetry.sampling = percent.clamp(0.0, 100.0);
                }
                if let Some(disabled) = entry.disable_span_reporting {
                    is_reporting = !disabled;
                }
                telemetry.tags.extend(entry.custom_tags.clone());
            }
        }
        if is_reporting {
            telemetry.provider = zipkin(mesh, own, &providers, scope, findings);
        }
        telemetry
    }

    /// For connection managers and TCP proxies.
    pub(crate) fn access_logs(&self) -> Vec<AccessLog> {
        self.log.iter().cloned().collect()
    }

    /// For listeners that really bind: connections that no chain takes.
    pub(crate) fn listener_logs(&self) -> Vec<AccessLog> {
        let filter = AccessLogFilter {
            filter_specifier: Some(access_log_filter::FilterSpecifier::ResponseFlagFilter(ResponseFlagFilter {
                flags: vec!["NR".into()],
            })),
        };
        let logs = self.log.iter().filter(|_| self.logs_unmatched);
        logs.map(|log| AccessLog { filter: Some(filter.clone()), ..log.clone() }).collect()
    }
}

/// The Telemetries that hold for a workload, outermost first: mesh, namespace, workload; the oldest of each.
fn closest_telemetries<'a>(
    snapshot: &'a MeshSnapshot,
    view: &View,
) -> Vec<&'a mesh::Config<api::telemetry::Telemetry>> {
    let pairs = |config: &&mesh::Config<api::telemetry::Telemetry>| {
        config.spec.selector.as_ref().map(|selector| selector.match_labels.clone()).unwrap_or_default()
    };
    let all = snapshot.telemetries();
    let root = snapshot.root_namespace();
    let mut found: Vec<_> = all.of(root).iter().find(|config| pairs(config).is_empty()).into_iter().collect();
    if *view.namespace != *root {
        found.extend(all.of(&view.namespace).iter().find(|config| pairs(config).is_empty()));
    }
    found.extend(all.of(&view.namespace).iter().find(|config| {
        let pairs = pairs(config);
        !pairs.is_empty() && pairs.iter().all(|(key, value)| view.labels.get(key) == Some(value))
    }));
    found
}

fn access_log(mesh: &MeshConfig) -> Option<AccessLog> {
    let path = mesh.access_log_file()?;
    let format = match mesh.access_log_encoding.unwrap_or_default() {
        AccessLogEncoding::Text => text_format(mesh.access_log_format.as_deref()),
        AccessLogEncoding::Json => json_format(mesh.access_log_format.as_deref()),
    };
    let config = wire::FileAccessLog { path: path.to_owned(), log_format: Some(format) };
    Some(AccessLog {
        name: "envoy.access_loggers.file".into(),
        filter: None,
        config_type: Some(access_log::ConfigType::TypedConfig(config.pack())),
    })
}

fn text_format(written: Option<&str>) -> wire::SubstitutionFormat {
    let text = match written {
        None | Some("") => TEXT_FORMAT.to_owned(),
        Some(text) if text.ends_with('\n') => text.to_owned(),
        Some(text) => format!("{text}\n"),
    };
    wire::SubstitutionFormat {
        text_format_source: Some(DataSource {
            specifier: Some(data_source::Specifier::InlineString(text)),
            ..DataSource::default()
        }),
        ..wire::SubstitutionFormat::default()
    }
}

fn json_format(written: Option<&str>) -> wire::SubstitutionFormat {
    let own: Option<BTreeMap<String, serde_json::Value>> =
        written.filter(|text| !text.is_empty()).and_then(|text| serde_json::from_str(text).ok());
    let fields = match own {
        Some(own) => own.into_iter().map(|(key, value)| (key, json_value(value))).collect(),
        None => JSON_FIELDS.iter().map(|(key, value)| ((*key).to_owned(), wire::text(*value))).collect(),
    };
    wire::SubstitutionFormat {
        json_format: Some(wire::OrderedStruct { fields }),
        json_format_options: Some(envoy_types::pb::envoy::config::core::v3::JsonFormatOptions::default()),
        ..wire::SubstitutionFormat::default()
    }
}

fn json_value(value: serde_json::Value) -> envoy_types::pb::google::protobuf::Value {
    use envoy_types::pb::google::protobuf::{Value, value::Kind};
    use serde_json::Value as Json;
    match value {
        Json::String(text) => wire::text(text),
        Json::Bool(value) => Value { kind: Some(Kind::BoolValue(value)) },
        Json::Number(number) => Value { kind: Some(Kind::NumberValue(number.as_f64().unwrap_or_default())) },
        Json::Array(values) => wire::list(values.into_iter().map(json_value).collect()),
        Json::Null | Json::Object(_) => wire::text(value.to_string()),
    }
}

/// The first Zipkin provider among `names`; without names the older `defaultConfig.tracing.zipkin`.
fn zipkin(
    mesh: &MeshConfig,
    own: Option<&ProxyConfig>,
    names: &[String],
    scope: &Scope,
    findings: &mut Vec<Finding>,
) -> Option<Zipkin> {
    let warn = |message: String, hint: &str| Finding {
        code: "LAT0301".into(),
        severity: Severity::Warning,
        object: None,
        field: "meshConfig.extensionProviders".into(),
        position: None,
        message: message.into(),
        hint: hint.into(),
    };
    let settings = if let Some(name) = names.first() {
        let Some(provider) = mesh.extension_provider(name) else {
            findings.push(warn(
                format!("there is no extension provider {name:?}, so no spans are sent"),
                "add it to meshConfig.extensionProviders",
            ));
            return None;
        };
        let Some(settings) = &provider.zipkin else {
            findings.push(warn(
                format!("provider {name:?} is not of kind zipkin, the only tracing kind that has an effect yet"),
                "use a zipkin provider",
            ));
            return None;
        };
        settings.clone()
    } else {
        let address = &own?.tracing.as_ref()?.zipkin.as_ref()?.address;
        let (service, port) = address.rsplit_once(':')?;
        ZipkinProvider { service: service.to_owned(), port: port.parse().ok()?, ..ZipkinProvider::default() }
    };
    let (namespace, host) = match settings.service.split_once('/') {
        Some((namespace, host)) => (Some(namespace), host),
        None => (None, settings.service.as_str()),
    };
    let service = scope.services.iter().find(|service| {
        let is_host = *service.host == *host
            || service
                .host
                .strip_prefix(host)
                .is_some_and(|rest| rest.starts_with(".svc.") || rest == ".cluster.local");
        is_host
            && namespace.is_none_or(|namespace| *service.namespace == *namespace)
            && service.port(settings.port).is_some()
    });
    let Some(service) = service else {
        findings.push(warn(
            format!("no visible service is {} with port {}, so no spans are sent", settings.service, settings.port),
            "deploy the tracing back end, or correct service and port",
        ));
        return None;
    };
    Some(Zipkin { service: Arc::clone(service), settings })
}

/// The tracing block of a connection manager.
pub(crate) fn tracing(context: &Context<'_>, direction: Direction) -> hcm::Tracing {
    let telemetry = &context.telemetry;
    let percent = |value: f64| Some(Percent { value });
    hcm::Tracing {
        client_sampling: percent(100.0),
        random_sampling: percent(telemetry.sampling),
        overall_sampling: percent(100.0),
        custom_tags: custom_tags(context),
        provider: telemetry.provider.as_ref().map(provider),
        spawn_upstream_span: if direction == Direction::Gateway && telemetry.provider.is_some() {
            boolean(true)
        } else {
            None
        },
        max_path_tag_length: telemetry
            .provider
            .as_ref()
            .and_then(|zipkin| zipkin.settings.max_tag_length.or(telemetry.path_tag_length))
            .and_then(uint),
        ..hcm::Tracing::default()
    }
}

fn provider(zipkin: &Zipkin) -> trace::Http {
    let settings = &zipkin.settings;
    let path = if settings.path.is_empty() { "/api/v2/spans" } else { &settings.path };
    let timeout = settings.timeout.map_or(std::time::Duration::from_secs(5), |timeout| timeout.0);
    let config = ZipkinConfig {
        trace_id_128bit: !settings.enable64bit_trace_id,
        shared_span_context: boolean(false),
        collector_endpoint_version: zipkin_config::CollectorEndpointVersion::HttpJson.into(),
        collector_service: Some(HttpService {
            http_uri: Some(HttpUri {
                uri: format!("http://{}{path}", zipkin.service.host),
                http_upstream_type: Some(http_uri::HttpUpstreamType::Cluster(format!(
                    "outbound|{}||{}",
                    settings.port, zipkin.service.host
                ))),
                timeout: wire::duration(timeout),
            }),
            ..HttpService::default()
        }),
        trace_context_option: if settings.trace_context_option == "USE_B3_WITH_W3C_PROPAGATION" {
            zipkin_config::TraceContextOption::UseB3WithW3cPropagation.into()
        } else {
            0
        },
        ..ZipkinConfig::default()
    };
    trace::Http {
        name: "envoy.tracers.zipkin".into(),
        config_type: Some(trace::http::ConfigType::TypedConfig(pack(&config))),
    }
}

fn custom_tags(context: &Context<'_>) -> Vec<CustomTag> {
    let literal = |value: &str| custom_tag::Type::Literal(custom_tag::Literal { value: value.to_owned() });
    let mut tags: BTreeMap<String, custom_tag::Type> = BTreeMap::new();
    for action in ["allow", "deny"] {
        for (what, key) in [("name", "effective_policy_id"), ("result", "engine_result")] {
            tags.insert(
                format!("istio.authorization.dry_run.{action}_policy.{what}"),
                request_metadata("envoy.filters.http.rbac", &format!("istio_dry_run_{action}_shadow_{key}")),
            );
        }
    }
    let view = context.view;
    for (name, value) in [
        ("istio.canonical_revision", view.canonical_revision()),
        ("istio.canonical_service", view.canonical_name()),
        ("istio.cluster_id", &view.cluster_id),
        ("istio.mesh_id", &view.mesh_id),
        ("istio.namespace", &view.namespace),
    ] {
        tags.insert(name.to_owned(), literal(value));
    }
    for (name, tag) in &context.telemetry.tags {
        let kind = if let Some(of) = &tag.literal {
            literal(&of.value)
        } else if let Some(of) = &tag.environment {
            custom_tag::Type::Environment(custom_tag::Environment {
                name: of.name.clone(),
                default_value: of.default_value.clone(),
            })
        } else if let Some(of) = &tag.header {
            custom_tag::Type::RequestHeader(custom_tag::Header {
                name: of.name.clone(),
                default_value: of.default_value.clone(),
            })
        } else {
            continue;
        };
        tags.insert(name.clone(), kind);
    }
    tags.into_iter().map(|(tag, r#type)| CustomTag { tag, r#type: Some(r#type) }).collect()
}

fn request_metadata(filter: &str, key: &str) -> custom_tag::Type {
    custom_tag::Type::Metadata(custom_tag::Metadata {
        kind: Some(MetadataKind { kind: Some(metadata_kind::Kind::Request(metadata_kind::Request {})) }),
        metadata_key: Some(MetadataKey {
            key: filter.to_owned(),
            path: vec![metadata_key::PathSegment {
                segment: Some(metadata_key::path_segment::Segment::Key(key.to_owned())),
            }],
        }),
        default_value: String::new(),
    })
}

//! `telemetry.istio.io`: recognised and decoded; what has an effect is decided where it is compiled.

#![expect(missing_docs, reason = "a field is named and means what Istio's API reference says")]

use std::collections::BTreeMap;

use serde_json::Value;

use crate::mesh_config::CustomTag;
use crate::networking::LabelSelector;
use crate::scalar::Duration;
use crate::security::TargetRef;

records! {
    /// `Telemetry`
    pub struct Telemetry {
        pub selector: Option<LabelSelector>,
        pub target_ref: Option<TargetRef>,
        pub target_refs: Vec<TargetRef>,
        pub tracing: Vec<Tracing>,
        pub metrics: Vec<Metrics>,
        pub access_logging: Vec<AccessLogging>,
    }

    /// A provider by name.
    pub struct ProviderRef {
        pub name: String,
    }

    /// `{mode}`
    pub struct TelemetryMatch {
        /// `CLIENT_AND_SERVER` (also when empty), `CLIENT`, `SERVER`
        pub mode: String,
    }

    /// One entry of `tracing`.
    pub struct Tracing {
        #[serde(rename = "match")]
        pub matches: Option<TelemetryMatch>,
        pub providers: Vec<ProviderRef>,
        pub random_sampling_percentage: Option<f64>,
        pub disable_span_reporting: Option<bool>,
        pub disable_context_propagation: Option<bool>,
        pub custom_tags: BTreeMap<String, CustomTag>,
        pub use_request_id_for_trace_sampling: Option<bool>,
        pub enable_istio_tags: Option<bool>,
    }

    /// One entry of `metrics`.
    pub struct Metrics {
        pub providers: Vec<ProviderRef>,
        pub overrides: Vec<Value>,
        pub reporting_interval: Option<Duration>,
    }

    /// One entry of `accessLogging`.
    pub struct AccessLogging {
        #[serde(rename = "match")]
        pub matches: Option<TelemetryMatch>,
        pub providers: Vec<ProviderRef>,
        pub disabled: Option<bool>,
        pub filter: Option<AccessLogFilter>,
    }

    /// `filter`
    pub struct AccessLogFilter {
        pub expression: String,
    }
}

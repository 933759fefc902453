//! What an API server with Istio's webhook would refuse or warn about, one object at a time.
//!
//! *Source*: `docs/parity.md`, Traffic 5.10 and the sections of each kind, Security 8.1 and 9. A field that
//! Istio has and this mesh does not build yet is a warning, and refused where it is about security.

mod destination_rule;
mod gateway;
mod kubernetes;
mod mesh;
mod rules;
mod security;
mod service_entry;
mod sidecar;
mod virtual_service;

use types::{Finding, Severity};

use crate::codes;
use crate::kind::Kind;
use crate::object::{Object, Spec};

/// Checks one decoded object. An `Error` means that it may not be admitted.
pub fn validate(object: &Object) -> Vec<Finding> {
    let mut check = Check { object, findings: Vec::new() };
    kubernetes::metadata(&mut check);
    match &object.spec {
        Spec::VirtualService(spec) => virtual_service::check(&mut check, spec),
        Spec::DestinationRule(spec) => destination_rule::check(&mut check, spec),
        Spec::Gateway(spec) => gateway::check(&mut check, spec),
        Spec::ServiceEntry(spec) => service_entry::check(&mut check, spec),
        Spec::WorkloadEntry(spec) => service_entry::workload_entry(&mut check, spec, "spec"),
        Spec::Sidecar(spec) => sidecar::check(&mut check, spec),
        Spec::PeerAuthentication(spec) => security::peer_authentication(&mut check, spec),
        Spec::RequestAuthentication(spec) => security::request_authentication(&mut check, spec),
        Spec::AuthorizationPolicy(spec) => security::authorization_policy(&mut check, spec),
        Spec::IstioOperator(spec) => mesh::operator(&mut check, spec),
        Spec::Service(spec) => kubernetes::service(&mut check, spec),
        Spec::Deployment(spec) => kubernetes::deployment(&mut check, spec),
        Spec::Pod(spec) => {
            kubernetes::proxy_config(&mut check, "metadata.annotations", &object.meta.annotations);
            kubernetes::pod(&mut check, &spec.spec, "spec");
        }
        Spec::EndpointSlice(spec) => kubernetes::endpoint_slice(&mut check, spec),
        Spec::ConfigMap(spec) => kubernetes::config_map(&mut check, spec),
        Spec::Secret(spec) => kubernetes::secret(&mut check, spec),
        Spec::ServiceAccount(spec) => kubernetes::service_account(&mut check, spec),
        Spec::Namespace(_) | Spec::Telemetry(_) | Spec::Recognised => {}
    }
    check.findings
}

/// Whether an object of the kind may have this name in this namespace.
pub(crate) fn may_be_named(kind: Kind, namespace: &str, name: &str) -> bool {
    kubernetes::is_name(kind, name) && (!kind.is_namespaced() || rules::is_dns_label(namespace))
}

/// Findings on one object, as they are made.
struct Check<'a> {
    object: &'a Object,
    findings: Vec<Finding>,
}

impl Check<'_> {
    fn add(&mut self, code: &str, severity: Severity, field: &str, message: impl Into<String>, hint: &str) {
        self.findings.push(Finding {
            code: code.into(),
            severity,
            object: Some(self.object.reference()),
            field: field.into(),
            position: None,
            message: message.into().into(),
            hint: hint.into(),
        });
    }

    /// The object may not be admitted.
    fn error(&mut self, field: &str, message: impl Into<String>, hint: &str) {
        self.add(codes::SCHEMA, Severity::Error, field, message, hint);
    }

    /// Admitted, but probably not what was meant.
    fn warn(&mut self, field: &str, message: impl Into<String>, hint: &str) {
        self.add(codes::DUBIOUS, Severity::Warning, field, message, hint);
    }

    /// Istio has it, we do not build it yet: a warning, an error for security kinds.
    fn unbuilt(&mut self, field: &str) {
        let (severity, hint) = if self.object.kind.is_security() {
            (Severity::Error, "remove it: half of what guards something would guard nothing")
        } else {
            (Severity::Warning, "remove it, or go on without it")
        };
        self.add(codes::NOT_EFFECTIVE, severity, field, format!("{} is not yet effective", last_of(field)), hint);
    }

    fn unbuilt_if(&mut self, is_set: bool, field: impl AsRef<str>) {
        if is_set {
            self.unbuilt(field.as_ref());
        }
    }

    /// It means nothing on one machine, so that nothing is lost without it: told, not warned about.
    fn idle_if(&mut self, is_set: bool, field: impl AsRef<str>, why: &str) {
        if is_set {
            let field = field.as_ref();
            let message = format!("{} has no effect here: {why}", last_of(field));
            self.add(codes::NOT_EFFECTIVE, Severity::Info, field, message, "");
        }
    }
}

/// The field's own name.
fn last_of(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

#[cfg(test)]
mod tests;

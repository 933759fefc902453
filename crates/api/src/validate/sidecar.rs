//! Sidecar.

use std::collections::BTreeSet;

use super::destination_rule::connection_pool;
use super::virtual_service::labels;
use super::{Check, rules};
use crate::networking::{CaptureMode, OutboundMode, Sidecar};

pub(super) fn check(check: &mut Check<'_>, spec: &Sidecar) {
    let is_empty = spec.ingress.is_empty()
        && spec.egress.is_empty()
        && spec.outbound_traffic_policy.is_none()
        && spec.inbound_connection_pool.is_none();
    if is_empty {
        check.error("spec", "the object says nothing", "set egress, ingress or outboundTrafficPolicy");
    }
    if let Some(selector) = &spec.workload_selector {
        labels(check, "spec.workloadSelector.labels", &selector.labels);
        if selector.labels.is_empty() {
            check.warn(
                "spec.workloadSelector",
                "selector has no labels and selects the whole namespace",
                "add labels, or leave the selector out",
            );
        }
    }
    let mut without_port = None;
    let mut numbers = BTreeSet::new();
    for (index, listener) in spec.egress.iter().enumerate() {
        let at = format!("spec.egress[{index}]");
        if listener.hosts.is_empty() {
            check.error(&format!("{at}.hosts"), "at least one host is needed", "write `*/*` for all");
        }
        for (index, host) in listener.hosts.iter().enumerate() {
            egress_host(check, &format!("{at}.hosts[{index}]"), host);
        }
        match &listener.port {
            None if without_port.is_some() => {
                check.error(&at, "only one entry may have no port", "give the others a port");
            }
            None => without_port = Some(index),
            Some(port) => {
                rules::port_number(check, &format!("{at}.port.number"), port.number);
                if port.number != 0 && !numbers.insert(port.number) {
                    check.error(
                        &format!("{at}.port.number"),
                        format!("port {} is listed twice", port.number),
                        "remove or renumber one of the two",
                    );
                }
            }
        }
        check.unbuilt_if(listener.bind.starts_with("unix:"), format!("{at}.bind"));
    }
    if without_port.is_some_and(|index| index + 1 != spec.egress.len()) {
        check.error("spec.egress", "the entry without port must be the last", "move it to the end");
    }
    let mut numbers = BTreeSet::new();
    for (index, listener) in spec.ingress.iter().enumerate() {
        let at = format!("spec.ingress[{index}]");
        match &listener.port {
            None => check.error(
                &format!("{at}.port"),
                "port is needed",
                "write port: {number: …, protocol: HTTP, name: http}",
            ),
            Some(port) => {
                rules::port_number(check, &format!("{at}.port.number"), port.number);
                if !numbers.insert(port.number) {
                    check.error(
                        &format!("{at}.port.number"),
                        format!("port {} is listed twice", port.number),
                        "remove or renumber one of the two",
                    );
                }
            }
        }
        check.unbuilt_if(listener.default_endpoint.starts_with("unix:"), format!("{at}.defaultEndpoint"));
        check.unbuilt_if(!listener.bind.is_empty(), format!("{at}.bind"));
        check.unbuilt_if(listener.capture_mode == CaptureMode::None, format!("{at}.captureMode"));
        check.unbuilt_if(listener.tls.is_some(), format!("{at}.tls"));
    }
    if let Some(pool) = &spec.inbound_connection_pool {
        connection_pool(check, "spec.inboundConnectionPool", pool);
    }
    if let Some(policy) = &spec.outbound_traffic_policy {
        let at = "spec.outboundTrafficPolicy";
        if policy.mode == Some(OutboundMode::AllowAnyDynamicDns) {
            check.error(
                &format!("{at}.mode"),
                "ALLOW_ANY_DYNAMIC_DNS is a setting of the mesh",
                "set it in meshConfig.outboundTrafficPolicy",
            );
        }
        if let Some(proxy) = &policy.egress_proxy
            && (policy.mode.unwrap_or_default() != OutboundMode::AllowAny || proxy.port.is_none())
        {
            check.error(
                &format!("{at}.egressProxy"),
                "egressProxy needs mode ALLOW_ANY and a port",
                "set mode: ALLOW_ANY, and the port of the proxy",
            );
        }
    }
}

fn egress_host(check: &mut Check<'_>, field: &str, host: &str) {
    let Some((namespace, name)) = host.split_once('/') else {
        check.error(
            field,
            format!("{host:?} is not of the form namespace/host"),
            "write `*/host`, `./host`, or `namespace/host`",
        );
        return;
    };
    if !matches!(namespace, "*" | "." | "~") && !rules::is_dns_label(namespace) {
        check.error(field, format!("{namespace:?} is not a namespace"), "write `*`, `.`, `~`, or a namespace's name");
    }
    if name != "*" {
        rules::full_host(check, field, name);
    }
}

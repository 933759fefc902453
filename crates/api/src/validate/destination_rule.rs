//! DestinationRule.

use std::collections::BTreeSet;

use super::virtual_service::labels;
use super::{Check, rules};
use crate::networking::{
    ClientTlsMode, ClientTlsSettings, ConnectionPoolSettings, DestinationRule, LoadBalancerSettings, LocalityLbSetting,
    OutlierDetection, TrafficPolicy,
};

/// Envoy's largest Maglev table.
const MAGLEV_MAX: u64 = 5_000_011;
/// Envoy's largest ring.
const RING_MAX: u64 = 8_388_608;

pub(super) fn check(check: &mut Check<'_>, spec: &DestinationRule) {
    if spec.host.is_empty() {
        check.error("spec.host", "host is missing", "name the service that the rule is about");
    } else {
        rules::host_with_wildcard(check, "spec.host", &spec.host);
    }
    rules::export_to(check, &spec.export_to, false);
    let has_selector = spec.workload_selector.is_some();
    if has_selector && spec.export_to.iter().any(|to| to != ".") {
        check.error(
            "spec.exportTo",
            "a rule with workloadSelector cannot be exported",
            "write `.`, or leave exportTo out",
        );
    }
    if let Some(policy) = &spec.traffic_policy {
        traffic_policy(check, "spec.trafficPolicy", policy, has_selector);
    }
    let mut seen = BTreeSet::new();
    for (index, subset) in spec.subsets.iter().enumerate() {
        let at = format!("spec.subsets[{index}]");
        if subset.name.is_empty() {
            check.error(&format!("{at}.name"), "subset has no name", "give it a name, such as `v1`");
        } else if !rules::is_dns_label(&subset.name) {
            let hint = "use lower-case letters, digits and `-`";
            check.error(&format!("{at}.name"), format!("{:?} is not the name of a subset", subset.name), hint);
        } else if !seen.insert(&subset.name) {
            check.error(
                &format!("{at}.name"),
                format!("subset {:?} is defined twice", subset.name),
                "rename or remove one of the two",
            );
        }
        labels(check, &format!("{at}.labels"), &subset.labels);
        if let Some(policy) = &subset.traffic_policy {
            traffic_policy(check, &format!("{at}.trafficPolicy"), policy, has_selector);
        }
    }
}

fn traffic_policy(check: &mut Check<'_>, at: &str, policy: &TrafficPolicy, has_selector: bool) {
    if *policy == TrafficPolicy::default() {
        check.error(at, "trafficPolicy is empty", "remove it, or say something in it");
    }
    if policy.tunnel.is_some() && policy.proxy_protocol.is_some() {
        check.error(at, "tunnel and proxyProtocol exclude each other", "keep one of the two");
    }
    if let Some(tunnel) = &policy.tunnel {
        if !matches!(tunnel.protocol.as_str(), "" | "CONNECT" | "POST") {
            check.error(
                &format!("{at}.tunnel.protocol"),
                format!("{:?} is neither CONNECT nor POST", tunnel.protocol),
                "write CONNECT or POST",
            );
        }
        check.unbuilt(&format!("{at}.tunnel"));
    }
    if let Some(budget) = &policy.retry_budget
        && budget.percent.is_some_and(|percent| !(0.0..=100.0).contains(&percent))
    {
        check.error(
            &format!("{at}.retryBudget.percent"),
            "percent is not between 0 and 100",
            "write a number from 0 to 100",
        );
    }
    blocks(
        check,
        at,
        Blocks {
            load_balancer: policy.load_balancer.as_ref(),
            connection_pool: policy.connection_pool.as_ref(),
            outlier_detection: policy.outlier_detection.as_ref(),
            tls: policy.tls.as_ref(),
        },
        has_selector,
    );
    let mut seen = BTreeSet::new();
    for (index, entry) in policy.port_level_settings.iter().enumerate() {
        let at = format!("{at}.portLevelSettings[{index}]");
        let Some(port) = &entry.port else {
            check.error(&at, "port is needed", "write port: {number: …}");
            continue;
        };
        rules::port_number(check, &format!("{at}.port.number"), port.number);
        if !seen.insert(port.number) {
            check.error(
                &format!("{at}.port.number"),
                format!("port {} is set twice", port.number),
                "keep one entry for the port",
            );
        }
        let found = Blocks {
            load_balancer: entry.load_balancer.as_ref(),
            connection_pool: entry.connection_pool.as_ref(),
            outlier_detection: entry.outlier_detection.as_ref(),
            tls: entry.tls.as_ref(),
        };
        if found.is_empty() {
            check.error(
                &at,
                "the port's settings are empty",
                "set loadBalancer, connectionPool, outlierDetection or tls, or remove the entry",
            );
        }
        blocks(check, &at, found, has_selector);
    }
}

#[derive(Clone, Copy)]
struct Blocks<'a> {
    load_balancer: Option<&'a LoadBalancerSettings>,
    connection_pool: Option<&'a ConnectionPoolSettings>,
    outlier_detection: Option<&'a OutlierDetection>,
    tls: Option<&'a ClientTlsSettings>,
}

impl Blocks<'_> {
    fn is_empty(&self) -> bool {
        self.load_balancer.is_none()
            && self.connection_pool.is_none()
            && self.outlier_detection.is_none()
            && self.tls.is_none()
    }
}

fn blocks(check: &mut Check<'_>, at: &str, blocks: Blocks<'_>, has_selector: bool) {
    if let Some(balancer) = blocks.load_balancer {
        load_balancer(check, &format!("{at}.loadBalancer"), balancer);
        if let Some(locality) = &balancer.locality_lb_setting
            && (!locality.failover.is_empty() || !locality.failover_priority.is_empty())
            && blocks.outlier_detection.is_none()
        {
            let hint = "add outlierDetection";
            check.warn(
                &format!("{at}.loadBalancer.localityLbSetting"),
                "failover has no effect without outlierDetection",
                hint,
            );
        }
    }
    if let Some(pool) = blocks.connection_pool {
        connection_pool(check, &format!("{at}.connectionPool"), pool);
    }
    if let Some(outlier) = blocks.outlier_detection {
        outlier_detection(check, &format!("{at}.outlierDetection"), outlier);
    }
    if let Some(settings) = blocks.tls {
        tls(check, &format!("{at}.tls"), settings, has_selector);
    }
}

fn load_balancer(check: &mut Check<'_>, at: &str, balancer: &LoadBalancerSettings) {
    if balancer.simple.is_some() && balancer.consistent_hash.is_some() {
        check.error(at, "simple and consistentHash exclude each other", "keep one of the two");
    }
    if let Some(hash) = &balancer.consistent_hash {
        let at = format!("{at}.consistentHash");
        let keys = [
            hash.http_header_name.is_some(),
            hash.http_cookie.is_some(),
            hash.use_source_ip.is_some(),
            hash.http_query_parameter_name.is_some(),
        ];
        match keys.iter().filter(|set| **set).count() {
            0 => check.error(
                &at,
                "a hash key is needed",
                "set httpHeaderName, httpCookie, useSourceIp or httpQueryParameterName",
            ),
            1 => {}
            _ => check.error(&at, "only one hash key may be set", "keep one of them"),
        }
        if hash.http_cookie.as_ref().is_some_and(|cookie| cookie.name.is_empty()) {
            check.error(
                &format!("{at}.httpCookie.name"),
                "cookie has no name",
                "name the cookie that tells clients apart",
            );
        }
        if hash.ring_hash.is_some() && hash.maglev.is_some() {
            check.error(&at, "ringHash and maglev exclude each other", "keep one of the two");
        }
        if hash.minimum_ring_size.is_some() {
            if hash.ring_hash.is_some() || hash.maglev.is_some() {
                check.error(
                    &format!("{at}.minimumRingSize"),
                    "minimumRingSize excludes ringHash and maglev",
                    "write ringHash: {minimumRingSize: …} instead",
                );
            } else {
                check.warn(
                    &format!("{at}.minimumRingSize"),
                    "minimumRingSize is deprecated",
                    "use ringHash.minimumRingSize",
                );
            }
        }
        let ring = hash.ring_hash.as_ref().and_then(|ring| ring.minimum_ring_size).or(hash.minimum_ring_size);
        if ring.is_some_and(|size| size > RING_MAX) {
            check.error(&at, format!("the ring is larger than {RING_MAX}"), "write a smaller minimumRingSize");
        }
        let table = hash.maglev.as_ref().and_then(|maglev| maglev.table_size);
        if table.is_some_and(|size| size > MAGLEV_MAX || !is_prime(size)) {
            check.error(
                &format!("{at}.maglev.tableSize"),
                format!("tableSize must be a prime up to {MAGLEV_MAX}"),
                "leave it out for 65537",
            );
        }
    }
    check.unbuilt_if(balancer.zone_aware_lb_setting.is_some(), format!("{at}.zoneAwareLbSetting"));
    if let Some(locality) = &balancer.locality_lb_setting {
        if balancer.zone_aware_lb_setting.is_some() {
            check.error(at, "localityLbSetting and zoneAwareLbSetting exclude each other", "keep one of the two");
        }
        locality_setting(check, &format!("{at}.localityLbSetting"), locality);
    }
    if let Some(warmup) = &balancer.warmup {
        let at = format!("{at}.warmup");
        if warmup.duration.is_none() {
            check.error(&at, "duration is needed", "write how long, such as duration: 30s");
        }
        if warmup.aggression.is_some_and(|aggression| aggression <= 0.0) {
            check.error(&format!("{at}.aggression"), "aggression must be above 0", "leave it out for 1");
        }
        if warmup.minimum_percent.is_some_and(|percent| !(0.0..=100.0).contains(&percent)) {
            check.error(
                &format!("{at}.minimumPercent"),
                "minimumPercent is not between 0 and 100",
                "write a number from 0 to 100",
            );
        }
    }
}

fn is_prime(number: u64) -> bool {
    number >= 2 && (2..=number.isqrt()).all(|divisor| !number.is_multiple_of(divisor))
}

fn locality_setting(check: &mut Check<'_>, at: &str, setting: &LocalityLbSetting) {
    if !setting.distribute.is_empty() && (!setting.failover.is_empty() || !setting.failover_priority.is_empty()) {
        check.error(at, "distribute and failover exclude each other", "keep one of the two");
    }
    let mut seen = BTreeSet::new();
    for (index, entry) in setting.distribute.iter().enumerate() {
        let at = format!("{at}.distribute[{index}]");
        let sum: u64 = entry.to.values().map(|weight| u64::from(*weight)).sum();
        if entry.to.values().any(|weight| !(1..=100).contains(weight)) || sum != 100 {
            check.error(
                &format!("{at}.to"),
                format!("the weights must be 1 to 100 and sum to 100, not {sum}"),
                "write whole percentages that sum to 100",
            );
        }
        if !seen.insert(&entry.from) {
            check.error(
                &format!("{at}.from"),
                format!("locality {:?} is listed twice", entry.from),
                "put both entries under one",
            );
        }
    }
    for (index, entry) in setting.failover.iter().enumerate() {
        let at = format!("{at}.failover[{index}]");
        if entry.from == entry.to {
            check.error(&at, "from and to must differ", "name another region under `to`");
        }
        if [&entry.from, &entry.to].iter().any(|region| region.contains(['/', '*'])) {
            check.error(&at, "failover is between regions", "write a region without zone and `*`");
        }
    }
}

pub(super) fn connection_pool(check: &mut Check<'_>, at: &str, pool: &ConnectionPoolSettings) {
    if pool.tcp.is_none() && pool.http.is_none() {
        check.error(at, "connectionPool is empty", "set tcp or http in it, or remove it");
    }
    if let Some(tcp) = &pool.tcp {
        let at = format!("{at}.tcp");
        rules::duration(check, &format!("{at}.connectTimeout"), tcp.connect_timeout);
        rules::duration(check, &format!("{at}.maxConnectionDuration"), tcp.max_connection_duration);
        rules::duration_or_zero(check, &format!("{at}.idleTimeout"), tcp.idle_timeout);
        if let Some(keepalive) = &tcp.tcp_keepalive {
            rules::duration(check, &format!("{at}.tcpKeepalive.time"), keepalive.time);
            rules::duration(check, &format!("{at}.tcpKeepalive.interval"), keepalive.interval);
        }
    }
    if let Some(http) = &pool.http {
        let at = format!("{at}.http");
        rules::duration(check, &format!("{at}.idleTimeout"), http.idle_timeout);
        if http.use_client_protocol && http.h2_upgrade_policy == Some(crate::networking::H2UpgradePolicy::Upgrade) {
            check.error(&at, "useClientProtocol excludes h2UpgradePolicy UPGRADE", "keep one of the two");
        }
        if let Some(keep_alive) = &http.http2_keep_alive
            && (keep_alive.interval.is_none() || keep_alive.timeout.is_none())
        {
            check.error(
                &format!("{at}.http2KeepAlive"),
                "interval and timeout are both needed",
                "write both, such as interval: 30s, timeout: 5s",
            );
        }
    }
}

pub(super) fn outlier_detection(check: &mut Check<'_>, at: &str, outlier: &OutlierDetection) {
    rules::duration(check, &format!("{at}.interval"), outlier.interval);
    rules::duration(check, &format!("{at}.baseEjectionTime"), outlier.base_ejection_time);
    for (name, value) in [
        ("maxEjectionPercent", outlier.max_ejection_percent.unwrap_or_default()),
        ("minHealthPercent", outlier.min_health_percent),
    ] {
        if !(0..=100).contains(&value) {
            check.error(
                &format!("{at}.{name}"),
                format!("{value} is not between 0 and 100"),
                "write a whole number from 0 to 100",
            );
        }
    }
    if outlier.consecutive_local_origin_failures.is_some() && !outlier.split_external_local_origin_errors {
        let hint = "set splitExternalLocalOriginErrors: true";
        check.error(&format!("{at}.consecutiveLocalOriginFailures"), "it needs splitExternalLocalOriginErrors", hint);
    }
    if outlier.consecutive_errors.is_some() {
        check.warn(&format!("{at}.consecutiveErrors"), "consecutiveErrors is deprecated", "use consecutive5xxErrors");
    }
    for (index, code) in outlier.outlier_detection_http_error_codes.iter().enumerate() {
        if !(100..600).contains(code) {
            check.error(
                &format!("{at}.outlierDetectionHttpErrorCodes[{index}]"),
                format!("{code} is not a status code"),
                "write a number from 100 to 599",
            );
        }
    }
}

fn tls(check: &mut Check<'_>, at: &str, tls: &ClientTlsSettings, has_selector: bool) {
    let skip = tls.insecure_skip_verify == Some(true);
    let has_files = !tls.client_certificate.is_empty() || !tls.private_key.is_empty();
    let has_ca = !tls.ca_certificates.is_empty();
    if skip
        && (has_ca
            || !tls.subject_alt_names.is_empty()
            || (tls.mode == ClientTlsMode::Simple && !tls.credential_name.is_empty()))
    {
        check.error(
            &format!("{at}.insecureSkipVerify"),
            "insecureSkipVerify excludes certificates and names to verify",
            "remove it, or what it would not verify",
        );
    }
    if !tls.credential_name.is_empty() {
        if has_files || has_ca || !tls.ca_crl.is_empty() {
            check.error(
                &format!("{at}.credentialName"),
                "credentialName excludes certificate files",
                "keep the name or the files",
            );
        }
        if !has_selector {
            let message =
                "credentialName is ignored by sidecars without workloadSelector: their traffic is not encrypted";
            check.warn(&format!("{at}.credentialName"), message, "add workloadSelector, or use certificate files");
        }
    }
    match tls.mode {
        ClientTlsMode::Mutual if tls.credential_name.is_empty() => {
            for (name, value) in [("clientCertificate", &tls.client_certificate), ("privateKey", &tls.private_key)] {
                if value.is_empty() {
                    check.error(
                        &format!("{at}.{name}"),
                        format!("MUTUAL needs {name}"),
                        "name the file, or use credentialName",
                    );
                }
            }
        }
        ClientTlsMode::IstioMutual if has_files || has_ca || !tls.credential_name.is_empty() => {
            check.error(at, "ISTIO_MUTUAL uses the workload's own certificate", "remove the certificate fields");
        }
        ClientTlsMode::Simple | ClientTlsMode::Mutual if !has_ca && tls.credential_name.is_empty() && !skip => {
            let message = "without caCertificates the system's roots are trusted";
            check.add("IST0128", types::Severity::Warning, at, message, "set caCertificates");
        }
        _ => {}
    }
    check.unbuilt_if(!tls.ca_crl.is_empty(), format!("{at}.caCrl"));
}

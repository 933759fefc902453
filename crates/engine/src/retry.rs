//! Retries: whether an attempt may be repeated, how often, and when.
//!
//! *Source*: Envoy's router filter, `x-envoy-retry-on` and `x-envoy-retry-grpc-on`.

use std::time::Duration;

use envoy_types::pb::envoy::config::route::v3 as pb;
use envoy_types::pb::envoy::extensions::retry::host::previous_hosts::v3::PreviousHostsPredicate;
use envoy_types::pb::envoy::extensions::retry::priority::previous_priorities::v3::PreviousPrioritiesConfig;
use types::{Cause, RequestHead, ResponseHead};

use crate::cluster::Limits;
use crate::draw::scale;
use crate::matcher::HeaderMatcher;
use crate::unsupported::{Unsupported, Within as _, duration, each, unpack};

/// Envoy's back-off without settings.
const BASE_INTERVAL: Duration = Duration::from_millis(25);

/// What makes an attempt worth repeating.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Conditions(u32);

impl Conditions {
    const SERVER_ERROR: u32 = 1;
    const GATEWAY_ERROR: u32 = 1 << 1;
    const RESET: u32 = 1 << 2;
    const RESET_BEFORE_REQUEST: u32 = 1 << 3;
    const CONNECT_FAILURE: u32 = 1 << 4;
    const CONFLICT: u32 = 1 << 5;
    const REFUSED_STREAM: u32 = 1 << 6;
    const STATUS_CODES: u32 = 1 << 7;
    const HEADERS: u32 = 1 << 8;
    const RATE_LIMITED: u32 = 1 << 9;
    const CANCELLED: u32 = 1 << 10;
    const DEADLINE_EXCEEDED: u32 = 1 << 11;
    const INTERNAL: u32 = 1 << 12;
    const RESOURCE_EXHAUSTED: u32 = 1 << 13;
    const UNAVAILABLE: u32 = 1 << 14;

    /// Parses a comma-separated list; empty words are skipped.
    fn parse(list: &str) -> Result<Self, Unsupported> {
        let mut all = 0;
        for word in list.split(',').map(str::trim).filter(|word| !word.is_empty()) {
            let one = Self::word(word);
            all |= one.ok_or_else(|| Unsupported::new("retry_on", format!("has the unknown word {word:?}")))?;
        }
        Ok(Self(all))
    }

    /// What a caller asks for; words it made up mean nothing.
    fn asked(list: &[u8]) -> u32 {
        let words = list.split(|b| *b == b',').filter_map(|word| std::str::from_utf8(word).ok());
        words.filter_map(|word| Self::word(word.trim())).fold(0, |all, one| all | one)
    }

    fn word(word: &str) -> Option<u32> {
        Some(match word {
            "5xx" => Self::SERVER_ERROR,
            "gateway-error" => Self::GATEWAY_ERROR,
            "reset" => Self::RESET,
            "reset-before-request" => Self::RESET_BEFORE_REQUEST,
            "connect-failure" => Self::CONNECT_FAILURE,
            "retriable-4xx" => Self::CONFLICT,
            "refused-stream" => Self::REFUSED_STREAM,
            "retriable-status-codes" => Self::STATUS_CODES,
            "retriable-headers" => Self::HEADERS,
            "envoy-ratelimited" => Self::RATE_LIMITED,
            // There is no HTTP/3 upstream, so this never happens.
            "http3-post-connect-failure" => 0,
            "cancelled" => Self::CANCELLED,
            "deadline-exceeded" => Self::DEADLINE_EXCEEDED,
            "internal" => Self::INTERNAL,
            "resource-exhausted" => Self::RESOURCE_EXHAUSTED,
            "unavailable" => Self::UNAVAILABLE,
            _ => return None,
        })
    }

    fn any(self, of: u32) -> bool {
        self.0 & of != 0
    }
}

/// Envoy's `RetryPolicy`.
#[derive(Clone, PartialEq, Debug)]
pub struct RetryPolicy {
    on: Conditions,
    status_codes: Vec<u16>,
    headers: Vec<HeaderMatcher>,
    request_headers: Vec<HeaderMatcher>,
    /// Attempts beyond the first.
    pub retries_max: u32,
    /// Until an attempt has a response head; `None`: only the route's time-out counts.
    pub per_try_timeout: Option<Duration>,
    /// Until an attempt moves a byte.
    pub per_try_idle_timeout: Option<Duration>,
    base_interval: Duration,
    interval_max: Duration,
    /// Hosts already tried are avoided.
    pub previous_hosts: bool,
    /// How often to pick anew for that.
    pub repicks_max: u32,
    /// Priorities already tried are avoided; looked at anew every so many attempts.
    pub previous_priorities: Option<u32>,
}

impl RetryPolicy {
    /// Lowers Envoy's message.
    pub fn lower(proto: &pb::RetryPolicy) -> Result<Self, Unsupported> {
        let optional = |value: &Option<_>, path: &str| value.as_ref().map(|value| duration(value, path)).transpose();
        if !proto.retry_options_predicates.is_empty() {
            return Err(Unsupported::not_built("retry_options_predicates"));
        }
        if proto.rate_limited_retry_back_off.is_some() {
            return Err(Unsupported::not_built("rate_limited_retry_back_off"));
        }
        if proto.refresh_cluster_on_retry {
            return Err(Unsupported::not_built("refresh_cluster_on_retry"));
        }
        let mut previous_hosts = false;
        for (index, predicate) in proto.retry_host_predicate.iter().enumerate() {
            predicate_is_previous_hosts(predicate).within_item("retry_host_predicate", index)?;
            previous_hosts = true;
        }
        let (base_interval, interval_max) = match &proto.retry_back_off {
            None => (BASE_INTERVAL, BASE_INTERVAL * 10),
            Some(back_off) => {
                let base = optional(&back_off.base_interval, "retry_back_off.base_interval")?
                    .filter(|base| !base.is_zero())
                    .ok_or_else(|| Unsupported::new("retry_back_off.base_interval", "must be above 0"))?;
                // Envoy keeps whole milliseconds and rounds up to one.
                let base = base.max(Duration::from_millis(1));
                let max = optional(&back_off.max_interval, "retry_back_off.max_interval")?;
                let max = max.unwrap_or(base.saturating_mul(10)).max(Duration::from_millis(1));
                if max < base {
                    return Err(Unsupported::new("retry_back_off.max_interval", "must not be below base_interval"));
                }
                (base, max)
            }
        };
        let repicks = u32::try_from(proto.host_selection_retry_max_attempts)
            .map_err(|_| Unsupported::new("host_selection_retry_max_attempts", "is out of range"))?;
        Ok(Self {
            on: Conditions::parse(&proto.retry_on)?,
            status_codes: each(&proto.retriable_status_codes, "retriable_status_codes", |code| {
                u16::try_from(*code).map_err(|_| Unsupported::new("", format!("{code} is not a status")))
            })?,
            headers: each(&proto.retriable_headers, "retriable_headers", HeaderMatcher::lower)?,
            request_headers: each(&proto.retriable_request_headers, "retriable_request_headers", HeaderMatcher::lower)?,
            retries_max: proto.num_retries.as_ref().map_or(1, |value| value.value),
            per_try_timeout: optional(&proto.per_try_timeout, "per_try_timeout")?.filter(|value| !value.is_zero()),
            per_try_idle_timeout: optional(&proto.per_try_idle_timeout, "per_try_idle_timeout")?
                .filter(|value| !value.is_zero()),
            base_interval,
            interval_max,
            previous_hosts,
            repicks_max: if repicks == 0 { 1 } else { repicks.min(64) },
            previous_priorities: proto
                .retry_priority
                .as_ref()
                .map(previous_priorities)
                .transpose()
                .within("retry_priority")?,
        })
    }

    /// The route's policy as an internal caller's `x-envoy-*` headers change it; `None`: they say
    /// nothing. Conditions are added, the number of retries is replaced.
    ///
    /// *Source*: Envoy's router, `x-envoy-retry-on` and its siblings; property 13: other callers'
    /// are gone by now.
    pub fn steered(base: Option<&Self>, head: &RequestHead) -> Option<Self> {
        let conditions =
            ["x-envoy-retry-on", "x-envoy-retry-grpc-on"].into_iter().filter_map(|name| head.fields.get(name));
        let asked = conditions.fold(0, |all, list| all | Conditions::asked(list));
        let number = |text: &str| text.trim().parse::<u32>().ok();
        let retries = head.fields.get_str("x-envoy-max-retries").and_then(number);
        let codes = head.fields.get_str("x-envoy-retriable-status-codes").unwrap_or_default();
        let codes: Vec<u16> = codes.split(',').filter_map(|code| code.trim().parse().ok()).collect();
        if asked == 0 && retries.is_none() && codes.is_empty() {
            return None;
        }
        let mut policy = base.cloned().unwrap_or_else(Self::none);
        policy.on.0 |= asked;
        policy.status_codes.extend(codes);
        if let Some(retries) = retries.filter(|_| policy.on.0 != 0) {
            policy.retries_max = retries;
        }
        Some(policy)
    }

    /// A policy without a condition, as Envoy has it where a route has none.
    fn none() -> Self {
        Self {
            on: Conditions(0),
            status_codes: Vec::new(),
            headers: Vec::new(),
            request_headers: Vec::new(),
            retries_max: 1,
            per_try_timeout: None,
            per_try_idle_timeout: None,
            base_interval: BASE_INTERVAL,
            interval_max: BASE_INTERVAL * 10,
            previous_hosts: false,
            repicks_max: 1,
            previous_priorities: None,
        }
    }

    /// Whether this request is retried at all.
    pub fn applies_to(&self, head: &RequestHead) -> bool {
        self.request_headers.is_empty() || self.request_headers.iter().any(|matcher| matcher.matches(head))
    }

    /// Whether an attempt that failed before its response head is repeated. `request_sent`: a byte
    /// of the request may have reached the upstream.
    pub fn on_failure(&self, cause: Cause, request_sent: bool) -> bool {
        type C = Conditions;
        let any_reset = C::SERVER_ERROR | C::GATEWAY_ERROR | C::RESET;
        match cause {
            // A limit of our own: a retry would only make it worse.
            Cause::UpstreamOverflow => false,
            _ if self.on.any(C::RESET_BEFORE_REQUEST) && !request_sent => true,
            Cause::ConnectFailed | Cause::ConnectTimeout | Cause::UpstreamTlsFailed => {
                self.on.any(any_reset | C::CONNECT_FAILURE)
            }
            Cause::UpstreamRefusedStream => self.on.any(any_reset | C::REFUSED_STREAM),
            _ => self.on.any(any_reset),
        }
    }

    /// Whether an attempt that ran into its per-try time-out is repeated.
    pub fn on_per_try_timeout(&self) -> bool {
        self.on.any(Conditions::SERVER_ERROR | Conditions::GATEWAY_ERROR | Conditions::RESET)
    }

    /// Whether an attempt with this response head is repeated.
    pub fn on_response(&self, head: &ResponseHead) -> bool {
        type C = Conditions;
        // A rate limiter that says no means no, unless asked otherwise.
        if head.fields.contains("x-envoy-ratelimited") {
            return self.on.any(C::RATE_LIMITED);
        }
        let by_status = match head.status {
            409 if self.on.any(C::CONFLICT) => true,
            502..=504 if self.on.any(C::GATEWAY_ERROR) => true,
            500..=599 => self.on.any(C::SERVER_ERROR),
            _ => false,
        };
        by_status
            || self.on.any(C::STATUS_CODES) && self.status_codes.contains(&head.status)
            || self.on.any(C::HEADERS) && self.headers.iter().any(|matcher| matcher.matches_response(head))
            || self.on_grpc_status(head)
    }

    /// A gRPC status in the head: the response has no body.
    fn on_grpc_status(&self, head: &ResponseHead) -> bool {
        type C = Conditions;
        let condition = match head.fields.get("grpc-status") {
            Some(b"1") => C::CANCELLED,
            Some(b"4") => C::DEADLINE_EXCEEDED,
            Some(b"8") => C::RESOURCE_EXHAUSTED,
            Some(b"13") => C::INTERNAL,
            Some(b"14") => C::UNAVAILABLE,
            _ => return false,
        };
        self.on.any(condition)
    }

    /// How long to wait before the `retry`-th retry (from 1): anything below
    /// `base * 2^(retry - 1)`, at most the configured maximum.
    pub fn back_off(&self, retry: u32, draw: u64) -> Duration {
        let doubled = 1u32.checked_shl(retry.saturating_sub(1)).unwrap_or(u32::MAX);
        let window = self.base_interval.saturating_mul(doubled).min(self.interval_max);
        Duration::from_nanos(scale(draw, u64::try_from(window.as_nanos()).unwrap_or(u64::MAX)))
    }
}

fn predicate_is_previous_hosts(proto: &pb::retry_policy::RetryHostPredicate) -> Result<(), Unsupported> {
    let Some(pb::retry_policy::retry_host_predicate::ConfigType::TypedConfig(any)) = &proto.config_type else {
        return Err(Unsupported::missing("typed_config"));
    };
    unpack::<PreviousHostsPredicate>(any, "typed_config").map(|PreviousHostsPredicate {}| ())
}

fn previous_priorities(proto: &pb::retry_policy::RetryPriority) -> Result<u32, Unsupported> {
    let Some(pb::retry_policy::retry_priority::ConfigType::TypedConfig(any)) = &proto.config_type else {
        return Err(Unsupported::missing("typed_config"));
    };
    let every = unpack::<PreviousPrioritiesConfig>(any, "typed_config")?.update_frequency;
    let every = u32::try_from(every).ok().filter(|every| *every > 0);
    every.ok_or_else(|| Unsupported::new("typed_config.update_frequency", "must be above 0"))
}

/// How many retries a cluster may have under way, `requests` being under way or pending.
pub fn retries_allowed(limits: &Limits, requests: u32) -> u32 {
    match limits.retry_budget {
        None => limits.retries_max,
        Some(budget) => {
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of a u32, 0 to 100 %")]
            let share = (f64::from(requests) * budget.percent.clamp(0.0, 100.0) / 100.0) as u32;
            share.max(budget.min_concurrency)
        }
    }
}

/// Whether a draw falls into `percent` of all draws.
pub fn percent_holds(percent: f64, draw: u64) -> bool {
    #[expect(clippy::cast_precision_loss, reason = "53 bits fit")]
    let share = (draw >> 11) as f64 / (1u64 << 53) as f64;
    share * 100.0 < percent
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::google::protobuf::{Any, Duration as ProtoDuration, UInt32Value};
    use prost::Name;

    use super::*;
    use crate::cluster::RetryBudget;

    fn policy(retry_on: &str) -> RetryPolicy {
        let proto = pb::RetryPolicy {
            retry_on: retry_on.into(),
            retriable_status_codes: vec![503, 418],
            ..pb::RetryPolicy::default()
        };
        RetryPolicy::lower(&proto).unwrap()
    }

    const ISTIO: &str = "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes";

    #[test]
    fn failures() {
        let check = |retry_on: &str, cause: Cause, sent: bool, expect: bool| {
            assert_eq!(policy(retry_on).on_failure(cause, sent), expect, "{retry_on} {cause:?} {sent}");
        };
        check(ISTIO, Cause::ConnectFailed, false, true);
        check(ISTIO, Cause::ConnectTimeout, false, true);
        check(ISTIO, Cause::UpstreamTlsFailed, false, true);
        check(ISTIO, Cause::UpstreamRefusedStream, true, true);
        check(ISTIO, Cause::UpstreamReset, true, false);
        check(ISTIO, Cause::UpstreamClosed, true, false);
        check(ISTIO, Cause::UpstreamOverflow, false, false);
        check("reset-before-request", Cause::UpstreamClosed, false, true);
        check("reset-before-request", Cause::UpstreamClosed, true, false);
        check("reset-before-request", Cause::UpstreamOverflow, false, false);
        check("reset", Cause::UpstreamClosed, true, true);
        check("5xx", Cause::UpstreamProtocolError, true, true);
        check("gateway-error", Cause::ConnectFailed, false, true);
        check("", Cause::ConnectFailed, false, false);
        assert!(!policy(ISTIO).on_per_try_timeout());
        assert!(policy("5xx").on_per_try_timeout());
    }

    #[test]
    fn responses() {
        let check = |retry_on: &str, status: u16, header: Option<(&str, &str)>, expect: bool| {
            let mut head = ResponseHead::new(status);
            if let Some((name, value)) = header {
                head.fields.push(name, value.as_bytes());
            }
            assert_eq!(policy(retry_on).on_response(&head), expect, "{retry_on} {status} {header:?}");
        };
        check(ISTIO, 503, None, true);
        check(ISTIO, 500, None, false);
        check("connect-failure", 503, None, false);
        check("5xx", 500, None, true);
        check("5xx", 499, None, false);
        check("gateway-error", 500, None, false);
        check("gateway-error", 502, None, true);
        check("retriable-4xx", 409, None, true);
        check("retriable-4xx", 404, None, false);
        check(",retriable-status-codes", 418, None, true);
        check(ISTIO, 200, Some(("grpc-status", "14")), true);
        check(ISTIO, 200, Some(("grpc-status", "1")), true);
        check(ISTIO, 200, Some(("grpc-status", "13")), false);
        check("5xx", 503, Some(("x-envoy-ratelimited", "true")), false);
        check("envoy-ratelimited", 429, Some(("x-envoy-ratelimited", "true")), true);
    }

    #[test]
    fn headers() {
        let matcher = |name: &str| pb::HeaderMatcher {
            name: name.into(),
            header_match_specifier: Some(pb::header_matcher::HeaderMatchSpecifier::PresentMatch(true)),
            ..pb::HeaderMatcher::default()
        };
        let policy = RetryPolicy::lower(&pb::RetryPolicy {
            retry_on: "retriable-headers".into(),
            retriable_headers: vec![matcher("x-again")],
            retriable_request_headers: vec![matcher("x-may")],
            ..pb::RetryPolicy::default()
        })
        .unwrap();
        let mut response = ResponseHead::new(200);
        assert!(!policy.on_response(&response));
        response.fields.push("x-again", b"");
        assert!(policy.on_response(&response));
        let mut request = RequestHead::new("GET", "h", "/");
        assert!(!policy.applies_to(&request));
        request.fields.push("x-may", b"1");
        assert!(policy.applies_to(&request));
    }

    #[test]
    fn internal_callers_add_conditions_and_set_the_number() {
        let check = |base: Option<&RetryPolicy>, headers: &[(&str, &str)], expect: Option<(u32, bool, bool)>| {
            let mut head = RequestHead::new("GET", "h", "/");
            for (name, value) in headers {
                head.fields.push(name, value.as_bytes());
            }
            let steered = RetryPolicy::steered(base, &head);
            let seen = steered.map(|policy| {
                let fails = policy.on_failure(Cause::ConnectFailed, false);
                (policy.retries_max, fails, policy.on_response(&ResponseHead::new(500)))
            });
            assert_eq!(seen, expect, "{headers:?}");
        };
        let base = policy("connect-failure");
        check(None, &[], None);
        check(None, &[("x-envoy-retry-on", "5xx, nonsense")], Some((1, true, true)));
        check(None, &[("x-envoy-max-retries", "7")], Some((1, false, false)));
        check(Some(&base), &[("x-envoy-max-retries", "7")], Some((7, true, false)));
        check(Some(&base), &[("x-envoy-retry-on", "5xx"), ("x-envoy-max-retries", "0")], Some((0, true, true)));
        let on = ("x-envoy-retry-on", "retriable-status-codes");
        check(None, &[on, ("x-envoy-retriable-status-codes", "500,x")], Some((1, false, true)));
    }

    fn typed<M: Name>(message: &M) -> Any {
        Any { type_url: M::type_url(), value: message.encode_to_vec() }
    }

    #[test]
    fn what_istio_sends() {
        use pb::retry_policy::{RetryHostPredicate, RetryPriority, retry_host_predicate, retry_priority};
        let hosts = retry_host_predicate::ConfigType::TypedConfig(typed(&PreviousHostsPredicate {}));
        let priorities = typed(&PreviousPrioritiesConfig { update_frequency: 2 });
        let policy = RetryPolicy::lower(&pb::RetryPolicy {
            retry_on: ISTIO.into(),
            num_retries: Some(UInt32Value { value: 2 }),
            per_try_timeout: Some(ProtoDuration { seconds: 2, nanos: 0 }),
            retry_host_predicate: vec![RetryHostPredicate { name: "x".into(), config_type: Some(hosts) }],
            retry_priority: Some(RetryPriority {
                name: "y".into(),
                config_type: Some(retry_priority::ConfigType::TypedConfig(priorities)),
            }),
            host_selection_retry_max_attempts: 5,
            ..pb::RetryPolicy::default()
        })
        .unwrap();
        assert_eq!((policy.retries_max, policy.repicks_max, policy.previous_hosts), (2, 5, true));
        assert_eq!(policy.per_try_timeout, Some(Duration::from_secs(2)));
        assert_eq!(policy.previous_priorities, Some(2));
        let unknown = pb::RetryPolicy { retry_on: "sometimes".into(), ..pb::RetryPolicy::default() };
        assert!(RetryPolicy::lower(&unknown).is_err());
    }

    #[test]
    fn back_off_doubles_up_to_its_maximum() {
        let policy = policy("5xx");
        for (retry, milliseconds) in [(1, 25), (2, 50), (3, 100), (4, 200), (5, 250), (40, 250)] {
            let longest = policy.back_off(retry, u64::MAX);
            assert!(longest < Duration::from_millis(milliseconds), "{retry}");
            assert!(longest > Duration::from_millis(milliseconds) * 9 / 10, "{retry}");
            assert_eq!(policy.back_off(retry, 0), Duration::ZERO);
        }
    }

    #[test]
    fn budgets() {
        let mut limits = Limits { retries_max: 7, ..Limits::default() };
        assert_eq!(retries_allowed(&limits, 1000), 7);
        limits.retry_budget = Some(RetryBudget { percent: 20.0, min_concurrency: 3 });
        assert_eq!(retries_allowed(&limits, 1000), 200);
        assert_eq!(retries_allowed(&limits, 2), 3);
    }

    #[test]
    fn percentages() {
        assert!(!percent_holds(0.0, 0) && percent_holds(100.0, u64::MAX));
        assert!(percent_holds(50.0, 0) && !percent_holds(50.0, u64::MAX));
    }
}

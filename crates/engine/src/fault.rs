//! Fault injection: delays and aborts.
//!
//! Faults that a client could ask for by header are refused: nothing a client sends may steer the
//! mesh (property 13).
//!
//! *Source*: Envoy, "Fault injection"; `docs/parity.md`, Traffic 2.6.

use std::time::Duration;

use envoy_types::pb::envoy::extensions::filters::common::fault::v3 as common;
use envoy_types::pb::envoy::extensions::filters::http::fault::v3 as pb;
use envoy_types::pb::envoy::r#type::v3::FractionalPercent;
use types::{GrpcCode, RequestHead};

use crate::draw::Draw;
use crate::matcher::HeaderMatcher;
use crate::route::Fraction;
use crate::unsupported::{Unsupported, Within as _, duration, each};

/// Settings of the filter or of a route.
#[derive(Debug, Default, PartialEq)]
pub struct Fault {
    delay: Option<(Duration, Fraction)>,
    abort: Option<(Abort, Fraction)>,
    headers: Vec<HeaderMatcher>,
}

/// How to abort.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Abort {
    /// With this status.
    Http(u16),
    /// With this gRPC code.
    Grpc(GrpcCode),
}

/// What is to be done to a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// First wait so long.
    pub delay: Option<Duration>,
    /// Then abort.
    pub abort: Option<Abort>,
}

impl std::fmt::Display for Abort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Http(status) => write!(f, "status {status}"),
            Self::Grpc(code) => write!(f, "gRPC status {}", code.0),
        }
    }
}

impl std::fmt::Display for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.delay, self.abort) {
            (Some(delay), None) => write!(f, "delay of {delay:?}"),
            (Some(delay), Some(abort)) => write!(f, "delay of {delay:?}, then abort with {abort}"),
            (None, Some(abort)) => write!(f, "abort with {abort}"),
            (None, None) => f.write_str("none"),
        }
    }
}

impl Fault {
    /// Lowers settings. Runtime keys have no layer here: the values given count.
    pub fn lower(proto: &pb::HttpFault) -> Result<Self, Unsupported> {
        for (path, used) in [
            ("upstream_cluster", !proto.upstream_cluster.is_empty()),
            ("downstream_nodes", !proto.downstream_nodes.is_empty()),
            ("max_active_faults", proto.max_active_faults.is_some()),
            ("response_rate_limit", proto.response_rate_limit.is_some()),
        ] {
            if used {
                return Err(Unsupported::not_built(path));
            }
        }
        Ok(Self {
            delay: proto.delay.as_ref().map(delay).transpose().within("delay")?,
            abort: proto.abort.as_ref().map(abort).transpose().within("abort")?,
            headers: each(&proto.headers, "headers", HeaderMatcher::lower)?,
        })
    }

    /// Decides for a request. Delay and abort are drawn independently.
    pub fn decide(&self, head: &RequestHead, draw: Draw) -> Plan {
        if !self.headers.iter().all(|matcher| matcher.matches(head)) {
            return Plan::default();
        }
        let delay = self.delay.filter(|(_, share)| share.holds(draw.named("fault_delay")));
        let abort = self.abort.filter(|(_, share)| share.holds(draw.named("fault_abort")));
        Plan { delay: delay.map(|(delay, _)| delay), abort: abort.map(|(abort, _)| abort) }
    }
}

impl Fault {
    /// Every plan that [`decide`](Self::decide) may make for a request, with its share.
    ///
    /// *Shape*: shares are above 0 and add up to 1.
    pub fn plans(&self, head: &RequestHead) -> Vec<(Plan, f64)> {
        if !self.headers.iter().all(|matcher| matcher.matches(head)) {
            return vec![(Plan::default(), 1.0)];
        }
        let of = |share: Option<Fraction>| share.map_or(0.0, Fraction::share);
        let (delays, aborts) = (of(self.delay.map(|(_, share)| share)), of(self.abort.map(|(_, share)| share)));
        let (delay, abort) = (self.delay.map(|(delay, _)| delay), self.abort.map(|(abort, _)| abort));
        let all = [
            (Plan { delay: None, abort: None }, (1.0 - delays) * (1.0 - aborts)),
            (Plan { delay, abort: None }, delays * (1.0 - aborts)),
            (Plan { delay: None, abort }, (1.0 - delays) * aborts),
            (Plan { delay, abort }, delays * aborts),
        ];
        all.into_iter().filter(|(_, share)| *share > 0.0).collect()
    }
}

/// A missing percentage is none at all.
fn share(proto: Option<&FractionalPercent>) -> Result<Fraction, Unsupported> {
    match proto {
        None => Ok(Fraction { numerator: 0, denominator: 100 }),
        Some(proto) => Fraction::lower(proto).within("percentage"),
    }
}

fn delay(proto: &common::FaultDelay) -> Result<(Duration, Fraction), Unsupported> {
    use common::fault_delay::FaultDelaySecifier as Specifier;
    let time = match proto.fault_delay_secifier.as_ref().ok_or_else(|| Unsupported::missing("fixed_delay"))? {
        Specifier::FixedDelay(time) => duration(time, "fixed_delay")?,
        Specifier::HeaderDelay(_) => return Err(Unsupported::not_built("header_delay")),
    };
    if time.is_zero() {
        return Err(Unsupported::new("fixed_delay", "must be above 0"));
    }
    Ok((time, share(proto.percentage.as_ref())?))
}

fn abort(proto: &pb::FaultAbort) -> Result<(Abort, Fraction), Unsupported> {
    use pb::fault_abort::ErrorType;
    if !proto.response_body.is_empty() {
        return Err(Unsupported::not_built("response_body"));
    }
    let abort = match proto.error_type.as_ref().ok_or_else(|| Unsupported::missing("error_type"))? {
        ErrorType::HttpStatus(status) => match u16::try_from(*status) {
            Ok(status @ 200..600) => Abort::Http(status),
            _ => return Err(Unsupported::new("http_status", "must be 200 to 599")),
        },
        ErrorType::GrpcStatus(code) => match u8::try_from(*code) {
            Ok(code) if code <= 16 => Abort::Grpc(GrpcCode(code)),
            _ => return Err(Unsupported::new("grpc_status", "must be 0 to 16")),
        },
        ErrorType::HeaderAbort(_) => return Err(Unsupported::not_built("header_abort")),
    };
    Ok((abort, share(proto.percentage.as_ref())?))
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::envoy::config::route::v3 as route;
    use envoy_types::pb::envoy::r#type::v3::fractional_percent::DenominatorType;
    use envoy_types::pb::google::protobuf::Duration as ProtoDuration;

    use super::*;

    #[expect(clippy::unnecessary_wraps, reason = "as the messages hold it")]
    fn million(numerator: u32) -> Option<FractionalPercent> {
        Some(FractionalPercent { numerator, denominator: DenominatorType::Million as i32 })
    }

    #[expect(clippy::unnecessary_wraps, reason = "as the messages hold it")]
    fn delaying(percentage: Option<FractionalPercent>) -> Option<common::FaultDelay> {
        let time = ProtoDuration { seconds: 2, nanos: 0 };
        let specifier = common::fault_delay::FaultDelaySecifier::FixedDelay(time);
        Some(common::FaultDelay { percentage, fault_delay_secifier: Some(specifier) })
    }

    #[expect(clippy::unnecessary_wraps, reason = "as the messages hold it")]
    fn aborting(error: pb::fault_abort::ErrorType, percentage: Option<FractionalPercent>) -> Option<pb::FaultAbort> {
        Some(pb::FaultAbort { percentage, response_body: String::new(), error_type: Some(error) })
    }

    fn get() -> RequestHead {
        RequestHead::new("GET", "h", "/")
    }

    /// How many of 10 000 requests are delayed and aborted.
    fn check(proto: &pb::HttpFault, delayed: std::ops::RangeInclusive<u32>, aborted: std::ops::RangeInclusive<u32>) {
        let fault = Fault::lower(proto).unwrap();
        let (mut delays, mut aborts) = (0, 0);
        for seed in 0..10_000 {
            let plan = fault.decide(&get(), Draw::new(seed));
            delays += u32::from(plan.delay.is_some());
            aborts += u32::from(plan.abort.is_some());
        }
        assert!(delayed.contains(&delays), "{delays} delayed");
        assert!(aborted.contains(&aborts), "{aborts} aborted");
    }

    #[test]
    fn shares() {
        use pb::fault_abort::ErrorType;
        check(&pb::HttpFault::default(), 0..=0, 0..=0);
        check(&pb::HttpFault { delay: delaying(None), ..Default::default() }, 0..=0, 0..=0);
        let empty = Some(FractionalPercent::default());
        check(&pb::HttpFault { delay: delaying(empty), ..Default::default() }, 0..=0, 0..=0);
        let both = pb::HttpFault {
            delay: delaying(million(1_000_000)),
            abort: aborting(ErrorType::HttpStatus(418), million(500_000)),
            ..Default::default()
        };
        check(&both, 10_000..=10_000, 4_700..=5_300);
    }

    #[test]
    fn what_is_done() {
        use pb::fault_abort::ErrorType;
        let fault = Fault::lower(&pb::HttpFault {
            delay: delaying(million(1_000_000)),
            abort: aborting(ErrorType::GrpcStatus(14), million(1_000_000)),
            headers: vec![route::HeaderMatcher {
                name: "end-user".into(),
                header_match_specifier: Some(route::header_matcher::HeaderMatchSpecifier::PresentMatch(true)),
                ..Default::default()
            }],
            ..Default::default()
        })
        .unwrap();
        let mut head = get();
        assert_eq!(fault.decide(&head, Draw::new(1)), Plan::default());
        head.fields.push("end-user", b"jason");
        let plan = fault.decide(&head, Draw::new(1));
        assert_eq!(plan.delay, Some(Duration::from_secs(2)));
        assert_eq!(plan.abort, Some(Abort::Grpc(GrpcCode(14))));
    }

    #[test]
    fn refused() {
        use pb::fault_abort::ErrorType;
        let refused = |proto: pb::HttpFault| Fault::lower(&proto).unwrap_err().to_string();
        let header = aborting(ErrorType::HeaderAbort(pb::fault_abort::HeaderAbort {}), None);
        let header = pb::HttpFault { abort: header, ..Default::default() };
        assert_eq!(refused(header), "abort.header_abort is not supported");
        let status = pb::HttpFault { abort: aborting(ErrorType::HttpStatus(600), None), ..Default::default() };
        assert_eq!(refused(status), "abort.http_status must be 200 to 599");
    }
}

//! What gRPC says in HTTP headers.

use std::time::Duration;

use types::{Fields, ResponseHead};

/// `grpc-timeout`: at most eight digits and a unit.
///
/// *Source*: gRPC over HTTP/2, "Timeout".
pub(super) fn timeout(fields: &Fields) -> Option<Duration> {
    let text = fields.get_str("grpc-timeout")?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let n: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(n * 3600),
        "M" => Duration::from_secs(n * 60),
        "S" => Duration::from_secs(n),
        "m" => Duration::from_millis(n),
        "u" => Duration::from_micros(n),
        "n" => Duration::from_nanos(n),
        _ => return None,
    })
}

/// The value of `grpc-timeout` for a duration, in the finest unit from milliseconds on that holds it.
///
/// *Source*: Envoy `Grpc::Common::toGrpcTimeout`.
pub(super) fn timeout_text(timeout: Duration) -> String {
    const MOST: u128 = 99_999_999;
    let millis = timeout.as_millis();
    let units = [(1, 'm'), (1000, 'S'), (60_000, 'M'), (3_600_000, 'H')];
    let fits = units.into_iter().find(|(size, _)| millis / size <= MOST);
    fits.map_or_else(|| format!("{MOST}H"), |(size, unit)| format!("{}{unit}", millis / size))
}

/// The status of a response for outlier detection: the gRPC status of a trailers-only response as
/// an HTTP one.
///
/// *Source*: Envoy `Grpc::Utility::grpcToHttpStatus`.
pub(super) fn effective_status(head: &ResponseHead) -> u16 {
    if head.status != 200 || !head.is_grpc() {
        return head.status;
    }
    match head.fields.get_str("grpc-status").and_then(|status| status.parse::<u32>().ok()) {
        None | Some(0) => head.status,
        Some(1) => 499,
        Some(3 | 9 | 11) => 400,
        Some(4) => 504,
        Some(5) => 404,
        Some(6 | 10) => 409,
        Some(7) => 403,
        Some(8) => 429,
        Some(12) => 501,
        Some(14) => 503,
        Some(16) => 401,
        Some(_) => 500,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts() {
        let check = |text: &str, expect: Option<Duration>| {
            let mut fields = Fields::new();
            fields.push("grpc-timeout", text.as_bytes());
            assert_eq!(timeout(&fields), expect, "{text:?}");
        };
        check("1S", Some(Duration::from_secs(1)));
        check("250m", Some(Duration::from_millis(250)));
        check("2H", Some(Duration::from_hours(2)));
        check("99999999n", Some(Duration::from_nanos(99_999_999)));
        assert_eq!(timeout_text(Duration::from_secs(5)), "5000m");
        assert_eq!(timeout_text(Duration::from_secs(100_000)), "100000S");
        assert_eq!(timeout_text(Duration::MAX), "99999999H");
        for bad in ["", "S", "1", "123456789S", "1x", "-1S", "1 S", "é"] {
            check(bad, None);
        }
    }

    #[test]
    fn statuses() {
        let mut head = ResponseHead::new(200);
        assert_eq!(effective_status(&head), 200);
        head.fields.push("content-type", b"application/grpc");
        head.fields.push("grpc-status", b"14");
        assert_eq!(effective_status(&head), 503);
    }
}

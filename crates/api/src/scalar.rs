//! Scalars that Istio writes in its own way: durations, percentages, string matches.

use std::fmt;
use std::time::Duration as StdDuration;

use serde::Deserialize;
use serde::de::Error as _;

/// A duration as protobuf's JSON and Go write it: `5s`, `1.5s`, `1h30m`, `100ms`. Never negative.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Duration(pub StdDuration);

impl Duration {
    /// Parses Go's grammar: decimal numbers with units `h m s ms us µs ns`, nothing between; `0`
    /// needs no unit.
    pub fn parse(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is not a duration: write a number and a unit (h, m, s, ms), such as \"5s\"");
        let mut rest = text.strip_prefix('+').unwrap_or(text);
        if rest == "0" {
            return Ok(Self::default());
        }
        if rest.starts_with('-') {
            return Err(format!("duration {text:?} must not be negative"));
        }
        if rest.is_empty() {
            return Err(bad());
        }
        let mut nanos: u128 = 0;
        while !rest.is_empty() {
            let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(bad)?;
            let (number, after) = rest.split_at(end);
            let unit_end = after.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(after.len());
            let (unit, next) = after.split_at(unit_end);
            let scale: u128 = match unit {
                "ns" => 1,
                "us" | "µs" | "μs" => 1_000,
                "ms" => 1_000_000,
                "s" => 1_000_000_000,
                "m" => 60_000_000_000,
                "h" => 3_600_000_000_000,
                _ => return Err(bad()),
            };
            let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
            if (whole.is_empty() && fraction.is_empty())
                || fraction.contains('.')
                || whole.len() > 18
                || fraction.len() > 18
            {
                return Err(bad());
            }
            let whole: u128 = if whole.is_empty() { 0 } else { whole.parse().map_err(|_| bad())? };
            nanos += whole * scale;
            if !fraction.is_empty() {
                let digits: u128 = fraction.parse().map_err(|_| bad())?;
                let exponent = u32::try_from(fraction.len()).map_err(|_| bad())?;
                nanos += digits * scale / 10_u128.pow(exponent);
            }
            rest = next;
        }
        let nanos = u64::try_from(nanos).map_err(|_| format!("duration {text:?} is too long"))?;
        Ok(Self(StdDuration::from_nanos(nanos)))
    }
}

impl std::ops::Deref for Duration {
    type Target = StdDuration;
    fn deref(&self) -> &StdDuration {
        &self.0
    }
}

impl From<Duration> for StdDuration {
    fn from(duration: Duration) -> Self {
        duration.0
    }
}

impl fmt::Debug for Duration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl<'de> Deserialize<'de> for Duration {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).map_err(D::Error::custom)
    }
}

/// A port that may also be written as text, as Istio's examples of providers do: `port: "8000"`.
pub(crate) fn port<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<u16, D::Error> {
    let number = u64::deserialize(deserializer)?;
    u16::try_from(number).map_err(|_| D::Error::custom(format!("{number} is not a port")))
}

/// `{value: 12.5}`: percent, 0 to 100.
#[derive(Clone, Copy, Default, PartialEq, Debug, Deserialize)]
#[serde(default)]
pub struct Percent {
    /// Percent.
    pub value: f64,
}

impl Percent {
    /// Millionths of the whole, Envoy's finest denominator: 100 % is 1 000 000.
    pub fn millionths(self) -> u32 {
        let scaled = (self.value * 10_000.0).round().clamp(0.0, 1_000_000.0);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "clamped to 0..=1e6 above; NaN casts to 0"
        )]
        let millionths = scaled as u32;
        millionths
    }
}

/// `{exact|prefix|regex: …}`; empty, null or regex `*` is "present".
#[derive(Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Deserialize)]
#[serde(try_from = "StringMatchRecord")]
pub enum StringMatch {
    /// Any value, also the empty one.
    #[default]
    Present,
    /// The whole value.
    Exact(String),
    /// Its beginning.
    Prefix(String),
    /// RE2 over the whole value.
    Regex(String),
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct StringMatchRecord {
    exact: Option<String>,
    prefix: Option<String>,
    regex: Option<String>,
}

impl TryFrom<StringMatchRecord> for StringMatch {
    type Error = String;

    fn try_from(record: StringMatchRecord) -> Result<Self, String> {
        match (record.exact, record.prefix, record.regex) {
            (None, None, None) => Ok(Self::Present),
            (Some(exact), None, None) => Ok(Self::Exact(exact)),
            (None, Some(prefix), None) => Ok(Self::Prefix(prefix)),
            (None, None, Some(regex)) if regex == "*" => Ok(Self::Present),
            (None, None, Some(regex)) => Ok(Self::Regex(regex)),
            _ => Err("only one of `exact`, `prefix`, `regex` may be set".to_owned()),
        }
    }
}

/// Parses an RFC 3339 time to seconds since 1970; fractions are dropped.
pub fn parse_time(text: &str) -> Option<i64> {
    let bytes = text.as_bytes();
    let number = |from: usize, to: usize| -> Option<i64> {
        let digits = text.get(from..to)?;
        if digits.bytes().all(|b| b.is_ascii_digit()) { digits.parse().ok() } else { None }
    };
    let at = |index: usize, any_of: &[u8]| bytes.get(index).is_some_and(|b| any_of.contains(b));
    if !(at(4, b"-") && at(7, b"-") && at(10, b"Tt ") && at(13, b":") && at(16, b":")) {
        return None;
    }
    let (year, month, day) = (number(0, 4)?, number(5, 7)?, number(8, 10)?);
    let (hour, minute, second) = (number(11, 13)?, number(14, 16)?, number(17, 19)?);
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let mut zone = text.get(19..)?;
    if let Some(fraction) = zone.strip_prefix('.') {
        zone = fraction.trim_start_matches(|c: char| c.is_ascii_digit());
    }
    let offset = match zone.as_bytes() {
        b"Z" | b"z" => 0,
        [sign @ (b'+' | b'-'), a, b, b':', c, d] if [a, b, c, d].iter().all(|x| x.is_ascii_digit()) => {
            let digit = |x: &u8| i64::from(x - b'0');
            let seconds = (digit(a) * 10 + digit(b)) * 3600 + (digit(c) * 10 + digit(d)) * 60;
            if *sign == b'+' { seconds } else { -seconds }
        }
        _ => return None,
    };
    // Days since the epoch of the proleptic Gregorian calendar, with years that begin in March.
    let shifted = if month <= 2 { year - 1 } else { year };
    let era = shifted.div_euclid(400);
    let year_of_era = shifted.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let days = era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468;
    Some(days * 86_400 + hour * 3600 + minute * 60 + second - offset)
}

/// The code of a gRPC status that is written by name or number.
pub fn grpc_code(name: &str) -> Option<u32> {
    const NAMES: [&str; 17] = [
        "OK",
        "CANCELLED",
        "UNKNOWN",
        "INVALID_ARGUMENT",
        "DEADLINE_EXCEEDED",
        "NOT_FOUND",
        "ALREADY_EXISTS",
        "PERMISSION_DENIED",
        "RESOURCE_EXHAUSTED",
        "FAILED_PRECONDITION",
        "ABORTED",
        "OUT_OF_RANGE",
        "UNIMPLEMENTED",
        "INTERNAL",
        "UNAVAILABLE",
        "DATA_LOSS",
        "UNAUTHENTICATED",
    ];
    let by_name = NAMES.iter().position(|known| *known == name).and_then(|code| u32::try_from(code).ok());
    by_name.or_else(|| name.parse().ok().filter(|code| *code <= 16))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (text, millis) in [
            ("5s", 5_000),
            ("1.5s", 1_500),
            ("100ms", 100),
            ("1h30m", 5_400_000),
            ("0", 0),
            ("0s", 0),
            (".5s", 500),
            ("2m0.25s", 120_250),
            ("7200s", 7_200_000),
        ] {
            assert_eq!(Duration::parse(text).unwrap().0, StdDuration::from_millis(millis), "{text}");
        }
        for bad in ["", "5", "s", "5 s", "5sec", "-1s", "1.2.3s", "5s ", "99999999999999h", ".s", "abc"] {
            assert!(Duration::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn percent_keeps_a_ten_thousandth() {
        assert_eq!(Percent { value: 0.0001 }.millionths(), 1);
        assert_eq!(Percent { value: 100.0 }.millionths(), 1_000_000);
        assert_eq!(Percent { value: f64::NAN }.millionths(), 0);
        assert_eq!(Percent { value: 1e300 }.millionths(), 1_000_000);
    }

    #[test]
    fn times() {
        for (text, seconds) in [
            ("1970-01-01T00:00:00Z", 0),
            ("2026-11-25T03:47:00Z", 1_795_578_420),
            ("2000-02-29T12:00:00.5+01:00", 951_822_000),
        ] {
            assert_eq!(parse_time(text), Some(seconds), "{text}");
        }
        for bad in ["", "2026-11-25", "2026-13-01T00:00:00Z", "2026-11-25T03:47:00", "not a time at all!!"] {
            assert_eq!(parse_time(bad), None, "{bad:?}");
        }
    }
}

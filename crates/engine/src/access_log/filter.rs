//! Which requests get a log line.

use super::LogRecord;
use crate::matcher::HeaderMatcher;

/// A condition on the end of a request or connection.
#[derive(Debug)]
pub enum LogFilter {
    /// The status compares.
    Status(Comparison),
    /// The duration in milliseconds compares.
    Duration(Comparison),
    /// One of these flags is set; any flag, if the list is empty.
    Flags(Vec<Box<str>>),
    /// A request header.
    Header(HeaderMatcher),
    /// All hold.
    And(Vec<LogFilter>),
    /// One holds.
    Or(Vec<LogFilter>),
    /// An expression holds.
    Expression(crate::cel::Expression),
    /// Always (health checks and tracing do not set requests apart here).
    Always,
}

/// A comparison with a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Comparison {
    /// Equal.
    Equal(u64),
    /// Not less.
    AtLeast(u64),
    /// Not more.
    AtMost(u64),
    /// Different.
    NotEqual(u64),
}

impl Comparison {
    /// Whether it holds.
    pub fn holds(self, value: u64) -> bool {
        match self {
            Self::Equal(to) => value == to,
            Self::AtLeast(to) => value >= to,
            Self::AtMost(to) => value <= to,
            Self::NotEqual(to) => value != to,
        }
    }
}

impl LogFilter {
    /// Whether a line is written.
    pub fn holds(&self, record: &LogRecord<'_>) -> bool {
        match self {
            Self::Status(comparison) => comparison.holds(record.response.map_or(0, |head| head.status.into())),
            Self::Duration(comparison) => {
                comparison.holds(u64::try_from(record.duration.as_millis()).unwrap_or(u64::MAX))
            }
            Self::Flags(wanted) => record
                .info
                .causes
                .iter()
                .map(|cause| cause.surface().flag)
                .any(|flag| flag != "-" && (wanted.is_empty() || wanted.iter().any(|wanted| **wanted == *flag))),
            Self::Header(matcher) => record.request.is_some_and(|head| matcher.matches(head)),
            Self::And(list) => list.iter().all(|filter| filter.holds(record)),
            Self::Or(list) => list.iter().any(|filter| filter.holds(record)),
            Self::Expression(expression) => expression.holds(record),
            Self::Always => true,
        }
    }
}

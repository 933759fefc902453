//! Access logs: formats compiled once, lines made from what is known at the end.

/// Where log lines go and what they say.
#[derive(Debug)]
pub struct AccessLog {
    /// File, or `/dev/stdout`.
    pub path: Box<str>,
}

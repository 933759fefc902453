//! What lowering says when a message holds something that is not built or not valid.

use std::fmt;

use envoy_types::pb::google::protobuf::{Any, Duration as ProtoDuration};
use std::time::Duration;

/// A part of a resource that the engine refuses. The whole resource is refused with it: nothing is
/// skipped silently.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Unsupported {
    /// Path of the field inside the resource, in the names of the `.proto` files.
    pub path: String,
    /// Why: lower case, no full stop.
    pub reason: String,
}

impl Unsupported {
    /// A refusal at `path`.
    pub fn new(path: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { path: path.into(), reason: reason.into() }
    }

    /// The field must be set and is not.
    pub fn missing(path: impl Into<String>) -> Self {
        Self::new(path, "must be set")
    }

    /// The field is valid in Envoy, but not built here.
    pub fn not_built(path: impl Into<String>) -> Self {
        Self::new(path, "is not supported")
    }

    /// The same refusal, seen from a message that holds the refused one at `prefix`.
    #[must_use]
    pub fn within(mut self, prefix: &str) -> Self {
        if self.path.is_empty() {
            prefix.clone_into(&mut self.path);
        } else if !prefix.is_empty() {
            let dot = if self.path.starts_with('[') { "" } else { "." };
            self.path = format!("{prefix}{dot}{}", self.path);
        }
        self
    }
}

impl fmt::Display for Unsupported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.path.is_empty() { f.write_str(&self.reason) } else { write!(f, "{} {}", self.path, self.reason) }
    }
}

impl std::error::Error for Unsupported {}

/// Adds the path on the way out of nested lowering.
pub trait Within {
    /// The same result; a refusal is seen from `prefix`.
    #[must_use]
    fn within(self, prefix: &str) -> Self;
    /// The same result; a refusal is seen from `prefix[index]`.
    #[must_use]
    fn within_item(self, prefix: &str, index: usize) -> Self;
}

impl<T> Within for Result<T, Unsupported> {
    fn within(self, prefix: &str) -> Self {
        self.map_err(|bad| bad.within(prefix))
    }

    fn within_item(self, prefix: &str, index: usize) -> Self {
        self.map_err(|bad| bad.within(&format!("{prefix}[{index}]")))
    }
}

/// Lowers every item of a list; a refusal carries the item's index.
pub fn each<T, U>(
    items: &[T],
    path: &str,
    lower: impl Fn(&T) -> Result<U, Unsupported>,
) -> Result<Vec<U>, Unsupported> {
    items.iter().enumerate().map(|(index, item)| lower(item).within_item(path, index)).collect()
}

/// A duration that must not be negative.
pub fn duration(value: &ProtoDuration, path: &str) -> Result<Duration, Unsupported> {
    let seconds = u64::try_from(value.seconds).map_err(|_| Unsupported::new(path, "must not be negative"))?;
    let nanos = u32::try_from(value.nanos)
        .ok()
        .filter(|nanos| *nanos < 1_000_000_000)
        .ok_or_else(|| Unsupported::new(path, "is not a valid duration"))?;
    Ok(Duration::new(seconds, nanos))
}

/// The full name of the type that a URL ends in.
pub fn type_name(url: &str) -> &str {
    url.rsplit('/').next().unwrap_or(url)
}

/// The message inside `any`, which must be of exactly this type.
pub fn unpack<M: prost::Message + prost::Name + Default>(any: &Any, path: &str) -> Result<M, Unsupported> {
    if type_name(&any.type_url) != M::full_name() {
        return Err(Unsupported::new(path, format!("holds {}, where {} is needed", any.type_url, M::full_name())));
    }
    M::decode(any.value.as_slice()).map_err(|error| Unsupported::new(path, format!("cannot be decoded: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_grow_outward() {
        let bad = Unsupported::missing("name").within("headers[2]").within("match");
        assert_eq!(bad.to_string(), "match.headers[2].name must be set");
        assert_eq!(Unsupported::missing("[1].name").within("logs").to_string(), "logs[1].name must be set");
        assert_eq!(Unsupported::new("", "is empty").within("match").to_string(), "match is empty");
    }

    #[test]
    fn durations() {
        let proto = |seconds, nanos| ProtoDuration { seconds, nanos };
        assert_eq!(duration(&proto(1, 5), "x").unwrap(), Duration::new(1, 5));
        assert!(duration(&proto(-1, 0), "x").is_err());
        assert!(duration(&proto(1, -5), "x").is_err());
    }
}

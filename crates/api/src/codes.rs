//! Codes of the findings that reading and checking one object can give.

/// The text is not YAML.
pub const SYNTAX: &str = "LAT0001";
/// Nobody knows a kind of that name or version.
pub const UNKNOWN_KIND: &str = "LAT0002";
/// Known to Istio or Kubernetes, without effect here so far.
pub const NOT_EFFECTIVE: &str = "LAT0003";
/// The object has no such field.
pub const UNKNOWN_FIELD: &str = "LAT0004";
/// The same object is written twice.
pub const DUPLICATE: &str = "LAT0005";
/// A value does not fit its field. Istio's `SchemaValidationError`.
pub const SCHEMA: &str = "IST0106";
/// Admitted, but probably not what was meant. Istio's `SchemaWarning`.
pub const DUBIOUS: &str = "IST0133";

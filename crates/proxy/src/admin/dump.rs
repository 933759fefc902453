//! `/config_dump`, in Envoy's form.

use super::Context;
use crate::control::Inspection;

/// The dump as JSON.
pub(super) fn config(_: &Context, inspection: &Inspection, _eds: bool, _resource: Option<&str>) -> Result<String, String> {
    let _ = (&inspection.raw, &inspection.versions, inspection.live);
    Err("config_dump is not built yet".into())
}

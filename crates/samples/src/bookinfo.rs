//! Bookinfo: productpage calls details and reviews; reviews v2 and v3 call ratings.
//!
//! *Source*: Istio's bookinfo sample: paths, JSON, environment variables and time-outs are its
//! own, because its tasks depend on them (a seven second delay before ratings breaks productpage,
//! whose budget is two tries of three seconds).

pub(crate) mod details;
pub(crate) mod productpage;
pub(crate) mod ratings;
pub(crate) mod reviews;

use crate::http_app::setting;

/// Bookinfo's port.
const PORT: u16 = 9080;

/// Host and port of a service, as bookinfo's environment may move them.
fn service(name: &str) -> (String, u16) {
    let upper = name.to_uppercase();
    let host = setting(&format!("{upper}_HOSTNAME"), name);
    let domain = setting("SERVICES_DOMAIN", "");
    let host = if domain.is_empty() { host } else { format!("{host}.{domain}") };
    // Kubernetes sets REVIEWS_PORT to tcp://…, which is why bookinfo calls its own *_SERVICE_PORT.
    let port = setting(&format!("{upper}_SERVICE_PORT"), "").parse().unwrap_or(PORT);
    (host, port)
}

fn port(options: &crate::Options) -> u16 {
    if options.port == 0 { PORT } else { options.port }
}

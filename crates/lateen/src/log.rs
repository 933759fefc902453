//! The process's own log: where its levels come from, and how they change while it runs.

use std::collections::BTreeMap;
use std::io::IsTerminal as _;
use std::sync::{Arc, Mutex, PoisonError};

use proxy::LogLevels;
use tracing_subscriber::EnvFilter;

/// What can be given a level of its own, beside everything else.
const COMPONENTS: [&str; 10] =
    ["discovery", "engine", "h2", "http1", "identity", "lateen", "proxy", "rustls", "telemetry", "xds"];

/// Puts a new filter in place.
type Reload = Box<dyn Fn(EnvFilter) -> Result<(), String> + Send + Sync>;

/// Levels in force.
pub(crate) struct Levels {
    by_component: Mutex<BTreeMap<&'static str, &'static str>>,
    reload: Reload,
}

/// Our word for one of Envoy's levels, or of our own.
fn word(level: &str) -> Option<&'static str> {
    Some(match level {
        "trace" => "trace",
        "debug" => "debug",
        "info" => "info",
        "warning" | "warn" => "warn",
        "error" | "critical" => "error",
        "off" => "off",
        _ => return None,
    })
}

/// Starts the log. `LATEEN_LOG` says what is written, else `level`.
pub(crate) fn start(level: &str) -> Arc<Levels> {
    let level = word(level).unwrap_or("warn");
    let filter = EnvFilter::try_from_env("LATEEN_LOG").unwrap_or_else(|_| level.into());
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        // It would say so on standard error, which is what is closed then.
        .log_internal_errors(false)
        // What is kept in a file, as the logs of pods are, is text.
        .with_ansi(std::io::stderr().is_terminal())
        .with_filter_reloading();
    let handle = builder.reload_handle();
    // A second call is a test's; the first one holds.
    _ = builder.try_init();
    Arc::new(Levels {
        by_component: Mutex::new(COMPONENTS.map(|component| (component, level)).into()),
        reload: Box::new(move |filter| handle.reload(filter).map_err(|error| error.to_string())),
    })
}

impl LogLevels for Levels {
    fn list(&self) -> Vec<(&'static str, &'static str)> {
        let levels = self.by_component.lock().unwrap_or_else(PoisonError::into_inner);
        levels.iter().map(|(component, level)| (*component, *level)).collect()
    }

    fn set(&self, component: Option<&str>, level: &str) -> Result<(), String> {
        let level = word(level).ok_or_else(|| format!("unknown level {level:?}"))?;
        let mut levels = self.by_component.lock().unwrap_or_else(PoisonError::into_inner);
        let mut next = levels.clone();
        match component {
            None => next.values_mut().for_each(|of| *of = level),
            Some(name) => *next.get_mut(name).ok_or_else(|| format!("unknown logger {name:?}"))? = level,
        }
        let directives: Vec<String> = next.iter().map(|(component, level)| format!("{component}={level}")).collect();
        let filter = EnvFilter::try_new(directives.join(",")).map_err(|error| error.to_string())?;
        (self.reload)(filter)?;
        *levels = next;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_change_one_by_one_or_all_at_once() {
        let reload: Reload = Box::new(|_| Ok(()));
        let levels = Levels { by_component: Mutex::new([("proxy", "warn"), ("xds", "warn")].into()), reload };
        levels.set(Some("xds"), "debug").unwrap();
        assert_eq!(levels.list(), [("proxy", "warn"), ("xds", "debug")]);
        levels.set(None, "critical").unwrap();
        assert_eq!(levels.list(), [("proxy", "error"), ("xds", "error")]);
        assert!(levels.set(Some("nobody"), "info").unwrap_err().contains("nobody"));
        assert!(levels.set(None, "loud").unwrap_err().contains("loud"));
        assert_eq!(levels.list(), [("proxy", "error"), ("xds", "error")]);
    }
}

//! The process's own log: where its levels come from, and how they change while it runs.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::IsTerminal as _;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result};
use proxy::LogLevels;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::writer::BoxMakeWriter;

/// What can be given a level of its own, beside everything else.
const COMPONENTS: [&str; 11] =
    ["discovery", "engine", "h2", "http1", "identity", "lateen", "proxy", "rustls", "telemetry", "workers", "xds"];

/// Puts a new filter in place.
type Reload = Box<dyn Fn(EnvFilter) -> Result<(), String> + Send + Sync>;

/// Levels in force.
pub(crate) struct Levels {
    by_component: Mutex<BTreeMap<&'static str, &'static str>>,
    reload: Reload,
}

/// Our word for one of Envoy's levels, or of our own.
pub(crate) fn word(level: &str) -> Option<&'static str> {
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

/// What is written, and where.
#[derive(Debug, Default)]
pub(crate) struct Settings<'a> {
    /// Of everything that has no level of its own.
    pub(crate) level: &'a str,
    /// Of single components: ours, or Envoy's.
    pub(crate) components: Vec<(&'a str, &'a str)>,
    /// Lines go to the end of this file, in place of standard error.
    pub(crate) file: Option<&'a Path>,
}

/// Where we do what one of Envoy's loggers tells of. Most of Envoy's have no counterpart.
const ENVOYS: [(&str, &str); 22] = [
    ("admin", "proxy"),
    ("client", "workers"),
    ("config", "xds"),
    ("conn_handler", "workers"),
    ("connection", "workers"),
    ("dns", "proxy"),
    ("ext_authz", "engine"),
    ("file", "workers"),
    ("filter", "engine"),
    ("grpc", "xds"),
    ("hc", "engine"),
    ("http", "workers"),
    ("http2", "h2"),
    ("jwt", "engine"),
    ("main", "proxy"),
    ("pool", "workers"),
    ("rbac", "engine"),
    ("router", "engine"),
    ("secret", "identity"),
    ("stats", "telemetry"),
    ("tracing", "telemetry"),
    ("upstream", "workers"),
];

/// From least to most.
const WORDS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

impl Settings<'_> {
    /// The level of every component.
    ///
    /// A logger of Envoy's can only make its counterpart say more: `misc:error` or `upstream:error` shall not
    /// silence what others of its loggers would say. One without a counterpart is passed over.
    ///
    /// *Errors*: a word that is no level.
    fn by_component(&self) -> Result<BTreeMap<&'static str, &'static str>> {
        let rank = |word: &str| WORDS.iter().position(|known| *known == word);
        let level = word(self.level).with_context(|| format!("unknown level {:?}", self.level))?;
        let mut levels: BTreeMap<_, _> = COMPONENTS.map(|component| (component, level)).into();
        for (name, level) in &self.components {
            let level = word(level).with_context(|| format!("unknown level {level:?} of {name}"))?;
            if let Some(own) = levels.get_mut(*name) {
                *own = level;
            } else if let Some((_, ours)) = ENVOYS.iter().find(|(envoys, _)| envoys == name)
                && let Some(own) = levels.get_mut(ours)
                && rank(level) > rank(own)
            {
                *own = level;
            }
        }
        Ok(levels)
    }
}

/// Starts the log on standard error. `LATEEN_LOG` says what is written, else `level`.
pub(crate) fn start(level: &str) -> Arc<Levels> {
    let level = word(level).unwrap_or("warn");
    let levels = COMPONENTS.map(|component| (component, level)).into();
    install(level, levels, None)
}

/// Starts the log as a command line wants it. `LATEEN_LOG` goes before the levels.
///
/// *Errors*: a word that is no level, a file that cannot be opened.
pub(crate) fn start_with(settings: &Settings<'_>) -> Result<Arc<Levels>> {
    let file = match settings.file {
        None => None,
        Some(path) => {
            let open = File::options().create(true).append(true).open(path);
            Some(open.with_context(|| format!("cannot open the log {}", path.display()))?)
        }
    };
    Ok(install(word(settings.level).unwrap_or("warn"), settings.by_component()?, file))
}

fn install(level: &str, levels: BTreeMap<&'static str, &'static str>, file: Option<File>) -> Arc<Levels> {
    let filter = EnvFilter::try_from_env("LATEEN_LOG").unwrap_or_else(|_| {
        let own = levels.iter().filter(|(_, own)| **own != level).map(|(component, own)| format!("{component}={own}"));
        let directives: Vec<String> = std::iter::once(level.to_owned()).chain(own).collect();
        EnvFilter::new(directives.join(","))
    });
    // What is kept in a file, as the logs of pods are, is text.
    let ansi = file.is_none() && std::io::stderr().is_terminal();
    let writer = match file {
        Some(file) => BoxMakeWriter::new(Arc::new(file)),
        None => BoxMakeWriter::new(std::io::stderr),
    };
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer)
        // It would say so on standard error, which is what is closed then.
        .log_internal_errors(false)
        .with_ansi(ansi)
        .with_filter_reloading();
    let handle = builder.reload_handle();
    // A second call is a test's; the first one holds.
    _ = builder.try_init();
    Arc::new(Levels {
        by_component: Mutex::new(levels),
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
    fn loggers_of_envoy_stand_for_ours() {
        let levels = |components: &[(&'static str, &'static str)]| {
            let settings = Settings { level: "warning", components: components.to_vec(), file: None };
            settings.by_component().map(|all| all.into_iter().filter(|(_, level)| *level != "warn").collect::<Vec<_>>())
        };
        assert_eq!(levels(&[("misc", "error"), ("upstream", "critical")]).unwrap(), []);
        assert_eq!(
            levels(&[("config", "trace"), ("upstream", "debug"), ("http", "info")]).unwrap(),
            [("workers", "debug"), ("xds", "trace")]
        );
        assert_eq!(levels(&[("proxy", "off")]).unwrap(), [("proxy", "off")]);
        assert!(levels(&[("config", "loud")]).unwrap_err().to_string().contains("loud"));
    }

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

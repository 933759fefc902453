//! Follows the CA's directory: roots that end, files that change.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use telemetry::registry::Registry;
use tokio::sync::watch;

use super::{Ca, store};
use crate::Clock;

/// Takes over what the CA's directory holds, as far as nobody is cut off by it.
pub(crate) struct CaRenewal {
    pub(crate) dir: PathBuf,
    pub(crate) root_cert_out: Option<PathBuf>,
    pub(crate) every: Duration,
    pub(crate) clock: Clock,
    pub(crate) newest: watch::Sender<Arc<Ca>>,
    pub(crate) metrics: Registry,
}

impl CaRenewal {
    pub(crate) async fn run(self) {
        // What cannot be used is told once, not at each look.
        let mut told = None;
        loop {
            tokio::time::sleep(self.every).await;
            let followed = match self.look().await {
                Ok(Some(next)) => self.take_over(next),
                Ok(None) => Ok(()),
                Err(error) => Err(error),
            };
            match followed {
                Ok(()) => told = None,
                Err(error) if told.as_ref() != Some(&error) => {
                    tracing::error!(error, "the CA stays as it was");
                    told = Some(error);
                }
                Err(_) => {}
            }
            count_roots(&self.metrics, &self.newest.borrow());
        }
    }

    async fn look(&self) -> Result<Option<Ca>, String> {
        let (current, dir, now) = (Arc::clone(&self.newest.borrow()), self.dir.clone(), (self.clock)());
        let looked = tokio::task::spawn_blocking(move || store::successor(&current, &dir, now)).await;
        looked.map_err(|error| error.to_string())?.map_err(|error| identity::agent::describe(&error))
    }

    /// Puts `next` in place, once its roots are where those who start find them. The next look makes another
    /// one if they cannot be written.
    fn take_over(&self, next: Ca) -> Result<(), String> {
        if let Some(path) = &self.root_cert_out {
            let written = store::write_atomically(path, next.roots().to_pem().as_bytes(), 0o644);
            written.map_err(|error| identity::agent::describe(&error))?;
        }
        let has_signer = next.has_signer_of(&self.newest.borrow());
        tracing::info!(
            roots = next.roots().certificates().len(),
            signer = if has_signer { "as before" } else { "new" },
            "the CA follows its directory"
        );
        count_roots(&self.metrics, &next);
        self.newest.send_replace(Arc::new(next));
        Ok(())
    }
}

/// Writes down when the CA ends.
pub(crate) fn count_roots(metrics: &Registry, ca: &Ca) {
    let at = |until: SystemTime| until.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    let left = |until: SystemTime| until.duration_since(SystemTime::now()).unwrap_or_default().as_secs_f64();
    if let Some(until) = ca.roots().not_after() {
        metrics.set("citadel_server_root_cert_expiry_timestamp", &[], at(until));
        metrics.set("citadel_server_root_cert_expiry_seconds", &[], left(until));
    }
    metrics.set("citadel_server_cert_chain_expiry_timestamp", &[], at(ca.not_after()));
    metrics.set("citadel_server_cert_chain_expiry_seconds", &[], left(ca.not_after()));
    metrics.set("istio_build", &[("component", "pilot"), ("tag", env!("CARGO_PKG_VERSION"))], 1.0);
}

#[cfg(test)]
mod tests {
    use types::TrustDomain;

    use super::*;
    use crate::ca::Lifetimes;

    #[tokio::test]
    async fn a_ca_takes_over_once_its_roots_are_written() {
        let dir = tempfile::tempdir().unwrap();
        let (ca_dir, out) = (dir.path().join("ca"), dir.path().join("out"));
        let (now, day) = (SystemTime::now(), Duration::from_hours(24));
        // Nine tenths of its ten years are over.
        let made = now - 3285 * day;
        let first = store::load_or_create(&ca_dir, &TrustDomain::default(), Lifetimes::default(), made).unwrap();
        let renewal = CaRenewal {
            dir: ca_dir,
            root_cert_out: Some(out.join("root-cert.pem")),
            every: day,
            clock: Arc::new(move || now),
            newest: watch::Sender::new(Arc::new(first)),
            metrics: Registry::new(),
        };
        let roots = || renewal.newest.borrow().roots().certificates().len();
        let next = renewal.look().await.unwrap().expect("it is due");
        let error = renewal.take_over(next).unwrap_err();
        assert!(error.contains("root-cert.pem"), "{error}");
        assert_eq!(roots(), 1);
        std::fs::create_dir(&out).unwrap();
        let next = renewal.look().await.unwrap().expect("it is due still");
        renewal.take_over(next).unwrap();
        assert_eq!(roots(), 2);
        let written = std::fs::read_to_string(out.join("root-cert.pem")).unwrap();
        assert_eq!(written, renewal.newest.borrow().roots().to_pem());
        assert!(renewal.look().await.unwrap().is_none());
    }
}

//! Secrets as messages: parsed, checked, stored.

use engine::config::Name;
use engine::lower::Raw;
use identity::agent::describe;
use xds::client::Rejected;

use workers::secrets::{ROOTS, Secret, Secrets, WORKLOAD};

/// Applies an update; each secret is taken or refused whole, a refused one keeps its last good value.
pub(crate) fn apply(secrets: &Secrets, raws: &[Raw], removed: &[Name]) -> Vec<Rejected> {
    let mut rejected = Vec::new();
    secrets.change(|store| {
        for name in removed {
            store.remove(name);
        }
        for raw in raws {
            // the workload's own never comes over ADS
            let own = matches!(&*raw.name, WORKLOAD | ROOTS) && store.contains_key(&raw.name);
            let parsed = if own { Err("the name is the workload's own".to_owned()) } else { parse(raw) };
            match parsed {
                Ok(secret) => {
                    store.insert(Name::clone(&raw.name), secret);
                }
                Err(reason) => rejected.push(Rejected { name: raw.name.to_string(), reason }),
            }
        }
    });
    rejected
}

fn parse(raw: &Raw) -> Result<Secret, String> {
    let settings = engine::lower::secret(&raw.body).map_err(|refused| refused.to_string())?;
    Secret::read(settings).map_err(|error| describe(&error))
}

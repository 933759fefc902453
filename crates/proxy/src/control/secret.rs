//! Secrets as messages: parsed, checked, stored.

use std::sync::Arc;

use engine::config::Name;
use engine::lower::Raw;
use envoy_types::pb::envoy::config::core::v3::{DataSource, data_source::Specifier};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{Secret as Message, secret::Type};
use identity::workload::{KeyAndChain, TrustRoots};
use prost::Message as _;
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
    let message = Message::decode(raw.body.value.as_slice()).map_err(|error| error.to_string())?;
    match message.r#type.ok_or("it is empty")? {
        Type::TlsCertificate(certificate) => {
            let chain = bytes(certificate.certificate_chain.as_ref(), "certificate_chain")?;
            let key = bytes(certificate.private_key.as_ref(), "private_key")?;
            KeyAndChain::from_pem(&chain, &key)
                .map(|keys| Secret::Certificate(Arc::new(keys)))
                .map_err(|e| e.to_string())
        }
        Type::ValidationContext(validation) => {
            let roots = bytes(validation.trusted_ca.as_ref(), "trusted_ca")?;
            TrustRoots::from_pem(&roots).map(|roots| Secret::Roots(Arc::new(roots))).map_err(|e| e.to_string())
        }
        Type::SessionTicketKeys(_) => Err("session_ticket_keys is not built: sessions are not resumed".into()),
        Type::GenericSecret(_) => Err("generic_secret is not built".into()),
    }
}

fn bytes(source: Option<&DataSource>, field: &str) -> Result<Vec<u8>, String> {
    match source.and_then(|source| source.specifier.as_ref()) {
        None => Err(format!("{field} is missing")),
        Some(Specifier::InlineBytes(bytes)) => Ok(bytes.clone()),
        Some(Specifier::InlineString(text)) => Ok(text.clone().into_bytes()),
        Some(Specifier::Filename(path)) => std::fs::read(path).map_err(|error| format!("{field}: {path}: {error}")),
        Some(Specifier::EnvironmentVariable(name)) => {
            std::env::var(name).map(String::into_bytes).map_err(|_| format!("{field}: ${name} is not set"))
        }
    }
}

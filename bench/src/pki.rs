//! SPIFFE identities of a mesh that lives as long as one run.

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};

/// A workload's certificate, all as PEM.
pub(crate) struct Identity {
    /// `spiffe://…`
    pub(crate) id: String,
    pub(crate) chain: String,
    pub(crate) key: String,
    pub(crate) roots: String,
}

/// Identities of `accounts` in the namespace `default`, signed by one new root.
pub(crate) fn identities<const N: usize>(accounts: [&str; N]) -> Result<[Identity; N]> {
    let key = KeyPair::generate().context("a key for the root")?;
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let roots = params.self_signed(&key).context("the root")?.pem();
    let issuer = Issuer::new(params, key);
    let mut made = Vec::new();
    for account in accounts {
        let id = format!("spiffe://cluster.local/ns/default/sa/{account}");
        let key = KeyPair::generate().context("a key for a workload")?;
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(id.as_str().try_into()?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let chain = params.signed_by(&key, &issuer).context("a workload's certificate")?.pem();
        made.push(Identity { id, chain, key: key.serialize_pem(), roots: roots.clone() });
    }
    made.try_into().map_err(|_| anyhow::anyhow!("one identity for each account"))
}

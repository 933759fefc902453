//! Where the signing key comes from: plugged-in files, or a self-signed root kept in a directory.
//!
//! | in the directory | mode |
//! |---|---|
//! | `ca-cert.pem`, `ca-key.pem`, `root-cert.pem`, `cert-chain.pem` | plugged-in (Istio's `cacerts`) |
//! | some but not all of them | refused: a half-made bundle is never ignored |
//! | none of them | `self-signed/ca-cert.pem` and `ca-key.pem`, made once and kept |
//!
//! A self-signed root gets a successor for the same key before it ends ([`load_or_create`]): it
//! signs from then on and stands first in the file, and those before stay trusted while they live.
//! Since the key is the same, old and new roots vouch for each other's certificates.
//!
//! Several control planes may share a folder: who writes holds the lock on `.lock` and looks again under it,
//! so that all have what the first one wrote.
//!
//! What cannot be read or does not fit is an error that names the file; a CA is never silently
//! replaced, since that would cut every workload off.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use identity::{PeerFacts, TrustRoots, pem};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384,
};
use rustls::pki_types::CertificateDer;
use thiserror::Error;
use types::TrustDomain;

use super::{Ca, HandedOut, Lifetimes, SKEW, Signer};

/// Life of a self-signed root (`CITADEL_SELF_SIGNED_CA_CERT_TTL`).
pub(super) const ROOT_LIFETIME: Duration = Duration::from_hours(3650 * 24);

/// A self-signed root with less of its life left than this gets a successor
/// (`CITADEL_SELF_SIGNED_ROOT_CERT_GRACE_PERIOD_PERCENTILE`).
const ROOT_GRACE_PERCENT: u32 = 20;

const PLUGGED_IN: [&str; 4] = ["ca-cert.pem", "ca-key.pem", "root-cert.pem", "cert-chain.pem"];
const SELF_SIGNED: &str = "self-signed";

/// Why there is no CA.
#[derive(Debug, Error)]
pub enum StoreError {
    /// A file or folder.
    #[error("{}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A plugged-in bundle misses files.
    #[error("{} holds {found:?} but lacks {missing:?}; give all four or none", dir.display())]
    Partial {
        /// Where.
        dir: PathBuf,
        /// What is there.
        found: Vec<&'static str>,
        /// What is not.
        missing: Vec<&'static str>,
    },
    /// A file is unreadable as what it should be.
    #[error("{}: {reason}", path.display())]
    Invalid {
        /// Which.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// Key, certificate, chain and root do not belong together.
    #[error("CA key, certificate, chain and root do not fit together: {0}")]
    Inconsistent(String),
    /// Another CA was put in the place of the one that serves.
    #[error("the CA that is there now lacks a root that is trusted, so all who hold its certificates would be cut off")]
    CutsOff,
    /// No key or certificate could be made.
    #[error("cannot make a root certificate: {0}")]
    Make(rcgen::Error),
}

/// Loads the CA of `dir`, making a self-signed one if the directory holds none, and a successor of
/// a self-signed root that will end.
pub fn load_or_create(
    dir: &Path,
    trust_domain: &TrustDomain,
    lifetimes: Lifetimes,
    now: SystemTime,
) -> Result<Ca, StoreError> {
    let ca = if is_plugged_in(dir)? {
        load_plugged_in(dir, trust_domain, lifetimes)?
    } else {
        let kept = dir.join(SELF_SIGNED);
        if !kept.exists() || needs_successor(&kept, now)? {
            let _writer = become_writer(dir)?;
            if !kept.exists() {
                create_self_signed(dir, &kept, trust_domain, now)?;
            } else if needs_successor(&kept, now)? {
                succeed_self_signed(&kept, trust_domain, now)?;
            }
        }
        load_self_signed(&kept, trust_domain, lifetimes)?
    };
    ca.probe(ca.roots(), now)?;
    Ok(ca)
}

/// Whether the CA that `dir` holds can be used; `Ok` also when it holds none. Changes nothing.
pub fn check(dir: &Path, now: SystemTime) -> Result<(), StoreError> {
    let (trust_domain, lifetimes) = (TrustDomain::default(), Lifetimes::default());
    let kept = dir.join(SELF_SIGNED);
    let ca = if is_plugged_in(dir)? {
        load_plugged_in(dir, &trust_domain, lifetimes)?
    } else if kept.exists() {
        let ca = load_self_signed(&kept, &trust_domain, lifetimes)?;
        if needs_successor(&kept, now)? {
            return Ok(());
        }
        ca
    } else {
        return Ok(());
    };
    ca.probe(ca.roots(), now)
}

/// Whether `dir` holds a bundle that somebody put there, whole.
fn is_plugged_in(dir: &Path) -> Result<bool, StoreError> {
    let (found, missing): (Vec<&str>, Vec<&str>) = PLUGGED_IN.iter().partition(|name| dir.join(name).exists());
    if !found.is_empty() && !missing.is_empty() {
        return Err(StoreError::Partial { dir: dir.to_owned(), found, missing });
    }
    Ok(missing.is_empty())
}

/// The CA that is to take the place of `current`, if any, by what `dir` holds now; see [`Ca::successor`].
pub fn successor(current: &Ca, dir: &Path, now: SystemTime) -> Result<Option<Ca>, StoreError> {
    current.successor(load_or_create(dir, &current.trust_domain, current.lifetimes, now)?, now)
}

/// Waits for other writers of the folder, in whatever process; the answer's end lets the next one in.
fn become_writer(dir: &Path) -> Result<fs::File, StoreError> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(at(dir))?;
    let path = dir.join(".lock");
    let file = fs::OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
    let file = file.map_err(at(&path))?;
    file.lock().map_err(at(&path))?;
    Ok(file)
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> StoreError + use<> {
    let path = path.to_owned();
    move |source| StoreError::File { path, source }
}

pub(super) fn is_alive(certificate: &CertificateDer<'_>, now: SystemTime) -> bool {
    PeerFacts::read(certificate).is_ok_and(|facts| facts.not_after > now)
}

/// Writes a file so that readers see the old text or the new one, and a crash leaves no half.
pub fn write_atomically(path: &Path, text: &[u8], mode: u32) -> Result<(), StoreError> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = path.with_file_name(name);
    let written = (|| {
        let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&temporary)?;
        file.write_all(text)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    })();
    if written.is_err() {
        // What is left of the attempt; the error at hand matters more.
        drop(fs::remove_file(&temporary));
    }
    written.map_err(at(path))
}

fn read(path: &Path) -> Result<String, StoreError> {
    fs::read_to_string(path).map_err(at(path))
}

fn invalid(path: &Path, reason: &dyn std::fmt::Display) -> StoreError {
    StoreError::Invalid { path: path.to_owned(), reason: reason.to_string() }
}

/// Made aside and renamed, so that a crash leaves no half. Only for the writer.
fn create_self_signed(dir: &Path, kept: &Path, trust_domain: &TrustDomain, now: SystemTime) -> Result<(), StoreError> {
    let (certificate, key) = make_root(trust_domain, now).map_err(StoreError::Make)?;
    let temporary = dir.join(format!("{SELF_SIGNED}.tmp"));
    // What a crash may have left.
    drop(fs::remove_dir_all(&temporary));
    fs::DirBuilder::new().mode(0o700).create(&temporary).map_err(at(&temporary))?;
    write_atomically(&temporary.join("ca-key.pem"), key.as_bytes(), 0o600)?;
    write_atomically(&temporary.join("ca-cert.pem"), certificate.as_bytes(), 0o644)?;
    fs::rename(&temporary, kept).map_err(at(kept))
}

fn make_root(trust_domain: &TrustDomain, now: SystemTime) -> Result<(String, String), rcgen::Error> {
    let key =
        KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).or_else(|_| KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256))?;
    Ok((root_of(&key, trust_domain, now)?, key.serialize_pem()))
}

/// A root certificate of this key, from now on.
fn root_of(key: &KeyPair, trust_domain: &TrustDomain, now: SystemTime) -> Result<String, rcgen::Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, trust_domain.as_str());
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params.not_before = (now - SKEW).into();
    params.not_after = (now + ROOT_LIFETIME).into();
    Ok(pem::encode(params.self_signed(key)?.der()))
}

fn self_signed_roots(kept: &Path) -> Result<Vec<CertificateDer<'static>>, StoreError> {
    let path = kept.join("ca-cert.pem");
    pem::certificates(read(&path)?.as_bytes()).map_err(|error| invalid(&path, &error))
}

/// Whether too little is left of the root that signs.
fn needs_successor(kept: &Path, now: SystemTime) -> Result<bool, StoreError> {
    let path = kept.join("ca-cert.pem");
    let roots = self_signed_roots(kept)?;
    let first = roots.first().ok_or_else(|| invalid(&path, &"holds no certificate"))?;
    let facts = PeerFacts::read(first).map_err(|error| invalid(&path, &error))?;
    let life = facts.not_after.duration_since(facts.not_before).unwrap_or_default();
    let left = facts.not_after.duration_since(now).unwrap_or_default();
    Ok(left < life * ROOT_GRACE_PERCENT / 100)
}

/// Puts a successor before a root that will end, and leaves out those that have ended. Only for the writer.
fn succeed_self_signed(kept: &Path, trust_domain: &TrustDomain, now: SystemTime) -> Result<(), StoreError> {
    let key_path = kept.join("ca-key.pem");
    let key = KeyPair::from_pem(&read(&key_path)?).map_err(|error| invalid(&key_path, &error))?;
    let mut bundle = root_of(&key, trust_domain, now).map_err(StoreError::Make)?;
    bundle.extend(self_signed_roots(kept)?.iter().filter(|root| is_alive(root, now)).map(pem::encode));
    write_atomically(&kept.join("ca-cert.pem"), bundle.as_bytes(), 0o644)
}

fn load_self_signed(kept: &Path, trust_domain: &TrustDomain, lifetimes: Lifetimes) -> Result<Ca, StoreError> {
    let certificate_path = kept.join("ca-cert.pem");
    let certificate = read(&certificate_path)?;
    let key = read(&kept.join("ca-key.pem"))?;
    let roots = TrustRoots::from_pem(certificate.as_bytes()).map_err(|error| invalid(&certificate_path, &error))?;
    assemble(
        &certificate_path,
        &certificate,
        &kept.join("ca-key.pem"),
        &key,
        roots,
        Vec::new(),
        trust_domain,
        lifetimes,
    )
}

fn load_plugged_in(dir: &Path, trust_domain: &TrustDomain, lifetimes: Lifetimes) -> Result<Ca, StoreError> {
    let [certificate_path, key_path, root_path, chain_path] = PLUGGED_IN.map(|name| dir.join(name));
    let (certificate, key) = (read(&certificate_path)?, read(&key_path)?);
    let roots = TrustRoots::from_pem(read(&root_path)?.as_bytes()).map_err(|error| invalid(&root_path, &error))?;
    let own = pem::certificates(certificate.as_bytes()).map_err(|error| invalid(&certificate_path, &error))?;
    let chain = pem::certificates(read(&chain_path)?.as_bytes()).map_err(|error| invalid(&chain_path, &error))?;
    // A presented chain is the leaf and intermediates, never a root; the chain file usually starts
    // with the signing certificate itself.
    let mut intermediates: Vec<_> = own.into_iter().take(1).collect();
    for one in chain {
        if !intermediates.contains(&one) {
            intermediates.push(one);
        }
    }
    intermediates.retain(|one| !roots.certificates().contains(one));
    assemble(&certificate_path, &certificate, &key_path, &key, roots, intermediates, trust_domain, lifetimes)
}

#[expect(clippy::too_many_arguments, reason = "two callers, each with all the parts at hand")]
fn assemble(
    certificate_path: &Path,
    certificate: &str,
    key_path: &Path,
    key: &str,
    roots: TrustRoots,
    intermediates: Vec<CertificateDer<'static>>,
    trust_domain: &TrustDomain,
    lifetimes: Lifetimes,
) -> Result<Ca, StoreError> {
    let der = pem::certificates(certificate.as_bytes()).map_err(|error| invalid(certificate_path, &error))?;
    let first = der.first().ok_or_else(|| invalid(certificate_path, &"holds no certificate"))?;
    let facts = PeerFacts::read(first).map_err(|error| invalid(certificate_path, &error))?;
    let key = KeyPair::from_pem(key).map_err(|error| invalid(key_path, &error))?;
    let issuer =
        Issuer::from_ca_cert_pem(&pem::encode(first), key).map_err(|error| invalid(certificate_path, &error))?;
    Ok(Ca {
        signer: Arc::new(Signer { issuer, certificate: first.clone(), intermediates, not_after: facts.not_after }),
        now: HandedOut::new(Arc::new(roots)),
        before: Vec::new(),
        trust_domain: trust_domain.clone(),
        lifetimes,
    })
}

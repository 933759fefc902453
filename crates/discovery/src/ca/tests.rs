use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use identity::PeerFacts;
use rcgen::{BasicConstraints, CertifiedIssuer};

use super::store::{StoreError, check, load_or_create, write_atomically};
use super::*;

fn ca(dir: &Path) -> Ca {
    load_or_create(dir, &TrustDomain::default(), Lifetimes::default(), SystemTime::now()).unwrap()
}

fn csr(fill: impl FnOnce(&mut CertificateParams)) -> (String, KeyPair) {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    fill(&mut params);
    (params.serialize_request(&key).unwrap().pem().unwrap(), key)
}

fn id() -> SpiffeId {
    SpiffeId::parse("spiffe://cluster.local/ns/shop/sa/reviews").unwrap()
}

fn leaf(issued: &Issued) -> PeerFacts {
    PeerFacts::read(&pem::certificates(issued.chain[0].as_bytes()).unwrap()[0]).unwrap()
}

#[test]
fn nothing_of_a_request_counts_but_its_key() {
    let dir = tempfile::tempdir().unwrap();
    let ca = ca(dir.path());
    let (csr, key) = csr(|params| {
        params.distinguished_name.push(rcgen::DnType::CommonName, "admin");
        params.subject_alt_names = vec![
            SanType::URI("spiffe://cluster.local/ns/kube-system/sa/root".try_into().unwrap()),
            SanType::DnsName("istiod.istio-system.svc".try_into().unwrap()),
        ];
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    });
    let issued = ca.sign(&csr, &id(), Duration::ZERO, SystemTime::now()).unwrap();
    let facts = leaf(&issued);
    assert_eq!(facts.uris, [id().to_string()]);
    assert!(facts.dns_names.is_empty() && facts.subject.is_empty());
    // As a peer sees it: usable as a leaf with our key, and no CA.
    let keys = KeyAndChain::new(pem::certificates(issued.chain.concat().as_bytes()).unwrap(), key.into()).unwrap();
    let identity = WorkloadIdentity::new(keys, Arc::clone(ca.roots()), 1).unwrap();
    identity.verify_own_chain(SystemTime::now()).unwrap();
    let day = Duration::from_hours(24);
    let life = facts.not_after.duration_since(facts.not_before).unwrap();
    assert!(life >= day && life <= day + 2 * SKEW, "{life:?}");
}

#[test]
fn a_root_has_a_successor_before_it_ends() {
    let dir = tempfile::tempdir().unwrap();
    let first = ca(dir.path());
    let at = |now| load_or_create(dir.path(), &TrustDomain::default(), Lifetimes::default(), now).unwrap();
    let identity = |ca: &Ca, roots: &Ca, now| {
        let (csr, key) = csr(|_| {});
        let issued = ca.sign(&csr, &id(), Duration::ZERO, now).unwrap();
        let chain = pem::certificates(issued.chain.concat().as_bytes()).unwrap();
        WorkloadIdentity::new(KeyAndChain::new(chain, key.into()).unwrap(), Arc::clone(roots.roots()), 1).unwrap()
    };
    let now = SystemTime::now();
    let life = first.not_after().duration_since(now).unwrap();
    let early = now + life * 7 / 10;
    assert!(store::successor(&first, dir.path(), early).unwrap().is_none());
    // A fifth is left: a new root for the same key signs, and both are trusted.
    let late = now + life * 9 / 10;
    let second = store::successor(&first, dir.path(), late).unwrap().unwrap();
    assert_eq!(second.roots().certificates()[1..], *first.roots().certificates());
    assert!(second.not_after() > first.not_after());
    assert!(store::successor(&second, dir.path(), late).unwrap().is_none(), "once");
    assert_eq!(at(late).roots().certificates(), second.roots().certificates(), "after a restart too");
    // Who has only one of the roots accepts certificates from before and after.
    identity(&first, &second, now).verify_own_chain(now).unwrap();
    identity(&second, &first, now).verify_own_chain(now).unwrap();
    // Its turn comes again, and what has ended by then is trusted no more.
    let much_later = first.not_after() + life * 8 / 10;
    let third = store::successor(&second, dir.path(), much_later).unwrap().unwrap();
    assert_eq!(third.roots().certificates().len(), 2);
    assert_eq!(third.roots().certificates()[1], second.roots().certificates()[0]);
}

/// Several at once, each by its own clock: what the first one writes is everybody's.
#[test]
fn one_of_several_control_planes_writes_and_all_use_what_it_wrote() {
    let dir = tempfile::tempdir().unwrap();
    let life = store::ROOT_LIFETIME;
    let begin = std::sync::Barrier::new(8);
    let all_at = |now: SystemTime| -> Vec<Vec<_>> {
        let load = |ahead: u64| {
            begin.wait();
            let now = now + Duration::from_secs(ahead);
            let ca = load_or_create(dir.path(), &TrustDomain::default(), Lifetimes::default(), now).unwrap();
            ca.roots().certificates().to_vec()
        };
        std::thread::scope(|scope| {
            let running: Vec<_> = (0..8).map(|ahead| scope.spawn(move || load(ahead))).collect();
            running.into_iter().map(|one| one.join().unwrap()).collect()
        })
    };
    let now = SystemTime::now();
    let made = all_at(now);
    assert!(made.iter().all(|roots| roots.len() == 1 && *roots == made[0]), "one root");
    let succeeded = all_at(now + life * 9 / 10);
    assert!(succeeded.iter().all(|roots| roots.len() == 2 && *roots == succeeded[0]), "one successor");
    assert_eq!(succeeded[0][1], made[0][0]);
}

/// Writes a bundle whose root signs itself, as an operator would plug it in.
fn plug_in(dir: &Path, root: &CertifiedIssuer<'static, KeyPair>, roots: &str) {
    for (name, text) in [
        ("root-cert.pem", roots),
        ("cert-chain.pem", &root.pem()),
        ("ca-cert.pem", &root.pem()),
        ("ca-key.pem", &root.key().serialize_pem()),
    ] {
        write_atomically(&dir.join(name), text.as_bytes(), 0o600).unwrap();
    }
}

fn root(name: &str) -> CertifiedIssuer<'static, KeyPair> {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

#[test]
fn a_new_root_is_passed_on_before_it_signs() {
    let dir = tempfile::tempdir().unwrap();
    let (now, hour) = (SystemTime::now(), Duration::from_hours(1));
    let first = ca(dir.path());
    let (csr, _) = csr(|_| {});
    let signed_by = |ca: &Ca, at: SystemTime| {
        let issued = ca.sign(&csr, &id(), hour, at).unwrap();
        leaf(&issued).issuer
    };
    let by_first = signed_by(&first, now);
    let next_root = root("next");
    plug_in(dir.path(), &next_root, &(first.roots().to_pem() + &next_root.pem()));
    // Both are trusted at once; who got a certificate before does not know the new one yet.
    let second = store::successor(&first, dir.path(), now).unwrap().unwrap();
    assert_eq!(second.roots().certificates().len(), 2);
    assert_eq!(signed_by(&second, now), by_first);
    assert!(store::successor(&second, dir.path(), now + hour / 2).unwrap().is_none(), "not yet");
    assert_eq!(signed_by(&second, now + hour / 2), by_first);
    // All that was issued without it has ended, whatever was issued since.
    let over = now + hour + Duration::from_secs(2);
    let third = store::successor(&second, dir.path(), over).unwrap().unwrap();
    assert_ne!(signed_by(&third, over), by_first);
    assert_eq!(third.roots().certificates(), second.roots().certificates());
    assert!(store::successor(&third, dir.path(), over).unwrap().is_none(), "settled");
    // The old root may not go while it lives.
    plug_in(dir.path(), &next_root, &next_root.pem());
    assert!(matches!(store::successor(&third, dir.path(), over), Err(StoreError::CutsOff)));
}

#[test]
fn a_signer_that_all_know_does_not_wait() {
    let dir = tempfile::tempdir().unwrap();
    let (now, hour) = (SystemTime::now(), Duration::from_hours(1));
    let (old, new) = (root("old"), root("new"));
    plug_in(dir.path(), &old, &(old.pem() + &new.pem()));
    let first = ca(dir.path());
    let (csr, _) = csr(|_| {});
    first.sign(&csr, &id(), hour, now).unwrap();
    plug_in(dir.path(), &new, &(old.pem() + &new.pem()));
    let second = store::successor(&first, dir.path(), now).unwrap().unwrap();
    assert!(!second.has_signer_of(&first));
    // Two changes on top of each other: the third root waits for those who know none but the first two.
    let third_root = root("third");
    plug_in(dir.path(), &third_root, &(old.pem() + &new.pem() + &third_root.pem()));
    second.sign(&csr, &id(), hour, now).unwrap();
    let third = store::successor(&second, dir.path(), now).unwrap().unwrap();
    assert!(third.has_signer_of(&second) && third.roots().certificates().len() == 3);
    assert!(!store::successor(&third, dir.path(), now + 2 * hour).unwrap().unwrap().has_signer_of(&second));
}

#[test]
fn a_ca_that_would_cut_workloads_off_is_not_taken_over() {
    let dir = tempfile::tempdir().unwrap();
    let current = ca(dir.path());
    std::fs::remove_dir_all(dir.path().join("self-signed")).unwrap();
    let next = store::successor(&current, dir.path(), SystemTime::now());
    assert!(matches!(next, Err(StoreError::CutsOff)), "{next:?}");
}

#[test]
fn lifetimes_are_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let ca = ca(dir.path());
    let (csr, _) = csr(|_| {});
    let day = Duration::from_hours(24);
    let sign = |lifetime, now| ca.sign(&csr, &id(), lifetime, now);
    assert!(sign(90 * day, SystemTime::now()).is_ok());
    assert!(matches!(sign(91 * day, SystemTime::now()), Err(SignError::Lifetime { .. })));
    // Near its own end the CA cuts the life; past it, it refuses.
    let late = ca.not_after() - day / 2;
    assert_eq!(sign(day, late).unwrap().not_after, ca.not_after());
    assert!(matches!(sign(day, ca.not_after()), Err(SignError::Expired)));
}

#[test]
fn bad_requests_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let ca = ca(dir.path());
    let (good, _) = csr(|_| {});
    let sign = |csr: &str| ca.sign(csr, &id(), Duration::ZERO, SystemTime::now());
    assert!(matches!(sign(""), Err(SignError::Request(_))));
    assert!(matches!(sign(&"x".repeat(CSR_BYTES_MAX + 1)), Err(SignError::TooLong)));
    // Another's key under our signature: proof of possession fails.
    let mut der = pem_body(&good);
    let last = der.len() - 1;
    der[last] ^= 1;
    let damaged = format!(
        "-----BEGIN CERTIFICATE REQUEST-----\n{}\n-----END CERTIFICATE REQUEST-----\n",
        base64::Engine::encode(&base64::engine::general_purpose::STANDARD, &der)
    );
    assert!(matches!(sign(&damaged), Err(SignError::Request(_))));
}

fn pem_body(text: &str) -> Vec<u8> {
    let body: String = text.lines().filter(|line| !line.starts_with("-----")).collect();
    base64::Engine::decode(&base64::engine::general_purpose::STANDARD, body).unwrap()
}

#[test]
fn a_root_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    assert!(check(dir.path(), SystemTime::now()).is_ok(), "there is none yet");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "looking makes none");
    let roots = ca(dir.path()).roots().to_pem();
    assert_eq!(ca(dir.path()).roots().to_pem(), roots);
    assert!(check(dir.path(), SystemTime::now()).is_ok());
    let key = dir.path().join("self-signed/ca-key.pem");
    assert_eq!(std::fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
    // A damaged key is an error, never a new root.
    std::fs::write(&key, "nothing").unwrap();
    let again = load_or_create(dir.path(), &TrustDomain::default(), Lifetimes::default(), SystemTime::now());
    assert!(matches!(again, Err(StoreError::Invalid { .. })), "{again:?}");
    assert!(matches!(check(dir.path(), SystemTime::now()), Err(StoreError::Invalid { .. })));
    // So is another's key.
    let other = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
    std::fs::write(&key, other.serialize_pem()).unwrap();
    let again = load_or_create(dir.path(), &TrustDomain::default(), Lifetimes::default(), SystemTime::now());
    assert!(matches!(again, Err(StoreError::Inconsistent(_))), "{again:?}");
    assert!(matches!(check(dir.path(), SystemTime::now()), Err(StoreError::Inconsistent(_))));
}

#[test]
fn a_plugged_in_intermediate_signs() {
    let dir = tempfile::tempdir().unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(rcgen::DnType::CommonName, "root");
    let root = CertifiedIssuer::self_signed(params.clone(), KeyPair::generate().unwrap()).unwrap();
    params.distinguished_name.push(rcgen::DnType::CommonName, "intermediate");
    let key = KeyPair::generate().unwrap();
    let intermediate = params.signed_by(&key, &root).unwrap();
    let put = |name: &str, text: &str| write_atomically(&dir.path().join(name), text.as_bytes(), 0o600).unwrap();
    put("ca-cert.pem", &intermediate.pem());
    put("ca-key.pem", &key.serialize_pem());
    put("root-cert.pem", &root.pem());
    let load = || load_or_create(dir.path(), &TrustDomain::default(), Lifetimes::default(), SystemTime::now());
    assert!(matches!(load(), Err(StoreError::Partial { .. })), "three of four files are not a bundle");
    assert!(matches!(check(dir.path(), SystemTime::now()), Err(StoreError::Partial { .. })));
    put("cert-chain.pem", &(intermediate.pem() + &root.pem()));
    let ca = load().unwrap();
    let (csr, _) = csr(|_| {});
    let issued = ca.sign(&csr, &id(), Duration::ZERO, SystemTime::now()).unwrap();
    assert_eq!(issued.chain.len(), 2, "leaf and intermediate, never the root");
    assert_eq!(pem::certificates(issued.chain[1].as_bytes()).unwrap()[0], *intermediate.der());
    // A chain that leads elsewhere is refused.
    let other = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    put("root-cert.pem", &other.pem());
    put("cert-chain.pem", &intermediate.pem());
    assert!(matches!(load(), Err(StoreError::Inconsistent(_))));
}

//! Cluster DNS: a table of full names, everything else asked of the machine's resolvers.
//!
//! Search lists are the client's business (`/etc/resolv.conf`); here only full names arrive.
//! Standard: RFC 1035 section 4; RFC 2308 for the difference between "no such name" and "no such
//! record".

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, PoisonError, RwLock};

use types::wellknown::DEFAULT_DOMAIN_SUFFIX;

/// Seconds an answer may be kept: the table changes with every rollout.
const TTL: u32 = 5;
const UDP_ANSWER_MAX: usize = 512;
const TYPE_A: u16 = 1;
const TYPE_AAAA: u16 = 28;
const TYPE_ANY: u16 = 255;
const CLASS_IN: u16 = 1;

/// Full names in lower case without trailing dot; `*.` as first label matches whatever has no entry.
#[derive(Debug, Default)]
pub(crate) struct Names(RwLock<Arc<BTreeMap<String, Vec<IpAddr>>>>);

impl Names {
    pub(crate) fn set(&self, names: BTreeMap<String, Vec<IpAddr>>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(names);
    }

    fn current(&self) -> Arc<BTreeMap<String, Vec<IpAddr>>> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// What to do with a question.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Outcome {
    Answer(Vec<u8>),
    /// Not ours: ask the machine's resolvers.
    Ask,
    /// Not a question.
    Drop,
}

/// Response codes in use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Rcode {
    NoError = 0,
    FormatError = 1,
    ServerFailure = 2,
    NameError = 3,
    NotImplemented = 4,
}

struct Question {
    name: String,
    kind: u16,
    class: u16,
    /// Offset behind the question.
    end: usize,
}

/// Answers from the table. `udp` = cut to 512 bytes with the flag that makes clients use TCP.
pub(crate) fn answer(message: &[u8], names: &Names, udp: bool) -> Outcome {
    let Some(&flags) = message.get(2) else { return Outcome::Drop };
    if message.len() < 12 || flags & 0x80 != 0 {
        return Outcome::Drop;
    }
    if flags & 0x78 != 0 {
        return Outcome::Answer(error(message, Rcode::NotImplemented));
    }
    let Some(question) = question(message) else { return Outcome::Answer(error(message, Rcode::FormatError)) };
    let names = names.current();
    let found = lookup(&names, &question.name);
    match found {
        Some(addresses) => Outcome::Answer(reply(message, &question, addresses, udp)),
        None if is_below(&question.name, DEFAULT_DOMAIN_SUFFIX) => Outcome::Answer(error(message, Rcode::NameError)),
        None => Outcome::Ask,
    }
}

fn is_below(name: &str, domain: &str) -> bool {
    name.strip_suffix(domain).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

fn lookup<'a>(names: &'a BTreeMap<String, Vec<IpAddr>>, name: &str) -> Option<&'a [IpAddr]> {
    if let Some(found) = names.get(name) {
        return Some(found);
    }
    let mut rest = name;
    while let Some((_, parent)) = rest.split_once('.') {
        if let Some(found) = names.get(&format!("*.{parent}")) {
            return Some(found);
        }
        rest = parent;
    }
    None
}

/// The only question of a message; RFC 9619 allows no more than one.
fn question(message: &[u8]) -> Option<Question> {
    if message.get(4..6)? != [0, 1] {
        return None;
    }
    let mut at = 12;
    let mut name = String::new();
    loop {
        let length = usize::from(*message.get(at)?);
        at += 1;
        if length == 0 {
            break;
        }
        if length > 63 {
            return None;
        }
        let label = message.get(at..at + length)?;
        at += length;
        if !name.is_empty() {
            name.push('.');
        }
        name.extend(label.iter().map(|byte| char::from(byte.to_ascii_lowercase())));
        if name.len() > 1000 {
            return None;
        }
    }
    let word = |at: usize| Some(u16::from_be_bytes(message.get(at..at + 2)?.try_into().ok()?));
    Some(Question { name, kind: word(at)?, class: word(at + 2)?, end: at + 4 })
}

fn head(message: &[u8], rcode: Rcode, answers: u16, end: usize) -> Vec<u8> {
    let mut out = message[..end].to_vec();
    // Response, authoritative unless it failed; recursion as asked, and available.
    out[2] = 0x80 | (message[2] & 0x79) | if matches!(rcode, Rcode::NoError | Rcode::NameError) { 4 } else { 0 };
    out[3] = 0x80 | rcode as u8;
    let questions = u16::from(end > 12);
    out[4..6].copy_from_slice(&questions.to_be_bytes());
    out[6..8].copy_from_slice(&answers.to_be_bytes());
    out[8..12].fill(0);
    out
}

fn reply(message: &[u8], question: &Question, addresses: &[IpAddr], udp: bool) -> Vec<u8> {
    let wanted = |address: &&IpAddr| {
        question.class == CLASS_IN
            && match question.kind {
                TYPE_A => address.is_ipv4(),
                TYPE_AAAA => address.is_ipv6(),
                TYPE_ANY => true,
                _ => false,
            }
    };
    let mut out = head(message, Rcode::NoError, 0, question.end);
    let mut count = 0_u16;
    for address in addresses.iter().filter(wanted) {
        let (kind, octets) = match address {
            IpAddr::V4(v4) => (TYPE_A, v4.octets().to_vec()),
            IpAddr::V6(v6) => (TYPE_AAAA, v6.octets().to_vec()),
        };
        if (udp && out.len() + 12 + octets.len() > UDP_ANSWER_MAX) || count == 2000 {
            out[2] |= 2;
            break;
        }
        // The name is the question's, at offset 12.
        out.extend([0xc0, 12]);
        out.extend(kind.to_be_bytes());
        out.extend(CLASS_IN.to_be_bytes());
        out.extend(TTL.to_be_bytes());
        out.extend(u16::try_from(octets.len()).expect("4 or 16").to_be_bytes());
        out.extend(octets);
        count += 1;
    }
    out[6..8].copy_from_slice(&count.to_be_bytes());
    out
}

/// An answer without records. The message has at least a head.
pub(crate) fn error(message: &[u8], rcode: Rcode) -> Vec<u8> {
    let end = question(message).map_or(12, |question| question.end);
    head(message, rcode, 0, end)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(name: &str, kind: u16) -> Vec<u8> {
        let mut message = vec![0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in name.split('.') {
            message.push(u8::try_from(label.len()).unwrap());
            message.extend(label.bytes());
        }
        message.push(0);
        message.extend(kind.to_be_bytes());
        message.extend(CLASS_IN.to_be_bytes());
        message
    }

    fn table() -> Names {
        let names = Names::default();
        let v4 = |last| IpAddr::from([10, 96, 0, last]);
        names.set(BTreeMap::from([
            ("reviews.shop.svc.cluster.local".into(), vec![v4(7), "fd77::7".parse().unwrap()]),
            ("*.wild.svc.cluster.local".into(), vec![v4(8)]),
            ("many.svc.cluster.local".into(), (0..100).map(|i| IpAddr::from([10, 77, 1, i])).collect()),
        ]));
        names
    }

    /// rcode, addresses' last bytes, truncated
    fn check(name: &str, kind: u16, udp: bool, expect: Option<(u8, usize, bool)>) {
        let message = ask(name, kind);
        match (answer(&message, &table(), udp), expect) {
            (Outcome::Answer(bytes), Some((rcode, count, truncated))) => {
                assert_eq!(bytes[..2], message[..2], "{name}: number");
                assert_eq!(bytes[2] & 0x80, 0x80, "{name}: response");
                assert_eq!(bytes[3] & 15, rcode, "{name}: code");
                assert_eq!(usize::from(u16::from_be_bytes([bytes[6], bytes[7]])), count, "{name}: answers");
                assert_eq!(bytes[2] & 2 != 0, truncated, "{name}: truncated");
            }
            (Outcome::Ask, None) => {}
            (other, _) => panic!("{name}: {other:?} instead of {expect:?}"),
        }
    }

    #[test]
    fn names_are_answered_refused_or_passed_on() {
        check("reviews.shop.svc.cluster.local", TYPE_A, true, Some((0, 1, false)));
        check("Reviews.SHOP.svc.cluster.local", TYPE_AAAA, true, Some((0, 1, false)));
        check("reviews.shop.svc.cluster.local", TYPE_ANY, true, Some((0, 2, false)));
        check("reviews.shop.svc.cluster.local", 33, true, Some((0, 0, false))); // exists, but no such record
        check("x.y.wild.svc.cluster.local", TYPE_A, true, Some((0, 1, false)));
        check("ratings.shop.svc.cluster.local", TYPE_A, true, Some((3, 0, false)));
        check("example.org", TYPE_A, true, None);
        check("notcluster.local", TYPE_A, true, None);
        check("reviews.shop.svc.cluster.local.example.org", TYPE_A, true, None);
        check("many.svc.cluster.local", TYPE_A, true, Some((0, 29, true)));
        check("many.svc.cluster.local", TYPE_A, false, Some((0, 100, false)));
    }

    #[test]
    fn hostile_messages_never_panic() {
        let names = table();
        let good = ask("reviews.shop.svc.cluster.local", TYPE_A);
        for cut in 0..good.len() {
            let _outcome = answer(&good[..cut], &names, true);
        }
        let mut response = good.clone();
        response[2] |= 0x80;
        assert_eq!(answer(&response, &names, true), Outcome::Drop, "no loops between servers");
        let mut compressed = good.clone();
        compressed[12] = 0xc0;
        assert!(matches!(answer(&compressed, &names, true), Outcome::Answer(bytes) if bytes[3] & 15 == 1));
        let mut two = good;
        two[5] = 2;
        assert!(matches!(answer(&two, &names, true), Outcome::Answer(bytes) if bytes[3] & 15 == 1));
    }
}

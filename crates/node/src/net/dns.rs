//! Cluster DNS: a table of full names, everything else asked of the machine's resolvers.
//!
//! Search lists are the client's business (`/etc/resolv.conf`); here only full names arrive.
//! Standard: RFC 1035 section 4; RFC 2308 for the difference between "no such name" and "no such
//! record".

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, PoisonError, RwLock};

use types::wellknown::DEFAULT_DOMAIN_SUFFIX;

use crate::spec::Name;

/// Seconds an answer may be kept: the table changes with every rollout.
const TTL: u32 = 5;
const UDP_ANSWER_MAX: usize = 512;
/// A longer answer than this many records has no use, and fits into no message over TCP.
const RECORDS_MAX: usize = 2000;
/// Names that stand for each other, one after the other.
const ALIASES_MAX: usize = 8;
const HEAD: usize = 12;
const TYPE_A: u16 = 1;
const TYPE_CNAME: u16 = 5;
const TYPE_TXT: u16 = 16;
const TYPE_AAAA: u16 = 28;
const TYPE_ANY: u16 = 255;
const CLASS_IN: u16 = 1;

type Table = BTreeMap<String, Name>;

/// Full names in lower case without trailing dot; `*.` as first label matches whatever has no entry.
#[derive(Debug, Default)]
pub(crate) struct Names(RwLock<Arc<Table>>);

impl Names {
    pub(crate) fn set(&self, names: Table) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(names);
    }

    fn current(&self) -> Arc<Table> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// How the asker asks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Transport {
    /// Answers are cut to 512 bytes, with the flag that makes clients use TCP.
    Udp,
    Tcp,
}

/// What to do with a question.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Outcome {
    Answer(Vec<u8>),
    /// Not ours: ask the machine's resolvers.
    Ask,
    /// An alias for what is not ours: ask them for that, see [`followed`].
    Follow(Alias),
    /// Not a question.
    Drop,
}

/// A name of the table that stands for one that the machine's resolvers know.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Alias {
    /// The question for them.
    pub(crate) question: Vec<u8>,
    /// The names from the one that was asked for to the last, each an alias for the next.
    chain: Vec<String>,
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

/// One record of an answer.
struct Record {
    owner: String,
    kind: u16,
    ttl: u32,
    data: Vec<u8>,
}

/// Answers from the table.
pub(crate) fn answer(message: &[u8], names: &Names, transport: Transport) -> Outcome {
    let Some(&flags) = message.get(2) else { return Outcome::Drop };
    if message.len() < HEAD || flags & 0x80 != 0 {
        return Outcome::Drop;
    }
    if flags & 0x78 != 0 {
        return Outcome::Answer(error(message, Rcode::NotImplemented));
    }
    let Some(question) = question(message) else { return Outcome::Answer(error(message, Rcode::FormatError)) };
    let names = names.current();
    let mut chain = vec![question.name.clone()];
    loop {
        let name = chain.last().map_or("", String::as_str);
        let (rcode, addresses) = match lookup(&names, name) {
            // Who asks for the alias itself has it.
            _ if chain.len() > 1 && (question.kind == TYPE_CNAME || question.class != CLASS_IN) => {
                (Rcode::NoError, &[][..])
            }
            Some(Name::Addresses(addresses)) => (Rcode::NoError, addresses.as_slice()),
            Some(Name::Alias(_)) if chain.len() > ALIASES_MAX => {
                return Outcome::Answer(error(message, Rcode::ServerFailure));
            }
            Some(Name::Alias(target)) => {
                chain.push(target.clone());
                continue;
            }
            None if is_below(name, DEFAULT_DOMAIN_SUFFIX) => (Rcode::NameError, &[][..]),
            None if chain.len() == 1 => return Outcome::Ask,
            None => {
                return match question_for(message, name, question.kind) {
                    Some(question) => Outcome::Follow(Alias { question, chain }),
                    None => Outcome::Answer(error(message, Rcode::ServerFailure)),
                };
            }
        };
        let records = records(&question, &chain, addresses);
        return Outcome::Answer(reply(message, &question, rcode, &records, transport));
    }
}

/// The answer to `message`, once the machine's resolvers have told what is at the end of the alias: the
/// aliases, and what of their answer a client looks for. Where theirs was cut off, this one is.
///
/// *Source*: RFC 1034 section 3.6.2.
pub(crate) fn followed(message: &[u8], alias: &Alias, told: &[u8], transport: Transport) -> Vec<u8> {
    let Some(question) = question(message) else { return error(message, Rcode::FormatError) };
    let rcode = match told.get(3).map(|flags| flags & 15) {
        Some(0) => Rcode::NoError,
        Some(3) => Rcode::NameError,
        _ => return error(message, Rcode::ServerFailure),
    };
    let mut all = records(&question, &alias.chain, &[]);
    all.extend(answers(told).unwrap_or_default());
    let mut out = reply(message, &question, rcode, &all, transport);
    if is_truncated(told) {
        out[2] |= 2;
    }
    out
}

/// Whether an answer was cut off.
pub(crate) fn is_truncated(message: &[u8]) -> bool {
    message.get(2).is_some_and(|flags| flags & 2 != 0)
}

/// The question for `name` with the number and the wishes of `message`.
fn question_for(message: &[u8], name: &str, kind: u16) -> Option<Vec<u8>> {
    let mut out = message.get(..4)?.to_vec();
    out.extend([0, 1, 0, 0, 0, 0, 0, 0]);
    out.extend(encode(name)?);
    out.extend(kind.to_be_bytes());
    out.extend(CLASS_IN.to_be_bytes());
    Some(out)
}

/// A name as labels, without compression.
fn encode(name: &str) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(name.len() + 2);
    for label in name.split('.').filter(|label| !label.is_empty()) {
        // Each byte was read into a character of its own.
        let bytes: Vec<u8> = label.chars().map(|c| u8::try_from(u32::from(c)).ok()).collect::<Option<_>>()?;
        out.push(u8::try_from(bytes.len()).ok().filter(|length| *length < 64)?);
        out.extend(bytes);
    }
    out.push(0);
    (out.len() <= 255).then_some(out)
}

/// The name at an offset, and where it ends. Pointers lead backwards only, and a name has an end: none leads
/// in a circle.
fn name_at(message: &[u8], mut at: usize) -> Option<(String, usize)> {
    let mut name = String::new();
    let mut end = None;
    loop {
        let length = *message.get(at)?;
        match length {
            0 => return Some((name, end.unwrap_or(at + 1))),
            1..64 => {
                let label = message.get(at + 1..=at + usize::from(length))?;
                if !name.is_empty() {
                    name.push('.');
                }
                name.extend(label.iter().map(|byte| char::from(byte.to_ascii_lowercase())));
                if name.len() > 1000 {
                    return None;
                }
                at += 1 + usize::from(length);
            }
            192.. => {
                let to = usize::from(length & 63) << 8 | usize::from(*message.get(at + 1)?);
                end = end.or(Some(at + 2));
                at = Some(to).filter(|to| *to < at)?;
            }
            _ => return None,
        }
    }
}

/// The records of an answer that clients look for: addresses, aliases, texts; `None` when it is broken.
fn answers(message: &[u8]) -> Option<Vec<Record>> {
    let word = |at: usize| Some(u16::from_be_bytes(message.get(at..at + 2)?.try_into().ok()?));
    let mut at = question(message)?.end;
    let mut out = Vec::new();
    for _ in 0..word(6)? {
        let (owner, end) = name_at(message, at)?;
        let (kind, class) = (word(end)?, word(end + 2)?);
        let ttl = u32::from_be_bytes(message.get(end + 4..end + 8)?.try_into().ok()?);
        let from = end + 10;
        at = from + usize::from(word(end + 8)?);
        let data = match kind {
            // Names in it may be compressed.
            TYPE_CNAME => encode(&name_at(message, from)?.0)?,
            TYPE_A | TYPE_AAAA | TYPE_TXT => message.get(from..at)?.to_vec(),
            _ => continue,
        };
        if class == CLASS_IN {
            out.push(Record { owner, kind, ttl, data });
        }
    }
    Some(out)
}

fn is_below(name: &str, domain: &str) -> bool {
    name.strip_suffix(domain).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

fn lookup<'a>(names: &'a Table, name: &str) -> Option<&'a Name> {
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
    let mut at = HEAD;
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
    let questions = u16::from(end > HEAD);
    out[4..6].copy_from_slice(&questions.to_be_bytes());
    out[6..8].copy_from_slice(&answers.to_be_bytes());
    out[8..12].fill(0);
    out
}

/// A chain of aliases, and what the last of them has of the kind that was asked for.
fn records(question: &Question, chain: &[String], addresses: &[IpAddr]) -> Vec<Record> {
    if question.class != CLASS_IN {
        return Vec::new();
    }
    let aliases = chain.windows(2).filter_map(|pair| {
        let data = encode(&pair[1])?;
        Some(Record { owner: pair[0].clone(), kind: TYPE_CNAME, ttl: TTL, data })
    });
    let owner = chain.last().unwrap_or(&question.name);
    let addresses = addresses.iter().filter_map(|address| {
        let (kind, data) = match address {
            IpAddr::V4(v4) => (TYPE_A, v4.octets().to_vec()),
            IpAddr::V6(v6) => (TYPE_AAAA, v6.octets().to_vec()),
        };
        let is_wanted = question.kind == kind || question.kind == TYPE_ANY;
        is_wanted.then(|| Record { owner: owner.clone(), kind, ttl: TTL, data })
    });
    aliases.chain(addresses).take(RECORDS_MAX).collect()
}

fn reply(message: &[u8], question: &Question, rcode: Rcode, records: &[Record], transport: Transport) -> Vec<u8> {
    let size_max = if transport == Transport::Udp { UDP_ANSWER_MAX } else { usize::from(u16::MAX) };
    let mut out = head(message, rcode, 0, question.end);
    let mut count = 0_u16;
    for record in records {
        // The question's name stands at offset 12.
        let owner = if record.owner == question.name { Some(vec![0xc0, 12]) } else { encode(&record.owner) };
        let (Some(owner), Ok(length)) = (owner, u16::try_from(record.data.len())) else { continue };
        if out.len() + owner.len() + 10 + record.data.len() > size_max {
            out[2] |= 2;
            break;
        }
        out.extend(owner);
        out.extend(record.kind.to_be_bytes());
        out.extend(CLASS_IN.to_be_bytes());
        out.extend(record.ttl.to_be_bytes());
        out.extend(length.to_be_bytes());
        out.extend(&record.data);
        count += 1;
    }
    out[6..8].copy_from_slice(&count.to_be_bytes());
    out
}

/// An answer without records. The message has at least a head.
pub(crate) fn error(message: &[u8], rcode: Rcode) -> Vec<u8> {
    let end = question(message).map_or(HEAD, |question| question.end);
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
        let alias = |to: &str| Name::Alias(to.into());
        names.set(BTreeMap::from([
            ("reviews.shop.svc.cluster.local".into(), Name::Addresses(vec![v4(7), "fd77::7".parse().unwrap()])),
            ("*.wild.svc.cluster.local".into(), Name::Addresses(vec![v4(8)])),
            (
                "many.svc.cluster.local".into(),
                Name::Addresses((0..100).map(|i| IpAddr::from([10, 77, 1, i])).collect()),
            ),
            ("near.svc.cluster.local".into(), alias("nearer.svc.cluster.local")),
            ("nearer.svc.cluster.local".into(), alias("reviews.shop.svc.cluster.local")),
            ("far.svc.cluster.local".into(), alias("api.example.org")),
            ("lost.svc.cluster.local".into(), alias("nobody.svc.cluster.local")),
            ("round.svc.cluster.local".into(), alias("round.svc.cluster.local")),
        ]));
        names
    }

    /// rcode, addresses' last bytes, truncated
    fn check(name: &str, kind: u16, udp: bool, expect: Option<(u8, usize, bool)>) {
        let message = ask(name, kind);
        let transport = if udp { Transport::Udp } else { Transport::Tcp };
        match (answer(&message, &table(), transport), expect) {
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
        check("near.svc.cluster.local", TYPE_A, true, Some((0, 3, false)));
        check("near.svc.cluster.local", TYPE_CNAME, true, Some((0, 1, false)));
        check("lost.svc.cluster.local", TYPE_A, true, Some((3, 1, false)));
        check("round.svc.cluster.local", TYPE_A, true, Some((2, 0, false)));
    }

    /// The records of an answer as text.
    fn shown(message: &[u8]) -> Vec<String> {
        let show = |record: Record| {
            let data = match record.kind {
                TYPE_CNAME => name_at(&record.data, 0).unwrap().0,
                _ => format!("{:?}", record.data),
            };
            format!("{} {} {} {data}", record.owner, record.kind, record.ttl)
        };
        answers(message).unwrap().into_iter().map(show).collect()
    }

    #[test]
    fn an_alias_leads_to_its_addresses_here_and_elsewhere() {
        let message = ask("near.svc.cluster.local", TYPE_A);
        let Outcome::Answer(near) = answer(&message, &table(), Transport::Udp) else { panic!("not answered") };
        assert_eq!(
            shown(&near),
            [
                "near.svc.cluster.local 5 5 nearer.svc.cluster.local",
                "nearer.svc.cluster.local 5 5 reviews.shop.svc.cluster.local",
                "reviews.shop.svc.cluster.local 1 5 [10, 96, 0, 7]",
            ]
        );
        let message = ask("far.svc.cluster.local", TYPE_A);
        let Outcome::Follow(alias) = answer(&message, &table(), Transport::Udp) else { panic!("not followed") };
        assert_eq!(alias.question, ask("api.example.org", TYPE_A));
        // What a resolver says, compressed: api.example.org is an alias of a.example.org.
        let mut told = ask("api.example.org", TYPE_A);
        told[2..4].copy_from_slice(&[0x81, 0x80]);
        told[7] = 2;
        told.extend([0xc0, 12, 0, 5, 0, 1, 0, 0, 0, 60, 0, 4, 1, b'a', 0xc0, 16]);
        told.extend([0xc0, 45, 0, 1, 0, 1, 0, 0, 0, 30, 0, 4, 192, 0, 2, 1]);
        let far = followed(&message, &alias, &told, Transport::Udp);
        assert_eq!((far[3] & 15, &far[..2]), (0, &message[..2]));
        assert_eq!(
            shown(&far),
            [
                "far.svc.cluster.local 5 5 api.example.org",
                "api.example.org 5 60 a.example.org",
                "a.example.org 1 30 [192, 0, 2, 1]",
            ]
        );
        assert!(!is_truncated(&far));
        told[2] |= 2;
        assert!(is_truncated(&followed(&message, &alias, &told, Transport::Tcp)), "a part says that it is one");
        told[3] |= 3;
        assert_eq!(followed(&message, &alias, &told, Transport::Udp)[3] & 15, 3, "no such name");
        for cut in 0..told.len() {
            let _answer = followed(&message, &alias, &told[..cut], Transport::Udp);
        }
        let mut circle = ask("api.example.org", TYPE_A);
        circle[7] = 1;
        let at = u8::try_from(circle.len()).unwrap();
        circle.extend([0xc0, at, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0]);
        assert!(answers(&circle).is_none(), "a pointer to itself");
    }

    #[test]
    fn hostile_messages_never_panic() {
        let names = table();
        let good = ask("reviews.shop.svc.cluster.local", TYPE_A);
        for cut in 0..good.len() {
            let _outcome = answer(&good[..cut], &names, Transport::Udp);
        }
        let mut response = good.clone();
        response[2] |= 0x80;
        assert_eq!(answer(&response, &names, Transport::Udp), Outcome::Drop, "no loops between servers");
        let mut compressed = good.clone();
        compressed[12] = 0xc0;
        assert!(matches!(answer(&compressed, &names, Transport::Udp), Outcome::Answer(bytes) if bytes[3] & 15 == 1));
        let mut two = good;
        two[5] = 2;
        assert!(matches!(answer(&two, &names, Transport::Udp), Outcome::Answer(bytes) if bytes[3] & 15 == 1));
    }
}

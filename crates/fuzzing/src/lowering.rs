//! Lowering: arbitrary messages are accepted or refused, and what is accepted can be run.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use engine::assembly::Assembly;
use engine::config::NodeFacts;
use engine::exchange::{Env, Exchange, Start};
use engine::facts::{ConnFacts, Now};
use engine::lower::Raw;
use engine::record::NoRecord;
use engine::shared::SharedTable;
use engine::worker::Worker;
use envoy_types::pb::google::protobuf::Any;
use types::RequestHead;
use types::wellknown::type_urls;

use crate::mutate::{self, Random};

/// The first byte says of which type the rest is.
const TYPES: [&str; 4] = [type_urls::LISTENER, type_urls::CLUSTER, type_urls::ROUTE, type_urls::ENDPOINT];

pub(crate) fn run(data: &[u8]) -> u64 {
    let Some((first, value)) = data.split_first() else { return 0 };
    let type_url = TYPES[usize::from(*first) % TYPES.len()].to_owned();
    let any = Any { type_url, value: value.to_vec() };
    match lowers(&any) {
        Ok(what) => crate::signature([what]),
        Err(reason) => crate::signature([reason]),
    }
}

/// Lowers a resource and, if it is a listener, sends a request through each of its chains.
///
/// *Errors*: the reason why it is refused.
pub(crate) fn lowers(any: &Any) -> Result<String, String> {
    let mut assembly = Assembly::new(NodeFacts::default());
    let raw = [Raw { name: "".into(), body: any.clone() }];
    let rejected = match &*any.type_url {
        type_urls::LISTENER => assembly.apply_listeners(&raw, &[]),
        type_urls::CLUSTER => assembly.apply_clusters(&raw, &[]),
        type_urls::ROUTE => assembly.apply_routes(&raw, &[]),
        type_urls::ENDPOINT => assembly.apply_endpoints(&raw, &[]),
        _ => return Ok("another type".into()),
    };
    if let Some(bad) = rejected.into_iter().next() {
        return Err(bad.reason);
    }
    let config = Rc::new(assembly.publish());
    let mono = Instant::now();
    let worker = Worker::new(Arc::new(SharedTable::new(mono)));
    let now = Now { mono, wall_nanos: 1_700_000_000_000_000_000 };
    let env = Env { config: &config, worker: &worker, now };
    let mut steps = String::new();
    for (name, listener) in config.listeners.iter() {
        let local = SocketAddr::from(([10, 1, 0, 9], 9080));
        let conn = Arc::new(ConnFacts::plaintext(name, local, SocketAddr::from(([192, 0, 2, 7], 1234))));
        // whether one is chosen depends on the match; each can be run
        drop(engine::select_chain(listener, &conn, &mut NoRecord));
        for chain in listener.all_chains() {
            for mut head in
                [RequestHead::new("GET", "reviews:9080", "/x?a=bb"), RequestHead::new("POST", "*", "/%2e%2F/")]
            {
                head.fields.push("end-user", b"jason");
                head.fields.push("authorization", b"Bearer a.b.c");
                let start = Start { chain, conn: &conn, ended: true, seed: 7, recorder: &mut NoRecord };
                let (_, step) = Exchange::start(&env, start, &mut head);
                steps.push_str(step_name(&step));
            }
        }
    }
    Ok(format!("{} {steps}", any.type_url))
}

fn step_name(step: &engine::Step) -> &'static str {
    match step {
        engine::Step::Ask(_) => "ask ",
        engine::Step::Wait(_) => "wait ",
        engine::Step::Forward(_) => "forward ",
        engine::Step::Reply(_) => "reply ",
        engine::Step::Respond => "respond ",
        engine::Step::Abort(_) => "abort ",
    }
}

const WORDS: [&str; 16] = [
    "*",
    "%REQ(a)%",
    "%",
    "(",
    "[a-z]{1000}",
    "a{1000}{1000}",
    "/{*}/",
    "{**}",
    "::/0",
    "10.0.0.0/99",
    "\0",
    "\r\n",
    "type.googleapis.com/",
    "\u{e9}",
    ":path",
    "host",
];

pub(crate) fn mutated(input: &[u8], random: &mut Random) -> Vec<u8> {
    let Some((first, value)) = input.split_first() else { return vec![0] };
    let mut out = vec![if random.below(50) == 0 { random.number().to_le_bytes()[0] } else { *first }];
    out.extend(mutate::message(value, &WORDS, random));
    out
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let place = |url: &str| TYPES.iter().position(|known| *known == url).and_then(|at| u8::try_from(at).ok());
    crate::reader::resources()
        .into_iter()
        .filter(|resource| resource.any.value.len() < mutate::LENGTH_MAX)
        .filter_map(|resource| Some([&[place(resource.type_url)?], &resource.any.value[..]].concat()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_seeds_compile_to_is_accepted() {
        let resources = crate::reader::resources();
        assert!(resources.len() > 10);
        for resource in resources {
            let lowered = lowers(&resource.any);
            assert!(lowered.is_ok(), "{}: {lowered:?}", resource.name);
        }
    }
}

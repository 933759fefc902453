//! Sidecars, three ways: the caller's and the called workload's, with mutual TLS between them. What each decides is
//! compared: listener, chain, route, cluster, who the peer is, the verdict, and what the application gets.

mod bed;
mod random;

use std::fmt::Debug;
use std::path::PathBuf;

use explain::{EndKind, Explanation, Hop, Side};
use serde_json::Value;

use crate::random::Random;
use crate::round::{self, Compared, Disagreement, Round};
use crate::{envoy, number};

use bed::{Answer, Bed, Live, Outcome};
use random::{Case, cases};

/// Calls to one namespace.
const CALLS: usize = 8;
/// Always the same; other seeds look for more. Every setting of the mesh is among them.
const SEEDS: [u64; 3] = [1, 2, 3];

/// Namespaces for cases: those that follow each other with equal objects share one.
fn hosted(cases: &[Case]) -> Vec<(usize, &Case)> {
    let mut out: Vec<(usize, &Case)> = Vec::new();
    for case in cases {
        let namespace = match out.last() {
            Some((namespace, before)) if before.objects == case.objects => *namespace,
            last => last.map_or(0, |(namespace, _)| *namespace) + 1,
        };
        out.push((namespace, case));
    }
    out
}

/// What each says of one case.
struct Said {
    namespace: usize,
    explain: Option<Explanation>,
    lateen: Outcome,
    envoy: Option<Outcome>,
}

/// Runs cases three ways, or two.
fn ask(bed: &Bed, envoy: Option<&PathBuf>, cases: &[Case]) -> Vec<Said> {
    let hosted = hosted(cases);
    let compiled = bed.compile(&hosted);
    let (lateen, other) = std::thread::scope(|scope| {
        let other = envoy.map(|program| {
            let (compiled, hosted) = (&compiled, &hosted);
            scope.spawn(move || Live::start(Some(program), compiled, bed).outcomes(hosted))
        });
        let lateen = Live::start(None, &compiled, bed).outcomes(&hosted);
        (lateen, other.map(|other| other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))))
    });
    let mut other = other.map(Vec::into_iter);
    let all = hosted.iter().zip(compiled.explained(&hosted)).zip(lateen);
    all.map(|(((namespace, _), explain), lateen)| Said {
        namespace: *namespace,
        explain,
        lateen,
        envoy: other.as_mut().and_then(Iterator::next),
    })
    .collect()
}

/// In what they disagree.
fn disagreements(case: &Case, said: &Said) -> Vec<Disagreement> {
    let mut all = Vec::new();
    if let Some(envoy) = &said.envoy {
        let mut compared = Compared::between("lateen", "envoy");
        answers(&mut compared, &said.lateen.answer, &envoy.answer);
        let is_nothing = said.lateen.answer == Answer::Nothing;
        for (side, ours, theirs) in
            [("caller", &said.lateen.client, &envoy.client), ("called", &said.lateen.server, &envoy.server)]
        {
            // Of a handshake that fails, each tells in words of its own, and Envoy at ports of bytes only.
            if ours.as_ref().is_some_and(|line| line.of("details").starts_with("downstream_tls_failed")) {
                continue;
            }
            let is_begun = theirs.as_ref().is_some_and(|line| line.of("termination") == "-");
            if !(is_nothing && ours.is_none() && is_begun) {
                compared.field(&format!("whether the {side}'s sidecar logs"), &ours.is_some(), &theirs.is_some());
            }
            if let (Some(ours), Some(theirs)) = (ours, theirs) {
                // Envoy connects to the application before policies look at the bytes; nothing is sent there.
                let is_denied = ours.of("termination").starts_with("rbac_access_denied");
                let is_common = |column: &str| !(is_denied && matches!(column, "upstream host" | "cluster"));
                let pairs = ours.columns().zip(theirs.columns()).filter(|((column, _), _)| is_common(column));
                for ((column, ours), (_, theirs)) in pairs {
                    // Whether an end comes as a reset follows from what the other side had read of the bytes.
                    let is_end = |flags: &str| matches!(flags, "-" | "UR");
                    if column == "flags" && is_nothing && is_end(ours) && is_end(theirs) {
                        continue;
                    }
                    let (ours, theirs) = (without_tls_error(ours), without_tls_error(theirs));
                    compared.field(&format!("{column} in the {side}'s log"), &ours, &theirs);
                }
            }
        }
        all.append(&mut compared.found);
    }
    if let Some(explanation) = &said.explain {
        all.extend(foretold(case, said.namespace, explanation, &said.lateen));
    }
    all
}

/// What two libraries of TLS have no common words for.
fn without_tls_error(text: &str) -> &str {
    text.split_once("TLS_error").map_or(text, |(before, _)| before)
}

fn answers(compared: &mut Compared<'_>, one: &Answer, other: &Answer) {
    match (one, other) {
        (Answer::Application(one), Answer::Application(other)) => {
            for field in ["backend", "port", "tls", "line", "method", "path"] {
                compared.field(&format!("the application's {field}"), &one[field], &other[field]);
            }
            compared.headers("header of the request", &request_headers(one), &request_headers(other));
        }
        (Answer::Proxy(one, one_headers, one_body), Answer::Proxy(other, other_headers, other_body)) => {
            compared.field("status", one, other);
            if one == other {
                compared.headers("header of the answer", one_headers, other_headers);
                compared.field("body", one_body, other_body);
            }
        }
        _ => compared.field("answer", one, other),
    }
}

/// Of a request as the application got it.
fn request_headers(told: &Value) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let pairs = told["headers"].as_array().into_iter().flatten();
    crate::bed::comparable(pairs.map(|pair| (text(&pair[0]), text(&pair[1]))))
}

fn decided<'a>(hop: &'a Hop, stage: &str) -> Option<&'a str> {
    let decisions = hop.decisions.iter().filter(|decision| decision.stage == stage);
    decisions.map(|decision| decision.outcome.as_str()).next_back()
}

/// In what `explain` did not foretell what came.
fn foretold(case: &Case, namespace: usize, explanation: &Explanation, came: &Outcome) -> Vec<Disagreement> {
    let mut compared = Compared::between("explain", "lateen");
    let [path] = &explanation.paths[..] else {
        compared.field("number of ways", &explanation.paths.len(), &1);
        return compared.found;
    };
    let end = &path.end;
    match (&came.answer, end.kind) {
        (Answer::Application(told), EndKind::Delivered) => {
            let last = path.hops.last().expect("a call that is delivered has passed a proxy");
            let backend = format!("c{namespace}/{}", told["backend"].as_str().unwrap_or_default());
            compared.field("pod", &last.proxy, &backend);
            let port = format!("on port {}", told["port"]);
            // What no Service names has one backend for all ports.
            let is_declared = decided(last, "cluster") != Some("InboundPassthroughCluster");
            compared.field("port", &(is_declared && !end.text.ends_with(&port)), &false);
            if let (Some(request), Some(_)) = (&last.request, &case.request.http) {
                let head = [("method", &request.method), ("path", &request.path)];
                for (field, value) in head {
                    compared.field(field, &value.as_str(), &told[field].as_str().unwrap_or_default());
                }
                let got = request_headers(told).into_iter().filter(|(name, _)| name != "host").collect::<Vec<_>>();
                let known = crate::bed::comparable(request.headers.clone());
                compared.headers("header of the request", &without_hash(known), &without_hash(got));
            }
        }
        (Answer::Proxy(status, ..), EndKind::Answered | EndKind::Closed) => {
            compared.field("status", &end.status, &Some(*status));
        }
        // TLS within TLS that only the application ends: it takes the outer one and cannot read what is within.
        (Answer::Nothing, EndKind::Delivered) if case.request.tls.is_some() => {}
        // What leaves the mesh meets nobody: a connection ends, a request is answered.
        (Answer::Nothing, EndKind::Closed | EndKind::Left) | (Answer::Proxy(503, ..), EndKind::Left) => {}
        (answer, kind) => compared.field("end", &format!("{kind:?}: {}", end.text), &format!("{answer:?}")),
    }
    for hop in &path.hops {
        let (side, line) = match hop.side {
            Side::Outbound => ("caller", &came.client),
            Side::Inbound => ("called", &came.server),
            Side::Gateway | Side::Unproxied => continue,
        };
        // Neither of these: none at all, or that of a handshake that failed.
        let is_told = |line: &&bed::Line| !line.of("details").starts_with("downstream_tls_failed");
        let Some(line) = line.as_ref().filter(is_told) else { continue };
        for column in ["chain", "route", "cluster"] {
            // What a proxy answers by itself goes nowhere, though the log has the way it would have gone.
            let is_last = path.hops.last().is_some_and(|last| last == hop);
            if column != "chain" && is_last && end.kind == EndKind::Answered {
                continue;
            }
            let known = decided(hop, column).filter(|name| !matches!(*name, "unnamed" | "none")).unwrap_or("-");
            compared.field(&format!("{column} of the {side}"), &known, &line.of(column));
        }
    }
    if end.kind == EndKind::Answered
        && let Some(line) =
            if path.hops.last().is_some_and(|hop| hop.side == Side::Inbound) { &came.server } else { &came.client }
    {
        compared.field("flags", &end.flag.as_deref().unwrap_or("-"), &line.of("flags"));
        compared.field("details", &end.details.as_str(), &line.of("details"));
    }
    compared.found
}

/// `explain` knows no certificate, only whose it is.
fn without_hash(headers: Vec<(String, String)>) -> Vec<(String, String)> {
    let without = |(name, value): (String, String)| {
        let parts: Vec<&str> = value.split(';').filter(|part| !part.starts_with("Hash=")).collect();
        let value = parts.join(";");
        (name, value)
    };
    headers.into_iter().map(without).collect()
}

/// Callers and called workloads, asked about calls to one namespace.
struct Sidecars {
    seed: u64,
    bed: Bed,
    envoy: Option<PathBuf>,
    random: Random,
}

impl Round for Sidecars {
    type Case = Case;
    type Said = Said;
    const FOLDER: &'static str = "sidecar";

    fn seed(&self) -> u64 {
        self.seed
    }

    fn draw(&mut self) -> Vec<Case> {
        cases(&mut self.random, CALLS)
    }

    fn is_valid(case: &Case) -> bool {
        Bed::is_valid(case)
    }

    fn ask(&self, cases: &[Case]) -> Vec<Said> {
        ask(&self.bed, self.envoy.as_ref(), cases)
    }

    fn disagreements(case: &Case, said: &Said) -> Vec<Disagreement> {
        disagreements(case, said)
    }

    fn request(case: &Case) -> &dyn Debug {
        &case.request
    }

    fn objects(case: &Case) -> String {
        bed::shown(case)
    }
}

fn run(seed: u64, namespaces: usize) {
    println!("LATEEN_SEED={seed} LATEEN_NAMESPACES={namespaces}");
    let mut sidecars = Sidecars { seed, bed: Bed::new(seed), envoy: envoy(), random: Random::new(seed) };
    let all = round::cases(&mut sidecars, namespaces);
    let said = sidecars.ask(&all);
    let is_delivered = |said: &&Said| matches!(said.lateen.answer, Answer::Application(_));
    let (delivered, explained) =
        (said.iter().filter(is_delivered).count(), said.iter().filter(|said| said.explain.is_some()).count());
    println!("{} calls: {delivered} delivered, {explained} explained", all.len());
    assert!(
        namespaces == 0 || delivered >= all.len() / 4 && delivered <= all.len() * 9 / 10,
        "{delivered} of {} are delivered",
        all.len()
    );
    assert!(namespaces == 0 || explained >= all.len() * 9 / 10, "only {explained} of {} are explained", all.len());
    round::settle(&sidecars, &all, &said);
}

#[test]
fn all_agree_on_every_call_between_sidecars() {
    let namespaces = if cfg!(feature = "envoy") { 14 } else { 8 };
    let namespaces = number("LATEEN_NAMESPACES").map_or(namespaces, |count| usize::try_from(count).unwrap());
    round::each_seed::<Sidecars>(&SEEDS, namespaces, run);
}

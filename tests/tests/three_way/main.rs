//! Random configurations and requests, three ways: what `explain` says, what a Lateen proxy does, and
//! what an Envoy does with the very same resources. All agree; a disagreement is shrunk to the
//! smallest objects and request that still show it, and kept as a golden case ([`golden`]).
//!
//! This file asks a gateway, one hop; [`sidecar`] asks the sidecars of callers and of what they call.
//!
//! Without Envoy, `explain` and Lateen are compared. With the feature `envoy`, the variable
//! `LATEEN_ENVOY` names Envoy's program. `LATEEN_SEED` makes one other run, `LATEEN_HOSTS` sets its size.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

mod bed;
mod golden;
mod random;
mod round;
mod shrink;
mod sidecar;

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::path::PathBuf;

use bed::{Bed, Live, Outcome};
use explain::{EndKind, Explanation};
use random::{ASKED, Case, Random, Tokens, by_chance, cases};
use round::{Compared, Disagreement, Round};

/// Requests of one host.
const REQUESTS: usize = 5;
/// Requests for a host that decides by chance.
const DRAWS: u32 = 500;
/// Chances below this are no chance.
const P_MIN: f64 = 1e-6;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{variable}={text}: no number")))
}

/// Always the same, so that a run that passes passes again; other seeds look for more. Four of them
/// have every setting of the mesh.
const SEEDS: [u64; 4] = [1, 2, 3, 4];

/// The program of Envoy, where these tests are built to need one.
fn envoy() -> Option<PathBuf> {
    cfg!(feature = "envoy")
        .then(|| std::env::var_os("LATEEN_ENVOY").expect("LATEEN_ENVOY names the program of Envoy").into())
}

/// Hosts for cases: those that follow each other with equal objects share one.
fn hosted(cases: &[Case]) -> Vec<(String, &Case)> {
    let mut out: Vec<(String, &Case)> = Vec::new();
    let mut number = 0;
    for case in cases {
        let host = match out.last() {
            Some((host, before)) if before.objects == case.objects => host.clone(),
            _ => {
                number += 1;
                format!("c{number}.{}.test", case.class)
            }
        };
        out.push((host, case));
    }
    out
}

/// What each says, case by case.
struct Said {
    explain: Explanation,
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
            scope.spawn(move || Live::envoy(program, compiled, bed).outcomes(hosted))
        });
        let lateen = Live::lateen(&compiled, bed).outcomes(&hosted);
        (lateen, other.map(|other| other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))))
    });
    let mut other = other.map(Vec::into_iter);
    let explained = compiled.explained(&hosted).into_iter().zip(lateen);
    explained
        .map(|(explain, lateen)| Said { explain, lateen, envoy: other.as_mut().and_then(Iterator::next) })
        .collect()
}

/// In what they disagree; if in the status, then only this.
fn disagreements(case: &Case, said: &Said) -> Vec<Disagreement> {
    let mut all = Vec::new();
    let is_drawn = said.lateen.is_drawn();
    let known = |outcome: &Outcome| if is_drawn { outcome.clone().somewhere() } else { outcome.clone() };
    let lateen = &known(&said.lateen);
    if let Some(envoy) = &said.envoy.as_ref().map(known) {
        let mut compared = Compared::between("lateen", "envoy");
        compared.field("status", &lateen.status, &envoy.status);
        if compared.found.is_empty() {
            compared.headers("header of the answer", &lateen.headers, &envoy.headers);
            compared.field("body", &lateen.body, &envoy.body);
            compared.field("whether a backend is asked", &lateen.upstream.is_some(), &envoy.upstream.is_some());
            if let (Some(ours), Some(theirs)) = (&lateen.upstream, &envoy.upstream) {
                requests(&mut compared, ours, theirs);
            }
            for ((column, ours), (_, theirs)) in lateen.log.columns().into_iter().zip(envoy.log.columns()) {
                compared.field(&format!("{column} in the log"), &ours, &theirs);
            }
        }
        all.append(&mut compared.found);
    }
    all.extend(foretold(case, &said.explain, lateen, is_drawn));
    all
}

fn requests(compared: &mut Compared<'_>, one: &bed::Upstream, other: &bed::Upstream) {
    compared.field("method of the request", &one.method, &other.method);
    compared.field("authority of the request", &one.authority, &other.authority);
    compared.field("path of the request", &one.path, &other.path);
    compared.headers("header of the request", &one.headers, &other.headers);
}

/// Whether a request says what the authorizer is to answer, which `explain` cannot know.
fn is_asked(case: &Case) -> bool {
    case.request.headers.iter().any(|(name, _)| name == ASKED)
}

/// In what `explain` did not foretell what came.
fn foretold(case: &Case, explanation: &Explanation, came: &Outcome, is_drawn: bool) -> Vec<Disagreement> {
    if is_asked(case) {
        return Vec::new();
    }
    let told = Outcome::explained(explanation).into_iter();
    let told: Vec<Outcome> = told.map(|told| if is_drawn { told.somewhere() } else { told }).collect();
    let mut compared = Compared::between("explain", "lateen");
    let ([told], [path]) = (&told[..], &explanation.paths[..]) else {
        compared.field("number of ways", &told.len(), &1);
        return compared.found;
    };
    if path.end.kind == EndKind::Answered {
        compared.field("status", &told.log.code, &came.log.code);
        if !compared.found.is_empty() {
            return compared.found;
        }
        compared.field("flags", &told.log.flags, &came.log.flags);
        compared.field("details", &told.log.details, &came.log.details);
        // Whether the connection goes on is no part of an explanation.
        let is_kept = |(name, _): &&(String, String)| name != "connection";
        let headers: Vec<_> = came.headers.iter().filter(is_kept).cloned().collect();
        compared.headers("header of the answer", &told.headers, &headers);
    } else {
        compared.field("route", &told.log.route, &came.log.route);
        compared.field("cluster", &told.log.cluster, &came.log.cluster);
    }
    compared.field("endpoint", &told.log.upstream_host, &came.log.upstream_host);
    // A retry carries the number of its try, and what is left of the time.
    let is_retried = case.request.headers.iter().any(|(name, _)| name == "x-reply-status");
    let fixed = |outcome: &Outcome| {
        let outcome = if is_retried { outcome.clone().once() } else { outcome.clone() };
        outcome.upstream.map(|mut upstream| {
            upstream.headers.retain(|(name, _)| !name.starts_with(bed::OF_TLS));
            upstream
        })
    };
    match (fixed(told), fixed(came)) {
        (Some(told), Some(came)) => requests(&mut compared, &told, &came),
        // An answer without a body does not tell what its backend got.
        (_, None) => {}
        (None, Some(_)) => compared.field("whether a backend is asked", &false, &true),
    }
    compared.found
}

/// A gateway with its backends, asked about one host's requests.
struct Gateway {
    seed: u64,
    bed: Bed,
    envoy: Option<PathBuf>,
    random: Random,
    tokens: Tokens,
}

impl Round for Gateway {
    type Case = Case;
    type Said = Said;
    const FOLDER: &'static str = "gateway";

    fn seed(&self) -> u64 {
        self.seed
    }

    fn draw(&mut self) -> Vec<Case> {
        cases(&mut self.random, &self.tokens, REQUESTS)
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
        bed::text(case, &format!("c1.{}.test", case.class), "c1", bed::SOME_PORTS)
    }

    fn show(&self, text: String) -> String {
        self.tokens.show(text)
    }

    fn hide(&self, text: String) -> String {
        self.tokens.hide(text)
    }
}

fn run(seed: u64, hosts: usize) {
    println!("LATEEN_SEED={seed} LATEEN_HOSTS={hosts}");
    let bed = Bed::new(seed);
    let tokens = bed.tokens();
    let mut gateway = Gateway { seed, bed, envoy: envoy(), random: Random::new(seed), tokens };
    let all = round::cases(&mut gateway, hosts);
    let said = gateway.ask(&all);
    let delivered = said.iter().filter(|said| said.lateen.upstream.is_some()).count();
    assert!(hosts == 0 || delivered > all.len() / 6, "only {delivered} of {} requests reach a backend", all.len());
    // Of what gets no answer there is next to nothing to compare.
    let is_compared = |case: &Case, said: &Said| said.lateen.status != 0 && (said.envoy.is_some() || !is_asked(case));
    let compared = all.iter().zip(&said).filter(|(case, said)| is_compared(case, said)).count();
    assert!(hosts == 0 || compared > all.len() * 2 / 3, "only {compared} of {} requests are compared", all.len());
    println!("{compared} of {} requests are compared", all.len());
    round::settle(&gateway, &all, &said);
}

#[test]
fn all_agree_on_every_request() {
    let hosts = if cfg!(feature = "envoy") { 150 } else { 20 };
    let hosts = number("LATEEN_HOSTS").map_or(hosts, |hosts| usize::try_from(hosts).unwrap());
    round::each_seed::<Gateway>(&SEEDS, hosts, run);
}

/// The chance that `count` of `times` or something rarer on that side comes, twice.
fn p_value(times: u32, count: u32, share: f64) -> f64 {
    if share <= 0.0 || share >= 1.0 {
        let expected = if share <= 0.0 { 0 } else { times };
        return if count == expected { 1.0 } else { 0.0 };
    }
    // Logarithms of the binomial distribution, one after the other.
    let (p, q) = (share.ln(), (1.0 - share).ln());
    let mut log = f64::from(times) * q;
    let (mut below, mut above) = (0.0, 0.0);
    for k in 0..=times {
        if k <= count {
            below += log.exp();
        }
        if k >= count {
            above += log.exp();
        }
        log += f64::from(times - k).ln() - f64::from(k + 1).ln() + p - q;
    }
    2.0 * f64::min(below, above)
}

#[test]
fn chances_are_as_explained() {
    let seed = number("LATEEN_SEED").unwrap_or(SEEDS[0]);
    let (envoy, bed) = (envoy(), Bed::new(seed));
    println!("LATEEN_SEED={seed}");
    let mut random = Random::new(seed);
    let cases: Vec<Case> = (0..8).map(|_| by_chance(&mut random)).collect();
    let hosted: Vec<(String, &Case)> =
        cases.iter().enumerate().map(|(at, case)| (format!("c{at}.open.test"), case)).collect();
    let compiled = bed.compile(&hosted);
    let explained = compiled.explained(&hosted);
    let mut proxies = vec![("lateen", Live::lateen(&compiled, &bed))];
    proxies.extend(envoy.map(|program| ("envoy", Live::envoy(&program, &compiled, &bed))));
    let mut tests = 0;
    for ((host, case), explanation) in hosted.iter().zip(&explained) {
        // By backend or status: its share.
        let mut shares: BTreeMap<String, f64> = BTreeMap::new();
        for (outcome, path) in Outcome::explained(explanation).iter().zip(&explanation.paths) {
            let backend =
                ["v1", "v2"].into_iter().find(|version| outcome.log.cluster.contains(&format!("|{version}|")));
            let what = match (path.end.kind, backend) {
                (EndKind::Delivered, Some(backend)) => backend.to_owned(),
                _ => outcome.status.to_string(),
            };
            *shares.entry(what).or_default() += path.percent / 100.0;
        }
        for (name, proxy) in &mut proxies {
            let counted = proxy.count(host, &case.request, DRAWS);
            for what in counted.keys().chain(shares.keys()) {
                let (count, share) =
                    (counted.get(what).copied().unwrap_or(0), shares.get(what).copied().unwrap_or(0.0));
                let p = p_value(DRAWS, count, share);
                assert!(
                    p >= P_MIN,
                    "{name}: {what} came {count} times of {DRAWS}, explain says {share}: p = {p:e}\n{}",
                    bed::text(case, host, "c", bed::SOME_PORTS)
                );
                tests += 1;
            }
        }
    }
    println!("{tests} shares hold");
}

#[test]
fn what_is_too_rare_is_found() {
    assert!(p_value(500, 250, 0.5) > 0.9);
    assert!(p_value(500, 250, 0.6) < P_MIN * 100.0 && p_value(500, 310, 0.5) < P_MIN);
    assert!(p_value(500, 0, 0.0) >= 1.0 && p_value(500, 1, 0.0) <= 0.0);
    assert!(p_value(500, 50, 0.1) > 0.5 && p_value(500, 100, 0.1) < P_MIN);
}

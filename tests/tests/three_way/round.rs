//! A round: cases are drawn, everybody is asked, and where two disagree, the case is shrunk and kept as a golden one.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::golden::{Folder, Golden};
use crate::shrink::{Shrinks, shrink};

/// Different disagreements that one round shrinks.
const SHRUNK_MAX: usize = 5;

/// Two who say different things.
#[derive(Clone, Debug)]
pub(crate) struct Disagreement {
    /// About what, and who, without values.
    pub(crate) kind: String,
    /// Who says what.
    pub(crate) text: String,
}

/// Collects the disagreements of two.
pub(crate) struct Compared<'a> {
    names: [&'a str; 2],
    pub(crate) found: Vec<Disagreement>,
}

impl<'a> Compared<'a> {
    pub(crate) const fn between(one: &'a str, other: &'a str) -> Self {
        Self { names: [one, other], found: Vec::new() }
    }

    pub(crate) fn field<T: Debug + PartialEq>(&mut self, field: &str, one: &T, other: &T) {
        if one != other {
            let [a, b] = self.names;
            let text = format!("{a} {one:?}, {b} {other:?}");
            self.found.push(Disagreement { kind: format!("{field}, {a} and {b}"), text });
        }
    }

    /// Each name that has other values.
    pub(crate) fn headers(&mut self, which: &str, one: &[(String, String)], other: &[(String, String)]) {
        // A list in one line or in several is the same list.
        fn of(list: &[(String, String)], name: &str) -> Option<String> {
            let values: Vec<&str> =
                list.iter().filter(|(have, _)| have == name).map(|(_, value)| value.as_str()).collect();
            (!values.is_empty()).then(|| values.join(","))
        }
        let names: BTreeSet<&String> = one.iter().chain(other).map(|(name, _)| name).collect();
        for name in names {
            self.field(&format!("{which} {name}"), &of(one, name), &of(other, name));
        }
    }
}

/// Cases of one kind, and those who are asked about them.
pub(crate) trait Round {
    type Case: Shrinks + Debug + Serialize + DeserializeOwned;
    /// What each says of one case.
    type Said;
    /// Where golden cases of this kind are.
    const FOLDER: &'static str;

    fn seed(&self) -> u64;

    /// Some cases that share their objects.
    fn draw(&mut self) -> Vec<Self::Case>;

    /// Whether the control plane takes the objects of a case.
    fn is_valid(case: &Self::Case) -> bool;

    fn ask(&self, cases: &[Self::Case]) -> Vec<Self::Said>;

    fn disagreements(case: &Self::Case, said: &Self::Said) -> Vec<Disagreement>;

    fn request(case: &Self::Case) -> &dyn Debug;

    /// The objects of a case for a reader, in YAML.
    fn objects(case: &Self::Case) -> String;

    /// A golden file's text with what differs between runs put in.
    fn show(&self, text: String) -> String {
        text
    }

    /// The other way round.
    fn hide(&self, text: String) -> String {
        text
    }
}

/// The golden cases of this round's seed, then `draws` draws.
pub(crate) fn cases<R: Round>(round: &mut R, draws: usize) -> Vec<R::Case> {
    let golden = Folder::of(R::FOLDER).all(|text| round.show(text)).into_iter();
    let seed = round.seed();
    let mut all: Vec<R::Case> =
        golden.filter(|golden: &Golden<R::Case>| golden.seed == seed).map(|golden| golden.case).collect();
    let (mut taken, mut refused) = (0, 0);
    while taken < draws {
        let drawn = round.draw();
        if R::is_valid(&drawn[0]) {
            all.extend(drawn);
            taken += 1;
        } else {
            refused += 1;
            assert!(refused <= draws, "{refused} draws are no configuration, {taken} are");
        }
    }
    assert!(draws == 0 || refused < draws / 3, "{refused} draws are no configuration, {draws} are");
    all
}

/// Ends the test where somebody disagrees, with the smallest cases that show it.
pub(crate) fn settle<R: Round>(round: &R, cases: &[R::Case], said: &[R::Said]) {
    let seed = round.seed();
    let mut found: BTreeMap<String, (usize, String, &R::Case)> = BTreeMap::new();
    for (case, said) in cases.iter().zip(said) {
        for Disagreement { kind, text } in R::disagreements(case, said) {
            found.entry(kind).or_insert((0, text, case)).0 += 1;
        }
    }
    if found.is_empty() {
        return;
    }
    for (kind, (count, text, case)) in &found {
        println!("{count} times: {kind}: {text}\n    {:?}", R::request(case));
    }
    for (kind, (count, _, case)) in found.iter().take(SHRUNK_MAX) {
        println!("\n#### {count} times: {kind}");
        let (case, found) = shrink(*case, kind, |cases| {
            let said = round.ask(cases);
            cases.iter().zip(&said).map(|(case, said)| R::disagreements(case, said)).collect()
        });
        let why = found.iter().map(|one| format!("{}: {}", one.kind, one.text)).collect::<Vec<_>>().join("; ");
        println!("{}\n---\n# {:?}\n# {why}", R::objects(&case), R::request(&case));
        Folder::of(R::FOLDER).keep(kind, &Golden { why, seed, case }, |text| round.hide(text));
    }
    panic!("{} kinds of disagreement, LATEEN_SEED={seed}: {:#?}", found.len(), found.keys());
}

/// Runs each seed with `draws` draws, and golden cases of other seeds; `LATEEN_SEED` makes it one seed.
pub(crate) fn each_seed<R: Round>(seeds: &[u64], draws: usize, run: impl Fn(u64, usize)) {
    if let Some(seed) = crate::number("LATEEN_SEED") {
        return run(seed, draws);
    }
    seeds.iter().for_each(|seed| run(*seed, draws));
    let golden: Vec<Golden<R::Case>> = Folder::of(R::FOLDER).all(|text| text);
    let others: BTreeSet<u64> = golden.iter().map(|golden| golden.seed).filter(|seed| !seeds.contains(seed)).collect();
    others.into_iter().for_each(|seed| run(seed, 0));
}

//! What hostile bytes are thrown at: the HTTP/1 codec, lowering, the reader of YAML.
//!
//! A target takes bytes, panics if something that must hold does not, and gives a number that tells
//! one way through the code from another, as far as it shows: a driver without coverage keeps the
//! inputs that give new numbers.
//!
//! **Invariants.** A target is a function of its bytes alone. Seeds are small and made here.
//!
//! Start reading at [`TARGETS`].

mod codec;
mod lowering;
pub mod mutate;
mod reader;

use std::hash::{Hash, Hasher};

/// One target.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name.
    pub name: &'static str,
    /// Runs one input; panics at a fault.
    pub run: fn(&[u8]) -> u64,
    /// Inputs to begin with.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// Changes an input.
    pub mutate: fn(&[u8], &mut mutate::Random) -> Vec<u8>,
}

/// All targets.
pub const TARGETS: [Target; 3] = [
    Target { name: "http1", run: codec::run, seeds: codec::seeds, mutate: codec::mutated },
    Target { name: "lower", run: lowering::run, seeds: lowering::seeds, mutate: lowering::mutated },
    Target { name: "yaml", run: reader::run, seeds: reader::seeds, mutate: reader::mutated },
];

/// Runs one input through the target of this name; for libFuzzer.
///
/// # Panics
///
/// At a fault, and where there is no such target.
pub fn run(target: &str, input: &[u8]) {
    let target = TARGETS.iter().find(|one| one.name == target).expect("the target's name is in the table");
    (target.run)(input);
}

/// A number for a way through the code; digits and quoted text in it do not count.
fn signature(of: impl IntoIterator<Item = impl AsRef<str>>) -> u64 {
    let mut hasher = std::hash::DefaultHasher::new();
    for text in of {
        let mut quoted = false;
        let mut last = ' ';
        for c in text.as_ref().chars() {
            if c == '"' && last != '\\' {
                quoted = !quoted;
            } else if !quoted && !c.is_ascii_digit() {
                c.hash(&mut hasher);
            }
            last = c;
        }
        0_u8.hash(&mut hasher);
    }
    hasher.finish()
}

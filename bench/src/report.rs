//! What was measured, as tables.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::cases::{Case, Sample};
use crate::contestant::Kind;
use crate::counts::Counts;
use crate::demo::Demo;
use crate::memory::{CONNECTIONS, Memory};

/// The middle, and both ends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

impl Spread {
    /// Of at least one value.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut sorted: Vec<f64> = values.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let (Some(min), Some(max)) = (sorted.first(), sorted.last()) else {
            return Self { median: f64::NAN, min: f64::NAN, max: f64::NAN };
        };
        let half = sorted.len() / 2;
        let median = if sorted.len() % 2 == 1 { sorted[half] } else { f64::midpoint(sorted[half - 1], sorted[half]) };
        Self { median, min: *min, max: *max }
    }

    fn show(self, digits: usize) -> String {
        format!("{:.digits$} ({:.digits$}–{:.digits$})", self.median, self.min, self.max)
    }
}

/// Rounds of one case: all of [`Kind::ALL`] right after one another.
pub(crate) type Rounds = Vec<[Sample; 3]>;

/// Everything of a run; what was not measured is empty.
#[derive(Default)]
pub(crate) struct Results {
    pub(crate) speed: BTreeMap<usize, Rounds>,
    pub(crate) memory: Vec<[Memory; 2]>,
    pub(crate) counts: Option<BTreeMap<String, Counts>>,
    pub(crate) demo: Option<Demo>,
}

impl Results {
    /// As Markdown.
    pub(crate) fn markdown(&self) -> String {
        let mut out = String::new();
        self.speed_table(&mut out);
        self.memory_table(&mut out);
        self.counts_table(&mut out);
        self.demo_table(&mut out);
        out
    }

    fn speed_table(&self, out: &mut String) {
        if self.speed.is_empty() {
            return;
        }
        out.push_str(
            "| path | Lateen µs/request | Envoy µs/request | ratio | aim | with Istio's filters µs/request | ratio | \
             Lateen req/s | Envoy req/s |\n|---|---|---|---|---|---|---|---|---|\n",
        );
        for (at, rounds) in &self.speed {
            let case = Case::ALL[*at];
            let cpu = |kind: Kind| Spread::of(rounds.iter().map(|round| round[kind as usize].cpu_us)).show(1);
            let speed = |kind: Kind| Spread::of(rounds.iter().map(|round| round[kind as usize].per_second)).show(0);
            let ratio = |kind: Kind| {
                let ratios =
                    rounds.iter().map(|round| round[kind as usize].cpu_us / round[Kind::Envoy as usize].cpu_us);
                Spread::of(ratios).show(2)
            };
            let aim = case.aim().map_or_else(|| "–".to_owned(), |aim| format!("≤ {aim:.2}"));
            _ = writeln!(
                out,
                "| {} | {} | {} | {} | {aim} | {} | {} | {} | {} |",
                case.title(),
                cpu(Kind::Lateen),
                cpu(Kind::Envoy),
                ratio(Kind::Lateen),
                cpu(Kind::LateenIstio),
                ratio(Kind::LateenIstio),
                speed(Kind::Lateen),
                speed(Kind::Envoy),
            );
        }
        if let Some(at) = Case::ALL.iter().position(|case| *case == Case::TwoWorkers)
            && let Some(rounds) = self.speed.get(&at)
        {
            let busiest = |kind: Kind| Spread::of(rounds.iter().map(|round| round[kind as usize].busiest)).show(2);
            _ = writeln!(
                out,
                "\nShare of the busiest thread with two workers and two connections (0.5 is even): Lateen {}, Envoy {}.",
                busiest(Kind::Lateen),
                busiest(Kind::Envoy)
            );
        }
        out.push('\n');
    }

    fn memory_table(&self, out: &mut String) {
        if self.memory.is_empty() {
            return;
        }
        out.push_str("| memory (PSS) | Lateen | Envoy | aim |\n|---|---|---|---|\n");
        let of = |kind: Kind, get: fn(&Memory) -> f64| {
            Spread::of(self.memory.iter().map(|both| get(&both[kind as usize]))).show(1)
        };
        let rows: [(String, fn(&Memory) -> f64, &str); 2] = [
            ("idle gateway, MiB".to_owned(), |memory| memory.idle_mib, "≤ 14"),
            (format!("idle HTTP/1.1 connection, KiB (of {CONNECTIONS})"), |memory| memory.connection_kib, "–"),
        ];
        for (what, get, aim) in rows {
            _ = writeln!(out, "| {what} | {} | {} | {aim} |", of(Kind::Lateen, get), of(Kind::Envoy, get));
        }
        out.push('\n');
    }

    fn counts_table(&self, out: &mut String) {
        let Some(counts) = &self.counts else { return };
        out.push_str("| per request | instructions | allocations |\n|---|---|---|\n");
        for (name, counts) in counts {
            _ = writeln!(out, "| {name} | {:.0} | {:.1} |", counts.instructions, counts.allocations);
        }
        out.push('\n');
    }

    fn demo_table(&self, out: &mut String) {
        let Some(demo) = &self.demo else { return };
        out.push_str("| the demo | measured | aim |\n|---|---|---|\n");
        _ = writeln!(out, "| first answer through the gateway, s | {:.2} | < 2 |", demo.first_answer.as_secs_f64());
        _ = writeln!(out, "| PSS of its {} processes, MiB | {:.0} | < 300 |", demo.processes, demo.pss_mib);
        _ = writeln!(out, "| CPU at rest, % of one core | {:.2} | ≤ 2 |", demo.idle_percent);
        _ = writeln!(out, "| a saved file is live after, s (median) | {:.2} | < 1 |", demo.saved_live.as_secs_f64());
        out.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_of_odd_and_even() {
        assert_eq!(Spread::of([3.0, 1.0, 2.0]), Spread { median: 2.0, min: 1.0, max: 3.0 });
        assert_eq!(Spread::of([4.0, 1.0, 2.0, 3.0]), Spread { median: 2.5, min: 1.0, max: 4.0 });
        assert_eq!(Spread::of([1.0, 2.0]).show(1), "1.5 (1.0–2.0)");
    }
}

//! Whether counts fit what was asked for, or one would see them less than once in a billion runs.

/// Probability that a fair process gives a count this far out, or farther, before a test fails.
const P_MIN: f64 = 1e-9;

/// Fails when `hits` of `count` draws are too many or too few for draws that hit with `share`.
#[track_caller]
pub(crate) fn assert_share(what: &str, hits: usize, count: usize, share: f64) {
    let (lower, upper) = tails(hits, count, share);
    assert!(
        lower.min(upper) >= P_MIN / 2.0,
        "{what}: {hits} of {count} with a share of {share}; so few: p = {lower:.1e}, so many: p = {upper:.1e}"
    );
}

/// `P(X <= hits)` and `P(X >= hits)` of the binomial distribution.
#[expect(clippy::cast_precision_loss, reason = "counts of a test are far below 2^52")]
fn tails(hits: usize, count: usize, share: f64) -> (f64, f64) {
    if share <= 0.0 || share >= 1.0 {
        let expect = if share <= 0.0 { 0 } else { count };
        return if hits == expect { (1.0, 1.0) } else { (0.0, 0.0) };
    }
    // P(X = 0), then each from the one before it, in logarithms: (1 - share)^count may underflow.
    let mut log = count as f64 * (1.0 - share).ln();
    let (mut lower, mut upper) = (0.0, 0.0);
    for at in 0..=count {
        let here = log.exp();
        if at <= hits {
            lower += here;
        }
        if at >= hits {
            upper += here;
        }
        log += ((count - at) as f64 / (at + 1) as f64 * share / (1.0 - share)).ln();
    }
    (lower, upper)
}

#[test]
fn tails_of_the_binomial_distribution() {
    let near = |(a, b): (f64, f64), (c, d): (f64, f64)| (a - c).abs() < 1e-9 && (b - d).abs() < 1e-9;
    assert!(near(tails(0, 3, 0.5), (0.125, 1.0)));
    assert!(near(tails(2, 3, 0.5), (0.875, 0.5)));
    assert_eq!(tails(0, 9, 0.0), (1.0, 1.0));
    assert_eq!(tails(8, 9, 1.0), (0.0, 0.0));
    let (lower, upper) = tails(2000, 4000, 0.5);
    assert!((lower + upper - 1.0).abs() < 0.02, "the middle of many draws: {lower} {upper}");
}

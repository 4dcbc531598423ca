//! Which keys are asked for: all alike, a few far more often than the rest, or the newest most.
//!
//! The skewed ones are YCSB's (Cooper et al., "Benchmarking Cloud Serving Systems with YCSB", 2010),
//! so that figures can be held against those of others. YCSB draws ranks by the method of Gray et al.,
//! "Quickly Generating Billion-Record Synthetic Databases" (1994): constant time for each draw, exact
//! for the first two ranks, very close for the rest. Its "scrambled" form draws from ten billion ranks
//! whatever the number of keys, and hashes the rank to a key, so that the popular keys are not
//! neighbours and their share does not depend on how many keys there are.

use rand::{Rng, RngExt};

/// The skew that YCSB uses.
const THETA: f64 = 0.99;

/// How many ranks YCSB's scrambled form draws from.
const SCRAMBLED_RANKS: u64 = 10_000_000_000;

/// The sum of `1 / rank^THETA` over those, which nobody wants to compute each time. YCSB's constant.
const SCRAMBLED_ZETA: f64 = 26.469_028_201_783_02;

/// How the keys of operations are spread, as it is asked for.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Distribution {
    /// Every key alike.
    Uniform,
    /// Few keys take most of the operations; YCSB's scrambled zipfian with theta 0.99.
    Zipfian,
    /// The newest keys take most of the operations.
    Latest,
}

/// Draws key numbers. Cheap to copy; all state is the random numbers that it is given.
#[derive(Debug, Clone, Copy)]
pub enum Chooser {
    /// See [`Distribution::Uniform`].
    Uniform,
    /// See [`Distribution::Zipfian`].
    Scrambled(Zipfian),
    /// See [`Distribution::Latest`].
    Latest(Zipfian),
}

impl Chooser {
    /// A chooser among `keys` keys at first; there may be more later.
    pub fn new(distribution: Distribution, keys: u64) -> Self {
        match distribution {
            Distribution::Uniform => Self::Uniform,
            Distribution::Zipfian => {
                Self::Scrambled(Zipfian::with_zeta(SCRAMBLED_RANKS, SCRAMBLED_ZETA))
            }
            Distribution::Latest => Self::Latest(Zipfian::new(keys)),
        }
    }

    /// The number of a key, below `keys`, which is at least 1.
    ///
    /// Latest looks back over as many keys as there were at first: the tail beyond that is so thin
    /// that computing its sum again for every insert, as YCSB does, would change nothing.
    pub fn draw(&self, rng: &mut impl Rng, keys: u64) -> u64 {
        match self {
            Self::Uniform => rng.random_range(0..keys),
            Self::Scrambled(zipfian) => scramble(zipfian.draw(rng)) % keys,
            Self::Latest(zipfian) => keys - 1 - zipfian.draw(rng).min(keys - 1),
        }
    }
}

/// Draws ranks from 0, of which rank `r` has the weight `1 / (r + 1)^THETA`.
#[derive(Debug, Clone, Copy)]
pub struct Zipfian {
    ranks: f64,
    zeta: f64,
    /// The exponent of the inverse, `1 / (1 - THETA)`.
    alpha: f64,
    eta: f64,
}

impl Zipfian {
    /// Takes time in proportion to `ranks`: a third of a second for ten million.
    pub fn new(ranks: u64) -> Self {
        Self::with_zeta(ranks, zeta(ranks))
    }

    fn with_zeta(ranks: u64, zeta_of_all: f64) -> Self {
        let count = ranks as f64;
        let eta = (1.0 - (2.0 / count).powf(1.0 - THETA)) / (1.0 - zeta(2) / zeta_of_all);
        Self { ranks: count, zeta: zeta_of_all, alpha: 1.0 / (1.0 - THETA), eta }
    }

    /// A rank.
    pub fn draw(&self, rng: &mut impl Rng) -> u64 {
        let uniform: f64 = rng.random();
        let scaled = uniform * self.zeta;
        if scaled < 1.0 || self.ranks < 2.0 {
            return 0;
        }
        if scaled < 1.0 + 0.5_f64.powf(THETA) {
            return 1;
        }
        let rank = self.ranks * (self.eta * uniform - self.eta + 1.0).powf(self.alpha);
        // Rounding can reach the end itself for a number close to 1.
        rank.min(self.ranks - 1.0) as u64
    }
}

/// The sum of the weights of the first `ranks` ranks.
fn zeta(ranks: u64) -> f64 {
    (1..=ranks).map(|rank| (rank as f64).powf(-THETA)).sum()
}

/// FNV-1a over the number's eight bytes, little end first, made positive as YCSB does.
fn scramble(rank: u64) -> u64 {
    const OFFSET_BASIS: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0000_0100_0000_01b3;
    let hash = rank
        .to_le_bytes()
        .iter()
        .fold(OFFSET_BASIS, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(PRIME));
    hash.cast_signed().unsigned_abs()
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::SmallRng;

    use super::*;

    const DRAWS: usize = 200_000;

    fn counts(keys: u64, mut draw: impl FnMut(&mut SmallRng) -> u64) -> Vec<f64> {
        let mut rng = SmallRng::seed_from_u64(7);
        let mut counts = vec![0.0; keys as usize];
        for _ in 0..DRAWS {
            counts[draw(&mut rng) as usize] += 1.0 / DRAWS as f64;
        }
        counts
    }

    /// Five standard deviations of a share that is counted over all draws, and a little for theory
    /// that is itself approximate. The seed is fixed: this cannot flake.
    fn close(found: f64, expected: f64, slack: f64) {
        let deviation = (expected * (1.0 - expected) / DRAWS as f64).sqrt();
        let bound = 5.0 * deviation + slack * expected;
        assert!((found - expected).abs() < bound, "found {found}, expected {expected} +- {bound}");
    }

    /// The shares of the ranks are those of Zipf's law: the first two exactly, the rest in sum.
    #[test]
    fn zipfian_ranks_have_their_shares() {
        for ranks in [10, 1_000, 100_000] {
            let zipfian = Zipfian::new(ranks);
            let shares = counts(ranks, |rng| zipfian.draw(rng));
            let all = zeta(ranks);
            close(shares[0], 1.0 / all, 0.0);
            close(shares[1], 0.5_f64.powf(THETA) / all, 0.0);
            let mut first = ranks;
            while first > 4 {
                first /= 2;
                let share: f64 = shares[..first as usize].iter().sum();
                close(share, zeta(first) / all, 0.06);
            }
        }
    }

    /// YCSB's constant for ten billion ranks is the sum that it claims to be.
    #[test]
    fn the_scrambled_sum_is_right() {
        // Euler and Maclaurin: the head summed, the tail as an integral.
        let head = 1_000_000;
        let power = |ranks: f64| ranks.powf(1.0 - THETA) / (1.0 - THETA);
        let (from, to) = (head as f64, SCRAMBLED_RANKS as f64);
        let ends = (to.powf(-THETA) - from.powf(-THETA)) / 2.0;
        let sum = zeta(head) + power(to) - power(from) + ends;
        assert!((sum - SCRAMBLED_ZETA).abs() < 1e-6, "{sum}");
    }

    /// The hottest key is the hash of rank 0 and has the share of rank 0; keys that few draws reach
    /// are spread over the whole range.
    #[test]
    fn scrambled_keys_keep_the_ranks_shares() {
        let keys = 1_000;
        let chooser = Chooser::new(Distribution::Zipfian, keys);
        let shares = counts(keys, |rng| chooser.draw(rng, keys));
        let hottest = (scramble(0) % keys) as usize;
        let top = shares.iter().copied().fold(0.0, f64::max);
        assert_eq!(shares[hottest], top);
        close(top, 1.0 / SCRAMBLED_ZETA, 0.05);
        assert!(shares.iter().filter(|&&share| share > 0.0).count() > 990);
    }

    /// Known answers of FNV-1a, one with the sign that YCSB takes away.
    #[test]
    fn the_scramble_is_fnv_1a() {
        assert_eq!(scramble(0), 0xa8c7_f832_281a_39c5_u64.cast_signed().unsigned_abs());
        assert_eq!(scramble(1), 0x89cd_3129_1d2a_efa4_u64.cast_signed().unsigned_abs());
    }

    #[test]
    fn uniform_keys_are_alike() {
        let chooser = Chooser::new(Distribution::Uniform, 50);
        for share in counts(50, |rng| chooser.draw(rng, 50)) {
            close(share, 1.0 / 50.0, 0.0);
        }
    }

    /// The newest key is the likeliest, also after more keys came; each draw is a key that exists.
    #[test]
    fn latest_follows_the_newest_key() {
        let chooser = Chooser::new(Distribution::Latest, 1_000);
        for keys in [1_000, 1_500] {
            let shares = counts(keys, |rng| chooser.draw(rng, keys));
            let newest = shares[keys as usize - 1];
            close(newest, 1.0 / zeta(1_000), 0.0);
            assert!(shares.iter().all(|&share| share <= newest));
        }
    }

    /// The same seed draws the same keys, another seed others.
    #[test]
    fn a_seed_repeats() {
        for distribution in [Distribution::Uniform, Distribution::Zipfian, Distribution::Latest] {
            let chooser = Chooser::new(distribution, 1_000);
            let draw = |seed| {
                let mut rng = SmallRng::seed_from_u64(seed);
                (0..50).map(|_| chooser.draw(&mut rng, 1_000)).collect::<Vec<_>>()
            };
            assert_eq!(draw(1), draw(1));
            assert_ne!(draw(1), draw(2));
        }
    }

    /// No key at all but the one there is.
    #[test]
    fn one_key_is_enough() {
        let mut rng = SmallRng::seed_from_u64(1);
        for distribution in [Distribution::Uniform, Distribution::Zipfian, Distribution::Latest] {
            assert_eq!(Chooser::new(distribution, 1).draw(&mut rng, 1), 0);
        }
    }
}

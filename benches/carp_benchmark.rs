//! How long a CARP lookup takes, next to SHA-256 of the same key, and how evenly keys spread.
//!
//! Run `cargo bench --bench carp_benchmark`. It first prints the table of spreads (the largest
//! and the smallest share of any member over the mean share; seeds are fixed), then measures.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use distrib_kv_store::carp::{Carp, HashVersion};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use sha2::{Digest, Sha256};

const LOOKUP_MEMBERS: [usize; 6] = [3, 8, 32, 128, 512, 2048];
const SPREAD_MEMBERS: [usize; 4] = [3, 8, 32, 64];
const SPREAD_KEYS: usize = 200_000;
const SEED: u64 = 42;

/// Lookups walk over this many keys, so that no branch predictor learns the answer for one.
/// A power of two.
const LOOKUP_KEYS: usize = 4096;

fn ring(members: usize, version: HashVersion, weight: impl Fn(usize) -> f32) -> Carp {
    let nodes = (0..members).map(|i| (format!("c{i}"), weight(i))).collect();
    Carp::with_hash(nodes, 1, version)
}

fn sequential_keys(count: usize) -> Vec<Vec<u8>> {
    let key = |i| format!("user:{i:08}").into_bytes();
    (0..count).map(key).collect()
}

fn random_keys(count: usize) -> Vec<[u8; 16]> {
    let mut rng = StdRng::seed_from_u64(SEED);
    let key = |_| {
        let mut key = [0; 16];
        rng.fill_bytes(&mut key);
        key
    };
    (0..count).map(key).collect()
}

fn uuid_keys(count: usize) -> Vec<Vec<u8>> {
    let uuid = |bytes| uuid::Builder::from_random_bytes(bytes).into_uuid();
    let key = |bytes| uuid(bytes).to_string().into_bytes();
    random_keys(count).into_iter().map(key).collect()
}

/// The largest and the smallest share of any member, over the mean share.
fn spread(ring: &Carp, keys: &[Vec<u8>]) -> (f64, f64) {
    let mut owned = vec![0_u32; ring.len()];
    for key in keys {
        owned[ring.owner_index(key).expect("the ring has members")] += 1;
    }
    let mean = keys.len() as f64 / ring.len() as f64;
    let over_mean = |count: Option<&u32>| f64::from(*count.expect("it has members")) / mean;
    (over_mean(owned.iter().max()), over_mean(owned.iter().min()))
}

fn print_spreads() {
    let kinds = [
        ("user:00000042", sequential_keys(SPREAD_KEYS)),
        ("UUID", uuid_keys(SPREAD_KEYS)),
        ("random", random_keys(SPREAD_KEYS).iter().map(|key| key.to_vec()).collect()),
    ];
    println!("Spread of {SPREAD_KEYS} keys over equal members, largest and smallest share / mean");
    println!("{:>7}  {:<14} {:^15} {:^15}", "members", "keys", "version 1", "version 2");
    for members in SPREAD_MEMBERS {
        let v1 = ring(members, HashVersion::V1, |_| 1.0);
        let v2 = ring(members, HashVersion::V2, |_| 1.0);
        for (kind, keys) in &kinds {
            let (v1_max, v1_min) = spread(&v1, keys);
            let (v2_max, v2_min) = spread(&v2, keys);
            println!(
                "{members:>7}  {kind:<14} {v1_max:>7.3} {v1_min:>7.3} {v2_max:>7.3} {v2_min:>7.3}"
            );
        }
    }
    println!();
}

fn bench_lookups(criterion: &mut Criterion) {
    print_spreads();
    let keys = sequential_keys(LOOKUP_KEYS);
    let mut group = criterion.benchmark_group("lookup");
    group
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(1200));

    let mut next = 0;
    group.bench_function("sha256_of_the_key", |bencher| {
        bencher.iter(|| {
            next = (next + 1) % LOOKUP_KEYS;
            Sha256::digest(black_box(&keys[next]))
        });
    });
    for members in LOOKUP_MEMBERS {
        let rings = [
            ("v1", ring(members, HashVersion::V1, |_| 1.0)),
            ("v2", ring(members, HashVersion::V2, |_| 1.0)),
            // No two alike: the worst case, as each weight may need a logarithm.
            ("v2_unequal", ring(members, HashVersion::V2, |i| 1.0 + i as f32 / members as f32)),
        ];
        for (name, ring) in &rings {
            group.bench_with_input(BenchmarkId::new(*name, members), ring, |bencher, ring| {
                bencher.iter(|| {
                    next = (next + 1) % LOOKUP_KEYS;
                    ring.owner(black_box(&keys[next]))
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, bench_lookups);
criterion_main!(benches);

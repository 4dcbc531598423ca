//! How many operations a second 1, 10, 100 and 1000 concurrent clients get done.
//!
//! Each client does one operation after the other, as many as the measurement asks for, and the time
//! runs until the last is done: a closed loop, without a barrier after every operation.

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput};
use distrib_kv_store::kvclient::KVClient;
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

mod common;
use common::{Operation, Target};

/// How many clients work at once.
const CONCURRENT_CLIENTS: [u32; 4] = [1, 10, 100, 1000];

fn main() {
    let runtime = Runtime::new().expect("a runtime can be made");
    let target = runtime.block_on(Target::open());
    let mut criterion = Criterion::default().configure_from_args();
    for operation in Operation::ALL {
        measure(&mut criterion, &runtime, &target.client, operation);
    }
    criterion.final_summary();
    runtime.block_on(target.close());
}

fn measure(criterion: &mut Criterion, runtime: &Runtime, client: &KVClient, operation: Operation) {
    let mut group = criterion.benchmark_group(format!("concurrent_{}", operation.name()));
    // Flat: one round of a thousand clients takes long enough to be a sample by itself.
    group.sample_size(10).sampling_mode(SamplingMode::Flat);
    group.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(3));
    for clients in CONCURRENT_CLIENTS {
        group.throughput(Throughput::Elements(u64::from(clients)));
        let id = BenchmarkId::from_parameter(clients);
        group.bench_function(id, |bencher| {
            let rounds = |rounds| run_clients(client.clone(), operation, clients, rounds);
            bencher.to_async(runtime).iter_custom(rounds);
        });
    }
    group.finish();
}

/// Lets that many clients do `rounds` operations each; returns the time until the last was done.
async fn run_clients(
    client: KVClient,
    operation: Operation,
    clients: u32,
    rounds: u64,
) -> Duration {
    let begun = Instant::now();
    let mut tasks = JoinSet::new();
    for _ in 0..clients {
        let client = client.clone();
        tasks.spawn(async move {
            for _ in 0..rounds {
                operation.run(&client).await;
            }
        });
    }
    tasks.join_all().await;
    begun.elapsed()
}

//! How long one client waits for one operation: write, read, linearizable read, and a mix.

use std::time::Duration;

use criterion::{Criterion, Throughput};
use tokio::runtime::Runtime;

mod common;
use common::{Operation, Target};

fn main() {
    let runtime = Runtime::new().expect("a runtime can be made");
    let target = runtime.block_on(Target::open());
    let mut criterion = Criterion::default().configure_from_args();
    measure(&mut criterion, &runtime, &target);
    criterion.final_summary();
    runtime.block_on(target.close());
}

fn measure(criterion: &mut Criterion, runtime: &Runtime, target: &Target) {
    let mut group = criterion.benchmark_group("operations");
    group.sample_size(20).warm_up_time(Duration::from_secs(1));
    group.measurement_time(Duration::from_secs(5)).throughput(Throughput::Elements(1));
    for operation in Operation::ALL {
        group.bench_function(operation.name(), |bencher| {
            bencher.to_async(runtime).iter(|| operation.run(&target.client));
        });
    }
    group.finish();
}

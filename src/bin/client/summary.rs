//! What a run found, for a program (one JSON object) and for a person (a few lines).

use std::collections::BTreeMap;
use std::fmt;

use distrib_kv_store::kvclient::Consistency;
use serde::{Deserialize, Serialize};

use super::cpu::CpuUse;
use super::distribution::Distribution;
use super::mix::{Kind, Workload};
use super::run::{Measured, Plan};
use super::tally::{Answers, Outcomes, Percentiles};

/// Who was measured, and through what.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum System {
    /// This store through `KVClient`.
    Kvclient,
    /// This store, one HTTP request for each operation.
    Http,
    /// etcd.
    Etcd,
    /// Redis.
    Redis,
}

/// What was asked for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Parameters {
    /// Who was measured.
    pub system: System,
    /// The mix.
    pub workload: Workload,
    /// How its keys were spread.
    pub distribution: Distribution,
    /// Of reads: `linearizable` or `stale`.
    pub consistency: String,
    /// How many clients worked at once.
    pub clients: usize,
    /// The load program's own threads.
    pub threads: usize,
    /// Connections that clients shared; 0: not shared, or the library's business.
    pub connections: usize,
    /// How many keys there were at first.
    pub keys: u64,
    /// The size of each value.
    pub value_bytes: usize,
    /// Whether all keys were written first.
    pub load: bool,
    /// How long was not measured.
    pub warmup_seconds: f64,
    /// Of all that is random.
    pub seed: u64,
}

impl Parameters {
    /// Those of a plan.
    pub fn new(
        plan: &Plan,
        system: System,
        consistency: Consistency,
        threads: usize,
        connections: usize,
    ) -> Self {
        let consistency = match consistency {
            Consistency::Linearizable | Consistency::LinearizableOnFollower => "linearizable",
            Consistency::Stale => "stale",
        };
        Self {
            system,
            workload: plan.workload,
            distribution: plan.distribution,
            consistency: consistency.to_owned(),
            clients: plan.clients,
            threads,
            connections,
            keys: plan.keys,
            value_bytes: plan.value_bytes,
            load: plan.load,
            warmup_seconds: plan.warmup.as_secs_f64(),
            seed: plan.seed,
        }
    }
}

/// The result of a run. Times are in seconds or, where the name says so, microseconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// What was asked for.
    pub parameters: Parameters,
    /// How long was measured.
    pub seconds: f64,
    /// Ctrl-C ended it early.
    pub interrupted: bool,
    /// Operations that were given up then; in no other count.
    pub abandoned: u64,
    /// All operations: the sum of the outcomes.
    pub operations: u64,
    /// Those that were answered, by seconds.
    pub throughput: f64,
    /// How they ended.
    pub outcomes: Outcomes,
    /// Those that were not answered: the sum of the errors by code.
    pub errors: u64,
    /// Why not.
    pub errors_by_code: BTreeMap<String, u64>,
    /// Keys that were read; a multi-get reads several.
    pub keys_read: u64,
    /// Of answered operations.
    pub latency_us: Percentiles,
    /// The same for each kind of operation.
    pub by_operation: BTreeMap<Kind, Answers>,
    /// Of the processes that were asked for; `null` when there were none or one has ended.
    pub server_cpu: Option<CpuUse>,
    /// Of the load program itself.
    pub client_cpu: CpuUse,
}

impl Summary {
    /// Turns counts into figures.
    pub fn new(parameters: Parameters, watched: bool, measured: &Measured) -> Self {
        let tally = &measured.tally;
        let (outcomes, overall) = (tally.outcomes().clone(), tally.overall());
        let seconds = measured.elapsed.as_secs_f64();
        let answered = outcomes.answered();
        let server_cpu_s = measured.server_cpu_s.filter(|_| watched);
        Self {
            parameters,
            seconds,
            interrupted: measured.interrupted,
            abandoned: measured.abandoned,
            operations: answered + outcomes.failed(),
            throughput: if answered == 0 { 0.0 } else { answered as f64 / seconds },
            errors: outcomes.failed(),
            errors_by_code: tally.errors_by_code().clone(),
            keys_read: tally.keys_read(),
            latency_us: overall.latency_us,
            by_operation: tally.by_kind(),
            server_cpu: server_cpu_s.map(|seconds| CpuUse::new(seconds, answered)),
            client_cpu: CpuUse::new(measured.client_cpu_s, answered),
            outcomes,
        }
    }
}

/// For a person.
impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Parameters { workload, distribution, clients, .. } = &self.parameters;
        writeln!(f, "workload     {workload:?}, {distribution:?}, {clients} clients, closed loop")?;
        writeln!(f, "measured     {} operations in {:.2} s", self.operations, self.seconds)?;
        writeln!(f, "throughput   {:.0} op/s", self.throughput)?;
        writeln!(f, "latency      {}", Shown(&self.latency_us))?;
        if self.by_operation.len() > 1 {
            for (kind, answers) in &self.by_operation {
                let name = format!("{kind:?}");
                writeln!(
                    f,
                    "  {name:<18} {:>9}  {}",
                    answers.answered,
                    Shown(&answers.latency_us)
                )?;
            }
        }
        let Outcomes { absent, condition_failed, .. } = self.outcomes;
        if absent > 0 {
            writeln!(
                f,
                "absent       {absent} reads found nothing; `--load` writes the keys first"
            )?;
        }
        if condition_failed > 0 {
            writeln!(f, "lost races   {condition_failed} read-modify-writes came second")?;
        }
        writeln!(f, "errors       {}", self.errors)?;
        for (code, count) in &self.errors_by_code {
            writeln!(f, "  {code:<18} {count:>9}")?;
        }
        let shown = |cpu: &CpuUse| match cpu.us_per_operation {
            Some(us) => format!("{:.2} s, {us:.1} us an operation", cpu.seconds),
            None => format!("{:.2} s", cpu.seconds),
        };
        if let Some(cpu) = &self.server_cpu {
            writeln!(f, "server CPU   {}", shown(cpu))?;
        }
        writeln!(f, "client CPU   {}", shown(&self.client_cpu))?;
        if self.interrupted {
            writeln!(f, "interrupted; {} operations in flight were given up", self.abandoned)?;
        }
        Ok(())
    }
}

struct Shown<'a>(&'a Percentiles);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Percentiles { p50, p90, p99, p99_9, max, .. } = self.0;
        write!(f, "p50 {p50}  p90 {p90}  p99 {p99}  p99.9 {p99_9}  max {max} us")
    }
}

#[cfg(test)]
pub mod tests {
    use std::time::Duration;

    use distrib_kv_store::network::error::Outcome;

    use super::*;
    use crate::bench::run::End;
    use crate::bench::tally::{Answered, Failure, Tally};

    fn plan() -> Plan {
        Plan {
            workload: Workload::A,
            distribution: Distribution::Zipfian,
            clients: 4,
            keys: 10,
            value_bytes: 100,
            load: true,
            warmup: Duration::from_secs(1),
            end: End::Operations(10),
            seed: 1,
            cpu_of: vec![1],
        }
    }

    fn measured() -> Measured {
        let mut tally = Tally::default();
        for us in 1..=8 {
            let kind = if us % 2 == 0 { Kind::Read } else { Kind::Update };
            tally.record(kind, 1, &Ok(Answered::Done), Duration::from_micros(us * 100));
        }
        let lost = Failure::new("ANSWER_LOST", "", Outcome::Unknown);
        tally.record(Kind::Update, 0, &Err(lost), Duration::from_secs(9));
        Measured {
            tally,
            elapsed: Duration::from_secs(2),
            server_cpu_s: Some(0.008),
            client_cpu_s: 0.004,
            interrupted: false,
            abandoned: 0,
        }
    }

    /// Some summary, to be changed where it matters.
    pub fn example() -> Summary {
        summary(&measured(), true)
    }

    fn summary(measured: &Measured, watched: bool) -> Summary {
        let consistency = Consistency::Linearizable;
        Summary::new(Parameters::new(&plan(), System::Http, consistency, 2, 0), watched, measured)
    }

    /// The figures agree with each other and with what was counted.
    #[test]
    fn the_figures_add_up() {
        let summary = summary(&measured(), true);
        let Outcomes { done, absent, condition_failed, not_applied, applied, unknown } =
            summary.outcomes;
        let sum = done + absent + condition_failed + not_applied + applied + unknown;
        assert_eq!((summary.operations, sum), (9, 9));
        assert_eq!(summary.errors, summary.errors_by_code.values().sum::<u64>());
        assert_eq!(summary.throughput, 4.0);
        assert_eq!(summary.latency_us.p50, 400);
        // An error's nine seconds are nobody's latency.
        assert_eq!(summary.latency_us.max, 800);
        assert_eq!(summary.by_operation[&Kind::Read].answered, 4);
        assert_eq!(summary.by_operation[&Kind::Update].answered, 4);
        assert_eq!(summary.server_cpu.unwrap().us_per_operation, Some(1_000.0));
        assert_eq!(summary.client_cpu.us_per_operation, Some(500.0));
    }

    /// The JSON keeps its names, and reads back as what was written.
    #[test]
    fn the_json_is_stable() {
        let summary = summary(&measured(), true);
        let json = serde_json::to_value(&summary).unwrap();
        assert_eq!(json["parameters"]["system"], "http");
        assert_eq!(json["parameters"]["workload"], "a");
        assert_eq!(json["latency_us"]["p99_9"], 800);
        assert_eq!(json["by_operation"]["read"]["answered"], 4);
        assert_eq!(json["errors_by_code"]["ANSWER_LOST"], 1);
        assert_eq!(json["outcomes"]["unknown"], 1);
        assert_eq!(serde_json::from_value::<Summary>(json).unwrap(), summary);
    }

    /// Nobody's CPU was asked for: none is told. Nothing was answered: no figure is infinite.
    #[test]
    fn nothing_is_made_up() {
        assert_eq!(summary(&measured(), false).server_cpu, None);
        let nothing = Measured { tally: Tally::default(), elapsed: Duration::ZERO, ..measured() };
        let summary = summary(&nothing, true);
        assert_eq!((summary.throughput, summary.operations), (0.0, 0));
        assert_eq!(summary.latency_us, Percentiles::default());
        assert!(!summary.to_string().contains("NaN"), "{summary}");
    }
}

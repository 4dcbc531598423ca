//! `client bench-report`: many runs next to each other, as a table and as a chart.
//!
//! Reads the JSON lines that `client bench --json` wrote, several rounds of each measurement. What is
//! shown is the **median** over the rounds: other programs on the machine disturb single rounds, and
//! hardly more than half of them. Ratios are of medians.
//!
//! `scripts/compare.sh` is its only user, which is why it is not in the help.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Args;

use super::mix::Workload;
use super::summary::{Summary, System};

/// Flags of `client bench-report`.
#[derive(Debug, Args)]
pub struct ReportFlags {
    /// One JSON object of `client bench --json` a line
    raw: PathBuf,
    /// Where to draw the ratios
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// The input cannot be read or the chart not be written.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A line is not a summary.
    #[error("{path}, line {line}: {source}")]
    Line {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong with it.
        source: serde_json::Error,
    },
}

/// One measurement, of which there are several rounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cell {
    /// `write` or `read`, usually.
    pub workload: Workload,
    /// How many clients worked at once.
    pub clients: usize,
    /// Who was measured.
    pub system: System,
}

/// The medians over the rounds of a cell.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Medians {
    /// Operations answered in a second.
    pub throughput: f64,
    /// The rounds' lowest and highest throughput, as parts of the median.
    pub spread: (f64, f64),
    /// CPU time of all server processes for each operation; nothing if it was not measured.
    pub server_cpu_us: Option<f64>,
    /// Median, 99 % and 99.9 % of latencies.
    pub latency_us: [f64; 3],
    /// Errors of all rounds.
    pub errors: u64,
}

/// All cells.
pub type Cells = BTreeMap<Cell, Medians>;

/// Prints the table to the returned text and writes the chart, if one is asked for.
pub fn report(flags: &ReportFlags) -> Result<String, ReportError> {
    let file = |path: &PathBuf, source| ReportError::File { path: path.clone(), source };
    let text = std::fs::read_to_string(&flags.raw).map_err(|source| file(&flags.raw, source))?;
    let mut rounds = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let (path, line_number) = (flags.raw.clone(), index + 1);
        let parsed = serde_json::from_str(line);
        rounds.push(parsed.map_err(|source| ReportError::Line {
            path,
            line: line_number,
            source,
        })?);
    }
    let cells = medians(&rounds);
    if let Some(path) = &flags.svg {
        let drawn = super::chart::draw(&cells);
        std::fs::write(path, drawn).map_err(|source| file(path, source))?;
    }
    Ok(ratios(&cells) + &table(&cells))
}

/// Groups rounds into cells.
pub fn medians(rounds: &[Summary]) -> Cells {
    let mut grouped: BTreeMap<Cell, Vec<&Summary>> = BTreeMap::new();
    for round in rounds {
        let parameters = &round.parameters;
        let (workload, clients) = (parameters.workload, parameters.clients);
        let cell = Cell { workload, clients, system: parameters.system };
        grouped.entry(cell).or_default().push(round);
    }
    grouped.into_iter().map(|(cell, rounds)| (cell, medians_of(&rounds))).collect()
}

fn medians_of(rounds: &[&Summary]) -> Medians {
    let of = |figure: &dyn Fn(&Summary) -> Option<f64>| {
        median(rounds.iter().filter_map(|round| figure(round)).collect())
    };
    let throughput = of(&|round| Some(round.throughput)).unwrap_or(0.0);
    let part = |round: &&Summary| round.throughput / throughput;
    let latency =
        |figure: fn(&Summary) -> u64| of(&|round| Some(figure(round) as f64)).unwrap_or(0.0);
    Medians {
        throughput,
        spread: (
            rounds.iter().map(part).fold(f64::INFINITY, f64::min),
            rounds.iter().map(part).fold(0.0, f64::max),
        ),
        server_cpu_us: of(&|round| round.server_cpu.as_ref()?.us_per_operation),
        latency_us: [
            latency(|round| round.latency_us.p50),
            latency(|round| round.latency_us.p99),
            latency(|round| round.latency_us.p99_9),
        ],
        errors: rounds.iter().map(|round| round.errors).sum(),
    }
}

/// The middle one; the mean of the middle two of an even number; nothing of none.
fn median(mut figures: Vec<f64>) -> Option<f64> {
    figures.sort_by(f64::total_cmp);
    let half = figures.len() / 2;
    match figures.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(figures[half]),
        _ => Some((figures[half - 1] + figures[half]) / 2.0),
    }
}

/// How many times the peer's throughput; nothing when the peer was not measured.
pub fn ratio(cells: &Cells, cell: &Cell, peer: System) -> Option<f64> {
    let peer = cells.get(&Cell { system: peer, ..*cell })?;
    (peer.throughput > 0.0).then(|| cells[cell].throughput / peer.throughput)
}

/// How a system is called in tables and charts.
pub fn name(system: System) -> &'static str {
    match system {
        System::Kvclient => "raft-kv, KVClient",
        System::Http => "raft-kv, plain HTTP",
        System::Etcd => "etcd",
        System::Redis => "Redis, one node",
    }
}

/// A figure that is better the higher it is, of a cell next to the same cell of etcd.
type Comparison = fn(&Medians, &Medians) -> Option<f64>;

/// What is compared with etcd, in words and in figures.
const COMPARISONS: [(&str, Comparison); 3] = [
    ("throughput, times etcd's", |own, etcd| Some(own.throughput / etcd.throughput)),
    ("p99, etcd's / it", |own, etcd| Some(etcd.latency_us[1] / own.latency_us[1])),
    ("server CPU an operation, etcd's / it", |own, etcd| {
        Some(etcd.server_cpu_us? / own.server_cpu_us?)
    }),
];

/// Three small tables in Markdown, with a column for each number of clients. Nothing without etcd.
fn ratios(cells: &Cells) -> String {
    if !cells.keys().any(|cell| cell.system == System::Etcd) {
        return String::new();
    }
    let clients: BTreeSet<usize> = cells.keys().map(|cell| cell.clients).collect();
    let rows: BTreeSet<_> = cells.keys().map(|cell| (cell.workload, cell.system)).collect();
    let mut text = String::new();
    for (title, compare) in COMPARISONS {
        let columns: Vec<String> = clients.iter().map(|clients| clients.to_string()).collect();
        // Writing to a string cannot fail, here and below.
        let _ = writeln!(text, "| {title}: clients | {} |", columns.join(" | "));
        let _ = writeln!(text, "| --- |{}", " ---: |".repeat(columns.len()));
        for (workload, system) in rows.iter().filter(|(_, system)| *system != System::Etcd) {
            let figures = clients.iter().map(|clients| {
                let cell = |system| Cell { workload: *workload, clients: *clients, system };
                let (own, etcd) = (cells.get(&cell(*system))?, cells.get(&cell(System::Etcd))?);
                compare(own, etcd).filter(|ratio| ratio.is_finite())
            });
            let figures: Vec<String> = figures.map(times).collect();
            let _ = writeln!(
                text,
                "| {}, {} | {} |",
                lower_case(*workload),
                name(*system),
                figures.join(" | ")
            );
        }
        text.push('\n');
    }
    text
}

fn times(factor: Option<f64>) -> String {
    factor.map_or("-".to_owned(), |factor| format!("{factor:.2}"))
}

fn lower_case(workload: Workload) -> String {
    format!("{workload:?}").to_lowercase()
}

/// The figures as a table in Markdown.
pub fn table(cells: &Cells) -> String {
    let mut text = String::from(
        "| workload | clients | system | op/s | spread | x etcd | x Redis | CPU us/op | CPU, etcd's / it \
         | p50 us | p99 us | p99.9 us | errors |\n\
         | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n",
    );
    for (cell, medians) in cells {
        let etcd = cells.get(&Cell { system: System::Etcd, ..*cell });
        let saved = etcd.and_then(|etcd| Some(etcd.server_cpu_us? / medians.server_cpu_us?));
        let [p50, p99, p99_9] = medians.latency_us;
        let workload = lower_case(cell.workload);
        let (low, high) = medians.spread;
        let _ = writeln!(
            text,
            "| {workload} | {} | {} | {:.0} | {low:.2}-{high:.2} | {} | {} | {} | {} | {p50:.0} | {p99:.0} \
             | {p99_9:.0} | {} |",
            cell.clients,
            name(cell.system),
            medians.throughput,
            times(ratio(cells, cell, System::Etcd)),
            times(ratio(cells, cell, System::Redis)),
            medians.server_cpu_us.map_or("-".to_owned(), |us| format!("{us:.1}")),
            times(saved),
            medians.errors,
        );
    }
    text
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A cell with this throughput and nothing else of interest.
    pub fn cell(system: System, workload: Workload, clients: usize, op_s: f64) -> (Cell, Medians) {
        let medians = Medians {
            throughput: op_s,
            spread: (0.9, 1.1),
            server_cpu_us: Some(1e6 / op_s),
            latency_us: [1.0, 2.0, 3.0],
            errors: 0,
        };
        (Cell { workload, clients, system }, medians)
    }

    #[test]
    fn a_median_is_the_middle() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![3.0]), Some(3.0));
        assert_eq!(median(vec![9.0, 1.0, 3.0]), Some(3.0));
        assert_eq!(median(vec![9.0, 1.0, 3.0, 5.0]), Some(4.0));
    }

    /// Rounds become one cell each with the medians; other clients or systems are other cells.
    #[test]
    fn rounds_become_cells() {
        let round = |system, clients, throughput, p99| {
            let mut round = crate::bench::summary::tests::example();
            round.parameters.system = system;
            round.parameters.clients = clients;
            round.throughput = throughput;
            round.latency_us.p99 = p99;
            round
        };
        let rounds = [
            round(System::Http, 1, 100.0, 30),
            round(System::Http, 1, 300.0, 10),
            round(System::Http, 1, 200.0, 90),
            round(System::Http, 16, 900.0, 1),
            round(System::Etcd, 1, 50.0, 1),
        ];
        let cells = medians(&rounds);
        assert_eq!(cells.len(), 3);
        let (cell, found) = cells.iter().find(|(cell, _)| cell.system == System::Http).unwrap();
        assert_eq!((cell.clients, found.throughput, found.latency_us[1]), (1, 200.0, 30.0));
        assert_eq!(found.spread, (0.5, 1.5));
        assert_eq!(ratio(&cells, cell, System::Etcd), Some(4.0));
        assert_eq!(ratio(&cells, cell, System::Redis), None);
    }

    /// Ratios to etcd are higher the better it is, and nothing is compared with what was not measured.
    #[test]
    fn etcd_is_the_measure() {
        let mut cells = Cells::from([
            cell(System::Http, Workload::Write, 1, 300.0),
            cell(System::Http, Workload::Write, 16, 500.0),
            cell(System::Etcd, Workload::Write, 1, 100.0),
        ]);
        for (cell, medians) in &mut cells {
            medians.latency_us[1] = if cell.system == System::Etcd { 90.0 } else { 60.0 };
        }
        let text = ratios(&cells);
        let rows: Vec<_> = text.lines().filter(|line| line.starts_with("| write")).collect();
        let row = |figures| format!("| write, raft-kv, plain HTTP | {figures} | - |");
        assert_eq!(rows, [row("3.00"), row("1.50"), row("3.00")], "{text}");
        cells.retain(|cell, _| cell.system != System::Etcd);
        assert_eq!(ratios(&cells), "");
    }

    /// One row for each cell; peers that were not measured show as such.
    #[test]
    fn the_table_has_a_row_for_each_cell() {
        let cells = Cells::from([
            cell(System::Kvclient, Workload::Write, 16, 300.0),
            cell(System::Etcd, Workload::Write, 16, 100.0),
        ]);
        let table = table(&cells);
        let rows: Vec<_> = table.lines().collect();
        assert_eq!(rows.len(), 4);
        assert!(
            rows[2].contains("raft-kv, KVClient | 300 | 0.90-1.10 | 3.00 | - |"),
            "{}",
            rows[2]
        );
        let columns = |row: &str| row.matches('|').count();
        assert!(rows.iter().all(|row| columns(row) == columns(rows[0])));
    }
}

//! `client bench`: a load against a real node ends with figures that add up, in every mode and mix;
//! failures are counted by their codes; Ctrl-C reports what was measured so far.

use std::io::{BufRead, BufReader};
use std::process::{Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

mod common;
mod fake_node;

use common::cluster::{Cluster, FAST};
use common::eventually;
use distrib_kv_store::ring::Ring;
use fake_node::{FakeNode, Gate, Reply, error, metrics, ring_reply, start, written};

/// `client bench` with an environment of its own, and few threads: other tests run beside it.
fn bench(endpoints: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_client"));
    command.env_remove("KV_ENDPOINTS").stdin(Stdio::null());
    command.args(["bench", "--json", "--threads", "1", "--endpoints", endpoints]);
    command.args(["--keys", "60", "--clients", "4", "--warmup-seconds", "0"]).args(arguments);
    command
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap_or_else(|| panic!("{output:?}"))
}

/// The one JSON object on standard output, after checking what holds for every run.
fn summary(output: &Output) -> Value {
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    assert_eq!(text.matches('\n').count(), 1, "{output:?}");
    let summary: Value = serde_json::from_str(&text).unwrap();
    let sum = |object: &Value| -> u64 {
        object.as_object().unwrap().values().map(|count| count.as_u64().unwrap()).sum()
    };
    assert_eq!(sum(&summary["outcomes"]), count(&summary["operations"]), "{summary}");
    assert_eq!(sum(&summary["errors_by_code"]), count(&summary["errors"]), "{summary}");
    let kinds = summary["by_operation"].as_object().unwrap();
    let answered: u64 = kinds.values().map(|kind| count(&kind["answered"])).sum();
    assert_eq!(answered + count(&summary["errors"]), count(&summary["operations"]), "{summary}");
    let latencies = ["p50", "p90", "p99", "p99_9", "max"].map(|name| &summary["latency_us"][name]);
    assert!(latencies.map(count).is_sorted(), "{summary}");
    summary
}

fn count(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is a count"))
}

/// A second of load through either client: operations, no errors, nothing missing.
#[test]
fn a_second_of_load_adds_up() {
    let cluster = Cluster::formed(1, FAST);
    let pid = cluster.node(1).pid().to_string();
    for mode in ["kvclient", "http"] {
        let arguments = ["--mode", mode, "--seconds", "1", "--load", "--cpu-of", &pid];
        let output = bench(cluster.http(1), &arguments).output().unwrap();
        assert_eq!(code(&output), 0, "{output:?}");
        let summary = summary(&output);
        assert_eq!((count(&summary["errors"]), count(&summary["outcomes"]["absent"])), (0, 0));
        assert_eq!(summary["outcomes"]["done"], summary["operations"]);
        assert!(count(&summary["operations"]) > 0, "{summary}");
        assert!(summary["seconds"].as_f64().unwrap() >= 1.0, "{summary}");
        assert!(count(&summary["latency_us"]["max"]) > 0, "{summary}");
        assert!(summary["server_cpu"]["us_per_operation"].is_f64(), "{summary}");
        assert_eq!(summary["parameters"]["system"], mode);
        assert_eq!(summary["interrupted"], false);
    }
}

/// Every mix makes as many operations as were asked for, without errors and without reading keys that
/// do not exist.
#[test]
fn every_mix_works_in_both_modes() {
    let cluster = Cluster::formed(1, FAST);
    for mode in ["kvclient", "http"] {
        for workload in ["write", "read", "mixed", "a", "b", "c", "d", "e", "f"] {
            let arguments =
                ["--mode", mode, "--workload", workload, "--operations", "150", "--load"];
            let output = bench(cluster.http(1), &arguments).output().unwrap();
            assert_eq!(code(&output), 0, "{output:?}");
            let summary = summary(&output);
            assert_eq!(count(&summary["operations"]), 150, "{summary}");
            assert_eq!(count(&summary["errors"]), 0, "{summary}");
            assert_eq!(count(&summary["outcomes"]["absent"]), 0, "{summary}");
            assert_eq!(summary["parameters"]["workload"], workload);
            if workload == "e" {
                assert!(count(&summary["keys_read"]) > 150, "{summary}");
            }
        }
    }
}

/// Loading writes exactly the keys that were asked for, stale reads find them, and without loading
/// reads of nothing are told apart.
#[test]
fn keys_are_loaded_and_absent_ones_counted() {
    let cluster = Cluster::formed(1, FAST);
    let read = ["--workload", "read", "--operations", "40", "--consistency", "stale"];
    let output = bench(cluster.http(1), &read).output().unwrap();
    assert_eq!(count(&summary(&output)["outcomes"]["absent"]), 40);
    for nothing_else in [["--seconds", "0"], ["--operations", "0"]] {
        let load = [&["--load", "--value-bytes", "5"], &nothing_else[..]].concat();
        let output = bench(cluster.http(1), &load).output().unwrap();
        assert_eq!((code(&output), count(&summary(&output)["operations"])), (0, 0), "{output:?}");
    }
    assert_eq!(cluster.metrics(1).unwrap()["keys"], 60);
    let value = cluster.get(1, "/v1/kv/user000000000059");
    assert_eq!((value.status, value.body.len()), (200, 5));
    let output = bench(cluster.http(1), &read).output().unwrap();
    assert_eq!(count(&summary(&output)["outcomes"]["done"]), 40);
}

/// A node of a cluster without a ring that answers reads and writes by `script`.
fn node(script: impl Fn() -> Reply + Send + Sync + 'static) -> FakeNode {
    start(move |seen| match seen.path.as_str() {
        "/v1/ring" => ring_reply(&Ring::none()),
        "/cluster/metrics" => metrics("c1", "h:1"),
        _ => script(),
    })
}

/// Errors are counted by their codes and outcomes, next to what was answered, and end nothing.
#[tokio::test(flavor = "multi_thread")]
async fn errors_are_counted_by_code() {
    let turn = std::sync::atomic::AtomicUsize::new(0);
    let replies = [
        written(1),
        error(503, "OVERLOADED", "not_applied"),
        error(504, "TIMEOUT", "unknown"),
        Reply::Close,
    ];
    let node =
        node(move || replies[turn.fetch_add(1, std::sync::atomic::Ordering::SeqCst) % 4].clone());
    let arguments =
        ["--mode", "http", "--ask", "given", "--workload", "write", "--operations", "40"];
    let output = bench(&node.address, &arguments).output().unwrap();
    assert_eq!(code(&output), 0, "{output:?}");
    let summary = summary(&output);
    let expected = json!({"OVERLOADED": 10, "TIMEOUT": 10, "ANSWER_LOST": 10});
    assert_eq!(summary["errors_by_code"], expected);
    assert_eq!(count(&summary["outcomes"]["done"]), 10);
    assert_eq!(count(&summary["outcomes"]["not_applied"]), 10);
    assert_eq!(count(&summary["outcomes"]["unknown"]), 20);
}

/// When nothing at all is answered, the figures say why and the exit code that it failed.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_answered_is_a_failure_with_figures() {
    let node = node(|| error(500, "STORAGE", "not_applied"));
    let arguments = ["--mode", "http", "--ask", "given", "--workload", "read"];
    let output = bench(&node.address, &arguments).args(["--operations", "8"]).output().unwrap();
    assert_eq!(code(&output), 1, "{output:?}");
    assert_eq!(summary(&output)["errors_by_code"], json!({"STORAGE": 8}));
}

/// Ctrl-C ends a long measurement at once, with what was measured so far.
#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_reports_so_far() {
    let node = node(|| written(1));
    let arguments = ["--workload", "write", "--seconds", "3600"];
    let mut command = bench(&node.address, &arguments);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    eventually("the load is under way", || (node.seen("/v1/kv/").len() > 20).then_some(()));
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(code(&output), 130, "{output:?}");
    let summary = summary(&output);
    assert_eq!(summary["interrupted"], true);
    assert!(count(&summary["operations"]) > 0, "{summary}");
}

/// A long load is alive in a log, too: a line now and then, on standard error alone.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_load_is_told_where_there_is_no_terminal() {
    let gate = Gate::closed();
    let (held, first) = (gate.clone(), std::sync::atomic::AtomicUsize::new(0));
    let node = node(move || match first.fetch_add(1, std::sync::atomic::Ordering::SeqCst) {
        0 => written(1),
        _ => Reply::After(held.clone(), Box::new(written(1))),
    });
    let arguments = ["--mode", "http", "--load", "--operations", "0"];
    let mut command = bench(&node.address, &arguments);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stderr.as_mut().unwrap()).read_line(&mut line).unwrap();
    gate.open();
    assert!(line.starts_with("loading: 1 of 60 done after "), "{line}");
    let output = child.wait_with_output().unwrap();
    assert_eq!((code(&output), count(&summary(&output)["operations"])), (0, 0), "{output:?}");
}

/// What cannot be done is said before anything is loaded.
#[test]
fn wrong_usage_is_refused() {
    for arguments in [
        &["--seconds", "1", "--operations", "1"][..],
        &["--clients", "0"],
        &["--keys", "0"],
        &["--seconds", "-1"],
        // Nothing would be measured, and nothing else was asked for.
        &["--seconds", "0"],
        &["--operations", "0"],
        &["--workload", "g"],
        // Without the feature it is unknown; with it the workload is not possible.
        &["--target", "etcd", "--workload", "f"],
    ] {
        let output = bench("127.0.0.1:1", arguments).output().unwrap();
        assert_eq!(code(&output), 2, "{arguments:?}: {output:?}");
    }
}

/// Many runs become a table of medians.
#[test]
fn runs_are_put_next_to_each_other() {
    let cluster = Cluster::formed(1, FAST);
    let mut lines = Vec::new();
    for mode in ["kvclient", "http", "kvclient"] {
        let arguments = ["--mode", mode, "--workload", "write", "--operations", "20"];
        lines.extend(bench(cluster.http(1), &arguments).output().unwrap().stdout);
    }
    let (raw, svg) = (cluster.path("raw.jsonl"), cluster.path("chart.svg"));
    std::fs::write(&raw, &lines).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_client"));
    let output = command.arg("bench-report").arg(&raw).arg("--svg").arg(&svg).output().unwrap();
    assert_eq!(code(&output), 0, "{output:?}");
    let table = String::from_utf8(output.stdout).unwrap();
    assert_eq!(table.lines().count(), 2 + 2, "{table}");
    assert!(std::fs::read_to_string(&svg).unwrap().contains("etcd was not measured"));
    std::fs::write(&raw, "{}\n").unwrap();
    let output = command.output().unwrap();
    assert_eq!(code(&output), 1);
    assert!(String::from_utf8(output.stderr).unwrap().contains("line 1"));
}

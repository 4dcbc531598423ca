//! What the scripts share (`scripts/lib.sh`): help that does nothing else, and an end that leaves nothing
//! behind.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use tempfile::TempDir;

/// How long anything may take that is expected to happen. Generous: test machines are busy.
const PATIENCE: Duration = Duration::from_secs(30);

/// A shell in the project's directory, as the scripts go there, with `TMPDIR` for what they leave on disk.
fn shell(arguments: &[&str], tmp: &Path) -> Command {
    let mut command = Command::new("sh");
    command.args(arguments).current_dir(env!("CARGO_MANIFEST_DIR")).env("TMPDIR", tmp);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// The same with a `cargo` that builds nothing, should a script get so far.
fn shell_without_cargo(arguments: &[&str], tmp: &Path) -> (Command, TempDir) {
    let bin = tempfile::tempdir().unwrap();
    let cargo = bin.path().join("cargo");
    std::fs::write(&cargo, "#!/bin/sh\nexit 9\n").unwrap();
    std::fs::set_permissions(&cargo, std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = shell(arguments, tmp);
    let path = std::env::var("PATH").unwrap();
    command.env("PATH", format!("{}:{path}", bin.path().display()));
    (command, bin)
}

/// Its end, which must come.
fn end(mut child: Child) -> Output {
    let deadline = Instant::now() + PATIENCE;
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("it runs on: {:?}", child.wait_with_output().unwrap());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.wait_with_output().unwrap()
}

fn is_empty(dir: &Path) -> bool {
    std::fs::read_dir(dir).unwrap().next().is_none()
}

/// `--help` prints the comment at a script's head, from whichever directory, and starts nothing.
#[test]
fn help_is_the_head_comment_and_nothing_else() {
    let tmp = tempfile::tempdir().unwrap();
    for script in ["scale.sh", "compare.sh", "test-single-cluster.sh", "test-multiple-clusters.sh"]
    {
        let path = format!("{}/scripts/{script}", env!("CARGO_MANIFEST_DIR"));
        let (mut command, _bin) = shell_without_cargo(&[&path, "--help"], tmp.path());
        let output = end(command.current_dir("/").spawn().unwrap());
        assert_eq!(output.status.code(), Some(0), "{script}: {output:?}");
        let told = String::from_utf8(output.stdout).unwrap();
        let source = std::fs::read_to_string(&path).unwrap();
        let head = source.lines().skip(1).take_while(|line| line.starts_with('#'));
        let head: Vec<&str> = head.map(|line| line[1..].trim_start_matches(' ')).collect();
        let lines: Vec<&str> = told.lines().map(|line| line.trim_start_matches(' ')).collect();
        assert_eq!(lines, head, "{script}");
        assert!(output.stderr.is_empty() && is_empty(tmp.path()), "{script}");
    }
}

/// A part that does not exist is found out before anything is built or started.
#[test]
fn an_unknown_part_is_refused_at_once() {
    let tmp = tempfile::tempdir().unwrap();
    let arguments = ["scripts/scale.sh", "keys", "keyz"];
    let (mut command, _bin) = shell_without_cargo(&arguments, tmp.path());
    let output = end(command.spawn().unwrap());
    assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0), "{output:?}");
    assert!(String::from_utf8(output.stderr).unwrap().contains("unknown part: keyz"));
}

/// Whether a shell that is started here cannot be told to look at this signal, because it was ignored before: so a shell
/// without job control starts what it does not wait for.
fn is_ignored(signal: Signal) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.map_or(0, |mask| u64::from_str_radix(mask.trim(), 16).unwrap());
    ignored >> (signal.as_raw() - 1) & 1 == 1
}

/// Whoever interrupts a script is told that nothing goes on behind it, and nothing does.
#[test]
fn an_interrupted_script_stops_what_it_started_and_says_so() {
    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        if is_ignored(signal) {
            continue;
        }
        let tmp = tempfile::tempdir().unwrap();
        let story = "set -eu; . scripts/lib.sh; begin; start nap sleep 600; echo $PID; wait";
        let mut child = shell(&["-c", story], tmp.path()).spawn().unwrap();
        let mut started = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut started).unwrap();
        let nap = Pid::from_raw(started.trim().parse().unwrap()).unwrap();
        test_kill_process(nap).unwrap();
        kill_process(Pid::from_child(&child), signal).unwrap();
        let output = end(child);
        let told = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{told}");
        assert!(told.trim().starts_with("INTERRUPTED"), "{told}");
        assert_eq!(told.trim().lines().count(), 1, "{told}");
        assert!(test_kill_process(nap).is_err() && is_empty(tmp.path()));
    }
}

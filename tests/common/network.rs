//! A network that can be cut: each node of a cluster in a Linux network namespace of its own.
//!
//! A test that uses it runs itself again in a namespace ([`in_a_namespace`]), so that nothing here touches
//! the machine's own network, and all of it goes with the last process. In there is a bridge, as a switch
//! would be, with a cable to each host:
//!
//! ```text
//! the test  10.77.0.254 ── bridge ──┬── host1 ── 10.77.0.1  node 1
//!                                   ├── host2 ── 10.77.0.2  node 2
//!                                   └── host3 ── 10.77.0.3  node 3
//! ```
//!
//! Needs root, `ip` and `ss` (iproute2), `unshare` and `nsenter` (util-linux), and a kernel that ends
//! connections when it is asked to (`CONFIG_INET_DIAG_DESTROY`).

use std::collections::BTreeSet;
use std::process::{Child, Command, Stdio};

/// Set in the run within the namespace: to a file that it removes, to show that it was there.
const INSIDE: &str = "KV_TEST_IN_NAMESPACE";

/// Whether this is the run within a namespace of the test's own. If not, runs `test` there and passes its
/// verdict on.
pub fn in_a_namespace(test: &str) -> bool {
    if let Some(unseen) = std::env::var_os(INSIDE) {
        std::fs::remove_file(unseen).expect("each run asks once");
        return true;
    }
    // The run inside removes it: with a wrong name it would run no test, and succeed.
    let unseen = tempfile::NamedTempFile::new().unwrap().into_temp_path().keep().unwrap();
    let mut command = Command::new("unshare");
    command.args(["--net", "--"]).arg(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--ignored", "--nocapture"]).env(INSIDE, &unseen);
    let status = command.status().expect("unshare is there");
    assert!(status.success(), "{test} failed in its namespace");
    assert!(!unseen.exists(), "{test} did not run in its namespace");
    false
}

/// The hosts, numbered from 1, and what is wrong between them.
pub struct Network {
    hosts: Vec<Host>,
    unplugged: BTreeSet<u64>,
    /// `(a, b)`: what `a` sends to `b` is lost.
    lost: BTreeSet<(u64, u64)>,
    /// `(a, b)`: `a` takes itself for `b`.
    mistaken: BTreeSet<(u64, u64)>,
}

/// A process that does nothing keeps the namespace.
struct Host {
    keeper: Child,
}

impl Network {
    pub fn new(hosts: u64) -> Self {
        ip("link set lo up");
        ip("link add bridge type bridge");
        ip("addr add 10.77.0.254/24 dev bridge");
        ip("link set bridge up");
        let hosts = (1..=hosts).map(Host::connected).collect();
        let (unplugged, lost, mistaken) = Default::default();
        Self { hosts, unplugged, lost, mistaken }
    }

    /// A command that becomes `program` on a host.
    pub fn command(&self, host: u64, program: &str) -> Command {
        self.host(host).command(program)
    }

    /// The host's cable is out: what is sent to it and by it is lost without a word.
    pub fn unplug(&mut self, host: u64) {
        ip(&format!("link set host{host} down"));
        self.unplugged.insert(host);
    }

    /// From now on, what `from` sends to `to` is lost; not what `to` sends.
    pub fn lose(&mut self, from: u64, to: u64) {
        self.host(from).ip(&format!("route add blackhole {}/32", ip_of(to)));
        self.lost.insert((from, to));
    }

    /// As if a firewall came between the two that refuses what `host` sends to `by`: what is open between
    /// them ends on `host`, new connections are refused, and what `by` sends to it is lost.
    ///
    /// `host` gets the other's address as one of its own, and nobody listens there.
    pub fn refuse(&mut self, host: u64, by: u64) {
        let address = ip_of(by);
        self.host(host).ip(&format!("addr add {address}/32 dev lo"));
        self.host(host).run("ss", &format!("--tcp --kill dst {address}"));
        self.mistaken.insert((host, by));
    }

    /// Everything reaches everybody again.
    pub fn heal(&mut self) {
        for host in std::mem::take(&mut self.unplugged) {
            ip(&format!("link set host{host} up"));
        }
        for (from, to) in std::mem::take(&mut self.lost) {
            self.host(from).ip(&format!("route del blackhole {}/32", ip_of(to)));
        }
        for (host, by) in std::mem::take(&mut self.mistaken) {
            self.host(host).ip(&format!("addr del {}/32 dev lo", ip_of(by)));
        }
    }

    fn host(&self, host: u64) -> &Host {
        &self.hosts[host as usize - 1]
    }
}

impl Host {
    fn connected(number: u64) -> Self {
        let mut keeper = Command::new("unshare");
        // Ends with its standard input, which is this process's to close.
        keeper.args(["--net", "--", "cat"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut host = Self { keeper: keeper.spawn().expect("unshare is there") };
        host.await_namespace();
        let pid = host.keeper.id();
        ip(&format!("link add host{number} type veth peer name eth0 netns {pid}"));
        ip(&format!("link set host{number} master bridge up"));
        host.ip("link set lo up");
        host.ip(&format!("addr add {}/24 dev eth0", ip_of(number)));
        host.ip("link set eth0 up");
        host
    }

    /// Until `unshare` has made the namespace, the keeper's process id names the one that this test is in.
    fn await_namespace(&mut self) {
        let namespace = |pid| std::fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
        let (own, pid) = (namespace(std::process::id()), self.keeper.id());
        super::eventually("the host has a namespace", || (namespace(pid) != own).then_some(()));
    }

    fn ip(&self, arguments: &str) {
        self.run("ip", arguments);
    }

    fn run(&self, program: &str, arguments: &str) {
        run(self.command(program), arguments);
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--net", "--target", &self.keeper.id().to_string(), "--", program]);
        command
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // Fails only when it has ended already.
        let _ = self.keeper.kill();
        let _ = self.keeper.wait();
    }
}

/// Where a host is reached.
pub fn ip_of(host: u64) -> String {
    format!("10.77.0.{host}")
}

fn ip(arguments: &str) {
    run(Command::new("ip"), arguments);
}

fn run(mut command: Command, arguments: &str) {
    let output = command.args(arguments.split(' ')).output().expect("the tools are there");
    let says = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {says}");
}

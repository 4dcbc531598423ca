//! Which nodes there are and where they listen, and the file that ties a data directory to it.
//!
//! Raft remembers its members by id and address. Data that was written by three clusters of three
//! nodes is not the data of four, and a cluster whose nodes come back on other ports finds none of
//! its peers. So the first start writes `layout.json` into the data directory, before any cluster is
//! formed, and every later start compares. A difference is refused before a node is started, with
//! nothing changed.
//!
//! A directory that is missing although the clusters were formed is refused too: a member that lost
//! its vote and its log must not take part again under its old id, or two leaders of one term become
//! possible and acknowledged writes are lost.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::ManagerError;
use super::files;
use super::forming::Membership;
use crate::config::{Config, PORTS_PER_CLUSTER};
use crate::ring::RingNode;
use crate::types::ClusterId;

/// The name of the layout's file in the data directory.
const LAYOUT_FILE: &str = "layout.json";

/// The version of the layout's format. A file of another version is refused, not guessed at.
const LAYOUT_VERSION: u32 = 1;

/// Where the nodes listen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ports {
    /// On the ports that `Config` derives from the base ports.
    Configured,
    /// On ports that are free at the first start, and on the same ones ever after.
    Free,
}

/// All clusters that one process runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layout {
    version: u32,
    /// Whether all clusters were seen complete once. Until then a start changes their membership
    /// even if it looks complete: see [`Membership`].
    formed: bool,
    /// In the order of their numbers, `c1` first.
    pub clusters: Vec<LayoutCluster>,
}

/// One cluster of a [`Layout`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayoutCluster {
    /// `c1`, `c2`, and so on.
    pub id: ClusterId,
    /// Its nodes, numbered from 1.
    pub nodes: Vec<RingNode>,
}

/// One node that a [`Layout`] and another do not share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayoutDifference {
    recorded: String,
    wanted: String,
}

impl fmt::Display for LayoutDifference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "it was written with {}, but now {} is asked for", self.recorded, self.wanted)
    }
}

impl Layout {
    /// A layout of these clusters.
    pub(super) fn new(clusters: Vec<LayoutCluster>) -> Self {
        Self { version: LAYOUT_VERSION, formed: false, clusters }
    }

    /// The layout that `config` asks for. With [`Ports::Free`] every port is 0.
    pub(super) fn wanted(config: &Config, ports: Ports) -> Self {
        let address = |base: u16, cluster: u32, node: u32| {
            let port = match ports {
                Ports::Configured => u32::from(base) + PORTS_PER_CLUSTER * cluster + node,
                Ports::Free => 0,
            };
            join_host_port(&config.host, port)
        };
        let node = |cluster, node| RingNode {
            id: u64::from(node),
            http: address(config.http_base_port, cluster, node),
            rpc: address(config.rpc_base_port, cluster, node),
        };
        let cluster = |c| LayoutCluster {
            id: format!("c{c}").parse().expect("a letter and digits are a cluster id"),
            nodes: (1..=config.nodes_per_cluster).map(|n| node(c, n)).collect(),
        };
        Self::new((1..=config.num_clusters).map(cluster).collect())
    }

    /// The layout to start: the wanted one, checked against what `data_dir` was written with.
    /// With [`Ports::Free`] the recorded ports are taken up again. Reads only.
    pub(super) fn settle(self, data_dir: &Path, ports: Ports) -> Result<Self, ManagerError> {
        let path = data_dir.join(LAYOUT_FILE);
        let Some(recorded) = Self::read(&path)? else {
            return Ok(self);
        };
        if let Some(difference) = recorded.difference(&self, ports) {
            return Err(ManagerError::OtherLayout { path, difference });
        }
        for (cluster, node) in recorded.nodes() {
            let path = node_dir(data_dir, &cluster.id, node);
            if !path.is_dir() {
                return Err(ManagerError::NodeDirMissing { path });
            }
        }
        Ok(recorded)
    }

    /// The same nodes at the addresses where they really listen, given in order. Only a port of 0 is
    /// replaced: the configured host may be a name, and the members know each other by it.
    pub(super) fn with_addresses(mut self, bound: impl Iterator<Item = (String, String)>) -> Self {
        let nodes = self.clusters.iter_mut().flat_map(|cluster| &mut cluster.nodes);
        for (node, (http, rpc)) in nodes.zip(bound) {
            take_port(&mut node.http, &http);
            take_port(&mut node.rpc, &rpc);
        }
        self
    }

    /// The same layout, with the note that its clusters are complete.
    pub(super) fn formed(self) -> Self {
        Self { formed: true, ..self }
    }

    /// Whether a membership that looks complete is known to be.
    pub(super) fn membership(&self) -> Membership {
        if self.formed { Membership::Confirmed } else { Membership::Unconfirmed }
    }

    /// Ties `data_dir` to this layout. Durable when it returns.
    pub(super) fn record(&self, data_dir: &Path) -> Result<(), ManagerError> {
        files::write_json(&data_dir.join(LAYOUT_FILE), self)
    }

    /// The file and the directories that it takes up in `data_dir`.
    pub(super) fn paths(&self, data_dir: &Path) -> Vec<PathBuf> {
        let directories = self.nodes().map(|(cluster, node)| node_dir(data_dir, &cluster.id, node));
        std::iter::once(data_dir.join(LAYOUT_FILE)).chain(directories).collect()
    }

    /// Every node with its cluster, in order.
    pub fn nodes(&self) -> impl Iterator<Item = (&LayoutCluster, &RingNode)> {
        self.clusters
            .iter()
            .flat_map(|cluster| cluster.nodes.iter().map(move |node| (cluster, node)))
    }

    /// The HTTP addresses, cluster by cluster: what the nodes file lists.
    pub fn http_addresses(&self) -> Vec<Vec<String>> {
        let of = |cluster: &LayoutCluster| cluster.nodes.iter().map(|n| n.http.clone()).collect();
        self.clusters.iter().map(of).collect()
    }

    fn read(path: &Path) -> Result<Option<Self>, ManagerError> {
        let Some(text) = files::read_if_there(path)? else {
            return Ok(None);
        };
        let bad = |message: String| ManagerError::BadFile { path: path.into(), message };
        let layout: Self = serde_json::from_str(&text).map_err(|error| bad(error.to_string()))?;
        if layout.version != LAYOUT_VERSION {
            let message = format!("layout version {} is not known here", layout.version);
            return Err(bad(message));
        }
        Ok(Some(layout))
    }

    fn difference(&self, wanted: &Self, ports: Ports) -> Option<LayoutDifference> {
        let differ = |recorded: String, wanted: String| Some(LayoutDifference { recorded, wanted });
        if self.counts() != wanted.counts() {
            return differ(self.describe_counts(), wanted.describe_counts());
        }
        if ports == Ports::Free {
            return None;
        }
        let mut pairs = self.nodes().zip(wanted.nodes());
        let ((cluster, recorded), (_, wanted)) = pairs.find(|((_, a), (_, b))| a != b)?;
        let name = format!("node {} of {}", recorded.id, cluster.id);
        differ(
            format!("{name} at {} / {}", recorded.http, recorded.rpc),
            format!("{} / {}", wanted.http, wanted.rpc),
        )
    }

    fn counts(&self) -> Vec<(&ClusterId, usize)> {
        self.clusters.iter().map(|cluster| (&cluster.id, cluster.nodes.len())).collect()
    }

    fn describe_counts(&self) -> String {
        let of = |(id, nodes): (&ClusterId, usize)| format!("{id} of {nodes}");
        let all: Vec<String> = self.counts().into_iter().map(of).collect();
        format!("{} cluster(s) ({})", all.len(), all.join(", "))
    }
}

/// Where a node keeps its data: `c1-n1` in the data directory.
pub(super) fn node_dir(data_dir: &Path, cluster: &ClusterId, node: &RingNode) -> PathBuf {
    data_dir.join(format!("{cluster}-n{}", node.id))
}

fn take_port(address: &mut String, bound: &str) {
    if let Some(host) = address.strip_suffix(":0") {
        let port = bound.rsplit(':').next().expect("a split has at least one part");
        *address = format!("{host}:{port}");
    }
}

/// `HOST:PORT`, with the brackets that an IPv6 address needs.
fn join_host_port(host: &str, port: u32) -> String {
    if host.contains(':') && !host.starts_with('[') {
        format!("[{host}]:{port}")
    } else {
        format!("{host}:{port}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(clusters: u32, nodes: u32) -> Config {
        Config { num_clusters: clusters, nodes_per_cluster: nodes, ..Config::default() }
    }

    fn formed(dir: &Path, config: &Config) -> Layout {
        let layout = Layout::wanted(config, Ports::Configured);
        for (cluster, node) in layout.nodes() {
            std::fs::create_dir_all(node_dir(dir, &cluster.id, node)).unwrap();
        }
        layout.record(dir).unwrap();
        layout
    }

    #[test]
    fn ports_follow_the_contract() {
        let layout = Layout::wanted(&config(3, 3), Ports::Configured);
        assert_eq!(layout.clusters.len(), 3);
        let node = &layout.clusters[1].nodes[2];
        assert_eq!((node.id, node.http.as_str()), (3, "127.0.0.1:31023"));
        assert_eq!(node.rpc, "127.0.0.1:32023");
    }

    #[test]
    fn an_ipv6_host_gets_its_brackets() {
        let config = Config { host: "::1".into(), ..config(1, 1) };
        assert_eq!(
            Layout::wanted(&config, Ports::Configured).clusters[0].nodes[0].http,
            "[::1]:31011"
        );
    }

    #[test]
    fn the_same_layout_is_taken_up_again() {
        let dir = tempfile::tempdir().unwrap();
        let layout = formed(dir.path(), &config(2, 3));
        let again = Layout::wanted(&config(2, 3), Ports::Configured);
        assert_eq!(again.settle(dir.path(), Ports::Configured).unwrap(), layout);
    }

    #[test]
    fn other_counts_and_other_ports_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        formed(dir.path(), &config(2, 3));
        let other_ports = Config { http_base_port: 41000, ..config(2, 3) };
        for other in [config(3, 3), config(1, 3), config(2, 1), other_ports] {
            let refused =
                Layout::wanted(&other, Ports::Configured).settle(dir.path(), Ports::Configured);
            assert!(matches!(refused, Err(ManagerError::OtherLayout { .. })), "{other:?}");
        }
    }

    #[test]
    fn free_ports_are_chosen_once() {
        let dir = tempfile::tempdir().unwrap();
        let layout = formed(dir.path(), &config(1, 3));
        let again = Layout::wanted(&config(1, 3), Ports::Free);
        assert_eq!(again.clusters[0].nodes[0].http, "127.0.0.1:0");
        assert_eq!(again.settle(dir.path(), Ports::Free).unwrap(), layout);
    }

    #[test]
    fn a_member_that_lost_its_data_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        formed(dir.path(), &config(1, 3));
        std::fs::remove_dir(dir.path().join("c1-n2")).unwrap();
        let refused =
            Layout::wanted(&config(1, 3), Ports::Configured).settle(dir.path(), Ports::Configured);
        let Err(ManagerError::NodeDirMissing { path }) = refused else { panic!("{refused:?}") };
        assert!(path.ends_with("c1-n2"));
    }

    #[test]
    fn a_damaged_layout_is_an_error_not_a_first_start() {
        let dir = tempfile::tempdir().unwrap();
        for text in ["", "{", r#"{"version":2,"clusters":[]}"#] {
            std::fs::write(dir.path().join(LAYOUT_FILE), text).unwrap();
            let wanted = Layout::wanted(&config(1, 1), Ports::Configured);
            let refused = wanted.settle(dir.path(), Ports::Configured);
            assert!(matches!(refused, Err(ManagerError::BadFile { .. })), "{text}");
        }
    }
}

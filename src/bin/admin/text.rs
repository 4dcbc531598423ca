//! What `admin` prints: tables for people, and JSON for programs.

use std::io::{self, Write};
use std::path::PathBuf;

use distrib_kv_store::cluster_manager::{ClusterManager, ClusterStatus, NodeStatus};
use distrib_kv_store::config::Config;
use distrib_kv_store::metrics::{COUNTED_KEYS_MAX, NodeState};
use distrib_kv_store::reshard::{self, Basis, Holdings, Outlook, Progress, Scene};
use distrib_kv_store::ring::Ring;
use distrib_kv_store::types::ClusterId;

/// Stands where nothing is known.
const UNKNOWN: &str = "-";

/// Stands where a cluster is not known.
const UNKNOWN_CLUSTER: &str = "?";

/// Prints to stdout.
pub fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush())
}

/// Prints one JSON document on one line.
pub fn print_json(value: &impl serde::Serialize) -> io::Result<()> {
    let text = serde_json::to_string(value).expect("strings and numbers always serialise");
    print(&format!("{text}\n"))
}

/// Prints one line to stderr.
pub fn note(line: &str) {
    // Without stderr there is nobody left to tell: no reason to fail, or to stop serving.
    let _ = writeln!(io::stderr(), "{line}");
}

/// What runs where, and what to do with it.
pub fn running(
    config: &Config,
    manager: &ClusterManager,
    status: &[ClusterStatus],
    others: &[(ClusterId, ClusterStatus)],
) -> String {
    let role = |cluster: &ClusterId, node: u64| {
        let cluster = status.iter().find(|c| c.id.as_ref() == Some(cluster));
        cluster.and_then(|c| c.nodes.iter().find(|n| n.id == Some(node))).map_or(UNKNOWN, role)
    };
    let mut rows = vec![header(&["cluster", "node", "role", "http", "peers"])];
    for (cluster, node) in manager.layout().nodes() {
        rows.push(vec![
            cluster.id.to_string(),
            node.id.to_string(),
            role(&cluster.id, node.id).to_owned(),
            node.http.clone(),
            node.rpc.clone(),
        ]);
    }
    let (clusters, nodes) = (config.num_clusters, config.nodes_per_cluster);
    let first = manager.layout().nodes().next().map_or(UNKNOWN, |(_, node)| node.http.as_str());
    let last = manager.layout().nodes().last().map_or(UNKNOWN, |(_, node)| node.http.as_str());
    let nodes_file = config.nodes_file.display();
    let flag = match nodes_file.to_string().as_str() {
        "all_nodes.json" => String::new(),
        path => format!(" --nodes-file {path}"),
    };
    format!(
        "ready: {}\n{}\n\n{}{}\n\
         data in {}, addresses in {nodes_file}\n\n\
         Try it from another terminal; any node takes any key:\n  \
         curl -X PUT --data-binary 'Hello, ring!' http://{first}/v1/kv/greeting\n  \
         curl http://{last}/v1/kv/greeting\n  \
         {} put greeting 'Hello again'{flag}\n  \
         {} status{flag}\n\n\
         Stop with Ctrl-C.\n",
        counted(clusters, nodes),
        ring_line(manager.ring()),
        table(&rows),
        others.iter().map(elsewhere).collect::<String>(),
        std::path::absolute(&config.data_dir).unwrap_or_else(|_| config.data_dir.clone()).display(),
        sibling("client"),
        sibling("admin"),
    )
}

/// So many clusters of so many nodes.
pub fn counted(clusters: u32, nodes: u32) -> String {
    let of = |count: u32, one: &str| format!("{count} {one}{}", if count == 1 { "" } else { "s" });
    format!("{} of {}", of(clusters, "cluster"), of(nodes, "node"))
}

/// A cluster of the ring that is not among those that run here.
fn elsewhere((id, status): &(ClusterId, ClusterStatus)) -> String {
    let nodes: Vec<&str> = status.nodes.iter().map(|node| node.http.as_str()).collect();
    let nodes = nodes.join(", ");
    match status.leader {
        Some(_) => format!("{id} runs elsewhere: {nodes}\n"),
        None => format!(
            "{id} IS NOT SERVED: it is in the ring, does not run here, and has no leader that answers; \
             start its nodes again ({nodes})\n"
        ),
    }
}

/// One row for each node, then why some of them do not serve.
pub fn status(clusters: &[ClusterStatus], unplaced: &[NodeStatus]) -> String {
    let columns = ["cluster", "node", "role", "term", "applied", "keys", "http", "reachable"];
    let mut rows = vec![header(&columns)];
    let mut reasons = String::new();
    let placed = clusters.iter().flat_map(|c| c.nodes.iter().map(move |node| (name_of(c), node)));
    let unplaced = unplaced.iter().map(|node| (UNKNOWN_CLUSTER.to_owned(), node));
    for (cluster, node) in placed.chain(unplaced) {
        let metrics = node.metrics.as_ref();
        rows.push(vec![
            cluster,
            shown(node.id),
            role(node).to_owned(),
            shown(metrics.map(|m| m.term)),
            shown(metrics.and_then(|m| m.last_applied)),
            shown(metrics.and_then(|m| m.keys).map(about)),
            node.http.clone(),
            if node.reachable { "yes" } else { "NO" }.to_owned(),
        ]);
        if let Some(error) = &node.error {
            let is_named = error.contains(&node.http);
            reasons +=
                &if is_named { format!("{error}\n") } else { format!("{}: {error}\n", node.http) };
        }
        if let Some(failure) = metrics.and_then(|m| m.failed.as_ref()) {
            reasons += &format!("{} serves no more: {failure}\n", node.http);
        }
        if metrics.is_some_and(|m| m.awaits_ring) {
            reasons += &format!("{} serves nothing yet: its cluster waits for a ring\n", node.http);
        }
    }
    let gap = if reasons.is_empty() { "" } else { "\n" };
    format!("{}{gap}{reasons}", table(&rows))
}

/// A number of keys, marked where it is an estimate.
fn about(keys: u64) -> String {
    if keys > COUNTED_KEYS_MAX { format!("~{keys}") } else { keys.to_string() }
}

/// What a cluster is called in tables and messages.
pub fn name_of(cluster: &ClusterStatus) -> String {
    cluster.id.as_ref().map_or(UNKNOWN_CLUSTER.to_owned(), ClusterId::to_string)
}

/// The ring, and which clusters do not live by it yet.
pub fn ring(ring: &Ring, clusters: &[ClusterStatus]) -> String {
    if ring.epoch == 0 {
        return "no ring. `admin ring install` gives the clusters one\n".into();
    }
    let total: f32 = ring.clusters.iter().map(|cluster| cluster.weight).sum();
    let mut rows = vec![header(&["cluster", "weight", "share", "nodes"])];
    for cluster in &ring.clusters {
        let nodes: Vec<&str> = cluster.nodes.iter().map(|node| node.http.as_str()).collect();
        rows.push(vec![
            cluster.id.to_string(),
            cluster.weight.to_string(),
            format!("{:.1} %", 100.0 * cluster.weight / total),
            nodes.join(" "),
        ]);
    }
    let mut text = format!("{}\n\n{}", ring_line(ring), table(&rows));
    if let Some(next) = &ring.next {
        text +=
            &format!("\nchanging to epoch {} with {} clusters\n", next.epoch, next.clusters.len());
    }
    for cluster in clusters {
        let seen = cluster.nodes.iter().filter_map(|node| node.metrics.as_ref());
        let epoch = seen.filter_map(|metrics| metrics.epoch).max();
        if epoch.is_some_and(|epoch| epoch < ring.epoch) {
            text += &format!("{} lives by epoch {}\n", name_of(cluster), shown(epoch));
        }
    }
    text
}

/// What `ring install` did.
pub fn installed(ring: &Ring, installed: &[ClusterId]) -> String {
    if installed.is_empty() {
        return "all clusters live by this ring already; nothing to do\n".into();
    }
    let names: Vec<&str> = installed.iter().map(ClusterId::as_str).collect();
    format!("installed in {}\n{}\n", names.join(", "), ring_line(ring))
}

/// What a change came to.
pub fn in_force(ring: &Ring) -> String {
    let names: Vec<&str> = ring.clusters.iter().map(|cluster| cluster.id.as_str()).collect();
    format!("in force: {}\nclusters: {}\n", ring_line(ring), names.join(", "))
}

/// How far the change under way is, if one is.
pub fn migration(scene: &Scene, progress: Option<&Progress>, troubles: &[String]) -> String {
    let mut text = match (scene, progress) {
        (_, Some(progress)) => changing(progress),
        (Scene::NoRing, _) => "no ring\n".into(),
        (Scene::Reverting(ring), _) => {
            format!(
                "a change was called off; epoch {} is not in force everywhere yet\n",
                ring.epoch
            )
        }
        (Scene::Quiet { ring, settled: Some(true) }, _) => {
            format!("no change is under way\n{}\n", ring_line(ring))
        }
        (Scene::Quiet { ring, .. }, _) => {
            format!("epoch {} is not known to be in force everywhere yet\n", ring.epoch)
        }
        (Scene::Changing(_), None) => unreachable!("a change has progress"),
    };
    for trouble in troubles {
        text += &format!("{trouble}\n");
    }
    text
}

fn changing(progress: &Progress) -> String {
    let mut rows = vec![header(&["from", "to", "phase", "attempt", "keys", "copied", "to delete"])];
    for handoff in &progress.handoffs {
        rows.push(vec![
            handoff.pair.from.to_string(),
            handoff.pair.to.to_string(),
            handoff.phase.name().to_owned(),
            handoff.attempt.to_string(),
            shown(handoff.keys),
            handoff.keys_copied.to_string(),
            handoff.keys_to_delete.to_string(),
        ]);
    }
    let off = if progress.cancelled { ", being called off" } else { "" };
    let mut text = format!(
        "changing from epoch {} to {}{off}\n\n{}",
        progress.from_epoch,
        progress.to_epoch,
        table(&rows)
    );
    if !progress.waiting_for.is_empty() {
        let names: Vec<&str> = progress.waiting_for.iter().map(ClusterId::as_str).collect();
        text += &format!("\nnot begun, or not answering: {}\n", names.join(", "));
    }
    text
}

/// What a change would move, for people.
pub fn outlook(outlook: &Outlook) -> String {
    if outlook.plan.handoffs.is_empty() {
        return "nothing would move\n".into();
    }
    let mut rows = vec![header(&["from", "to", "share of all keys", "keys", "on disk"])];
    for (handoff, moved) in estimates(outlook) {
        let error = match outlook.plan.basis {
            Basis::Exact => String::new(),
            Basis::Sampled => format!(" +- {:.2}", 100.0 * handoff.error),
        };
        rows.push(vec![
            handoff.pair.from.to_string(),
            handoff.pair.to.to_string(),
            format!("{:.2}{error} %", 100.0 * handoff.share),
            format!("~{}", moved.keys),
            format!("~{:.1} MB", moved.bytes as f64 / 1e6),
        ]);
    }
    let all = total(outlook);
    let basis = match outlook.plan.basis {
        Basis::Exact => "shares are calculated",
        Basis::Sampled => "shares are counted in a fixed sample of keys",
    };
    format!(
        "{}\n{:.2} % of all keys would move: about {} keys, {:.1} MB on each node's disk\n\
         {basis}; keys and bytes are estimates\n",
        table(&rows),
        100.0 * outlook.plan.share(),
        all.keys,
        all.bytes as f64 / 1e6
    )
}

/// What a change would move, for programs.
pub fn outlook_json(outlook: &Outlook) -> serde_json::Value {
    let all = total(outlook);
    let handoff = |(handoff, moved): (&reshard::PlannedHandoff, Holdings)| {
        serde_json::json!({
            "from": handoff.pair.from, "to": handoff.pair.to, "share": handoff.share,
            "error": handoff.error, "share_of_source": handoff.share_of_source,
            "keys": moved.keys, "bytes": moved.bytes,
        })
    };
    let handoffs: Vec<_> = estimates(outlook).map(handoff).collect();
    serde_json::json!({
        "next": outlook.next, "basis": outlook.plan.basis, "share": outlook.plan.share(),
        "keys": all.keys, "bytes": all.bytes, "handoffs": handoffs,
    })
}

fn estimates(outlook: &Outlook) -> impl Iterator<Item = (&reshard::PlannedHandoff, Holdings)> {
    outlook.plan.handoffs.iter().map(|handoff| {
        let held = outlook.holdings.get(&handoff.pair.from).copied().unwrap_or_default();
        (handoff, reshard::estimate(handoff, held))
    })
}

fn total(outlook: &Outlook) -> Holdings {
    estimates(outlook).fold(Holdings::default(), |all, (_, moved)| Holdings {
        keys: all.keys + moved.keys,
        bytes: all.bytes + moved.bytes,
    })
}

fn ring_line(ring: &Ring) -> String {
    let sequencer = shown(ring.sequencer.as_ref());
    format!(
        "ring epoch {}, hash version {}, cached by clients for {} s, sequencer {sequencer}",
        ring.epoch, ring.hash_version, ring.list_ttl_s
    )
}

fn role(node: &NodeStatus) -> &'static str {
    match node.metrics.as_ref().map(|metrics| metrics.state) {
        Some(NodeState::Leader) => "leader",
        Some(NodeState::Follower) => "follower",
        Some(NodeState::Candidate) => "candidate",
        Some(NodeState::Learner) => "learner",
        Some(NodeState::Uninitialized) => "uninitialized",
        None => UNKNOWN,
    }
}

fn shown(value: Option<impl ToString>) -> String {
    value.map_or(UNKNOWN.to_owned(), |value| value.to_string())
}

fn header(titles: &[&str]) -> Vec<String> {
    titles.iter().map(|title| title.to_string()).collect()
}

/// Lines of left-aligned columns, two spaces apart, without trailing spaces.
fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column| rows.iter().filter_map(|row| row.get(column)).map(String::len).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        let line = cells.collect::<Vec<_>>().join("  ");
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// How to call another binary of this build, from the current directory if it is below it.
fn sibling(name: &str) -> String {
    let path = std::env::current_exe().ok().map(|exe| exe.with_file_name(name));
    let Some(path) = path else { return name.to_owned() };
    let here: PathBuf = std::env::current_dir().unwrap_or_default();
    path.strip_prefix(&here).unwrap_or(&path).display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_lines_end_without_spaces() {
        let rows = [header(&["a", "long title", ""]), header(&["wider", "b", ""])];
        assert_eq!(table(&rows), "a      long title\nwider  b\n");
    }

    fn silent(http: &str) -> NodeStatus {
        let error = Some("refused".into());
        NodeStatus { id: None, http: http.into(), reachable: false, error, metrics: None }
    }

    #[test]
    fn a_silent_node_shows_what_is_unknown_and_why() {
        let nodes = vec![silent("127.0.0.1:1")];
        let cluster = ClusterStatus { id: "c1".parse().ok(), leader: None, nodes };
        let text = status(&[cluster], &[silent("127.0.0.1:2")]);
        let lines: Vec<Vec<&str>> =
            text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[1], ["c1", "-", "-", "-", "-", "-", "127.0.0.1:1", "NO"]);
        assert_eq!(lines[2], ["?", "-", "-", "-", "-", "-", "127.0.0.1:2", "NO"]);
        assert_eq!(lines[4..], [["127.0.0.1:1:", "refused"], ["127.0.0.1:2:", "refused"]]);
    }
}

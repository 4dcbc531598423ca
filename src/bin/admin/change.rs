//! The verbs that change the ring while it serves, and those that look after a change.
//!
//! A change is begun here and then goes on in the clusters; what a verb does after that is watch. So a
//! verb that is interrupted, or gives up, has lost nothing, and says how to watch on.

use clap::{Args, Subcommand};
use distrib_kv_store::cluster_manager;
use distrib_kv_store::kvclient::Endpoints;
use distrib_kv_store::reshard::{
    self, Begun, Change, ChangeError, DriveError, HttpClusters, Progress, Request, Role, Scene,
    Transition,
};
use distrib_kv_store::ring::{Ring, RingCluster, RingNode};
use distrib_kv_store::types::ClusterId;
use serde_json::json;

use crate::progress::{Form, Reporter};
use crate::{EXIT_INTERRUPTED, Failure, Target, parse_weight, text};

/// How to see a change that goes on without the command that began it.
const WATCH: &str = "watch it with `admin migration status --watch`";

#[derive(Subcommand)]
pub enum ClusterVerb {
    /// Adds a cluster, forming it first if its nodes are blank; returns when its keys have moved
    Add {
        /// The id that its nodes were started with
        id: ClusterId,
        /// The HTTP and peer addresses of all its nodes
        #[arg(long, required = true, value_name = "HTTP/RPC,...", value_delimiter = ',', value_parser = parse_node)]
        nodes: Vec<(String, String)>,
        /// Its share relative to the others
        #[arg(long, value_name = "W", default_value = "1", value_parser = parse_weight, allow_negative_numbers = true)]
        weight: f32,
        #[command(flatten)]
        target: Target,
    },
    /// Takes a cluster out of the ring; returns when its keys have moved. Its nodes go on running
    Remove {
        /// Its id
        id: ClusterId,
        #[command(flatten)]
        target: Target,
    },
    /// Gives a cluster another share of the keys; returns when they have moved
    Weight {
        /// Its id
        id: ClusterId,
        /// Its share relative to the others
        #[arg(value_parser = parse_weight, allow_negative_numbers = true)]
        weight: f32,
        #[command(flatten)]
        target: Target,
    },
}

/// What a change would move: by default one back to equal weights.
#[derive(Args)]
pub struct Rebalance {
    /// Changes nothing; there is no other way yet
    #[arg(long, required = true)]
    dry_run: bool,
    /// As if this cluster were added
    #[arg(long, value_name = "ID:W", value_parser = parse_share, group = "change")]
    add: Option<(ClusterId, f32)>,
    /// As if this cluster were removed
    #[arg(long, value_name = "ID", group = "change")]
    remove: Option<ClusterId>,
    /// As if this cluster had this weight
    #[arg(long, value_name = "ID:W", value_parser = parse_share, group = "change")]
    weight: Option<(ClusterId, f32)>,
    #[command(flatten)]
    target: Target,
}

#[derive(Subcommand)]
pub enum MigrationVerb {
    /// Shows how far the change under way is
    Status {
        /// Goes on showing until it is finished
        #[arg(long)]
        watch: bool,
        #[command(flatten)]
        target: Target,
    },
    /// Helps the change under way along; returns when it is finished
    Resume(Target),
    /// Calls the change under way off, unless keys are frozen or have moved already
    Abort(Target),
}

pub async fn cluster(verb: ClusterVerb) -> Result<(), Failure> {
    let (change, target) = match verb {
        ClusterVerb::Add { id, nodes, weight, target } => {
            (Change::Add { id, nodes, weight }, target)
        }
        ClusterVerb::Remove { id, target } => (Change::Remove(id), target),
        ClusterVerb::Weight { id, weight, target } => (Change::Weight(id, weight), target),
    };
    let addresses = target.clusters().await?.clusters;
    let http = HttpClusters::default();
    let begun = match reshard::begin(&http, &addresses, &change).await.map_err(failed)? {
        Begun::Change(begun) => begun,
        Begun::AlreadySo(ring) => return already_so(&target, &change, &ring),
    };
    // The new cluster's nodes are not in the file yet; its own word leads to them.
    let ring = watch(&target, &http, &addresses, Role::Helper, Some(&begun)).await?;
    finished(&target, &ring)
}

pub async fn migration(verb: MigrationVerb) -> Result<(), Failure> {
    let http = HttpClusters::default();
    match verb {
        MigrationVerb::Status { watch: false, target } => status(&target, &http).await,
        MigrationVerb::Status { watch: true, target } => {
            let addresses = target.clusters().await?.clusters;
            let ring = watch(&target, &http, &addresses, Role::Onlooker, None).await?;
            shown(&target, &ring)
        }
        MigrationVerb::Resume(target) => {
            let addresses = target.clusters().await?.clusters;
            let ring = watch(&target, &http, &addresses, Role::Helper, None).await?;
            finished(&target, &ring)
        }
        MigrationVerb::Abort(target) => {
            let addresses = target.clusters().await?.clusters;
            let mut reporter = reporter(&target, &http, &addresses).await;
            let off = reshard::abort(&http, &addresses, |progress, _| reporter.show(progress));
            let ring = interruptible(off).await;
            reporter.end();
            finished(&target, &ring?)
        }
    }
}

/// Runs until the change is over. What goes wrong does not stop the change, and is told so.
async fn watch(
    target: &Target,
    http: &HttpClusters,
    addresses: &[Vec<String>],
    role: Role,
    begun: Option<&Transition>,
) -> Result<Ring, Failure> {
    let mut reporter = reporter(target, http, addresses).await;
    let show = |progress: Option<&Progress>, _: &_| reporter.show(progress);
    let ring = interruptible(reshard::follow(http, addresses, role, begun, show)).await;
    reporter.end();
    ring
}

async fn interruptible(
    work: impl Future<Output = Result<Ring, ChangeError>>,
) -> Result<Ring, Failure> {
    tokio::select! {
        done = work => done.map_err(failed),
        _ = tokio::signal::ctrl_c() => {
            let message = format!(
                "interrupted; a change that has begun goes on by itself: {WATCH}. `admin migration resume` \
                 waits for its end, too, and brings the nodes file up to date"
            );
            Err(Failure { code: EXIT_INTERRUPTED as u8, message })
        }
    }
}

async fn reporter(target: &Target, http: &HttpClusters, addresses: &[Vec<String>]) -> Reporter {
    let form = if target.json { Form::Json } else { Form::of_stderr() };
    // Only to show bytes beside keys: without an answer there are keys alone.
    let held = match reshard::survey(http, addresses).await {
        Ok(seen) => reshard::holdings(http, &seen).await,
        Err(_) => Default::default(),
    };
    Reporter::new(form, held)
}

fn failed(error: ChangeError) -> Failure {
    Failure::failed(match &error {
        ChangeError::Drive(DriveError::Stalled { .. }) => format!(
            "{error}; the change goes on once that is gone: {WATCH}, or help it along with `admin migration resume`"
        ),
        _ => error.to_string(),
    })
}

fn finished(target: &Target, ring: &Ring) -> Result<(), Failure> {
    list(target, ring)?;
    shown(target, ring)
}

/// The nodes file lists what the ring lists from now on.
fn list(target: &Target, ring: &Ring) -> Result<(), Failure> {
    let nodes = |cluster: &RingCluster| cluster.nodes.iter().map(|n| n.http.clone()).collect();
    let clusters: Vec<Vec<String>> = ring.clusters.iter().map(nodes).collect();
    if is_file_of(target, &clusters) {
        let written = cluster_manager::write_nodes_file(&target.nodes_file, &clusters);
        written.map_err(|error| {
            Failure::failed(format!("the ring of epoch {} is in force, but {error}", ring.epoch))
        })?;
    }
    Ok(())
}

/// As when it had just been done: the command that did it may not have come to its end.
fn already_so(target: &Target, change: &Change, ring: &Ring) -> Result<(), Failure> {
    list(target, ring)?;
    if target.json {
        return shown(target, ring);
    }
    let is = match change {
        Change::Add { id, weight, .. } => {
            format!("{id} is in the ring with these nodes and weight {weight}")
        }
        Change::Remove(id) => format!("{id} is not in the ring"),
        Change::Weight(id, weight) => format!("{id} has weight {weight}"),
    };
    let printed = text::print(&format!("{is} already; nothing to change\n"));
    printed.or_else(Failure::of_printing)
}

/// Whether the nodes file lists these clusters. One that was named does, or is to. With `--endpoints` it is
/// the one that lies where the command was given, if one does: that may list quite another system.
fn is_file_of(target: &Target, clusters: &[Vec<String>]) -> bool {
    let file = &target.nodes_file;
    if target.endpoints.is_empty() || !file.exists() {
        return target.endpoints.is_empty();
    }
    let left_alone = |why: &str| {
        text::note(&format!("admin: {} is left as it is: {why}", file.display()));
        false
    };
    match cluster_manager::read_nodes_file(file) {
        Ok(listed) => {
            let mut own = clusters.iter().flatten().chain(&target.endpoints);
            own.any(|node| listed.iter().flatten().any(|other| other == node))
                || left_alone("it lists none of these nodes")
        }
        Err(_) => left_alone("it is no list of nodes"),
    }
}

fn shown(target: &Target, ring: &Ring) -> Result<(), Failure> {
    let printed = if target.json {
        text::print_json(&json!({ "ring": ring }))
    } else {
        text::print(&text::in_force(ring))
    };
    printed.or_else(Failure::of_printing)
}

async fn status(target: &Target, http: &HttpClusters) -> Result<(), Failure> {
    let addresses = target.clusters().await?.clusters;
    let seen = reshard::survey(http, &addresses).await.map_err(failed)?;
    let scene = Scene::of(&seen.views);
    let progress = Progress::of(&seen.views);
    let settled = matches!(scene, Scene::Quiet { settled: Some(true), .. });
    let epoch = scene.ring().map_or(0, |ring| ring.epoch);
    let printed = if target.json {
        let troubles = &seen.troubles;
        text::print_json(&json!({
            "epoch": epoch, "settled": settled, "change": progress, "troubles": troubles,
        }))
    } else {
        text::print(&text::migration(&scene, progress.as_ref(), &seen.troubles))
    };
    printed.or_else(Failure::of_printing)
}

pub async fn rebalance(rebalance: &Rebalance) -> Result<(), Failure> {
    let request = rebalance.request();
    let addresses = rebalance.target.clusters().await?.clusters;
    let http = HttpClusters::default();
    let outlook = reshard::outlook(&http, &addresses, &request).await.map_err(failed)?;
    let printed = if rebalance.target.json {
        text::print_json(&text::outlook_json(&outlook))
    } else {
        text::print(&text::outlook(&outlook))
    };
    printed.or_else(Failure::of_printing)
}

impl Rebalance {
    fn request(&self) -> Request {
        debug_assert!(self.dry_run, "the flag is required");
        if let Some((id, weight)) = self.add.clone() {
            // Where its nodes are changes nothing about what moves.
            let node = RingNode { id: 1, http: "-".into(), rpc: "new".into() };
            return Request::Add(RingCluster { id, weight, nodes: vec![node] });
        }
        match (&self.remove, &self.weight) {
            (Some(id), _) => Request::Remove(id.clone()),
            (None, Some((id, weight))) => Request::Weight(id.clone(), *weight),
            (None, None) => Request::Equal,
        }
    }
}

fn parse_node(text: &str) -> Result<(String, String), String> {
    let Some((http, rpc)) = text.split_once('/') else {
        return Err("a node is its HTTP and its peer address, as in 127.0.0.1:1/127.0.0.1:2".into());
    };
    Endpoints::from(vec![http.to_owned(), rpc.to_owned()]).check()?;
    Ok((http.to_owned(), rpc.to_owned()))
}

fn parse_share(text: &str) -> Result<(ClusterId, f32), String> {
    let (id, weight) = text.rsplit_once(':').ok_or("a cluster and its weight, as in c4:1.5")?;
    let id = id.parse().map_err(|error| format!("{error}"))?;
    Ok((id, parse_weight(weight)?))
}

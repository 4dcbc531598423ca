//! Several clusters of real processes that live by one ring.
//!
//! The clusters are `c1`, `c2`, ...; the first is the ring's first sequencer. Clusters beyond the
//! ring's members stand by, formed and empty.
//!
//! **Gates.** The ring of clusters that are started [`Clusters::gated`] lists a proxy for each node,
//! which lets everything pass but steps of a change. So the nodes, which drive changes by themselves,
//! cannot, and a test that posts to the nodes' own addresses holds every step in its hand.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use distrib_kv_store::handoff::{Done, Refused, Step};
use distrib_kv_store::metrics::HandoffView;
use distrib_kv_store::reshard::{Goal, Hints, Scene, Views, next_actions};
use distrib_kv_store::ring::{Ring, RingCluster, RingNode, RingTable};
use distrib_kv_store::types::ClusterId;

use super::cluster::{Cluster, expect_ok};
use super::line::{Line, try_request};
use super::proxy::Proxy;
use super::{Answer, eventually};

/// How long one look at a cluster or one step may take: some elections.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a change of the ring may take. Generous: test machines are busy, and processes die.
pub const CHANGE_PATIENCE: Duration = Duration::from_secs(120);

/// What a request for a step begins with.
const STEP: &[u8] = b"POST /cluster/step";

/// Keeps a node from passing a request on.
const DIRECT: [(&str, &str); 1] = [("Kv-Routing", "direct")];

/// The processes. They end with its drop.
pub struct Clusters {
    list: Vec<Cluster>,
    gates: Vec<Proxy>,
}

impl Clusters {
    /// Clusters of so many nodes each, the first `members` of which live by a ring of epoch 1.
    pub fn start(sizes: &[u64], members: usize, config: &str) -> Self {
        Self::launch(sizes, members, config, false)
    }

    /// So many clusters of one node each, none of which can take a step but by [`Self::step`].
    pub fn gated(count: usize, members: usize, config: &str) -> Self {
        Self::launch(&vec![1; count], members, config, true)
    }

    fn launch(sizes: &[u64], members: usize, config: &str, gated: bool) -> Self {
        let form = |(place, size): (usize, &u64)| {
            let cluster = Cluster::start_as(&format!("c{}", place + 1), *size, config);
            cluster.form();
            cluster
        };
        let list: Vec<Cluster> = sizes.iter().enumerate().map(form).collect();
        let gate = |cluster: &Cluster| Proxy::start(cluster.http(1));
        let gates = if gated { list.iter().map(gate).collect() } else { Vec::new() };
        let clusters = Self { list, gates };
        clusters.install(members);
        clusters.gates.iter().for_each(|gate| gate.bar(STEP));
        clusters
    }

    fn install(&self, members: usize) {
        let listed: Vec<_> = (0..members).map(|place| self.listed(place, 1.0)).collect();
        let sequencer = Some(listed[0].id.clone());
        let ring = Ring { epoch: 1, sequencer, clusters: listed, ..Ring::none() };
        let json = serde_json::to_string(&ring).unwrap();
        for cluster in &self.list[..members] {
            expect_ok(&cluster.post(1, "/cluster/update-hash-ring", &json));
        }
        eventually("the first ring is in force everywhere", || {
            matches!(self.scene()?, Scene::Quiet { settled: Some(true), .. }).then_some(())
        });
    }

    /// A cluster as the ring lists it.
    pub fn listed(&self, place: usize, weight: f32) -> RingCluster {
        let cluster = &self.list[place];
        let http = |id| match self.gates.get(place) {
            Some(gate) => gate.address().to_owned(),
            None => cluster.http(id).to_owned(),
        };
        let nodes =
            cluster.ids().map(|id| RingNode { id, http: http(id), rpc: cluster.rpc(id).into() });
        RingCluster { id: id(place), weight, nodes: nodes.collect() }
    }

    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// The cluster at this place, counted from 0.
    pub fn at(&self, place: usize) -> &Cluster {
        &self.list[place]
    }

    pub fn at_mut(&mut self, place: usize) -> &mut Cluster {
        &mut self.list[place]
    }

    /// What stands before the only node of a gated cluster.
    pub fn gate(&self, place: usize) -> &Proxy {
        &self.gates[place]
    }

    /// From now on no step passes to this cluster.
    pub fn close_gate(&self, place: usize) {
        self.gates[place].bar(STEP);
    }

    /// From now on steps pass, too: whoever drives does so.
    pub fn open_gates(&self) {
        self.gates.iter().for_each(Proxy::unbar);
    }

    /// Where clients find the clusters.
    pub fn endpoints(&self) -> Vec<Vec<String>> {
        let http = |cluster: RingCluster| cluster.nodes.into_iter().map(|node| node.http).collect();
        (0..self.len()).map(|place| http(self.listed(place, 1.0))).collect()
    }

    // --- The ring ----------------------------------------------------------------------------------

    /// What the cluster knows of the ring and of handoffs; `None` when it does not answer.
    pub fn view(&self, place: usize) -> Option<HandoffView> {
        let cluster = &self.list[place];
        cluster.up().into_iter().find_map(|id| {
            let asked =
                try_request(cluster.http(id), "GET", "/cluster/handoffs", &[], b"", ANSWER_TIMEOUT);
            let answer = asked.ok().filter(|answer| answer.status == 200)?;
            Some(serde_json::from_slice(&answer.body).expect("it is a view"))
        })
    }

    /// What all clusters know; `None` unless all answer.
    pub fn views(&self) -> Option<Views> {
        let view = |place| self.view(place).map(|view| (view.cluster, view.state));
        (0..self.len()).map(view).collect()
    }

    /// Where the clusters stand; `None` unless all answer.
    pub fn scene(&self) -> Option<Scene> {
        self.views().map(|views| Scene::of(&views))
    }

    /// The ring in force. Waits until no change is under way.
    pub fn ring(&self) -> Ring {
        let deadline = Instant::now() + CHANGE_PATIENCE;
        loop {
            let scene = self.scene();
            if let Some(Scene::Quiet { ring, settled: Some(true) }) = scene {
                return ring;
            }
            assert!(Instant::now() < deadline, "a change does not end: {scene:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Takes the change under way step by step, past the gates, until it is where it should be.
    pub fn drive_until(&self, reached: impl Fn(&Views) -> bool) {
        self.drive_until_but_for(|_| false, reached);
    }

    /// The same without the steps that are `withheld`.
    pub fn drive_until_but_for(
        &self,
        withheld: impl Fn(&Step) -> bool,
        reached: impl Fn(&Views) -> bool,
    ) {
        let deadline = Instant::now() + CHANGE_PATIENCE;
        loop {
            assert!(Instant::now() < deadline, "the change does not get there: {:?}", self.views());
            let Some(views) = self.views() else { continue };
            if reached(&views) {
                return;
            }
            let actions = next_actions(&views, &Hints::new(Goal::Forward));
            match actions.iter().find(|action| !withheld(&action.step)) {
                Some(action) => drop(self.step(&action.at, &action.step)),
                // Keys are being copied, counted or deleted.
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// Proposes a step to a cluster, past its gate. `None`: there was no answer, or none that says what
    /// became of the step.
    pub fn step(&self, at: &ClusterId, step: &Step) -> Option<Result<Done, Refused>> {
        let place =
            (0..self.len()).find(|place| id(*place) == *at).expect("the cluster is one of ours");
        post_step(self.list[place].http(1), step)
    }

    // --- The end -----------------------------------------------------------------------------------

    /// Every replica of a cluster holds the same, every key is served where the ring says and only there,
    /// with the value it should have, and nothing else is left anywhere.
    pub fn check(&self, expected: &BTreeMap<String, Option<String>>) {
        let ring = self.ring();
        let views = eventually("all clusters answer", || self.views());
        let table = RingTable::new(ring.clone()).unwrap();
        let owner =
            |key: &String| table.owner(key.as_bytes()).expect("the ring has clusters").id.clone();
        for place in 0..self.len() {
            let (cluster, own) = (&self.list[place], id(place));
            cluster.await_ready();
            cluster.await_caught_up();
            let there =
                |(key, value): &(&String, &Option<String>)| value.is_some() && owner(key) == own;
            let keys = expected.iter().filter(there).count();
            let leads = cluster.await_node(1, "says its revision", |m| m["revision"].is_u64());
            for node in cluster.ids() {
                let same = |m: &serde_json::Value| {
                    m["keys"] == keys
                        && m["revision"] == leads["revision"]
                        && m["epoch"] == leads["epoch"]
                };
                cluster.await_node(node, &format!("{own} holds {keys} keys at {leads}"), same);
            }
            check_digests(cluster);
            let state = &views[&own];
            assert_eq!(state.change, None, "{own}");
            // A cluster that is no member may live by the ring under which it left or joined.
            if ring.cluster(&own).is_some() {
                assert_eq!(*state.ring.ring(), ring, "{own}");
            }
            if state.epoch() > 0 {
                self.check_keys(place, expected, &owner);
            }
        }
    }

    fn check_keys(
        &self,
        place: usize,
        expected: &BTreeMap<String, Option<String>>,
        owner: &impl Fn(&String) -> ClusterId,
    ) {
        let (cluster, own) = (&self.list[place], id(place));
        let mut tags: BTreeMap<&String, Option<String>> = BTreeMap::new();
        for node in cluster.ids() {
            let mut line = Line::new(cluster.http(node), ANSWER_TIMEOUT);
            for (key, value) in expected {
                let path = format!("/v1/kv/{key}?consistency=stale");
                let answer = line.request("GET", &path, &DIRECT, b"").expect("the node answers");
                let at = format!("{key} at node {node} of {own}");
                if owner(key) != own {
                    assert_eq!(answer.status, 421, "{at}: {}", answer.text());
                    continue;
                }
                let found = (answer.status != 404).then(|| answer.text());
                assert_eq!(found, *value, "{at}");
                let tag = answer.header("etag").map(str::to_owned);
                assert_eq!(*tags.entry(key).or_insert_with(|| tag.clone()), tag, "{at}");
            }
        }
    }
}

/// The whole state of each replica comes to the same, once they have applied the same.
fn check_digests(cluster: &Cluster) {
    let same = || {
        let digests: Vec<_> =
            cluster.ids().map(|node| cluster.get(node, "/cluster/digest")).collect();
        digests.iter().for_each(expect_ok);
        let digests: Vec<_> = digests.iter().map(Answer::json).collect();
        let all = |name: &str| digests.iter().all(|digest| digest[name] == digests[0][name]);
        if !all("applied") {
            return None;
        }
        assert!(all("digest") && all("rows"), "replicas differ: {digests:?}");
        Some(())
    };
    eventually("all replicas have applied the same", same);
}

/// The id of the cluster at this place, counted from 0.
pub fn id(place: usize) -> ClusterId {
    format!("c{}", place + 1).parse().expect("it is an id")
}

/// Proposes a step at a node. `None`: there was no answer that says what became of the step.
pub fn post_step(http: &str, step: &Step) -> Option<Result<Done, Refused>> {
    let body = serde_json::to_vec(step).unwrap();
    let answer = try_request(http, "POST", "/cluster/step", &[], &body, ANSWER_TIMEOUT).ok()?;
    match answer.status {
        200 => Some(Ok(serde_json::from_slice(&answer.body).expect("it is an answer to a step"))),
        409 => {
            answer.assert_error(409, "CONFLICT", "not_applied");
            let refused = answer.json()["error"]["refused"].clone();
            Some(Err(serde_json::from_value(refused).expect("it is a refusal")))
        }
        500.. => None,
        status => panic!("{status}: {}", answer.text()),
    }
}

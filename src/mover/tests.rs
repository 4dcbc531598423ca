//! The jobs against a cluster and sources that are fakes, but decide by the real rules: everything is
//! received, counted and cleaned, whatever is lost, refused, repeated or restarted on the way.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

use super::here::Unanswered;
use super::*;
use crate::handoff::*;
use crate::network::handoff_links::SourceError;
use crate::ring::{Ring, RingCluster, RingNode, RingTable};
use crate::types::{Command, Revision};

type Rows = BTreeMap<Bytes, Bytes>;

fn id(text: &str) -> ClusterId {
    text.parse().unwrap()
}

fn ring(epoch: u64, clusters: &[&str]) -> Ring {
    let node = RingNode { id: 1, http: "127.0.0.1:1".into(), rpc: "127.0.0.1:2".into() };
    let cluster =
        |name: &&str| RingCluster { id: id(name), weight: 1.0, nodes: vec![node.clone()] };
    let clusters: Vec<_> = clusters.iter().map(cluster).collect();
    Ring { epoch, sequencer: Some(clusters[0].id.clone()), clusters, ..Ring::none() }
}

fn handoff(from: &str, to: &str) -> Handoff {
    Handoff { epoch: 2, from: id(from), to: id(to) }
}

fn key(n: u64) -> Bytes {
    format!("key{n:06}").into()
}

/// What decisions need to know of the fake's data.
struct FactsOf<'a>(&'a ClusterId, &'a Rows);

impl Facts for FactsOf<'_> {
    fn own(&self) -> &ClusterId {
        self.0
    }

    fn index(&self) -> u64 {
        1
    }

    fn revision(&self) -> Revision {
        1
    }

    fn floors(&self) -> Vec<(String, u64)> {
        Vec::new()
    }

    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.1.is_empty())
    }

    fn answers(&self, _: &dyn Fn(&[u8]) -> bool) -> Tally {
        Tally::default()
    }

    fn records(
        &self,
        moves: &dyn Fn(&[u8]) -> bool,
        from: &[u8],
        to: Option<&[u8]>,
        _: Prepared,
    ) -> io::Result<Option<Tally>> {
        let mut tally = Tally::default();
        for key in self.1.keys() {
            let within = &key[..] > from && to.is_none_or(|to| &key[..] <= to);
            if within && moves(key) {
                tally.add_record(1);
            }
        }
        Ok(Some(tally))
    }
}

/// A cluster whose log is applied at once.
struct FakeCluster {
    own: ClusterId,
    state: Mutex<RingState>,
    /// What it has: live at a source, staged at a destination.
    rows: Mutex<Rows>,
    /// Rows that dead attempts staged.
    dead: Mutex<BTreeSet<Bytes>>,
    leads: AtomicBool,
    proposals: AtomicU64,
    /// Every so many proposals, one takes effect and is not answered; 0 for never.
    lose_every: u64,
    /// Every so many, somebody else is faster with the same.
    repeat_every: u64,
}

impl FakeCluster {
    fn new(own: &str, old: &[&str], new: &[&str]) -> Self {
        let (own, old, new) = (id(own), ring(1, old), ring(2, new));
        let mut state = RingState::with_ring(RingTable::new(old.clone()).unwrap());
        let plan = pairs(&old, &new);
        let begin = Step::Begin { ring: Box::new(old), next: Box::new(new), plan };
        state.decide(&begin, &FactsOf(&own, &Rows::new())).unwrap().unwrap();
        Self {
            own,
            state: Mutex::new(state),
            rows: Mutex::default(),
            dead: Mutex::default(),
            leads: AtomicBool::new(true),
            proposals: AtomicU64::new(0),
            lose_every: 0,
            repeat_every: 0,
        }
    }

    fn step(&self, step: &Step) -> Result<Done, Refused> {
        let rows = self.rows.lock().unwrap();
        let decided = self.state.lock().unwrap().decide(step, &FactsOf(&self.own, &rows));
        decided.unwrap().map(|decision| decision.done)
    }

    fn open(&self, from: &str, attempt: Attempt) {
        let handoff = Handoff { epoch: 2, from: id(from), to: self.own.clone() };
        self.step(&Step::Open { handoff, attempt, start: 0 }).unwrap();
    }

    fn cursor(&self, from: &str) -> Option<Cursor> {
        let state = self.state.lock().unwrap();
        due::receiving(&state, &self.own, &id(from)).map(|open| open.cursor)
    }

    fn apply(&self, command: &Command) -> Result<Done, Refused> {
        match command {
            Command::Step(step) => self.step(step),
            Command::Import(import) => self.import(import),
            Command::Clean(clean) => self.clean(clean),
            other => panic!("nobody proposes {other}"),
        }
    }

    fn import(&self, import: &Import) -> Result<Done, Refused> {
        let Import { handoff, attempt, from, page } = import;
        let mut state = self.state.lock().unwrap();
        state.check_import(handoff, *attempt, from, &page.to, &self.own)?;
        let mut rows = self.rows.lock().unwrap();
        for (key, record) in &page.records {
            match record {
                Some(record) => rows.insert(key.clone(), record.clone()),
                None => rows.remove(key),
            };
        }
        let tally = Tally { records: rows.len() as u64, ..Tally::default() };
        state.end_import(handoff, &page.to, tally, 0);
        Ok(Done::Receiving { cursor: page.to.clone() })
    }

    fn clean(&self, clean: &Clean) -> Result<Done, Refused> {
        let mut state = self.state.lock().unwrap();
        for key in &clean.keys {
            if clean.handoff.to == self.own {
                let gone = u64::from(self.dead.lock().unwrap().remove(key));
                state.incoming_slot(&clean.handoff).unwrap().garbage -= gone;
            } else if self.rows.lock().unwrap().remove(key).is_some() {
                state.outgoing_slot(&clean.handoff).unwrap().tally.records -= 1;
            }
        }
        Ok(Done::Ok)
    }

    /// What [`StateReader::leftovers`] looks through.
    fn useless(&self, handoff: &Handoff) -> BTreeSet<Bytes> {
        if handoff.to == self.own {
            return self.dead.lock().unwrap().clone();
        }
        let state = self.state.lock().unwrap();
        let moves = |key: &&Bytes| state.way_out(&self.own, key) == Some(&handoff.to);
        self.rows.lock().unwrap().keys().filter(moves).cloned().collect()
    }
}

fn happens(count: u64, every: u64) -> bool {
    every > 0 && count.is_multiple_of(every)
}

#[async_trait]
impl Here for FakeCluster {
    fn own(&self) -> &ClusterId {
        &self.own
    }

    fn leads(&self) -> bool {
        self.leads.load(Ordering::SeqCst)
    }

    fn state(&self) -> RingState {
        self.state.lock().unwrap().clone()
    }

    async fn stretch(&self, from: Bytes, keys_max: usize) -> io::Result<Option<Bytes>> {
        let rows = self.rows.lock().unwrap();
        Ok(rows.keys().filter(|key| **key > from).nth(keys_max - 1).cloned())
    }

    async fn leftovers(
        &self,
        handoff: &Handoff,
        after: Bytes,
        keys_max: usize,
    ) -> io::Result<Vec<Bytes>> {
        let useless = self.useless(handoff);
        Ok(useless.into_iter().filter(|key| *key > after).take(keys_max).collect())
    }

    async fn propose(&self, command: Command) -> Result<Result<Done, Refused>, Unanswered> {
        tokio::task::yield_now().await;
        let count = self.proposals.fetch_add(1, Ordering::SeqCst) + 1;
        if happens(count, self.repeat_every) {
            // Its answer went to whoever was faster.
            let _ = self.apply(&command);
        }
        let answer = self.apply(&command);
        if happens(count, self.lose_every) {
            return Err(Unanswered("lost".into()));
        }
        Ok(answer)
    }
}

/// Sources that hold records, and changes that came later.
#[derive(Default)]
struct FakeSources {
    records: BTreeMap<ClusterId, Rows>,
    changes: Mutex<Vec<Bytes>>,
    /// Sources that cannot be reached.
    dead: BTreeSet<ClusterId>,
    asked: AtomicU64,
    closed: AtomicBool,
    /// Sources that are being asked, and the most that were at once.
    at_once: Mutex<(BTreeSet<ClusterId>, usize)>,
    /// Every so many pages, one is refused, ...
    refuse_every: u64,
    /// ... or makes no sense.
    senseless_every: u64,
}

/// Rows in a page, whatever is asked for.
const PAGE_ROWS: usize = 7;

impl FakeSources {
    fn of(sources: &[&str], records: u64) -> Self {
        let rows: Rows = (0..records).map(|n| (key(n), Bytes::from_static(b"old"))).collect();
        let records = sources.iter().map(|source| (id(source), rows.clone())).collect();
        Self { records, ..Self::default() }
    }

    fn change(&self, keys: impl IntoIterator<Item = u64>) {
        self.changes.lock().unwrap().extend(keys.into_iter().map(key));
    }

    fn page_of(&self, request: &PageRequest) -> Page {
        let changes = self.changes.lock().unwrap();
        let (end, answers) = (changes.len() as u64, Vec::new());
        let (to, records) = match &request.cursor {
            Cursor::Records { after } => {
                let rows = &self.records[&request.handoff.from];
                let rows = rows.iter().filter(|(key, _)| *key > after).take(PAGE_ROWS);
                let rows: Vec<_> = rows.map(|(k, v)| (k.clone(), Some(v.clone()))).collect();
                match rows.last() {
                    Some((last, _)) => (Cursor::Records { after: last.clone() }, rows),
                    None => (Cursor::Answers { after: Bytes::new() }, rows),
                }
            }
            Cursor::Answers { .. } => (Cursor::Changes { position: 0 }, Vec::new()),
            Cursor::Changes { position } => {
                let new = changes.iter().skip(*position as usize).take(PAGE_ROWS);
                let new: Vec<_> = new.map(|k| (k.clone(), Some("new".into()))).collect();
                (Cursor::Changes { position: position + new.len() as u64 }, new)
            }
        };
        Page { to, end, records, answers }
    }
}

#[async_trait]
impl Pages for FakeSources {
    async fn page(&self, source: &RingCluster, request: &PageRequest) -> Result<Page, SourceError> {
        let cluster = source.id.clone();
        if self.dead.contains(&cluster) {
            return Err(SourceError::Unreachable { cluster, why: "dead".into() });
        }
        {
            let mut at_once = self.at_once.lock().unwrap();
            at_once.0.insert(cluster.clone());
            at_once.1 = at_once.1.max(at_once.0.len());
        }
        tokio::time::sleep(Duration::from_micros(100)).await;
        self.at_once.lock().unwrap().0.remove(&cluster);
        let count = self.asked.fetch_add(1, Ordering::SeqCst) + 1;
        let mut page = self.page_of(request);
        if happens(count, self.refuse_every) {
            let refused = Refused::WrongAttempt { attempt: request.attempt, present: 0 };
            return Err(SourceError::Refused { cluster, refused });
        }
        if happens(count, self.senseless_every) {
            page.to = Cursor::start();
            page.records.push(("x".into(), None));
        }
        Ok(page)
    }

    fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
    }
}

/// Without the pauses that copying makes for everything else: they grow with the time that a page
/// takes, many times over, so that on a busy machine they are most of the time.
fn without_pauses() -> Config {
    let mut config = Config::default();
    config.reshard.pause_times = 0;
    config
}

/// A mover over fakes.
struct Running {
    cluster: Arc<FakeCluster>,
    sources: Arc<FakeSources>,
    shutdown: CancellationToken,
    task: JoinHandle<()>,
}

impl Running {
    fn start(cluster: FakeCluster, sources: FakeSources) -> Self {
        Self::start_with(cluster, sources, &Config::default())
    }

    fn start_with(cluster: FakeCluster, sources: FakeSources, config: &Config) -> Self {
        let (cluster, sources) = (Arc::new(cluster), Arc::new(sources));
        let shutdown = CancellationToken::new();
        let mover = Mover::new(cluster.clone(), sources.clone(), config);
        let task = tokio::spawn(mover.run(shutdown.clone()));
        Self { cluster, sources, shutdown, task }
    }

    async fn until(&self, what: &str, condition: impl Fn(&FakeCluster) -> bool) {
        within(what, async {
            while !condition(&self.cluster) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
    }

    fn asked(&self) -> u64 {
        self.sources.asked.load(Ordering::SeqCst)
    }

    /// Until no source was asked for a while: whoever has noticed that it is not to ask has
    /// stopped.
    async fn until_nothing_is_asked(&self) {
        within("nothing is asked", async {
            let mut before = None;
            while before != Some(self.asked()) {
                before = Some(self.asked());
                tokio::time::sleep(Duration::from_millis(300)).await;
            }
        })
        .await;
    }

    async fn stop(self) {
        self.shutdown.cancel();
        within("the mover ends", self.task).await.unwrap();
        assert_eq!(Arc::strong_count(&self.cluster), 1, "a job outlived its owner");
    }
}

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(Duration::from_secs(30), future).await {
        Ok(done) => done,
        Err(_) => panic!("took too long: {what}"),
    }
}

/// Whatever goes wrong on the way, in the end the destination has what the source has, and goes on
/// following what changes.
#[tokio::test]
async fn everything_comes_whatever_goes_wrong() {
    for (lose_every, repeat_every, refuse_every, senseless_every) in
        [(0, 0, 0, 0), (3, 0, 0, 0), (0, 2, 0, 0), (0, 0, 3, 0), (0, 0, 0, 4), (5, 3, 7, 11)]
    {
        let cluster =
            FakeCluster { lose_every, repeat_every, ..FakeCluster::new("b", &["a"], &["a", "b"]) };
        cluster.open("a", 1);
        let sources = FakeSources { refuse_every, senseless_every, ..FakeSources::of(&["a"], 500) };
        sources.change([3, 5, 400]);
        let running = Running::start_with(cluster, sources, &without_pauses());
        running.until("the records", |c| c.cursor("a").unwrap().covers(3)).await;
        running.sources.change(450..600);
        running.until("the changes", |c| c.cursor("a").unwrap().covers(153)).await;
        {
            let rows = running.cluster.rows.lock().unwrap();
            let value = |n| if [3, 5, 400].contains(&n) || n >= 450 { "new" } else { "old" };
            let expected: Rows = (0..600).map(|n| (key(n), value(n).into())).collect();
            assert_eq!(*rows, expected);
        }
        running.stop().await;
    }
}

/// Near the end it looks often, and proposes nothing for nothing.
#[tokio::test]
async fn following_is_prompt_and_an_empty_page_is_no_entry() {
    let cluster = FakeCluster::new("b", &["a"], &["a", "b"]);
    cluster.open("a", 1);
    let running = Running::start(cluster, FakeSources::of(&["a"], 20));
    running.until("the records", |c| c.cursor("a").unwrap().covers(0)).await;
    let before = running.cluster.proposals.load(Ordering::SeqCst);
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(running.cluster.proposals.load(Ordering::SeqCst), before);
    let (began, asked) = (tokio::time::Instant::now(), running.asked());
    running.until("many looks", |_| running.asked() >= asked + 20).await;
    // Each 5 ms after the other, where an idle mover looks every 200 ms.
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    running.sources.change([1]);
    running.until("the change", |c| c.cursor("a").unwrap().covers(1)).await;
    running.stop().await;
}

/// A new attempt is received from the beginning, one that is refused not at all.
#[tokio::test]
async fn attempts_follow_each_other() {
    let cluster = FakeCluster::new("b", &["a"], &["a", "b"]);
    cluster.open("a", 1);
    let running = Running::start(cluster, FakeSources::of(&["a"], 100));
    running.until("the first", |c| c.cursor("a").unwrap().covers(0)).await;
    running.cluster.open("a", 2);
    running.until("the second", |c| c.cursor("a").unwrap().covers(0)).await;
    let refuse = Step::Refuse { handoff: handoff("a", "b"), attempt: 2 };
    running.cluster.step(&refuse).unwrap();
    running.until_nothing_is_asked().await;
    let asked = running.asked();
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(running.asked(), asked);
    running.stop().await;
}

/// Only so many are copied side by side, sources that are out of reach give their place up, and all that
/// can be reached come.
#[tokio::test]
async fn places_are_shared() {
    let old = ["a", "b", "c", "d", "e", "f"];
    let new = ["a", "b", "c", "d", "e", "f", "x"];
    let cluster = FakeCluster::new("x", &old, &new);
    old.iter().for_each(|from| cluster.open(from, 1));
    let mut sources = FakeSources::of(&old, 300);
    sources.dead = [id("a"), id("b")].into();
    let mut config = without_pauses();
    config.reshard.handoffs_at_once = 2;
    let running = Running::start_with(cluster, sources, &config);
    let reachable = ["c", "d", "e", "f"];
    let copying = |c: &FakeCluster, from: &&str| !c.cursor(from).unwrap().covers(0);
    running.until("one", |c| reachable.iter().any(|from| !copying(c, from))).await;
    let at_most = running.sources.at_once.lock().unwrap().1;
    assert!(at_most <= 2, "{at_most} at once");
    running.until("all", |c| !reachable.iter().any(|from| copying(c, from))).await;
    running.stop().await;
}

/// The configured rate holds.
#[tokio::test]
async fn the_rate_is_limited() {
    let cluster = FakeCluster::new("b", &["a"], &["a", "b"]);
    cluster.open("a", 1);
    // Or the pauses would hold the rate, too.
    let mut config = without_pauses();
    config.reshard.handoff_bytes_per_s = 4000;
    // 500 records of 12 bytes.
    let (running, began) = {
        let sources = FakeSources::of(&["a"], 500);
        (Running::start_with(cluster, sources, &config), tokio::time::Instant::now())
    };
    running.until("the records", |c| c.cursor("a").unwrap().covers(0)).await;
    let took = began.elapsed().as_secs_f64();
    assert!(took >= 1.0, "{took} s");
    running.stop().await;
}

/// Who does not lead does nothing, stops what it does, and begins again when it leads.
#[tokio::test]
async fn only_the_leader_works() {
    let cluster = FakeCluster::new("b", &["a"], &["a", "b"]);
    cluster.leads.store(false, Ordering::SeqCst);
    cluster.open("a", 1);
    let running = Running::start(cluster, FakeSources::of(&["a"], 100));
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(running.asked(), 0);
    assert!(running.sources.closed.load(Ordering::SeqCst));
    running.cluster.leads.store(true, Ordering::SeqCst);
    running.until("the records", |c| c.cursor("a").unwrap().covers(0)).await;
    running.cluster.leads.store(false, Ordering::SeqCst);
    running.until_nothing_is_asked().await;
    let asked = running.asked();
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(running.asked(), asked);
    running.stop().await;
}

/// Every handoff is counted to its end, each record once, whatever is lost and whoever is faster.
#[tokio::test]
async fn all_that_moves_is_counted_once() {
    for (lose_every, repeat_every) in [(0, 0), (2, 0), (0, 2), (3, 2)] {
        let cluster = FakeCluster {
            lose_every,
            repeat_every,
            ..FakeCluster::new("a", &["a"], &["a", "b", "c"])
        };
        let records = 5 * count::STRETCH_KEYS_MAX as u64 + 1;
        *cluster.rows.lock().unwrap() = (0..records).map(|n| (key(n), Bytes::new())).collect();
        for to in ["b", "c"] {
            let prepare = Step::Prepare { handoff: handoff("a", to), attempt: 1 };
            cluster.step(&prepare).unwrap();
        }
        let running = Running::start(cluster, FakeSources::default());
        running
            .until("all counted", |c| {
                let state = c.state.lock().unwrap();
                let change = state.change.as_ref().unwrap();
                change.outgoing.values().all(|outgoing| outgoing.counted == Counted::All)
            })
            .await;
        for to in ["b", "c"] {
            let moving = running.cluster.useless(&handoff("a", to)).len() as u64;
            let state = running.cluster.state.lock().unwrap();
            assert_eq!(state.outgoing(&handoff("a", to)).unwrap().tally.records, moving);
        }
        running.stop().await;
    }
}

/// What moved and what was staged in vain goes, in batches, and what stays stays.
#[tokio::test]
async fn leftovers_go() {
    for lose_every in [0, 2] {
        let cluster = FakeCluster { lose_every, ..FakeCluster::new("a", &["a", "c"], &["a", "b"]) };
        let records = 3 * clean::BATCH_KEYS_MAX as u64;
        *cluster.rows.lock().unwrap() = (0..records).map(|n| (key(n), Bytes::new())).collect();
        let (out, into) = (handoff("a", "b"), handoff("c", "a"));
        let moved = cluster.useless(&out);
        *cluster.dead.lock().unwrap() = (0..1500).map(key).collect();
        {
            let mut state = cluster.state.lock().unwrap();
            let outgoing = state.outgoing_slot(&out).unwrap();
            outgoing.sending = Sending::Moved;
            outgoing.tally.records = moved.len() as u64;
            state.incoming_slot(&into).unwrap().garbage = 1500;
        }
        let running = Running::start(cluster, FakeSources::default());
        running
            .until("nothing left", |c| due::to_clean(&c.state.lock().unwrap(), &c.own).is_empty())
            .await;
        let left = running.cluster.rows.lock().unwrap().len() as u64;
        assert_eq!(left, records - moved.len() as u64);
        assert!(running.cluster.dead.lock().unwrap().is_empty());
        let proposals = running.cluster.proposals.load(Ordering::SeqCst);
        assert!((3..20).contains(&proposals), "{proposals}");
        running.stop().await;
    }
}

/// A stop in the middle of anything ends everything.
#[tokio::test]
async fn a_stop_ends_every_job() {
    for after_ms in [0, 1, 60, 61, 75, 500] {
        let cluster = FakeCluster::new("b", &["a"], &["a", "b"]);
        cluster.open("a", 1);
        let running = Running::start(cluster, FakeSources::of(&["a"], 100_000));
        tokio::time::sleep(Duration::from_millis(after_ms)).await;
        running.stop().await;
    }
}

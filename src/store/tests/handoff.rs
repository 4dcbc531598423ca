//! Two stores hand keys over, entry by entry: what arrives is what was there, through restarts, given-up
//! attempts and writes in between.

use std::collections::BTreeMap;

use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};

use super::super::round::Round;
use super::*;
use crate::config::KEY_BYTES_MAX;
use crate::handoff::{
    Clean, Counted, Cursor, Done, Frozen, Handoff, Import, Page, PageRequest, Pair, Refused, Step,
    pairs,
};
use crate::once::{ClientFloor, Once};
use crate::ring::RingTable;

/// A cluster of one store, whose log is what it is told.
struct Site {
    dir: tempfile::TempDir,
    cluster: ClusterId,
    store: Option<Store>,
    index: u64,
}

impl Site {
    fn new(cluster: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut site = Self { dir, cluster: cluster.parse().unwrap(), store: None, index: 0 };
        site.open();
        site
    }

    fn open(&mut self) {
        let mut options = options(self.dir.path());
        options.cluster = self.cluster.clone();
        self.store = Some(Store::open(&options).unwrap());
    }

    /// Stops and starts again: everything comes from the disk now.
    fn reopen(&mut self) {
        self.store.take().unwrap().close().unwrap();
        self.open();
    }

    fn reader(&self) -> StateReader {
        self.store.as_ref().unwrap().reader()
    }

    fn run(&mut self, command: Command) -> Applied {
        self.index += 1;
        let shared = self.reader().shared;
        let entry = command_entry(self.index, command);
        let mut machine = shared.machine();
        let mut round = Round::new(&shared, &mut machine);
        let answer = round.step(&entry).unwrap();
        round.finish().unwrap();
        answer
    }

    fn step(&mut self, step: Step) -> Result<Done, Refused> {
        self.decided(Command::Step(Box::new(step)))
    }

    fn decided(&mut self, command: Command) -> Result<Done, Refused> {
        match self.run(command) {
            Applied::Step(decided) => *decided,
            other => panic!("{other:?}"),
        }
    }

    fn write(&mut self, write: Write) -> Written {
        match self.run(Command::Write(Writes::new(self.index, &[write]))) {
            Applied::Written(mut written) => written.remove(0),
            other => panic!("{other:?}"),
        }
    }

    fn get(&self, key: &str) -> Option<(Revision, Bytes)> {
        match self.reader().get(key.as_bytes()).unwrap() {
            Lookup::Found(record) => Some((record.revision, record.value)),
            Lookup::Absent => None,
            Lookup::NotHere(_) => panic!("{key} is not served by {}", self.cluster),
        }
    }

    fn serves(&self, key: &str) -> bool {
        !matches!(self.reader().get(key.as_bytes()).unwrap(), Lookup::NotHere(_))
    }
}

fn ring(epoch: u64, clusters: &[&str]) -> Ring {
    let cluster = |id: &&str| RingCluster {
        id: id.parse().unwrap(),
        weight: 1.0,
        nodes: vec![RingNode { id: 1, http: "h:1".into(), rpc: "r:1".into() }],
    };
    let sequencer = Some(clusters[0].parse().unwrap());
    Ring { epoch, sequencer, clusters: clusters.iter().map(cluster).collect(), ..Ring::none() }
}

/// A source with data, a destination that has joined, and the change from one to two clusters.
struct Move {
    source: Site,
    target: Site,
    handoff: Handoff,
    old: Ring,
    new: Ring,
    plan: Vec<Pair>,
    table: RingTable,
    /// What the keys should hold.
    model: BTreeMap<String, (Revision, Bytes)>,
    rng: StdRng,
    seq: u64,
    /// Writes whose answers are known, for repeats.
    done: Vec<(Write, Written)>,
    attempt: u64,
}

impl Move {
    fn new(seed: u64) -> Self {
        let (old, new) = (ring(1, &["c1"]), ring(2, &["c1", "c2"]));
        let plan = pairs(&old, &new);
        let handoff = Handoff { epoch: 2, from: "c1".parse().unwrap(), to: "c2".parse().unwrap() };
        let table = RingTable::new(new.clone()).unwrap();
        let (source, target) = (Site::new("c1"), Site::new("c2"));
        let (model, rng) = (BTreeMap::new(), StdRng::seed_from_u64(seed));
        let (seq, done, attempt) = (0, Vec::new(), 0);
        Self { source, target, handoff, old, new, plan, table, model, rng, seq, done, attempt }
    }

    fn begin(&mut self) {
        let installed = self.source.run(Command::InstallRing(Box::new(self.old.clone())));
        assert_eq!(installed, Applied::RingInstalled { epoch: 1 });
        for _ in 0..200 {
            self.write();
        }
        let ring = || Box::new(self.old.clone());
        self.target.step(Step::Join { ring: ring() }).unwrap();
        let (next, plan) = (Box::new(self.new.clone()), self.plan.clone());
        let begin = Step::Begin { ring: ring(), next, plan };
        self.source.step(begin.clone()).unwrap();
        self.target.step(begin).unwrap();
    }

    fn moves(&self, key: &str) -> bool {
        self.table.owner(key.as_bytes()).unwrap().id.as_str() == "c2"
    }

    /// A random write at the source, mostly with an idempotency key.
    fn write(&mut self) {
        self.seq += 1;
        let key = format!("key{}", self.rng.random_range(0..120));
        let write = if self.rng.random_bool(0.8) {
            let mut value = vec![0; self.rng.random_range(0..50)];
            self.rng.fill_bytes(&mut value);
            let absent = self.rng.random_bool(0.2);
            let condition = if absent { Condition::Absent } else { Condition::Always };
            Write::put(key.clone().into(), value.into(), condition)
        } else {
            Write::delete(key.clone().into(), Condition::Always)
        };
        let floor = self.seq.saturating_sub(30);
        let client = ClientFloor { client: "me".parse().unwrap(), floor };
        let once = Once::new(client, self.seq).unwrap();
        let write = write.once(self.rng.random_bool(0.9).then_some(once));
        let written = self.source.write(write.clone());
        match (&written, &write.action) {
            (Written::Put { revision }, Action::Put(value)) => {
                self.model.insert(key, (*revision, value.clone()));
            }
            (Written::Deleted { .. }, _) => drop(self.model.remove(&key)),
            (Written::ConditionFailed { .. }, _) => {}
            other => panic!("{other:?}"),
        }
        if write.once.is_some() {
            self.done.push((write, written));
        }
    }

    /// Writes every key that has moved: also those of which a dead attempt has left a row.
    fn write_at_target(&mut self) {
        let keys = (0..120).map(|number| format!("key{number}"));
        for key in keys.filter(|key| self.moves(key)).collect::<Vec<_>>() {
            let value = Bytes::from_static(b"at the target");
            let write = Write::put(key.clone().into(), value.clone(), Condition::Always);
            let Written::Put { revision } = self.target.write(write) else { panic!("{key}") };
            let before = self.model.insert(key.clone(), (revision, value));
            assert!(before.is_none_or(|(older, _)| older < revision), "{key} goes back");
        }
    }

    fn maybe_reopen(&mut self) {
        match self.rng.random_range(0..12) {
            0 => self.source.reopen(),
            1 => self.target.reopen(),
            _ => {}
        }
    }

    /// Prepares and opens the next attempt.
    fn attempt(&mut self) {
        self.attempt += 1;
        let (handoff, attempt) = (self.handoff.clone(), self.attempt);
        let prepared = self.source.step(Step::Prepare { handoff: handoff.clone(), attempt });
        let Ok(Done::Prepared { start }) = prepared else { panic!("{prepared:?}") };
        self.target.step(Step::Open { handoff, attempt, start }).unwrap();
    }

    fn page(&mut self, from: &Cursor) -> Page {
        let request = PageRequest {
            handoff: self.handoff.clone(),
            attempt: self.attempt,
            cursor: from.clone(),
            bytes_max: 200,
        };
        let page = self.source.reader().page(&request).unwrap().unwrap();
        let record_bytes = |(key, record): &(Bytes, Option<Bytes>)| {
            key.len() + record.as_ref().map_or(0, Bytes::len)
        };
        // A message has room for the largest record alone, or for a page of the usual size.
        let bytes: usize = page.records.iter().map(record_bytes).sum();
        assert!(page.records.len() <= 1 || bytes <= 200, "{bytes}: {:?}", page.records.len());
        page
    }

    /// Copies one page; true when there was nothing left at that moment.
    fn pull(&mut self) -> bool {
        let from = self.cursor();
        let page = self.page(&from);
        let caught_up = page.to.covers(page.end);
        let import = Import { handoff: self.handoff.clone(), attempt: self.attempt, from, page };
        self.target.decided(Command::Import(Box::new(import.clone()))).unwrap();
        if import.page.to != import.from {
            // Once more: a repeat changes nothing.
            let before = self.target.reader().ring_state();
            let again = self.target.decided(Command::Import(Box::new(import)));
            assert_eq!(again, Err(Refused::WrongCursor));
            assert_eq!(self.target.reader().ring_state(), before);
        }
        caught_up
    }

    fn cursor(&self) -> Cursor {
        let state = self.target.reader().ring_state();
        match &state.incoming(&self.handoff).unwrap().receipt {
            crate::handoff::Receipt::Receiving { cursor, .. } => cursor.clone(),
            other => panic!("{other:?}"),
        }
    }

    /// Counts one stretch; true when all are counted.
    fn count(&mut self) -> bool {
        let state = self.source.reader().ring_state();
        let outgoing = state.outgoing(&self.handoff).unwrap();
        let Counted::UpTo(from) = outgoing.counted.clone() else { return true };
        let to = self.source.reader().stretch(&from, 7).unwrap();
        let (handoff, attempt) = (self.handoff.clone(), self.attempt);
        self.source.step(Step::Count { handoff, attempt, from, to }).unwrap();
        false
    }

    fn copy(&mut self) {
        loop {
            let (copied, counted) = (self.pull(), self.count());
            if copied && counted {
                return;
            }
            if self.rng.random_bool(0.5) {
                self.write();
            }
            self.maybe_reopen();
        }
    }

    fn freeze(&mut self) -> Box<Frozen> {
        let (handoff, attempt) = (self.handoff.clone(), self.attempt);
        let frozen = self.source.step(Step::Freeze { handoff, attempt, floors_bytes_max: None });
        let Ok(Done::Frozen(frozen)) = frozen else { panic!("{frozen:?}") };
        frozen
    }

    fn clean(&mut self) {
        for target in [false, true] {
            loop {
                let handoff = self.handoff.clone();
                let site = if target { &mut self.target } else { &mut self.source };
                let keys = site.reader().leftovers(&handoff, b"", 5).unwrap();
                if keys.is_empty() {
                    break;
                }
                let clean = Clean { handoff, keys };
                site.decided(Command::Clean(Box::new(clean))).unwrap();
                self.maybe_reopen();
            }
        }
    }

    /// Every key is served where the ring says, with what it should hold.
    fn check(&self) {
        for number in 0..120 {
            let key = format!("key{number}");
            let (site, other) = match self.moves(&key) {
                true => (&self.target, &self.source),
                false => (&self.source, &self.target),
            };
            assert_eq!(site.get(&key), self.model.get(&key).cloned(), "{key}");
            assert!(!other.serves(&key), "{key}");
        }
    }

    /// A repeat gets the first answer, or none; it is never carried out again.
    fn check_repeats(&mut self) {
        for (write, written) in std::mem::take(&mut self.done) {
            let key = String::from_utf8(write.key.to_vec()).unwrap();
            let moved = self.moves(&key);
            let site = if moved { &mut self.target } else { &mut self.source };
            let again = site.write(write);
            assert!(again == written || again == Written::OnceForgotten, "{again:?}");
        }
        self.check();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_and_answers_arrive_whole() {
    for seed in 0..6 {
        let mut mv = Move::new(seed);
        mv.begin();
        // The first attempts come to nothing, at different points.
        for round in 0..3 {
            mv.attempt();
            if round > 0 {
                mv.copy();
            }
            if round == 2 {
                mv.freeze();
            }
            let (handoff, refused) = (mv.handoff.clone(), mv.attempt);
            let refuse = Step::Refuse { handoff: handoff.clone(), attempt: refused };
            mv.target.step(refuse).unwrap();
            mv.source.step(Step::Thaw { handoff, refused }).unwrap();
            mv.write();
        }
        mv.attempt();
        mv.copy();
        mv.write();
        mv.write();
        let frozen = mv.freeze();
        let (handoff, attempt) = (mv.handoff.clone(), mv.attempt);
        let activate = Step::Activate { handoff: handoff.clone(), attempt, frozen };
        if !mv.cursor().covers(mv.source.reader().ring_state().position) {
            assert_eq!(mv.target.step(activate.clone()), Err(Refused::WrongCursor));
        }
        while !mv.pull() {
            mv.maybe_reopen();
        }
        let activated = mv.target.step(activate.clone()).unwrap();
        let Done::Active { tally, .. } = activated else { panic!("{activated:?}") };
        mv.maybe_reopen();
        assert_eq!(mv.target.step(activate), Ok(activated));
        mv.source.step(Step::Release { handoff, attempt, tally }).unwrap();
        mv.check();
        mv.write_at_target();
        assert!(mv.source.step(Step::Finish { epoch: 2 }).is_err(), "rows are left");
        mv.clean();
        for site in [&mut mv.source, &mut mv.target] {
            site.step(Step::Finish { epoch: 2 }).unwrap();
            site.reopen();
        }
        mv.check();
        mv.check_repeats();
        let moved = mv.model.keys().filter(|key| mv.moves(key)).count() as u64;
        assert_eq!(mv.target.reader().key_count().unwrap(), moved);
        assert_eq!(mv.source.reader().key_count().unwrap(), mv.model.len() as u64 - moved);
    }
}

/// Two replicas apply an entry, and answer alike.
#[track_caller]
fn both(leader: &mut Site, follower: &mut Site, command: Command) -> Applied {
    let answer = leader.run(command.clone());
    assert_eq!(follower.run(command), answer);
    answer
}

#[track_caller]
fn both_step(leader: &mut Site, follower: &mut Site, step: Step) -> Result<Done, Refused> {
    match both(leader, follower, Command::Step(Box::new(step))) {
        Applied::Step(decided) => *decided,
        other => panic!("{other:?}"),
    }
}

/// More rows than may be counted in one entry.
const MANY: u32 = 25_000;

/// A replica that comes to lead in the middle of counting, and has everything in memory still, goes on
/// with stretches that may be counted: not with one that holds all the rest, which is refused for ever.
#[test]
fn a_new_leader_counts_on_from_memory() {
    let (mut leader, mut follower) = (Site::new("c1"), Site::new("c1"));
    let (old, new) = (ring(1, &["c1"]), ring(2, &["c1", "c2"]));
    let handoff = Handoff { epoch: 2, from: "c1".parse().unwrap(), to: "c2".parse().unwrap() };
    both(&mut leader, &mut follower, Command::InstallRing(Box::new(old.clone())));
    for part in 0..MANY / 1000 {
        let keys = (part * 1000..(part + 1) * 1000).map(|n| format!("key{n:06}"));
        let put = |key: String| Write::put(key.into(), Bytes::new(), Condition::Always);
        let writes: Vec<_> = keys.map(put).collect();
        both(&mut leader, &mut follower, Command::Write(Writes::new(1, &writes)));
    }
    let plan = pairs(&old, &new);
    let begin = Step::Begin { ring: Box::new(old), next: Box::new(new), plan };
    both_step(&mut leader, &mut follower, begin).unwrap();
    let prepare = Step::Prepare { handoff: handoff.clone(), attempt: 1 };
    both_step(&mut leader, &mut follower, prepare).unwrap();
    let mut stretches = 0;
    loop {
        let state = leader.reader().ring_state();
        let counted = state.outgoing(&handoff).unwrap().counted.clone();
        let Counted::UpTo(from) = counted else { break };
        // The first two by the one, the rest by the other.
        let counting = if stretches < 2 { &leader } else { &follower };
        let to = counting.reader().stretch(&from, 2000).unwrap();
        let count = Step::Count { handoff: handoff.clone(), attempt: 1, from, to };
        both_step(&mut leader, &mut follower, count).unwrap();
        stretches += 1;
    }
    assert!(stretches >= MANY / 2000, "{stretches}");
    assert_eq!(follower.reader().ring_state(), leader.reader().ring_state());
}

/// A destination takes no record under a key that no write can have: its followers could be sent its state
/// no more, because they check what they are sent.
#[test]
fn a_key_that_is_none_is_not_staged() {
    let mut site = Site::new("c1");
    let weighted = |epoch, weights: [f32; 2]| {
        let mut ring = ring(epoch, &["c1", "c2"]);
        ring.clusters.iter_mut().zip(weights).for_each(|(cluster, weight)| cluster.weight = weight);
        ring
    };
    // Nearly every key moves, among them those below.
    let (old, new) = (weighted(1, [1.0, 1e6]), weighted(2, [1e6, 1.0]));
    let (from, to) = ("c2".parse().unwrap(), "c1".parse().unwrap());
    let handoff = Handoff { epoch: 2, from, to };
    let long = "k".repeat(KEY_BYTES_MAX + 1);
    for key in ["", "key", &long] {
        let owner = |ring: &Ring| {
            RingTable::new(ring.clone()).unwrap().owner(key.as_bytes()).unwrap().id.clone()
        };
        assert_eq!((owner(&old), owner(&new)), (handoff.from.clone(), handoff.to.clone()));
    }
    site.run(Command::InstallRing(Box::new(old.clone())));
    site.step(Step::Settle { epoch: 1 }).unwrap();
    let plan = pairs(&old, &new);
    site.step(Step::Begin { ring: Box::new(old), next: Box::new(new), plan }).unwrap();
    site.step(Step::Open { handoff: handoff.clone(), attempt: 1, start: 0 }).unwrap();
    let import = |keys: &[&str]| {
        let row = || Some(Bytes::from(meta::encode_record(1, b"")));
        let records = keys.iter().map(|key| (Bytes::from(key.to_string()), row())).collect();
        let to = Cursor::Records { after: "key".into() };
        let page = Page { to, end: 0, records, answers: Vec::new() };
        let import = Import { handoff: handoff.clone(), attempt: 1, from: Cursor::start(), page };
        Command::Import(Box::new(import))
    };
    let before = site.reader().ring_state();
    for bad in ["", &long] {
        assert_eq!(site.decided(import(&["key", bad])), Err(Refused::ForeignRecord));
    }
    assert_eq!(site.reader().ring_state(), before);
    site.decided(import(&["key"])).unwrap();
    let state = site.reader().ring_state();
    assert_eq!(state.incoming(&handoff).unwrap().tally.records, 1);
}

/// What is staged while a source counts is not counted, wherever a replica has it: the one has flushed
/// between the attempt and the import, the other has not.
#[test]
fn what_is_staged_meanwhile_is_not_counted() {
    let (mut leader, mut follower) = (Site::new("c1"), Site::new("c1"));
    let weighted = |epoch, weights: [f32; 3]| {
        let mut ring = ring(epoch, &["c1", "c2", "c3"]);
        ring.clusters.iter_mut().zip(weights).for_each(|(cluster, weight)| cluster.weight = weight);
        ring
    };
    let (old, new) = (weighted(1, [1.0; 3]), weighted(2, [20.0, 1.0, 40.0]));
    let tables = [&old, &new].map(|ring| RingTable::new(ring.clone()).unwrap());
    let owners = |key: &String| {
        [0, 1].map(|n| tables[n].owner(key.as_bytes()).unwrap().id.as_str().to_owned())
    };
    let keys = || (0..).map(|n| format!("key{n:06}"));
    let handoff = |from: &str, to: &str| Handoff {
        epoch: 2,
        from: from.parse().unwrap(),
        to: to.parse().unwrap(),
    };
    let (out, into) = (handoff("c1", "c3"), handoff("c2", "c1"));

    both(&mut leader, &mut follower, Command::InstallRing(Box::new(old.clone())));
    let own = keys().filter(|key| owners(key)[0] == "c1").take(100);
    let put = |key: String| Write::put(key.into(), Bytes::new(), Condition::Always);
    let writes: Vec<_> = own.map(put).collect();
    both(&mut leader, &mut follower, Command::Write(Writes::new(1, &writes)));
    both_step(&mut leader, &mut follower, Step::Settle { epoch: 1 }).unwrap();
    let plan = pairs(&old, &new);
    let begin = Step::Begin { ring: Box::new(old), next: Box::new(new), plan };
    both_step(&mut leader, &mut follower, begin).unwrap();
    let prepare = Step::Prepare { handoff: out.clone(), attempt: 1 };
    both_step(&mut leader, &mut follower, prepare).unwrap();
    // Flushes, as whoever cuts the first stretch does.
    leader.reader().stretch(b"", 10).unwrap();
    let open = Step::Open { handoff: into.clone(), attempt: 1, start: 0 };
    both_step(&mut leader, &mut follower, open).unwrap();
    let moving: Vec<String> =
        keys().filter(|key| owners(key) == ["c2", "c1"]).take(MANY as usize).collect();
    let row = || Some(Bytes::from(meta::encode_record(1, b"")));
    let mut from = Cursor::start();
    for part in moving.chunks(2500) {
        let after = Bytes::from(part.last().unwrap().clone());
        let records = part.iter().map(|key| (Bytes::from(key.clone()), row())).collect();
        let to = Cursor::Records { after };
        let page = Page { to: to.clone(), end: 0, records, answers: Vec::new() };
        let import = Import { handoff: into.clone(), attempt: 1, from, page };
        let imported = both(&mut leader, &mut follower, Command::Import(Box::new(import)));
        assert!(matches!(imported, Applied::Step(decided) if decided.is_ok()));
        from = to;
    }
    let count = Step::Count { handoff: out.clone(), attempt: 1, from: Bytes::new(), to: None };
    both_step(&mut leader, &mut follower, count).unwrap();
    let state = leader.reader().ring_state();
    assert_eq!(state.outgoing(&out).unwrap().counted, Counted::All);
    assert_eq!(follower.reader().ring_state(), state);
}

//! The table does what its module says: by example, and against a model that forgets nothing it could
//! be slow about.

use bytes::Bytes;
use proptest::collection::vec;
use proptest::prelude::*;

use super::encoding::CHUNK_BYTES;
use super::*;
use crate::handoff::{Frozen, Tally};
use crate::once::{ClientFloor, Once};
use crate::types::{Action, Condition, Write};

fn once(client: &str, seq: u64, floor: u64) -> Once {
    Once::new(ClientFloor { client: client.parse().unwrap(), floor }, seq).unwrap()
}

fn put(key: &str) -> Write {
    Write::put(key.to_owned().into(), "v".into(), Condition::Always)
}

fn delete(key: &str) -> Write {
    Write::delete(key.to_owned().into(), Condition::Always)
}

fn wrote(revision: u64) -> Written {
    Written::Put { revision }
}

fn gone(_: &[u8]) -> Fall {
    Fall::Gone
}

/// Carries a write out if it is new, and answers it.
fn run(table: &mut Dedupe, once: &Once, write: &Write, answer: Written) -> Written {
    let (once, write) = (OnceRef::from(once), WriteRef::from(write));
    match table.check(&once, &write, &gone) {
        Verdict::Answered(written) => written,
        Verdict::New => {
            table.record(&once, &write, &answer, &gone);
            answer
        }
    }
}

fn decode(chunks: Vec<Bytes>) -> std::io::Result<Dedupe> {
    let mut decoder = Decoder::default();
    chunks.into_iter().try_for_each(|chunk| decoder.chunk(chunk))?;
    decoder.finish()
}

fn reloaded(table: &Dedupe) -> Dedupe {
    let chunks = table.encode();
    let mut again = decode(chunks.clone()).unwrap();
    assert_eq!(again.encode(), chunks);
    again.bounds = table.bounds;
    again
}

/// A repeat gets the first answer, whatever it was.
#[test]
fn a_repeat_gets_the_first_answer() {
    let mut table = Dedupe::default();
    let refused = Written::ConditionFailed { current: Some(4) };
    let deleted = Written::Deleted { revision: 9, deleted: false };
    assert_eq!(run(&mut table, &once("a", 1, 0), &put("k"), wrote(5)), wrote(5));
    assert_eq!(run(&mut table, &once("a", 2, 0), &put("k"), refused.clone()), refused);
    assert_eq!(run(&mut table, &once("a", 3, 0), &delete("k"), deleted.clone()), deleted);
    assert_eq!(run(&mut table, &once("b", 1, 0), &put("k"), wrote(6)), wrote(6), "another client");
    for table in [&mut reloaded(&table), &mut table] {
        assert_eq!(run(table, &once("a", 1, 0), &put("k"), wrote(10)), wrote(5));
        assert_eq!(run(table, &once("a", 2, 1), &put("k"), wrote(10)), refused);
        assert_eq!(run(table, &once("a", 3, 1), &delete("k"), wrote(10)), deleted);
    }
}

/// A sequence means one write: another key or kind is refused, and the first answer stays.
#[test]
fn another_write_with_the_same_sequence_is_refused() {
    let mut table = Dedupe::default();
    run(&mut table, &once("a", 1, 0), &put("k"), wrote(1));
    for other in [put("other"), delete("k")] {
        let answer = run(&mut table, &once("a", 1, 0), &other, wrote(2));
        assert_eq!(answer, Written::OnceReused);
    }
    assert_eq!(run(&mut table, &once("a", 1, 0), &put("k"), wrote(2)), wrote(1));
}

/// What lies below a floor once told is never carried out, whatever floor a late request tells.
#[test]
fn a_floor_only_rises() {
    let mut table = Dedupe::default();
    for seq in 1..=5 {
        run(&mut table, &once("a", seq, 0), &put("k"), wrote(seq));
    }
    run(&mut table, &once("a", 6, 4), &put("k"), wrote(6));
    assert_eq!(table.live, 3);
    for seq in [0, 1, 3] {
        let answer = run(&mut table, &once("a", seq, 0), &put("k"), wrote(9));
        assert_eq!(answer, Written::OnceForgotten);
    }
    assert_eq!(run(&mut table, &once("a", 4, 0), &put("k"), wrote(9)), wrote(4));
    // The floor counts even when its write is refused.
    run(&mut table, &once("a", 6, 6), &put("other"), wrote(9));
    assert_eq!(run(&mut table, &once("a", 5, 0), &put("k"), wrote(9)), Written::OnceForgotten);
}

/// An answer is there until it is 15 minutes old in log time; then its write is never carried out.
#[test]
fn old_answers_go_and_their_writes_are_not_carried_out() {
    let mut table = Dedupe::default();
    table.advance(1000, &gone);
    run(&mut table, &once("a", 7, 0), &put("k"), wrote(1));
    table.advance(500, &gone);
    table.advance(1000 + ANSWER_AGE_MAX_MS - 1, &gone);
    assert_eq!(run(&mut table, &once("a", 7, 0), &put("k"), wrote(2)), wrote(1));
    table.advance(1000 + ANSWER_AGE_MAX_MS, &gone);
    assert_eq!((table.live, table.key_bytes), (0, 0));
    for seq in [0, 7] {
        let answer = run(&mut table, &once("a", seq, 0), &put("k"), wrote(2));
        assert_eq!(answer, Written::OnceForgotten);
    }
    assert_eq!(run(&mut table, &once("a", 8, 0), &put("k"), wrote(2)), wrote(2));
}

/// A clock that jumps to the end of time and back forgets, and nothing worse.
#[test]
fn a_mad_clock_does_no_harm() {
    let mut table = Dedupe::default();
    run(&mut table, &once("a", 1, 0), &put("k"), wrote(1));
    table.advance(u64::MAX, &gone);
    assert_eq!(run(&mut table, &once("a", 1, 0), &put("k"), wrote(2)), Written::OnceForgotten);
    run(&mut table, &once("a", 2, 0), &put("k"), wrote(2));
    table.advance(0, &gone);
    assert_eq!(run(&mut reloaded(&table), &once("a", 2, 0), &put("k"), wrote(3)), wrote(2));
}

/// The oldest answers in log order make room, in number and in bytes of keys.
#[test]
fn answers_are_bounded() {
    let bounds = Bounds { answers_max: 4, key_bytes_max: 20, clients_max: 9 };
    let mut table = Dedupe::with_bounds(bounds);
    for seq in [5, 1, 2, 3, 4] {
        run(&mut table, &once(&format!("c{seq}"), seq, 0), &put("k"), wrote(seq));
    }
    let oldest = run(&mut table, &once("c5", 5, 0), &put("k"), wrote(9));
    assert_eq!(oldest, Written::OnceForgotten);
    assert_eq!(run(&mut table, &once("c1", 1, 0), &put("k"), wrote(9)), wrote(1));
    let long = "0123456789abcdefgh";
    run(&mut table, &once("c9", 1, 0), &put(long), wrote(9));
    assert_eq!((table.live, table.key_bytes), (3, 20));
}

/// Only a client that has been silent for an hour is forgotten, and only for want of room; the one
/// that has been silent longest goes first.
#[test]
fn clients_are_bounded_and_active_ones_stay() {
    let bounds = Bounds { clients_max: 3, ..BOUNDS };
    let mut table = Dedupe::with_bounds(bounds);
    for (at, client) in [(0, "a"), (1, "b"), (2, "c")] {
        table.advance(at, &gone);
        run(&mut table, &once(client, 5, 5), &put("k"), wrote(1));
    }
    table.advance(CLIENT_IDLE_MIN_MS - 1, &gone);
    let new = |table: &mut Dedupe, name| run(table, &once(name, 5, 0), &put("k"), wrote(2));
    assert_eq!(new(&mut table, "d"), Written::TooManyClients);
    run(&mut table, &once("a", 6, 6), &put("k"), wrote(3));
    table.advance(CLIENT_IDLE_MIN_MS + 1, &gone);
    assert_eq!(new(&mut table, "d"), wrote(2), "b made room");
    assert_eq!(new(&mut table, "e"), Written::TooManyClients);
    let names: Vec<_> = table.clients.keys().map(ClientName::as_str).collect();
    assert_eq!(names, ["a", "c", "d"]);
    assert_eq!(table.idle.len(), 3);
    assert_eq!(run(&mut table, &once("a", 5, 5), &put("k"), wrote(4)), Written::OnceForgotten);
}

/// A client whose answers are pinned, for as long as another cluster is away, keeps no new one out: the one
/// that was idle longest after it makes room. When they are let go, it is its turn again.
#[test]
fn a_pinned_answer_keeps_no_new_client_out() {
    fn falls(key: &[u8]) -> Fall {
        if key == b"frozen" { Fall::Pinned } else { Fall::Gone }
    }
    let is_frozen = |key: &[u8]| key == b"frozen";
    let let_go: [fn(&mut Dedupe, Moves<'_>); 2] = [Dedupe::unpin, Dedupe::forget_moved];
    for (let_go, restarts) in let_go.into_iter().flat_map(|go| [false, true].map(|r| (go, r))) {
        let mut table = Dedupe::with_bounds(Bounds { clients_max: 3, ..BOUNDS });
        for (at, client, key) in [(0, "a", "frozen"), (1, "b", "k"), (2, "c", "k")] {
            table.advance(at, &falls);
            run(&mut table, &once(client, 5, 5), &put(key), wrote(1));
        }
        table.advance(CLIENT_IDLE_MIN_MS + 2, &falls);
        assert_eq!(table.pinned.len(), 1);
        let maybe_restarted = |table: Dedupe| if restarts { reloaded(&table) } else { table };
        let new = |table: &mut Dedupe, name| run(table, &once(name, 5, 0), &put("k"), wrote(2));
        let names =
            |table: &Dedupe| table.clients.keys().map(|n| n.to_string()).collect::<String>();
        for (name, left) in [("d", "acd"), ("e", "ade")] {
            assert_eq!(new(&mut table, name), wrote(2));
            assert_eq!(names(&table), left);
            table = maybe_restarted(table);
        }
        assert_eq!(new(&mut table, "f"), Written::TooManyClients, "all others have just written");
        table = maybe_restarted(table);

        let_go(&mut table, &|key| key == b"other");
        assert_eq!(new(&mut table, "f"), Written::TooManyClients, "it is held still");
        table = maybe_restarted(table);
        let_go(&mut table, &is_frozen);
        assert_eq!(new(&mut table, "f"), wrote(2));
        assert_eq!(names(&table), "def");
        assert_eq!((table.idle.len(), table.held.len()), (3, 0));
    }
}

/// Clients beyond the bound, which a handover has brought, keep no new one out once they may be forgotten,
/// and become fewer.
#[test]
fn clients_of_a_handover_make_room() {
    let mut table = Dedupe::with_bounds(Bounds { clients_max: 2, ..BOUNDS });
    let floors = ["a", "b", "c", "d", "e"].map(|name| (name.to_owned(), 7));
    table.take_over(&frozen(floors.into(), Vec::new()), Travelling::new(), &gone);
    let new = |table: &mut Dedupe, name| run(table, &once(name, 5, 0), &put("k"), wrote(2));
    table.advance(CLIENT_IDLE_MIN_MS - 1, &gone);
    assert_eq!(new(&mut table, "x"), Written::TooManyClients);
    table.advance(CLIENT_IDLE_MIN_MS, &gone);
    for (name, left) in [("x", 4), ("y", 3), ("z", 3)] {
        assert_eq!(new(&mut table, name), wrote(2));
        assert_eq!(table.clients.len(), left);
    }
    assert_eq!(new(&mut table, "w"), Written::TooManyClients, "all have written just now");
}

fn frozen(floors: Vec<(String, u64)>, idle_floors: Vec<(String, u64)>) -> Frozen {
    Frozen { position: 0, revision: 0, tally: Tally::default(), floors, idle_floors }
}

/// Who has been idle for long is known to the new owner, too, and there it is the first to be forgotten; but
/// not before there is no room.
#[test]
fn idle_clients_travel_as_such() {
    let mut source = Dedupe::with_bounds(Bounds { clients_max: 3, ..BOUNDS });
    for (at, client) in [(0, "a"), (1, "b")] {
        source.advance(at, &gone);
        run(&mut source, &once(client, 5, 5), &put("k"), wrote(1));
    }
    source.advance(CLIENT_IDLE_MIN_MS - 1, &gone);
    let floor = |name: &str| (name.to_owned(), 6);
    assert_eq!((source.floors(), source.idle_floors()), (vec![floor("a"), floor("b")], vec![]));
    source.advance(CLIENT_IDLE_MIN_MS, &gone);
    assert_eq!((source.floors(), source.idle_floors()), (vec![floor("b")], vec![floor("a")]));

    let mut table = Dedupe::with_bounds(Bounds { clients_max: 3, ..BOUNDS });
    table.advance(2 * CLIENT_IDLE_MIN_MS, &gone);
    let taken = frozen(source.floors(), source.idle_floors());
    table.take_over(&taken, Travelling::new(), &gone);
    let write = |table: &mut Dedupe, name| run(table, &once(name, 5, 0), &put("k"), wrote(2));
    assert_eq!(write(&mut table, "a"), Written::OnceForgotten, "it is not carried out again");
    assert_eq!(write(&mut table, "b"), Written::OnceForgotten);

    let mut table = Dedupe::with_bounds(Bounds { clients_max: 3, ..BOUNDS });
    table.advance(2 * CLIENT_IDLE_MIN_MS, &gone);
    table.take_over(&taken, Travelling::new(), &gone);
    assert_eq!([write(&mut table, "c"), write(&mut table, "d")], [wrote(2), wrote(2)]);
    let names: Vec<_> = table.clients.keys().map(ClientName::as_str).collect();
    assert_eq!(names, ["b", "c", "d"], "a made room");
    // Where there is no room already it is not even taken in, nor given away.
    table.take_over(&taken, Travelling::new(), &gone);
    assert_eq!(table.clients.len(), 3);
    table.advance(4 * CLIENT_IDLE_MIN_MS, &gone);
    assert_eq!((table.floors(), table.idle_floors()), (vec![], vec![]));
}

/// Of an answer that falls while its key is being copied somebody is told, with what it had added to the
/// tally; one whose key is frozen stays until it is let go.
#[test]
fn what_falls_on_its_way_is_told_or_pinned() {
    let mut table = Dedupe::default();
    for (seq, key) in [(1, "told"), (2, "pinned"), (3, "gone"), (4, "told")] {
        run(&mut table, &once("a", seq, 0), &put(key), wrote(seq));
    }
    let place = |seq| place("a", seq);
    let hash = answer_hash(&place(1), &table.at(&place(1)).unwrap());
    let falls = |key: &[u8]| match key {
        b"told" => Fall::Told,
        b"pinned" => Fall::Pinned,
        _ => Fall::Gone,
    };
    let (told_floor, write) = (once("a", 5, 4), put("gone"));
    let verdict = table.check(&(&told_floor).into(), &(&write).into(), &falls);
    assert_eq!(verdict, Verdict::New);
    assert_eq!(table.take_fallen(), [Fallen { key: "told".into(), place: place(1), hash }]);
    assert_eq!(table.take_fallen(), []);
    let there = |table: &Dedupe| [1, 2, 3, 4].map(|seq| table.at(&place(seq)).is_some());
    assert_eq!(there(&table), [false, true, false, true]);
    assert_eq!(run(&mut table, &once("a", 2, 0), &put("pinned"), wrote(9)), Written::OnceForgotten);
    table = reloaded(&table);
    table.unpin(&|key| key != b"pinned");
    assert_eq!(there(&table), [false, true, false, true]);
    table.unpin(&|key| key == b"pinned");
    assert_eq!(there(&table), [false, false, false, true]);
    assert_eq!((table.live, table.key_bytes, table.pinned.len()), (1, 4, 0));
}

/// A chunk that is damaged, missing, repeated or out of order is an error, and any of it never panics.
#[test]
fn what_is_not_a_table_is_refused() {
    let mut table = Dedupe::default();
    for seq in 0..30_000u64 {
        table.advance(seq / 7, &gone);
        let client = format!("client-{}", seq % 5);
        run(&mut table, &once(&client, seq, 0), &put(&format!("k{seq}")), wrote(seq));
    }
    let chunks = table.encode();
    assert!(chunks.len() > 3 && chunks.iter().all(|chunk| chunk.len() < CHUNK_BYTES + 100));
    for missing in 0..chunks.len() {
        let mut some = chunks.clone();
        some.remove(missing);
        assert!(decode(some).is_err(), "without chunk {missing}");
        let mut more = chunks.clone();
        more.insert(missing, chunks[missing].clone());
        assert!(decode(more).is_err(), "chunk {missing} twice");
        for length in [0, 1, 2, chunks[missing].len() - 1] {
            let mut cut = chunks.clone();
            cut[missing] = cut[missing].slice(..length);
            assert!(decode(cut).is_err(), "chunk {missing} cut at {length}");
        }
    }
    assert!(decode(Vec::new()).is_err());
}

/// One step of the property test.
#[derive(Debug, Clone)]
struct Step {
    clock_ms: u64,
    once: Once,
    write: Write,
    refused: bool,
    /// The replica under test is restarted before.
    restart: bool,
}

fn any_step() -> impl Strategy<Value = Step> {
    let minute = 60_000u64;
    let clock = prop_oneof![4 => 0..minute, 2 => 0..20 * minute, 1 => 0..400 * minute];
    let write = ("[kl]{1,3}", any::<bool>())
        .prop_map(|(key, is_put)| if is_put { put(&key) } else { delete(&key) });
    let once = ("[a-e]", 0u64..12, 0u64..12)
        .prop_map(|(client, floor, above)| once(&client, floor + above, floor));
    (clock, once, write, any::<bool>(), any::<bool>()).prop_map(
        |(clock_ms, once, write, refused, restart)| Step {
            clock_ms,
            once,
            write,
            refused,
            restart,
        },
    )
}

/// The same rules, written down without any thought of speed.
#[derive(Default)]
struct Model {
    now: u64,
    /// Name, floor, last write.
    clients: Vec<(String, u64, u64)>,
    /// In log order: when, whose, seq, write, answer.
    answers: Vec<(u64, String, u64, Write, Written)>,
}

impl Model {
    fn step(&mut self, at_ms: u64, step: &Step, answer: &Written, bounds: Bounds) -> Written {
        self.now = self.now.max(at_ms);
        while self.answers.first().is_some_and(|a| self.now - a.0 >= ANSWER_AGE_MAX_MS) {
            self.forget_oldest();
        }
        let (name, seq) = (step.once.client().as_str(), step.once.seq());
        if !self.clients.iter().any(|client| client.0 == name) {
            if self.clients.len() >= bounds.clients_max {
                self.clients.sort_by(|a, b| (a.2, &a.0).cmp(&(b.2, &b.0)));
                if self.now - self.clients[0].2 < CLIENT_IDLE_MIN_MS {
                    return Written::TooManyClients;
                }
                self.clients.remove(0);
            }
            self.clients.push((name.to_owned(), 0, 0));
        }
        self.raise(name, step.once.floor());
        let client = self.clients.iter_mut().find(|client| client.0 == name).unwrap();
        client.2 = self.now;
        if seq < client.1 {
            return Written::OnceForgotten;
        }
        if let Some(known) = self.answers.iter().find(|a| a.1 == name && a.2 == seq) {
            let same = known.3.key == step.write.key && known.3.action == step.write.action;
            return if same { known.4.clone() } else { Written::OnceReused };
        }
        let new = (self.now, name.to_owned(), seq, step.write.clone(), answer.clone());
        self.answers.push(new);
        let key_bytes = |model: &Self| model.answers.iter().map(|a| a.3.key.len()).sum::<usize>();
        while self.answers.len() > bounds.answers_max || key_bytes(self) > bounds.key_bytes_max {
            self.forget_oldest();
        }
        answer.clone()
    }

    fn forget_oldest(&mut self) {
        let (_, name, seq, ..) = self.answers[0].clone();
        self.raise(&name, seq + 1);
    }

    fn raise(&mut self, name: &str, floor: u64) {
        let client = self.clients.iter_mut().find(|client| client.0 == name).unwrap();
        client.1 = client.1.max(floor);
        let floor = client.1;
        self.answers.retain(|answer| answer.1 != name || answer.2 >= floor);
    }
}

proptest! {
    /// The table answers as the model does, and one that is stored and loaded again on the way stays
    /// equal to one that is not, to the byte.
    #[test]
    fn the_table_is_its_model(steps in vec(any_step(), 1..120)) {
        let bounds = Bounds { answers_max: 6, key_bytes_max: 12, clients_max: 3 };
        let (mut table, mut replica) = (Dedupe::with_bounds(bounds), Dedupe::with_bounds(bounds));
        let mut model = Model::default();
        let mut clock = 0u64;
        for (revision, step) in (1..).zip(&steps) {
            // Also backwards now and then.
            clock = if step.restart { clock / 2 } else { clock + step.clock_ms };
            let answer = match (step.refused, &step.write.action) {
                (true, _) => Written::ConditionFailed { current: Some(revision) },
                (false, Action::Put(_)) => wrote(revision),
                (false, Action::Delete) => Written::Deleted { revision, deleted: true },
            };
            if step.restart {
                replica = reloaded(&replica);
            }
            table.advance(clock, &gone);
            replica.advance(clock, &gone);
            let expected = model.step(clock, step, &answer, bounds);
            let found = run(&mut table, &step.once, &step.write, answer.clone());
            prop_assert_eq!(&found, &expected);
            prop_assert_eq!(run(&mut replica, &step.once, &step.write, answer), expected);
            prop_assert_eq!(table.live, model.answers.len());
            prop_assert_eq!(replica.encode(), table.encode());
        }
    }

    /// A flipped byte is another table, which encodes to the same bytes, or an error.
    #[test]
    fn a_flipped_byte_never_panics(
        steps in vec(any_step(), 1..40), at in any::<usize>(), flip in 1u8..,
    ) {
        let mut table = Dedupe::default();
        for (revision, step) in (1..).zip(&steps) {
            table.advance(step.clock_ms, &gone);
            let answer = Written::ConditionFailed { current: (revision > 9).then_some(revision) };
            run(&mut table, &step.once, &step.write, answer);
        }
        let mut bytes = table.encode().concat();
        let at = at % bytes.len();
        bytes[at] ^= flip;
        if let Ok(other) = decode(vec![bytes.clone().into()]) {
            prop_assert_eq!(other.encode().concat(), bytes);
        }
    }
}

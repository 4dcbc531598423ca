//! The heads of requests, judged before hyper sees them.
//!
//! hyper parses well, but keeps two things from us. It drops an unescaped `#` and what follows it from a
//! path, as if it were a fragment: a write to `a#b` would overwrite `a`. And what it refuses it answers
//! itself, without a body, where our clients expect to read why. So a [`Gate`] between socket and hyper
//! holds a head back until it is whole, and hands it on if hyper will take it and understand the same;
//! otherwise it pretends that the connection ends, and leaves the answer to be written behind hyper's.
//!
//! To find the next head it must know where a body ends, and hyper must think the same of it. So what
//! could be read in two ways is refused: two lengths, a length with chunks, another coding than `chunked`,
//! chunks ([`chunks`]) that are not exactly as they should be.
//!
//! Most requests need none of this: they are whole after one read, and [`plain`] understands them without
//! doubt. [`Gate::whole`] gives them out before hyper comes into play at all.

mod chunks;
mod plain;

use bytes::{Buf, Bytes, BytesMut};
use http::header;

use super::error::ApiError;
use chunks::Chunks;
pub(super) use plain::{BATCH_PATH, KV_PREFIX, PlainRequest};

/// The longest head, in bytes: the longest path that the `http` crate takes (64 KiB), and 16 KiB.
pub(super) const HEAD_BYTES_MAX: usize = 80 << 10;

/// The longest path, in bytes: what the `http` crate takes.
const PATH_BYTES_MAX: usize = u16::MAX as usize - 1;

/// The most header fields of a request: hyper's bound.
const FIELDS_MAX: usize = 100;

/// The longest name of one, in bytes: what the `http` crate takes.
const FIELD_NAME_BYTES_MAX: usize = u16::MAX as usize;

/// How much is read at once while a head is not complete; most are shorter.
pub(super) const HEAD_BUFFER_BYTES: usize = 4 << 10;

/// The most that a connection keeps for its next request: idle ones are many, and count nowhere else. Larger
/// than what requests with small values take.
const BUFFER_KEPT_BYTES: usize = 16 << 10;

/// Judges what a client sends. Pure: it is given bytes, and asked what may go on to hyper.
#[derive(Debug, Default)]
pub(super) struct Gate {
    /// What came and was not handed on yet.
    received: BytesMut,
    /// So much of it may be.
    cleared: usize,
    search: Search,
    /// With a head of a plain request that lacks a part of its body: how long it is with it.
    awaited: Option<usize>,
    state: State,
}

#[derive(Debug, Default)]
enum State {
    /// Between two requests, or in a head.
    #[default]
    Head,
    /// In a body with so many bytes to come that were not cleared yet.
    Length(u64),
    /// In a body of chunks.
    Chunks(Chunks),
    /// Nothing goes on any more.
    Refused,
}

/// What a reader may do next.
#[derive(Debug, PartialEq)]
pub(super) enum Next {
    /// Take so many of the received bytes, with [`Gate::take`].
    Received(usize),
    /// Read up to so many bytes from the socket, past the gate. Then [`Gate::passed`].
    Direct(u64),
    /// [`Gate::receive`] more: what is here cannot be judged yet.
    More,
    /// The connection ends for hyper.
    End,
}

/// What there is for the short way.
#[derive(Debug, PartialEq)]
pub(super) enum Whole {
    /// A request, taken out of what was received.
    Request(Box<PlainRequest>),
    /// None yet, and [`Gate::inbox`] takes more.
    More,
    /// Something else, for hyper. It stays where it is.
    Other,
}

impl Gate {
    /// Where what comes goes, after [`Next::More`] or [`Whole::More`].
    pub(super) fn inbox(&mut self) -> &mut BytesMut {
        self.received.reserve(HEAD_BUFFER_BYTES);
        &mut self.received
    }

    /// The next request, if it is plain and all of it was received. Not once [`Self::next`] was called.
    pub(super) fn whole(&mut self) -> Whole {
        if self.awaited.is_some_and(|length| self.received.len() < length) {
            return Whole::More;
        }
        let end = match self.search.end_in(&self.received) {
            Some(end) if end <= HEAD_BYTES_MAX => end,
            None if self.received.len() < HEAD_BYTES_MAX => return Whole::More,
            _ => return self.other(),
        };
        let Some((mut request, body_bytes)) = plain::parse(&self.received[..end]) else {
            return self.other();
        };
        self.search = Search::default();
        let length = end + body_bytes;
        self.awaited = (self.received.len() < length).then_some(length);
        if self.awaited.is_some() {
            return Whole::More;
        }
        request.body = Bytes::copy_from_slice(&self.received[end..length]);
        self.received.advance(length);
        self.release();
        Whole::Request(Box::new(request))
    }

    /// Lets go of the memory that a large request took, once all of it was handed on. Asked of the whole
    /// allocation: what is left behind the last request may be little of it.
    fn release(&mut self) {
        if self.received.is_empty() && self.received.try_reclaim(BUFFER_KEPT_BYTES + 1) {
            self.received = BytesMut::new();
        }
    }

    fn other(&mut self) -> Whole {
        self.search = Search::default();
        Whole::Other
    }

    /// Whether the head of a plain request is there, and a part of its body is not.
    pub(super) fn lacks_body(&self) -> bool {
        self.awaited.is_some()
    }

    /// Whether nothing was received that was not handed on.
    pub(super) fn is_empty(&self) -> bool {
        self.received.is_empty()
    }

    /// What to do next. An error is said once, between two requests: its answer is the caller's to write.
    pub(super) fn next(&mut self) -> Result<Next, ApiError> {
        loop {
            if self.cleared > 0 {
                return Ok(Next::Received(self.cleared));
            }
            let empty = self.received.is_empty();
            match &mut self.state {
                State::Refused => return Ok(Next::End),
                State::Length(0) => self.state = State::Head,
                State::Length(left) if empty => return Ok(Next::Direct(*left)),
                State::Length(left) => {
                    self.cleared = clamp(*left).min(self.received.len());
                    *left -= self.cleared as u64;
                }
                State::Chunks(chunks) if empty => {
                    return Ok(chunks.data_left().map_or(Next::More, Next::Direct));
                }
                State::Chunks(chunks) => match chunks.scan(&self.received) {
                    Some(count) => {
                        self.cleared = count;
                        if chunks.ended() {
                            self.state = State::Head;
                        }
                    }
                    // In the middle of a request: hyper sees its body end early, and says so.
                    None => self.refuse(),
                },
                State::Head => match self.search.end_in(&self.received) {
                    Some(length) if length <= HEAD_BYTES_MAX => self.judge(length)?,
                    None if self.received.len() < HEAD_BYTES_MAX => return Ok(Next::More),
                    _ => {
                        let error = too_long(&self.received);
                        self.refuse();
                        return Err(error);
                    }
                },
            }
        }
    }

    fn judge(&mut self, length: usize) -> Result<(), ApiError> {
        self.search = Search::default();
        match body_of(&self.received[..length]) {
            Ok(body) => {
                self.state = body;
                self.cleared = length;
                Ok(())
            }
            Err(error) => {
                self.refuse();
                Err(error)
            }
        }
    }

    fn refuse(&mut self) {
        self.state = State::Refused;
        self.received = BytesMut::new();
    }

    /// Hands received bytes on, as many as `out` holds: no more than [`Next::Received`] said.
    pub(super) fn take(&mut self, out: &mut [u8]) {
        self.received.copy_to_slice(out);
        self.cleared -= out.len();
        self.release();
    }

    /// So many bytes went on directly.
    pub(super) fn passed(&mut self, bytes: usize) {
        match &mut self.state {
            State::Length(left) => *left -= bytes as u64,
            State::Chunks(chunks) => chunks.passed(bytes as u64),
            State::Head | State::Refused => {}
        }
    }

    /// Whether the client may still be sending what nobody will read once the connection ends here.
    pub(super) fn unfinished(&self) -> bool {
        !matches!(self.state, State::Head | State::Length(0))
    }

    /// Whether the client has to send more of the request that hyper is reading.
    pub(super) fn awaits_body(&self) -> bool {
        self.cleared == 0 && matches!(self.state, State::Length(1..) | State::Chunks(_))
    }
}

fn clamp(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

/// The search for the end of a head; goes on where it stopped when more has come. Lines end as hyper's
/// parser wants them to: with or without a carriage return. Empty lines before a head belong to it.
#[derive(Debug, Default)]
struct Search {
    /// Where the line begins that is looked at, and how far it was looked at.
    line: usize,
    at: usize,
    /// There was a line that is not empty.
    began: bool,
}

impl Search {
    /// The length of the head at the start of `bytes`, the empty line at its end included.
    fn end_in(&mut self, bytes: &[u8]) -> Option<usize> {
        while let Some(end) = bytes[self.at..].iter().position(|byte| *byte == b'\n') {
            let next = self.at + end + 1;
            let empty = matches!(&bytes[self.line..next], b"\n" | b"\r\n");
            if empty && self.began {
                return Some(next);
            }
            self.began |= !empty;
            (self.line, self.at) = (next, next);
        }
        self.at = bytes.len();
        None
    }
}

fn too_long(bytes: &[u8]) -> ApiError {
    let first_line = bytes.split(|byte| *byte == b'\n').find(|line| !matches!(line, [] | [b'\r']));
    let what = match first_line {
        Some(line) if line.len() > PATH_BYTES_MAX => return path_too_long(),
        _ => "header",
    };
    ApiError::TooLarge { what, max: HEAD_BYTES_MAX }
}

fn path_too_long() -> ApiError {
    ApiError::TooLarge { what: "path", max: PATH_BYTES_MAX }
}

/// Checks a whole head as hyper will, and more strictly; finds what it says about its body.
fn body_of(head: &[u8]) -> Result<State, ApiError> {
    let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let mut request = httparse::Request::new(&mut fields);
    match request.parse(head) {
        Ok(httparse::Status::Complete(length)) if length == head.len() => {}
        Ok(_) => return Err(bad("the request's head is malformed")),
        Err(httparse::Error::TooManyHeaders) => {
            return Err(ApiError::TooLarge { what: "number of header fields", max: FIELDS_MAX });
        }
        Err(error) => return Err(bad(&format!("the request is no HTTP/1.1: {error}"))),
    }
    let path = request.path.unwrap_or_default();
    if path.len() > PATH_BYTES_MAX {
        return Err(path_too_long());
    }
    if path.contains('#') {
        return Err(bad("the path holds an unescaped `#`; write `%23`"));
    }
    if path.parse::<http::Uri>().is_err() {
        return Err(bad("the path is malformed; percent-encode what is not plain ASCII"));
    }
    if request.headers.iter().any(|field| field.name.len() > FIELD_NAME_BYTES_MAX) {
        let what = "name of a header field";
        return Err(ApiError::TooLarge { what, max: FIELD_NAME_BYTES_MAX });
    }
    match framing(request.headers)? {
        State::Chunks(_) if request.version == Some(0) => Err(bad("HTTP/1.0 has no chunks")),
        state => Ok(state),
    }
}

fn framing(fields: &[httparse::Header<'_>]) -> Result<State, ApiError> {
    let named = |name: header::HeaderName| {
        fields.iter().filter(move |field| field.name.eq_ignore_ascii_case(name.as_str()))
    };
    let mut lengths = named(header::CONTENT_LENGTH);
    let mut codings = named(header::TRANSFER_ENCODING);
    match (lengths.next(), codings.next()) {
        (None, None) => Ok(State::Length(0)),
        (Some(length), None) if lengths.next().is_none() => decimal(length.value)
            .map(State::Length)
            .ok_or_else(|| bad("Content-Length is not a number of bytes")),
        (None, Some(coding)) if codings.next().is_none() => {
            if coding.value.eq_ignore_ascii_case(b"chunked") {
                return Ok(State::Chunks(Chunks::default()));
            }
            Err(bad("Transfer-Encoding knows only `chunked`"))
        }
        _ => Err(bad("the request says in more than one way how long its body is")),
    }
}

fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    // Far above every limit, and far from where hyper's own arithmetic ends.
    std::str::from_utf8(digits).ok()?.parse().ok().filter(|length| *length <= u64::MAX / 4)
}

fn bad(message: &str) -> ApiError {
    ApiError::BadRequest(message.to_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GET: &str = "GET /v1/kv/k HTTP/1.1\r\nHost: n\r\n\r\n";
    const PUT: &str = "PUT /v1/kv/k HTTP/1.1\nContent-Length: 3\n\nabc";
    const CHUNKED: &str = "PUT /v1/kv/k HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n\
                           3;x=\"#\"\r\n#bc\r\n1f\r\nGET /a#b HTTP/1.1\r\n\r\n----------\r\n\
                           0\r\nTrailer: #\r\n\r\n";

    /// What goes on to hyper when `bytes` come in pieces, and the error at the end, if any.
    fn pass(bytes: &[u8], piece: usize) -> (Vec<u8>, Option<ApiError>) {
        let (mut gate, mut passed, mut rest) = (Gate::default(), Vec::new(), bytes);
        loop {
            match gate.next() {
                Err(error) => return (passed, Some(error)),
                Ok(Next::End) => return (passed, None),
                Ok(Next::Received(count)) => {
                    let mut out = vec![0; count.min(piece)];
                    gate.take(&mut out);
                    passed.extend(out);
                }
                Ok(_) if rest.is_empty() => return (passed, None),
                Ok(Next::Direct(max)) => {
                    let count = clamp(max).min(piece).min(rest.len());
                    passed.extend(&rest[..count]);
                    gate.passed(count);
                    rest = &rest[count..];
                }
                Ok(Next::More) => {
                    let count = piece.min(rest.len());
                    gate.inbox().extend_from_slice(&rest[..count]);
                    rest = &rest[count..];
                }
            }
        }
    }

    /// What a connection holds on to while it is idle does not depend on its largest request, be that plain
    /// or not, however full it made the buffer.
    #[test]
    fn a_large_request_leaves_no_large_buffer_behind() {
        let put =
            format!("PUT /v1/kv/k HTTP/1.1\r\nContent-Length: 60000\r\n\r\n{}", "v".repeat(60_000));
        let other = format!("GET /v1/ring HTTP/1.1\r\nCookie: {}\r\n\r\n", "c".repeat(60_000));
        for spare in [0, 1 << 17] {
            let mut gate = Gate { received: BytesMut::with_capacity(put.len()), ..Gate::default() };
            gate.received.reserve(put.len() + spare);
            gate.received.extend_from_slice(put.as_bytes());
            assert!(matches!(gate.whole(), Whole::Request(_)));
            assert!(allocated(&mut gate) <= BUFFER_KEPT_BYTES, "spare: {spare}");

            gate.received.reserve(other.len() + spare);
            gate.received.extend_from_slice(other.as_bytes());
            while let Ok(Next::Received(count)) = gate.next() {
                gate.take(&mut vec![0; count.min(4096)]);
            }
            assert!(allocated(&mut gate) <= BUFFER_KEPT_BYTES, "spare: {spare}");
        }
        // Small ones go on using what is there.
        let mut gate = Gate::default();
        gate.inbox().extend_from_slice(GET.as_bytes());
        let at = gate.received.as_ptr();
        assert!(matches!(gate.whole(), Whole::Request(_)));
        gate.inbox().extend_from_slice(GET.as_bytes());
        assert!(
            (0..HEAD_BUFFER_BYTES).any(|offset| at.wrapping_add(offset) == gate.received.as_ptr())
        );
    }

    /// The size of the memory behind the empty buffer.
    fn allocated(gate: &mut Gate) -> usize {
        assert!(gate.received.is_empty());
        (0..20)
            .map(|power| 1 << power)
            .take_while(|bytes| gate.received.try_reclaim(*bytes))
            .last()
            .unwrap_or(0)
    }

    fn refusal(bytes: &[u8]) -> ApiError {
        let (_, error) = pass(bytes, 7);
        error.unwrap_or_else(|| panic!("{:?} went through", String::from_utf8_lossy(bytes)))
    }

    /// What the short way takes of `bytes` when they come in pieces, and what is left for hyper.
    fn take_whole(bytes: &[u8], piece: usize) -> (Vec<PlainRequest>, Vec<u8>) {
        let (mut gate, mut requests, mut rest) = (Gate::default(), Vec::new(), bytes);
        loop {
            match gate.whole() {
                Whole::Request(request) => requests.push(*request),
                Whole::More if !rest.is_empty() => {
                    let count = piece.min(rest.len());
                    gate.inbox().extend_from_slice(&rest[..count]);
                    rest = &rest[count..];
                }
                Whole::More | Whole::Other => {
                    let mut left = vec![0; gate.received.len()];
                    gate.received.copy_to_slice(&mut left);
                    left.extend(rest);
                    return (requests, left);
                }
            }
        }
    }

    proptest! {
        /// Plain requests are taken whole, however they arrive, and the first other one goes to hyper
        /// untouched, with all that is behind it.
        #[test]
        fn plain_requests_are_taken_until_another_comes(
            before in prop::collection::vec(0..2usize, 0..5), other in any::<bool>(), piece in 1usize..90,
        ) {
            let mut bytes: String = before.iter().map(|at| [GET, PUT][*at]).collect();
            let behind = if other { format!("{CHUNKED}{GET}") } else { String::new() };
            bytes.push_str(&behind);
            let (requests, left) = take_whole(bytes.as_bytes(), piece);
            let bodies: Vec<_> = requests.iter().map(|request| &request.body[..]).collect();
            let expected: Vec<_> = before.iter().map(|at| [&b""[..], b"abc"][*at]).collect();
            prop_assert_eq!(bodies, expected);
            prop_assert_eq!(left, behind.into_bytes());
        }

        /// Requests go on as they came, however they arrive, pipelined or not.
        #[test]
        fn sound_requests_go_on_unchanged(
            which in prop::collection::vec(0..3usize, 1..6), piece in 1usize..90,
        ) {
            let bytes: String = which.iter().map(|at| [GET, PUT, CHUNKED][*at]).collect();
            prop_assert_eq!(pass(bytes.as_bytes(), piece), (bytes.into_bytes(), None));
        }

        /// A `#` is found in every request of a connection, and nowhere but in a path.
        #[test]
        fn a_fragment_is_found_behind_other_requests(before in 0usize..4, piece in 1usize..90) {
            let body = "PUT /v1/kv/k HTTP/1.1\r\nContent-Length: 25\r\n\r\nGET /a#b HTTP/1.1\r\n\r\n####";
            let sound = format!("{body}{CHUNKED}").repeat(before);
            let bytes = format!("{sound}PUT /v1/kv/a#b HTTP/1.1\r\nContent-Length: 0\r\n\r\n");
            let (passed, error) = pass(bytes.as_bytes(), piece);
            prop_assert_eq!(passed, sound.into_bytes());
            prop_assert!(matches!(error, Some(ApiError::BadRequest(_))));
        }

        #[test]
        fn any_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), piece in 1usize..90) {
            pass(&bytes, piece);
        }
    }

    #[test]
    fn empty_lines_before_a_request_are_part_of_its_head() {
        let head_len = |bytes: &[u8]| Search::default().end_in(bytes);
        assert_eq!(head_len(b"\r\n\nGET / HTTP/1.1\r\n\r\nx"), Some(21));
        assert_eq!(head_len(b"GET / HTTP/1.1\n\nx"), Some(16));
        assert_eq!(head_len(b"GET / HTTP/1.1\r\nA: b\r\n\r"), None);
        assert_eq!(head_len(b"\r\n\r\n\r\n"), None);
    }

    #[test]
    fn what_can_be_read_in_two_ways_is_refused() {
        for fields in [
            "Content-Length: 3\r\nContent-Length: 4",
            "Content-Length: 3\r\nContent-Length: 3",
            "Content-Length: 3\r\nTransfer-Encoding: chunked",
            "Transfer-Encoding: gzip, chunked",
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
            "Content-Length: +3",
            "Content-Length: 3, 3",
            "Content-Length: 0x3",
            "Content-Length:",
            "Content-Length: 18446744073709551615",
        ] {
            let request = format!("PUT /v1/kv/k HTTP/1.1\r\n{fields}\r\n\r\nabc");
            assert!(matches!(refusal(request.as_bytes()), ApiError::BadRequest(_)), "{fields}");
        }
    }

    /// Behind chunks that hyper might read in another way, nothing goes on.
    #[test]
    fn malformed_chunks_end_the_connection() {
        for chunks in [
            "3\nabc\r\n0\r\n\r\n",
            "3\r\nabcd\r\n0\r\n\r\n",
            "3\r\nabc\n0\r\n\r\n",
            "\r\nabc\r\n0\r\n\r\n",
            "-3\r\nabc\r\n0\r\n\r\n",
            "0x3\r\nabc\r\n0\r\n\r\n",
            "3 \r\nabc\r\n0\r\n\r\n",
            "3;a\nb\r\nabc\r\n0\r\n\r\n",
            "10000000000000000\r\nabc\r\n0\r\n\r\n",
            "3\r\nabc\r\n0\r\n\rx",
        ] {
            let head = "PUT /v1/kv/k HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n";
            for piece in [1, 2, 50] {
                let (passed, _) = pass(format!("{head}{chunks}{GET}").as_bytes(), piece);
                let passed = String::from_utf8(passed).unwrap();
                assert!(!passed.contains("GET"), "{chunks:?}: {passed}");
            }
        }
    }

    #[test]
    fn what_is_no_request_is_refused() {
        for request in [
            "GET /a b HTTP/1.1\r\n\r\n",
            "GET / HTTP/2.0\r\n\r\n",
            "GET /\r\n\r\n",
            "\u{16}\u{3}\u{1} client hello\r\n\r\n",
            "GET / HTTP/1.1\r\nno colon\r\n\r\n",
            "GET / HTTP/1.1\r\nA : b\r\n\r\n",
        ] {
            assert!(matches!(refusal(request.as_bytes()), ApiError::BadRequest(_)), "{request}");
        }
    }

    #[test]
    fn what_is_too_long_is_told_apart() {
        let long = "k".repeat(PATH_BYTES_MAX);
        let path = format!("GET /{long} HTTP/1.1\r\n\r\n");
        assert_eq!(refusal(path.as_bytes()), path_too_long());
        let endless = format!("GET /{long}{long}");
        assert_eq!(refusal(endless.as_bytes()), path_too_long());
        let field = format!("GET / HTTP/1.1\r\nA: {long}{long}");
        assert!(matches!(refusal(field.as_bytes()), ApiError::TooLarge { what: "header", .. }));
        let fields = format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(FIELDS_MAX + 1));
        assert!(matches!(refusal(fields.as_bytes()), ApiError::TooLarge { .. }));
    }
}

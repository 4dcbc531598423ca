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
#[cfg(test)]
mod tests;

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

/// Why nothing more goes on. Its answer is the caller's to write.
#[derive(Debug, PartialEq)]
pub(super) struct Refusal {
    pub error: ApiError,
    /// It is a `HEAD` that is refused: the answer ends with its head (RFC 9110, 9.3.2).
    pub of_head: bool,
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

    /// Whether a head has begun that was not handed on. Empty lines before it, which old clients send behind a
    /// body (RFC 9112, 2.2), are none of it.
    pub(super) fn has_begun(&self) -> bool {
        self.received.iter().any(|byte| !matches!(byte, b'\r' | b'\n'))
    }

    /// What to do next. A refusal is said once, between two requests.
    pub(super) fn next(&mut self) -> Result<Next, Refusal> {
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
                        return Err(self.refusal(too_long(&self.received)));
                    }
                },
            }
        }
    }

    fn judge(&mut self, length: usize) -> Result<(), Refusal> {
        self.search = Search::default();
        match body_of(&self.received[..length]) {
            Ok(body) => {
                self.state = body;
                self.cleared = length;
                Ok(())
            }
            Err(error) => Err(self.refusal(error)),
        }
    }

    fn refusal(&mut self, error: ApiError) -> Refusal {
        let of_head = first_line(&self.received).is_some_and(|line| line.starts_with(b"HEAD "));
        self.refuse();
        Refusal { error, of_head }
    }

    fn refuse(&mut self) {
        self.state = State::Refused;
        self.received = BytesMut::new();
    }

    /// No more comes of a head that has begun, for this reason. `None` if none has.
    pub(super) fn break_off(&mut self, why: &str) -> Option<Refusal> {
        let in_head = matches!(self.state, State::Head) && self.cleared == 0 && self.has_begun();
        in_head.then(|| self.refusal(bad(why)))
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

/// The first line that is not empty.
fn first_line(bytes: &[u8]) -> Option<&[u8]> {
    bytes.split(|byte| *byte == b'\n').find(|line| !matches!(line, [] | [b'\r']))
}

fn too_long(bytes: &[u8]) -> ApiError {
    let what = match first_line(bytes) {
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
    // Without one, HTTP/1.1 wants a refusal too (RFC 9112, 3.2). But there is one store behind every name, and
    // who writes a request by hand leaves the field out; two of them say that somebody reads the request in
    // another way.
    if request.headers.iter().filter(|field| field.name.eq_ignore_ascii_case("host")).count() > 1 {
        return Err(bad("the request names more than one Host"));
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

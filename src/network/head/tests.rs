//! What goes on to hyper, what is taken whole, and what is refused.

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
            Err(refusal) => return (passed, Some(refusal.error)),
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
    assert!((0..HEAD_BUFFER_BYTES).any(|offset| at.wrapping_add(offset) == gate.received.as_ptr()));
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
        "GET / HTTP/1.1\r\nHost: a\r\nHOST: a\r\n\r\n",
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

/// Whatever is wrong with it, and what empty lines come before it.
#[test]
fn the_refusal_of_a_head_request_is_one() {
    let long = "k".repeat(HEAD_BYTES_MAX);
    for (request, expected) in [
        ("HEAD /v1/kv/a#b HTTP/1.1\r\n\r\n".to_owned(), true),
        ("\r\n\nHEAD /a b HTTP/1.1\r\n\r\n".into(), true),
        (format!("HEAD /{long}"), true),
        ("HEADS /v1/kv/a#b HTTP/1.1\r\n\r\n".into(), false),
        ("GET /v1/kv/a#b HTTP/1.1\r\n\r\n".into(), false),
    ] {
        let mut gate = Gate::default();
        gate.inbox().extend_from_slice(request.as_bytes());
        assert_eq!(gate.next().unwrap_err().of_head, expected, "{request:.40}");
    }
}

/// Only what has begun can break off, and a body is none of it.
#[test]
fn a_head_that_breaks_off_is_refused() {
    let put = "PUT /v1/kv/k HTTP/1.1\r\nContent-Length: 3\r\n\r\n";
    for (bytes, expected) in [("", false), ("\r\n", false), (put, false), ("\r\nG", true)] {
        let mut gate = Gate::default();
        gate.inbox().extend_from_slice(bytes.as_bytes());
        while let Next::Received(count) = gate.next().unwrap() {
            gate.take(&mut vec![0; count]);
        }
        assert_eq!(gate.break_off("it broke off").is_some(), expected, "{bytes:?}");
        assert_eq!(gate.next() == Ok(Next::End), expected, "{bytes:?}");
    }
}

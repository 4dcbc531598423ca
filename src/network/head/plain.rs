//! The head of a request that can take the short way ([`crate::network::connection`]): one on a key, on a
//! batch, or a `GET` of anything, as almost all of them are, in which nothing has to be weighed.
//!
//! Whatever is not plain in this sense is not refused: it goes to the gate and to hyper. So this knows
//! only what is understood without doubt, and lets everything else be.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method};

use super::decimal;

/// Requests on a key, and on many.
pub(in crate::network) const KV_PREFIX: &str = "/v1/kv/";
pub(in crate::network) const BATCH_PATH: &str = "/v1/batch";

/// The most header fields; browsers and proxies may send more.
const FIELDS_MAX: usize = 24;

/// The longest path with its query, in bytes: much longer ones have limits of their own.
const TARGET_BYTES_MAX: usize = 8 << 10;

/// The longest body that waits in memory until it is whole, in bytes: less than hyper keeps of one.
const BODY_BYTES_MAX: u64 = 64 << 10;

/// Fields that change nothing about what is said of a key, whatever they say.
const MEANINGLESS: [&str; 5] =
    ["host", "user-agent", "accept", "accept-encoding", "accept-language"];

/// Fields about the connection, or about how the body comes: hyper's to handle.
const HOP_BY_HOP: [&str; 5] = ["transfer-encoding", "expect", "te", "trailer", "proxy-connection"];

/// An offer to go on in another protocol, which a server may pass over (RFC 9110, 7.8). curl and Java's client
/// make one with requests that are plain otherwise.
const OFFERS: [&str; 2] = ["upgrade", "http2-settings"];

/// A whole request.
#[derive(Debug, PartialEq)]
pub(in crate::network) struct PlainRequest {
    /// `GET` of anything, `PUT` or `DELETE` of a key, `POST` of a batch.
    pub method: Method,
    /// As it came.
    pub path: String,
    /// As it came, without the `?`.
    pub query: Option<String>,
    /// All that may mean something.
    pub headers: HeaderMap,
    /// In an allocation of its own.
    pub body: Bytes,
}

/// Reads a head; also says how long the body behind it is. `None` when the request is not plain.
pub(super) fn parse(head: &[u8]) -> Option<(PlainRequest, usize)> {
    let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let mut request = httparse::Request::new(&mut fields);
    let Ok(httparse::Status::Complete(length)) = request.parse(head) else { return None };
    if length != head.len() || request.version != Some(1) {
        return None;
    }
    let target = request.path?;
    if target.len() > TARGET_BYTES_MAX || !target.bytes().all(is_plain) {
        return None;
    }
    let (path, query) = match target.split_once('?') {
        Some((path, query)) => (path, Some(query.to_owned())),
        None => (target, None),
    };
    let method = match request.method? {
        "GET" => Method::GET,
        "PUT" => Method::PUT,
        "DELETE" => Method::DELETE,
        "POST" => Method::POST,
        _ => return None,
    };
    let on_keys = match method {
        Method::POST => path == BATCH_PATH,
        _ => path.starts_with(KV_PREFIX),
    };
    // A client asks for the ring on the connection that it then uses for keys.
    if !(on_keys || method == Method::GET && path.starts_with('/')) {
        return None;
    }
    let meaningless = if on_keys { &MEANINGLESS[..] } else { &[] };
    let (headers, body_bytes) = read_fields(request.headers, meaningless)?;
    if body_bytes > 0 && matches!(method, Method::GET | Method::DELETE) {
        return None;
    }
    let path = path.to_owned();
    Some((PlainRequest { method, path, query, headers, body: Bytes::new() }, body_bytes))
}

/// Characters that every reader of URLs takes for themselves.
fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~%!$&'()*+,;=:@/?".contains(&byte)
}

fn read_fields(
    fields: &[httparse::Header<'_>],
    meaningless: &[&str],
) -> Option<(HeaderMap, usize)> {
    let (mut headers, mut length, mut has_host) = (HeaderMap::new(), None, false);
    for field in fields {
        let named = |name: &&str| field.name.eq_ignore_ascii_case(name);
        if named(&"host") && std::mem::replace(&mut has_host, true) {
            return None;
        }
        if meaningless.iter().any(&named) {
            continue;
        }
        if HOP_BY_HOP.iter().any(&named) {
            return None;
        }
        if OFFERS.iter().any(&named) {
            continue;
        }
        if named(&"connection") {
            if !goes_on(field.value) {
                return None;
            }
        } else if named(&"content-length") {
            let bytes = decimal(field.value).filter(|bytes| *bytes <= BODY_BYTES_MAX)?;
            if length.replace(bytes).is_some() {
                return None;
            }
        } else {
            let name = HeaderName::from_bytes(field.name.as_bytes()).ok()?;
            headers.append(name, HeaderValue::from_bytes(field.value).ok()?);
        }
    }
    // At most BODY_BYTES_MAX, as just checked.
    Some((headers, length.unwrap_or(0) as usize))
}

/// Whether a `Connection` field asks for nothing but what happens anyway.
fn goes_on(options: &[u8]) -> bool {
    options.split(|byte| *byte == b',').map(<[u8]>::trim_ascii).all(|option| {
        let is = |name: &&str| option.eq_ignore_ascii_case(name.as_bytes());
        is(&"keep-alive") || OFFERS.iter().any(is)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(head: &str) -> Option<(PlainRequest, usize)> {
        parse(head.replace('\n', "\r\n").as_bytes())
    }

    #[test]
    fn what_clients_usually_send_is_plain() {
        let head = "PUT /v1/kv/a%20b HTTP/1.1\nHost: n:1\nUser-Agent: curl/7.88.1\nAccept: */*\n\
                    Connection: keep-alive\nIf-Match: \"7\"\nContent-Length: 3\n\n";
        let (request, body_bytes) = plain(head).unwrap();
        assert_eq!((request.method, &*request.path, body_bytes), (Method::PUT, "/v1/kv/a%20b", 3));
        assert_eq!(request.headers.len(), 1);
        assert_eq!(request.headers["if-match"], "\"7\"");
        let (request, _) = plain("GET /v1/kv/k?consistency=stale HTTP/1.1\n\n").unwrap();
        assert_eq!(request.query.as_deref(), Some("consistency=stale"));
        assert!(plain("POST /v1/batch HTTP/1.1\nContent-Length: 65536\n\n").is_some());
        let (request, _) = plain("GET /metrics HTTP/1.1\nAccept: text/plain\n\n").unwrap();
        assert_eq!(request.headers["accept"], "text/plain");
    }

    /// As `curl --http2` and Java's client ask.
    #[test]
    fn an_offer_of_another_protocol_is_passed_over() {
        let offer = "Connection: Upgrade, HTTP2-Settings\nUpgrade: h2c\nHTTP2-Settings: AAEAAEAA\n";
        for path in ["/v1/kv/k", "/v1/ring"] {
            let (request, _) = plain(&format!("GET {path} HTTP/1.1\n{offer}\n")).unwrap();
            assert!(request.headers.is_empty(), "{:?}", request.headers);
        }
    }

    /// A field that is given twice stays twice: whether that is allowed is said elsewhere.
    #[test]
    fn no_field_that_may_matter_is_lost() {
        let (request, _) = plain("GET /v1/kv/k HTTP/1.1\nKv-Read: a\nKv-Read: b\n\n").unwrap();
        assert_eq!(request.headers.get_all("kv-read").iter().count(), 2);
    }

    #[test]
    fn whatever_has_to_be_weighed_is_not_plain() {
        for head in [
            "GET /v1/kv/k HTTP/1.0\n\n",
            "HEAD /v1/kv/k HTTP/1.1\n\n",
            "PUT /livez HTTP/1.1\n\n",
            "OPTIONS * HTTP/1.1\n\n",
            "POST /v1/kv/k HTTP/1.1\n\n",
            "GET /v1/kv/a#b HTTP/1.1\n\n",
            "GET /v1/kv/a\"b HTTP/1.1\n\n",
            "GET http://n/v1/kv/k HTTP/1.1\n\n",
            "GET /v1/kv/k HTTP/1.1\nContent-Length: 1\n\n",
            "PUT /v1/kv/k HTTP/1.1\nContent-Length: 1\nContent-Length: 1\n\n",
            "PUT /v1/kv/k HTTP/1.1\nContent-Length: +1\n\n",
            "PUT /v1/kv/k HTTP/1.1\nContent-Length: 65537\n\n",
            "PUT /v1/kv/k HTTP/1.1\nTransfer-Encoding: chunked\n\n",
            "PUT /v1/kv/k HTTP/1.1\nExpect: 100-continue\nContent-Length: 1\n\n",
            "GET /v1/kv/k HTTP/1.1\nConnection: close\n\n",
            "GET /v1/kv/k HTTP/1.1\nConnection: keep-alive, close\n\n",
            "GET /v1/kv/k HTTP/1.1\nConnection: Upgrade, Kv-Read\nUpgrade: h2c\n\n",
            "GET /v1/kv/k HTTP/1.1\nHost: n\nhost: n\n\n",
            "GET /v1/ring HTTP/1.1\nHost: n\nHost: m\n\n",
            "GET /v1/kv/k HTTP/1.1\nno colon\n\n",
        ] {
            assert_eq!(plain(head), None, "{head}");
        }
        let long = "k".repeat(TARGET_BYTES_MAX);
        assert_eq!(plain(&format!("GET /v1/kv/{long} HTTP/1.1\n\n")), None);
        assert_eq!(plain("GET /v1/kv/\u{e9} HTTP/1.1\n\n"), None);
    }
}

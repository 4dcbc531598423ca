//! A request's head, decoded strictly: what every route needs before it looks at its body.
//!
//! Headers and query parameters that would change what a request does are either understood or
//! refused with 400. Guessing is not an option here: a condition that is skipped because of its form
//! is a lost update.

use std::time::Duration;

use axum::extract::FromRequestParts;
use bytes::Bytes;
use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use super::api::ApiState;
use super::body::{BodyLimit, BodySlot, ReadBody};
use super::error::ApiError;
use super::head::PlainRequest;
use crate::app::Consistency;
use crate::once::{ClientFloor, Once};
use crate::types::{Condition, Revision};

/// How often a request was passed on so far.
pub const HOPS: HeaderName = HeaderName::from_static("kv-hops");
/// How much of its time a request that is passed on has left, in milliseconds.
pub const DEADLINE_MS: HeaderName = HeaderName::from_static("kv-deadline-ms");
/// `direct`: say where to go instead of passing the request on.
pub const ROUTING: HeaderName = HeaderName::from_static("kv-routing");
/// `follower`: a follower may answer a linearizable read.
pub const READ: HeaderName = HeaderName::from_static("kv-read");
/// `CLIENT/SEQ`: the write happens at most once, however often it is asked for.
pub const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// Goes with [`IDEMPOTENCY_KEY`]: the sequence below which the client has all its answers.
pub const CLIENT_FLOOR: HeaderName = HeaderName::from_static("kv-client-floor");

/// How often a request may be passed on: to an old owner, to the right cluster, to its leader.
pub const HOPS_MAX: u8 = 3;

/// What to do with a request that another node has to answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Routing {
    /// Pass it on and relay the answer.
    PassOn,
    /// Say where to go.
    Direct,
}

/// A request without its body, which waits in its slot.
#[derive(Debug)]
pub struct Call {
    /// The method.
    pub method: Method,
    /// The path as it came, undecoded.
    pub path: String,
    /// The query as it came, without the `?`.
    pub query: Option<String>,
    /// All headers.
    pub headers: HeaderMap,
    /// When the client's patience or ours ends.
    pub deadline: Instant,
    /// How often the request was passed on before it came here.
    pub hops: u8,
    /// Whether it may be passed on again.
    pub routing: Routing,
    body: BodySlot,
}

impl FromRequestParts<ApiState> for Call {
    type Rejection = ApiError;

    async fn from_request_parts(
        parts: &mut Parts,
        state: &ApiState,
    ) -> Result<Self, Self::Rejection> {
        let own_timeout = Duration::from_millis(state.app.limits().request_timeout_ms);
        Self::decode(parts, own_timeout)
    }
}

impl Call {
    fn decode(parts: &mut Parts, own_timeout: Duration) -> Result<Self, ApiError> {
        let request = PlainRequest {
            method: parts.method.clone(),
            path: parts.uri.path().to_owned(),
            query: parts.uri.query().map(str::to_owned),
            headers: std::mem::take(&mut parts.headers),
            body: Bytes::new(),
        };
        let slot = parts.extensions.remove::<BodySlot>().unwrap_or_default();
        Self::with_body(request, slot, own_timeout)
    }

    /// Of a request that is here as a whole.
    pub(super) fn plain(
        mut request: PlainRequest,
        own_timeout: Duration,
    ) -> Result<Self, ApiError> {
        let body = std::mem::take(&mut request.body);
        let slot = if body.is_empty() { BodySlot::default() } else { BodySlot::whole(body) };
        Self::with_body(request, slot, own_timeout)
    }

    fn with_body(
        request: PlainRequest,
        body: BodySlot,
        own_timeout: Duration,
    ) -> Result<Self, ApiError> {
        let PlainRequest { method, path, query, headers, .. } = request;
        let timeout = match number(&headers, &DEADLINE_MS)? {
            Some(left_ms) => Duration::from_millis(left_ms).min(own_timeout),
            None => own_timeout,
        };
        let hops = number(&headers, &HOPS)?.unwrap_or(0);
        if hops > u64::from(HOPS_MAX) {
            return Err(ApiError::TooManyHops { hops: u8::try_from(hops).unwrap_or(u8::MAX) });
        }
        let routing = match single(&headers, &ROUTING)? {
            None => Routing::PassOn,
            Some("direct") => Routing::Direct,
            Some(_) => return Err(bad("Kv-Routing knows only `direct`")),
        };
        Ok(Self {
            method,
            path,
            query,
            headers,
            deadline: Instant::now() + timeout,
            // At most HOPS_MAX, as just checked.
            hops: hops as u8,
            routing,
            body,
        })
    }

    /// A question of this node's own: `GET path`.
    pub(super) fn question(path: &str, deadline: Instant) -> Self {
        Self {
            method: Method::GET,
            path: path.to_owned(),
            query: None,
            headers: HeaderMap::new(),
            deadline,
            hops: 0,
            routing: Routing::PassOn,
            body: BodySlot::default(),
        }
    }

    /// The same request for another body, which whoever passes it on gives by itself.
    pub fn with_content_type(&self, content_type: HeaderValue) -> Self {
        let mut headers = self.headers.clone();
        headers.insert(header::CONTENT_TYPE, content_type);
        Self {
            method: self.method.clone(),
            path: self.path.clone(),
            query: self.query.clone(),
            headers,
            body: BodySlot::default(),
            ..*self
        }
    }

    /// The path and the query as they came.
    pub fn path_and_query(&self) -> String {
        match &self.query {
            Some(query) => format!("{}?{query}", self.path),
            None => self.path.clone(),
        }
    }

    /// Reads the body.
    pub async fn read_body(
        &self,
        state: &ApiState,
        limit: BodyLimit,
    ) -> Result<ReadBody, ApiError> {
        let pace = Duration::from_millis(state.app.limits().header_timeout_ms);
        self.body.read(limit, &state.bodies, self.deadline, pace).await
    }

    /// Reads the body as JSON, whatever its `Content-Type` says; also gives it as it came, to be
    /// passed on.
    pub async fn read_json<T: DeserializeOwned>(
        &self,
        state: &ApiState,
    ) -> Result<(T, ReadBody), ApiError> {
        let bytes_max = state.app.limits().http_body_bytes_max;
        let body = self.read_body(state, BodyLimit { what: "body", bytes_max }).await?;
        let parsed = serde_json::from_slice(&body.bytes)
            .map_err(|error| bad(format!("the body is not the JSON this path takes: {error}")))?;
        Ok((parsed, body))
    }

    /// Refuses a query on a path that takes none. A lone `?` is no parameter.
    pub fn no_query(&self) -> Result<(), ApiError> {
        match self.query.as_deref() {
            None | Some("") => Ok(()),
            Some(_) => Err(bad("this request takes no query parameters")),
        }
    }

    /// What `If-Match` and `If-None-Match` ask of a write.
    pub fn condition(&self) -> Result<Condition, ApiError> {
        let if_match = single(&self.headers, &header::IF_MATCH)?;
        let if_none_match = single(&self.headers, &header::IF_NONE_MATCH)?;
        match (if_match, if_none_match) {
            (None, None) => Ok(Condition::Always),
            (Some(tag), None) => revision(tag).map(Condition::Revision),
            (None, Some("*")) if self.method == Method::PUT => Ok(Condition::Absent),
            (None, Some(_)) => Err(bad("If-None-Match is understood as `*` on PUT only")),
            (Some(_), Some(_)) => Err(bad("If-Match and If-None-Match exclude each other")),
        }
    }

    /// Refuses conditions on a read: answering as if they were not there would be wrong, and no client
    /// of this store needs 304.
    pub fn no_condition(&self) -> Result<(), ApiError> {
        let conditional = [header::IF_MATCH, header::IF_NONE_MATCH];
        if conditional.iter().any(|name| self.headers.contains_key(name)) {
            return Err(bad("If-Match and If-None-Match are not understood here"));
        }
        Ok(())
    }

    /// What `Idempotency-Key` and `Kv-Client-Floor` ask of a write.
    pub fn once(&self) -> Result<Option<Once>, ApiError> {
        let floor = number(&self.headers, &CLIENT_FLOOR)?;
        let Some(key) = single(&self.headers, &IDEMPOTENCY_KEY)? else {
            return match floor {
                None => Ok(None),
                Some(_) => Err(bad("Kv-Client-Floor says nothing without an Idempotency-Key")),
            };
        };
        let (client, seq) = key
            .split_once('/')
            .and_then(|(client, seq)| Some((client, canonical(seq)?)))
            .ok_or_else(|| {
                bad("Idempotency-Key is understood as CLIENT/SEQ, SEQ a number, only")
            })?;
        let client = client.parse().map_err(|error| bad(format!("Idempotency-Key: {error}")))?;
        let client = ClientFloor { client, floor: floor.unwrap_or(0) };
        let once = Once::new(client, seq);
        once.map(Some).map_err(|error| bad(format!("Idempotency-Key and Kv-Client-Floor: {error}")))
    }

    /// Refuses what promises "at most once" where it is not understood: ignoring it would break that
    /// promise.
    pub fn no_once(&self) -> Result<(), ApiError> {
        for name in [&IDEMPOTENCY_KEY, &CLIENT_FLOOR] {
            if self.headers.contains_key(name) {
                return Err(bad(format!("the header {name} is not understood here")));
            }
        }
        Ok(())
    }

    /// Refuses all that is said of writes only.
    pub fn no_terms(&self) -> Result<(), ApiError> {
        self.no_condition()?;
        self.no_once()
    }

    /// How fresh a read has to be: the query's `consistency` and the header `Kv-Read`. A stale read is
    /// any node's to answer, so `Kv-Read` adds nothing to it.
    pub fn consistency(&self) -> Result<Consistency, ApiError> {
        let linearizable = match single(&self.headers, &READ)? {
            None => Consistency::Linearizable,
            Some("follower") => Consistency::LinearizableOnFollower,
            Some(_) => return Err(bad("Kv-Read knows only `follower`")),
        };
        match self.query.as_deref() {
            None | Some("" | "consistency=linearizable") => Ok(linearizable),
            Some("consistency=stale") => Ok(Consistency::Stale),
            Some(_) => Err(bad(
                "the query may be `consistency=linearizable` or `consistency=stale` and nothing else",
            )),
        }
    }
}

fn bad(message: impl Into<String>) -> ApiError {
    ApiError::BadRequest(message.into())
}

/// A header's value; an error when it comes twice or is not text.
fn single<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<Option<&'a str>, ApiError> {
    let mut values = headers.get_all(name).iter();
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(bad(format!("the header {name} may be given once")));
    }
    match value.to_str() {
        Ok(text) => Ok(Some(text)),
        Err(_) => Err(bad(format!("the header {name} is not plain text"))),
    }
}

fn number(headers: &HeaderMap, name: &HeaderName) -> Result<Option<u64>, ApiError> {
    let Some(text) = single(headers, name)? else { return Ok(None) };
    match digits(text) {
        Some(number) => Ok(Some(number)),
        None => Err(bad(format!("the header {name} is not a number"))),
    }
}

/// One strong tag as this server makes them: decimal, no sign, no leading zero.
fn revision(tag: &str) -> Result<Revision, ApiError> {
    let inner = tag.strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
    inner
        .and_then(canonical)
        .ok_or_else(|| bad("If-Match is understood as one revision in double quotes only"))
}

/// Digits without a leading zero.
fn canonical(text: &str) -> Option<u64> {
    digits(text).filter(|_| !text.starts_with('0') || text == "0")
}

/// `str::parse` alone would take a plus sign.
fn digits(text: &str) -> Option<u64> {
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    text.parse().ok()
}

#[cfg(test)]
pub(super) mod tests {
    use http::Request;

    use super::*;

    const OWN_TIMEOUT: Duration = Duration::from_secs(10);

    /// A call as a route would see it.
    pub fn call(method: Method, path: &str, headers: &[(&str, &str)]) -> Result<Call, ApiError> {
        let mut request = Request::builder().method(method).uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let (mut parts, ()) = request.body(()).unwrap().into_parts();
        Call::decode(&mut parts, OWN_TIMEOUT)
    }

    fn put(headers: &[(&str, &str)]) -> Result<Condition, ApiError> {
        call(Method::PUT, "/v1/kv/k", headers).and_then(|call| call.condition())
    }

    fn put_once(headers: &[(&str, &str)]) -> Result<Option<Once>, ApiError> {
        call(Method::PUT, "/v1/kv/k", headers).and_then(|call| call.once())
    }

    fn is_bad<T>(result: Result<T, ApiError>) -> bool {
        matches!(result, Err(ApiError::BadRequest(_)))
    }

    #[test]
    fn conditions_have_exactly_two_forms() {
        assert_eq!(put(&[]), Ok(Condition::Always));
        assert_eq!(put(&[("if-match", "\"7\"")]), Ok(Condition::Revision(7)));
        assert_eq!(put(&[("if-match", "\"0\"")]), Ok(Condition::Revision(0)));
        assert_eq!(put(&[("if-none-match", "*")]), Ok(Condition::Absent));
        for tag in [
            "*",
            "7",
            "\"7",
            "7\"",
            "\"\"",
            "\"+7\"",
            "\"07\"",
            "W/\"7\"",
            "\"7\", \"8\"",
            "\"x\"",
            "\"18446744073709551616\"",
            "",
            "\"",
        ] {
            assert!(is_bad(put(&[("if-match", tag)])), "{tag}");
        }
        for tag in ["\"7\"", "**", "", "*, *"] {
            assert!(is_bad(put(&[("if-none-match", tag)])), "{tag}");
        }
        assert!(is_bad(put(&[("if-match", "\"7\""), ("if-match", "\"7\"")])));
        assert!(is_bad(put(&[("if-match", "\"7\""), ("if-none-match", "*")])));
    }

    #[test]
    fn a_delete_has_no_if_none_match_and_a_read_no_condition() {
        let delete = call(Method::DELETE, "/v1/kv/k", &[("if-none-match", "*")]).unwrap();
        assert!(is_bad(delete.condition()));
        let delete = call(Method::DELETE, "/v1/kv/k", &[("if-match", "\"1\"")]).unwrap();
        assert_eq!(delete.condition(), Ok(Condition::Revision(1)));
        for name in ["if-match", "if-none-match"] {
            let get = call(Method::GET, "/v1/kv/k", &[(name, "\"1\"")]).unwrap();
            assert!(is_bad(get.no_condition()));
        }
    }

    #[test]
    fn consistency_is_one_known_word_or_an_error() {
        let read = |query: &str, headers: &[(&str, &str)]| {
            let call = call(Method::GET, &format!("/v1/kv/k{query}"), headers);
            call.and_then(|call| call.consistency())
        };
        for query in ["", "?", "?consistency=linearizable"] {
            assert!(matches!(read(query, &[]), Ok(Consistency::Linearizable)), "{query}");
        }
        assert!(matches!(read("?consistency=stale", &[]), Ok(Consistency::Stale)));
        let follower = [("kv-read", "follower")];
        assert!(matches!(read("", &follower), Ok(Consistency::LinearizableOnFollower)));
        assert!(matches!(read("?consistency=stale", &follower), Ok(Consistency::Stale)));
        for query in [
            "?x=1",
            "?consistency",
            "?consistency=",
            "?consistency=fresh",
            "?&",
            "?consistency=stale&consistency=stale",
            "?consistency=stale&x=1",
            "?Consistency=stale",
            "?consistency=%73tale",
        ] {
            assert!(is_bad(read(query, &[])), "{query}");
        }
        assert!(is_bad(read("", &[("kv-read", "leader")])));
    }

    #[test]
    fn the_routing_header_is_direct_or_an_error() {
        let routing = |value| call(Method::GET, "/", &[("kv-routing", value)]).map(|c| c.routing);
        assert_eq!(routing("direct"), Ok(Routing::Direct));
        assert_eq!(call(Method::GET, "/", &[]).unwrap().routing, Routing::PassOn);
        assert!(is_bad(routing("Direct")) && is_bad(routing("")) && is_bad(routing("proxy")));
    }

    #[test]
    fn hops_are_counted_up_to_their_bound() {
        let hops = |value| call(Method::GET, "/", &[("kv-hops", value)]).map(|c| c.hops);
        assert_eq!(hops("3"), Ok(3));
        assert_eq!(hops("4"), Err(ApiError::TooManyHops { hops: 4 }));
        assert_eq!(hops("9999"), Err(ApiError::TooManyHops { hops: 255 }));
        assert!(is_bad(hops("-1")) && is_bad(hops("x")) && is_bad(hops("")) && is_bad(hops("+1")));
    }

    #[test]
    fn a_passed_on_deadline_can_only_shorten_our_own() {
        let left = |value| {
            let call = call(Method::GET, "/", &[("kv-deadline-ms", value)]);
            call.map(|call| call.deadline - Instant::now())
        };
        assert!(left("1500").unwrap() <= Duration::from_millis(1500));
        let capped = left("18446744073709551615").unwrap();
        assert!(capped <= OWN_TIMEOUT && capped > OWN_TIMEOUT / 2);
        assert!(is_bad(left("1.5")) && is_bad(left("-1")) && is_bad(left("")));
    }

    #[test]
    fn an_idempotency_key_has_exactly_one_form() {
        let key = |key| put_once(&[("idempotency-key", key)]);
        let once = key("me/7").unwrap().unwrap();
        assert_eq!((once.client().as_str(), once.seq(), once.floor()), ("me", 7, 0));
        assert_eq!(put_once(&[]), Ok(None));
        let long = format!("{}/1", "x".repeat(65));
        for bad in [
            "",
            "/",
            "me",
            "me/",
            "/7",
            "me/7/8",
            "me/-1",
            "me/+1",
            "me/07",
            "me/7 ",
            "m e/7",
            "me /7",
            "me/x",
            "me/18446744073709551615",
            "me/18446744073709551616",
            "\"me/7\"",
            &long,
        ] {
            assert!(is_bad(key(bad)), "{bad}");
        }
        let twice = [("idempotency-key", "me/7"), ("idempotency-key", "me/7")];
        assert!(is_bad(put_once(&twice)));
    }

    #[test]
    fn a_floor_goes_with_a_key_and_lies_not_above_it() {
        let floor = |floor| put_once(&[("idempotency-key", "me/7"), ("kv-client-floor", floor)]);
        for good in ["0", "3", "7"] {
            let once = floor(good).unwrap().unwrap();
            assert_eq!(once.floor().to_string(), good);
        }
        for bad in ["8", "", "-1", "x", "me/3", "18446744073709551616"] {
            assert!(is_bad(floor(bad)), "{bad}");
        }
        assert!(is_bad(put_once(&[("kv-client-floor", "3")])));
    }

    #[test]
    fn where_idempotency_is_not_understood_it_is_refused_not_ignored() {
        for name in ["idempotency-key", "kv-client-floor"] {
            let call = call(Method::POST, "/v1/batch", &[(name, "c/1")]).unwrap();
            assert!(is_bad(call.no_once()));
        }
    }
}

//! The HTTP routes for clients: `/v1`, health, and the original's `/api`.
//!
//! Handlers decode, call [`App`], and encode; which node answers is [`super::forward`]'s business. The
//! key comes from the raw path: axum's own `Path` would refuse `%ff` and let `%zz` through.
//!
//! `GET` includes `HEAD` everywhere: axum answers it with the same head and no body.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post};
use axum::{Json, Router};
use bytes::Bytes;
use http::{HeaderValue, Method, Request, StatusCode, Uri, header};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tower_service::Service;

use super::batch;
use super::body::{BodyBudget, BodyLimit};
use super::call::Call;
use super::error::{ApiError, Outcome, etag};
use super::forward::{Effect, Forwarder, Refusal, Served};
use super::head::{BATCH_PATH, KV_PREFIX, PlainRequest};
use super::json::Object;
use super::management;
use crate::app::{App, Consistency};
use crate::key_path;
use crate::types::{Condition, Record, Revision};

/// What `prometheus-client` writes is OpenMetrics. To a reader of the older text format, which is what
/// a client gets that does not ask for the other, its extra lines are comments.
const OPENMETRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const PROMETHEUS_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What every handler needs.
#[derive(Clone)]
pub struct ApiState {
    /// The node's use cases.
    pub app: App,
    /// The way to other nodes.
    pub forwarder: Forwarder,
    /// Bounds the memory of request bodies.
    pub bodies: Arc<BodyBudget>,
    /// Bounds the memory of large answers.
    pub answers: Arc<BodyBudget>,
}

impl ApiState {
    /// Of one node.
    pub fn new(app: App) -> Self {
        let budget = || BodyBudget::new(app.limits().http_body_bytes_max);
        let (bodies, answers) = (budget(), budget());
        let forwarder = Forwarder::new(app.limits().passed_on_max, Arc::clone(&answers));
        Self { app, forwarder, bodies, answers }
    }
}

/// What a handler returns.
pub(super) type Answer = Result<Response, Refusal>;

/// The answer to a plain request. What almost all of them are is told as it is: a response would only be
/// taken apart again.
pub(super) enum PlainAnswer {
    /// A `PUT` took effect.
    Stored(Revision),
    /// A `GET` found a record.
    Found(Record),
    /// Anything else.
    Other(Response),
}

/// Answers what the router would answer in the same way; without it if the request is on keys.
pub(super) async fn answer_plain(
    state: &ApiState,
    router: &Router,
    request: PlainRequest,
) -> PlainAnswer {
    let on_a_key = request.path.starts_with(KV_PREFIX);
    if !on_a_key && request.method == Method::GET {
        return PlainAnswer::Other(by_router(router.clone(), request).await);
    }
    let own_timeout = Duration::from_millis(state.app.limits().request_timeout_ms);
    let answer = match Call::plain(request, own_timeout) {
        Ok(call) => match call.method {
            Method::GET => match read_key(state, &call).await {
                Ok(Served::Here(Some(record))) => return PlainAnswer::Found(record),
                other => other.and_then(found_or_not),
            },
            Method::PUT => match store_key(state, &call).await {
                Ok(Served::Here(revision)) => return PlainAnswer::Stored(revision),
                other => other.and_then(|served| served.respond(|revision| Ok(stored(revision)))),
            },
            Method::DELETE => delete_key(state, &call).await,
            _ => batch::answer(state, &call).await,
        },
        Err(error) => Err(error.into()),
    };
    PlainAnswer::Other(answer.into_response())
}

async fn by_router(mut router: Router, plain: PlainRequest) -> Response {
    let PlainRequest { method, path, query, headers, .. } = plain;
    let target = query.map_or_else(|| path.clone(), |query| format!("{path}?{query}"));
    let Ok(uri) = target.parse::<Uri>() else {
        return ApiError::BadRequest("the path is malformed".into()).into_response();
    };
    let mut request = Request::new(Body::empty());
    (*request.method_mut(), *request.uri_mut(), *request.headers_mut()) = (method, uri, headers);
    let Ok(response) = router.call(request).await;
    response
}

/// All routes of a node.
pub fn router(state: ApiState) -> Router {
    Router::new()
        .route("/v1/kv/{*key}", kv_routes())
        // The wildcard does not match an empty key, which deserves a better answer than 404.
        .route(KV_PREFIX, kv_routes())
        .route(BATCH_PATH, post(batch::serve).fallback(only("POST")))
        .route("/v1/ring", get(ring).fallback(only("GET, HEAD")))
        .route("/livez", get(livez).fallback(only("GET, HEAD")))
        .route("/readyz", get(readyz).fallback(only("GET, HEAD")))
        .route("/metrics", get(metrics).fallback(only("GET, HEAD")))
        .route("/api/write", post(original_write).fallback(only("POST")))
        .route("/api/read", post(original_read).fallback(only("POST")))
        .route("/api/consistent_read", post(original_consistent_read).fallback(only("POST")))
        .route("/api/get_hash_ring", get(original_ring).fallback(only("GET, HEAD")))
        .merge(management::routes())
        .fallback(|| async { ApiError::UnknownPath })
        .with_state(state)
}

fn kv_routes() -> MethodRouter<ApiState> {
    get(get_kv).put(put_kv).delete(delete_kv).fallback(only("GET, HEAD, PUT, DELETE"))
}

/// Answers a method that a path does not take.
pub(super) fn only(
    allow: &'static str,
) -> impl Fn() -> std::future::Ready<ApiError> + Clone + Send + Sync + 'static {
    move || std::future::ready(ApiError::MethodNotAllowed { allow })
}

async fn put_kv(State(state): State<ApiState>, call: Call) -> Answer {
    store_key(&state, &call).await?.respond(|revision| Ok(stored(revision)))
}

async fn store_key(state: &ApiState, call: &Call) -> Result<Served<Revision>, Refusal> {
    call.no_query()?;
    let key = key_of(state, call)?;
    let condition = call.condition()?;
    let once = call.once()?;
    let bytes_max = state.app.limits().value_bytes_max;
    let body = call.read_body(state, BodyLimit { what: "value", bytes_max }).await?;
    let put =
        || state.app.put(key.clone(), body.bytes.clone(), condition, once.clone(), call.deadline);
    state.forwarder.serve(call, || body.bytes.clone(), Effect::Write, put).await
}

pub(super) fn stored(revision: Revision) -> Response {
    Json(Put { revision }).into_response()
}

/// The answer to a `PUT`.
#[derive(Serialize)]
struct Put {
    revision: Revision,
}

async fn delete_kv(State(state): State<ApiState>, call: Call) -> Answer {
    delete_key(&state, &call).await
}

async fn delete_key(state: &ApiState, call: &Call) -> Answer {
    call.no_query()?;
    let key = key_of(state, call)?;
    let condition = call.condition()?;
    let once = call.once()?;
    let delete = || state.app.delete(key.clone(), condition, once.clone(), call.deadline);
    let served = state.forwarder.serve(call, Bytes::new, Effect::Write, delete).await?;
    served.respond(|done| {
        Ok(Json(json!({"revision": done.revision, "deleted": done.deleted})).into_response())
    })
}

async fn get_kv(State(state): State<ApiState>, call: Call) -> Answer {
    read_key(&state, &call).await.and_then(found_or_not)
}

async fn read_key(state: &ApiState, call: &Call) -> Result<Served<Option<Record>>, Refusal> {
    let key = key_of(state, call)?;
    let consistency = call.consistency()?;
    call.no_terms()?;
    let read = || state.app.get(&key, consistency, call.deadline);
    match state.forwarder.serve(call, Bytes::new, Effect::Read, read).await? {
        Served::Here(Some(Record { revision, value })) => {
            let value = state.answers.hold(value)?;
            Ok(Served::Here(Some(Record { revision, value })))
        }
        Served::Here(None) => Ok(Served::Here(None)),
        Served::Elsewhere(response) => Ok(Served::Elsewhere(response)),
    }
}

/// The response to a read, which counts among the answers in memory. Another node's does already.
pub(super) async fn held<T>(
    state: &ApiState,
    served: Served<T>,
    render: impl FnOnce(T) -> Result<Response, ApiError>,
) -> Answer {
    let response = match served {
        Served::Here(value) => render(value)?,
        Served::Elsewhere(response) => return Ok(response),
    };
    let (head, body) = response.into_parts();
    // It is in memory already.
    let body = axum::body::to_bytes(body, usize::MAX).await.expect("what is in memory can be read");
    Ok(Response::from_parts(head, Body::from(state.answers.hold(body)?)))
}

fn found_or_not(served: Served<Option<Record>>) -> Answer {
    served.respond(|record| record.map(found).ok_or(ApiError::KeyAbsent))
}

pub(super) fn found(record: Record) -> Response {
    let octets = HeaderValue::from_static("application/octet-stream");
    let head = [(header::CONTENT_TYPE, octets), (header::ETAG, etag(record.revision))];
    (head, record.value).into_response()
}

/// The key in the raw path, within its limit.
fn key_of(state: &ApiState, call: &Call) -> Result<Bytes, ApiError> {
    let raw = call.path.strip_prefix(KV_PREFIX).unwrap_or_default();
    let key = key_path::decode(raw).map_err(|error| ApiError::BadRequest(error.to_string()))?;
    check_key(state, &key)?;
    Ok(key)
}

fn check_key(state: &ApiState, key: &[u8]) -> Result<(), ApiError> {
    let max = state.app.limits().key_bytes_max;
    if key.is_empty() {
        return Err(ApiError::BadRequest("the key is empty".into()));
    }
    if key.len() > max {
        return Err(ApiError::TooLarge { what: "key", max });
    }
    Ok(())
}

async fn ring(State(state): State<ApiState>, call: Call) -> Answer {
    call.no_query()?;
    Ok(Json(state.app.ring_with_next()).into_response())
}

async fn livez(State(state): State<ApiState>, call: Call) -> Answer {
    call.no_query()?;
    Ok(match state.app.storage_failed() {
        None => "ok".into_response(),
        Some(why) => unhealthy("STORAGE", &why),
    })
}

async fn readyz(State(state): State<ApiState>, call: Call) -> Answer {
    call.no_query()?;
    Ok(match state.app.check_ready().await {
        Ok(()) => Json(json!({"ready": true})).into_response(),
        Err(reason) => unhealthy("NOT_READY", &reason),
    })
}

fn unhealthy(code: &str, reason: &str) -> Response {
    let error = json!({"code": code, "message": reason, "outcome": Outcome::NotApplied});
    let body = Json(json!({"error": error}));
    (StatusCode::SERVICE_UNAVAILABLE, [(header::RETRY_AFTER, "1")], body).into_response()
}

async fn metrics(State(state): State<ApiState>, call: Call) -> Answer {
    call.no_query()?;
    let accept = call.headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok());
    let open = accept.is_some_and(|accept| accept.contains("application/openmetrics-text"));
    let text_type = if open { OPENMETRICS_TYPE } else { PROMETHEUS_TYPE };
    Ok(([(header::CONTENT_TYPE, text_type)], state.app.prometheus()).into_response())
}

/// The original's request: `{"Set":{"key":"k","value":"v"}}`.
#[derive(Deserialize)]
enum OriginalWrite {
    Set(Object<OriginalSet>),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OriginalSet {
    key: String,
    value: String,
}

async fn original_write(State(state): State<ApiState>, call: Call) -> Answer {
    call.no_query()?;
    call.no_terms()?;
    let (OriginalWrite::Set(Object(set)), body) = call.read_json(&state).await?;
    check_key(&state, set.key.as_bytes())?;
    let max = state.app.limits().value_bytes_max;
    if set.value.len() > max {
        return Err(ApiError::TooLarge { what: "value", max }.into());
    }
    let (key, value) = (Bytes::from(set.key), Bytes::from(set.value));
    let always = Condition::Always;
    let put = || state.app.put(key.clone(), value.clone(), always, None, call.deadline);
    let served = state.forwarder.serve(&call, || body.bytes.clone(), Effect::Write, put).await?;
    served.respond(|revision| {
        Ok((StatusCode::CREATED, Json(json!({"revision": revision}))).into_response())
    })
}

async fn original_read(state: State<ApiState>, call: Call) -> Answer {
    read_as_json(state, call, Consistency::Stale).await
}

async fn original_consistent_read(state: State<ApiState>, call: Call) -> Answer {
    read_as_json(state, call, Consistency::Linearizable).await
}

/// A value that JSON cannot carry is 409: the request is fine, the value's bytes are in its way, and
/// replacing some of them would be an invention.
async fn read_as_json(
    State(state): State<ApiState>,
    call: Call,
    consistency: Consistency,
) -> Answer {
    call.no_query()?;
    call.no_terms()?;
    let (key, body) = call.read_json::<String>(&state).await?;
    check_key(&state, key.as_bytes())?;
    let read = || state.app.get(key.as_bytes(), consistency, call.deadline);
    let served = state.forwarder.serve(&call, || body.bytes.clone(), Effect::Read, read).await?;
    let render = |record: Option<Record>| {
        let Some(record) = record else { return Ok(Json(json!(null)).into_response()) };
        let text = std::str::from_utf8(&record.value).map_err(|_| {
            ApiError::Conflict("the value is not UTF-8; read it with GET /v1/kv/{key}".into())
        })?;
        Ok(Json(text).into_response())
    };
    held(&state, served, render).await
}

async fn original_ring(State(state): State<ApiState>, call: Call) -> Answer {
    call.no_query()?;
    Ok(Json(state.app.ring().carp()).into_response())
}

//! `/cluster/*`: forming a cluster, giving it its first ring, and the steps of later changes of it.
//!
//! The routes and their bodies are the original's, but for `handoffs` and `step`, by which drivers change
//! the ring (`crate::reshard`), and `digest`. `init`, `metrics` and `digest` concern the asked node alone; the
//! others need the leader and are passed on to it like any write.

use std::collections::BTreeSet;

use axum::Json;
use axum::Router;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use bytes::Bytes;
use serde::Deserialize;

use super::api::{Answer, ApiState, held, only};
use super::call::Call;
use super::error::{ApiError, Outcome};
use super::forward::Effect;
use super::json::Object;
use super::witness;
use crate::handoff::Step;
use crate::metrics::Sizes;
use crate::ring::{Ring, RingTable};
use crate::store::formation::BeforeRing;
use crate::types::{NodeAddrs, NodeId};

/// The longest address that a node may have: a DNS name, a colon and a port.
const ADDRESS_BYTES_MAX: usize = 253 + 6;

/// The routes under `/cluster/`.
pub(super) fn routes() -> Router<ApiState> {
    Router::new()
        .route("/cluster/init", post(init).fallback(only("POST")))
        .route("/cluster/add-learner", post(add_learner).fallback(only("POST")))
        .route("/cluster/change-membership", post(change_membership).fallback(only("POST")))
        .route("/cluster/update-hash-ring", post(update_hash_ring).fallback(only("POST")))
        .route("/cluster/handoffs", get(handoffs).fallback(only("GET, HEAD")))
        .route("/cluster/step", post(step).fallback(only("POST")))
        .route("/cluster/digest", get(digest).fallback(only("GET, HEAD")))
        .route("/cluster/metrics", get(metrics).fallback(only("GET, HEAD")))
}

/// `{}` and little else: whoever sends more expects more.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Init {
    /// Whether the cluster is to serve nothing before it has a ring.
    #[serde(default)]
    awaits_ring: bool,
}

impl Init {
    fn before_ring(&self) -> BeforeRing {
        if self.awaits_ring { BeforeRing::Waits } else { BeforeRing::Serves }
    }
}

async fn init(State(state): State<ApiState>, call: Call) -> Answer {
    call.no_query()?;
    call.no_terms()?;
    let (Object(init), _body) = call.read_json::<Object<Init>>(&state).await?;
    let forming = state.app.init(init.before_ring());
    let initialized = tokio::time::timeout_at(call.deadline, forming).await;
    initialized.unwrap_or_else(|_| {
        let message = "the cluster was not initialized within the deadline";
        Err(ApiError::Timeout { message, outcome: Outcome::Unknown })
    })?;
    Ok(ok())
}

async fn add_learner(State(state): State<ApiState>, call: Call) -> Answer {
    call.no_query()?;
    call.no_terms()?;
    let ((id, http, rpc), body) = call.read_json::<(NodeId, String, String)>(&state).await?;
    check_node(id, [&http, &rpc])?;
    let addrs = NodeAddrs { http, rpc };
    let app = &state.app;
    let local = || app.add_learner(id, addrs.clone(), call.deadline);
    let served = state.forwarder.serve(&call, || body.bytes.clone(), Effect::Write, local).await?;
    served.respond(|()| Ok(ok()))
}

async fn change_membership(State(state): State<ApiState>, call: Call) -> Answer {
    call.no_query()?;
    call.no_terms()?;
    let (ids, body) = call.read_json::<Vec<NodeId>>(&state).await?;
    let voters = distinct(&ids)?;
    let app = &state.app;
    let local = || app.change_membership(voters.clone(), call.deadline);
    let served = state.forwarder.serve(&call, || body.bytes.clone(), Effect::Write, local).await?;
    served.respond(|()| Ok(ok()))
}

async fn update_hash_ring(State(state): State<ApiState>, call: Call) -> Answer {
    call.no_query()?;
    call.no_terms()?;
    let (Object(ring), body) = call.read_json::<Object<Ring>>(&state).await?;
    check_new_ring(&Ring { next: None, ..ring.clone() })?;
    let app = &state.app;
    let local = || app.install_ring(ring.clone(), call.deadline);
    let served = state.forwarder.serve(&call, || body.bytes.clone(), Effect::Write, local).await?;
    served.respond(|()| Ok(ok()))
}

async fn handoffs(State(state): State<ApiState>, call: Call) -> Answer {
    let sizes = sizes(call.query.as_deref())?;
    call.no_terms()?;
    let view = || state.app.handoffs(sizes, call.deadline);
    let served = state.forwarder.serve(&call, Bytes::new, Effect::Read, view).await?;
    // While something is frozen, megabytes: the floors of all clients.
    held(&state, served, |view| Ok(Json(view).into_response())).await
}

fn sizes(query: Option<&str>) -> Result<Sizes, ApiError> {
    match query {
        None | Some("" | "sizes=false") => Ok(Sizes::Omitted),
        Some("sizes=true") => Ok(Sizes::Counted),
        Some(_) => {
            Err(ApiError::BadRequest("the query may be `sizes=true` or `sizes=false`".into()))
        }
    }
}

async fn step(State(state): State<ApiState>, call: Call) -> Answer {
    call.no_query()?;
    call.no_terms()?;
    let (Object(step), body) = call.read_json::<Object<Step>>(&state).await?;
    check_step(&step)?;
    let local = || witness::take(&state, &step, call.deadline);
    // A repeat gets the first answer, but the caller is who repeats: this node may be cut off.
    let served = state.forwarder.serve(&call, || body.bytes.clone(), Effect::Write, local).await?;
    served.respond(|done| Ok(Json(done).into_response()))
}

async fn digest(State(state): State<ApiState>, call: Call) -> Answer {
    call.no_query()?;
    call.no_terms()?;
    Ok(Json(state.app.digest().await?).into_response())
}

async fn metrics(State(state): State<ApiState>, call: Call) -> Answer {
    call.no_query()?;
    call.no_terms()?;
    Ok(Json(state.app.metrics()).into_response())
}

/// The answer of a management request that has nothing to tell.
fn ok() -> Response {
    Json(serde_json::json!({"ok": true})).into_response()
}

fn distinct(ids: &[NodeId]) -> Result<BTreeSet<NodeId>, ApiError> {
    let voters: BTreeSet<NodeId> = ids.iter().copied().collect();
    if voters.is_empty() || voters.len() != ids.len() || voters.contains(&0) {
        let message = "a membership is a list of one or more node ids above 0, each once";
        return Err(ApiError::BadRequest(message.into()));
    }
    Ok(voters)
}

/// What the ring says is checked here, what it means for the cluster at apply.
fn check_ring(ring: &Ring) -> Result<(), ApiError> {
    if ring.next.is_some() {
        return Err(ApiError::BadRequest("a ring that a cluster takes has no `next`".into()));
    }
    RingTable::new(ring.clone()).map_err(|error| ApiError::BadRequest(error.to_string()))?;
    let nodes = ring.clusters.iter().flat_map(|cluster| &cluster.nodes);
    for node in nodes {
        check_node(node.id, [&node.http, &node.rpc])?;
    }
    Ok(())
}

/// A ring that is to come says of each node where to connect.
fn check_new_ring(ring: &Ring) -> Result<(), ApiError> {
    check_ring(ring)?;
    for node in ring.clusters.iter().flat_map(|cluster| &cluster.nodes) {
        let addrs = NodeAddrs { http: node.http.clone(), rpc: node.rpc.clone() };
        if addrs.has_wildcard() {
            let id = node.id;
            let message = format!(
                "node {id}: nobody can connect to a wildcard; start the node with its own address"
            );
            return Err(ApiError::BadRequest(message));
        }
    }
    Ok(())
}

/// Rings are checked before they are proposed, everything else at apply.
fn check_step(step: &Step) -> Result<(), ApiError> {
    match step {
        Step::Join { ring } => check_new_ring(ring),
        Step::Revert { ring } => check_ring(ring),
        Step::Begin { ring, next, .. } => check_ring(ring).and_then(|()| check_new_ring(next)),
        _ => Ok(()),
    }
}

fn check_node(id: NodeId, addresses: [&str; 2]) -> Result<(), ApiError> {
    if id == 0 {
        return Err(ApiError::BadRequest("node ids count from 1".into()));
    }
    match addresses.into_iter().find(|address| !is_host_port(address)) {
        None => Ok(()),
        Some(_) => {
            let message = format!("node {id}: each of its addresses has to be HOST:PORT");
            Err(ApiError::BadRequest(message))
        }
    }
}

/// Whether a text can stand between `http://` and a path, and says where to connect.
fn is_host_port(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else { return false };
    let is_port =
        port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|port| port > 0);
    let is_name = |host: &str| {
        !host.is_empty()
            && host.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'))
    };
    let is_host = match host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        Some(v6) => v6.parse::<std::net::Ipv6Addr>().is_ok(),
        None => is_name(host),
    };
    text.len() <= ADDRESS_BYTES_MAX && is_port && is_host
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_a_host_and_a_port() {
        for good in ["127.0.0.1:1", "node-1.example:65535", "[::1]:80", "localhost:8080"] {
            assert!(is_host_port(good), "{good}");
        }
        let long = format!("{}:80", "x".repeat(ADDRESS_BYTES_MAX));
        for bad in [
            "",
            ":",
            "localhost",
            "localhost:",
            ":80",
            "a:0",
            "a:65536",
            "a:+80",
            "a b:80",
            "http://a:80",
            "a:80/",
            "u@a:80",
            "::1:80",
            "[x]:80",
            "a\r\nb:80",
            &long,
        ] {
            assert!(!is_host_port(bad), "{bad}");
        }
    }

    #[test]
    fn a_membership_lists_each_node_once() {
        assert_eq!(distinct(&[3, 1]), Ok(BTreeSet::from([1, 3])));
        for bad in [&[][..], &[1, 1], &[0, 1]] {
            assert!(distinct(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_init_says_what_it_means_or_nothing() {
        let parse = |text: &str| serde_json::from_str::<Object<Init>>(text);
        for (text, expected) in [
            ("{}", BeforeRing::Serves),
            (r#"{"awaits_ring":false}"#, BeforeRing::Serves),
            (r#"{"awaits_ring":true}"#, BeforeRing::Waits),
        ] {
            assert_eq!(parse(text).unwrap().0.before_ring(), expected, "{text}");
        }
        for bad in ["", "null", "[]", "[1]", "{\"a\":1}", "1", r#"{"awaits_ring":1}"#, "[true]"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}

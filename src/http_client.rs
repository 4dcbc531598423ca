//! One HTTP/1.1 client for everything that calls a node: the forwarder, `RaftNode`, `KVClient`.
//!
//! Its point is [`SendError`]: a caller must know whether a request may have reached the other side,
//! because a write that may have arrived must not be sent again. It never retries and never follows a
//! redirect. Paths go out byte for byte as given; clients that normalise URLs (`/v1/kv/..`) would
//! change keys. Connections are kept alive and pooled for each address.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use tokio::time::Instant;

/// How long a connection may take to be established. Short: a dead node on the same machine refuses
/// at once, and a caller has other nodes to try.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// Idle connections kept for each address: more than one client has in flight at one node, so that
/// none is closed only to be opened again.
const IDLE_CONNECTIONS_MAX: usize = 256;

/// How long an idle connection is kept: well below the 75 s after which our own servers close it, so
/// that no request meets a connection that is just being closed.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// The largest answer that is read: the largest value that can be configured (64 MiB) and some room.
/// A larger one is an error.
const RESPONSE_BYTES_MAX: usize = 65 << 20;

/// A request to one node.
#[derive(Debug, Clone)]
pub struct HttpRequest {
    /// The method.
    pub method: Method,
    /// `HOST:PORT`.
    pub address: String,
    /// The raw path and query, percent-encoded by the caller.
    pub path_and_query: String,
    /// Headers besides `Host` and `Content-Length`.
    pub headers: HeaderMap,
    /// The body, possibly empty.
    pub body: Bytes,
}

/// A complete answer.
#[derive(Debug, Clone)]
pub struct HttpResponse {
    /// The status.
    pub status: StatusCode,
    /// The headers.
    pub headers: HeaderMap,
    /// The whole body.
    pub body: Bytes,
}

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// The request did not leave: nothing can have happened there.
    #[error("cannot reach {address}: {message}")]
    NotSent {
        /// The node.
        address: String,
        /// What the system said.
        message: String,
    },
    /// The request may have arrived, but no answer came back.
    #[error("no answer from {address}: {message}")]
    MaybeSent {
        /// The node.
        address: String,
        /// What happened.
        message: String,
    },
    /// The deadline passed; the request may have arrived.
    #[error("no answer from {address} within {} ms", .waited.as_millis())]
    TimedOut {
        /// The node.
        address: String,
        /// How long the answer was waited for.
        waited: Duration,
    },
}

impl SendError {
    /// Whether the other side may have received the request.
    pub fn may_have_arrived(&self) -> bool {
        !matches!(self, Self::NotSent { .. })
    }
}

/// The client. Cloning shares the connection pool.
#[derive(Debug, Clone)]
pub struct HttpClient {
    inner: Client<HttpConnector, Full<Bytes>>,
}

impl Default for HttpClient {
    fn default() -> Self {
        Self::new()
    }
}

impl HttpClient {
    /// A client with an empty pool.
    pub fn new() -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
        let inner = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_TIMEOUT)
            .pool_max_idle_per_host(IDLE_CONNECTIONS_MAX)
            .build(connector);
        Self { inner }
    }

    /// Sends one request and reads the whole answer, or gives up at `deadline`.
    ///
    /// Dropping the future closes the connection; the request may have arrived all the same.
    pub async fn send(
        &self,
        request: HttpRequest,
        deadline: Instant,
    ) -> Result<HttpResponse, SendError> {
        let address = request.address.clone();
        let started = Instant::now();
        match tokio::time::timeout_at(deadline, self.exchange(request)).await {
            Ok(result) => result,
            Err(_) => Err(SendError::TimedOut { address, waited: started.elapsed() }),
        }
    }

    async fn exchange(&self, request: HttpRequest) -> Result<HttpResponse, SendError> {
        let HttpRequest { method, address, path_and_query, headers, body } = request;
        let not_sent = |message: String| SendError::NotSent { address: address.clone(), message };
        let maybe_sent =
            |message: String| SendError::MaybeSent { address: address.clone(), message };
        let uri: Uri = format!("http://{address}{path_and_query}")
            .parse()
            .map_err(|error: http::uri::InvalidUri| not_sent(error.to_string()))?;
        let mut outgoing = http::Request::new(Full::new(body));
        *outgoing.method_mut() = method;
        *outgoing.uri_mut() = uri;
        *outgoing.headers_mut() = headers;
        let response = self.inner.request(outgoing).await.map_err(|error| {
            // A failed connect is the one case in which not a byte of the request was written.
            let message = chain(&error);
            if error.is_connect() { not_sent(message) } else { maybe_sent(message) }
        })?;
        let (head, body) = response.into_parts();
        let body = Limited::new(body, RESPONSE_BYTES_MAX).collect().await;
        let body = body.map_err(|error| maybe_sent(chain(error.as_ref())))?;
        Ok(HttpResponse { status: head.status, headers: head.headers, body: body.to_bytes() })
    }
}

/// An error with its causes: hyper's own text alone ("client error (Connect)") says too little.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

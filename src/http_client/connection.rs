//! One connection, driven by whoever waits for its answer.
//!
//! hyper's connection is a future beside the one that waits for the answer. Spawned as a task, as is usual,
//! it has to be woken for each request and wakes the caller for each answer: two hand-overs, on a runtime
//! of several threads often to another one. Here the caller polls both: first the connection, which writes
//! and reads, then what it is waiting for, which makes no progress by itself.
//!
//! So nobody polls a connection that is not in use, and that the other side has closed it is found out when
//! it is used again: hyper looks for that before it writes, and gives the request back. What the runtime has
//! not heard of by then is not found, and that request may have arrived: one reason more to close idle
//! connections long before a server does.

use std::error::Error;
use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http::header::HOST;
use http::{HeaderValue, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Body, Incoming};
use hyper::client::conn::http1;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::runtime::Id;
use tokio::task::coop::unconstrained;
use tokio::time::Instant;
use tower_service::Service;

use crate::alarm::Alarm;

use super::{HasRoom, HttpResponse, RESPONSE_BYTES_MAX, chain};

/// A request as hyper takes it.
pub(super) type Outgoing = http::Request<Full<Bytes>>;

/// Open, or found closed when it is used.
pub(super) struct Connection {
    /// What `Host` says.
    host: HeaderValue,
    sender: http1::SendRequest<Full<Bytes>>,
    /// Whether an answer came on it: then HTTP is spoken at its other end.
    has_answered: bool,
    /// `None` once it has ended.
    io: Option<http1::Connection<TokioIo<TcpStream>, Full<Bytes>>>,
    alarm: Alarm,
}

/// Why there is no answer.
pub(super) enum Failure {
    /// The connection had ended: not a byte of the request was written, and here it is.
    NotWritten { request: Box<Outgoing>, message: String },
    /// The request may have arrived.
    MaybeSent { message: String },
    /// There was no room for the answer.
    NoRoom,
    /// The deadline passed; the request may have arrived.
    TimedOut,
}

impl Connection {
    /// Opens a connection to `HOST:PORT`.
    pub(super) async fn open(mut connector: HttpConnector, address: &str) -> Result<Self, String> {
        let host = HeaderValue::from_str(address).map_err(|error| error.to_string())?;
        let uri = format!("http://{address}").parse::<Uri>().map_err(|error| error.to_string())?;
        let stream = connector.call(uri).await.map_err(|error| chain(&error))?;
        let (sender, io) = http1::handshake(stream).await.map_err(|error| chain(&error))?;
        Ok(Self { host, sender, has_answered: false, io: Some(io), alarm: Alarm::new() })
    }

    /// Whether it may be used on this runtime: its socket and its timer end with the one it was opened on.
    pub(super) fn belongs_to(&self, runtime: Id) -> bool {
        self.alarm.belongs_to(runtime)
    }

    /// Sends a request and reads the whole answer, or gives up at `deadline`. After a failure, or when the
    /// future was dropped, the connection must not be used again.
    pub(super) async fn exchange(
        &mut self,
        mut request: Outgoing,
        deadline: Instant,
        has_room: &mut HasRoom<'_>,
    ) -> Result<HttpResponse, Failure> {
        request.headers_mut().insert(HOST, self.host.clone());
        let response = pin!(self.sender.try_send_request(request));
        let Self { io, alarm, has_answered, .. } = self;
        let answered = async {
            let response = Driven { io: &mut *io, waits_for: response }.await;
            let response = response.map_err(|error| not_answered(error, *has_answered))?;
            *has_answered = true;
            let (head, body) = response.into_parts();
            let body = pin!(collect(body, has_room));
            let body = Driven { io: &mut *io, waits_for: body }.await?;
            Ok(HttpResponse { status: head.status, headers: head.headers, body })
        };
        tokio::select! {
            biased;
            result = answered => result,
            // What comes without end may use up all that Tokio lets a task do, and must end all the same;
            // Tokio's own timeouts look at their time in that case, too.
            () = unconstrained(alarm.until(deadline)) => Err(Failure::TimedOut),
        }
    }

    /// Finishes the last exchange, and says whether another request may be sent.
    pub(super) fn settle(&mut self) -> bool {
        // Nobody is to be woken for a connection that is not in use, as whoever used it last would be.
        turn(&mut self.io, &mut Context::from_waker(Waker::noop()));
        self.io.is_some() && self.sender.is_ready()
    }
}

/// All of an answer's body, as long as there is room for it. One that came in one piece is that piece.
async fn collect(body: Incoming, has_room: &mut HasRoom<'_>) -> Result<Bytes, Failure> {
    let announced = body.size_hint().lower().min(RESPONSE_BYTES_MAX as u64) as usize;
    let mut counted = announced;
    if !has_room(counted) {
        return Err(Failure::NoRoom);
    }
    let mut body = pin!(Limited::new(body, RESPONSE_BYTES_MAX));
    let (mut first, mut all) = (Bytes::new(), Vec::new());
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Failure::MaybeSent { message: chain(&*error) })?;
        // Trailers have no meaning here.
        let Ok(data) = frame.into_data() else { continue };
        let length = first.len().max(all.len()) + data.len();
        if length > counted && !has_room(length - counted) {
            return Err(Failure::NoRoom);
        }
        counted = counted.max(length);
        if first.is_empty() && all.is_empty() {
            first = data;
            continue;
        }
        if all.is_empty() {
            all = Vec::with_capacity(counted);
            all.extend_from_slice(&std::mem::take(&mut first));
        }
        all.extend_from_slice(&data);
    }
    Ok(if all.is_empty() { first } else { all.into() })
}

fn not_answered(
    mut error: hyper::client::conn::TrySendError<Outgoing>,
    has_answered: bool,
) -> Failure {
    let request = error.take_message();
    let error = error.into_error();
    let mut message = chain(&error);
    if !has_answered {
        message.push_str(doubt(&error));
    }
    match request {
        Some(request) => Failure::NotWritten { request: Box::new(request), message },
        None => Failure::MaybeSent { message },
    }
}

/// What to think of an end that has not said one word of HTTP. A peer port resets a connection that does not
/// begin with a greeting; but so may a node that was killed.
fn doubt(error: &hyper::Error) -> &'static str {
    let source = error.source().and_then(|source| source.downcast_ref::<io::Error>());
    let is_reset = source.is_some_and(|source| source.kind() == io::ErrorKind::ConnectionReset);
    if error.is_parse() && !error.is_parse_too_large() {
        "; what listens there does not speak HTTP: is it a node's peer port?"
    } else if is_reset || error.is_incomplete_message() {
        "; if it always does so, it does not speak HTTP: is it a node's peer port?"
    } else {
        ""
    }
}

/// Lets a connection read and write what it can.
fn turn<C: Future + Unpin>(io: &mut Option<C>, cx: &mut Context<'_>) {
    if let Some(connection) = io
        && Pin::new(connection).poll(cx).is_ready()
    {
        // Whatever waits for it hears that it is gone. What it has to say about that, they hear, too.
        *io = None;
    }
}

/// Waits for what only a turn of the connection can bring.
struct Driven<'a, C, F> {
    io: &'a mut Option<C>,
    waits_for: Pin<&'a mut F>,
}

impl<C: Future + Unpin, F: Future> Future for Driven<'_, C, F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        turn(self.io, cx);
        // This task is being polled: a wake-up by the connection would only cost a turn through the
        // scheduler, so the waker does nothing. Tokio's cooperative budget must be off then: what that stops
        // goes on only when its waker is called.
        let waits_for = pin!(unconstrained(self.waits_for.as_mut()));
        waits_for.poll(&mut Context::from_waker(Waker::noop()))
    }
}

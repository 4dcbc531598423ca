//! Toy-RPC's codec over our frames.
//!
//! Toy-RPC hands a codec a header and a body for every message and takes the same from it. Its own
//! codec would trust lengths, write the two in separate flushed pieces, and reach a `todo!()` when a
//! write fails. This one keeps to four rules that Toy-RPC's loops need:
//!
//! - **Reading never fails, it ends.** After an error Toy-RPC's server reads on for ever; after `None`
//!   it stops. So every error closes the connection through its [`Closer`] and reads as the end.
//! - **Writing never fails.** After a write error Toy-RPC's client panics at the end of the stream. So
//!   a message for a closed connection is dropped, and the reading side ends the tasks.
//! - **Only calls of known procedures come in**, so nothing that a peer sends makes Toy-RPC log.
//! - **Only bytes of this process reach bincode.** Toy-RPC asks for its header as "any type that can
//!   be deserialised"; the one built from a checked frame takes a detour through bincode's bytes.
//!
//! Messages go to a task of their own ([`flush`]), which writes all that waits with one flush. The
//! server side admits a bounded number of calls and bytes, and stops reading beyond.

mod body;
mod flush;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::io::{AsyncRead, AsyncWrite, BufReader};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;
use toy_rpc::codec::split::SplittableCodec;
use toy_rpc::codec::{Codec, CodecRead, CodecWrite, EraseDeserializer, Marshal, Unmarshal};
use toy_rpc::erased_serde;
use toy_rpc::error::CodecError;
use toy_rpc::message::{MessageId, Metadata};
use toy_rpc::protocol::Header;
use toy_rpc::util::GracefulShutdown;

use super::closer::{CloseReason, Closer};
use super::frame::{FrameError, FrameHeader, FrameKind, FrameLimits, read_frame};
use super::wire::Method;
use flush::Outbound;

/// The error that Toy-RPC's serialisation traits want.
type ParseError = Box<dyn std::error::Error + Send + Sync>;

/// Toy-RPC's own codec, used for its serialisation of headers only.
type Bincode = Codec<(), (), ()>;

/// How long Toy-RPC lets a call run. It would abort the work and log; we bound calls ourselves, and
/// far below this.
pub(in crate::network) const NEVER: Duration = Duration::from_secs(24 * 3600);

/// Messages that wait to be written. The calls in flight bound them too; this keeps the buffered
/// bytes low while a peer reads slowly.
const OUTBOUND_MESSAGES_MAX: usize = 16;

/// The unit in which bytes in flight are counted: a semaphore counts to 2^29 at least.
const ADMISSION_UNIT_BYTES: usize = 1 << 10;

/// A stream split into a codec's two halves.
pub(in crate::network) struct PeerCodec<R> {
    reader: PeerReader<R>,
    writer: PeerWriter,
}

/// The reading half.
pub(in crate::network) struct PeerReader<R> {
    stream: BufReader<R>,
    limits: FrameLimits,
    /// `Some` on the server side, which is also what tells the two sides apart.
    admission: Option<Arc<Admission>>,
    closer: Closer,
    body: Vec<u8>,
    _alive: TaskTrackerToken,
}

/// The writing half.
pub(in crate::network) struct PeerWriter {
    outbound: mpsc::Sender<Outbound>,
    admission: Option<Arc<Admission>>,
    closer: Closer,
    header: Option<FrameHeader>,
    _alive: TaskTrackerToken,
}

/// Bounds the calls that a server works on for one connection.
pub(in crate::network) struct Admission {
    calls: Arc<Semaphore>,
    units: Arc<Semaphore>,
    held: Mutex<HashMap<MessageId, [OwnedSemaphorePermit; 2]>>,
}

impl Admission {
    /// `bytes_max` must be at least the largest frame, or that frame would wait for ever.
    pub(in crate::network) fn new(calls_max: usize, bytes_max: usize) -> Self {
        Self {
            calls: Arc::new(Semaphore::new(calls_max)),
            units: Arc::new(Semaphore::new(bytes_max.div_ceil(ADMISSION_UNIT_BYTES))),
            held: Mutex::default(),
        }
    }

    /// Waits for room for a call, or fails if its id is in use already.
    async fn admit(&self, id: MessageId, bytes: usize) -> Result<(), CloseReason> {
        let units = bytes.div_ceil(ADMISSION_UNIT_BYTES) as u32;
        let call = Arc::clone(&self.calls).acquire_owned().await;
        let units = Arc::clone(&self.units).acquire_many_owned(units).await;
        let permits = [
            call.expect("the semaphore is never closed"),
            units.expect("the semaphore is never closed"),
        ];
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        match held.insert(id, permits) {
            None => Ok(()),
            Some(_) => Err(CloseReason::Protocol("two calls in flight with one id".into())),
        }
    }

    fn release(&self, id: MessageId) {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
    }
}

impl<R: AsyncRead + Send + Unpin> PeerCodec<R> {
    /// A codec over a greeted stream. Its writing task and both halves count as tasks of `tracker`.
    pub(in crate::network) fn new<W>(
        (read, write): (R, W),
        limits: FrameLimits,
        admission: Option<Admission>,
        closer: Closer,
        tracker: &TaskTracker,
    ) -> Self
    where
        W: AsyncWrite + Send + Unpin + 'static,
    {
        let admission = admission.map(Arc::new);
        let (outbound, waiting) = mpsc::channel(OUTBOUND_MESSAGES_MAX);
        tracker.spawn(flush::run(write, waiting, closer.clone()));
        let reader = PeerReader {
            stream: BufReader::new(read),
            limits,
            admission: admission.clone(),
            closer: closer.clone(),
            body: Vec::new(),
            _alive: tracker.token(),
        };
        let writer =
            PeerWriter { outbound, admission, closer, header: None, _alive: tracker.token() };
        Self { reader, writer }
    }
}

impl<R: AsyncRead + Send + Unpin> PeerReader<R> {
    /// Reads one message; its body waits in `self.body`.
    async fn read_message(&mut self) -> Result<Header, CloseReason> {
        let (frame, body) = match read_frame(&mut self.stream, &self.limits).await {
            Ok(Some(read)) => read,
            Ok(None) => return Err(CloseReason::PeerClosed),
            Err(FrameError::Io(error)) => return Err(CloseReason::Io(error.to_string())),
            Err(error) => return Err(CloseReason::Protocol(error.to_string())),
        };
        let header = match &self.admission {
            Some(admission) => {
                let header = request_header(frame)?;
                admission.admit(frame.id, body.len()).await?;
                header
            }
            None => reply_header(frame)?,
        };
        self.body = body;
        Ok(header)
    }
}

fn request_header(frame: FrameHeader) -> Result<Header, CloseReason> {
    match (frame.kind, Method::from_number(frame.method)) {
        (FrameKind::Request, Some(method)) => Ok(Header::Request {
            id: frame.id,
            service_method: method.full_name().to_owned(),
            timeout: NEVER,
        }),
        _ => Err(CloseReason::Protocol("a frame that is no known request".into())),
    }
}

fn reply_header(frame: FrameHeader) -> Result<Header, CloseReason> {
    match frame.kind {
        FrameKind::Reply => Ok(Header::Response { id: frame.id, is_ok: true }),
        FrameKind::Request => Err(CloseReason::Protocol("a request where replies belong".into())),
    }
}

#[async_trait]
impl<R: AsyncRead + Send + Unpin> CodecRead for PeerReader<R> {
    async fn read_header<H>(&mut self) -> Option<Result<H, CodecError>>
    where
        H: serde::de::DeserializeOwned,
    {
        let closer = self.closer.clone();
        let read = tokio::select! {
            biased;
            () = closer.closed() => return None,
            read = self.read_message() => read,
        };
        match read {
            Ok(header) => {
                let bytes = Bincode::marshal(&header).ok()?;
                Bincode::unmarshal(&bytes).ok().map(Ok)
            }
            Err(reason) => {
                closer.close(reason);
                None
            }
        }
    }

    async fn read_bytes(&mut self) -> Option<Result<Vec<u8>, std::io::Error>> {
        Some(Ok(std::mem::take(&mut self.body)))
    }
}

impl PeerWriter {
    /// The frame that a Toy-RPC header stands for. `None` for what is not sent: a cancelled call
    /// still runs and its answer is ignored, so that no work stops half way.
    fn frame_for(&self, header: Header) -> Option<FrameHeader> {
        match header {
            Header::Request { id, service_method, .. } if self.admission.is_none() => {
                let method = Method::from_full_name(&service_method)?.number();
                Some(FrameHeader { kind: FrameKind::Request, method, id })
            }
            Header::Response { id, is_ok: true } if self.admission.is_some() => {
                Some(FrameHeader { kind: FrameKind::Reply, method: 0, id })
            }
            Header::Response { is_ok: false, .. } => {
                self.closer.close(CloseReason::Protocol("a request that cannot be taken".into()));
                None
            }
            _ => None,
        }
    }
}

#[async_trait]
impl CodecWrite for PeerWriter {
    async fn write_header<H>(&mut self, header: H) -> Result<(), CodecError>
    where
        H: serde::Serialize + Metadata + Send,
    {
        let bytes = Bincode::marshal(&header)?;
        self.header = self.frame_for(Bincode::unmarshal(&bytes)?);
        Ok(())
    }

    async fn write_body(
        &mut self,
        _: MessageId,
        body: &(dyn erased_serde::Serialize + Send + Sync),
    ) -> Result<(), CodecError> {
        let Some(header) = self.header.take() else { return Ok(()) };
        let body = body::to_bytes(body).map_err(|error| CodecError::ParseError(error.into()))?;
        let outbound = Outbound::new(header, body);
        tokio::select! {
            biased;
            () = self.closer.closed() => {}
            // It fails only when the writing task has ended, which closes the connection.
            _ = self.outbound.send(outbound) => {}
        }
        if let Some(admission) = &self.admission {
            admission.release(header.id);
        }
        Ok(())
    }

    async fn write_body_bytes(&mut self, _: MessageId, _: &[u8]) -> Result<(), std::io::Error> {
        // Only Toy-RPC's publications come here, and there are none.
        Ok(())
    }
}

#[async_trait]
impl GracefulShutdown for PeerWriter {
    async fn close(&mut self) {
        self.closer.close(CloseReason::Local);
    }
}

impl<R: AsyncRead + Send + Unpin> SplittableCodec for PeerCodec<R> {
    type Writer = PeerWriter;
    type Reader = PeerReader<R>;

    fn split(self) -> (PeerWriter, PeerReader<R>) {
        (self.writer, self.reader)
    }
}

impl<R> EraseDeserializer for PeerReader<R> {
    fn from_bytes(bytes: Vec<u8>) -> Box<dyn erased_serde::Deserializer<'static> + Send> {
        Box::new(<dyn erased_serde::Deserializer>::erase(body::BodyDeserializer::new(bytes)))
    }
}

impl<R> Unmarshal for PeerReader<R> {
    fn unmarshal<'de, D: serde::Deserialize<'de>>(bytes: &'de [u8]) -> Result<D, ParseError> {
        Bincode::unmarshal(bytes)
    }
}

impl Marshal for PeerWriter {
    fn marshal<S: serde::Serialize>(value: &S) -> Result<Vec<u8>, ParseError> {
        Bincode::marshal(value)
    }
}

impl<R> Unmarshal for PeerCodec<R> {
    fn unmarshal<'de, D: serde::Deserialize<'de>>(bytes: &'de [u8]) -> Result<D, ParseError> {
        Bincode::unmarshal(bytes)
    }
}

impl<R> Marshal for PeerCodec<R> {
    fn marshal<S: serde::Serialize>(value: &S) -> Result<Vec<u8>, ParseError> {
        Bincode::marshal(value)
    }
}

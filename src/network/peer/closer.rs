//! Closing a connection: one token that everything on it watches, and the first reason.

use std::sync::{Arc, OnceLock};

use tokio_util::sync::CancellationToken;

/// Why a connection ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(in crate::network) enum CloseReason {
    /// The other end closed it, between two messages.
    #[error("the peer closed the connection")]
    PeerClosed,
    /// Reading or writing failed.
    #[error("{0}")]
    Io(String),
    /// The other end sent what no peer sends.
    #[error("the peer broke the protocol: {0}")]
    Protocol(String),
    /// A reply did not come.
    #[error("a call was not answered in time")]
    Timeout,
    /// The other end took nothing for too long.
    #[error("the peer does not take what is sent to it")]
    Stalled,
    /// The same peer connected again for the same purpose.
    #[error("replaced by a newer connection of the same peer")]
    Superseded,
    /// It was a stranger's, and other strangers came.
    #[error("no member's, and had to make room")]
    Evicted,
    /// This node does not need it any more.
    #[error("closed by this node")]
    Local,
}

impl CloseReason {
    /// Whether connections end so in the ordinary course of things: nodes come and go.
    pub(in crate::network) fn is_orderly(&self) -> bool {
        match self {
            Self::PeerClosed | Self::Superseded | Self::Evicted | Self::Local => true,
            Self::Io(_) | Self::Protocol(_) | Self::Timeout | Self::Stalled => false,
        }
    }
}

/// Closes one connection, once. Cheap to clone.
#[derive(Debug, Clone)]
pub(in crate::network) struct Closer {
    token: CancellationToken,
    reason: Arc<OnceLock<CloseReason>>,
}

impl Closer {
    /// A connection that also ends when `parent` is cancelled.
    pub(in crate::network) fn under(parent: &CancellationToken) -> Self {
        Self { token: parent.child_token(), reason: Arc::default() }
    }

    /// Ends the connection. The first reason stays.
    pub(in crate::network) fn close(&self, reason: CloseReason) {
        // A second reason is a consequence of the first.
        let _ = self.reason.set(reason);
        self.token.cancel();
    }

    pub(in crate::network) fn is_closed(&self) -> bool {
        self.token.is_cancelled()
    }

    /// Returns when the connection has ended. Cancel safe.
    pub(in crate::network) async fn closed(&self) {
        self.token.cancelled().await;
    }

    /// Why the connection ended, or is about to.
    pub(in crate::network) fn reason(&self) -> CloseReason {
        self.reason.get().cloned().unwrap_or(CloseReason::Local)
    }
}

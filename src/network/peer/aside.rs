//! Values that are slow to let go of.

use std::ops::Deref;

use tokio::runtime::Handle;

/// Drops its value on a thread that may block, wherever it is dropped itself: a future that somebody gives up is
/// dropped on one that others wait for.
pub(in crate::network) struct Aside<T: Send + 'static>(Option<T>);

impl<T: Send> Aside<T> {
    pub(in crate::network) fn new(value: T) -> Self {
        Self(Some(value))
    }
}

impl<T: Send> Deref for Aside<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.0.as_ref().expect("it is taken when this is dropped, and not before")
    }
}

impl<T: Send> Drop for Aside<T> {
    fn drop(&mut self) {
        let value = self.0.take();
        // Without a runtime nobody waits for this thread.
        if let Ok(runtime) = Handle::try_current() {
            drop(runtime.spawn_blocking(move || drop(value)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::pending;
    use std::thread::{self, ThreadId};
    use std::time::Duration;

    use tokio::sync::mpsc;

    /// Tells on which thread it went.
    struct Slow(mpsc::UnboundedSender<ThreadId>);

    impl Drop for Slow {
        fn drop(&mut self) {
            self.0.send(thread::current().id()).unwrap();
        }
    }

    #[tokio::test]
    async fn who_gives_a_future_up_does_not_wait_for_what_it_holds() {
        let (sender, mut dropped) = mpsc::unbounded_channel();
        let held = Aside::new(Slow(sender));
        let work = async move {
            let _held = &held.0;
            pending::<()>().await;
        };
        tokio::time::timeout(Duration::from_millis(1), work).await.unwrap_err();
        let on = tokio::time::timeout(Duration::from_secs(20), dropped.recv()).await.unwrap();
        assert_ne!(on, Some(thread::current().id()));
    }
}

//! Wakes whoever waits for a change of a VM.

use std::sync::Arc;

use tokio::sync::watch;

/// Shared by the parts of a VM.
#[derive(Clone, Debug, Default)]
pub struct Changes(Arc<watch::Sender<u64>>);

impl Changes {
    /// Something may have changed.
    pub fn note(&self) {
        self.0.send_modify(|n| *n = n.wrapping_add(1));
    }

    /// Wakes up at each change from now on.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.0.subscribe()
    }
}

//! A shard on a thread of its own.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use super::{News, Shard};
use crate::carrier::Carrier;
use crate::inbox::{Command, Inbox};
use crate::port::Notice;

/// A shard on its own thread. Dropping it stops the shard.
#[derive(Debug)]
pub struct ShardThread {
    inbox: Arc<Inbox>,
    thread: Option<JoinHandle<()>>,
}

impl<C: Carrier + Send + 'static> Shard<C> {
    /// Runs the shard on a thread. News for an owner are dropped, and guest requests without a listener are refused.
    /// Use handles to talk to the shard.
    ///
    /// # Errors
    /// The thread cannot be created.
    pub fn spawn(mut self, name: &str) -> io::Result<ShardThread> {
        let inbox = self.inbox.clone();
        let run = move || {
            while !self.stopped {
                if let Err(e) = self.turn(None) {
                    tracing::error!(error = %e, "shard ends");
                    return;
                }
                while let Some(news) = self.poll_news() {
                    if let News::Notice(port, Notice::Incoming { stream, .. }) = news {
                        let now = self.now();
                        self.port_mut(port).refuse(now, stream);
                    }
                }
            }
        };
        let thread = std::thread::Builder::new()
            .name(name.chars().take(15).collect())
            .spawn(run)?;
        Ok(ShardThread {
            inbox,
            thread: Some(thread),
        })
    }
}

impl Drop for ShardThread {
    fn drop(&mut self) {
        self.inbox.send(Command::Stop);
        if let Some(thread) = self.thread.take() {
            // If it panicked there is nothing left to clean up.
            let _ = thread.join();
        }
    }
}

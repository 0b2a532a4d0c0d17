//! The worker's end of the socket to its monitor: asks, and awaits the answers. A monitor may go, and the next one comes; what was
//! asked and not answered fails then.

use std::collections::HashMap;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use adit_passed::Passed;
use tokio::sync::{oneshot, watch};

use super::packets::Packets;
use super::wire::{Message, WireError};

/// Why something that was asked for is not done.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// There is no monitor.
    #[error(
        "aditd's monitor is not there: what is there goes on, and nothing new is started until it is back"
    )]
    Absent,
    /// It says no.
    #[error("{0}")]
    Refused(String),
    /// It cannot be asked.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// It answered something else.
    #[error("aditd's monitor answered with a packet of another kind")]
    Other,
}

type Answer = (Message, Vec<Passed>);

/// What the monitor says without being asked.
#[derive(Debug)]
pub enum Told {
    /// It has found this worker.
    Hello,
    /// The configuration was read again; or why not.
    Config(Result<Passed, String>),
    /// To end.
    Stop,
}

/// The socket, and who waits for an answer.
#[derive(Debug)]
pub struct Client {
    connection: watch::Sender<Option<Arc<Packets>>>,
    waiting: Mutex<HashMap<u32, oneshot::Sender<Answer>>>,
    next: AtomicU32,
}

impl Default for Client {
    fn default() -> Self {
        Self {
            connection: watch::Sender::new(None),
            waiting: Mutex::default(),
            // 0 is what needs no answer.
            next: AtomicU32::new(1),
        }
    }
}

/// A place among those who wait. Dropped = waits no more.
struct Waits<'a> {
    of: &'a Client,
    id: u32,
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.of.waiting().remove(&self.id);
    }
}

impl Client {
    /// Whether there is no monitor at the moment.
    pub fn is_absent(&self) -> bool {
        self.connection.borrow().is_none()
    }

    /// Waits until there is a monitor.
    pub async fn is_there(&self) {
        let mut connection = self.connection.subscribe();
        // The sender is this object's.
        let _ = connection.wait_for(Option::is_some).await;
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// There is no monitor, it goes before it answers, or it says no.
    pub async fn ask(&self, message: &Message, fds: &[BorrowedFd<'_>]) -> Result<Answer, AskError> {
        let connection = self.connection.borrow().clone().ok_or(AskError::Absent)?;
        let id = self.next_id();
        let (tell, told) = oneshot::channel();
        self.waiting().insert(id, tell);
        let _waits = Waits { of: self, id };
        connection.send(id, message, fds).await?;
        match told.await {
            Ok((Message::Refused(refused), _)) => Err(AskError::Refused(refused.text)),
            Ok(answer) => Ok(answer),
            Err(_) => Err(AskError::Absent),
        }
    }

    /// Says what has no answer.
    ///
    /// # Errors
    /// There is no monitor.
    pub async fn say(&self, message: &Message, fds: &[BorrowedFd<'_>]) -> Result<(), AskError> {
        let connection = self.connection.borrow().clone().ok_or(AskError::Absent)?;
        Ok(connection.send(0, message, fds).await?)
    }

    /// Asks this monitor from now on. [`drive`](Self::drive) hears its answers.
    pub fn connect(&self, packets: Packets) -> Arc<Packets> {
        let packets = Arc::new(packets);
        self.connection.send_replace(Some(packets.clone()));
        packets
    }

    /// Serves the connection until it ends.
    ///
    /// # Errors
    /// The monitor says what it never says.
    pub async fn drive(
        &self,
        packets: Arc<Packets>,
        mut on: impl FnMut(Told),
    ) -> Result<(), WireError> {
        let ended = Ends(self);
        while let Some((id, message, mut fds)) = packets.receive().await? {
            match message {
                Message::Hello(_) => on(Told::Hello),
                Message::Config(config) => on(Told::Config(fds.pop().ok_or(config.error))),
                Message::Stop(_) => on(Told::Stop),
                message => {
                    if let Some(tell) = self.waiting().remove(&id) {
                        // Whoever asked may have gone.
                        let _ = tell.send((message, fds));
                    }
                }
            }
        }
        drop(ended);
        Ok(())
    }

    fn next_id(&self) -> u32 {
        match self.next.fetch_add(1, Ordering::Relaxed) {
            0 => self.next.fetch_add(1, Ordering::Relaxed),
            id => id,
        }
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<u32, oneshot::Sender<Answer>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The end of a connection, also where its future is dropped for another one.
struct Ends<'a>(&'a Client);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.connection.send_replace(None);
        // Whoever waits learns that there will be no answer.
        self.0.waiting().clear();
    }
}

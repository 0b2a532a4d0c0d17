//! The thread that talks to one VM's frontend.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use vhost::vhost_user::{BackendReqHandler, Error};

use super::VhostUserConfig;
use super::command::{Command, Link};
use super::handler::Handler;

const STACK_BYTES: usize = 128 * 1024;
/// Pause after a failed accept (no descriptors left), ms.
const ACCEPT_RETRY_MS: u16 = 100;

/// What the carrier and the thread share to end it.
struct Control {
    stop: AtomicBool,
    stop_event: EventFd,
    /// The connection, to cut it off from outside.
    current: Mutex<Option<UnixStream>>,
}

impl Control {
    fn stopping(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    fn set_current(&self, connection: Option<UnixStream>) {
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = connection;
    }
}

/// The carrier's handle on the thread. Dropped = the connection is cut and the thread ends.
pub(super) struct Frontend {
    waker: Arc<EventFd>,
    control: Arc<Control>,
    thread: Option<JoinHandle<()>>,
}

impl Frontend {
    pub(super) fn spawn(
        config: VhostUserConfig,
        commands: SyncSender<Command>,
    ) -> io::Result<Self> {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let waker = Arc::new(EventFd::from_flags(flags)?);
        let control = Arc::new(Control {
            stop: AtomicBool::new(false),
            stop_event: EventFd::from_flags(flags)?,
            current: Mutex::new(None),
        });
        // `accept` must not block when a frontend gave up between poll and accept.
        config.listener.set_nonblocking(true)?;
        let link = Link {
            commands,
            waker: waker.clone(),
        };
        let handler = Handler::new(config.guest_cid, config.queue_max, config.memory, link);
        // Linux keeps 15 bytes of a thread's name.
        let name: String = format!("vu-{}", config.name).chars().take(15).collect();
        let thread = std::thread::Builder::new()
            .name(name)
            .stack_size(STACK_BYTES)
            .spawn({
                let control = control.clone();
                move || serve(&config.listener, &config.name, handler, &control)
            })?;
        Ok(Self {
            waker,
            control,
            thread: Some(thread),
        })
    }

    pub(super) fn waker(&self) -> &EventFd {
        &self.waker
    }

    /// Makes the carrier's command waker readable.
    pub(super) fn wake(&self) {
        // Fails only when it is readable already.
        let _ = self.waker.write(1);
    }
}

impl Drop for Frontend {
    fn drop(&mut self) {
        self.control.stop.store(true, Ordering::SeqCst);
        let _ = self.control.stop_event.write(1);
        let current = self.control.current.lock();
        if let Some(connection) = &*current.unwrap_or_else(PoisonError::into_inner) {
            let _ = connection.shutdown(std::net::Shutdown::Both);
        }
        if let Some(thread) = self.thread.take() {
            // It panicked: nothing is left to clean up.
            let _ = thread.join();
        }
    }
}

fn serve(listener: &UnixListener, vm: &str, handler: Handler, control: &Control) {
    let handler = Arc::new(Mutex::new(handler));
    while let Some(connection) = accept(listener, control) {
        match connection.try_clone() {
            Ok(clone) => control.set_current(Some(clone)),
            Err(e) => {
                tracing::warn!(vm, error = %e, "vhost-user frontend not served");
                continue;
            }
        }
        // `Frontend::drop` either saw the connection, or set the flag before.
        if control.stopping() {
            return;
        }
        tracing::info!(vm, "vhost-user frontend connected");
        let mut requests = BackendReqHandler::from_stream(connection, handler.clone());
        let end = loop {
            match requests.handle_request() {
                Ok(()) | Err(Error::SocketRetry(_)) => {}
                Err(e) => break e,
            }
        };
        drop(requests);
        control.set_current(None);
        handler
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .gone();
        match end {
            Error::Disconnected => tracing::info!(vm, "vhost-user frontend gone"),
            e => tracing::warn!(vm, error = %e, "vhost-user frontend cut off"),
        }
    }
}

/// Waits for a frontend. `None` = stop.
fn accept(listener: &UnixListener, control: &Control) -> Option<UnixStream> {
    let mut only_stop = false;
    loop {
        let mut fds = [
            PollFd::new(control.stop_event.as_fd(), PollFlags::POLLIN),
            PollFd::new(listener.as_fd(), PollFlags::POLLIN),
        ];
        let (watched, timeout) = if only_stop {
            (&mut fds[..1], PollTimeout::from(ACCEPT_RETRY_MS))
        } else {
            (&mut fds[..], PollTimeout::NONE)
        };
        let polled = poll(watched, timeout);
        if control.stopping() || polled.is_err_and(|e| e != nix::errno::Errno::EINTR) {
            return None;
        }
        only_stop = false;
        match listener.accept() {
            Ok((connection, _)) => return Some(connection),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(e) => {
                tracing::warn!(error = %e, "cannot accept a vhost-user frontend");
                only_stop = true;
            }
        }
    }
}

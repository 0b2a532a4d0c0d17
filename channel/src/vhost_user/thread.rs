//! The thread that communicates with one VM's frontend.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::Ordering;
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use adit_passed::{Apart, Closer};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SigSet, Signal};
use vhost::vhost_user::Error;

use super::VhostUserConfig;
use super::command::{Command, Link};
use super::control::{ACCEPT_RETRY_MS, Control};
use super::handler::Handler;
use super::handover::Handover;
use super::intake::{Continuity, Ended, Intake};

const STACK_BYTES: usize = 128 * 1024;

/// Releases a frontend's connection for a successor.
#[derive(Clone)]
pub struct Releaser(pub(super) Arc<Control>);

impl Releaser {
    /// Ends the frontend's thread between two messages without closing the connection, even when the carrier is
    /// dropped. The keeper is informed. The device continues until it is dropped.
    pub fn release(&self) {
        self.0.release.store(true, Ordering::SeqCst);
        self.0.stop.store(true, Ordering::SeqCst);
        let _ = self.0.stop_event.write(1);
    }
}

/// The carrier's handle on the thread. Dropping it cuts the connection off and ends the thread.
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
        let control = Arc::new(Control::new()?);
        // `accept` must not block if a frontend gave up between poll and accept.
        config.listener.set_nonblocking(true)?;
        let link = Link {
            commands,
            waker: waker.clone(),
        };
        let handler = Handler::new(config.guest_cid, config.queue_max, config.memory, link);
        // Linux keeps only 15 bytes of a thread's name.
        let continuity = Continuity {
            live: config.live,
            keeper: config.keeper,
            changes: 0,
        };
        let name: String = format!("vu-{}", config.name).chars().take(15).collect();
        let thread = std::thread::Builder::new()
            .name(name)
            .stack_size(STACK_BYTES)
            .spawn({
                let control = control.clone();
                move || {
                    let mut thread = Serving {
                        listener: config.listener,
                        vm: config.name,
                        handler: Arc::new(Mutex::new(handler)),
                        control,
                        continuity,
                    };
                    thread.run(config.resume);
                }
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

    pub(super) fn control(&self) -> Arc<Control> {
        self.control.clone()
    }

    pub(super) fn is_connected(&self) -> bool {
        self.control.connected.load(Ordering::SeqCst)
    }

    /// Makes the carrier's command waker readable.
    pub(super) fn wake(&self) {
        // The write fails only when the counter is full, and then the eventfd is readable anyway.
        let _ = self.waker.write(1);
    }
}

impl Drop for Frontend {
    fn drop(&mut self) {
        self.control.stop.store(true, Ordering::SeqCst);
        let _ = self.control.stop_event.write(1);
        let current = self.control.current.lock();
        if !self.control.release.load(Ordering::SeqCst)
            && let Some(connection) = &*current.unwrap_or_else(PoisonError::into_inner)
        {
            let _ = connection.shutdown(std::net::Shutdown::Both);
        }
        if let Some(thread) = self.thread.take() {
            // If it panicked there is nothing left to clean up.
            let _ = thread.join();
        }
    }
}

/// The state of the thread.
struct Serving {
    listener: UnixListener,
    vm: String,
    handler: Arc<Mutex<Handler>>,
    control: Arc<Control>,
    continuity: Continuity,
}

impl Serving {
    /// Serves one frontend after the other. The first one may come from a predecessor.
    fn run(&mut self, mut inherited: Option<Handover>) {
        // `sendfile` to a closed socket raises SIGPIPE, and a process that links this crate may not ignore that signal
        // (R52).
        let mut pipe = SigSet::empty();
        pipe.add(Signal::SIGPIPE);
        if let Err(e) = pipe.thread_block() {
            tracing::warn!(vm = self.vm, error = %e, "cannot block SIGPIPE");
        }
        loop {
            let intake = match inherited.take() {
                Some(handover) => self.resume(handover),
                None => match accept(&self.listener, &self.control) {
                    Some(connection) => self.begin(connection),
                    None => break,
                },
            };
            let Some(intake) = intake else { continue };
            match intake.socket().try_clone() {
                Ok(clone) => {
                    self.control.set_current(Some(clone));
                    self.handler().wake();
                }
                Err(e) => {
                    tracing::warn!(vm = self.vm, error = %e, "cannot serve the vhost-user frontend");
                    continue;
                }
            }
            if self.serve(intake) {
                break;
            }
        }
        if self.control.release.load(Ordering::SeqCst)
            && let Some(keeper) = &mut self.continuity.keeper
        {
            keeper.released();
        }
    }

    fn begin(&mut self, connection: UnixStream) -> Option<Intake> {
        tracing::info!(vm = self.vm, "vhost-user frontend connected");
        let connection = Apart::new(connection, &Closer::shared());
        let begun = Intake::new(connection, self.handler.clone());
        begun
            .inspect_err(
                |e| tracing::warn!(vm = self.vm, error = %e, "cannot serve the vhost-user frontend"),
            )
            .ok()
    }

    fn resume(&mut self, handover: Handover) -> Option<Intake> {
        match Intake::resume(handover, self.handler.clone(), &mut self.continuity) {
            Ok(intake) => {
                tracing::info!(vm = self.vm, "vhost-user frontend taken over");
                Some(intake)
            }
            Err(e) => {
                tracing::error!(vm = self.vm, error = %e, "vhost-user frontend cannot be taken over");
                self.handler().disconnected();
                self.continuity.give_up(e.to_string());
                None
            }
        }
    }

    /// Returns true if the thread must end.
    fn serve(&mut self, mut intake: Intake) -> bool {
        let end = loop {
            // If `Frontend::drop` did not see this connection, it set the stop flag before.
            match intake.step(&self.control, &mut self.continuity) {
                Ok(()) => {}
                Err(Ended::Stop) => return true,
                Err(Ended::Gone(e)) => break e,
            }
        };
        // The close may take long, so shut the connection down first: the frontend sees its end now.
        let _ = intake.socket().shutdown(std::net::Shutdown::Both);
        drop(intake);
        self.control.set_current(None);
        self.handler().wake();
        self.handler().disconnected();
        self.continuity.forget();
        match end {
            Error::Disconnected => tracing::info!(vm = self.vm, "vhost-user frontend gone"),
            e => {
                tracing::warn!(vm = self.vm, error = %e, "vhost-user frontend cut off");
                self.continuity.refuse(format!("the VMM was cut off: {e}"));
            }
        }
        false
    }

    fn handler(&self) -> MutexGuard<'_, Handler> {
        self.handler.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits for a frontend. `None` means stop.
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

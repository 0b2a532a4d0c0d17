//! What other threads ask of a shard, and what becomes of it when the shard ends.

use adit_engine::Tick;

use super::{PortIndex, Shard};
use crate::backlog::ListenError;
use crate::carrier::Carrier;
use crate::dial::DialError;
use crate::inbox::Command;
use crate::sink::Sink;

impl<C: Carrier> Shard<C> {
    /// Does what another thread asks.
    pub(super) fn command(&mut self, now: Tick, command: Command) {
        match command {
            Command::Dial(p, request, end) => {
                let mut state = end.0.lock();
                if state.abandoned {
                    return;
                }
                match self
                    .port_mut(PortIndex(p))
                    .dial(now, request, Some(Sink::Local(end.clone())))
                {
                    Ok(stream) => state.stream = Some(stream),
                    Err(e) => {
                        drop(state);
                        end.fail(e);
                    }
                }
            }
            Command::Listen(p, at, backlog) => {
                // A listener that was dropped may be replaced.
                let taken = self.listeners.get(&(p, at)).is_some_and(|l| l.is_open());
                let listened = match taken {
                    true => Err(ListenError::Taken { port: at }),
                    false => (self.port_mut(PortIndex(p)).listen(at)).map_err(Into::into),
                };
                if listened.is_ok() {
                    self.listeners.insert((p, at), backlog.clone());
                }
                backlog.listening(listened);
            }
            Command::Accept(p, stream, end) => {
                self.port_mut(PortIndex(p))
                    .accept(now, stream, Some(Sink::Local(end.clone())));
                if !end.0.lock().open {
                    end.fail(DialError::Reset);
                }
            }
            Command::Refuse(p, stream) => self.port_mut(PortIndex(p)).refuse(now, stream),
            Command::Changed(p, stream) => self.port_mut(PortIndex(p)).local_changed(now, stream),
            Command::Reset(p, stream, why) => self.port_mut(PortIndex(p)).reset(now, stream, why),
            Command::Attach(p, stream, sink) => {
                let port = self.port_mut(PortIndex(p));
                // Only an agent splices, so the other end is a port process, which ends in order.
                port.expect_order(stream);
                port.attach(now, stream, sink, &[]);
            }
            Command::Stop => self.stopped = true,
        }
    }
}

impl<C: Carrier> Drop for Shard<C> {
    fn drop(&mut self) {
        for command in self.inbox.close() {
            if let Command::Listen(_, _, backlog) = &command {
                backlog.close();
            }
            if let Command::Dial(_, _, end) | Command::Accept(_, _, end) = command {
                end.fail(DialError::Cancelled);
            }
        }
        for backlog in self.listeners.values() {
            backlog.close();
        }
    }
}

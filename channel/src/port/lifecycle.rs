//! What happens to a stream apart from its packets: dials, hellos, ends, and sinks that outlive their streams.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use adit_engine::{Event, How, ResetReason, StreamId, Tick};

use nix::sys::epoll::EpollFlags;

use super::entry::{self, Entry, Phase};
use super::watch::Token;
use super::{KEPT_MAX, LINGER_BYTES_MAX, LINGER_MAX, Linger, Notice, Port, Totals};
use crate::carrier::Carrier;
use crate::dial::{Dial, DialError};
use crate::hello::Accept;
use crate::rate::{Limit, Rate, Way};
use crate::sink::Sink;

impl<C: Carrier> Port<C> {
    /// Handles the engine's events. Returns true if there were any.
    pub(super) fn handle_events(&mut self, now: Tick) -> bool {
        let mut any = false;
        while let Some(event) = self.engine.poll_event() {
            any = true;
            self.handle_event(now, event);
        }
        any
    }

    /// Limits how many bytes a second the sink of a stream takes and gives, to the least of these rates; without any it is not
    /// limited any more. Only a socket is limited.
    pub fn limit(&mut self, now: Tick, stream: StreamId, rates: Vec<Rate>) {
        let Some(entry) = self.entry(stream) else {
            return;
        };
        let old = std::mem::replace(&mut entry.limit, Limit::new(rates));
        if let Some(old) = old {
            self.forget_waits(stream, &old);
            // What it waited for is given back before anything is taken anew.
            drop(old);
            self.drain_held(now, stream.slot());
            self.settle(now, stream.slot());
        }
    }

    /// Streams whose limits have let nothing through until now.
    pub(super) fn release_limited(&mut self, now: Tick) {
        while let Some(&(at, slot, way)) = self.limited.first()
            && at <= now
        {
            self.limited.pop_first();
            let entry = self.entries.get_mut(slot as usize);
            let limit = entry.and_then(|e| e.as_mut()?.limit.as_mut());
            if limit.is_some_and(|limit| limit.release(now, way)) {
                if way == Way::Out {
                    self.drain_held(now, slot);
                }
                self.settle(now, slot);
            }
        }
    }

    fn forget_waits(&mut self, stream: StreamId, limit: &Limit) {
        for way in [Way::In, Way::Out] {
            if let Some(at) = limit.until(way) {
                self.limited.remove(&(at, stream.slot(), way));
            }
        }
    }

    fn handle_event(&mut self, now: Tick, event: Event) {
        match event {
            Event::Incoming {
                stream,
                local_port,
                peer_port,
            } => {
                self.insert(Entry::new(stream, Phase::Asked));
                self.notices.push_back(Notice::Incoming {
                    stream,
                    local_port,
                    peer_port,
                });
            }
            Event::Connected { stream } => self.connected(now, stream),
            Event::Writable { stream } => self.settle(now, stream.slot()),
            Event::PeerShutdown { stream, how } => self.peer_shutdown(now, stream, how),
            Event::HungUp { stream } => self.hung_up(now, stream),
            Event::Closed { stream, reason } => self.closed(now, stream, reason),
        }
    }

    fn connected(&mut self, now: Tick, stream: StreamId) {
        let Some(entry) = self.entry(stream) else {
            return;
        };
        let Phase::Dialing(dial) = &mut entry.phase else {
            return;
        };
        match dial.connected() {
            Some(hello) => {
                entry.out.extend(hello);
                self.settle(now, stream.slot());
                // A foreign listener may have sent bytes first.
                self.read_hello(now, stream.slot());
            }
            None => self.dialed(now, stream, None),
        }
    }

    /// Takes a dial out of its stream, which is open from now on, or about to be removed: the one place where a dial ends.
    fn end_dial(&mut self, stream: StreamId) -> Option<Box<Dial>> {
        let entry = self.entry(stream)?;
        match std::mem::replace(&mut entry.phase, Phase::Open) {
            Phase::Dialing(dial) => {
                if let Some(deadline) = dial.deadline() {
                    self.deadlines.remove(&(deadline, stream.slot()));
                }
                Some(dial)
            }
            other => {
                entry.phase = other;
                None
            }
        }
    }

    /// Reads the answer to the hello from the held bytes. The rest stays held for the sink.
    pub(super) fn read_hello(&mut self, now: Tick, slot: u32) {
        let Some(Some(entry)) = self.entries.get_mut(slot as usize) else {
            return;
        };
        let stream = entry.id;
        let mut taken = 0;
        let outcome = loop {
            let Phase::Dialing(dial) = &mut entry.phase else {
                return;
            };
            if entry.held.is_empty() || !dial.is_in_hello() {
                break None;
            }
            let n = dial.wants().min(entry.held.len());
            let bytes: Vec<u8> = entry.held.drain(..n).collect();
            taken += n;
            if let Some(outcome) = dial.push(&bytes) {
                break Some(outcome);
            }
        };
        // At most the length of a hello.
        self.engine.consumed(now, stream, taken as u32);
        match outcome {
            None => {}
            Some(Ok(accept)) => {
                if let Some(entry) = self.entry(stream) {
                    entry.ends_in_order = true;
                }
                self.dialed(now, stream, Some(accept));
            }
            Some(Err(error)) => {
                self.fail_dial(stream, error);
                self.engine.reset(now, stream, ResetReason::Local);
            }
        }
    }

    fn dialed(&mut self, now: Tick, stream: StreamId, accept: Option<Accept>) {
        self.end_dial(stream);
        let Some(entry) = self.entry(stream) else {
            return;
        };
        // What is held behind the hello is the first of its bytes.
        entry.totals = Totals::default();
        entry.totals.add_from_guest(now, entry.held.len() as u64);
        match entry.sink.take() {
            Some(sink) => {
                if let Sink::Local(end) = &sink {
                    end.0.lock().accept = accept;
                }
                self.set_sink(now, stream, sink);
            }
            None => self.notices.push_back(Notice::Dialed { stream, accept }),
        }
    }

    /// Reports to the dialler that its dial failed, if the stream is one that is dialled. The caller must then end the stream,
    /// whose end is reported to no one.
    pub(super) fn fail_dial(&mut self, stream: StreamId, error: DialError) -> bool {
        if self.end_dial(stream).is_none() {
            return false;
        }
        let slot = self.entries.get_mut(stream.slot() as usize);
        let entry = slot.and_then(Option::take);
        match entry.and_then(|entry| entry.sink) {
            Some(Sink::Local(end)) => end.close(None, error),
            Some(Sink::Fd(fd)) => entry::abort(fd),
            Some(Sink::Inline(_)) => {}
            None => self.notices.push_back(Notice::DialFailed { stream, error }),
        }
        true
    }

    fn peer_shutdown(&mut self, now: Tick, stream: StreamId, how: How) {
        let Some(entry) = self.entry(stream) else {
            return;
        };
        if matches!(how, How::Send | How::Both) {
            entry.peer_done = true;
            if matches!(&entry.phase, Phase::Dialing(dial) if dial.is_in_hello()) {
                // It ended before it answered the hello.
                self.fail_dial(stream, DialError::Reset);
                self.engine.reset(now, stream, ResetReason::Local);
                return;
            }
        }
        if matches!(how, How::Receive | How::Both) {
            // The engine sends no more, whatever the sink has. Pass on our own end of this direction too.
            entry.readable = false;
            entry.sink_done = true;
            entry.out.clear();
            entry.stop_sink_writes();
            self.engine.shutdown(now, stream, How::Send);
        }
        self.settle(now, stream.slot());
    }

    /// The guest closed without ending its sending first. Most programs do that when they are finished; an agent does
    /// it when it dies.
    fn hung_up(&mut self, now: Tick, stream: StreamId) {
        let Some(entry) = self.entry(stream) else {
            return;
        };
        if !entry.ends_in_order {
            return self.peer_shutdown(now, stream, How::Both);
        }
        // `Closed` will reset the sink after it has got all bytes.
        entry.readable = false;
        entry.sink_done = true;
        entry.out.clear();
        entry.stop_sink_writes();
        self.settle(now, stream.slot());
    }

    fn closed(&mut self, now: Tick, stream: StreamId, reason: Option<ResetReason>) {
        if self.entry(stream).is_none() {
            return; // a failed dial, which was reported already
        }
        self.fail_dial(stream, DialError::from_reason(reason));
        let Some(mut entry) = self
            .entries
            .get_mut(stream.slot() as usize)
            .filter(|e| e.as_ref().is_some_and(|e| e.id == stream))
            .and_then(Option::take)
        else {
            return;
        };
        // A peer that has ended its sending waits for our end only for a limited time, then resets. Its bytes are
        // complete anyway.
        let complete = reason.is_none()
            || entry.peer_done
                && matches!(
                    reason,
                    Some(
                        ResetReason::Peer
                            | ResetReason::Told(_)
                            | ResetReason::Timeout
                            | ResetReason::HungUp
                    )
                );
        let reason = reason.filter(|_| !(complete && reason == Some(ResetReason::HungUp)));
        if let Some(limit) = entry.limit.take() {
            self.forget_waits(stream, &limit);
            if complete {
                // They go to a sink that outlives the stream, as fast as it takes them.
                limit.charge(now, Way::Out, entry.held.len() as u32);
            }
        }
        match entry.sink.take() {
            Some(Sink::Fd(fd)) => {
                self.watch.remove(fd.as_fd());
                if complete {
                    let held = std::mem::take(&mut entry.held);
                    self.linger(fd, held, entry.ends_in_order);
                } else {
                    entry::abort(fd);
                }
            }
            Some(Sink::Local(end)) => {
                if complete {
                    let mut state = end.0.lock();
                    state.to_app.append(&mut entry.held);
                    state.peer_done = true;
                }
                let reason = if complete { None } else { reason };
                end.close(reason, DialError::Reset);
            }
            Some(Sink::Inline(_)) | None => {}
        }
        let totals = entry.totals;
        self.notices.push_back(Notice::Closed {
            stream,
            reason,
            totals,
        });
    }

    /// Keeps a socket until it has accepted its held bytes. If that fails it is reset, so that the data does not look
    /// complete. With `in_order` a Unix socket is also kept until its other end is closed. If we closed it first, its
    /// reader would see a broken stream.
    fn linger(&mut self, fd: OwnedFd, held: VecDeque<u8>, in_order: bool) {
        let keep = in_order && entry::shows_close(fd.as_fd());
        if held.is_empty() {
            entry::finish(fd.as_fd());
            if !keep {
                return;
            }
        }
        // A socket without held bytes only uses its descriptor, which its stream also did.
        let waiting = self.lingering.iter().flatten();
        let (count, bytes, kept) = waiting.fold((0, 0, 0), |(n, b, k), l| match l.held.len() {
            0 => (n, b, k + 1),
            len => (n + 1, b + len, k),
        });
        let full = match held.len() {
            0 => kept >= KEPT_MAX,
            len => count >= LINGER_MAX || bytes + len > LINGER_BYTES_MAX,
        };
        if full {
            return entry::abort(fd);
        }
        let free = self.lingering.iter().position(Option::is_none);
        let index = free.unwrap_or(self.lingering.len());
        let token = Token::Linger(index as u32);
        let watched = self.watch.add_edge(fd.as_fd(), token);
        if let Err(e) = watched.and_then(|()| self.watch.edge_on_room(fd.as_fd(), token, true)) {
            tracing::warn!(error = %e, "cannot watch a sink");
            return entry::abort(fd);
        }
        if free.is_none() {
            self.lingering.push(None);
        }
        self.lingering[index] = Some(Linger { fd, held, keep });
    }

    pub(super) fn linger_ready(&mut self, index: usize, flags: EpollFlags) {
        let Some(Some(linger)) = self.lingering.get_mut(index) else {
            return;
        };
        let mut gone = flags.intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR);
        if !linger.held.is_empty() {
            let written = entry::write_held(linger.fd.as_fd(), &mut linger.held, usize::MAX);
            gone |= written.is_err();
            if linger.held.is_empty() {
                entry::finish(linger.fd.as_fd());
            }
        }
        let done = gone || linger.held.is_empty() && !linger.keep;
        if done && let Some(linger) = self.lingering[index].take() {
            self.watch.remove(linger.fd.as_fd());
            while self.lingering.last().is_some_and(Option::is_none) {
                self.lingering.pop();
            }
        }
    }

    /// Passes held bytes to a sink.
    pub(super) fn drain_held(&mut self, now: Tick, slot: u32) {
        let Some(Some(entry)) = self.entries.get_mut(slot as usize) else {
            return;
        };
        let id = entry.id;
        match entry.flush(now, &mut self.counters.bytes_copied) {
            Ok(0) => {}
            Ok(n) => self.engine.consumed(now, id, n),
            Err(e) => {
                tracing::debug!(error = %e, "sink failed");
                self.counters.sink_failures += 1;
                self.engine.reset(now, id, ResetReason::Local);
            }
        }
        self.watch_room(now, slot);
    }

    /// Asks epoll to report when a socket has room, if bytes are held for it and only its room is missing.
    pub(super) fn watch_room(&mut self, now: Tick, slot: u32) {
        let Some(Some(entry)) = self.entries.get_mut(slot as usize) else {
            return;
        };
        if let Some(at) = entry.waits(Way::Out) {
            self.limited.insert((at, slot, Way::Out));
            return;
        }
        if entry.held.is_empty() || entry.room_watched {
            return;
        }
        let id = entry.id;
        let Some(fd) = entry.fd() else { return };
        match self.watch.edge_on_room(fd, Token::sink(id), true) {
            Ok(()) => entry.room_watched = true,
            Err(e) => {
                // Without this report the held bytes would never move.
                tracing::warn!(error = %e, "cannot watch a sink");
                self.counters.sink_failures += 1;
                self.engine.reset(now, id, ResetReason::Local);
            }
        }
    }

    /// The socket has room: pass on the bytes that wait for it. If there are none, stop asking for this report.
    pub(super) fn room(&mut self, now: Tick, slot: u32) {
        let Some(Some(entry)) = self.entries.get_mut(slot as usize) else {
            return;
        };
        if entry.held.is_empty()
            && std::mem::take(&mut entry.room_watched)
            && let Some(fd) = entry.fd()
        {
            // If this fails, the only effect is another report.
            let _ = self.watch.edge_on_room(fd, Token::sink(entry.id), false);
        }
        self.drain_held(now, slot);
    }

    /// Updates what the engine knows of a sink, and what the sink knows of its stream.
    pub(super) fn settle(&mut self, now: Tick, slot: u32) {
        let Some(Some(entry)) = self.entries.get_mut(slot as usize) else {
            return;
        };
        let id = entry.id;
        entry.pass_on_end();
        if entry.service_reset {
            self.engine.reset(now, id, ResetReason::Local);
            return;
        }
        self.engine.offer(id, entry.offered());
        if entry.at_end() {
            entry.sink_done = true;
            self.engine.shutdown(now, id, How::Send);
        }
        if std::mem::take(&mut entry.wake)
            && let Some(Sink::Local(end)) = &entry.sink
        {
            let local = &end.0;
            if !self
                .wakes
                .last()
                .is_some_and(|last| Arc::ptr_eq(last, local))
            {
                self.wakes.push(local.clone());
            }
        }
    }
}

//! One burst: first packets from the guest to the sinks, then events, then bytes from the sinks to the guest.

use std::io;

use adit_engine::{Disposition, How, Lane, Op, ResetReason, StreamId, Tick, Transmit};

use super::entry::{DeliveryError, Fill};
use super::succession::next_reset;
use super::{Budget, Port, PortCounters, Turn};
use crate::carrier::{Armed, Carrier, CarrierFault, Interest, RxPacket, SetAside, TxSlot};
use crate::rate::Way;

/// How one direction of a burst ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// There is nothing more to move.
    Drained,
    /// The budget is used up.
    Budget,
    /// There was no slot.
    NoSlot,
}

/// Packets in a row for one socket, whose payload is set aside.
struct Run {
    stream: StreamId,
    len: u32,
}

enum Sent {
    /// A packet went into a slot, with this many payload bytes.
    Packet(u64),
    /// No stream has something that can be sent.
    Nothing,
    /// There was no slot.
    NoSlot,
}

impl<C: Carrier> Port<C> {
    /// Moves packets and bytes within a budget, then asks for notifications.
    pub fn poll(&mut self, now: Tick, budget: Budget) -> Turn {
        self.counters.polls += 1;
        let before = self.packets();
        let ends = self.burst(now, budget);
        // First, because the guest waits for it.
        self.flush();
        self.burst_over(now, before, &ends);
        let again = match ends {
            Ok((End::Budget, _) | (_, End::Budget)) => true,
            Ok((_, tx)) => {
                let interest = Interest {
                    rx: true,
                    tx: tx == End::NoSlot,
                };
                self.carrier.arm(interest) == Armed::WorkAppeared
            }
            Err(fault) => {
                self.carrier_fault(now, &fault);
                self.handle_events(now);
                false
            }
        };
        for local in self.wakes.drain(..) {
            local.notify();
        }
        if again {
            return Turn::Again;
        }
        let dial = self.deadlines.first().map(|(t, _)| *t);
        let rest = self.carrier.rest().map(|rest| {
            let ns = u64::try_from(rest.as_nanos()).unwrap_or(u64::MAX);
            Tick(now.0.saturating_add(ns))
        });
        let limit = self.limited.first().map(|(t, ..)| *t);
        let engine = self.engine.poll_timeout();
        let deadline = [engine, dial, rest, limit, self.wakers.until()]
            .into_iter()
            .flatten()
            .min();
        Turn::Idle { deadline }
    }

    /// As `poll`, for a shell that polls again soon: it does not ask for kicks. Returns true if something moved.
    pub(crate) fn poll_unarmed(&mut self, now: Tick, budget: Budget) -> bool {
        self.counters.polls += 1;
        let before = self.packets();
        let ends = self.burst(now, budget);
        self.flush();
        self.burst_over(now, before, &ends);
        if let Err(fault) = ends {
            self.carrier_fault(now, &fault);
            self.handle_events(now);
        }
        for local in self.wakes.drain(..) {
            local.notify();
        }
        before != self.packets()
    }

    /// Number of packets from the guest and to it so far.
    fn packets(&self) -> (u64, u64) {
        let PortCounters {
            packets_from_guest,
            packets_to_guest,
            ..
        } = self.counters;
        (packets_from_guest, packets_to_guest)
    }

    /// Stops watching the doorbells of a peer that signals them again and again without work. Work for which the peer
    /// signals a doorbell is a packet from it, or room that this side waited for.
    fn burst_over(
        &mut self,
        now: Tick,
        (from, to): (u64, u64),
        ends: &Result<(End, End), CarrierFault>,
    ) {
        let room = self.starved && self.counters.packets_to_guest > to;
        let found = room || self.counters.packets_from_guest > from;
        self.starved = matches!(ends, Ok((_, End::NoSlot)));
        let counters = &mut self.counters;
        if let Err(e) = self.wakers.burst(now, found, &self.watch, counters) {
            self.wakers_failed(now, &e);
        }
    }

    /// See [`Carrier::glance`].
    pub(crate) fn glance(&mut self) -> Option<bool> {
        self.carrier.glance()
    }

    fn burst(&mut self, now: Tick, budget: Budget) -> Result<(End, End), CarrierFault> {
        self.carrier.begin();
        if self.engine.poll_timeout().is_some_and(|t| t <= now) {
            self.engine.handle_timeout(now);
        }
        self.expire_dials(now);
        if self.limited.first().is_some_and(|(t, ..)| *t <= now) {
            self.release_limited(now);
        }
        let rx = self.receive(now, budget)?;
        self.handle_events(now);
        let mut tx = self.transmit(now, budget)?;
        // Sending may end streams, and streams that end may leave something to send.
        while self.handle_events(now) && tx == End::Drained {
            tx = self.transmit(now, budget)?;
        }
        Ok((rx, tx))
    }

    fn receive(&mut self, now: Tick, budget: Budget) -> Result<End, CarrierFault> {
        let mut run = None;
        let end = self.receive_packets(now, budget, &mut run)?;
        if let Some(run) = run {
            self.deliver_run(now, run)?;
        }
        Ok(end)
    }

    /// Packets in a row for the same socket are set aside in `run`. The caller must deliver the last run.
    fn receive_packets(
        &mut self,
        now: Tick,
        budget: Budget,
        run: &mut Option<Run>,
    ) -> Result<End, CarrierFault> {
        let mut bytes = 0;
        for _ in 0..budget.packets {
            if bytes >= budget.bytes {
                return Ok(End::Budget);
            }
            let Some(mut packet) = self.carrier.rx()? else {
                return Ok(End::Drained);
            };
            let (header, lane, body) = (*packet.header(), packet.lane(), packet.remaining());
            self.counters.packets_from_guest += 1;
            match self.engine.handle_packet_on(now, lane, &header, body) {
                Disposition::Consume => {}
                Disposition::Ignore(violation) => {
                    self.counters.violations += 1;
                    tracing::debug!(%violation, "packet dropped");
                }
                Disposition::Tear(violation) => {
                    self.counters.violations += 1;
                    tracing::debug!(%violation, "channel torn down");
                    return Err(CarrierFault {
                        what: "the guest broke the protocol beyond one stream; op of the packet",
                        value: u64::from(header.op),
                        limit: 7,
                    });
                }
                Disposition::Deliver { stream, len } => {
                    bytes += u64::from(len);
                    self.counters.bytes_from_guest += u64::from(len);
                    let slot = stream.slot();
                    let entries = &mut self.entries;
                    let entry = entries.get_mut(slot as usize).and_then(Option::as_mut);
                    let Some(entry) = entry.filter(|e| e.id == stream) else {
                        // Unreachable: the engine delivers only to streams that it has announced.
                        drop(packet);
                        self.engine.reset(now, stream, ResetReason::Local);
                        continue;
                    };
                    entry.totals.add_from_guest(now, len.into());
                    if run.as_ref().is_none_or(|r| r.stream == stream) && entry.gathers() {
                        let kept = packet.set_aside(len);
                        if kept != SetAside::No {
                            drop(packet);
                            let so_far = run.take().map_or(0, |r| r.len);
                            let longer = Run {
                                stream,
                                len: so_far + len,
                            };
                            if kept == SetAside::Full || longer.len >= self.carrier.caps().run_bytes
                            {
                                self.deliver_run(now, longer)?;
                            } else {
                                *run = Some(longer);
                            }
                            continue;
                        }
                    }
                    let copied = &mut self.counters.bytes_copied;
                    match entry.deliver(now, &mut packet, len, copied) {
                        Ok(0) => {}
                        Ok(n) => self.engine.consumed(now, stream, n),
                        Err(DeliveryError::Carrier(fault)) => return Err(fault),
                        Err(DeliveryError::Sink(e)) => {
                            tracing::debug!(error = %e, "sink failed");
                            self.counters.sink_failures += 1;
                            self.engine.reset(now, stream, ResetReason::Local);
                        }
                    }
                    drop(packet);
                    self.delivered(now, slot);
                    // The streams alternate, so write the finished run now.
                    if let Some(run) = run.take() {
                        self.deliver_run(now, run)?;
                    }
                }
            }
        }
        Ok(End::Budget)
    }

    /// Writes a run to its socket. Bytes that the socket does not accept are held.
    fn deliver_run(&mut self, now: Tick, run: Run) -> Result<(), CarrierFault> {
        let Run { stream, len } = run;
        let slot = stream.slot();
        // Entries change only between bursts.
        if let Some(Some(entry)) = self.entries.get_mut(slot as usize) {
            let written = match entry.fd() {
                Some(fd) => self.carrier.write_aside(fd),
                None => Ok(0),
            };
            let taken = match written {
                Ok(n) => Ok(n as u32),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(0),
                Err(e) => Err(e),
            };
            match taken {
                Ok(taken) => {
                    let carrier = &mut self.carrier;
                    entry.hold_from(len - taken, |dst| carrier.read_aside(dst))?;
                    self.counters.bytes_copied += u64::from(len - taken);
                    if taken > 0 {
                        self.engine.consumed(now, stream, taken);
                    }
                }
                Err(e) => {
                    tracing::debug!(error = %e, "sink failed");
                    self.counters.sink_failures += 1;
                    self.engine.reset(now, stream, ResetReason::Local);
                }
            }
        }
        self.carrier.release_aside();
        self.watch_room(now, slot);
        Ok(())
    }

    /// Follows up on a delivery: continues a hello, or collects what a service or an application wants to send.
    fn delivered(&mut self, now: Tick, slot: u32) {
        let Some(Some(entry)) = self.entries.get(slot as usize) else {
            return;
        };
        if matches!(entry.phase, super::Phase::Dialing(_)) {
            self.read_hello(now, slot);
        } else if entry.fd().is_none() {
            self.settle(now, slot);
        } else if !entry.held.is_empty() {
            self.watch_room(now, slot);
        }
    }

    /// A carrier with two lanes may have room on only one of them.
    fn transmit(&mut self, now: Tick, budget: Budget) -> Result<End, CarrierFault> {
        if !self.carrier.caps().lanes {
            return self.transmit_on(now, budget, None);
        }
        let control = self.transmit_on(now, budget, Some(Lane::Control))?;
        let bulk = self.transmit_on(now, budget, Some(Lane::Bulk))?;
        Ok(match (control, bulk) {
            (End::Budget, _) | (_, End::Budget) => End::Budget,
            (End::NoSlot, _) | (_, End::NoSlot) => End::NoSlot,
            (End::Drained, End::Drained) => End::Drained,
        })
    }

    fn transmit_on(
        &mut self,
        now: Tick,
        budget: Budget,
        lane: Option<Lane>,
    ) -> Result<End, CarrierFault> {
        let mut bytes = 0;
        for _ in 0..budget.packets {
            let wanted = match lane {
                Some(lane) => self.engine.wants_transmit_on(lane),
                None => !self.inherited.is_empty() || self.engine.wants_transmit(),
            };
            if !wanted {
                return Ok(End::Drained);
            }
            if bytes >= budget.bytes {
                return Ok(End::Budget);
            }
            match self.send_one(now, lane)? {
                Sent::Packet(n) => {
                    bytes += n;
                    self.counters.bytes_to_guest += n;
                    self.counters.packets_to_guest += 1;
                }
                // Not `NoSlot`: then the shell would wait for a slot, and a level-triggered watch would fire forever
                // while a slot is free.
                Sent::Nothing => return Ok(End::Drained),
                Sent::NoSlot => return Ok(End::NoSlot),
            }
        }
        Ok(End::Budget)
    }

    /// Puts one packet into a slot, from the next stream whose sink really has bytes.
    fn send_one(&mut self, now: Tick, lane: Option<Lane>) -> Result<Sent, CarrierFault> {
        let caps = self.carrier.caps();
        let queue = lane.unwrap_or(Lane::Bulk);
        let Some(mut slot) = self.carrier.tx(queue, caps.max_payload)? else {
            return Ok(Sent::NoSlot);
        };
        // Only on a carrier with one lane: no successor takes over a ring.
        if lane.is_none()
            && let Some(header) = next_reset(&mut self.inherited, &mut self.live)
        {
            slot.commit(&header);
            return Ok(Sent::Packet(0));
        }
        let capacity = slot.capacity().min(caps.max_payload);
        while let Some(Transmit { header, body, .. }) =
            self.engine.poll_transmit_on(now, lane, capacity)
        {
            let Some((stream, len)) = body else {
                slot.commit(&header);
                // Requests are rare, and one that a sleeping peer never hears would be lost with all that follows it.
                if header.op == Op::Request as u16 {
                    self.carrier.insist();
                }
                return Ok(Sent::Packet(0));
            };
            let entries = &mut self.entries;
            let entry = entries
                .get_mut(stream.slot() as usize)
                .and_then(Option::as_mut);
            let Some(entry) = entry.filter(|e| e.id == stream) else {
                self.engine.offer(stream, 0);
                continue;
            };
            let len = match &mut entry.limit {
                None => len,
                Some(limit) => match limit.may(now, Way::In, len) {
                    0 => {
                        let until = limit.until(Way::In).map(|t| (t, stream.slot(), Way::In));
                        self.limited.extend(until);
                        self.engine.offer(stream, 0);
                        continue;
                    }
                    may => may,
                },
            };
            let filled = entry.fill(&mut slot, len, &mut self.counters.bytes_copied)?;
            if let Some(limit) = &entry.limit {
                limit.unused(Way::In, len - filled.bytes());
            }
            match filled {
                Fill::Bytes(n) => {
                    entry.totals.to_guest += u64::from(n);
                    let header = self.engine.commit_body(now, stream, n);
                    slot.commit(&header);
                    self.settle(now, stream.slot());
                    return Ok(Sent::Packet(u64::from(n)));
                }
                Fill::Empty => self.engine.offer(stream, 0),
                Fill::End => {
                    entry.sink_done = true;
                    let how = match entry.is_sink_closed() {
                        true => How::Both,
                        false => How::Send,
                    };
                    self.engine.offer(stream, 0);
                    self.engine.shutdown(now, stream, how);
                }
                Fill::Broken(e) => {
                    tracing::debug!(error = %e, "sink failed");
                    self.counters.sink_failures += 1;
                    self.engine.offer(stream, 0);
                    self.engine.reset(now, stream, ResetReason::Local);
                }
            }
        }
        Ok(Sent::Nothing)
    }

    fn expire_dials(&mut self, now: Tick) {
        while let Some(&(deadline, slot)) = self.deadlines.first()
            && deadline <= now
        {
            self.deadlines.remove(&(deadline, slot));
            let entry = self.entries.get(slot as usize).and_then(Option::as_ref);
            if let Some(stream) = entry.map(|entry| entry.id)
                && self.fail_dial(stream, crate::dial::DialError::Timeout)
            {
                self.engine.reset(now, stream, ResetReason::Timeout);
            }
        }
    }
}

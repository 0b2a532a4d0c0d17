//! The guest's side of the channel: the engine over a ring, with an echo service.

use alloc::vec::Vec;

use adit_engine::{
    Answer, Disposition, Engine, EngineConfig, Event, How, Kind, Lane, PACKET_HEADER_BYTES,
    PacketHeader, SessionChange, Tick,
};
use adit_ringbuf::session::{self, Ends};
use adit_ringbuf::{Pace, PushError, RingMem};

use crate::ring::{EchoError, POLLS_PER_CHECK, attach};

/// The port of the echo service.
pub const PORT: u32 = 7;
/// Longest payload of one packet in either direction, bytes.
const PAYLOAD_MAX: usize = 64 << 10;
/// Bytes that all streams together may have in flight.
const POOL: u64 = 256 << 10;
const STREAMS: u32 = 16;

struct Service<M> {
    engine: Engine,
    lanes: Vec<Ends<M>>,
    /// Bytes received and not sent back yet, by the stream's slot. The stream's window, which comes from the pool, limits
    /// them.
    held: Vec<Vec<u8>>,
    buf: Vec<u8>,
}

/// Serves streams on [`PORT`] until the host ends the session. Never sleeps: it polls. `now` is a clock that never goes
/// back. Returns the number of packets.
///
/// # Errors
/// The host broke a rule of the ring.
pub fn serve<M: RingMem + Clone>(mem: M, now: impl Fn() -> Tick) -> Result<u64, EchoError> {
    let (mut guest, epoch) = attach(mem)?;
    let config = EngineConfig {
        max_streams: STREAMS,
        pool_bytes: POOL,
        initial_window: 16 << 10,
        max_window: 64 << 10,
        packet_overhead: 0,
        tells_reason: true,
        ..EngineConfig::default()
    };
    let count = guest
        .region()
        .map_or(0, |region| region.spec().lanes().len());
    let lanes: Result<Vec<_>, _> = (0..count.min(2)).map(|n| guest.ends(n, false)).collect();
    let mut service = Service {
        engine: Engine::new(config, 1),
        lanes: lanes?.into_iter().flatten().collect(),
        held: alloc::vec![Vec::new(); STREAMS as usize],
        buf: alloc::vec![0; PACKET_HEADER_BYTES + PAYLOAD_MAX],
    };
    // It cannot fail: one port on a new engine.
    let _ = service.engine.listen(PORT, Kind::Stream);
    let change = SessionChange::Attached { epoch };
    service.engine.handle_session(now(), change);
    let (mut pace, mut packets, mut missed) = (Pace::default(), 0, 0);
    loop {
        let came = service.burst(now(), &mut pace)?;
        packets += came;
        if came > 0 {
            missed = 0;
            continue;
        }
        pace.missed();
        missed += 1;
        if missed % POLLS_PER_CHECK == 0 {
            service.engine.handle_timeout(now());
            if let Some(session::Event::Lost(_)) = guest.poll()?.event {
                return Ok(packets);
            }
        }
    }
}

impl<M: RingMem> Service<M> {
    /// Handles all packets that have arrived, and sends what may be sent.
    fn burst(&mut self, now: Tick, pace: &mut Pace) -> Result<u64, EchoError> {
        let mut came = 0;
        for n in 0..self.lanes.len() {
            while let Some(len) = self.lanes[n].consumer.pop(&mut self.buf)? {
                pace.came(len);
                came += 1;
                self.packet(now, lane(n), len);
                if self.lanes[n].consumer.wants_release() {
                    let _ = self.lanes[n].consumer.release();
                }
            }
            let _ = self.lanes[n].consumer.release();
        }
        self.events(now);
        for n in 0..self.lanes.len() {
            self.transmit(now, n)?;
        }
        Ok(came)
    }

    fn packet(&mut self, now: Tick, lane: Lane, len: usize) {
        let record = &self.buf[..len.min(self.buf.len())];
        let Some((frame, body)) = record.split_first_chunk::<PACKET_HEADER_BYTES>() else {
            return; // too short for a packet: no stream depends on it
        };
        let header = PacketHeader::from_ring_bytes(frame);
        let there = body.len() as u32;
        let told = self.engine.handle_packet_on(now, lane, &header, there);
        if let Disposition::Deliver { stream, len } = told {
            let held = &mut self.held[stream.slot() as usize];
            held.extend_from_slice(&body[..len as usize]);
            self.engine.offer(stream, held.len() as u32);
        }
    }

    fn events(&mut self, now: Tick) {
        while let Some(event) = self.engine.poll_event() {
            match event {
                Event::Incoming { stream, .. } => {
                    self.engine.answer(now, stream, Answer::Accept);
                }
                Event::PeerShutdown {
                    stream,
                    how: How::Send | How::Both,
                } => {
                    // The peer sends no more. The engine ends our side too, after everything has been echoed.
                    self.engine.shutdown(now, stream, How::Send);
                }
                Event::HungUp { stream } => self.engine.shutdown(now, stream, How::Send),
                Event::Closed { stream, .. } => {
                    self.held[stream.slot() as usize] = Vec::new();
                }
                _ => {}
            }
        }
    }

    fn transmit(&mut self, now: Tick, n: usize) -> Result<(), EchoError> {
        let only = (self.lanes.len() > 1).then_some(lane(n));
        let wants = |engine: &Engine| match only {
            Some(lane) => engine.wants_transmit_on(lane),
            None => engine.wants_transmit(),
        };
        while wants(&self.engine) {
            let producer = &mut self.lanes[n].producer;
            let mut grant = match producer
                .reserve_some(PACKET_HEADER_BYTES + 1, PACKET_HEADER_BYTES + PAYLOAD_MAX)
            {
                Ok(grant) => grant,
                Err(PushError::Full) => break,
                Err(e) => return Err(EchoError::Record(e)),
            };
            let room = (grant.len() - PACKET_HEADER_BYTES) as u32;
            let Some(t) = self.engine.poll_transmit_on(now, only, room) else {
                break;
            };
            let (mut header, mut sent) = (t.header, 0);
            if let Some((stream, len)) = t.body {
                let held = &mut self.held[stream.slot() as usize];
                sent = held.len().min(len as usize);
                grant.write(PACKET_HEADER_BYTES, &held[..sent]);
                held.drain(..sent);
                header = self.engine.commit_body(now, stream, sent as u32);
                self.engine.offer(stream, held.len() as u32);
                self.engine.consumed(now, stream, sent as u32);
            }
            grant.write(0, &header.to_ring_bytes());
            let _ = grant.commit_first(PACKET_HEADER_BYTES + sent, false);
        }
        let _ = self.lanes[n].producer.publish();
        Ok(())
    }
}

/// The lane with this index.
fn lane(n: usize) -> Lane {
    if n == 0 { Lane::Control } else { Lane::Bulk }
}

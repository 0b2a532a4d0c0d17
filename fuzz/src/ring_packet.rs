//! Target `ring_packet`: the other side of a ring, which sends packets, well-framed or not, restarts, and overwrites any word of
//! the region. While it follows the rules, every packet goes through ring, carrier and engine and is compared with what was sent,
//! in both directions. If it breaks one, the session ends with a fault or continues, and nothing else may happen.

use std::cell::Cell;
use std::collections::VecDeque;

use adit_channel::carrier::{Carrier, Interest, RxPacket};
use adit_channel::ring::{RingBells, RingCarrier, RingState};
use adit_engine::{Lane, PACKET_HEADER_BYTES, PacketHeader, SessionChange};
use adit_ringbuf::region::{self, Features, Spec};
use adit_ringbuf::session::{Ends, Event, Guest};
use adit_ringbuf::{Mapped, RingMem};

use crate::engine_ops::packet;
use crate::input::Input;
use crate::pattern::{Sent, body, fill};
use crate::shell::Shell;

/// Head, both sides' words, and a ring in each direction.
const HEAD: usize = 3 * 4096;
const RING: usize = 8192;
const BYTES: usize = HEAD + 2 * RING;
/// Most packets that a burst sends.
const SENT_MAX: usize = 64;

thread_local! {
    static MEMORY: Mapped = Mapped::anonymous(BYTES).expect("memory");
    static EPOCH: Cell<u64> = const { Cell::new(1) };
}

struct World {
    mem: Mapped,
    host: RingCarrier,
    guest: Guest<Mapped>,
    ends: Option<Ends<Mapped>>,
    shell: Shell,
    to_host: VecDeque<Sent>,
    to_guest: VecDeque<Sent>,
    serial: u8,
    /// The guest broke a rule: from now on everything except a panic is allowed.
    wild: bool,
}

/// Runs one input.
pub fn run(data: &[u8]) {
    let mem = MEMORY.with(Clone::clone);
    let epoch = EPOCH.get();
    EPOCH.set(epoch + 1000);
    mem.zero(0, BYTES);
    let lane = region::Lane {
        to_guest: RING,
        to_host: RING,
    };
    let bells = RingBells::polled();
    let host = RingCarrier::host(mem.clone(), Spec::new(&[lane]), epoch, bells);
    let guest = Guest::find(mem.clone(), epoch << 8, Features::NONE);
    let input = &mut Input(data);
    let mut world = World {
        mem,
        host: host.expect("a region that fits"),
        guest: guest.expect("it was just made"),
        ends: None,
        shell: Shell::new(input),
        to_host: VecDeque::new(),
        to_guest: VecDeque::new(),
        serial: 0,
        wild: false,
    };
    world.attach();
    world.run(input);
}

impl World {
    /// The guest restarts; what was in flight is lost.
    fn attach(&mut self) {
        self.ends = None;
        self.to_host.clear();
        self.to_guest.clear();
        let _ = self.guest.attach();
        self.host.begin();
        if let Ok(turn) = self.guest.poll()
            && let Some(Event::Attached { .. }) = turn.event
        {
            self.ends = self.guest.ends(0, false).ok().flatten();
        }
        self.host.begin();
        self.host.flush();
        let told = self.host.woken(0).session;
        if self.wild {
            return;
        }
        assert!(self.ends.is_some());
        assert!(matches!(told, Some(SessionChange::Attached { .. })));
        self.shell.session(Some(()));
    }

    fn run(mut self, input: &mut Input<'_>) {
        while !input.is_empty() && !matches!(self.host.state(), RingState::Held) {
            match input.u8() % 16 {
                0..=6 => self.send(input),
                7..=9 => self.burst(input),
                10 => self.receive(),
                11 => self.shell.wait(input),
                12 | 13 => self.shell.command(input),
                14 => {
                    self.attach();
                    if self.ends.is_none() {
                        return;
                    }
                }
                _ => self.scribble(input),
            }
            self.shell.events(input);
        }
        self.burst(input);
        self.receive();
        if !self.wild {
            assert!(self.to_host.is_empty(), "packets were lost");
            assert_eq!(self.host.counters().faults, 0, "{}", self.host.last_fault());
        }
        self.shell.session(None);
    }

    fn send(&mut self, input: &mut Input<'_>) {
        // Only as many bits as a packet header has room for.
        let h = PacketHeader::from_ring_bytes(&packet(input, &self.shell).to_ring_bytes());
        let shape = input.u8();
        let len = match shape & 3 {
            0 => h.len as usize % 64,
            1 => h.len as usize % 1024,
            _ => 0,
        };
        let h = match shape & 0x0c {
            0 => h,
            _ => PacketHeader {
                len: len as u32,
                ..h
            },
        };
        self.serial = self.serial.wrapping_add(1);
        let record = [&h.to_ring_bytes(), body(self.serial, len)].concat();
        // A packet header that is too short ends the session.
        let cut = shape & 0xf0 == 0xf0;
        let record = if cut {
            &record[..input.below(PACKET_HEADER_BYTES)]
        } else {
            &record[..]
        };
        let Some(ends) = &mut self.ends else { return };
        if ends.producer.try_push(record).is_ok() {
            let _ = ends.producer.publish();
            self.wild |= cut;
            self.to_host.push_back((h, len, self.serial));
        }
    }

    /// Overwrites any word with any value.
    fn scribble(&mut self, input: &mut Input<'_>) {
        let page = input.pick(&[0, 4096, 8192, HEAD, HEAD + RING]);
        let at = page + (usize::from(input.u16()) % 4096) / 8 * 8;
        let word = input.u64();
        self.wild |= self.mem.load(at) != word;
        self.mem.store(at, word);
    }

    /// One burst of the host, as a port does it.
    fn burst(&mut self, input: &mut Input<'_>) {
        self.host.begin();
        loop {
            let mut packet = match self.host.rx() {
                Ok(Some(packet)) => packet,
                Ok(None) => break,
                Err(fault) => {
                    assert!(self.wild, "{fault}");
                    return self.host.tear();
                }
            };
            let (h, there) = (*packet.header(), packet.remaining());
            let expected = self.to_host.pop_front();
            if !self.wild {
                let (sent, len, _) = expected.expect("a packet that nobody sent");
                assert_eq!((h, there as usize), (sent, len));
            }
            let delivered = self.shell.packet(&h, there) as usize;
            let mut got = vec![0; delivered];
            assert_eq!(packet.read(&mut got).expect("readable"), delivered);
            if let (Some((_, len, seed)), false) = (expected, self.wild) {
                assert!(got == body(seed, len)[..delivered], "payload differs");
            }
            self.shell.events(input);
        }
        if !self.transmit() {
            return self.host.tear();
        }
        self.host.flush();
        let interest = Interest {
            rx: true,
            tx: self.shell.engine.wants_transmit(),
        };
        let _ = self.host.arm(interest);
    }

    /// Returns false if the ring broke.
    fn transmit(&mut self) -> bool {
        for _ in 0..SENT_MAX {
            let slot = match self.host.tx(Lane::Bulk, 1500) {
                Ok(Some(slot)) => slot,
                Ok(None) => break,
                Err(fault) => {
                    assert!(self.wild, "{fault}");
                    return false;
                }
            };
            let serial = self.serial.wrapping_add(1);
            let Some(sent) = fill(&mut self.shell, slot, serial) else {
                break;
            };
            self.serial = serial;
            self.to_guest.push_back(sent);
        }
        true
    }

    /// The guest receives all records.
    fn receive(&mut self) {
        let mut record = [0; RING];
        let Some(ends) = &mut self.ends else { return };
        loop {
            let len = match ends.consumer.pop(&mut record) {
                Ok(Some(len)) => len,
                Ok(None) => break,
                Err(corrupt) => return assert!(self.wild, "{corrupt}"),
            };
            let Some((h, n, seed)) = self.to_guest.pop_front().filter(|_| !self.wild) else {
                assert!(self.wild, "a packet that nobody sent");
                continue;
            };
            let (frame, payload) = record[..len].split_first_chunk().expect("a frame");
            assert_eq!(PacketHeader::from_ring_bytes(frame), h);
            assert!(payload == body(seed, n), "payload differs");
        }
        let _ = ends.consumer.release();
        assert!(self.wild || self.to_guest.is_empty(), "packets were lost");
    }
}

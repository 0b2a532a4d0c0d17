//! A guest whose device runs on another thread, with the host's ends on Unix sockets: it kicks, waits, and talks to both
//! sides of a stream.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use adit_channel::device::{HOST_CID, RX_QUEUE, TX_QUEUE, WireHeader};
use adit_engine::{Op, PacketHeader};

use crate::driver::Driver;
use crate::queue::Buffer;
use crate::stream::GuestStream;

/// How long the guest waits for a packet. Only a broken device takes this long.
const PATIENCE: Duration = Duration::from_secs(30);
/// Bytes that one exchange sends in each direction: several buffers of the guest.
const EXCHANGE_BYTES: usize = 9000;
/// A port of the host that the guest dials, and one of the guest that the host dials.
const HOST_PORT: u32 = 7000;
const GUEST_PORT: u32 = 5000;

/// A driver, and what it does to kick a queue.
pub struct Guest<K> {
    /// The driver.
    pub driver: Driver,
    kick: K,
    /// Port of the last stream that the guest opened.
    port: u32,
}

impl<K: Fn(u16)> Guest<K> {
    /// Makes a guest with this driver. `kick` gets the index of the queue.
    pub fn new(driver: Driver, kick: K) -> Self {
        let port = 1023;
        Self { driver, kick, port }
    }

    /// Sends a packet.
    ///
    /// # Panics
    /// The TX queue is full.
    pub fn send(&mut self, h: &PacketHeader, payload: &[u8]) {
        self.driver.reap_tx();
        assert!(self.driver.send(h, payload, 4096), "TX queue is full");
        self.driver.tx.publish();
        (self.kick)(TX_QUEUE);
    }

    /// Waits for the next packet.
    ///
    /// # Panics
    /// There is none.
    pub fn receive(&mut self) -> (PacketHeader, Vec<u8>) {
        let (begin, mut payload) = (Instant::now(), Vec::new());
        loop {
            if let Some(wire) = self.driver.receive(&mut payload) {
                if self.driver.rx.publish() {
                    (self.kick)(RX_QUEUE);
                }
                return (wire.header(), payload);
            }
            assert!(begin.elapsed() < PATIENCE, "no packet from the device");
            std::thread::yield_now();
        }
    }

    /// Waits for a packet with this operation, and skips others.
    ///
    /// # Panics
    /// There is none.
    pub fn expect(&mut self, op: Op) -> PacketHeader {
        loop {
            let (h, _) = self.receive();
            if h.op == op as u16 {
                return h;
            }
        }
    }

    /// Sends a packet from one buffer at this guest address.
    ///
    /// # Panics
    /// The TX queue is full.
    pub fn send_from(&mut self, addr: u64, h: &PacketHeader, payload: &[u8]) {
        let mut bytes = WireHeader::new(self.driver.cid(), HOST_CID, h)
            .to_bytes()
            .to_vec();
        bytes.extend_from_slice(payload);
        self.driver.write(addr, &bytes);
        let len = bytes.len() as u32;
        let added = self.driver.tx.add(&[Buffer { addr, len }], false);
        assert!(added.is_some(), "TX queue is full");
        self.driver.tx.publish();
        (self.kick)(TX_QUEUE);
    }

    /// Dials both ways through `hybrid::Host` at `uds`, and has bytes go both ways over each stream.
    ///
    /// # Panics
    /// A stream is not opened, or a byte is wrong.
    pub fn talk(&mut self, uds: &Path) {
        self.dial_host(uds, None);
        let mut client = UnixStream::connect(uds).expect("the host's socket");
        let line = format!("CONNECT {GUEST_PORT}\n");
        client.write_all(line.as_bytes()).expect("room");
        let asked = self.expect(Op::Request);
        assert_eq!(asked.dst_port, GUEST_PORT);
        let mut stream = GuestStream::new(GUEST_PORT, asked.src_port);
        stream.handle(&asked, 0);
        let answer = stream.header(Op::Response);
        self.send(&answer, &[]);
        let mut answered = [0; 1];
        while answered != *b"\n" {
            client.read_exact(&mut answered).expect("the line OK");
        }
        self.exchange(&mut stream, &mut client, None);
    }

    /// Dials a listener beside `uds`, and has bytes go both ways. The guest's are at the address `from`, if there is
    /// one.
    ///
    /// # Panics
    /// The stream is not opened, or a byte is wrong.
    pub fn dial_host(&mut self, uds: &Path, from: Option<u64>) {
        let listener = format!("{}_{HOST_PORT}", uds.display());
        let served = UnixListener::bind(&listener).expect("a socket");
        self.port += 1;
        let mut stream = GuestStream::new(self.port, HOST_PORT);
        let request = stream.header(Op::Request);
        self.send(&request, &[]);
        stream.handle(&self.expect(Op::Response), 0);
        let (mut far, _) = served.accept().expect("the guest's stream");
        self.exchange(&mut stream, &mut far, from);
        std::fs::remove_file(listener).expect("the socket");
    }

    fn exchange(&mut self, stream: &mut GuestStream, far: &mut UnixStream, from: Option<u64>) {
        let bytes: Vec<u8> = (0..EXCHANGE_BYTES).map(|i| ((i * 31) >> 3) as u8).collect();
        let h = stream.payload(bytes.len() as u32);
        match from {
            None => self.send(&h, &bytes),
            Some(addr) => self.send_from(addr, &h, &bytes),
        }
        let mut got = vec![0; bytes.len()];
        far.read_exact(&mut got).expect("what the guest sent");
        assert!(got == bytes, "what the guest sent is not what came");
        far.write_all(&bytes).expect("room");
        let mut back = Vec::new();
        while back.len() < bytes.len() {
            let (h, payload) = self.receive();
            stream.handle(&h, payload.len());
            back.extend_from_slice(&payload);
        }
        assert!(back == bytes, "what the host sent is not what came");
    }
}

//! A page of one guest's memory is missing for a while, as during a migration. A thread that accesses it blocks
//! (userfaultfd). Only the shard of that guest blocks. Another VM's shard continues, and no byte is lost when the page
//! arrives.

mod common;
#[path = "common/uffd.rs"]
mod uffd;
#[path = "common/vm.rs"]
mod vm;

use std::io::{ErrorKind, Read, Write};
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use adit_channel::device::{HEADER_BYTES, HOST_CID, TX_QUEUE, WireHeader};
use adit_channel::shard::{Shard, ShardThread};
use adit_channel::vhost_user::{VhostUserCarrier, VhostUserConfig};
use adit_engine::{EngineConfig, Op};
use adit_testkit::memory;
use adit_testkit::queue::Buffer;
use adit_testkit::stream::GuestStream;
use common::{CID, cid, pattern};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::poll::PollTimeout;
use uffd::{Missing, PAGE};
use vm::{PATIENCE, Vm};

const HOST_PORT: u32 = 741;
/// Time that a page is missing.
const STALL: Duration = Duration::from_secs(1);
/// Minimum number of echoes of the other VM during that time.
const ECHOES: u32 = 500;

/// A VM whose shard has its own thread, as in a port process, and one tunnel to a socket.
struct World {
    vm: Vm,
    stream: GuestStream,
    client: UnixStream,
    /// Bytes that the guest received and the test has not checked yet.
    got: Vec<u8>,
    _shard: ShardThread,
    _dir: tempfile::TempDir,
}

impl World {
    fn new(name: &str) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let socket = dir.path().join("vhost.sock");
        let listener = UnixListener::bind(&socket).expect("a socket");
        let config = VhostUserConfig::new(listener, cid(), name);
        let carrier = VhostUserCarrier::new(config).expect("a carrier");
        let mut shard = Shard::new().expect("an epoll set");
        let port = shard
            .add(carrier, EngineConfig::default(), 1)
            .expect("a port");
        let handle = shard.handle(port);
        let shard = shard.spawn(name).expect("a thread");
        let listener = handle.listen(HOST_PORT).expect("free");
        let mut vm = Vm::start(&socket);
        let mut stream = GuestStream::new(1024, HOST_PORT);
        assert!(vm.driver.send(&stream.header(Op::Request), &[], 1));
        let (client, theirs) = UnixStream::pair().expect("a pair");
        client.set_nonblocking(true).expect("a flag");
        let mut world = Self {
            vm,
            stream,
            client,
            got: Vec::new(),
            _shard: shard,
            _dir: dir,
        };
        world.publish();
        let incoming = listener.accept().expect("the guest's request");
        // From here on the shard moves bytes between guest memory and a socket, with system calls that use both.
        incoming.accept().expect("open").splice(theirs.into());
        let end = Instant::now() + PATIENCE;
        while world.stream.credit() == 0 {
            world.receive();
            assert!(Instant::now() < end, "no answer");
        }
        world
    }

    fn publish(&mut self) {
        if self.vm.driver.tx.publish() {
            self.vm.kicks[1].write(1).expect("kick");
        }
        if self.vm.driver.rx.publish() {
            self.vm.kicks[0].write(1).expect("kick");
        }
    }

    /// Takes the packets that arrived at the guest.
    fn receive(&mut self) {
        let mut payload = Vec::new();
        while let Some(wire) = self.vm.driver.receive(&mut payload) {
            self.stream.handle(&wire.header(), payload.len());
            assert_ne!(wire.header().op, Op::Rst as u16);
            self.got.extend_from_slice(&payload);
        }
        self.vm.driver.reap_tx();
        if self.stream.owes_credit() {
            let update = self.stream.header(Op::CreditUpdate);
            assert!(self.vm.driver.send(&update, &[], 1));
        }
        self.publish();
    }

    fn guest_writes(&mut self, bytes: &[u8]) {
        let h = self.stream.payload(bytes.len() as u32);
        assert!(self.vm.driver.send(&h, bytes, PAGE));
        self.publish();
    }

    fn client_reads(&mut self) -> Vec<u8> {
        let (mut all, mut buf) = (Vec::new(), [0; 8192]);
        loop {
            match self.client.read(&mut buf) {
                Ok(n @ 1..) => all.extend_from_slice(&buf[..n]),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return all,
                other => panic!("{other:?}"),
            }
        }
    }

    /// One echo.
    fn echo(&mut self, number: u32) {
        let bytes = number.to_le_bytes();
        self.guest_writes(&bytes);
        let (mut there, end) = (Vec::new(), Instant::now() + PATIENCE);
        while there.len() < bytes.len() {
            there.extend(self.client_reads());
            assert!(Instant::now() < end, "echo {number} did not arrive");
        }
        assert_eq!(there, bytes);
        self.client.write_all(&there).expect("room");
        while self.got.len() < bytes.len() {
            self.receive();
            assert!(Instant::now() < end, "echo {number} was not returned");
        }
        assert_eq!(self.got.split_off(0), bytes);
    }

    /// Address at which the backend (not the driver) has the guest's memory mapped.
    fn backends_mapping(&self) -> u64 {
        let inode = self.vm.file.metadata().expect("a file").ino().to_string();
        let maps = std::fs::read_to_string("/proc/self/maps").expect("proc");
        let of_file = maps
            .lines()
            .filter(|l| l.split_ascii_whitespace().nth(4) == Some(&inode));
        let starts = of_file.filter_map(|l| u64::from_str_radix(l.split('-').next()?, 16).ok());
        let ours = self.vm.host_address(0);
        let mut theirs = starts.filter(|&start| start != ours);
        let start = theirs.next().expect("mapped by the backend");
        assert_eq!(theirs.next(), None, "mapped in one piece");
        start
    }

    /// Removes pages, so that an access to them finds them missing.
    fn punch(&self, guest_address: u64, len: usize) {
        let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let (at, len) = (guest_address as i64, len as i64);
        fallocate(self.vm.file.as_fd(), how, at, len).expect("a hole");
    }
}

/// Waits for an access to a missing page among `pages`. Delays the page for a second, or longer until the other VM has
/// its echoes. Meanwhile the waiting VM is blocked. Returns the page.
fn hold(missing: &Missing, pages: Range<u64>, waiting: &mut World, other: &mut World) -> u64 {
    let page = missing.wait(PollTimeout::from(30_000u16));
    let page = page.expect("the backend touches it");
    assert!(pages.contains(&page), "{page:#x}");
    let (begin, mut echoes) = (Instant::now(), 0);
    while begin.elapsed() < STALL || echoes < ECHOES {
        other.echo(echoes);
        echoes += 1;
        waiting.receive();
        assert!(waiting.got.is_empty() && waiting.client_reads().is_empty());
    }
    println!("{echoes} echoes of the other VM in {:?}", begin.elapsed());
    page
}

#[test]
fn memory_missing_for_a_second_stalls_only_its_own_vm() {
    let (mut stalled, mut other) = (World::new("stalled"), World::new("other"));
    for i in 0..20 {
        stalled.echo(i);
        other.echo(i);
    }
    let base = stalled.backends_mapping();
    let missing = match Missing::register(base, memory::MEMORY_BYTES as u64) {
        Ok(missing) => missing,
        Err(e) if e.kind() == ErrorKind::PermissionDenied => {
            println!("skipped: userfaultfd needs root, or vm.unprivileged_userfaultfd=1");
            return;
        }
        Err(e) => panic!("{e}"),
    };

    // From the guest: a packet whose payload is in a missing page.
    let bytes: [u8; PAGE] = pattern(PAGE, 4).try_into().expect("a page");
    let head = stalled.vm.driver.tx.next_head().expect("a descriptor");
    let payload = memory::tx_payload(head);
    stalled.punch(payload, PAGE);
    let wire = WireHeader::new(CID, HOST_CID, &stalled.stream.payload(PAGE as u32));
    let header = memory::header(TX_QUEUE, head);
    stalled.vm.driver.write(header, &wire.to_bytes());
    let buffers = [(header, HEADER_BYTES), (payload, PAGE)];
    let buffers = buffers.map(|(addr, len)| Buffer {
        addr,
        len: len as u32,
    });
    assert!(stalled.vm.driver.send_buffers(&buffers));
    // And a packet after it, whose memory is present.
    stalled.guest_writes(b"behind");
    let at = base + payload;
    hold(&missing, at..at + 1, &mut stalled, &mut other);
    missing.fill(at, &bytes);
    let (mut there, end) = (Vec::new(), Instant::now() + PATIENCE);
    while there.len() < PAGE + 6 {
        there.extend(stalled.client_reads());
        stalled.receive();
        assert!(Instant::now() < end, "{} bytes came", there.len());
    }
    assert_eq!(there, [&bytes[..], b"behind"].concat());

    // To the guest: all pages that it posted are missing, and arrive on access.
    let pages = u64::from(memory::QUEUE_MAX);
    stalled.punch(memory::rx_page(0), pages as usize * PAGE);
    let answer = pattern(3 * PAGE, 7);
    stalled.client.write_all(&answer).expect("room");
    let at = base + memory::rx_page(0);
    let posted = at..at + pages * PAGE as u64;
    let first = hold(&missing, posted, &mut stalled, &mut other);
    missing.fill(first, &[0; PAGE]);
    let end = Instant::now() + PATIENCE;
    while stalled.got.len() < answer.len() {
        if let Some(page) = missing.wait(PollTimeout::from(1u8)) {
            missing.fill(page, &[0; PAGE]);
        }
        stalled.receive();
        assert!(Instant::now() < end, "{} bytes came", stalled.got.len());
    }
    assert!(stalled.got.split_off(0) == answer);
    // Both VMs work as before. The kernel no longer reports missing pages.
    drop(missing);
    for i in 0..20 {
        stalled.echo(i);
        other.echo(i);
    }
}

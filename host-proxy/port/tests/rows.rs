//! R1 to R17 of the attack catalogue, against the real `adit-port` with its sandbox on, through each socket that a ring
//! comes by: `attach_socket::r..` and `ivshmem::r..`. The hostile guest, or VMM, is this process.
//!
//! While each attack runs, a tunnel of another VM, through a port process of its own, must go on; afterwards the attacked
//! process, which is the same, serves the same VM again, and has grown within bounds.

mod guest;
mod running;
mod storm;
mod vmm;

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use adit_bare::rude::{Attack, cases};
use adit_channel::ring::RingBells;
use adit_engine::Tick;
use adit_port::control::{DialError, RING_SOCKET, Target};
use adit_port::control_io::Message;
use adit_ringbuf::region::{Features, Region, Side};
use adit_ringbuf::session::Guest;
use adit_ringbuf::{Mapped, RingMem};
use adit_ringbuf_io::attach::{AttachError, Bells, Code, Socket};
use adit_ringbuf_io::doorbell::{Doorbell, Polled};
use running::{Aditd, Running};
use rustix::fs::{FallocateFlags, SealFlags, fallocate, fcntl_add_seals, ftruncate};
use vmm::{Agent, BYTES, LONG, Talk, Vmm, Way, echoed, offer, start, wait_dialed, wait_ring};

/// How long an attack lasts, as a rule.
const ATTACK: Duration = Duration::from_millis(500);
/// A session is there again within a second; other tests on the same processors may have them for longer.
const SOON: Duration = Duration::from_secs(5);
/// Most anonymous memory of an attacked process, KiB.
const PORT_MAX_KIB: u64 = 8 << 10;

fn service() -> Target {
    Target::Service("tcp:80".parse().unwrap())
}

/// Another VM, in order: a tunnel over its ring, in use.
struct Neighbour {
    over: Arc<AtomicBool>,
    echoing: Option<JoinHandle<u32>>,
    _vm: (Running, Aditd, Vmm, Agent),
}

impl Neighbour {
    fn start() -> Self {
        let mut running = Running::start();
        let aditd = running.connect();
        let vmm = Vmm::by(Way::Attach, &running.dir);
        let agent = vmm.boot();
        agent.serve();
        wait_ring(&aditd, |ring| ring.running);
        let tunnel = tunnel(&aditd, 1);
        let over = Arc::new(AtomicBool::new(false));
        let ends = over.clone();
        let echoing = std::thread::spawn(move || {
            let mut count = 0;
            while !ends.load(Ordering::SeqCst) {
                echoed(&tunnel, b"undisturbed");
                count += 1;
            }
            count
        });
        Self {
            over,
            echoing: Some(echoing),
            _vm: (running, aditd, vmm, agent),
        }
    }

    /// It never noticed.
    fn lived(mut self) {
        self.over.store(true, Ordering::SeqCst);
        let echoes = self.echoing.take().unwrap().join().expect("no error");
        assert!(echoes > 20, "{echoes} echoes");
    }
}

/// A port process that is attacked, and a VMM with its ring.
struct Rig {
    running: Running,
    aditd: Aditd,
    vmm: Vmm,
    way: Way,
    neighbour: Neighbour,
}

/// Dials, as often as an old session is still ending.
fn tunnel(aditd: &Aditd, id: u64) -> UnixStream {
    let until = Instant::now() + SOON;
    for id in (id << 16).. {
        aditd.dial(id, service());
        let answer = wait_dialed(aditd);
        if matches!(&answer, Message::Dialed(d) if d.id == id) {
            return aditd.attach(id, b"");
        }
        assert!(Instant::now() < until, "{answer:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("no number is left")
}

impl Rig {
    fn start(way: Way) -> Self {
        let neighbour = Neighbour::start();
        let mut running = Running::start();
        let aditd = running.connect();
        let vmm = Vmm::by(way, &running.dir);
        wait_ring(&aditd, |ring| !ring.memory.is_empty());
        Self {
            running,
            aditd,
            vmm,
            way,
            neighbour,
        }
    }

    /// A guest in order, attached.
    fn agent(&self) -> Agent {
        let agent = self.vmm.boot();
        agent.serve();
        wait_ring(&self.aditd, |ring| ring.running);
        agent
    }

    /// How often the process was woken, or made to wait.
    fn switches(&self) -> u64 {
        let of = |which| self.running.status(which);
        of("voluntary_ctxt_switches") + of("nonvoluntary_ctxt_switches")
    }

    /// The process is the same, has not grown, and serves this VM; the neighbour's tunnel lives.
    fn ends_well(mut self) {
        let kib = self.running.status("RssAnon");
        assert!(kib < PORT_MAX_KIB, "{kib} KiB");
        assert!(self.running.child.try_wait().unwrap().is_none(), "it ended");
        // Whatever was said of the ring meanwhile is old; a new connection is told how it is.
        self.aditd = self.running.connect();
        let _agent = self.agent();
        let tunnel = tunnel(&self.aditd, 99);
        echoed(&tunnel, &[5; 50_000]);
        self.neighbour.lived();
    }

    /// The guest's VMM ends, and the next one comes: for guests that have lost their region by their own doing.
    fn next_vmm(&mut self) {
        self.vmm.talk = Talk::Nothing;
        wait_ring(&self.aditd, |ring| ring.memory.is_empty());
        self.vmm = Vmm::by(self.way, &self.running.dir);
        wait_ring(&self.aditd, |ring| !ring.memory.is_empty());
    }

    /// A case of the hostile guest, which says of its sessions how many there were and how many of them the host ended.
    fn case(&self, name: &str) -> (u32, u32) {
        self.case_for(name, ATTACK)
    }

    fn case_for(&self, name: &str, lasts: Duration) -> (u32, u32) {
        let memory = self.vmm.memory.clone();
        let guest = Guest::find(memory.clone(), start(), Features::NONE).unwrap();
        let begin = Instant::now();
        let now = || Tick(begin.elapsed().as_nanos() as u64);
        let bells = &self.vmm.bells;
        let ring = || {
            bells.host_data.ring().unwrap();
            bells.host_space.ring().unwrap();
        };
        let (_, case) = cases::<Mapped>()
            .into_iter()
            .find(|(n, _)| *n == name)
            .expect("such a case");
        let mut attack = Attack::new(memory, guest, start(), &ring, &now, lasts.as_nanos() as u64);
        attack.run(case);
        println!(
            "{name}: {} sessions, {} ended",
            attack.sessions, attack.lost
        );
        assert!(attack.sessions > 0, "{name} met no session");
        (attack.sessions, attack.lost)
    }
}

impl Rig {
    /// A case, until the host has ended a session of it: on a busy machine it takes its time to get so far, as to fill a
    /// ring, so that every attempt lasts twice as long as the one before.
    fn torn(&self, name: &str) {
        let until = Instant::now() + LONG;
        let mut lasts = ATTACK;
        while self.case_for(name, lasts).1 == 0 {
            assert!(Instant::now() < until, "{name}: nothing of it was refused");
            lasts *= 2;
        }
    }
}

/// The hostile guest's cases that the host must end sessions of.
fn torn(way: Way, name: &str) {
    let rig = Rig::start(way);
    rig.torn(name);
    rig.ends_well();
}

/// What is fetched is valid, or ends the session: which of them it is, chance says.
fn r01_words_that_change_between_two_looks(way: Way) {
    let rig = Rig::start(way);
    rig.case("r01-fetched-twice");
    rig.ends_well();
}

fn r02_positions_of_what_was_never_written(way: Way) {
    torn(way, "r02-positions-ahead");
}

fn r03_positions_that_go_back(way: Way) {
    torn(way, "r03-positions-back");
}

fn r04_pads_that_end_elsewhere(way: Way) {
    torn(way, "r04-pads");
}

fn r05_offsets_and_lengths_at_their_borders(way: Way) {
    torn(way, "r05-borders");
}

fn r06_headers_that_no_producer_writes(way: Way) {
    torn(way, "r06-headers");
}

fn r07_every_message_in_every_state(way: Way) {
    torn(way, "r07-messages");
}

fn r08_ids_that_nobody_has(way: Way) {
    let rig = Rig::start(way);
    let (_, lost) = rig.case("r08-ids");
    assert_eq!(lost, 0, "r08-ids ended sessions");
    rig.ends_well();
}

/// Both sides sleep between any two echoes, and are woken by the other's doorbell; then all at once.
fn r09_nobody_sleeps_over_a_record(way: Way) {
    let rig = Rig::start(way);
    let agent = rig.agent();
    let tunnel = tunnel(&rig.aditd, 1);
    for n in 0..300u64 {
        echoed(&tunnel, &n.to_le_bytes());
        std::thread::sleep(Duration::from_micros(n * 37 % 2000));
    }
    // More than a ring holds, so that each side waits for space as well.
    let sent: Vec<u8> = (0..16 << 20).map(|n: u32| (n / 7) as u8).collect();
    let mut back = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            { &tunnel }.write_all(&sent).unwrap();
            tunnel.shutdown(Shutdown::Write).unwrap();
        });
        { &tunnel }.read_to_end(&mut back).unwrap();
    });
    assert!(sent == back, "{} of {} bytes", back.len(), sent.len());
    drop(agent);
    rig.ends_well();
}

/// Whatever another process rings, and it rings a million times a second: the port process is woken a few times a second,
/// and takes next to nothing of a core. (`ADIT_STORM_SECONDS=60` for as long as the catalogue says.)
fn r10_doorbells_without_end(way: Way) {
    let rig = Rig::start(way);
    let (_, lost) = rig.case("r10-doorbells");
    assert_eq!(lost, 0, "r10-doorbells ended sessions");
    let agent = rig.agent();
    let pid = rig.running.child.id();
    let (begin, cpu) = (Instant::now(), storm::cpu(pid));
    let woken = rig.switches();
    let rung = storm::storm(&rig.vmm.bells);
    let (took, cpu) = (begin.elapsed().as_secs_f64(), storm::cpu(pid) - cpu);
    let woken = (rig.switches() - woken) as f64 / took;
    let share = cpu.as_secs_f64() / took;
    println!(
        "{way:?}: {:.0} rings/s, {woken:.0} wake-ups/s, {:.2} % of a core",
        rung as f64 / took,
        100.0 * share
    );
    assert!(woken < 300.0, "{woken} wake-ups a second");
    assert!(share <= 0.05, "{share} of a core");
    // What the guest has to say comes through at once afterwards, and the ring was never lost.
    echoed(&tunnel(&rig.aditd, 1), &[7; 50_000]);
    drop(agent);
    rig.ends_well();
}

/// A guest that attached, and takes nothing: whoever dials it is told in time, and nobody spins.
fn r11_a_guest_that_never_takes_a_record(way: Way) {
    let rig = Rig::start(way);
    let mut guest = Guest::find(rig.vmm.memory.clone(), start(), Features::NONE).unwrap();
    let _ = guest.attach();
    let until = Instant::now() + LONG;
    while guest.state() != adit_ringbuf::session::State::Run {
        assert!(Instant::now() < until, "no session");
        rig.vmm.bells.host_data.ring().unwrap();
        let _ = guest.poll().unwrap();
    }
    rig.vmm.bells.host_data.ring().unwrap();
    wait_ring(&rig.aditd, |ring| ring.running);
    let before = rig.switches();
    rig.aditd.dial(1, service());
    let answer = wait_dialed(&rig.aditd);
    assert!(
        matches!(&answer, Message::DialFailed(f) if f.id == 1 && f.error == DialError::Timeout),
        "{answer:?}"
    );
    let woken = rig.switches() - before;
    assert!(woken < 100, "it woke up {woken} times in five seconds");
    rig.ends_well();
}

/// What a ring may bring with it, of descriptors and of mappings. One that stays of each round would be 36.
const RING_MAX: usize = 12;

/// The VMM ends, or the region is offered anew, in the middle of what is copied: descriptors and mappings are as many
/// as before, but for those of one ring.
fn r12_rings_that_go_in_the_middle_of_a_copy(way: Way) {
    let mut rig = Rig::start(way);
    let mut before = None;
    for n in 0..40 {
        let mut agent = Some(rig.agent());
        let tunnel = tunnel(&rig.aditd, n);
        let mut far = tunnel.try_clone().unwrap();
        far.set_nonblocking(false).unwrap();
        let copying = std::thread::spawn(move || while far.write_all(&[9; 1 << 16]).is_ok() {});
        let mut got = vec![0; 1 << 18];
        { &tunnel }.set_nonblocking(false).unwrap();
        { &tunnel }.read_exact(&mut got).unwrap();
        if n % 2 == 0 {
            rig.next_vmm();
        } else {
            // Its guest begins anew under it.
            drop(agent.take());
            agent = Some(rig.vmm.boot());
        }
        wait_end(&tunnel);
        // It may be closed on both sides already.
        let _ = tunnel.shutdown(Shutdown::Both);
        copying.join().unwrap();
        drop((agent, tunnel));
        if n % 2 == 1 {
            rig.next_vmm();
        }
        // The first ones bring what stays. The ring that came last may not be in use yet.
        if n == 3 {
            before = Some(rig.running.counts());
        }
    }
    rig.running
        .shrinks_to(before.unwrap().map(|n| n + RING_MAX));
    rig.ends_well();
}

fn wait_end(tunnel: &UnixStream) {
    tunnel.set_read_timeout(Some(LONG)).unwrap();
    let mut buf = vec![0; 1 << 16];
    loop {
        match { tunnel }.read(&mut buf) {
            Ok(0) => return,
            Ok(_) => {}
            Err(e) => {
                let hangs = [io::ErrorKind::WouldBlock, io::ErrorKind::TimedOut];
                assert!(!hangs.contains(&e.kind()), "the tunnel hangs");
                return;
            }
        }
    }
}

/// The memory cannot be made shorter, or longer; its pages can be taken away, which are zero then, and no fault.
fn r13_memory_that_is_cut_under_the_host(way: Way) {
    let mut rig = Rig::start(way);
    let agent = rig.agent();
    let tunnel = tunnel(&rig.aditd, 1);
    echoed(&tunnel, &[1; 100_000]);
    let fd = &rig.vmm.fd;
    for bytes in [0, 4096, BYTES / 2, 2 * BYTES] {
        let cut = ftruncate(fd, bytes as u64);
        assert_eq!(cut, Err(rustix::io::Errno::PERM), "{bytes} bytes");
    }
    let more = fcntl_add_seals(fd, SealFlags::WRITE);
    assert!(more.is_err(), "sealed under the host");
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let begin = Instant::now();
    while begin.elapsed() < ATTACK {
        fallocate(fd, hole, 0, BYTES as u64).unwrap();
        rig.vmm.bells.host_data.ring().unwrap();
        rig.vmm.bells.host_space.ring().unwrap();
    }
    drop((agent, tunnel));
    // There is no region any more, by the guest's own doing.
    rig.next_vmm();
    rig.ends_well();
}

/// What the host writes and what it leaves out: between the records, and behind the last of them, there is nothing.
fn r14_nothing_of_the_hosts_between_its_records(way: Way) {
    let rig = Rig::start(way);
    let agent = rig.agent();
    let mut tunnel = tunnel(&rig.aditd, 1);
    tunnel.set_nonblocking(false).unwrap();
    tunnel.set_read_timeout(Some(LONG)).unwrap();
    let mut total = 0;
    for n in 0..200usize {
        let len = n * 37 % 2500 + 1;
        total += len;
        tunnel.write_all(&vec![0xc5; len]).unwrap();
        tunnel.read_exact(&mut vec![0; len]).unwrap();
    }
    drop((agent, tunnel));
    let memory = &rig.vmm.memory;
    let region = Region::read(memory).unwrap();
    let mut canaries = 0;
    for lane in 0..2 {
        let ring = region.geometry(lane, Side::Guest, false, false);
        // Or what stands there is of two times around.
        assert!(2 * total < ring.size || lane == 0);
        let mut at = 0;
        loop {
            let word = memory.load(ring.data + at);
            if word == 0 {
                break;
            }
            let len = (word & 0x7fff_ffff) as usize;
            let mut record = vec![0; len];
            memory.read(ring.data + at + 8, &mut record);
            canaries += record.iter().filter(|&&b| b == 0xc5).count();
            let end = at + 8 + len;
            at = end.next_multiple_of(ring.align);
            let mut padding = vec![0; at - end];
            memory.read(ring.data + end, &mut padding);
            assert!(padding.iter().all(|&b| b == 0), "behind {len} bytes");
        }
        let mut rest = vec![0; ring.size - at];
        memory.read(ring.data + at, &mut rest);
        assert!(rest.iter().all(|&b| b == 0), "behind the last record");
    }
    assert!(canaries >= total, "{canaries} of {total} bytes were found");
    rig.ends_well();
}

/// Features that were not offered, a second handshake and an old one in a session; and the socket's own.
fn r15_handshakes_that_are_changed_afterwards(way: Way) {
    let mut rig = Rig::start(way);
    rig.torn("r15-handshakes");
    match way {
        Way::Attach => {
            // Another version, and an offer behind the one that was taken.
            let socket = Socket::connect(&rig.running.dir.join(RING_SOCKET)).unwrap();
            let mut hello = [0; 34];
            hello[..8].copy_from_slice(b"ADITATT1");
            (hello[8], hello[10]) = (2, 1);
            raw(&socket, &hello, &[]);
            assert_eq!(code(&socket.wait()), Some(Code::Version));
            let Talk::Attach(taken) = &rig.vmm.talk else {
                panic!("attached by another socket")
            };
            let bells = Bells::new().unwrap();
            let again = taken.offer(&offer("web-1", BYTES), 2, rig.vmm.fd.as_fd(), &bells);
            assert!(again.is_err(), "offered twice");
        }
        Way::Ivshmem => {
            // One that listens only, and speaks.
            let Talk::Ivshmem(taken) = &rig.vmm.talk else {
                panic!("given by another socket")
            };
            { taken }.write_all(&1i64.to_le_bytes()).unwrap();
        }
    }
    let gone = wait_ring(&rig.aditd, |ring| ring.memory.is_empty());
    assert!(!gone.running, "{gone:?}");
    rig.vmm = Vmm::by(way, &rig.running.dir);
    wait_ring(&rig.aditd, |ring| !ring.memory.is_empty());
    rig.ends_well();
}

fn raw(socket: &Socket, bytes: &[u8], fds: &[&OwnedFd]) {
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let mut space = vec![std::mem::MaybeUninit::uninit(); 8192];
    let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(&fds)));
    }
    let parts = [std::io::IoSlice::new(bytes)];
    let flags = rustix::net::SendFlags::NOSIGNAL;
    rustix::net::sendmsg(socket, &parts, &mut control, flags).unwrap();
}

fn code(e: &AttachError) -> Option<Code> {
    match e {
        AttachError::Refused { code, .. } => Some(*code),
        _ => None,
    }
}

/// Ranges that overlap, overflow and end outside: in the region's head, and in what a VMM says of its memory.
fn r16_ranges_that_are_none(way: Way) {
    let mut rig = Rig::start(way);
    let (sessions, _) = rig.case("r16-ranges");
    assert!(
        sessions > 1,
        "the host believed a head that it wrote itself"
    );
    if way == Way::Attach {
        rig.vmm.talk = Talk::Nothing;
        wait_ring(&rig.aditd, |ring| ring.memory.is_empty());
        for (bytes, lanes, wanted) in [
            (0, 2, Code::Memory),
            (1, 2, Code::Memory),
            (4096, 2, Code::Memory),
            (BYTES as u64 + 1, 2, Code::Memory),
            ((1 << 31) + 1, 2, Code::Malformed),
            (1 << 63, 2, Code::Malformed),
            (u64::MAX, 2, Code::Malformed),
            (BYTES as u64, 0, Code::Malformed),
            (BYTES as u64, 5, Code::Malformed),
            (BYTES as u64, 255, Code::Malformed),
        ] {
            let socket = Socket::connect(&rig.running.dir.join(RING_SOCKET)).unwrap();
            let bells = Bells::new().unwrap();
            let mut offer = offer("web-1", 0);
            (offer.bytes, offer.lanes) = (bytes, lanes);
            let refused = socket.offer(&offer, 1, rig.vmm.fd.as_fd(), &bells);
            let refused = refused.expect_err("no such region");
            assert_eq!(code(&refused), Some(wanted), "{bytes} bytes, {lanes} lanes");
        }
        rig.vmm = Vmm::by(way, &rig.running.dir);
        wait_ring(&rig.aditd, |ring| !ring.memory.is_empty());
    }
    rig.ends_well();
}

/// A doorbell that is dumb.
struct Dumb;

impl Doorbell for Dumb {
    fn ring(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A guest that looks on and never asks to be rung, which is its right; and one that never rings, which costs those who
/// dial it their time, and nobody a processor.
fn r17_guests_without_doorbells(way: Way) {
    let rig = Rig::start(way);
    let bells = rig.vmm.guest_bells();
    let agent = rig.vmm.boot_with(RingBells {
        data_heard: Box::new(Polled),
        space_heard: Box::new(Polled),
        ..bells
    });
    agent.serve();
    wait_ring(&rig.aditd, |ring| ring.running);
    let progress = tunnel(&rig.aditd, 1);
    echoed(&progress, &[3; 300_000]);
    drop((agent, progress));
    wait_ring(&rig.aditd, |ring| !ring.running);
    let bells = rig.vmm.guest_bells();
    let mute = rig.vmm.boot_with(RingBells {
        data: Box::new(Dumb),
        space: Box::new(Dumb),
        ..bells
    });
    // Not while the host is awake for its own message: it would find the answer without a doorbell.
    mute.serve_after(Duration::from_millis(100));
    // Its requests are not heard: they are rung for here, until both sides are in a session.
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                rig.vmm.bells.host_data.ring().unwrap();
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        wait_ring(&rig.aditd, |ring| ring.running);
        over.store(true, Ordering::SeqCst);
    });
    // The host may be awake for something else, its pings at the start among it, and find the answer.
    let gives_up = (2..6).any(|id| {
        rig.aditd.dial(id, service());
        match wait_dialed(&rig.aditd) {
            Message::Dialed(dialed) if dialed.id == id => false,
            Message::DialFailed(f) if f.id == id && f.error == DialError::Timeout => true,
            other => panic!("{other:?}"),
        }
    });
    assert!(gives_up, "who hears it without a doorbell?");
    drop(mute);
    rig.ends_well();
}

/// Two VMs: whatever one guest writes to its region, and whichever of its doorbells it rings, the other's are its own.
fn two_guests_cannot_reach_each_other(way: Way) {
    let [mut one, mut other] = [(); 2].map(|()| {
        let mut running = Running::start();
        let aditd = running.connect();
        let vmm = Vmm::by(way, &running.dir);
        wait_ring(&aditd, |ring| !ring.memory.is_empty());
        (running, aditd, vmm)
    });
    let inode = |fd: &OwnedFd| rustix::fs::fstat(fd).unwrap().st_ino;
    assert_ne!(inode(&one.2.fd), inode(&other.2.fd));
    let agent = other.2.boot();
    agent.serve();
    wait_ring(&other.1, |ring| ring.running);
    let stream = tunnel(&other.1, 1);
    echoed(&stream, b"before");
    let all = |memory: &Mapped| {
        let mut bytes = vec![0; BYTES];
        memory.read(0, &mut bytes);
        bytes
    };
    // Until its own two sides have gone to sleep.
    let mut before = all(&other.2.memory);
    loop {
        std::thread::sleep(Duration::from_millis(100));
        let after = std::mem::replace(&mut before, all(&other.2.memory));
        if after == before {
            break;
        }
    }
    // Everything of its own that the first guest can reach.
    let switches = other.0.status("voluntary_ctxt_switches");
    for at in (0..BYTES).step_by(8) {
        one.2.memory.store(at, 0xdead_beef_dead_beef);
    }
    let bells = &one.2.bells;
    for _ in 0..1000 {
        for bell in [
            &bells.host_data,
            &bells.host_space,
            &bells.guest_data,
            &bells.guest_space,
        ] {
            bell.ring().unwrap();
        }
    }
    assert!(before == all(&other.2.memory), "its memory changed");
    let woken = other.0.status("voluntary_ctxt_switches") - switches;
    assert!(woken < 10, "it woke up {woken} times");
    echoed(&stream, b"afterwards");
    for (running, ..) in [&mut one, &mut other] {
        assert!(running.child.try_wait().unwrap().is_none(), "it ended");
    }
}

/// Every row, by both ways.
macro_rules! by_both {
    ($($row:ident),* $(,)?) => {
        mod attach_socket {
            $(#[test] fn $row() { super::$row(super::Way::Attach); })*
        }
        mod ivshmem {
            $(#[test] fn $row() { super::$row(super::Way::Ivshmem); })*
        }
    };
}

by_both!(
    r01_words_that_change_between_two_looks,
    r02_positions_of_what_was_never_written,
    r03_positions_that_go_back,
    r04_pads_that_end_elsewhere,
    r05_offsets_and_lengths_at_their_borders,
    r06_headers_that_no_producer_writes,
    r07_every_message_in_every_state,
    r08_ids_that_nobody_has,
    r09_nobody_sleeps_over_a_record,
    r10_doorbells_without_end,
    r11_a_guest_that_never_takes_a_record,
    r12_rings_that_go_in_the_middle_of_a_copy,
    r13_memory_that_is_cut_under_the_host,
    r14_nothing_of_the_hosts_between_its_records,
    r15_handshakes_that_are_changed_afterwards,
    r16_ranges_that_are_none,
    r17_guests_without_doorbells,
    two_guests_cannot_reach_each_other,
);

//! Guest memory that changes at any time, and guest memory that returns less than requested: R24, R25.

mod common;

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use adit_channel::carrier::{Armed, Carrier, CarrierFault, Interest, RxPacket, TxSlot};
use adit_channel::device::{FEATURES, HEADER_BYTES, VsockDevice};
use adit_engine::{Lane, ResetReason};
use adit_testkit::queue::Buffer;
use adit_testkit::{Driver, DriverConfig, VmMemory, memory};
use common::{Rig, Signals, cid, pattern, rw, scatter, wire_bytes};
use vm_memory::bitmap::BS;
use vm_memory::guest_memory::{Error as MemoryError, GuestMemorySliceIterator};
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryBackend, Permissions, VolatileSlice};

/// Number of chains that the driver sends. Once in 256, the step of its index changes both bytes of the index.
const CHAINS: u32 = 100_000;
/// Value of the index's low byte at which such a batch starts.
const BEFORE_THE_CARRY: u16 = 0xfc;
const QUEUE: u16 = 128;

/// A driver on its own thread stores its index while the device loads it, with many stores that change both bytes:
/// from 0x..fc to 0x..04. A torn value would be an index that is 252 lower or 260 higher, and either is a fault. A
/// packet that is taken twice or too early has a wrong number.
#[test]
fn r24_a_concurrently_changed_index_is_read_as_old_or_new_and_never_torn() {
    let mut rig = Rig::new();
    let mut driver = rig.driver;
    // One packet per descriptor, each with its own port, written once. After this the driver only changes indices.
    for head in 0..QUEUE {
        let addr = memory::tx_payload(head);
        driver.write(addr, &wire_bytes(&rw(u32::from(head)), &[]));
        driver.tx.write_desc(head, addr, HEADER_BYTES as u32, 0, 0);
    }
    let hammer = std::thread::spawn(move || {
        let (mut sent, mut event, mut crossings) = (0u32, 0u16, 0u32);
        let mut used = 0u16;
        while sent < CHAINS {
            let at = sent as u16 % 256;
            let batch = match at {
                0..4 => 4,
                BEFORE_THE_CARRY.. => 8,
                // Up to the position where the next such batch starts.
                _ => (BEFORE_THE_CARRY - at).min(QUEUE / 2),
            };
            let batch = u32::from(batch).min(CHAINS - sent);
            crossings += u32::from(at == BEFORE_THE_CARRY);
            for _ in 0..batch {
                // The driver loads the used index while the device stores it. It must never decrease or pass the
                // number of sent packets.
                while (sent as u16).wrapping_sub(used) >= QUEUE {
                    let now = driver.tx.used_idx();
                    assert!(now.wrapping_sub(used) <= QUEUE, "{used:#x}, then {now:#x}");
                    used = now;
                    // The device may be waiting for this CPU.
                    std::thread::yield_now();
                }
                driver.tx.push(sent as u16 % QUEUE);
                sent += 1;
            }
            driver.tx.publish();
            // The driver may change its used_event at any time.
            event = event.wrapping_mul(31).wrapping_add(7);
            driver.tx.set_used_event(event);
        }
        crossings
    });
    let (mut next, mut idle) = (0, 0u64);
    while next < CHAINS {
        let (ended, before) = (hammer.is_finished(), next);
        rig.device.begin();
        while let Some(packet) = rig.device.rx().expect("no index is torn") {
            assert_eq!(packet.header().src_port, next % u32::from(QUEUE));
            next += 1;
        }
        // The device checks the index once more before it sleeps.
        let _ = rig.device.arm(Interest {
            rx: true,
            tx: false,
        });
        assert!(!ended || next > before, "{next} came");
        idle = if next > before { 0 } else { idle + 1 };
        if idle % 64 == 63 {
            std::thread::yield_now();
        }
    }
    let crossings = hammer.join().expect("the driver");
    assert!(crossings > 300, "both bytes changed only {crossings} times");
    assert_eq!(next, CHAINS);
    let stopped = rig.device.reset(ResetReason::Epoch);
    assert_eq!(stopped.bases[1], CHAINS as u16);
}

/// How one memory access fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Failure {
    /// The last byte is missing.
    OneShort,
    /// The second half is missing.
    HalfShort,
    /// The second half is an error.
    HalfThenError,
    /// The range is missing.
    Error,
    /// The range is longer than requested.
    Longer,
}

/// Guest memory that reports every range as present, but fails in one access.
struct Failing {
    inner: Arc<VmMemory>,
    how: Failure,
    /// Number of accesses before the failure; `usize::MAX` for never.
    left: AtomicUsize,
    accesses: AtomicUsize,
    happened: AtomicBool,
}

impl Failing {
    fn new(how: Failure, at: usize) -> Arc<Self> {
        Arc::new(Self {
            inner: memory::anonymous(),
            how,
            left: AtomicUsize::new(at),
            accesses: AtomicUsize::new(0),
            happened: AtomicBool::new(false),
        })
    }

    fn now(&self) -> bool {
        self.accesses.fetch_add(1, Ordering::Relaxed);
        match self.left.load(Ordering::Relaxed) {
            usize::MAX => false,
            left => {
                let next = left.checked_sub(1).unwrap_or(usize::MAX);
                self.left.store(next, Ordering::Relaxed);
                self.happened.fetch_or(left == 0, Ordering::Relaxed);
                left == 0
            }
        }
    }
}

type Slice<'a> = VolatileSlice<'a, BS<'a, <VmMemory as GuestMemory>::Bitmap>>;
type Slices<'a> = std::vec::IntoIter<Result<Slice<'a>, MemoryError>>;

/// The result of an access.
struct Given<'a>(Slices<'a>);

impl<'a> Iterator for Given<'a> {
    type Item = Result<Slice<'a>, MemoryError>;
    fn next(&mut self) -> Option<Self::Item> {
        self.0.next()
    }
}

impl std::iter::FusedIterator for Given<'_> {}
impl<'a> GuestMemorySliceIterator<'a, BS<'a, <VmMemory as GuestMemory>::Bitmap>> for Given<'a> {}

impl GuestMemory for Failing {
    type PhysicalMemory = VmMemory;
    type Bitmap = <VmMemory as GuestMemory>::Bitmap;

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        GuestMemory::check_range(&*self.inner, addr, count, access)
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        _: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, Self::Bitmap>>, MemoryError> {
        let slices = |count| GuestMemoryBackend::get_slices(&*self.inner, addr, count);
        if !self.now() {
            return Ok(Given(slices(count).collect::<Vec<_>>().into_iter()));
        }
        let error = MemoryError::InvalidGuestAddress(addr);
        let half = count.div_ceil(2).min(count - 1);
        let mut given: Vec<_> = match self.how {
            Failure::OneShort => slices(count - 1).collect(),
            Failure::HalfShort | Failure::HalfThenError => slices(half).collect(),
            Failure::Error => return Err(error),
            Failure::Longer => slices(count + 5).collect(),
        };
        if self.how == Failure::HalfThenError {
            given.push(Err(error));
        }
        // An atomic access requires a first slice, according to the documentation of vm-memory.
        if given.is_empty() {
            return Err(MemoryError::InvalidGuestAddress(addr));
        }
        Ok(Given(given.into_iter()))
    }
}

/// The device on failing memory, and its driver, for which the memory does not fail.
struct Bench {
    device: VsockDevice<Arc<Failing>>,
    driver: Driver,
    mem: Arc<Failing>,
}

/// The bytes that one exchange moved, and the errors that it returned.
#[derive(Debug, Default)]
struct Moved {
    /// Bytes from the guest: copied, and written to a socket.
    copied: Vec<u8>,
    sent: Vec<u8>,
    /// Number of errors that the caller got.
    errors: usize,
}

const TO_COPY: usize = 700;
const TO_SEND: usize = 5000;
const TO_GUEST: usize = 900;

impl Bench {
    fn new(mem: Arc<Failing>) -> Self {
        let mut bench = Self {
            device: VsockDevice::new(cid(), 1).expect("a descriptor"),
            driver: Driver::new(mem.inner.clone(), cid(), DriverConfig::LINUX_6_1),
            mem,
        };
        bench.activate();
        bench
    }

    /// Activates the device while no access fails. The guest's driver does the same after a reset.
    fn activate(&mut self) {
        let at = self.mem.left.swap(usize::MAX, Ordering::Relaxed);
        for queue in [0, 1] {
            for addr in memory::queue_addrs(queue) {
                self.driver.write(addr, &[0; 0x2000]);
            }
        }
        let mem = self.mem.inner.clone();
        self.driver = Driver::new(mem, cid(), DriverConfig::LINUX_6_1);
        self.device.ack_features(FEATURES).expect("offered");
        let signals = Arc::new(Signals::default());
        self.device
            .activate(self.mem.clone(), self.driver.queues(), signals)
            .expect("usable");
        self.device.take_session_change();
        self.mem.accesses.store(0, Ordering::Relaxed);
        self.mem.left.store(at, Ordering::Relaxed);
    }

    /// Two packets from the guest and two to it, in buffers of several pieces.
    fn exchange(&mut self) -> Moved {
        let mut moved = Moved::default();
        let (mut ours, theirs) = UnixStream::pair().expect("a pair");
        ours.write_all(&pattern(TO_GUEST, 3)).expect("room");
        theirs.set_nonblocking(true).expect("a flag");
        self.post(0, &pattern(TO_COPY, 1), &[HEADER_BYTES, 100, 1, 300]);
        self.post(1, &pattern(TO_SEND, 2), &[20, 1000, 1500, 1, 2000]);
        self.driver.tx.publish();
        let result = self.burst(&mut moved, &theirs);
        moved.errors += usize::from(result.is_err());
        // A fault may be found in a call that cannot return it, for example in `arm`. The next call returns it.
        self.device.flush();
        let wanted = Interest { rx: true, tx: true };
        if self.device.arm(wanted) == Armed::WorkAppeared {
            self.device.begin();
        }
        moved.errors += usize::from(self.device.rx().is_err());
        ours.set_nonblocking(true).expect("a flag");
        let mut buf = [0; 4096];
        while let Ok(n @ 1..) = ours.read(&mut buf) {
            moved.sent.extend_from_slice(&buf[..n]);
        }
        moved
    }

    fn post(&mut self, at: u16, payload: &[u8], lengths: &[usize]) {
        let bytes = wire_bytes(&rw(u32::from(at)), payload);
        let buffers: Vec<Buffer> = scatter(memory::tx_payload(at), bytes.len(), lengths);
        let mut done = 0;
        for buffer in &buffers {
            let end = done + buffer.len as usize;
            self.driver.write(buffer.addr, &bytes[done..end]);
            done = end;
        }
        assert!(self.driver.send_buffers(&buffers));
    }

    fn burst(&mut self, moved: &mut Moved, socket: &UnixStream) -> Result<(), CarrierFault> {
        let device = &mut self.device;
        device.begin();
        for _ in 0..2 {
            let Some(mut packet) = device.rx()? else {
                break;
            };
            let port = packet.header().src_port;
            if port == 0 {
                let mut bytes = vec![0; packet.remaining() as usize];
                let n = packet.read(&mut bytes)?;
                moved.copied.extend_from_slice(&bytes[..n]);
            } else if packet.write_to(socket.as_fd(), u32::MAX).is_err() {
                moved.errors += 1;
            }
        }
        for by_copy in [true, false] {
            let Some(mut slot) = device.tx(Lane::Bulk, TO_GUEST as u32)? else {
                break;
            };
            let written = match by_copy {
                true => slot.write(&pattern(TO_GUEST, 3)).is_ok(),
                false => slot.read_from(socket.as_fd(), TO_GUEST as u32).is_ok(),
            };
            match written {
                true => slot.commit(&rw(9)),
                false => moved.errors += 1,
            }
        }
        Ok(())
    }

    /// The packets that the guest received.
    fn received(&mut self) -> Vec<Vec<u8>> {
        let (mut all, mut payload) = (Vec::new(), Vec::new());
        while self.driver.receive(&mut payload).is_some() {
            all.push(payload.clone());
        }
        all
    }
}

fn assert_whole(bench: &mut Bench, moved: &Moved) {
    assert_eq!(moved.errors, 0);
    assert!(moved.copied == pattern(TO_COPY, 1) && moved.sent == pattern(TO_SEND, 2));
    let to_guest = pattern(TO_GUEST, 3);
    assert_eq!(bench.received(), [to_guest.clone(), to_guest]);
}

#[test]
fn r25_memory_that_returns_less_than_requested_is_an_error_and_moves_no_wrong_byte() {
    let mut bench = Bench::new(Failing::new(Failure::Error, usize::MAX));
    let moved = bench.exchange();
    let accesses = bench.mem.accesses.load(Ordering::Relaxed);
    assert_whole(&mut bench, &moved);
    assert!(accesses > 40, "{accesses} accesses");
    for how in [
        Failure::OneShort,
        Failure::HalfShort,
        Failure::HalfThenError,
        Failure::Error,
        Failure::Longer,
    ] {
        for at in 0..accesses {
            let mut bench = Bench::new(Failing::new(how, at));
            let moved = bench.exchange();
            assert!(bench.mem.happened.load(Ordering::Relaxed), "{how:?} {at}");
            // The bytes that were moved are a prefix of those that were sent.
            let of = |got: &[u8], sent: Vec<u8>| sent.starts_with(got);
            assert!(
                of(&moved.copied, pattern(TO_COPY, 1)),
                "{how:?} {at}: copied"
            );
            assert!(of(&moved.sent, pattern(TO_SEND, 2)), "{how:?} {at}: sent");
            let received = bench.received();
            for payload in &received {
                assert!(
                    of(payload, pattern(TO_GUEST, 3)),
                    "{how:?} {at}: to the guest"
                );
            }
            let refused = bench.device.counters().malformed_chains;
            let told = moved.errors as u64 + refused;
            // A failed prefetch has no effect, because the data is read again when it is needed.
            let whole = moved.copied.len() == TO_COPY
                && moved.sent.len() == TO_SEND
                && received.iter().map(Vec::len).eq([TO_GUEST; 2]);
            assert!(told > 0 || whole, "{how:?} {at}: no error was returned");
            // The driver resets the device, and the channel works again.
            bench.device.reset(ResetReason::Epoch);
            bench.activate();
            let moved = bench.exchange();
            assert_whole(&mut bench, &moved);
        }
    }
}

//! Two shards on two mappings of one region.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use adit_channel::dial::DialError;
use adit_channel::ring::{RingBells, RingCarrier, RingError, spec};
use adit_channel::shard::{Handle, PortIndex, Shard, ShardThread};
use adit_channel::stream::{Listener, Stream, Target};
use adit_engine::EngineConfig;
use adit_ringbuf::Mapped;
use adit_ringbuf::region::Features;
use adit_ringbuf_io::attach::Bells;

/// Size of a region in bytes.
pub const BYTES: usize = 4 << 20;
/// A time limit that no step reaches.
pub const LONG: Duration = Duration::from_secs(20);

/// A new session begins within a second, but other tests may use the processors for longer.
pub const SOON: Duration = Duration::from_secs(5);

/// A region with its descriptor and its doorbells.
pub struct Region {
    pub fd: OwnedFd,
    pub mem: Mapped,
    pub bells: Bells,
}

impl Region {
    pub fn new() -> Self {
        Self::of(BYTES)
    }

    pub fn of(bytes: usize) -> Self {
        let (mem, fd) = Mapped::memfd(bytes).expect("memory");
        let bells = Bells::new().expect("doorbells");
        Self { fd, mem, bells }
    }

    /// Maps the region once more.
    pub fn map(&self) -> Mapped {
        let fd = self.fd.try_clone().expect("a descriptor");
        Mapped::from_memfd(fd, adit_ringbuf::RingMem::len(&self.mem)).expect("memory")
    }

    pub fn bells(&self) -> Bells {
        self.bells.try_clone().expect("descriptors")
    }

    pub fn host(&self) -> RingCarrier {
        let spec = spec(adit_ringbuf::RingMem::len(&self.mem)).expect("room");
        let bells = RingBells::of_host(self.bells());
        RingCarrier::host(self.map(), spec, epoch(), bells).expect("a region")
    }

    /// The guest's end. Waits until a host has made the region.
    pub fn guest(&self) -> RingCarrier {
        let until = Instant::now() + LONG;
        loop {
            let bells = RingBells::of_guest(self.bells());
            match RingCarrier::guest(self.map(), epoch() << 16, Features::NONE, bells) {
                Err(RingError::Region(_)) if Instant::now() < until => std::thread::yield_now(),
                made => return made.expect("a region"),
            }
        }
    }
}

/// Higher than every epoch before.
pub fn epoch() -> u64 {
    let now = std::time::SystemTime::now();
    let since = now.duration_since(std::time::UNIX_EPOCH);
    since.expect("after 1970").as_nanos() as u64
}

/// A shard with one `Port`, which is not running yet.
pub fn shard(carrier: RingCarrier) -> (Shard<RingCarrier>, PortIndex) {
    let mut shard = Shard::new().expect("an epoll set");
    let port = shard.add(carrier, EngineConfig::default(), 7);
    (shard, port.expect("a port"))
}

/// One end, on its own thread.
pub struct End {
    pub handle: Handle,
    _thread: ShardThread,
}

impl End {
    pub fn spawn(carrier: RingCarrier) -> Self {
        let (shard, port) = shard(carrier);
        let handle = shard.handle(port);
        let thread = shard.spawn("ring").expect("a thread");
        Self {
            handle,
            _thread: thread,
        }
    }

    pub fn listen(&self, port: u32) -> Listener {
        self.handle.listen(port).expect("a free port")
    }

    /// Dials, and repeats while there is no session.
    pub fn dial(&self, port: u32) -> Stream {
        dial(&self.handle, port)
    }

    pub fn try_dial(&self, port: u32) -> Result<Stream, DialError> {
        try_dial(&self.handle, port)
    }
}

fn try_dial(handle: &Handle, port: u32) -> Result<Stream, DialError> {
    let hello = None;
    handle.dialer().dial(&Target { port, hello }, LONG)
}

/// Dials, and repeats while there is no session or no listener.
pub fn dial(handle: &Handle, port: u32) -> Stream {
    let until = Instant::now() + LONG;
    loop {
        match try_dial(handle, port) {
            Err(DialError::NoSession | DialError::Refused) if Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(1));
            }
            stream => return stream.expect("a stream"),
        }
    }
}

/// The host's end of a region. Its shard also serves another VM, whose stream is in use all the time.
pub struct Shared {
    pub end: End,
    over: Arc<AtomicBool>,
    echoes: Arc<AtomicU32>,
    echoing: JoinHandle<()>,
    _other: (Region, End),
}

/// Minimum number of echoes of the other VM.
const ECHOES: u32 = 10;
/// The vsock port of the other VM's echo.
const OTHERS_PORT: u32 = 7;

impl Shared {
    pub fn spawn(region: &Region) -> Self {
        let other = Region::new();
        let mut shard = Shard::new().expect("an epoll set");
        let config = EngineConfig::default();
        let [at, beside] = [(region, 7), (&other, 8)]
            .map(|(region, seed)| shard.add(region.host(), config, seed).expect("a port"));
        let (handle, beside) = (shard.handle(at), shard.handle(beside));
        let thread = shard.spawn("both").expect("a thread");
        let guest = End::spawn(other.guest());
        serve(guest.listen(OTHERS_PORT), echo);
        let stream = dial(&beside, OTHERS_PORT);
        let over = Arc::new(AtomicBool::new(false));
        let echoes = Arc::new(AtomicU32::new(0));
        let (ends, counts) = (over.clone(), echoes.clone());
        let echoing = std::thread::spawn(move || {
            while !ends.load(Ordering::SeqCst) {
                stream.set_deadline(Some(Instant::now() + LONG));
                (&stream).write_all(b"undisturbed").expect("room");
                (&stream).read_exact(&mut [0; 11]).expect("an answer");
                counts.fetch_add(1, Ordering::SeqCst);
            }
        });
        Self {
            end: End {
                handle,
                _thread: thread,
            },
            over,
            echoes,
            echoing,
            _other: (other, guest),
        }
    }

    /// Checks that the other VM still works. (The attack may end before the other VM gets a processor, so this waits.)
    pub fn assert_other_vm_works(self, what: &str) {
        let begin = Instant::now();
        while self.echoes.load(Ordering::SeqCst) < ECHOES {
            let waits = begin.elapsed() < LONG && !self.echoing.is_finished();
            assert!(waits, "{what}: the other VM has no echo");
            std::thread::sleep(Duration::from_millis(1));
        }
        self.over.store(true, Ordering::SeqCst);
        self.echoing.join().expect("no error");
    }
}

/// Both ends of a new region.
pub fn pair() -> (End, End) {
    let region = Region::new();
    (End::spawn(region.host()), End::spawn(region.guest()))
}

/// Serves each incoming stream on a thread, while the listener exists.
pub fn serve(listener: Listener, serve: impl Fn(Stream) + Clone + Send + 'static) {
    std::thread::spawn(move || {
        while let Ok(incoming) = listener.accept() {
            let serve = serve.clone();
            let Ok(stream) = incoming.accept() else {
                continue;
            };
            std::thread::spawn(move || serve(stream));
        }
    });
}

/// Echoes a stream to its end.
pub fn echo(stream: Stream) {
    let (mut reader, mut writer) = (&stream, &stream);
    // An error is fine: the other side may have closed the stream.
    let _ = std::io::copy(&mut reader, &mut writer);
    let _ = stream.shutdown(adit_engine::How::Send);
    // Keep the stream until the other side has ended too.
    let _ = std::io::copy(&mut reader, &mut std::io::sink());
}

/// Runs a function that must not hang.
pub fn within<T: Send + 'static>(limit: Duration, run: impl FnOnce() -> T + Send + 'static) -> T {
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || tell.send(run()));
    told.recv_timeout(limit).expect("done in time")
}

pub fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|n| (n * 31 + n / 251 + seed) as u8).collect()
}

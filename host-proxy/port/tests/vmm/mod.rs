//! Both ways for a VMM to have a ring, and an agent in its guest, all in this process.
#![allow(dead_code)] // each test file uses only a part of it

use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use adit_channel::hello::{self, Accept, Common, Hello};
use adit_channel::ring::{RingBells, RingCarrier};
use adit_channel::shard::{Handle, Shard, ShardThread};
use adit_channel::stream::Stream;
use adit_engine::{EngineConfig, How};
use adit_port::control::{IVSHMEM_SOCKET, RING_SOCKET, Ring};
use adit_port::control_io::{Message, receive};
use adit_ringbuf::Mapped;
use adit_ringbuf::region::Features;
use adit_ringbuf_io::attach::{AttachError, Bells, Offer, Socket};
use adit_ringbuf_io::doorbell::from_passed;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use crate::running::Aditd;

/// Bytes of a region.
pub const BYTES: usize = 4 << 20;
/// Longer than anything in these tests takes.
pub const LONG: Duration = Duration::from_secs(20);

/// How the VMM gets the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// It offers its own region.
    Attach,
    /// It gets one, as QEMU does.
    Ivshmem,
}

/// The VMM's connection. When it is closed, the VMM is gone.
pub enum Talk {
    Attach(Socket),
    Ivshmem(UnixStream),
    /// Closed.
    Nothing,
}

/// A VMM with a ring, and its guest.
pub struct Vmm {
    pub talk: Talk,
    pub fd: OwnedFd,
    pub memory: Mapped,
    pub bells: Bells,
}

pub fn offer(vm: &str, bytes: usize) -> Offer {
    Offer {
        vm: vm.into(),
        bytes: bytes as u64,
        lanes: 2,
    }
}

/// A message of the ivshmem protocol.
pub fn message(from: &UnixStream) -> (i64, Option<OwnedFd>) {
    let mut bytes = [0; 8];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let parts = &mut [IoSliceMut::new(&mut bytes)];
    let got = recvmsg(from, parts, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
    assert_eq!(got.bytes, 8);
    let fd = control.drain().find_map(|m| match m {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    (i64::from_le_bytes(bytes), fd)
}

impl Vmm {
    pub fn by(way: Way, dir: &Path) -> Self {
        match way {
            Way::Attach => Self::attach(dir).expect("taken"),
            Way::Ivshmem => Self::ivshmem(dir, BYTES),
        }
    }

    pub fn attach(dir: &Path) -> Result<Self, AttachError> {
        let (memory, fd) = Mapped::memfd(BYTES).unwrap();
        let bells = Bells::new().unwrap();
        let socket = Socket::connect(&dir.join(RING_SOCKET)).unwrap();
        socket.offer(&offer("web-1", BYTES), 1, fd.as_fd(), &bells)?;
        let talk = Talk::Attach(socket);
        Ok(Self {
            talk,
            fd,
            memory,
            bells,
        })
    }

    pub fn ivshmem(dir: &Path, bytes: usize) -> Self {
        let socket = UnixStream::connect(dir.join(IVSHMEM_SOCKET)).unwrap();
        let mut fds: Vec<OwnedFd> = (0..7).filter_map(|_| message(&socket).1).collect();
        let fd = fds.remove(0);
        let memory = Mapped::from_memfd(fd.try_clone().unwrap(), bytes).unwrap();
        let mut bell = || from_passed(fds.remove(0)).unwrap();
        let (host_data, host_space) = (bell(), bell());
        let (guest_data, guest_space) = (bell(), bell());
        let bells = Bells {
            guest_data,
            guest_space,
            host_data,
            host_space,
        };
        let talk = Talk::Ivshmem(socket);
        Self {
            talk,
            fd,
            memory,
            bells,
        }
    }

    /// The guest's doorbells.
    pub fn guest_bells(&self) -> RingBells {
        RingBells::of_guest(self.bells.try_clone().unwrap())
    }

    /// Boots a guest whose agent answers the hello and echoes, once it serves.
    pub fn boot(&self) -> Agent {
        self.boot_with(self.guest_bells())
    }

    /// The same with other doorbells.
    pub fn boot_with(&self, bells: RingBells) -> Agent {
        Agent::start(self.memory.clone(), bells)
    }
}

/// A number that differs in every call, as a guest's first request should.
pub fn start() -> u64 {
    let now = std::time::SystemTime::now();
    let since = now.duration_since(std::time::UNIX_EPOCH).unwrap();
    (since.as_nanos() as u64) << 8
}

pub struct Agent {
    pub handle: Handle,
    _thread: ShardThread,
}

impl Agent {
    fn start(memory: Mapped, bells: RingBells) -> Self {
        let carrier = RingCarrier::guest(memory, start(), Features::NONE, bells).unwrap();
        let mut shard = Shard::new().unwrap();
        let port = shard.add(carrier, EngineConfig::default(), 9).unwrap();
        let handle = shard.handle(port);
        let thread = shard.spawn("guest").unwrap();
        Self {
            handle,
            _thread: thread,
        }
    }

    pub fn serve(&self) {
        self.serve_after(Duration::ZERO);
    }

    /// The same, but each stream waits so long for its answer.
    pub fn serve_after(&self, pause: Duration) {
        let listener = self.handle.listen(hello::PORT).unwrap();
        std::thread::spawn(move || {
            while let Ok(incoming) = listener.accept() {
                std::thread::sleep(pause);
                let Ok(stream) = incoming.accept() else {
                    continue;
                };
                std::thread::spawn(move || greet_and_echo(&stream));
            }
        });
    }
}

fn greet_and_echo(stream: &Stream) {
    let (mut reader, mut writer) = (stream, stream);
    let Ok(Hello::Open(_)) = hello::read(&mut reader) else {
        return;
    };
    let common = Common {
        features: 0,
        epoch: 0,
        boot_nonce: [7; 16],
    };
    let accept = Accept {
        common,
        version: hello::VERSION,
    };
    let _ = writer.write_all(&Hello::Accept(accept).encode());
    let _ = std::io::copy(&mut reader, &mut writer);
    let _ = stream.shutdown(How::Send);
}

/// Waits until the ring's status is as wanted.
pub fn wait_ring(aditd: &Aditd, want: impl Fn(&Ring) -> bool) -> Ring {
    let until = Instant::now() + LONG;
    loop {
        assert!(Instant::now() < until, "the ring is never like that");
        if let (Message::Ring(ring), _) = receive(&aditd.0).unwrap().expect("connection")
            && want(&ring)
        {
            return ring;
        }
    }
}

pub fn wait_dialed(aditd: &Aditd) -> Message {
    let until = Instant::now() + LONG;
    loop {
        assert!(Instant::now() < until, "no answer");
        if let Some((message, _)) = aditd.heard() {
            return message;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

pub fn echoed(mut socket: &UnixStream, text: &[u8]) {
    socket.set_nonblocking(false).unwrap();
    socket.set_read_timeout(Some(LONG)).unwrap();
    socket.write_all(text).unwrap();
    let mut got = vec![0; text.len()];
    socket.read_exact(&mut got).unwrap();
    assert_eq!(got, text);
}

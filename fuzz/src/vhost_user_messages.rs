//! Target `vhost_user_messages`: a frontend that sends anything, with any descriptors, over a real socket to a real backend
//! with its thread. The target is also the shard. The next input is the next frontend, which must be served.

use std::fs::File;
use std::io::{ErrorKind, IoSlice, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

use adit_channel::carrier::{Armed, Carrier, Interest, RxPacket, TxSlot};
use adit_channel::device::{FEATURES, GuestCid};
use adit_channel::vhost_user::{VhostUserCarrier, VhostUserConfig};
use adit_engine::{Lane, PacketHeader};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use crate::input::Input;
use crate::mem_table::{assert_no_leak, held, memfd};

const MEMORY_BYTES: u64 = 0x1_0000;
const USER: u64 = 0x7f00_0000_0000;
const LOOK_EVERY: u64 = 1024;
/// Longer than anything in this target takes, ms.
const PATIENCE_MS: u16 = 20_000;
/// Most messages of one input: they all fit into the socket's buffer.
const MESSAGES_MAX: usize = 48;
const SOCKET: u64 = u64::MAX;

const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const SET_PROTOCOL_FEATURES: u32 = 16;
const SET_VRING_ENABLE: u32 = 18;
const VERSION: u32 = 1;
const NEED_REPLY: u32 = 8;
const PROTOCOL_FEATURES: u64 = 1 << 30;
/// MQ, REPLY_ACK, CONFIG.
const PROTOCOL: u64 = 1 | 1 << 3 | 1 << 9;

struct Fixture {
    carrier: VhostUserCarrier,
    address: SocketAddr,
    /// The guest's memory, then other files that can be passed.
    files: [File; 5],
    events: [EventFd; 2],
    runs: u64,
    held: (usize, usize),
}

thread_local! {
    static FIXTURE: std::cell::RefCell<Option<Fixture>> = const { std::cell::RefCell::new(None) };
}

fn event() -> EventFd {
    let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
    EventFd::from_flags(flags).expect("eventfd")
}

impl Fixture {
    fn new() -> Self {
        let thread = format!("{:?}", std::thread::current().id());
        let name = format!("adit-fuzz-{}-{thread}", std::process::id());
        let address = SocketAddr::from_abstract_name(name).expect("a name");
        let listener = UnixListener::bind_addr(&address).expect("a socket");
        let cid = GuestCid::new(3).expect("a guest's CID");
        let config = VhostUserConfig::new(listener, cid, "fuzz");
        let files = [
            memfd(MEMORY_BYTES, true),
            memfd(4096, true),
            memfd(MEMORY_BYTES, false),
            File::from(OwnedFd::from(event())),
            File::open("/dev/null").expect("/dev/null"),
        ];
        Self {
            carrier: VhostUserCarrier::new(config).expect("a carrier"),
            address,
            files,
            events: [event(), event()],
            runs: 0,
            held: held(),
        }
    }
}

/// Runs one input.
pub fn run(data: &[u8]) {
    FIXTURE.with_borrow_mut(|kept| {
        let mut fixture = kept.take().unwrap_or_else(Fixture::new);
        Case::new(&mut fixture).run(&mut Input(data));
        fixture.runs += 1;
        if fixture.runs % LOOK_EVERY == 0 {
            assert_no_leak(fixture.held);
        }
        *kept = Some(fixture);
    });
}

/// One frontend.
struct Case<'f> {
    fixture: &'f mut Fixture,
    socket: UnixStream,
    epoll: Epoll,
    messages: usize,
    received: Vec<u8>,
}

impl<'f> Case<'f> {
    fn new(fixture: &'f mut Fixture) -> Self {
        let socket = UnixStream::connect_addr(&fixture.address).expect("a listener");
        socket.set_nonblocking(true).expect("a flag");
        let mut case = Self {
            fixture,
            socket,
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).expect("epoll"),
            messages: 0,
            received: Vec::new(),
        };
        case.watch();
        case
    }

    fn run(mut self, input: &mut Input<'_>) {
        // Whatever the last frontend did, this one is answered, and the device is in its first state.
        assert!(self.say(GET_FEATURES, VERSION, &[], &[]));
        while self.received.len() < 20 {
            assert!(self.turn(), "not served");
        }
        assert_eq!(
            self.received[12..],
            (FEATURES | PROTOCOL_FEATURES).to_le_bytes()
        );
        assert!(
            !self.fixture.carrier.is_attached(),
            "the last frontend's session is on"
        );
        while !input.is_empty() && self.messages < MESSAGES_MAX {
            if !self.step(input) {
                break;
            }
        }
        let _ = self.socket.shutdown(std::net::Shutdown::Write);
        while self.turn() {}
        self.check_replies();
    }

    /// Sends a message, or changes shared memory. Returns false when the connection is closed.
    fn step(&mut self, input: &mut Input<'_>) -> bool {
        match input.u8() % 16 {
            0 | 1 => self.start(input),
            2 => {
                let at = u64::from(input.u16());
                let bytes = input.bytes(16);
                let room = MEMORY_BYTES.saturating_sub(at) as usize;
                let bytes = &bytes[..bytes.len().min(room)];
                self.fixture.files[0].write_at(bytes, at).expect("memory");
                true
            }
            3 => {
                let queue = input.below(2);
                // `start` puts the available rings there.
                let at = 0x1000 * (1 + queue as u64) + 0x402;
                let index = u16::from(input.u8()).to_le_bytes();
                self.fixture.files[0].write_at(&index, at).expect("memory");
                self.fixture.events[queue].write(1).expect("room");
                self.turn_if_ready()
            }
            4 => self.turn_if_ready(),
            5..=12 => self.known(input),
            _ => self.raw(input),
        }
    }

    /// Sends all messages that make a session, except those that the input leaves out.
    fn start(&mut self, input: &mut Input<'_>) -> bool {
        let without = input.u16();
        let features = FEATURES | PROTOCOL_FEATURES;
        let region = [0, MEMORY_BYTES, USER, 0];
        let table: Vec<u8> = [1u64]
            .iter()
            .chain(&region)
            .flat_map(|w| w.to_le_bytes())
            .collect();
        let zero = [0; 0x3000];
        self.fixture.files[0].write_at(&zero, 0).expect("memory");
        let mut said = vec![
            (SET_FEATURES, features.to_le_bytes().to_vec(), vec![]),
            (
                SET_PROTOCOL_FEATURES,
                PROTOCOL.to_le_bytes().to_vec(),
                vec![],
            ),
            (
                SET_MEM_TABLE,
                table,
                vec![self.fixture.files[0].as_raw_fd()],
            ),
        ];
        for queue in 0..2u32 {
            let state = |n: u32| {
                [queue, n]
                    .iter()
                    .flat_map(|w| w.to_le_bytes())
                    .collect::<Vec<u8>>()
            };
            let ring = USER + 0x1000 * u64::from(1 + queue);
            let mut addr = state(0);
            for word in [ring, ring + 0x800, ring + 0x400, 0] {
                addr.extend(word.to_le_bytes());
            }
            let kick = self.fixture.events[queue as usize].as_fd().as_raw_fd();
            let index = u64::from(queue).to_le_bytes().to_vec();
            said.push((SET_VRING_NUM, state(16), vec![]));
            said.push((SET_VRING_BASE, state(0), vec![]));
            said.push((SET_VRING_ADDR, addr, vec![]));
            said.push((SET_VRING_KICK, index.clone(), vec![kick]));
            said.push((SET_VRING_CALL, index, vec![kick]));
            said.push((SET_VRING_ENABLE, state(1), vec![]));
        }
        let said = said
            .into_iter()
            .enumerate()
            .filter(|(i, _)| without >> i & 1 == 0);
        said.map(|(_, m)| m)
            .all(|(code, body, fds)| self.say(code, VERSION, &body, &fds))
    }

    /// Sends an existing message with a body of its shape.
    fn known(&mut self, input: &mut Input<'_>) -> bool {
        let code = u32::from(input.u8() % 46);
        let shape = input.u8();
        let queue = u32::from(shape & 3).min(if shape & 0x80 != 0 { 3 } else { 1 });
        let mut body: Vec<u8> = Vec::new();
        let word = |body: &mut Vec<u8>, w: u64| body.extend(w.to_le_bytes());
        match code {
            SET_FEATURES => {
                let off = if shape & 4 == 0 { 0 } else { input.u64() };
                word(&mut body, (FEATURES | PROTOCOL_FEATURES) ^ off);
            }
            SET_PROTOCOL_FEATURES => word(
                &mut body,
                if shape & 4 == 0 {
                    PROTOCOL
                } else {
                    input.u64()
                },
            ),
            SET_MEM_TABLE => {
                let n = u64::from(input.u8() % 4);
                word(&mut body, n);
                for i in 0..n {
                    let page = |input: &mut Input<'_>| u64::from(input.u8() % 17) * 4096;
                    word(&mut body, i * MEMORY_BYTES + page(input));
                    word(&mut body, page(input));
                    word(&mut body, USER + i * MEMORY_BYTES + page(input));
                    word(&mut body, page(input));
                }
            }
            SET_VRING_ADDR => {
                word(&mut body, u64::from(queue) | u64::from(shape & 8) << 32);
                for _ in 0..4 {
                    word(&mut body, USER + u64::from(input.u16()) * 4);
                }
            }
            SET_VRING_KICK | SET_VRING_CALL | 14 => {
                word(&mut body, u64::from(queue) | u64::from(shape & 4) << 6)
            }
            // GET_CONFIG, SET_CONFIG
            24 | 25 => {
                for _ in 0..2 {
                    body.extend(u32::from(input.u8()).to_le_bytes());
                }
                body.extend([0; 4]);
                body.extend(input.bytes(usize::from(shape & 31)));
            }
            SET_VRING_NUM | SET_VRING_BASE | 11 | SET_VRING_ENABLE => {
                let n = if shape & 4 == 0 {
                    input.u8().into()
                } else {
                    input.edge32()
                };
                word(&mut body, u64::from(queue) | u64::from(n) << 32);
            }
            _ => body.extend(input.bytes(usize::from(shape & 63))),
        }
        let fds = self.fds(input);
        let flags = VERSION | if shape & 0x40 != 0 { NEED_REPLY } else { 0 };
        self.say(code, flags, &body, &fds)
    }

    fn fds(&self, input: &mut Input<'_>) -> Vec<RawFd> {
        let n = [0, 1, 1, 1, 2, 3, 8, 0][input.below(8)];
        (0..n)
            .map(|_| input.pick(&self.fixture.files.each_ref().map(AsRawFd::as_raw_fd)))
            .collect()
    }

    /// Sends any bytes.
    fn raw(&mut self, input: &mut Input<'_>) -> bool {
        let fds = self.fds(input);
        let n = 1 + usize::from(input.u8() & 63);
        let bytes = input.bytes(n);
        bytes.is_empty() || self.send(bytes, &fds)
    }

    fn say(&mut self, code: u32, flags: u32, body: &[u8], fds: &[RawFd]) -> bool {
        let head = [code, flags, body.len() as u32];
        let mut bytes: Vec<u8> = head.iter().flat_map(|w| w.to_le_bytes()).collect();
        bytes.extend(body);
        self.send(&bytes, fds)
    }

    fn send(&mut self, bytes: &[u8], fds: &[RawFd]) -> bool {
        self.messages += 1;
        let control = [ControlMessage::ScmRights(fds)];
        let control = if fds.is_empty() {
            &[][..]
        } else {
            &control[..]
        };
        let flags = MsgFlags::MSG_NOSIGNAL;
        let sent = sendmsg::<()>(
            self.socket.as_raw_fd(),
            &[IoSlice::new(bytes)],
            control,
            flags,
            None,
        );
        sent.is_ok_and(|n| n == bytes.len())
    }

    // ---- the shard

    fn watch(&mut self) {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).expect("epoll");
        let add = |fd: BorrowedFd<'_>, id: u64| {
            // Fails if both kicks are the same descriptor.
            let _ = epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, id));
        };
        add(self.socket.as_fd(), SOCKET);
        self.fixture
            .carrier
            .wakers(&mut |fd, id| add(fd, id.into()));
        self.epoll = epoll;
    }

    fn turn_if_ready(&mut self) -> bool {
        self.poll(EpollTimeout::ZERO)
    }

    /// Waits for the backend and does what it asks for. Returns false when it has closed the connection.
    fn turn(&mut self) -> bool {
        self.poll(EpollTimeout::from(PATIENCE_MS))
    }

    fn poll(&mut self, timeout: EpollTimeout) -> bool {
        let mut ready = [EpollEvent::empty(); 8];
        let n = loop {
            match self.epoll.wait(&mut ready, timeout) {
                // libFuzzer's timer signal.
                Err(Errno::EINTR) => {}
                n => break n.expect("epoll"),
            }
        };
        assert!(n > 0 || timeout == EpollTimeout::ZERO, "the backend hangs");
        let mut open = true;
        for event in &ready[..n] {
            match event.data() {
                SOCKET => open = self.read(),
                id => {
                    if self.fixture.carrier.woken(id as u32).wakers_changed {
                        self.watch();
                    }
                }
            }
        }
        self.burst();
        open
    }

    fn read(&mut self) -> bool {
        let mut buf = [0; 4096];
        loop {
            match self.socket.read(&mut buf) {
                Ok(0) => return false,
                Ok(n) => self.received.extend_from_slice(&buf[..n]),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return true,
                // The backend closed without reading everything.
                Err(_) => return false,
            }
        }
    }

    /// Sends packets back, as often as a shard would in one turn.
    fn burst(&mut self) {
        let carrier = &mut self.fixture.carrier;
        for _ in 0..4 {
            carrier.begin();
            let done = (|| {
                while let Some(mut packet) = carrier.rx()? {
                    let mut bytes = vec![0; packet.remaining() as usize];
                    packet.read(&mut bytes)?;
                }
                if let Some(mut slot) = carrier.tx(Lane::Bulk, 64)? {
                    slot.write(&[7; 64])?;
                    slot.commit(&PacketHeader::default());
                }
                Ok::<_, adit_channel::carrier::CarrierFault>(())
            })();
            if done.is_err() {
                carrier.tear();
            }
            carrier.flush();
            if carrier.arm(Interest {
                rx: true,
                tx: false,
            }) == Armed::Sleep
            {
                return;
            }
        }
    }

    /// Checks that answers are complete, and no more than there were requests.
    fn check_replies(&self) {
        let (mut rest, mut replies) = (&self.received[..], 0);
        while !rest.is_empty() {
            let (head, body) = rest.split_first_chunk::<12>().expect("a whole header");
            let word = |at: usize| {
                u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]])
            };
            assert_eq!(word(4) & 7, VERSION | 4, "version 1, a reply");
            rest = body.get(word(8) as usize..).expect("a whole body");
            replies += 1;
        }
        // Raw bytes may contain several messages; each has at least 12 bytes.
        assert!(replies <= 6 * self.messages, "{replies} answers");
    }
}

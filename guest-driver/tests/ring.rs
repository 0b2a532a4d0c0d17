//! The agent's ports over a ring: the agent in a process of its own that is killed and started again, the host here.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use adit_channel::dial::DialError;
use adit_channel::hello::{Common, Open, PORT};
use adit_channel::refusal::Code;
use adit_channel::ring::{RingBells, RingCarrier, spec};
use adit_channel::shard::{Handle, Shard};
use adit_channel::stream::{Stream, Target};
use adit_engine::{EngineConfig, How};
use adit_guest_driver::serve::{Identity, Server, blob};
use adit_guest_driver::transport::ring::{RingEnd, carrier};
use adit_ringbuf::Mapped;
use adit_ringbuf_io::attach::{self, Bells, Offer, Socket};

const BYTES: usize = 4 << 20;
const LONG: Duration = Duration::from_secs(20);
const SOCKET: &str = "ADIT_RING_SOCKET";
const ALLOW: &str = "ADIT_RING_ALLOW";
/// Above every epoch of this memory.
const EPOCH: u64 = 7;

/// Not a test by itself: the agent's process.
#[test]
fn agent() {
    let (Some(path), Ok(port)) = (std::env::var_os(SOCKET), std::env::var(ALLOW)) else {
        return;
    };
    let socket = Socket::connect(path.as_ref()).expect("our parent");
    let offered = socket.offered().expect("an offer");
    let (_socket, memory, bells) = offered.accept(0).expect("our parent");
    let carrier = carrier(memory, RingBells::of_guest(bells)).expect("a region");
    let ring = RingEnd::start(carrier).expect("a thread");
    let identity = Arc::new(Identity {
        boot_nonce: [5; 16],
        epoch: AtomicU64::new(0),
        admission: Default::default(),
    });
    let blobs = blob::store("/nowhere".as_ref());
    let server = Server::new(vec![port.parse().expect("a port")], blobs, None, identity);
    let listener = ring.listen().expect("a free port");
    server.run_on_ring(listener);
}

struct Host {
    fd: OwnedFd,
    bells: Bells,
    handle: Handle,
    _thread: adit_channel::shard::ShardThread,
}

impl Host {
    fn new() -> Self {
        let (memory, fd) = Mapped::memfd(BYTES).expect("memory");
        let bells = Bells::new().expect("doorbells");
        let ours = RingBells::of_host(bells.try_clone().expect("doorbells"));
        let spec = spec(BYTES).expect("room");
        let carrier = RingCarrier::host(memory, spec, EPOCH, ours).expect("a region");
        let mut shard = Shard::new().expect("an epoll set");
        let port = shard.add(carrier, EngineConfig::default(), 1);
        let handle = shard.handle(port.expect("a port"));
        let thread = shard.spawn("host").expect("a thread");
        Self {
            fd,
            bells,
            handle,
            _thread: thread,
        }
    }

    /// Starts an agent on it.
    fn agent(&self, allow: u16) -> Child {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("attach");
        let listener = attach::Listener::bind(&path).expect("a socket");
        let child = Command::new(std::env::current_exe().expect("this test"))
            .args(["agent", "--exact", "--nocapture"])
            .env(SOCKET, &path)
            .env(ALLOW, allow.to_string())
            .stdout(Stdio::null())
            .spawn()
            .expect("a process");
        let offer = Offer {
            vm: "web-1".into(),
            bytes: BYTES as u64,
            lanes: 2,
        };
        let socket = listener.accept().expect("our child");
        let taken = socket.offer(&offer, 1, self.fd.as_fd(), &self.bells);
        taken.expect("it takes it");
        child
    }

    fn dial(&self, service: &str) -> Result<Stream, DialError> {
        let common = Common {
            features: 0,
            epoch: 9,
            boot_nonce: [1; 16],
        };
        let service = service.parse().expect("a name");
        self.open(Some(Open::new(service, common)))
    }

    /// Without a hello it is open when the agent has taken it.
    fn open(&self, hello: Option<Open>) -> Result<Stream, DialError> {
        let target = Target { port: PORT, hello };
        let until = Instant::now() + LONG;
        loop {
            match self.handle.dialer().dial(&target, LONG) {
                // Not attached yet, or not listening yet.
                Err(DialError::NoSession | DialError::Refused) if Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                dialled => return dialled,
            }
        }
    }
}

fn echo_server() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("a port").port();
    std::thread::spawn(move || {
        for tcp in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut &tcp, &mut &tcp);
                let _ = tcp.shutdown(Shutdown::Write);
            });
        }
    });
    port
}

fn echoes(host: &Host, port: u16, len: usize) {
    let stream = host
        .dial(&format!("tcp:{port}"))
        .expect("the agent accepts");
    let sent: Vec<u8> = (0..len).map(|n| (n / 3) as u8).collect();
    let mut back = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            (&stream).write_all(&sent).expect("room");
            stream.shutdown(How::Send).expect("open");
        });
        (&stream).read_to_end(&mut back).expect("an end in order");
    });
    assert!(back == sent, "{} of {len} bytes came back", back.len());
}

#[test]
fn allowed_ports_are_served_over_a_ring_and_by_the_next_agent_too() {
    let host = Host::new();
    let port = echo_server();
    let mut agent = host.agent(port);
    for len in [1, 1000, 70_000, 2 << 20] {
        echoes(&host, port, len);
    }
    match host.dial("tcp:1") {
        Err(DialError::HelloRefused(refuse)) => assert_eq!(refuse.refusal.code(), Code::Denied),
        other => panic!("{other:?}"),
    }
    let mut old = host.dial(&format!("tcp:{port}")).expect("open");
    agent.kill().expect("our child");
    agent.wait().expect("our child");
    let begin = Instant::now();
    let mut agent = host.agent(port);
    old.read(&mut [0; 1]).expect_err("its session is over");
    echoes(&host, port, 1000);
    assert!(
        begin.elapsed() < Duration::from_secs(1),
        "{:?}",
        begin.elapsed()
    );
    agent.kill().expect("our child");
    agent.wait().expect("our child");
}

/// How many threads of a process wait for a ring's streams, or serve one.
fn accepting(agent: &Child) -> usize {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", agent.id())).expect("our child");
    let names =
        tasks.map(|task| std::fs::read_to_string(task.expect("a thread").path().join("comm")));
    names
        .filter(|name| name.as_ref().is_ok_and(|name| name.trim() == "ring-accept"))
        .count()
}

#[test]
fn streams_that_say_nothing_hold_up_no_other_and_their_threads_end_with_them() {
    let host = Host::new();
    let port = echo_server();
    let mut agent = host.agent(port);
    let silent: Vec<_> = (0..20)
        .map(|_| host.open(None).expect("it is taken"))
        .collect();
    echoes(&host, port, 1000);
    assert!(accepting(&agent) >= silent.len());
    drop(silent);
    let until = Instant::now() + LONG;
    while accepting(&agent) > 5 {
        assert!(Instant::now() < until, "{} are left", accepting(&agent));
        std::thread::sleep(Duration::from_millis(1));
    }
    for _ in 0..20 {
        echoes(&host, port, 10);
    }
    assert!(accepting(&agent) <= 6);
    agent.kill().expect("our child");
    agent.wait().expect("our child");
}

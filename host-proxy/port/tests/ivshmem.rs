//! The real `adit-port` with a ring: a VMM gets it from ivshmem.sock, and this process is the agent. There is no vsock here, so
//! everything is served over the ring.

mod guest;
mod running;
mod vmm;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use adit_channel::hello::{self, Accept, Hello};
use adit_channel::refusal::{Code, Refusal};
use adit_channel::ring::RingCarrier;
use adit_channel::shard::{Handle, Shard, ShardThread};
use adit_channel::stream::{Listener, Stream, Target as To};
use adit_engine::{EngineConfig, How};
use adit_port::control::{
    Attach, Dial, DialError, Handover, IVSHMEM_SOCKET, Kept, RING_FDS, RING_PEER_PORT, Ring, Target,
};
use adit_port::control_io::{Message, receive_all, send, send_all};
use adit_port::place::connect_control;
use adit_ringbuf::RingMem;
use adit_ringbuf::region::Features;
use vmm::{Vmm, start};

const MIB: usize = 1;
const LIMIT: Duration = Duration::from_secs(30);

/// A port process, and `aditd`'s connection to it.
struct Port {
    child: Child,
    run: tempfile::TempDir,
    aditd: OwnedFd,
    kept: Option<(Handover, Vec<OwnedFd>)>,
}

impl Drop for Port {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(dir: &Path, resume: Option<&(Handover, Vec<OwnedFd>)>) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_adit-port"));
    command.args(["--name", "web-1", "--cid", "5", "--ivshmem-mib"]);
    command.arg(MIB.to_string()).arg("--dir").arg(dir);
    if let Some((handover, fds)) = resume {
        let (ours, theirs) = rustix::net::socketpair(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::SEQPACKET,
            rustix::net::SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        send_all(&ours, &Message::Handover(handover.clone()), &fds).unwrap();
        command.arg("--resume").stdin(Stdio::from(theirs));
    }
    command.spawn().unwrap()
}

fn wait<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + LIMIT;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Connects to the port process in `dir`, as aditd does. A read that gets nothing fails the test after a while.
fn control(dir: &Path) -> OwnedFd {
    let socket = UnixStream::from(wait("it listens", || connect_control(dir).ok()));
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    socket.into()
}

impl Port {
    fn start() -> Self {
        let run = tempfile::tempdir().unwrap();
        let dir = run.path().join("web-1");
        let child = spawn(&dir, None);
        let aditd = control(&dir);
        Self {
            child,
            run,
            aditd,
            kept: None,
        }
    }

    fn dir(&self) -> PathBuf {
        self.run.path().join("web-1")
    }

    /// Kills the process, and starts a successor with its state.
    fn succeed(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.child = spawn(&self.dir(), self.kept.as_ref());
        self.aditd = control(&self.dir());
    }

    /// Receives the next frame. Keeps it if it is a handover.
    fn hear(&mut self) -> (Message, Vec<OwnedFd>) {
        let (message, fds) = receive_all(&self.aditd).unwrap().expect("connection");
        if let Message::Handover(handover) = &message {
            let seq = handover.seq;
            self.kept = Some((handover.clone(), fds));
            send(&self.aditd, &Message::Kept(Kept { seq }), None).unwrap();
            return (message, vec![]);
        }
        (message, fds)
    }

    fn wait_ring(&mut self, want: impl Fn(&Ring) -> bool) -> Ring {
        loop {
            if let (Message::Ring(status), _) = self.hear()
                && want(&status)
            {
                return status;
            }
        }
    }

    /// Waits until the handover has so many descriptors: a ring adds some.
    fn wait_kept(&mut self, fds: usize) {
        while self
            .kept
            .as_ref()
            .is_none_or(|(h, _)| usize::from(h.ring) != fds)
        {
            let _ = self.hear();
        }
    }

    fn dial(&mut self, id: u64, service: &str) -> Result<(), DialError> {
        let to = Target::Service(service.parse().unwrap());
        let deadline_ms = 5000;
        let dial = Dial {
            id,
            to,
            deadline_ms,
        };
        send(&self.aditd, &Message::Dial(dial), None).unwrap();
        loop {
            match self.hear().0 {
                Message::Dialed(d) if d.id == id => return Ok(()),
                Message::DialFailed(f) if f.id == id => return Err(f.error),
                _ => {}
            }
        }
    }

    fn attach(&self, id: u64) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let prefix = vec![];
        let message = Message::Attach(Attach { id, prefix });
        send(&self.aditd, &message, Some(theirs.as_fd())).unwrap();
        ours
    }

    fn tunnel(&mut self, id: u64) -> UnixStream {
        self.dial(id, "tcp:7").unwrap();
        self.attach(id)
    }
}

/// Connects as the VMM.
fn connect(port: &Port) -> Vmm {
    Vmm::ivshmem(&port.dir(), MIB << 20)
}

/// Starts the agent, which echoes every service.
fn boot(vmm: &Vmm) -> Agent {
    let carrier = wait("a region", || {
        let (memory, bells) = (vmm.memory.clone(), vmm.guest_bells());
        RingCarrier::guest(memory, start(), Features::NONE, bells).ok()
    });
    let mut shard = Shard::new().unwrap();
    let port = shard.add(carrier, EngineConfig::default(), 3).unwrap();
    let handle = shard.handle(port);
    let thread = shard.spawn("agent").unwrap();
    serve(handle.listen(hello::PORT).unwrap());
    Agent {
        handle,
        _thread: thread,
    }
}

struct Agent {
    handle: Handle,
    _thread: ShardThread,
}

fn serve(listener: Listener) {
    std::thread::spawn(move || {
        while let Ok(incoming) = listener.accept() {
            let Ok(stream) = incoming.accept() else {
                continue;
            };
            std::thread::spawn(move || {
                let _ = echo(&stream);
            });
        }
    });
}

fn echo(mut stream: &Stream) -> std::io::Result<()> {
    let Ok(Hello::Open(open)) = hello::read(&mut stream) else {
        return Ok(());
    };
    if open.service.as_str() == "none" {
        let refuse = hello::Refuse {
            common: hello::Common::default(),
            refusal: Refusal::new(Code::UnknownService, ""),
        };
        stream.write_all(&Hello::Refuse(refuse).encode())?;
        return stream.shutdown(How::Send);
    }
    let accept = Accept {
        common: hello::Common::default(),
        version: hello::VERSION,
    };
    stream.write_all(&Hello::Accept(accept).encode())?;
    std::io::copy(&mut { stream }, &mut { stream })?;
    stream.shutdown(How::Send)?;
    std::io::copy(&mut stream, &mut std::io::sink()).map(drop)
}

/// Sends bytes and compares their echo.
fn carry(tunnel: &UnixStream, len: usize) {
    let sent: Vec<u8> = (0..len).map(|n| (n / 7) as u8).collect();
    let mut back = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            { tunnel }.write_all(&sent).unwrap();
            tunnel.shutdown(Shutdown::Write).unwrap();
        });
        { tunnel }.read_to_end(&mut back).unwrap();
    });
    assert!(sent == back, "{} of {len}", back.len());
}

#[test]
fn services_use_the_ring_and_the_agents_dials_reach_aditd() {
    let mut port = Port::start();
    assert_eq!(port.dial(1, "tcp:7"), Err(DialError::NoSession));
    let vmm = connect(&port);
    let agent = boot(&vmm);
    let status = port.wait_ring(|ring| ring.running);
    assert_eq!(
        (status.memory.as_str(), status.bytes),
        ("memfd by ivshmem", 1 << 20)
    );
    for (id, len) in [(2, 1), (3, 100_000), (4, 3 << 20)] {
        carry(&port.tunnel(id), len);
    }
    // A refused service is not tried over vsock, because the agent has answered.
    assert_eq!(port.dial(5, "none"), Err(DialError::HelloRefused));
    // A plain vsock port never uses the ring.
    let to = Target::VsockPort(22);
    let deadline_ms = 5000;
    let id = 6;
    let dial = Message::Dial(Dial {
        id,
        to,
        deadline_ms,
    });
    send(&port.aditd, &dial, None).unwrap();
    let failed = loop {
        if let Message::DialFailed(failed) = port.hear().0 {
            break failed;
        }
    };
    assert_eq!((failed.id, failed.error), (6, DialError::NoSession));

    let to = To {
        port: hello::PORT,
        hello: None,
    };
    let mut dialled = agent.handle.dialer().dial(&to, LIMIT).unwrap();
    dialled.write_all(b"from the agent").unwrap();
    let (incoming, fds) = loop {
        if let (Message::Incoming(incoming), fds) = port.hear() {
            break (incoming, fds);
        }
    };
    assert!(incoming.port == hello::PORT && incoming.peer_port == RING_PEER_PORT);
    let mut stream = UnixStream::from(fds.into_iter().next().unwrap());
    let mut said = [0; 14];
    stream.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"from the agent");
}

#[test]
fn tunnels_outlive_aditd_and_the_ring_outlives_a_killed_port_process() {
    let mut port = Port::start();
    let vmm = connect(&port);
    let _agent = boot(&vmm);
    port.wait_ring(|ring| ring.running);
    port.wait_kept(RING_FDS);
    let mut tunnel = port.tunnel(1);
    // aditd ends, and the next one connects.
    port.aditd = control(&port.dir());
    port.kept = None;
    port.wait_kept(RING_FDS);
    tunnel.write_all(b"x").unwrap();
    tunnel.read_exact(&mut [0]).unwrap();

    for _ in 0..5 {
        let begin = Instant::now();
        port.succeed();
        // The old stream has ended, with an error and not as if it were complete.
        assert!(matches!(tunnel.read(&mut [0]), Ok(0) | Err(_)));
        port.wait_ring(|ring| ring.running);
        println!("attached again after {} ms", begin.elapsed().as_millis());
        assert!(begin.elapsed() < Duration::from_secs(5));
        tunnel = port.tunnel(9);
        tunnel.write_all(b"x").unwrap();
        tunnel.read_exact(&mut [0]).unwrap();
        port.wait_kept(RING_FDS);
    }
    carry(&port.tunnel(10), 1 << 20);
}

#[test]
fn the_ring_ends_with_its_vmm_and_the_next_vmm_gets_new_memory() {
    let mut port = Port::start();
    let first = connect(&port);
    let agent = boot(&first);
    port.wait_ring(|ring| ring.running);
    // A second VMM is refused meanwhile.
    let mut second = UnixStream::connect(port.dir().join(IVSHMEM_SOCKET)).unwrap();
    assert_eq!(second.read(&mut [0; 8]).unwrap(), 0);
    carry(&port.tunnel(1), 10_000);
    drop(first.talk);
    let status = port.wait_ring(|ring| ring.memory.is_empty());
    assert!(!status.running, "{status:?}");
    port.wait_kept(0);
    assert_eq!(port.dial(2, "tcp:7"), Err(DialError::NoSession));
    let next = connect(&port);
    let _agent = boot(&next);
    port.wait_ring(|ring| ring.running);
    // Writing to the old memory has no effect on anybody.
    for at in (0..1 << 20).step_by(8) {
        first.memory.store(at, u64::MAX);
    }
    carry(&port.tunnel(3), 1 << 20);
    drop(agent);
}

//! What the device adds to a process that links it: few crates, no thread, no global, and few system calls.

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use adit_channel::device::FEATURES;
use adit_channel::port::Notice;
use adit_channel::shard::{News, PortIndex, SYSTEM_CALLS, Shard};
use adit_channel::sink::Sink;
use adit_engine::{EngineConfig, Op, ResetReason, StreamId};
use adit_testkit::stream::GuestStream;
use adit_testkit::{Driver, DriverConfig, memory};
use common::{Device, Signals, cid};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};

const HOST_PORT: u32 = 741;
/// Maximum number of crates below `adit-channel` with the device, including itself and the engine.
const CRATES_MAX: usize = 35;

#[test]
fn the_device_pulls_few_crates() {
    let out = Command::new(env!("CARGO"))
        .args(["tree", "--offline", "-p", "adit-channel", "-e", "normal"])
        .args(["--no-default-features", "--features", "device"])
        .args(["--prefix", "none", "--format", "{p}"])
        .output()
        .expect("cargo");
    let text = String::from_utf8_lossy(&out.stdout);
    let mut crates: Vec<_> = text
        .lines()
        .map(|l| l.split(' ').take(2).collect::<Vec<_>>())
        .collect();
    crates.sort();
    crates.dedup();
    assert!(
        crates.len() > 5 && crates.len() <= CRATES_MAX,
        "{} crates: {crates:?}\n{}",
        crates.len(),
        String::from_utf8_lossy(&out.stderr)
    );
}

#[test]
fn the_sources_hold_no_global_and_start_threads_in_two_places_only() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let (mut globals, mut threads) = (Vec::new(), Vec::new());
    let mut dirs = vec![root.join("src"), root.join("engine/src")];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                dirs.push(path);
                continue;
            }
            let name = path
                .strip_prefix(root)
                .expect("below")
                .display()
                .to_string();
            if name.contains("tests") {
                continue;
            }
            let text = std::fs::read_to_string(&path).expect("a source file");
            for line in text.lines().map(str::trim_start) {
                let global = line.trim_start_matches("pub ").starts_with("static ");
                if global || line.contains("thread_local!") || line.contains("LazyLock") {
                    globals.push(format!("{name}: {line}"));
                }
                if line.contains("thread::Builder") || line.contains("thread::spawn") {
                    threads.push(name.clone());
                }
            }
        }
    }
    assert!(globals.is_empty(), "{globals:?}");
    threads.sort();
    // `Shard::spawn`, which a caller uses on purpose, and the frontend's thread of the vhost-user backend.
    assert_eq!(threads, ["src/shard/thread.rs", "src/vhost_user/thread.rs"]);
}

struct World {
    driver: Driver,
    shard: Shard<Device>,
    port: PortIndex,
    payload: Vec<u8>,
}

impl World {
    fn new() -> Self {
        let driver = Driver::new(memory::anonymous(), cid(), DriverConfig::LINUX_6_1);
        let mut device = Device::new(cid(), 1).expect("a descriptor");
        device.ack_features(FEATURES).expect("offered");
        let signals = Arc::new(Signals::default());
        device
            .activate(driver.memory().clone(), driver.queues(), signals)
            .expect("usable");
        let mut shard = Shard::new().expect("an epoll set");
        let port = shard
            .add(device, EngineConfig::default(), 1)
            .expect("a port");
        shard.port_mut(port).listen(HOST_PORT).expect("free");
        Self {
            driver,
            shard,
            port,
            payload: Vec::new(),
        }
    }

    fn turn(&mut self, wait: Duration) {
        self.driver.tx.publish();
        self.shard.port_mut(self.port);
        self.shard.turn(Some(wait)).expect("a turn");
        self.driver.reap_tx();
    }

    fn receive(&mut self, guest: &mut GuestStream) -> usize {
        let mut bytes = 0;
        while let Some(wire) = self.driver.receive(&mut self.payload) {
            guest.handle(&wire.header(), self.payload.len());
            bytes += self.payload.len();
        }
        self.driver.rx.publish();
        bytes
    }

    /// A stream of the guest that is connected to `far`.
    fn connect(&mut self, from: u32, far: UnixStream) -> (GuestStream, StreamId) {
        let mut guest = GuestStream::new(from, HOST_PORT);
        let request = guest.header(Op::Request);
        assert!(self.driver.send(&request, &[], 1));
        self.turn(Duration::ZERO);
        let mut asked = None;
        while let Some(news) = self.shard.poll_news() {
            if let News::Notice(_, Notice::Incoming { stream, .. }) = news {
                asked = Some(stream);
            }
        }
        let (now, stream) = (self.shard.now(), asked.expect("a request"));
        let sink = Some(Sink::Fd(far.into()));
        self.shard.port_mut(self.port).accept(now, stream, sink);
        while guest.credit() == 0 {
            self.turn(Duration::ZERO);
            self.receive(&mut guest);
        }
        (guest, stream)
    }

    /// Bytes from the guest arrive at `near` and are sent back, with a wait in between.
    fn echo(&mut self, guest: &mut GuestStream, near: &mut UnixStream, bytes: &mut [u8]) {
        let header = guest.payload(bytes.len() as u32);
        assert!(self.driver.send(&header, bytes, 4096));
        self.turn(Duration::ZERO);
        near.read_exact(bytes).expect("what the guest sent");
        near.write_all(bytes).expect("room");
        let mut back = 0;
        while back < bytes.len() {
            // This turn has nothing to do and waits.
            self.turn(Duration::from_millis(1));
            back += self.receive(guest);
        }
    }

    /// Streams to sockets in both directions, with waits, ends and a reset.
    fn traffic(&mut self, pairs: Vec<(UnixStream, UnixStream)>) {
        self.turn(Duration::ZERO);
        for (n, (mut near, far)) in (0..).zip(pairs) {
            let (mut guest, stream) = self.connect(1024 + n, far);
            self.echo(&mut guest, &mut near, &mut [7; 5000]);
            match n % 3 {
                0 => drop(near),
                1 => {
                    let mut end = guest.header(Op::Shutdown);
                    end.flags = 3;
                    assert!(self.driver.send(&end, &[], 1));
                }
                _ => {
                    let now = self.shard.now();
                    let why = ResetReason::Local;
                    self.shard.port_mut(self.port).reset(now, stream, why);
                }
            }
            self.turn(Duration::ZERO);
            self.receive(&mut guest);
        }
    }
}

const CHILD: &str = "ADIT_TEST_FILTERED";

/// From now on any system call except these and the test's own kills this process.
fn allow(calls: &[libc::c_long]) {
    // The test's own calls: for its ends of the sockets, and to exit.
    let own = [
        libc::SYS_recvfrom,
        libc::SYS_sendto,
        libc::SYS_sigaltstack,
        libc::SYS_munmap,
        libc::SYS_exit_group,
        libc::SYS_exit,
    ];
    let calls = calls.iter().copied().chain(own);
    let arch = std::env::consts::ARCH.try_into().expect("a known machine");
    let filter: BpfProgram = SeccompFilter::new(
        calls.map(|call| (call, vec![])).collect(),
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        arch,
    )
    .and_then(TryInto::try_into)
    .expect("a filter");
    apply_filter(&filter).expect("a filter");
}

/// Runs a test of this file again in a separate process, which may be killed.
fn in_a_child(test: &str) {
    let status = Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", test, "--nocapture"])
        .env(CHILD, "1")
        // It would look like one more file of tests.
        .stdout(std::process::Stdio::null())
        .status()
        .expect("this test");
    assert!(
        status.success(),
        "{status} (signal {:?}): a system call that is not in the list; `strace -f` shows it",
        status.signal()
    );
}

#[test]
fn traffic_needs_only_the_listed_system_calls() {
    if std::env::var_os(CHILD).is_none() {
        return in_a_child("traffic_needs_only_the_listed_system_calls");
    }
    let mut world = World::new();
    let pairs = (0..60)
        .map(|_| UnixStream::pair().expect("a pair"))
        .collect();
    allow(SYSTEM_CALLS);
    world.traffic(pairs);
    std::process::exit(0);
}

/// No futex, no clock call, no memory allocation from the system. Per message there is only one wait, the eventfd, and
/// the socket.
#[test]
fn a_running_tunnel_only_waits_reads_and_writes() {
    if std::env::var_os(CHILD).is_none() {
        return in_a_child("a_running_tunnel_only_waits_reads_and_writes");
    }
    let mut world = World::new();
    world.turn(Duration::ZERO);
    let (mut near, far) = UnixStream::pair().expect("a pair");
    let (mut guest, _) = world.connect(1024, far);
    let mut bytes = vec![7; 8000];
    // Everything was used once, so all memory is allocated.
    world.echo(&mut guest, &mut near, &mut bytes);
    allow(&[
        libc::SYS_epoll_pwait,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_epoll_wait,
        libc::SYS_read,
        libc::SYS_write,
        libc::SYS_recvmsg,
        libc::SYS_sendmsg,
        // Between two looks for work.
        libc::SYS_sched_yield,
    ]);
    for len in (1..2000).map(|n| 1 + n * 97 % 8000) {
        world.echo(&mut guest, &mut near, &mut bytes[..len]);
    }
    std::process::exit(0);
}

#[test]
fn traffic_starts_no_thread() {
    let threads = || std::fs::read_dir("/proc/self/task").expect("proc").count();
    let mut world = World::new();
    let pairs = (0..3)
        .map(|_| UnixStream::pair().expect("a pair"))
        .collect();
    world.traffic(pairs);
    // The test harness runs other tests at the same time, each on one thread.
    let of_tests = 5 + std::thread::available_parallelism().map_or(1, usize::from);
    assert!(threads() <= of_tests, "{} threads", threads());
}

#[test]
fn the_examples_for_vmm_authors_run() {
    let mut path = std::env::current_exe().expect("this test");
    path.pop();
    path.pop();
    for (example, last) in [
        ("link_the_device", "host got: hi to"),
        ("adapter_cloud_hypervisor", "continued from a snapshot"),
        ("adapter_firecracker", "continued from a snapshot"),
    ] {
        let out = Command::new(path.join("examples").join(example))
            .output()
            .expect("cargo test builds examples");
        let said = String::from_utf8_lossy(&out.stdout);
        assert!(
            out.status.success() && said.contains(last),
            "{example}: {said}{}",
            String::from_utf8_lossy(&out.stderr)
        );
    }
}

#[test]
fn an_adapter_to_another_vmms_traits_is_short() {
    for adapter in [
        include_str!("../examples/adapter_cloud_hypervisor/adapter.rs"),
        include_str!("../examples/adapter_firecracker/adapter.rs"),
    ] {
        let lines = adapter.lines().count();
        assert!(lines <= 200, "{lines} lines");
    }
}

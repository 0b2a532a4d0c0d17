//! The ring in a stock QEMU: an ivshmem function that a real guest finds by itself and drives from user space.

use std::io::Write;
use std::net::TcpStream;
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use adit_channel::ring::spec;
use adit_ringbuf::Mapped;
use adit_ringbuf::session::{self, Event, Lost};
use adit_ringbuf_io::Spin;
use adit_ringbuf_io::blocking::{Receiver, Sender};
use adit_ringbuf_io::doorbell::Doorbell;
use adit_ringbuf_io::ivshmem::{Given, Server};
use adit_tests::connect::{connect, pattern};
use adit_tests::guest::{Guest, Identity, Ring};
use adit_tests::host::Host;
use adit_tests::image::{Image, Kernel};
use adit_tests::process::wait_for;
use vmm_sys_util::eventfd::EventFd;

use crate::{BOOT, bins};

const BYTES: usize = 8 << 20;
const LANE: usize = 1;
const LIMIT: Duration = Duration::from_secs(30);

/// The guest's doorbell.
enum Bell {
    Event(EventFd),
    Stream(TcpStream),
}

impl Doorbell for Bell {
    fn ring(&self) -> std::io::Result<()> {
        match self {
            Self::Event(event) => event.ring(),
            Self::Stream(stream) => {
                let mut stream = stream;
                stream.write_all(&[1])
            }
        }
    }
}

struct Rig {
    guest: Guest,
    given: Given,
    session: session::Host<Mapped>,
    host: Host,
    _server: Server,
}

/// Boots a guest with a ring. The guest runs `script` at its start.
fn rig(kernel: Kernel, iommu: bool, script: &str) -> Option<Rig> {
    rig_with(kernel, iommu, "", script)
}

fn rig_with(kernel: Kernel, iommu: bool, parameters: &str, script: &str) -> Option<Rig> {
    let bins = bins()?;
    let image = Image::build(kernel, &|what| println!("{what}")).unwrap();
    let host = Host::start(&bins, &["web-1"]).unwrap();
    host.wait_port("web-1").unwrap();
    let socket = host.dir().join("ivshmem.sock");
    let mut server = Server::new(UnixListener::bind(&socket).unwrap(), BYTES).unwrap();
    let who = Identity {
        name: "web-1",
        vhost_socket: &host.vhost_socket("web-1"),
        agent: None,
        trust: None,
        script,
        boot_files: false,
    };
    let ring = Some(Ring {
        socket: &socket,
        iommu,
        parameters,
    });
    let mut guest = Guest::boot_with(&image, &who, ring, &host.dir().join("web-1")).unwrap();
    let given = wait_for("QEMU's connection", LIMIT, || Ok(server.accept()?)).unwrap();
    let epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let epoch = epoch.as_secs();
    let session = session::Host::offer(given.memory.clone(), spec(BYTES).unwrap(), epoch).unwrap();
    guest.wait_ready(BOOT).unwrap();
    Some(Rig {
        guest,
        given,
        session,
        host,
        _server: server,
    })
}

impl Rig {
    /// Waits until the guest is attached. Returns its line on the serial line, which says how.
    fn attach(&mut self) -> String {
        let bell = &self.given.bells.guest_data;
        wait_for("the guest attaches", LIMIT, || {
            let turn = self.session.poll();
            if turn.wake == adit_ringbuf::Wake::Yes {
                bell.ring()?;
            }
            let attached = matches!(turn.event, Some(Event::Attached { .. }));
            Ok(attached.then_some(()))
        })
        .unwrap_or_else(|e| panic!("{e:#}\n{}", self.guest.serial()));
        self.guest
            .wait_serial("attached", LIMIT, |log| log.contains("RING-ATTACHED"))
            .unwrap();
        let log = self.guest.serial();
        let line = log.lines().find(|l| l.contains("RING-ATTACHED"));
        line.unwrap_or_default().trim().to_owned()
    }

    /// Checks the echo of records of all lengths, and measures round trips of 64 bytes.
    fn echo(&self, data: Bell, space: Bell, what: &str) {
        let ends = self.session.ends(LANE, true).unwrap();
        let bells = self.given.bells.try_clone().unwrap();
        let spin = Spin::default();
        let mut to = Sender::new(ends.producer, data, bells.host_space, spin);
        let mut from = Receiver::new(ends.consumer, space, bells.host_data, spin);
        let mut buf = vec![0; 256 << 10];
        for n in 0..2000u64 {
            let len = n * 3571 % 50_000 + 1;
            let record: Vec<u8> = (n..n + len).map(pattern).collect();
            to.send_within(&record, LIMIT).unwrap();
            let got = from.recv_within(&mut buf, LIMIT).unwrap();
            assert!(buf[..got] == record, "{what}: record {n} of {len} bytes");
        }
        for (pause, times) in [(0, 2000), (1, 300)] {
            let mut took = Vec::new();
            for _ in 0..times {
                std::thread::sleep(Duration::from_millis(pause));
                let begin = Instant::now();
                to.send_within(&[0x5a; 64], LIMIT).unwrap();
                from.recv_within(&mut buf, LIMIT).unwrap();
                took.push(begin.elapsed().as_nanos() / 100);
            }
            took.sort_unstable();
            println!(
                "{what}, {pause} ms between: 64 B there and back {:.1} us (least {:.1})",
                took[took.len() / 2] as f64 / 10.0,
                took[0] as f64 / 10.0
            );
        }
    }

    fn event_bells(&self) -> (Bell, Bell) {
        let bells = self.given.bells.try_clone().unwrap();
        (
            Bell::Event(bells.guest_data),
            Bell::Event(bells.guest_space),
        )
    }

    /// Ends the session, and waits until the guest has seen that.
    fn end(mut self) {
        let _ = self.session.close();
        let _ = self.given.bells.guest_data.ring();
        self.guest
            .wait_serial("lost", LIMIT, |log| log.contains("RING-LOST Closed"))
            .unwrap();
    }
}

#[test]
fn a_guest_without_an_iommu_polls_the_ring_and_writes_a_doorbell_register() {
    let script = "adit-testguest ring-echo > /dev/console 2>&1 &\n";
    let Some(mut rig) = rig(Kernel::V6_1, false, script) else {
        return;
    };
    let said = rig.attach();
    assert!(said.contains("by=sysfs hears=polling"), "{said}");
    // The guest polls, so these doorbells have no effect.
    let (data, space) = rig.event_bells();
    rig.echo(data, space, "sysfs, guest polls");
    rig.end();
}

#[test]
fn a_guest_without_an_iommu_is_woken_by_a_byte_over_vsock() {
    let script = "adit-testguest ring-echo 5001 > /dev/console 2>&1 &\n";
    let Some(mut rig) = rig(Kernel::V6_1, false, script) else {
        return;
    };
    let listens = |log: &str| log.contains("RING-LISTENS");
    rig.guest.wait_serial("listens", LIMIT, listens).unwrap();
    let stream = connect(rig.host.proxy(), "vsock-5001.web-1:5001").unwrap();
    stream.set_nodelay(true).unwrap();
    let said = rig.attach();
    assert!(said.contains("by=sysfs hears=vsock"), "{said}");
    let bell = || Bell::Stream(stream.try_clone().unwrap());
    rig.echo(bell(), bell(), "sysfs, a byte over vsock");
    rig.end();
}

fn interrupts(kernel: Kernel) {
    let script = "adit-testguest ring-echo > /dev/console 2>&1 &\n";
    let Some(mut rig) = rig(kernel, true, script) else {
        return;
    };
    let said = rig.attach();
    assert!(said.contains("MSI-X hears=msix"), "{said}");
    let (data, space) = rig.event_bells();
    rig.echo(data, space, "vfio, MSI-X");
    rig.end();
}

#[test]
fn a_guest_with_an_iommu_has_interrupts_of_the_ring_6_1() {
    interrupts(Kernel::V6_1);
}

#[test]
fn a_guest_with_an_iommu_has_interrupts_of_the_ring_6_12() {
    interrupts(Kernel::V6_12);
}

/// The guest's process ends, and another one uses the function as the first one left it.
fn twice(iommu: bool) {
    let script = "(adit-testguest ring-echo; adit-testguest ring-echo) > /dev/console 2>&1 &\n";
    let Some(mut rig) = rig(Kernel::V6_1, iommu, script) else {
        return;
    };
    let first = rig.attach();
    let epoch = rig.session.region().epoch();
    let spec = spec(BYTES).unwrap();
    rig.session = session::Host::offer(rig.given.memory.clone(), spec, epoch).unwrap();
    rig.given.bells.guest_data.ring().unwrap();
    let begin = Instant::now();
    let lost = format!("RING-LOST {:?}", Lost::Restarted);
    rig.guest
        .wait_serial("lost", LIMIT, |log| log.contains(&lost))
        .unwrap();
    let again = rig.attach();
    println!("attached again after {} ms", begin.elapsed().as_millis());
    // The lines are equal except for the epoch.
    let how = |line: &str| line.split(" epoch").next().map(str::to_owned);
    assert_eq!(how(&first), how(&again));
    let (data, space) = rig.event_bells();
    rig.echo(data, space, "the second time");
}

#[test]
fn a_guest_that_polls_notices_a_restarted_host() {
    twice(false);
}

#[test]
fn a_guest_with_interrupts_notices_a_restarted_host() {
    twice(true);
}

/// A kernel in lockdown gives a device's memory only to drivers. vfio is one.
#[test]
fn under_lockdown_only_a_guest_with_an_iommu_has_its_ring_and_the_other_says_why() {
    let script = "adit-testguest ring-echo > /dev/console 2>&1 &\n";
    let locked = "lockdown=integrity";
    let Some(mut plain) = rig_with(Kernel::V6_1, false, locked, script) else {
        return;
    };
    let says = |log: &str| log.contains("ring-not-used") && log.contains("locked down (integrity)");
    plain.guest.wait_serial("it says so", LIMIT, says).unwrap();
    let mut behind = rig_with(Kernel::V6_1, true, locked, script).unwrap();
    let said = behind.attach();
    assert!(said.contains("MSI-X hears=msix"), "{said}");
}

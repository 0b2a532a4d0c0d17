//! All steps to link the virtio-vsock device into a VMM, with the `event-manager` crate that Firecracker and others
//! use. The example knows nothing of `aditd` or of an agent in the guest. `cargo run -p adit-channel --example
//! link_the_device`
//!
//! ```text
//!  vCPU thread                          event thread                        any thread
//!  MMIO: features, queues ─── Bus ──┐
//!  DRIVER_OK: activate ─────────────┤ Mutex<Vsock>
//!  ioeventfd (kick) ────────────────┼──► epoll of the shard ──► Vsock::process
//!                                   │      device ⇄ engine ⇄ sinks (sockets, services)
//!  irqfd (interrupt) ◄──────────────┘                            ▲
//!                                                      Dialer ───┘  Stream: Read + Write
//! ```
//! A VMM provides five things: guest memory, the registers of its bus, ioeventfds, an irqfd and an event loop. Here
//! the software driver of the benches replaces the guest's kernel, so that the example runs anywhere.

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use adit_channel::device::{FEATURES, GuestCid, Signal, VirtQueues, VsockDevice, WireHeader};
use adit_channel::port::Notice;
use adit_channel::shard::{News, PortIndex, Shard};
use adit_channel::sink::{Service, ServiceEvent, Sink, StreamIo};
use adit_channel::stream::{Dialer, Target};
use adit_engine::{EngineConfig, Op, ResetReason};
use adit_testkit::stream::GuestStream;
use adit_testkit::{Driver, DriverConfig, memory};
use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::timerfd::TimerFd;

type Error = Box<dyn std::error::Error + Send + Sync>;

/// Guest memory of the VMM: any type that implements `GuestAddressSpace`.
type Memory = Arc<memory::VmMemory>;

/// A vsock port of the host that the guest dials.
const ECHO: u32 = 7000;
/// A vsock port of the guest that the host dials.
const GUEST_PORT: u32 = 5000;
const PATIENCE: Duration = Duration::from_secs(5);

/// 1. The interrupt. With KVM this eventfd is an irqfd.
struct Irq(Arc<EventFd>);

impl Signal for Irq {
    fn signal(&self, _queue: u16) {
        // The write fails only when the counter is full. Then the driver has not handled the interrupt yet, and will.
        let _ = self.0.write(1);
    }

    /// The driver looks at every queue after an interrupt, so it does not need an interrupt for each packet that it
    /// sent.
    fn is_shared(&self) -> bool {
        true
    }
}

/// 2. A service of the host. Here it runs on the event thread, between two packets. A `Sink::Fd` would use a socket,
///    and a `Listener` passes streams to other threads.
struct Echo;

impl Service for Echo {
    fn on_event(&mut self, event: ServiceEvent<'_>, io: &mut StreamIo<'_>) {
        if let ServiceEvent::Data(bytes) = event {
            let n = io.write(bytes);
            io.take(n);
        }
    }
}

/// 3. The device with its connections, registered in the VMM's event loop.
struct Vsock {
    shard: Shard<VsockDevice<Memory>>,
    port: PortIndex,
    deadline: TimerFd,
}

impl Vsock {
    fn new(cid: GuestCid) -> Result<Self, Error> {
        let mut shard = Shard::new()?;
        // The seed selects the first ephemeral port. A real VMM draws it at random.
        let port = shard.add(VsockDevice::new(cid, 1)?, EngineConfig::default(), 7)?;
        shard.port_mut(port).listen(ECHO)?;
        let deadline = TimerFd::new()?;
        Ok(Self {
            shard,
            port,
            deadline,
        })
    }

    /// Runs one turn, and sets the timer for the next deadline. There is no periodic tick, so an idle device causes no
    /// wake-up.
    fn turn(&mut self) -> Result<(), Error> {
        self.shard.turn(Some(Duration::ZERO))?;
        while let Some(news) = self.shard.poll_news() {
            match news {
                News::Notice(port, Notice::Incoming { stream, .. }) => {
                    let (now, echo) = (self.shard.now(), Sink::Inline(Box::new(Echo)));
                    self.shard.port_mut(port).accept(now, stream, Some(echo));
                }
                News::Notice(_, Notice::Session { epoch: Some(n) }) => {
                    println!("session {n} is on")
                }
                News::Notice(_, Notice::Session { epoch: None }) => println!("session is over"),
                News::Notice(..) | News::Ready { .. } => {}
            }
        }
        match self.shard.wait_limit() {
            None => self.deadline.clear()?,
            // A value of zero would disarm the timer.
            Some(limit) => self
                .deadline
                .reset(limit.max(Duration::from_nanos(1)), None)?,
        }
        Ok(())
    }
}

impl MutEventSubscriber for Vsock {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        // The shard's descriptor becomes readable for kicks, for sockets and for commands of other threads.
        let shard = self.shard.as_fd().as_raw_fd();
        for fd in [shard, self.deadline.as_raw_fd()] {
            if let Err(e) = ops.add(Events::new_raw(fd, EventSet::IN)) {
                eprintln!("no vsock: {e}");
            }
        }
    }

    fn process(&mut self, _: Events, _: &mut EventOps<'_>) {
        if let Err(e) = self.turn() {
            // The guest loses its sockets; the VM continues.
            eprintln!("vsock ends: {e}");
        }
    }
}

/// 4. The bus: what an MMIO or PCI transport does on the vCPU's thread when the guest writes its registers.
struct Bus {
    vsock: Arc<Mutex<Vsock>>,
    kicks: [Arc<EventFd>; 2],
    irq: Arc<EventFd>,
}

impl Bus {
    fn new(vsock: Arc<Mutex<Vsock>>) -> Result<Self, Error> {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let event = || EventFd::from_flags(flags).map(Arc::new);
        Ok(Self {
            vsock,
            kicks: [event()?, event()?],
            irq: event()?,
        })
    }

    /// Register writes are rare, and packets never wait for this lock.
    fn device<T>(&self, with: impl FnOnce(&mut VsockDevice<Memory>) -> T) -> T {
        let mut vsock = self.vsock.lock().unwrap_or_else(PoisonError::into_inner);
        let port = vsock.port;
        with(vsock.shard.port_mut(port).carrier_mut())
    }

    /// The driver wrote DRIVER_OK. The device takes the queues by value: later register writes do not change them.
    fn driver_ok(&self, mem: Memory, acked: u64, mut queues: VirtQueues) -> Result<(), Error> {
        queues.rx.kick = Some(self.kicks[0].as_fd().try_clone_to_owned()?);
        queues.tx.kick = Some(self.kicks[1].as_fd().try_clone_to_owned()?);
        let irq = Irq(self.irq.clone());
        self.device(|device| {
            device.ack_features(acked)?;
            device.activate(mem, queues, Arc::new(irq))?;
            Ok(())
        })
    }

    /// The driver wrote 0 to the status register. Every stream ends, and the device no longer accesses the old queues.
    fn reset(&self) {
        self.device(|device| drop(device.reset(ResetReason::Epoch)));
    }

    fn dialer(&self) -> Dialer {
        let vsock = self.vsock.lock().unwrap_or_else(PoisonError::into_inner);
        vsock.shard.handle(vsock.port).dialer()
    }
}

/// Replaces the guest's kernel: a driver that polls its queues after an interrupt.
struct Guest {
    driver: Driver,
    kick: Arc<EventFd>,
    irq: Arc<EventFd>,
    payload: Vec<u8>,
}

impl Guest {
    fn send(&mut self, stream: &mut GuestStream, op: Op, payload: &[u8]) -> Result<(), Error> {
        let header = match op {
            Op::Rw => stream.payload(payload.len() as u32),
            _ => stream.header(op),
        };
        if !self.driver.send(&header, payload, 4096) {
            return Err("TX queue is full".into());
        }
        self.driver.tx.publish();
        self.kick.write(1)?;
        Ok(())
    }

    /// Waits for a packet with this operation.
    fn expect(&mut self, op: Op) -> Result<WireHeader, Error> {
        let begin = Instant::now();
        while begin.elapsed() < PATIENCE {
            if let Some(wire) = self.driver.receive(&mut self.payload) {
                self.driver.rx.publish();
                if wire.header().op == op as u16 {
                    return Ok(wire);
                }
                continue;
            }
            let mut fds = [PollFd::new(self.irq.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::from(100u8))?;
            // An error means that the eventfd is empty: the interrupt was for something that is handled already.
            let _ = self.irq.read();
        }
        Err(format!("no {op:?} from the host").into())
    }
}

fn main() -> Result<(), Error> {
    let cid = GuestCid::new(3).ok_or("guest CIDs start at 3")?;
    let vsock = Arc::new(Mutex::new(Vsock::new(cid)?));
    let bus = Bus::new(vsock.clone())?;

    // 5. The VMM's event thread.
    let mut events = EventManager::<Arc<Mutex<Vsock>>>::new()?;
    events.add_subscriber(vsock);
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    let thread = std::thread::spawn(move || {
        while !stopped.load(Ordering::Relaxed) {
            if let Err(e) = events.run_with_timeout(100) {
                return eprintln!("event loop ends: {e}");
            }
        }
    });

    let mem = memory::anonymous();
    let mut guest = Guest {
        driver: Driver::new(mem.clone(), cid, DriverConfig::LINUX_6_12),
        kick: bus.kicks[1].clone(),
        irq: bus.irq.clone(),
        payload: Vec::new(),
    };
    bus.driver_ok(mem, FEATURES, guest.driver.queues())?;

    // The guest dials the host.
    let mut stream = GuestStream::new(1024, ECHO);
    guest.send(&mut stream, Op::Request, &[])?;
    let response = guest.expect(Op::Response)?;
    stream.handle(&response.header(), 0);
    guest.send(&mut stream, Op::Rw, b"hello from the guest")?;
    guest.expect(Op::Rw)?;
    println!("echoed: {}", String::from_utf8_lossy(&guest.payload));
    if guest.payload != b"hello from the guest" {
        return Err("the echo differs from the data that was sent".into());
    }

    // The host dials the guest, from a thread that is independent of the event loop.
    let dialer = bus.dialer();
    let host = std::thread::spawn(move || -> Result<Vec<u8>, Error> {
        let target = Target {
            port: GUEST_PORT,
            hello: None,
        };
        let mut stream = dialer.dial(&target, PATIENCE)?;
        stream.write_all(b"hello from the host")?;
        let mut answer = vec![0; 5];
        stream.read_exact(&mut answer)?;
        Ok(answer)
    });
    let asked = guest.expect(Op::Request)?.header();
    let mut stream = GuestStream::new(asked.dst_port, asked.src_port);
    stream.handle(&asked, 0);
    guest.send(&mut stream, Op::Response, &[])?;
    let said = guest.expect(Op::Rw)?;
    stream.handle(&said.header(), guest.payload.len());
    println!("guest got: {}", String::from_utf8_lossy(&guest.payload));
    guest.send(&mut stream, Op::Rw, b"hi to")?;
    let answer = host.join().map_err(|_| "the host's thread panicked")??;
    println!("host got: {}", String::from_utf8_lossy(&answer));

    // The guest reboots.
    bus.reset();
    stop.store(true, Ordering::Relaxed);
    thread.join().map_err(|_| "the event thread panicked")?;
    Ok(())
}

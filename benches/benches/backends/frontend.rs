//! Connects the software guest driver to a real vhost-user socket: does what QEMU does before the guest runs.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use adit_channel::device::{FEATURES, GuestCid};
use adit_testkit::memory::{MEMORY_BYTES, memfd};
use adit_testkit::{Driver, DriverConfig};
use anyhow::Context;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Address of the guest's memory in the process of an imaginary VMM.
const USER_ADDRESS: u64 = 0x7000_0000_0000;

/// A driver whose queues are served by a backend in another process.
pub struct Attached {
    /// Its queues.
    pub driver: Driver,
    kicks: [EventFd; 2],
    /// Number of kicks.
    pub kicked: u64,
    _calls: [EventFd; 2],
    _memory: File,
    // Dropped last: the backend must see the end of the socket before its memory is gone.
    _frontend: Frontend,
}

impl Attached {
    /// Gives memory and queues to the backend that listens on `socket`, and starts the queues.
    pub fn new(socket: &Path, cid: GuestCid, config: DriverConfig) -> anyhow::Result<Self> {
        let (mem, file) = memfd();
        let driver = Driver::new(mem, cid, config);
        let frontend = connect(socket)?;
        let kicks = [event()?, event()?];
        let calls = [event()?, event()?];
        let mut this = Self {
            driver,
            kicks,
            kicked: 0,
            _calls: calls,
            _memory: file,
            _frontend: frontend,
        };
        this.start()
            .context("the backend refuses a vhost-user message")?;
        Ok(this)
    }

    fn start(&mut self) -> anyhow::Result<()> {
        let frontend = &mut self._frontend;
        frontend.set_owner()?;
        let offered = frontend.get_features()?;
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        frontend.set_features(offered & (FEATURES | protocol))?;
        let features = frontend.get_protocol_features()?;
        frontend.set_protocol_features(
            features & (VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::MQ),
        )?;
        frontend.set_mem_table(&[VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: MEMORY_BYTES as u64,
            userspace_addr: USER_ADDRESS,
            mmap_offset: 0,
            mmap_handle: self._memory.as_raw_fd(),
        }])?;
        for (i, queue) in [&self.driver.rx, &self.driver.tx].into_iter().enumerate() {
            let [desc, avail, used] = queue.addrs().map(|a| USER_ADDRESS + a);
            let config = VringConfigData {
                queue_max_size: 1024,
                queue_size: queue.size(),
                flags: 0,
                desc_table_addr: desc,
                used_ring_addr: used,
                avail_ring_addr: avail,
                log_addr: None,
            };
            frontend.set_vring_num(i, queue.size())?;
            frontend.set_vring_addr(i, &config)?;
            frontend.set_vring_base(i, 0)?;
            frontend.set_vring_call(i, &self._calls[i])?;
            frontend.set_vring_kick(i, &self.kicks[i])?;
            frontend.set_vring_enable(i, true)?;
        }
        Ok(())
    }

    /// Publishes what was posted, and kicks if the backend wants it.
    pub fn publish(&mut self) {
        let wanted = [self.driver.rx.publish(), self.driver.tx.publish()];
        for (kick, _) in self.kicks.iter().zip(wanted).filter(|(_, wanted)| *wanted) {
            self.kicked += 1;
            // Fails only if the counter is full, and then it is readable.
            let _ = kick.write(1);
        }
    }
}

fn event() -> anyhow::Result<EventFd> {
    Ok(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?)
}

/// Connects to the backend, which was just started; waits until it listens.
fn connect(socket: &Path) -> anyhow::Result<Frontend> {
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        match Frontend::connect(socket, 2) {
            Ok(frontend) => return Ok(frontend),
            Err(e) if Instant::now() >= end => {
                return Err(e).with_context(|| format!("no backend on {}", socket.display()));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

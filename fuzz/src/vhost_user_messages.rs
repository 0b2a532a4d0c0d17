//! Arbitrary messages and descriptors on a frontend's socket, to a backend that is served as a shard would.

use std::cell::RefCell;
use std::fs::File;
use std::io::{IoSlice, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use adit_benches::memory;
use adit_channel::carrier::Carrier;
use adit_channel::device::{FEATURES, GuestCid};
use adit_channel::vhost_user::{VhostUserCarrier, VhostUserConfig};
use arbitrary::{Result, Unstructured};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

const MESSAGES_MAX: usize = 40;
/// Descriptors of this process that are more than were there after the first input: a leak.
const SLACK: usize = 16;

struct Backend {
    carrier: VhostUserCarrier,
    path: std::path::PathBuf,
    memory: File,
    runs: u64,
    open: usize,
    _dir: tempfile::TempDir,
}

thread_local! {
    static BACKEND: RefCell<Option<Backend>> = const { RefCell::new(None) };
}

pub fn run(data: &[u8]) {
    BACKEND.with_borrow_mut(|slot| {
        let backend = slot.get_or_insert_with(Backend::new);
        backend.attack(data);
    });
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

impl Backend {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("v");
        let listener = UnixListener::bind(&path).expect("a socket");
        let cid = GuestCid::new(3).expect("a guest's CID");
        let config = VhostUserConfig::new(listener, cid, "fuzz");
        let (_, memory) = memory::memfd();
        Self {
            carrier: VhostUserCarrier::new(config).expect("a backend"),
            path,
            memory,
            runs: 0,
            open: 0,
            _dir: dir,
        }
    }

    fn attack(&mut self, data: &[u8]) {
        let mut stream = UnixStream::connect(&self.path).expect("it listens");
        let mut u = Unstructured::new(data);
        for _ in 0..MESSAGES_MAX {
            if u.is_empty() || self.send(&mut u, &stream).is_err() {
                break;
            }
            self.serve(&stream, false);
        }
        let _ = stream.shutdown(std::net::Shutdown::Write);
        self.serve(&stream, true);
        // Whatever it still had to say.
        let _ = stream.set_nonblocking(true);
        let _ = stream.read(&mut [0; 4096]);
        drop(stream);
        self.runs += 1;
        if self.runs == 1 {
            self.open = open_descriptors();
        } else if self.runs.is_multiple_of(256) {
            let open = open_descriptors();
            assert!(
                open <= self.open + SLACK,
                "{open} descriptors, {} at first",
                self.open
            );
        }
    }

    /// Answers the frontend's thread; `to_end`: until it lets the connection go.
    fn serve(&mut self, stream: &UnixStream, to_end: bool) {
        loop {
            let mut ready = Vec::new();
            let mut ended = false;
            {
                let mut ids = Vec::new();
                let mut wakers = Vec::new();
                self.carrier.wakers(&mut |fd, id| {
                    ids.push(id);
                    wakers.push(fd.try_clone_to_owned().expect("a descriptor"));
                });
                let mut polled: Vec<_> = wakers
                    .iter()
                    .map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN))
                    .collect();
                // Its hang-up, whatever is left to read.
                polled.push(PollFd::new(stream.as_fd(), PollFlags::empty()));
                let wait = if to_end {
                    PollTimeout::from(10_000u16)
                } else {
                    PollTimeout::ZERO
                };
                let n = poll(&mut polled, wait).expect("poll");
                assert!(
                    n > 0 || !to_end,
                    "the backend holds on to a frontend that has gone"
                );
                for (fd, id) in polled.iter().zip(&ids) {
                    if fd.any() == Some(true) {
                        ready.push(*id);
                    }
                }
                if let Some(last) = polled.last() {
                    ended = last.any() == Some(true);
                }
            }
            if ready.is_empty() {
                if to_end && !ended {
                    continue;
                }
                return;
            }
            for id in ready {
                let _ = self.carrier.woken(id);
            }
            self.carrier.begin();
            while let Ok(Some(_)) = self.carrier.rx() {}
            self.carrier.flush();
        }
    }

    fn send(&mut self, u: &mut Unstructured<'_>, stream: &UnixStream) -> Result<()> {
        let request: u32 = if u.ratio(1, 16)? {
            u.arbitrary()?
        } else {
            u.int_in_range(1..=45)?
        };
        let flags: u32 = if u.ratio(1, 8)? {
            u.arbitrary()?
        } else {
            1 | u32::from(u.ratio(1, 2)?) << 3
        };
        let body = self.body(u, request)?;
        let size = if u.ratio(1, 16)? {
            u.arbitrary()?
        } else {
            body.len() as u32
        };
        let mut bytes = Vec::new();
        for word in [request, flags, size] {
            bytes.extend_from_slice(&word.to_ne_bytes());
        }
        bytes.extend_from_slice(&body);
        let fds = self.descriptors(u, request)?;
        let raw: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let rights = if raw.is_empty() { &[][..] } else { &rights[..] };
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        let sent = sendmsg::<()>(
            stream.as_raw_fd(),
            &[IoSlice::new(&bytes)],
            rights,
            flags,
            None,
        );
        sent.map(drop).map_err(|_| arbitrary::Error::NotEnoughData)
    }

    /// What belongs to a request, often; anything, else.
    fn body(&self, u: &mut Unstructured<'_>, request: u32) -> Result<Vec<u8>> {
        let vring = |u: &mut Unstructured<'_>| -> Result<u32> {
            if u.ratio(1, 8)? {
                u.arbitrary()
            } else {
                u.int_in_range(0..=2)
            }
        };
        let mut words: Vec<u8> = Vec::new();
        let mut wide = |n: u64| words.extend_from_slice(&n.to_ne_bytes());
        if u.ratio(1, 8)? {
            let n = u.int_in_range(0..=200usize)?;
            return Ok(u.bytes(n.min(u.len()))?.to_vec());
        }
        match request {
            // Features, owner's and protocol's.
            2 => wide(if u.ratio(1, 4)? {
                u.arbitrary()?
            } else {
                FEATURES | 1 << 30
            }),
            16 => wide(if u.ratio(1, 4)? {
                u.arbitrary()?
            } else {
                0x209
            }),
            5 => {
                let regions = u.int_in_range(0..=3u64)?;
                wide(regions);
                for i in 0..regions {
                    let odd = u.ratio(1, 4)?;
                    for n in [i << 25, memory::MEMORY_BYTES as u64, 1 << 40 | i << 25, 0] {
                        wide(if odd { u.arbitrary()? } else { n });
                    }
                }
            }
            // Numbers, bases and enables of vrings.
            8 | 10 | 11 | 18 => {
                let index = vring(u)?;
                let n: u32 = match request {
                    8 => 1 << u.int_in_range(0..=11u32)?,
                    18 => u32::from(u.arbitrary::<bool>()?),
                    _ => u32::from(u.arbitrary::<u16>()?),
                };
                wide(u64::from(n) << 32 | u64::from(index));
            }
            9 => {
                let index = vring(u)?;
                let [desc, avail, used] = memory::queue_addrs((index % 2) as u16);
                wide(u64::from(index));
                for n in [desc, used, avail] {
                    wide(if u.ratio(1, 8)? {
                        u.arbitrary()?
                    } else {
                        1 << 40 | n
                    });
                }
                wide(0);
            }
            // Kick, call, error.
            12..=14 => wide(u64::from(vring(u)?) | u64::from(u.ratio(1, 8)?) << 8),
            _ => {
                let n = u.int_in_range(0..=24usize)?;
                return Ok(u.bytes(n.min(u.len()))?.to_vec());
            }
        }
        Ok(words)
    }

    fn descriptors(&self, u: &mut Unstructured<'_>, request: u32) -> Result<Vec<OwnedFd>> {
        let usual = match request {
            5 => 1,
            12..=14 => 1,
            _ => 0,
        };
        let n = if u.ratio(1, 8)? {
            u.int_in_range(0..=9)?
        } else {
            usual
        };
        (0..n)
            .map(|_| {
                Ok(match u.int_in_range(0..=3u8)? {
                    0 if request != 5 => self.memory.try_clone().expect("a descriptor").into(),
                    1..=2 if request == 5 => self.memory.try_clone().expect("a descriptor").into(),
                    _ => EventFd::from_flags(EfdFlags::EFD_NONBLOCK)
                        .expect("an eventfd")
                        .into(),
                })
            })
            .collect()
    }
}

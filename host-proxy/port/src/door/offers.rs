//! Streams that the guest has dialled and that arrive at `aditd`: one AF_VSOCK listener serves all VMs of a host, so `aditd` accepts, and
//! passes each stream to the port process of the VM that the kernel names.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use adit_channel::foreign::{Door, DoorNews};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};

/// Streams that wait for the loop at most. It takes all of them in its next turn.
pub const WAITING_MAX: usize = 1024;

type Waiting = Mutex<VecDeque<DoorNews>>;

/// Where such streams are put in.
#[derive(Clone, Debug)]
pub struct Offers {
    waiting: Arc<Waiting>,
    bell: Arc<EventFd>,
}

impl Offers {
    /// Takes a stream. One for which there is no room is closed.
    pub fn put(&self, port: u32, guest_port: u32, socket: OwnedFd) {
        self.push(DoorNews::OfferedBy {
            port,
            guest_port,
            socket,
        });
    }

    /// The guest has begun anew with a stream that it has dialled.
    pub fn begun_anew(&self, port: u32, guest_port: u32) {
        self.push(DoorNews::BegunAnew { port, guest_port });
    }

    fn push(&self, news: DoorNews) {
        let mut waiting = lock(&self.waiting);
        if waiting.len() >= WAITING_MAX {
            tracing::debug!(?news, "the guest's stream is closed: too many wait");
            return;
        }
        waiting.push_back(news);
        // It fails only when it is rung already.
        let _ = self.bell.write(1);
    }
}

/// A door through which such streams come, too.
#[derive(Debug)]
pub struct WithOffers<D> {
    door: D,
    offers: Offers,
    /// Of the door and the bell.
    both: Epoll,
}

impl<D: Door> WithOffers<D> {
    /// Puts them together.
    ///
    /// # Errors
    /// This process has no free descriptors.
    pub fn new(door: D) -> io::Result<(Self, Offers)> {
        let bell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let both = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        both.add(door.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
        both.add(&bell, EpollEvent::new(EpollFlags::EPOLLIN, 1))?;
        let offers = Offers {
            waiting: Arc::default(),
            bell: Arc::new(bell),
        };
        let with = Self {
            door,
            offers: offers.clone(),
            both,
        };
        Ok((with, offers))
    }
}

impl<D: Door> Door for WithOffers<D> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.both.0.as_fd()
    }

    fn dial(&mut self, ticket: u32, port: u32) -> io::Result<()> {
        self.door.dial(ticket, port)
    }

    fn receive(&mut self) -> Option<DoorNews> {
        // What the door says of the VM comes first.
        if let Some(news) = self.door.receive() {
            return Some(news);
        }
        // Read before the queue is: one that comes in between rings again.
        let _ = self.offers.bell.read();
        lock(&self.offers.waiting).pop_front()
    }
}

fn lock(of: &Waiting) -> std::sync::MutexGuard<'_, VecDeque<DoorNews>> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;

    /// A door that says one thing.
    struct Says(Option<DoorNews>, EventFd);

    impl Door for Says {
        fn as_fd(&self) -> BorrowedFd<'_> {
            self.1.as_fd()
        }

        fn dial(&mut self, _: u32, _: u32) -> io::Result<()> {
            Ok(())
        }

        fn receive(&mut self) -> Option<DoorNews> {
            let _ = self.1.read();
            self.0.take()
        }
    }

    fn is_ready(door: &impl Door) -> bool {
        let mut fds = [PollFd::new(door.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).unwrap() > 0
    }

    #[test]
    fn streams_come_in_their_order_behind_what_the_door_says_and_at_most_so_many_wait() {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let says = Says(
            Some(DoorNews::State(Ok(()))),
            EventFd::from_flags(flags).unwrap(),
        );
        let (mut door, offers) = WithOffers::new(says).unwrap();
        assert!(!is_ready(&door));
        let (socket, _far) = UnixStream::pair().unwrap();
        for port in 0..=WAITING_MAX as u32 {
            offers.put(741, port, socket.try_clone().unwrap().into());
        }
        assert!(is_ready(&door));
        assert!(matches!(door.receive(), Some(DoorNews::State(Ok(())))));
        for want in 0..WAITING_MAX as u32 {
            match door.receive() {
                Some(DoorNews::OfferedBy { guest_port, .. }) => assert_eq!(guest_port, want),
                other => panic!("{other:?}"),
            }
        }
        assert!(door.receive().is_none() && !is_ready(&door));
        door.door.1.write(1).unwrap();
        assert!(is_ready(&door));
    }
}

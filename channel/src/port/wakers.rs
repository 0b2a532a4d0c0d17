//! The descriptors that wake a `Port`'s carrier. They are in the epoll set, unless [`WakeupLimit`] has muted them.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use adit_engine::Tick;

use super::PortCounters;
use super::wakeup_limit::{Action, WakeupLimit};
use super::watch::{Token, Watch};
use crate::carrier::Carrier;

#[derive(Default)]
pub(super) struct Wakers {
    /// Duplicates, so that they can be removed from the epoll set even if the carrier has closed its own.
    fds: Vec<(OwnedFd, u32)>,
    limit: WakeupLimit,
    /// The set of wakers changed, or a waker brought a session change.
    found: bool,
}

impl Wakers {
    /// Registers the carrier's current wakers.
    pub(super) fn renew<C: Carrier>(&mut self, carrier: &C, watch: &Watch) -> io::Result<()> {
        self.unregister(watch);
        self.fds.clear();
        let mut fds = Vec::new();
        carrier.wakers(&mut |fd, id| fds.push((fd.try_clone_to_owned(), id)));
        for (fd, id) in fds {
            self.fds.push((fd?, id));
        }
        match self.limit.until() {
            Some(_) => Ok(()),
            None => self.register(watch),
        }
    }

    fn register(&self, watch: &Watch) -> io::Result<()> {
        self.fds
            .iter()
            .try_for_each(|(fd, id)| watch.add_level(fd.as_fd(), Token::Waker(*id)))
    }

    /// Removes the wakers from the epoll set.
    pub(super) fn unregister(&self, watch: &Watch) {
        self.fds.iter().for_each(|(fd, _)| watch.remove(fd.as_fd()));
    }

    /// A waker became readable. `change` is true if it brought a session change or changed wakers.
    pub(super) fn woke(&mut self, change: bool) {
        self.limit.signalled();
        self.found |= change;
    }

    /// A burst is over; `found` is true if it found work of the peer.
    pub(super) fn burst(
        &mut self,
        now: Tick,
        found: bool,
        watch: &Watch,
        counters: &mut PortCounters,
    ) -> io::Result<()> {
        let found = std::mem::take(&mut self.found) || found;
        let (fruitless, action) = self.limit.burst(now, found);
        counters.fruitless_polls += u64::from(fruitless);
        match action {
            Action::None => Ok(()),
            Action::Mute => {
                counters.mutes += 1;
                self.unregister(watch);
                Ok(())
            }
            // A signal during the pause is noticed at once, because the descriptor is still readable.
            Action::Unmute => self.register(watch),
        }
    }

    /// Time at which the wakers are watched again, if they are muted.
    pub(super) fn until(&self) -> Option<Tick> {
        self.limit.until()
    }
}

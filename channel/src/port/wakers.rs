//! The descriptors that wake a port's carrier: in the epoll set, unless their peer rings for nothing ([`Patience`]).

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use adit_engine::Tick;

use super::PortCounters;
use super::patience::{Hearing, Patience};
use super::watch::{Token, Watch};
use crate::carrier::Carrier;

#[derive(Default)]
pub(super) struct Wakers {
    /// Duplicates: what is registered can be taken out again whatever the carrier did to its own.
    fds: Vec<(OwnedFd, u32)>,
    patience: Patience,
    /// Their set changed, or one brought a session.
    found: bool,
}

impl Wakers {
    /// Registers those that the carrier has now.
    pub(super) fn renew<C: Carrier>(&mut self, carrier: &C, watch: &Watch) -> io::Result<()> {
        self.leave(watch);
        self.fds.clear();
        let mut fds = Vec::new();
        carrier.wakers(&mut |fd, id| fds.push((fd.try_clone_to_owned(), id)));
        for (fd, id) in fds {
            self.fds.push((fd?, id));
        }
        match self.patience.until() {
            Some(_) => Ok(()),
            None => self.join(watch),
        }
    }

    fn join(&self, watch: &Watch) -> io::Result<()> {
        self.fds
            .iter()
            .try_for_each(|(fd, id)| watch.add_level(fd.as_fd(), Token::Waker(*id)))
    }

    /// Takes them out of the epoll set.
    pub(super) fn leave(&self, watch: &Watch) {
        self.fds.iter().for_each(|(fd, _)| watch.remove(fd.as_fd()));
    }

    /// One of them became readable, and brought a change or none.
    pub(super) fn rang(&mut self, change: bool) {
        self.patience.rang();
        self.found |= change;
    }

    /// A burst is over, and found work of the peer's or not.
    pub(super) fn burst(
        &mut self,
        now: Tick,
        found: bool,
        watch: &Watch,
        counters: &mut PortCounters,
    ) -> io::Result<()> {
        let found = std::mem::take(&mut self.found) || found;
        let (in_vain, hearing) = self.patience.burst(now, found);
        counters.in_vain += u64::from(in_vain);
        match hearing {
            Hearing::Same => Ok(()),
            Hearing::Deaf => {
                counters.unheard += 1;
                self.leave(watch);
                Ok(())
            }
            // Whoever rang meanwhile is heard at once: readable is what was not read.
            Hearing::Back => self.join(watch),
        }
    }

    /// When they are heard again, if they are not.
    pub(super) fn until(&self) -> Option<Tick> {
        self.patience.until()
    }
}

//! How a shard waits: events of the kernel, polling before it sleeps, the timeout.

use std::io;
use std::time::{Duration, Instant};

use nix::sys::epoll::{EpollEvent, EpollTimeout};

use super::Shard;
use crate::carrier::Carrier;
use crate::port::watch::Token;
use crate::port::{Budget, Port};

/// Number of spins after a round that found something: about a microsecond.
const BACK_OFF: u32 = 20;
/// Number of cheap checks (`glance`) per polling round, if all carriers support them.
const GLANCES: u32 = 256;
/// The kernel is polled once per this many rounds, if cheap checks find the work.
const LOOKS: u32 = 8;
/// Payload bytes per polling round in each direction: a quarter of the largest window.
const LOOK_BYTES: u64 = 128 << 10;
/// Number of events that are taken from the kernel at a time.
const EVENTS: usize = 64;

impl<C: Carrier> Shard<C> {
    /// Handles the events that the kernel has. Returns true if there were any.
    pub(super) fn events(&mut self, wait: EpollTimeout) -> io::Result<bool> {
        let mut events = [EpollEvent::empty(); EVENTS];
        let began = (wait != EpollTimeout::ZERO).then(Instant::now);
        let n = match self.watch.epoll().wait(&mut events, wait) {
            Ok(n) => n,
            Err(nix::errno::Errno::EINTR) => 0,
            Err(e) => return Err(e.into()),
        };
        let instant = Instant::now();
        if let Some(began) = began {
            self.woke = instant;
            self.polling.slept(instant - began);
        }
        let now = self.inbox.tick(instant);
        for event in &events[..n] {
            let (port, token) = Token::unpack(event.data());
            self.ready(now, port, token, event.events());
        }
        Ok(n > 0)
    }

    /// Polls the `Port`s and the kernel until nothing has arrived for a while, or there is news. Meanwhile the `Port`s
    /// do not ask for notifications, so guests need not kick. Afterwards they ask again.
    pub(super) fn poll_before_sleep(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        let begin = Instant::now();
        let until = begin + self.polling.run(timeout);
        let (mut last, mut came) = (begin, false);
        // A small budget: the peer's sender gets credit before it runs out of window.
        let small_budget = Budget {
            bytes: self.budget.bytes.min(LOOK_BYTES),
            ..self.budget
        };
        // The last cheap check found something, so the next round handles it first.
        let (mut instant, mut looks, mut found_by_glance) = (begin, 0, false);
        loop {
            let mut moved = false;
            if looks == 0 || !found_by_glance {
                moved = self.events(EpollTimeout::ZERO)?;
                looks = LOOKS;
            }
            looks -= 1;
            // Use the time of the last clock read. The clock is read below, after the packets were handled.
            let now = self.inbox.tick(instant);
            let mut all_glance = true;
            for (i, port) in self.ports.iter_mut().enumerate() {
                moved |= port.poll_unarmed(now, small_budget);
                all_glance &= port.glance().is_some();
                self.dirty[i] = true;
            }
            instant = Instant::now();
            let has_notice = self.ports.iter().any(Port::has_notice);
            if moved {
                (last, came) = (instant, true);
                // A pause while a stream flows. Without it each round would find only single packets.
                let pauses = if all_glance { 0 } else { BACK_OFF };
                (0..pauses).for_each(|_| std::hint::spin_loop());
            }
            let over = instant >= until || instant - last >= self.polling.window();
            if has_notice || over || self.stopped || !self.news.is_empty() {
                break;
            }
            let ports = &mut self.ports;
            let mut glance = || ports.iter_mut().any(|p| p.glance() != Some(false));
            found_by_glance = all_glance && (0..GLANCES).any(|_| glance());
            if !moved && !found_by_glance {
                // Whoever else wants this core goes first: often it is the one whose answer this thread looks for.
                std::thread::yield_now();
            }
        }
        self.polling.polled(came, instant - last);
        self.poll_ports();
        Ok(())
    }

    /// The epoll timeout. It is rounded up, so that the deadline has passed when it ends.
    pub(super) fn timeout(&self, limit: Option<Duration>) -> EpollTimeout {
        match [self.wait_limit(), limit].into_iter().flatten().min() {
            None => EpollTimeout::NONE,
            Some(wait) => {
                let ms = wait.as_nanos().div_ceil(1_000_000);
                EpollTimeout::try_from(i32::try_from(ms).unwrap_or(i32::MAX))
                    .unwrap_or(EpollTimeout::MAX)
            }
        }
    }
}

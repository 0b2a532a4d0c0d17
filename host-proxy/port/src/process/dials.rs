//! Dials for `aditd`: chooses the port, and tracks each dial until its stream has another end.

use std::os::fd::OwnedFd;

use adit_channel::carrier::Carrier;
use adit_channel::dial::{self, DialRequest};
use adit_channel::hello::{self, Common, Open};
use adit_channel::shard::PortIndex;
use adit_channel::sink::Sink;
use adit_engine::{Lane, Tick};

use super::{Asked, Process};
use crate::control::{Attach, DIALS_MAX, Dial, DialError, DialFailed, PREFIX_MAX, Target};
use crate::control_io::Message;
use adit_print::with_causes;

/// The lane of dialled streams. Round trips are measured on it too.
pub(super) const LANE: Lane = Lane::Bulk;

impl<C: Carrier> Process<C> {
    pub(super) fn dial(&mut self, dial: Dial) -> Result<(), &'static str> {
        let Some(aditd) = &self.aditd else {
            return Ok(());
        };
        if aditd.by_id.contains_key(&dial.id) {
            return Err("it used a dial's id twice");
        }
        if aditd.by_id.len() >= DIALS_MAX {
            let busy = failed(dial.id, &dial::DialError::Busy);
            self.say(Message::DialFailed(busy), vec![]);
            return Ok(());
        }
        let now = self.shard.now();
        let limit_ns = u64::from(dial.deadline_ms) * 1_000_000;
        let deadline = Some(Tick(now.0.saturating_add(limit_ns)));
        let id = dial.id;
        let asked = match self.ring_for(&dial.to) {
            Some(ring) => self.ask(ring, dial.clone(), deadline).or_else(|e| {
                // The ring ended in this turn.
                tracing::debug!(error = %e, "ring not dialled");
                self.ask(self.port, dial, deadline)
            }),
            None => self.ask(self.port, dial, deadline),
        };
        match (asked, &mut self.aditd) {
            (Ok(asked), Some(aditd)) => aditd.asked(id, asked),
            (Ok(_), None) => {}
            (Err(e), _) => self.say(Message::DialFailed(failed(id, &e)), vec![]),
        }
        Ok(())
    }

    /// Dials over one of the ports.
    pub(super) fn ask(
        &mut self,
        over: PortIndex,
        dial: Dial,
        deadline: Option<Tick>,
    ) -> Result<Asked, dial::DialError> {
        let now = self.shard.now();
        let request = self.request(&dial, over, deadline);
        let stream = self.shard.port_mut(over).dial(now, request, None)?;
        let again = (over != self.port).then_some(dial);
        Ok(Asked {
            at: (over, stream),
            again,
            deadline,
        })
    }

    fn request(&self, dial: &Dial, over: PortIndex, deadline: Option<Tick>) -> DialRequest {
        let (port, hello) = match &dial.to {
            Target::VsockPort(port) => (*port, None),
            Target::Service(service) => {
                let epoch = match over == self.port {
                    true => self.last_epoch,
                    false => self.shard.port(over).epoch().unwrap_or(0),
                };
                let common = Common {
                    features: 0,
                    epoch,
                    boot_nonce: self.options.boot_nonce,
                };
                let deadline_ms = dial.deadline_ms;
                let open = Open {
                    deadline_ms,
                    ..Open::new(service.clone(), common)
                };
                (hello::PORT, Some(open))
            }
        };
        DialRequest {
            port,
            hello,
            deadline,
            lane: LANE,
        }
    }

    pub(super) fn attach(
        &mut self,
        attach: Attach,
        fd: Option<OwnedFd>,
    ) -> Result<(), &'static str> {
        if attach.prefix.len() > PREFIX_MAX {
            return Err("it attached with a prefix that is too long");
        }
        let aditd = self.aditd.as_ref();
        let at = aditd.and_then(|a| a.by_id.get(&attach.id).map(|asked| asked.at));
        let (Some(fd), Some((port, stream))) = (fd, at) else {
            // The guest has ended the stream meanwhile: the socket is closed.
            return Ok(());
        };
        let now = self.shard.now();
        let sink = Sink::Fd(fd);
        if !(self.shard.port_mut(port)).attach(now, stream, sink, &attach.prefix) {
            self.reset((port, stream));
        }
        self.forget((port, stream));
        Ok(())
    }
}

/// The frame for a dial that failed.
pub(super) fn failed(id: u64, error: &dial::DialError) -> DialFailed {
    let (mut status, mut errno) = (0, 0);
    let class = match error {
        dial::DialError::NoSession => DialError::NoSession,
        dial::DialError::Refused => DialError::Refused,
        dial::DialError::Timeout => DialError::Timeout,
        dial::DialError::Reset | dial::DialError::Cancelled => DialError::Reset,
        dial::DialError::Foreign(_) | dial::DialError::NotOffered { .. } => DialError::Foreign,
        dial::DialError::HelloRefused(refuse) => {
            (status, errno) = (refuse.status as u16, refuse.errno);
            DialError::HelloRefused
        }
        dial::DialError::Busy => DialError::Busy,
    };
    let text = match error {
        dial::DialError::HelloRefused(refuse) => refuse.text.clone(),
        other => with_causes(other),
    };
    DialFailed {
        id,
        error: class,
        status,
        errno,
        text,
    }
}

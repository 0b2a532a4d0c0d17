//! Dials for `aditd`: chooses the port, follows each dial until its stream is a tunnel, and says what became of it.
//!
//! | | the client's end comes | crossings of the control socket |
//! |---|---|---|
//! | `Connect` | with the question | 2: `Connect`, `Dialed` |
//! | `Dial`, of an older `aditd` | after the answer | 3: `Dial`, `Dialed`, `Attach` |
//!
//! `aditd` holds a duplicate of a client that came with the question. It closes it on `Dialed`, and on `DialFailed` it answers
//! the client itself. So nothing may be written to the client before `Dialed` is on its way, and nothing after the connection
//! to `aditd` has ended without it.

use std::os::fd::{AsRawFd, OwnedFd};

use adit_channel::carrier::Carrier;
use adit_channel::dial::{self, DialRequest};
use adit_channel::hello::{self, Accept, Common, Extensions, Open};
use adit_channel::refusal::Refusal;
use adit_channel::shard::PortIndex;
use adit_channel::sink::Sink;
use adit_engine::{Lane, ResetReason, Tick};
use adit_print::with_causes;
use nix::sys::socket::{MsgFlags, send};

use super::dial_table::{self, NoRoom, State};
use super::ends::Noted;
use super::{At, Process};
use crate::control::{
    Ask, Attach, Connect, ConnectAs, ConnectLimited, ConnectNoted, Dial, DialFailed, Dialed,
    EndTunnels, GREETING_MAX, LIMITED_MAX, LIMITS_MAX, Limit, ListTunnels, NOTE_MAX, PREFIX_MAX,
    SetLimits, TAG_MAX, TUNNELS_MAX, Target,
};
use crate::control_io::Message;

/// The lane of dialled streams. Round trips are measured on it too.
pub(super) const LANE: Lane = Lane::Bulk;

/// The dials of one connection to `aditd`.
pub(super) type Dials = dial_table::Dials<At, Client, Question>;
/// One of them.
pub(super) type Asked = dial_table::Dial<At, Client, Question>;

/// What is dialled.
#[derive(Clone, Debug)]
pub(super) struct Question {
    to: Target,
    extensions: Extensions,
    deadline_ms: u32,
    deadline: Tick,
}

/// The other end of a stream-to-be.
#[derive(Debug)]
pub(super) struct Client {
    fd: OwnedFd,
    /// For the guest, ahead of what the descriptor has.
    prefix: Vec<u8>,
    /// For the client, ahead of the guest's bytes.
    greeting: Vec<u8>,
    // There are many of these at once, in a table that never shrinks.
    terms: Box<Terms>,
    /// When it was asked for.
    asked: Tick,
}

/// What is asked of a tunnel beside its bytes.
#[derive(Debug, Default)]
pub(super) struct Terms {
    /// By which it is found again.
    tag: Option<Vec<u8>>,
    /// What comes back when it ends.
    note: Option<Vec<u8>>,
    limits: Vec<Limit>,
}

impl<C: Carrier> Process<C> {
    /// Dials, and waits for `Attach`.
    pub(super) fn dial(&mut self, dial: Dial) -> Result<(), &'static str> {
        let question = self.question(dial.to, Extensions::default(), dial.deadline_ms);
        self.start(dial.id, question, None)
    }

    /// Dials for the client that came with the question.
    pub(super) fn connect(
        &mut self,
        connect: Connect,
        terms: Terms,
        fd: Option<OwnedFd>,
    ) -> Result<(), &'static str> {
        let Connect {
            id,
            to,
            deadline_ms,
            extensions,
            prefix,
            greeting,
        } = connect;
        if prefix.len() > PREFIX_MAX || greeting.len() > GREETING_MAX {
            return Err("it dialled with a prefix or a greeting that is too long");
        }
        let (tag, note) = (terms.tag.as_ref(), terms.note.as_ref());
        if tag.is_some_and(|tag| tag.len() > TAG_MAX) || note.is_some_and(|n| n.len() > NOTE_MAX) {
            return Err("it dialled with a tag or a note that is too long");
        }
        if terms.limits.len() > LIMITS_MAX {
            return Err("it dialled with too many limits");
        }
        // A packet without its descriptor is refused before it comes here.
        let asked = self.shard.now();
        let client = fd.map(|fd| Client {
            fd,
            prefix,
            greeting,
            terms: Box::new(terms),
            asked,
        });
        let question = self.question(to, extensions, deadline_ms);
        self.start(id, question, client)
    }

    /// The same, with a tag.
    pub(super) fn connect_as(
        &mut self,
        connect: ConnectAs,
        fd: Option<OwnedFd>,
    ) -> Result<(), &'static str> {
        let terms = Terms {
            tag: Some(connect.tag),
            ..Terms::default()
        };
        self.connect(connect.connect, terms, fd)
    }

    /// The same, with a note that comes back when the tunnel ends.
    pub(super) fn connect_noted(
        &mut self,
        connect: ConnectNoted,
        fd: Option<OwnedFd>,
    ) -> Result<(), &'static str> {
        let ConnectNoted { connect, tag, note } = connect;
        let terms = Terms {
            tag,
            note: Some(note),
            limits: Vec::new(),
        };
        self.connect(connect, terms, fd)
    }

    /// The same, and so many bytes a second go through.
    pub(super) fn connect_limited(
        &mut self,
        connect: ConnectLimited,
        fd: Option<OwnedFd>,
    ) -> Result<(), &'static str> {
        let ConnectLimited {
            connect,
            tag,
            note,
            limits,
        } = connect;
        self.connect(connect, Terms { tag, note, limits }, fd)
    }

    /// Replaces the limits of tunnels.
    pub(super) fn set_limits(&mut self, set: &SetLimits) -> Result<(), &'static str> {
        let is_over = |(_, limits): &(u64, Vec<Limit>)| limits.len() > LIMITS_MAX;
        if set.tunnels.len() > LIMITED_MAX || set.tunnels.iter().any(is_over) {
            return Err("it sets too many limits at once");
        }
        let now = self.shard.now();
        for (number, limits) in &set.tunnels {
            if let Some((port, stream)) = self.tunnels.stream(*number) {
                let rates = self.rates.of(limits, now);
                self.shard.port_mut(port).limit(now, stream, rates);
            }
        }
        Ok(())
    }

    fn question(&self, to: Target, extensions: Extensions, deadline_ms: u32) -> Question {
        let limit_ns = u64::from(deadline_ms) * 1_000_000;
        Question {
            to,
            extensions,
            deadline_ms,
            deadline: Tick(self.shard.now().0.saturating_add(limit_ns)),
        }
    }

    fn start(
        &mut self,
        id: u64,
        question: Question,
        client: Option<Client>,
    ) -> Result<(), &'static str> {
        let Some(aditd) = &self.aditd else {
            return Ok(());
        };
        match aditd.dials.room_for(id) {
            Ok(()) => {}
            Err(NoRoom::Twice) => return Err("it used a dial's id twice"),
            Err(NoRoom::Full) => {
                self.say_failed(id, &dial::DialError::Busy);
                return Ok(());
            }
        }
        let asked = match self.ring_for(&question.to) {
            Some(ring) => self.ask(ring, question.clone()).or_else(|e| {
                // The ring ended in this turn.
                tracing::debug!(error = %e, "ring not dialled");
                self.ask(self.port, question)
            }),
            None => self.ask(self.port, question),
        };
        match asked {
            Ok(asked) => self.follow(id, Asked { client, ..asked }),
            Err(e) => self.say_failed(id, &e),
        }
        Ok(())
    }

    /// Dials over one of the ports. The dial has no client yet.
    fn ask(&mut self, over: PortIndex, question: Question) -> Result<Asked, dial::DialError> {
        let now = self.shard.now();
        let request = self.request(&question, over);
        let stream = self.shard.port_mut(over).dial(now, request, None)?;
        Ok(Asked {
            at: (over, stream),
            state: State::Asked,
            client: None,
            again: (over != self.port).then_some(question),
        })
    }

    fn follow(&mut self, id: u64, asked: Asked) {
        if let Some(aditd) = &mut self.aditd {
            aditd.dials.insert(id, asked);
        }
    }

    fn request(&mut self, question: &Question, over: PortIndex) -> DialRequest {
        let (port, hello) = match &question.to {
            Target::VsockPort(port) => (*port, None),
            Target::Service(service) => {
                let epoch = match over == self.port {
                    true => self.last_epoch,
                    false => self.shard.port(over).epoch().unwrap_or(0),
                };
                let common = Common {
                    features: self.shard.port(over).carrier().hello_features(),
                    epoch,
                    boot_nonce: self.options.boot_nonce,
                };
                let mut open = Open {
                    deadline_ms: question.deadline_ms,
                    extensions: question.extensions.clone(),
                    ..Open::new(service.clone(), common)
                };
                if let Some(key) = &self.key {
                    self.keyed += 1;
                    open.mac = Some(key.mac(&open, self.keyed));
                }
                (hello::PORT, Some(open))
            }
        };
        DialRequest {
            port,
            hello,
            deadline: Some(question.deadline),
            lane: LANE,
        }
    }

    // ---- what becomes of a dial

    /// The stream of a dial is open.
    pub(super) fn dialed(&mut self, at: At, accept: Option<Accept>) {
        // The guest may have ended it in the same burst. Then this is said instead, as long as nobody was told otherwise.
        let is_open = self.shard.port(at.0).is_open(at.1);
        let opened = self.aditd.as_mut().and_then(|a| a.dials.opened(at));
        match opened {
            Some(id) if is_open => {
                let boot_nonce = accept.map_or([0; 16], |a| a.common.boot_nonce);
                self.say(Message::Dialed(Dialed { id, boot_nonce }), vec![]);
            }
            Some(id) => {
                self.forget(at);
                self.say_failed(id, &dial::DialError::Reset);
            }
            None => self.reset(at),
        }
    }

    /// `Dialed` is in the hands of the kernel: from now on the client is the tunnel's, and is greeted.
    pub(super) fn dialed_is_said(&mut self, id: u64) {
        let aditd = self.aditd.as_mut();
        let Some(((port, stream), client)) = aditd.and_then(|a| a.dials.take_open(id)) else {
            return;
        };
        let now = self.shard.now();
        let Client {
            fd,
            prefix,
            greeting,
            terms,
            asked,
        } = client;
        let Terms { tag, note, limits } = *terms;
        let sink = Sink::Fd(fd);
        let rates = self.rates.of(&limits, now);
        let port_mut = self.shard.port_mut(port);
        if !rates.is_empty() {
            port_mut.limit(now, stream, rates);
        }
        if !port_mut.attach_greeted(now, stream, sink, &prefix, &greeting) {
            return self.reset((port, stream));
        }
        if let Some(tag) = tag {
            self.tunnels.add((port, stream), tag);
        }
        if let Some(note) = note {
            let opened = now;
            let noted = Noted {
                note,
                asked,
                opened,
            };
            self.ends.add((port, stream), noted);
        }
    }

    /// Tells `aditd` of a page of the tunnels that have a tag.
    pub(super) fn list_tunnels(&mut self, ask: &ListTunnels) {
        let page = self.tunnels.page(ask.after);
        self.say(Message::Tunnels(page), vec![]);
    }

    /// Breaks tunnels off.
    pub(super) fn end_tunnels(&mut self, end: &EndTunnels) -> Result<(), &'static str> {
        if end.numbers.len() > TUNNELS_MAX {
            return Err("it ends too many tunnels at once");
        }
        for number in &end.numbers {
            if let Some(at) = self.tunnels.stream(*number) {
                self.reset(at);
                self.tunnels.ended(at);
            }
        }
        Ok(())
    }

    /// A dial failed. If nobody served it on the ring's other side, dials again over vsock; otherwise reports the failure.
    pub(super) fn dial_failed(&mut self, at: At, error: &dial::DialError) {
        use dial::DialError::{NoSession, Refused};
        let Some((id, asked)) = self.forget(at) else {
            return;
        };
        let mut error = error.clone();
        if let (Refused | NoSession, Some(question)) = (&error, asked.again) {
            match self.ask(self.port, question) {
                Ok(again) => {
                    let client = asked.client;
                    return self.follow(id, Asked { client, ..again });
                }
                // The VM has no vsock session: then report why the ring failed.
                Err(NoSession) => {}
                Err(e) => error = e,
            }
        }
        self.say_failed(id, &error);
    }

    /// A stream ended. If it is a dial's, and its answer still waits to be sent, then it has failed instead.
    pub(super) fn stream_closed(&mut self, at: At) {
        self.tunnels.ended(at);
        let Some((id, _)) = self.forget(at) else {
            return;
        };
        let aditd = self.aditd.as_mut();
        let mut outbox = aditd.into_iter().flat_map(|a| a.outbox.iter_mut());
        let answer = outbox.find(|(m, _)| matches!(m, Message::Dialed(d) if d.id == id));
        if let Some((answer, _)) = answer {
            *answer = Message::DialFailed(failed(id, &dial::DialError::Reset));
        }
    }

    /// Ends a dial that nobody waits for any more. Its client is closed here; `aditd` has its own duplicate.
    pub(super) fn cancel(&mut self, id: u64) {
        let aditd = self.aditd.as_mut();
        if let Some(asked) = aditd.and_then(|a| a.dials.take(id)) {
            self.reset(asked.at);
        }
    }

    /// Ends all dials: the connection to `aditd` has ended.
    pub(super) fn abandon(&mut self, mut dials: Dials) {
        for asked in dials.drain() {
            self.reset(asked.at);
        }
    }

    fn forget(&mut self, at: At) -> Option<(u64, Asked)> {
        self.aditd.as_mut()?.dials.take_stream(at)
    }

    fn reset(&mut self, (port, stream): At) {
        let now = self.shard.now();
        let port = self.shard.port_mut(port);
        port.reset(now, stream, ResetReason::Local);
    }

    pub(super) fn say_failed(&mut self, id: u64, error: &dial::DialError) {
        self.say(Message::DialFailed(failed(id, error)), vec![]);
    }

    // ---- what aditd says about a dial later

    pub(super) fn attach(
        &mut self,
        attach: Attach,
        fd: Option<OwnedFd>,
    ) -> Result<(), &'static str> {
        if attach.prefix.len() > PREFIX_MAX {
            return Err("it attached with a prefix that is too long");
        }
        let dials = self.aditd.as_mut().map(|aditd| &mut aditd.dials);
        let (Some(fd), Some(dials)) = (fd, dials) else {
            return Ok(());
        };
        // Otherwise the guest has ended the stream meanwhile: the socket is closed.
        let Some(asked) = dials.get_mut(attach.id) else {
            return Ok(());
        };
        if asked.client.is_some() {
            return Err("it attached to a dial that has its client");
        }
        if asked.state == State::Asked {
            // It did not wait for the answer.
            self.cancel(attach.id);
            return Ok(());
        }
        asked.client = Some(Client {
            fd,
            prefix: attach.prefix,
            greeting: Vec::new(),
            terms: Box::default(),
            asked: self.shard.now(),
        });
        self.dialed_is_said(attach.id);
        Ok(())
    }

    /// Writes to a client that waits for its dial: whoever is there skips it, and the kernel of whoever is gone answers with a
    /// reset, which `aditd` sees.
    pub(super) fn ask_client(&mut self, ask: Ask) -> Result<(), &'static str> {
        if ask.text.len() > GREETING_MAX {
            return Err("it asked with a text that is too long");
        }
        let aditd = self.aditd.as_mut();
        let asked = aditd.and_then(|a| a.dials.get_mut(ask.id));
        // Otherwise the answer is on its way.
        if let Some(client) = asked.and_then(|asked| asked.client.as_mut()) {
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            let written = send(client.fd.as_raw_fd(), &ask.text, flags).unwrap_or(0);
            if written > 0 {
                // What did not fit goes ahead of the greeting.
                client.greeting.splice(..0, ask.text[written..].to_vec());
            }
        }
        Ok(())
    }
}

/// The frame for a dial that failed.
pub(super) fn failed(id: u64, error: &dial::DialError) -> DialFailed {
    let refusal = match error {
        dial::DialError::HelloRefused(refuse) => refuse.refusal.clone(),
        other => Refusal::new(other.code(), with_causes(other)),
    };
    DialFailed::new(id, &refusal)
}

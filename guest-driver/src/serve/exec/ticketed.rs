//! What is done because a ticket says so: its signer decides, and the host carries it.
//!
//! ```text
//! first frame ─┬─ Ticket ──────────────────────────────► believed? ─► is it what aditd let through? ─► policy ─► used up, on disk
//!              └─ Seal ─► handshake by the guest's key ─► Ticket, which names that handshake ─┘            │
//!      run: its input, if it has a digest, is here and is that ─► is it still its time? ─► session process ◄┘
//! ```
//! All that runs is the ticket's. Of the host it takes the user and the program only to refuse what is not the same: aditd has let those
//! through, and has written them down.

use std::io;
use std::time::Duration;

use adit_exec::{Asked, Attach, Open, Refused, Size, ToClient, ToGuest, What, refusal};
use adit_tasks::ticket::{self, Here, Input, Proved, Run, SpentError, TicketError, Verb};
use adit_tasks::{KeyId, Ticket};
use sha2::{Digest, Sha256};

use super::talk::Talk;
use super::{LIMIT, Shared, invalid, place_of_input};
use crate::enrol::key::GuestKey;
use crate::log;
use crate::policy::Standing;
use crate::session::ask::{self, Attaching, Ending};
use crate::session::{Spec, refused};
use crate::tickets::SpendError;
use crate::transport::HostStream;

/// What a stream with a ticket comes to.
enum Next {
    /// A session process gets the stream.
    Start(Box<Spec>),
    /// A session that there is gets it.
    Attach(String, Attaching),
    /// This is said, and it is over.
    Say(ToClient),
}

impl Shared {
    /// Does what a ticket says. `first`: the stream's first frame.
    pub(super) fn by_ticket(
        &self,
        stream: Box<dyn HostStream>,
        asked: &Asked,
        first: ToGuest,
        (policy, caller): (&Standing, &str),
    ) -> io::Result<()> {
        let mut talk = Talk::new(&*stream);
        let (channel, envelope) = match first {
            ToGuest::Ticket(envelope) => (None, envelope),
            ToGuest::Seal(message) => {
                let own = match self.own_key() {
                    Ok(own) => own,
                    Err(why) => return refuse(talk, asked, why),
                };
                let Ok(channel) = talk.seal(&own, &message) else {
                    let text =
                        "it is sealed to another key than this guest's: `adit vm show` has the key";
                    return refuse(talk, asked, refused(refusal::SEAL, text));
                };
                match talk.next()? {
                    Some(ToGuest::Ticket(envelope)) => (Some(channel), envelope),
                    _ => return Err(invalid("its first sealed frame is no ticket")),
                }
            }
            _ => return Err(invalid("its first frame is no ticket")),
        };
        let proved = match self.believed(&envelope, channel.as_ref(), asked) {
            Ok(proved) => proved,
            Err(why) => return refuse(talk, asked, why),
        };
        let key = proved.key;
        match self.next(&mut talk, proved, policy)? {
            Err(why) => refuse(talk, asked, why),
            Ok(Next::Say(message)) => talk.end(&message),
            Ok(Next::Start(mut spec)) => {
                spec.seal = talk.keys()?;
                self.start(stream, *spec, caller)
            }
            Ok(Next::Attach(id, attaching)) => {
                let keys = talk.keys()?;
                self.attach(stream, &id, &attaching, (keys, Some(key)))
            }
        }
    }

    /// The ticket, if it is one for this guest, this time and this stream, and says what aditd was asked for.
    fn believed(
        &self,
        envelope: &[u8],
        channel: Option<&[u8; 32]>,
        asked: &Asked,
    ) -> Result<Proved, Refused> {
        let failed = |e: &dyn std::fmt::Display| refused(refusal::FAILED, e.to_string());
        let anchors = self.live.anchors();
        let me = self.live.me(&anchors);
        let me = me.map_err(|why| refused(refusal::TICKET, why))?;
        let here = Here {
            vm_id: &me,
            now_ms: self.tickets.now_ms().map_err(|e| failed(&e))?,
            channel,
        };
        let proved = ticket::check(envelope, &anchors.keys, here).map_err(|e| {
            let reason = match &e {
                TicketError::Expired { .. } | TicketError::NotYet { .. } => refusal::TICKET_TIME,
                TicketError::NeedsSeal { .. } => refusal::NEEDS_SEAL,
                _ => refusal::TICKET,
            };
            refused(reason, format!("{e}; {}", e.remedy()))
        })?;
        match is_asked(&proved.ticket, asked) {
            true => Ok(proved),
            false => {
                let text = "the ticket is for something else than what aditd was asked for";
                Err(refused(refusal::TICKET, text))
            }
        }
    }

    /// Uses a ticket up, and says what is to be done.
    fn next(
        &self,
        talk: &mut Talk<'_>,
        proved: Proved,
        policy: &Standing,
    ) -> io::Result<Result<Next, Refused>> {
        let Proved { ticket, key } = proved;
        let (verb, user) = (ticket.verb.clone(), ticket.user.clone());
        match verb {
            Verb::Run(run) => {
                let mut spec = match self.may(&user, open_of(&run), policy, true) {
                    Ok(spec) => spec,
                    Err(why) => return Ok(Err(why)),
                };
                spec.by = Some(key.to_string());
                if let Err(why) = self.spend(&ticket) {
                    return Ok(Err(why));
                }
                if let Input::Bytes(content) = &run.stdin {
                    let until = self.left(&ticket);
                    talk.limit(until);
                    let place = place_of_input(&self.state_dir, &spec.id);
                    if let Err(why) = take_input(talk, content, &place)? {
                        return Ok(Err(why));
                    }
                    spec.input = Some(place);
                    // The host may have kept the last of it back until nobody expects anything any more.
                    if self.left(&ticket).is_zero() {
                        self.forget_input(&spec);
                        let text = "the ticket's time has ended before all of its input was here";
                        return Ok(Err(refused(refusal::TICKET_TIME, text)));
                    }
                }
                Ok(Ok(Next::Start(Box::new(spec))))
            }
            Verb::Attach(of) => {
                let attach: Attach = match talk.next()? {
                    Some(ToGuest::Attach(attach)) => attach,
                    _ => return Err(invalid("it does not say from where on")),
                };
                let attaching = Attaching { user, attach };
                let spent = self.spend(&ticket);
                Ok(spent.map(|()| Next::Attach(of.session, attaching)))
            }
            Verb::End(of) => {
                let signal = of.signal;
                let ending = Ending { user, signal };
                let ended = self
                    .spend(&ticket)
                    .and_then(|()| self.asked(&of.session, |at| ask::end_by_ticket(at, &ending)));
                if ended.is_ok() {
                    log_by("exec-ending", &of.session, key);
                }
                Ok(ended.map(|_| Next::Say(ToClient::Done)))
            }
            Verb::List(_) => {
                let of = (!user.is_empty()).then_some(user.as_str());
                let spent = self.spend(&ticket);
                Ok(spent.map(|()| Next::Say(ToClient::Rows(self.rows(of)))))
            }
            Verb::Put(_) | Verb::Get(_) => {
                let text = format!("a ticket to {} is for files, not for commands", verb.name());
                Ok(Err(refused(refusal::TICKET, text)))
            }
        }
    }

    fn spend(&self, ticket: &Ticket) -> Result<(), Refused> {
        self.tickets.spend(ticket).map_err(|e| {
            let reason = match &e {
                SpendError::Spent(SpentError::Again | SpentError::Forgotten) => {
                    refusal::TICKET_SPENT
                }
                SpendError::Spent(SpentError::Full) => refusal::BUSY,
                SpendError::Late => refusal::TICKET_TIME,
                SpendError::Io(_) => refusal::FAILED,
            };
            refused(reason, e.to_string())
        })
    }

    /// How long a ticket is still good for.
    fn left(&self, ticket: &Ticket) -> Duration {
        let now = self.tickets.now_ms().unwrap_or(i64::MAX);
        let left = ticket.not_after.as_millisecond().saturating_sub(now);
        u64::try_from(left).map_or(Duration::ZERO, Duration::from_millis)
    }

    /// The guest's own key, as one that a stream is sealed to.
    fn own_key(&self) -> Result<zeroize::Zeroizing<[u8; 32]>, Refused> {
        let no = |why: String| {
            let text = format!("this guest has no key that a stream could be sealed to{why}");
            refused(refusal::SEAL, text)
        };
        match GuestKey::exchange(&self.state_dir) {
            Ok(Some(own)) => Ok(own),
            Ok(None) => Err(no(String::new())),
            Err(e) => Err(no(format!(": {e}"))),
        }
    }
}

fn log_by(event: &str, session: &str, key: KeyId) {
    log::event(event, &[("session", &session), ("key", &key)]);
}

/// Whether a ticket says what aditd has let through.
fn is_asked(ticket: &Ticket, asked: &Asked) -> bool {
    let is_user = asked.user.as_deref().unwrap_or_default() == ticket.user;
    let is_what = match (&asked.what, &ticket.verb) {
        (What::Run(program), Verb::Run(run)) => run.argv.first() == Some(program),
        (What::Ticket(_), verb) => !matches!(verb, Verb::Run(_)),
        _ => false,
    };
    is_user && is_what
}

/// A command as a ticket has it.
fn open_of(run: &Run) -> Open {
    let bytes = |text: &String| text.clone().into_bytes();
    Open {
        argv: run.argv.iter().map(bytes).collect(),
        env: (run.env.iter())
            .map(|(name, value)| (bytes(name), bytes(value)))
            .collect(),
        cwd: bytes(&run.cwd),
        tty: run.tty.map(|(rows, cols)| Size { rows, cols }),
        stdin: run.stdin == Input::Live,
        timeout_ms: run.timeout_ms,
        detach: run.detach,
    }
}

/// Takes a command's whole input, which a ticket has a digest of, into a file.
fn take_input(
    talk: &mut Talk<'_>,
    content: &ticket::Content,
    place: &std::path::Path,
) -> io::Result<Result<(), Refused>> {
    let is_not = || {
        let text = "the input is not what the ticket says: nothing runs";
        Ok(Err(refused(refusal::TICKET_INPUT, text)))
    };
    let full = |e: io::Error| {
        Ok(Err(refused(
            refusal::FAILED,
            format!("no place for the input: {e}"),
        )))
    };
    let file = place.parent().map_or(Ok(()), adit_blob::disk::own_dir);
    let file = match file.and_then(|()| adit_blob::disk::create(place, 0o400)) {
        Ok(file) => file,
        Err(e) => return full(e),
    };
    let taken = (|| {
        let (mut hash, mut had) = (Sha256::new(), 0_u64);
        loop {
            match talk.next()? {
                Some(ToGuest::Stdin { offset, bytes }) => {
                    if offset != had || bytes.len() as u64 > content.size - had {
                        return is_not();
                    }
                    had += bytes.len() as u64;
                    hash.update(&bytes);
                    if let Err(e) = adit_blob::disk::write(&file, &bytes) {
                        return full(e);
                    }
                }
                Some(ToGuest::StdinEnd { offset }) => {
                    let is = had == content.size && offset == had;
                    let is = is && <[u8; 32]>::from(hash.finalize()) == content.sha256;
                    return if is { Ok(Ok(())) } else { is_not() };
                }
                Some(_) => return is_not(),
                None => return Err(invalid("its input has no end")),
            }
        }
    })();
    if !matches!(taken, Ok(Ok(()))) {
        let _ = std::fs::remove_file(place);
    }
    taken
}

fn refuse(talk: Talk<'_>, asked: &Asked, why: Refused) -> io::Result<()> {
    let user = asked.user.as_deref().unwrap_or_default();
    log::event("exec-refused", &[("user", &user), ("why", &why.text)]);
    let mut talk = talk;
    talk.limit(LIMIT);
    talk.end(&ToClient::Refused(why))
}

//! The dialler's half of the hello: it sends `open` and receives `accept` or `refuse`, byte by byte if necessary.
//!
//! ```text
//! Requesting ── connected ──► Hello ── accept ──► done: later bytes belong to the service
//!      │                        ├──── refuse ───► failed, with the agent's status and errno
//!      └─ refused, timeout ─►   └──── other ────► failed, with a guess what the bytes are
//! ```
//! Rules: the reader never takes a byte after the hello. Foreign bytes are recognised at the first byte that differs,
//! because a foreign listener may send a short banner and then wait forever. One deadline covers all steps.

use adit_engine::{ConnectError, Lane, PeerReason, ResetReason, Tick};

use crate::hello::{self, Accept, Hello, HelloError, Open, PREFIX_LEN, Prefix, Refuse, TAIL_MAX};
use crate::refusal::Code;

/// The target of a dial, and its time limit.
#[derive(Clone, Debug)]
pub struct DialRequest {
    /// vsock port inside the guest.
    pub port: u32,
    /// The hello to send first. The dial completes with its answer. `None` for a listener without hellos.
    pub hello: Option<Open>,
    /// Deadline for request, response and hello together.
    pub deadline: Option<Tick>,
    /// The lane of the stream, on a carrier with two. [`Lane::Control`] is for small data that someone waits for.
    pub lane: Lane,
}

/// Why a dial failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DialError {
    /// The guest has no running driver.
    #[error("guest has no running vsock driver")]
    NoSession,
    /// Nothing listens on that port of the guest.
    #[error("nothing listens on that port of the guest")]
    Refused,
    /// No answer arrived in time.
    #[error("guest did not answer in time")]
    Timeout,
    /// The stream ended before the answer.
    #[error("guest ended the stream before it answered")]
    Reset,
    /// The answer is not a hello.
    #[error("the guest's answer is not a hello")]
    Foreign(#[source] HelloError),
    /// The agent refused.
    #[error("guest refused: {}", .0.refusal)]
    HelloRefused(Refuse),
    /// The agent accepted a version or feature that was not offered.
    #[error("guest chose version {version} and features {features:#x}, which were not offered")]
    NotOffered {
        /// The version that it chose.
        version: u16,
        /// The features that it chose.
        features: u64,
    },
    /// A limit of this process is reached.
    #[error("too many streams are open")]
    Busy,
    /// The shard that owned the stream has ended, or the caller gave the dial up.
    #[error("the dial was cancelled")]
    Cancelled,
}

impl From<ConnectError> for DialError {
    fn from(e: ConnectError) -> Self {
        match e {
            ConnectError::NoSession => Self::NoSession,
            ConnectError::TableFull { .. } | ConnectError::NoCredit | ConnectError::NoPort => {
                Self::Busy
            }
        }
    }
}

impl DialError {
    /// Why the stream was not opened, as whoever asked for it hears it.
    pub fn code(&self) -> Code {
        match self {
            Self::NoSession => Code::NoSession,
            Self::Refused => Code::NoListener,
            Self::Timeout => Code::NoAnswer,
            Self::Reset | Self::Cancelled => Code::Reset,
            Self::Foreign(_) | Self::NotOffered { .. } => Code::Foreign,
            Self::HelloRefused(refuse) => refuse.refusal.code(),
            Self::Busy => Code::Busy,
        }
    }

    /// The error of an unfinished dial for the reason of the engine.
    pub(crate) fn from_reason(reason: Option<ResetReason>) -> Self {
        match reason {
            Some(ResetReason::Refused | ResetReason::Told(PeerReason::Refused)) => Self::Refused,
            Some(ResetReason::Timeout | ResetReason::Told(PeerReason::Timeout)) => Self::Timeout,
            Some(ResetReason::Epoch | ResetReason::CarrierFault) => Self::NoSession,
            Some(ResetReason::Local) => Self::Cancelled,
            Some(
                ResetReason::Peer
                | ResetReason::Told(_)
                | ResetReason::HungUp
                | ResetReason::Credit
                | ResetReason::Protocol(_),
            )
            | None => Self::Reset,
        }
    }
}

/// An unfinished dial: everything about it that is not its stream's.
#[derive(Debug)]
pub(crate) struct Dial {
    open: Option<Open>,
    deadline: Option<Tick>,
    state: State,
}

#[derive(Debug)]
enum State {
    /// The guest has not answered.
    Requesting,
    /// Connected; this much of the hello's answer is here.
    Hello { answer: Vec<u8> },
}

impl Dial {
    pub(crate) fn new(request: DialRequest) -> Self {
        Self {
            open: request.hello,
            deadline: request.deadline,
            state: State::Requesting,
        }
    }

    /// By when it must be complete.
    pub(crate) fn deadline(&self) -> Option<Tick> {
        self.deadline
    }

    /// The stream is connected. Returns the bytes to send; `None` if there is no hello: then the dial is complete.
    pub(crate) fn connected(&mut self) -> Option<Vec<u8>> {
        let open = self.open.clone()?;
        self.state = State::Hello { answer: Vec::new() };
        Some(Hello::Open(open).encode())
    }

    /// Returns true if the stream is connected: its bytes are the answer to the hello.
    pub(crate) fn is_in_hello(&self) -> bool {
        matches!(self.state, State::Hello { .. })
    }

    /// Number of bytes of the answer that are known to be missing. Never more than belong to it.
    pub(crate) fn wants(&self) -> usize {
        let State::Hello { answer } = &self.state else {
            return 0;
        };
        let Some(prefix) = answer.first_chunk::<PREFIX_LEN>() else {
            return PREFIX_LEN - answer.len();
        };
        let tail = Prefix::parse(prefix).map_or(0, |p| p.tail_len().min(TAIL_MAX));
        PREFIX_LEN + tail - answer.len()
    }

    /// Takes the next bytes, at most [`wants`](Self::wants) of them. Returns `None` if more bytes are needed.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Option<Result<Accept, DialError>> {
        let State::Hello { answer } = &mut self.state else {
            return None;
        };
        answer.extend_from_slice(bytes);
        if answer.len() < PREFIX_LEN {
            return foreign_start(answer).map(|e| Err(DialError::Foreign(e)));
        }
        let (head, tail) = answer.split_first_chunk::<PREFIX_LEN>()?;
        let prefix = match Prefix::parse(head) {
            Ok(prefix) if tail.len() < prefix.tail_len() => return None,
            Ok(prefix) => prefix,
            Err(e) => return Some(Err(DialError::Foreign(e))),
        };
        Some(match prefix.finish(tail) {
            Ok(Hello::Accept(accept)) => self.check(accept),
            Ok(Hello::Refuse(refuse)) => Err(DialError::HelloRefused(refuse)),
            Ok(Hello::Open(_)) => Err(DialError::Foreign(HelloError::Field {
                field: "kind",
                value: 1,
                limit: 3,
            })),
            Err(e) => Err(DialError::Foreign(e)),
        })
    }

    fn check(&self, accept: Accept) -> Result<Accept, DialError> {
        let offered = self.open.as_ref().is_some_and(|open| {
            (open.version_min..=open.version_max).contains(&accept.version)
                && accept.common.features & !open.common.features == 0
        });
        if offered {
            return Ok(accept);
        }
        let (version, features) = (accept.version, accept.common.features);
        Err(DialError::NotOffered { version, features })
    }
}

/// Returns an error if the first bytes of an answer cannot be a hello.
fn foreign_start(start: &[u8]) -> Option<HelloError> {
    const MAGIC_LEN: usize = 8;
    let magic = Hello::Accept(Accept {
        common: hello::Common::default(),
        version: hello::VERSION,
    })
    .encode();
    let n = start.len().min(MAGIC_LEN);
    if start[..n] == magic[..n] {
        return None;
    }
    let mut padded = [0; PREFIX_LEN];
    padded[..start.len()].copy_from_slice(start);
    Prefix::parse(&padded).err()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hello::Common;
    use crate::refusal::Refusal;

    fn requested(hello: Option<Open>) -> Dial {
        Dial::new(DialRequest {
            port: hello::PORT,
            hello,
            deadline: None,
            lane: Lane::Bulk,
        })
    }

    fn open() -> Open {
        Open::new("tcp:80".parse().unwrap(), Common::default())
    }

    /// One that waits for the answer to its hello.
    fn dial() -> Dial {
        let mut dial = requested(Some(open()));
        assert!(dial.connected().is_some());
        dial
    }

    #[test]
    fn a_dial_is_requested_then_in_its_hello_and_without_one_complete() {
        let mut plain = requested(None);
        assert_eq!((plain.connected(), plain.is_in_hello()), (None, false));
        let mut dial = requested(Some(open()));
        // Bytes before the stream is connected are no answer.
        assert!(!dial.is_in_hello() && dial.wants() == 0 && dial.push(b"SSH-").is_none());
        assert_eq!(dial.connected(), Some(Hello::Open(open()).encode()));
        assert!(dial.is_in_hello() && dial.wants() == PREFIX_LEN);
    }

    /// Feeds bytes as `Port` does, never more than wanted. Returns the outcome and the bytes that are left.
    fn feed<'a>(
        d: &mut Dial,
        mut bytes: &'a [u8],
        step: usize,
    ) -> (Option<Result<Accept, DialError>>, &'a [u8]) {
        while !bytes.is_empty() {
            let n = d.wants().min(step).min(bytes.len());
            let (now, rest) = bytes.split_at(n);
            bytes = rest;
            if let Some(outcome) = d.push(now) {
                return (Some(outcome), bytes);
            }
        }
        (None, bytes)
    }

    #[test]
    fn answer_in_any_pieces_leaves_the_services_bytes() {
        let accept = Accept {
            common: Common::default(),
            version: 1,
        };
        let mut bytes = Hello::Accept(accept).encode();
        bytes.extend_from_slice(b"HTTP/1.1 200 OK");
        for step in [1, 2, 63, 64, 65, 500] {
            assert_eq!(
                feed(&mut dial(), &bytes, step),
                (Some(Ok(accept)), &b"HTTP/1.1 200 OK"[..])
            );
        }
        let refuse = Refuse {
            common: Common::default(),
            refusal: Refusal::of_hello(4, 111, "no"),
        };
        let bytes = Hello::Refuse(refuse.clone()).encode();
        for step in [1, 7, 500] {
            assert_eq!(
                feed(&mut dial(), &bytes, step).0,
                Some(Err(DialError::HelloRefused(refuse.clone())))
            );
        }
    }

    #[test]
    fn short_foreign_banner_is_recognised_at_once() {
        let (outcome, _) = feed(&mut dial(), b"SSH-2.0-OpenSSH_9.2\r\n", 500);
        assert!(matches!(
            outcome,
            Some(Err(DialError::Foreign(HelloError::Foreign {
                guess: "an SSH server",
                ..
            })))
        ));
        assert!(matches!(
            feed(&mut dial(), b"AX", 1).0,
            Some(Err(DialError::Foreign(_)))
        ));
        assert_eq!(feed(&mut dial(), b"ADIT\r\n", 500).0, None);
    }

    #[test]
    fn chosen_features_must_have_been_offered() {
        let common = Common {
            features: 1,
            ..Common::default()
        };
        let bytes = Hello::Accept(Accept { common, version: 1 }).encode();
        assert!(matches!(
            feed(&mut dial(), &bytes, 500).0,
            Some(Err(DialError::NotOffered { features: 1, .. }))
        ));
    }

    #[test]
    fn every_error_has_the_code_that_whoever_asked_hears() {
        let refuse = Refuse {
            common: Common::default(),
            refusal: Refusal::of_hello(4, 110, "no"),
        };
        let not_offered = DialError::NotOffered {
            version: 9,
            features: 1,
        };
        for (error, code) in [
            (DialError::NoSession, Code::NoSession),
            (DialError::Refused, Code::NoListener),
            (DialError::Timeout, Code::NoAnswer),
            (DialError::Reset, Code::Reset),
            (DialError::Cancelled, Code::Reset),
            (
                DialError::Foreign(HelloError::Format { found: 9 }),
                Code::Foreign,
            ),
            (not_offered, Code::Foreign),
            (DialError::HelloRefused(refuse), Code::DialTimedOut),
            (DialError::Busy, Code::Busy),
        ] {
            assert_eq!(error.code(), code, "{error}");
        }
    }

    #[test]
    fn every_flipped_byte_ends_the_dial_or_waits_for_more() {
        let good = Hello::Accept(Accept {
            common: Common::default(),
            version: 1,
        })
        .encode();
        for at in 0..good.len() {
            let mut bytes = good.clone();
            bytes[at] ^= 0xff;
            let _ = feed(&mut dial(), &bytes, 5); // must not panic
        }
    }
}

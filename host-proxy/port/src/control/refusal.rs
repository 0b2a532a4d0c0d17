//! A refusal as a control frame carries it: a class, and of what a listener said its number and errno.
//!
//! The fields are those of the first version; a process of an older build reads them as it always has. So a code that is new
//! travels as a listener's number, and never as a class.

use adit_channel::refusal::{Code, Refusal};

use super::{DialError, DialFailed, Target};

impl DialFailed {
    /// The frame that says why a dial failed.
    pub fn new(id: u64, refusal: &Refusal) -> Self {
        let code = refusal.code();
        let error = match code {
            Code::NoSession | Code::NoPortProcess => DialError::NoSession,
            Code::NoAgent | Code::NoListener => DialError::Refused,
            Code::NoAnswer => DialError::Timeout,
            Code::Reset => DialError::Reset,
            Code::Foreign => DialError::Foreign,
            Code::Busy => DialError::Busy,
            Code::Version
            | Code::UnknownService
            | Code::Denied
            | Code::WrongVm
            | Code::DialFailed
            | Code::DialTimedOut
            | Code::TooLarge
            | Code::NoSpace
            | Code::Mismatch
            | Code::Other(_)
            // Only aditd says these, and it has no use for its own answer.
            | Code::UnknownVm
            | Code::Ambiguous
            | Code::SilentHost
            | Code::NotAllowed
            | Code::TooOften
            | Code::Locked
            | Code::Internal => DialError::HelloRefused,
        };
        let (status, errno) = match error {
            DialError::HelloRefused => (code.hello_number(), refusal.errno()),
            _ => (0, 0),
        };
        let text = refusal.text().to_owned();
        Self {
            id,
            error,
            status,
            errno,
            text,
        }
    }

    /// What it says of a dial to this target.
    pub fn refusal(&self, to: &Target) -> Refusal {
        let code = match (self.error, to) {
            (DialError::NoSession, _) => Code::NoSession,
            (DialError::Refused, Target::Service(_)) => Code::NoAgent,
            (DialError::Refused, Target::VsockPort(_)) => Code::NoListener,
            (DialError::Timeout, _) => Code::NoAnswer,
            (DialError::Reset, _) => Code::Reset,
            (DialError::Foreign, _) => Code::Foreign,
            (DialError::Busy, _) => Code::Busy,
            (DialError::HelloRefused, _) => {
                return Refusal::of_hello(self.status, self.errno, &*self.text);
            }
        };
        Refusal::new(code, &*self.text)
    }
}

#[cfg(test)]
mod tests {
    use adit_channel::frame::HEADER_LEN;
    use adit_names::ServiceName;

    use super::*;
    use crate::control_io::Message;

    #[test]
    fn a_refusal_has_the_bytes_that_every_build_reads() {
        for (refusal, body) in [
            (
                Refusal::of_hello(4, 111, "no"),
                &[7, 5, 4, 111, 2, b'n', b'o'][..],
            ),
            (Refusal::of_hello(300, 0, ""), &[7, 5, 0xac, 2, 0, 0]),
            (Refusal::new(Code::NoSession, "x"), &[7, 0, 0, 0, 1, b'x']),
            (Refusal::new(Code::NoAgent, "x"), &[7, 1, 0, 0, 1, b'x']),
            (Refusal::busy("x"), &[7, 6, 0, 0, 1, b'x']),
        ] {
            let frame = Message::DialFailed(DialFailed::new(7, &refusal));
            assert_eq!(&frame.encode().unwrap()[HEADER_LEN..], body);
        }
    }

    #[test]
    fn every_code_arrives_as_itself_but_those_that_only_aditd_says() {
        for code in Code::ALL {
            let to = match code {
                Code::NoListener => Target::VsockPort(5),
                _ => Target::Service(ServiceName::tcp(80)),
            };
            let errno = match code {
                Code::DialTimedOut => 110,
                _ => 0,
            };
            let refusal = Refusal::new(code, "why").with_errno(errno);
            let arrived = DialFailed::new(1, &refusal).refusal(&to);
            match code {
                Code::UnknownVm
                | Code::Ambiguous
                | Code::NotAllowed
                | Code::TooOften
                | Code::SilentHost
                | Code::Locked
                | Code::Internal => {
                    assert_eq!(arrived.code(), Code::Other(0));
                }
                Code::NoPortProcess => assert_eq!(arrived.code(), Code::NoSession),
                code => assert_eq!(arrived.code(), code),
            }
            assert_eq!(arrived.text(), "why");
        }
    }
}

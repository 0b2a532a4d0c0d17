//! Why a stream was not opened: one value, from whoever refuses it to whoever asked for it.
//!
//! | code | who says it | in a hello |
//! |---|---|---|
//! | `unknown-vm`, `ambiguous`, `silent-host`, `not-allowed`, `too-often`, `locked`, `no-port-process`, `internal` | the host, before it dials | |
//! | `no-session`, `no-agent`, `no-listener`, `no-answer`, `reset`, `foreign` | the channel | |
//! | `version`, `unknown-service`, `denied`, `wrong-vm` | the listener of a hello | 1, 2, 3, 6 |
//! | `dial-failed`, `dial-timed-out` | the guest, of its own dial | 4, with its errno |
//! | `busy` | any of them | 5 |
//! | `too-large`, `no-space`, `mismatch` | the guest, of a file that it is sent | 7, 8, 9 |
//! | `other-N` | a listener of a newer build | N |
//!
//! A hello carries a number, an errno and a text. What a number means is decided by [`Code::of_hello`] alone, and it takes every
//! number: a listener's refusal is a refusal, whichever build it is of.

use std::fmt;
use std::io;

/// Most bytes of a refusal's text. A hello carries fewer ([`hello::TEXT_MAX`](crate::hello::TEXT_MAX)).
pub const TEXT_MAX: usize = 1024;
/// After how many seconds to ask again, where that may help.
const RETRY_S: u32 = 1;

/// Why a stream was not opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    /// No VM has that name.
    UnknownVm,
    /// Several hosts have a VM of that name.
    Ambiguous,
    /// The host that has the VM, or one that may have it, does not answer.
    SilentHost,
    /// The host's rules do not allow it.
    NotAllowed,
    /// The host's rules allow so many a second, and there were as many.
    TooOften,
    /// Its operator has locked the VM.
    Locked,
    /// The VM's port process does not run.
    NoPortProcess,
    /// The host itself failed.
    Internal,
    /// The guest has no running driver.
    NoSession,
    /// No agent listens in the guest.
    NoAgent,
    /// Nothing listens on that vsock port of the guest.
    NoListener,
    /// The guest did not answer in time.
    NoAnswer,
    /// The stream ended before it was answered.
    Reset,
    /// The answer is not adit's.
    Foreign,
    /// There is no common version.
    Version,
    /// The listener does not have this service.
    UnknownService,
    /// The listener's rules do not allow it.
    Denied,
    /// The peer is not the VM that was meant.
    WrongVm,
    /// The local port behind the service could not be reached.
    DialFailed,
    /// The local port behind the service did not answer in time.
    DialTimedOut,
    /// A limit is reached.
    Busy,
    /// What is sent is larger than the listener takes.
    TooLarge,
    /// The listener's disk has no room for it.
    NoSpace,
    /// What is sent is not what was announced.
    Mismatch,
    /// What a listener of a newer build says.
    Other(u16),
}

impl Code {
    /// One of each.
    pub const ALL: [Self; 25] = [
        Self::UnknownVm,
        Self::Ambiguous,
        Self::SilentHost,
        Self::NotAllowed,
        Self::TooOften,
        Self::Locked,
        Self::NoPortProcess,
        Self::Internal,
        Self::NoSession,
        Self::NoAgent,
        Self::NoListener,
        Self::NoAnswer,
        Self::Reset,
        Self::Foreign,
        Self::Version,
        Self::UnknownService,
        Self::Denied,
        Self::WrongVm,
        Self::DialFailed,
        Self::DialTimedOut,
        Self::Busy,
        Self::TooLarge,
        Self::NoSpace,
        Self::Mismatch,
        Self::Other(u16::MAX),
    ];

    /// What the number and the errno of a listener's refusal mean.
    pub fn of_hello(number: u16, errno: u16) -> Self {
        match number {
            1 => Self::Version,
            2 => Self::UnknownService,
            3 => Self::Denied,
            4 if i32::from(errno) == libc::ETIMEDOUT => Self::DialTimedOut,
            4 => Self::DialFailed,
            5 => Self::Busy,
            6 => Self::WrongVm,
            7 => Self::TooLarge,
            8 => Self::NoSpace,
            9 => Self::Mismatch,
            other => Self::Other(other),
        }
    }

    /// Its number in a hello. What is not a listener's to say has none, and is 0.
    pub fn hello_number(self) -> u16 {
        match self {
            Self::Version => 1,
            Self::UnknownService => 2,
            Self::Denied => 3,
            Self::DialFailed | Self::DialTimedOut => 4,
            Self::Busy => 5,
            Self::WrongVm => 6,
            Self::TooLarge => 7,
            Self::NoSpace => 8,
            Self::Mismatch => 9,
            Self::Other(number) => number,
            Self::UnknownVm
            | Self::Ambiguous
            | Self::SilentHost
            | Self::NotAllowed
            | Self::TooOften
            | Self::Locked
            | Self::NoPortProcess
            | Self::Internal
            | Self::NoSession
            | Self::NoAgent
            | Self::NoListener
            | Self::NoAnswer
            | Self::Reset
            | Self::Foreign => 0,
        }
    }

    /// What a failed dial of this process's own means. An errno that does not exist is a failure like any other.
    pub fn of_errno(errno: i32) -> Self {
        match errno {
            libc::ETIMEDOUT => Self::DialTimedOut,
            _ if is_shortage(errno) => Self::Busy,
            _ => Self::DialFailed,
        }
    }

    /// After how many seconds to ask again; none: it will not go better by itself.
    pub fn retry_after(self) -> Option<u32> {
        let passes = matches!(
            self,
            Self::NoPortProcess
                | Self::NoSession
                | Self::NoAgent
                | Self::SilentHost
                | Self::Busy
                | Self::TooOften
        );
        passes.then_some(RETRY_S)
    }
}

/// Its word, which stays the same in every version.
impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = match self {
            Self::UnknownVm => "unknown-vm",
            Self::Ambiguous => "ambiguous",
            Self::SilentHost => "silent-host",
            Self::NotAllowed => "not-allowed",
            Self::TooOften => "too-often",
            Self::Locked => "locked",
            Self::NoPortProcess => "no-port-process",
            Self::Internal => "internal",
            Self::NoSession => "no-session",
            Self::NoAgent => "no-agent",
            Self::NoListener => "no-listener",
            Self::NoAnswer => "no-answer",
            Self::Reset => "reset",
            Self::Foreign => "foreign",
            Self::Version => "version",
            Self::UnknownService => "unknown-service",
            Self::Denied => "denied",
            Self::WrongVm => "wrong-vm",
            Self::DialFailed => "dial-failed",
            Self::DialTimedOut => "dial-timed-out",
            Self::Busy => "busy",
            Self::TooLarge => "too-large",
            Self::NoSpace => "no-space",
            Self::Mismatch => "mismatch",
            Self::Other(number) => return write!(f, "other-{number}"),
        };
        f.pad(word)
    }
}

/// Whether an errno says that this process, or its system, is short of something.
pub fn is_shortage(errno: i32) -> bool {
    matches!(
        errno,
        libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOBUFS | libc::EADDRNOTAVAIL
    )
}

/// A refusal.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {}", adit_names::escape(.text))]
pub struct Refusal {
    code: Code,
    errno: u16,
    text: String,
}

impl Refusal {
    /// Makes one; of the text, [`TEXT_MAX`] bytes are kept.
    pub fn new(code: Code, text: impl Into<String>) -> Self {
        let mut text = text.into();
        text.truncate(prefix(&text, TEXT_MAX).len());
        let errno = 0;
        Self { code, errno, text }
    }

    /// Somebody has all that may be had of something right now.
    pub fn busy(text: impl Into<String>) -> Self {
        Self::new(Code::Busy, text)
    }

    /// What this process's own dial failed with; `to` says where it led.
    pub fn of_io(to: impl fmt::Display, e: &io::Error) -> Self {
        let errno = match e.kind() {
            // It has no errno where the time was the caller's.
            io::ErrorKind::TimedOut => libc::ETIMEDOUT,
            _ => e.raw_os_error().unwrap_or(0),
        };
        let text = format!("{to}: {e}");
        Self::new(Code::of_errno(errno), text).with_errno(u16::try_from(errno).unwrap_or(0))
    }

    /// What a listener's refusal says: the number, errno and text of its hello.
    pub fn of_hello(number: u16, errno: u16, text: impl Into<String>) -> Self {
        Self::new(Code::of_hello(number, errno), text).with_errno(errno)
    }

    /// The same with the errno that it comes from.
    pub fn with_errno(self, errno: u16) -> Self {
        Self { errno, ..self }
    }

    /// The same with another text.
    pub fn with_text(self, text: impl Into<String>) -> Self {
        Self::new(self.code, text).with_errno(self.errno)
    }

    /// Why.
    pub fn code(&self) -> Code {
        self.code
    }

    /// errno of the guest's own dial; 0: none.
    pub fn errno(&self) -> u16 {
        self.errno
    }

    /// For people. It may be a guest's: whoever shows it escapes it.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// After how many seconds to ask again, if that may help.
    pub fn retry_after(&self) -> Option<u32> {
        self.code.retry_after()
    }
}

/// The longest whole part of a text that fits into `max` bytes. `str::floor_char_boundary` would do it from Rust 1.91 on,
/// which is newer than this crate demands.
pub(crate) fn prefix(text: &str, max: usize) -> &str {
    let mut ends = (0..=max.min(text.len())).rev();
    let end = ends.find(|&end| text.is_char_boundary(end)).unwrap_or(0);
    &text[..end]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_code_has_a_word_of_its_own() {
        let words: BTreeSet<_> = Code::ALL.iter().map(Code::to_string).collect();
        assert_eq!(words.len(), Code::ALL.len());
        let is_word = |w: &String| {
            w.bytes()
                .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'))
        };
        assert!(words.iter().all(is_word), "{words:?}");
    }

    #[test]
    fn every_number_and_errno_of_a_hello_is_a_code_and_goes_out_as_it_came() {
        for number in 0..=u16::MAX {
            for errno in [0, 1, 110, 111, 134, u16::MAX] {
                let refusal = Refusal::of_hello(number, errno, "");
                assert_eq!(refusal.code().hello_number(), number);
                assert_eq!(refusal.errno(), errno);
            }
        }
        let known: Vec<_> = (1..=9).map(|n| Code::of_hello(n, 0)).collect();
        assert_eq!(
            known,
            [
                Code::Version,
                Code::UnknownService,
                Code::Denied,
                Code::DialFailed,
                Code::Busy,
                Code::WrongVm,
                Code::TooLarge,
                Code::NoSpace,
                Code::Mismatch
            ]
        );
        assert_eq!(Code::of_hello(4, 110), Code::DialTimedOut);
    }

    #[test]
    fn a_listener_cannot_say_what_only_the_host_and_the_channel_know() {
        for number in 0..=u16::MAX {
            let code = Code::of_hello(number, 0);
            let is_listeners = code.hello_number() != 0 || code == Code::Other(0);
            assert!(is_listeners, "{number}: {code}");
        }
    }

    #[test]
    fn an_errno_says_whether_the_port_or_the_guest_is_why() {
        for (errno, code) in [
            (libc::ECONNREFUSED, Code::DialFailed),
            (libc::ENETUNREACH, Code::DialFailed),
            (libc::ETIMEDOUT, Code::DialTimedOut),
            (libc::EMFILE, Code::Busy),
            (libc::ENFILE, Code::Busy),
            (libc::EADDRNOTAVAIL, Code::Busy),
            (0, Code::DialFailed),
            (-1, Code::DialFailed),
            (4095, Code::DialFailed),
            (i32::MAX, Code::DialFailed),
        ] {
            let e = io::Error::from_raw_os_error(errno);
            let refusal = Refusal::of_io("127.0.0.1:80", &e);
            assert_eq!(refusal.code(), code, "{errno}");
            assert_eq!(refusal.errno(), u16::try_from(errno).unwrap_or(0));
        }
        let no_errno = io::Error::from(io::ErrorKind::TimedOut);
        let refusal = Refusal::of_io("127.0.0.1:80", &no_errno);
        assert_eq!((refusal.code(), refusal.errno()), (Code::DialTimedOut, 110));
    }

    #[test]
    fn a_text_is_cut_between_characters_and_shown_on_one_line() {
        let refusal = Refusal::new(Code::Denied, "é".repeat(64 << 10));
        assert_eq!(refusal.text(), "é".repeat(TEXT_MAX / 2));
        let refusal = Refusal::new(Code::Denied, format!("x{}", "é".repeat(64 << 10)));
        assert_eq!(refusal.text().len(), TEXT_MAX - 1);
        let refusal = Refusal::new(Code::Denied, "no\r\n\x1b[2J");
        assert!(!refusal.to_string().chars().any(char::is_control));
    }
}

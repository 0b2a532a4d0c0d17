//! W3C Trace Context (level 1): which trace a request belongs to, and under which span it goes on. Pure.
//!
//! ```text
//! 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01
//! │  trace, 32 digits                 span, 16 digits  flags: bit 0 = whoever called records the trace
//! version
//! ```
//! What is no `traceparent` in its one spelling starts a new trace (§4.3), and takes `tracestate` with it. A later version is read
//! as version 00, by its first 55 characters, and written as that. A trace that begins here is not recorded by anybody yet, so its
//! flags are 0 (§3.2.2.5).

use std::fmt;

/// Characters of version 00.
const LEN: usize = 55;
/// Bytes of a trace, and of a span, for which random numbers are needed.
pub const RANDOM: usize = 24;

/// A trace, and one span of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trace {
    id: u128,
    span: u64,
    flags: u8,
}

impl Trace {
    /// A trace that begins here.
    pub fn new(random: [u8; RANDOM]) -> Self {
        let (id, span) = random.split_at(16);
        // 0 means none.
        Self {
            id: id.iter().fold(0, |n, b| n << 8 | u128::from(*b)).max(1),
            span: of(span),
            flags: 0,
        }
    }

    /// What a `traceparent` says; none: it is none.
    pub fn parse(text: &[u8]) -> Option<Self> {
        let (text, rest) = text.split_at_checked(LEN)?;
        let version = hex(&text[..2])?;
        let is_whole = match version {
            0 => rest.is_empty(),
            0xff => false,
            _ => rest.is_empty() || rest[0] == b'-',
        };
        let dashes = [2, 35, 52].iter().all(|at| text[*at] == b'-');
        let (id, span) = (hex(&text[3..35])?, hex(&text[36..52])?);
        let flags = hex(&text[53..])?;
        (is_whole && dashes && id != 0 && span != 0).then_some(Self {
            id,
            span: u64::try_from(span).ok()?,
            flags: u8::try_from(flags).ok()? & 1,
        })
    }

    /// The same trace under a span of its own.
    #[must_use]
    pub fn child(self, random: [u8; RANDOM]) -> Self {
        Self {
            span: of(&random[16..]),
            ..self
        }
    }

    /// The trace's id as it is written.
    pub fn id(&self) -> String {
        format!("{:032x}", self.id)
    }
}

fn of(span: &[u8]) -> u64 {
    span.iter().fold(0, |n, b| n << 8 | u64::from(*b)).max(1)
}

/// Lower-case digits only.
fn hex(digits: &[u8]) -> Option<u128> {
    digits.iter().try_fold(0_u128, |n, digit| {
        let digit = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'f' => digit - b'a' + 10,
            _ => return None,
        };
        Some(n << 4 | u128::from(digit))
    })
}

/// As `traceparent` has it.
impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "00-{:032x}-{:016x}-{:02x}",
            self.id, self.span, self.flags
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIVEN: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn a_trace_goes_on_under_a_span_of_its_own() {
        let trace = Trace::parse(GIVEN.as_bytes()).unwrap();
        assert_eq!(trace.to_string(), GIVEN);
        let on = trace.child([7; RANDOM]);
        assert_eq!(
            on.to_string(),
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0707070707070707-01"
        );
        assert_eq!(on.id(), "4bf92f3577b34da6a3ce929d0e0e4736");
        // A later version: what is known of it.
        let later = "cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-03-what-else";
        assert_eq!(Trace::parse(later.as_bytes()), Some(trace));
    }

    #[test]
    fn a_trace_that_begins_here_is_one_also_where_all_random_numbers_are_0() {
        for random in [[0; RANDOM], [0xff; RANDOM]] {
            let trace = Trace::new(random);
            let text = trace.to_string();
            assert!(text.ends_with("-00"), "{text}");
            assert_eq!(Trace::parse(text.as_bytes()), Some(trace));
            let child = trace.child(random).to_string();
            assert!(Trace::parse(child.as_bytes()).is_some(), "{child}");
        }
    }

    #[test]
    fn r72_what_is_no_traceparent_to_the_letter_is_none() {
        let huge = format!("{GIVEN}-{}", "a".repeat(1 << 16));
        for text in [
            "",
            "00",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00_4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01 ",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0\u{1b}",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0g",
            "cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01x",
            "+0-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            &huge,
        ] {
            assert_eq!(Trace::parse(text.as_bytes()), None, "{text:.80}");
        }
    }
}

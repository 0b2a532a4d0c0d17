//! The dialler's half of the hybrid protocol, without IO: `CONNECT port\n` is sent, and `OK n\n` comes back.
//!
//! ```text
//! Line ── "OK", one blank, 1 to 20 digits, LF ──► Open, and what follows belongs to the stream
//!   ├──── end of the stream before LF ─────────► Refused: the guest refused, or the VMM could not reach it
//!   └──── any other byte ──────────────────────► Foreign: no VMM answers so
//! ```
//! Rules: a byte that cannot belong to the line ends the dial at once, because a foreign listener may send a banner and wait. The
//! line has at most [`LINE_MAX`] bytes. What comes right behind it is never lost: [`Step::Open`] says where it begins. There is
//! no time here; a VMM that never answers is a matter of the dial's deadline.
//!
//! The number is the host's port as the VMM has chosen it. Nothing depends on it.
//!
//! Source: Firecracker, `docs/vsock.md`; Cloud Hypervisor has the same.

/// Longest answer with its LF, bytes. VMMs print a u32 after `OK `; there is room for a u64.
pub const LINE_MAX: usize = 24;

const START: &[u8] = b"OK ";

/// Returns the line that asks for a port of the guest.
pub fn request(port: u32) -> String {
    // In one piece with its LF: a Cloud Hypervisor that finds the end of the stream in the middle of the line ends the VM.
    format!("CONNECT {port}\n")
}

/// What the bytes so far mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Step {
    /// More bytes are needed.
    More,
    /// The stream is open. So many bytes of the last piece belong to the answer; those behind them are the guest's.
    Open {
        /// Bytes of the piece that was pushed last.
        taken: usize,
    },
}

/// Why a dial failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// The stream ended without an answer.
    #[error(
        "the VMM closed the stream without an answer: nothing listens on that port of the guest, or the guest is not up"
    )]
    Refused,
    /// The stream ended within the answer.
    #[error("the VMM closed the stream within its answer {0:?}")]
    Cut(String),
    /// The answer is none of this protocol.
    #[error("the answer {0:?} is not `OK NUMBER`: another program listens on the VMM's socket")]
    Foreign(String),
}

/// The answer to one request, as far as it has come.
#[derive(Debug, Default)]
pub struct Answer {
    line: [u8; LINE_MAX],
    len: usize,
}

impl Answer {
    /// Takes the next piece.
    ///
    /// # Errors
    /// It cannot belong to an answer.
    pub fn push(&mut self, piece: &[u8]) -> Result<Step, ConnectError> {
        for (at, &byte) in piece.iter().enumerate() {
            self.line[self.len] = byte;
            self.len += 1;
            if !self.is_start() {
                return Err(ConnectError::Foreign(self.text()));
            }
            if byte == b'\n' {
                return Ok(Step::Open { taken: at + 1 });
            }
        }
        Ok(Step::More)
    }

    /// The stream has ended.
    pub fn end(&self) -> ConnectError {
        match self.len {
            0 => ConnectError::Refused,
            _ => ConnectError::Cut(self.text()),
        }
    }

    /// Returns true if the bytes can still become an answer, or are one.
    fn is_start(&self) -> bool {
        let line = &self.line[..self.len];
        let (word, rest) = line.split_at(self.len.min(START.len()));
        if !START.starts_with(word) {
            return false;
        }
        match rest.split_last() {
            None => true,
            Some((b'\n', digits)) => !digits.is_empty() && digits.iter().all(u8::is_ascii_digit),
            // Room is left for the LF.
            Some((last, digits)) => {
                self.len < LINE_MAX
                    && last.is_ascii_digit()
                    && digits.iter().all(u8::is_ascii_digit)
            }
        }
    }

    fn text(&self) -> String {
        self.line[..self.len].escape_ascii().to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pushes pieces of this length. Returns the outcome, and what is left for the stream.
    fn feed(bytes: &[u8], piece: usize) -> (Result<Step, ConnectError>, Vec<u8>) {
        let mut answer = Answer::default();
        let mut rest = bytes;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(piece.min(rest.len()));
            match answer.push(now) {
                Ok(Step::More) => rest = later,
                Ok(open @ Step::Open { taken }) => {
                    return (Ok(open), [&now[taken..], later].concat());
                }
                Err(e) => return (Err(e), Vec::new()),
            }
        }
        (Ok(Step::More), Vec::new())
    }

    #[test]
    fn an_answer_in_any_pieces_leaves_the_guests_bytes() {
        for line in ["OK 0\n", "OK 1073741824\n", "OK 18446744073709551615\n"] {
            for tail in ["", "S", "SSH-2.0-x\r\n", "OK 1\n", "\0\n"] {
                let bytes = [line, tail].concat();
                for piece in 1..=bytes.len() {
                    let (outcome, rest) = feed(bytes.as_bytes(), piece);
                    assert!(matches!(outcome, Ok(Step::Open { .. })), "{line:?} {piece}");
                    assert_eq!(rest, tail.as_bytes(), "{line:?} {piece}");
                }
            }
        }
    }

    #[test]
    fn r53_an_answer_that_is_cut_at_any_byte_is_no_answer() {
        let line = b"OK 1073741824\n";
        for len in 0..line.len() {
            let mut answer = Answer::default();
            assert_eq!(answer.push(&line[..len]), Ok(Step::More));
            let end = answer.end();
            assert_eq!(end == ConnectError::Refused, len == 0, "{end}");
        }
    }

    #[test]
    fn r53_what_is_no_answer_ends_the_dial_at_its_first_wrong_byte() {
        let long = format!("OK {}", "1".repeat(1 << 20));
        for (bytes, seen) in [
            ("SSH-2.0-OpenSSH_9.2\r\n", 1),
            ("ok 1\n", 1),
            ("\n", 1),
            ("\0", 1),
            ("OK\n", 3),
            ("OK \n", 4),
            ("OK  1\n", 4),
            ("OK -1\n", 4),
            ("OK 1\r\n", 5),
            ("OK 1 \n", 5),
            ("OK 1\0\n", 5),
            (long.as_str(), LINE_MAX),
        ] {
            let mut answer = Answer::default();
            let mut taken = 0;
            let error = loop {
                match answer.push(&bytes.as_bytes()[taken..taken + 1]) {
                    Ok(Step::More) => taken += 1,
                    Ok(open) => panic!("{bytes:?} is {open:?}"),
                    Err(e) => break e,
                }
            };
            assert!(matches!(error, ConnectError::Foreign(_)), "{error}");
            assert_eq!(taken + 1, seen, "{bytes:?}");
            // In one piece it is the same, and no byte behind the line is looked at.
            assert_eq!(feed(bytes.as_bytes(), bytes.len()).0, Err(error));
        }
    }

    #[test]
    fn the_question_is_one_line() {
        assert_eq!(request(741), "CONNECT 741\n");
        assert_eq!(request(u32::MAX), "CONNECT 4294967295\n");
        // Firecracker and `hybrid/clients.rs` take lines of at most 32 bytes.
        assert!(request(u32::MAX).len() <= 32);
    }
}

//! What is typed at a terminal that may be left by an escape: `~.` at the beginning of a line, as with ssh.
//!
//! ```text
//! Line ── ~ ──► Tilde ── . ──► left        ── ~ ──► one tilde        ── anything else ──► the tilde, and that
//!  ▲ └── anything else ──► Within ── CR, LF ──► Line
//! ```

/// Where the typing is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum At {
    /// Nothing is on the line yet.
    #[default]
    Line,
    /// A tilde is, which was kept back.
    Tilde,
    Within,
}

/// What was typed so far.
#[derive(Debug, Default)]
pub(super) struct Typed(At);

impl Typed {
    /// Returns what of these bytes the guest is to have, and whether they leave it.
    pub(super) fn take(&mut self, bytes: &[u8]) -> (Vec<u8>, bool) {
        let mut out = Vec::with_capacity(bytes.len() + 1);
        for &byte in bytes {
            match (self.0, byte) {
                (At::Line, b'~') => {
                    self.0 = At::Tilde;
                    continue;
                }
                (At::Tilde, b'.') => return (out, true),
                (At::Tilde, b'~') => {}
                (At::Tilde, _) => out.push(b'~'),
                (At::Line | At::Within, _) => {}
            }
            out.push(byte);
            self.0 = match byte {
                b'\r' | b'\n' => At::Line,
                _ => At::Within,
            };
        }
        (out, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tilde_and_a_dot_at_the_beginning_of_a_line_leave() {
        for (typed, to_guest, left) in [
            ("ls\r", "ls\r", false),
            ("~.", "", true),
            ("ls\r~.more", "ls\r", true),
            ("a\n~~.\r", "a\n~.\r", false),
            ("cd ~.\r", "cd ~.\r", false),
            ("~a~.\r", "~a~.\r", false),
            ("~\r~.", "~\r", true),
        ] {
            for piece in 1..=typed.len() {
                let (mut all, mut state, mut leaves) = (Vec::new(), Typed::default(), false);
                for bytes in typed.as_bytes().chunks(piece) {
                    let (out, left) = state.take(bytes);
                    all.extend(out);
                    leaves |= left;
                    if leaves {
                        break;
                    }
                }
                assert_eq!(
                    (all.as_slice(), leaves),
                    (to_guest.as_bytes(), left),
                    "{typed:?}"
                );
            }
        }
    }
}

//! Lines of a header section, one byte at a time: CRLF ends a line, an empty line ends the section, nothing else does.
//!
//! hyper also takes a bare LF, and whoever reads the same bytes behind it may not: two readers that see different ends of a
//! header see different requests (RFC 9112 §2.2, §11.2). So a line that ends in any other way is refused when it is seen.

use super::super::problem::Problem;

/// A header section, or a trailer section, as far as it has come.
#[derive(Clone, Debug)]
pub(super) struct Lines {
    /// The byte before the next one.
    last: u8,
    /// Bytes of this line so far, without its end.
    in_line: usize,
}

impl Lines {
    /// At the beginning of a line.
    pub(super) fn new() -> Self {
        Self {
            last: b'\n',
            in_line: 0,
        }
    }

    /// Takes the next byte. True: it ends the section.
    ///
    /// # Errors
    /// No line may have this byte here.
    pub(super) fn take(&mut self, byte: u8) -> Result<bool, Problem> {
        let last = std::mem::replace(&mut self.last, byte);
        match (last, byte) {
            (b'\r', b'\n') => {
                let ends = self.in_line == 0;
                self.in_line = 0;
                return Ok(ends);
            }
            (b'\r', _) => return Err(refused("a CR without LF is in the header")),
            (_, b'\n') => {
                return Err(refused(
                    "a line of the header ends with a bare LF: use CRLF",
                ));
            }
            (_, b'\r') => {}
            (b'\n', b' ' | b'\t') => {
                return Err(refused(
                    "a line of the header begins with a space (line folding)",
                ));
            }
            (_, b'\t' | b' '..=b'~' | 0x80..) => self.in_line += 1,
            (_, control) => {
                let why = format!("the header has the control character 0x{control:02x}");
                return Err(refused(why));
            }
        }
        Ok(false)
    }
}

fn refused(why: impl Into<String>) -> Problem {
    Problem::malformed(why)
}

//! Text that somebody else wrote, made fit to show: on a terminal, in a line of a log, in an answer (R72).

use std::fmt::{self, Write as _};

/// Whether a terminal acts on it, or shows what follows in another order, or a reader takes it for the end of a line.
pub fn is_unsafe(c: char) -> bool {
    let reorders = matches!(c, '\u{61c}' | '\u{200e}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    // Of the C1 controls, U+009B begins a command as ESC does.
    c.is_control() || reorders || matches!(c, '\u{2028}'..='\u{2029}')
}

/// Shows a text with what is unsafe in it escaped, as `\n` or `\u{1b}`. All else stays, quotes and backslashes too, so that
/// what was escaped once stays as it is.
pub fn escape(text: &str) -> Escaped<'_> {
    Escaped {
        text,
        chars: usize::MAX,
    }
}

/// A text that is escaped when it is shown.
#[derive(Clone, Copy, Debug)]
pub struct Escaped<'a> {
    text: &'a str,
    chars: usize,
}

impl Escaped<'_> {
    /// Shows at most so many characters of the text.
    pub fn at_most(self, chars: usize) -> Self {
        Self { chars, ..self }
    }
}

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.text.chars().take(self.chars) {
            match is_unsafe(c) {
                true => write!(f, "{}", c.escape_default())?,
                false => f.write_char(c)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r72_terminal_escapes_stay_text() {
        let shown = |text| escape(text).to_string();
        assert_eq!(
            shown("a\x1b[2Jb\r\n\u{202e}\u{9b}1m\u{7f}\0"),
            "a\\u{1b}[2Jb\\r\\n\\u{202e}\\u{9b}1m\\u{7f}\\u{0}"
        );
        assert_eq!(
            shown("x\u{2028}\u{200f}\u{61c}\u{2069}y"),
            "x\\u{2028}\\u{200f}\\u{61c}\\u{2069}y"
        );
        assert_eq!(shown("grün 日本 \"it's\" a\\b"), "grün 日本 \"it's\" a\\b");
    }

    #[test]
    fn what_was_escaped_once_stays_as_it_is() {
        let once = escape("a\nb\u{1b}").to_string();
        assert_eq!(escape(&once).to_string(), once);
    }

    #[test]
    fn a_text_is_cut_between_characters() {
        assert_eq!(escape("ü\n日本").at_most(3).to_string(), "ü\\n日");
        assert_eq!(escape("ab").at_most(0).to_string(), "");
    }
}

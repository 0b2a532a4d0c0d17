//! Text for people and for programs. Nothing in it drives a terminal, whoever wrote it (R72).

use std::fmt::Write as _;

use serde::Serialize;

/// How to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Aligned columns, or lines
    Table,
    /// One JSON value, or one a line where there are many over time
    Json,
}

/// Whether a terminal would act on it, or show what follows in another order.
fn is_unsafe(c: char) -> bool {
    let reorders = matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    c.is_control() || reorders
}

/// Replaces control characters (ESC, CR, …) and such as reorder text, so that foreign text stays text.
pub fn escape(text: &str) -> String {
    text.chars()
        .fold(String::with_capacity(text.len()), |mut out, c| {
            if is_unsafe(c) {
                // Writing to a String cannot fail.
                let _ = write!(out, "{}", c.escape_default());
            } else {
                out.push(c);
            }
            out
        })
}

/// A value as JSON that is safe on a terminal. JSON must escape control characters up to U+001F only, and U+009B begins a
/// command to a terminal as ESC does. They can only be in strings, where `\u009b` is the same character.
pub fn json_text(value: &impl Serialize) -> serde_json::Result<String> {
    let text = serde_json::to_string(value)?;
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match is_unsafe(c) {
            // Writing to a String cannot fail.
            true => drop(write!(out, "\\u{:04x}", u32::from(c))),
            false => out.push(c),
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r72_terminal_escapes_stay_text() {
        assert_eq!(
            escape("a\x1b[2Jb\r\n\u{202e}"),
            "a\\u{1b}[2Jb\\r\\n\\u{202e}"
        );
        assert_eq!(escape("grün 日本"), "grün 日本");
    }
}

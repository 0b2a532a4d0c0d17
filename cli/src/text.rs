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

/// Makes foreign text fit for a terminal.
pub fn escape(text: &str) -> String {
    adit_names::escape(text).to_string()
}

/// A value as JSON that is safe on a terminal. JSON must escape control characters up to U+001F only, and U+009B begins a
/// command to a terminal as ESC does. They can only be in strings, where `\u009b` is the same character.
pub fn json_text(value: &impl Serialize) -> serde_json::Result<String> {
    let text = serde_json::to_string(value)?;
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match adit_names::is_unsafe(c) {
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
    fn r72_json_is_safe_on_a_terminal_and_the_same_value() {
        let value = "a\x1b[2J\u{9b}1m\u{202e}\u{200f}\r\n ü";
        let text = json_text(&value).unwrap();
        assert!(!text.chars().any(adit_names::is_unsafe), "{text:?}");
        assert_eq!(serde_json::from_str::<String>(&text).unwrap(), value);
    }
}

//! Event log: one line an event on standard error, which is a console, /dev/kmsg or a service manager's journal.
//!
//! `adit-guest: NAME key=value …`. Values that a peer or a task chose are escaped, so that no value can forge a
//! second line or a terminal sequence. A line that cannot be written is dropped: logging never stops the agent.

use std::fmt::{Display, Write as _};
use std::io::Write as _;

/// Most bytes of one value; the rest is cut and marked.
const VALUE_MAX: usize = 512;

/// Writes one event line.
pub fn event(name: &str, fields: &[(&str, &dyn Display)]) {
    let line = format_line(name, fields);
    let _ = std::io::stderr().lock().write_all(line.as_bytes());
}

fn format_line(name: &str, fields: &[(&str, &dyn Display)]) -> String {
    let mut line = format!("adit-guest: {name}");
    for (key, value) in fields {
        let _ = write!(line, " {key}=");
        push_value(&mut line, &value.to_string());
    }
    line.push('\n');
    line
}

fn push_value(line: &mut String, value: &str) {
    let mut end = value.len().min(VALUE_MAX);
    while !value.is_char_boundary(end) {
        end -= 1;
    }
    let (shown, cut) = (&value[..end], end < value.len());
    let plain = |c: char| c.is_ascii_graphic() && c != '"' && c != '\\';
    if !cut && !shown.is_empty() && shown.chars().all(plain) {
        line.push_str(shown);
        return;
    }
    line.push('"');
    line.extend(shown.chars().flat_map(char::escape_default));
    line.push_str(if cut { "…\"" } else { "\"" });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_cannot_forge_a_second_line_or_a_terminal_sequence() {
        let line = format_line(
            "refused",
            &[
                ("why", &"a\nadit-guest: ready \x1b[2J\u{202e}"),
                ("vm", &"web-1"),
            ],
        );
        assert_eq!(line.matches('\n').count(), 1);
        assert!(line.is_ascii() && !line.contains('\x1b'), "{line}");
        assert!(line.ends_with(" vm=web-1\n"));
    }

    #[test]
    fn long_values_are_cut_on_a_character_boundary() {
        let line = format_line("x", &[("v", &"é".repeat(VALUE_MAX))]);
        assert!(line.len() < 8 * VALUE_MAX && line.ends_with("…\"\n"));
    }
}

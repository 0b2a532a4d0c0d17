//! Printing: tables for people, JSON for programs, and nothing from a guest that could drive a terminal (R72).

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write as _};

use serde::Serialize;

use crate::error::Failure;

/// How to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Aligned columns, or lines
    Table,
    /// One JSON value, or one a line where there are many over time
    Json,
}

/// Replaces control characters (ESC, CR, …) and such as reorder text, so that foreign text stays text.
pub fn escape(text: &str) -> String {
    text.chars()
        .fold(String::with_capacity(text.len()), |mut out, c| {
            let reorders = matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
            if c.is_control() || reorders {
                // Writing to a String cannot fail.
                let _ = write!(out, "{}", c.escape_default());
            } else {
                out.push(c);
            }
            out
        })
}

/// Prints bytes that a guest wrote: as they are into a pipe or file, escaped (but for newline and tab) on a terminal.
pub fn foreign_bytes(bytes: &[u8]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if !out.is_terminal() {
        return out.write_all(bytes).and_then(|()| out.flush());
    }
    for line in String::from_utf8_lossy(bytes).split_inclusive('\n') {
        let (text, end) = line.strip_suffix('\n').map_or((line, ""), |l| (l, "\n"));
        let cells: Vec<String> = text.split('\t').map(escape).collect();
        write!(out, "{}{end}", cells.join("\t"))?;
    }
    out.flush()
}

/// Prints a value as one line of JSON.
pub fn json(value: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string(value).map_err(|e| Failure::new("internal", e.to_string()))?;
    println!("{text}");
    Ok(())
}

/// Prints rows under a heading, columns aligned, the last one unpadded.
pub fn table<const N: usize>(heading: [&str; N], rows: &[[String; N]]) {
    let rows: Vec<[String; N]> = rows
        .iter()
        .map(|row| row.each_ref().map(|cell| escape(cell)))
        .collect();
    let mut width = heading.map(|h| h.chars().count());
    for row in &rows {
        for (w, cell) in width.iter_mut().zip(row) {
            *w = (*w).max(cell.chars().count());
        }
    }
    let line = |cells: [&str; N]| {
        let mut text = String::new();
        for (i, (cell, w)) in cells.iter().zip(width).enumerate() {
            // Writing to a String cannot fail.
            let _ = if i + 1 == N {
                write!(text, "{cell}")
            } else {
                write!(text, "{cell:<w$}  ")
            };
        }
        println!("{}", text.trim_end());
    };
    line(heading);
    for row in &rows {
        line(row.each_ref().map(String::as_str));
    }
}

/// Says how long ago something was.
pub fn ago(ms: Option<u64>) -> String {
    match ms {
        None => "never".into(),
        Some(ms) if ms < 60_000 => format!("{}.{}s ago", ms / 1000, ms % 1000 / 100),
        Some(ms) if ms < 3_600_000 => format!("{}m ago", ms / 60_000),
        Some(ms) => format!("{}h ago", ms / 3_600_000),
    }
}

/// Reads `30s`, `500ms`, `2m`, `1h` (or plain seconds).
pub fn duration(text: &str) -> Result<std::time::Duration, String> {
    let at = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    let n: u64 = number
        .parse()
        .map_err(|_| format!("`{text}` is no duration: write 500ms, 30s, 2m or 1h"))?;
    let ms = match unit {
        "ms" => Some(n),
        "s" | "" => n.checked_mul(1000),
        "m" => n.checked_mul(60_000),
        "h" => n.checked_mul(3_600_000),
        _ => return Err(format!("`{unit}` is no unit of time: write ms, s, m or h")),
    };
    ms.map(std::time::Duration::from_millis)
        .ok_or_else(|| format!("`{text}` is too long"))
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

    #[test]
    fn durations_have_units() {
        assert_eq!(duration("500ms").unwrap().as_millis(), 500);
        assert_eq!(duration("2m").unwrap().as_secs(), 120);
        assert_eq!(duration("7").unwrap().as_secs(), 7);
        for bad in [
            "",
            "s",
            "-1s",
            "1d",
            "99999999999999999999s",
            "18446744073709551615h",
        ] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }
}

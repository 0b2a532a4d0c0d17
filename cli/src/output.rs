//! Printing: tables for people, JSON for programs.

use std::fmt::{Display, Write as _};
use std::io::{self, IsTerminal};
use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;

use crate::error::Failure;
use crate::text::{escape, json_text};

/// Prints bytes that a guest wrote: as they are into a pipe or file, escaped (but for newline and tab) on a terminal.
pub fn foreign_bytes(bytes: &[u8]) -> Result<(), Failure> {
    if !io::stdout().is_terminal() {
        return Ok(adit_print::bytes(bytes)?);
    }
    Ok(adit_print::bytes(for_terminal(bytes).as_bytes())?)
}

/// Bytes that a guest wrote as a terminal may have them: escaped, but for newline and tab.
pub fn for_terminal(bytes: &[u8]) -> String {
    let mut text = String::new();
    for line in String::from_utf8_lossy(bytes).split_inclusive('\n') {
        let (cells, end) = line.strip_suffix('\n').map_or((line, ""), |l| (l, "\n"));
        let cells: Vec<String> = cells.split('\t').map(escape).collect();
        text.push_str(&cells.join("\t"));
        text.push_str(end);
    }
    text
}

/// Prints a line.
pub fn line(text: impl Display) -> Result<(), Failure> {
    Ok(adit_print::line(text)?)
}

/// Prints a value as one line of JSON.
pub fn json(value: &impl Serialize) -> Result<(), Failure> {
    line(json_text(value).map_err(|e| Failure::new("internal", e.to_string()))?)
}

/// Prints rows under a heading, columns aligned, the last one unpadded.
pub fn table<const N: usize>(heading: [&str; N], rows: &[[String; N]]) -> Result<(), Failure> {
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
    let mut text = String::new();
    let headings = [heading.map(str::to_owned)];
    for row in headings.iter().chain(&rows) {
        let mut line = String::new();
        for (cell, w) in row.iter().zip(width) {
            // Writing to a String cannot fail.
            let _ = write!(line, "{cell:<w$}  ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    Ok(adit_print::bytes(text.as_bytes())?)
}

/// Prints a key and its value a line; `width`: of the column of keys.
pub fn pairs(width: usize, rows: &[[String; 2]]) -> Result<(), Failure> {
    let mut text = String::new();
    for [key, value] in rows {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{key:<width$} {}", escape(value));
    }
    Ok(adit_print::bytes(text.as_bytes())?)
}

/// Says how long ago something was.
pub fn ago(ms: Option<u64>) -> String {
    match ms {
        None => "never".into(),
        Some(ms) if ms < 60_000 => format!("{}.{}s ago", ms / 1000, ms % 1000 / 100),
        Some(ms) => format!("{} ago", span(Duration::from_millis(ms))),
    }
}

/// Says how long ago a time in RFC 3339 was: `12s`, `5m`, `3h`, `9d`; what is no time or is to come is shown as it is.
pub fn age(at: &str, now: Timestamp) -> String {
    let Ok(then) = at.parse::<Timestamp>() else {
        return at.to_owned();
    };
    match Duration::try_from(now.duration_since(then)) {
        Ok(past) => span(past),
        Err(_) => at.to_owned(),
    }
}

/// The largest unit of a span of time, whole.
pub fn span(span: Duration) -> String {
    match span.as_secs() {
        s if s < 60 => format!("{s}s"),
        s if s < 3600 => format!("{}m", s / 60),
        s if s < 172_800 => format!("{}h", s / 3600),
        s => format!("{}d", s / 86_400),
    }
}

/// Reads `30s`, `500ms`, `2m`, `1h` (or plain seconds).
pub fn duration(text: &str) -> Result<Duration, String> {
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
    ms.map(Duration::from_millis)
        .ok_or_else(|| format!("`{text}` is too long"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_age_is_the_largest_unit() {
        let now: Timestamp = "2026-11-20T22:00:00Z".parse().unwrap();
        for (at, want) in [
            ("2026-11-20T22:00:00Z", "0s"),
            ("2026-11-20T21:58:01Z", "1m"),
            ("2026-11-19T21:00:00Z", "25h"),
            ("2026-11-11T22:00:00Z", "9d"),
            ("2026-11-20T22:00:09Z", "2026-11-20T22:00:09Z"),
            ("soon", "soon"),
        ] {
            assert_eq!(age(at, now), want);
        }
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

//! The head of the proxy's answer. What is behind it is the tunnel's, and stays in the socket: ssh may get the socket, and the
//! guest may have spoken first.
//!
//! ```text
//! peek what is there ─► parse ─► the head ends in it? ─ yes ─► take the bytes up to there, and none more
//!        ▲                                 └─ no ──► all of it is head: take it ─┐
//!        └───────────────────────────────────────────────────────────────────────┘
//! ```
//! What was peeked is always taken, or a socket with half a head in it would be ready all the time.

use std::io;
use std::time::Duration;

use rustix::net::RecvFlags;
use tokio::time::{Instant, timeout_at};

use super::socket::Socket;

/// Most bytes of all heads of an answer: interim ones (1xx) too.
const HEAD_MAX: usize = 16 * 1024;
/// Most fields of a head.
const FIELDS_MAX: usize = 64;
/// Most bytes that are read of what a refusal says.
const REASON_MAX: usize = 2 * 1024;
/// How long the rest of a refusal may take: it is only there to be shown.
const REASON_LIMIT: Duration = Duration::from_secs(2);

/// Why there is no head.
#[derive(Debug)]
pub enum HeadError {
    /// The connection ended, or broke.
    Io(io::Error),
    /// It is not HTTP, or too much of it. Says what.
    Bad(String),
}

impl From<io::Error> for HeadError {
    fn from(e: io::Error) -> Self {
        Self::Io(e)
    }
}

/// What is of interest in a head.
#[derive(Debug, PartialEq, Eq)]
pub struct Head {
    pub code: u16,
    /// Bytes of a text for people that follow, as far as they are read; 0: something else follows.
    text: usize,
    /// `details` of `Proxy-Status` (RFC 9209), where it has them.
    details: Option<String>,
}

impl Head {
    pub fn is_success(&self) -> bool {
        (200..300).contains(&self.code)
    }

    /// What a refusal says, line by line: first why, then what to do about it. Empty: nothing.
    pub async fn reason(&self, socket: &Socket) -> Vec<String> {
        let mut bytes = vec![0; self.text];
        let mut got = 0;
        let until = Instant::now() + REASON_LIMIT;
        while got < bytes.len() {
            let more = socket.receive(&mut bytes[got..], RecvFlags::empty());
            match timeout_at(until, more).await {
                Ok(Ok(n @ 1..)) => got += n,
                _ => break,
            }
        }
        let text = String::from_utf8_lossy(&bytes[..got]);
        let lines = text.lines().map(str::trim).filter(|l| !l.is_empty());
        let lines: Vec<String> = lines.map(str::to_owned).collect();
        match lines.is_empty() {
            true => self.details.iter().cloned().collect(),
            false => lines,
        }
    }
}

/// Reads the head of the final answer, and not one byte more.
pub async fn read(socket: &Socket) -> Result<Head, HeadError> {
    let mut room = HEAD_MAX;
    loop {
        let head = one(socket, &mut room).await?;
        match head.code {
            101 => return Err(HeadError::Bad("it answers a CONNECT with 101".into())),
            100..200 => {}
            _ => return Ok(head),
        }
    }
}

/// Reads one head, of at most `room` bytes.
async fn one(socket: &Socket, room: &mut usize) -> Result<Head, HeadError> {
    let mut head = Vec::new();
    let mut ahead = vec![0; *room];
    loop {
        let there = socket.receive(&mut ahead[..*room], RecvFlags::PEEK).await?;
        if there == 0 {
            return Err(HeadError::Io(io::ErrorKind::UnexpectedEof.into()));
        }
        let begun = head.len();
        head.extend_from_slice(&ahead[..there]);
        let parsed = parse(&head)?;
        let end = parsed.as_ref().map_or(head.len(), |(_, end)| *end);
        take(socket, &mut ahead, end - begun).await?;
        *room -= end - begun;
        if let Some((head, _)) = parsed {
            return Ok(head);
        }
        if *room == 0 {
            let text = format!("the head of its answer is longer than {HEAD_MAX} bytes");
            return Err(HeadError::Bad(text));
        }
    }
}

/// Takes bytes out of the socket that are known to be there.
async fn take(socket: &Socket, space: &mut [u8], mut len: usize) -> io::Result<()> {
    while len > 0 {
        match socket
            .receive(&mut space[..len], RecvFlags::empty())
            .await?
        {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            got => len -= got,
        }
    }
    Ok(())
}

/// Parses a head, and says where it ends. `None`: it goes on.
fn parse(bytes: &[u8]) -> Result<Option<(Head, usize)>, HeadError> {
    let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let mut answer = httparse::Response::new(&mut fields);
    let end = match answer.parse(bytes) {
        Ok(httparse::Status::Complete(end)) => end,
        Ok(httparse::Status::Partial) => {
            // The parser forgives lines that end in LF alone, and would take the tunnel's first bytes for fields.
            return bare_lf(bytes).map(|()| None);
        }
        Err(e) => {
            let text = match bytes.starts_with(b"HTTP/") {
                true => format!("its answer is not HTTP/1: {e}"),
                false => format!("it does not speak HTTP: `{}`", shown(bytes)),
            };
            return Err(HeadError::Bad(text));
        }
    };
    bare_lf(&bytes[..end])?;
    let field = |name: &str| {
        let mut found = answer.headers.iter();
        let found = found.find(|f| f.name.eq_ignore_ascii_case(name))?;
        std::str::from_utf8(found.value).ok()
    };
    // A page for a browser says nothing on a terminal.
    let is_text = field("content-type").is_none_or(|t| t.starts_with("text/plain"));
    let length = field("content-length").and_then(|length| length.parse().ok());
    let text = match is_text && field("transfer-encoding").is_none() {
        true => length.unwrap_or(REASON_MAX).min(REASON_MAX),
        false => 0,
    };
    Ok(Some((
        Head {
            code: answer.code.unwrap_or_default(),
            text,
            details: field("proxy-status").and_then(details),
        },
        end,
    )))
}

fn bare_lf(bytes: &[u8]) -> Result<(), HeadError> {
    let bare = |at: usize| bytes[at] == b'\n' && (at == 0 || bytes[at - 1] != b'\r');
    match (0..bytes.len()).any(bare) {
        true => Err(HeadError::Bad(
            "a line of its answer ends without CR".into(),
        )),
        false => Ok(()),
    }
}

/// The string `details` of a `Proxy-Status` with one member.
fn details(value: &str) -> Option<String> {
    let (_, rest) = value.split_once("details=\"")?;
    let mut text = String::new();
    let mut chars = rest.chars();
    loop {
        match chars.next()? {
            '"' => return Some(text),
            '\\' => text.push(chars.next()?),
            c => text.push(c),
        }
    }
}

/// The first line of what is no HTTP, as far as it helps to see what listens there: `SSH-2.0-OpenSSH_9.2`.
fn shown(bytes: &[u8]) -> String {
    let line = bytes.split(|b| *b == b'\r' || *b == b'\n').next();
    let line = String::from_utf8_lossy(line.unwrap_or_default());
    adit_names::escape(&line).at_most(60).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(text: &str) -> Option<(Head, usize)> {
        parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn a_head_ends_at_its_empty_line_wherever_it_is_cut() {
        let whole = "HTTP/1.1 200 OK\r\nDate: x\r\n\r\n";
        for cut in 0..whole.len() {
            assert_eq!(head(&whole[..cut]), None, "{cut}");
        }
        let (found, end) = head(&format!("{whole}SSH-2.0-x\r\n\r\n")).unwrap();
        assert_eq!((found.code, end), (200, whole.len()));
    }

    #[test]
    fn what_is_no_head_is_refused_as_soon_as_it_shows() {
        for bad in [
            "SSH-2.0-OpenSSH_9.2p1\r\n",
            "HTTP/2 200 OK\r\n",
            "HTTP/1.1 20 OK\r\n",
            "HTTP/1.1 200 OK\n\n",
            "HTTP/1.1 200 OK\nx",
            "HTTP/1.1 200 OK\r\nDate: x\n\r\n",
            "HTTP/1.1 200 OK\r\nDa te: x\r\n\r\n",
            "\0\0\0\0",
        ] {
            assert!(
                matches!(parse(bad.as_bytes()), Err(HeadError::Bad(_))),
                "{bad:?}"
            );
        }
        let many = "a: b\r\n".repeat(FIELDS_MAX + 1);
        let many = format!("HTTP/1.1 200 OK\r\n{many}\r\n");
        assert!(parse(many.as_bytes()).is_err());
    }

    #[test]
    fn details_of_a_proxy_status_are_a_string_with_escapes() {
        let said = |value| details(value);
        assert_eq!(
            said(r#"adit; error=x; details="port \"1\" \\ no"; more"#).as_deref(),
            Some(r#"port "1" \ no"#)
        );
        for none in [
            "adit; error=x",
            r#"adit; details="open"#,
            r#"adit; details="\"#,
            "",
        ] {
            assert_eq!(said(none), None, "{none}");
        }
    }
}

//! The head of a request, checked and written anew before hyper reads it.
//!
//! | in the head | answer |
//! |---|---|
//! | a line that CRLF does not end, a folded line, a control character | 400 |
//! | more than [`HEADER_MAX`] bytes, more than [`FIELDS_MAX`] fields | 431; 414 if it is the target |
//! | a version other than HTTP/1.0 and HTTP/1.1, but for a connection that begins with [`PREFACE`] | 505 |
//! | HTTP/1.1 without `Host`; two of them, also as a list in one; one that is no host | 400 (RFC 9112 §3.2) |
//! | `Content-Length` twice, or not digits; with `Transfer-Encoding`; with CONNECT | 400 (RFC 9112 §6.3) |
//! | `Transfer-Encoding` in HTTP/1.0, twice, or without `chunked` at its end, once | 400 (RFC 9112 §6.1) |
//! | another coding below `chunked` | 501 |
//! | a target that is no URI | 400, and which byte it is |
//!
//! A `Host` that differs from the target's authority is no error: the target decides, and the field is replaced
//! (RFC 9112 §3.2.2). Where a byte of path or query is one that URIs do not have and clients send all the same (`"`, `<`, `>`,
//! a backtick, what is no UTF-8), it is carried percent-encoded, as a browser has it.

use bytes::{Buf, BytesMut};
use hyper::{Method, StatusCode, Uri};

use super::super::problem::Problem;
use super::body::Body;
use super::lines::Lines;
use super::{FIELDS_MAX, HEADER_MAX};

/// What a client of HTTP/2 begins with, as far as it looks like a head (RFC 9113 §3.4).
pub(super) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\n";

/// A request that may go on.
#[derive(Debug)]
pub(crate) struct Head {
    /// What hyper reads.
    pub(crate) bytes: BytesMut,
    /// What follows.
    pub(crate) body: Body,
    /// It is CONNECT, which a tunnel follows.
    pub(crate) connect: bool,
    /// It is of HTTP/1.1, so that it may have interim answers.
    pub(crate) http_11: bool,
    /// Its target is `scheme://authority` and nothing else.
    pub(crate) no_path: bool,
}

/// Looks for the end of a head in bytes that come in pieces.
#[derive(Debug)]
pub(crate) struct Search {
    lines: Lines,
    /// Bytes that were looked at.
    at: usize,
    in_first_line: bool,
}

impl Search {
    pub(crate) fn new() -> Self {
        Self {
            lines: Lines::new(),
            at: 0,
            in_first_line: true,
        }
    }

    /// Looks at what is new, and gives the length of the head once it is whole. Empty lines ahead of it are taken away
    /// (RFC 9112 §2.2).
    ///
    /// # Errors
    /// It is refused before its end.
    pub(crate) fn end(&mut self, bytes: &mut BytesMut) -> Result<Option<usize>, Problem> {
        while self.at == 0 && bytes.starts_with(b"\r\n") {
            bytes.advance(2);
        }
        if self.at == 0 && bytes[..] == b"\r"[..] {
            return Ok(None);
        }
        while let Some(&byte) = bytes.get(self.at) {
            self.at += 1;
            if self.lines.take(byte)? {
                return Ok(Some(self.at));
            }
            self.in_first_line &= byte != b'\n';
        }
        if self.at < HEADER_MAX {
            return Ok(None);
        }
        Err(too_long(self.in_first_line))
    }
}

fn too_long(in_target: bool) -> Problem {
    let (status, what) = if in_target {
        (StatusCode::URI_TOO_LONG, "target")
    } else {
        (StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "header")
    };
    let why = format!("the request's {what} is longer than {HEADER_MAX} bytes");
    let remedy = "send fewer and shorter fields: cookies are often the longest";
    Problem::new(status, "http_request_error", why, remedy)
}

/// Checks a whole head.
///
/// # Errors
/// It is refused.
pub(crate) fn check(head: &[u8]) -> Result<Head, Problem> {
    let end = head.windows(2).position(|w| w == b"\r\n");
    let (line, rest) = head.split_at(end.map_or(head.len(), |at| at + 2));
    let (method, Target { text, no_path }, http_11) =
        request_line(line.strip_suffix(b"\r\n").unwrap_or(line))?;
    let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let fields = match httparse::parse_headers(rest, &mut fields) {
        Ok(httparse::Status::Complete((_, fields))) => fields,
        Ok(httparse::Status::Partial) => return Err(Problem::malformed("the header has no end")),
        Err(httparse::Error::TooManyHeaders) => {
            let why = format!("a request has at most {FIELDS_MAX} header fields");
            let status = StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE;
            let problem = Problem::malformed(why).remedy("send fewer fields");
            return Err(Problem { status, ..problem });
        }
        Err(_) => {
            return Err(Problem::malformed(
                "a line of the header is no field (NAME: VALUE, without a space before the colon)",
            ));
        }
    };
    let body = framing(fields, http_11)?;
    if method == Method::CONNECT && !body.is_over() {
        return Err(Problem::malformed("CONNECT has no body"));
    }
    host(fields, http_11)?;

    let mut bytes = BytesMut::with_capacity(head.len() + 16);
    let version: &[u8] = if http_11 { b"HTTP/1.1" } else { b"HTTP/1.0" };
    for part in [method.as_str().as_bytes(), b" ", &text, b" ", version] {
        bytes.extend_from_slice(part);
    }
    for field in fields.iter() {
        for part in [b"\r\n", field.name.as_bytes(), b": ", value(field)] {
            bytes.extend_from_slice(part);
        }
    }
    bytes.extend_from_slice(b"\r\n\r\n");
    if bytes.len() > HEADER_MAX {
        return Err(too_long(text.len() > HEADER_MAX / 2));
    }
    Ok(Head {
        bytes,
        body,
        connect: method == Method::CONNECT,
        http_11,
        no_path,
    })
}

/// A target as it is carried.
struct Target {
    text: Vec<u8>,
    no_path: bool,
}

/// Method, target and whether the version is HTTP/1.1.
fn request_line(line: &[u8]) -> Result<(Method, Target, bool), Problem> {
    let parts: Vec<&[u8]> = line.split(|&b| b == b' ').collect();
    let &[method, target, version] = parts.as_slice() else {
        return Err(Problem::malformed(
            "the request line is not METHOD TARGET VERSION with one space between them",
        ));
    };
    let method = Method::from_bytes(method)
        .map_err(|_| Problem::malformed("the request line begins with no method"))?;
    let http_11 = match version {
        b"HTTP/1.1" => true,
        b"HTTP/1.0" => false,
        [b'H', b'T', b'T', b'P', b'/', ..] => {
            return Err(Problem::new(
                StatusCode::HTTP_VERSION_NOT_SUPPORTED,
                "http_protocol_error",
                "aditd speaks HTTP/1.1 and HTTP/1.0",
                "ask in one of these, or in HTTP/2 from the connection's first byte on",
            ));
        }
        _ => {
            return Err(Problem::malformed(
                "the request line ends with no version of HTTP",
            ));
        }
    };
    let target = carried(&method, target)?;
    Ok((method, target, http_11))
}

/// Checks a target, and spells it as it is carried.
fn carried(method: &Method, target: &[u8]) -> Result<Target, Problem> {
    // `scheme://authority` ahead of path and query.
    let scheme = target.windows(3).position(|w| w == b"://");
    let authority = match scheme {
        Some(at) if target.iter().position(|b| b"/?#".contains(b)) == Some(at + 1) => at + 3,
        _ => 0,
    };
    let path = target[authority..]
        .iter()
        .position(|b| b"/?#".contains(b))
        .map_or(target.len(), |at| authority + at);
    if method == Method::CONNECT && (authority > 0 || path < target.len()) {
        return Err(Problem::malformed("CONNECT names VM:PORT and nothing else"));
    }
    if let Some(byte) = target[..path].iter().find(|&&b| !may_name(b)) {
        return Err(Problem::malformed(format!(
            "the target has {} where it names a host",
            shown(*byte)
        )));
    }
    let utf8 = std::str::from_utf8(&target[path..]).is_ok();
    let mut carried = target[..path].to_vec();
    for &byte in &target[path..] {
        if matches!(byte, b'"' | b'<' | b'>' | b'`') || (byte >= 0x80 && !utf8) {
            carried.extend_from_slice(format!("%{byte:02X}").as_bytes());
        } else {
            carried.push(byte);
        }
    }
    match Uri::try_from(&carried[..]) {
        Ok(_) => Ok(Target {
            text: carried,
            no_path: authority > 0 && path == target.len(),
        }),
        Err(e) => {
            let target = String::from_utf8_lossy(target);
            let target: String = target.chars().take(80).collect();
            Err(Problem::malformed(format!("`{target}` is no target: {e}")))
        }
    }
}

/// What may be in a scheme, a user, a host, a port, and `*`.
pub(in crate::proxy) fn may_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:@[]%/".contains(&byte)
}

/// A byte as people know it.
pub(in crate::proxy) fn shown(byte: u8) -> String {
    if byte.is_ascii_graphic() {
        format!("`{}`", char::from(byte))
    } else {
        format!("the byte 0x{byte:02x}")
    }
}

/// What body the fields announce.
fn framing(fields: &[httparse::Header<'_>], http_11: bool) -> Result<Body, Problem> {
    let bad = |why: &str| Err(Problem::malformed(why));
    let mut lengths = fields.iter().filter(|f| is(f, "content-length"));
    let mut codings = fields.iter().filter(|f| is(f, "transfer-encoding"));
    match (lengths.next(), codings.next()) {
        (None, None) => Ok(Body::Length(0)),
        (Some(_), Some(_)) => {
            bad("both Content-Length and Transfer-Encoding say where the body ends")
        }
        (Some(length), None) => {
            if lengths.next().is_some() {
                return bad("Content-Length is there twice");
            }
            let digits = value(length);
            let text = std::str::from_utf8(digits).ok();
            let digits = text.filter(|t| t.bytes().all(|b| b.is_ascii_digit()));
            match digits.and_then(|t| t.parse().ok()) {
                // hyper keeps the highest numbers for itself.
                Some(length) if length <= u64::MAX >> 1 => Ok(Body::Length(length)),
                _ => bad("Content-Length is no number"),
            }
        }
        (None, Some(coding)) => {
            if !http_11 {
                return bad("a request of HTTP/1.0 has no Transfer-Encoding");
            }
            if codings.next().is_some() {
                return bad("Transfer-Encoding is there twice");
            }
            let text = value(coding).to_ascii_lowercase();
            let mut of_text = text.split(|&b| b == b',').map(<[u8]>::trim_ascii);
            match (of_text.next_back(), of_text.next_back()) {
                (Some(b"chunked"), None) => Ok(Body::chunked()),
                (Some(b"chunked"), Some(b"chunked" | b"")) => {
                    bad("Transfer-Encoding has `chunked` twice")
                }
                (Some(b"chunked"), Some(_)) => Err(Problem::new(
                    StatusCode::NOT_IMPLEMENTED,
                    "http_request_error",
                    "of transfer codings aditd knows `chunked` only",
                    "send the body `chunked`, or with Content-Length",
                )),
                _ => bad("Transfer-Encoding does not end with `chunked`"),
            }
        }
    }
}

/// Checks that one host is named, if any.
fn host(fields: &[httparse::Header<'_>], http_11: bool) -> Result<(), Problem> {
    let mut hosts = fields.iter().filter(|f| is(f, "host"));
    let Some(host) = hosts.next() else {
        return if http_11 {
            Err(Problem::malformed(
                "the request has no Host field, which HTTP/1.1 needs",
            ))
        } else {
            Ok(())
        };
    };
    if hosts.next().is_some() {
        return Err(Problem::malformed("Host is there twice"));
    }
    if let Some(byte) = value(host)
        .iter()
        .find(|&&b| !may_name(b) || b"/@,".contains(&b))
    {
        let why = format!("Host has {}, which no host has", shown(*byte));
        return Err(Problem::malformed(why));
    }
    Ok(())
}

fn is(field: &httparse::Header<'_>, name: &str) -> bool {
    field.name.eq_ignore_ascii_case(name)
}

/// A field's value without the spaces around it.
fn value<'a>(field: &httparse::Header<'a>) -> &'a [u8] {
    field.value.trim_ascii()
}

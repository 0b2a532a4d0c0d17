//! Why a client is not taken to a VM, as an answer: status, `Proxy-Status` (RFC 9209), a line of cause and one of remedy.

use adit_channel::refusal::Code;
use bytes::Bytes;
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Response, StatusCode};

/// What this proxy calls itself.
pub const NAME: &str = "adit-proxy";
/// Most characters of a text that another has written.
const SHOWN_MAX: usize = 600;

/// A body that is passed on.
pub type Body = BoxBody<Bytes, hyper::Error>;

/// Why not.
#[derive(Clone, Debug)]
pub struct Problem {
    pub status: StatusCode,
    /// The error type of RFC 9209.
    error: &'static str,
    cause: String,
    remedy: String,
}

impl Problem {
    pub fn new(status: StatusCode, error: &'static str, cause: impl ToString) -> Self {
        Self {
            status,
            error,
            cause: cause.to_string(),
            remedy: String::new(),
        }
    }

    pub fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = remedy.into();
        self
    }

    /// No host has the VM.
    pub fn unknown(name: &str) -> Self {
        let cause = format!("no host that the server knows has a VM named `{name}`");
        Self::new(StatusCode::NOT_FOUND, "destination_not_found", cause).remedy(
            "`adit vm ls --all-hosts` lists the names; `adit resolve` says what each host claims",
        )
    }

    /// What people read.
    fn lines(&self) -> String {
        let (cause, remedy) = (shown(&self.cause), shown(&self.remedy));
        match remedy.is_empty() {
            true => format!("{cause}\n"),
            false => format!("{cause}\n{remedy}\n"),
        }
    }

    fn proxy_status(&self) -> String {
        let quoted = shown(&self.cause)
            .replace('\\', "\\\\")
            .replace('"', "\\\"");
        // A string of RFC 8941 has no other characters.
        let quoted: String = quoted.chars().filter(|c| c.is_ascii()).collect();
        format!("{NAME}; error={}; details=\"{quoted}\"", self.error)
    }

    /// The answer as bytes of HTTP/1.1, for a client that is not served at all.
    pub fn text(&self) -> String {
        let text = self.lines();
        format!(
            "HTTP/1.1 {}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {}\r\nConnection: close\r\n\
             Proxy-Status: {}\r\n\r\n{text}",
            self.status,
            text.len(),
            self.proxy_status(),
        )
    }

    /// The answer.
    pub fn response(&self) -> Response<Body> {
        let text = self.lines();
        let mut response = Response::new(whole(text));
        *response.status_mut() = self.status;
        let head = response.headers_mut();
        head.insert(
            CONTENT_TYPE,
            HeaderValue::from_static("text/plain; charset=utf-8"),
        );
        if let Ok(status) = HeaderValue::from_str(&self.proxy_status()) {
            head.insert("proxy-status", status);
        }
        response
    }

    /// The same for protocols that have words of their own for it.
    pub fn code(&self) -> Code {
        code(self.status)
    }
}

/// A text that another may have written.
fn shown(text: &str) -> String {
    adit_names::escape(text).at_most(SHOWN_MAX).to_string()
}

/// What an answer's status says.
pub fn code(status: StatusCode) -> Code {
    match status.as_u16() {
        404 => Code::UnknownVm,
        409 => Code::Ambiguous,
        403 | 407 => Code::NotAllowed,
        504 => Code::NoAnswer,
        502 | 503 => Code::NoSession,
        _ => Code::Internal,
    }
}

/// A body that is all there.
pub fn whole(text: impl Into<Bytes>) -> Body {
    Full::new(text.into())
        .map_err(|never| match never {})
        .boxed()
}

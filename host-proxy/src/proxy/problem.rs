//! Failures are answers: a status, a `Proxy-Status` (RFC 9209) for programs, and for people a line of why and a line of what to do.
//!
//! What a [`Refusal`] becomes is one table, `of_code`, and [`remedy::of`]. Everything else here is about HTTP itself.

use adit_channel::refusal::{Code, Refusal};
use adit_names::VmId;
use bytes::Bytes;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::header::{CONNECTION, CONTENT_TYPE, HeaderValue, PROXY_AUTHENTICATE, RETRY_AFTER};
use hyper::{Response, StatusCode};

use crate::reach::DestinationError;
use crate::remedy;

/// What breaks a body off.
pub type BodyError = Box<dyn std::error::Error + Send + Sync>;
/// Body of every answer, and of every request on its way to a VM.
pub type Body = BoxBody<Bytes, BodyError>;

/// A failed request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// HTTP status.
    pub status: StatusCode,
    /// Error type of RFC 9209 §2.3.
    pub error: &'static str,
    /// What and why.
    pub detail: String,
    /// What to do about it.
    pub remedy: &'static str,
    /// Seconds after which it may go better.
    pub retry_after: Option<u32>,
    /// The other host that says so, and this one.
    pub hosts: Option<Box<[String; 2]>>,
}

/// What whoever wrote a request can do that is none.
const WRITE_A_REQUEST: &str = "the program that asks is at fault: it is to ask for http://VM/path or CONNECT VM:PORT, as curl does with `curl -x`";
/// What can be done where a name or a port is none.
const WRITE_A_NAME: &str = "write VM, VM.HOST or SERVICE.VM.svc, and a port from 1 to 65535; `adit vm ls` on the host lists its VMs";

impl Problem {
    /// Makes one that will not go better by itself.
    pub fn new(
        status: StatusCode,
        error: &'static str,
        detail: impl Into<String>,
        remedy: &'static str,
    ) -> Self {
        Self {
            status,
            error,
            detail: detail.into(),
            remedy,
            retry_after: None,
            hosts: None,
        }
    }

    /// The same, said by another host, if there is one: the answer names both.
    #[must_use]
    pub fn of(self, there: Option<&VmId>, here: Option<&VmId>) -> Self {
        // Of what nobody may know of, nobody learns where it is.
        let there = there.filter(|_| self.error != "destination_not_found");
        let hosts = there.map(|there| Box::new([item(Some(there)), item(here)]));
        Self { hosts, ..self }
    }

    fn proxy_status(&self) -> String {
        let status = |who: &str| proxy_status(who, self.error, &self.detail);
        match self.hosts.as_deref() {
            Some([there, here]) => format!("{}, {here}", status(there)),
            None => status("adit"),
        }
    }

    /// A request that is none.
    pub fn malformed(detail: impl Into<String>) -> Self {
        let status = StatusCode::BAD_REQUEST;
        Self::new(status, "http_request_error", detail, WRITE_A_REQUEST)
    }

    /// The same with another remedy.
    #[must_use]
    pub fn remedy(self, remedy: &'static str) -> Self {
        Self { remedy, ..self }
    }

    /// The same as bytes of HTTP/1.1, for a client that is not served at all.
    pub fn text(&self) -> String {
        let text = self.lines();
        let retry = self
            .retry_after
            .map(|seconds| format!("Retry-After: {seconds}\r\n"));
        format!(
            "HTTP/1.1 {}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {}\r\nConnection: close\r\n\
             {}Proxy-Status: {}\r\n\r\n{text}",
            self.status,
            text.len(),
            retry.unwrap_or_default(),
            self.proxy_status(),
        )
    }

    /// Why, and what to do: a line each.
    fn lines(&self) -> String {
        // Part of it may be a guest's, and the reader a terminal (R72).
        format!("{}\n{}\n", adit_names::escape(&self.detail), self.remedy)
    }

    /// The answer.
    pub fn response(&self) -> Response<Body> {
        let text = self.lines();
        let mut response = Response::new(Full::from(text).map_err(|never| match never {}).boxed());
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(
            CONTENT_TYPE,
            HeaderValue::from_static("text/plain; charset=utf-8"),
        );
        // What follows a refused CONNECT is meant for the tunnel and must not be read as a request (R66).
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
        if let Ok(value) = HeaderValue::from_str(&self.proxy_status()) {
            headers.insert("proxy-status", value);
        }
        if let Some(seconds) = self.retry_after {
            headers.insert(RETRY_AFTER, seconds.into());
        }
        if self.status == StatusCode::PROXY_AUTHENTICATION_REQUIRED {
            // curl and wget show a password only where they are asked for one; programs with a token say `Bearer`.
            for scheme in [
                "Basic realm=\"adit\", charset=\"UTF-8\"",
                "Bearer realm=\"adit\"",
            ] {
                headers.append(PROXY_AUTHENTICATE, HeaderValue::from_static(scheme));
            }
        }
        response
    }
}

/// What a client hears of each code: the status, and the error type of RFC 9209.
fn of_code(code: Code) -> (StatusCode, &'static str) {
    use StatusCode as S;
    match code {
        Code::UnknownVm => (S::NOT_FOUND, "destination_not_found"),
        Code::Ambiguous => (S::CONFLICT, "destination_not_found"),
        Code::NotAllowed | Code::Denied | Code::UnknownService => {
            (S::FORBIDDEN, "http_request_denied")
        }
        Code::Locked | Code::NoPortProcess | Code::NoSession | Code::NoAgent | Code::SilentHost => {
            (S::SERVICE_UNAVAILABLE, "destination_unavailable")
        }
        Code::TooOften => (S::TOO_MANY_REQUESTS, "connection_limit_reached"),
        Code::Busy => (S::SERVICE_UNAVAILABLE, "connection_limit_reached"),
        Code::NoAnswer | Code::DialTimedOut => (S::GATEWAY_TIMEOUT, "connection_timeout"),
        Code::Reset => (S::BAD_GATEWAY, "connection_terminated"),
        Code::Foreign => (S::BAD_GATEWAY, "http_protocol_error"),
        Code::NoListener | Code::DialFailed | Code::Version | Code::WrongVm | Code::Other(_) => {
            (S::BAD_GATEWAY, "connection_refused")
        }
        // Of a file that a guest is sent, which no front end of the proxy does.
        Code::TooLarge | Code::NoSpace | Code::Mismatch => (S::BAD_GATEWAY, "connection_refused"),
        Code::Internal => (S::INTERNAL_SERVER_ERROR, "proxy_internal_error"),
    }
}

impl From<Refusal> for Problem {
    fn from(refusal: Refusal) -> Self {
        let (status, error) = of_code(refusal.code());
        Self {
            retry_after: refusal.retry_after(),
            ..Self::new(status, error, refusal.text(), remedy::of(refusal.code()))
        }
    }
}

impl From<DestinationError> for Problem {
    fn from(e: DestinationError) -> Self {
        match e {
            DestinationError::BadName { .. } => {
                Self::from(Refusal::new(Code::UnknownVm, e.to_string())).remedy(WRITE_A_NAME)
            }
            e => Self::malformed(e.to_string()).remedy(WRITE_A_NAME),
        }
    }
}

/// A host as RFC 9209 has it: the name of its proxy. One that begins with a digit is no token there.
fn item(host: Option<&VmId>) -> String {
    match host {
        Some(host) if host.as_str().starts_with(|c: char| c.is_ascii_digit()) => {
            format!("\"{host}\"")
        }
        Some(host) => host.to_string(),
        None => "adit".into(),
    }
}

/// The `Proxy-Status` of an answer that has come by way of another host; none: it has not.
pub fn both(there: Option<&VmId>, here: Option<&VmId>) -> Option<HeaderValue> {
    let there = item(Some(there?));
    HeaderValue::from_str(&format!("{there}, {}", item(here))).ok()
}

/// `adit; error=TYPE; details="…"`: an sf-string has printable ASCII only (RFC 8941 §3.3.3).
fn proxy_status(who: &str, error: &str, details: &str) -> String {
    let safe: String = details
        .chars()
        .take(256)
        .map(|c| {
            if c == ' ' || c.is_ascii_graphic() {
                c
            } else {
                '?'
            }
        })
        .collect();
    format!(
        "{who}; error={error}; details=\"{}\"",
        safe.replace('\\', "\\\\").replace('"', "\\\"")
    )
}

#[cfg(test)]
mod tests;

//! Failures are answers: a status, a `Proxy-Status` (RFC 9209) for programs and one line for people.

use adit_channel::hello;
use adit_port::control::{DialError, DialFailed};
use bytes::Bytes;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::header::{CONNECTION, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use hyper::{Response, StatusCode};

use super::authority::{AuthorityError, Destination};

/// Body of every answer.
pub type Body = BoxBody<Bytes, hyper::Error>;

/// A failed request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// HTTP status.
    pub status: StatusCode,
    /// Error type of RFC 9209 §2.3.
    pub error: &'static str,
    /// What and why.
    pub detail: String,
    /// Seconds after which it may go better.
    pub retry_after: Option<u32>,
}

impl Problem {
    /// Makes one that will not go better by itself.
    pub fn new(status: StatusCode, error: &'static str, detail: impl Into<String>) -> Self {
        Self {
            status,
            error,
            detail: detail.into(),
            retry_after: None,
        }
    }

    fn later(status: StatusCode, error: &'static str, detail: impl Into<String>) -> Self {
        Self {
            retry_after: Some(1),
            ..Self::new(status, error, detail)
        }
    }

    /// A request that is none.
    pub fn malformed(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "http_request_error", detail)
    }

    /// Somebody has all that may be had of something right now.
    pub fn busy(detail: impl Into<String>) -> Self {
        Self::later(
            StatusCode::SERVICE_UNAVAILABLE,
            "connection_limit_reached",
            detail,
        )
    }

    /// The VM has no channel right now.
    pub fn no_channel(vm: &str, why: &str) -> Self {
        Self::later(
            StatusCode::SERVICE_UNAVAILABLE,
            "destination_unavailable",
            format!("VM `{vm}`: {why}"),
        )
    }

    /// What a failed dial means to the client.
    pub fn of_dial(to: &Destination, failed: &DialFailed) -> Self {
        use StatusCode as S;
        let said = |text: &str| format!("VM `{}` port {}: {text}", to.vm, to.port);
        let text = said(if failed.text.is_empty() {
            "dial failed"
        } else {
            &failed.text
        });
        match failed.error {
            DialError::NoSession => {
                Self::no_channel(to.vm.as_str(), "its guest is not up (no driver, or no VMM)")
            }
            DialError::Refused if matches!(to.target, adit_port::control::Target::Service(_)) => {
                Self::no_channel(
                    to.vm.as_str(),
                    "no agent listens in the guest: is adit-guest running?",
                )
            }
            DialError::Refused => Self::new(
                S::BAD_GATEWAY,
                "connection_refused",
                said("nobody listens there"),
            ),
            DialError::Timeout => Self::new(S::GATEWAY_TIMEOUT, "connection_timeout", text),
            DialError::Reset => Self::new(S::BAD_GATEWAY, "connection_terminated", text),
            DialError::Foreign => Self::new(S::BAD_GATEWAY, "http_protocol_error", text),
            DialError::Busy => {
                Self::later(S::SERVICE_UNAVAILABLE, "connection_limit_reached", text)
            }
            DialError::HelloRefused => Self::of_refusal(failed, text),
        }
    }

    fn of_refusal(failed: &DialFailed, text: String) -> Self {
        use StatusCode as S;
        let is = |s: hello::Status| failed.status == s as u16;
        if is(hello::Status::Denied) || is(hello::Status::UnknownService) {
            Self::new(S::FORBIDDEN, "http_request_denied", text)
        } else if is(hello::Status::Busy) {
            Self::later(S::SERVICE_UNAVAILABLE, "connection_limit_reached", text)
        } else if i32::from(failed.errno) == libc::ETIMEDOUT {
            Self::new(S::GATEWAY_TIMEOUT, "connection_timeout", text)
        } else {
            Self::new(S::BAD_GATEWAY, "connection_refused", text)
        }
    }

    /// The same as bytes of HTTP/1.1, for a client that is not served at all.
    pub fn text(&self) -> String {
        let line = self.line();
        let retry = self
            .retry_after
            .map(|seconds| format!("Retry-After: {seconds}\r\n"));
        format!(
            "HTTP/1.1 {}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {}\r\nConnection: close\r\n\
             {}Proxy-Status: {}\r\n\r\n{line}",
            self.status,
            line.len(),
            retry.unwrap_or_default(),
            proxy_status(self.error, &self.detail),
        )
    }

    fn line(&self) -> String {
        // Part of it may be a guest's, and the reader a terminal (R72).
        format!("{}\n", adit_names::escape(&self.detail))
    }

    /// The answer.
    pub fn response(&self) -> Response<Body> {
        let line = self.line();
        let mut response = Response::new(Full::from(line).map_err(|never| match never {}).boxed());
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(
            CONTENT_TYPE,
            HeaderValue::from_static("text/plain; charset=utf-8"),
        );
        // What follows a refused CONNECT is meant for the tunnel and must not be read as a request (R66).
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
        if let Ok(value) = HeaderValue::from_str(&proxy_status(self.error, &self.detail)) {
            headers.insert("proxy-status", value);
        }
        if let Some(seconds) = self.retry_after {
            headers.insert(RETRY_AFTER, seconds.into());
        }
        response
    }
}

impl From<AuthorityError> for Problem {
    fn from(e: AuthorityError) -> Self {
        match e {
            AuthorityError::BadName { .. } => Self::new(
                StatusCode::NOT_FOUND,
                "destination_not_found",
                e.to_string(),
            ),
            e => Self::new(StatusCode::BAD_REQUEST, "http_request_error", e.to_string()),
        }
    }
}

/// `adit; error=TYPE; details="…"`: an sf-string has printable ASCII only (RFC 8941 §3.3.3).
fn proxy_status(error: &str, details: &str) -> String {
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
        "adit; error={error}; details=\"{}\"",
        safe.replace('\\', "\\\\").replace('"', "\\\"")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn details_stay_inside_their_quotes() {
        let p = Problem::new(
            StatusCode::NOT_FOUND,
            "destination_not_found",
            "a\"b\\c\r\nX: y\u{e9}",
        );
        let value = p.response().headers()["proxy-status"]
            .to_str()
            .unwrap()
            .to_owned();
        assert_eq!(
            value,
            r#"adit; error=destination_not_found; details="a\"b\\c??X: y?""#
        );
    }
}

//! Why there is no tunnel.

use std::io;
use std::time::Duration;

use super::Address;
use crate::error::Failure;

/// Most characters of a line that a proxy says.
const LINE_MAX: usize = 300;

/// Why there is no tunnel.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    /// Nobody listens there, or this user may not connect.
    #[error("cannot reach the proxy at {proxy}")]
    Unreachable { proxy: Address, source: io::Error },
    /// Time is up.
    #[error("the proxy at {proxy} {doing} within {limit:?}")]
    Late {
        proxy: String,
        doing: &'static str,
        limit: Duration,
    },
    /// The connection ended before there was an answer.
    #[error("the proxy at {proxy} has hung up without an answer")]
    Ended { proxy: String, why: io::Error },
    /// What answers there is no proxy.
    #[error("what listens at {proxy} is no proxy: {what}")]
    NotAProxy { proxy: String, what: String },
    /// The proxy says no.
    #[error("{}", refused(to, *status, said))]
    Refused {
        to: String,
        status: u16,
        /// Why, and then what to do.
        said: Vec<String>,
    },
}

fn refused(to: &str, status: u16, said: &[String]) -> String {
    match said.first() {
        Some(why) => format!("no tunnel to {to} ({status}): {}", line(why)),
        None => format!("no tunnel to {to}: the proxy answers {status}, and says no more"),
    }
}

/// A line of the proxy's, as much as is shown of it. What is printed is escaped where it is printed.
fn line(text: &str) -> String {
    text.chars().take(LINE_MAX).collect()
}

impl From<TunnelError> for Failure {
    fn from(e: TunnelError) -> Self {
        let text = e.to_string();
        match e {
            TunnelError::Unreachable { proxy, source } => {
                Self::new("unreachable", format!("{text}: {source}")).help(unreachable(&proxy, &source))
            }
            TunnelError::Late { .. } => Self::timeout(text),
            TunnelError::Ended { why, .. } => {
                let why = match why.kind() {
                    io::ErrorKind::UnexpectedEof => String::new(),
                    _ => format!(": {why}"),
                };
                Self::new("cut-off", format!("{text}{why}"))
            }
            TunnelError::NotAProxy { .. } => Self::new("bad-answer", text)
                .help("name aditd's proxy with --proxy or ADIT_PROXY; /run/adit/proxy.addr has its address"),
            TunnelError::Refused { status, said, .. } => {
                let code = match status {
                    403 | 407 => "not-allowed",
                    404 => "unknown-vm",
                    502 => "refused",
                    503 => "unavailable",
                    504 => "no-answer",
                    _ => "http",
                };
                let help: Vec<String> = said.iter().skip(1).map(|l| line(l)).collect();
                Self::new(code, text).help(help.join("; "))
            }
        }
    }
}

fn unreachable(proxy: &Address, e: &io::Error) -> &'static str {
    match (proxy, e.kind()) {
        (Address::Unix(_), io::ErrorKind::PermissionDenied) => "this user may not use that socket",
        _ => {
            "start aditd with `systemctl start aditd`, or name its proxy with --proxy or ADIT_PROXY"
        }
    }
}

//! Why there is no answer, or not the one that was asked for.

use std::error::Error;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use adit_api::ErrorBody;

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// There is no aditd at the socket, or this user may not use it.
    #[error("cannot reach aditd at {}", socket.display())]
    Unreachable {
        /// The socket.
        socket: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// There is no aditd at the address, as far as the network says.
    #[error("cannot reach aditd at {server}")]
    NoServer {
        /// Its address.
        server: String,
        /// What the system says.
        source: io::Error,
    },
    /// Whoever answers at the address is not the aditd that is meant. Nothing was asked of it.
    #[error("whatever answers at {server} is not believed: {why}")]
    Untrusted {
        /// Its address.
        server: String,
        /// Why.
        why: String,
        /// What to do about it.
        help: &'static str,
    },
    /// What answers is aditd's, and a listener of its proxy: the API is elsewhere.
    #[error("what answers there is a proxy of aditd, and not its API")]
    Proxy,
    /// aditd did not answer in time. It may still do what was asked.
    #[error("aditd takes connections, but has not answered for {limit:?}")]
    Late {
        /// How long it had.
        limit: Duration,
    },
    /// The connection ended before an answer began.
    #[error("aditd did not answer")]
    NoAnswer(#[source] hyper::Error),
    /// The connection ended within the answer, or the answer is too long.
    #[error("aditd's answer was cut off")]
    CutOff(#[source] Box<dyn Error + Send + Sync>),
    /// The connection ended within a stream.
    #[error("aditd went away")]
    WentAway(#[source] hyper::Error),
    /// A line of a stream is longer than an answer may be.
    #[error("aditd sent a line without end")]
    Line,
    /// aditd refused, and said why.
    #[error("{}", said.message)]
    Refused {
        /// Status code.
        status: u16,
        /// What it said.
        said: ErrorBody,
    },
    /// aditd refused without a word of its own.
    #[error("aditd answered {0}")]
    Status(u16),
    /// The caller's fault: no path that HTTP has.
    #[error("`{path}` cannot be the path of a request")]
    Path {
        /// The path.
        path: String,
        /// What is wrong with it.
        source: hyper::http::Error,
    },
    /// The caller's fault: no value that JSON has.
    #[error("the request cannot be written as JSON")]
    Body(#[source] serde_json::Error),
    /// The answer is not what this build knows.
    #[error("aditd's answer is not understood")]
    Answer(#[source] serde_json::Error),
    /// A list of aditd's names the same page again.
    #[error("the pages of aditd's list do not go on")]
    Pages,
}

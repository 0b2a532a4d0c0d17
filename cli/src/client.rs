//! How the command line says that a request to aditd failed.

use std::io;
use std::path::Path;
use std::time::Duration;

use adit_client::ClientError;

use crate::error::Failure;

pub use adit_client::Client;

/// How long aditd may take to answer if nobody says otherwise.
pub const REQUEST_LIMIT: Duration = Duration::from_secs(60);

impl From<ClientError> for Failure {
    fn from(e: ClientError) -> Self {
        let said = e.to_string();
        match e {
            ClientError::Unreachable { socket, source } => unreachable(&socket, &source),
            ClientError::NoServer { server, source } => {
                let message = format!("cannot reach aditd at {server}: {source}");
                Self::new("unreachable", message)
                    .help("check that its host runs, and that its aditd.toml has a [[listen]] with `role = \"management\"` there")
            }
            ClientError::Untrusted { help, .. } => Self::new("untrusted-server", said).help(help),
            ClientError::Proxy => Self::new("not-the-api", said)
                .help("--server takes the port of a [[listen]] with `role = \"management\"` in the aditd.toml of its host"),
            ClientError::Late { .. } => Self::new("unreachable", said)
                .help("it may still do what was asked; look at `systemctl status aditd` and `journalctl -u aditd`, or give it longer with --request-timeout"),
            ClientError::NoAnswer(why) => Self::new(
                "cut-off",
                format!("{said}: {}", adit_print::with_causes(&why)),
            )
            .help("look at `journalctl -u aditd` on its host; --server takes the port of a [[listen]] with `role = \"management\"`"),
            ClientError::CutOff(why) => Self::new("cut-off", format!("{said}: {why}")),
            ClientError::WentAway(why) => Self::new("cut-off", format!("{said}: {why}"))
                .help("what was accepted is on its disk: run the command again"),
            ClientError::Line => Self::new("cut-off", said),
            ClientError::Refused { status, said } => {
                let code = if status == 408 { "timeout" } else { &said.code };
                let help = match code {
                    // It has no advice for what it does not know.
                    "unknown-path" => "this aditd is of a version before this adit: compare `adit version` and `aditd --version`",
                    _ => &said.help,
                };
                Self::new(code, said.message).help(help)
            }
            ClientError::Status(_) => Self::new("http", said),
            ClientError::Path { source, .. } => Self::new("usage", format!("{said}: {source}")),
            ClientError::Body(why) => Self::new("internal", format!("{said}: {why}")),
            ClientError::Answer(why) => {
                let why = adit_tasks::plain(&why.to_string());
                Self::new("bad-answer", format!("{said}: {why}"))
                    .help("adit and aditd should be of one version: compare `adit version` and `aditd --version`")
            }
            ClientError::Pages => Self::new("bad-answer", said),
        }
    }
}

fn unreachable(socket: &Path, e: &io::Error) -> Failure {
    let help = match e.kind() {
        io::ErrorKind::NotFound => {
            "start it with `aditd run` (or `systemctl start aditd`), or name its socket with --socket or ADIT_SOCKET"
        }
        io::ErrorKind::ConnectionRefused => {
            "the socket is left over from an aditd that ended: start it again with `aditd run`"
        }
        io::ErrorKind::PermissionDenied => {
            "only the user that aditd runs as may use its socket (mode 0600): try it as root"
        }
        _ => "check that aditd runs",
    };
    let message = format!("cannot reach aditd at {}: {e}", socket.display());
    let mut failure = Failure::new("unreachable", message);
    failure.passing = e.kind() != io::ErrorKind::PermissionDenied;
    failure.help(help)
}

//! The connection of a copy: what waits in its calls is on a thread of its own, and this side of it a socket that is pumped.

use std::os::unix::net::UnixStream;

use adit_files::tree::{Fault, Stream};
use adit_files::{Asked, What, refusal};
use tokio::io::copy_bidirectional_with_sizes;
use tokio::task::AbortHandle;

use super::place::Remote;
use crate::client::Client;
use crate::error::Failure;
use crate::exec::{OWN, WAY};

/// What the connection becomes.
const PROTOCOL: &str = "adit-files";
/// Bytes that are moved at once.
const PIECE: usize = 256 << 10;

/// Opens a stream to a VM's service `files`. It ends when the task that pumps it is aborted.
pub(super) async fn open(
    client: &Client,
    (vm, user): (&str, &str),
    (what, path): (What, &str),
) -> Result<(Stream, AbortHandle), Failure> {
    let asked = Asked {
        user: user.to_owned(),
        what,
        path: path.to_owned(),
        under: 0,
    };
    if asked.encode().is_none() {
        let text = "the user or the path is too long, or no text that a path may be";
        return Err(Failure::new("usage", text).with_status(OWN));
    }
    let mut query = form_urlencoded::Serializer::new(String::new());
    query.append_pair("user", user);
    query.append_pair(
        "do",
        match what {
            What::Read => "read",
            What::Write => "write",
            What::List => "list",
            What::Stat => "stat",
            What::Remove { all: false } => "remove",
            What::Remove { all: true } => "remove-all",
            What::Wait => "wait",
        },
    );
    query.append_pair("path", path);
    let at = format!("{}/files?{}", crate::vm::path(vm)?, query.finish());
    let mut io = client.upgrade(&at, PROTOCOL).await?;
    let local = |e| Failure::io("cannot make a pair of sockets", &e);
    let (ours, theirs) = UnixStream::pair().map_err(local)?;
    theirs.set_nonblocking(true).map_err(local)?;
    let mut theirs = tokio::net::UnixStream::from_std(theirs).map_err(local)?;
    let pump = tokio::spawn(async move {
        // An end that is no order is one for the other side of the pair, too.
        let _ = copy_bidirectional_with_sizes(&mut io, &mut theirs, PIECE, PIECE).await;
    });
    let stream = Stream::new(ours.into()).map_err(local)?;
    Ok((stream, pump.abort_handle()))
}

/// What a place is called in messages.
pub(super) fn shown(place: &Remote) -> String {
    format!("{}:{}", place.vm, place.path)
}

/// A fault as a failed command.
pub(super) fn failure(fault: &Fault) -> Failure {
    let (reason, is_theirs) = match fault {
        Fault::Cut(_) => {
            return Failure::new("broken-off", fault.to_string())
                .help("the same with --resume goes on where it broke off")
                .with_status(WAY);
        }
        Fault::Violation(_) | Fault::Wire(_) => (refusal::VIOLATION, true),
        Fault::Refused(refused) => (refused.reason, true),
        Fault::Local(refused) => (refused.reason, false),
    };
    let (code, help) = match reason {
        refusal::DENIED if is_theirs => (
            "denied",
            "the guest's owner says which files may be read and written: `adit-guest policy explain files …` in the guest",
        ),
        refusal::DENIED => ("denied", ""),
        refusal::NO_USER => ("unknown-user", ""),
        refusal::NOT_FOUND => ("unknown-file", ""),
        refusal::BUSY => ("busy", "wait until the other copy is over"),
        refusal::NO_SPACE => ("no-space", "nothing half is left under its name"),
        refusal::READ_ONLY => ("read-only", ""),
        refusal::LINK => ("link", "name where it leads"),
        refusal::KIND => ("wrong-kind", ""),
        refusal::CHANGED => ("changed", "copy it again when nobody writes to it"),
        refusal::VIOLATION => ("bad-guest", ""),
        refusal::UNREACHABLE => {
            return Failure::new("unreached", fault.to_string())
                .help("`adit doctor VM` says what is wrong")
                .with_status(WAY);
        }
        _ => ("refused", ""),
    };
    let side = if is_theirs { "the guest" } else { "here" };
    Failure::new(code, format!("{side}: {fault}"))
        .help(help)
        .with_status(OWN)
}

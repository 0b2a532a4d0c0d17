//! Guests whose VMM has a socket for each stream: which of the streams that such a guest dials is its agent's, and the key that the
//! agent gets.
//!
//! ```text
//! guest: hello {tasks, boot nonce N} ──► PATH_741 ──► aditd
//! aditd: hello {ping} ──► the guest's port 741, which only a privileged process listens on ──► accept {boot nonce M}
//!        N = M: the stream is the agent's, and gets a key; else it is anybody's
//! ```
//! Where the host's kernel carries the streams the first of these is not needed, because the guest's port is known.
//!
//! The nonce is random for each start of the agent, and the agent says it to the host only.

use std::io;
use std::time::Duration;

use adit_channel::hello::{Extensions, KEY_LEN, Open};
use adit_port::control::Target;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::Class;
use crate::link::{ClientEnd, Question};
use crate::vm::VmEntry;

/// A service that every agent has, and that reaches nothing.
const PING: &str = "ping";
const TRIED: &[u8] = b"half-close";
/// An agent that answers before the end has done so by then.
const EARLY: Duration = Duration::from_millis(300);
/// How long the agent may take to answer.
const LIMIT: Duration = Duration::from_secs(5);

/// Whose stream it is that begins with this hello.
pub(super) async fn class(vm: &VmEntry, open: &Open) -> Class {
    match agent_nonce(vm).await {
        Ok(nonce) if nonce == open.common.boot_nonce => Class::Agent,
        Ok(_) => Class::Anyone,
        Err(why) => {
            tracing::warn!(vm = %vm.name, why, "it is not known whose stream the guest has dialled");
            Class::Anyone
        }
    }
}

/// Tries whether the VMM passes half-closes on, where its configuration says so: the agent answers behind an end of ours, and a VMM that
/// takes the end for a close drops that.
pub(crate) async fn try_half_closes(vm: &VmEntry) {
    let tried = async {
        let (mut stream, _) = ping(vm, b"end").await?;
        let say = |e: io::Error| e.to_string();
        stream.write_all(TRIED).await.map_err(say)?;
        let early = tokio::time::timeout(EARLY, stream.readable()).await;
        if early.is_ok() {
            return Err("the agent is one that answers at once".to_owned());
        }
        stream.shutdown().await.map_err(say)?;
        let mut back = Vec::new();
        // Broken off is less than all of it, too.
        let _ = stream
            .take(2 * TRIED.len() as u64)
            .read_to_end(&mut back)
            .await;
        Ok(back == TRIED)
    };
    match tokio::time::timeout(LIMIT, tried).await {
        Ok(Ok(kept)) => vm.agent.half_closes_tried(kept),
        // The guest has gone, which says nothing of its VMM.
        Ok(Err(why)) => tracing::debug!(vm = %vm.name, why, "half-closes were not tried"),
        Err(_) => tracing::debug!(vm = %vm.name, "half-closes were not tried: no answer"),
    }
}

/// The boot nonce of whoever listens on the agent's port.
async fn agent_nonce(vm: &VmEntry) -> Result<[u8; 16], String> {
    // Ends the stream.
    ping(vm, b"").await.map(|(_, nonce)| nonce)
}

/// A stream to the agent's echo, and the boot nonce of whoever has answered.
async fn ping(vm: &VmEntry, arguments: &[u8]) -> Result<(UnixStream, [u8; 16]), String> {
    let link = vm.channel.link().ok_or("the port process has gone")?;
    let service = PING.parse().map_err(|_| "`ping` is no name")?;
    let question = Question {
        to: Target::Service(service),
        extensions: Extensions {
            arguments: arguments.to_vec().try_into().unwrap_or_default(),
            ..Extensions::default()
        },
        deadline: LIMIT,
        tag: None,
        note: None,
        limits: vec![],
    };
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(|e| e.to_string())?;
    let opened = link.opened(question, ClientEnd::Relayed(theirs.into()));
    let nonce = opened.await.map_err(|e| e.reason().text.clone())?;
    ours.set_nonblocking(true).map_err(|e| e.to_string())?;
    let ours = UnixStream::from_std(ours).map_err(|e| e.to_string())?;
    Ok((ours, nonce))
}

/// Draws a key for the VM's agent, and has its port process use it. None: it cannot.
pub(crate) async fn new_key(vm: &VmEntry) -> Option<[u8; KEY_LEN]> {
    let mut key = [0; KEY_LEN];
    getrandom::fill(&mut key).ok()?;
    let link = vm.channel.link()?;
    link.set_key(Some(key)).await.then_some(key)
}

/// The VM's agent knows no keys: it serves whoever dials it.
pub(crate) async fn no_key(vm: &VmEntry) {
    if let Some(link) = vm.channel.link() {
        link.set_key(None).await;
    }
}

//! What guests dial: the hello of a stream names a service, and that service serves the stream.
//!
//! ```text
//! the guest dialled ─► a slot of its class ─► hello ─► find ─► allow ─► accept ─► run
//!                      └─ none: closed        └──── refuse {why} ───┘
//! ```
//! Where the VMM has a socket for each stream, the guest's port is not told, and others can dial the guest too. Then a stream is the
//! agent's if its hello has the boot nonce that the listener on the guest's port 741 says, which is privileged (`keyed`); and the agent
//! is given a key, by which it knows our dials. Where the host's kernel carries the streams the port is told, and is worth as much as on our
//! own device: the guest's kernel says it, and gives a port below 1024 to nobody without CAP_NET_BIND_SERVICE; but others can dial the
//! guest there, so its agent is given a key, too.
//!
//! The VM is the one whose port process the stream came from; nothing that a hello says changes that. A service is a file in this
//! folder and a line of `SERVICES`. It gets the whole hello, so that arguments need no other way.

pub(crate) mod keyed;
pub mod tasks;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use adit_channel::hello::{self, Accept, Common, Hello, Open, Refuse};
use adit_channel::refusal::{Code, Refusal};
use adit_names::ServiceName;
use adit_passed::Passed;
use adit_port::control::Incoming;
use futures_util::future::BoxFuture;
use tokio::io::AsyncWriteExt;
use tokio::sync::Semaphore;

use crate::passing::Socket;
use crate::state::State;
use crate::vm::VmEntry;

/// All of them. Their order means nothing: no name belongs to two.
static SERVICES: [&dyn Service; 1] = [&tasks::Tasks];

/// In the guest, a port below this takes CAP_NET_BIND_SERVICE: no unprivileged process dials from one (R59).
const PRIVILEGED: u32 = 1024;
/// How long a guest may take for its hello.
const HELLO_LIMIT: Duration = Duration::from_secs(5);

/// What may run on a stream that a guest dialled.
pub trait Service: Sync {
    /// Its name as people write it, with its arguments: `tasks`, `expose:NAME`.
    fn form(&self) -> &'static str;

    /// Whether a name is its own.
    fn takes(&self, name: &ServiceName) -> bool;

    /// Whether this hello may have it.
    ///
    /// # Errors
    /// Why not.
    fn allow(&self, open: &Open, class: Class) -> Result<(), Refusal>;

    /// Bits of a hello's features that it knows.
    fn features(&self) -> u64 {
        0
    }

    /// Those that it knows besides where others can dial the guest, too.
    fn keyed_features(&self) -> u64 {
        0
    }

    /// Serves a stream whose hello was accepted. The features of its hello are those that both ends have. Dropped when the VM is removed.
    fn run(&self, call: Call, stream: Socket) -> BoxFuture<'static, io::Result<()>>;
}

/// A stream that a service is to serve.
pub struct Call {
    /// aditd's.
    pub state: Arc<State>,
    /// Who has dialled.
    pub vm: Arc<VmEntry>,
    /// What it said.
    pub open: Open,
    /// What its port process says of the stream.
    pub incoming: Incoming,
}

/// Who in the guest has dialled, as its port tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// A privileged process, as the agent is.
    Agent,
    /// Any process.
    Anyone,
}

impl Class {
    /// The class of a guest's port.
    pub fn of(peer_port: u32) -> Self {
        match peer_port < PRIVILEGED {
            true => Self::Agent,
            false => Self::Anyone,
        }
    }

    /// Counted separately: streams that any process of the guest can open must not keep the agent out.
    pub(super) fn slots(self, vm: &VmEntry) -> &Arc<Semaphore> {
        match self {
            Self::Agent => &vm.agent.streams,
            Self::Anyone => &vm.agent.other_streams,
        }
    }
}

/// Serves a stream that the guest dialled. If too many of its class are open, closes it.
pub fn accept(state: &Arc<State>, vm: &Arc<VmEntry>, incoming: Incoming, fd: Passed) {
    let slots = match vm.channel.hybrid() {
        Some(_) => &vm.agent.unknown_streams,
        // The host's kernel has it from the guest's, as our own device has.
        None => Class::of(incoming.peer_port).slots(vm),
    };
    let Ok(slot) = slots.clone().try_acquire_owned() else {
        tracing::debug!(vm = %vm.name, from = incoming.peer_port, "guest's stream closed: too many are open");
        return;
    };
    let (state, vm) = (state.clone(), vm.clone());
    tokio::spawn(async move {
        if let Err(e) = serve(&state, &vm, &incoming, fd).await {
            tracing::warn!(vm = %vm.name, error = %e, "guest's stream ended");
        }
        drop(slot);
    });
}

async fn serve(
    state: &Arc<State>,
    vm: &Arc<VmEntry>,
    incoming: &Incoming,
    fd: Passed,
) -> io::Result<()> {
    let mut stream = Socket::new(fd.unix_stream()?.into_inner()?, vm.channel.keeper.closer())?;
    let mut open = match tokio::time::timeout(HELLO_LIMIT, hello::read_async(&mut stream)).await {
        Ok(Ok(Hello::Open(open))) => open,
        Ok(Ok(_)) => {
            return Err(io::Error::other(
                "its first message is not an opening hello",
            ));
        }
        Ok(Err(e)) => return Err(e),
        Err(_) => return Err(io::ErrorKind::TimedOut.into()),
    };
    let common = Common {
        features: 0,
        epoch: vm.channel.epoch(),
        boot_nonce: state.boot_nonce,
    };
    let is_keyed = vm.channel.is_foreign();
    let class = match vm.channel.hybrid() {
        Some(_) => keyed::class(vm, &open).await,
        None => Class::of(incoming.peer_port),
    };
    let service = match choose(&SERVICES, &open, class) {
        Ok(service) => service,
        Err(refusal) => {
            tracing::warn!(vm = %vm.name, service = %open.service, from = incoming.peer_port, why = %refusal, "guest's stream refused");
            let refuse = Hello::Refuse(Refuse { common, refusal });
            return stream.write_all(&refuse.encode()).await;
        }
    };
    let version = hello::VERSION;
    let features = match is_keyed {
        true => service.features() | service.keyed_features(),
        false => service.features(),
    };
    open.common.features &= features;
    let common = Common {
        features: open.common.features,
        ..common
    };
    let accept = Hello::Accept(Accept { common, version });
    stream.write_all(&accept.encode()).await?;
    let (state, removed) = (state.clone(), vm.removed.clone());
    let vm = vm.clone();
    tokio::select! {
        result = service.run(Call { state, vm, open, incoming: incoming.clone() }, stream) => result,
        () = removed.cancelled() => Ok(()),
    }
}

/// The service that a hello asks for, if it may have it.
fn choose<'a>(
    services: &[&'a dyn Service],
    open: &Open,
    class: Class,
) -> Result<&'a dyn Service, Refusal> {
    if hello::choose_version(open).is_none() {
        return Err(Refusal::new(Code::Version, "no common version"));
    }
    let Some(service) = services.iter().find(|s| s.takes(&open.service)) else {
        let forms: Vec<_> = services.iter().map(|s| format!("`{}`", s.form())).collect();
        let text = format!("the host serves {} here", forms.join(", "));
        return Err(Refusal::new(Code::UnknownService, text));
    };
    service.allow(open, class)?;
    Ok(*service)
}

#[cfg(test)]
mod tests;

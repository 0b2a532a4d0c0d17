//! `tasks`: an agent's connection, one a VM. What is said on it is [`agent`]'s.

use std::io;
use std::sync::Arc;

use adit_channel::hello::Open;
use adit_channel::refusal::{Code, Refusal};
use adit_names::ServiceName;
use adit_port::control::Incoming;
use adit_tasks::wire;
use futures_util::future::BoxFuture;
use tokio_util::sync::CancellationToken;

use super::{Call, Class, Service};
use crate::agent;
use crate::passing::Socket;
use crate::vm::VmEntry;

/// The tasks service.
pub struct Tasks;

impl Service for Tasks {
    fn form(&self) -> &'static str {
        wire::SERVICE
    }

    fn takes(&self, name: &ServiceName) -> bool {
        name.as_str() == wire::SERVICE
    }

    fn allow(&self, _: &Open, class: Class) -> Result<(), Refusal> {
        match class {
            Class::Agent => Ok(()),
            Class::Anyone => {
                let text = "the agent dials from a port below 1024";
                Err(Refusal::new(Code::Denied, text))
            }
        }
    }

    fn features(&self) -> u64 {
        wire::FEATURES
    }

    fn keyed_features(&self) -> u64 {
        wire::KEY | wire::CHUNKS
    }

    fn run(&self, call: Call, stream: Socket) -> BoxFuture<'static, io::Result<()>> {
        Box::pin(async move {
            let connected = Connected::new(&call.vm, &call.incoming);
            let features = call.open.common.features;
            tokio::select! {
                result = agent::converse(&call.state, &call.vm, features, stream) => result,
                () = connected.token.cancelled() => Err(io::Error::other("replaced by a newer connection")),
            }
        })
    }
}

/// An agent's connection. Dropped, it has ended.
struct Connected {
    vm: Arc<VmEntry>,
    token: CancellationToken,
}

impl Connected {
    /// Begins one; an older one ends.
    fn new(vm: &Arc<VmEntry>, incoming: &Incoming) -> Self {
        let (token, has_older) = vm.agent.connected();
        // An agent has one connection, and its kernel ends that with the agent. If it has not, the guest was reset or restored, of which the
        // host's kernel tells nobody: what it has of the guest before would wait for ever, or reach the wrong one (R128).
        if has_older
            && vm.channel.kernel().is_some()
            && let Some(link) = vm.channel.link()
        {
            tracing::info!(vm = %vm.name, "the guest has begun anew: its older streams end");
            link.begun_anew(incoming.port, incoming.peer_port);
        }
        Self {
            vm: vm.clone(),
            token,
        }
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        self.vm.agent.gone(&self.token);
        tracing::info!(vm = %self.vm.name, "agent disconnected");
    }
}

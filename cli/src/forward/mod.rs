//! `adit forward`: local sockets whose connections lead into a VM, in the foreground.
//!
//! | file | what it is |
//! |---|---|
//! | `spec` | what is asked for: `8443:443`, `unix:web.sock:80` |
//! | `listener` | a local socket; the file of a Unix one goes with it |
//!
//! A connection has a tunnel of its own, and from then on a thread that relays, as the agent's other end does: each direction
//! ends by itself, and what is broken off on one side is reset on the other. A tunnel that is refused costs its client only.

mod listener;
mod spec;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use adit_guest_driver::conn::Conn;
use adit_guest_driver::relay::relay;
use clap::Args;
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::completion;
use crate::error::Failure;
use crate::output;
use crate::proxy::{Destination, Options, Proxy};
use crate::text::{Format, escape, json_text};

pub use listener::Listener;
use spec::Spec;
pub use spec::{Listen, listen};

/// Most connections at a time, of all forwards of a command: two descriptors, a thread and two buffers each.
const CONNECTIONS_MAX: usize = 256;
/// Most forwards of a command.
const FORWARDS_MAX: usize = 64;
/// How soon a client is taken again after that has failed, for example because there are no free descriptors.
const AGAIN: Duration = Duration::from_millis(200);

const EXAMPLES: &str = "\
Examples:
  adit forward web-1 8443:443                      # https://127.0.0.1:8443/ is the VM's port 443
  adit forward web-1 0:80 127.0.0.1:5432:5432      # several; it prints which port 0 has become
  adit forward web-1 unix:docker.sock:2375         # a socket that only you can use
  adit forward docker.web-1.svc unix:docker.sock   # the same of a service that the guest has a name for
  adit forward web-1 '[::1]:8080:80' 0.0.0.0:8081:80

It runs until Ctrl-C, which ends its connections too. Every user of this host can use a TCP port of its loopback; a Unix
socket has mode 0600. One that somebody left behind is replaced, one that somebody listens on is not.
A tunnel that is refused is told on standard error, and its client sees a reset. At most 256 connections are open at a time,
and further ones wait.

Exit status: 0 after Ctrl-C or SIGTERM; 1 it cannot listen there; 4 there can be no such VM.";

/// Arguments of `adit forward`.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct Forward {
    /// Name of the VM, also with `.adit` behind it; `vsock-PORT.` before it for a port of AF_VSOCK; SERVICE.VM.svc or
    /// adit://HOST/VM/SERVICE for a service that the guest has a name for
    #[arg(add = completion::vms())]
    vm: String,
    /// Where to listen and which port of the VM to reach: LOCALPORT:PORT on 127.0.0.1, ADDRESS:LOCALPORT:PORT, or
    /// unix:PATH:PORT. Where the name says what is meant, :PORT is left out. LOCALPORT 0 takes any free port
    #[arg(required = true, value_name = "WAY")]
    forwards: Vec<String>,
    #[command(flatten)]
    options: Options,
}

/// One of them.
struct Way {
    listener: Listener,
    to: Destination,
    /// Where it listens, as it is shown.
    at: String,
}

pub async fn forward(command: &Forward, format: Format) -> Result<(), Failure> {
    let cannot = |e: io::Error| Failure::io("cannot wait for signals", &e);
    let mut interrupt = signal(SignalKind::interrupt()).map_err(cannot)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(cannot)?;
    let proxy = Arc::new(command.options.proxy()?);
    if command.forwards.len() > FORWARDS_MAX {
        let message = format!("more than {FORWARDS_MAX} forwards in one command");
        return Err(Failure::new("usage", message));
    }
    // All of them, or none.
    let mut ways = Vec::new();
    // A name that says what is meant needs no port.
    let whole = Destination::new(&command.vm, None);
    for text in &command.forwards {
        let usage = |why| Failure::new("usage", why);
        let (listen, to) = match (&whole, text.parse::<Spec>()) {
            (Ok(to), Err(_)) => (spec::listen(text).map_err(usage)?, to.clone()),
            (_, spec) => {
                let spec = spec.map_err(usage)?;
                (spec.listen, Destination::new(&command.vm, Some(spec.port))?)
            }
        };
        let (listener, at) = Listener::bind(&listen).await?;
        ways.push(Way { listener, to, at });
    }
    for way in &ways {
        match format {
            Format::Json => output::json(&json!({ "listen": way.at, "to": way.to.to_string() }))?,
            Format::Table => output::line(format_args!(
                "listening on {} for {}",
                escape(&way.at),
                way.to
            ))?,
        }
        if way.listener.is_open_to_others() && format == Format::Table {
            adit_print::note!(
                "{}: whoever reaches this address reaches {}",
                way.at,
                way.to
            );
        }
    }
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let ways: Vec<Arc<Way>> = ways.into_iter().map(Arc::new).collect();
    let mut serving = tokio::task::JoinSet::new();
    for way in &ways {
        serving.spawn(serve(way.clone(), proxy.clone(), room.clone(), format));
    }
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    // The sockets' files go with the last that knows of them.
    serving.shutdown().await;
    Ok(())
}

/// Takes clients, for good.
async fn serve(way: Arc<Way>, proxy: Arc<Proxy>, room: Arc<Semaphore>, format: Format) {
    loop {
        let client = match way.listener.accept().await {
            Ok(client) => client,
            Err(e) => {
                tell(
                    &way.at,
                    &Failure::io("cannot take a connection", &e),
                    format,
                );
                tokio::time::sleep(AGAIN).await;
                continue;
            }
        };
        let permit = match room.clone().try_acquire_owned() {
            Ok(permit) => permit,
            Err(_) => {
                let message = format!("{CONNECTIONS_MAX} connections are open: the next ones wait");
                tell(&way.at, &Failure::new("busy", message), format);
                match room.clone().acquire_owned().await {
                    Ok(permit) => permit,
                    // Nobody closes it.
                    Err(_) => return,
                }
            }
        };
        let (to, at, proxy) = (way.to.clone(), way.at.clone(), proxy.clone());
        tokio::spawn(async move {
            if let Err(failure) = carry(client, &proxy, &to, permit).await {
                tell(&at, &failure, format);
            }
        });
    }
}

/// Opens a client's tunnel, and has a thread relay. A client whose tunnel is refused sees a reset.
async fn carry(
    client: OwnedFd,
    proxy: &Proxy,
    to: &Destination,
    permit: OwnedSemaphorePermit,
) -> Result<(), Failure> {
    let client = Conn::from(client);
    client.reset_on_close(true);
    let cannot = |e: io::Error| Failure::io("cannot use the tunnel", &e);
    let tunnel = Conn::from(proxy.open(to).await?.into_fd().map_err(cannot)?);
    tunnel.reset_on_close(true);
    let relaying = move || {
        let moved = relay(&tunnel, &client);
        tunnel.reset_on_close(moved.map_or(true, |moved| moved.aborted));
        drop(permit);
    };
    let started = std::thread::Builder::new().spawn(relaying);
    started
        .map(drop)
        .map_err(|e| Failure::io("cannot start a thread", &e))
}

/// Says why a client was not served. The others are.
pub fn tell(at: &str, failure: &Failure, format: Format) {
    match format {
        Format::Json => {
            let text = json_text(&json!({ "listen": at, "error": failure }));
            adit_print::note(text.unwrap_or_default());
        }
        Format::Table => adit_print::note!("{}: {}", escape(at), escape(&failure.message)),
    }
}

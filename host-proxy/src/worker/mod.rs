//! The worker: the part of aditd that serves strangers. It has a user of its own, no capability, no file but the database, and no
//! socket but those that it was given; what needs more it asks of the [`monitor`](crate::monitor).
//!
//! It begins with the monitor's [`Welcome`] on its standard input, and outlives that monitor: the next one connects
//! to `work.sock`.

pub mod sandbox;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use adit_passed::{Closer, Passed};
use anyhow::Context;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::access::diag;
use crate::config::{Config, Sources};
use crate::monitor::Monitor;
use crate::monitor::client::{Client, Told};
use crate::monitor::packets::Packets;
use crate::monitor::wire::{self, Message, Welcome};
use crate::place::Listeners;
use crate::serve::{Database, Parts, Service};
use crate::state::State;
use crate::{text, vms};

/// Texts of the configuration that wait to be applied.
const CHANGES_MAX: usize = 16;
/// Monitors that may wait to be heard, also those that were killed meanwhile: one that finds no room takes the worker for ended.
const BACKLOG: i32 = 128;

/// What the monitor gave.
struct Given {
    welcome: Welcome,
    rendezvous: OwnedFd,
    state_dir: OwnedFd,
    /// The configuration as the first worker had it, with the VMs as they are now.
    config: Config,
    listeners: Listeners,
}

/// Serves until it is told to stop. Call this while there is one thread.
///
/// # Errors
/// It was not started by a monitor, cannot be confined, or cannot use the database.
pub fn run() -> anyhow::Result<()> {
    let build = crate::build();
    let monitor = take_stdin().context("the worker is started by `aditd run`")?;
    let given = Given::receive(&monitor).context("the worker is started by `aditd run`")?;
    let (uid, gid) = (given.welcome.uid, given.welcome.gid);
    let files = sandbox::enter(&given.state_dir, uid, gid).context("cannot confine the worker")?;
    // The root directory needs no descriptor, and whoever has one could leave it.
    drop(given.state_dir);
    // From here on the next monitor learns this user of the kernel.
    rustix::net::listen(&given.rendezvous, BACKLOG).context("cannot listen on work.sock")?;
    let diag = diag::Socket::open();
    sandbox::lock_calls().context("cannot confine the worker")?;
    if !files {
        tracing::warn!(
            "the kernel has no landlock: only its root directory keeps the worker from other files"
        );
    }
    tracing::info!(pid = std::process::id(), uid, "the worker is confined");
    let worker = Worker {
        build,
        diag,
        config: given.config,
        listeners: given.listeners,
        rendezvous: given.rendezvous,
    };
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(worker.serve(monitor))
}

/// Takes the socket that is the standard input, and puts an empty one into its place.
fn take_stdin() -> io::Result<OwnedFd> {
    let socket = io::stdin().as_fd().try_clone_to_owned()?;
    nix::unistd::dup2_stdin(File::open("/dev/null")?)?;
    let socket = Passed::from(socket).unix_packets()?;
    socket.into_inner()
}

impl Given {
    fn receive(monitor: &OwnedFd) -> anyhow::Result<Self> {
        let received = wire::receive(monitor, &Closer::shared())?;
        let (_, message, fds) = received.context("the monitor has gone")?;
        let Message::Welcome(welcome) = message else {
            anyhow::bail!("another packet: {:?}", message.kind());
        };
        let mut fds: Vec<OwnedFd> = fds.into_iter().filter_map(Passed::trust).collect();
        let listeners = fds.split_off(4);
        let mut fds = fds.into_iter();
        let mut next = || fds.next().context("a descriptor is missing");
        let (rendezvous, state_dir) = (next()?, next()?);
        let mut parse = || anyhow::Ok(Config::of(&Sources::unpack(&text::text_in(next()?)?)?)?);
        let first = parse()?;
        // A monitor hands on only what it could read.
        let config = first.with_changes_of(parse()?);
        let listeners = Listeners::of(&config, listeners)?;
        Ok(Self {
            welcome,
            rendezvous,
            state_dir,
            config,
            listeners,
        })
    }
}

struct Worker {
    build: u64,
    diag: io::Result<diag::Socket>,
    config: Config,
    listeners: Listeners,
    rendezvous: OwnedFd,
}

/// What a monitor that finds this worker is told.
struct Known {
    client: Arc<Client>,
    state: Arc<State>,
    listeners: Vec<OwnedFd>,
    serving: Message,
}

impl Worker {
    async fn serve(self, monitor: OwnedFd) -> anyhow::Result<()> {
        // The whole control group may get it, and it means the monitor.
        let _ignored = signal(SignalKind::hangup())?;
        let mut term = signal(SignalKind::terminate())?;
        let client = Arc::new(Client::default());
        let monitor = Packets::new(monitor, Closer::default())?;
        let rendezvous = UnixListener::from_std(self.rendezvous.into())?;
        let serving = Message::Serving(wire::Serving {
            settings: self.config.digest(),
            build: self.build,
        });
        let listeners = self.listeners.all().map(|fd| fd.try_clone_to_owned());
        let listeners = listeners.collect::<io::Result<Vec<_>>>()?;
        let shown = self.config.state_dir.join("aditd.db");
        let service = Service::open(Parts {
            config: self.config,
            database: Database {
                path: "/aditd.db".into(),
                shown,
            },
            monitor: Monitor::There(client.clone()),
            listeners: self.listeners,
            diag: self.diag,
        })?;
        let known = Arc::new(Known {
            client: client.clone(),
            state: service.state.clone(),
            listeners,
            serving: serving.clone(),
        });
        let told = CancellationToken::new();
        let (tell, changes) = mpsc::channel(CHANGES_MAX);
        // What is asked at the start is asked of this one.
        let monitor = client.connect(monitor);
        tokio::spawn(known.follow(monitor, rendezvous, tell, told.clone()));
        let stopped = async {
            tokio::select! {
                () = told.cancelled() => {}
                _ = term.recv() => told.cancel(),
            }
        };
        let ready = async || {
            // Without a monitor there is the next one to be told.
            let _ = client.say(&serving, &[]).await;
            Ok(())
        };
        service.run(changes, stopped, ready).await?;
        if !told.is_cancelled() {
            let _ = client.say(&Message::StopAll(wire::StopAll {}), &[]).await;
        }
        Ok(())
    }
}

impl Known {
    /// Hears one monitor after the other.
    async fn follow(
        self: Arc<Self>,
        first: Arc<Packets>,
        rendezvous: UnixListener,
        tell: mpsc::Sender<Result<Sources, String>>,
        stop: CancellationToken,
    ) {
        let mut next = Some(first);
        loop {
            let Some(packets) = next.take() else {
                let accepted = accept(&rendezvous).await;
                next = accepted.map(|packets| self.client.connect(packets));
                continue;
            };
            let on = |told| match told {
                Told::Hello => drop(tokio::spawn(self.clone().introduce())),
                Told::Stop => stop.cancel(),
                Told::Config(text) => {
                    let text = text.and_then(|fd| {
                        let fd = fd.trust().ok_or("it is closed")?;
                        let text = text::text_in(fd).map_err(|e| e.to_string())?;
                        Sources::unpack(&text).map_err(|e| e.to_string())
                    });
                    if tell.try_send(text).is_err() {
                        tracing::error!("the configuration changes faster than it is applied");
                    }
                }
            };
            let newer = tokio::select! {
                ended = self.client.drive(packets, on) => {
                    let error = ended.err().map(|e| adit_print::with_causes(&e)).unwrap_or_default();
                    if !stop.is_cancelled() {
                        tracing::warn!(error, "the monitor has gone; what is there goes on");
                    }
                    None
                }
                newer = accept(&rendezvous) => newer,
            };
            // Only now is the older one's future gone, and with it what it had set.
            next = newer.map(|packets| self.client.connect(packets));
        }
    }

    /// Tells a monitor that has found this worker what it must know.
    async fn introduce(self: Arc<Self>) {
        let fds: Vec<_> = self.listeners.iter().map(AsFd::as_fd).collect();
        let listeners = Message::Listeners(wire::Listeners {});
        let mut said = self.client.say(&listeners, &fds).await;
        for vm in self.state.registry.all() {
            let ends = vm.channel.keeper.place(|ends| {
                let ends = ends.map(|end| end.try_clone_to_owned());
                ends.into_iter().collect::<io::Result<Vec<_>>>()
            });
            match ends {
                Some(Ok(ends)) => {
                    let slot = Message::SlotOf(wire::SlotOf {
                        vm: vm.name.clone(),
                    });
                    let ends: Vec<_> = ends.iter().map(AsFd::as_fd).collect();
                    said = said.and(self.client.say(&slot, &ends).await);
                }
                Some(Err(e)) => tracing::warn!(vm = %vm.name, error = %e, "not kept"),
                // It was added while there was no monitor.
                None => vms::place(&self.state, &vm).await,
            }
        }
        said = said.and(self.client.say(&self.serving, &[]).await);
        if let Err(e) = said {
            tracing::warn!(error = %e, "the monitor does not hear what this worker has");
        }
        crate::tell_status(&self.state).await;
    }
}

/// The next monitor.
async fn accept(rendezvous: &UnixListener) -> Option<Packets> {
    let accepted = async {
        let (socket, _) = rendezvous.accept().await?;
        let peer = socket.peer_cred()?;
        if peer.uid() != 0 {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        Packets::new(socket.into_std()?.into(), Closer::default())
    };
    match accepted.await {
        Ok(packets) => Some(packets),
        Err(e) => {
            tracing::warn!(error = %e, "a monitor cannot be heard");
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            None
        }
    }
}

//! The monitor process: the lock, the listeners, the configuration, and one worker after the other.
//!
//! ```text
//! found at work.sock ── of this build, with these settings ─► follow ──┐ told to stop: it ends first
//!        └── none, or another ─► listeners, start ─────────► follow ──┤
//!                                     ▲  at once; back-off 50 ms … 2 s │
//!                                     └──────── it has ended ──────────┘
//! ```

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use sd_notify::NotifyState;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::child::{self, Worker};
use super::privileged::Privileged;
use super::server::{self, Event};
use super::store::Store;
use super::user::{self, Account};
use super::wire::{self, Message, Welcome};
use crate::cgroup::Cgroups;
use crate::config::{Config, Sources};
use crate::place::{self, Listeners};
use crate::reload;
use crate::spawn::Spawner;
use crate::supervisor::Backoff;
use crate::text;
use crate::uids::Uids;

/// How long a worker that was found may take to say that it serves.
const FOUND_LIMIT: Duration = Duration::from_secs(5);
/// How long one that has closed its connection may take to end.
const ENDING_LIMIT: Duration = Duration::from_secs(2);
/// Why such a one is lost.
const ENDED: &str = "it has ended";
/// Events of a worker that wait.
const EVENTS_MAX: usize = 64;
/// The worker's process id, for people: in the run directory.
pub(super) const PID_FILE: &str = "worker.pid";

/// What aditd is started with.
#[derive(Debug)]
pub struct Boot {
    /// The configuration.
    pub config: Config,
    /// The texts that it was read from.
    pub text: Sources,
    /// The file that it was read from.
    pub file: PathBuf,
    /// Starts processes.
    pub spawner: Arc<Spawner>,
    /// What systemd held, by name.
    pub passed: Vec<(String, OwnedFd)>,
    /// Whether log lines are JSON.
    pub log_json: bool,
}

/// The monitor.
struct Run {
    config: Config,
    /// As the first worker has it, and as it was read last without a mistake.
    texts: [OwnedFd; 2],
    file: PathBuf,
    log_json: bool,
    account: Account,
    state_dir: OwnedFd,
    spawner: Arc<Spawner>,
    privileged: Arc<Privileged>,
    listeners: Option<Listeners>,
    /// Reads the configuration again, and hands it to the worker. Either may take forever, and SIGTERM is heard meanwhile.
    reloading: Option<JoinHandle<Option<OwnedFd>>>,
    hangup: Signal,
    term: Signal,
    int: Signal,
}

/// How following a worker ended.
enum End {
    /// aditd is to stop.
    Stop,
    /// The worker has ended or was given up, and why.
    Lost(String),
}

/// Runs until told to stop. Port processes, and the tunnels in them, go on. Returns the exit status: a worker that ends before
/// it serves has said why.
///
/// # Errors
/// One line that says what to do: another aditd runs, a port is busy, a directory cannot be used.
pub async fn run(boot: Boot, account: Account) -> anyhow::Result<ExitCode> {
    let watch = |kind| signal(kind).context("cannot watch signals");
    let (hangup, term, int) = (
        watch(SignalKind::hangup())?,
        watch(SignalKind::terminate())?,
        watch(SignalKind::interrupt())?,
    );
    let Boot {
        config,
        text,
        file,
        spawner,
        passed,
        log_json,
    } = boot;
    let _lock = place::lock(&config.run_dir)?;
    let state_dir = user::hand_over(&config.state_dir, account)?;
    let privileged = Privileged::new(
        config.run_dir.clone(),
        spawner.clone(),
        Uids::new(&config, Some(account.uid))?,
        Cgroups::new(),
        Store::new(passed),
        true,
    );
    privileged.set(&config);
    let text = text::file_of(&text.packed()).context("no memory for the configuration")?;
    let run = Run {
        texts: [text.try_clone()?, text],
        config,
        file,
        log_json,
        account,
        state_dir,
        spawner,
        privileged,
        listeners: None,
        reloading: None,
        hangup,
        term,
        int,
    };
    run.all().await
}

impl Run {
    async fn all(mut self) -> anyhow::Result<ExitCode> {
        let mut backoff = Backoff::default();
        let mut served = false;
        let mut found = Worker::find(&self.config.run_dir)?;
        loop {
            let mut worker = match found.take() {
                Some(worker) => worker,
                None => match self.start().await {
                    Ok(worker) => worker,
                    // What is missing may be there again soon, and clients wait in the listeners.
                    Err(e) if served => {
                        tracing::error!(error = format!("{e:#}"), "no worker");
                        tokio::time::sleep(backoff.after_failure()).await;
                        continue;
                    }
                    Err(e) => return Err(e),
                },
            };
            let (begin, is_found) = (Instant::now(), worker.is_found);
            let ended = self.follow(&worker, &mut served).await;
            match ended {
                End::Stop => {
                    let _ = sd_notify::notify(&[NotifyState::Stopping]);
                    worker.end().await;
                    break;
                }
                // It is of another build, or has other settings: that is what this monitor was started for.
                End::Lost(why) if is_found && !served => {
                    tracing::info!(
                        pid = worker.pid,
                        why,
                        "the worker that was found is replaced"
                    );
                    worker.end().await;
                    self.listeners = None;
                    continue;
                }
                End::Lost(why) => {
                    // One that has closed its connection ends by itself, and may be saying why.
                    let limit = match why == ENDED {
                        true => ENDING_LIMIT,
                        false => Duration::ZERO,
                    };
                    if tokio::time::timeout(limit, worker.ended()).await.is_err() {
                        worker.kill();
                        let _ = worker.ended().await;
                    }
                    let status = worker.status();
                    if !served {
                        place::clear(&self.config);
                        child::clear(&self.config.run_dir);
                        let code = status.and_then(|status| status.code());
                        let code = code.and_then(|code| u8::try_from(code).ok());
                        if code.is_none() {
                            tracing::error!(why, "the worker ended before it served");
                        }
                        return Ok(code.filter(|code| *code != 0).unwrap_or(1).into());
                    }
                    let status = status.map(|status| status.to_string()).unwrap_or_default();
                    tracing::error!(pid = worker.pid, why, status, "the worker is started again");
                }
            }
            tokio::select! {
                () = tokio::time::sleep(backoff.after(begin.elapsed())) => {}
                _ = self.term.recv() => break,
                _ = self.int.recv() => break,
            }
        }
        place::clear(&self.config);
        child::clear(&self.config.run_dir);
        let _ = std::fs::remove_file(self.config.run_dir.join(PID_FILE));
        Ok(ExitCode::SUCCESS)
    }

    /// Starts a worker.
    async fn start(&mut self) -> anyhow::Result<Worker> {
        let listeners = match self.listeners.take() {
            Some(listeners) => listeners,
            None => Listeners::bind(&self.config)?,
        };
        let listeners = self.listeners.insert(listeners);
        self.privileged.begin();
        let rendezvous = child::rendezvous(&self.config.run_dir)
            .context("cannot bind the socket of the worker")?;
        let welcome = Welcome {
            uid: self.account.uid,
            gid: self.account.gid,
        };
        let [first, now] = &self.texts;
        let mut fds = vec![
            rendezvous.as_fd(),
            self.state_dir.as_fd(),
            first.as_fd(),
            now.as_fd(),
        ];
        fds.extend(listeners.all());
        let worker = Worker::start(&self.spawner, welcome, &fds, self.log_json).await;
        worker.context("cannot start the worker")
    }

    /// Serves a worker until it ends, must be ended, or aditd is to stop.
    async fn follow(&mut self, worker: &Worker, served: &mut bool) -> End {
        let (tell, mut events) = mpsc::channel(EVENTS_MAX);
        let on = move |event| {
            // A worker that says more than is heard is soon found to ask too much.
            let _ = tell.try_send(event);
        };
        let mut serving = tokio::spawn({
            let (packets, privileged) = (worker.packets.clone(), self.privileged.clone());
            async move { server::serve(packets, privileged, on).await }
        });
        // What the worker before it may not have got, and what this one was not started with.
        if let Some(missed) = self.reloading.take() {
            missed.abort();
            self.reload(worker);
        }
        let mut silent = None;
        if worker.is_found && !*served {
            silent = Some(Instant::now() + FOUND_LIMIT);
            let hello = Message::Hello(wire::Hello {});
            if let Err(e) = worker.packets.send(0, &hello, &[]).await {
                return End::Lost(e.to_string());
            }
        }
        let end = loop {
            let silence = async {
                match silent {
                    Some(end) => tokio::time::sleep_until(end).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                Some(event) = events.recv() => match self.heard(worker, event, served) {
                    Ok(true) => silent = silent.filter(|_| !*served),
                    Ok(false) => break End::Stop,
                    Err(why) => break End::Lost(why),
                },
                ended = &mut serving => break End::Lost(match ended {
                    Ok(Ok(())) => ENDED.into(),
                    Ok(Err(fault)) => format!("it is given up: {}", adit_print::with_causes(&fault)),
                    Err(e) => e.to_string(),
                }),
                text = taken(&mut self.reloading) => {
                    if let Some(text) = text {
                        self.texts[1] = text;
                    }
                },
                Some(()) = self.hangup.recv(), if self.reloading.is_none() => self.reload(worker),
                _ = self.term.recv() => break End::Stop,
                _ = self.int.recv() => break End::Stop,
                () = silence => break End::Lost("it does not say that it serves".into()),
            }
        };
        serving.abort();
        end
    }

    /// Takes what a worker says. Returns whether aditd goes on; an error is why the worker must be ended.
    fn heard(&mut self, worker: &Worker, event: Event, served: &mut bool) -> Result<bool, String> {
        match event {
            Event::StopAll => return Ok(false),
            // By way of the signal, which waits its turn where a reading is under way.
            Event::Reread => {
                let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGHUP);
            }
            Event::Status(status) => {
                let status = text::line_of(&status);
                let _ = sd_notify::notify(&[NotifyState::Status(&status)]);
            }
            Event::Listeners(fds) if worker.is_found && self.listeners.is_none() => {
                let sockets = child::sockets(fds).ok_or("its listeners are no sockets")?;
                let listeners = Listeners::of(&self.config, sockets).map_err(|e| e.to_string())?;
                if !listeners.are_of(&self.config) {
                    return Err("its listeners are not those of the configuration".into());
                }
                self.listeners = Some(listeners);
            }
            Event::Listeners(_) => {}
            Event::Serving(serving) => {
                if worker.is_found && !*served {
                    if serving.build != crate::build() {
                        return Err("it is another build".into());
                    }
                    if worker.uid != self.account.uid {
                        return Err("it is of another user than the database".into());
                    }
                    if serving.settings != self.config.digest() {
                        return Err("it has other settings than the configuration".into());
                    }
                    if self.listeners.is_none() {
                        return Err("it has no listeners".into());
                    }
                    tracing::info!(
                        pid = worker.pid,
                        "the worker of an earlier monitor is found"
                    );
                    // What was changed meanwhile.
                    if self.reloading.is_none() {
                        self.reload(worker);
                    }
                }
                let said = self.is_serving(worker, *served);
                said.map_err(|e| format!("{e:#}"))?;
                *served = true;
            }
        }
        Ok(true)
    }

    /// Says that clients are served; `served`: it was said before.
    fn is_serving(&self, worker: &Worker, served: bool) -> anyhow::Result<()> {
        let run_dir = &self.config.run_dir;
        let write = || {
            place::write_whole(run_dir, PID_FILE, &format!("{}\n", worker.pid))?;
            match &self.listeners {
                Some(listeners) => listeners.write_addresses(run_dir),
                None => Ok(()),
            }
        };
        match write() {
            // Whoever needs the addresses has them, and clients are served.
            Err(e) if served || worker.is_found => {
                let error = format!("{e:#}");
                tracing::warn!(
                    error,
                    "the run directory does not say which process the worker is"
                );
            }
            written => written?,
        }
        let _ = sd_notify::notify(&[NotifyState::Ready]);
        Ok(())
    }

    /// Reads the configuration again, and hands it to the worker, which applies it.
    fn reload(&mut self, worker: &Worker) {
        let (file, packets) = (self.file.clone(), worker.packets.clone());
        let privileged = self.privileged.clone();
        self.reloading = Some(tokio::spawn(async move {
            let path = file.clone();
            let read = tokio::task::spawn_blocking(move || reload::read_again(&path)).await;
            let read = read.unwrap_or_else(|e| Err(e.to_string()));
            let read = read.and_then(|text: Sources| {
                let fd = text::file_of(&text.packed()).map_err(|e| e.to_string())?;
                // A successor gets what this one applies.
                let config = Config::of(&text);
                if let Ok(config) = &config {
                    privileged.set(config);
                }
                Ok((config.is_ok(), fd))
            });
            let (error, text) = match read {
                Ok(text) => (String::new(), Some(text)),
                Err(error) => (error, None),
            };
            let fds: Vec<_> = text.iter().map(|(_, fd)| fd.as_fd()).collect();
            let config = Message::Config(wire::Config { error });
            if let Err(e) = packets.send(0, &config, &fds).await {
                tracing::warn!(error = %e, "the worker does not get the configuration");
            }
            text.and_then(|(is_good, fd)| is_good.then_some(fd))
        }));
    }
}

/// What was read again, once the worker has it; never if nothing is under way.
async fn taken(reloading: &mut Option<JoinHandle<Option<OwnedFd>>>) -> Option<OwnedFd> {
    let Some(task) = reloading else {
        return std::future::pending().await;
    };
    let text = task.await.ok().flatten();
    *reloading = None;
    text
}

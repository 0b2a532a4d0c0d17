//! `files`: files read, written, listed and removed, for whom the guest's policy lets the host.
//!
//! ```text
//! hello {files, as whom, what, where, beneath which directory} ─► is it the host's? ─► are files on at all? ─► accept
//!   ─► policy: this user, this path, to read or to write? ─► a process gets the stream, and becomes that user
//! ```
//! As whom and where is what the hello says, which aditd has written of what it has let through. The agent opens nothing of it itself: the
//! process does, as that user, beneath the directory that the policy and the host's grant both name.

use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use adit_channel::hello::Open as Hello;
use adit_channel::refusal::{Code, Refusal};
use adit_files::{Asked, Message, Refused, SERVICE, refusal};
use adit_names::ServiceName;

use super::hand;
use super::services::{Run, Service};
use crate::copy::Spec;
use crate::exec::proc::{self, ProcId};
use crate::fork_server::{Becomes, ForkServer};
use crate::log;
use crate::policy::Standing;
use crate::transport::HostStream;

/// Most processes at a time.
pub const COPIES_MAX: usize = 64;

/// The service.
pub struct Files {
    policy: RwLock<Arc<Standing>>,
    shared: Arc<Shared>,
}

struct Shared {
    /// By which copies begin.
    forks: Arc<ForkServer>,
    /// Those that were started.
    started: Mutex<Vec<ProcId>>,
}

impl Files {
    /// Files, each of whose streams is a process's that this starts.
    pub fn new(forks: Arc<ForkServer>) -> Self {
        let shared = Shared {
            forks,
            started: Mutex::default(),
        };
        Self {
            policy: RwLock::default(),
            shared: Arc::new(shared),
        }
    }

    /// Has this policy decide, from the next stream on.
    pub fn govern(&self, policy: Arc<Standing>) {
        *self.policy.write().unwrap_or_else(PoisonError::into_inner) = policy;
    }
}

impl Service for Files {
    fn form(&self) -> &'static str {
        SERVICE
    }

    fn takes(&self, name: &ServiceName) -> bool {
        name.as_str() == SERVICE
    }

    fn is_for_the_host(&self) -> bool {
        true
    }

    fn has_own_rules(&self) -> bool {
        true
    }

    fn open(&self, open: &Hello) -> Result<Run, Refusal> {
        let asked = Asked::parse(open.extensions.arguments.as_bytes());
        let asked = asked.ok_or_else(|| {
            Refusal::new(
                Code::Denied,
                "the arguments do not say as whom, what and where",
            )
        })?;
        let policy = self.policy.read().unwrap_or_else(PoisonError::into_inner);
        let policy = policy.clone();
        policy.files_at_all()?;
        let shared = self.shared.clone();
        // Somebody's name, as aditd shows it: for the log.
        let caller = String::from_utf8_lossy(open.extensions.caller.as_bytes()).into_owned();
        Ok(Box::new(move |stream| {
            shared.serve(stream, &asked, (&policy, &caller))
        }))
    }
}

impl Shared {
    fn serve(
        &self,
        stream: Box<dyn HostStream>,
        asked: &Asked,
        (policy, caller): (&Standing, &str),
    ) -> io::Result<()> {
        let what = format!("{:?}", asked.what);
        let refuse = |stream: &dyn HostStream, why: Refused| {
            let fields: [(&str, &dyn std::fmt::Display); 4] = [
                ("user", &asked.user),
                ("what", &what),
                ("path", &asked.path),
                ("why", &why.text),
            ];
            log::event("files-refused", &fields);
            hand::say(stream, &Message::Refused(why).encode())
        };
        let spec = match may(asked, policy) {
            Ok(spec) => spec,
            Err(why) => return refuse(&*stream, why),
        };
        if self.running() >= COPIES_MAX {
            let text = format!("{COPIES_MAX} copies and lists are there already: try again later");
            return refuse(&*stream, Refused::new(refusal::BUSY, text));
        }
        let fields: [(&str, &dyn std::fmt::Display); 4] = [
            ("by", &caller),
            ("user", &spec.user),
            ("what", &what),
            ("path", &spec.path),
        ];
        stream.set_timeout(None)?;
        let (theirs, carried) = hand::split(stream)?;
        let spawned = postcard::to_stdvec(&spec)
            .map_err(io::Error::other)
            .and_then(|told| self.forks.start(Becomes::Copy, theirs.as_fd(), &told));
        match spawned {
            Ok(pid) => {
                let mut started = self.started.lock().unwrap_or_else(PoisonError::into_inner);
                started.extend(proc::read(pid).map(|p| p.id));
                log::event("files", &fields);
            }
            Err(e) => {
                log::event("files-refused", &[("why", &e)]);
                let why = Refused::new(refusal::FAILED, format!("no process for it: {e}"));
                let mut theirs = std::fs::File::from(theirs.try_clone()?);
                let _ = io::Write::write_all(&mut theirs, &Message::Refused(why).encode());
            }
        }
        drop(theirs);
        carried.map_or(Ok(()), hand::Carried::carry)
    }

    /// How many go on.
    fn running(&self) -> usize {
        let mut started = self.started.lock().unwrap_or_else(PoisonError::into_inner);
        started.retain(|id| proc::read(id.pid).is_some_and(|p| p.id == *id && !p.zombie));
        started.len()
    }
}

/// What a process is to do, if it may be done.
fn may(asked: &Asked, policy: &Standing) -> Result<Spec, Refused> {
    let user = hand::user_of(&asked.user).map_err(|why| Refused::new(refusal::NO_USER, why))?;
    let path = match asked.path.as_str() {
        path if path.starts_with('/') => path.to_owned(),
        below => {
            let home = user.dir.to_str().filter(|home| adit_files::is_plain(home));
            let home = home.ok_or_else(|| {
                let text = format!("the home of `{}` is no plain path", user.name);
                Refused::new(refusal::MALFORMED, text)
            })?;
            match (home, below) {
                (home, "") => home.to_owned(),
                ("/", below) => format!("/{below}"),
                (home, below) => format!("{home}/{below}"),
            }
        }
    };
    let allowed = policy.files(&user.name, &path, asked.what.is_write());
    let root = allowed.map_err(|why| Refused::new(refusal::DENIED, why))?;
    // Both hold: of two directories above a path one is beneath the other.
    let root = match asked.root() {
        Some(granted) if granted.len() > root.len() => granted.to_owned(),
        _ => root,
    };
    Ok(Spec {
        user: user.name,
        asked: asked.clone(),
        path,
        root,
    })
}

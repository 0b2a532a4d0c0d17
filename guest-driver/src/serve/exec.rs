//! `exec`: commands, for whom the guest's policy lets the host.
//!
//! ```text
//! hello {exec, as whom, what} ─► is it the host's? ─► is exec on at all? ─► accept ─► first frame
//!   run:     the program found ─► policy: this user, this program? ─► a session process gets the stream
//!   attach:  the session's socket gets the stream
//!   list, end: the sockets are asked
//!   a ticket: see `ticketed`
//! ```
//! As whom and which program is what the hello says, which aditd has written of what it has let through. The agent is done with a stream
//! once a session process has it; of a stream that is no socket of the kernel's it carries the bytes.

mod talk;
mod ticketed;

use std::ffi::OsStr;
use std::fs;
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use adit_channel::hello::Open as Hello;
use adit_channel::refusal::{Code, Refusal};
use adit_exec::seal::{Keys, Sealed};
use adit_exec::{Asked, Open, ROWS_MAX, Refused, Row, SERVICE, ToClient, ToGuest, What, refusal};
use adit_names::{ServiceName, escape};
use adit_tasks::KeyId;
use nix::unistd::User;

use super::hand;
use super::services::{Run, Service};
use crate::exec::{cgroup, script, sessions};
use crate::fork_server::{Becomes, ForkServer};
use crate::live::Live;
use crate::log;
use crate::policy::Standing;
use crate::session::ask::{self, Answer, Attaching, Ending};
use crate::session::place::{Place, SESSIONS_MAX, new_id};
use crate::session::{Spec, child, refused};
use crate::tickets::Tickets;
use crate::transport::HostStream;
use talk::Talk;

/// How long a client may take for its first frame, and to read a refusal.
const LIMIT: Duration = Duration::from_secs(10);

/// Directory of such inputs, in the state directory.
const INPUTS: &str = "exec-input";

/// The service.
pub struct Exec {
    policy: RwLock<Arc<Standing>>,
    shared: Arc<Shared>,
}

/// What a stream's thread needs of it.
struct Shared {
    /// By which sessions begin.
    forks: Arc<ForkServer>,
    run_dir: PathBuf,
    state_dir: PathBuf,
    place: Place,
    /// Whom the guest trusts, and who it is.
    live: Arc<Live>,
    tickets: Tickets,
}

/// Where a command's input is, between the ticket that has its digest and the session process.
fn place_of_input(state_dir: &Path, id: &str) -> PathBuf {
    state_dir.join(INPUTS).join(id)
}

impl Exec {
    /// Commands whose sessions are found in the run_dir of the configuration, each a process of `program`.
    ///
    /// # Errors
    /// Its directory cannot be made.
    pub fn new(forks: Arc<ForkServer>, live: Arc<Live>) -> io::Result<Self> {
        let config = live.config();
        let (run_dir, state_dir) = (config.run_dir.clone(), config.state_dir.clone());
        let place = Place::of(&run_dir);
        place.prepare()?;
        // What an agent that was killed has left.
        let _ = fs::remove_dir_all(state_dir.join(INPUTS));
        let shared = Shared {
            forks,
            run_dir,
            place,
            tickets: Tickets::of(&state_dir),
            state_dir,
            live,
        };
        Ok(Self {
            policy: RwLock::default(),
            shared: Arc::new(shared),
        })
    }

    /// Has this policy decide, from the next stream on.
    pub fn govern(&self, policy: Arc<Standing>) {
        *self.policy.write().unwrap_or_else(PoisonError::into_inner) = policy;
    }
}

impl Service for Exec {
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
            Refusal::new(Code::Denied, "the arguments do not say as whom and what")
        })?;
        let policy = self.policy.read().unwrap_or_else(PoisonError::into_inner);
        let policy = policy.clone();
        policy.exec_at_all()?;
        let shared = self.shared.clone();
        // Somebody's name, as aditd shows it: for the log.
        let caller = String::from_utf8_lossy(open.extensions.caller.as_bytes()).into_owned();
        Ok(Box::new(move |stream| {
            shared.serve(stream, asked, (&policy, &caller))
        }))
    }
}

fn invalid(e: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, e)
}

impl Shared {
    fn serve(
        &self,
        stream: Box<dyn HostStream>,
        asked: Asked,
        (policy, caller): (&Standing, &str),
    ) -> io::Result<()> {
        stream.set_timeout(Some(LIMIT))?;
        let first = match asked.what {
            What::List | What::End { .. } => None,
            What::Run(_) | What::Shell | What::Attach(_) | What::Ticket(_) => {
                Talk::new(&*stream).next()?
            }
        };
        if let Some(first @ (ToGuest::Ticket(_) | ToGuest::Seal(_))) = first {
            return self.by_ticket(stream, &asked, first, (policy, caller));
        }
        let user = asked.user.unwrap_or_default();
        match (asked.what, first) {
            (what @ (What::Run(_) | What::Shell), Some(ToGuest::Open(open))) => {
                let program = match &what {
                    What::Run(program) => Some(program.as_str()),
                    _ => None,
                };
                let told = open.argv.first().map(Vec::as_slice);
                let is_same = told == program.map(str::as_bytes);
                let spec = match is_same {
                    true => self.may(&user, open, policy, false),
                    // aditd has let this one through, and written it down.
                    false => {
                        let text = "it is not the program that aditd was told";
                        Err(refused(refusal::MALFORMED, text))
                    }
                };
                match spec {
                    Ok(spec) => self.start(stream, spec, caller),
                    Err(why) => {
                        let program = program.unwrap_or("login shell");
                        let fields: [(&str, &dyn std::fmt::Display); 3] =
                            [("user", &user), ("program", &program), ("why", &why.text)];
                        log::event("exec-refused", &fields);
                        Talk::new(&*stream).end(&ToClient::Refused(why))
                    }
                }
            }
            (What::Run(_), _) => Err(invalid("its first frame is no command")),
            (What::Ticket(_), _) => Err(invalid("its first frame is no ticket")),
            (what, first) => {
                if let Err(why) = policy.exec_by_host() {
                    let why = refused(refusal::NEEDS_TICKET, why);
                    return Talk::new(&*stream).end(&ToClient::Refused(why));
                }
                match (what, first) {
                    (What::Attach(id), Some(ToGuest::Attach(attach))) => {
                        self.attach(stream, &id, &Attaching { user, attach }, (None, None))
                    }
                    (What::Attach(_), _) => {
                        Err(invalid("its first frame does not say from where on"))
                    }
                    (What::End { id, signal }, _) => {
                        let ending = Ending { user, signal };
                        let ended = self.asked(&id, |at| ask::end(at, &ending));
                        let said = ended.map_or_else(ToClient::Refused, |_| ToClient::Done);
                        Talk::new(&*stream).end(&said)
                    }
                    _ => {
                        let of = (!user.is_empty()).then_some(user.as_str());
                        Talk::new(&*stream).end(&ToClient::Rows(self.rows(of)))
                    }
                }
            }
        }
    }

    /// A command as it is to be run, if it may be: because the host says so, or a ticket. One without elements is the user's login shell.
    fn may(
        &self,
        name: &str,
        mut open: Open,
        policy: &Standing,
        ticket: bool,
    ) -> Result<Spec, Refused> {
        let malformed = |text: String| refused(refusal::MALFORMED, text);
        let is_shell = open.argv.is_empty() && !ticket;
        let is_whole = match is_shell {
            true => open.check_shell(),
            false => open.check(),
        };
        is_whole.map_err(|e| malformed(e.to_string()))?;
        let user = hand::user_of(name).map_err(|why| refused(refusal::NO_USER, why))?;
        let at = match is_shell {
            true => login_shell(&user, &mut open),
            false => {
                let program = open.argv.first().and_then(|p| std::str::from_utf8(p).ok());
                let program = program.unwrap_or_default().to_owned();
                found(&program, &open, &user)?
            }
        };
        let text = at
            .to_str()
            .ok_or_else(|| malformed("its path is no UTF-8".into()))?;
        policy.exec(&user.name, text, ticket).map_err(|why| {
            let with = !ticket && policy.exec(&user.name, text, true).is_ok();
            let reason = if with {
                refusal::NEEDS_TICKET
            } else {
                refusal::DENIED
            };
            refused(reason, why)
        })?;
        let failed =
            |e: io::Error| refused(refusal::FAILED, format!("no session can be made: {e}"));
        self.place.prepare().map_err(failed)?;
        if self.live_ids().len() >= SESSIONS_MAX {
            let text = format!("{SESSIONS_MAX} sessions are there already: `adit ps` shows them");
            return Err(refused(refusal::BUSY, text));
        }
        Ok(Spec {
            id: new_id().map_err(failed)?,
            user: user.name,
            program: at,
            open,
            run_dir: self.run_dir.clone(),
            cgroups: self.forks.cgroups(),
            by: None,
            seal: None,
            input: None,
        })
    }

    /// Starts a session process, and gives it the stream.
    fn start(&self, stream: Box<dyn HostStream>, spec: Spec, caller: &str) -> io::Result<()> {
        stream.set_timeout(None)?;
        let (theirs, carried) = hand::split(stream)?;
        let spawned = self.spawn(theirs.as_fd(), &spec);
        match spawned {
            Ok(()) => {
                let program = spec.program.display();
                let mut fields: Vec<(&str, &dyn std::fmt::Display)> = vec![
                    ("session", &spec.id),
                    ("by", &caller),
                    ("user", &spec.user),
                    ("program", &program),
                ];
                fields.extend(
                    spec.by
                        .as_ref()
                        .map(|key| ("key", key as &dyn std::fmt::Display)),
                );
                log::event("exec", &fields);
            }
            Err(e) => {
                self.forget_input(&spec);
                log::event("exec-refused", &[("why", &e)]);
                let why = refused(refusal::FAILED, format!("no session process: {e}"));
                let why = sealed(spec.seal, &ToClient::Refused(why));
                let _ = (&UnixStream::from(theirs.try_clone()?)).write_all(&why);
            }
        }
        drop(theirs);
        carried.map_or(Ok(()), hand::Carried::carry)
    }

    fn forget_input(&self, spec: &Spec) {
        if let Some(input) = &spec.input {
            let _ = fs::remove_file(input);
        }
    }

    fn spawn(&self, stream: BorrowedFd<'_>, spec: &Spec) -> io::Result<()> {
        let told = postcard::to_stdvec(spec).map_err(io::Error::other)?;
        self.forks.start(Becomes::Session, stream, &told).map(drop)
    }

    fn attach(
        &self,
        stream: Box<dyn HostStream>,
        id: &str,
        attaching: &Attaching,
        (keys, key): (Option<Keys>, Option<KeyId>),
    ) -> io::Result<()> {
        stream.set_timeout(None)?;
        let (theirs, carried) = hand::split(stream)?;
        let attached = self.asked(id, |at| match &keys {
            Some(keys) => ask::attach_by_ticket(at, attaching, keys, theirs.as_fd()),
            None => ask::attach(at, attaching, theirs.as_fd()),
        });
        if let Err(why) = attached {
            let mut theirs = fs::File::from(theirs);
            let _ = theirs.write_all(&sealed(keys, &ToClient::Refused(why)));
        } else {
            let mut fields: Vec<(&str, &dyn std::fmt::Display)> = vec![("session", &id)];
            fields.extend(
                key.as_ref()
                    .map(|key| ("key", key as &dyn std::fmt::Display)),
            );
            log::event("exec-attached", &fields);
            drop(theirs);
        }
        carried.map_or(Ok(()), hand::Carried::carry)
    }

    /// Asks a session, and says in a client's words why not.
    fn asked(
        &self,
        id: &str,
        ask: impl FnOnce(&Path) -> io::Result<Answer>,
    ) -> Result<Option<Row>, Refused> {
        let no_such = || {
            let text = format!(
                "there is no session `{}` here: `adit ps` lists them",
                escape(id).at_most(40)
            );
            refused(refusal::NO_SESSION, text)
        };
        let at = self.place.socket(id).ok_or_else(no_such)?;
        match ask(&at) {
            Ok(Answer {
                refused: Some(why), ..
            }) => Err(why),
            Ok(answer) => Ok(answer.row),
            Err(e) if is_gone(&e) => {
                self.forget(id, &at, &e);
                Err(no_such())
            }
            Err(e) => Err(refused(
                refusal::FAILED,
                format!("the session does not answer: {e}"),
            )),
        }
    }

    /// Those that have a socket.
    fn live_ids(&self) -> Vec<String> {
        self.place.ids()
    }

    /// A session process that was killed has left its socket, and what it has started.
    fn forget(&self, id: &str, at: &Path, e: &io::Error) {
        if e.kind() == ErrorKind::NotFound {
            // It has ended in order, and taken its socket along.
            return;
        }
        let _ = fs::remove_file(at);
        if let Some(base) = cgroup::base() {
            sessions::end_left(&base, id);
        }
        log::event("exec-lost", &[("session", &id)]);
    }

    fn rows(&self, user: Option<&str>) -> Vec<Row> {
        let rows = self.live_ids().into_iter().filter_map(|id| {
            let at = self.place.socket(&id)?;
            match ask::row(&at) {
                Ok(answer) => answer.row,
                Err(e) => {
                    if is_gone(&e) {
                        self.forget(&id, &at, &e);
                    }
                    None
                }
            }
        });
        let of_user = rows.filter(|row| user.is_none_or(|user| row.user == user));
        of_user.take(ROWS_MAX).collect()
    }
}

/// Nobody is behind a socket any more.
fn is_gone(e: &io::Error) -> bool {
    matches!(e.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused)
}

/// The last thing that is said on a stream, in a record if it is sealed.
fn sealed(keys: Option<Keys>, message: &ToClient) -> Vec<u8> {
    let frame = message.encode();
    let Some(keys) = keys else {
        return frame;
    };
    let (mut sealed, mut out) = (Sealed::new(keys), Vec::new());
    match sealed
        .seal(&frame, &mut out)
        .and_then(|()| sealed.seal_end(&mut out))
    {
        Ok(()) => out,
        // Cut off: that is an error there, too.
        Err(_) => Vec::new(),
    }
}

/// The program that a user has for a login; its name for itself begins with a dash, which makes it read what is read at a login.
fn login_shell(user: &User, open: &mut Open) -> PathBuf {
    let shell = child::shell(user);
    let mut name = vec![b'-'];
    name.extend(shell.file_name().unwrap_or_default().as_bytes());
    open.argv = vec![name];
    shell
}

/// The program's absolute path, in the one spelling that the policy compares.
fn found(program: &str, open: &Open, user: &User) -> Result<PathBuf, Refused> {
    if program.contains('/') {
        let cwd = match &open.cwd[..] {
            [] => &user.dir,
            cwd => Path::new(OsStr::from_bytes(cwd)),
        };
        let plain: PathBuf = cwd
            .join(program)
            .components()
            .filter(|part| *part != Component::CurDir)
            .collect();
        return Ok(plain);
    }
    let set = open.env.iter().find(|(name, _)| name == b"PATH");
    let path = set.map_or(script::DEFAULT_PATH.as_bytes(), |(_, path)| path);
    let dirs = path
        .split(|b| *b == b':')
        .filter(|dir| dir.starts_with(b"/"));
    let mut at = dirs.map(|dir| Path::new(OsStr::from_bytes(dir)).join(program));
    at.find(|at| {
        let meta = fs::metadata(at);
        meta.is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    })
    .ok_or_else(|| {
        let text = format!(
            "no program `{}` in the directories of PATH",
            escape(program).at_most(80)
        );
        refused(refusal::NO_PROGRAM, text)
    })
}

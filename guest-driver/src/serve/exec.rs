//! `exec`: commands, for whom the guest's policy lets the host.
//!
//! ```text
//! hello {exec, as whom, what} ─► is it the host's? ─► is exec on at all? ─► accept ─► first frame
//!   run:     the program found ─► policy: this user, this program? ─► a session process gets the stream
//!   attach:  the session's socket gets the stream
//!   list, end: the sockets are asked
//! ```
//! As whom and which program is what the hello says, which aditd has written of what it has let through. The agent is done with a stream
//! once a session process has it; of a stream that is no socket of the kernel's it carries the bytes.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use adit_channel::frame;
use adit_channel::hello::Open as Hello;
use adit_channel::refusal::{Code, Refusal};
use adit_exec::{
    Asked, FRAME_MAX, Message, Open, ROWS_MAX, Refused, Row, SERVICE, ToClient, ToGuest, What,
    refusal,
};
use adit_names::{ServiceName, escape};
use nix::unistd::User;

use super::services::{Run, Service};
use crate::exec::{cgroup, script, sessions};
use crate::log;
use crate::policy::Standing;
use crate::session::ask::{self, Answer, Attaching, Ending};
use crate::session::fork_server::ForkServer;
use crate::session::place::{Place, SESSIONS_MAX, new_id};
use crate::session::{Spec, child, refused};
use crate::transport::HostStream;

/// How long a client may take for its first frame, and to read a refusal.
const LIMIT: Duration = Duration::from_secs(10);

/// The service.
pub struct Exec {
    policy: RwLock<Arc<Standing>>,
    shared: Arc<Shared>,
}

/// What a stream's thread needs of it.
struct Shared {
    /// By which sessions begin.
    forks: ForkServer,
    cgroups: Mutex<Option<PathBuf>>,
    run_dir: PathBuf,
    place: Place,
}

impl Exec {
    /// Commands whose sessions are found in `run_dir`, each a process of `program`.
    ///
    /// # Errors
    /// Its directory cannot be made.
    pub fn new(program: &Path, run_dir: &Path) -> io::Result<Self> {
        let place = Place::of(run_dir);
        place.prepare()?;
        let shared = Shared {
            forks: ForkServer::of(program),
            cgroups: Mutex::default(),
            run_dir: run_dir.to_owned(),
            place,
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
        match asked.what {
            What::Run(_) | What::Shell => {
                let user = asked.user.unwrap_or_default();
                let open = match first(&*stream)? {
                    Some(ToGuest::Open(open)) => open,
                    _ => return Err(invalid("its first frame is no command")),
                };
                let program = match &asked.what {
                    What::Run(program) => Some(program.as_str()),
                    _ => None,
                };
                match self.may(&user, program, open, policy) {
                    Ok(spec) => self.start(stream, spec, caller),
                    Err(why) => {
                        let program = program.unwrap_or("login shell");
                        let fields: [(&str, &dyn std::fmt::Display); 3] =
                            [("user", &user), ("program", &program), ("why", &why.text)];
                        log::event("exec-refused", &fields);
                        say(&*stream, &ToClient::Refused(why))
                    }
                }
            }
            What::Attach(id) => {
                let attach = match first(&*stream)? {
                    Some(ToGuest::Attach(attach)) => attach,
                    _ => return Err(invalid("its first frame does not say from where on")),
                };
                let user = asked.user.unwrap_or_default();
                self.attach(stream, &id, &Attaching { user, attach })
            }
            What::List => {
                let rows = self.rows(asked.user.as_deref());
                say(&*stream, &ToClient::Rows(rows))
            }
            What::End { id, signal } => {
                let user = asked.user.unwrap_or_default();
                let ended = self.asked(&id, |at| ask::end(at, &Ending { user, signal }));
                say(
                    &*stream,
                    &ended.map_or_else(ToClient::Refused, |_| ToClient::Done),
                )
            }
        }
    }

    /// A command as it is to be run, if it may be; without a program it is the user's login shell.
    fn may(
        &self,
        name: &str,
        program: Option<&str>,
        mut open: Open,
        policy: &Standing,
    ) -> Result<Spec, Refused> {
        let malformed = |text: String| refused(refusal::MALFORMED, text);
        let is_whole = match program {
            Some(_) => open.check(),
            None => open.check_shell(),
        };
        is_whole.map_err(|e| malformed(e.to_string()))?;
        // aditd has let this one through, and written it down.
        if open.argv.first().map(Vec::as_slice) != program.map(str::as_bytes) {
            return Err(malformed(
                "it is not the program that aditd was told".into(),
            ));
        }
        let user = user_of(name)?;
        let at = match program {
            Some(program) => found(program, &open, &user)?,
            None => login_shell(&user, &mut open),
        };
        let text = at
            .to_str()
            .ok_or_else(|| malformed("its path is no UTF-8".into()))?;
        let allowed = policy.exec(&user.name, text);
        allowed.map_err(|why| refused(refusal::DENIED, why))?;
        let failed =
            |e: io::Error| refused(refusal::FAILED, format!("no session can be made: {e}"));
        self.place.prepare().map_err(failed)?;
        if self.live().len() >= SESSIONS_MAX {
            let text = format!("{SESSIONS_MAX} sessions are there already: `adit ps` shows them");
            return Err(refused(refusal::BUSY, text));
        }
        Ok(Spec {
            id: new_id().map_err(failed)?,
            user: user.name,
            program: at,
            open,
            run_dir: self.run_dir.clone(),
            cgroups: self.cgroups(),
        })
    }

    /// Where cgroups can be made: to look for it takes longer than to see that it is still there.
    fn cgroups(&self) -> Option<PathBuf> {
        let mut known = self.cgroups.lock().unwrap_or_else(PoisonError::into_inner);
        if known.as_ref().is_none_or(|base| !base.is_dir()) {
            *known = cgroup::base();
        }
        known.clone()
    }

    /// Starts a session process, and gives it the stream.
    fn start(&self, stream: Box<dyn HostStream>, spec: Spec, caller: &str) -> io::Result<()> {
        stream.set_timeout(None)?;
        let (theirs, carried) = split(stream)?;
        let spawned = self.spawn(theirs.as_fd(), &spec);
        match spawned {
            Ok(()) => {
                let fields: [(&str, &dyn std::fmt::Display); 4] = [
                    ("session", &spec.id),
                    ("by", &caller),
                    ("user", &spec.user),
                    ("program", &spec.program.display()),
                ];
                log::event("exec", &fields);
            }
            Err(e) => {
                log::event("exec-refused", &[("why", &e)]);
                let why = refused(refusal::FAILED, format!("no session process: {e}"));
                let _ = (&UnixStream::from(theirs.try_clone()?))
                    .write_all(&ToClient::Refused(why).encode());
            }
        }
        drop(theirs);
        carried.map_or(Ok(()), Carried::carry)
    }

    fn spawn(&self, stream: BorrowedFd<'_>, spec: &Spec) -> io::Result<()> {
        let told = postcard::to_stdvec(spec).map_err(io::Error::other)?;
        self.forks.start(stream, &told, spec.cgroups.as_deref())
    }

    fn attach(
        &self,
        stream: Box<dyn HostStream>,
        id: &str,
        attaching: &Attaching,
    ) -> io::Result<()> {
        stream.set_timeout(None)?;
        let (theirs, carried) = split(stream)?;
        let attached = self.asked(id, |at| ask::attach(at, attaching, theirs.as_fd()));
        if let Err(why) = attached {
            let mut theirs = fs::File::from(theirs);
            let _ = theirs.write_all(&ToClient::Refused(why).encode());
        } else {
            log::event("exec-attached", &[("session", &id)]);
            drop(theirs);
        }
        carried.map_or(Ok(()), Carried::carry)
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
    fn live(&self) -> Vec<String> {
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
        let rows = self.live().into_iter().filter_map(|id| {
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

/// The rest of a stream whose bytes this process carries.
struct Carried(Box<dyn HostStream>, OwnedFd);

impl Carried {
    fn carry(self) -> io::Result<()> {
        self.0.relay_to(self.1.into())
    }
}

/// The stream as a socket, for another process; and what is to be carried to it, where it is none.
fn split(stream: Box<dyn HostStream>) -> io::Result<(OwnedFd, Option<Carried>)> {
    match stream.into_socket() {
        Ok(socket) => Ok((socket, None)),
        Err(stream) => {
            let (ours, theirs) = UnixStream::pair()?;
            Ok((theirs.into(), Some(Carried(stream, ours.into()))))
        }
    }
}

/// The first frame of a client.
fn first(stream: &dyn HostStream) -> io::Result<Option<ToGuest>> {
    let Some((header, body)) = frame::read(&mut stream.io(), FRAME_MAX)? else {
        return Ok(None);
    };
    ToGuest::read(&header, &body).map(Some).map_err(invalid)
}

/// Says the last thing on a stream, and has it read: some carriers forget what was said when a stream is closed on bytes that nobody has
/// read.
fn say(stream: &dyn HostStream, message: &ToClient) -> io::Result<()> {
    stream.io().write_all(&message.encode())?;
    stream.end_sending()?;
    let _ = stream.set_timeout(Some(LIMIT));
    let mut rest = [0; 1024];
    while stream.io().read(&mut rest).is_ok_and(|n| n > 0) {}
    Ok(())
}

/// A user by name or number.
fn user_of(name: &str) -> Result<User, Refused> {
    let found = match name.parse::<u32>() {
        Ok(number) => User::from_uid(number.into()),
        Err(_) => User::from_name(name),
    };
    found.ok().flatten().ok_or_else(|| {
        let text = format!("this guest has no user `{}`", escape(name).at_most(64));
        refused(refusal::NO_USER, text)
    })
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

//! The command of a session: its pipes or its terminal, and all that it has started.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use adit_exec::{Refused, Size, refusal};
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nix::sys::signal::kill;
use nix::unistd::{Pid, Uid, User};
use rustix::process::{WaitOptions, wait};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcgetpgrp, tcsetwinsize};

use super::{MARKER, Spec, refused};
use crate::exec::cgroup::Cgroup;
use crate::exec::sessions::CGROUP;
use crate::exec::{script, tree};
use crate::protect::Inherited;
use crate::sys;

/// Bytes of a command's output that wait for this process.
const OUTPUT_PIPE: libc::c_int = 256 << 10;
/// Shell of a user that has none.
const SHELL: &str = "/bin/sh";

/// A user's login shell.
pub(crate) fn shell(user: &User) -> PathBuf {
    match user.shell.as_os_str().is_empty() {
        true => SHELL.into(),
        false => user.shell.clone(),
    }
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Code(i32),
    Signal(i32),
}

/// A command that was started.
pub(super) struct Child {
    pid: i32,
    /// Where its input goes.
    pub(super) stdin: Option<OwnedFd>,
    /// Where its output, and its error output, come from.
    pub(super) outs: [Option<OwnedFd>; 2],
    /// It has a terminal: this is the other end, also of `stdin`.
    tty: Option<OwnedFd>,
    cgroup: Option<Cgroup>,
    has_ended: bool,
}

/// The ends that the command gets, and those that stay here.
struct Ends {
    theirs: [Stdio; 3],
    stdin: Option<OwnedFd>,
    outs: [Option<OwnedFd>; 2],
    tty: Option<OwnedFd>,
}

fn size_of(size: Size) -> Winsize {
    Winsize {
        ws_row: size.rows,
        ws_col: size.cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

fn nonblocking(fd: impl AsFd) -> io::Result<()> {
    Ok(rustix::io::ioctl_fionbio(fd, true)?)
}

/// A terminal of that user.
fn terminal(size: Size, user: &User) -> io::Result<Ends> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let name = ptsname(&master, Vec::new())?;
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC;
    let slave = rustix::fs::open(name.as_c_str(), flags, rustix::fs::Mode::empty())?;
    if user.uid != Uid::effective() {
        nix::unistd::fchown(&slave, Some(user.uid), None)?;
    }
    tcsetwinsize(&master, size_of(size))?;
    nonblocking(&master)?;
    let theirs = || slave.try_clone().map(Stdio::from);
    Ok(Ends {
        theirs: [theirs()?, theirs()?, theirs()?],
        stdin: Some(master.try_clone()?),
        outs: [Some(master.try_clone()?), None],
        tty: Some(master),
    })
}

/// A command's input, which was put into a file. It is the user's own, as a pipe would be.
fn file_of_input(place: &Path, user: &User) -> io::Result<File> {
    let file = File::open(place)?;
    std::fs::remove_file(place)?;
    if user.uid != Uid::effective() {
        nix::unistd::fchown(&file, Some(user.uid), Some(user.gid))?;
    }
    Ok(file)
}

fn pipes(with_input: bool, user: &User) -> io::Result<Ends> {
    let ([out, to_out], [err, to_err]) = (script::output_pipe(user)?, script::output_pipe(user)?);
    nonblocking(&out)?;
    nonblocking(&err)?;
    // Whoever writes much waits less often. A kernel or a user with little to spare has the usual size.
    let _ = fcntl(&out, FcntlArg::F_SETPIPE_SZ(OUTPUT_PIPE));
    let (input, stdin) = match with_input {
        true => {
            let (reader, writer) = io::pipe()?;
            if user.uid != Uid::effective() {
                nix::unistd::fchown(&reader, Some(user.uid), Some(user.gid))?;
            }
            nonblocking(&writer)?;
            (Stdio::from(reader), Some(writer.into()))
        }
        false => (Stdio::null(), None),
    };
    Ok(Ends {
        theirs: [input, to_out.into(), to_err.into()],
        stdin,
        outs: [Some(out), Some(err)],
        tty: None,
    })
}

impl Child {
    /// Starts the command of a session.
    pub(super) fn start(spec: &Spec) -> Result<Self, Refused> {
        let open = &spec.open;
        let failed = |what: &str, e: &dyn std::fmt::Display| {
            refused(refusal::FAILED, format!("cannot {what}: {e}"))
        };
        let user = User::from_name(&spec.user).map_err(|e| failed("look the user up", &e))?;
        let user = user.ok_or_else(|| {
            let text = format!(
                "this guest has no user `{}`",
                adit_names::escape(&spec.user)
            );
            refused(refusal::NO_USER, text)
        })?;
        let mut ends = match open.tty {
            Some(size) => terminal(size, &user).map_err(|e| failed("make a terminal", &e))?,
            None => pipes(open.stdin, &user).map_err(|e| failed("make a pipe", &e))?,
        };
        if let Some(place) = &spec.input {
            let file = file_of_input(place, &user);
            ends.theirs[0] = file.map_err(|e| failed("give it its input", &e))?.into();
        }
        let cwd = cwd(&spec.open.cwd, &user);
        let base = spec.cgroups.as_deref();
        let cgroup = base.and_then(|base| Cgroup::create(base, &format!("{CGROUP}{}", spec.id)));
        let setup = sys::ChildSetup {
            cgroup: cgroup.as_ref().and_then(Cgroup::procs),
            user: script::credentials(&user).map_err(|e| failed("become the user", &e))?,
            cwd: CString::new(cwd).map_err(|e| failed("use the working directory", &e))?,
            // The agent has given it back to this process.
            inherited: Inherited::default(),
            tty: ends.tty.is_some(),
            dies_with: Some(nix::unistd::getpid()),
        };
        let mut command = Command::new(&spec.program);
        let mut argv = open.argv.iter().map(|text| OsStr::from_bytes(text));
        if let Some(name) = argv.next() {
            command.arg0(name);
        }
        command.args(argv).env_clear();
        command
            .env("PATH", script::DEFAULT_PATH)
            .env("HOME", &user.dir)
            .env("USER", &user.name)
            .env("LOGNAME", &user.name)
            .env("SHELL", shell(&user))
            .env("LANG", "C.UTF-8");
        for (name, value) in &open.env {
            command.env(OsStr::from_bytes(name), OsStr::from_bytes(value));
        }
        command.env(MARKER, &spec.id);
        let [input, out, err] = ends.theirs;
        command.stdin(input).stdout(out).stderr(err);
        let cwd = setup.cwd.clone();
        let started = start(&mut command, setup, cgroup.as_ref());
        // The command's ends are in it.
        drop(command);
        match started {
            Ok(pid) => Ok(Self {
                pid,
                stdin: ends.stdin,
                outs: ends.outs,
                tty: ends.tty,
                cgroup,
                has_ended: false,
            }),
            Err(e) => {
                if let Some(cgroup) = cgroup {
                    cgroup.release();
                }
                Err(explain(spec, &cwd, &e))
            }
        }
    }

    /// Whether it has a terminal.
    pub(super) fn has_tty(&self) -> bool {
        self.tty.is_some()
    }

    /// Sends a signal to the command: with a terminal to the job in its foreground, else to all in its process group.
    pub(super) fn signal(&self, number: i32) {
        if self.has_ended {
            return;
        }
        let foreground = self.tty.as_ref().and_then(|tty| tcgetpgrp(tty).ok());
        let group = foreground.map_or(self.pid, |group| group.as_raw_pid());
        if let Ok(signal) = nix::sys::signal::Signal::try_from(number) {
            let _ = kill(Pid::from_raw(-group), signal);
        }
    }

    /// Its terminal has that size from now on.
    pub(super) fn resize(&self, size: Size) {
        if let Some(tty) = &self.tty {
            let _ = tcsetwinsize(tty, size_of(size));
        }
    }

    /// Waits for what has ended, without waiting. Returns how the command itself did, once.
    pub(super) fn reap(&mut self) -> Option<Status> {
        let mut own = None;
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) if pid.as_raw_pid() == self.pid => {
                    let code = status.exit_status().map(Status::Code);
                    let ended = code.or_else(|| status.terminating_signal().map(Status::Signal));
                    own = ended.or(own);
                    self.has_ended |= ended.is_some();
                }
                Ok(Some(_)) => {}
                Err(rustix::io::Errno::INTR) => {}
                Ok(None) | Err(_) => return own,
            }
        }
    }

    /// Kills what the command has left in its own session, after it has ended by itself; where there is no cgroup all that it has left:
    /// nobody could tell later whose it was.
    pub(super) fn end_rest(&self) {
        match &self.cgroup {
            // It was all there was, as after most commands: nobody needs to be looked for.
            Some(cgroup) if !cgroup.populated() => true,
            Some(_) => tree::kill_session(self.pid),
            None => tree::kill_descendants(),
        };
    }

    /// Kills all of it; false if something could not be killed.
    pub(super) fn kill(&self) -> bool {
        let until = Instant::now() + tree::KILL_LIMIT;
        let in_cgroup = self.cgroup.as_ref().is_none_or(|cgroup| cgroup.kill(until));
        in_cgroup & tree::kill_descendants()
    }

    /// Which limits it ran into, for people.
    pub(super) fn limits_hit(&self) -> Vec<String> {
        self.cgroup
            .as_ref()
            .map(Cgroup::limits_hit)
            .unwrap_or_default()
    }

    /// Gives its cgroup back.
    pub(super) fn release(self) {
        if let Some(cgroup) = self.cgroup {
            cgroup.release();
        }
    }
}

/// Starts a program, in its cgroup if there is one. Returns its pid.
fn start(
    command: &mut Command,
    setup: sys::ChildSetup,
    cgroup: Option<&Cgroup>,
) -> io::Result<i32> {
    if let Some(dir) = cgroup.and_then(Cgroup::directory)
        && let Ok(alone) = sys::Alone::now()
    {
        return sys::spawn_in(command, setup, dir.as_fd(), &alone);
    }
    Ok(sys::spawn(command, setup)?.id().cast_signed())
}

/// Where it begins: as asked, or the user's home if that is there.
fn cwd(asked: &[u8], user: &User) -> Vec<u8> {
    match asked {
        [] if user.dir.is_dir() => user.dir.as_os_str().as_bytes().to_vec(),
        [] => b"/".to_vec(),
        asked => asked.to_vec(),
    }
}

/// Says which step of a start most likely failed: the error number alone does not.
fn explain(spec: &Spec, cwd: &CString, e: &io::Error) -> Refused {
    let program = adit_names::escape(&spec.program.to_string_lossy()).to_string();
    let dir = Path::new(OsStr::from_bytes(cwd.as_bytes()));
    if !dir.is_dir() {
        let dir = adit_names::escape(&dir.to_string_lossy()).to_string();
        let text = format!("cannot start {program}: its working directory {dir} is no directory");
        return refused(refusal::CANNOT_RUN, text);
    }
    match e.kind() {
        ErrorKind::NotFound if !spec.program.exists() => {
            refused(refusal::NO_PROGRAM, format!("no such program: {program}"))
        }
        _ => refused(refusal::CANNOT_RUN, format!("cannot start {program}: {e}")),
    }
}

/// Standard output as a stream of this process's own, and /dev/null in its place.
pub(crate) fn take_stdout() -> io::Result<OwnedFd> {
    let own = io::stdout().as_fd().try_clone_to_owned()?;
    let nowhere = File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdout(&nowhere)?;
    rustix::stdio::dup2_stdin(&nowhere)?;
    Ok(own)
}

//! What the doorkeeper gives up before it serves: everything but what it does at one path.
//!
//! | by | left |
//! |---|---|
//! | capabilities | where it is root: to give its sockets to the VMM's user, and to reach that user's |
//! | landlock | to make and remove sockets beneath one directory; no file is read, written or started, no TCP, no abstract socket |
//! | seccomp | the calls of its loop. A file is opened as a name only (`O_PATH`), a socket is a Unix one, no process and no program is started |
//!
//! The port process has none of these rights, and tells this one nothing but numbers, so somebody has to take that over first and
//! find a mistake here.
//!
//! Landlock knows directories by what they are, and not by their paths. A VMM's own directory often comes and goes with it, so the
//! one above it is named. Where that was replaced, [`Confined::is_current`] says so, and the process ends: the next one names it anew.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetStatus, Scope,
};
use nix::libc;
use nix::sys::resource::Resource;
use rustix::thread::CapabilitySet;

use crate::privilege;
use crate::sandbox::{Rules, SandboxError, by_argument, exactly, lock_to, masked_is};

/// To give sockets to the VMM's user, to set their mode afterwards, and to use that user's directory and socket.
const CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::DAC_OVERRIDE);

/// The directory beneath which sockets may be made.
#[derive(Debug)]
pub struct Confined(Option<(PathBuf, (u64, u64))>);

impl Confined {
    /// Returns false if another directory is at the path now, in which this process can make nothing.
    pub fn is_current(&self) -> bool {
        let Self(Some((path, id))) = self else {
            return true;
        };
        identity(path).is_ok_and(|now| now == *id)
    }
}

fn identity(of: &Path) -> io::Result<(u64, u64)> {
    fs::metadata(of).map(|m| (m.dev(), m.ino()))
}

/// The directory that is named to landlock for sockets in `dir`: the one above, or the closest above that there is.
fn above(dir: &Path) -> &Path {
    let root = Path::new("/");
    let wanted = dir.parent().filter(|above| *above != root).unwrap_or(dir);
    let mut all = wanted.ancestors();
    all.find(|above| above.is_dir()).unwrap_or(root)
}

/// Confines the process, which has one thread, to sockets in `dir`.
///
/// # Errors
/// The kernel refuses.
pub fn confine(dir: &Path) -> io::Result<Confined> {
    privilege::limit(Resource::RLIMIT_CORE, 0)?;
    privilege::keep_capabilities(CAPABILITIES).map_err(io::Error::other)?;
    let above = above(dir).to_owned();
    let id = identity(&above)?;
    let confined = match lock_files(&above).map_err(io::Error::other)? {
        true => Confined(Some((above, id))),
        false => {
            tracing::warn!("the kernel has no landlock: only seccomp confines the doorkeeper");
            Confined(None)
        }
    };
    let rules = allowed().and_then(|allowed| Ok((allowed, refused()?)));
    let (allowed, refused) = rules.map_err(io::Error::other)?;
    lock_to(allowed, refused, libc::EACCES).map_err(io::Error::other)?;
    Ok(confined)
}

fn lock_files(above: &Path) -> Result<bool, SandboxError> {
    let sockets = AccessFs::MakeSock | AccessFs::RemoveFile;
    let ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI::V5))?
        .handle_access(AccessNet::from_all(ABI::V5))?
        .scope(Scope::from_all(ABI::V6))?
        .create()?;
    let status = match PathFd::new(above) {
        Ok(fd) => ruleset
            .add_rule(PathBeneath::new(fd.as_fd(), sockets))?
            .restrict_self()?,
        // It has gone this moment.
        Err(_) => ruleset.restrict_self()?,
    };
    Ok(status.ruleset != RulesetStatus::NotEnforced)
}

/// Opening a file for more than its name returns an error: a library may try.
fn refused() -> Result<Rules, seccompiler::BackendError> {
    let mut rules = Rules::new();
    rules.insert(libc::SYS_openat, vec![masked_is(2, PATH_ONLY, 0)?]);
    #[cfg(target_arch = "x86_64")]
    rules.insert(libc::SYS_open, vec![masked_is(1, PATH_ONLY, 0)?]);
    Ok(rules)
}

const PATH_ONLY: u32 = libc::O_PATH as u32;

fn allowed() -> Result<Rules, seccompiler::BackendError> {
    let mut calls = vec![
        // The port process, the log, and what is ready.
        libc::SYS_read,
        libc::SYS_write,
        libc::SYS_writev,
        libc::SYS_recvfrom,
        libc::SYS_sendmsg,
        libc::SYS_ppoll,
        libc::SYS_clock_gettime,
        libc::SYS_clock_nanosleep,
        libc::SYS_nanosleep,
        libc::SYS_restart_syscall,
        libc::SYS_futex,
        // Its path.
        libc::SYS_openat,
        libc::SYS_newfstatat,
        libc::SYS_statx,
        libc::SYS_fstat,
        libc::SYS_unlinkat,
        libc::SYS_fchmodat,
        libc::SYS_fchownat,
        libc::SYS_inotify_add_watch,
        libc::SYS_inotify_rm_watch,
        // Its sockets.
        libc::SYS_connect,
        libc::SYS_bind,
        libc::SYS_listen,
        libc::SYS_accept4,
        libc::SYS_close,
        libc::SYS_geteuid,
        // Memory.
        libc::SYS_munmap,
        libc::SYS_mremap,
        libc::SYS_madvise,
        libc::SYS_brk,
        libc::SYS_getrandom,
        // End.
        libc::SYS_exit,
        libc::SYS_exit_group,
        libc::SYS_rt_sigreturn,
        libc::SYS_rt_sigprocmask,
        libc::SYS_rt_sigaction,
        libc::SYS_sigaltstack,
        libc::SYS_getpid,
        libc::SYS_gettid,
    ];
    // musl's.
    #[cfg(target_arch = "x86_64")]
    calls.extend([
        libc::SYS_poll,
        libc::SYS_open,
        libc::SYS_stat,
        libc::SYS_lstat,
        libc::SYS_unlink,
        libc::SYS_chmod,
        libc::SYS_lchown,
    ]);
    let mut rules = by_argument()?;
    for makes_more in [libc::SYS_socketpair, libc::SYS_memfd_create] {
        rules.remove(&makes_more);
    }
    rules.extend(calls.into_iter().map(|call| (call, vec![])));
    let (family, stream) = (libc::AF_UNIX as u32, libc::SOCK_STREAM);
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    let kinds = [
        stream,
        stream | libc::SOCK_CLOEXEC,
        stream | libc::SOCK_NONBLOCK,
        stream | flags,
    ];
    let sockets = kinds.map(|kind| exactly(&[(0, family), (1, kind as u32), (2, 0)]));
    let sockets = sockets.into_iter().collect::<Result<_, _>>()?;
    rules.insert(libc::SYS_socket, sockets);
    Ok(rules)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::net::TcpListener;
    use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::os::unix::process::{CommandExt, ExitStatusExt};
    use std::process::{Command, ExitStatus};

    use super::*;

    /// Names what the process that a test starts tries, and where.
    const TRIES: &str = "ADIT_TEST_DOOR_TRIES";

    /// The status of a process that lacks landlock, which alone forbids what it tries.
    const NO_LANDLOCK: i32 = 77;

    /// Not a test by itself: the confined process of the others. It ends with 0 if it may do what it tries, and with 1 if not.
    #[test]
    fn tries() {
        let Some(what) = std::env::var_os(TRIES) else {
            return;
        };
        let what = what.into_string().unwrap();
        let (what, dir) = what.split_once(' ').unwrap();
        let dir = Path::new(dir);
        // The one of the test's own.
        let stderr = io::stderr();
        let confined = confine(&dir.join("vms/web-1")).unwrap();
        let done = match what {
            "serve" => serve(dir, &confined),
            "read" => File::open(dir.join("secret")).map(drop),
            "read-relatively" => File::open("/proc/self/maps").map(drop),
            "write" => File::create(dir.join("vms/web-1/file")).map(drop),
            "make-elsewhere" => UnixListener::bind(dir.join("a.sock")).map(drop),
            "remove-elsewhere" => fs::remove_file(dir.join("secret")),
            "listen-tcp" => TcpListener::bind("127.0.0.1:0").map(drop),
            "start" => Err(Command::new("/bin/true").exec()),
            "fork" => Command::new("/bin/true").spawn().map(drop),
            other => Err(io::Error::other(other.to_owned())),
        };
        if confined.0.is_none() && what.ends_with("elsewhere") {
            std::process::exit(NO_LANDLOCK);
        }
        if let Err(e) = &done {
            use io::Write;
            let _ = writeln!(&stderr, "{what}: {e}");
        }
        std::process::exit(done.is_err().into());
    }

    /// What a doorkeeper does all day.
    fn serve(dir: &Path, confined: &Confined) -> io::Result<()> {
        let own = dir.join("vms/web-1");
        for _ in 0..2 {
            let path = own.join("v.sock_741");
            let listener = UnixListener::bind(&path)?;
            fs::symlink_metadata(&path)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
            let _client = UnixStream::connect(&path)?;
            listener.accept()?.0.set_nonblocking(true)?;
            let name = fs::OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_PATH | libc::O_NOFOLLOW)
                .open(&path)?;
            name.metadata()?;
            fs::remove_file(&path)?;
            tracing::warn!("it can say something");
        }
        match confined.is_current() {
            true => Ok(()),
            false => Err(io::Error::other("its directory is there")),
        }
    }

    fn tried(what: &str) -> ExitStatus {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("vms/web-1")).unwrap();
        fs::write(dir.path().join("secret"), "x").unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "door::confine::tests::tries", "--test-threads=1"]);
        command.env(TRIES, format!("{what} {}", dir.path().display()));
        command.status().unwrap()
    }

    #[test]
    fn a_doorkeeper_does_its_work_and_opens_no_other_file_and_starts_no_program() {
        assert_eq!(tried("serve").code(), Some(0));
        for what in ["read", "read-relatively", "write"] {
            assert_eq!(tried(what).code(), Some(1), "{what}");
        }
        for what in ["listen-tcp", "start", "fork"] {
            assert_eq!(tried(what).signal(), Some(libc::SIGSYS), "{what}");
        }
        for what in ["make-elsewhere", "remove-elsewhere"] {
            match tried(what).code() {
                Some(NO_LANDLOCK) => println!("skipped: {what}: this kernel has no landlock"),
                code => assert_eq!(code, Some(1), "{what}"),
            }
        }
    }

    #[test]
    fn the_directory_above_is_named_unless_it_is_the_root() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path();
        assert_eq!(above(&at.join("a/b")), at);
        fs::create_dir_all(at.join("a/b")).unwrap();
        assert_eq!(above(&at.join("a/b")), at.join("a"));
        assert_eq!(above(Path::new("/tmp")), Path::new("/tmp"));
        // Another directory at the same path is another one.
        let confined = Confined(Some((at.join("a"), identity(&at.join("a")).unwrap())));
        assert!(confined.is_current());
        fs::rename(at.join("a"), at.join("old")).unwrap();
        assert!(!confined.is_current());
        fs::create_dir(at.join("a")).unwrap();
        assert!(!confined.is_current());
        assert!(Confined(None).is_current());
    }
}

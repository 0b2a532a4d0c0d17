//! What a doorkeeper gives up before it serves: everything but what it does at one path, or for one CID.
//!
//! | by | left at a path | left for a CID |
//! |---|---|---|
//! | capabilities | where it is root: to give its sockets to the VMM's user, and to reach that user's | none |
//! | landlock | to make and remove sockets beneath one directory; no file is read, written or started, no TCP, no abstract socket | nothing |
//! | seccomp | the calls of its loop. A file is opened as a name only (`O_PATH`), a socket is a Unix one, no process and no program is started | the same without files; a socket is one of AF_VSOCK |
//!
//! The port process has none of these rights, and tells this one nothing but numbers, so somebody has to take that over first and
//! find a mistake here.
//!
//! Landlock knows directories by what they are, and not by their paths. A VMM's own directory often comes and goes with it, so the
//! one above it is named. Where that was replaced, [`Confined::is_current`] says so, and the process ends: the next one names it anew. The
//! VM's own directory stays, and is named itself: the one above it has those of other VMs.

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
use crate::sandbox::{ALWAYS, Rules, SandboxError, by_argument, exactly, lock_to, masked_is};

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

/// The directory that is named to landlock for sockets in `dir`: the one above, or the closest above that there is; itself, if it stays.
fn above(dir: &Path, stays: bool) -> &Path {
    let root = Path::new("/");
    let wanted = dir.parent().filter(|above| *above != root && !stays);
    let wanted = wanted.unwrap_or(dir);
    let mut all = wanted.ancestors();
    all.find(|above| above.is_dir()).unwrap_or(root)
}

/// Confines the process, which has one thread, to sockets in `dir`. `stays`: that directory is never replaced.
///
/// # Errors
/// The kernel refuses.
pub fn confine(dir: &Path, stays: bool) -> io::Result<Confined> {
    give_up(CAPABILITIES)?;
    let above = above(dir, stays).to_owned();
    let id = identity(&above)?;
    let locked = lock_files(Some(&above))?;
    lock_calls(at_a_path, &[libc::AF_UNIX])?;
    Ok(Confined(locked.then_some((above, id))))
}

/// Confines the process, which has one thread, to sockets of AF_VSOCK.
///
/// # Errors
/// The kernel refuses.
pub fn confine_to_vsock() -> io::Result<()> {
    give_up(CapabilitySet::empty())?;
    lock_files(None)?;
    lock_calls(for_a_cid, &[libc::AF_VSOCK])
}

fn give_up(but: CapabilitySet) -> io::Result<()> {
    privilege::limit(Resource::RLIMIT_CORE, 0)?;
    privilege::keep_capabilities(but).map_err(io::Error::other)
}

type Built = Result<Rules, seccompiler::BackendError>;

/// `own`: what this kind of doorkeeper has beyond the others.
fn lock_calls(own: impl FnOnce(&mut Rules) -> Built, families: &[i32]) -> io::Result<()> {
    let locked = || {
        let mut allowed = allowed(families)?;
        let refused = own(&mut allowed)?;
        lock_to(allowed, refused, libc::EACCES)
    };
    locked().map_err(io::Error::other)
}

/// Returns false if the kernel has no landlock.
fn lock_files(above: Option<&Path>) -> io::Result<bool> {
    let sockets = AccessFs::MakeSock | AccessFs::RemoveFile;
    let locked = || {
        let ruleset = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(ABI::V5))?
            .handle_access(AccessNet::from_all(ABI::V5))?
            .scope(Scope::from_all(ABI::V6))?
            .create()?;
        // One that has gone this moment is not named.
        match above.and_then(|above| PathFd::new(above).ok()) {
            Some(fd) => ruleset
                .add_rule(PathBeneath::new(fd.as_fd(), sockets))?
                .restrict_self(),
            None => ruleset.restrict_self(),
        }
    };
    let status = locked().map_err(|e| io::Error::other(SandboxError::from(e)))?;
    let is_locked = status.ruleset != RulesetStatus::NotEnforced;
    if !is_locked {
        tracing::warn!("the kernel has no landlock: only seccomp confines the doorkeeper");
    }
    Ok(is_locked)
}

const PATH_ONLY: u32 = libc::O_PATH as u32;

/// The calls of a doorkeeper at a path. Returns those that fail: a library may try to open a file for more than its name.
fn at_a_path(rules: &mut Rules) -> Built {
    let mut calls = vec![
        libc::SYS_openat,
        libc::SYS_fstat,
        libc::SYS_unlinkat,
        libc::SYS_fchmodat,
        libc::SYS_fchownat,
        libc::SYS_bind,
        libc::SYS_listen,
        libc::SYS_accept4,
        libc::SYS_geteuid,
    ];
    // musl's.
    #[cfg(target_arch = "x86_64")]
    calls.extend([
        libc::SYS_open,
        libc::SYS_unlink,
        libc::SYS_chmod,
        libc::SYS_lchown,
    ]);
    rules.extend(calls.into_iter().map(|call| (call, vec![])));
    let mut refused = Rules::new();
    refused.insert(libc::SYS_openat, vec![masked_is(2, PATH_ONLY, 0)?]);
    #[cfg(target_arch = "x86_64")]
    refused.insert(libc::SYS_open, vec![masked_is(1, PATH_ONLY, 0)?]);
    Ok(refused)
}

/// For a CID no file is opened at all. A library may try.
fn for_a_cid(rules: &mut Rules) -> Built {
    let mut calls = vec![libc::SYS_openat];
    #[cfg(target_arch = "x86_64")]
    calls.push(libc::SYS_open);
    let none: Rules = calls.into_iter().map(|call| (call, vec![])).collect();
    rules.extend(none.clone());
    Ok(none)
}

/// Of every doorkeeper, with sockets of these families.
fn allowed(families: &[i32]) -> Built {
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
        // What is there, and changes of it.
        libc::SYS_newfstatat,
        libc::SYS_statx,
        libc::SYS_inotify_add_watch,
        libc::SYS_inotify_rm_watch,
        // Its sockets.
        libc::SYS_connect,
        libc::SYS_close,
    ];
    calls.extend(ALWAYS);
    // musl's.
    #[cfg(target_arch = "x86_64")]
    calls.extend([libc::SYS_poll, libc::SYS_stat, libc::SYS_lstat]);
    let mut rules = by_argument()?;
    for makes_more in [libc::SYS_socketpair, libc::SYS_memfd_create] {
        rules.remove(&makes_more);
    }
    rules.extend(calls.into_iter().map(|call| (call, vec![])));
    let stream = libc::SOCK_STREAM;
    let kinds = [
        stream,
        stream | libc::SOCK_CLOEXEC,
        stream | libc::SOCK_NONBLOCK,
        stream | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
    ];
    let pairs = families.iter().flat_map(|f| kinds.map(|kind| (*f, kind)));
    let sockets = pairs.map(|(f, kind)| exactly(&[(0, f as u32), (1, kind as u32), (2, 0)]));
    rules.insert(libc::SYS_socket, sockets.collect::<Result<_, _>>()?);
    Ok(rules)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::os::fd::OwnedFd;
    use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::os::unix::process::{CommandExt, ExitStatusExt};
    use std::process::{Command, ExitStatus, Stdio};

    use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, listen, socket};
    use rustix::fs::inotify::{self, CreateFlags, WatchFlags};

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
        if let Some(what) = what.strip_prefix("cid-") {
            let before = Before {
                inotify: inotify::init(CreateFlags::CLOEXEC).unwrap(),
                pair: UnixStream::pair().unwrap(),
            };
            confine_to_vsock().unwrap();
            std::process::exit(before.tries(what, dir).is_err().into());
        }
        let stays = what.starts_with("own-");
        let what = what.trim_start_matches("own-");
        let confined = confine(&dir.join("vms/web-1"), stays).unwrap();
        let done = match what {
            "serve" => serve(dir, &confined),
            "read" => File::open(dir.join("secret")).map(drop),
            "read-relatively" => File::open("/proc/self/maps").map(drop),
            "write" => File::create(dir.join("vms/web-1/file")).map(drop),
            "beside" => UnixListener::bind(dir.join("vms/a.sock")).map(drop),
            "make-elsewhere" => UnixListener::bind(dir.join("a.sock")).map(drop),
            "remove-elsewhere" => fs::remove_file(dir.join("secret")),
            "listen-tcp" => TcpListener::bind("127.0.0.1:0").map(drop),
            "start" => Err(Command::new("/bin/true").exec()),
            "fork" => Command::new("/bin/true").spawn().map(drop),
            other => Err(io::Error::other(other.to_owned())),
        };
        if confined.0.is_none() && (what.ends_with("elsewhere") || what == "beside") {
            std::process::exit(NO_LANDLOCK);
        }
        if let Err(e) = &done {
            let _ = writeln!(&stderr, "{what}: {e}");
        }
        std::process::exit(done.is_err().into());
    }

    /// What a doorkeeper of a CID has before it is confined.
    struct Before {
        inotify: OwnedFd,
        pair: (UnixStream, UnixStream),
    }

    impl Before {
        /// No test makes a socket of AF_VSOCK on the machine itself: the nested ones do.
        fn tries(&self, what: &str, dir: &Path) -> io::Result<()> {
            let secret = dir.join("secret");
            match what {
                "serve" => {
                    let (mut near, mut far) = (&self.pair.0, &self.pair.1);
                    near.write_all(b"x")?;
                    far.read_exact(&mut [0])?;
                    inotify::add_watch(&self.inotify, dir, WatchFlags::CREATE)?;
                    tracing::warn!("it can say something");
                    match secret.exists() {
                        true => Ok(()),
                        false => Err(io::ErrorKind::NotFound.into()),
                    }
                }
                "read" => File::open(secret).map(drop),
                "name" => name(&secret).map(drop),
                "write" => File::create(dir.join("vms/web-1/file")).map(drop),
                "remove" => fs::remove_file(secret),
                "unix" => UnixStream::connect(dir.join("a.sock")).map(drop),
                "datagrams" => {
                    let (family, kind) = (AddressFamily::Vsock, SockType::Datagram);
                    Ok(socket(family, kind, SockFlag::empty(), None).map(drop)?)
                }
                "tcp" => TcpListener::bind("127.0.0.1:0").map(drop),
                "listen" => Ok(listen(&self.pair.0, Backlog::new(1)?)?),
                "pair" => UnixStream::pair().map(drop),
                "start" => Err(Command::new("/bin/true").exec()),
                "fork" => Command::new("/bin/true").spawn().map(drop),
                other => Err(io::Error::other(other.to_owned())),
            }
        }
    }

    /// Opens a file as a name only.
    fn name(path: &Path) -> io::Result<File> {
        let mut how = fs::OpenOptions::new();
        how.read(true).custom_flags(libc::O_PATH | libc::O_NOFOLLOW);
        how.open(path)
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
            name(&path)?.metadata()?;
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
        // What it says of itself is not of this run of tests.
        command.stdout(Stdio::null()).status().unwrap()
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
    fn a_doorkeeper_in_the_vms_own_directory_makes_nothing_in_those_of_others() {
        assert_eq!(tried("own-serve").code(), Some(0));
        for (what, status) in [("beside", 0), ("own-beside", 1)] {
            match tried(what).code() {
                Some(NO_LANDLOCK) => println!("skipped: {what}: this kernel has no landlock"),
                code => assert_eq!(code, Some(status), "{what}"),
            }
        }
    }

    #[test]
    fn a_doorkeeper_of_a_cid_has_no_file_at_all_and_no_other_kind_of_socket() {
        assert_eq!(tried("cid-serve").code(), Some(0));
        for what in ["cid-read", "cid-name", "cid-write"] {
            assert_eq!(tried(what).code(), Some(1), "{what}");
        }
        for what in [
            "remove",
            "unix",
            "datagrams",
            "tcp",
            "listen",
            "pair",
            "start",
            "fork",
        ] {
            let what = format!("cid-{what}");
            assert_eq!(tried(&what).signal(), Some(libc::SIGSYS), "{what}");
        }
    }

    #[test]
    fn the_directory_above_is_named_unless_it_is_the_root_or_its_own_stays() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path();
        assert_eq!(above(&at.join("a/b"), false), at);
        fs::create_dir_all(at.join("a/b")).unwrap();
        assert_eq!(above(&at.join("a/b"), false), at.join("a"));
        assert_eq!(above(&at.join("a/b"), true), at.join("a/b"));
        assert_eq!(above(Path::new("/tmp"), false), Path::new("/tmp"));
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

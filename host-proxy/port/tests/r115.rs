//! R115: what a port process can still reach when its guest controls it. A child enters the sandbox as `adit-port` does, makes
//! one attempt, and the test checks the effect from outside.
#![allow(unsafe_code)] // attempts are bare system calls, with arguments that no library would pass

mod guest;
mod running;

use std::ffi::CStr;
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use adit_port::place::Place;
use adit_port::{born, privilege, sandbox};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::Uid;
use running::{Running, command};
use rustix::thread::{CapabilitySet, capabilities};

/// Which attempt the child makes, and where.
const ATTEMPT: &str = "ADIT_R115_ATTEMPT";
const DIR: &str = "ADIT_R115_DIR";
const OTHER: &str = "ADIT_R115_OTHER";
/// Whether the child enters the sandbox first.
const INSIDE: &str = "ADIT_R115_INSIDE";
const TEST: &str = "r115_nothing_leaves_the_sandbox";
/// User ids that no machine which runs this test uses: one for each of two VMs.
const OWN: u32 = 70_001;
const OTHERS: u32 = 70_002;
/// Exit statuses of the child.
const GOT_THROUGH: i32 = 42;
const REFUSED: i32 = 43;

/// What the attempts are made on.
struct Scene {
    /// This VM's directory.
    dir: String,
    /// Another VM's directory.
    other_dir: String,
    /// The socket of another daemon. Everybody may use it.
    daemon: String,
    /// Another user's process.
    other: i32,
    /// A socket pair, such as every tunnel has.
    stream: (OwnedFd, OwnedFd),
    /// A terminal.
    terminal: Option<OwnedFd>,
}

impl Scene {
    fn of_child() -> Self {
        let dir = std::env::var(DIR).unwrap();
        let at = Path::new(&dir).parent().unwrap().to_owned();
        let stream = std::os::unix::net::UnixStream::pair().unwrap();
        let terminal = fs::File::options().read(true).write(true).open("/dev/ptmx");
        Self {
            other_dir: at.join("web-2").display().to_string(),
            daemon: at.join("daemon").display().to_string(),
            dir,
            other: std::env::var(OTHER).unwrap().parse().unwrap(),
            stream: (stream.0.into(), stream.1.into()),
            terminal: terminal.ok().map(OwnedFd::from),
        }
    }
}

/// Makes a system call. Returns the kernel's result; errors are negative.
fn call<const N: usize>(number: libc::c_long, arguments: [usize; N]) -> i64 {
    let mut all = [0; 6];
    all[..N].copy_from_slice(&arguments);
    let [a, b, c, d, e, f] = all;
    // SAFETY: a pointer among the arguments leads to an object of the caller that outlives the call, or is invalid, and then
    // the kernel returns an error.
    let result = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    match result {
        -1 => -i64::from(nix::errno::Errno::last_raw()),
        result => result,
    }
}

fn path(text: &str) -> std::ffi::CString {
    std::ffi::CString::new(text).unwrap()
}

fn at(text: &CStr) -> usize {
    text.as_ptr() as usize
}

fn socket_address(to: &str) -> (libc::sockaddr_un, usize) {
    // SAFETY: all zeros is a valid sockaddr_un.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as u16;
    for (to, from) in address.sun_path.iter_mut().zip(to.bytes()) {
        *to = from as libc::c_char;
    }
    (address, size_of::<libc::sockaddr_un>())
}

fn open(what: &str, flags: i32) -> i64 {
    let what = path(what);
    call(
        libc::SYS_openat,
        [libc::AT_FDCWD as usize, at(&what), flags as usize, 0o600],
    )
}

fn pair(kind: i32) -> i64 {
    let mut ends = [0i32; 2];
    let arguments = [
        libc::AF_UNIX as usize,
        kind as usize,
        0,
        ends.as_mut_ptr() as usize,
    ];
    call(libc::SYS_socketpair, arguments)
}

fn set_option(on: &OwnedFd, level: i32, option: i32) -> i64 {
    let value = 7u32;
    let (level, option) = (level as usize, option as usize);
    let (value, len) = (&raw const value as usize, size_of::<u32>());
    call(
        libc::SYS_setsockopt,
        [on.as_raw_fd() as usize, level, option, value, len],
    )
}

fn control(on: &OwnedFd, command: i32, argument: usize) -> i64 {
    call(
        libc::SYS_fcntl,
        [on.as_raw_fd() as usize, command as usize, argument],
    )
}

/// Whether the attempt succeeds without the sandbox. This shows that the attempt itself is made correctly.
#[derive(Clone, Copy, PartialEq)]
enum Outside {
    /// For everybody.
    Works,
    /// For root.
    WorksForRoot,
    /// It depends on the machine.
    Depends,
}
use Outside::{Depends, Works, WorksForRoot};

type Attempt = (&'static str, Outside, fn(&Scene) -> i64);

/// All attempts. Each returns the kernel's result; it succeeded if that is not negative.
const KIT: &[Attempt] = &[
    // Sockets of every family and type.
    ("socket inet stream", Works, |_| {
        call(libc::SYS_socket, [2, 1, 0])
    }),
    ("socket inet datagram", Works, |_| {
        call(libc::SYS_socket, [2, 2, 0])
    }),
    ("socket inet raw", WorksForRoot, |_| {
        call(libc::SYS_socket, [2, 3, 1])
    }),
    ("socket inet6", Depends, |_| {
        call(libc::SYS_socket, [10, 1, 0])
    }),
    ("socket unix stream", Works, |_| {
        call(libc::SYS_socket, [1, 1, 0])
    }),
    ("socket unix datagram", Works, |_| {
        call(libc::SYS_socket, [1, 2, 0])
    }),
    ("socket unix seqpacket", Works, |_| {
        call(libc::SYS_socket, [1, 5, 0])
    }),
    ("socket netlink", Works, |_| {
        call(libc::SYS_socket, [16, 3, 0])
    }),
    ("socket packet", Depends, |_| {
        call(libc::SYS_socket, [17, 3, 0])
    }),
    ("socket vsock", Depends, |_| {
        call(libc::SYS_socket, [40, 1, 0])
    }),
    ("socket alg", Depends, |_| {
        call(libc::SYS_socket, [38, 5, 0])
    }),
    ("socketpair datagram", Works, |_| pair(libc::SOCK_DGRAM)),
    ("socketpair datagram closed on exec", Works, |_| {
        pair(libc::SOCK_DGRAM | libc::SOCK_CLOEXEC)
    }),
    ("socketpair seqpacket", Works, |_| {
        pair(libc::SOCK_SEQPACKET)
    }),
    ("datagram to a daemon", Works, |scene| {
        let mut ends = [0i32; 2];
        let ends_at = ends.as_mut_ptr() as usize;
        let kind = libc::SOCK_DGRAM as usize;
        let made = call(
            libc::SYS_socketpair,
            [libc::AF_UNIX as usize, kind, 0, ends_at],
        );
        if made < 0 {
            return made;
        }
        let (address, len) = socket_address(&scene.daemon);
        let text = b"escaped";
        let (text, bytes) = (text.as_ptr() as usize, text.len());
        let to = &raw const address as usize;
        call(
            libc::SYS_sendto,
            [ends[0] as usize, text, bytes, 0, to, len],
        )
    }),
    ("send to an address", Depends, |scene| {
        let (address, len) = socket_address(&scene.daemon);
        let text = b"escaped";
        let (text, bytes) = (text.as_ptr() as usize, text.len());
        let to = &raw const address as usize;
        let from = scene.stream.0.as_raw_fd() as usize;
        call(libc::SYS_sendto, [from, text, bytes, 0, to, len])
    }),
    ("connect", Depends, |scene| {
        let (address, len) = socket_address(&scene.daemon);
        let from = scene.stream.0.as_raw_fd() as usize;
        call(libc::SYS_connect, [from, &raw const address as usize, len])
    }),
    ("bind", Depends, |scene| {
        let (address, len) = socket_address(&format!("{}/mine", scene.dir));
        let from = scene.stream.0.as_raw_fd() as usize;
        call(libc::SYS_bind, [from, &raw const address as usize, len])
    }),
    ("SO_MARK", WorksForRoot, |scene| {
        set_option(&scene.stream.0, libc::SOL_SOCKET, libc::SO_MARK)
    }),
    ("SO_PRIORITY", WorksForRoot, |scene| {
        set_option(&scene.stream.0, libc::SOL_SOCKET, libc::SO_PRIORITY)
    }),
    ("SO_PASSCRED", Works, |scene| {
        set_option(&scene.stream.0, libc::SOL_SOCKET, libc::SO_PASSCRED)
    }),
    ("SO_ATTACH_FILTER", Depends, |scene| {
        set_option(&scene.stream.0, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER)
    }),
    ("TCP_REPAIR", Depends, |scene| {
        set_option(&scene.stream.0, libc::IPPROTO_TCP, 19)
    }),
    // Other processes.
    ("ptrace", WorksForRoot, |scene| {
        call(
            libc::SYS_ptrace,
            [libc::PTRACE_SEIZE as usize, scene.other as usize, 0, 0],
        )
    }),
    ("kill", WorksForRoot, |scene| {
        call(
            libc::SYS_kill,
            [scene.other as usize, libc::SIGURG as usize],
        )
    }),
    ("kill everybody", Depends, |_| {
        call(libc::SYS_kill, [-1isize as usize, 0])
    }),
    ("tgkill", WorksForRoot, |scene| {
        let other = scene.other as usize;
        call(libc::SYS_tgkill, [other, other, libc::SIGURG as usize])
    }),
    ("tkill", WorksForRoot, |scene| {
        call(
            libc::SYS_tkill,
            [scene.other as usize, libc::SIGURG as usize],
        )
    }),
    ("rt_sigqueueinfo", Depends, |scene| {
        let info = [0u64; 16];
        let info = info.as_ptr() as usize;
        call(
            libc::SYS_rt_sigqueueinfo,
            [scene.other as usize, libc::SIGURG as usize, info],
        )
    }),
    ("pidfd_open", Works, |scene| {
        call(libc::SYS_pidfd_open, [scene.other as usize, 0])
    }),
    ("F_SETOWN", WorksForRoot, |scene| {
        control(&scene.stream.0, libc::F_SETOWN, scene.other as usize)
    }),
    ("F_SETOWN_EX", WorksForRoot, |scene| {
        let owner = [0, scene.other];
        control(&scene.stream.0, 15, owner.as_ptr() as usize)
    }),
    ("F_SETSIG", Works, |scene| {
        control(&scene.stream.0, 10, libc::SIGKILL as usize)
    }),
    ("F_SETLEASE", Depends, |scene| {
        control(&scene.stream.0, libc::F_SETLEASE, libc::F_RDLCK as usize)
    }),
    ("F_NOTIFY", Depends, |scene| {
        control(&scene.stream.0, libc::F_NOTIFY, 1)
    }),
    ("F_SETPIPE_SZ", Depends, |scene| {
        control(&scene.stream.0, libc::F_SETPIPE_SZ, 1 << 20)
    }),
    ("process_vm_readv", WorksForRoot, |scene| {
        let mut byte = 0u8;
        let here = libc::iovec {
            iov_base: (&raw mut byte).cast(),
            iov_len: 1,
        };
        // The other process runs the same program, but the address may be invalid there: EFAULT counts as success too.
        let there = &raw const here as usize;
        let said = call(
            libc::SYS_process_vm_readv,
            [scene.other as usize, there, 1, there, 1, 0],
        );
        if said == -i64::from(libc::EFAULT) {
            0
        } else {
            said
        }
    }),
    ("memory of another process", WorksForRoot, |scene| {
        open(&format!("/proc/{}/mem", scene.other), libc::O_RDWR)
    }),
    ("its own memory by name", Works, |_| {
        open("/proc/self/mem", libc::O_RDWR)
    }),
    ("setpriority", WorksForRoot, |scene| {
        call(libc::SYS_setpriority, [0, scene.other as usize, 5])
    }),
    ("sched_setaffinity", Depends, |scene| {
        let mask = [1u64; 16];
        call(
            libc::SYS_sched_setaffinity,
            [scene.other as usize, 128, mask.as_ptr() as usize],
        )
    }),
    ("prlimit", WorksForRoot, |scene| {
        let mut limit = [0u64; 2];
        let old = limit.as_mut_ptr() as usize;
        call(libc::SYS_prlimit64, [scene.other as usize, 7, 0, old])
    }),
    // Files.
    ("/etc/shadow", WorksForRoot, |_| {
        open("/etc/shadow", libc::O_RDONLY)
    }),
    ("/etc/passwd", Works, |_| {
        open("/etc/passwd", libc::O_RDONLY)
    }),
    ("openat2", Works, |_| {
        let (what, how) = (c"/etc/passwd", [0u64; 3]);
        call(
            libc::SYS_openat2,
            [libc::AT_FDCWD as usize, at(what), how.as_ptr() as usize, 24],
        )
    }),
    ("another VM's log", WorksForRoot, |scene| {
        open(&format!("{}/port.log", scene.other_dir), libc::O_RDONLY)
    }),
    ("its own directory", Works, |scene| {
        open(
            &format!("{}/new", scene.dir),
            libc::O_CREAT | libc::O_WRONLY,
        )
    }),
    ("unlink", Works, |scene| {
        let what = path(&format!("{}/ctl.sock", scene.dir));
        call(libc::SYS_unlink, [at(&what)])
    }),
    ("symlink", Works, |scene| {
        let what = path(&format!("{}/link", scene.dir));
        call(libc::SYS_symlink, [at(c"/etc/shadow"), at(&what)])
    }),
    ("chmod", Works, |scene| {
        let what = path(&scene.dir);
        call(libc::SYS_chmod, [at(&what), 0o700])
    }),
    ("chown", WorksForRoot, |scene| {
        let what = path(&scene.dir);
        call(libc::SYS_chown, [at(&what), 0, 0])
    }),
    ("chdir", Works, |_| call(libc::SYS_chdir, [at(c"/")])),
    ("chroot", WorksForRoot, |_| {
        call(libc::SYS_chroot, [at(c"/")])
    }),
    ("mount", WorksForRoot, |scene| {
        let on = path(&scene.other_dir);
        let kind = c"tmpfs";
        let said = call(libc::SYS_mount, [at(kind), at(&on), at(kind), 0, 0]);
        call(libc::SYS_umount2, [at(&on), 0]);
        said
    }),
    ("fsopen", WorksForRoot, |_| {
        call(libc::SYS_fsopen, [at(c"tmpfs"), 0])
    }),
    ("TIOCSTI", Depends, |scene| {
        let (byte, on) = (b'x', scene.terminal.as_ref().map_or(0, AsRawFd::as_raw_fd));
        call(
            libc::SYS_ioctl,
            [
                on as usize,
                libc::TIOCSTI as usize,
                &raw const byte as usize,
            ],
        )
    }),
    ("TIOCLINUX", Depends, |scene| {
        let (byte, on) = (2u8, scene.terminal.as_ref().map_or(0, AsRawFd::as_raw_fd));
        call(
            libc::SYS_ioctl,
            [
                on as usize,
                libc::TIOCLINUX as usize,
                &raw const byte as usize,
            ],
        )
    }),
    ("FIOASYNC", Works, |scene| {
        let (on, with) = (1i32, scene.stream.0.as_raw_fd() as usize);
        call(
            libc::SYS_ioctl,
            [with, libc::FIOASYNC as usize, &raw const on as usize],
        )
    }),
    ("FIOSETOWN", WorksForRoot, |scene| {
        let (owner, with) = (scene.other, scene.stream.0.as_raw_fd() as usize);
        call(libc::SYS_ioctl, [with, 0x8901, &raw const owner as usize])
    }),
    // Programs, threads, namespaces, users.
    ("execve", Depends, |_| {
        let arguments = [c"/bin/true".as_ptr(), std::ptr::null()];
        let arguments = arguments.as_ptr() as usize;
        call(
            libc::SYS_execve,
            [at(c"/bin/absent"), arguments, arguments + 8],
        )
    }),
    ("fork", Works, |_| {
        let said = call(libc::SYS_clone, [libc::SIGCHLD as usize, 0, 0, 0, 0]);
        if said == 0 {
            // SAFETY: the fork's child ends at once.
            unsafe { libc::_exit(0) };
        }
        said
    }),
    ("unshare users", Depends, |_| {
        call(libc::SYS_unshare, [libc::CLONE_NEWUSER as usize])
    }),
    ("unshare mounts", WorksForRoot, |_| {
        call(libc::SYS_unshare, [libc::CLONE_NEWNS as usize])
    }),
    ("unshare network", WorksForRoot, |_| {
        call(libc::SYS_unshare, [libc::CLONE_NEWNET as usize])
    }),
    ("clone3 with users", Depends, |_| {
        let mut how = [0u64; 11];
        how[0] = libc::CLONE_NEWUSER as u64;
        how[4] = libc::SIGCHLD as u64;
        let said = call(libc::SYS_clone3, [how.as_ptr() as usize, 88]);
        if said == 0 {
            // SAFETY: the fork's child ends at once.
            unsafe { libc::_exit(0) };
        }
        said
    }),
    ("setns", Depends, |scene| {
        call(libc::SYS_setns, [scene.stream.0.as_raw_fd() as usize, 0])
    }),
    ("setuid", WorksForRoot, |_| call(libc::SYS_setuid, [0])),
    ("setresgid", WorksForRoot, |_| {
        call(libc::SYS_setresgid, [0, 0, 0])
    }),
    ("setgroups", WorksForRoot, |_| {
        call(libc::SYS_setgroups, [0, 0])
    }),
    ("capset", Works, |_| {
        let (head, sets) = ([0x2008_0522u32, 0], [0u32; 6]);
        call(
            libc::SYS_capset,
            [head.as_ptr() as usize, sets.as_ptr() as usize],
        )
    }),
    ("dumpable", Works, |_| {
        call(libc::SYS_prctl, [4, 1, 0, 0, 0])
    }),
    ("to be ptraced", Depends, |_| {
        call(libc::SYS_prctl, [0x5961_6d61, usize::MAX, 0, 0, 0])
    }),
    ("a filter of its own", Depends, |_| {
        call(libc::SYS_seccomp, [0, 0, 0])
    }),
    // Facilities of the kernel.
    ("keyctl", Depends, |_| {
        call(libc::SYS_keyctl, [0, -3isize as usize, 1])
    }),
    ("add_key", Depends, |_| {
        let bytes = c"x";
        call(
            libc::SYS_add_key,
            [at(c"user"), at(c"adit"), at(bytes), 1, -2isize as usize],
        )
    }),
    ("bpf", Depends, |_| call(libc::SYS_bpf, [0, 0, 0])),
    ("io_uring", Depends, |_| {
        let parameters = [0u64; 32];
        call(libc::SYS_io_uring_setup, [1, parameters.as_ptr() as usize])
    }),
    ("userfaultfd", Depends, |_| call(libc::SYS_userfaultfd, [1])),
    ("perf_event_open", Depends, |_| {
        let about = [0u64; 16];
        call(
            libc::SYS_perf_event_open,
            [about.as_ptr() as usize, 0, usize::MAX, usize::MAX, 0],
        )
    }),
    ("shared memory by key", Works, |_| {
        call(libc::SYS_shmget, [0, 4096, 0o1600])
    }),
    ("message queue", Depends, |_| {
        call(libc::SYS_msgget, [0, 0o1600])
    }),
    ("reboot", Depends, |_| call(libc::SYS_reboot, [0, 0, 0, 0])),
    ("set the clock", Depends, |_| {
        call(libc::SYS_clock_settime, [0, 0])
    }),
    ("kexec", Depends, |_| {
        call(libc::SYS_kexec_load, [0, 0, 0, 0])
    }),
    ("modules", Depends, |_| {
        call(libc::SYS_init_module, [0, 0, 0])
    }),
    ("code", Works, |_| {
        let code = (libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC) as usize;
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as usize;
        call(libc::SYS_mmap, [0, 4096, code, flags, usize::MAX, 0])
    }),
    ("memory without end", Works, |_| {
        let access = (libc::PROT_READ | libc::PROT_WRITE) as usize;
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE) as usize;
        call(libc::SYS_mmap, [0, 2 << 30, access, flags, usize::MAX, 0])
    }),
    ("a lock of a file", Works, |scene| {
        let on = scene.terminal.as_ref().unwrap_or(&scene.stream.0);
        call(
            libc::SYS_flock,
            [
                on.as_raw_fd() as usize,
                (libc::LOCK_EX | libc::LOCK_NB) as usize,
            ],
        )
    }),
    #[cfg(target_arch = "x86_64")]
    ("x32", Depends, |_| call(0x4000_0000 | libc::SYS_getpid, [])),
    #[cfg(target_arch = "x86_64")]
    ("iopl", Depends, |_| call(libc::SYS_iopl, [3])),
];

/// Another process. Drop ends it by its pid.
struct Sleeper(Child);

impl Sleeper {
    fn start() -> Self {
        Self(Command::new("sleep").arg("1000").spawn().unwrap())
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The child: enters the sandbox as `adit-port` does, makes one attempt, and ends with a status that tells the result.
fn child(name: &str) -> ! {
    let scene = Scene::of_child();
    let attempt = KIT.iter().find(|(n, ..)| *n == name);
    if std::env::var_os(INSIDE).is_some() {
        privilege::give_up(Uid::effective().is_root().then_some(OWN), 0).unwrap();
        sandbox::lock_files().unwrap();
        sandbox::lock_calls().unwrap();
    }
    // What the loop itself does must still work in the sandbox.
    let status = match attempt {
        None => 0,
        Some((_, _, attempt)) => match attempt(&scene) {
            0.. => GOT_THROUGH,
            _ => REFUSED,
        },
    };
    // SAFETY: only ends the process; no other code of it runs.
    unsafe { libc::_exit(status) }
}

#[test]
fn r115_nothing_leaves_the_sandbox() {
    if let Ok(name) = std::env::var(ATTEMPT) {
        child(&name);
    }
    let root = Uid::effective().is_root();
    if !root {
        println!("skipped: a user of its own takes root; the filters are tried all the same");
    }
    // Root in a container may lack capabilities.
    let wanted = CapabilitySet::SYS_ADMIN
        | CapabilitySet::SYS_PTRACE
        | CapabilitySet::SYS_CHROOT
        | CapabilitySet::NET_ADMIN
        | CapabilitySet::NET_RAW;
    let whole = root && capabilities(None).unwrap().effective.contains(wanted);
    let run = tempfile::tempdir().unwrap();
    fs::set_permissions(run.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let dir = run.path().join("web-1");
    let _place = Place::take(&dir).unwrap();
    let other_dir = run.path().join("web-2");
    fs::create_dir(&other_dir).unwrap();
    fs::write(other_dir.join("port.log"), "another VM's").unwrap();
    fs::set_permissions(&other_dir, fs::Permissions::from_mode(0o700)).unwrap();
    // A daemon that accepts datagrams from everybody, and trusts what the kernel says about the sender.
    let at = run.path().join("daemon");
    let daemon = UnixDatagram::bind(&at).unwrap();
    fs::set_permissions(&at, fs::Permissions::from_mode(0o777)).unwrap();
    daemon.set_nonblocking(true).unwrap();
    let escaped = || daemon.recv(&mut [0; 64]).is_ok();
    let mut other = Sleeper::start();
    let other_id = other.0.id();

    let attempt = |name: &str, inside: bool| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", TEST, "--nocapture"]);
        command.env(ATTEMPT, name).env(DIR, &dir);
        command.env(OTHER, other_id.to_string());
        if inside {
            command.env(INSIDE, "1");
        }
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command.status().unwrap()
    };
    // A child without an attempt ends with success.
    assert_eq!(attempt("nothing", true).code(), Some(0));
    let (mut killed, mut refused) = (0, 0);
    let (mut through, mut idle) = (Vec::new(), Vec::new());
    for (name, outside, _) in KIT {
        let works = *outside == Works || (*outside == WorksForRoot && whole);
        if works {
            let status = attempt(name, false);
            if status.code() != Some(GOT_THROUGH) {
                idle.push(format!("{name}: {status}"));
            }
            if *name == "datagram to a daemon" {
                assert!(escaped());
            }
            // Without the sandbox the attempt may have had effects: undo them.
            let _ = fs::remove_file(dir.join("new"));
            let _ = fs::remove_file(dir.join("link"));
        }
        let status = attempt(name, true);
        match (status.code(), status.signal()) {
            (_, Some(libc::SIGSYS)) => killed += 1,
            (Some(REFUSED), _) => refused += 1,
            _ => through.push(format!("{name}: {status}")),
        }
    }
    assert!(idle.is_empty(), "do nothing outside of it: {idle:#?}");
    assert!(through.is_empty(), "got through: {through:#?}");
    assert!(!escaped(), "another daemon received something");
    assert!(
        other.0.try_wait().unwrap().is_none(),
        "another process was ended"
    );
    println!("{killed} attempts ended the process, {refused} were refused");
}

fn lines(of: &str, keys: &[&str]) -> Vec<String> {
    let line = |key: &&str| {
        let found = of
            .lines()
            .find_map(|l| l.strip_prefix(*key)?.strip_prefix(':'));
        let words = found
            .unwrap_or_else(|| panic!("{key} in {of}"))
            .split_whitespace();
        words.collect::<Vec<_>>().join(" ")
    };
    keys.iter().map(line).collect()
}

#[test]
fn r115_it_runs_as_its_vms_own_user_without_any_capability() {
    let own = Uid::effective().is_root().then_some(OWN);
    if own.is_none() {
        println!("skipped: a user of its own takes root");
    }
    let mut running = Running::start_with(|command| {
        if let Some(own) = own {
            command.args(["--uid", &own.to_string()]);
        }
    });
    let aditd = running.connect();
    aditd.wait_status(|_| true);
    let pid = running.child.id().cast_signed();
    // Every thread, including those that were made before the change.
    for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        let none = "0000000000000000";
        let caps = [
            "CapInh",
            "CapPrm",
            "CapEff",
            "CapAmb",
            "NoNewPrivs",
            "Seccomp",
        ];
        assert_eq!(lines(&status, &caps), [none, none, none, none, "1", "2"]);
        if let Some(own) = own {
            let user = format!("{own} {own} {own} {own}");
            let is = lines(&status, &["Uid", "Gid", "Groups", "CapBnd"]);
            assert_eq!(is, [&user, &user, "", none]);
        }
    }
    // The kernel's view of who listens, and the note in the directory, must agree.
    let peer = getsockopt(&aditd.0, PeerCredentials).unwrap();
    let us = Uid::effective().as_raw();
    assert_eq!((peer.pid(), peer.uid()), (pid, own.unwrap_or(us)));
    assert_eq!(born::Born::noted(&running.dir), born::Born::of(pid));
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let core = limits.lines().find(|l| l.starts_with("Max core")).unwrap();
    assert!(core.split_whitespace().nth(4) == Some("0"), "{core}");
    // Its log has a limit, even if the guest has taken the process over.
    let file = limits.lines().find(|l| l.starts_with("Max file size"));
    let hard = file.and_then(|l| l.split_whitespace().nth(4)?.parse::<u64>().ok());
    assert_eq!(hard, Some(2 * adit_port::log::FILE_MAX), "{limits}");
    // The directory still belongs to whoever started the process, and the process cannot open it.
    for file in ["", "ctl.sock", "vhost.sock", "port.pid"] {
        let meta = fs::metadata(running.dir.join(file)).unwrap();
        assert_eq!((meta.uid(), meta.mode() & 0o077), (us, 0), "{file}");
    }
    // A guest is still served.
    let _guest = running.boot(&[22]);
    aditd.wait_status(|s| s.session);
}

#[test]
fn r115_if_it_cannot_become_its_own_user_it_does_not_serve() {
    if Uid::effective().is_root() {
        println!("skipped: root can become anybody");
        return;
    }
    let run = tempfile::tempdir().unwrap();
    let out = command(&run.path().join("web-1"))
        .args(["--uid", &OTHERS.to_string()])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success() && said.contains("own user"), "{said}");
}

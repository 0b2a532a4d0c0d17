//! A file system in user space with one file. Its server answers an open, and then nothing more.
//!
//! The server is a process of its own, because a close of such a file waits until the server ends. It also ends by itself after
//! a while, so that no test can hang on it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// Tells the server where to mount. Only the server's process has it.
const SERVES: &str = "ADIT_TEST_FUSE";
/// The server's longest life.
const LIFE: Duration = Duration::from_secs(60);

const OPEN: u32 = 14;
const INIT: u32 = 26;

/// The file system. Drop kills its server, and with that every waiting call on the file returns.
pub struct Mute {
    server: Child,
    at: PathBuf,
}

impl Drop for Mute {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
        let _ = umount2(&self.at, MntFlags::MNT_DETACH);
    }
}

impl Mute {
    /// Mounts it. `test` is the test of this program that calls [`serve`]. Prints the reason and returns `None` if mounting is
    /// not possible.
    pub fn mount(dir: &Path, test: &str) -> Option<Self> {
        if let Err(e) = File::options().read(true).write(true).open("/dev/fuse") {
            println!("skipped: /dev/fuse: {e}");
            return None;
        }
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: mounting a file system takes root");
            return None;
        }
        let at = dir.join("mute");
        File::create(&at).unwrap();
        let mut server = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--nocapture"])
            .env(SERVES, &at)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = String::new();
        let mut out = server.stdout.take().unwrap();
        let mut byte = [0];
        while !said.contains("SERVING") && !said.contains("CANNOT") {
            assert_eq!(out.read(&mut byte).unwrap(), 1, "it ended: {said}");
            said.push(char::from(byte[0]));
        }
        let mute = Self { server, at };
        if said.contains("CANNOT") {
            println!("skipped: this machine mounts no FUSE: {said}");
            return None;
        }
        Some(mute)
    }

    /// Opens the file. Close it only after the server has ended.
    pub fn open(&self) -> File {
        File::options()
            .read(true)
            .write(true)
            .open(&self.at)
            .unwrap()
    }
}

/// The server, if this process was started as one; otherwise returns at once.
pub fn serve() {
    let Some(at) = std::env::var_os(SERVES) else {
        return;
    };
    let fuse = File::options().read(true).write(true).open("/dev/fuse");
    let mut fuse = fuse.unwrap();
    let options = format!(
        "fd={},rootmode=100644,user_id=0,group_id=0",
        fuse.as_raw_fd()
    );
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let at = Path::new(&at);
    if let Err(e) = mount(Some("mute"), at, Some("fuse"), flags, Some(&*options)) {
        println!("CANNOT mount: {e}\n");
        return;
    }
    println!("SERVING\n");
    std::thread::spawn(|| {
        let begin = Instant::now();
        while begin.elapsed() < LIFE {
            std::thread::sleep(Duration::from_millis(100));
        }
        std::process::exit(0)
    });
    let mut request = vec![0; 1 << 17];
    // An error means that the file system was unmounted.
    while let Ok(len) = fuse.read(&mut request) {
        let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|n| request[at + n]));
        let unique: [u8; 8] = std::array::from_fn(|n| request[8 + n]);
        assert!(len >= 40, "a request of {len} bytes");
        let body: Vec<u8> = match word(4) {
            INIT => {
                let mut body = [0; 64];
                body[..4].copy_from_slice(&7u32.to_le_bytes());
                body[4..8].copy_from_slice(&31u32.to_le_bytes());
                body[20..24].copy_from_slice(&4096u32.to_le_bytes());
                body.into()
            }
            OPEN => vec![0; 16],
            // Everything else gets no answer: length, content, close.
            _ => continue,
        };
        let mut answer = Vec::new();
        answer.extend((16 + body.len() as u32).to_le_bytes());
        answer.extend(0u32.to_le_bytes());
        answer.extend(unique);
        answer.extend(body);
        fuse.write_all(&answer).unwrap();
    }
}

//! A process that writes two doorbells as fast as it can, and what that costs the process that receives them.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use adit_ringbuf_io::attach::Bells;
use adit_ringbuf_io::doorbell::borrow;
use nix::unistd::{SysconfVar, sysconf};

/// Set for the child, and by tests: how many seconds a storm lasts.
const SECONDS: &str = "ADIT_STORM_SECONDS";
const CHILD: &str = "ADIT_STORM_CHILD";

/// Not a test by itself: the process that writes the doorbells, which are its standard input and standard error.
#[test]
fn child() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let bells: Vec<File> = [std::io::stdin().as_fd(), std::io::stderr().as_fd()]
        .map(|fd| fd.try_clone_to_owned().unwrap().into())
        .into();
    let (begin, mut written) = (Instant::now(), 0u64);
    while begin.elapsed() < lasts() {
        for _ in 0..1000 {
            for mut bell in &bells {
                // An error means that the counter is full: nobody reads it.
                let _ = bell.write(&1u64.to_ne_bytes());
                written += 1;
            }
        }
    }
    println!("STORM {written}");
}

/// How long a storm lasts: two seconds, or as many as the environment says.
pub fn lasts() -> Duration {
    let seconds = std::env::var(SECONDS).ok().and_then(|s| s.parse().ok());
    Duration::from_secs(seconds.unwrap_or(2))
}

/// Writes both of the host's doorbells from another process. Returns how often.
pub fn storm(bells: &Bells) -> u64 {
    let own = |bell| -> OwnedFd { borrow(bell).try_clone_to_owned().unwrap() };
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["storm::child", "--exact", "--nocapture"])
        .env(CHILD, "1")
        .stdin(own(&bells.host_data))
        .stdout(Stdio::piped())
        .stderr(own(&bells.host_space))
        .spawn()
        .unwrap();
    let mut said = String::new();
    let out = child.stdout.as_mut().unwrap();
    out.read_to_string(&mut said).unwrap();
    child.wait().unwrap();
    let written = said.lines().find_map(|l| l.split("STORM ").nth(1));
    written
        .and_then(|n| n.parse().ok())
        .expect("it says how often")
}

/// Processor time of a process since its start.
pub fn cpu(pid: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    // Count from behind the process's name, which may contain anything: state is field 3, utime 14, stime 15.
    let (_, fields) = stat.rsplit_once(") ").unwrap();
    let fields: Vec<&str> = fields.split(' ').collect();
    let ticks: u64 = fields[11..13]
        .iter()
        .map(|f| f.parse::<u64>().unwrap())
        .sum();
    let hz = sysconf(SysconfVar::CLK_TCK).unwrap().unwrap();
    Duration::from_millis(ticks * 1000 / hz.cast_unsigned())
}

//! What a port process that an earlier aditd started was started with, as its command line says.
//!
//! Only for [`VmEntry::pending`](crate::vm::VmEntry::pending), which people read: a process can rewrite its command line.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use adit_port::control::HYBRID_SOCKET;

use crate::config::{AutoAt, CarrierConfig, Hybrid, Named, VmConfig};

/// Bytes of a command line that are read.
const LINE_MAX: u64 = 16 << 10;

/// The command line of a process; empty: it has none.
pub fn line_of(pid: u32) -> Vec<u8> {
    let mut line = Vec::new();
    let file = File::open(format!("/proc/{pid}/cmdline"));
    match file.and_then(|f| f.take(LINE_MAX).read_to_end(&mut line)) {
        Ok(_) => line,
        Err(_) => Vec::new(),
    }
}

/// Returns `spec` with the settings that a process with this command line has. One that does not say is taken to have all of
/// them.
pub fn settings_in(line: &[u8], spec: &VmConfig) -> VmConfig {
    let mut settings = spec.clone();
    let args = line.split(|byte| *byte == 0);
    let args: Vec<_> = args.filter_map(|a| std::str::from_utf8(a).ok()).collect();
    let value = |name: &str| {
        let at = args.iter().position(|arg| *arg == name)?;
        args.get(at + 1)?.parse().ok()
    };
    if let Some(us) = value("--busy-poll-us") {
        settings.busy_poll_us = us;
        settings.allow_any_memory = args.contains(&"--allow-any-memory");
    }
    settings.ivshmem_mib = value("--ivshmem-mib").unwrap_or(settings.ivshmem_mib);
    if !args.is_empty() {
        let path = |name: &str| {
            let at = args.iter().position(|arg| *arg == name)?;
            args.get(at + 1).map(Path::new)
        };
        let hybrid = path("--hybrid").map(|path| Hybrid {
            hybrid: path.into(),
            half_closes: args.contains(&"--half-closes"),
        });
        let own = path("--dir").map(|dir| dir.join(HYBRID_SOCKET));
        settings.carrier = match (hybrid, value("--cid")) {
            (Some(auto), _) if args.contains(&"--auto") => match own.as_ref() {
                Some(own) if *own == auto.hybrid => CarrierConfig::Named(Named::Auto),
                _ => CarrierConfig::AutoAt(AutoAt { auto }),
            },
            (Some(hybrid), _) => CarrierConfig::Hybrid(hybrid),
            (None, Some(cid)) if args.contains(&"--vsock") => CarrierConfig::of_kernel(cid),
            _ => CarrierConfig::default(),
        };
    }
    settings
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn the_settings_of_a_running_process_are_read_from_its_command_line() {
        let mut spec = VmConfig::new("a".parse().unwrap(), 3);
        (spec.busy_poll_us, spec.ivshmem_mib) = (70, 8);
        let mut child = Command::new("sh")
            .args(["-c", "read line", "sh", "--busy-poll-us", "50"])
            .args(["--ivshmem-mib", "4", "--allow-any-memory"])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // Started, it has a command line a moment later.
        let mut found = settings_in(&line_of(child.id()), &spec);
        while found == spec {
            std::thread::yield_now();
            found = settings_in(&line_of(child.id()), &spec);
        }
        assert_eq!((found.busy_poll_us, found.ivshmem_mib), (50, 4));
        assert!(found.allow_any_memory);
        let line = b"adit-port\0--name\0a\0--cid\x0042\0--busy-poll-us\x000\0--vsock\0";
        assert_eq!(settings_in(line, &spec).carrier.kernel(), Some(42));
        for (path, found) in [
            ("/run/web-1/v.sock", "\"auto\""),
            ("/fc/v.sock", "{\"auto\":{\"hybrid\":\"/fc/v.sock\"}}"),
        ] {
            let line =
                format!("--cid\x003\0--dir\0/run/web-1\0--hybrid\0{path}\0--vsock\0--auto\0");
            let carrier = settings_in(line.as_bytes(), &spec).carrier;
            assert_eq!(serde_json::to_string(&carrier).unwrap(), found);
        }
        drop(child.stdin.take());
        child.wait().unwrap();
        // This process, and one that is not there, say nothing.
        for pid in [std::process::id(), 0] {
            assert_eq!(settings_in(&line_of(pid), &spec), spec);
        }
    }
}

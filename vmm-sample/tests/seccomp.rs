//! What the filters of the guest-driven threads do to a thread that asks for more.

use adit_vmm_sample::seccomp::{Filters, Thread};

const CHILD: &str = "ADIT_VMM_FORBIDDEN_CALL";
const TEST: &str = "a_forbidden_call_ends_the_process_with_a_report";
const THREADS: [(&str, Thread); 3] = [
    ("vcpu0", Thread::Vcpu),
    ("vsock", Thread::Vsock),
    ("disk", Thread::Disk),
];

/// Runs itself again: what is forbidden ends a process.
#[test]
fn a_forbidden_call_ends_the_process_with_a_report() {
    if let Some(child) = std::env::var_os(CHILD) {
        let (name, kind) = THREADS.into_iter().find(|(n, _)| child == *n).unwrap();
        let filters = Filters::on().unwrap();
        let run = move || {
            filters.apply(kind).unwrap();
            let _ = std::fs::File::open("/etc/passwd");
        };
        let thread = std::thread::Builder::new().name(name.to_owned());
        let _ = thread.spawn(run).unwrap().join();
        return;
    }
    for (name, _) in THREADS {
        let out = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", TEST, "--nocapture"])
            .env(CHILD, name)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(1), "{said}");
        let call = format!("may not make: {} by {name}", libc::SYS_openat);
        assert!(said.contains(&call), "{said}");
    }
}

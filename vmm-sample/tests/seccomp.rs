//! What the filters of the guest-driven threads do to a thread that asks for more.

mod common;

use adit_benches::{DriverConfig, memory};
use adit_vmm_sample::seccomp::{Filters, Thread};
use common::{DISK, DISK_RING, Vm};
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_STATUS;

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

/// A guest's registers are written on a processor's thread, and what they ask for is done within the filters of all three.
#[test]
fn devices_are_started_stopped_and_held_within_the_filters() {
    const CHILD: &str = "ADIT_VMM_REGISTERS";
    const TEST: &str = "devices_are_started_stopped_and_held_within_the_filters";
    if std::env::var_os(CHILD).is_none() {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        let child = child.args(["--exact", TEST, "--nocapture"]).env(CHILD, "1");
        let out = child.output().unwrap();
        assert!(
            out.status.success(),
            "{}",
            String::from_utf8_lossy(&out.stderr)
        );
        return;
    }
    let filters = Filters::on().unwrap();
    let mut vm = Vm::filtered(memory::anonymous(), DriverConfig::LINUX_6_12, &filters);
    for _ in 0..3 {
        let processor = std::thread::Builder::new().name("vcpu0".to_owned());
        let filters = filters.clone();
        let run = move || {
            filters.apply(Thread::Vcpu).unwrap();
            for _ in 0..3 {
                vm.boot();
                vm.boot_disk(DISK_RING);
                vm.put(VIRTIO_MMIO_STATUS, 0);
                vm.put_at(DISK, VIRTIO_MMIO_STATUS, 0);
            }
            vm.boot();
            vm
        };
        vm = processor.spawn(run).unwrap().join().unwrap();
        let mut stream = vm.open();
        vm.exchange(&mut stream, 10_000);
        vm.settle();
        let mut ring = vm.boot_disk(DISK_RING);
        ring.request(&vm, 0, 0x9_0000, (memory::tx_payload(0), 4096));
        assert_eq!(ring.answer(&vm, 0x9_0000), 0);
    }
}

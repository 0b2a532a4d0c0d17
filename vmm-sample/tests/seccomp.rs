//! The filters of the guest-driven threads: calls that are not on the list end the process.
#![allow(unsafe_code)] // makes calls with arguments that no library would pass

mod common;

use adit_testkit::{DriverConfig, memory};
use adit_vmm_sample::seccomp::{Filters, Thread};
use common::{DISK, DISK_RING, Vm};
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_STATUS;

const CHILD: &str = "ADIT_VMM_FORBIDDEN_CALL";
const TEST: &str = "a_forbidden_call_ends_the_process_with_a_report";
const THREADS: [(&str, Thread); 4] = [
    ("vcpu0", Thread::Vcpu),
    ("vsock", Thread::Vsock),
    ("disk", Thread::Disk),
    ("hybrid", Thread::Hybrid),
];

/// The forbidden call ends the process, so the test runs itself again as a child.
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

/// Calls that a guest might try after it took over the vsock thread, with their arguments.
fn kit(stream: libc::c_long) -> Vec<(&'static str, libc::c_long, [libc::c_long; 6])> {
    let int = |n: i32| libc::c_long::from(n);
    let parent = int(nix::unistd::getppid().as_raw());
    static VALUE: [u32; 4] = [7; 4];
    let value = VALUE.as_ptr() as libc::c_long;
    let option = |option| [stream, int(libc::SOL_SOCKET), int(option), value, 4, 0];
    let control = |command, value| [stream, int(command), value, 0, 0, 0];
    let (pair, datagram) = (libc::SYS_socketpair, int(libc::SOCK_DGRAM));
    let urge = int(libc::SIGURG);
    vec![
        ("a datagram pair", pair, [1, datagram, 0, value, 0, 0]),
        ("a socket", libc::SYS_socket, [2, 1, 0, 0, 0, 0]),
        (
            "a datagram socket",
            libc::SYS_socket,
            [1, datagram, 0, 0, 0, 0],
        ),
        (
            "to an address",
            libc::SYS_sendto,
            [stream, value, 4, 0, value, 16],
        ),
        ("SO_MARK", libc::SYS_setsockopt, option(libc::SO_MARK)),
        (
            "SO_PASSCRED",
            libc::SYS_setsockopt,
            option(libc::SO_PASSCRED),
        ),
        ("F_SETOWN", libc::SYS_fcntl, control(libc::F_SETOWN, parent)),
        ("F_SETSIG", libc::SYS_fcntl, control(10, 9)),
        ("FIOASYNC", libc::SYS_ioctl, control(0x5452, value)),
        ("kill", libc::SYS_kill, [parent, urge, 0, 0, 0, 0]),
        ("tgkill", libc::SYS_tgkill, [parent, parent, urge, 0, 0, 0]),
        ("ptrace", libc::SYS_ptrace, [0x4206, parent, 0, 0, 0, 0]),
        ("dumpable", libc::SYS_prctl, [4, 1, 0, 0, 0, 0]),
        ("code", libc::SYS_mmap, [0, 4096, 7, 0x22, -1, 0]),
        ("unshare", libc::SYS_unshare, [0x1000_0000, 0, 0, 0, 0, 0]),
        ("setuid", libc::SYS_setuid, [0, 0, 0, 0, 0, 0]),
        ("mount", libc::SYS_mount, [0, 0, 0, 0, 0, 0]),
        ("keyctl", libc::SYS_keyctl, [0, -3, 1, 0, 0, 0]),
    ]
}

#[test]
fn r115_a_vsock_thread_has_no_access_beyond_its_descriptors() {
    const CHILD: &str = "ADIT_VMM_ESCAPE";
    const TEST: &str = "r115_a_vsock_thread_has_no_access_beyond_its_descriptors";
    let stream = std::os::unix::net::UnixStream::pair().unwrap();
    let kit = kit(std::os::fd::AsRawFd::as_raw_fd(&stream.0).into());
    if let Ok(child) = std::env::var(CHILD) {
        let (kind, nth) = child.split_once(' ').unwrap();
        let (_, kind) = THREADS.into_iter().find(|(n, _)| kind == *n).unwrap();
        let (_, call, [a, b, c, d, e, f]) = kit[nth.parse::<usize>().unwrap()];
        let filters = Filters::on().unwrap();
        let run = move || {
            filters.apply(kind).unwrap();
            // SAFETY: pointers among the arguments lead to a static that the kernel only reads. The one call that would
            // write there, socketpair, is stopped by the filter.
            unsafe { libc::syscall(call, a, b, c, d, e, f) };
        };
        let thread = std::thread::Builder::new().name("taken".to_owned());
        let _ = thread.spawn(run).unwrap().join();
        return;
    }
    for kind in ["vsock", "hybrid"] {
        for (nth, (what, call, _)) in kit.iter().enumerate() {
            let out = std::process::Command::new(std::env::current_exe().unwrap())
                .args(["--exact", TEST, "--nocapture"])
                .env(CHILD, format!("{kind} {nth}"))
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&out.stderr);
            let reported = format!("may not make: {call:03} by taken");
            let ended = out.status.code() == Some(1) && said.contains(&reported);
            assert!(ended, "{what} by {kind}: {}: {said}", out.status);
        }
    }
}

/// Guest-driven threads have no capability, whoever runs the VMM.
#[test]
fn r115_guest_driven_threads_have_no_capability() {
    let filters = Filters::on().unwrap();
    for (name, kind) in THREADS {
        let (tell, told) = std::sync::mpsc::channel();
        let (hold, held) = std::sync::mpsc::channel::<()>();
        let filters = filters.clone();
        let run = move || {
            let id = nix::unistd::gettid();
            filters.apply(kind).unwrap();
            tell.send(id).unwrap();
            let _ = held.recv();
        };
        let thread = std::thread::spawn(run);
        let path = format!("/proc/self/task/{}/status", told.recv().unwrap());
        let status = std::fs::read_to_string(path).unwrap();
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            let none = format!("{set}:\t0000000000000000");
            assert!(status.contains(&none), "{name}: {status}");
        }
        drop(hold);
        thread.join().unwrap();
    }
}

/// A vCPU thread writes the registers, and the device threads do the work: each within its filter.
#[test]
fn devices_start_stop_and_pause_within_the_filters() {
    const CHILD: &str = "ADIT_VMM_REGISTERS";
    const TEST: &str = "devices_start_stop_and_pause_within_the_filters";
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

//! `adit-vmm` boots stock Debian, in a QEMU guest that has KVM. The host needs no KVM.
//!
//! These tests need the binaries and images that `cargo xtask test` builds. Without them they print that and pass.

use std::path::{Path, PathBuf};
use std::time::Duration;

use adit_tests::guest::{Accel, Identity};
use adit_tests::image::{Image, Kernel};
use adit_tests::nested::{self, BUILT, HELPERS, Inner, Nested};
use adit_tests::{guest_bin, target, vmm_bin};

/// A step takes seconds, but many more on a busy machine.
const LIMIT: Duration = Duration::from_secs(600);

/// Runs in L2: dials the host, waits until the host has done its part; reboots after the first boot, powers off after the second.
const INNER: &str = r#"
echo up >> /var/lib/boots
adit-testguest dial-few 7000 || echo DIALS-FAILED
adit-testguest dial-few 7999 2>/dev/null && echo DIALED-NOBODY
echo "CPUS $(nproc) BOOTS $(wc -l < /var/lib/boots) CLOCK $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
sync
echo INNER-WAITS
until adit-testguest dial-few 7009 >/dev/null 2>&1; do sleep 0.2; done
[ $(wc -l < /var/lib/boots) = 2 ] || reboot -f
poweroff -f
"#;

/// Runs in L1, for one guest: two boots on one disk, streams in both directions, the agent's hello, a reset and a power-off.
const OUTER: &str = r#"
LOG=$T/$NAME.log UDS=$T/$NAME.sock
dd if=/dev/zero of=$T/$NAME.disk bs=1M count=0 seek=16 2>/dev/null
mke2fs -F $T/$NAME.disk >/dev/null 2>&1 || fail "no disk"
adit-testguest uds-echo ${UDS}_7000 &
for boot in $BOOTS; do
    begin=$(now)
    start --kernel $L2/$NAME/$KERNEL --initrd $L2/$NAME/initrd --disk $T/$NAME.disk --cpus $CPUS --memory 256M \
        --cmdline "console=ttyS0 quiet panic=-1 mitigations=off" --vsock cid=3,uds=$UDS
    until_said ADIT-READY 120 || break
    echo "$NAME ready: boot $boot, $begin .. $(now)"
    until_said INNER-WAITS 120 || break
    grep -q DIALS-OK $LOG || fail "guest's dials"
    grep -q "DIALED-NOBODY" $LOG && fail "a port that nobody serves answered"
    grep -q "CPUS $CPUS BOOTS $boot CLOCK ${CLOCK:-kvm-clock}" $LOG || fail "$(grep CPUS $LOG)"
    adit-testguest uds-dial $UDS 5000 1 || fail "dial"
    adit-testguest uds-dial $UDS 5000 1000000 || fail "dial"
    adit-testguest uds-dial $UDS 5999 1 2>/dev/null && fail "a port that nobody listens on answered"
    adit-testguest uds-hello $UDS tcp:7 || fail "hello"
    adit-testguest uds-echo ${UDS}_7009 & ECHO=$!
    if [ $boot != 2 ]; then ended 3 "asked for a reset"; else ended 0 "switched itself off"; fi
    kill $ECHO; rm -f ${UDS}_7009
    echo "$NAME ended: boot $boot, $(now)"
done
echo "NESTED-DONE $NAME"
"#;

/// Runs in L1: this very test program runs one test there, and must not skip it.
const ITSELF: &str = r#"
itself --exact a_stock_kernel_boots_on_plain_kvm --nocapture >/tmp/itself 2>&1 || echo "NESTED-FAIL: $?"
cat /tmp/itself
grep -q "^NESTED-DONE new" /tmp/itself && echo NESTED-DONE itself || echo NESTED-FAIL it skipped
"#;

/// Whatever a guest or a caller does wrong, the VMM prints one line that says what to do, and ends.
const WRONG: &str = r#"
wrong() { # TEXT ARGS...: fails at once, and says this
    text=$1; shift
    adit-vmm run "$@" --serial /tmp/wrong.log >/tmp/wrong 2>&1 </dev/null; rc=$?
    # A mistake on the command line has its usage behind it.
    [ $rc = 2 ] || { [ $rc = 1 ] && [ $(wc -l < /tmp/wrong) = 1 ]; } || fail "adit-vmm $*: status $rc: $(cat /tmp/wrong)"
    grep -q "$text" /tmp/wrong || fail "adit-vmm $*: $(cat /tmp/wrong)"
}
wrong "cannot open kernel \"/nowhere\": name a file" --kernel /nowhere
wrong "not an x86-64 kernel" --kernel /etc/rc
wrong "does not fit" --kernel /l2/old/vmlinux --initrd /l2/old/initrd --memory 64M
wrong "64 to" --kernel /l2/old/vmlinux --memory 1M
wrong "cannot open disk /nowhere: name a file" --kernel /l2/old/vmlinux --disk /nowhere
wrong "CIDs are 3" --kernel /l2/old/vmlinux --vsock cid=2
wrong "power of two" --kernel /l2/old/vmlinux --ring 3M
( ulimit -v 300000; wrong "give the guest less (--memory)" --kernel /l2/old/vmlinux --memory 512M )
mv /dev/kvm /dev/kvm.away
wrong "there is no /dev/kvm" --kernel /l2/old/vmlinux
mv /dev/kvm.away /dev/kvm
echo NESTED-DONE wrong
"#;

/// A guest that is hostile to its VMM: the VMM ends with a reason, or continues.
const HOSTILE: &str = r#"
LOG=/tmp/hostile.log
dd if=/dev/zero of=/tmp/hostile.disk bs=1M count=0 seek=1 2>/dev/null
hostile() { start --kernel /l2/hostile$1 --memory 64M --disk /tmp/hostile.disk --vsock cid=3,uds=/tmp/hostile; }
hostile 0; ended 0 "switched itself off"
[ $(tr -cd x < $LOG | wc -c) -ge 5000 ] || fail "the serial line lost bytes"
hostile 1; ended 3 "asked for a reset"
hostile 2; n=300; until [ $(tr -cd x < $LOG | wc -c) -ge 5000 ]; do n=$((n - 1)); [ $n -gt 0 ] || { fail "halting guest"; break; }; sleep 0.1; done
kill -TERM $VMM; ended 0 stopped
# At a terminal every key is the guest's, at once; ctrl-a x is not.
mkdir -p /dev/pts; mount -t devpts devpts /dev/pts
mkfifo /tmp/keys
script -qec "adit-vmm run --kernel /l2/hostile2 --memory 64M" /tmp/typescript </tmp/keys >/tmp/screen 2>&1 & VMM=$!
exec 9>/tmp/keys
n=300; until [ $(tr -cd x < /tmp/screen | wc -c) -ge 5000 ]; do n=$((n - 1)); [ $n -gt 0 ] || { fail "guest at a terminal: $(tail -c 300 /tmp/screen)"; break; }; sleep 0.1; done
printf 'a\003\001x' >&9
gone $VMM 60 || fail "at a terminal: $?"
grep -q "adit-vmm: stopped" /tmp/screen || fail "at a terminal: $(tail -c 300 /tmp/screen)"
echo NESTED-DONE hostile
"#;

/// Runs in L2: prints a line again and again, which a restore must continue, and holds a stream, which it must end.
const TICKING: &str = r#"
(while :; do adit-testguest hold 7001; sleep 0.5; done) &
(
    n=0
    while :; do
        n=$((n + 1)); echo $n > /var/lib/n; echo "TICK $n of $(nproc)"
        dmesg | grep -q "virtual machine fork" && echo FORKED
        sleep 0.3
    done
) &
"#;

/// Runs in L1: a VM is paused, saved and continued. The snapshot is started twice: in place of the VM, and as a clone.
const SNAPSHOT: &str = r#"
API=/tmp/api
api() { curl -sS -m 60 --unix-socket $API -X "$@"; }
ticks() { grep -c TICK $1; }
# lives LOG UDS: it ticks on, and its agent answers.
lives() {
    before=$(ticks $1); n=100
    while [ $(ticks $1) -le $((before + 2)) ]; do n=$((n - 1)); [ $n -gt 0 ] || { fail "$1 does not tick"; return; }; sleep 0.2; done
    adit-testguest uds-hello $2 tcp:7 || fail "$2: no agent"
}
dd if=/dev/zero of=/tmp/disk bs=1M count=0 seek=16 2>/dev/null
mke2fs -F /tmp/disk >/dev/null 2>&1
for n in 0 1 2; do adit-testguest uds-echo /tmp/v${n}_7001 & done
LOG=/tmp/v0.log
start --kernel /l2/vm/vmlinux --initrd /l2/vm/initrd --disk /tmp/disk --memory 256M --cpus 2 \
    --cmdline "console=ttyS0 quiet panic=-1 mitigations=off" --vsock cid=3,uds=/tmp/v0 --api $API
ORIGIN=$VMM
until_said "TICK 3 of 2" 120; until_said HELD 20
[ "$(api GET http://vm/vm)" = '{"state":"running"}' ] || fail "state"
api PUT -d '{"dir":"/tmp/snap"}' http://vm/snapshot | grep -q "pause first" || fail "a running VM was written"
api PUT http://vm/pause
[ "$(api GET http://vm/vm)" = '{"state":"paused"}' ] || fail "not paused"
before=$(ticks $LOG); sleep 1; [ $(ticks $LOG) = $before ] || fail "a paused VM ticks"
begin=$(now); api PUT -d '{"dir":"/tmp/snap"}' http://vm/snapshot; echo "snapshot: $begin .. $(now)"
cp /tmp/disk /tmp/disk.clone
api PUT -d '{"dir":"/tmp/snap"}' http://vm/snapshot | grep -q "cannot create" || fail "a snapshot was written over"
api PUT http://vm/resume; api PUT http://vm/resume
lives $LOG /tmp/v0
grep -q "HELD-ENDED" $LOG && fail "a pause ended a stream"
api PUT http://vm/nothing | grep -q "no PUT /nothing" || fail "404"
printf 'PUT /pause HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n' | timeout 5 nc local:$API >/tmp/long 2>&1
api PUT http://vm/stop; VMM=$ORIGIN; ended 0 stopped
[ -e $API ] && fail "the API's socket is left"

begin=$(now)
LOG=/tmp/v1.log; : > $LOG
adit-vmm restore --from /tmp/snap --disk /tmp/disk --vsock cid=3,uds=/tmp/v1 --serial $LOG 2>/tmp/vmm.err </dev/null & VMM=$!; FIRST=$!
until_said "HELD-ENDED ConnectionReset" 20; echo "restored: $begin .. $(now)"
until_said 'HELD[^-]' 20
lives $LOG /tmp/v1
until_said FORKED 20
grep -q ADIT-READY $LOG && fail "it booted"
LOG=/tmp/v2.log; : > $LOG
adit-vmm restore --from /tmp/snap --disk /tmp/disk.clone --vsock cid=4,uds=/tmp/v2 --serial $LOG 2>/tmp/vmm.err2 </dev/null & VMM=$!
until_said "HELD-ENDED ConnectionReset" 20
lives $LOG /tmp/v2; lives /tmp/v1.log /tmp/v1
until_said FORKED 20
for pid in $VMM $FIRST; do kill $pid; gone $pid 60 || fail "restored VM: $?"; done

wrong() { text=$1; shift; adit-vmm restore "$@" --serial /tmp/w.log </dev/null >/tmp/wrong 2>&1 && fail "$*"; grep -q "$text" /tmp/wrong || fail "$*: $(cat /tmp/wrong)"; }
wrong "cannot open the snapshot" --from /nowhere
wrong "give it the same" --from /tmp/snap --vsock cid=3
wrong "cannot open disk" --from /tmp/snap --disk /nowhere --vsock cid=3
printf x | dd of=/tmp/snap/state bs=1 seek=3000 conv=notrunc 2>/dev/null
wrong "cut off or changed" --from /tmp/snap --disk /tmp/disk --vsock cid=3
echo NESTED-DONE snapshot
"#;

fn identity<'a>(name: &'a str, agent: Option<&'a Path>, script: &'a str) -> Identity<'a> {
    Identity {
        name,
        vhost_socket: Path::new(""),
        agent,
        trust: None,
        script,
        boot_files: false,
    }
}

/// The directory of aditd and adit. Prints the reason and returns `None` if nothing can be booted.
fn bins() -> Option<PathBuf> {
    let bins = std::env::var_os("ADIT_TEST_BINS").map(PathBuf::from);
    if bins.is_none() {
        println!(
            "skipped: ADIT_TEST_BINS is not set; `cargo xtask test` builds what is needed and sets it"
        );
    }
    bins
}

fn image(kernel: Kernel) -> Image {
    Image::build(kernel, &|what| println!("{what}")).unwrap()
}

fn fresh(name: &str) -> PathBuf {
    let dir = target().join("tests").join(name);
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

fn vmm() -> (PathBuf, String) {
    (vmm_bin(), "/bin/adit-vmm".to_owned())
}

// Last by name, because it is short: the other processor may still be busy with a long one.
#[test]
fn wrong_use_and_hostile_guests_end_in_one_line() {
    let Some(_) = bins() else { return };
    let old = image(Kernel::V6_1);
    let inner = [Inner {
        image: &old,
        identity: identity("old", None, ""),
        packed: false,
        ssh: None,
    }];
    let dir = fresh("wrong");
    let mut programs = vec![vmm()];
    programs.extend(Nested::hostile_kernels(&dir).unwrap());
    let terminal = Path::new("/usr/bin/script");
    programs.extend(Nested::with_libraries(terminal, &dir.join("stripped")).unwrap());
    let script = format!("{HELPERS}\n{WRONG}\n{HOSTILE}");
    let mut l1 = Nested::boot(&old, &inner, &programs, &script, &dir).unwrap();
    for marker in ["NESTED-DONE wrong", "NESTED-DONE hostile"] {
        l1.wait_said(marker, LIMIT).unwrap();
    }
    report(&l1);
}

// First by name, because it takes longest.
#[test]
fn a_debian_of_each_kernel_does_the_main_job_and_again_after_a_restore() {
    let Some(bins) = bins() else { return };
    let mut l1 = Nested::managed(&bins, Kernel::V6_12, &fresh("managed")).unwrap();
    l1.wait_said("NESTED-DONE managed", LIMIT).unwrap();
    report(&l1);
}

#[test]
fn a_stock_qemu_is_served_through_the_hosts_kernel() {
    let Some(bins) = bins() else { return };
    let mut l1 = Nested::stock(&bins, &fresh("stock")).unwrap();
    l1.wait_said("NESTED-DONE stock", LIMIT).unwrap();
    report(&l1);
}

#[test]
fn aditd_serves_a_vmm_that_has_a_socket_for_each_stream_and_outlives_it() {
    let Some(bins) = bins() else { return };
    let mut l1 = Nested::hybrid(&bins, &fresh("hybrid")).unwrap();
    l1.wait_said("NESTED-DONE hybrid", LIMIT).unwrap();
    report(&l1);
}

/// Without an L1. On such a machine the guest may use the processor's own counter as its clock.
#[test]
fn a_stock_kernel_boots_on_plain_kvm() {
    let Some(_) = bins() else { return };
    if let Err(why) = Accel::plain_kvm() {
        return println!("skipped: this machine's KVM boots no Linux: {why}");
    }
    let (new, agent) = (image(Kernel::V6_12), guest_bin("adit-guest"));
    let inner = [Inner {
        image: &new,
        identity: identity("new", Some(&agent), INNER),
        packed: true,
        ssh: None,
    }];
    let clock = r"CLOCK='\(kvm-clock\|tsc\)'";
    // More processors than the machine has would only wait for each other.
    let cpus = std::thread::available_parallelism().map_or(1, |n| n.get().min(2));
    let script =
        format!("{HELPERS}\n{clock} NAME=new KERNEL=bzimage CPUS={cpus} BOOTS='1 2'\n{OUTER}");
    let programs = [vmm_bin(), guest_bin("adit-testguest")];
    let said = nested::here(&inner, &programs, &script, &fresh("here"), LIMIT).unwrap();
    println!("{said}");
    assert!(said.contains("NESTED-DONE new") && !said.contains("NESTED-FAIL"));
}

/// The test above, in an L1, where it cannot skip.
#[test]
fn a_stock_kernel_boots_on_plain_kvm_in_l1() {
    let Some(_) = bins() else { return };
    let dir = fresh("itself");
    let programs = Nested::itself(&image(Kernel::V6_12), &dir.join("stripped")).unwrap();
    let mut l1 = Nested::boot(
        &image(Kernel::V6_1),
        &[],
        &programs,
        &format!("{BUILT}{ITSELF}"),
        &dir,
    )
    .unwrap();
    l1.wait_said("NESTED-DONE itself", LIMIT).unwrap();
    report(&l1);
}

fn report(l1: &Nested) {
    let said = l1.said();
    let of_interest = |l: &&str| {
        l.contains(": ") && !l.starts_with('[') || l.contains("-OK") || l.starts_with("SHOW")
    };
    for line in said.lines().filter(of_interest) {
        println!("{line}");
    }
}

#[test]
fn a_paused_vm_continues_in_another_process_and_as_a_clone() {
    let Some(_) = bins() else { return };
    let new = image(Kernel::V6_12);
    let dir = fresh("snapshot");
    let agent = guest_bin("adit-guest");
    let inner = [Inner {
        image: &new,
        identity: identity("vm", Some(&agent), TICKING),
        packed: false,
        ssh: None,
    }];
    let mut programs = vec![vmm()];
    let curl = Path::new("/usr/bin/curl");
    programs.extend(Nested::with_libraries(curl, &dir.join("stripped")).unwrap());
    let script = format!("{HELPERS}\n{SNAPSHOT}");
    let mut l1 = Nested::boot(&image(Kernel::V6_1), &inner, &programs, &script, &dir).unwrap();
    l1.wait_said("NESTED-DONE snapshot", LIMIT).unwrap();
    report(&l1);
}

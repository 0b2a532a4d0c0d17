//! `adit-vmm` boots stock Debian, in a guest of QEMU's that has KVM: needs no KVM of the host.
//!
//! These need the binaries and images that `cargo xtask test` builds; alone they say so and pass.

use std::path::{Path, PathBuf};
use std::time::Duration;

use adit_tests::guest::Identity;
use adit_tests::image::{Image, Kernel};
use adit_tests::nested::{Inner, Nested};
use adit_tests::process::output;
use adit_tests::{guest_bin, target};

/// A step takes seconds; a machine that is busy with other things many more.
const LIMIT: Duration = Duration::from_secs(240);

/// In L1: functions that the scripts share.
const HELPERS: &str = r#"
fail() { echo "NESTED-FAIL $*"; [ -f "$LOG" ] && tail -n 25 "$LOG"; tail -n 5 /tmp/vmm.err; }
# until_said TEXT SECONDS: until the guest has said it on its serial line.
until_said() {
    n=$(($2 * 10))
    until grep -q "$1" "$LOG"; do
        n=$((n - 1)); [ $n -gt 0 ] || { fail "no '$1' in $2 s"; return 1; }
        kill -0 $VMM || { fail "adit-vmm ended before '$1'"; return 1; }
        sleep 0.1
    done
}
start() { : > "$LOG"; adit-vmm run "$@" --serial $LOG 2>/tmp/vmm.err </dev/null & VMM=$!; }
# ended STATUS TEXT: adit-vmm ends with this status, and says this.
ended() {
    wait $VMM; rc=$?
    [ $rc = $1 ] || fail "adit-vmm ended with $rc, not $1"
    grep -q "$2" /tmp/vmm.err || fail "adit-vmm did not say '$2'"
}
now() { read -r up _ < /proc/uptime; echo "$up"; }
"#;

/// In L2: dials the host, waits until the host has done its part, and reboots the first time, powers off the second.
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

/// In L1, for one guest: two boots on one disk, streams both ways, the agent's hello, a reset and a power-off.
const OUTER: &str = r#"
LOG=/tmp/$NAME.log UDS=/tmp/$NAME.sock
dd if=/dev/zero of=/tmp/$NAME.disk bs=1M count=0 seek=16 2>/dev/null
mke2fs -F /tmp/$NAME.disk >/dev/null 2>&1 || fail "no disk"
adit-testguest uds-echo ${UDS}_7000 &
for boot in $BOOTS; do
    begin=$(now)
    start --kernel /l2/$NAME/$KERNEL --initrd /l2/$NAME/initrd --disk /tmp/$NAME.disk --cpus $CPUS --memory 256M \
        --cmdline "console=ttyS0 quiet panic=-1 mitigations=off" --vsock cid=3,uds=$UDS
    until_said ADIT-READY 120 || break
    echo "$NAME ready: boot $boot, $begin .. $(now)"
    until_said INNER-WAITS 120 || break
    grep -q DIALS-OK $LOG || fail "guest's dials"
    grep -q "DIALED-NOBODY" $LOG && fail "a port that nobody serves answered"
    grep -q "CPUS $CPUS BOOTS $boot CLOCK kvm-clock" $LOG || fail "$(grep CPUS $LOG)"
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

/// Nothing that the guest or a caller can do wrong ends in anything but one line that says what to do.
const WRONG: &str = r#"
wrong() { # TEXT ARGS...: fails at once, and says this
    text=$1; shift
    adit-vmm run "$@" --serial /tmp/wrong.log >/tmp/wrong 2>&1 </dev/null; rc=$?
    [ $rc = 1 ] || [ $rc = 2 ] || fail "adit-vmm $*: status $rc"
    grep -q "$text" /tmp/wrong || fail "adit-vmm $*: $(cat /tmp/wrong)"
}
wrong "cannot open kernel /nowhere" --kernel /nowhere
wrong "no x86-64 kernel" --kernel /etc/rc
wrong "does not fit" --kernel /l2/old/vmlinux --initrd /l2/old/initrd --memory 64M
wrong "64 to" --kernel /l2/old/vmlinux --memory 1M
wrong "cannot open disk" --kernel /l2/old/vmlinux --disk /nowhere
wrong "CIDs are 3" --kernel /l2/old/vmlinux --vsock cid=2
mv /dev/kvm /dev/kvm.away
wrong "there is no /dev/kvm" --kernel /l2/old/vmlinux
mv /dev/kvm.away /dev/kvm
echo NESTED-DONE wrong
"#;

/// In L1: aditd serves a VM that has no port process beside its VMM; it may die; the VM's end takes it off the map.
const MANAGED: &str = r#"
LOG=/tmp/web.log AD=/tmp/adit
mkdir -p $AD
cat > $AD/aditd.toml <<END
run_dir = "$AD/run"
state_dir = "$AD/state"
[proxy]
listen = "127.0.0.1:7080"
END
export ADIT_SOCKET=$AD/run/aditd.sock http_proxy=http://127.0.0.1:7080
serve() {
    aditd run --config $AD/aditd.toml 2>>$AD/log & ADITD=$!
    n=300; until adit vm ls >/dev/null 2>&1; do
        n=$((n - 1)); [ $n -gt 0 ] || { fail "no aditd: $(tail -n 3 $AD/log)"; return; }; sleep 0.1
    done
}
page() { [ "$(curl -sS -m 20 http://web-1/ 2>&1)" = "this is web-1" ] || fail "no page: $1"; }
serve
echo "aditd serves: $(now)"
start --kernel /l2/web-1/vmlinux --initrd /l2/web-1/initrd --memory 256M \
    --cmdline "console=ttyS0 quiet panic=-1 mitigations=off" \
    --vsock cid=3 --aditd $ADIT_SOCKET --name web-1 --allow 80,7 --allow-vsock 5000
until_said ADIT-READY 120
adit wait web-1 --for agent --timeout 60s || fail "no agent: $(adit vm show web-1)"
echo "agent ready: $(now)"
page "first"
cat > /tmp/goal.yaml <<END
steps: [{id: hello, script: {interpreter: /bin/sh, script: "echo hello from \$(hostname)"}}]
END
( cd /tmp && adit goal apply goal.yaml --sign /etc/fleet.key --to web-1 ) || fail "goal"
adit task watch --timeout 60s
adit task ls | tee /tmp/tasks
grep -q "hello from web-1" /tmp/tasks || fail "task"
pidof adit-port && fail "there is a port process beside the VMM"
kill -9 $ADITD; wait $ADITD
serve
adit wait web-1 --for agent --timeout 60s || fail "no agent after aditd was killed: $(adit vm show web-1)"
page "after aditd was killed"
kill -TERM $VMM; ended 0 stopped
adit vm ls | grep -q web-1 && fail "an ended VM is still on the map"
start --kernel /l2/web-1/vmlinux --vsock cid=3 --aditd /nowhere/aditd.sock --name web-2
wait $VMM; grep -q "no aditd at /nowhere" /tmp/vmm.err || fail "$(cat /tmp/vmm.err)"
echo NESTED-DONE managed
"#;

fn identity<'a>(name: &'a str, agent: &'a Path, script: &'a str) -> Identity<'a> {
    Identity {
        name,
        vhost_socket: Path::new(""),
        agent: Some(agent),
        trust: None,
        script,
        boot_files: false,
    }
}

/// Where aditd and adit are. `None`, with the reason printed, if there is nothing to boot.
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
    (guest_bin("adit-vmm"), "/bin/adit-vmm".to_owned())
}

#[test]
fn stock_kernels_boot_and_their_streams_work() {
    let Some(_) = bins() else { return };
    let (old, new) = (image(Kernel::V6_1), image(Kernel::V6_12));
    let agent = guest_bin("adit-guest");
    let inner = [
        Inner {
            image: &old,
            identity: identity("old", &agent, INNER),
            packed: false,
        },
        Inner {
            image: &new,
            identity: identity("new", &agent, INNER),
            packed: true,
        },
    ];
    let script = format!(
        "{HELPERS}\nNAME=old KERNEL=vmlinux CPUS=2 BOOTS='1 2'\n{OUTER}\nNAME=new KERNEL=bzimage CPUS=1 BOOTS=1\n{OUTER}\n{WRONG}"
    );
    let dir = fresh("nested");
    let mut l1 = Nested::boot(&old, &inner, &[vmm()], &script, &dir).unwrap();
    for marker in ["NESTED-DONE old", "NESTED-DONE new", "NESTED-DONE wrong"] {
        l1.wait_said(marker, LIMIT).unwrap();
    }
    report(&l1);
}

fn report(l1: &Nested) {
    let said = l1.said();
    let of_interest = |l: &&str| l.contains(": ") && !l.starts_with('[') || l.contains("-OK");
    for line in said.lines().filter(of_interest) {
        println!("{line}");
    }
}

#[test]
fn aditd_serves_a_vm_whose_vmm_has_the_device() {
    let Some(bins) = bins() else { return };
    let new = image(Kernel::V6_12);
    let dir = fresh("managed");
    output(
        std::process::Command::new(bins.join("adit"))
            .args(["key", "new", "fleet.key"])
            .current_dir(&dir),
    )
    .unwrap();
    let (agent, trust) = (guest_bin("adit-guest"), dir.join("fleet.key.pub"));
    let inner = [Inner {
        image: &new,
        identity: Identity {
            trust: Some(&trust),
            ..identity("web-1", &agent, "")
        },
        packed: false,
    }];
    let mut programs = vec![vmm(), (dir.join("fleet.key"), "/etc/fleet.key".to_owned())];
    let ours = ["aditd", "adit-port", "adit"].map(|name| bins.join(name));
    for program in ours
        .iter()
        .map(PathBuf::as_path)
        .chain([Path::new("/usr/bin/curl")])
    {
        let files = Nested::with_libraries(program, &dir.join("stripped")).unwrap();
        programs.extend(files);
    }
    let script = format!("{HELPERS}\n{MANAGED}");
    let mut l1 = Nested::boot(&image(Kernel::V6_1), &inner, &programs, &script, &dir).unwrap();
    l1.wait_said("NESTED-DONE managed", LIMIT).unwrap();
    report(&l1);
}

//! `adit-vmm` boots stock Debian, in a guest of QEMU's that has KVM: needs no KVM of the host.

use std::time::Duration;

use adit_tests::guest::Identity;
use adit_tests::image::{Image, Kernel};
use adit_tests::nested::{Inner, Nested};
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

fn identity<'a>(name: &'a str, agent: &'a std::path::Path) -> Identity<'a> {
    Identity {
        name,
        vhost_socket: std::path::Path::new(""),
        agent: Some(agent),
        trust: None,
        script: INNER,
        boot_files: false,
    }
}

#[test]
fn stock_kernels_boot_and_their_streams_work() {
    let say = |what: &str| eprintln!("{what}");
    let old = Image::build(Kernel::V6_1, &say).unwrap();
    let new = Image::build(Kernel::V6_12, &say).unwrap();
    let agent = guest_bin("adit-guest");
    let inner = [
        Inner {
            image: &old,
            identity: identity("old", &agent),
            packed: false,
        },
        Inner {
            image: &new,
            identity: identity("new", &agent),
            packed: true,
        },
    ];
    let script = format!(
        "{HELPERS}\nNAME=old KERNEL=vmlinux CPUS=2 BOOTS='1 2'\n{OUTER}\nNAME=new KERNEL=bzimage CPUS=1 BOOTS=1\n{OUTER}\n{WRONG}"
    );
    let dir = target().join("tests/nested");
    let _ = std::fs::remove_dir_all(&dir);
    let programs = [(guest_bin("adit-vmm"), "/bin/adit-vmm")];
    let mut l1 = Nested::boot(&old, &inner, &programs, &script, &dir).unwrap();
    for marker in ["NESTED-DONE old", "NESTED-DONE new", "NESTED-DONE wrong"] {
        l1.wait_said(marker, LIMIT).unwrap();
    }
    let said = l1.said();
    for line in said
        .lines()
        .filter(|l| l.contains("ready:") || l.contains("ended:") || l.contains("-OK"))
    {
        eprintln!("{line}");
    }
}

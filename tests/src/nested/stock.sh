# Runs in L1: stock QEMU boots Debian with a vhost-vsock device, and aditd reaches it through L1's kernel. Everything that matters is killed.
AD=/tmp/adit VM=web-1 LOG=/tmp/web-1.log
mkdir -p $AD
grep -q vhost-vsock /proc/misc || fail "L1 has no vhost_vsock"
cat > $AD/aditd.toml <<END
run_dir = "$AD/run"
state_dir = "$AD/state"
[proxy]
listen = "127.0.0.1:7080"
[metrics]
listen = "127.0.0.1:7081"
[[grant]]
to = ["anyone"]
vms = ["*"]
may = ["reach", "see"]
[[vm]]
name = "web-1"
carrier = { vsock = { cid = 42 } }
allow = [80, 7, 81]
allow_vsock = [5000, 5999]
[[vm]]
name = "other"
cid = 43
END
export ADIT_SOCKET=$AD/run/aditd.sock http_proxy=http://127.0.0.1:7080
echo "user:x:1000:1000::/:/bin/sh" >> /etc/passwd
serve() {
    aditd run --config $AD/aditd.toml 2>>$AD/log & ADITD=$!
    n=300; until adit vm ls >/dev/null 2>&1; do
        n=$((n - 1)); [ $n -gt 0 ] || { fail "no aditd: $(tail -n 3 $AD/log)"; return; }; sleep 0.1
    done
}
port_pid() { curl -sS --noproxy '*' --unix-socket $ADIT_SOCKET http://adit/v1/vms/web-1 | sed 's/.*"port_pid":\([0-9]*\).*/\1/'; }
# shown TEXT WHEN: waits until `vm show` has this text.
shown() {
    n=300; until adit vm show web-1 >/tmp/show 2>&1 && grep -q "$1" /tmp/show; do
        n=$((n - 1)); [ $n -gt 0 ] || { fail "not shown $2: '$1': $(cat /tmp/show; tail -n 20 $AD/log $AD/run/vm/web-1/port.log)"; return 1; }; sleep 0.1
    done
}
# boots ARGS...: starts QEMU.
boots() {
    : > $LOG
    # Its monitor is a pair of pipes. Held open here, they are there for every command.
    rm -f /tmp/mon.in /tmp/mon.out; mkfifo /tmp/mon.in /tmp/mon.out
    cat /tmp/mon.out >> /tmp/hmp &
    qemu-system-x86_64 -L /usr/share/qemu -M microvm,pcie=on -accel kvm -cpu host -m 160M -nodefaults -no-user-config -display none \
        -kernel /l2/web-1/vmlinux -initrd /l2/web-1/initrd -append "console=ttyS0 quiet panic=1 reboot=t mitigations=off" \
        -chardev file,id=tty,path=$LOG,append=on -serial chardev:tty -chardev pipe,id=mon,path=/tmp/mon -mon chardev=mon \
        -drive if=none,id=disk,format=qcow2,file=/tmp/disk.qcow2 -device virtio-blk-pci-non-transitional,drive=disk \
        -device vhost-vsock-pci,guest-cid=42 "$@" >/tmp/vmm.err 2>&1 </dev/null & VMM=$!
    exec 9<>/tmp/mon.in
}
# hmp COMMAND: gives QEMU a command, and waits until it is done.
hmp() {
    : > /tmp/hmp
    printf '%s\nprint 424242\n' "$1" >&9
    n=1200; until grep -q 0x67932 /tmp/hmp; do n=$((n - 1)); [ $n -gt 0 ] || break; sleep 0.1; done
    grep -q 0x67932 /tmp/hmp || fail "QEMU does not do '$1': $(cat /tmp/hmp)"
    grep -i "error\|unknown\|not support" /tmp/hmp && fail "QEMU: $1: $(cat /tmp/hmp)"
}
page() { [ "$(curl -sS -m 30 http://$VM/ 2>&1)" = "this is $VM" ] || { fail "no page: $1: $(curl -sS -m 30 http://$VM/ 2>&1; adit vm show $VM; tail -n 30 $AD/log)"; return 1; }; }
# again WHEN: waits until the VM answers again.
again() {
    begin=$(now); n=300
    until [ "$(curl -sS -m 20 http://$VM/ 2>/dev/null)" = "this is $VM" ]; do
        n=$((n - 1)); [ $n -gt 0 ] || { fail "it does not answer $1: $(adit vm show $VM; tail -n 30 $AD/log $AD/run/vm/web-1/port.log)"; return; }; sleep 0.1
    done
    echo "SHOW http://web-1/ answers again $1 ($begin .. $(now) s)"
}
# holds: opens a tunnel on which nothing happens any more.
holds() {
    : > /tmp/held; curl -sS -p -N http://$VM/waits >/tmp/held 2>&1 & HELD=$!
    n=300; until [ -s /tmp/held ]; do n=$((n - 1)); [ $n -gt 0 ] || { fail "no tunnel to hold"; return; }; sleep 0.1; done
}
# held_ends WHEN: it ends, though nobody sends anything on it.
held_ends() { n=600; while kill -0 $HELD 2>/dev/null; do n=$((n - 1)); [ $n -gt 0 ] || { fail "a stream of the old guest goes on $1"; return; }; sleep 0.1; done; echo "SHOW a tunnel of the guest before has ended $1"; }
goal() {
    echo "steps: [{id: $1, script: {interpreter: /bin/sh, script: \"echo $1 from \$(hostname)\"}}]" > /tmp/goal.yaml
    ( cd /tmp && adit goal apply goal.yaml --sign /etc/fleet.key --to $VM ) || fail "goal"
    adit task watch --timeout 120s
    adit task ls | grep "$1 from $VM" || fail "task $1: $(adit task ls)"
    echo "SHOW a signed goal ran in it: $1 ($(now) s)"
}
# stranger WHO: dials the guest's agent by AF_VSOCK, as any user of this host can.
stranger() {
    said=$(su -s /bin/sh -c "adit-testguest vsock-stranger 42 tcp:80" $1 2>&1)
    case $said in STRANGER-REFUSED*) ;; *) fail "$1 was not refused: $said" ;; esac
    case $said in *"nonce [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]") ;; *) fail "$1 learns the guest's nonce: $said" ;; esac
}

cp /l2/web-1/disk.qcow2 /tmp/disk.qcow2
serve
shown "no VM of this host has CID 42" "without a VM" && shown "AF_VSOCK of the kernel, CID 42" "without a VM"
adit doctor web-1 2>&1 | grep -q "guest-cid=42" || fail "doctor: $(adit doctor web-1 2>&1)"
curl -sS -m 30 -o /dev/null -w '%{http_code}\n' http://web-1/ | grep -q 503 || fail "a VM that is not there answered"
boots
until_said ADIT-READY 240
adit wait web-1 --for agent --timeout 120s || fail "no agent: $(adit vm show web-1; tail -n 30 $AD/log $AD/run/vm/web-1/port.log; grep adit-guest $LOG)"
echo "SHOW stock QEMU booted Debian with vhost-vsock-pci, and its agent is there ($(now) s)"
adit vm show web-1
page "first" && echo "SHOW curl -x aditd http://web-1/ answers ($(now) s)"
[ "$(curl -sS -m 60 -p http://$VM/big?mb=1 | wc -c)" = 1048576 ] || fail "a megabyte by CONNECT"
[ "$(curl -sS -m 60 http://$VM/big?mb=1 | wc -c)" = 1048576 ] || fail "a megabyte"
curl -sS -m 30 -o /dev/null -w '%{http_code}\n' -p http://vsock-5999.web-1:5999/ >/tmp/code 2>&1; grep -q 502 /tmp/code || fail "a port that nobody listens on: $(cat /tmp/code)"
half=$(printf 'CONNECT vsock-5000.web-1:5000 HTTP/1.1\r\nHost: a\r\n\r\nlast' | timeout 60 nc 127.0.0.1 7080 | tail -c 4)
[ "$half" = last ] || fail "an answer behind a half-close is lost: '$half'"
goal first
stranger user; stranger root
page "beside strangers" && echo "SHOW uid 1000 and root of this host are refused by the guest's agent: they have no key ($(now) s)"

# aditd is killed in the middle of a tunnel.
curl -sS -m 300 -p http://$VM/slow?mb=24 > /tmp/slow & SLOW=$!
n=300; until [ -s /tmp/slow ]; do n=$((n - 1)); [ $n -gt 0 ] || { fail "no slow answer"; break; }; sleep 0.1; done
kill -9 $ADITD $(cat $AD/run/worker.pid); wait $ADITD
kill -0 $SLOW || fail "the tunnel ended before aditd was killed"
serve
wait $SLOW && [ $(wc -c < /tmp/slow) = 25165824 ] || fail "a tunnel did not outlive aditd: $(wc -c < /tmp/slow)"
echo "SHOW a tunnel of 24 MiB outlived kill -9 of aditd ($(now) s)"
adit wait web-1 --for agent --timeout 120s || fail "no agent after aditd was killed"
again "after aditd was killed"
# The worker alone, whose listener the monitor keeps.
kill -9 $(cat $AD/run/worker.pid)
n=300; until adit vm ls >/dev/null 2>&1; do n=$((n - 1)); [ $n -gt 0 ] || break; sleep 0.1; done
again "after its worker was killed"
adit wait web-1 --for agent --timeout 120s || fail "no agent after the worker was killed"

# The port process is killed.
pid=$(port_pid); kill -9 $pid
again "after its port process was killed"
[ "$(port_pid)" != $pid ] || fail "it is the same port process"
adit wait web-1 --for agent --timeout 120s || fail "no agent after the port process was killed"
stranger user

# The guest is saved and loaded: its kernel forgets its streams, and L1's is told nothing.
holds
hmp "savevm one"
page "after savevm"; kill -0 $HELD || fail "savevm ended a stream"
echo "SHOW saved ($(now) s)"
hmp "loadvm one"
again "after loadvm"; held_ends "after loadvm"
goal loaded
# Another VM with the same CID.
holds
kill -9 $VMM; wait $VMM
held_ends "with its VMM"
shown "no VM of this host has CID 42" "without its VMM"
boots
until_said ADIT-READY 240
again "in another QEMU with the same CID"
stranger user
# Who has no VM here, and who is another's.
for m in $(cat /lib/adit/modules-spare); do insmod /lib/adit/$m.ko; done
adit-testguest vsock-stranger 1 tasks >/tmp/own 2>&1; grep -q SERVED /tmp/own && fail "a process of the host passed for a guest"
curl -sS --noproxy '*' http://127.0.0.1:7081/metrics | grep adit_guest_streams || fail "a stream of nobody is not counted"
kill $VMM; wait $VMM
echo NESTED-DONE stock

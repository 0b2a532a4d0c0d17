# Runs in L1: stock QEMU boots Debian with a vhost-vsock device, and aditd reaches it through L1's kernel. Everything that matters is killed.
VM=web-1 LOG=/tmp/web-1.log
grep -q vhost-vsock /proc/misc || fail "L1 has no vhost_vsock"
configure <<END
[metrics]
listen = "127.0.0.1:7081"
[[vm]]
name = "web-1"
carrier = { vsock = { cid = 42 } }
allow = [80, 7, 81, 22]
allow_vsock = [5000, 5999]
[[vm]]
name = "other"
cid = 43
END
echo "user:x:1000:1000::/:/bin/sh" >> /etc/passwd
# boots ARGS...: starts QEMU.
boots() {
    : > $LOG
    # Its monitor is a pair of pipes. Held open here, they are there for every command.
    rm -f /tmp/mon.in /tmp/mon.out; mkfifo /tmp/mon.in /tmp/mon.out
    cat /tmp/mon.out >> /tmp/hmp &
    qemu-system-x86_64 -M microvm,pcie=on -accel kvm -cpu host -m 160M -nodefaults -no-user-config -display none \
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
    within 120 grep -q 0x67932 /tmp/hmp || fail "QEMU does not do '$1': $(cat /tmp/hmp)"
    grep -i "error\|unknown\|not support" /tmp/hmp && fail "QEMU: $1: $(cat /tmp/hmp)"
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
agent "after a boot"
echo "SHOW stock QEMU booted Debian with vhost-vsock-pci, and its agent is there ($(now) s)"
adit vm show web-1
main_job first
[ "$(curl -sS -m 60 -p http://$VM/big?mb=1 | wc -c)" = 1048576 ] || fail "a megabyte by CONNECT"
curl -sS -m 30 -o /dev/null -w '%{http_code}\n' -p http://vsock-5999.web-1:5999/ >/tmp/code 2>&1; grep -q 502 /tmp/code || fail "a port that nobody listens on: $(cat /tmp/code)"
half=$(printf 'CONNECT vsock-5000.web-1:5000 HTTP/1.1\r\nHost: a\r\n\r\nlast' | timeout 60 nc 127.0.0.1 7080 | tail -c 4)
[ "$half" = last ] || fail "an answer behind a half-close is lost: '$half'"
# As a package has set it up: by the VM's name, and what ssh sends its output to is a tunnel.
chmod 700 /root /root/.ssh; chmod 600 /root/.ssh/id_ed25519
by_ssh() { ssh -o StrictHostKeyChecking=accept-new -o LogLevel=ERROR root@$VM.adit "$@"; }
[ "$(by_ssh hostname 2>&1)" = $VM ] || fail "no ssh: $(by_ssh -v hostname 2>&1)"
[ "$(head -c 1000000 /dev/zero | by_ssh wc -c)" = 1000000 ] || fail "a megabyte by ssh"
echo "SHOW ssh root@web-1.adit ran a command in it ($(now) s)"
stranger user; stranger root
page "beside strangers" && echo "SHOW uid 1000 and root of this host are refused by the guest's agent: they have no key ($(now) s)"

# aditd is killed in the middle of a tunnel.
curl -sS -m 300 -p http://$VM/slow?mb=24 > /tmp/slow & SLOW=$!
within 30 [ -s /tmp/slow ] || fail "no slow answer"
kill -9 $ADITD $(cat $RUN/worker.pid); wait $ADITD
kill -0 $SLOW || fail "the tunnel ended before aditd was killed"
serve
wait $SLOW && [ $(wc -c < /tmp/slow) = 25165824 ] || fail "a tunnel did not outlive aditd: $(wc -c < /tmp/slow)"
echo "SHOW a tunnel of 24 MiB outlived kill -9 of aditd ($(now) s)"
agent "after aditd was killed"
again "after aditd was killed"
# The worker alone, whose listener the monitor keeps.
kill -9 $(cat $RUN/worker.pid)
within 30 quietly adit vm ls
again "after its worker was killed"
agent "after the worker was killed"

# The port process is killed.
pid=$(field port_pid); kill -9 $pid
again "after its port process was killed"
[ "$(field port_pid)" != $pid ] || fail "it is the same port process"
agent "after the port process was killed"
stranger user

# The guest is saved and loaded: its kernel forgets its streams, and L1's is told nothing.
holds
hmp "savevm one"
page "after savevm"; kill -0 $HELD || fail "savevm ended a stream"
echo "SHOW saved ($(now) s)"
hmp "loadvm one"
again "after loadvm"; held_ends "after loadvm"
signed loaded
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

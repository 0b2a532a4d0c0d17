# Runs in L1: aditd serves two VMs, each with another kernel, whose VMMs are their port processes. Both do the whole main job, are
# saved, restored, and do it again. Then one turns hostile, and the other must not be affected. aditd is killed. When a VM ends, its
# entry is removed.
# of VM PID CID: the following commands are about this VM, its VMM's process and its guest's address.
of() { VM=$1 VMM=$2 CID=$3 LOG=/tmp/$1.log; }
# boots VM CID MEMORY ARGS...: adit-vmm registers the VM and boots Debian; waits until its agent is connected.
boots() {
    of $1 0 $2; memory=$3; shift 3
    start --kernel /l2/$VM/vmlinux --initrd /l2/$VM/initrd --memory $memory --vsock cid=$CID --aditd $ADIT_SOCKET --name $VM \
        --allow 80,7,81 --allow-vsock 5000 --api /tmp/$VM.api --ring "$@"
    until_said ADIT-READY 120
    agent "after a boot"
    kernel=$(grep -o "kernel=[0-9.]*" $LOG)
    echo "SHOW adit-vmm has registered $VM and booted Debian, $kernel: its agent is there ($(now) s)"
}
# ring WHEN: waits until the agent's services use the ring, whose pin wakes the guest; checks that.
ring() {
    shown "^carrier  *ring" "$1" || return
    attached=$(now)
    grep -q "^ring memory .* by PCI function" /tmp/show || fail "$1: $(cat /tmp/show)"
    page "over the ring $1" && megabyte "over the ring $1"
}
# everything WORD: the main job, over vsock and over its ring.
everything() {
    page "$1" && ring "$1" && echo "SHOW http://$VM/ answers over vsock, and over shared memory: $1 ($(now) s)"
    main_job $1
}
api() { curl -sS -m 60 --unix-socket /tmp/$VM.api -X PUT "$@"; }
# away: saves the VM, and kills its VMM.
away() {
    api http://vm/pause; api -d "{\"dir\":\"/tmp/$VM.snap\"}" http://vm/snapshot
    kill -9 $VMM; wait $VMM
    within 30 quietly pidof adit-port || fail "aditd did not start a port process for a VM without one"
    # The port process has started. Wait until it is up: otherwise the next VMM would wait for it to come up, and then to leave.
    sleep 0.4
    # So long that the guest knows by its host's clock.
    sleep 3
    echo "SHOW $VM was paused and saved; its VMM is killed ($(now) s)"
}
# back ARGS...: restores the VM in another process; waits until its agent is connected. The agent must have dialled once, when it
# learned that its streams have ended: no stream of it ends by itself before that.
back() {
    begin=$(now) said=$(wc -l < $LOG)
    adit-vmm restore --from /tmp/$VM.snap --vsock cid=$CID --aditd $ADIT_SOCKET --name $VM --ring --serial $LOG "$@" 2>/tmp/vmm.err </dev/null & VMM=$!
    agent "after the restore"
    echo "SHOW $VM restored in another process: the agent is back ($begin .. $(now) s)"
    tail -n +$((said + 1)) $LOG > /tmp/since
    [ $(grep -c ": connected service=tasks" /tmp/since) = 1 ] || fail "the agent did not redial: $(cat /tmp/since)"
    [ $(grep -c ": disconnected service=tasks" /tmp/since) = 1 ] || fail "the agent dialled in vain: $(cat /tmp/since)"
    grep -q ADIT-READY /tmp/since && fail "it booted"
    # It is not the guest any more that was saved, and says so.
    within 30 shows "^stood still .*new entropy mixed in" || fail "the agent did not say that it stood still: $(adit vm show $VM)"
    grep "^stood still" /tmp/show
}
QUIET="console=ttyS0 quiet panic=-1 mitigations=off"
configure </dev/null
serve
echo "SHOW aditd serves, and has no VM ($(now) s)"
boots web-1 3 192M --cmdline "$QUIET"
grep -q 'ring-found .*by="uio, INTx"' $LOG || fail "the agent has no ring by uio"
everything first
idle
pidof adit-port && fail "there is a port process beside the VMM"
adit vm show web-1 | grep latency
WEB=$VMM

# A neighbour with another kernel.
dd if=/dev/zero of=/tmp/disk bs=1M count=0 seek=16 2>/dev/null
mke2fs -F /tmp/disk >/dev/null 2>&1 || fail "no disk"
boots web-2 4 128M --disk /tmp/disk --cmdline "$QUIET hostile"
everything first
away
back --disk /tmp/disk
everything again
# Root in web-2 drives the socket device by hand, and overwrites the ring. web-1 must not be affected, and adit-vmm must not grow.
# beyond PID: resident KiB without the guest's memory, which is the one large mapping.
beyond() { awk '/^Size:/ { size = $2 } /^Rss:/ && size < 120000 { sum += $2 } END { print sum }' /proc/$1/smaps; }
# A dial lets the guest begin. Its listener only closes the connection.
said=$(curl -sS -m 20 http://$VM:81/ 2>&1)
echo "$said" | grep -q "connection closed" || fail "the guest was not told to begin: $said"
until_said RING-MUTE 120
told=$(curl -sS -m 20 -o /dev/null -w '%{http_code}' http://$VM/)
[ "$told" = 504 ] || fail "a dial to a guest that reads nothing from its ring: $told"
until_said HOSTILE-DONE 120
grep HOSTILE- $LOG
grep -q HOSTILE-FAILED $LOG && fail "a hostile guest"
[ $(grep -c HOSTILE-OK $LOG) = $(grep -c HOSTILE-CASE $LOG) ] || fail "a case without a verdict"
own=$(beyond $VMM)
[ $own -lt 16384 ] || fail "adit-vmm has grown to $own KiB beside its guest's memory"
BAD=$VMM
of web-1 $WEB 3
page "beside a hostile guest" && echo "SHOW web-2's root drove its device by hand, and web-1 was not affected ($(now) s)"
of web-2 $BAD 4
kill -TERM $VMM; ended 0 stopped
rm -r /tmp/web-2.snap
of web-1 $WEB 3

# All that follows happens while a task runs. The task ends when somebody dials it.
goal long "echo start >> /tmp/starts; nc -l -p 81 < /dev/null > /dev/null; echo begun \$(wc -l < /tmp/starts) times"
starts long
runs() { running long || fail "the task does not run $1: $(adit task ls)"; }
kill -9 $ADITD; wait $ADITD
serve
begin=$(now)
agent "after aditd was killed"
echo "SHOW aditd was killed while a task runs: the agent is back ($begin .. $(now) s)"
page "after aditd was killed" && runs "after aditd was killed" && echo "SHOW it serves again, and the task runs on"
# A VM that its VMM holds cannot be removed by mistake, and continues.
adit vm rm web-1 >/tmp/rm 2>&1 && fail "a VM was removed while it runs"
grep -q "its VMM" /tmp/rm && page "after a refused rm" || fail "$(cat /tmp/rm)"
away
back; there=$(now)
ring "after the restore" && echo "SHOW over a new ring, attached in a new epoch ($begin .. $attached s)"
# A second is enough on an idle machine, but several guests may be emulated on these processors.
awk "BEGIN { exit !($attached - $there <= 5) }" || fail "the ring is back at $attached, the agent at $there"
page "after the restore" && runs "after the restore" && echo "SHOW http://web-1/ answers again, and the task runs on"
# A clone cannot pass for its origin: it cannot have the same name, and under another name it is shown as a clone.
clone="timeout 60 adit-vmm restore --from /tmp/web-1.snap --aditd $ADIT_SOCKET --serial /tmp/clone.log"
$clone --vsock cid=3 --name web-1 --ring >/tmp/clone 2>&1 </dev/null && fail "a clone took its origin's place"
grep -q "web-1. runs" /tmp/clone || fail "$(cat /tmp/clone)"
$clone --vsock cid=5 --name twin --ring >/tmp/clone 2>&1 </dev/null & CLONE=$!
VM=twin; shown "enrolled as .web-1" "as a clone"; VM=web-1
page "beside its clone" && runs "beside its clone" && echo "SHOW a clone is refused web-1's name, and is shown as a clone under another one ($(now) s)"
kill -TERM $CLONE; gone $CLONE 60
curl -sS -m 20 http://web-1:81/ >/dev/null 2>&1
said "begun 1 times" && echo "SHOW the task from before ended, after both: begun 1 times"
everything again
kill -TERM $VMM; ended 0 stopped
adit vm ls | grep -q web-1 && fail "an ended VM still has its entry"
echo "SHOW stopped, and its entry is removed"
$clone --vsock cid=3 --name web-1 >/tmp/clone 2>&1 </dev/null && fail "a VM lost its ring"
grep -q "same --ring" /tmp/clone || fail "$(cat /tmp/clone)"
$clone --vsock cid=3 --name web-1 --ring 8M >/tmp/clone 2>&1 </dev/null && fail "a ring grew"
grep -q "the same" /tmp/clone || fail "$(cat /tmp/clone)"
start --kernel /l2/web-1/vmlinux --vsock cid=3 --aditd /nowhere/aditd.sock --name twin
gone $VMM 60; grep -q "cannot reach aditd at /nowhere" /tmp/vmm.err || fail "$(cat /tmp/vmm.err)"
echo NESTED-DONE managed

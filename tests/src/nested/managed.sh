# In L1: aditd serves a VM that has no port process beside its VMM; it may die; the VM's end takes it off the map.
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
# ring WHEN: until the agent's services go over the ring, whose pin rings the guest.
ring() {
    n=100; until adit vm show web-1 >/tmp/show && grep -q "^carrier  *ring" /tmp/show; do
        n=$((n - 1)); [ $n -gt 0 ] || { fail "no ring $1: $(cat /tmp/show)"; return; }; sleep 0.1
    done
    attached=$(now)
    grep -q "^ring memory .* by PCI function" /tmp/show || fail "$1: $(cat /tmp/show)"
    page "over the ring $1"
    [ "$(curl -sS -m 20 http://web-1/big?mb=1 | wc -c)" = 1048576 ] || fail "a megabyte over the ring $1"
}
page() { [ "$(curl -sS -m 20 http://web-1/ 2>&1)" = "this is web-1" ] || { fail "no page: $1"; return 1; }; }
serve
echo "SHOW aditd serves, and knows no VM ($(now) s)"
start --kernel /l2/web-1/vmlinux --initrd /l2/web-1/initrd --memory 256M \
    --cmdline "console=ttyS0 quiet panic=-1 mitigations=off" \
    --vsock cid=3 --aditd $ADIT_SOCKET --name web-1 --allow 80,7,81 --allow-vsock 5000 --api /tmp/api --ring
until_said ADIT-READY 120
adit wait web-1 --for agent --timeout 60s || fail "no agent: $(adit vm show web-1)"
echo "SHOW adit-vmm has registered web-1 and booted Debian: its agent is there ($(now) s)"
grep -q 'ring-found .*by="uio, INTx"' $LOG || fail "the agent has no ring by uio"
ring first && echo "SHOW its services go over shared memory: a PCI function that stock Linux drives by uio_pci_generic ($(now) s)"
idle
page "first" && echo "SHOW curl -x aditd http://web-1/: this is web-1"
# A neighbour whose root drives the socket device by hand, and writes over the ring. web-1 never notices; nor does adit-vmm, which grows by nothing.
# Resident KiB beside the guest's memory, which is the one large mapping.
beyond() { awk '/^Size:/ { size = $2 } /^Rss:/ && size < 120000 { sum += $2 } END { print sum }' /proc/$1/smaps; }
hostile() {
    WEB=$VMM LOG=/tmp/bad.log
    start --kernel /l2/web-1/vmlinux --initrd /l2/web-1/initrd --memory 128M --vsock cid=4 --aditd $ADIT_SOCKET --name bad --allow 80 --ring \
        --cmdline "console=ttyS0 quiet panic=-1 mitigations=off hostile"
    until_said RING-MUTE 120
    told=$(curl -sS -m 20 -o /dev/null -w '%{http_code}' http://bad/)
    [ "$told" = 504 ] || fail "a guest that takes nothing of its ring: $told"
    until_said HOSTILE-DONE 120
    grep HOSTILE- $LOG
    grep -q HOSTILE-FAILED $LOG && fail "a hostile guest"
    [ $(grep -c HOSTILE-OK $LOG) = $(grep -c HOSTILE-CASE $LOG) ] || fail "a case without a verdict"
    own=$(beyond $VMM)
    [ $own -lt 16384 ] || fail "adit-vmm has grown to $own KiB beside its guest's memory"
    page "beside a hostile guest" && echo "SHOW a hostile neighbour drove its device by hand, and web-1 did not notice ($(now) s)"
    kill -TERM $VMM; ended 0 stopped
    VMM=$WEB LOG=/tmp/web.log
}
hostile
cat > /tmp/goal.yaml <<END
steps: [{id: hello, script: {interpreter: /bin/sh, script: "echo hello from \$(hostname)"}}]
END
( cd /tmp && adit goal apply goal.yaml --sign /etc/fleet.key --to web-1 ) || fail "goal"
adit task watch --timeout 60s
adit task ls | tee /tmp/tasks
grep -q "hello from web-1" /tmp/tasks && echo "SHOW a signed goal ran in it: hello from web-1" || fail "task"
pidof adit-port && fail "there is a port process beside the VMM"
adit vm show web-1 | grep latency
cat > /tmp/goal.yaml <<END
steps: [{id: long, script: {interpreter: /bin/sh, script: "echo start >> /tmp/starts; nc -l -p 81 < /dev/null > /dev/null; echo begun \$(wc -l < /tmp/starts) times"}}]
END
( cd /tmp && adit goal apply goal.yaml --sign /etc/fleet.key --to web-1 ) || fail "goal"
# It ends when somebody dials it: until then whatever happens, happens while it runs.
runs() { adit task ls | grep -q " long  *1  *started " || fail "$1: $(adit task ls)"; }
n=100; until adit task ls | grep -q " long  *1  *started "; do n=$((n - 1)); [ $n -gt 0 ] || { fail "the task does not start"; break; }; sleep 0.1; done
kill -9 $ADITD; wait $ADITD
serve
begin=$(now)
adit wait web-1 --for agent --timeout 60s || fail "no agent after aditd was killed: $(adit vm show web-1)"
echo "SHOW aditd was killed while a task runs: the agent is back ($begin .. $(now) s)"
page "after aditd was killed" && runs "after aditd was killed" && echo "SHOW it serves again, and the task runs on"
# What its VMM holds is not removed by mistake, and goes on.
adit vm rm web-1 >/tmp/rm 2>&1 && fail "a VM was removed while it runs"
grep -q "its VMM" /tmp/rm && page "after a refused rm" || fail "$(cat /tmp/rm)"
api() { curl -sS -m 60 --unix-socket /tmp/api -X PUT "$@"; }
api http://vm/pause; api -d '{"dir":"/tmp/snap"}' http://vm/snapshot
echo "SHOW still in mid-task, the VM is paused and written down; its VMM is killed ($(now) s)"
kill -9 $VMM; wait $VMM
n=300; until pidof adit-port >/dev/null; do n=$((n - 1)); [ $n -gt 0 ] || { fail "aditd did not start a port process for a VM without one"; break; }; sleep 0.1; done
begin=$(now)
adit-vmm restore --from /tmp/snap --vsock cid=3 --aditd $ADIT_SOCKET --name web-1 --ring --serial $LOG 2>/tmp/vmm.err </dev/null & VMM=$!
adit wait web-1 --for agent --timeout 60s || fail "no agent after the restore: $(cat /tmp/vmm.err; adit vm show web-1)"
echo "SHOW restored in another process: the agent is back ($begin .. $(now) s)"
page "after the restore" && runs "after the restore" && echo "SHOW http://web-1/ answers again, and the task runs on"
ring "after the restore" && echo "SHOW over a new ring, attached in a new epoch ($begin .. $attached s)"
# A clone does not pass for its origin: not under its name, and under another it is shown for what it is.
adit-vmm restore --from /tmp/snap --vsock cid=3 --aditd $ADIT_SOCKET --name web-1 --ring --serial /tmp/clone.log >/tmp/clone 2>&1 </dev/null &&
    fail "a clone took its origin's place"
grep -q "web-1. runs" /tmp/clone || fail "$(cat /tmp/clone)"
adit-vmm restore --from /tmp/snap --vsock cid=4 --aditd $ADIT_SOCKET --name web-2 --ring --serial /tmp/clone.log >/tmp/clone 2>&1 </dev/null & CLONE=$!
n=100; until adit vm show web-2 2>/dev/null | grep -q "enrolled as .web-1"; do
    n=$((n - 1)); [ $n -gt 0 ] || { fail "no clone: $(cat /tmp/clone; adit vm show web-2)"; break; }; sleep 0.1
done
page "beside its clone" && runs "beside its clone" && echo "SHOW a clone is refused web-1's name, and shown as one under another ($(now) s)"
kill -TERM $CLONE; wait $CLONE
curl -sS -m 20 http://web-1:81/ >/dev/null 2>&1
adit task watch --timeout 60s
adit task ls | tee /tmp/tasks
grep -q "begun 1 times" /tmp/tasks && echo "SHOW the task of before ended, through both: begun 1 times" || fail "a task of before the snapshot"
kill -TERM $VMM; ended 0 stopped
adit vm ls | grep -q web-1 && fail "an ended VM is still on the map"
echo "SHOW stopped, and off the map"
adit-vmm restore --from /tmp/snap --vsock cid=3 --aditd $ADIT_SOCKET --name web-1 --serial /tmp/clone.log >/tmp/clone 2>&1 </dev/null && fail "a VM lost its ring"
grep -q "give it the same" /tmp/clone || fail "$(cat /tmp/clone)"
adit-vmm restore --from /tmp/snap --vsock cid=3 --aditd $ADIT_SOCKET --name web-1 --ring 8M --serial /tmp/clone.log >/tmp/clone 2>&1 </dev/null && fail "a ring grew"
grep -q "give it the same" /tmp/clone || fail "$(cat /tmp/clone)"
start --kernel /l2/web-1/vmlinux --vsock cid=3 --aditd /nowhere/aditd.sock --name web-2
wait $VMM; grep -q "no aditd at /nowhere" /tmp/vmm.err || fail "$(cat /tmp/vmm.err)"
echo NESTED-DONE managed

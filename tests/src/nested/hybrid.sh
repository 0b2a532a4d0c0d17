# Runs in L1: adit-vmm has a socket for each stream of its guest, as Firecracker has, and knows nothing of aditd. aditd serves the VM as
# it is. aditd, the port process and the VMM are killed, and the VM is restored from a snapshot: each time it answers again.
VM=web-1 LOG=/tmp/web-1.log UDS=/tmp/fc/web-1/v.sock API=/tmp/web-1.api
mkdir -p /tmp/fc/web-1
configure <<END
[[vm]]
name = "$VM"
cid = 3
allow = [80, 81]
carrier = { hybrid = "$UDS" }
END
api() { curl -sS -m 60 --noproxy '*' --unix-socket $API -X PUT "$@"; }
boots() {
    start --kernel /l2/$VM/vmlinux --initrd /l2/$VM/initrd --memory 192M --vsock cid=3,uds=$UDS --api $API \
        --cmdline "console=ttyS0 quiet panic=-1 mitigations=off"
    until_said ADIT-READY 120
    agent "after a boot"
}

serve
adit vm show $VM | grep -q "has not made" || fail "a VMM that is not there: $(adit vm show $VM)"
boots
adit vm show $VM > /tmp/show
grep "^carrier" /tmp/show
grep -q "^carrier .*$UDS" /tmp/show || fail "$(cat /tmp/show)"
grep -q "^carrier .*chunks" /tmp/show || fail "the agent knows chunks: $(cat /tmp/show)"
main_job first

# The end of a client's sending reaches the guest's server, which answers behind it.
goal half "nc -l -p 81 -w 20 > /tmp/sent; wc -c < /tmp/sent"
starts half
sleep 0.5
head -c 300000 /dev/zero | timeout 20 adit connect $VM 81 >/dev/null || fail "adit connect: $?"
said 300000 && echo "SHOW a client's end reaches the guest ($(now) s)"

# Whoever else may open the VMM's socket is refused by the agent.
adit-testguest uds-hello $UDS tcp:80 2>/tmp/stranger && fail "a stranger was served"
echo "SHOW a stranger at the VMM's socket: $(tail -n 1 /tmp/stranger)"

# All that follows happens while a task runs. The task ends when somebody dials it.
goal long "nc -l -p 81 < /dev/null > /dev/null; echo ended once"
starts long
runs() { running long || fail "the task does not run $1: $(adit task ls)"; }
kill -9 $ADITD; wait $ADITD
serve; agent "after aditd was killed"
page "after aditd was killed" && runs "after aditd was killed" && echo "SHOW aditd was killed: it serves again ($(now) s)"

old=$(field port_pid)
kill -9 $old
another() { new=$(field port_pid); [ -n "$new" ] && [ "$new" != "$old" ]; }
within 30 another || fail "no other port process"
# The agent's stream has ended with it, and is dialled again.
again "after the port process was killed"
agent "after the port process was killed"
runs "after the port process was killed" && echo "SHOW the port process was killed: the VM answers ($(now) s)"

api http://vm/pause; api -d "{\"dir\":\"/tmp/snap\"}" http://vm/snapshot
kill -9 $VMM; wait $VMM
none() { [ "$(field streams)" = 0 ]; }
within 10 none || fail "streams of a VMM that is gone: $(state)"
said=$(wc -l < $LOG)
adit-vmm restore --from /tmp/snap --vsock cid=3,uds=$UDS --api $API --serial $LOG 2>/tmp/vmm.err </dev/null & VMM=$!
agent "after the restore"
page "after the restore" && runs "after the restore" && echo "SHOW restored from a snapshot: the VM answers ($(now) s)"
tail -n +$((said + 1)) $LOG | grep -q ADIT-READY && fail "it booted"
curl -sS -m 20 http://$VM:81/ >/dev/null 2>&1
said "ended once"

kill -9 $VMM; wait $VMM
boots
main_job again
kill -TERM $VMM; ended 0 stopped
echo NESTED-DONE hybrid

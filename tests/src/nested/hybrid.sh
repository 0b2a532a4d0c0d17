# Runs in L1: adit-vmm has a socket for each stream of its guest, as Firecracker has, and knows nothing of aditd. aditd serves the VM as
# it is. aditd, the port process and the VMM are killed, and the VM is restored from a snapshot: each time it answers again.
AD=/tmp/adit VM=web-1 LOG=/tmp/web-1.log UDS=/tmp/fc/web-1/v.sock API=/tmp/web-1.api
mkdir -p $AD /tmp/fc/web-1
cat > $AD/aditd.toml <<END
run_dir = "$AD/run"
state_dir = "$AD/state"
[proxy]
listen = "127.0.0.1:7080"
[[grant]]
to = ["anyone"]
vms = ["*"]
may = ["reach", "see"]
[[vm]]
name = "$VM"
cid = 3
allow = [80, 81]
carrier = { hybrid = "$UDS" }
END
export ADIT_SOCKET=$AD/run/aditd.sock http_proxy=http://127.0.0.1:7080
serve() {
    aditd run --config $AD/aditd.toml 2>>$AD/log & ADITD=$!
    n=300; until adit vm ls >/dev/null 2>&1; do
        n=$((n - 1)); [ $n -gt 0 ] || { fail "no aditd: $(tail -n 3 $AD/log)"; return; }; sleep 0.1
    done
}
show() { curl -sS -m 20 --noproxy '*' --unix-socket $ADIT_SOCKET http://a/v1/vms/$VM; }
# field NAME: a number of what aditd shows of the VM.
field() { show | grep -o "\"$1\": *[0-9]*" | head -n 1 | grep -o '[0-9]*$'; }
agent() { adit wait $VM --for agent --timeout 60s || fail "no agent $1: $(adit vm show $VM; tail -n 20 $AD/log)"; }
page() { [ "$(curl -sS -m 20 http://$VM/ 2>&1)" = "this is $VM" ] || { fail "no page $1: $(curl -sS -m 20 http://$VM/ 2>&1)"; return 1; }; }
goal() {
    echo "steps: [{id: $1, script: {interpreter: /bin/sh, script: \"$2\"}}]" > /tmp/goal.yaml
    ( cd /tmp && adit goal apply goal.yaml --sign /etc/fleet.key --to $VM ) || fail "goal"
}
main_job() {
    page "$1"
    [ "$(curl -sS -m 20 http://$VM/big?mb=1 | wc -c)" = 1048576 ] || fail "a megabyte $1"
    goal $1 "echo $1 from \$(hostname)"
    adit task watch --timeout 60s
    adit task ls > /tmp/tasks
    grep -q "$1 from $VM" /tmp/tasks && echo "SHOW curl http://$VM/ answers, and a signed goal ran: $1 ($(now) s)" || fail "task $1: $(cat /tmp/tasks)"
}
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
n=100; until adit task ls | grep -q " half  *1  *started "; do n=$((n - 1)); [ $n -gt 0 ] || { fail "no server"; break; }; sleep 0.1; done
sleep 0.5
head -c 300000 /dev/zero | timeout 20 adit connect $VM 81 >/dev/null || fail "adit connect: $?"
adit task watch --timeout 60s
adit task ls > /tmp/tasks; grep -q 300000 /tmp/tasks && echo "SHOW a client's end reaches the guest ($(now) s)" || fail "$(cat /tmp/tasks)"

# Whoever else may open the VMM's socket is refused by the agent.
adit-testguest uds-hello $UDS tcp:80 2>/tmp/stranger && fail "a stranger was served"
echo "SHOW a stranger at the VMM's socket: $(tail -n 1 /tmp/stranger)"

# All that follows happens while a task runs. The task ends when somebody dials it.
goal long "nc -l -p 81 < /dev/null > /dev/null; echo ended once"
runs() { adit task ls | grep -q " long  *1  *started " || fail "$1: $(adit task ls)"; }
n=100; until adit task ls | grep -q " long  *1  *started "; do n=$((n - 1)); [ $n -gt 0 ] || { fail "the task does not start"; break; }; sleep 0.1; done
kill -9 $ADITD; wait $ADITD
serve; agent "after aditd was killed"
page "after aditd was killed" && runs "after aditd was killed" && echo "SHOW aditd was killed: it serves again ($(now) s)"

old=$(field port_pid)
kill -9 $old
n=300; until new=$(field port_pid) && [ -n "$new" ] && [ "$new" != "$old" ]; do
    n=$((n - 1)); [ $n -gt 0 ] || { fail "no other port process"; break; }; sleep 0.1
done
# The agent's stream has ended with it, and is dialled again.
n=300; until page "" >/dev/null 2>&1; do n=$((n - 1)); [ $n -gt 0 ] || { page "after the port process was killed"; break; }; sleep 0.1; done
agent "after the port process was killed"
runs "after the port process was killed" && echo "SHOW the port process was killed: the VM answers ($(now) s)"

api http://vm/pause; api -d "{\"dir\":\"/tmp/snap\"}" http://vm/snapshot
kill -9 $VMM; wait $VMM
n=100; while [ "$(field streams)" != 0 ]; do n=$((n - 1)); [ $n -gt 0 ] || { fail "streams of a VMM that is gone: $(show)"; break; }; sleep 0.1; done
said=$(wc -l < $LOG)
adit-vmm restore --from /tmp/snap --vsock cid=3,uds=$UDS --api $API --serial $LOG 2>/tmp/vmm.err </dev/null & VMM=$!
agent "after the restore"
page "after the restore" && runs "after the restore" && echo "SHOW restored from a snapshot: the VM answers ($(now) s)"
tail -n +$((said + 1)) $LOG | grep -q ADIT-READY && fail "it booted"
curl -sS -m 20 http://$VM:81/ >/dev/null 2>&1
adit task watch --timeout 60s
adit task ls > /tmp/tasks; grep -q "ended once" /tmp/tasks || fail "a task from before: $(cat /tmp/tasks)"

kill -9 $VMM; wait $VMM
boots
main_job again
kill -TERM $VMM; ended 0 stopped
echo NESTED-DONE hybrid

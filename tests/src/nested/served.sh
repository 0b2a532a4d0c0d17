# Functions for the scripts in L1 in which aditd serves guests. VM is the one that a command is about, and LOG its serial line.
AD=/tmp/adit RUN=/run/adit
export ADIT_SOCKET=$RUN/aditd.sock http_proxy=http://127.0.0.1:7080
# configure: writes aditd's configuration. What only this script has is on standard input.
configure() {
    mkdir -p $AD
    cat > $AD/aditd.toml <<END
run_dir = "$RUN"
state_dir = "$AD/state"
[proxy]
listen = "127.0.0.1:7080"
[[grant]]
to = ["anyone"]
vms = ["*"]
may = ["reach", "see"]
END
    cat >> $AD/aditd.toml
}
serve() {
    aditd run --config $AD/aditd.toml 2>>$AD/log & ADITD=$!
    within 30 quietly adit vm ls || fail "no aditd: $(tail -n 3 $AD/log)"
}
# state: all that is known of the VM, for a failure's line.
state() { adit vm show $VM; tail -n 30 $AD/log $RUN/vm/$VM/port.log; grep adit-guest $LOG; }
# field NAME: a number of what aditd shows of the VM.
field() {
    curl -sS -m 20 --noproxy '*' --unix-socket $ADIT_SOCKET http://a/v1/vms/$VM | grep -o "\"$1\": *[0-9]*" | head -n 1 | grep -o '[0-9]*$'
}
shows() { adit vm show $VM >/tmp/show 2>&1 && grep -q "$1" /tmp/show; }
# shown TEXT WHEN: waits until aditd shows this of the VM.
shown() { within 30 shows "$1" || { fail "not shown $2: '$1': $(cat /tmp/show; state)"; return 1; }; }
agent() { adit wait $VM --for agent --timeout 120s || fail "no agent $1: $(state)"; }
answers() { [ "$(curl -sS -m 30 http://$VM/ 2>&1)" = "this is $VM" ]; }
# page WHEN: the VM's page is there at the first try.
page() { answers || { fail "no page $1: $(curl -sS -m 30 http://$VM/ 2>&1; state)"; return 1; }; }
# again WHEN: waits until it is there.
again() {
    begin=$(now)
    within 30 answers && echo "SHOW http://$VM/ answers again $1 ($begin .. $(now) s)" || fail "it does not answer $1: $(state)"
}
megabyte() { [ "$(curl -sS -m 60 http://$VM/big?mb=1 | wc -c)" = 1048576 ] || fail "a megabyte $1"; }
# goal STEP SCRIPT: signs a goal for the VM and applies it. A step that waits for this script must not be killed on a busy machine.
goal() {
    echo "steps: [{id: $1, script: {interpreter: /bin/sh, timeout_s: 600, script: \"$2\"}}]" > /tmp/goal.yaml
    ( cd /tmp && adit goal apply goal.yaml --sign /etc/fleet.key --to $VM ) || fail "goal"
}
running() { adit task ls | grep -q " $1  *1  *started "; }
starts() { within 10 running $1 || fail "the step $1 does not start: $(adit task ls)"; }
# said TEXT: waits until all tasks have ended; one of them has said this.
said() {
    adit task watch --timeout 120s
    adit task ls > /tmp/tasks
    grep -q "$1" /tmp/tasks || { fail "no task has said '$1': $(cat /tmp/tasks)"; return 1; }
}
# signed WORD: a signed goal runs in the VM.
signed() {
    goal $1 "echo $1 from \$(hostname)"
    said "$1 from $VM" && echo "SHOW a signed goal ran in it: $1 from $VM ($(now) s)"
}
# main_job WORD: the host reaches the VM by name, and a signed goal runs in it.
main_job() {
    page "$1" && megabyte "$1" && echo "SHOW curl -x aditd http://$VM/ answers: $1 ($(now) s)"
    signed $1
}
# holds: opens a tunnel on which nothing happens any more.
holds() {
    : > /tmp/held; curl -sS -p -N http://$VM/waits >/tmp/held 2>&1 & HELD=$!
    within 30 [ -s /tmp/held ] || fail "no tunnel to hold"
}
held_ended() { ! kill -0 $HELD 2>/dev/null; }
# held_ends WHEN: it ends, though nobody sends anything on it.
held_ends() { within 60 held_ended && echo "SHOW a tunnel of the guest before has ended $1" || fail "a stream of the old guest goes on $1"; }

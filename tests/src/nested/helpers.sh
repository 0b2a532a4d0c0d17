# Functions for the scripts in L1, and for plain KVM. T is the directory for files.
T=${T:-/tmp} L2=${L2:-/l2}
fail() { [ -f "$LOG" ] && tail -n 80 "$LOG"; tail -n 5 $T/vmm.err; echo "NESTED-FAIL $*"; }
# within SECONDS COMMAND...: tries this command until it succeeds. Fails if it never does.
within() {
    local n=$(($1 * 10)); shift
    until "$@"; do n=$((n - 1)); [ $n -gt 0 ] || return 1; sleep 0.1; done
}
quietly() { "$@" >/dev/null 2>&1; }
ended_or_said() { grep -q "$1" "$LOG" || ! kill -0 $VMM; }
# until_said TEXT SECONDS: waits for this text on the guest's serial line.
until_said() {
    within $2 ended_or_said "$1" || { fail "no '$1' in $2 s"; return 1; }
    grep -q "$1" "$LOG" || { fail "the VMM ended before '$1'"; return 1; }
}
start() { : > "$LOG"; adit-vmm run "$@" --serial $LOG 2>$T/vmm.err </dev/null & VMM=$!; }
# gone PID SECONDS: waits until this process has ended; returns its status. After that time it is killed with SIGABRT.
gone() {
    ( sleep $2; kill -ABRT $1 ) & dog=$!
    wait $1; rc=$?
    kill $dog; wait $dog
    return $rc
}
# ended STATUS TEXT: waits until adit-vmm has ended; checks its status and its message.
ended() {
    gone $VMM 60; rc=$?
    [ $rc = $1 ] || fail "adit-vmm ended with $rc, not $1"
    grep -q "$2" $T/vmm.err || fail "adit-vmm did not say '$2'"
}
now() { read -r up _ < /proc/uptime; echo "$up"; }

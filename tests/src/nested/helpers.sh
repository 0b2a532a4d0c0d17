# In L1, and where there is plain KVM: functions that the scripts share. T is where files go.
T=${T:-/tmp} L2=${L2:-/l2}
fail() { [ -f "$LOG" ] && tail -n 80 "$LOG"; tail -n 5 $T/vmm.err; echo "NESTED-FAIL $*"; }
# until_said TEXT SECONDS: until the guest has said it on its serial line.
until_said() {
    n=$(($2 * 10))
    until grep -q "$1" "$LOG"; do
        n=$((n - 1)); [ $n -gt 0 ] || { fail "no '$1' in $2 s"; return 1; }
        kill -0 $VMM || { fail "adit-vmm ended before '$1'"; return 1; }
        sleep 0.1
    done
}
start() { : > "$LOG"; adit-vmm run "$@" --serial $LOG 2>$T/vmm.err </dev/null & VMM=$!; }
# gone PID SECONDS: until this process has ended; returns what it ended with. One that does not is killed, with SIGABRT.
gone() {
    ( sleep $2; kill -ABRT $1 ) & dog=$!
    wait $1; rc=$?
    kill $dog; wait $dog
    return $rc
}
# ended STATUS TEXT: adit-vmm ends with this status, and says this.
ended() {
    gone $VMM 60; rc=$?
    [ $rc = $1 ] || fail "adit-vmm ended with $rc, not $1"
    grep -q "$2" $T/vmm.err || fail "adit-vmm did not say '$2'"
}
now() { read -r up _ < /proc/uptime; echo "$up"; }

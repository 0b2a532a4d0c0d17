# Runs in L1, with a ring whose pin wakes the guest: an idle VM wakes nobody. Counts wake-ups in the guest, by a task that sleeps (the
# agent's threads, and the pin's interrupts), and here in the meantime.
# awake: how often each thread of adit-vmm, then of aditd, slept. Without vCPUs, which their guests' kernels wake.
awake() {
    for t in /proc/$VMM/task/* /proc/$ADITD/task/*; do
        case $(cat $t/comm) in vcpu*) ;; *) echo "$(cat $t/comm) $(grep ^voluntary $t/status)" ;; esac
    done
}
idle() {
    cat > /tmp/idle.yaml <<'END'
steps: [{id: idle, script: {interpreter: /bin/sh, script: "count() { for t in /proc/$(pidof adit-guest)/task/*; do echo $(cat $t/comm) $(grep -h ctxt $t/status); done; grep uio /proc/interrupts; }; sleep 0.5; count > /run/a; sleep 2.5; count > /run/b; grep -q uio /run/a && diff /run/a /run/b && echo asleep"}}]
END
    ( cd /tmp && adit goal apply idle.yaml --sign /etc/fleet.key --to web-1 ) || fail "goal"
    n=100; until adit task ls | grep -q " idle  *1  *started "; do n=$((n - 1)); [ $n -gt 0 ] || { fail "the idle task does not start"; break; }; sleep 0.1; done
    sleep 0.7; awake > /tmp/awake.a; sleep 1; awake > /tmp/awake.b
    cmp -s /tmp/awake.a /tmp/awake.b || fail "a thread was woken: $(diff /tmp/awake.a /tmp/awake.b)"
    adit task watch --timeout 60s
    adit task ls > /tmp/tasks; grep -q asleep /tmp/tasks || fail "the agent was woken: $(cat /tmp/tasks)"
    echo "SHOW idle: adit-vmm, aditd and the agent are not woken, and the ring's pin is quiet ($(now) s)"
}

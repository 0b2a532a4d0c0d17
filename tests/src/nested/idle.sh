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
    starts idle
    sleep 0.7; awake > /tmp/awake.a; sleep 1; awake > /tmp/awake.b
    cmp -s /tmp/awake.a /tmp/awake.b || fail "a thread was woken: $(diff /tmp/awake.a /tmp/awake.b)"
    # Else the agent was woken.
    said asleep
    echo "SHOW idle: adit-vmm, aditd and the agent are not woken, and the ring's pin is quiet ($(now) s)"
}

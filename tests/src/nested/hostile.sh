# Runs in L2 if its command line says so. Waits for a dial. Then root takes the socket device from the kernel and drives it by hand;
# after that it overwrites the memory that it shares with the host.
if grep -q hostile /proc/cmdline; then
    nc -l -p 81 < /dev/null > /dev/null
    for case in $(adit-hostile list); do
        echo HOSTILE-CASE $case
        adit-hostile $case 120
    done
    /etc/init.d/S50adit-guest stop
    # The cases that depend on the VMM: pages, doorbells, handshakes; and everything at once. Guests on QEMU run the other ones
    # against the same host. The host dials the guest of r11-mute.
    for case in handshakes r10-doorbells r17-no-hints r11-mute everything; do
        echo HOSTILE-CASE $case
        adit-testguest ring-attack $case
    done
    echo HOSTILE-DONE
fi

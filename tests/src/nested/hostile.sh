# In L2, when its command line says so, and once it is dialled: root takes the socket device from the kernel, and drives it by
# hand; then it writes over the memory that it shares with the host.
if grep -q hostile /proc/cmdline; then
    nc -l -p 81 < /dev/null > /dev/null
    for case in $(adit-hostile list); do
        echo HOSTILE-CASE $case
        adit-hostile $case 120
    done
    /etc/init.d/S50adit-guest stop
    # What a VMM has a part in: pages, doorbells, handshakes; and everything at once. Guests on QEMU do the rest case by case,
    # to the same host. The host dials the one that is mute.
    for case in handshakes r10-doorbells r17-no-hints r11-mute everything; do
        echo HOSTILE-CASE $case
        adit-testguest ring-rude $case
    done
    echo HOSTILE-DONE
fi

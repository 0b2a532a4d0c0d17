# In L2, when its command line says so: root takes the socket device from the kernel, and drives it by hand; then it writes
# over the memory that it shares with the host.
if grep -q hostile /proc/cmdline; then
    for case in $(adit-hostile list); do
        echo HOSTILE-CASE $case
        adit-hostile $case 20
    done
    /etc/init.d/S50adit-guest stop
    echo HOSTILE-CASE everything
    adit-testguest ring-rude everything
    echo HOSTILE-DONE
fi

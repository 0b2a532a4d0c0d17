# In L2, when its command line says so: root takes the socket device from the kernel, and drives it by hand.
if grep -q hostile /proc/cmdline; then
    for case in $(adit-hostile list); do
        echo HOSTILE-CASE $case
        adit-hostile $case 20
    done
    echo HOSTILE-DONE
fi

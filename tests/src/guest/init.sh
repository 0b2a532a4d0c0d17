#!/bin/busybox sh
# The first process of the test guest: mounts file systems, loads modules, mounts the state disk; then busybox init runs /etc/rc.
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
# The kernel measures its only timer in a tenth of a second, and does without one if the host had no time for QEMU just then. Nothing that
# waits for a time, or for all processors to have been elsewhere (as a move into a cgroup does), ever ends then, and no reboot either.
# One that works has interrupted by now: the processor's own, or the PIT.
ticks='$1 == "0:" || $1 == "LOC:" { n += $2 } END { print n + 0 }'
if [ "$($b awk "$ticks" /proc/interrupts)" = 0 ]; then
    echo ADIT-NO-TIMER
    $b sync
    echo b > /proc/sysrq-trigger
fi
$b mount -t securityfs security /sys/kernel/security
$b mount -t devtmpfs dev /dev
$b mount -t tmpfs run /run
$b mount -t cgroup2 cgroup2 /sys/fs/cgroup
$b --install -s /bin
while read -r m; do
    insmod /lib/adit/$m.ko || echo "ADIT-ERROR insmod $m"
done < /lib/adit/modules
if [ -d /sys/kernel/iommu_groups/0 ]; then
    while read -r m; do
        insmod /lib/adit/$m.ko || echo "ADIT-ERROR insmod $m"
    done < /lib/adit/modules-ring
fi
if grep -qs 0x1110 /sys/bus/pci/devices/*/device; then
    while read -r m; do
        insmod /lib/adit/$m.ko || echo "ADIT-ERROR insmod $m"
    done < /lib/adit/modules-uio
fi
if [ -b /dev/vda ]; then
    mount -t ext4 /dev/vda /var/lib || echo "ADIT-ERROR no state disk"
fi
exec /bin/busybox init

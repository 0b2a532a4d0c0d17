#!/bin/sh
# Runs once the test guest is up. /etc/hostname, the agent and /etc/adit-test come with the VM's identity.
export PATH=/bin:/sbin:/usr/bin:/usr/sbin
[ -f /etc/hostname ] && hostname -F /etc/hostname
ip link set lo up
adit-testguest http 80 "$(hostname)" &
adit-testguest tcp-echo 7 &
adit-testguest vsock-echo 5000 &
[ -x /etc/init.d/S50adit-guest ] && /etc/init.d/S50adit-guest start
read -r up _ < /proc/uptime
echo "ADIT-READY uptime=$up kernel=$(uname -r)"
[ -f /etc/adit-test ] && . /etc/adit-test
exit 0

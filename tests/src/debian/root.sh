#!/bin/sh
# root.sh ROOT KERNEL-PACKAGE INIT: Debian 12 with what its people have on it, and no agent.
set -eu
root=$1 kernel=$2
case $3 in
systemd) init=systemd,systemd-sysv,dbus ;;
# Here nobody but ifupdown switches the loopback interface on.
openrc) init=openrc,sysvinit-core,ifupdown ;;
esac
people=openssh-server,nginx-light,fcgiwrap,git,python3-minimal,python3-websockets,prometheus-node-exporter,sudo,nftables,rsync,curl
system=udev,kmod,iproute2,procps,ca-certificates,openssl,less,initramfs-tools,lz4
# An initramfs with the drivers of the test's machine only is small, and starts quickly where it is emulated.
small='mkdir -p "$1/etc/initramfs-tools/conf.d" "$1/usr/share/initramfs-tools/modules.d"
printf "MODULES=list\nCOMPRESS=lz4\n" > "$1/etc/initramfs-tools/conf.d/small"
printf "virtio_pci\nvirtio_blk\next4\ncrc32c_generic\n" > "$1/usr/share/initramfs-tools/modules.d/small"'
exec mmdebstrap --quiet --variant=minbase --format=directory \
    --aptopt='Apt::Install-Recommends "false"' \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
    --essential-hook="$small" --include="$init,$people,$system,$kernel" \
    bookworm "$root" \
    'deb http://deb.debian.org/debian bookworm main' \
    'deb http://deb.debian.org/debian bookworm-updates main' \
    'deb http://deb.debian.org/debian-security bookworm-security main'

#!/bin/sh
# debian-image.sh IMAGE.qcow2 [PACKAGE.deb…]: makes a disk image of Debian 12 that boots by itself in QEMU. With adit-guest_*.deb the
# agent is in it, and nobody yet: a copy of the image gets its identity from `adit image inject`, or from a card.
#
# As root, on Debian with mmdebstrap, fdisk, e2fsprogs and qemu-utils. Other packages and commands of yours go to mmdebstrap.
set -eu
image=$1
shift
for package; do
	shift
	set -- "$@" --include="$(realpath "$package")"
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/root disk=$work/disk

# As in Debian's own images for clouds, there is cloud-init. The hooks let apt in the new root see the packages that are files here.
mmdebstrap --variant=minbase --format=directory \
	--aptopt='Apt::Install-Recommends "false"' \
	--hook-dir=/usr/share/mmdebstrap/hooks/file-mirror-automount \
	--include=systemd-sysv,dbus,udev,iproute2,linux-image-cloud-amd64,grub-pc-bin,cloud-init "$@" \
	bookworm "$root"
echo '/dev/vda1 / ext4 errors=remount-ro 0 1' >"$root/etc/fstab"
# cloud-init would set en_US.UTF-8, which Debian has no data for until somebody generates it, and end each first boot with an error.
echo 'locale: C.UTF-8' >"$root/etc/cloud/cloud.cfg.d/10_locale.cfg"
# Each copy of the image makes its own.
: >"$root/etc/machine-id"

# grub-install wants a disk device. Here its parts are put together by hand: a core with all that it needs, behind the boot sector.
cat >"$root/boot/grub.cfg" <<'END'
set root=(hd0,msdos1)
linux /vmlinuz root=/dev/vda1 ro console=ttyS0
initrd /initrd.img
boot
END
chroot "$root" grub-mkimage -O i386-pc -p / -c /boot/grub.cfg -o /boot/core.img biosdisk part_msdos ext2 linux

truncate -s 4G "$disk"
echo '2048,,L,*' | sfdisk -q "$disk"
mke2fs -q -F -t ext4 -d "$root" -E offset=$((2048 * 512)) "$disk" $((4 * 1024 * 1024 - 1024))k
dd if="$root/usr/lib/grub/i386-pc/boot.img" of="$disk" bs=440 count=1 conv=notrunc status=none
dd if="$root/boot/core.img" of="$disk" bs=512 seek=1 conv=notrunc status=none
qemu-img convert -O qcow2 "$disk" "$image"

# Runs in L1: boots the same guest on each VMM in turn, and prints figures on the serial line.
LOG=/tmp/serial.log
configure <<END
[[vm]]
name = "qemu"
cid = 4
allow_vsock = [5000]
END
serve
ARGS="console=ttyS0 quiet panic=-1 mitigations=off"
ours() {
    exec adit-vmm run --kernel /l2/ours/vmlinux --initrd /l2/ours/initrd --memory 256M --cmdline "$ARGS" --serial $LOG \
        --vsock cid=3 --aditd $ADIT_SOCKET --name ours --allow-vsock 5000
}
qemu() {
    exec qemu-system-x86_64 -accel kvm -cpu host -smp 1 -m 256M -nodefaults -no-user-config -display none -no-reboot -L /usr/share/qemu -L /usr/share/seabios \
        -M microvm,pcie=on -object memory-backend-memfd,id=ram,size=256M,share=on -machine memory-backend=ram \
        -serial file:$LOG -kernel /l2/qemu/vmlinux -initrd /l2/qemu/initrd -append "$ARGS" \
        -chardev socket,id=vu,path=$RUN/vm/qemu/vhost.sock -device vhost-user-vsock-pci-non-transitional,chardev=vu
}
# Resident KiB without the guest's memory, which is the one large mapping.
beyond() { awk '/^Size:/ { size = $2 } /^Rss:/ && size < 250000 { sum += $2 } END { print sum }' /proc/$1/smaps; }
# KVM's counters.
mount -t debugfs debugfs /sys/kernel/debug
count() { cat /sys/kernel/debug/kvm/$1; }
round() {
    : > $LOG
    begin=$(now) tries=24
    $1 </dev/null >/tmp/vmm.err 2>&1 &
    job=$!
    until adit wait $1 --for agent --timeout 5s >/dev/null 2>&1; do
        kill -0 $job 2>/dev/null || { fail "$1 ended: no agent"; return; }
        # Two minutes, because the machine may be busy.
        tries=$((tries - 1)); [ $tries -gt 0 ] || { adit vm show $1; fail "$1: no agent"; kill $job; return; }
        sleep 0.05
    done
    end=$(now)
    echo "FIGURE $1 ready $(awk "BEGIN { print $end - $begin }") s"
    echo "FIGURE $1 memory-beyond-guest $(beyond $job) KiB"
    for len in 64 65536; do
        all=$(count exits) mmio=$(count mmio_exits)
        us=$(adit-testguest rtt 127.0.0.1:7080 vsock-5000.$1:5000 $len 200) || fail "$1: no echo"
        echo "FIGURE $1 rtt-$len $us us"
        # The program makes 20 round trips before the 200.
        echo "FIGURE $1 exits-$len $(awk "BEGIN { print ($(count exits) - $all) / 220 }") a-trip"
        echo "FIGURE $1 exits-to-vmm-$len $(awk "BEGIN { print ($(count mmio_exits) - $mmio) / 220 }") a-trip"
    done
    kill $job; wait $job
    echo "$1 has ended"
}
for n in 1 2 3; do round ours; round qemu; done
echo NESTED-DONE

# Runs in L1, behind stock.sh: Debian's libvirt starts a domain with a vsock device, and its hook tells aditd.
# The domain is reset, libvirt and aditd are started anew.
VM=web-4 LOG=/tmp/web-4.log
# The package of the daemon's settings makes this user.
echo "libvirt-qemu:x:64055:64055::/var/lib/libvirt:/bin/false" >> /etc/passwd
echo "libvirt-qemu:x:64055:" >> /etc/group
mkdir -p /etc/libvirt /etc/adit
# Debian's virsh looks there for the daemon's socket.
ln -s /run /var/run
# There are neither PolicyKit, AppArmor nor a log daemon here.
cat > /etc/libvirt/libvirtd.conf <<END
auth_unix_rw = "none"
unix_sock_group = "root"
END
cat > /etc/libvirt/qemu.conf <<END
user = "root"
group = "root"
security_driver = "none"
namespaces = []
cgroup_controllers = []
stdio_handler = "file"
END
# domain NAME CID: a domain's XML, with this element for its address.
domain() {
    cat <<END
<domain type='kvm'>
  <name>$1</name>
  <memory unit='MiB'>160</memory>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <kernel>/l2/web-4/vmlinux</kernel>
    <initrd>/l2/web-4/initrd</initrd>
    <cmdline>console=ttyS0 quiet panic=1 mitigations=off</cmdline>
  </os>
  <features><acpi/><apic/></features>
  <cpu mode='host-passthrough'/>
  <devices>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    <serial type='file'><source path='/tmp/$1.log'/></serial>
    <vsock model='virtio'>$2</vsock>
  </devices>
</domain>
END
}
export LIBVIRT_DEFAULT_URI=qemu:///system
# libvirt: starts libvirt's daemon, or starts it anew, as `systemctl restart` does: domains go on.
libvirt() {
    [ -z "$LIBVIRTD" ] || { kill $LIBVIRTD; wait $LIBVIRTD; }
    libvirtd 2>>/tmp/libvirtd.log & LIBVIRTD=$!
    within 60 quietly virsh list || fail "no libvirt: $(virsh list 2>&1; tail -n 20 /tmp/libvirtd.log)"
}
lv() { virsh "$@" || fail "virsh $*: $(tail -n 20 /tmp/libvirtd.log /var/log/libvirt/qemu/$VM.log)"; }
# cid: the CID that libvirt has given the domain.
cid() { virsh dumpxml $VM | sed -n "s/.*<cid auto='yes' address='\([0-9]*\)'.*/\1/p"; }
known() { given=$(cid); [ -n "$given" ] && [ "$(field cid)" = "$given" ]; }
unknown() { ! adit vm show $VM >/tmp/show 2>&1; }

mkdir -p /etc/libvirt/hooks/qemu.d
cp /opt/libvirt-hook /etc/libvirt/hooks/qemu.d/adit
echo 'ADIT_VM_OPTIONS="--allow 80,22"' > /etc/adit/libvirt-hook.conf
syslogd -O /tmp/syslog
libvirt
echo "SHOW libvirt is there: $(virsh version | grep Running) ($(now) s)"
domain $VM "<cid auto='yes'/>" > /tmp/$VM.xml
lv define /tmp/$VM.xml
# A domain starts, though aditd does not answer.
kill -STOP $ADITD $(cat $RUN/worker.pid)
lv start $VM
VMM=$(cat /run/libvirt/qemu/$VM.pid)
kill -CONT $ADITD $(cat $RUN/worker.pid)
unknown || fail "a VM that nobody has told of: $(cat /tmp/show)"
grep "adit-libvirt.* $VM: .*does not answer" /tmp/syslog || fail "the hook says nothing: $(cat /tmp/syslog)"
echo "SHOW libvirt has started a domain beside an aditd that does not answer ($(now) s)"
# Started anew, libvirt tells the hook of the domains that run.
libvirt
within 10 known || fail "the hook has not told of a domain that runs: $(adit vm show $VM 2>&1; virsh dumpxml $VM; tail -n 20 /tmp/libvirtd.log)"
echo "SHOW its hook has told aditd of it, and of its CID, $(cid) ($(now) s)"
# Another one with its CID does not start, and is no VM.
domain web-5 "<cid auto='no' address='$(cid)'/>" > /tmp/web-5.xml
virsh create /tmp/web-5.xml >/tmp/web-5 2>&1 && fail "two VMs have one CID"
grep "cid: Address already in use" /tmp/web-5 || fail "$(cat /tmp/web-5)"
adit vm show web-5 >/tmp/show 2>&1 && fail "a domain that did not start is a VM: $(cat /tmp/show)"
until_said ADIT-READY 240
agent "of a domain"
adit vm show $VM
main_job domain
[ "$(by_ssh hostname 2>&1)" = $VM ] || fail "no ssh: $(by_ssh -v hostname 2>&1)"
echo "SHOW ssh root@$VM.adit ran a command in it ($(now) s)"
# A reset: the guest's kernel forgets its streams, and L1's is told nothing.
holds
lv reset $VM
twice() { [ $(grep -c ADIT-READY $LOG) = 2 ]; }
within 240 twice || fail "it does not boot again"
again "after a reset"; held_ends "after a reset"
signed reset
holds
lv destroy $VM
within 10 unknown || fail "a domain that is destroyed is a VM: $(cat /tmp/show)"
held_ends "with its domain"
echo "SHOW virsh destroy: aditd has no such VM any more ($(now) s)"
lv start $VM
known || fail "the hook has not told of a domain that starts: $(adit vm show $VM 2>&1; tail -n 20 /tmp/libvirtd.log)"
echo "SHOW virsh start: aditd knows it at once ($(now) s)"
lv destroy $VM
within 10 unknown || fail "a domain that is destroyed is a VM: $(cat /tmp/show)"
kill $LIBVIRTD; wait $LIBVIRTD
echo NESTED-DONE stock

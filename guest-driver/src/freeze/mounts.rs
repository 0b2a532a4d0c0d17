//! Which file systems there are to freeze: those on a block device of the guest's own, each once.

use std::path::PathBuf;

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Where it is mounted; of several places the first.
    pub at: PathBuf,
    /// Number of its device.
    pub device: String,
}

/// Those of a `/proc/self/mountinfo`, in the order in which they are to be frozen: what was mounted last first, because it may be on a
/// file of one before (a loop device).
pub fn to_freeze(mountinfo: &str) -> Vec<Mount> {
    let mut all: Vec<Mount> = Vec::new();
    for mount in mountinfo.lines().filter_map(parse) {
        if !all.iter().any(|known| known.device == mount.device) {
            all.push(mount);
        }
    }
    all.reverse();
    all
}

/// `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`; see proc_pid_mountinfo(5).
fn parse(line: &str) -> Option<Mount> {
    let (mount, of) = line.split_once(" - ")?;
    let mut mount = mount.split(' ').skip(2);
    let (device, _root, at) = (mount.next()?, mount.next()?, mount.next()?);
    let mut of = of.split(' ');
    let (_kind, _source, options) = (of.next()?, of.next()?, of.next()?);
    // Without a device of its own: tmpfs, proc, network file systems, overlays. Whose is read-only is never written.
    let is_on_device = !device.starts_with("0:");
    let is_writable = options.split(',').next() == Some("rw");
    (is_on_device && is_writable).then(|| Mount {
        at: unescaped(at).into(),
        device: device.to_owned(),
    })
}

/// Without what the kernel writes for spaces and the like: a backslash and three octal digits.
fn unescaped(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((first, more)) = rest.split_first() {
        let digits = more.get(..3).filter(|_| *first == b'\\');
        let digits = digits.and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &more[3..];
            }
            None => {
                bytes.push(*first);
                rest = more;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_that_can_be_written_are_frozen_once_and_the_last_first() {
        let info = "\
22 28 0:20 / /sys rw,nosuid - sysfs sysfs rw
28 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw,errors=remount-ro
30 28 0:25 / /run rw - tmpfs tmpfs rw,size=1k
40 28 254:16 / /srv/a\\040b rw - xfs /dev/vdb rw,attr2
41 28 254:1 /var /var ro - ext4 /dev/vda1 rw,errors=remount-ro
42 28 254:32 / /ro ro - ext4 /dev/vdc ro
43 28 0:40 / /net rw - nfs4 host:/x rw
44 40 7:0 / /srv/a\\040b/loop rw - ext4 /dev/loop0 rw
short
45 28 254:48 / /cut rw -";
        let found = to_freeze(info);
        let at: Vec<_> = found.iter().map(|m| m.at.to_str().unwrap()).collect();
        assert_eq!(at, ["/srv/a b/loop", "/srv/a b", "/"]);
        assert_eq!(unescaped("a\\134b\\9\\"), "a\\b\\9\\");
    }
}

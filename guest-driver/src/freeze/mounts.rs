//! Which file systems there are to freeze: those on a block device of the guest's own, each once.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Where it is mounted; of several places the first.
    pub at: PathBuf,
    /// What tells it from others: its device, or where it has none of its own (btrfs) the source.
    of: Vec<u8>,
    /// Numbers of the device.
    pub device: Option<(u32, u32)>,
}

/// Those of a `/proc/self/mountinfo`, in the order in which they are to be frozen: what was mounted last first, because it may be on a
/// file of one before (a loop device).
pub fn to_freeze(mountinfo: &[u8]) -> Vec<Mount> {
    let mut all: Vec<Mount> = Vec::new();
    for mount in mountinfo.split(|b| *b == b'\n').filter_map(parse) {
        if !all.iter().any(|known| known.of == mount.of) {
            all.push(mount);
        }
    }
    all.reverse();
    all
}

/// `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`; see proc_pid_mountinfo(5).
fn parse(line: &[u8]) -> Option<Mount> {
    let words: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
    let dash = words.iter().position(|word| *word == b"-")?;
    let (device, at) = (*words.get(2)?, *words.get(4)?);
    let (source, options) = (*words.get(dash + 2)?, *words.get(dash + 3)?);
    let (major, minor) = std::str::from_utf8(device).ok()?.split_once(':')?;
    let (major, minor) = (major.parse::<u32>().ok()?, minor.parse::<u32>().ok()?);
    // Without a device: tmpfs, proc, network file systems, overlays. Whose is read-only is never written.
    let (of, device) = match major {
        0 if source.starts_with(b"/dev/") => (source.to_vec(), None),
        0 => return None,
        _ => (device.to_vec(), Some((major, minor))),
    };
    let is_writable = options.split(|b| *b == b',').next() == Some(b"rw");
    is_writable.then(|| Mount {
        at: OsString::from_vec(unescaped(at)).into(),
        of,
        device,
    })
}

/// Without what the kernel writes for spaces and the like: a backslash and three octal digits.
fn unescaped(text: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = text;
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
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_that_can_be_written_are_frozen_once_and_the_last_first() {
        let info = b"\
22 28 0:20 / /sys rw,nosuid - sysfs sysfs rw
28 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw,errors=remount-ro
30 28 0:25 / /run rw - tmpfs tmpfs rw,size=1k
40 28 254:16 / /srv/a\\040b rw - xfs /dev/vdb rw,attr2
41 28 254:1 /var /var ro - ext4 /dev/vda1 rw,errors=remount-ro
42 28 254:32 / /ro ro - ext4 /dev/vdc ro
43 28 0:40 / /net rw - nfs4 host:/x rw
44 40 7:0 / /srv/a\\040b/loop rw - ext4 /dev/loop0 rw
short
46 28 0:41 /a /btr rw master:2 shared:3 - btrfs /dev/vde rw,subvolid=256
47 28 0:42 /b /btr/b rw - btrfs /dev/vde rw,subvolid=257
48 28 254:64 / /l\\012ine\xff rw - ext4 /dev/vdf rw
45 28 254:48 / /cut rw -";
        let found = to_freeze(info);
        let at: Vec<_> = found
            .iter()
            .map(|m| m.at.clone().into_os_string().into_vec())
            .collect();
        let want: [&[u8]; 5] = [b"/l\nine\xff", b"/btr", b"/srv/a b/loop", b"/srv/a b", b"/"];
        assert_eq!(at, want);
        assert_eq!((found[0].device, found[1].device), (Some((254, 64)), None));
        assert_eq!(unescaped(b"a\\134b\\9\\"), b"a\\b\\9\\");
    }
}

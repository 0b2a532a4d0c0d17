//! What host and guest do alike with cgroups v2: find where they are mounted, and switch their limits on.
#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};

/// Where this process sees cgroups v2, if it does.
pub fn mount_point() -> Option<PathBuf> {
    mounted(&fs::read_to_string("/proc/self/mountinfo").ok()?)
}

/// Mount point of the first cgroup2 file system: `id parent dev root MOUNT options … - cgroup2 …`.
fn mounted(mountinfo: &str) -> Option<PathBuf> {
    mountinfo
        .lines()
        .filter_map(|l| l.split_once(" - "))
        .find(|(_, kind)| kind.starts_with("cgroup2 "))
        .and_then(|(mount, _)| mount.split(' ').nth(4))
        .map(PathBuf::from)
}

/// Switches on the limits for what is below a cgroup, each by itself: where the kernel lacks one, the others still work.
pub fn switch_on(dir: &Path) {
    for controller in ["+memory", "+pids", "+cpu"] {
        let _ = fs::write(dir.join("cgroup.subtree_control"), controller);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_cgroup2_mount_is_found_among_others() {
        let mounts = "24 1 0:22 / /sys rw - sysfs sysfs rw\n\
            30 24 0:26 / /sys/fs/cgroup ro,nosuid shared:9 - tmpfs tmpfs ro\n\
            31 30 0:27 / /sys/fs/cgroup/unified rw shared:10 - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(mounted(mounts), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(mounted(""), None);
    }
}

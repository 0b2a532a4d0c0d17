//! An L1 in which aditd serves a VM whose VMM has a socket for each stream, and knows nothing of aditd.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::{HELPERS, Inner, Nested};
use crate::guest::Identity;
use crate::image::{Image, Kernel};
use crate::process::output;

const HYBRID: &str = include_str!("hybrid.sh");

impl Nested {
    /// Boots L1 to show the main job, kills and a restore through `carrier = { hybrid = PATH }`. Lines for people begin with `SHOW`.
    ///
    /// # Errors
    /// As [`boot`](Self::boot), or `bins` lacks aditd, adit-port or adit.
    pub fn hybrid(bins: &Path, dir: &Path) -> anyhow::Result<Self> {
        let image = |kernel| Image::build(kernel, &|what| println!("{what}"));
        let (old, new) = (image(Kernel::V6_1)?, image(Kernel::V6_12)?);
        let mut key = Command::new(bins.join("adit"));
        output(key.args(["key", "new", "fleet.key"]).current_dir(dir))?;
        let (agent, trust) = (crate::guest_bin("adit-guest"), dir.join("fleet.key.pub"));
        let inner = [Inner {
            image: &new,
            identity: Identity {
                name: "web-1",
                vhost_socket: Path::new(""),
                agent: Some(&agent),
                trust: Some(&trust),
                script: "",
                boot_files: false,
            },
            packed: false,
        }];
        let mut programs = vec![
            (crate::vmm_bin(), "/bin/adit-vmm".to_owned()),
            (dir.join("fleet.key"), "/etc/fleet.key".to_owned()),
        ];
        let ours = ["aditd", "adit-port", "adit"].map(|name| bins.join(name));
        let curl = PathBuf::from("/usr/bin/curl");
        for program in ours.iter().chain([&curl]) {
            programs.extend(Self::with_libraries(program, &dir.join("stripped"))?);
        }
        let script = format!("{HELPERS}\n{HYBRID}");
        Self::boot(&old, &inner, &programs, &script, dir)
    }
}

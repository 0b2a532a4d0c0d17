//! An L1 in which aditd serves guests, and what each of them has there: our programs and curl, a key that signs goals, and the shell
//! functions of `served.sh`.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::{HELPERS, HOSTILE, Inner, Nested};
use crate::guest::Identity;
use crate::image::{Image, Kernel};
use crate::process::output;

const SERVED: &str = include_str!("served.sh");
const MANAGED: &str = include_str!("managed.sh");
const IDLE: &str = include_str!("idle.sh");
const HYBRID: &str = include_str!("hybrid.sh");

/// What goes into such an L1.
#[derive(Debug)]
pub struct Served {
    dir: PathBuf,
    agent: PathBuf,
    trust: PathBuf,
    files: Vec<(PathBuf, String)>,
}

impl Served {
    /// Makes a key, whose public part every guest trusts. Files of L1 are made in `dir`.
    ///
    /// # Errors
    /// `bins` lacks aditd, adit-port or adit, or there is no curl.
    pub fn new(bins: &Path, dir: &Path) -> anyhow::Result<Self> {
        let mut key = Command::new(bins.join("adit"));
        output(key.args(["key", "new", "fleet.key"]).current_dir(dir))?;
        let mut served = Self {
            dir: dir.to_owned(),
            agent: crate::guest_bin("adit-guest"),
            trust: dir.join("fleet.key.pub"),
            files: Vec::new(),
        };
        served.file(dir.join("fleet.key"), "/etc/fleet.key");
        for name in ["aditd", "adit-port", "adit"] {
            served.program(&bins.join(name))?;
        }
        served.program(Path::new("/usr/bin/curl"))?;
        Ok(served)
    }

    /// Puts a file of the host at a path in L1. Programs share libraries: the first at a path stays.
    pub fn file(&mut self, from: impl Into<PathBuf>, to: &str) {
        if !self.files.iter().any(|(_, there)| there == to) {
            self.files.push((from.into(), to.to_owned()));
        }
    }

    /// Puts a program of the host into L1's /bin, with its libraries.
    ///
    /// # Errors
    /// As [`Nested::with_libraries`].
    pub fn program(&mut self, program: &Path) -> anyhow::Result<()> {
        for (from, to) in Nested::with_libraries(program, &self.dir.join("stripped"))? {
            self.file(from, &to);
        }
        Ok(())
    }

    /// The same, but the program keeps its own path, from which it finds its other files, or others find it.
    ///
    /// # Errors
    /// As [`Nested::with_libraries`].
    pub fn program_in_place(&mut self, program: &Path) -> anyhow::Result<()> {
        let mut files = Nested::with_libraries(program, &self.dir.join("stripped"))?;
        if let Some((_, to)) = files.first_mut() {
            *to = program.to_string_lossy().into_owned();
        }
        for (from, to) in files {
            self.file(from, &to);
        }
        Ok(())
    }

    /// Puts adit-vmm into L1.
    pub fn vmm(&mut self) {
        self.file(crate::vmm_bin(), "/bin/adit-vmm");
    }

    /// A guest in L1 that has the agent.
    pub fn guest<'a>(&'a self, name: &'a str, image: &'a Image) -> Inner<'a> {
        Inner {
            image,
            identity: Identity {
                name,
                vhost_socket: Path::new(""),
                agent: Some(&self.agent),
                trust: Some(&self.trust),
                script: "",
                boot_files: false,
            },
            packed: false,
            ssh: None,
        }
    }

    /// Boots L1 with these guests, and runs `script` in it behind the functions of `served.sh`.
    ///
    /// # Errors
    /// As [`Nested::boot`].
    pub fn boot(
        &self,
        outer: &Image,
        guests: &[Inner<'_>],
        script: &str,
    ) -> anyhow::Result<Nested> {
        let script = format!("{HELPERS}\n{SERVED}\n{script}");
        Nested::boot(outer, guests, &self.files, &script, &self.dir)
    }
}

fn image(kernel: Kernel) -> anyhow::Result<Image> {
    Image::build(kernel, &|what| println!("{what}"))
}

impl Nested {
    /// Boots L1 to show the main job through `adit-vmm`: aditd serves VMs whose VMMs are their port processes. aditd is killed, a
    /// neighbour is hostile, and VMMs are killed after a snapshot. `web-1` runs `kernel`, and its neighbour the other one. Lines
    /// for people begin with `SHOW`.
    ///
    /// # Errors
    /// As [`boot`](Self::boot), or `bins` lacks aditd, adit-port or adit.
    pub fn managed(bins: &Path, kernel: Kernel, dir: &Path) -> anyhow::Result<Self> {
        let (old, new) = (image(Kernel::V6_1)?, image(Kernel::V6_12)?);
        let (web, neighbour) = match kernel {
            Kernel::V6_1 => (&old, &new),
            Kernel::V6_12 => (&new, &old),
        };
        let mut served = Served::new(bins, dir)?;
        served.vmm();
        let mut guests = [("web-1", web), ("web-2", neighbour)].map(|(n, i)| served.guest(n, i));
        for guest in &mut guests {
            guest.identity.script = HOSTILE;
        }
        served.boot(&old, &guests, &format!("{IDLE}\n{MANAGED}"))
    }

    /// Boots L1 to show the main job, kills and a restore through `carrier = { hybrid = PATH }`: adit-vmm has a socket for each stream,
    /// and knows nothing of aditd. Lines for people begin with `SHOW`.
    ///
    /// # Errors
    /// As [`boot`](Self::boot), or `bins` lacks aditd, adit-port or adit.
    pub fn hybrid(bins: &Path, dir: &Path) -> anyhow::Result<Self> {
        let (old, new) = (image(Kernel::V6_1)?, image(Kernel::V6_12)?);
        let mut served = Served::new(bins, dir)?;
        served.vmm();
        served.boot(&old, &[served.guest("web-1", &new)], HYBRID)
    }
}

//! `cargo xtask`: the commands for a newcomer. `demo` and `test` install what is missing, so that a fresh Debian 12 with a Rust
//! toolchain needs nothing else.

mod ahead;
mod bench;
mod bench_vmm;
mod boots;
mod demo;
mod fuzz;
mod package;
mod progress;
mod sanitize;
mod setup;
mod sim;
mod soak;
mod test;

use std::path::{Path, PathBuf};
use std::process::{self, ExitCode};

use adit_tests::debian::{self, Debian};
use adit_tests::image::{Image, Kernel};
use adit_tests::process::output;
use anyhow::Context;
use clap::{Parser, Subcommand, ValueEnum};

const EXAMPLES: &str = "\
Examples:
  cargo xtask demo                     # two VMs without a network, reached by name, signed work in both
  cargo xtask demo --kernel 6.12 --keep
  cargo xtask demo --vmm               # through our own VMM, which is killed and restored
  cargo xtask test                     # everything; prints a table of seconds
  cargo xtask package                  # .deb files and tarballs, in target/package
  cargo xtask guest-image debian       # Debian 12 with systemd, sshd, nginx, git and the agent
  cargo xtask bench vsock --json
  cargo xtask bench guest               # real guests on our backend and on the peer's
  cargo xtask bench vmm                # adit-vmm beside QEMU's microvm
  cargo xtask sim --seeds 1000000
  cargo xtask fuzz engine_ops --minutes 10
  cargo xtask soak --minutes 60        # a real guest echoes odd pieces; every byte is compared
  cargo xtask soak --proxy --minutes 30 # clients of every kind, while aditd is killed every 20 s
  cargo xtask soak --boots 50          # adit-vmm boots Debian again and again, until a boot hangs
  cargo xtask sanitize                 # ThreadSanitizer over shared memory";

/// Shows, tests and measures adit.
#[derive(Parser)]
#[command(name = "cargo xtask", after_help = EXAMPLES)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Show what adit does, with real VMs
    Demo(demo::Options),
    /// Run every test; set up what is missing first
    Test(test::Options),
    /// Build a guest's kernel, initramfs and disk
    GuestImage(GuestImage),
    /// Make Debian packages and tarballs of static programs
    Package(package::Options),
    /// Measure, and compare with a peer in the same run
    Bench(bench::Options),
    /// Run engine pairs in virtual time, with lost doorbells, delays, resets and starved sides
    Sim(sim::Options),
    /// Look for inputs that break a rule
    Fuzz(fuzz::Options),
    /// Echo streams of every length through a real guest, for an hour; or boot adit-vmm again and again
    Soak(soak::Options),
    /// Run tests of shared memory under ThreadSanitizer
    Sanitize,
}

#[derive(clap::Args)]
struct GuestImage {
    /// `small`: busybox in an initramfs; `debian`: Debian 12 with its init system on a disk
    #[arg(default_value = "small")]
    what: Guest,
    /// debian: the init system [default: systemd]
    #[arg(long)]
    init: Option<Init>,
    /// 6.1 or 6.12
    #[arg(long, default_value = "6.1")]
    kernel: Kernel,
    /// small: lay the files below DIR over it: what `adit-guest install --root DIR` wrote, for instance
    #[arg(long, value_name = "DIR", requires = "out")]
    root: Option<PathBuf>,
    /// Copy what was built there
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

impl GuestImage {
    /// An option that is for the other kind of guest, with what to do instead.
    fn unused(&self) -> Option<&'static str> {
        match self.what {
            Guest::Small if self.init.is_some() => Some("--init is for `guest-image debian`"),
            Guest::Debian if self.root.is_some() => Some(
                "--root is for the small guest: `adit image inject` puts files into the disk of this one",
            ),
            _ => None,
        }
    }

    fn build(&self) -> anyhow::Result<()> {
        if let Some(why) = self.unused() {
            anyhow::bail!("{why}");
        }
        let out = self.out.as_deref();
        match self.what {
            Guest::Small => guest_image(self.kernel, self.root.as_deref(), out),
            Guest::Debian => debian(self.kernel, self.init.unwrap_or(Init::Systemd), out),
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum Guest {
    Small,
    Debian,
}

#[derive(Clone, Copy, ValueEnum)]
enum Init {
    Systemd,
    Openrc,
}

fn main() -> ExitCode {
    if let Some(ended) = fuzz::compiler() {
        return ended;
    }
    let done = match Args::parse().command {
        Command::Demo(options) => demo::run(&options),
        Command::Test(options) => test::run(&options),
        Command::GuestImage(image) => image.build().map(|()| true),
        Command::Package(options) => package::run(&options),
        Command::Bench(options) => bench::run(&options),
        Command::Sim(options) => sim::run(&options),
        Command::Fuzz(options) => fuzz::run(&options),
        Command::Soak(options) => soak::run(&options),
        Command::Sanitize => sanitize::run(),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("xtask: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn guest_image(kernel: Kernel, root: Option<&Path>, out: Option<&Path>) -> anyhow::Result<()> {
    setup::run()?;
    setup::guest_binaries()?;
    let mut image = Image::build(kernel, &|what| progress::line(what))?;
    if let Some(out) = out {
        image = image.copy_to(out, root)?;
    }
    println!(
        "kernel  {}\ninitrd  {}\ndisk    {}",
        image.vmlinux.display(),
        image.initrd.display(),
        image.disk.display()
    );
    Ok(())
}

/// Files that `guest-image debian` makes.
const DEBIAN_FILES: [&str; 5] = ["vmlinuz", "initrd", "disk.ext4", "id_ed25519", "web-1.crt"];

fn debian(kernel: Kernel, init: Init, out: Option<&Path>) -> anyhow::Result<()> {
    setup::run()?;
    if let Some(why) = Debian::missing() {
        anyhow::bail!("{why}");
    }
    package::deb(package::Package::AditGuest, None, package::For::Tests)?;
    let init = match init {
        Init::Systemd => debian::Init::Systemd,
        Init::Openrc => debian::Init::Openrc,
    };
    let image = setup::debian(kernel, init)?;
    let files = DEBIAN_FILES.map(|name| image.file(name));
    if let Some(out) = out {
        copy(&files, out)?;
    }
    for file in files {
        let file = match (out, file.file_name()) {
            (Some(out), Some(name)) => out.join(name),
            _ => file,
        };
        println!("{}", file.display());
    }
    Ok(())
}

/// Copies files to a directory. Disks stay sparse.
fn copy(files: &[PathBuf], to: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(to).with_context(|| format!("cannot make {}", to.display()))?;
    let mut cp = process::Command::new("cp");
    cp.args(["--sparse=always", "--preserve=mode", "-t"])
        .arg(to);
    output(cp.args(files)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(args: &[&str]) -> GuestImage {
        let args = [&["cargo xtask", "guest-image"], args].concat();
        match Args::parse_from(args).command {
            Command::GuestImage(image) => image,
            _ => panic!("another command"),
        }
    }

    #[test]
    fn an_option_for_the_other_guest_is_refused_and_not_ignored() {
        assert_eq!(image(&["--root", "a", "--out", "b"]).unused(), None);
        let debian = ["debian", "--init", "openrc", "--out", "b"];
        assert_eq!(image(&debian).unused(), None);
        for (args, word) in [
            (&["debian", "--root", "a", "--out", "b"][..], "--root"),
            (&["--init", "openrc"], "--init"),
        ] {
            let why = image(args).build().unwrap_err().to_string();
            assert!(why.contains(word), "{why}");
        }
    }

    #[test]
    fn what_was_built_is_copied() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk.ext4");
        std::fs::write(&disk, "disk").unwrap();
        let out = dir.path().join("new/out");
        copy(&[disk], &out).unwrap();
        assert_eq!(std::fs::read(out.join("disk.ext4")).unwrap(), b"disk");
    }
}

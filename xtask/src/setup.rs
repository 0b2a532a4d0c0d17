//! Installs what a fresh machine lacks: Debian packages and Rust targets. Builds the binaries that tests and benches need.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use adit_tests::debian::{Debian, Init};
use adit_tests::image::Kernel;
use adit_tests::process::output;
use anyhow::{Context, bail, ensure};

use crate::progress;

/// Programs that are needed, by name or path, and their packages.
const PROGRAMS: &[(&str, &str)] = &[
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("busybox", "busybox-static"),
    ("lz4", "lz4"),
    ("xz", "xz-utils"),
    ("zstd", "zstd"),
    ("mke2fs", "e2fsprogs"),
    ("sfdisk", "fdisk"),
    ("qemu-img", "qemu-utils"),
    ("cloud-localds", "cloud-image-utils"),
    ("curl", "curl"),
    ("setpriv", "util-linux"),
    ("script", "bsdutils"),
    ("cc", "gcc"),
    ("c++", "g++"),
    ("apt-cache", "apt"),
    ("systemctl", "systemd"),
    ("dpkg", "dpkg"),
    ("ssh", "openssh-client"),
    ("socat", "socat"),
    ("haproxy", "haproxy"),
    ("dropbear", "dropbear-bin"),
    ("libvirtd", "libvirt-daemon"),
    ("virsh", "libvirt-clients"),
    ("sqlite3", "sqlite3"),
    ("musl-gcc", "musl-tools"),
    ("lintian", "lintian"),
    ("mmdebstrap", "mmdebstrap"),
    ("/usr/bin/git", "git"),
    ("rsync", "rsync"),
    ("wget", "wget"),
    ("dig", "bind9-dnsutils"),
    ("dnsmasq", "dnsmasq-base"),
    ("unbound", "unbound"),
    (
        "/usr/lib/python3/dist-packages/requests",
        "python3-requests",
    ),
    (
        "/usr/lib/python3/dist-packages/websocket",
        "python3-websocket",
    ),
    ("/usr/lib/python3/dist-packages/aiohttp", "python3-aiohttp"),
    ("/usr/lib/python3/dist-packages/grpc", "python3-grpcio"),
    ("node", "nodejs"),
    ("ip", "iproute2"),
];
/// Rust targets: for guest binaries, and for the engine without an operating system.
const TARGETS: [&str; 3] = [
    "x86_64-unknown-linux-musl",
    "x86_64-unknown-none",
    "aarch64-unknown-none",
];

/// For programs without libraries.
pub const STATIC_TARGET: &str = TARGETS[0];

/// Whether apt has heard of the newest packages: once is enough.
static UPDATED: AtomicBool = AtomicBool::new(false);
/// How often apt is asked for what is missing.
const ROUNDS_MAX: usize = 3;

/// Installs what is missing. Without root, prints the command to run.
pub fn run() -> anyhow::Result<()> {
    until_there(missing, packages)?;
    if on_path("rustup") {
        let installed = output(Command::new("rustup").args(["target", "list", "--installed"]))?;
        let installed = String::from_utf8_lossy(&installed.stdout).into_owned();
        for target in TARGETS
            .iter()
            .filter(|t| !installed.lines().any(|l| l == **t))
        {
            progress::during(&format!("adding Rust target {target}"), || {
                output(Command::new("rustup").args(["target", "add", target]))
            })?;
        }
    }
    Ok(())
}

/// Packages of the programs that are not there.
fn missing() -> Vec<&'static str> {
    let missing = PROGRAMS.iter().filter(|(program, _)| !on_path(program));
    missing.map(|(_, package)| *package).collect()
}

/// Installs until nothing is missing: one package may take away another that was there, where that came from another release
/// (Debian's backports). What cannot be installed together, because of one that was there, may be installed one by one.
fn until_there(
    missing: impl Fn() -> Vec<&'static str>,
    install: impl Fn(&[&'static str]) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    for _ in 0..ROUNDS_MAX {
        let missing = missing();
        if missing.is_empty() {
            return Ok(());
        }
        if let Err(e) = install(&missing) {
            let alone = missing.iter().filter(|one| install(&[one]).is_ok());
            if alone.count() == 0 {
                return Err(e);
            }
        }
    }
    let missing = missing();
    ensure!(
        missing.is_empty(),
        "installed, and not there afterwards: {}. `apt-get install -s` says what takes them away",
        missing.join(", ")
    );
    Ok(())
}

/// Installs what only iceoryx2 needs to build.
pub fn libclang() -> anyhow::Result<()> {
    let lib = Path::new("/usr/lib");
    let there = ["llvm-14", "llvm-16", "llvm-19"].iter().any(|llvm| {
        let so = lib.join(llvm).join("lib/libclang.so");
        so.exists()
    });
    if there {
        Ok(())
    } else {
        packages(&["libclang-dev"])
    }
}

/// What the proxy is compared with, besides what the tests use already: program or file, package.
const RELAYS: [(&str, &str); 3] = [
    ("nginx", "nginx-light"),
    (
        "/usr/lib/nginx/modules/ngx_stream_module.so",
        "libnginx-mod-stream",
    ),
    ("tinyproxy", "tinyproxy-bin"),
];

/// Installs the relays of the proxy's bench.
pub fn relays() -> anyhow::Result<()> {
    let missing = || {
        let missing = RELAYS.iter().filter(|(program, _)| !on_path(program));
        missing.map(|(_, package)| *package).collect()
    };
    until_there(missing, packages)
}

/// Installs the browser that one test has; it is 350 MB, and nothing else needs it. Where it cannot be had, the test says so.
pub fn browser() {
    if on_path("chromium") {
        return;
    }
    if let Err(e) = packages(&["chromium"]) {
        eprintln!("skipped: the browser: {e}");
    }
}

/// Installs packages. Without root, prints the command to run.
fn packages(missing: &[&str]) -> anyhow::Result<()> {
    if missing.is_empty() {
        return Ok(());
    }
    let line = format!(
        "apt-get install -y --no-install-recommends {}",
        missing.join(" ")
    );
    if !nix::unistd::geteuid().is_root() {
        bail!(
            "missing: {}. Run this, then again:\n  sudo {line}",
            missing.join(", ")
        );
    }
    progress::during(&format!("installing {}", missing.join(", ")), || {
        let apt = |args: &[&str]| {
            let mut command = Command::new("apt-get");
            output(
                command
                    .env("DEBIAN_FRONTEND", "noninteractive")
                    .arg("-q")
                    .args(args),
            )
        };
        if !UPDATED.load(Ordering::Relaxed) {
            apt(&["update"])?;
            UPDATED.store(true, Ordering::Relaxed);
        }
        apt(&[&["install", "-y", "--no-install-recommends"], missing].concat())?;
        Ok(())
    })
}

fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        // A path stays one.
        .any(|dir| dir.join(program).exists())
}

/// Installs a program of crates.io under `target/DIR`, once a version. Returns its path.
pub fn cargo_install(
    (name, version): (&str, &str),
    dir: &str,
    settings: &[(&str, &str)],
) -> anyhow::Result<PathBuf> {
    let root = adit_tests::target().join(dir);
    let binary = root.join("bin").join(name);
    let there = Command::new(&binary).arg("--version").output();
    let said = there.map(|o| String::from_utf8_lossy(&o.stdout).into_owned());
    if said.is_ok_and(|said| said.split_whitespace().last() == Some(version)) {
        return Ok(binary);
    }
    progress::during(
        &format!("installing {name} {version} under target/{dir}"),
        || {
            let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
            let mut command = Command::new(cargo);
            command
                .args(["install", "--quiet", "--locked", "--root"])
                .arg(&root);
            command.arg("--target-dir").arg(root.join("build"));
            command.envs(settings.iter().copied());
            output(command.args(["--version", version, name]))
        },
    )?;
    // Some hundred MB that nothing reads again.
    let _ = std::fs::remove_dir_all(root.join("build"));
    Ok(binary)
}

/// The property tester of APIs, from PyPI.
const SCHEMATHESIS: &str = "schemathesis==4.32.5";

/// Installs schemathesis under `target/`, once a version. Returns the program; none, with the reason printed: PyPI cannot be reached.
pub fn schemathesis() -> anyhow::Result<Option<PathBuf>> {
    let venv = adit_tests::target().join("schemathesis");
    let (program, whole) = (venv.join("bin/schemathesis"), venv.join(SCHEMATHESIS));
    if whole.exists() {
        return Ok(Some(program));
    }
    let make = || output(Command::new("python3").args(["-m", "venv"]).arg(&venv));
    if make().is_err() {
        // Debian has what it takes in a package of its own.
        packages(&["python3-venv"])?;
        make()?;
    }
    let installed = progress::during(&format!("installing {SCHEMATHESIS}"), || {
        let mut pip = Command::new(venv.join("bin/pip"));
        output(pip.args(["install", "--disable-pip-version-check", SCHEMATHESIS]))
    });
    match installed {
        Ok(_) => {
            std::fs::write(whole, "")?;
            Ok(Some(program))
        }
        // Said of each try to connect.
        Err(e) if e.to_string().contains("Retrying (") => {
            eprintln!("skipped: schemathesis: PyPI cannot be reached: {e}");
            Ok(None)
        }
        Err(e) => Err(e),
    }
}

/// Runs cargo, which prints only errors.
pub fn cargo(args: &[&str]) -> anyhow::Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .args(args)
        .current_dir(adit_tests::root())
        .stdin(Stdio::null());
    let status = command.status().context("cannot start cargo")?;
    if !status.success() {
        bail!(
            "cargo {} failed: run it by itself to see more",
            args.join(" ")
        );
    }
    Ok(())
}

/// Builds the static binaries for guests.
pub fn guest_binaries() -> anyhow::Result<()> {
    progress::during("building adit-guest for the image (static)", || {
        cargo(&[
            "build",
            "--quiet",
            "--profile",
            "guest",
            "--target",
            STATIC_TARGET,
            "-p",
            "adit-guest-driver",
            "-p",
            "adit-tests",
            "--bins",
        ])
    })
}

/// Builds what runs on a host, as it is packaged.
pub fn static_host_binaries(profile: &str) -> anyhow::Result<()> {
    progress::during("building aditd, adit-port and adit (static)", || {
        cargo(&[
            "build",
            "--quiet",
            "--profile",
            profile,
            "--target",
            STATIC_TARGET,
            "-p",
            "adit-host-proxy",
            "-p",
            "adit-port",
            "-p",
            "adit-cli",
            "--bins",
        ])
    })
}

/// Builds Debian's disk.
pub fn debian(kernel: Kernel, init: Init) -> anyhow::Result<Debian> {
    let what = format!("Debian's disk, {}, {}", kernel.name(), init.name());
    progress::during(&what, || Debian::build(kernel, init, &progress::line))
}

/// Builds adit-vmm statically: the guest of its tests has no libraries.
pub fn vmm_binary() -> anyhow::Result<()> {
    progress::during("building adit-vmm (static)", || {
        cargo(&[
            "build",
            "--quiet",
            "--profile",
            "vmm",
            "--target",
            STATIC_TARGET,
            "-p",
            "adit-vmm-sample",
        ])
    })
}

/// Builds the image of the guest without Linux. Returns its path.
pub fn bare_image() -> anyhow::Result<PathBuf> {
    let args = |verb| {
        let image = ["--features", "image", "--bin", "adit-bare", "--target"];
        [
            &[verb, "--quiet", "--release", "-p", "adit-bare"],
            &image[..],
            &[TARGETS[1]],
        ]
        .concat()
    };
    progress::during("building the guest without Linux", || {
        // The workspace's clippy run skips the image, because it needs this target.
        cargo(&[&args("clippy")[..], &["--", "-D", "warnings"]].concat())?;
        cargo(&args("build"))
    })?;
    let dir = adit_tests::target().join(TARGETS[1]);
    Ok(dir.join("release/adit-bare"))
}

/// Builds aditd, adit-port and adit. Returns their directory.
pub fn host_binaries(release: bool) -> anyhow::Result<PathBuf> {
    let mut args = vec![
        "build",
        "--quiet",
        "-p",
        "adit-host-proxy",
        "-p",
        "adit-port",
        "-p",
        "adit-cli",
        "--bins",
    ];
    if release {
        args.push("--release");
    }
    progress::during("building aditd, adit-port and adit", || cargo(&args))?;
    Ok(adit_tests::target().join(Path::new(if release { "release" } else { "debug" })))
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn what_an_installation_takes_away_is_installed_too() {
        let there = RefCell::new(vec!["qemu-utils"]);
        let missing = || {
            let mut all = vec!["qemu-system-x86", "qemu-utils"];
            all.retain(|package| !there.borrow().contains(package));
            all
        };
        let install = |packages: &[&'static str]| {
            let mut there = there.borrow_mut();
            // The one from backports goes when the other of this release comes.
            if packages.contains(&"qemu-system-x86") {
                there.clear();
            }
            there.extend(packages);
            Ok(())
        };
        until_there(missing, install).unwrap();
        assert_eq!(there.borrow().len(), 2);
        // Nor is it in the way of others for ever: together they cannot be installed, because one depends on what is there.
        let there = RefCell::new(vec!["qemu-utils of backports"]);
        let wanted = ["qemu-system-x86", "cloud-image-utils", "qemu-utils"];
        let missing = || {
            let there = there.borrow();
            let is_missing = |package: &&str| !there.iter().any(|is| is.starts_with(package));
            wanted.into_iter().filter(is_missing).collect()
        };
        let install = |packages: &[&'static str]| {
            let mut there = there.borrow_mut();
            let kept = there.contains(&"qemu-utils of backports");
            if kept && packages.len() > 1 {
                bail!("held broken packages");
            }
            if packages.contains(&"qemu-system-x86") {
                there.clear();
            }
            there.extend(packages);
            Ok(())
        };
        until_there(missing, install).unwrap();
        assert_eq!(missing(), [""; 0]);
        let said = until_there(|| vec!["lost"], |_| Ok(())).unwrap_err();
        assert!(said.to_string().contains("lost"), "{said}");
    }
}

//! `cargo xtask package`: Debian packages and tarballs, in target/package.
//!
//! | package | programs | profile |
//! |---|---|---|
//! | `adit-guest` | adit-guest | guest |
//! | `aditd` | aditd, adit-port, adit; the agent, for images | host |
//! | `adit-vmm` | adit-vmm | vmm |
//!
//! Every program is linked statically (musl): one build runs on every distribution, in a guest of any age, and is the same in
//! package and tarball. What goes where is in `[package.metadata.deb]` of each program's Cargo.toml, for cargo-deb. What is
//! made here lies beside the programs, in `package/NAME` of their profile's directory: manual pages, completions, changelogs.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use adit_tests::process::output;
use anyhow::{Context, ensure};

use crate::{progress, setup};

/// Makes .deb files; installed under target/tools.
const CARGO_DEB: (&str, &str) = ("cargo-deb", "3.8.0");
/// It runs for seconds, so it need not be built for more.
const QUICK: [(&str, &str); 2] = [
    ("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1"),
    ("CARGO_PROFILE_RELEASE_LTO", "off"),
];

/// What to make.
#[derive(clap::Args)]
pub struct Options {
    /// Make these only
    #[arg(value_enum)]
    packages: Vec<Package>,
    /// Give the Debian packages this version, with the programs of this one: to try an upgrade
    #[arg(long, value_name = "VERSION")]
    deb_version: Option<String>,
    /// Make and check what the tests install, in target/package/tests, and nothing else
    #[arg(long, conflicts_with_all = ["packages", "deb_version"])]
    for_tests: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Package {
    AditGuest,
    Aditd,
    AditVmm,
}

/// Who is to install a package.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum For {
    Users,
    /// aditd's programs are less optimised, because they are built in half the time.
    Tests,
}

impl For {
    /// Where packages are put.
    pub fn directory(self) -> PathBuf {
        let packages = adit_tests::target().join("package");
        match self {
            Self::Users => packages,
            Self::Tests => adit_tests::packages(),
        }
    }
}

/// Each of them.
const ALL: [Package; 3] = [Package::AditGuest, Package::Aditd, Package::AditVmm];

impl Package {
    const fn name(self) -> &'static str {
        match self {
            Self::AditGuest => "adit-guest",
            Self::Aditd => "aditd",
            Self::AditVmm => "adit-vmm",
        }
    }

    const fn crate_name(self) -> &'static str {
        match self {
            Self::AditGuest => "adit-guest-driver",
            Self::Aditd => "adit-host-proxy",
            Self::AditVmm => "adit-vmm-sample",
        }
    }

    const fn profile(self, purpose: For) -> &'static str {
        match (self, purpose) {
            (Self::AditGuest, _) => "guest",
            (Self::Aditd, For::Users) => "host",
            (Self::Aditd, For::Tests) => "host-quick",
            (Self::AditVmm, _) => "vmm",
        }
    }

    const fn programs(self) -> &'static [&'static str] {
        match self {
            Self::AditGuest => &["adit-guest"],
            Self::Aditd => &["aditd", "adit-port", "adit"],
            Self::AditVmm => &["adit-vmm"],
        }
    }

    fn build(self, purpose: For) -> anyhow::Result<()> {
        match self {
            Self::AditGuest => setup::guest_binaries(),
            // With the agent that `adit image` puts into images.
            Self::Aditd => setup::static_host_binaries(self.profile(purpose))
                .and_then(|()| setup::guest_binaries()),
            Self::AditVmm => setup::vmm_binary(),
        }
    }

    /// Where cargo puts its programs.
    fn built(self, purpose: For) -> PathBuf {
        let target = adit_tests::target();
        target
            .join(setup::STATIC_TARGET)
            .join(self.profile(purpose))
    }

    /// Where this file puts what cargo-deb is to find beside them.
    fn made(self, purpose: For) -> PathBuf {
        self.built(purpose).join("package").join(self.name())
    }
}

impl fmt::Display for Package {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

pub fn run(options: &Options) -> anyhow::Result<bool> {
    setup::run()?;
    if options.for_tests {
        all_for_tests()?;
        return Ok(true);
    }
    let chosen = match options.packages.as_slice() {
        [] => &ALL,
        some => some,
    };
    for package in chosen {
        let file = deb(*package, options.deb_version.as_deref(), For::Users)?;
        println!("{}", file.display());
        if options.deb_version.is_none() {
            println!("{}", tarball(*package, &file, For::Users)?.display());
        }
    }
    Ok(true)
}

/// What tests upgrade from: the same programs, as a version of Debian's that is older than every other.
const BEFORE: &str = "0.0.9-1";

/// Makes all packages, has lintian check them, and makes those that tests upgrade from.
pub fn all_for_tests() -> anyhow::Result<()> {
    for package in ALL {
        let file = deb(package, None, For::Tests)?;
        let tarball = tarball(package, &file, For::Tests)?;
        output(Command::new("tar").arg("-tf").arg(tarball))?;
        let mut lintian = Command::new("lintian");
        lintian.args(["--no-cfg", "--allow-root", "--fail-on", "error,warning"]);
        let status = lintian
            .arg(&file)
            .status()
            .context("cannot start lintian")?;
        ensure!(
            status.success(),
            "lintian has something against {}",
            file.display()
        );
        pack(package, Some(BEFORE), For::Tests)?;
    }
    Ok(())
}

/// Builds a package's programs, and its .deb. Returns the file's path. Another version has a directory of its own.
pub fn deb(package: Package, version: Option<&str>, purpose: For) -> anyhow::Result<PathBuf> {
    package.build(purpose)?;
    make(package, purpose)?;
    pack(package, version, purpose)
}

/// Puts what is built and made into a .deb.
fn pack(package: Package, version: Option<&str>, purpose: For) -> anyhow::Result<PathBuf> {
    let tool = setup::cargo_install(CARGO_DEB, "tools", &QUICK)?;
    let dir = purpose.directory();
    let dir = version.map_or(dir.clone(), |version| dir.join(version));
    let fast: &[&str] = match purpose {
        For::Users => &[],
        For::Tests => &["--fast"],
    };
    fs::create_dir_all(&dir)?;
    let version = version.map_or_else(|| format!("{}-1", env!("CARGO_PKG_VERSION")), Into::into);
    let file = dir.join(format!("{package}_{version}_amd64.deb"));
    progress::during(&format!("packing {}", file.display()), || {
        output(
            Command::new(tool)
                .current_dir(adit_tests::root())
                .env("SOURCE_DATE_EPOCH", made_at()?)
                .args([
                    "--quiet",
                    "--no-build",
                    "--no-strip",
                    "--target",
                    setup::STATIC_TARGET,
                ])
                .args(fast)
                .args(["-p", package.crate_name()])
                .args(["--profile", package.profile(purpose)])
                .args(["--deb-version", &version, "--output"])
                .arg(&file),
        )
    })?;
    Ok(file)
}

/// Makes what is in a package beside its programs and the files of this repository.
fn make(package: Package, purpose: For) -> anyhow::Result<()> {
    let dir = package.made(purpose);
    let _ = fs::remove_dir_all(&dir);
    let man = dir.join("man");
    fs::create_dir_all(&man)?;
    for program in package.programs() {
        let path = package.built(purpose).join(program);
        output(Command::new(path).arg("--man-pages").arg(&man))?;
    }
    if package == Package::Aditd {
        completions(&package.built(purpose), &dir)?;
        let agent = Package::AditGuest.built(purpose).join("adit-guest");
        fs::copy(agent, dir.join("adit-guest")).context("cannot copy adit-guest")?;
    }
    fs::copy(
        adit_tests::root().join("CHANGELOG.md"),
        dir.join("changelog"),
    )
    .context("cannot copy CHANGELOG.md")?;
    fs::write(dir.join("changelog.Debian"), debian_changelog(package)?)?;
    let changelogs = ["changelog", "changelog.Debian"].map(|name| dir.join(name));
    output(
        Command::new("gzip")
            .args(["-9nr"])
            .arg(man)
            .args(changelogs),
    )?;
    Ok(())
}

/// The scripts of `adit completion`, by the names that each shell looks for.
fn completions(bins: &Path, dir: &Path) -> anyhow::Result<()> {
    for (shell, name) in [("bash", "adit"), ("zsh", "_adit"), ("fish", "adit.fish")] {
        let dir = dir.join(shell);
        fs::create_dir_all(&dir)?;
        // Found by its name, so that the scripts call `adit` by its name too.
        let printed = output(
            Command::new("env")
                .arg(format!("PATH={}", bins.display()))
                .args(["adit", "completion", shell]),
        )?;
        fs::write(dir.join(name), printed.stdout)?;
    }
    Ok(())
}

/// Debian's changelog says that this version was packaged. What changed is in CHANGELOG.md.
fn debian_changelog(package: Package) -> anyhow::Result<String> {
    let date = output(Command::new("date").args(["-u", "-R", "-d", &format!("@{}", made_at()?)]))?;
    let date = String::from_utf8(date.stdout)?;
    Ok(format!(
        "{package} ({version}-1) unstable; urgency=medium\n\n  * Package of version {version}: see changelog.gz.\n\n \
         -- The adit authors <authors@adit.invalid>  {date}",
        version = env!("CARGO_PKG_VERSION"),
    ))
}

/// The time of the last commit, in seconds, or the environment's: two builds of one commit are equal.
fn made_at() -> anyhow::Result<String> {
    if let Ok(given) = std::env::var("SOURCE_DATE_EPOCH") {
        return Ok(given);
    }
    let mut git = Command::new("git");
    git.args(["log", "-1", "--format=%ct"]);
    let told = output(git.current_dir(adit_tests::root()));
    // A copy of the sources may have no history.
    let told = told.map_or_else(
        |_| "0".into(),
        |o| String::from_utf8_lossy(&o.stdout).into_owned(),
    );
    Ok(told.trim().to_owned())
}

/// The files of a .deb without a package manager: `tar -C / --strip-components=1 -xf FILE` installs them.
fn tarball(package: Package, deb: &Path, purpose: For) -> anyhow::Result<PathBuf> {
    let dir = purpose.directory();
    let name = format!("{package}-{}-x86_64", env!("CARGO_PKG_VERSION"));
    let stage = dir.join("stage").join(&name);
    let _ = fs::remove_dir_all(&stage);
    fs::create_dir_all(&stage)?;
    // What the package has, less what only Debian reads.
    output(Command::new("dpkg-deb").arg("-x").arg(deb).arg(&stage))?;
    for debian in [
        format!("usr/share/doc/{package}/changelog.Debian.gz"),
        "usr/share/lintian".to_owned(),
    ] {
        output(Command::new("rm").arg("-r").arg(stage.join(debian)))?;
    }
    let file = dir.join(format!("{name}.tar.gz"));
    let time = format!("--mtime=@{}", made_at()?);
    output(
        Command::new("tar")
            .args([
                "--sort=name",
                "--owner=0",
                "--group=0",
                "--numeric-owner",
                &time,
            ])
            .args(["--use-compress-program", "gzip -9n", "-C"])
            .arg(dir.join("stage"))
            .arg("-cf")
            .args([file.as_os_str(), name.as_ref()]),
    )?;
    fs::remove_dir_all(dir.join("stage"))?;
    Ok(file)
}

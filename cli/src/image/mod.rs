//! `adit image …`: puts the agent into VM images, without starting or mounting them.
//!
//! What goes in is what `adit-guest install` puts into a root directory, by the same code.

mod cloud_config;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use adit_guest_driver::install::{Init, InstallError, What, install, install_in};
use adit_image::{Disk, DiskError};
use clap::{Args, Subcommand};

use crate::error::Failure;
use crate::output;
use crate::text::Format;
use cloud_config::CloudConfig;

const INJECT: &str = "\
TARGET is a root directory, or a disk image in a file: raw or qcow2, with or without a partition table, whose root file
system is ext4. Nothing is mounted, no root is needed, and a disk image is replaced only when the new one is whole. Its VM
must be shut down. For another file system use `adit image cloud-init`.

Examples:
  adit image inject web-1.qcow2 --vm-id web-1 --trust fleet.key.pub --allow-port 22,80
  adit image inject ./rootfs --vm-id web-1 --trust fleet.key.pub
  adit image inject web-2.qcow2 --card web-2.card --trust enrol.key.pub,fleet.key.pub
  adit image inject web-3.raw --vm-id web-3 --trust fleet.key.pub --policy minimal.toml";

const CLOUD_INIT: &str = "\
Example: a seed for an image of a distribution that stays as it is
  adit image cloud-init --vm-id web-1 --trust fleet.key.pub --allow-port 22 > user-data
  cloud-localds seed.img user-data          # then start the VM with seed.img as a second disk";

#[derive(Subcommand)]
pub enum ImageCommand {
    /// Put agent, service, configuration and trusted keys into a disk image or a root directory
    #[command(after_help = INJECT)]
    Inject {
        /// Disk image or root directory
        target: PathBuf,
        /// Number of the partition to use, if several hold a root file system
        #[arg(long, value_name = "N")]
        partition: Option<u32>,
        /// The image's init system; looked for in the image if not given
        #[arg(long)]
        init: Option<Init>,
        #[command(flatten)]
        what: Installed,
    },
    /// Print user data for cloud-init that installs the agent when the VM boots first
    #[command(after_help = CLOUD_INIT)]
    CloudInit {
        #[command(flatten)]
        what: Installed,
    },
}

#[derive(Args)]
pub struct Installed {
    #[command(flatten)]
    what: What,
    /// The agent, a static program [default: adit-guest beside adit, else /usr/lib/adit/adit-guest]; not needed where the image has
    /// the package adit-guest
    #[arg(long, value_name = "FILE")]
    agent: Option<PathBuf>,
}

pub fn run(command: &ImageCommand, format: Format) -> Result<(), Failure> {
    match command {
        ImageCommand::Inject {
            target,
            partition,
            init,
            what,
        } => {
            let said = inject(target, *partition, *init, what)?;
            match format {
                Format::Json => {
                    output::json(&serde_json::json!({ "target": target, "lines": said }))
                }
                Format::Table => output::line(said.join("\n")),
            }
        }
        ImageCommand::CloudInit { what } => {
            let mut config = CloudConfig::default();
            let agent = what.agent()?;
            let install = what
                .what
                .install(Path::new("/"), Some(Init::Systemd), agent.as_deref());
            let said = install_in(&mut config, &install).map_err(refused)?;
            // What a person should know; standard output is the document.
            for line in said.iter().filter(|line| !line.starts_with("wrote ")) {
                adit_print::note!("adit: {line}");
            }
            match format {
                Format::Json => {
                    output::json(&serde_json::json!({ "user_data": config.to_string() }))
                }
                Format::Table => output::line(config),
            }
        }
    }
}

fn inject(
    target: &Path,
    partition: Option<u32>,
    init: Option<Init>,
    what: &Installed,
) -> Result<Vec<String>, Failure> {
    let agent = what.agent()?;
    let install_what = what.what.install(target, init, agent.as_deref());
    if target.is_dir() {
        if partition.is_some() {
            let text = format!("--partition: {} is a directory", target.display());
            return Err(Failure::new("usage", text));
        }
        return install(&install_what).map_err(refused);
    }
    let disk = Disk::open(target, partition).map_err(unusable)?;
    let mut root = disk.root().map_err(unusable)?;
    let said = install_in(&mut root, &install_what).map_err(refused)?;
    disk.commit(root).map_err(unusable)?;
    Ok(said)
}

impl Installed {
    /// The agent that was named, or else that is found.
    fn agent(&self) -> Result<Option<PathBuf>, Failure> {
        if let Some(agent) = &self.agent {
            return program(agent).map(Some);
        }
        let beside = std::env::current_exe().map(|adit| adit.with_file_name("adit-guest"));
        let installed = PathBuf::from("/usr/lib/adit/adit-guest");
        let mut places = beside.into_iter().chain([installed]);
        Ok(places.find(|path| path.is_file()))
    }
}

/// Refuses what no VM could start, such as a key given in its place.
fn program(agent: &Path) -> Result<PathBuf, Failure> {
    let shown = agent.display();
    let mut magic = [0; 4];
    let read = File::open(agent).and_then(|file| file.read_at(&mut magic, 0));
    read.map_err(|e| Failure::io(&format!("cannot read the agent {shown}"), &e))?;
    match &magic {
        b"\x7fELF" => Ok(agent.into()),
        _ => Err(
            Failure::new("no-agent", format!("{shown} is no program (no ELF file)"))
                .help("--agent takes the static adit-guest"),
        ),
    }
}

fn refused(e: InstallError) -> Failure {
    let why = adit_print::with_causes(&e);
    match e {
        InstallError::NoAgent => Failure::new("no-agent", why).help(
            "adit-guest is looked for beside adit and in /usr/lib/adit; name another with --agent FILE",
        ),
        _ => Failure::new("image", why),
    }
}

fn unusable(e: DiskError) -> Failure {
    let code = match &e {
        DiskError::InUse(_) => "image-in-use",
        _ => "image",
    };
    Failure::new(code, adit_print::with_causes(&e))
}

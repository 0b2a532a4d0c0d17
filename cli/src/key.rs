//! `adit key …`: keys that goals are signed with. They are made and kept where the manager is, never on a host or guest.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use adit_tasks::key::{format_private, parse_private};
use adit_tasks::{Anchor, PublicKey, Role, Roles};
use clap::Subcommand;
use ed25519_dalek::SigningKey;
use zeroize::Zeroizing;

use crate::error::Failure;
use crate::output;
use crate::text::Format;

const EXAMPLE: &str = "\
Example:
  adit key new fleet.key --comment \"fleet 2027\"
  adit key new enrol.key --role card                # signs cards, and no goal
  adit-guest install --root /mnt/image --init systemd --vm-id web-1 --trust fleet.key.pub";

#[derive(Subcommand)]
pub enum KeyCommand {
    /// Make a key: FILE is private (0600), FILE.pub goes into VM images
    #[command(after_help = EXAMPLE)]
    New {
        /// File for the private key
        file: PathBuf,
        /// Name of the key in lists [default: the file's name]
        #[arg(long)]
        comment: Option<String>,
        /// What it is trusted for: card, goal, exec, agent
        #[arg(
            long,
            value_delimiter = ',',
            value_name = "ROLE,…",
            default_value = "goal"
        )]
        role: Vec<Role>,
        /// Replace the key that is in FILE, which is lost then
        #[arg(long)]
        force: bool,
    },
    /// Print the public line of a key
    Show {
        /// File with the private key
        file: PathBuf,
        /// What it is to be trusted for: card, goal, exec, agent
        #[arg(
            long,
            value_delimiter = ',',
            value_name = "ROLE,…",
            default_value = "goal"
        )]
        role: Vec<Role>,
    },
}

pub fn run(command: &KeyCommand, format: Format) -> Result<(), Failure> {
    match command {
        KeyCommand::New {
            file,
            comment,
            role,
            force,
        } => new(file, comment.as_deref(), roles(role), *force, format),
        KeyCommand::Show { file, role } => {
            let (key, roles) = (PublicKey::of(&read(file)?, &stem(file)), roles(role));
            show(&Anchor { key, roles }, format)
        }
    }
}

/// One that is named twice counts once. There is at least one: the option has a default.
fn roles(named: &[Role]) -> Roles {
    let roles = named.iter().map(|role| Roles::from(*role));
    roles.reduce(Roles::and).unwrap_or(Role::Goal.into())
}

/// Reads a private key.
pub fn read(file: &Path) -> Result<SigningKey, Failure> {
    let shown = file.display();
    let text = fs::read_to_string(file).map(Zeroizing::new).map_err(|e| {
        Failure::io(&format!("cannot read key {shown}"), &e)
            .help(format!("make one with `adit key new {shown}`"))
    })?;
    parse_private(&text).map_err(|e| {
        Failure::new("bad-key", format!("{shown}: {e}"))
            .help("--sign takes the private key, not the .pub file")
    })
}

fn stem(file: &Path) -> String {
    file.file_stem()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

fn show(anchor: &Anchor, format: Format) -> Result<(), Failure> {
    match format {
        Format::Json => output::json(&serde_json::json!({
            "id": anchor.key.id().to_string(),
            "public": anchor.to_string(),
            "roles": anchor.roles.to_string(),
        })),
        Format::Table => output::line(anchor),
    }
}

fn new(
    file: &Path,
    comment: Option<&str>,
    roles: Roles,
    force: bool,
    format: Format,
) -> Result<(), Failure> {
    let mut seed = Zeroizing::new([0; 32]);
    getrandom::fill(seed.as_mut())
        .map_err(|e| Failure::new("io", format!("the system gives no random numbers: {e}")))?;
    let key = SigningKey::from_bytes(&seed);
    let public = Anchor {
        key: PublicKey::of(&key, comment.unwrap_or(&stem(file))),
        roles,
    };
    write(file, 0o600, &Zeroizing::new(format_private(&key)), force)?;
    let mut public_file = file.as_os_str().to_owned();
    public_file.push(".pub");
    write(Path::new(&public_file), 0o644, &format!("{public}\n"), true)?;
    show(&public, format)?;
    if format == Format::Table {
        let public_file = Path::new(&public_file).display();
        adit_print::note(format_args!(
            "the private key is in {} (keep it safe), the public key in {public_file}\n\
             put the public key into an image: adit-guest install --root DIR --init systemd --vm-id NAME --trust {public_file}",
            file.display()
        ));
    }
    Ok(())
}

/// Creates a file with its final mode, so that a key is at no time readable by others.
fn write(file: &Path, mode: u32, text: &str, force: bool) -> Result<(), Failure> {
    let shown = file.display();
    if force {
        match fs::remove_file(file) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(Failure::io(&format!("cannot replace {shown}"), &e));
            }
            _ => {}
        }
    }
    let created = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(file);
    created
        .and_then(|mut f| f.write_all(text.as_bytes()).and_then(|()| f.sync_all()))
        .map_err(|e| {
            let help = match e.kind() {
                io::ErrorKind::AlreadyExists => {
                    "a key that is lost cannot be made again: choose another name, or --force"
                }
                io::ErrorKind::NotFound => "make the directory first",
                _ => "",
            };
            Failure::io(&format!("cannot write {shown}"), &e).help(help)
        })
}

//! `adit-guest install`: puts agent, service, configuration and trust anchors into an image's root.
//!
//! Every file is written beside its place and renamed, and only if it differs, so that installing twice changes
//! nothing and an installation that is cut short leaves no half file. No link in the image leads out of it (`adit_image`). An
//! existing configuration is replaced: the command line says what the image is to be. Keys are added, and none is removed.
//! Where Debian's package of the agent is installed, program and service are the package's, and are left as they are.

mod detect;
mod interpreter;

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use adit_image::{Dir, Root};
use adit_names::VmId;
use adit_tasks::TrustStore;
use adit_tasks::anchor::ANCHORS_MAX;
use adit_tasks::card::{self, CardError};
use adit_tasks::dsse::{Envelope, Type};
use adit_tasks::trust::Document;

use crate::clock;
use crate::config::{Config, ConfigError};
use crate::documents;
use crate::policy::{PolicyError, source};
use crate::trust::{KeyFileError, check_key, pub_files};

/// Where the agent goes.
const BINARY: &str = "usr/sbin/adit-guest";
const CONFIG: &str = "etc/adit-guest/adit-guest.toml";
/// Where the agent looks for its policy; its configuration names it as well, so that it must be there.
const POLICY: &str = "etc/adit-guest/policy.toml";
/// Where the agent looks for its card if its configuration says nothing else.
const CARD: &str = "etc/adit/card";
/// And for a trust document, beside it.
const TRUST_DOCUMENT: &str = "etc/adit/trust.json";
const TRUST_DIR: &str = "etc/adit-guest/trust";
/// Of Debian's package, in every image that has it. Nothing else puts a unit there.
const PACKAGED: &str = "usr/lib/systemd/system/adit-guest.service";

/// The image's init system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Init {
    /// A unit, enabled for multi-user.target.
    Systemd,
    /// A supervised service in runlevel default.
    Openrc,
    /// `/etc/init.d/S50adit-guest`, which supervises by itself.
    Busybox,
    /// No service is installed: something else starts `adit-guest run`.
    None,
}

/// What of the command line says what to install: of `adit-guest install`, and of `adit image`.
#[derive(Clone, Debug, clap::Args)]
pub struct What {
    /// The id that the VM is enrolled with, for example web-1. Without it, its card says it
    #[arg(long)]
    pub vm_id: Option<VmId>,
    /// Public keys of the managers whose goals the guest runs: files, or directories of *.pub. May be given many times, or as a
    /// list with commas. Without it, the guest runs no goal
    #[arg(long, value_name = "KEYFILE.pub|DIR", value_delimiter = ',')]
    pub trust: Vec<PathBuf>,
    /// The VM's card, as `adit card new` makes it; goes to /etc/adit/card
    #[arg(long, value_name = "FILE")]
    pub card: Option<PathBuf>,
    /// A trust document, as `adit trust change` makes it; goes to /etc/adit/trust.json
    #[arg(long, value_name = "FILE")]
    pub trust_document: Option<PathBuf>,
    /// The guest's policy (docs/operate.md); goes to /etc/adit-guest/policy.toml, and has to be there from then on
    #[arg(long, value_name = "FILE")]
    pub policy: Option<PathBuf>,
    /// Local TCP ports that the host may reach, for example 80,22
    #[arg(long, value_delimiter = ',')]
    pub allow_port: Vec<u16>,
}

impl What {
    /// The same with where it goes.
    pub fn install<'a>(
        &'a self,
        root: &'a Path,
        init: Option<Init>,
        binary: Option<&'a Path>,
    ) -> Install<'a> {
        Install {
            root,
            init,
            vm_id: self.vm_id.as_ref(),
            trust: &self.trust,
            card: self.card.as_deref(),
            trust_document: self.trust_document.as_deref(),
            policy: self.policy.as_deref(),
            ports: &self.allow_port,
            binary,
        }
    }
}

/// What to install.
#[derive(Clone, Debug)]
pub struct Install<'a> {
    /// The image's root directory.
    pub root: &'a Path,
    /// Its init system; looked for in the image if not given.
    pub init: Option<Init>,
    /// The id that the image is enrolled with; none: its card says it.
    pub vm_id: Option<&'a VmId>,
    /// Public keys of managers: files, and directories of `*.pub`.
    pub trust: &'a [PathBuf],
    /// A file with the VM's card.
    pub card: Option<&'a Path>,
    /// A file with a trust document.
    pub trust_document: Option<&'a Path>,
    /// A file with the guest's policy.
    pub policy: Option<&'a Path>,
    /// Local TCP ports that the host may reach.
    pub ports: &'a [u16],
    /// The agent's binary; none: only for an image that has the package.
    pub binary: Option<&'a Path>,
}

/// Why it could not be installed.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// Something cannot be read or written.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// There is no agent to put there, and the image does not have its package.
    #[error(
        "no agent to install: the image does not have the package adit-guest, and no program was given or found"
    )]
    NoAgent,
    /// The image's init system is not known.
    #[error(transparent)]
    Init(#[from] detect::Unknown),
    /// The agent could not use the configuration that it would get.
    #[error("the agent could not use its configuration")]
    Config(#[from] ConfigError),
    /// What is to be the card is none, or another VM's.
    #[error("--card: {}: {why}", path.display())]
    Card {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to do.
        why: String,
    },
    /// What is to be the trust document is none.
    #[error("--trust-document: {}: {why}", path.display())]
    TrustDocument {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// What is to be the policy cannot be used.
    #[error("--policy: {0}")]
    Policy(PolicyError),
    /// What is to be trusted is no key.
    #[error(transparent)]
    Key(#[from] KeyFileError),
    /// Two different files would have one name in the image.
    #[error("--trust: {} and {} have the same file name: rename one", one.display(), other.display())]
    SameName {
        /// One file.
        one: PathBuf,
        /// The other.
        other: PathBuf,
    },
    /// More keys than a guest reads.
    #[error("--trust: {count} keys, at most {ANCHORS_MAX} are allowed")]
    TooManyKeys {
        /// So many were given.
        count: usize,
    },
    /// A directory without a key.
    #[error("--trust: {} has no file *.pub", dir.display())]
    NoKeys {
        /// The directory.
        dir: PathBuf,
    },
}

fn at<'p>(what: &'static str, path: &'p Path) -> impl Fn(io::Error) -> InstallError + 'p {
    move |source| InstallError::Io {
        what,
        path: path.to_owned(),
        source,
    }
}

/// What goes into the image's `trust_dir`: file name and content.
fn key_files(trust: &[PathBuf]) -> Result<Vec<(String, Vec<u8>)>, InstallError> {
    let mut files = Vec::new();
    for path in trust {
        if !path.is_dir() {
            files.push(path.clone());
            continue;
        }
        let found = pub_files(path).map_err(at("read the directory", path))?;
        if found.is_empty() {
            return Err(InstallError::NoKeys { dir: path.clone() });
        }
        files.extend(found);
    }
    let mut placed: BTreeMap<String, (PathBuf, Vec<u8>)> = BTreeMap::new();
    let mut count = 0;
    for file in files {
        let (keys, text) = check_key(&file)?;
        count += keys.len();
        let content = text.into_bytes();
        let stem = file.file_stem().and_then(|s| s.to_str());
        let name = format!("{}.pub", stem.unwrap_or("manager"));
        match placed.get(&name) {
            Some((one, same)) if *same != content => {
                let (one, other) = (one.clone(), file);
                return Err(InstallError::SameName { one, other });
            }
            _ => placed.insert(name, (file, content)),
        };
    }
    if count > ANCHORS_MAX {
        return Err(InstallError::TooManyKeys { count });
    }
    let files = placed.into_iter();
    Ok(files.map(|(name, (_, content))| (name, content)).collect())
}

/// Reads a card, and checks what can be known here. Returns its text, and a line for people if the image could not believe it by
/// the keys that come with it.
fn card_file(
    path: &Path,
    what: &Install<'_>,
    keys: &[(String, Vec<u8>)],
) -> Result<(Vec<u8>, Option<String>), InstallError> {
    let refused = |why: String| InstallError::Card {
        path: path.into(),
        why,
    };
    let mut text = Vec::new();
    let limit = card::TEXT_MAX as u64 + 1;
    let read = fs::File::open(path).and_then(|file| file.take(limit).read_to_end(&mut text));
    read.map_err(at("read the card", path))?;
    let envelope = card::from_text(&text).map_err(|e| refused(e.to_string()))?;
    let mut trust = TrustStore::default();
    for (_, key) in keys {
        // They were checked one by one.
        let _ = trust.add_text(&String::from_utf8_lossy(key));
    }
    let here = card::Here {
        vm_id: what.vm_id,
        now_ms: clock::unix_ms(),
    };
    match card::check(&envelope, &trust, here) {
        Ok(_) => Ok((text, None)),
        // The image may have a key that is not given here.
        Err(e @ CardError::Verify(_)) => {
            let line = format!(
                "{}: {e}: none of the keys of --trust counts for it",
                path.display()
            );
            Ok((text, Some(line)))
        }
        Err(e) => Err(refused(format!("{e}: {}", e.remedy()))),
    }
}

/// Reads a trust document, and checks that it is one. Who has signed it is checked in the guest, which may trust more keys.
fn trust_document(path: &Path) -> Result<Vec<u8>, InstallError> {
    let refused = |why: String| InstallError::TrustDocument {
        path: path.into(),
        why,
    };
    let envelope = documents::read_file(path).map_err(|e| refused(e.to_string()))?;
    let open = Envelope::parse_as(Type::Trust, &envelope).map_err(|e| refused(e.to_string()))?;
    let said = Document::parse(open.unverified_payload());
    said.map_err(|e| refused(e.to_string()))?;
    Ok(envelope)
}

/// Installs, and returns one line a file for people.
///
/// # Errors
/// Something cannot be read or written; what was written before is complete and harmless.
pub fn install(what: &Install<'_>) -> Result<Vec<String>, InstallError> {
    let mut image = Dir::open(what.root).map_err(at("use root", what.root))?;
    install_in(&mut image, what)
}

/// The same in a root that is open, a directory or not; `what.root` only names it.
///
/// # Errors
/// As [`install`].
pub fn install_in(image: &mut dyn Root, what: &Install<'_>) -> Result<Vec<String>, InstallError> {
    let root = what.root;
    let packaged = image.has(PACKAGED);
    let binary = match what.binary {
        _ if packaged => None,
        None => return Err(InstallError::NoAgent),
        binary => binary,
    };
    let init = match what.init {
        Some(init) => init,
        None if packaged => Init::None,
        None => detect::init(image, root)?,
    };
    let keys = key_files(what.trust)?;
    let card = what
        .card
        .map(|path| card_file(path, what, &keys))
        .transpose()?;
    let document = what.trust_document.map(trust_document).transpose()?;
    let policy = what.policy.map(source::read_given).transpose();
    let policy = policy.map_err(InstallError::Policy)?;
    let config = config(what);
    Config::parse(&root.join(CONFIG), &config)?;
    let mut said = Vec::new();
    let mut put = |path: &str, content: &[u8], mode: u32| -> Result<(), InstallError> {
        let full = root.join(path);
        let changed = image.place(path, content, mode);
        let changed = changed.map_err(at("write", &full))?;
        said.push(format!(
            "{} /{path}",
            if changed { "wrote " } else { "keeps " }
        ));
        Ok(())
    };
    let mut interpreter = None;
    if let Some(path) = binary {
        let binary = fs::read(path).map_err(at("read binary", path))?;
        put(BINARY, &binary, 0o755)?;
        interpreter = interpreter::of(&binary).map(|needs| (needs, path));
    }
    put(CONFIG, config.as_bytes(), 0o600)?;
    for (name, key) in &keys {
        put(&format!("{TRUST_DIR}/{name}"), key, 0o600)?;
    }
    if let Some((card, _)) = &card {
        put(CARD, card, 0o600)?;
    }
    if let Some(document) = &document {
        put(TRUST_DOCUMENT, document, 0o600)?;
    }
    if let Some((_, policy)) = &policy {
        put(POLICY, policy, 0o600)?;
    }
    let mut link = None;
    match init {
        _ if packaged => {}
        Init::Systemd => {
            put(
                "etc/systemd/system/adit-guest.service",
                SYSTEMD.as_bytes(),
                0o644,
            )?;
            link = Some((
                "etc/systemd/system/multi-user.target.wants/adit-guest.service",
                "../adit-guest.service",
            ));
        }
        Init::Openrc => {
            put("etc/init.d/adit-guest", OPENRC.as_bytes(), 0o755)?;
            link = Some(("etc/runlevels/default/adit-guest", "/etc/init.d/adit-guest"));
        }
        Init::Busybox => put("etc/init.d/S50adit-guest", BUSYBOX.as_bytes(), 0o755)?,
        Init::None => {}
    }
    if let Some((path, target)) = link {
        let full = root.join(path);
        let changed = image.place_link(path, target);
        let changed = changed.map_err(at("link", &full))?;
        said.push(format!(
            "{} /{path} -> {target}",
            if changed { "wrote " } else { "keeps " }
        ));
    }
    if let Some((needs, binary)) = interpreter
        && !image.has(needs.trim_start_matches('/'))
    {
        said.push(format!(
            "{} is linked dynamically, and the image has no {needs}: it will not start there. Install the static program: \
             cargo build --profile guest --target x86_64-unknown-linux-musl -p adit-guest-driver",
            binary.display()
        ));
    }
    if keys.is_empty() {
        said.push(
            "no --trust: no key was added; an image without one serves ports and runs no task"
                .into(),
        );
    }
    if let Some((_, Some(doubt))) = &card {
        said.push(doubt.clone());
    }
    if what.vm_id.is_none() && card.is_none() {
        said.push(
            "no --vm-id: the guest runs no task before it has a card, see `adit card new --help`"
                .into(),
        );
    }
    if packaged {
        for path in [BINARY, PACKAGED] {
            said.push(format!("keeps  /{path} (package adit-guest)"));
        }
    } else if init == Init::None {
        said.push("no service was installed: have something start /usr/sbin/adit-guest run".into());
    }
    Ok(said)
}

fn config(what: &Install<'_>) -> String {
    let ports = what
        .ports
        .iter()
        .map(u16::to_string)
        .collect::<Vec<_>>()
        .join(", ");
    let vm_id = what.vm_id.map(|id| format!("vm_id = \"{id}\"\n"));
    let policy = what.policy.map(|_| format!("policy = \"/{POLICY}\"\n"));
    format!(
        "# Written by `adit-guest install`.\n\
         {}{}trust_dir = \"/{TRUST_DIR}\"\nstate_dir = \"/var/lib/adit-guest\"\nallow_ports = [{ports}]\n",
        vm_id.unwrap_or_default(),
        policy.unwrap_or_default()
    )
}

/// Tasks are children of the agent, and may be told to do whatever root can. So the unit has nothing that a child inherits
/// and could not give back: no filter of system calls, no bounding set, no limit, no mount namespace, no score, and no
/// directive that implies one of these (`ProtectClock`, `LockPersonality`, …). What can be given back the agent takes by
/// itself (`protect.rs`). Tasks have cgroups outside the unit's (`exec/cgroup.rs`). Where they cannot, they are below it, and
/// then `KillMode=process` and `OOMPolicy=continue` see to it that a restart ends none of their daemons, and that a task that
/// runs out of memory does not end the agent.
const SYSTEMD: &str = include_str!("../dist/adit-guest.service");

/// As for systemd: no limit, no score, no capability. OpenRC ends the supervised process and leaves what it started.
const OPENRC: &str = include_str!("../dist/adit-guest.openrc");

/// The supervising loop is a child of init; `stop` ends the loop first, so that it starts nothing new.
const BUSYBOX: &str = include_str!("../dist/S50adit-guest");

#[cfg(test)]
mod tests;

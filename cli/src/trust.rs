//! `adit trust …`: says which keys guests are to trust, and which no longer, signed where the manager is; hands that over.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use adit_api::{KeptTrust, NewTrust};
use adit_guest_driver::documents;
use adit_names::VmId;
use adit_tasks::dsse::{self, Envelope, TRUST_MAX, Type};
use adit_tasks::trust::{self, Document, SEQUENCE_MAX};
use adit_tasks::{Anchor, KeyId, PublicKey, Role, Roles, TrustStore};
use clap::{Args, Subcommand};
use jiff::{SignedDuration, Timestamp};

use crate::card::trusted;
use crate::client::Client;
use crate::error::Failure;
use crate::text::Format;
use crate::{completion, key, output};

/// How long a document can be taken if nobody says otherwise.
const VALID: SignedDuration = SignedDuration::from_hours(366 * 24);

const EXAMPLE: &str = "\
FILE is the document, and the record of what its signer has said: keep it. Each change makes the next one of it, with all that it
said before. What was revoked is never trusted again.

Example: a new key for goals in place of an old one. To bring one, enrol.key has the roles card,goal in the guests
  adit key new fleet-2.key
  adit trust change enrol.trust --sign enrol.key --add fleet-2.key.pub --revoke fleet.key.pub
  adit trust apply enrol.trust
  adit vm show web-1                # `trust`: which document the guest has taken

A guest that has no host at the moment takes it as a file: `adit-guest trust add enrol.trust`.";

#[derive(Subcommand)]
pub enum TrustCommand {
    /// Sign the next trust document of a key, with keys that are added or revoked
    #[command(after_help = EXAMPLE)]
    Change(Change),
    /// Print what a trust document says, and whether it is to be believed
    Show {
        /// The document
        file: PathBuf,
        /// Check it against these public keys
        #[arg(long, value_name = "KEYFILE.pub", value_delimiter = ',')]
        trust: Vec<PathBuf>,
    },
    /// Hand a trust document to aditd, which keeps it and gives it to the guests: now, or when their agents connect
    Apply {
        /// The document
        file: PathBuf,
        /// VMs that it is given to [default: all, also those that are added later]
        #[arg(long, value_delimiter = ',', value_name = "VM,…", add = completion::vms())]
        to: Vec<String>,
    },
    /// List the trust documents that aditd gives to guests
    #[command(alias = "list")]
    Ls,
    /// Have aditd give a trust document to no further guest; those that have taken it keep it
    Rm {
        /// Id of the key that signed it, as `adit trust ls` shows it
        signer: String,
        /// Only that of this VM [default: wherever it is kept]
        #[arg(long, add = completion::vms())]
        vm: Option<String>,
    },
}

#[derive(Args)]
pub struct Change {
    /// The document; made if there is none
    file: PathBuf,
    /// Private key to sign with; guests need its public half as an anchor of the role card
    #[arg(long, value_name = "KEY")]
    sign: PathBuf,
    /// Keys to trust; they may have no role that KEY does not have in the guest
    #[arg(long, value_name = "KEYFILE.pub", value_delimiter = ',')]
    add: Vec<PathBuf>,
    /// Keys to trust no longer, by their ids or their files
    #[arg(long, value_name = "ID|KEYFILE.pub", value_delimiter = ',')]
    revoke: Vec<String>,
    /// The one VM that it is for [default: every guest that trusts KEY]
    #[arg(long = "for", value_name = "VM")]
    of: Option<VmId>,
    /// Until when guests may take it, as 2027-11-21T22:00:00Z [default: a year from now]
    #[arg(long, value_name = "TIME")]
    not_after: Option<Timestamp>,
    /// Guests take it also where it leaves them no key that may sign cards and trust documents: the last word, for good
    #[arg(long)]
    leave_no_card_key: bool,
}

pub async fn run(command: &TrustCommand, client: &Client, format: Format) -> Result<(), Failure> {
    match command {
        TrustCommand::Change(change) => self::change(change, format),
        TrustCommand::Show { file, trust } => show(file, trust, format),
        TrustCommand::Apply { file, to } => {
            let envelope = read(file)?;
            let envelope = String::from_utf8_lossy(&envelope).into_owned();
            let to = to.clone();
            let kept: KeptTrust = client.post("/v1/trust", &NewTrust { envelope, to }).await?;
            list(&[kept], format)
        }
        TrustCommand::Ls => list(&client.get::<Vec<KeptTrust>>("/v1/trust").await?, format),
        TrustCommand::Rm { signer, vm } => {
            let signer: KeyId = signer.parse().map_err(|e| bad(format!("{e}")))?;
            let query = match vm {
                Some(vm) => {
                    let vm: VmId = vm.parse().map_err(|e| bad(format!("`{vm}`: {e}")))?;
                    format!("?vm={vm}")
                }
                None => String::new(),
            };
            client.delete(&format!("/v1/trust/{signer}{query}")).await?;
            match format {
                Format::Json => output::json(&serde_json::json!({ "removed": signer.to_string() })),
                Format::Table => output::line(format_args!("{signer}: given to no further guest")),
            }
        }
    }
}

fn bad(what: impl Into<String>) -> Failure {
    Failure::new("bad-trust", what)
}

fn read(file: &Path) -> Result<Vec<u8>, Failure> {
    documents::read_file(file)
        .map_err(|e| Failure::io(&format!("cannot read {}", file.display()), &e))
}

/// What is in the file by now, signed by this key.
fn before(file: &Path, signer: &PublicKey) -> Result<Option<Document>, Failure> {
    if !file.exists() {
        return Ok(None);
    }
    let of = |e: String| bad(format!("{}: {e}", file.display()));
    let mut only = TrustStore::default();
    let (key, roles) = (signer.clone(), Role::Card.into());
    only.add(Anchor { key, roles })
        .map_err(|e| of(e.to_string()))?;
    let envelope = Envelope::parse_as(Type::Trust, &read(file)?).map_err(|e| of(e.to_string()))?;
    let verified = envelope.verify(&only).map_err(|e| {
        of(e.to_string()).help(
            "a document goes on with the key that has begun it: name another file for another key",
        )
    })?;
    let said = Document::parse(verified.payload()).map_err(|e| of(e.to_string()))?;
    Ok(Some(said))
}

fn change(change: &Change, format: Format) -> Result<(), Failure> {
    let private = key::read(&change.sign)?;
    let signer = PublicKey::of(&private, "");
    let before = before(&change.file, &signer)?;
    let now = Timestamp::now();
    // Whole seconds: somebody reads them.
    let now = Timestamp::from_second(now.as_second()).unwrap_or(now);
    let not_after = match change.not_after {
        Some(at) if at <= now => return Err(bad(format!("--not-after {at} is over already"))),
        Some(at) => at,
        None => now.saturating_add(VALID).unwrap_or(Timestamp::MAX),
    };
    let by_clock = u64::try_from(now.as_second()).unwrap_or(1).max(1);
    let next = before.as_ref().map_or(1, |b| b.sequence.saturating_add(1));
    let sequence = by_clock.max(next);
    if sequence > SEQUENCE_MAX {
        return Err(bad("the sequence of this key has come to its end")
            .help("have another key of the role card revoke it"));
    }
    if let Some(b) = &before
        && change.of.is_some()
        && b.vm_id != change.of
    {
        let of = b.vm_id.as_ref().map_or("every guest", VmId::as_str);
        let text = format!("{} is for {of}", change.file.display());
        return Err(bad(text).help("name another file: each has a sequence of its own"));
    }
    let (vm_id, anchors, revoked) = match before {
        Some(b) => (b.vm_id, b.anchors, b.revoked),
        None => (change.of.clone(), Vec::new(), Vec::new()),
    };
    let mut document = Document {
        sequence,
        vm_id,
        anchors,
        revoked,
        leaves_no_card_key: change.leave_no_card_key,
        not_after,
    };
    for file in &change.add {
        for anchor in trusted(std::slice::from_ref(file))?.anchors() {
            add(&mut document, anchor.clone())?;
        }
    }
    for text in &change.revoke {
        for id in ids(text)? {
            document.anchors.retain(|anchor| anchor.key.id() != id);
            if !document.revoked.contains(&id) {
                document.revoked.push(id);
            }
        }
    }
    let id = signer.id();
    if document.revoked.contains(&id) {
        // Guests drop what a revoked key has brought, in this document too.
        if !change.add.is_empty() {
            return Err(bad("a document that revokes its own signer brings no keys")
                .help("have a key sign it that stays"));
        }
        document.anchors.clear();
    } else {
        // Where it revokes the key that has brought it, it carries on by this. It has the roles of all that it brings, or no
        // guest would take the next one.
        document.anchors.retain(|anchor| anchor.key.id() != id);
        let brought = document.anchors.iter().map(|anchor| anchor.roles);
        let roles = brought.fold(Role::Card.into(), Roles::and);
        document.anchors.insert(0, Anchor { key: signer, roles });
    }
    let payload = document.payload();
    // What no guest would take is not signed.
    Document::parse(&payload).map_err(|e| bad(e.to_string()))?;
    let envelope = dsse::sign_as(Type::Trust, &payload, &private);
    if envelope.len() > TRUST_MAX {
        let len = envelope.len();
        return Err(bad(format!(
            "the document has {len} bytes, at most {TRUST_MAX} are allowed"
        ))
        .help("leave keys out, or their comments"));
    }
    replace(&change.file, &format!("{envelope}\n"))?;
    print(&document, &id.to_string(), None, format)
}

fn add(document: &mut Document, anchor: Anchor) -> Result<(), Failure> {
    let id = anchor.key.id();
    if document.revoked.contains(&id) {
        return Err(bad(format!(
            "the key {id} was revoked, and no guest trusts it again"
        ))
        .help("make another one: `adit key new`"));
    }
    document.anchors.retain(|known| known.key.id() != id);
    document.anchors.push(anchor);
    Ok(())
}

/// A key's id, or those of the keys in a file.
fn ids(text: &str) -> Result<Vec<KeyId>, Failure> {
    if let Ok(id) = text.parse() {
        return Ok(vec![id]);
    }
    let keys = trusted(&[PathBuf::from(text)])?;
    Ok(keys.anchors().map(|anchor| anchor.key.id()).collect())
}

/// Replaces the file at once: it is the only record of what was said before.
fn replace(file: &Path, text: &str) -> Result<(), Failure> {
    let failed = |e: std::io::Error| Failure::io(&format!("cannot write {}", file.display()), &e);
    let mut name = file.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let new = file.with_file_name(name);
    let mut open = fs::File::create(&new).map_err(failed)?;
    let written = open
        .write_all(text.as_bytes())
        .and_then(|()| open.sync_all());
    written.map_err(failed)?;
    fs::rename(&new, file).map_err(failed)
}

fn show(file: &Path, trust: &[PathBuf], format: Format) -> Result<(), Failure> {
    let envelope = read(file)?;
    let of = |e: String| bad(format!("{}: {e}", file.display()));
    let open = Envelope::parse_as(Type::Trust, &envelope).map_err(|e| of(e.to_string()))?;
    let signer = open.unverified_signer().map(|id| id.to_string());
    let said = Document::parse(open.unverified_payload()).map_err(|e| of(e.to_string()))?;
    if !trust.is_empty() {
        let here = trust::Here {
            vm_id: said.vm_id.as_ref(),
            now_ms: Timestamp::now().as_millisecond(),
        };
        let proved = trust::check(&envelope, &trusted(trust)?, here);
        proved.map_err(|e| of(e.to_string()).help(e.remedy()))?;
    }
    let signer = signer.unwrap_or_default();
    print(&said, &signer, Some(!trust.is_empty()), format)
}

/// `proved`: none where it was signed here.
fn print(
    said: &Document,
    signer: &str,
    proved: Option<bool>,
    format: Format,
) -> Result<(), Failure> {
    let anchors: Vec<String> = said.anchors.iter().map(Anchor::to_string).collect();
    let revoked: Vec<String> = said.revoked.iter().map(KeyId::to_string).collect();
    if format == Format::Json {
        return output::json(&serde_json::json!({
            "sequence": said.sequence, "vm_id": said.vm_id, "anchors": anchors, "revoked": revoked,
            "leaves_no_card_key": said.leaves_no_card_key, "not_after": said.not_after, "signer": signer,
            "proved": proved.unwrap_or(true),
        }));
    }
    let signed = match proved {
        Some(false) => format!("{signer}, as the document says: not checked without --trust"),
        _ => signer.to_owned(),
    };
    let of = said.vm_id.as_ref();
    let mut rows = vec![
        ["sequence".into(), said.sequence.to_string()],
        [
            "for".into(),
            of.map_or_else(
                || "every guest that trusts its signer".into(),
                VmId::to_string,
            ),
        ],
        ["not after".into(), said.not_after.to_string()],
        ["signed by".into(), signed],
    ];
    rows.extend(anchors.into_iter().map(|anchor| ["adds".into(), anchor]));
    rows.extend(revoked.into_iter().map(|id| ["revokes".into(), id]));
    if said.leaves_no_card_key {
        let text = "it may leave no key that signs cards and trust documents";
        rows.push(["last word".into(), text.into()]);
    }
    output::pairs(12, &rows)
}

fn list(kept: &[KeptTrust], format: Format) -> Result<(), Failure> {
    if format == Format::Json {
        return output::json(&kept);
    }
    if kept.is_empty() {
        return output::line("no trust documents: `adit trust apply` hands one over");
    }
    let rows: Vec<_> = kept
        .iter()
        .map(|kept| {
            let vms = match kept.vms.is_empty() {
                true => "all".into(),
                false => kept.vms.join(", "),
            };
            let (signer, given) = (kept.signer.clone(), kept.given_at.clone());
            [signer, kept.sequence.to_string(), given, vms]
        })
        .collect();
    output::table(["SIGNER", "SEQUENCE", "SINCE", "VMS"], &rows)
}

//! `adit card …`: says who a guest is, signed where the manager is.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use adit_guest_driver::trust::check_key;
use adit_names::VmId;
use adit_tasks::card::{self, Labels, TEXT_MAX};
use adit_tasks::dsse::{self, CARD_MAX, Envelope, Type};
use adit_tasks::{Anchor, Card, PublicKey, TrustStore};
use clap::{Args, Subcommand};
use jiff::{SignedDuration, Timestamp};

use crate::completion;
use crate::error::Failure;
use crate::key;
use crate::output;
use crate::text::Format;

/// How long a card is valid if nobody says otherwise.
const VALID: SignedDuration = SignedDuration::from_hours(366 * 24);

const EXAMPLE: &str = "\
Example:
  adit key new enrol.key --role card
  adit card new web-1 --labels env=prod,tier=web --sign enrol.key > web-1.card
  adit card show web-1.card --trust enrol.key.pub

A guest whose image trusts the key finds its card in /etc/adit/card, or is handed it by its platform:
  qemu … -smbios type=11,value=io.adit.card=$(adit card new web-1 --sign enrol.key --word)
  qemu … -fw_cfg name=opt/io.adit.card,file=web-1.card
  qemu … -append \"… adit.card=$(adit card new web-1 --sign enrol.key --word)\"";

#[derive(Subcommand)]
pub enum CardCommand {
    /// Sign a card, and print it
    #[command(after_help = EXAMPLE)]
    New(New),
    /// Print what a card says, and whether it is to be believed
    Show(Show),
}

#[derive(Args)]
pub struct New {
    /// Who the guest is
    #[arg(add = completion::vms())]
    vm: String,
    /// Private key to sign with; the guest needs its public half as an anchor of the role card
    #[arg(long, value_name = "KEY")]
    sign: PathBuf,
    /// What the VM is used for
    #[arg(long, value_delimiter = ',', value_name = "NAME=VALUE,…")]
    labels: Vec<String>,
    /// Counts the cards of a VM: a lower one than was seen is refused [default: seconds since 1970]
    #[arg(long, value_name = "N")]
    generation: Option<u64>,
    /// Until when it is valid, as 2027-11-21T22:00:00Z [default: a year from now]
    #[arg(long, value_name = "TIME")]
    not_after: Option<Timestamp>,
    /// Public key of the guest, if it is known: the line, or a file with it
    #[arg(long, value_name = "LINE|FILE")]
    guest_pk: Option<String>,
    /// Keys that the guest is to trust besides those of its image; they may have no role that KEY does not have there
    #[arg(long, value_name = "KEYFILE.pub", value_delimiter = ',')]
    anchors: Vec<PathBuf>,
    /// Print it as one word, for a command line
    #[arg(long)]
    word: bool,
}

#[derive(Args)]
pub struct Show {
    /// The card; `-` = standard input
    file: PathBuf,
    /// Check it against these public keys, and the clock
    #[arg(long, value_name = "KEYFILE.pub", value_delimiter = ',')]
    trust: Vec<PathBuf>,
}

pub fn run(command: &CardCommand, format: Format) -> Result<(), Failure> {
    match command {
        CardCommand::New(new) => sign(new, format),
        CardCommand::Show(show) => print(show, format),
    }
}

fn bad(what: impl Into<String>) -> Failure {
    Failure::new("bad-card", what)
}

fn sign(new: &New, format: Format) -> Result<(), Failure> {
    let vm_id = new.vm.parse::<VmId>();
    let vm_id = vm_id.map_err(|e| bad(format!("`{}` names no VM: {e}", new.vm)))?;
    let mut labels = Labels::default();
    for label in &new.labels {
        let (name, value) = label.split_once('=').ok_or_else(|| {
            bad(format!("`{label}` is no label")).help("write NAME=VALUE, as in env=prod")
        })?;
        labels.add(name, value).map_err(|e| bad(e.to_string()))?;
    }
    let now = Timestamp::now();
    // Whole seconds: somebody reads them.
    let now = Timestamp::from_second(now.as_second()).unwrap_or(now);
    let by_clock = u64::try_from(now.as_second()).unwrap_or(1);
    let not_after = match new.not_after {
        Some(at) if at <= now => {
            return Err(bad(format!("--not-after {at} is over already")));
        }
        Some(at) => at,
        None => now.saturating_add(VALID).unwrap_or(Timestamp::MAX),
    };
    let mut anchors = Vec::new();
    for file in &new.anchors {
        anchors.extend(trusted(std::slice::from_ref(file))?.anchors().cloned());
    }
    let written = Card {
        vm_id,
        generation: new.generation.unwrap_or(by_clock),
        labels,
        guest_pk: new.guest_pk.as_deref().map(guest_key).transpose()?,
        anchors,
        not_after,
    };
    let payload = written.payload();
    // What no guest would take is not signed.
    Card::parse(&payload).map_err(|e| bad(e.to_string()))?;
    let envelope = dsse::sign_as(Type::Card, &payload, &key::read(&new.sign)?);
    if envelope.len() > CARD_MAX {
        let len = envelope.len();
        return Err(bad(format!(
            "the card has {len} bytes, at most {CARD_MAX} are allowed"
        ))
        .help("leave labels or anchors out"));
    }
    let word = new.word.then(|| card::as_text(envelope.as_bytes()));
    match (word, format) {
        (Some(word), Format::Json) => output::json(&word),
        (Some(word), Format::Table) => output::line(word),
        // It is JSON.
        (None, _) => output::line(envelope),
    }
}

/// A guest's key: as a line, or in a file.
pub fn guest_key(text: &str) -> Result<PublicKey, Failure> {
    let line = match PublicKey::parse(text) {
        Ok(key) => return Ok(key.without_comment()),
        Err(_) => read(Path::new(text), 4096)?,
    };
    let line = String::from_utf8_lossy(&line);
    let key = PublicKey::parse(&line).map_err(|e| bad(format!("--guest-pk {text}: {e}")))?;
    Ok(key.without_comment())
}

/// The keys in these files.
pub fn trusted(files: &[PathBuf]) -> Result<TrustStore, Failure> {
    let mut trust = TrustStore::default();
    for file in files {
        let (keys, _) = check_key(file).map_err(|e| Failure::new("bad-key", e.to_string()))?;
        for anchor in keys.anchors() {
            let added = trust.add(anchor.clone());
            added.map_err(|e| Failure::new("bad-key", format!("{}: {e}", file.display())))?;
        }
    }
    Ok(trust)
}

/// A file, of which no more is read than this and one byte; `-`: standard input.
pub fn read(file: &Path, max: u64) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    let done = match file.to_str() {
        Some("-") => io::stdin().take(max + 1).read_to_end(&mut bytes),
        _ => File::open(file).and_then(|open| open.take(max + 1).read_to_end(&mut bytes)),
    };
    done.map_err(|e| Failure::io(&format!("cannot read {}", file.display()), &e))?;
    Ok(bytes)
}

fn print(show: &Show, format: Format) -> Result<(), Failure> {
    let text = read(&show.file, TEXT_MAX as u64 + 64)?;
    let of = |e: String| bad(format!("{}: {e}", show.file.display()));
    let envelope = card::from_text(&text).map_err(|e| of(e.to_string()))?;
    let open = Envelope::parse_as(Type::Card, &envelope).map_err(|e| of(e.to_string()))?;
    let signer = open.unverified_signer().map(|id| id.to_string());
    let signer = signer.unwrap_or_default();
    let said = Card::parse(open.unverified_payload()).map_err(|e| of(e.to_string()))?;
    let proved = if show.trust.is_empty() {
        false
    } else {
        let here = card::Here {
            vm_id: None,
            now_ms: Timestamp::now().as_millisecond(),
        };
        let proved = card::check(&envelope, &trusted(&show.trust)?, here);
        proved.map_err(|e| of(e.to_string()).help(e.remedy()))?;
        true
    };
    let anchors: Vec<String> = said.anchors.iter().map(Anchor::to_string).collect();
    let guest_pk = said.guest_pk.as_ref().map(PublicKey::to_string);
    if format == Format::Json {
        return output::json(&serde_json::json!({
            "vm_id": said.vm_id, "generation": said.generation, "labels": said.labels,
            "guest_pk": guest_pk, "anchors": anchors, "not_after": said.not_after,
            "signer": signer, "proved": proved,
        }));
    }
    let signed = match proved {
        true => signer,
        false => format!("{signer}, as the card says: not checked without --trust"),
    };
    let mut rows = vec![
        ["vm_id".into(), said.vm_id.to_string()],
        ["generation".into(), said.generation.to_string()],
        ["labels".into(), said.labels.to_string()],
        ["not after".into(), said.not_after.to_string()],
        ["signed by".into(), signed],
    ];
    rows.extend(guest_pk.map(|key| ["guest key".into(), key]));
    rows.extend(anchors.into_iter().map(|anchor| ["anchor".into(), anchor]));
    output::pairs(12, &rows)
}

//! Commands that are signed here: by a ticket alone, or on a stream that is sealed to the guest's key.

use std::io::{self, Read};
use std::path::PathBuf;
use std::time::Duration;

use adit_api::Vm;
use adit_exec::seal::Asking;
use adit_exec::{DATA_MAX, ToGuest, What};
use adit_names::VmId;
use adit_tasks::card::{self, Here};
use adit_tasks::dsse::{self, TICKET_MAX, Type};
use adit_tasks::ticket::{Content, INPUT_MAX, Input, LIFE_MAX, NONCE_LEN, Run, Verb};
use adit_tasks::{PublicKey, Ticket};
use clap::Args;
use ed25519_dalek::SigningKey;
use jiff::{SignedDuration, Timestamp};
use sha2::{Digest, Sha256};

use super::stream::{self, Stream};
use super::usage;
use crate::card::{guest_key, read, trusted};
use crate::client::Client;
use crate::error::Failure;
use crate::key;
use crate::output::duration;

/// How a command is signed.
#[derive(Args)]
pub struct Sign {
    /// Sign it with this private key; the guest needs its public half as an anchor of the role exec
    #[arg(long, value_name = "KEY")]
    pub sign: Option<PathBuf>,
    /// For how long the guest may take what is signed, at most 10m
    #[arg(long, value_parser = duration, value_name = "DURATION", default_value = "2m", requires = "sign")]
    valid: Duration,
    /// The guest's key, to which the stream is sealed: the line, or a file with it
    #[arg(
        long,
        value_name = "LINE|FILE",
        requires = "sign",
        conflicts_with = "card"
    )]
    guest_pk: Option<String>,
    /// The guest's card, which names its key and is signed by one of --trust
    #[arg(long, value_name = "FILE", requires = "trust")]
    card: Option<PathBuf>,
    /// Keys of the role card
    #[arg(
        long,
        value_name = "KEYFILE.pub",
        value_delimiter = ',',
        requires = "card"
    )]
    trust: Vec<PathBuf>,
    /// Seal to the key that aditd names, whoever's it is
    #[arg(long, requires = "sign", conflicts_with_all = ["card", "guest_pk"])]
    accept_unproved: bool,
}

fn bad(what: impl Into<String>) -> Failure {
    Failure::new("bad-ticket", what)
}

impl Sign {
    /// The key to sign with; none: nothing is signed.
    pub fn key(&self) -> Result<Option<SigningKey>, Failure> {
        self.sign.as_deref().map(key::read).transpose()
    }

    /// For how long a ticket of now is good.
    pub fn life(&self) -> Result<SignedDuration, Failure> {
        life(self.valid)
    }

    /// The key that the guest is known by.
    async fn guest(&self, client: &Client, vm: &str) -> Result<PublicKey, Failure> {
        if let Some(text) = &self.guest_pk {
            return guest_key(text);
        }
        if let Some(file) = &self.card {
            let of = |e: String| bad(format!("--card {}: {e}", file.display()));
            let text = read(file, card::TEXT_MAX as u64 + 64)?;
            let envelope = card::from_text(&text).map_err(|e| of(e.to_string()))?;
            let vm_id = vm_id(vm)?;
            let here = Here {
                vm_id: Some(&vm_id),
                now_ms: Timestamp::now().as_millisecond(),
            };
            let proved = card::check(&envelope, &trusted(&self.trust)?, here);
            let proved = proved.map_err(|e| of(e.to_string()).help(e.remedy()))?;
            return proved.card.guest_pk.ok_or_else(|| {
                of("it does not name the guest's key".into())
                    .help("sign one with `adit card new --guest-pk`")
            });
        }
        let shown: Vm = client.get(&crate::vm::path(vm)?).await?;
        let Some(found) = shown.guest_key else {
            return Err(Failure::new(
                "unproved-key",
                format!("aditd knows no key of VM `{vm}`, and none is given"),
            )
            .help("give --guest-pk: it is in the guest, `adit-guest status` shows it"));
        };
        if !self.accept_unproved {
            return Err(Failure::new(
                "unproved-key",
                format!("that the key of VM `{vm}` is {} is aditd's word alone", found.public),
            )
            .help("compare it with `adit-guest status` in the guest, and give it as --guest-pk; or give --card and --trust; or say --accept-unproved"));
        }
        guest_key(&found.public)
    }
}

/// For how long one is good, if that is not too long.
///
/// # Errors
/// It is.
pub fn life(valid: Duration) -> Result<SignedDuration, Failure> {
    let life = SignedDuration::try_from(valid).unwrap_or(SignedDuration::MAX);
    match life <= LIFE_MAX && !life.is_zero() {
        true => Ok(life),
        false => Err(usage(format!(
            "--valid is at most {} minutes: what is signed is for now",
            LIFE_MAX.as_mins()
        ))),
    }
}

fn vm_id(vm: &str) -> Result<VmId, Failure> {
    vm.parse()
        .map_err(|e| usage(format!("`{vm}` names no VM: {e}")))
}

/// A ticket for this VM, from this time on.
pub fn ticket(
    vm: &str,
    user: &str,
    verb: Verb,
    (not_before, life): (Timestamp, SignedDuration),
) -> Result<Ticket, Failure> {
    let mut nonce = [0; NONCE_LEN];
    getrandom::fill(&mut nonce)
        .map_err(|e| Failure::new("io", format!("the system gives no random numbers: {e}")))?;
    // Whole seconds: somebody reads them.
    let second = |at: Timestamp| Timestamp::from_second(at.as_second()).unwrap_or(at);
    let not_before = second(not_before);
    Ok(Ticket {
        vm_id: vm_id(vm)?,
        user: user.to_owned(),
        verb,
        not_before,
        not_after: not_before.saturating_add(life).unwrap_or(Timestamp::MAX),
        nonce,
        channel: None,
    })
}

/// Signs it.
pub fn signed(ticket: &Ticket, key: &SigningKey) -> Result<Vec<u8>, Failure> {
    let payload = ticket.payload();
    // What no guest would take is not signed.
    Ticket::parse(&payload).map_err(|e| bad(e.to_string()))?;
    let envelope = dsse::sign_as(Type::Ticket, &payload, key);
    match envelope.len() {
        len if len > TICKET_MAX => Err(bad(format!(
            "the ticket has {len} bytes, at most {TICKET_MAX} are allowed"
        ))
        .help("give what is long as input, or as a file")),
        _ => Ok(envelope.into_bytes()),
    }
}

/// Elements and variables as a ticket has them.
pub fn texts(bytes: &[Vec<u8>]) -> Result<Vec<String>, Failure> {
    let text = |one: &Vec<u8>| String::from_utf8(one.clone());
    let all: Result<_, _> = bytes.iter().map(text).collect();
    all.map_err(|_| {
        usage("what is signed is UTF-8, and an element or a variable is not")
            .help("give such names as input, or through a file")
    })
}

/// All of the input, which a ticket has a digest of.
pub fn whole(mut from: impl Read) -> Result<(Vec<u8>, Input), Failure> {
    let mut bytes = Vec::new();
    from.by_ref()
        .take(INPUT_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| Failure::io("cannot read the input", &e))?;
    let size = bytes.len() as u64;
    if size > INPUT_MAX {
        return Err(usage(format!(
            "the input has more than {} MiB, which is what a guest keeps of one that is signed as a whole",
            INPUT_MAX >> 20
        ))
        .help("give --seal: then it is sealed, and as long as you like"));
    }
    let sha256 = Sha256::digest(&bytes).into();
    Ok((bytes, Input::Bytes(Content { sha256, size })))
}

/// All of standard input.
pub fn whole_stdin() -> Result<(Vec<u8>, Input), Failure> {
    whole(io::stdin().lock())
}

/// Opens a stream for a ticket that says everything, and gives it with its input.
pub(super) async fn bring(
    client: &Client,
    ticket: &Ticket,
    envelope: Vec<u8>,
    input: &[u8],
) -> Result<Stream, Failure> {
    let Verb::Run(Run { argv, stdin, .. }) = &ticket.verb else {
        return Err(bad(format!(
            "a ticket to {} needs a sealed stream",
            ticket.verb.name()
        )));
    };
    let what = What::Run(argv.first().cloned().unwrap_or_default());
    let vm = ticket.vm_id.as_str();
    let mut stream = stream::open(client, vm, Some(&ticket.user), &what).await?;
    stream.say(&ToGuest::Ticket(envelope)).await?;
    if matches!(stdin, Input::Bytes(_)) {
        let mut offset = 0;
        for piece in input.chunks(DATA_MAX) {
            let bytes = piece.to_vec();
            stream.say(&ToGuest::Stdin { offset, bytes }).await?;
            offset += piece.len() as u64;
        }
        stream.say(&ToGuest::StdinEnd { offset }).await?;
    }
    Ok(stream)
}

/// Opens a stream that is sealed to the guest's key, with a ticket for it and for nothing else.
pub(super) async fn sealed(
    client: &Client,
    (vm, user): (&str, Option<&str>),
    verb: Verb,
    sign: &Sign,
) -> Result<Stream, Failure> {
    let key = sign.key()?.ok_or_else(|| usage("--seal needs --sign"))?;
    let life = sign.life()?;
    let guest = sign.guest(client, vm).await?;
    let what = match &verb {
        Verb::Run(run) => What::Run(run.argv.first().cloned().unwrap_or_default()),
        Verb::Attach(of) => What::Ticket(format!("attach {}", of.session)),
        Verb::End(of) => What::Ticket(format!("end {}", of.session)),
        verb => What::Ticket(verb.name().into()),
    };
    let none = |e| bad(format!("cannot seal: {e}"));
    let mut stream = stream::open(client, vm, user, &what).await?;
    let (asking, first) = Asking::new(&guest.exchange()).map_err(none)?;
    stream.say(&ToGuest::Seal(first)).await?;
    let (keys, channel) = asking.finish(&stream.handshake().await?).map_err(|_| {
        Failure::new(
            "other-key",
            format!("whoever answers for VM `{vm}` does not have the key {}: nothing was said", guest.id()),
        )
        .help("a guest that was made anew has another key: compare `adit-guest status` there with --guest-pk")
    })?;
    stream.seal(keys);
    let now = Timestamp::now();
    let ticket = Ticket {
        channel: Some(channel),
        ..ticket(vm, user.unwrap_or_default(), verb, (now, life))?
    };
    let envelope = signed(&ticket, &key)?;
    stream.say(&ToGuest::Ticket(envelope)).await?;
    Ok(stream)
}

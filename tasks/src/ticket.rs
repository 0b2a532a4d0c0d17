//! Tickets: one thing that is to be done in one guest at once, with everything that it is, signed by a key of the role `exec`. JSON in a
//! DSSE envelope of its own type, at most [`TICKET_MAX`](crate::dsse::TICKET_MAX) bytes in all.
//!
//! ```json
//! {"vm_id": "web-1", "user": "deploy",
//!  "verb": {"run": {"argv": ["/usr/bin/uptime", "-p"], "env": [["LANG", "C"]], "cwd": "/srv", "stdin": "none"}},
//!  "not_before": "2027-11-21T22:00:00Z", "not_after": "2027-11-21T22:02:00Z",
//!  "nonce": "5f0c…", "channel": "HEX(32)"}
//! ```
//! | verb | says | needs a sealed stream |
//! |---|---|---|
//! | `run` | elements, variables, directory, `tty` as `[rows, columns]`, `stdin`, `timeout_ms`, `detach` | with a terminal, or with `"stdin": "live"` |
//! | `attach` | `session` | yes |
//! | `end` | `session`, `signal` | yes |
//! | `list` | nothing | yes |
//! | `put` | `path`, `mode`, `sha256`, `size`: reserved for files | no |
//! | `get` | `path`: reserved for files | yes |
//!
//! `channel` is the hash of a sealed stream's handshake, and is there exactly where the stream is sealed: such a ticket is good for that
//! stream alone. What a ticket leaves out is at its narrowest: no variable, the user's home, no terminal, no input. All texts are UTF-8,
//! so that a person can read what is signed. An unknown or duplicate key anywhere is refused.
//!
//! | file | what |
//! |---|---|
//! | `check` | what a guest asks of a ticket before it believes it |
//! | `spent` | that each is used once |

mod check;
mod spent;

use adit_names::VmId;
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use crate::object::{self, Object};
use crate::{hex, unhex};

pub use check::{Here, Proved, TicketError, check};
pub use spent::{Change, Floor, Ledger, SPENT_MAX, Spent, SpentError};

/// Longest time for which one is valid.
pub const LIFE_MAX: SignedDuration = SignedDuration::from_mins(10);
/// How far the clocks of signer and guest may be apart.
pub const TOLERANCE: SignedDuration = SignedDuration::from_secs(60);
/// Most bytes of input that a digest stands for: the guest keeps all of it before anything runs.
pub const INPUT_MAX: u64 = 16 << 20;
/// Bytes of a nonce.
pub const NONCE_LEN: usize = 16;
/// Most bytes of a user's name, a session's id or a path.
const TEXT_MAX: usize = 4096;

/// What makes a ticket one of its own.
pub type Nonce = [u8; NONCE_LEN];

/// Why a signed text is no ticket: the fault of whoever signed it.
#[derive(Debug, thiserror::Error)]
pub enum FormError {
    /// Not the JSON that it should be; says line, column and key.
    #[error("{}", object::shown_plain(.0))]
    Json(#[source] serde_json::Error),
    /// A value is not hex of its length.
    #[error("`{0}`: must be hex, of its whole length")]
    Hex(&'static str),
    /// It ends before it begins, begins before 1970, or is valid for too long.
    #[error("it is valid from {not_before} to {not_after}, and may be for {} minutes", LIFE_MAX.as_mins())]
    Life {
        /// As it says.
        not_before: Timestamp,
        /// As it says.
        not_after: Timestamp,
    },
    /// More input than a guest keeps.
    #[error("`stdin`: has {0} bytes, at most {INPUT_MAX} are allowed")]
    Input(u64),
    /// A text that is too long, or a command without a user or a program.
    #[error("`{0}`: is empty or too long")]
    Text(&'static str),
}

/// A ticket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ticket {
    /// The guest that it is for.
    pub vm_id: VmId,
    /// As whom; empty where a session may be anybody's.
    pub user: String,
    /// What.
    pub verb: Verb,
    /// Not to be used before.
    pub not_before: Timestamp,
    /// Nor after.
    pub not_after: Timestamp,
    /// Used once.
    pub nonce: Nonce,
    /// The sealed stream that it is for.
    pub channel: Option<[u8; 32]>,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Verb {
    Run(#[serde(deserialize_with = "object::one")] Run),
    Attach(#[serde(deserialize_with = "object::one")] Attach),
    End(#[serde(deserialize_with = "object::one")] End),
    List(#[serde(deserialize_with = "object::one")] List),
    Put(#[serde(deserialize_with = "object::one")] Put),
    Get(#[serde(deserialize_with = "object::one")] Get),
}

/// A command.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// Program and arguments, element by element.
    pub argv: Vec<String>,
    /// Variables, in their order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<(String, String)>,
    /// Working directory; empty: the user's home.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub cwd: String,
    /// Rows and columns of its terminal.
    #[serde(
        default,
        deserialize_with = "size",
        skip_serializing_if = "Option::is_none"
    )]
    pub tty: Option<(u16, u16)>,
    /// What it reads.
    #[serde(default)]
    pub stdin: Input,
    /// It is ended after so long; 0: never.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub timeout_ms: u64,
    /// It goes on without a client.
    #[serde(default, skip_serializing_if = "is_no")]
    pub detach: bool,
}

/// What a command reads.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Input {
    /// Nothing.
    #[default]
    None,
    /// What comes on the stream, which is a sealed one.
    Live,
    /// Exactly this.
    Bytes(#[serde(deserialize_with = "object::one")] Content),
}

/// Bytes that a ticket stands for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Content {
    /// Hex of their digest.
    #[serde(with = "digest")]
    pub sha256: [u8; 32],
    /// How many.
    pub size: u64,
}

/// A client comes to a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attach {
    /// Its id.
    pub session: String,
}

/// A session is ended, or gets a signal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct End {
    /// Its id.
    pub session: String,
    /// Number of the signal; 0: it is ended with all that it has started.
    #[serde(default)]
    pub signal: u8,
}

/// All sessions of the user.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct List {}

/// A file goes into the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Put {
    /// Where to.
    pub path: String,
    /// Its mode.
    pub mode: u32,
    /// What is in it.
    #[serde(deserialize_with = "object::one")]
    pub content: Content,
}

/// A file comes out of the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Get {
    /// Which.
    pub path: String,
}

impl Verb {
    /// As it is written.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Run(_) => "run",
            Self::Attach(_) => "attach",
            Self::End(_) => "end",
            Self::List(_) => "list",
            Self::Put(_) => "put",
            Self::Get(_) => "get",
        }
    }

    /// What of it no ticket can bind, so that it needs a sealed stream; none: the ticket says all of it.
    pub fn unbound(&self) -> Option<&'static str> {
        match self {
            Self::Run(run) if run.tty.is_some() => Some("a terminal"),
            Self::Run(run) if run.stdin == Input::Live => Some("live input"),
            Self::Run(_) | Self::Put(_) => None,
            Self::Attach(_) => Some("attaching to a session"),
            Self::End(_) => Some("ending or signalling a session"),
            Self::List(_) => Some("the list of sessions"),
            Self::Get(_) => Some("a file that comes out of the guest"),
        }
    }
}

// serde asks for references.
#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_no(what: &bool) -> bool {
    !*what
}

/// A size where the key is there: `null` is refused.
fn size<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Option<(u16, u16)>, D::Error> {
    <(u16, u16)>::deserialize(d).map(Some)
}

mod digest {
    use serde::{Deserialize, Deserializer, Serializer, de};

    pub(super) fn serialize<S: Serializer>(digest: &[u8; 32], s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&crate::hex(digest))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<[u8; 32], D::Error> {
        let text = String::deserialize(d)?;
        crate::unhex(&text).ok_or_else(|| de::Error::custom("a digest is 64 hex digits"))
    }
}

/// As it is written.
#[derive(Serialize, Deserialize)]
#[serde(
    deny_unknown_fields,
    expecting = "a ticket: an object with the keys `vm_id`, `user`, `verb`, `not_before`, `not_after` and `nonce`"
)]
struct Written {
    vm_id: VmId,
    user: String,
    verb: Verb,
    not_before: Timestamp,
    not_after: Timestamp,
    nonce: String,
    #[serde(
        default,
        deserialize_with = "text",
        skip_serializing_if = "Option::is_none"
    )]
    channel: Option<String>,
}

/// A text where the key is there: `null` is refused.
fn text<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Option<String>, D::Error> {
    String::deserialize(d).map(Some)
}

impl Ticket {
    /// Parses a payload, signed or to be signed. That it parses says nothing about whether it is true: see [`check`].
    ///
    /// # Errors
    /// It is no ticket.
    pub fn parse(payload: &[u8]) -> Result<Self, FormError> {
        let Object(written): Object<Written> =
            serde_json::from_slice(payload).map_err(FormError::Json)?;
        let (not_before, not_after) = (written.not_before, written.not_after);
        let life = not_before.duration_until(not_after);
        let is_life = not_before.as_millisecond() >= 0 && life.is_positive() && life <= LIFE_MAX;
        if !is_life {
            return Err(FormError::Life {
                not_before,
                not_after,
            });
        }
        let channel = written.channel.as_deref().map(unhex);
        let channel = match channel {
            Some(None) => return Err(FormError::Hex("channel")),
            channel => channel.flatten(),
        };
        let ticket = Self {
            nonce: unhex(&written.nonce).ok_or(FormError::Hex("nonce"))?,
            vm_id: written.vm_id,
            user: written.user,
            verb: written.verb,
            not_before,
            not_after,
            channel,
        };
        ticket.check_texts()?;
        Ok(ticket)
    }

    fn check_texts(&self) -> Result<(), FormError> {
        let fits = |text: &str| text.len() <= TEXT_MAX;
        let is = |text: &str| !text.is_empty() && fits(text);
        let (ok, field) = match &self.verb {
            Verb::Run(run) if !is(&self.user) || !run.argv.first().is_some_and(|p| is(p)) => {
                (false, if is(&self.user) { "argv" } else { "user" })
            }
            Verb::Run(run) => (fits(&run.cwd), "cwd"),
            Verb::Attach(Attach { session }) | Verb::End(End { session, .. }) => {
                (is(session), "session")
            }
            Verb::List(_) => (true, ""),
            Verb::Put(Put { path, .. }) | Verb::Get(Get { path }) => (is(path), "path"),
        };
        if !fits(&self.user) {
            return Err(FormError::Text("user"));
        }
        if !ok {
            return Err(FormError::Text(field));
        }
        match &self.verb {
            Verb::Run(Run {
                stdin: Input::Bytes(Content { size, .. }),
                ..
            }) if *size > INPUT_MAX => Err(FormError::Input(*size)),
            _ => Ok(()),
        }
    }

    /// The bytes to sign.
    pub fn payload(&self) -> Vec<u8> {
        let written = Written {
            vm_id: self.vm_id.clone(),
            user: self.user.clone(),
            verb: self.verb.clone(),
            not_before: self.not_before,
            not_after: self.not_after,
            nonce: hex(&self.nonce),
            channel: self.channel.as_ref().map(|channel| hex(channel)),
        };
        // Texts, numbers and lists of them always serialise.
        serde_json::to_vec(&written).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests;

//! What a key takes: the check of a value, and what is said of it.

use adit_names::{ServiceName, VmId};
use adit_tasks::card::LABELS_MAX;

use crate::access::{May, Subject, subject};
use crate::config::access::{self, Address};
use crate::config::hosts::{self, Pin};
use crate::config::{ALLOW_MAX, Pattern, Trust, UidRange};
use crate::reach::Suffix;
use adit_tasks::vms::Vms;

/// What a key takes.
#[derive(Clone, Copy, Debug)]
pub(in crate::config) enum Kind {
    /// IP address and port.
    Address,
    /// An absolute path.
    Path,
    Flag,
    Number {
        min: u64,
        max: u64,
    },
    PowerOfTwo {
        max: u64,
    },
    /// A list of at most [`ALLOW_MAX`] numbers.
    Numbers {
        min: u64,
        max: u64,
    },
    Uids,
    User,
    VmName,
    /// A list of at most `max` texts.
    Texts {
        of: Texts,
        max: usize,
    },
    /// IP address and port, or `unix:` and a path.
    Listener,
    /// One of these words.
    Word(&'static [&'static str]),
    /// `VM:PORT`.
    Destination,
    /// What names may end with.
    Suffix,
    /// Digest of a key.
    Pin,
    /// A time as RFC 3339 has it.
    Time,
    /// Name of a network device.
    Device,
    /// Name of a token or a network.
    TokenName,
    /// 64 hex digits.
    Sha256,
    /// `{ NAME = "VALUE", … }`.
    Labels,
    /// A path with a name in it.
    Pattern,
    /// `"auto"`, `"vhost-user"`, `"ring"`, `{ hybrid = PATH }`, `{ vsock = { cid = N } }` or `{ auto = { hybrid = PATH } }`.
    Carrier,
}

/// Texts of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::config) enum Texts {
    /// Public keys with the role `card`.
    CardKeys,
    /// Who is granted something.
    Subjects,
    /// With which VMs.
    Vms,
    /// What.
    May,
    /// VMs that a host may claim.
    Claims,
    /// Users and groups of a host.
    Vouched,
    /// Services that guests name.
    Services,
    /// IP addresses, one of each kind.
    Addresses,
}

impl Texts {
    /// Why a text is none of them.
    pub(in crate::config) fn refuses(self, text: &str) -> Option<String> {
        fn error<T: std::str::FromStr<Err: ToString>>(text: &str) -> Option<String> {
            text.parse::<T>().err().map(|e| e.to_string())
        }
        match self {
            Self::CardKeys => {
                let why = "it takes a line as `adit key new --role card` prints it";
                Trust::card_key(text).is_none().then(|| why.to_owned())
            }
            Self::Subjects => error::<Subject>(text),
            Self::Vms => error::<Vms>(text),
            Self::May => error::<May>(text),
            Self::Claims => hosts::refuses_claim(text),
            Self::Vouched => hosts::refuses_vouched(text),
            Self::Services => match ServiceName::named(text) {
                Some(_) => None,
                None => Some("it takes names of 1 to 60 of a-z, 0-9 and inner `-`".into()),
            },
            Self::Addresses => access::refuses_address(text),
        }
    }
}

impl Kind {
    /// What it takes, and how much of it.
    pub(in crate::config) fn limit(self) -> String {
        match self {
            Self::Address => {
                "an IP address and a port in quotes, such as \"127.0.0.1:7080\"".into()
            }
            Self::Path => "an absolute path in quotes".into(),
            Self::Flag => "true or false".into(),
            Self::Number { min, max } => format!("a whole number from {min} to {max}"),
            Self::PowerOfTwo { max } => format!("a power of two from 1 to {max}"),
            Self::Numbers { min, max } => {
                format!("a list of at most {ALLOW_MAX} whole numbers from {min} to {max}")
            }
            Self::Uids => {
                "\"FIRST-LAST\": user ids from 1 to 4294967294, without 65534 (`nobody`)".into()
            }
            Self::User => "the name of a user of the host, not `root`, in quotes".into(),
            Self::VmName => "1 to 63 of a-z, 0-9 and inner `-`, in quotes".into(),
            Self::Texts { of, max } => {
                let what = match of {
                    Texts::CardKeys => "lines as `adit key new --role card` prints them",
                    Texts::Subjects => {
                        "of `user:NAME`, `group:NAME`, `token:NAME`, `cert:NAME`, `network:NAME` and `anyone`"
                    }
                    Texts::Vms => "VM names, also with one `*` in them, and of `label:NAME=VALUE`",
                    Texts::Claims => "VM names, also with one `*` in them",
                    Texts::Services => "names of 1 to 60 of a-z, 0-9 and inner `-`",
                    Texts::Vouched => "of `user:NAME` and `group:NAME`",
                    Texts::Addresses => "IP addresses of a host",
                    Texts::May => {
                        "of `reach`, `reach:PORTS` (also `svc:NAME`), `forward`, `see`, `task`, `goal`, `manage`, `exec`, `exec:USERS`, `files`, `files:/PATH` and `files:USER@/PATH`"
                    }
                };
                format!("a list of at most {max} {what}, each in quotes")
            }
            Self::Listener => {
                "an IP address and a port, or `unix:` and an absolute path, in quotes".into()
            }
            Self::Word(words) => {
                let words: Vec<_> = words.iter().map(|word| format!("\"{word}\"")).collect();
                format!("one of {}", words.join(", "))
            }
            Self::Destination => "VM:PORT in quotes".into(),
            Self::Pin => "`sha256/` with the base64 of a key's SHA-256, in quotes".into(),
            Self::Suffix => "a dot and labels of a-z, 0-9 and inner `-`, in quotes".into(),
            Self::Time => "a time in quotes, such as \"2027-01-31T00:00:00Z\"".into(),
            Self::Device => "the name of a network device in quotes, such as \"mgmt0\"".into(),
            Self::TokenName => format!(
                "1 to {} printable characters without space, quote, comma and colon, in quotes",
                subject::NAME_MAX
            ),
            Self::Sha256 => "64 of 0-9 and a-f in quotes".into(),
            Self::Carrier => {
                "\"vhost-user\", \"ring\", { hybrid = PATH }, also with `half_closes = true`, { vsock = { cid = N } }, \"auto\" or \
                 { auto = { hybrid = PATH } }; the path is absolute, and of at most 96 bytes; the CID is 3 to 4294967294"
                    .into()
            }
            Self::Pattern => {
                "a path below `dir` in quotes, of at most 4 parts and 96 characters, with `{name}` in the first one: \"{name}/v.sock\"".into()
            }
            Self::Labels => format!("at most {LABELS_MAX} names with values: {{ env = \"prod\" }}"),
        }
    }

    /// Whether the key takes this text.
    pub(in crate::config) fn takes_text(self, text: &str) -> bool {
        match self {
            Self::Address => text.parse::<std::net::SocketAddr>().is_ok(),
            Self::Path => std::path::Path::new(text).is_absolute(),
            Self::Uids => text.parse::<UidRange>().is_ok(),
            Self::User => is_user(text),
            Self::VmName => text.parse::<VmId>().is_ok(),
            Self::Listener => text.parse::<Address>().is_ok(),
            Self::Word(words) => words.contains(&text),
            Self::Carrier => ["auto", "vhost-user", "ring"].contains(&text),
            Self::Pattern => text.parse::<Pattern>().is_ok(),
            // With the suffix that is configured it is read once that is known.
            Self::Destination => access::destination(&Suffix::default(), text).is_some(),
            Self::Suffix => text.parse::<Suffix>().is_ok(),
            Self::Pin => text.parse::<Pin>().is_ok(),
            Self::Time => text.parse::<jiff::Timestamp>().is_ok(),
            Self::Device => access::is_device(text),
            Self::TokenName => subject::is_name(text),
            Self::Sha256 => {
                text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
            }
            _ => false,
        }
    }

    /// Whether the key takes this number, or has it in its list.
    pub(in crate::config) fn takes_number(self, n: u64) -> bool {
        match self {
            Self::Number { min, max } | Self::Numbers { min, max } => (min..=max).contains(&n),
            Self::PowerOfTwo { max } => n.is_power_of_two() && n <= max,
            _ => false,
        }
    }
}

/// Names of users as useradd(8) takes them.
fn is_user(text: &str) -> bool {
    let is = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"_-.".contains(&b);
    let begins = text.starts_with(|c: char| c.is_ascii_lowercase() || c == '_');
    begins && text.len() <= 32 && text.bytes().all(is) && text != "root"
}

//! Who may do what: what is decided of a caller, and the grants that say so.

use serde::{Deserialize, Serialize};

/// What is decided of a request.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccessDecision {
    /// Whether it may be done.
    pub allowed: bool,
    /// Every name of the caller that counted.
    pub caller: Vec<String>,
    /// File and line of the grant that allows it; none: it is denied, or the owner's right.
    pub by: Option<String>,
    /// Why not, in a word: `unknown-vm`, `not-granted`, `expired`, `not-listed`, `no-rule`.
    pub reason: Option<String>,
    /// The same for people.
    pub text: String,
    /// The caller is told only that there is no such VM.
    pub hidden: bool,
}

/// A grant of the configuration.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrantShown {
    /// File and line.
    pub place: String,
    /// To whom.
    pub to: Vec<String>,
    /// With which VMs.
    pub vms: Vec<String>,
    /// What may be done.
    pub may: Vec<String>,
    /// Until when; RFC 3339.
    pub until: Option<String>,
    /// Its time is over.
    pub expired: bool,
    /// Connections that each of them may open in a second; none: any number.
    // A build before does not say these.
    #[serde(default)]
    pub connections_per_s: Option<u32>,
    /// Bytes a second, each way, of each of them with one VM; none: any number.
    #[serde(default)]
    pub bytes_per_s: Option<u64>,
    /// How many times a client's share each of them has.
    #[serde(default)]
    pub weight: Option<u32>,
}

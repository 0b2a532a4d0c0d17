//! What a guest and its agent say of themselves, and what they are given: programs, trust documents, files.

use serde::{Deserialize, Serialize};

/// Which program an agent is.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// Of a program that came over the channel, 64 hex digits; none: it is the one of the guest's image.
    pub sha256: Option<String>,
    /// The oldest version that the guest takes; none: any.
    pub floor: Option<String>,
    /// The program that was to be the agent last, and is not: 64 hex digits. `fault` says why.
    pub taken_back: Option<String>,
}

/// Has an agent become another program.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentOrder {
    /// The DSSE envelope of the package, exactly as signed: JSON text.
    pub envelope: String,
}

/// An agent's answer: it follows the order.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentAnswer {
    /// It is that program already.
    pub already: bool,
    /// It waits for the end of a task that runs.
    pub waits: bool,
}

/// A card that a guest shows.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Card {
    /// Where the guest says that it found it.
    pub place: String,
    /// Which; none if it was not believed when it was shown.
    pub generation: Option<u64>,
    /// Id of the key that signed it; none as above.
    pub signer: Option<String>,
    /// RFC 3339; until when it is valid; none as above.
    pub not_after: Option<String>,
    /// Why this host does not believe it; none: it does.
    pub unproved: Option<String>,
}

/// A guest's own key.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestKey {
    /// The line of the public half.
    pub public: String,
    /// Why it may be anybody's; none: the card that is believed names it.
    pub unproved: Option<String>,
}

/// What a guest has taken of trust documents, as it says.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trust {
    /// The newest of each signer.
    pub documents: Vec<TrustTaken>,
    /// How many keys are revoked there.
    pub revoked: u32,
    /// Those that it did not take.
    pub refused: Vec<TrustRefused>,
}

/// A trust document that a guest has taken.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrustTaken {
    /// Id of the key that signed it.
    pub signer: String,
    /// It is for this VM only.
    pub own: bool,
    /// Counts the documents of a signer.
    pub sequence: u64,
}

/// A trust document that a guest has not taken.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrustRefused {
    /// Id of the key that signed it.
    pub signer: String,
    /// Which.
    pub sequence: u64,
    /// Why, in the guest's words: begins with a stable code.
    pub why: String,
}

/// A task that waits in the guest.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holding {
    /// 32 hex digits.
    pub task_id: String,
    /// RFC 3339; from when its goal is valid.
    pub valid_from: String,
    /// RFC 3339; what the guest's clock showed when it said so.
    pub guest_time: String,
}

/// What a guest says of that its time stood still: between two times that the host gave it, less went by in the guest.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoodStill {
    /// RFC 3339, by this host's clock; when it said so.
    pub at: String,
    /// For how long, ms.
    pub ms: u64,
    /// By how much it set its clock then, ms; none: it did not, because its configuration does not say so.
    pub clock_set_ms: Option<i64>,
    /// Random bytes of this host went into its random numbers: those of a guest that was restored from a snapshot are its own since.
    pub entropy_mixed: bool,
}

/// Hands a trust document over.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewTrust {
    /// The DSSE envelope, exactly as signed: JSON text.
    pub envelope: String,
    /// VMs to give it to; empty: all, also those that come, or the one that it is for.
    #[serde(default)]
    pub to: Vec<String>,
}

/// A trust document that is kept for guests.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptTrust {
    /// Id of the key that has signed it, as it says.
    pub signer: String,
    /// It is for one VM only.
    pub own: bool,
    /// Counts the documents of a signer.
    pub sequence: u64,
    /// VMs that are given it; empty: all.
    pub vms: Vec<String>,
    /// RFC 3339; since when.
    pub given_at: String,
}

/// Most bytes of a file that one request brings.
pub const PIECE_MAX: usize = 512 << 10;

/// A file that aditd has for VMs.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blob {
    /// 64 hex digits.
    pub sha256: String,
    /// Bytes that are here, from its start.
    pub bytes: u64,
    /// Bytes that it will have; none: nothing is here.
    pub size: Option<u64>,
    /// All of it is here, and has that digest.
    pub whole: bool,
}

/// A file on its way into a guest.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transfer {
    /// 64 hex digits.
    pub sha256: String,
    /// Bytes that the guest has or that are on their way.
    pub sent: u64,
    /// Bytes of the file.
    pub size: u64,
    /// The guest has all of it, on its disk.
    pub kept: bool,
}

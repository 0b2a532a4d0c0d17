//! What happens on a host, as `adit events` follows it.

use serde::{Deserialize, Serialize};

/// What kind of event it is.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HostEventKind {
    /// Events are missing here: `count` says how many, where that is known.
    #[default]
    Gap,
    /// aditd serves.
    Started,
    /// There is one more VM.
    VmAdded,
    /// A VM is no more.
    VmRemoved,
    /// A VM is locked; `text` says why, and who did it.
    VmLocked,
    /// A VM is open again.
    VmUnlocked,
    /// A VM is in another `state`, see [`VmState`](crate::VmState).
    VmState,
    /// A task is in another `state`, see [`TaskState`](crate::TaskState).
    Task,
    /// The configuration was read again and applied.
    ConfigReloaded,
    /// The configuration was read again and refused; `text` says why.
    ConfigRefused,
    /// Who may do what has changed.
    GrantsChanged,
    /// So many requests were denied since the last such event; the audit says which.
    Denied,
    /// So many tunnels were broken off because their grant is gone.
    TunnelsCut,
    /// A kind that this build does not know.
    #[serde(other)]
    Other,
}

impl HostEventKind {
    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Gap => "gap",
            Self::Started => "started",
            Self::VmAdded => "vm-added",
            Self::VmRemoved => "vm-removed",
            Self::VmLocked => "vm-locked",
            Self::VmUnlocked => "vm-unlocked",
            Self::VmState => "vm-state",
            Self::Task => "task",
            Self::ConfigReloaded => "config-reloaded",
            Self::ConfigRefused => "config-refused",
            Self::GrantsChanged => "grants-changed",
            Self::Denied => "denied",
            Self::TunnelsCut => "tunnels-cut",
            Self::Other => "other",
        }
    }
}

/// Something that has happened on a host.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostEvent {
    /// To be given as `since`, for what comes behind it.
    pub cursor: String,
    /// RFC 3339; when.
    pub at: String,
    /// What.
    pub kind: HostEventKind,
    /// Of which VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
    /// The new state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<String>,
    /// Of which task.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task: Option<String>,
    /// Of which goal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub goal: Option<String>,
    /// How many.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub count: Option<u64>,
    /// For people; may be empty.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub text: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kinds_name_is_the_same_in_json_and_in_lists_and_an_unknown_one_is_another() {
        for kind in [
            HostEventKind::Gap,
            HostEventKind::Started,
            HostEventKind::VmAdded,
            HostEventKind::VmRemoved,
            HostEventKind::VmLocked,
            HostEventKind::VmUnlocked,
            HostEventKind::VmState,
            HostEventKind::Task,
            HostEventKind::ConfigReloaded,
            HostEventKind::ConfigRefused,
            HostEventKind::GrantsChanged,
            HostEventKind::Denied,
            HostEventKind::TunnelsCut,
        ] {
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.name());
        }
        let later: HostEventKind = serde_json::from_str("\"moon-rises\"").unwrap();
        assert_eq!(later, HostEventKind::Other);
    }
}

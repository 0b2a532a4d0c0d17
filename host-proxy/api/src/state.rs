//! States of VMs and of tasks. Each has its name here and nowhere else: in JSON, in lists, on the command line, in aditd's
//! database.

use adit_tasks::wire::Outcome;
use serde::{Deserialize, Serialize};

macro_rules! states {
    ($(#[$doc:meta])* $type:ident { $($(#[$of:meta])* $state:ident = $name:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum $type {
            $($(#[$of])* #[serde(rename = $name)] $state,)*
        }

        impl $type {
            /// All of them, in the order in which they are usually taken.
            pub const ALL: [Self; [$($name),*].len()] = [$(Self::$state),*];

            /// Its name.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$state => $name,)*
                }
            }

            /// The state of a name.
            pub fn from_name(name: &str) -> Option<Self> {
                Self::ALL.into_iter().find(|state| state.name() == name)
            }
        }

        #[cfg(feature = "openapi")]
        impl utoipa::PartialSchema for $type {
            fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::Schema> {
                crate::openapi::names([$($name),*])
            }
        }

        #[cfg(feature = "openapi")]
        impl utoipa::ToSchema for $type {}

        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.name())
            }
        }
    };
}

states! {
    /// State of a VM's channel.
    VmState {
        /// The port process does not run (yet).
        Down = "down",
        /// The port process waits for a VMM or for the guest's driver, or the VM is paused.
        Waiting = "waiting",
        /// The guest's driver runs; no agent has spoken yet.
        Up = "up",
        /// The agent is connected.
        Ready = "ready",
        /// The VMM is connected to a port process that is no more, and no other can go on with it: the VM has no channel until
        /// it is power-cycled. `fault` says why.
        PowerCycle = "power-cycle",
    }
}

states! {
    /// State of a task on the host.
    TaskState {
        /// Waits in the queue of its VM.
        Queued = "queued",
        /// Handed to the guest.
        Leased = "leased",
        /// The guest said that it began.
        Started = "started",
        /// Terminal: success.
        Done = "done",
        /// Terminal: ran and failed.
        Failed = "failed",
        /// Terminal: killed at its deadline.
        TimedOut = "timed_out",
        /// Terminal: cut off, not run again.
        Interrupted = "interrupted",
        /// Terminal: the guest would not run it.
        Refused = "refused",
        /// Terminal: an earlier step did not succeed.
        Skipped = "skipped",
        /// Terminal: its goal's `not_after` passed before it began.
        Expired = "expired",
        /// Terminal: it was handed out, and nothing can be heard of it any more.
        LostContact = "lost_contact",
    }
}

impl TaskState {
    /// True for a state that never changes again.
    pub fn is_terminal(self) -> bool {
        !matches!(self, Self::Queued | Self::Leased | Self::Started)
    }
}

impl From<Outcome> for TaskState {
    fn from(o: Outcome) -> Self {
        match o {
            Outcome::Done => Self::Done,
            Outcome::Failed => Self::Failed,
            Outcome::TimedOut => Self::TimedOut,
            Outcome::Interrupted => Self::Interrupted,
            Outcome::Refused => Self::Refused,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_states_name_is_the_same_in_json_and_in_lists() {
        for state in TaskState::ALL {
            let json = serde_json::to_value(state).unwrap();
            assert_eq!(json, state.name());
            assert_eq!(TaskState::from_name(state.name()), Some(state));
            assert_eq!(serde_json::from_value::<TaskState>(json).unwrap(), state);
        }
        for state in VmState::ALL {
            assert_eq!(serde_json::to_value(state).unwrap(), state.name());
        }
        assert_eq!(TaskState::from_name("Queued"), None);
    }
}

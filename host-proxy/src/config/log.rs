//! `[log]` and `[audit]`: what is written of requests, tunnels and decisions.

use serde::{Deserialize, Serialize};

/// Where the access log goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AccessLog {
    /// There is none.
    #[default]
    Off,
    /// To standard error, with the log.
    Journal,
    /// Into `aditd.access` in state_dir.
    File,
}

/// Names of [`AccessLog`].
pub const ACCESS_LOGS: [&str; 3] = ["off", "journal", "file"];

/// `[log]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// A line for each request and tunnel.
    pub access: AccessLog,
}

/// `[audit]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AuditConfig {
    /// Also what is allowed.
    pub allows: bool,
}

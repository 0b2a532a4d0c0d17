//! Goals: what a manager signs. JSON only, parsed strictly: an unknown or duplicate key anywhere is an error with line
//! and column, because two readers that skip different things would see two goals (R87).
//!
//! ```json
//! {"goal_id": "0198…", "key_seq": 1763675000000000, "audience": {"vms": ["web-1"]},
//!  "not_before": "2026-11-20T22:00:00Z", "not_after": "2026-11-21T22:00:00Z", "min_planner": 1,
//!  "steps": [{"id": "hello", "script": {"interpreter": "/bin/sh", "script": "echo hi\n"}},
//!            {"id": "motd", "file": {"path": "/etc/motd", "content": "hi\n"}}]}
//! ```
//! `key_seq` grows with every goal of a key; a guest refuses one that is lower than it has seen (see `admit`).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use adit_names::VmId;
use jiff::Timestamp;
use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use uuid::Uuid;

use crate::dsse::Verified;
use crate::object::{self, Object};
use crate::principal::Principal;

/// The planner that this build has.
pub const PLANNER: u16 = 1;
/// Most steps of a goal.
pub const STEPS_MAX: usize = 64;
/// Most VMs that a goal names.
pub const AUDIENCE_MAX: usize = 4096;
/// Most arguments of a script.
pub const ARGS_MAX: usize = 256;
/// Most environment variables of a script.
pub const ENV_MAX: usize = 256;
/// Longest that a script may run, seconds.
pub const TIMEOUT_MAX_S: u32 = 86_400;
/// Most bytes kept of each output stream.
pub const OUTPUT_CAP_MAX: u32 = 256 << 10;

/// What a mode must be.
pub(crate) const MODE_FORM: &str =
    "must be octal digits in quotes, such as \"0644\" or \"02775\", up to \"07777\"";

/// Why text is no goal: the fault of whoever wrote it.
#[derive(Debug, thiserror::Error)]
pub enum GoalError {
    /// Not the JSON that it should be; says line, column and key.
    #[error("{}", object::shown_plain(.0))]
    Json(#[source] serde_json::Error),
    /// A value that has the right type and cannot be used.
    #[error("`{key}`: {why}")]
    Value {
        /// Path of the key, for example `steps[2].file.path`.
        key: String,
        /// What is wrong with it.
        why: String,
    },
    /// Made for a newer planner.
    #[error("the goal needs planner {needs}, and this one is {PLANNER}: update adit")]
    Planner {
        /// What it needs.
        needs: u16,
    },
}

/// A goal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    deny_unknown_fields,
    expecting = "a goal: a mapping with the key `steps`"
)]
pub struct Goal {
    /// Names it.
    pub goal_id: Uuid,
    /// Counts the goals of its key.
    pub key_seq: u64,
    /// The VMs that it is for.
    #[serde(deserialize_with = "object::one")]
    pub audience: Audience,
    /// Not to be started before.
    pub not_before: Timestamp,
    /// Not to be started after.
    pub not_after: Timestamp,
    /// Lowest planner that understands it.
    pub min_planner: u16,
    /// What is to be done, in order.
    #[serde(deserialize_with = "object::list")]
    pub steps: Vec<Step>,
}

/// The VMs that a goal is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    deny_unknown_fields,
    expecting = "an audience: a mapping with the key `vms`"
)]
pub struct Audience {
    /// Ids of VMs.
    pub vms: Vec<VmId>,
}

/// One step: exactly one of `script` and `file`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    deny_unknown_fields,
    expecting = "a step: a mapping with the key `id`, and `script` or `file`"
)]
pub struct Step {
    /// Names it within its goal: `[a-z0-9_-]`, 1 to 64 bytes.
    pub id: String,
    /// Run a program.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "object::some"
    )]
    pub script: Option<Script>,
    /// Write a file.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "object::some"
    )]
    pub file: Option<FileStep>,
    /// May be run again after it was cut off.
    #[serde(default, skip_serializing_if = "is_false")]
    pub idempotent: bool,
    /// Later steps run even if this one does not succeed.
    #[serde(default, skip_serializing_if = "is_false")]
    pub continue_on_error: bool,
}

/// A checked step's work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work<'a> {
    /// Run a program.
    Script(&'a Script),
    /// Write a file.
    File(&'a FileStep),
}

impl Step {
    /// What there is to do; `None` cannot happen in a goal that was parsed.
    pub fn work(&self) -> Option<Work<'_>> {
        match (&self.script, &self.file) {
            (Some(s), None) => Some(Work::Script(s)),
            (None, Some(f)) => Some(Work::File(f)),
            _ => None,
        }
    }
}

/// A program to run: `interpreter SCRIPT-FILE args…`, never through a shell of ours. The text is a temporary file that only
/// the script's user can read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    deny_unknown_fields,
    expecting = "a script: a mapping with the keys `interpreter` and `script`"
)]
pub struct Script {
    /// Absolute path of the program that reads the text.
    pub interpreter: String,
    /// The text.
    pub script: String,
    /// Arguments, each passed byte for byte.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<String>,
    /// The whole environment besides PATH, HOME, USER and LANG.
    #[serde(
        default,
        skip_serializing_if = "BTreeMap::is_empty",
        deserialize_with = "unique_map"
    )]
    pub env: BTreeMap<String, String>,
    /// Working directory.
    #[serde(default = "root_dir")]
    pub cwd: String,
    /// User that it runs as.
    #[serde(default = "root_user")]
    pub run_as: String,
    /// Seconds until the whole process tree is killed.
    #[serde(default = "timeout_s")]
    pub timeout_s: u32,
    /// Exit statuses that mean success.
    #[serde(default = "success_codes")]
    pub success_codes: Vec<i32>,
    /// Bytes kept of each output stream: the first half and the last half.
    #[serde(default = "output_cap")]
    pub output_cap: u32,
}

/// A file to write: whole, atomically.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    deny_unknown_fields,
    expecting = "a file: a mapping with the keys `path` and `content`"
)]
pub struct FileStep {
    /// Absolute path under a root that the guest allows; no symbolic link on the way is followed.
    pub path: String,
    /// Content as text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    /// Content as base64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content_base64: Option<String>,
    /// Mode as octal text, up to 7777, with `0` or `0o` before it or nothing.
    #[serde(default = "mode")]
    pub mode: String,
    /// Owner by name or number (see [`Principal`]).
    #[serde(default = "root_user")]
    pub owner: String,
    /// Group by name or number.
    #[serde(default = "root_user")]
    pub group: String,
}

impl FileStep {
    /// The bytes to write; `None` cannot happen in a goal that was parsed.
    pub fn bytes(&self) -> Option<Vec<u8>> {
        use base64::Engine as _;
        match (&self.content, &self.content_base64) {
            (Some(text), None) => Some(text.clone().into_bytes()),
            (None, Some(b)) => base64::engine::general_purpose::STANDARD.decode(b).ok(),
            _ => None,
        }
    }

    /// The mode bits, of three or four octal digits with `0` or `0o` before them or nothing; `None` cannot happen in a goal that was parsed.
    pub fn mode_bits(&self) -> Option<u32> {
        let octal = |digits: &str| {
            let plain =
                (3..=4).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_digit());
            plain.then(|| u32::from_str_radix(digits, 8).ok())?
        };
        let marked = self.mode.strip_prefix("0o").or(self.mode.strip_prefix('0'));
        octal(&self.mode).or_else(|| octal(marked?))
    }
}

fn is_false(b: &bool) -> bool {
    !*b
}
fn root_dir() -> String {
    "/".into()
}
fn root_user() -> String {
    "root".into()
}
fn timeout_s() -> u32 {
    60
}
fn success_codes() -> Vec<i32> {
    vec![0]
}
fn output_cap() -> u32 {
    64 << 10
}
fn mode() -> String {
    "0644".into()
}

impl Goal {
    /// Parses the payload that a trusted key has signed.
    ///
    /// # Errors
    /// It is no goal.
    pub fn from_verified(v: &Verified) -> Result<Self, GoalError> {
        Self::parse_unverified(v.payload())
    }

    /// Parses a payload that is not verified: to plan from on the host, never to act on.
    ///
    /// # Errors
    /// It is no goal.
    pub fn parse_unverified(payload: &[u8]) -> Result<Self, GoalError> {
        let Object(goal): Object<Self> =
            serde_json::from_slice(payload).map_err(GoalError::Json)?;
        if goal.min_planner > PLANNER {
            return Err(GoalError::Planner {
                needs: goal.min_planner,
            });
        }
        goal.check()?;
        Ok(goal)
    }

    /// The step of this id.
    pub fn step(&self, id: &str) -> Option<&Step> {
        self.steps.iter().find(|s| s.id == id)
    }

    fn check(&self) -> Result<(), GoalError> {
        let vms = &self.audience.vms;
        if vms.is_empty() || vms.len() > AUDIENCE_MAX {
            return bad(
                "audience.vms",
                format!("has {} VMs, 1 to {AUDIENCE_MAX} are allowed", vms.len()),
            );
        }
        let mut named = BTreeSet::new();
        if let Some(twice) = vms.iter().find(|vm| !named.insert(*vm)) {
            return bad("audience.vms", format!("`{twice}` is named twice"));
        }
        if self.not_after <= self.not_before {
            return bad("not_after", "must be later than not_before");
        }
        check_steps(&self.steps)
    }
}

/// Checks what types cannot express.
pub(crate) fn check_steps(steps: &[Step]) -> Result<(), GoalError> {
    if steps.is_empty() || steps.len() > STEPS_MAX {
        return bad(
            "steps",
            format!("has {} steps, 1 to {STEPS_MAX} are allowed", steps.len()),
        );
    }
    let mut ids = BTreeSet::new();
    for (i, step) in steps.iter().enumerate() {
        let at = |key: &str| format!("steps[{i}].{key}");
        let id_ok = |b: u8| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-');
        if step.id.is_empty() || step.id.len() > 64 || !step.id.bytes().all(id_ok) {
            return bad(&at("id"), "must be 1 to 64 of a-z, 0-9, _ and -");
        }
        if !ids.insert(&step.id) {
            return bad(
                &at("id"),
                format!("`{}` is the id of an earlier step, too", step.id),
            );
        }
        match step.work() {
            Some(Work::Script(s)) => check_script(s, &at)?,
            Some(Work::File(f)) => check_file(f, &at)?,
            None => {
                return bad(
                    &format!("steps[{i}]"),
                    "must have exactly one of `script` and `file`",
                );
            }
        }
    }
    Ok(())
}

fn check_script(s: &Script, at: &dyn Fn(&str) -> String) -> Result<(), GoalError> {
    let at = |key: &str| at(&format!("script.{key}"));
    absolute(&s.interpreter, &at("interpreter"))?;
    absolute(&s.cwd, &at("cwd"))?;
    no_nul(&s.run_as, &at("run_as"))?;
    if s.args.len() > ARGS_MAX {
        return bad(
            &at("args"),
            format!("has {}, at most {ARGS_MAX} are allowed", s.args.len()),
        );
    }
    s.args.iter().try_for_each(|a| no_nul(a, &at("args")))?;
    if s.env.len() > ENV_MAX {
        return bad(
            &at("env"),
            format!("has {}, at most {ENV_MAX} are allowed", s.env.len()),
        );
    }
    for (name, value) in &s.env {
        no_nul(value, &at("env"))?;
        let first_ok = name
            .bytes()
            .next()
            .is_some_and(|b| b.is_ascii_alphabetic() || b == b'_');
        if !first_ok || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
            return bad(
                &at("env"),
                format!("`{}` is not a variable name", adit_names::escape(name)),
            );
        }
    }
    if s.timeout_s == 0 || s.timeout_s > TIMEOUT_MAX_S {
        return bad(&at("timeout_s"), format!("must be 1 to {TIMEOUT_MAX_S}"));
    }
    if s.success_codes.is_empty() || s.success_codes.len() > 256 {
        return bad(&at("success_codes"), "must have 1 to 256 codes");
    }
    if s.output_cap > OUTPUT_CAP_MAX {
        return bad(
            &at("output_cap"),
            format!("must be at most {OUTPUT_CAP_MAX}"),
        );
    }
    Ok(())
}

fn check_file(f: &FileStep, at: &dyn Fn(&str) -> String) -> Result<(), GoalError> {
    let at = |key: &str| at(&format!("file.{key}"));
    absolute(&f.path, &at("path"))?;
    for (key, text) in [("owner", &f.owner), ("group", &f.group)] {
        if Principal::parse(text).is_none() {
            return bad(
                &at(key),
                format!("must be a name, or a number from 0 to {}", u32::MAX - 1),
            );
        }
    }
    if f.path.split('/').any(|part| part == ".." || part == ".") {
        return bad(&at("path"), "must not have `.` or `..` in it");
    }
    if f.path.ends_with('/') {
        return bad(&at("path"), "must name a file, not a directory");
    }
    if f.mode_bits().is_none() {
        return bad(&at("mode"), MODE_FORM);
    }
    if f.content.is_some() == f.content_base64.is_some() {
        return bad(
            &at("content"),
            "must have exactly one of `content` and `content_base64`",
        );
    }
    if f.bytes().is_none() {
        return bad(&at("content_base64"), "is not (padded, canonical) base64");
    }
    Ok(())
}

fn absolute(path: &str, key: &str) -> Result<(), GoalError> {
    no_nul(path, key)?;
    match path.starts_with('/') {
        true => Ok(()),
        false => bad(key, "must be an absolute path"),
    }
}

fn no_nul(text: &str, key: &str) -> Result<(), GoalError> {
    match text.contains('\0') {
        true => bad(key, "must not have a NUL byte"),
        false => Ok(()),
    }
}

fn bad<T>(key: &str, why: impl Into<String>) -> Result<T, GoalError> {
    Err(GoalError::Value {
        key: key.into(),
        why: why.into(),
    })
}

/// A map in which no key comes twice (serde's own keeps the last).
fn unique_map<'de, D: Deserializer<'de>>(d: D) -> Result<BTreeMap<String, String>, D::Error> {
    struct Unique;
    impl<'de> Visitor<'de> for Unique {
        type Value = BTreeMap<String, String>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a map of text to text")
        }
        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut out = BTreeMap::new();
            while let Some((key, value)) = map.next_entry::<String, String>()? {
                if out.len() > ENV_MAX {
                    return Err(A::Error::custom(format!("more than {ENV_MAX} entries")));
                }
                if out.contains_key(&key) {
                    return Err(A::Error::custom(format!(
                        "`{}` is given twice",
                        adit_names::escape(&key)
                    )));
                }
                out.insert(key, value);
            }
            Ok(out)
        }
    }
    d.deserialize_map(Unique)
}

#[cfg(test)]
pub(crate) mod tests;

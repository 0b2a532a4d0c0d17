//! `script`: a program to run.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::{Form, Unusable, absolute, no_nul, root_user};
use crate::goal::{OUTPUT_CAP_MAX, TIMEOUT_MAX_S};

/// Most arguments of a script.
pub const ARGS_MAX: usize = 256;
/// Most environment variables of a script.
pub const ENV_MAX: usize = 256;
/// Most exit statuses that mean success.
const CODES_MAX: usize = 256;

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

fn root_dir() -> String {
    "/".into()
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

impl Form for Script {
    fn check(&self) -> Result<(), Unusable> {
        let bad = Unusable::because::<()>;
        absolute(&self.interpreter, "interpreter")?;
        absolute(&self.cwd, "cwd")?;
        no_nul(&self.run_as, "run_as")?;
        let count = self.args.len();
        if count > ARGS_MAX {
            bad(
                "args",
                format!("has {count}, at most {ARGS_MAX} are allowed"),
            )?;
        }
        self.args.iter().try_for_each(|a| no_nul(a, "args"))?;
        let count = self.env.len();
        if count > ENV_MAX {
            bad("env", format!("has {count}, at most {ENV_MAX} are allowed"))?;
        }
        for (name, value) in &self.env {
            no_nul(value, "env")?;
            let first_ok = name
                .bytes()
                .next()
                .is_some_and(|b| b.is_ascii_alphabetic() || b == b'_');
            if !first_ok || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
                let name = adit_names::escape(name);
                bad("env", format!("`{name}` is not a variable name"))?;
            }
        }
        if self.timeout_s == 0 || self.timeout_s > TIMEOUT_MAX_S {
            bad("timeout_s", format!("must be 1 to {TIMEOUT_MAX_S}"))?;
        }
        if self.success_codes.is_empty() || self.success_codes.len() > CODES_MAX {
            let why = format!("must have 1 to {CODES_MAX} codes");
            bad("success_codes", why)?;
        }
        if self.output_cap > OUTPUT_CAP_MAX {
            bad("output_cap", format!("must be at most {OUTPUT_CAP_MAX}"))?;
        }
        Ok(())
    }

    fn output_cap(&self) -> u32 {
        self.output_cap
    }
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

//! `file`: a file to write.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize};

use super::{Form, Unusable, absolute, root_user};
use crate::principal::Principal;

/// What a mode must be.
const MODE_FORM: &str =
    "must be octal digits in quotes, such as \"0644\" or \"02775\", up to \"07777\"";
/// Most bytes that are kept of each output stream: it runs nothing, and says a word or two.
const OUTPUT_CAP: u32 = 4096;

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

fn mode() -> String {
    "0644".into()
}

impl FileStep {
    /// The bytes to write; `None` cannot happen in a goal that was parsed.
    pub fn bytes(&self) -> Option<Vec<u8>> {
        match (&self.content, &self.content_base64) {
            (Some(text), None) => Some(text.clone().into_bytes()),
            (None, Some(b)) => BASE64.decode(b).ok(),
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

impl Form for FileStep {
    const OCTAL: &'static [(&'static str, &'static str)] = &[("mode", MODE_FORM)];

    fn check(&self) -> Result<(), Unusable> {
        let bad = Unusable::because::<()>;
        absolute(&self.path, "path")?;
        for (key, text) in [("owner", &self.owner), ("group", &self.group)] {
            if Principal::parse(text).is_none() {
                let last = u32::MAX - 1;
                bad(key, format!("must be a name, or a number from 0 to {last}"))?;
            }
        }
        if self.path.split('/').any(|part| part == ".." || part == ".") {
            bad("path", "must not have `.` or `..` in it".into())?;
        }
        if self.path.ends_with('/') {
            bad("path", "must name a file, not a directory".into())?;
        }
        if self.mode_bits().is_none() {
            bad("mode", MODE_FORM.into())?;
        }
        if self.content.is_some() == self.content_base64.is_some() {
            let why = "must have exactly one of `content` and `content_base64`";
            bad("content", why.into())?;
        }
        if self.bytes().is_none() {
            let why = "is not (padded, canonical) base64";
            bad("content_base64", why.into())?;
        }
        Ok(())
    }

    fn output_cap(&self) -> u32 {
        OUTPUT_CAP
    }
}

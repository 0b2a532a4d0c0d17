//! Labels: what a VM is used for, as names with values. They are shown, and goals may come to be chosen by them, so each has one
//! spelling.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

/// Most labels of a card.
pub const LABELS_MAX: usize = 16;
/// Most bytes of a label's name, and of its value.
const PART_MAX: usize = 63;

/// Why a text is no label.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LabelError {
    /// Not a name.
    #[error(
        "`{0}` is no name of a label: it takes 1 to {PART_MAX} of a-z, 0-9, `.`, `_`, `-` and `/`, the first a letter"
    )]
    Name(String),
    /// Not a value.
    #[error(
        "`{0}` is no value of a label: it takes 1 to {PART_MAX} of a-z, A-Z, 0-9, `.`, `_` and `-`"
    )]
    Value(String),
    /// A name that is there already.
    #[error("the label `{0}` is given twice")]
    Twice(String),
    /// More than [`LABELS_MAX`].
    #[error("more than {LABELS_MAX} labels")]
    TooMany,
}

/// Names and values, at most [`LABELS_MAX`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Labels(BTreeMap<String, String>);

impl Labels {
    /// Adds one.
    ///
    /// # Errors
    /// It is no label, is there already, or is one too many.
    pub fn add(&mut self, name: &str, value: &str) -> Result<(), LabelError> {
        let shown = |text: &str| adit_names::escape(text).at_most(PART_MAX).to_string();
        let fits = |text: &str| (1..=PART_MAX).contains(&text.len());
        let of_name = |b: u8| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-' | b'/');
        let of_value = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        let begins_well = name.starts_with(|c: char| c.is_ascii_lowercase());
        if !fits(name) || !begins_well || !name.bytes().all(of_name) {
            return Err(LabelError::Name(shown(name)));
        }
        if !fits(value) || !value.bytes().all(of_value) {
            return Err(LabelError::Value(shown(value)));
        }
        if self.0.contains_key(name) {
            return Err(LabelError::Twice(name.to_owned()));
        }
        if self.0.len() == LABELS_MAX {
            return Err(LabelError::TooMany);
        }
        self.0.insert(name.to_owned(), value.to_owned());
        Ok(())
    }

    /// All of them, by name.
    pub fn as_map(&self) -> &BTreeMap<String, String> {
        &self.0
    }
}

/// `env=prod, tier=web`.
impl fmt::Display for Labels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pairs: Vec<_> = self.0.iter().map(|(n, v)| format!("{n}={v}")).collect();
        f.write_str(&pairs.join(", "))
    }
}

impl<'de> Deserialize<'de> for Labels {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = Labels;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("labels: an object of names and texts")
            }
            // A map of the standard library would keep the last of two.
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Labels, A::Error> {
                let mut labels = Labels::default();
                while let Some((name, value)) = map.next_entry::<String, String>()? {
                    labels.add(&name, &value).map_err(A::Error::custom)?;
                }
                Ok(labels)
            }
        }
        d.deserialize_map(Pairs)
    }
}

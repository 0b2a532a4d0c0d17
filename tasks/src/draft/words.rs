//! What the YAML parser says, in words of a goal: its own texts name types and options of a program.

use std::borrow::Cow;

use serde_saphyr::{Error, MessageFormatter, UserMessageFormatter};

use crate::object::plain;

/// Says what is wrong with a draft.
pub(super) struct Words;

impl MessageFormatter for Words {
    fn format_message<'a>(&self, e: &'a Error) -> Cow<'a, str> {
        let found = |expected: &str, found: &str| format!("expected {expected}, found {found}");
        let text = match e {
            Error::DuplicateMappingKey { key: Some(key), .. } => format!("`{key}` is there twice"),
            Error::DuplicateMappingKey { .. } => "a key is there twice".into(),
            Error::SerdeUnknownField {
                field, expected, ..
            } => format!("there is no key `{field}` here, only {}", listed(expected)),
            Error::SerdeMissingField { field, .. } => format!("`{field}` is missing"),
            Error::SerdeInvalidType {
                unexpected,
                expected,
                ..
            }
            | Error::SerdeInvalidValue {
                unexpected,
                expected,
                ..
            } => found(expected, unexpected),
            Error::InvalidScalar { ty, .. } => format!("expected {}", kind(ty)),
            Error::Unexpected { expected, .. } => format!("expected {}", node(expected)),
            Error::NullIntoString { .. } => found("text", "nothing"),
            Error::Eof { .. } => "the text ends where more is expected".into(),
            Error::MultipleDocuments { .. } => {
                "a second document begins here, and a file is one goal".into()
            }
            Error::RecursiveReferencesRequireWeakTypes { .. } => {
                "a value must not contain itself".into()
            }
            Error::Budget { .. }
            | Error::AliasReplayLimitExceeded { .. }
            | Error::AliasExpansionLimitExceeded { .. }
            | Error::AliasReplayStackDepthExceeded { .. } => "the text is too large or too deep".into(),
            _ => UserMessageFormatter.format_message(e).into_owned(),
        };
        Cow::Owned(plain(&text))
    }
}

fn listed(keys: &[&str]) -> String {
    let keys: Vec<String> = keys.iter().map(|key| format!("`{key}`")).collect();
    keys.join(", ")
}

/// A part of a YAML text as what is to be written.
fn node(part: &str) -> &str {
    match part {
        part if part.contains("sequence") => "a list",
        part if part.contains("map") => "keys with values",
        part if part.contains("scalar") || part.contains("string") => "a single value",
        part => part,
    }
}

/// A type's name as what is to be written.
fn kind(ty: &str) -> &str {
    match ty {
        "bool" => "true or false",
        ty if ty.starts_with('f') => "a number",
        ty if ty.starts_with(['i', 'u']) => "a whole number that is not too large",
        ty => ty,
    }
}

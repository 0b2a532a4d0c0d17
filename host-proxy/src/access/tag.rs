//! What is noted of a tunnel's caller where the tunnel is, so that it can be judged again: also by the next `aditd`.
//!
//! Groups are not noted: the host's user database has them as they are then.

use adit_port::control::{TAG_MAX, Target};
use serde::{Deserialize, Serialize};

use super::caller::Caller;
use super::subject::Subject;

/// A tunnel's caller and target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tag {
    /// Names that the caller has proved, the most telling first.
    #[serde(rename = "c")]
    caller: Vec<String>,
    /// Where it came from.
    #[serde(rename = "f")]
    from: String,
    /// What it reached.
    #[serde(rename = "t")]
    target: Target,
}

impl Tag {
    /// Of a caller who may reach this. None: it is the owner's, which is nobody's to end.
    pub fn of(caller: &Caller, target: &Target) -> Option<Vec<u8>> {
        if caller.is_owner() {
            return None;
        }
        let names = caller.subjects().iter();
        let names = names.filter(|name| !matches!(name, Subject::Group(_) | Subject::Anyone));
        let mut tag = Self {
            caller: names.map(ToString::to_string).collect(),
            from: caller.from().into(),
            target: target.clone(),
        };
        loop {
            match serde_json::to_vec(&tag) {
                Ok(bytes) if bytes.len() <= TAG_MAX => return Some(bytes),
                // With fewer names less is granted, so that nothing is left open that should not be.
                Ok(_) if tag.caller.pop().is_some() => {}
                _ => return None,
            }
        }
    }

    /// Reads one.
    pub fn read(bytes: &[u8]) -> Option<Self> {
        serde_json::from_slice(bytes).ok()
    }

    /// What was reached.
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// Number of the user behind it, if that was known.
    pub fn uid(&self) -> Option<u32> {
        let mut numbers = self
            .caller
            .iter()
            .filter_map(|name| name.strip_prefix("user:"));
        numbers.find_map(|number| number.parse().ok())
    }

    /// The caller, without groups. `holds` says whether a name that was proved then is still one: a token may be gone.
    pub fn caller(&self, holds: impl Fn(&Subject) -> bool) -> Caller {
        let names = self.caller.iter().filter_map(|name| name.parse().ok());
        Caller::anonymous(&self.from).with(names.filter(holds))
    }
}

#[cfg(test)]
mod tests {
    use adit_names::ServiceName;

    use super::super::caller::Person;
    use super::*;

    #[test]
    fn a_caller_is_read_back_without_its_groups_and_without_what_is_gone() {
        let person = Person {
            uid: 1000,
            name: Some("deploy".into()),
            groups: vec!["ops".into()],
        };
        let caller = Caller::anonymous("127.0.0.1:9")
            .with_person(&person)
            .with_token("ci");
        let target = Target::Service(ServiceName::tcp(80));
        let tag = Tag::read(&Tag::of(&caller, &target).unwrap()).unwrap();
        assert_eq!((tag.target(), tag.uid()), (&target, Some(1000)));
        let names = |caller: &Caller| {
            caller
                .subjects()
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
        };
        let all = tag.caller(|_| true);
        assert_eq!(
            names(&all),
            ["token:ci", "user:deploy", "user:1000", "anyone"]
        );
        assert_eq!(all.from(), "127.0.0.1:9");
        let less = tag.caller(|name| !matches!(name, Subject::Token(_)));
        assert_eq!(names(&less), ["user:deploy", "user:1000", "anyone"]);
        assert_eq!(Tag::of(&Caller::owner(), &target), None);
    }

    #[test]
    fn a_tag_fits_whatever_its_caller_is_called() {
        let names = (0..100).map(|n| Subject::Token(format!("{n:064}")));
        let caller = Caller::anonymous("x").with(names);
        let bytes = Tag::of(&caller, &Target::VsockPort(1)).unwrap();
        assert!(bytes.len() <= TAG_MAX);
        assert!(!Tag::read(&bytes).unwrap().caller.is_empty());
        assert_eq!(Tag::read(b"{}"), None);
    }
}

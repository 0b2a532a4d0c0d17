//! What is noted of a tunnel's caller where the tunnel is, so that it can be judged again: also by the next `aditd`.
//!
//! Groups are not noted: the host's user database has them as they are then.

use adit_names::VmId;
use adit_port::control::{TAG_MAX, Target};
use serde::{Deserialize, Serialize};

use super::caller::Caller;
use super::decide::{Verb, Where};
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
    /// The host that it came by way of.
    #[serde(rename = "v", default, skip_serializing_if = "Option::is_none")]
    via: Option<VmId>,
    /// What it reached.
    #[serde(rename = "t")]
    target: Target,
    /// It is a session of a command, as this user; empty: as any.
    #[serde(rename = "e", default, skip_serializing_if = "Option::is_none")]
    exec: Option<String>,
    /// Files are read or written over it: as whom, and where.
    #[serde(rename = "w", default, skip_serializing_if = "Option::is_none")]
    files: Option<(String, String)>,
    /// It came by a listener that leads there.
    #[serde(rename = "l", default, skip_serializing_if = "std::ops::Not::not")]
    is_led: bool,
}

impl Tag {
    /// Of a caller who may do this, over a stream. None: it is the owner's, which is nobody's to end.
    pub fn of(caller: &Caller, verb: Verb<'_>) -> Option<Vec<u8>> {
        if caller.is_owner() {
            return None;
        }
        // No name of a VM's own lists: an aditd of before, which knows nothing of them, ends it.
        let none = Target::VsockPort(0);
        let (target, exec, files) = match verb {
            Verb::Reach(target) => (target.clone(), None, None),
            Verb::Exec(user) => {
                let user = Some(user.unwrap_or_default().to_owned());
                (none, user, None)
            }
            Verb::Files(Where { user, path }) => {
                let files = Some((user.to_owned(), path.to_owned()));
                (none, None, files)
            }
            Verb::See | Verb::Task | Verb::Goal | Verb::Manage => return None,
        };
        let names = caller.subjects().iter();
        // The user database of another host is asked by nobody here.
        let is_kept = |name: &&Subject| match name {
            Subject::Group(_) => caller.via().is_some(),
            Subject::Anyone => false,
            _ => true,
        };
        let names = names.filter(is_kept);
        let mut tag = Self {
            caller: names.map(ToString::to_string).collect(),
            from: caller.from().into(),
            via: caller.via().cloned(),
            target,
            exec,
            files,
            is_led: caller.is_led(),
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

    /// The host that it came by way of.
    pub fn via(&self) -> Option<&VmId> {
        self.via.as_ref()
    }

    /// What is done over it.
    pub fn verb(&self) -> Verb<'_> {
        match (&self.exec, &self.files) {
            (None, Some((user, path))) => Verb::Files(Where { user, path }),
            (None, None) => Verb::Reach(&self.target),
            (Some(user), _) => Verb::Exec(Some(user.as_str()).filter(|user| !user.is_empty())),
        }
    }

    /// Number of the user behind it, if that was known.
    pub fn uid(&self) -> Option<u32> {
        if self.via.is_some() {
            return None;
        }
        let mut numbers = self
            .caller
            .iter()
            .filter_map(|name| name.strip_prefix("user:"));
        numbers.find_map(|number| number.parse().ok())
    }

    /// The caller, without groups. `holds` says whether a name that was proved then is still one: a token may be gone.
    pub fn caller(&self, holds: impl Fn(&Subject) -> bool) -> Caller {
        let names = self.caller.iter().filter_map(|name| name.parse().ok());
        let caller = Caller::anonymous(&self.from);
        match &self.via {
            Some(host) => caller.by_way_of(host, names.filter(holds).collect()),
            None if self.is_led => caller.with(names.filter(holds)).led(),
            None => caller.with(names.filter(holds)),
        }
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
        let tag = Tag::read(&Tag::of(&caller, Verb::Reach(&target)).unwrap()).unwrap();
        assert_eq!((tag.verb(), tag.uid()), (Verb::Reach(&target), Some(1000)));
        for user in [None, Some("deploy")] {
            let tag = Tag::of(&caller, Verb::Exec(user)).unwrap();
            assert_eq!(Tag::read(&tag).unwrap().verb(), Verb::Exec(user));
        }
        let path = &format!("/{}", "x".repeat(399));
        let user = "deploy";
        let files = Verb::Files(Where { user, path });
        let tag_of_files = Tag::of(&caller, files).unwrap();
        assert_eq!(Tag::read(&tag_of_files).unwrap().verb(), files);
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
        let led = Tag::read(&Tag::of(&caller.led(), Verb::Reach(&target)).unwrap()).unwrap();
        assert!(led.caller(|_| true).is_led() && !all.is_led());
        assert_eq!(Tag::of(&Caller::owner(), Verb::Reach(&target)), None);
    }

    #[test]
    fn r126_a_tag_of_somebody_by_way_of_another_host_is_of_no_user_of_this_one() {
        let ops = ["user:deploy", "group:ops"].map(|name| name.parse().unwrap());
        let local = Person {
            uid: 0,
            name: Some("root".into()),
            groups: vec!["root".into()],
        };
        let host = "beta".parse().unwrap();
        let caller = Caller::anonymous("x")
            .with_person(&local)
            .by_way_of(&host, ops.to_vec());
        let tag = Tag::of(&caller, Verb::Reach(&Target::VsockPort(1))).unwrap();
        let tag = Tag::read(&tag).unwrap();
        assert_eq!((tag.via(), tag.uid()), (Some(&host), None));
        assert_eq!(tag.caller(|_| true), caller);
        assert_eq!(caller.to_string(), "user:deploy via beta");
        let none = tag.caller(|name| !ops.contains(name));
        assert_eq!(none.subjects(), [Subject::Anyone]);
        // As the version before wrote it.
        let before = Tag::read(br#"{"c":["user:a"],"f":"x","t":{"VsockPort":1}}"#);
        assert!(before.is_none_or(|tag| tag.via().is_none()));
    }

    #[test]
    fn a_tag_fits_whatever_its_caller_is_called() {
        let names = (0..100).map(|n| Subject::Token(format!("{n:064}")));
        let caller = Caller::anonymous("x").with(names);
        let bytes = Tag::of(&caller, Verb::Reach(&Target::VsockPort(1))).unwrap();
        assert!(bytes.len() <= TAG_MAX);
        assert!(!Tag::read(&bytes).unwrap().caller.is_empty());
        assert_eq!(Tag::read(b"{}"), None);
    }
}

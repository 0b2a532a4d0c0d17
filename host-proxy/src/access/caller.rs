//! Who asks.
//!
//! A caller is known by what the kernel or a secret proves, never by what it says of itself: the user behind a socket, a token, the key of a
//! certificate.
//! It has every name that it has proved at the same time, and what any of them is granted.

use std::fmt;
use std::sync::Arc;

use adit_names::VmId;

use super::subject::{Subject, is_name};

/// Most groups of a user that count.
pub const GROUPS_MAX: usize = 1024;

/// Who asks. A copy is cheap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller(Arc<Inner>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Inner {
    is_owner: bool,
    /// The user of this host that it is.
    uid: Option<u32>,
    /// The most telling first; [`Subject::Anyone`] last.
    subjects: Vec<Subject>,
    /// Where the connection came from, for people.
    from: String,
    /// The host that it came by way of.
    via: Option<VmId>,
    /// What tells that host's clients apart. It proves nothing.
    client: String,
    shown: Option<Shown>,
    /// They came by a listener that leads to one place.
    is_led: bool,
}

/// What a caller has shown in `Proxy-Authorization`, for the host that has the VM.
#[derive(Clone, PartialEq, Eq)]
struct Shown {
    field: Vec<u8>,
    /// It is no token of this host.
    is_strange: bool,
}

/// Without the secret.
impl fmt::Debug for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shown").finish_non_exhaustive()
    }
}

/// A user of this host, as its user database has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Person {
    /// The number.
    pub uid: u32,
    /// The name, if it has one.
    pub name: Option<String>,
    /// Names of its groups.
    pub groups: Vec<String>,
}

impl Caller {
    /// What somebody is called of whom nothing is known.
    pub const NOBODY: &str = "nobody known";

    /// Whoever may use aditd's own socket: everything is theirs.
    pub fn owner() -> Self {
        Self(Arc::new(Inner {
            is_owner: true,
            uid: None,
            subjects: vec![Subject::Anyone],
            from: "aditd.sock".into(),
            via: None,
            client: String::new(),
            shown: None,
            is_led: false,
        }))
    }

    /// Somebody of whom nothing is known.
    pub fn anonymous(from: impl fmt::Display) -> Self {
        Self(Arc::new(Inner {
            is_owner: false,
            uid: None,
            subjects: vec![Subject::Anyone],
            from: from.to_string(),
            via: None,
            client: String::new(),
            shown: None,
            is_led: false,
        }))
    }

    /// Adds a user of this host.
    #[must_use]
    pub fn with_person(&self, person: &Person) -> Self {
        let number = person.uid.to_string();
        // A name that reads as another user's number must not be taken for it.
        let name = person
            .name
            .iter()
            .filter(|name| is_name(name) && !name.bytes().all(|b| b.is_ascii_digit()));
        let users = name.cloned().chain([number]).map(Subject::User);
        let groups = person.groups.iter().filter(|name| is_name(name));
        let groups = groups.take(GROUPS_MAX).cloned().map(Subject::Group);
        let mut known = Inner::clone(&self.with(users.chain(groups)).0);
        known.uid = Some(person.uid);
        Self(Arc::new(known))
    }

    /// Adds the groups of a user of this host.
    #[must_use]
    pub fn with_groups(&self, person: &Person) -> Self {
        let groups = person.groups.iter().filter(|name| is_name(name));
        self.with(groups.take(GROUPS_MAX).cloned().map(Subject::Group))
    }

    /// Adds a token that was shown.
    #[must_use]
    pub fn with_token(&self, name: &str) -> Self {
        self.with([Subject::Token(name.to_owned())])
    }

    /// Adds names that were proved.
    #[must_use]
    pub fn with(&self, more: impl IntoIterator<Item = Subject>) -> Self {
        let mut inner = Inner::clone(&self.0);
        inner.subjects.pop();
        inner.subjects.extend(more);
        // Tokens before certificates before users before groups, and a user's name before its number.
        inner.subjects.sort_by_key(|subject| match subject {
            Subject::Token(_) => 0,
            Subject::Cert(_) => 1,
            Subject::User(_) => 2,
            Subject::Group(_) => 3,
            Subject::Network(_) => 4,
            Subject::Anyone => 5,
        });
        inner.subjects.push(Subject::Anyone);
        Self(Arc::new(inner))
    }

    /// Says that they came by way of another host, which vouches for these names. Whoever has made the connection is a user of
    /// that host, also where both are one machine.
    #[must_use]
    pub fn by_way_of(&self, host: &VmId, vouched: Vec<Subject>) -> Self {
        let mut inner = Inner::clone(&self.0);
        let is_shown = |subject: &Subject| matches!(subject, Subject::Cert(_) | Subject::Anyone);
        inner.subjects.retain(is_shown);
        inner.uid = None;
        inner.via = Some(host.clone());
        inner.is_led = false;
        Self(Arc::new(inner)).with(vouched)
    }

    /// Notes which client of that host it is, as that host tells them apart.
    #[must_use]
    pub fn for_client(&self, client: String) -> Self {
        let mut inner = Inner::clone(&self.0);
        inner.client = client;
        Self(Arc::new(inner))
    }

    /// Which client of the host that they came by way of.
    pub fn client(&self) -> &str {
        &self.0.client
    }

    /// Keeps what they showed for the host that has the VM; `is_strange`: it is no token of this one.
    #[must_use]
    pub fn with_shown(&self, field: &[u8], is_strange: bool) -> Self {
        let mut inner = Inner::clone(&self.0);
        let field = field.to_vec();
        inner.shown = Some(Shown { field, is_strange });
        Self(Arc::new(inner))
    }

    /// Says that they came by a listener that leads to one place, so that they have not chosen it.
    #[must_use]
    pub fn led(&self) -> Self {
        let mut inner = Inner::clone(&self.0);
        inner.is_led = true;
        Self(Arc::new(inner))
    }

    /// Whether they came by a listener that leads to one place.
    pub fn is_led(&self) -> bool {
        self.0.is_led
    }

    /// The host that they came by way of.
    pub fn via(&self) -> Option<&VmId> {
        self.0.via.as_ref()
    }

    /// What they showed, for the host that has the VM.
    pub fn shown(&self) -> Option<&[u8]> {
        self.0.shown.as_ref().map(|shown| &*shown.field)
    }

    /// Whether they showed what is no token of this host.
    pub fn shows_strange(&self) -> bool {
        self.0.shown.as_ref().is_some_and(|shown| shown.is_strange)
    }

    /// The user of this host that it is, if the kernel knows.
    pub fn uid(&self) -> Option<u32> {
        self.0.uid
    }

    /// Whether everything is theirs.
    pub fn is_owner(&self) -> bool {
        self.0.is_owner
    }

    /// Whether nothing is known of them.
    pub fn is_anonymous(&self) -> bool {
        !self.0.is_owner && self.0.subjects.len() == 1
    }

    /// All names, `anyone` last.
    pub fn subjects(&self) -> &[Subject] {
        &self.0.subjects
    }

    /// Where the connection came from.
    pub fn from(&self) -> &str {
        &self.0.from
    }
}

/// The most telling name. The certificate of another host is that of all who come by way of it: of these a name that it vouches for
/// tells more.
impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut names = self.0.subjects.iter();
        let of_one = |name: &&Subject| !matches!(name, Subject::Cert(_) | Subject::Anyone);
        let vouched = self.0.via.as_ref().and_then(|_| names.clone().find(of_one));
        match vouched.or_else(|| names.next()) {
            _ if self.0.is_owner => f.pad("owner"),
            Some(Subject::Anyone) | None => f.pad(Self::NOBODY),
            Some(subject) => match &self.0.via {
                Some(via) => write!(f, "{subject} via {via}"),
                None => write!(f, "{subject}"),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn person(uid: u32, name: Option<&str>, groups: &[&str]) -> Person {
        Person {
            uid,
            name: name.map(str::to_owned),
            groups: groups.iter().map(|g| (*g).to_owned()).collect(),
        }
    }

    #[test]
    fn a_caller_has_all_names_that_it_proved_and_is_called_by_the_most_telling() {
        let nobody = Caller::anonymous("127.0.0.1:1");
        assert!(nobody.is_anonymous() && !nobody.is_owner());
        let user = nobody.with_person(&person(1000, Some("deploy"), &["ops", "adm"]));
        let names: Vec<_> = user.subjects().iter().map(ToString::to_string).collect();
        let want = [
            "user:deploy",
            "user:1000",
            "group:ops",
            "group:adm",
            "anyone",
        ];
        assert_eq!(names, want);
        assert_eq!(user.to_string(), "user:deploy");
        let both = user.with_token("ci");
        assert_eq!(both.to_string(), "token:ci");
        assert_eq!(both.subjects().len(), 6);
        assert_eq!(both.from(), "127.0.0.1:1");
        assert!(!Caller::owner().is_anonymous());
    }

    #[test]
    fn r126_by_way_of_another_host_somebody_is_called_by_what_it_vouches_for_and_else_by_its_certificate()
     {
        let cert: Subject = "cert:alpha".parse().unwrap();
        let (host, user) = ("alpha".parse().unwrap(), "user:deploy".parse().unwrap());
        let of_host = Caller::anonymous("192.0.2.1:9").with([cert]);
        let nobody = of_host.by_way_of(&host, vec![]);
        assert_eq!(nobody.to_string(), "cert:alpha via alpha");
        let vouched = of_host.by_way_of(&host, vec![user]);
        assert_eq!(vouched.to_string(), "user:deploy via alpha");
        let names: Vec<_> = vouched.subjects().iter().map(ToString::to_string).collect();
        assert_eq!(names, ["cert:alpha", "user:deploy", "anyone"]);
        let token = of_host.by_way_of(&host, vec!["token:ci".parse().unwrap()]);
        assert_eq!(token.to_string(), "token:ci via alpha");
    }

    #[test]
    fn r125_a_name_that_reads_as_a_number_or_a_subject_is_nobodys() {
        for name in ["0", "1000", "a b", "x,group:ops", "group:wheel"] {
            let user = Caller::anonymous("x").with_person(&person(7, Some(name), &[name]));
            let users: Vec<_> = user
                .subjects()
                .iter()
                .filter(|s| matches!(s, Subject::User(_)))
                .collect();
            assert_eq!(users, [&Subject::User("7".into())], "{name}");
        }
    }
}

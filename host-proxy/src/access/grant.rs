//! What is granted.
//!
//! | text | what may be done |
//! |---|---|
//! | `reach` | streams to whatever the VM's own lists have |
//! | `reach:80,8000-8100,vsock:5000,svc:docker` | streams to these TCP and AF_VSOCK ports and services, as far as the VM's own lists have them |
//! | `forward` | streams through a listener that leads to one place of it (`to = "web-1:22"`), and only through such a one |
//! | `see` | the VM is in lists and is shown; without it the VM looks as if there were none |
//! | `task` | its tasks and what they wrote are shown |
//! | `goal` | goals are applied to it |
//! | `manage` | it is added, changed, removed |
//! | `exec` | commands are run in it, as any user of it, and its sessions are shown and ended |
//! | `exec:deploy,www-data` | the same, as these users |
//! | `files` | files are read, written, listed and removed in it, as any user of it |
//! | `files:/srv/app`, `files:deploy@/srv/app` | the same, at this path and below; as this user |
//!
//! `reach` is also by a listener that leads there, as `forward` is. Else none of them implies another one.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use adit_names::ServiceName;
use adit_port::control::Target;
use adit_tasks::vms::Vms;

use super::decide::{Verb, Where};
use super::subject::Subject;

/// Most grants of a host.
pub const GRANTS_MAX: usize = 4096;
/// Most entries of each list of a grant, and of ports or users in one entry.
pub const LIST_MAX: usize = 256;
/// Most characters of a user's name.
const USER_MAX: usize = 32;

/// What to say of verbs that are thought of and not there.
const LATER: [&str; 2] = ["expose", "capture"];

/// A grant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// To whom.
    pub to: Vec<Subject>,
    /// With which VMs.
    pub vms: Vec<Vms>,
    /// What.
    pub may: Vec<May>,
    /// Until when, Unix time; none: for ever.
    pub until_ms: Option<i64>,
    /// Connections that each of them may open in a second; none: any number.
    pub connections_per_s: Option<u32>,
    /// Bytes a second, in each direction, of all tunnels of each of them to one VM; none: any number.
    pub bytes_per_s: Option<u64>,
    /// How many times a client's share each of them has.
    pub weight: u32,
    /// Where it is written: file and line.
    pub place: String,
}

impl Grant {
    /// Whether it says the same, wherever it is written.
    pub fn says_as(&self, other: &Self) -> bool {
        let place = other.place.clone();
        Self {
            place,
            ..self.clone()
        } == *other
    }
}

/// Something that may be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum May {
    /// Streams to what the VM's own lists have; with a list, to these of them.
    Reach(Option<Ports>),
    /// Streams through a listener that leads to one place of it.
    Forward,
    /// It is shown.
    See,
    /// Its tasks are shown.
    Task,
    /// Goals are applied to it.
    Goal,
    /// Its settings are changed.
    Manage,
    /// Commands are run in it, as any user; with a list, as these.
    Exec(Option<Users>),
    /// Files are read and written in it, anywhere and as any user; or there.
    Files(Option<FilesAt>),
}

/// Where files may be read and written, and as whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilesAt {
    user: Option<String>,
    path: String,
}

/// Users of a guest, by the names that a client gives.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Users(Vec<String>);

/// Ports and named services of a guest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ports {
    tcp: Vec<RangeInclusive<u16>>,
    vsock: Vec<RangeInclusive<u32>>,
    services: Vec<ServiceName>,
}

/// Why a text is nothing that may be done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MayError {
    /// No such verb.
    #[error(
        "it takes `reach`, `reach:PORTS`, `forward`, `see`, `task`, `goal`, `manage`, `exec`, `exec:USERS`, `files`, `files:/PATH` and `files:USER@/PATH`"
    )]
    Unknown,
    /// No users.
    #[error(
        "`exec:` takes users of the guest such as deploy,www-data: at most {LIST_MAX}, of letters, digits and `._-`"
    )]
    Users,
    /// No path.
    #[error(
        "`files:` takes an absolute path without `.`, `..`, `//` or a slash at its end, such as /srv/app, with a user of the guest before it where that is to be: deploy@/srv/app"
    )]
    Files,
    /// It would do nothing.
    #[error("nothing of this aditd asks for `{0}` yet")]
    Later(&'static str),
    /// No ports.
    #[error(
        "`reach:` takes ports and services such as 80,8000-8100,vsock:5000,svc:docker: at most {LIST_MAX}, 1 to 65535 for TCP"
    )]
    Ports,
}

impl Users {
    /// Whether a text could be a user of a guest.
    pub fn could_be(user: &str) -> bool {
        let is = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        (1..=USER_MAX).contains(&user.len()) && user.chars().all(is) && !user.starts_with('-')
    }
}

impl FromStr for Users {
    type Err = MayError;

    fn from_str(text: &str) -> Result<Self, MayError> {
        let users: Vec<_> = text.split(',').take(LIST_MAX + 1).collect();
        let fits = users.len() <= LIST_MAX && users.iter().all(|user| Self::could_be(user));
        let users = users.into_iter().map(str::to_owned);
        fits.then(|| Self(users.collect())).ok_or(MayError::Users)
    }
}

impl fmt::Display for Users {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join(","))
    }
}

impl FilesAt {
    fn has(&self, at: Where<'_>) -> bool {
        let is_user = self.user.as_deref().is_none_or(|user| user == at.user);
        let is_below = || {
            let rest = at.path.strip_prefix(&self.path);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        // Where a home is only the guest knows.
        is_user && (self.path == "/" || is_below())
    }
}

impl FromStr for FilesAt {
    type Err = MayError;

    fn from_str(text: &str) -> Result<Self, MayError> {
        let (user, path) = match text.split_once("@/") {
            Some((user, _)) if !text.starts_with('/') => (Some(user), &text[user.len() + 1..]),
            _ => (None, text),
        };
        let fits = user.is_none_or(Users::could_be)
            && adit_files::is_plain(path)
            && path.len() <= adit_files::PATH_MAX;
        let (user, path) = (user.map(str::to_owned), path.to_owned());
        fits.then_some(Self { user, path }).ok_or(MayError::Files)
    }
}

impl fmt::Display for FilesAt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.user {
            Some(user) => write!(f, "{user}@{}", self.path),
            None => f.write_str(&self.path),
        }
    }
}

impl Ports {
    fn has(&self, target: &Target) -> bool {
        match target {
            Target::Service(service) => match service.tcp_port() {
                Some(port) => self.tcp.iter().any(|range| range.contains(&port)),
                None => self.services.contains(service),
            },
            Target::VsockPort(port) => self.vsock.iter().any(|range| range.contains(port)),
        }
    }
}

fn range<T: FromStr + ToString + PartialOrd + Copy>(text: &str) -> Option<RangeInclusive<T>> {
    let number = |text: &str| {
        let n: T = text.parse().ok()?;
        (n.to_string() == text).then_some(n)
    };
    match text.split_once('-') {
        None => number(text).map(|n| n..=n),
        Some((first, last)) => {
            let (first, last) = (number(first)?, number(last)?);
            (first <= last).then_some(first..=last)
        }
    }
}

impl FromStr for Ports {
    type Err = MayError;

    fn from_str(text: &str) -> Result<Self, MayError> {
        let mut ports = Self::default();
        for (nth, part) in text.split(',').enumerate() {
            if nth == LIST_MAX {
                return Err(MayError::Ports);
            }
            if let Some(name) = part.strip_prefix("svc:") {
                let service = ServiceName::named(name);
                ports.services.push(service.ok_or(MayError::Ports)?);
                continue;
            }
            match part.strip_prefix("vsock:") {
                Some(vsock) => ports.vsock.push(range(vsock).ok_or(MayError::Ports)?),
                None => {
                    let tcp: RangeInclusive<u16> = range(part).ok_or(MayError::Ports)?;
                    if *tcp.start() == 0 {
                        return Err(MayError::Ports);
                    }
                    ports.tcp.push(tcp);
                }
            }
        }
        Ok(ports)
    }
}

impl May {
    /// Whether it is what is asked for. `led`: whoever asks came by a listener that leads to this one place.
    pub fn covers(&self, verb: Verb<'_>, led: bool) -> bool {
        match (self, verb) {
            (Self::Reach(None), Verb::Reach(_))
            | (Self::See, Verb::See)
            | (Self::Task, Verb::Task)
            | (Self::Goal, Verb::Goal)
            | (Self::Manage, Verb::Manage) => true,
            (Self::Reach(Some(ports)), Verb::Reach(target)) => ports.has(target),
            (Self::Exec(None), Verb::Exec(_)) => true,
            (Self::Exec(Some(users)), Verb::Exec(Some(user))) => {
                users.0.iter().any(|one| one == user)
            }
            (Self::Forward, Verb::Reach(_)) => led,
            (Self::Files(None), Verb::Files(_)) => true,
            (Self::Files(Some(files)), Verb::Files(at)) => files.has(at),
            _ => false,
        }
    }

    /// Bytes of the path that it is for; 0: any.
    pub(super) fn root_len(&self) -> usize {
        match self {
            Self::Files(Some(files)) if files.path != "/" => files.path.len(),
            _ => 0,
        }
    }
}

impl FromStr for May {
    type Err = MayError;

    fn from_str(text: &str) -> Result<Self, MayError> {
        let (verb, rest) = match text.split_once(':') {
            Some((verb, rest)) => (verb, Some(rest)),
            None => (text, None),
        };
        if let Some(later) = LATER.into_iter().find(|later| *later == verb) {
            return Err(MayError::Later(later));
        }
        match (verb, rest) {
            ("reach", None) => Ok(Self::Reach(None)),
            ("reach", Some(ports)) => Ok(Self::Reach(Some(ports.parse()?))),
            ("forward", None) => Ok(Self::Forward),
            ("see", None) => Ok(Self::See),
            ("task", None) => Ok(Self::Task),
            ("goal", None) => Ok(Self::Goal),
            ("manage", None) => Ok(Self::Manage),
            ("exec", None) => Ok(Self::Exec(None)),
            ("exec", Some(users)) => Ok(Self::Exec(Some(users.parse()?))),
            ("files", None) => Ok(Self::Files(None)),
            ("files", Some(at)) => Ok(Self::Files(Some(at.parse()?))),
            _ => Err(MayError::Unknown),
        }
    }
}

impl fmt::Display for May {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reach(None) => f.pad("reach"),
            Self::Reach(Some(ports)) => write!(f, "reach:{ports}"),
            Self::Forward => f.pad("forward"),
            Self::See => f.pad("see"),
            Self::Task => f.pad("task"),
            Self::Goal => f.pad("goal"),
            Self::Manage => f.pad("manage"),
            Self::Exec(None) => f.pad("exec"),
            Self::Exec(Some(users)) => write!(f, "exec:{users}"),
            Self::Files(None) => f.pad("files"),
            Self::Files(Some(at)) => write!(f, "files:{at}"),
        }
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fn shown<T: PartialEq + fmt::Display>(range: &RangeInclusive<T>) -> String {
            match range.start() == range.end() {
                true => range.start().to_string(),
                false => format!("{}-{}", range.start(), range.end()),
            }
        }
        let tcp = self.tcp.iter().map(shown);
        let vsock = self
            .vsock
            .iter()
            .map(|range| format!("vsock:{}", shown(range)));
        let services = self.services.iter().map(ToString::to_string);
        let all: Vec<_> = tcp.chain(vsock).chain(services).collect();
        f.write_str(&all.join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reaches(may: &str, target: &Target) -> bool {
        may.parse::<May>()
            .unwrap()
            .covers(Verb::Reach(target), false)
    }

    #[test]
    fn ports_are_single_or_ranges_and_each_of_its_kind() {
        let tcp = |port| Target::Service(ServiceName::tcp(port));
        assert!(reaches("reach:80,443", &tcp(80)) && reaches("reach:80,443", &tcp(443)));
        assert!(!reaches("reach:80,443", &tcp(81)));
        assert!(reaches("reach:8000-8100", &tcp(8100)) && !reaches("reach:8000-8100", &tcp(8101)));
        assert!(reaches("reach", &tcp(1)) && reaches("reach", &Target::VsockPort(1)));
        assert!(!reaches("reach:5000", &Target::VsockPort(5000)));
        assert!(reaches("reach:vsock:5000", &Target::VsockPort(5000)));
        assert!(!reaches("reach:vsock:5000", &tcp(5000)));
        let named = Target::Service("agent".parse().unwrap());
        assert!(!reaches("reach:1-65535", &named));
        let docker = Target::Service("svc:docker".parse().unwrap());
        assert!(reaches("reach", &docker) && reaches("reach:80,svc:docker", &docker));
        assert!(!reaches("reach:1-65535,svc:dock", &docker));
    }

    #[test]
    fn what_may_be_done_has_one_spelling_and_later_verbs_are_refused_by_name() {
        for text in [
            "reach",
            "reach:80,8000-8100,vsock:5000",
            "reach:80,svc:docker",
            "forward",
            "see",
            "task",
            "goal",
            "manage",
            "exec",
            "exec:deploy,www-data,1000",
            "files",
            "files:/",
            "files:/srv/a@/b",
            "files:deploy@/srv/app",
        ] {
            assert_eq!(text.parse::<May>().unwrap().to_string(), text);
        }
        for ports in [
            "",
            "0",
            "080",
            "65536",
            "80,",
            "9-8",
            "80 ",
            "vsock:",
            "vsock:4294967296",
            "*",
            "svc:",
            "svc:Docker",
            "svc:a.b",
            "svc:tcp:80",
        ] {
            let may = format!("reach:{ports}").parse::<May>();
            assert_eq!(may, Err(MayError::Ports), "{ports}");
        }
        let many = vec!["1"; LIST_MAX + 1].join(",");
        assert_eq!(many.parse::<Ports>(), Err(MayError::Ports));
        for text in ["", "Reach", "see:x", "all", "*"] {
            assert_eq!(text.parse::<May>(), Err(MayError::Unknown), "{text}");
        }
        assert_eq!("expose:web".parse::<May>(), Err(MayError::Later("expose")));
        for at in [
            "",
            "srv",
            "/srv/",
            "/srv/../etc",
            "//",
            "a b@/srv",
            "@/srv",
            "deploy@",
            "deploy",
        ] {
            let may = format!("files:{at}").parse::<May>();
            assert_eq!(may, Err(MayError::Files), "{at}");
        }
        for users in ["", "root,", "a b", "-x", "*", &"u".repeat(USER_MAX + 1)] {
            let may = format!("exec:{users}").parse::<May>();
            assert_eq!(may, Err(MayError::Users), "{users}");
        }
    }

    #[test]
    fn r122_files_are_granted_at_a_path_and_below_and_as_the_user_that_is_named() {
        let has = |may: &str, user, path| {
            let verb = Verb::Files(Where { user, path });
            may.parse::<May>().unwrap().covers(verb, false)
        };
        assert!(has("files", "root", "") && has("files", "root", "/etc/passwd"));
        assert!(has("files:/srv", "ops", "/srv") && has("files:/srv", "ops", "/srv/a/b"));
        for path in ["/srvx", "/", "/etc", "srv", "", "a"] {
            assert!(!has("files:/srv", "ops", path), "{path}");
        }
        assert!(has("files:ops@/srv", "ops", "/srv/a") && !has("files:ops@/srv", "root", "/srv/a"));
        assert!(has("files:ops@/", "ops", "") && has("files:/", "ops", "a"));
        assert!(!has("exec", "ops", "/srv") && !has("manage", "ops", "/srv"));
        assert!(
            !"files"
                .parse::<May>()
                .unwrap()
                .covers(Verb::Exec(None), false)
        );
    }

    #[test]
    fn commands_are_granted_as_the_users_that_are_named() {
        let runs = |may: &str, user| may.parse::<May>().unwrap().covers(Verb::Exec(user), false);
        assert!(runs("exec", None) && runs("exec", Some("root")));
        assert!(runs("exec:deploy,ops", Some("ops")) && !runs("exec:deploy", Some("root")));
        // Sessions of anybody are shown to whoever may be anybody.
        assert!(!runs("exec:deploy", None));
        for other in ["reach", "see", "task", "goal", "manage", "forward"] {
            assert!(!runs(other, Some("deploy")), "{other}");
        }
        assert!(!"exec".parse::<May>().unwrap().covers(Verb::See, false));
    }
}

//! What a policy says to one request. Pure: no file is read here, and no name is looked up.
//!
//! | request | allowed where one rule | has |
//! |---|---|---|
//! | a step | `[[step]]` | its kind, its user, each of its groups, and, if it writes a file, a root above its path |
//! | a dial | `[[service]]` | the service's name |
//! | a command | `[[exec]]` | its user, its path, and `allow`: `host` always, `ticket` with a ticket |
//! | files | `[[files]]` | the user, a directory above the path (or the path itself), to read or to write, and `allow` as of a command |
//!
//! There are no rules that deny. So their order means nothing, a rule more never forbids, and a rule less never allows. Users and
//! groups are compared by number: two names of one number are one user.
//!
//! Each answer names a line: that of the rule (or of the entry) that allows; else that of the condition which is not met, in
//! the rule that comes nearest; else that of `default`.

use std::collections::BTreeMap;

use adit_names::{ServiceName, escape};

/// A line of the file, from 1.
pub type Line = usize;

/// Names of a list that a reason shows; of more, the number.
const SHOWN_MAX: usize = 6;
/// Characters of one text that a reason shows.
const TEXT_MAX: usize = 160;

/// A value, and the line that it is on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct At<T> {
    /// Where.
    pub line: Line,
    /// What.
    pub value: T,
}

/// A user or a group, as the file names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Who {
    /// By number.
    Number(u32),
    /// By name.
    Name(String),
}

/// What a list of a rule holds for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Of<T> {
    /// The word `any`.
    Any,
    /// What is listed.
    These(Vec<T>),
}

/// How commands may be run, and files read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exec {
    /// Not at all.
    Off,
    /// Because the host says so.
    Host,
    /// Only with a signed ticket.
    Ticket,
}

/// A `[[step]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepRule {
    /// Where it begins.
    pub line: Line,
    /// Kinds of steps.
    pub kinds: At<Vec<String>>,
    /// Users that they may run as, or give files to.
    pub users: At<Of<Who>>,
    /// The same of groups; none: any.
    pub groups: Option<At<Of<Who>>>,
    /// Directories below which files may be written; none: it allows no path.
    pub roots: Option<At<Vec<String>>>,
}

/// A `[[service]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceRule {
    /// Where it begins.
    pub line: Line,
    /// Services that the host may dial.
    pub names: Vec<At<ServiceName>>,
}

/// An `[[exec]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecRule {
    /// Where it begins.
    pub line: Line,
    /// How.
    pub allow: At<Exec>,
    /// As whom.
    pub users: At<Of<Who>>,
    /// Absolute paths of programs.
    pub commands: At<Of<String>>,
}

/// A `[[files]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilesRule {
    /// Where it begins.
    pub line: Line,
    /// How.
    pub allow: At<Exec>,
    /// As whom.
    pub users: At<Of<Who>>,
    /// Directories, and files, that may be read; none: nothing.
    pub read: Option<At<Of<String>>>,
    /// The same, that may be written.
    pub write: Option<At<Of<String>>>,
}

impl FilesRule {
    fn paths(&self, is_write: bool) -> Option<&At<Of<String>>> {
        match is_write {
            true => self.write.as_ref(),
            false => self.read.as_ref(),
        }
    }

    /// The directory nearest to `/` that allows a path. It is also what no link may lead out of: a nearer one must not forbid more.
    fn root(&self, path: &str, is_write: bool) -> Option<&str> {
        match &self.paths(is_write)?.value {
            Of::Any => Some("/"),
            Of::These(list) => {
                let above = list
                    .iter()
                    .filter(|root| path == *root || is_below(path, root));
                above.min_by_key(|root| root.len()).map(String::as_str)
            }
        }
    }
}

/// A policy file that was checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// The line of `default`, which decides what no rule does.
    pub default: Line,
    /// Its `[[step]]`s.
    pub steps: Vec<StepRule>,
    /// Its `[[service]]`s.
    pub services: Vec<ServiceRule>,
    /// Its `[[exec]]`s.
    pub exec: Vec<ExecRule>,
    /// Its `[[files]]`s.
    pub files: Vec<FilesRule>,
}

/// Numbers of the users and groups that a policy names, as they are in the guest at this moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Accounts {
    /// Of users.
    pub users: BTreeMap<String, u32>,
    /// Of groups.
    pub groups: BTreeMap<String, u32>,
}

/// A user or a group that is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    /// As whoever asks has written it.
    pub name: String,
    /// Its number; none: the guest does not know it.
    pub id: Option<u32>,
}

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request<'a> {
    /// May this step run?
    Step {
        /// Its kind.
        kind: &'a str,
        /// Whom it runs as, or whose its file is.
        user: Account,
        /// All groups that it gets; none: they are not known, for the user is not.
        groups: Option<Vec<Account>>,
        /// What it writes.
        path: Option<&'a str>,
    },
    /// May the host dial this?
    Dial {
        /// Its name.
        service: &'a ServiceName,
    },
    /// May this command be run?
    Exec {
        /// As whom.
        user: Account,
        /// The program.
        command: &'a str,
        /// Whether a signed ticket orders it.
        ticket: bool,
    },
    /// May the host have this read, or written?
    Files {
        /// As whom.
        user: Account,
        /// Where.
        path: &'a str,
        /// Whether it is written, or removed.
        write: bool,
    },
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision<'p> {
    /// Yes.
    Allow {
        /// The line that allows it.
        line: Line,
        /// The root that allows it, where a path was asked for: of a step the deepest, of files the one nearest to `/`.
        root: Option<&'p str>,
    },
    /// No.
    Deny {
        /// The line that decides.
        line: Line,
        /// Why, for people.
        reason: String,
    },
}

impl Decision<'_> {
    /// Whether it is a yes.
    pub fn is_allowed(&self) -> bool {
        matches!(self, Self::Allow { .. })
    }
}

/// Which condition of a rule is not met. The later in this list, the nearer the rule was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Unmet {
    User,
    Group,
    Path,
    Way,
}

/// Whether a path is spelled in the one way that counts: absolute, no `.`, `..`, `//` or slash at its end, no NUL.
pub fn is_plain(path: &str) -> bool {
    let is_name = |part: &str| !matches!(part, "" | "." | "..");
    let rest = path.strip_prefix('/').filter(|_| !path.contains('\0'));
    rest.is_some_and(|rest| rest.split('/').all(is_name))
}

/// Whether a path leads to something below a root, both in their plain spelling.
pub fn is_below(path: &str, root: &str) -> bool {
    let root = if root == "/" { "" } else { root };
    let rest = path
        .strip_prefix(root)
        .and_then(|rest| rest.strip_prefix('/'));
    rest.is_some_and(|rest| !rest.is_empty())
}

impl Of<Who> {
    fn has(&self, who: &Account, numbers: &BTreeMap<String, u32>) -> bool {
        match (self, who.id) {
            (Self::Any, _) => true,
            (Self::These(_), None) => false,
            (Self::These(list), Some(id)) => list.iter().any(|of| match of {
                Who::Number(number) => *number == id,
                Who::Name(name) => numbers.get(name) == Some(&id),
            }),
        }
    }

    fn shown(&self) -> String {
        match self {
            Self::Any => "any".into(),
            Self::These(list) => shown(list.iter().map(|who| match who {
                Who::Number(number) => number.to_string(),
                Who::Name(name) => name.clone(),
            })),
        }
    }
}

/// A text of the request: it may be long, and is somebody else's.
fn brief(text: &str) -> adit_names::Escaped<'_> {
    escape(text).at_most(TEXT_MAX)
}

/// A list as a reason shows it.
fn shown<T: AsRef<str>>(names: impl ExactSizeIterator<Item = T>) -> String {
    let more = names.len().saturating_sub(SHOWN_MAX);
    let mut text = String::new();
    for name in names.take(SHOWN_MAX) {
        let comma = if text.is_empty() { "" } else { ", " };
        text.push_str(&format!("{comma}{}", brief(name.as_ref())));
    }
    match more {
        0 => text,
        more => format!("{text} and {more} more"),
    }
}

fn named(who: &Account) -> String {
    let name = brief(&who.name);
    match who.id {
        Some(_) => format!("`{name}`"),
        None => format!("`{name}`, which this guest does not know"),
    }
}

impl StepRule {
    fn check(&self, request: &Request<'_>, numbers: &Accounts) -> Result<Option<&str>, Unmet> {
        let Request::Step {
            user, groups, path, ..
        } = request
        else {
            return Err(Unmet::User);
        };
        if !self.users.value.has(user, &numbers.users) {
            return Err(Unmet::User);
        }
        let gets = |allowed: &At<Of<Who>>| match groups {
            Some(groups) => groups.iter().all(|g| allowed.value.has(g, &numbers.groups)),
            None => allowed.value == Of::Any,
        };
        if !self.groups.as_ref().is_none_or(gets) {
            return Err(Unmet::Group);
        }
        match (path, &self.roots) {
            (None, None) => Ok(None),
            (Some(path), Some(roots)) => {
                let above = roots.value.iter().filter(|root| is_below(path, root));
                let deepest = above.max_by_key(|root| root.len());
                deepest.map(|root| Some(root.as_str())).ok_or(Unmet::Path)
            }
            (Some(_), None) | (None, Some(_)) => Err(Unmet::Path),
        }
    }

    /// Where the condition is, and what is to be said of it.
    fn explain(&self, unmet: Unmet, request: &Request<'_>, numbers: &Accounts) -> (Line, String) {
        let Request::Step {
            kind,
            user,
            groups,
            path,
        } = request
        else {
            return (self.line, String::new());
        };
        let kind = brief(kind);
        match (unmet, &self.groups, &self.roots, path) {
            (Unmet::Group, Some(allowed), ..) => {
                let groups = groups.as_deref().unwrap_or_default();
                let other = groups
                    .iter()
                    .find(|g| !allowed.value.has(g, &numbers.groups));
                let other = other.map_or_else(|| "those of an unknown user".into(), named);
                let these = allowed.value.shown();
                let why =
                    format!("`{kind}` gets no group but {these} here, and {other} is asked for");
                (allowed.line, why)
            }
            (Unmet::Path, _, Some(roots), Some(path)) => {
                let (path, roots_shown) = (brief(path), shown(roots.value.iter()));
                let why = format!("`{path}` is not below {roots_shown}");
                (roots.line, why)
            }
            (Unmet::Path, _, None, _) => {
                let why = format!("this rule has no `roots`, and `{kind}` writes a file");
                (self.line, why)
            }
            (Unmet::Path, _, Some(roots), None) => {
                let why = format!("this rule is about files, and `{kind}` names none");
                (roots.line, why)
            }
            _ => {
                let these = self.users.value.shown();
                let why = format!(
                    "`{kind}` is for the users {these} here, not for {}",
                    named(user)
                );
                (self.users.line, why)
            }
        }
    }
}

impl Policy {
    /// Decides one request.
    pub fn decide<'p>(&'p self, request: &Request<'_>, numbers: &Accounts) -> Decision<'p> {
        match request {
            Request::Step { kind, path, .. } => {
                if let Some(path) = path.filter(|path| !is_plain(path)) {
                    let path = brief(path);
                    return self.denied(format!("`{path}` is not a plain absolute path"));
                }
                self.step(kind, request, numbers)
            }
            Request::Dial { service } => self.dial(service),
            Request::Exec {
                user,
                command,
                ticket,
            } => self.exec(user, command, *ticket, numbers),
            Request::Files { user, path, write } => self.files(user, path, *write, numbers),
        }
    }

    /// What no rule allows.
    fn denied<'p>(&self, reason: String) -> Decision<'p> {
        let line = self.default;
        Decision::Deny { line, reason }
    }

    fn step<'p>(&'p self, kind: &str, request: &Request<'_>, numbers: &Accounts) -> Decision<'p> {
        let mut allowed: Option<(Line, Option<&str>)> = None;
        let mut nearest: Option<(Unmet, &StepRule)> = None;
        let of_kind = |rule: &&StepRule| rule.kinds.value.iter().any(|k| k == kind);
        for rule in self.steps.iter().filter(of_kind) {
            match rule.check(request, numbers) {
                // The deepest root of all rules: from there on no link is followed, and a shallower one must not forbid more.
                Ok(root) => {
                    let depth = |root: Option<&str>| root.map_or(0, str::len);
                    if allowed.is_none_or(|(_, before)| depth(root) > depth(before)) {
                        allowed = Some((rule.line, root));
                    }
                }
                Err(unmet) => {
                    if nearest.is_none_or(|(before, _)| unmet > before) {
                        nearest = Some((unmet, rule));
                    }
                }
            }
        }
        match (allowed, nearest) {
            (Some((line, root)), _) => Decision::Allow { line, root },
            (None, Some((unmet, rule))) => {
                let (line, reason) = rule.explain(unmet, request, numbers);
                Decision::Deny { line, reason }
            }
            (None, None) => {
                let kind = brief(kind);
                self.denied(format!("no [[step]] allows the kind `{kind}`"))
            }
        }
    }

    fn dial<'p>(&self, service: &ServiceName) -> Decision<'p> {
        let mut names = self.services.iter().flat_map(|rule| &rule.names);
        match names.find(|name| name.value == *service) {
            Some(name) => Decision::Allow {
                line: name.line,
                root: None,
            },
            None => self.denied(format!("no [[service]] names `{service}`")),
        }
    }

    fn exec<'p>(
        &self,
        user: &Account,
        command: &str,
        ticket: bool,
        numbers: &Accounts,
    ) -> Decision<'p> {
        let shown_command = brief(command);
        if !is_plain(command) {
            return self.denied(format!("`{shown_command}` is not a plain absolute path"));
        }
        let mut nearest: Option<(Unmet, &ExecRule)> = None;
        for rule in &self.exec {
            let is_listed = match &rule.commands.value {
                Of::Any => true,
                Of::These(list) => list.iter().any(|c| c == command),
            };
            let unmet = if !rule.users.value.has(user, &numbers.users) {
                Unmet::User
            } else if !is_listed {
                Unmet::Path
            } else {
                match (rule.allow.value, ticket) {
                    (Exec::Host, _) | (Exec::Ticket, true) => {
                        let (line, root) = (rule.line, None);
                        return Decision::Allow { line, root };
                    }
                    (Exec::Off, _) | (Exec::Ticket, false) => Unmet::Way,
                }
            };
            if nearest.is_none_or(|(before, _)| unmet > before) {
                nearest = Some((unmet, rule));
            }
        }
        let Some((unmet, rule)) = nearest else {
            return self.denied("no [[exec]] allows a command".into());
        };
        let (line, reason) = match (unmet, rule.allow.value) {
            (_, Exec::Off) => (rule.allow.line, "exec is off here".into()),
            (Unmet::Way, _) => {
                let why = format!("`{shown_command}` needs a signed ticket here");
                (rule.allow.line, why)
            }
            (Unmet::Path, _) => {
                let why = format!("`{shown_command}` is not among the commands of this rule");
                (rule.commands.line, why)
            }
            _ => {
                let these = rule.users.value.shown();
                let why = format!("commands run as {these} here, not as {}", named(user));
                (rule.users.line, why)
            }
        };
        Decision::Deny { line, reason }
    }

    fn files<'p>(
        &'p self,
        user: &Account,
        path: &str,
        is_write: bool,
        numbers: &Accounts,
    ) -> Decision<'p> {
        let shown_path = brief(path);
        if path != "/" && !is_plain(path) {
            return self.denied(format!("`{shown_path}` is not a plain absolute path"));
        }
        let mut allowed: Option<(Line, &str)> = None;
        let mut nearest: Option<(Unmet, &FilesRule)> = None;
        for rule in &self.files {
            let root = rule.root(path, is_write);
            let unmet = match (rule.users.value.has(user, &numbers.users), root) {
                (false, _) => Unmet::User,
                (true, None) => Unmet::Path,
                (true, Some(root)) if rule.allow.value == Exec::Host => {
                    if allowed.is_none_or(|(_, before)| root.len() < before.len()) {
                        allowed = Some((rule.line, root));
                    }
                    continue;
                }
                (true, Some(_)) => Unmet::Way,
            };
            if nearest.is_none_or(|(before, _)| unmet > before) {
                nearest = Some((unmet, rule));
            }
        }
        if let Some((line, root)) = allowed {
            let root = Some(root);
            return Decision::Allow { line, root };
        }
        let Some((unmet, rule)) = nearest else {
            return self.denied("no [[files]] allows a file".into());
        };
        let done = if is_write { "written" } else { "read" };
        let (line, reason) = match (unmet, rule.allow.value, rule.paths(is_write)) {
            (_, Exec::Off, _) => (rule.allow.line, "files are off here".into()),
            (Unmet::Way, ..) => {
                let why = format!("`{shown_path}` needs a signed ticket here");
                (rule.allow.line, why)
            }
            (Unmet::Path, _, Some(paths)) => {
                let these = match &paths.value {
                    Of::Any => "any".into(),
                    Of::These(list) => shown(list.iter()),
                };
                let why = format!("`{shown_path}` is not at or below {these}, which may be {done}");
                (paths.line, why)
            }
            (Unmet::Path, _, None) => (rule.line, format!("by this rule nothing is {done}")),
            _ => {
                let these = rule.users.value.shown();
                let why = format!("files are {done} as {these} here, not as {}", named(user));
                (rule.users.line, why)
            }
        };
        Decision::Deny { line, reason }
    }

    /// Names of users and of groups in it, which are to be looked up.
    pub fn names(&self) -> (Vec<&str>, Vec<&str>) {
        fn of(list: &Of<Who>) -> impl Iterator<Item = &str> {
            let list: &[Who] = match list {
                Of::Any => &[],
                Of::These(list) => list,
            };
            list.iter().filter_map(|who| match who {
                Who::Name(name) => Some(name.as_str()),
                Who::Number(_) => None,
            })
        }
        let steps = self.steps.iter();
        let of_steps = steps.clone().flat_map(|rule| of(&rule.users.value));
        let of_exec = self.exec.iter().flat_map(|rule| of(&rule.users.value));
        let of_files = self.files.iter().flat_map(|rule| of(&rule.users.value));
        let groups = steps.filter_map(|rule| rule.groups.as_ref());
        let groups = groups.flat_map(|groups| of(&groups.value));
        let users = of_steps.chain(of_exec).chain(of_files);
        (users.collect(), groups.collect())
    }

    /// Whether any rule has commands run.
    pub fn lets_anybody(&self) -> bool {
        self.exec.iter().any(|rule| rule.allow.value != Exec::Off)
    }

    /// Whether any rule lets the host have commands run.
    pub fn lets_host(&self) -> bool {
        self.exec.iter().any(|rule| rule.allow.value == Exec::Host)
    }

    /// Whether any rule lets the host have files.
    pub fn lets_host_files(&self) -> bool {
        self.files.iter().any(|rule| rule.allow.value == Exec::Host)
    }

    /// How many rules it has.
    pub fn rules(&self) -> usize {
        self.steps.len() + self.services.len() + self.exec.len() + self.files.len()
    }
}

#[cfg(test)]
mod tests;

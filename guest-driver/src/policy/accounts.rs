//! Names become numbers here: of the users and groups that a step asks for, and of those that a policy names, both as the guest
//! knows them at this moment and as the executors will look them up.

use std::ffi::CString;

use adit_tasks::{Kind, Principal};
use nix::unistd::{Gid, Group, User, getgrouplist};

use super::decide::{Account, Accounts, Policy, Request};

/// Who is who in a guest.
pub trait Lookup {
    /// Number and first group of a user.
    fn user(&self, name: &str) -> Option<(u32, u32)>;
    /// Number of a group.
    fn group(&self, name: &str) -> Option<u32>;
    /// All groups of a user; none if they cannot be told.
    fn groups_of(&self, name: &str, first: u32) -> Option<Vec<u32>>;
}

/// This system: `/etc/passwd` and `/etc/group`.
pub struct System;

impl Lookup for System {
    fn user(&self, name: &str) -> Option<(u32, u32)> {
        let user = User::from_name(name).ok().flatten()?;
        Some((user.uid.as_raw(), user.gid.as_raw()))
    }

    fn group(&self, name: &str) -> Option<u32> {
        let group = Group::from_name(name).ok().flatten()?;
        Some(group.gid.as_raw())
    }

    fn groups_of(&self, name: &str, first: u32) -> Option<Vec<u32>> {
        let name = CString::new(name).ok()?;
        let groups = getgrouplist(&name, Gid::from_raw(first)).ok()?;
        Some(groups.into_iter().map(Gid::as_raw).collect())
    }
}

/// What a step touches, in its own words. Each kind of step says it in one of these forms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touches<'a> {
    /// It runs as a user, by name, with all groups of that user.
    RunsAs {
        /// Its kind.
        kind: &'a str,
        /// The name; digits are a name too.
        user: &'a str,
    },
    /// It writes a file that belongs to somebody, each a name or a number.
    Writes {
        /// Its kind.
        kind: &'a str,
        /// The file's owner.
        owner: &'a str,
        /// The file's group.
        group: &'a str,
        /// Where.
        path: &'a str,
    },
}

impl<'a> Touches<'a> {
    /// A step of the kind `script`.
    pub fn script(run_as: &'a str) -> Self {
        Self::RunsAs {
            kind: Kind::Script.name(),
            user: run_as,
        }
    }

    /// A step of the kind `file`.
    pub fn file(owner: &'a str, group: &'a str, path: &'a str) -> Self {
        Self::Writes {
            kind: Kind::File.name(),
            owner,
            group,
            path,
        }
    }

    /// The request that a policy decides.
    pub fn request(self, guest: &dyn Lookup) -> Request<'a> {
        let account = |name: &str, id| Account {
            name: name.to_owned(),
            id,
        };
        match self {
            Self::RunsAs { kind, user } => {
                let found = guest.user(user);
                let groups = found.and_then(|(_, first)| guest.groups_of(user, first));
                let named = |id: u32| account(&id.to_string(), Some(id));
                Request::Step {
                    kind,
                    user: account(user, found.map(|(id, _)| id)),
                    groups: groups.map(|ids| ids.into_iter().map(named).collect()),
                    path: None,
                }
            }
            Self::Writes {
                kind,
                owner,
                group,
                path,
            } => {
                let uid = number(owner, |name| guest.user(name).map(|(id, _)| id));
                let gid = number(group, |name| guest.group(name));
                Request::Step {
                    kind,
                    user: account(owner, uid),
                    groups: Some(vec![account(group, gid)]),
                    path: Some(path),
                }
            }
        }
    }
}

/// A user by name or number, for a command.
pub fn user(name: &str, guest: &dyn Lookup) -> Account {
    Account {
        name: name.to_owned(),
        id: number(name, |name| guest.user(name).map(|(id, _)| id)),
    }
}

fn number(text: &str, look: impl Fn(&str) -> Option<u32>) -> Option<u32> {
    match Principal::parse(text)? {
        Principal::Number(number) => Some(number),
        Principal::Name(name) => look(name),
    }
}

/// Looks up every name of a policy. One that the guest does not know is left out, and means nobody.
pub fn of_policy(policy: &Policy, guest: &dyn Lookup) -> Accounts {
    let (users, groups) = policy.names();
    let users = users.into_iter();
    let users = users.filter_map(|name| Some((name.to_owned(), guest.user(name)?.0)));
    let groups = groups.into_iter();
    let groups = groups.filter_map(|name| Some((name.to_owned(), guest.group(name)?)));
    Accounts {
        users: users.collect(),
        groups: groups.collect(),
    }
}

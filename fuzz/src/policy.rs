//! Target `policy`: bytes in place of a guest's policy file. One that is taken is in its limits, and whatever it allows, a rule of it
//! allows alone: so a rule less allows nothing more. One that is not taken has mistakes, each a line with its place.
//!
//! Input: the file.

use adit_guest_driver::policy::accounts::{self, Lookup, Touches};
use adit_guest_driver::policy::decide::{Accounts, Decision, Request};
use adit_guest_driver::policy::parse::{ENTRIES_MAX, PROBLEMS_MAX, RULES_MAX, parse};
use adit_guest_driver::policy::{Policy, is_plain};
use adit_names::ServiceName;

/// A guest that knows two users, and root by two names.
struct Guest;

impl Lookup for Guest {
    fn user(&self, name: &str) -> Option<(u32, u32)> {
        match name {
            "root" | "toor" => Some((0, 0)),
            "www-data" => Some((33, 33)),
            _ => None,
        }
    }

    fn group(&self, name: &str) -> Option<u32> {
        self.user(name).map(|(id, _)| id)
    }

    fn groups_of(&self, _: &str, first: u32) -> Option<Vec<u32>> {
        Some(vec![first])
    }
}

pub fn run(data: &[u8]) {
    let policy = match parse(data) {
        Ok(policy) => policy,
        Err(problems) => {
            assert!(!problems.is_empty() && problems.len() <= PROBLEMS_MAX);
            let lines = data.iter().filter(|b| **b == b'\n').count() + 1;
            for problem in problems {
                assert!(problem.line >= 1 && problem.line <= lines && problem.column >= 1);
                // It is shown on a console.
                let said = problem.to_string();
                assert!(
                    said.len() < 2000 && !said.contains(char::is_control),
                    "{said:?}"
                );
            }
            return;
        }
    };
    in_limits(&policy);
    let numbers = accounts::of_policy(&policy, &Guest);
    for request in requests(&policy) {
        decided(&policy, &request.as_request(), &numbers);
    }
}

fn in_limits(policy: &Policy) {
    let Policy {
        steps,
        services,
        exec,
        ..
    } = policy;
    for rules in [steps.len(), services.len(), exec.len()] {
        assert!(rules <= RULES_MAX);
    }
    for rule in steps {
        assert!((1..=ENTRIES_MAX).contains(&rule.kinds.value.len()));
        let roots = rule.roots.iter().flat_map(|roots| &roots.value);
        for root in roots {
            assert!(root == "/" || is_plain(root));
        }
    }
    assert!(services.iter().all(|rule| rule.names.len() <= ENTRIES_MAX));
}

/// A request that owns its words.
enum Asked {
    Script(&'static str),
    File(&'static str, String),
    Dial(ServiceName),
    Exec(String),
}

impl Asked {
    fn as_request(&self) -> Request<'_> {
        match self {
            Self::Script(user) => Touches::script(user).request(&Guest),
            Self::File(owner, path) => Touches::file(owner, "root", path).request(&Guest),
            Self::Dial(service) => Request::Dial { service },
            Self::Exec(command) => Request::Exec {
                user: accounts::user("toor", &Guest),
                command,
                ticket: true,
            },
        }
    }
}

/// What the policy speaks of, and what is near to that.
fn requests(policy: &Policy) -> Vec<Asked> {
    let users = ["root", "toor", "www-data", "nobody"];
    let mut asked: Vec<_> = users.map(Asked::Script).into();
    let roots = policy.steps.iter().filter_map(|rule| rule.roots.as_ref());
    for root in roots.flat_map(|roots| &roots.value).take(4) {
        for path in [
            format!("{root}/a"),
            format!("{root}a/b"),
            format!("{root}/../b"),
            root.clone(),
        ] {
            asked.push(Asked::File("toor", path));
        }
    }
    let names = policy.services.iter().flat_map(|rule| &rule.names);
    asked.extend(names.take(4).map(|name| Asked::Dial(name.value.clone())));
    asked.push(Asked::Exec("/bin/sh".into()));
    asked
}

fn decided(policy: &Policy, request: &Request<'_>, numbers: &Accounts) {
    let (line, is_allowed) = match policy.decide(request, numbers) {
        Decision::Allow { line, root } => {
            if let (
                Request::Step {
                    path: Some(path), ..
                },
                Some(root),
            ) = (request, root)
            {
                assert!(is_plain(path) && path.starts_with(root) && *path != root);
            }
            if let (Request::Files { path, .. }, Some(root)) = (request, root) {
                assert!(path.starts_with(root));
            }
            (line, true)
        }
        Decision::Deny { line, reason } => {
            assert!(
                !reason.is_empty() && !reason.contains(char::is_control),
                "{reason:?}"
            );
            (line, false)
        }
    };
    assert!(line >= 1);
    // Each rule by itself.
    let alone = |one: Policy| one.decide(request, numbers).is_allowed();
    let none = Policy {
        default: policy.default,
        steps: Vec::new(),
        services: Vec::new(),
        exec: Vec::new(),
        files: Vec::new(),
    };
    let steps = policy.steps.iter().map(|rule| Policy {
        steps: vec![rule.clone()],
        ..none.clone()
    });
    let services = policy.services.iter().map(|rule| Policy {
        services: vec![rule.clone()],
        ..none.clone()
    });
    let exec = policy.exec.iter().map(|rule| Policy {
        exec: vec![rule.clone()],
        ..none.clone()
    });
    let files = policy.files.iter().map(|rule| Policy {
        files: vec![rule.clone()],
        ..none.clone()
    });
    let mut all = steps.chain(services).chain(exec).chain(files);
    assert_eq!(all.any(alone), is_allowed);
}

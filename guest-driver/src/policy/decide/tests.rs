//! What is allowed and what is not, and by which line. `model` has what holds for every policy.

mod model;

use super::*;
use crate::policy::accounts::{Lookup, Touches, of_policy, user};
use crate::policy::parse::parse;

/// A guest with two names for root, and groups that users are in.
pub struct Guest;

impl Lookup for Guest {
    fn user(&self, name: &str) -> Option<(u32, u32)> {
        Some(match name {
            "root" | "toor" => (0, 0),
            "www-data" => (33, 33),
            "deploy" => (1000, 1000),
            "huge" => (4_000_000_000, 1000),
            _ => return None,
        })
    }

    fn group(&self, name: &str) -> Option<u32> {
        Some(match name {
            "root" => 0,
            "www-data" => 33,
            "docker" => 999,
            "deploy" => 1000,
            _ => return None,
        })
    }

    fn groups_of(&self, name: &str, first: u32) -> Option<Vec<u32>> {
        Some(match name {
            "deploy" => vec![first, 999],
            _ => vec![first],
        })
    }
}

fn policy(rules: &str) -> Policy {
    let text = format!("default = \"deny\"\n{rules}");
    parse(text.as_bytes()).unwrap_or_else(|e| panic!("{e:?}\n{text}"))
}

/// The line that allows, or the line that denies and why.
fn asks(policy: &Policy, touches: Touches<'_>) -> Result<Line, (Line, String)> {
    decides(policy, &touches.request(&Guest))
}

fn decides(policy: &Policy, request: &Request<'_>) -> Result<Line, (Line, String)> {
    match policy.decide(request, &of_policy(policy, &Guest)) {
        Decision::Allow { line, .. } => Ok(line),
        Decision::Deny { line, reason } => {
            assert!(
                !reason.is_empty() && !reason.contains(char::is_control),
                "{reason}"
            );
            Err((line, reason))
        }
    }
}

fn line<T>(answer: Result<T, (Line, String)>) -> Option<Line> {
    answer.err().map(|(line, _)| line)
}

const RULES: &str = r#"
[[step]]
kinds = ["script"]
users = ["deploy", "www-data"]
groups = ["www-data"]
[[step]]
kinds = ["file"]
users = [0]
groups = "any"
roots = ["/srv", "/etc/nginx"]
[[service]]
names = [
  "ping",
  "tcp:80",
]
"#;

#[test]
fn the_line_that_decides_is_that_of_the_rule_or_of_the_condition_that_comes_nearest() {
    let p = policy(RULES);
    assert_eq!(asks(&p, Touches::script("www-data")), Ok(3));
    // Its user may be docker's, too.
    assert_eq!(line(asks(&p, Touches::script("deploy"))), Some(6));
    assert_eq!(line(asks(&p, Touches::script("root"))), Some(5));
    let file = |owner, path| asks(&p, Touches::file(owner, "root", path));
    assert_eq!(file("root", "/srv/a/b"), Ok(7));
    assert_eq!(line(file("root", "/etc/passwd")), Some(11));
    assert_eq!(line(file("deploy", "/srv/a")), Some(9));
    let dial = |name: &str| {
        decides(
            &p,
            &Request::Dial {
                service: &name.parse().unwrap(),
            },
        )
    };
    assert_eq!((dial("ping"), dial("tcp:80")), (Ok(14), Ok(15)));
    assert_eq!(line(dial("tcp:8080")), Some(1), "nothing names it");
    assert_eq!(line(dial("exec")), Some(1));
    let other = Touches::RunsAs {
        kind: "reboot",
        user: "root",
    };
    assert_eq!(line(asks(&p, other)), Some(1));
}

#[test]
fn an_empty_policy_allows_nothing() {
    let p = policy("");
    assert_eq!(line(asks(&p, Touches::script("root"))), Some(1));
    assert_eq!(
        line(asks(&p, Touches::file("root", "root", "/etc/motd"))),
        Some(1)
    );
    let ping = "ping".parse().unwrap();
    assert_eq!(
        line(decides(&p, &Request::Dial { service: &ping })),
        Some(1)
    );
}

/// sudo ran commands as root for the user -1, polkit for users above 2^31 and for 2^32, and one agent for users it did not know.
#[test]
fn users_count_by_their_number_and_an_unknown_one_is_nobody() {
    let as_user = |users: &str, name: &str| {
        let p = policy(&format!(
            "[[step]]\nkinds = [\"script\"]\nusers = {users}\n"
        ));
        asks(&p, Touches::script(name)).is_ok()
    };
    assert!(as_user("[\"root\"]", "root") && as_user("[\"root\"]", "toor"));
    assert!(as_user("[\"toor\"]", "root") && as_user("[0]", "toor") && as_user("[\"0\"]", "root"));
    assert!(as_user("[\"huge\"]", "huge") && as_user("[4000000000]", "huge"));
    assert!(!as_user("[\"huge\"]", "root") && !as_user("[0]", "huge"));
    for unknown in [
        "nobody-there",
        "",
        "0",
        "1000",
        "4294967295",
        "-1",
        "#0",
        "root\0",
        " root",
    ] {
        for users in ["[\"root\"]", "[0, 33, 1000]", "[\"nobody-there\"]"] {
            assert!(!as_user(users, unknown), "{users} {unknown}");
        }
    }
    // Then the executor says that there is no such user.
    assert!(as_user("\"any\"", "nobody-there"));
    let restricted = "\"any\"\ngroups = [\"root\"]";
    assert!(as_user(restricted, "root") && !as_user(restricted, "nobody-there"));
    let owner = |users: &str, owner: &str, group: &str| {
        let rule = format!(
            "[[step]]\nkinds = [\"file\"]\nroots = [\"/srv\"]\ngroups = [\"deploy\"]\nusers = {users}\n"
        );
        asks(&policy(&rule), Touches::file(owner, group, "/srv/f")).is_ok()
    };
    // An owner of digits is a number.
    assert!(owner("[\"deploy\"]", "1000", "1000") && owner("[1000]", "deploy", "deploy"));
    assert!(!owner("[\"deploy\"]", "01", "1000") && !owner("[1000]", "deploy", "docker"));
    for bad in ["4294967295", "4294967296", "-1", "nobody-there"] {
        assert!(
            !owner("[0, 1000]", bad, "deploy") && !owner("[1000]", "deploy", bad),
            "{bad}"
        );
    }
}

/// `/srv/www` is not `/srv/www2`, and `tcp:8` not `tcp:80`: both were such bugs elsewhere.
#[test]
fn a_path_is_below_a_root_by_whole_names_and_in_one_spelling() {
    let rule = "[[step]]\nkinds = [\"file\"]\nusers = \"any\"\nroots = [\"/srv/www\"]\n";
    let may = |path: &str| asks(&policy(rule), Touches::file("root", "root", path)).is_ok();
    assert!(may("/srv/www/a") && may("/srv/www/..a/b..") && may("/srv/www/ü"));
    for bad in [
        "/srv/www",
        "/srv/www/",
        "/srv/www2/a",
        "/srv/wwww",
        "/srv/www/../a",
        "/srv/www/..",
        "/srv/www//a",
        "//srv/www/a",
        "/srv/./www/a",
        "/srv/www/a/",
        "/srv/www/a/.",
        "srv/www/a",
        "/srv/www/a\0b",
        "",
        "/",
        "/srv/ww",
        "/SRV/WWW/a",
        "/srv/www\u{0}/a",
        " /srv/www/a",
    ] {
        assert!(!may(bad), "{bad:?}");
    }
    let whole = "[[step]]\nkinds = [\"file\"]\nusers = \"any\"\nroots = [\"/\"]\n";
    let may = |path: &str| asks(&policy(whole), Touches::file("root", "root", path)).is_ok();
    assert!(may("/a") && may("/etc/passwd") && !may("/") && !may("/../a") && !may("a"));
}

#[test]
fn the_deepest_root_of_all_rules_is_the_one_that_holds() {
    let rule =
        |roots: &str| format!("[[step]]\nkinds = [\"file\"]\nusers = \"any\"\nroots = {roots}\n");
    let rules = [
        rule("[\"/\"]"),
        rule("[\"/srv/www\", \"/srv\"]"),
        rule("[\"/srv\"]"),
    ];
    let request = Touches::file("root", "root", "/srv/www/a").request(&Guest);
    for order in [[0, 1, 2], [2, 1, 0], [1, 0, 2]] {
        let p = policy(&order.map(|n| rules[n].clone()).concat());
        let Decision::Allow { root, .. } = p.decide(&request, &Accounts::default()) else {
            panic!("denied")
        };
        assert_eq!(root, Some("/srv/www"));
    }
}

#[test]
fn what_a_rule_cannot_mean_for_a_kind_of_a_later_version_it_denies() {
    let rules = "[[step]]\nkinds = [\"package\"]\nusers = [\"root\"]\n[[step]]\nkinds = [\"copy\"]\nusers = [\"root\"]\nroots = [\"/srv\"]\n";
    let p = policy(rules);
    let runs = |kind, user| asks(&p, Touches::RunsAs { kind, user });
    let writes = |kind, path| {
        asks(
            &p,
            Touches::Writes {
                kind,
                owner: "root",
                group: "root",
                path,
            },
        )
    };
    assert_eq!(runs("package", "root"), Ok(2));
    assert_eq!(line(runs("package", "deploy")), Some(4));
    assert_eq!(
        line(writes("package", "/srv/a")),
        Some(2),
        "it has no roots"
    );
    assert_eq!(writes("copy", "/srv/a"), Ok(5));
    assert_eq!(line(runs("copy", "root")), Some(8), "it names no path");
}

#[test]
fn commands_need_their_user_their_path_and_their_ticket() {
    let rules = "[[exec]]\nallow = \"ticket\"\nusers = [\"deploy\"]\ncommands = [\"/usr/bin/uptime\"]\n[[exec]]\nallow = \"host\"\nusers = [33]\ncommands = \"any\"\n";
    let p = policy(rules);
    let may = |name: &str, command: &str, ticket| {
        let user = user(name, &Guest);
        decides(
            &p,
            &Request::Exec {
                user,
                command,
                ticket,
            },
        )
    };
    assert_eq!(may("deploy", "/usr/bin/uptime", true), Ok(2));
    assert_eq!(line(may("deploy", "/usr/bin/uptime", false)), Some(3));
    assert_eq!(line(may("deploy", "/usr/bin/uptime2", true)), Some(5));
    assert_eq!(may("www-data", "/bin/sh", false), Ok(6));
    assert_eq!(line(may("www-data", "/bin/../bin/sh", false)), Some(1));
    assert_eq!(line(may("root", "/usr/bin/uptime", true)), Some(4));
    let off = policy("[[exec]]\nallow = \"off\"\n");
    let root = || user("root", &Guest);
    let request = Request::Exec {
        user: root(),
        command: "/bin/sh",
        ticket: true,
    };
    assert_eq!(line(decides(&off, &request)), Some(3));
    assert_eq!(line(decides(&policy(""), &request)), Some(1));
}

#[test]
fn a_reason_is_one_short_line_whatever_was_asked() {
    let p = policy(RULES);
    let long = format!("/{}\n\u{1b}[2J", "x".repeat(10_000));
    let kind = "k\n".repeat(5000);
    for touches in [
        Touches::script(&long),
        Touches::file(&long, &long, "/srv/a"),
        Touches::file("root", "root", &long),
        Touches::RunsAs {
            kind: &kind,
            user: "root",
        },
    ] {
        let (_, reason) = asks(&p, touches).unwrap_err();
        assert!(reason.len() < 600, "{}", reason.len());
    }
    let many: Vec<_> = (0..200).map(|n| format!("\"user-{n}\"")).collect();
    let rule = format!(
        "[[step]]\nkinds = [\"script\"]\nusers = [{}]\n",
        many.join(",")
    );
    let (_, reason) = asks(&policy(&rule), Touches::script("root")).unwrap_err();
    assert!(reason.contains("and 194 more"), "{reason}");
}

#[test]
fn r122_files_are_read_and_written_where_a_rule_says_and_no_link_may_lead_out_of_that() {
    let rules = "[[files]]\nallow = \"host\"\nusers = [\"deploy\"]\nread = [\"/srv\", \"/etc/hostname\"]\nwrite = [\"/srv/app\"]\n\
                 [[files]]\nallow = \"host\"\nusers = [33]\nwrite = \"any\"\n[[files]]\nallow = \"ticket\"\nusers = [\"root\"]\nread = \"any\"\n";
    let policy = policy(rules);
    let numbers = of_policy(&policy, &Guest);
    let root = |name: &str, path: &str, write| {
        let user = user(name, &Guest);
        match policy.decide(&Request::Files { user, path, write }, &numbers) {
            Decision::Allow { root, .. } => Ok(root.unwrap().to_owned()),
            Decision::Deny { line, .. } => Err(line),
        }
    };
    let allowed = |root: &str| Ok(root.to_owned());
    assert_eq!(root("deploy", "/srv/app/x", false), allowed("/srv"));
    assert_eq!(root("deploy", "/srv", false), allowed("/srv"));
    assert_eq!(
        root("deploy", "/etc/hostname", false),
        allowed("/etc/hostname")
    );
    assert_eq!(root("deploy", "/srv/app/x", true), allowed("/srv/app"));
    assert_eq!(root("www-data", "/etc/passwd", true), allowed("/"));
    // The condition that is not met, in the rule that comes nearest.
    assert_eq!(root("deploy", "/srvx", false), Err(5));
    assert_eq!(root("deploy", "/srv/x", true), Err(6));
    assert_eq!(root("www-data", "/etc/passwd", false), Err(7));
    assert_eq!(root("root", "/etc/passwd", false), Err(12));
    for path in ["/srv/../etc/shadow", "srv", "/srv/", "", "/srv//x"] {
        assert_eq!(root("deploy", path, false), Err(1), "{path}");
    }
    assert!(policy.lets_host_files() && !policy.lets_host());
}

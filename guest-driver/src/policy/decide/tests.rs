//! What is allowed and what is not, by which line; and that a rule less never allows more.

use proptest::prelude::*;

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

static USERS: [&str; 6] = ["root", "toor", "www-data", "deploy", "huge", "ghost"];
static PATHS: [&str; 6] = [
    "/srv",
    "/srv/www",
    "/srv/www/a",
    "/srv/www2/a",
    "/etc/a",
    "/srv/../a",
];
static SERVICES: [&str; 4] = ["ping", "tcp:80", "tcp:8", "exec"];

fn names(of: &'static [&'static str]) -> impl Strategy<Value = Vec<&'static str>> {
    prop::sample::subsequence(of, 1..=of.len())
}

fn quoted(list: &[&str]) -> String {
    let list: Vec<_> = list.iter().map(|name| format!("\"{name}\"")).collect();
    format!("[{}]", list.join(", "))
}

fn whom(of: &'static [&'static str]) -> impl Strategy<Value = String> {
    prop_oneof![
        Just("\"any\"".to_owned()),
        names(of).prop_map(|l| quoted(&l))
    ]
}

/// The text of a rule.
fn rule() -> impl Strategy<Value = String> {
    let script = (whom(&USERS), prop::option::of(whom(&USERS))).prop_map(|(users, groups)| {
        let groups = groups
            .map(|g| format!("groups = {g}\n"))
            .unwrap_or_default();
        format!("[[step]]\nkinds = [\"script\"]\nusers = {users}\n{groups}")
    });
    let file = (whom(&USERS), whom(&USERS), names(&PATHS[..5])).prop_map(|(users, groups, roots)| {
        let roots = quoted(&roots);
        format!("[[step]]\nkinds = [\"file\", \"copy\"]\nusers = {users}\ngroups = {groups}\nroots = {roots}\n")
    });
    let service = names(&SERVICES).prop_map(|l| format!("[[service]]\nnames = {}\n", quoted(&l)));
    let exec = (any::<bool>(), whom(&USERS), names(&PATHS[..5])).prop_map(|(ticket, users, of)| {
        let allow = if ticket { "ticket" } else { "host" };
        format!(
            "[[exec]]\nallow = \"{allow}\"\nusers = {users}\ncommands = {}\n",
            quoted(&of)
        )
    });
    prop_oneof![script, file, service, exec]
}

#[derive(Clone, Debug)]
enum Asked {
    Script(&'static str),
    File(&'static str, &'static str, &'static str),
    Dial(ServiceName),
    Exec(&'static str, &'static str, bool),
}

impl Asked {
    fn request(&self) -> Request<'_> {
        match self {
            Self::Script(user) => Touches::script(user).request(&Guest),
            Self::File(owner, group, path) => Touches::file(owner, group, path).request(&Guest),
            Self::Dial(service) => Request::Dial { service },
            Self::Exec(name, command, ticket) => Request::Exec {
                user: user(name, &Guest),
                command,
                ticket: *ticket,
            },
        }
    }

    /// Another reader of one rule's text, which knows that each list is on one line.
    fn is_allowed_by(&self, rule: &str) -> bool {
        let value = |key: &str| {
            let line = rule.lines().find(|l| l.starts_with(&format!("{key} = ")));
            line.map(|l| l.split_once(" = ").unwrap().1.to_owned())
        };
        let lists =
            |key: &str, name: &str| value(key).is_some_and(|v| v.contains(&format!("\"{name}\"")));
        let any = |key: &str| value(key).is_none_or(|v| v == "\"any\"");
        let aliases = |name: &'static str| match name {
            "root" | "toor" => vec!["root", "toor"],
            name => vec![name],
        };
        let is_user = |name: &'static str| {
            let known = name != "ghost";
            any("users") || known && aliases(name).iter().any(|n| lists("users", n))
        };
        let is_group = |name: &'static str| {
            any("groups") || Guest.group(name).is_some() && lists("groups", name)
        };
        match self {
            Self::Script(user) => {
                let groups_fit = match *user {
                    "ghost" => any("groups"),
                    // In docker too, which no rule lists.
                    "deploy" => any("groups"),
                    "huge" => is_group("deploy"),
                    "toor" => is_group("root"),
                    user => is_group(user),
                };
                rule.contains("\"script\"") && is_user(user) && groups_fit
            }
            Self::File(owner, group, path) => {
                let below = |root: &&&str| {
                    path.strip_prefix(**root)
                        .is_some_and(|r| r.starts_with('/'))
                };
                rule.contains("\"file\"")
                    && !path.contains("..")
                    && is_user(owner)
                    && is_group(group)
                    && PATHS[..5]
                        .iter()
                        .filter(below)
                        .any(|root| lists("roots", root))
            }
            Self::Dial(service) => {
                rule.starts_with("[[service]]") && lists("names", service.as_str())
            }
            Self::Exec(user, command, ticket) => {
                rule.starts_with("[[exec]]")
                    && is_user(user)
                    && lists("commands", command)
                    && (*ticket || lists("allow", "host"))
            }
        }
    }
}

fn asked() -> impl Strategy<Value = Asked> {
    let user = || prop::sample::select(&USERS[..]);
    let path = || prop::sample::select(&PATHS[..]);
    prop_oneof![
        user().prop_map(Asked::Script),
        (user(), user(), path()).prop_map(|(o, g, p)| Asked::File(o, g, p)),
        prop::sample::select(&SERVICES[..]).prop_map(|s| Asked::Dial(s.parse().unwrap())),
        (user(), path(), any::<bool>()).prop_map(|(u, c, t)| Asked::Exec(u, c, t)),
    ]
}

proptest! {
    #[test]
    fn a_policy_allows_what_one_of_its_rules_allows_and_names_that_rule(
        rules in prop::collection::vec(rule(), 0..6), asked in asked(),
    ) {
        let p = policy(&rules.concat());
        let text = format!("default = \"deny\"\n{}", rules.concat());
        let want = rules.iter().any(|rule| asked.is_allowed_by(rule));
        let got = decides(&p, &asked.request());
        prop_assert_eq!(got.is_ok(), want, "{:?}\n{}\n{:?}", &asked, &text, &got);
        let line = got.unwrap_or_else(|(line, _)| line);
        let at = text.lines().nth(line - 1);
        prop_assert!(at.is_some_and(|l| l.starts_with('[') || l.contains(" = ")), "{}: {}", line, text);
    }

    #[test]
    fn a_rule_less_never_allows_more_and_their_order_means_nothing(
        rules in prop::collection::vec(rule(), 1..6), asked in asked(), gone in any::<prop::sample::Index>(), turn in 0..6_usize,
    ) {
        let request = asked.request();
        let whole = decides(&policy(&rules.concat()), &request).is_ok();
        let mut fewer = rules.clone();
        fewer.remove(gone.index(rules.len()));
        let without = decides(&policy(&fewer.concat()), &request).is_ok();
        prop_assert!(whole || !without);
        let mut turned = rules.clone();
        turned.rotate_left(turn % rules.len());
        prop_assert_eq!(decides(&policy(&turned.concat()), &request).is_ok(), whole);
    }

    #[test]
    fn an_entry_less_never_allows_more(rules in prop::collection::vec(rule(), 1..4), asked in asked(), at in any::<prop::sample::Index>()) {
        let request = asked.request();
        let text = rules.concat();
        // Each entry that is not the last of its list.
        let entries: Vec<_> = text.match_indices("\", ").map(|(end, _)| end).collect();
        prop_assume!(!entries.is_empty());
        let end = entries[at.index(entries.len())];
        let begin = text[..end].rfind('"').unwrap();
        let fewer = format!("{}{}", &text[..begin], &text[end + 3..]);
        let without = decides(&policy(&fewer), &request).is_ok();
        prop_assert!(!without || decides(&policy(&text), &request).is_ok(), "{}\n{}", text, fewer);
    }
}

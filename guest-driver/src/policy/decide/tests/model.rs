//! Any rules and any request: what is allowed is what another reader of the text finds, and a rule less never allows more.

use proptest::prelude::*;

use super::*;

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

//! Other hosts, their names, and the map of VMs.

use super::*;

const PIN: &str = "sha256/47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=";

fn host(name: &str, pin: &str, more: &str) -> String {
    format!("[[host]]\nname = \"{name}\"\naddress = \"192.0.2.2:1\"\npin = \"{pin}\"\n{more}")
}

#[test]
fn hosts_and_vms_share_their_names_and_a_clash_is_refused() {
    let other_pin = PIN.replace("47D", "48D");
    let named = "[names]\nhost = \"b\"\n";
    for (text, line, key) in [
        ("[names]\nhost = \"a\"\n".to_owned() + VM, 2, "host"),
        (VM.to_owned() + &host("a", PIN, ""), 5, "name"),
        (named.to_owned() + &host("b", PIN, ""), 4, "name"),
        (host("b", PIN, "") + &host("b", &other_pin, ""), 6, "name"),
        // One key is one host.
        (host("b", PIN, "") + &host("c", PIN, ""), 8, "pin"),
        // What would be read as another name.
        (host("svc", PIN, ""), 2, "name"),
        (host("adit", PIN, ""), 2, "name"),
        (
            "[names]\nhost = \"vm\"\nsuffix = \".vm\"\n".into(),
            2,
            "host",
        ),
        ("[names]\nsuffix = \"vm\"\n".into(), 2, "suffix"),
    ] {
        let found = &problems(&text)[0];
        assert_eq!(
            (found.line, found.key.as_deref()),
            (line, Some(key)),
            "{text}"
        );
    }
    let whole = named.to_owned() + VM + &host("c", PIN, "") + &host("d", &other_pin, "");
    let config = parse(&whole).unwrap();
    assert_eq!(config.host_name().unwrap().as_str(), "b");
}

#[test]
fn the_machines_name_is_the_hosts_unless_something_else_has_it() {
    let mut config = parse(&(VM.to_owned() + &host("b", PIN, ""))).unwrap();
    for (hostname, name) in [
        ("Alpha.example.org\n", Some("alpha")),
        ("a", None),
        ("b.example.org", None),
        ("svc", None),
        ("not_a_label", None),
        ("", None),
    ] {
        config.names.hostname = super::names::of_machine(hostname);
        let found = config.host_name().map(|name| name.as_str());
        assert_eq!(found, name, "{hostname:?}");
    }
}

#[test]
fn r126_what_another_host_may_say_is_what_is_written_and_nothing_else() {
    let more = "names = [\"db-*\", \"web-1\"]\nvouches = [\"user:deploy\", \"group:ops\"]\n";
    let config = parse(&host("b", PIN, more)).unwrap();
    let host_b = &config.host[0];
    let claims = |vm: &str| host_b.may_claim(&vm.parse().unwrap());
    assert!(claims("db-1") && claims("web-1") && !claims("web-2") && !claims("xdb-1"));
    let vouches = |subject: &str| host_b.vouches_for(&subject.parse().unwrap());
    assert!(vouches("user:deploy") && vouches("group:ops"));
    for other in [
        "user:ops",
        "group:deploy",
        "token:deploy",
        "cert:deploy",
        "anyone",
    ] {
        assert!(!vouches(other), "{other}");
    }
    assert!(!parse(&host("b", PIN, "")).unwrap().host[0].vouches_for(&"user:a".parse().unwrap()));
    for (more, key) in [
        ("names = [\"label:env=prod\"]\n", "names"),
        ("names = [\"A\"]\n", "names"),
        ("vouches = [\"user:1000\"]\n", "vouches"),
        ("vouches = [\"token:ci\"]\n", "vouches"),
        ("vouches = [\"anyone\"]\n", "vouches"),
        ("vouches = [\"cert:x\"]\n", "vouches"),
    ] {
        assert_eq!(
            problems(&host("b", PIN, more))[0].key.as_deref(),
            Some(key),
            "{more}"
        );
    }
    for pin in [
        "",
        "x",
        "47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=",
        "beta.example",
        &PIN[..40],
    ] {
        assert_eq!(
            problems(&host("b", pin, ""))[0].key.as_deref(),
            Some("pin"),
            "{pin}"
        );
    }
}

#[test]
fn a_file_that_says_where_vms_are_is_checked_with_its_lines() {
    let dir = tempfile::tempdir().unwrap();
    let (main, map) = (dir.path().join("aditd.toml"), dir.path().join("vms.map"));
    let text = format!(
        "[names]\nhost = \"alpha\"\n[peers]\nmap = \"{}\"\n{}",
        map.display(),
        host("b", PIN, "names = [\"db-*\"]\n")
    );
    std::fs::write(&main, text).unwrap();
    let load = |rows: &str| {
        std::fs::write(&map, rows).unwrap();
        Config::load(&main)
    };
    let config = load("# shared\ndb-1 b\nweb-1 alpha\n").unwrap();
    let rows: Vec<_> = config.peers.rows.iter().collect();
    assert_eq!((rows.len(), rows[0].1.as_str()), (2, "b"));
    for (rows, why) in [
        ("db-1 b\nweb-1 b\n", "line 2: `names` of [[host]] `b`"),
        ("db-1 c\n", "line 1: there is no [[host]] `c`"),
        ("db-1\n", "line 1: a line has two words"),
    ] {
        let ConfigError::Wrong { problems } = load(rows).unwrap_err() else {
            panic!("{rows}")
        };
        let found = &problems[0];
        assert_eq!(
            (found.line, found.key.as_deref()),
            (4, Some("map")),
            "{rows}"
        );
        assert!(found.message.contains(why), "{}", found.message);
    }
    std::fs::remove_file(&map).unwrap();
    assert!(matches!(
        Config::load(&main),
        Err(ConfigError::Wrong { .. })
    ));
}

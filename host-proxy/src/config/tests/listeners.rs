//! Listeners, and the files that they name.

use super::*;

#[test]
fn a_proxy_for_other_machines_needs_the_operators_word() {
    let listen = |address: &str| format!("[proxy]\nlisten = \"{address}\"\n");
    parse("[metrics]\nlisten = \"127.0.0.1:7081\"\n").unwrap();
    for address in [
        "127.0.0.1:1",
        "127.8.9.1:1",
        "[::1]:1",
        "[::ffff:127.0.0.1]:1",
    ] {
        let ours = parse(&listen(address)).unwrap().summary();
        assert!(!ours.contains("other machines"), "{ours}");
    }
    for address in [
        "0.0.0.0:7080",
        "[::]:7080",
        "192.0.2.1:7080",
        "[fe80::1]:7080",
        "[::ffff:192.0.2.1]:7080",
    ] {
        let found = &problems(&listen(address))[0];
        assert_eq!((found.line, found.key.as_deref()), (2, Some("listen")));
        let open = parse(&(listen(address) + "open = true\n")).unwrap();
        assert_eq!(open.proxy.listen.to_string(), address);
        assert!(
            open.summary()
                .contains(&format!("{address} (other machines"))
        );
        // It shows all VMs to whoever reaches it.
        let metrics = format!("[metrics]\nlisten = \"{address}\"\n");
        let found = &problems(&metrics)[0];
        assert_eq!((found.line, found.key.as_deref()), (2, Some("listen")));
        assert!(found.message.contains("`open = true`"), "{found:?}");
        let metrics = parse(&(metrics + "open = true\n")).unwrap().summary();
        assert_eq!(metrics.matches("(other machines").count(), 1, "{metrics}");
        problems(&(listen(address) + "open = false\n"));
    }
}

#[test]
fn a_listener_says_where_its_connections_lead_if_and_only_if_its_clients_do_not() {
    let listen = |more: &str| format!("[[listen]]\naddress = \"127.0.0.1:0\"\n{more}");
    for (more, key) in [
        ("speak = \"any\"\n", "to"),
        ("to = \"a:1\"\n", "to"),
        ("port = 1\n", "port"),
        ("speak = \"socks5\"\nport = 1\n", "port"),
    ] {
        let found = &problems(&listen(more))[0];
        assert_eq!(found.key.as_deref(), Some(key), "{more}");
    }
    let to = parse(&listen("speak = \"any\"\nto = \"WEB-1.adit:22\"\n")).unwrap();
    assert_eq!(
        to.listen[0]
            .destination(&to.names.suffix)
            .unwrap()
            .vm
            .as_str(),
        "web-1"
    );
    let open = "[[listen]]\naddress = \"0.0.0.0:1\"\n";
    assert_eq!(problems(open)[0].key.as_deref(), Some("address"));
    parse(&format!("{open}open = true\n")).unwrap();
    // Port 0 is another port each time; others are not.
    parse(&(listen("") + &listen(""))).unwrap();
    let twice = "[[listen]]\naddress = \"127.0.0.1:7\"\n";
    let found = &problems(&twice.repeat(2))[0];
    assert_eq!((found.line, found.key.as_deref()), (4, Some("address")));
    // Nor may one be where something else listens.
    for section in ["proxy", "metrics"] {
        let both = format!("[{section}]\nlisten = \"127.0.0.1:7\"\n{twice}");
        let found = &problems(&both)[0];
        assert_eq!((found.line, found.key.as_deref()), (4, Some("address")));
        parse(&both.replace(":7", ":0")).unwrap();
    }
    let both = "[proxy]\nlisten = \"127.0.0.1:7\"\n[metrics]\nlisten = \"127.0.0.1:7\"\n";
    assert_eq!(problems(both)[0].line, 4);
}

#[test]
fn a_listener_for_dns_has_one_address_and_says_what_it_answers() {
    let dns = |address: &str, more: &str| {
        format!("[[listen]]\naddress = \"{address}\"\nspeak = \"dns\"\nopen = true\n{more}")
    };
    let here = "127.0.0.1:53";
    for (text, key) in [
        // An answer would come from another address than was asked.
        (dns("0.0.0.0:53", ""), "address"),
        (dns("[::]:53", ""), "address"),
        (dns("unix:/run/a.sock", ""), "address"),
        (dns(here, "cert = \"/a\"\nkey = \"/a\"\n"), "cert"),
        (dns(here, "role = \"management\"\n"), "speak"),
        (dns(here, "to = \"a:1\"\n"), "to"),
        (dns(here, "network = \"a b\"\n"), "network"),
        (dns(here, "answer = [\"0.0.0.0\"]\n"), "answer"),
        (dns(here, "answer = [\"host.example\"]\n"), "answer"),
        (
            dns(here, "answer = [\"192.0.2.1\", \"192.0.2.2\"]\n"),
            "answer",
        ),
        (
            dns(here, "answer = [\"192.0.2.1\", \"::ffff:192.0.2.2\"]\n"),
            "answer",
        ),
        (
            dns(here, "").replace("\"dns\"", "\"http\"") + "network = \"lab\"\n",
            "network",
        ),
        (
            dns(here, "").replace("\"dns\"", "\"any\"") + "to = \"a:1\"\nanswer = [\"::1\"]\n",
            "answer",
        ),
    ] {
        let found = &problems(&text)[0];
        assert_eq!(found.key.as_deref(), Some(key), "{text}");
    }
    let answers = |text: &str| {
        let answers = parse(text).unwrap().listen[0].answers();
        answers.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(answers(&dns(here, "network = \"lab\"\n")), ["127.0.0.1"]);
    let both = "answer = [\"192.0.2.1\", \"2001:db8::1\"]\n";
    assert_eq!(answers(&dns(here, both)), ["192.0.2.1", "2001:db8::1"]);
}

/// A certificate and its key.
fn certified(name: &str) -> (String, String) {
    let key = rcgen::KeyPair::generate().unwrap();
    let params = rcgen::CertificateParams::new(vec![name.into()]).unwrap();
    let certificate = params.self_signed(&key).unwrap();
    (certificate.pem(), key.serialize_pem())
}

#[test]
fn files_of_a_listener_are_checked_with_it_and_nothing_of_its_key_is_shown() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        std::fs::write(dir.path().join(name), text).unwrap();
        dir.path().join(name).display().to_string()
    };
    let ((cert, key), (_, other)) = (certified("a"), certified("b"));
    let encrypted = key.replace("PRIVATE KEY", "ENCRYPTED PRIVATE KEY");
    let (cut, two) = (&key[..key.len() / 2], format!("{key}{other}"));
    let both = file("both", &format!("Bag Attributes\n{key}{cert}"));
    let (cert, key) = (file("cert", &cert), file("key", &key));
    let listen = |keys: &str| {
        let text = format!("\n[[listen]]\naddress = \"127.0.0.1:1\"\n{keys}\n");
        Config::load(Path::new(&file("aditd.toml", &text)))
    };
    let with = |cert: &str, key: &str| listen(&format!("cert = \"{cert}\"\nkey = \"{key}\""));
    for (cert, key) in [(&cert, &key), (&both, &both)] {
        let config = with(cert, key).unwrap();
        assert!(config.listen[0].terms().unwrap().is_some());
        assert!(config.summary().contains("http over TLS"));
        let sources = Sources::read(&dir.path().join("aditd.toml")).unwrap();
        let unpacked = Sources::unpack(&sources.packed()).unwrap();
        assert_eq!(Config::of(&unpacked).unwrap(), config);
        let secret = std::fs::read_to_string(key).unwrap();
        let secret = secret.split("PRIVATE KEY-----").nth(1).unwrap();
        let secret = secret.lines().nth(1).unwrap();
        let shown = format!("{config:?} {sources:?} {}", config.summary());
        assert!(
            !shown.contains(secret) && !serde_json::to_string(&config).unwrap().contains(secret)
        );
        // Whoever changes them needs no restart.
        assert_eq!(config.digest(), listen("").unwrap().digest());
    }
    let pipe = dir.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let (none, pipe) = (file("none", "text"), pipe.display().to_string());
    let large = file("large", &"x".repeat(2 << 20));
    let not_v3 = "-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n";
    let not_v3 = file("not-v3", not_v3);
    for (cert, key, at, why) in [
        (&*cert, "/nonexistent/x", "key", "No such file"),
        ("/nonexistent/x", &key, "cert", "No such file"),
        (&pipe, &key, "cert", "regular file"),
        (&large, &key, "cert", "more than"),
        (&none, &key, "cert", "no certificate"),
        (&key, &key, "cert", "no certificate"),
        (&not_v3, &key, "cert", "X.509"),
        (&cert, &cert, "key", "no private key"),
        (&cert, &file("other", &other), "key", "not the key of"),
        (&cert, &file("two", &two), "key", "more than one"),
        (&cert, &file("cut", cut), "key", "broken"),
        (&cert, &file("encrypted", &encrypted), "key", "encrypted"),
    ] {
        let Err(ConfigError::Wrong { problems }) = with(cert, key) else {
            panic!("{why}");
        };
        let line = if at == "cert" { 4 } else { 5 };
        let found = (problems.len(), problems[0].line, problems[0].key.as_deref());
        assert_eq!(found, (1, line, Some(at)), "{problems:?}");
        let message = &problems[0].message;
        assert!(message.contains(why), "{message}");
        assert!(
            message.contains(if at == "cert" { cert } else { key }),
            "{message}"
        );
    }
    let pair = format!("cert = \"{cert}\"\nkey = \"{key}\"\n");
    for (keys, at) in [
        (format!("cert = \"{cert}\""), "cert"),
        (format!("key = \"{key}\""), "key"),
        (format!("client_ca = \"{cert}\""), "client_ca"),
        (format!("{pair}client_ca = \"{none}\""), "client_ca"),
        (format!("{pair}client_ca = \"{not_v3}\""), "client_ca"),
        (format!("{pair}speak = \"tls\""), "cert"),
        (format!("{pair}speak = \"any\"\nto = \"a:1\""), "cert"),
    ] {
        let Err(ConfigError::Wrong { problems }) = listen(&keys) else {
            panic!("{keys}");
        };
        assert_eq!(problems[0].key.as_deref(), Some(at), "{problems:?}");
    }
}

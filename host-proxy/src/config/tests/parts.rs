//! Files of `conf.d`, and the grants in them.

use super::*;

/// `aditd.toml` and `conf.d` with these files.
fn with_parts(
    main: &str,
    parts: &[(&str, &str)],
) -> (tempfile::TempDir, Result<Config, ConfigError>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("aditd.toml");
    std::fs::write(&path, main).unwrap();
    std::fs::create_dir(dir.path().join("conf.d")).unwrap();
    for (name, text) in parts {
        std::fs::write(dir.path().join("conf.d").join(name), text).unwrap();
    }
    let loaded = Config::load(&path);
    (dir, loaded)
}

const GRANT: &str = "[[grant]]\nto = [\"user:a\"]\nvms = [\"*\"]\nmay = [\"see\"]\n";

#[test]
fn files_of_conf_d_add_to_the_main_one_in_the_order_of_their_names() {
    let (dir, loaded) = with_parts(
        VM,
        &[
            ("20-b.toml", "[[vm]]\nname = \"c\"\ncid = 5\n"),
            (
                "10-a.toml",
                &format!("\n{GRANT}[[vm]]\nname = \"b\"\ncid = 4\n"),
            ),
            (".20-b.toml.swp", "x"),
            (".half.toml", "x"),
            ("README", "x"),
        ],
    );
    let config = loaded.unwrap();
    let names: Vec<_> = config.vm.iter().map(|vm| vm.name.as_str()).collect();
    assert_eq!(names, ["a", "b", "c"]);
    let place = format!("{}:2", dir.path().join("conf.d/10-a.toml").display());
    assert_eq!(config.grants().all()[0].place, place);
    // Another process of aditd has the same.
    let sources = Sources::read(&dir.path().join("aditd.toml")).unwrap();
    let unpacked = Sources::unpack(&sources.packed()).unwrap();
    assert_eq!(Config::of(&unpacked).unwrap(), config);
}

#[test]
fn a_mistake_in_a_file_of_conf_d_names_that_file() {
    for (text, line, key) in [
        ("\n[limits]\nkept_days = 1\n", 2, "limits"),
        (
            "[[grant]]\nto = [\"user:a\"]\nvms = [\"*\"]\nmay = [\"fly\"]\n",
            4,
            "may",
        ),
        ("[[vm]]\nname = \"a\"\ncid = 9\n", 2, "name"),
        ("\n[[vm]]\nname = \"b\"\ncid = 3\n", 4, "cid"),
    ] {
        let (dir, loaded) = with_parts(VM, &[("x.toml", text)]);
        let Err(ConfigError::Wrong { problems }) = loaded else {
            panic!("{text}")
        };
        let found = (
            &problems[0].file,
            problems[0].line,
            problems[0].key.as_deref(),
        );
        assert_eq!(found, (&dir.path().join("conf.d/x.toml"), line, Some(key)));
    }
}

#[test]
fn a_grant_must_say_who_what_and_with_which_vms() {
    for key in ["to", "vms", "may"] {
        let lines = GRANT.lines().filter(|line| !line.starts_with(key));
        let text: String = lines.map(|line| format!("{line}\n")).collect();
        assert_eq!(problems(&text)[0].key.as_deref(), Some(key));
    }
    let said = &problems(&GRANT.replace("see", "expose:web"))[0].message;
    assert!(said.contains("`expose`"), "{said}");
    for may in ["exec:root", "files", "files:ops@/srv"] {
        assert!(parse(&GRANT.replace("see", may)).is_ok());
    }
    let grants = parse(GRANT).unwrap().grants();
    assert_eq!(grants.all()[0].place, "a.toml:1");
}

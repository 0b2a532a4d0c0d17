//! What somebody types on the first day, and gets wrong: each answer says what failed, why, and what to do next, and has the status
//! of its kind.

use crate::text;

#[test]
fn a_mistake_is_answered_by_what_failed_why_and_what_to_do_next() {
    let dir = tempfile::tempdir().unwrap();
    let pin = "sha256/AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
    for (args, code, says) in [
        (
            &["proxy", "--lisen", "x"][..],
            2,
            &["--lisen", "--listen"][..],
        ),
        (
            &["proxy"],
            2,
            &["which server", "help: ", "--server", "--pin"],
        ),
        (
            &["proxy", "--listen", "x"],
            2,
            &["`x`", "ADDRESS:PORT", "unix:PATH"],
        ),
        (
            &["--server", "https://127.0.0.1:1", "proxy"],
            2,
            &["nothing says which server to believe", "help: ", "--ca"],
        ),
        (
            &["--server", "https://127.0.0.1:1", "--pin", pin, "proxy"],
            3,
            &["https://127.0.0.1:1", "refused", "help: ", "management"],
        ),
        (
            &["goal", "apply", "/nowhere", "--to", "web-9"],
            1,
            &["/nowhere", "No such file", "help: ", "standard input"],
        ),
        (
            &["connect", "adit://alpha/web-1"],
            2,
            &["three parts", "help: ", "adit:///web-1/80"],
        ),
        (
            &["connect", "adit:///web-1/"],
            2,
            &["without a service", "help: "],
        ),
        (
            &["connect", "adit://…/web-1/80"],
            2,
            &["is no name of a host", "help: "],
        ),
        (
            &["resolve", "web_9"],
            4,
            &["`web_9`", "help: ", "--all-hosts"],
        ),
        (&["resolve", "web-9"], 3, &["none.sock", "help: "]),
        (&["vm", "ls", "--all-hosts"], 3, &["none.sock", "help: "]),
        (
            &["forward", "web-1", "8080"],
            2,
            &["`8080`", "LOCALPORT:PORT"],
        ),
        (&["forward", "docker.web-1.svc"], 2, &["<WAY>", "Usage: "]),
    ] {
        let out = crate::adit(dir.path(), args);
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(code), "{args:?}: {said}");
        for words in says {
            assert!(said.contains(words), "{args:?}: no `{words}` in {said}");
        }
        assert!(out.stdout.is_empty(), "{args:?}");
    }
}

//! What a file with mistakes is answered.

mod hosts;
mod limits;
mod listeners;
mod parts;

use adit_channel::socket_path::PATH_MAX;
use adit_tasks::anchor::ANCHORS_MAX;

use super::*;

const VM: &str = "[[vm]]\nname = \"a\"\ncid = 3\n";

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse(Path::new("a.toml"), text)
}

fn problems(text: &str) -> Vec<Problem> {
    match parse(text) {
        Err(ConfigError::Wrong { problems, .. }) => problems,
        other => panic!("{other:?}\n{text}"),
    }
}

#[test]
fn an_empty_file_is_a_configuration() {
    assert_eq!(parse("").unwrap(), Config::default());
}

#[test]
fn a_run_dir_that_is_too_long_for_a_socket_is_refused() {
    let vm = "[[vm]]\nname = \"web-1\"\ncid = 3\n";
    // `/` and the rest of RUN/vm/web-1/ivshmem.sock.
    let rest = 1 + "/vm/web-1/ivshmem.sock".len();
    let dir = |len: usize| format!("run_dir = \"/{}\"\n", "x".repeat(len));
    parse(&(dir(PATH_MAX - rest) + vm)).unwrap();
    for (text, line) in [(dir(PATH_MAX - rest + 1) + vm, 3), (dir(PATH_MAX), 1)] {
        let found = &problems(&text)[0];
        assert_eq!(
            (found.line, found.key.as_deref()),
            (line, Some("run_dir")),
            "{found:?}"
        );
    }
}

#[test]
fn mistakes_name_file_line_and_key() {
    for (text, line, key) in [
        (
            "\n[proxy]\nlissten = \"127.0.0.1:1\"\n".to_owned(),
            3,
            "lissten",
        ),
        ("[ports]\nuids = \"0-70000\"\n".to_owned(), 2, "uids"),
        ("[ports]\nuids = \"65000-66000\"\n".to_owned(), 2, "uids"),
        ("[ports]\nuids = \"70000\"\n".to_owned(), 2, "uids"),
        (format!("{VM}alow = [80]\n"), 4, "alow"),
        (format!("{VM}allow = [70000]\n"), 4, "allow"),
        (
            format!("{VM}allow_vsock = [4294967295]\n"),
            4,
            "allow_vsock",
        ),
        (
            format!("{VM}allow_services = [\"Docker\"]\n"),
            4,
            "allow_services",
        ),
        (format!("{VM}ivshmem_mib = 6\n"), 4, "ivshmem_mib"),
        (
            format!(
                "{VM}carrier = {{ hybrid = \"/a/v\" }}\n[[vm]]\nname = \"b\"\ncid = 4\ncarrier = {{ hybrid = \"/a/./v\" }}\n"
            ),
            8,
            "carrier",
        ),
        (
            format!("{VM}[[vm]]\nname = \"b\"\ncarrier = {{ vsock = {{ cid = 3 }} }}\n"),
            6,
            "carrier",
        ),
        (
            format!("{VM}carrier = {{ vsock = {{ cid = 4 }} }}\n"),
            3,
            "cid",
        ),
        ("[[vm]]\nname = \"A\"\ncid = 3\n".to_owned(), 2, "name"),
        ("[[vm]]\nname = \"a\"\ncid = 2\n".to_owned(), 3, "cid"),
        ("[[vm]]\nname = \"a\"\n".to_owned(), 1, "cid"),
        (format!("{VM}[[vm]]\nname = \"a\"\ncid = 4\n"), 5, "name"),
        (format!("{VM}[[vm]]\nname = \"b\"\ncid = 3\n"), 6, "cid"),
        (format!("{VM}cid = 4\n"), 4, "cid"),
        ("proxy = 3\n".to_owned(), 1, "proxy"),
        ("[vm]\nname = \"a\"\ncid = 4\n".to_owned(), 1, "vm"),
        ("vm = [3]\n".to_owned(), 1, "vm"),
    ] {
        let found = &problems(&text)[0];
        assert_eq!(
            (found.line, found.key.as_deref()),
            (line, Some(key)),
            "{found:?}"
        );
        let said = parse(&text).unwrap_err().to_string();
        assert!(
            said.starts_with(&format!("a.toml:{line}: `{key}`: ")),
            "{said}"
        );
    }
}

#[test]
fn a_vm_of_the_hosts_kernel_has_the_cid_of_its_carrier_and_a_clash_names_both_places() {
    let of = |text: &str| {
        let text = format!("[[vm]]\nname = \"a\"\n{text}");
        parse(&text).unwrap().vm.remove(0)
    };
    for cid in ["", "cid = 42\n"] {
        let vm = of(&format!("{cid}carrier = {{ vsock = {{ cid = 42 }} }}\n"));
        assert_eq!((vm.cid, vm.carrier.kernel()), (42, Some(42)));
        // As the database has it.
        let kept = serde_json::to_string(&vm).unwrap();
        assert_eq!(serde_json::from_str::<VmConfig>(&kept).unwrap(), vm);
    }
    let carrier = "carrier = { vsock = { cid = 42 } }";
    let text = format!("[[vm]]\nname = \"a\"\n{carrier}\n[[vm]]\nname = \"b\"\n{carrier}\n");
    let said = parse(&text).unwrap_err().to_string();
    let is_clear = said.starts_with("a.toml:6: `carrier`: ") && said.ends_with("already: line 3");
    assert!(is_clear, "{said}");
}

#[test]
fn every_mistake_of_a_file_is_named_at_once() {
    let text = "run_dir = \"run\"\nstates = 1\n[limits]\nkept_days = \"x\"\nresponse_s = 0\n[[vm]]\nname = \"a\"\n";
    let found: Vec<_> = problems(text)
        .into_iter()
        .map(|p| (p.line, p.key))
        .collect();
    let found: Vec<_> = found
        .iter()
        .map(|(line, key)| (*line, key.as_deref().unwrap()))
        .collect();
    let want = [
        (1, "run_dir"),
        (2, "states"),
        (4, "kept_days"),
        (5, "response_s"),
        (6, "cid"),
    ];
    assert_eq!(found, want);
}

#[test]
fn an_unknown_key_has_a_suggestion() {
    for (text, suggestion) in [
        (format!("{VM}alow = [80]\n"), "`allow`"),
        (
            "[proxy]\nlissten = \"127.0.0.1:1\"\n".to_owned(),
            "`listen`",
        ),
        ("[limit]\n".to_owned(), "`limits`"),
        ("statedir = \"/a\"\n".to_owned(), "`state_dir`"),
        (format!("{VM}run_dir = \"/a\"\n"), "before all sections"),
        ("allow = [80]\n".to_owned(), "[[vm]]"),
        ("xyz = 1\n".to_owned(), "example-config"),
    ] {
        let said = &problems(&text)[0].message;
        assert!(said.contains(suggestion), "{text}: {said}");
    }
}

#[test]
fn each_vm_needs_a_user_of_its_own() {
    let vms = |n: u64| -> String {
        (0..n)
            .map(|n| format!("[[vm]]\nname = \"a{n}\"\ncid = {}\n", n + 3))
            .collect()
    };
    let uids = "[ports]\nuids = \"70000-70001\"\n";
    parse(&(uids.to_owned() + &vms(2))).unwrap();
    let found = &problems(&(uids.to_owned() + &vms(3)))[0];
    assert_eq!((found.line, found.key.as_deref()), (2, Some("uids")));
}

#[test]
fn r125_a_label_of_the_configuration_is_one_or_is_refused() {
    for labels in [
        "{ Env = \"prod\" }",
        "{ env = \"a b\" }",
        "{ env = 7 }",
        "{ env = \"\" }",
    ] {
        let found = &problems(&format!("{VM}labels = {labels}\n"))[0];
        assert_eq!(
            (found.line, found.key.as_deref()),
            (4, Some("labels")),
            "{labels}"
        );
    }
}

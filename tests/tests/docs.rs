//! The pages are true where a program can tell: lists are compared with the files and the code that they are about.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use adit_api::{TaskState, VmState};

const PAGES: [&str; 11] = [
    "README.md",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "docs/install.md",
    "docs/operate.md",
    "docs/clients.md",
    "docs/exec.md",
    "docs/files.md",
    "docs/link-your-vmm.md",
    "docs/link-the-ring.md",
    "docs/which-carrier.md",
];
/// Folders whose every source file is in a table of ARCHITECTURE.md.
const PRODUCT: [&str; 23] = [
    "names",
    "blob",
    "cgroup",
    "exec",
    "files",
    "passed",
    "print",
    "ringbuf",
    "ringbuf/io",
    "ringbuf/pci",
    "channel/engine",
    "channel",
    "tasks",
    "host-proxy/api",
    "host-proxy/reach",
    "host-proxy/client",
    "host-proxy/port",
    "host-proxy",
    "guest-driver",
    "cli",
    "vmm-sample",
    "vmm-sample/bare",
    "testkit",
];

fn read(path: &str) -> String {
    fs::read_to_string(adit_tests::root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// Rust files below a folder of the repository, as paths from its root.
fn rust_files(folder: &str) -> BTreeSet<String> {
    fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
            let path = entry.path();
            let name = entry.file_name();
            if path.is_dir() && name != "target" && name != ".git" && name != "corpus" {
                walk(&path, found);
            } else if path.extension().is_some_and(|e| e == "rs") {
                found.push(path);
            }
        }
    }
    let root = adit_tests::root();
    let mut found = Vec::new();
    walk(&root.join(folder), &mut found);
    let of_root = |p: &PathBuf| p.strip_prefix(&root).unwrap().display().to_string();
    found.iter().map(of_root).collect()
}

/// Words in backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// The first cells of a section's table.
fn first_cells<'a>(page: &'a str, heading: &str) -> Vec<&'a str> {
    rows(page, heading)
        .into_iter()
        .map(|cells| cells[0])
        .collect()
}

/// The cells of a table's rows, heading and rule left out, of the section that begins with `heading`.
fn rows<'a>(page: &'a str, heading: &str) -> Vec<Vec<&'a str>> {
    let section = page.split_once(&format!("\n{heading}\n"));
    let section = section
        .unwrap_or_else(|| panic!("no section `{heading}`"))
        .1;
    let end = section.find("\n#").unwrap_or(section.len());
    let rows = section[..end].lines().filter(|l| l.starts_with('|'));
    let cells = |l: &'a str| l.trim_matches('|').split('|').map(str::trim).collect();
    rows.skip(2).map(cells).collect()
}

#[test]
fn every_file_with_unsafe_is_listed_and_no_other() {
    let page = read("ARCHITECTURE.md");
    let listed: BTreeSet<String> = first_cells(&page, "## Files with `unsafe`")
        .iter()
        .flat_map(|cell| quoted(cell))
        .map(str::to_owned)
        .collect();
    // In two parts, or this file would be one of them.
    let keyword = ["un", "safe"].concat();
    let forms = [" {", " fn", " impl", " extern", "_code)"].map(|after| keyword.clone() + after);
    let uses = |path: &String| {
        let text = read(path);
        let mut code = text.lines().filter(|l| !l.trim_start().starts_with("//"));
        code.any(|l| {
            let forbids = l.contains("forbid(") || l.contains("deny(");
            !forbids && forms.iter().any(|form| l.contains(form))
        })
    };
    let mut files = rust_files("");
    files.retain(uses);
    assert_eq!(
        listed, files,
        "left: ARCHITECTURE.md, right: files that have it"
    );
}

#[test]
fn every_source_file_is_in_its_crates_table_and_every_row_is_a_file() {
    let page = read("ARCHITECTURE.md");
    let (mut all_gone, mut all_new) = (Vec::new(), Vec::new());
    for folder in PRODUCT {
        let src = format!("{folder}/src");
        let mut listed = BTreeMap::new();
        for name in first_cells(&page, &format!("### `{src}`"))
            .into_iter()
            .flat_map(quoted)
        {
            *listed.entry(format!("{src}/{name}")).or_insert(0) += 1;
        }
        let twice: Vec<_> = listed.iter().filter(|(_, n)| **n > 1).collect();
        assert!(twice.is_empty(), "listed twice: {twice:?}");
        let mut files = rust_files(&src);
        // Unit tests stand beside what they test.
        files.retain(|f| !f.ends_with("/tests.rs") && !f.contains("/tests/"));
        let listed: BTreeSet<String> = listed.into_keys().collect();
        all_gone.extend(listed.difference(&files).cloned());
        all_new.extend(files.difference(&listed).cloned());
    }
    assert!(
        all_gone.is_empty() && all_new.is_empty(),
        "ARCHITECTURE.md: no such file {all_gone:#?}, not in a table {all_new:#?}"
    );
}

/// What a pure file may use of others. Whatever else there is has a clock, a lock, a thread or IO in it, or could have.
const PURE: [&str; 30] = [
    "TaskState as S;",
    "std::collections::",
    "std::fmt",
    "std::hash::Hash",
    "std::net::SocketAddr",
    "std::net::IpAddr",
    "super::destination::Destination",
    "super::*",
    "super::caller::Caller",
    "super::decide::Verb",
    "super::decide::{Verb, Where}",
    "super::grant::Grant",
    "super::grant::{Grant, May}",
    "super::resolve::",
    "super::rows::",
    "super::subject::Subject",
    "super::vms::Vms",
    "std::ops::RangeInclusive",
    "std::str::FromStr",
    "adit_api::TaskState",
    "adit_names::",
    "adit_tasks::",
    "adit_port::control::Target",
    "crate::reach::{Destination, Suffix}",
    "hickory_proto::",
    "adit_blob::Digest",
    "base64::",
    "semver::Version",
    "serde::{Deserialize, Serialize}",
    "proptest::",
];

/// Of the files that I1 names: they import only what is pure, and name nothing by its whole path.
#[test]
fn pure_files_use_what_is_pure_and_nothing_else() {
    let page = read("ARCHITECTURE.md");
    let invariants = rows(&page, "## Invariants");
    let named = invariants.iter().filter(|row| row[0] == "I1");
    let files: Vec<&str> = named.flat_map(|row| quoted(row[1])).collect();
    assert!(
        files.iter().any(|f| f.ends_with("access/decide.rs")),
        "{files:?}"
    );
    for file in files {
        for line in read(file).lines().map(str::trim) {
            if let Some(used) = line.strip_prefix("use ") {
                let is_pure = PURE.iter().any(|p| used.starts_with(p));
                assert!(is_pure, "{file}: {line}");
            } else if !line.starts_with("//") && !line.ends_with("mod tests;") {
                let paths = [
                    "std::",
                    "crate::",
                    "tokio::",
                    "tracing::",
                    "async ",
                    "unsafe ",
                ];
                let named = paths.iter().find(|p| line.contains(**p));
                assert_eq!(named, None, "{file}: {line}");
            }
        }
    }
}

#[test]
fn links_of_the_pages_lead_to_files() {
    for page in PAGES {
        let text = read(page);
        let dir = Path::new(page).parent().unwrap();
        for target in text
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split(')').next())
        {
            let target = target.split('#').next().unwrap();
            if !target.is_empty() && !target.contains("://") {
                let file = adit_tests::root().join(dir).join(target);
                assert!(file.exists(), "{page}: {target}");
            }
        }
    }
}

/// Also in pictures. A name may leave folders out in front.
#[test]
fn files_that_the_pages_name_exist() {
    let files = rust_files("");
    for page in PAGES {
        let text = read(page);
        let words = text.split(|c: char| c.is_whitespace() || "`,|()".contains(c));
        for name in words
            .map(|w| {
                w.trim_end_matches(['.', ':', ';'])
                    .trim_start_matches("../")
            })
            .filter(|w| w.ends_with(".rs"))
        {
            let there = files
                .iter()
                .any(|f| f == name || f.ends_with(&format!("/{name}")));
            assert!(there, "{page}: {name}");
        }
    }
}

/// So the compiler has seen them.
#[test]
fn rust_on_the_pages_is_lines_of_the_code() {
    let squeeze = |line: &str| line.split_whitespace().collect::<String>();
    let code: BTreeSet<String> = rust_files("")
        .iter()
        .flat_map(|f| read(f).lines().map(squeeze).collect::<Vec<_>>())
        .collect();
    let mut seen = 0;
    for page in PAGES {
        let text = read(page);
        let blocks = text.split("\n```rust\n").skip(1);
        let lines = blocks.flat_map(|block| block.split("\n```").next().unwrap().lines());
        for line in lines.filter(|l| !l.trim_start().starts_with("//") && !l.is_empty()) {
            assert!(code.contains(&squeeze(line)), "{page}: {line}");
            seen += 1;
        }
    }
    assert!(seen > 0);
}

#[test]
fn operate_explains_every_state_of_a_vm_and_of_a_task() {
    let page = read("docs/operate.md");
    for (heading, names) in [
        (
            "## What a VM's state means",
            VmState::ALL.map(VmState::name).to_vec(),
        ),
        (
            "## What a task's state means",
            TaskState::ALL.map(TaskState::name).to_vec(),
        ),
    ] {
        let explained: BTreeSet<&str> = first_cells(&page, heading)
            .into_iter()
            .flat_map(quoted)
            .collect();
        assert_eq!(explained, BTreeSet::from_iter(names), "{heading}");
    }
}

#[test]
fn the_databases_words_for_states_are_their_names() {
    let names = TaskState::ALL.map(TaskState::name);
    let mut found = BTreeSet::new();
    for file in rust_files("host-proxy/src") {
        let text = read(&file);
        for line in text.lines().filter(|l| l.contains("state")) {
            let words = line.split('\'').skip(1).step_by(2);
            let is_word =
                |w: &&str| !w.is_empty() && w.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
            for word in words.filter(is_word) {
                assert!(
                    names.contains(&word),
                    "{file}: `{word}` is no state: {line}"
                );
                found.insert(word.to_owned());
            }
        }
    }
    assert!(found.contains("queued"), "{found:?}");
}

/// Keys of a file with every key, commented out or not, as `section.key`, and their defaults.
fn keys(example: &str) -> BTreeMap<String, String> {
    let (mut section, mut default, mut found) = (String::new(), None, BTreeMap::new());
    for line in example.lines() {
        let code = line.trim_start_matches('#');
        let word = |k: &str| {
            !k.is_empty()
                && k.bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
        };
        if let Some(name) = code.strip_prefix('[') {
            section = name.trim_matches(['[', ']']).to_owned() + ".";
        } else if let Some((key, value)) = code.split_once(" = ").filter(|(k, _)| word(k)) {
            let value = default.take().unwrap_or_else(|| value.to_owned());
            found.insert(format!("{section}{key}"), value);
        } else if line.starts_with("# Required") || line.contains("Required;") {
            default = Some("required".to_owned());
        } else if let Some((_, rest)) = line.split_once("# Default: ") {
            default = rest.split_once(". ").map(|(value, _)| value.to_owned());
        }
    }
    found
}

#[test]
fn operate_explains_every_key_of_each_configuration() {
    let page = read("docs/operate.md");
    for (heading, example) in [
        (
            "## Every key of `aditd.toml`",
            "host-proxy/dist/aditd.toml.example",
        ),
        (
            "## Every key of `adit-guest.toml`",
            "guest-driver/dist/adit-guest.toml.example",
        ),
        (
            "## Every key of `policy.toml`",
            "guest-driver/dist/policy.toml.example",
        ),
    ] {
        let rows = rows(&page, heading);
        let plain = |cell: &str| cell.trim_matches('`').to_owned();
        let explained: BTreeMap<_, _> = rows.iter().map(|r| (plain(r[0]), plain(r[2]))).collect();
        assert_eq!(
            explained,
            keys(&read(example)),
            "left: {heading}, right: {example}"
        );
    }
}

/// Names of all metrics.
fn metrics(source: &str) -> BTreeSet<&str> {
    let lines = source.lines().map(str::trim);
    let names = lines.filter_map(|l| l.strip_prefix("name: \"")?.strip_suffix("\","));
    names.collect()
}

#[test]
fn operate_explains_every_metric() {
    let page = read("docs/operate.md");
    let source = read("host-proxy/src/metrics.rs");
    let explained: BTreeSet<&str> = first_cells(&page, "## Metrics")
        .into_iter()
        .flat_map(quoted)
        .collect();
    assert_eq!(explained, metrics(&source));
}

/// A rule about a metric that is not there never fires, and nobody finds out.
#[test]
fn every_metric_of_an_alert_rule_is_there() {
    let (rules, source) = (
        read("host-proxy/dist/alerts.yml"),
        read("host-proxy/src/metrics.rs"),
    );
    let there = metrics(&source);
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let words = rules.split(|c| !is_word(c));
    let mut seen = 0;
    for name in words.filter(|word| word.starts_with("adit_")) {
        let of_histogram = ["_bucket", "_count", "_sum"];
        let mut family = of_histogram.iter().filter_map(|end| name.strip_suffix(end));
        let is_there = there.contains(name) || family.any(|family| there.contains(family));
        assert!(is_there, "{name}");
        seen += 1;
    }
    assert!(seen > 0);
}

#[test]
fn operate_explains_every_exit_status_of_adit() {
    let page = read("docs/operate.md");
    let help = read("cli/src/lib.rs");
    let help = help.split_once("\nExit status:\n").unwrap().1;
    let number = |l| str::split_whitespace(l).next().unwrap_or_default();
    let is_number = |w: &&str| !w.is_empty() && w.bytes().all(|b| b.is_ascii_digit());
    let lines = help.split("\";").next().unwrap().lines();
    let of_help: BTreeSet<&str> = lines.map(number).filter(is_number).collect();
    let explained: BTreeSet<&str> = first_cells(&page, "## Exit statuses of `adit`")
        .into_iter()
        .collect();
    assert_eq!(explained, of_help);
}

#[test]
fn the_changelog_names_the_formats_of_this_version() {
    let page = read("CHANGELOG.md");
    let version = env!("CARGO_PKG_VERSION");
    let newest = page.lines().find(|l| l.starts_with("## ")).unwrap();
    assert!(newest.starts_with(&format!("## {version} ")), "{newest}");
    let mut compared = 0;
    for row in rows(&page, newest) {
        let (number, mut place) = (row[2], quoted(row[3]));
        let (Some(file), Some(constant)) = (place.next(), place.next()) else {
            continue;
        };
        let source = read(file);
        let line = source
            .lines()
            .find(|l| l.contains(&format!("const {constant}:")))
            .unwrap_or_else(|| panic!("{file} has no {constant}"));
        let value = line.rsplit_once("= ").unwrap().1.trim_end_matches(';');
        // A list of steps, each of which makes a version.
        let value = match value.starts_with("&[") {
            true => value.split(',').count().to_string(),
            false => value.to_owned(),
        };
        assert_eq!(value, number, "{constant} of {file}");
        compared += 1;
    }
    assert_ne!(compared, 0);
}

/// No page and no comment is about a file that a reader does not have.
#[test]
fn nothing_points_outside_of_the_repository() {
    for path in rust_files("").into_iter().chain(PAGES.map(str::to_owned)) {
        let text = read(&path);
        let outside = ["/work", "/"].concat();
        let line = text.lines().find(|l| l.contains(&outside));
        assert!(
            line.is_none() || path.ends_with("tests/tests/docs.rs"),
            "{path}: {line:?}"
        );
    }
}

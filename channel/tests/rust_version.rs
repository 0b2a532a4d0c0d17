//! The libraries that a VMM links state the oldest compiler that they build with, and not an older one.
//!
//! Only one compiler is at hand here, so it is found by what can be read: `rust-version` of the dependencies, which this
//! test compares; the standard library's functions, of which clippy's `incompatible_msrv` knows since when there are
//! (`cargo xtask test` makes a warning of it a fault); and parts of the language, of which this test knows those that
//! these crates use.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// The libraries, and what they are made of.
const LIBRARIES: [&str; 6] = [
    "adit-channel",
    "adit-engine",
    "adit-names",
    "adit-passed",
    "adit-ringbuf",
    "adit-ringbuf-io",
];

/// Edition 2024.
const EDITION: Version = Version(1, 85);
/// `if let … && let …`.
const LET_CHAINS: Version = Version(1, 88);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Version(u64, u64);

impl Version {
    fn of(package: &Value) -> Option<Self> {
        let mut parts = package["rust_version"].as_str()?.split('.');
        let mut next = || parts.next()?.parse().ok();
        Some(Self(next()?, next()?))
    }
}

struct Metadata {
    packages: BTreeMap<String, Value>,
    /// Packages by which a package is built, without tests, build scripts and other systems.
    dependencies: BTreeMap<String, Vec<String>>,
}

fn id(value: &Value) -> String {
    value.as_str().expect("an id").to_owned()
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().expect("a list").iter()
}

impl Metadata {
    fn read() -> Self {
        let out = Command::new(env!("CARGO"))
            .args(["metadata", "--offline", "--format-version", "1"])
            .args(["--filter-platform", "x86_64-unknown-linux-gnu"])
            .output()
            .expect("cargo");
        let all: Value = serde_json::from_slice(&out.stdout)
            .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&out.stderr)));
        let dependencies = list(&all["resolve"]["nodes"]).map(|node| {
            let normal = |dep: &&Value| list(&dep["dep_kinds"]).any(|kind| kind["kind"].is_null());
            let deps = list(&node["deps"]).filter(normal);
            (id(&node["id"]), deps.map(|dep| id(&dep["pkg"])).collect())
        });
        let packages = list(&all["packages"]).map(|p| (id(&p["id"]), p.clone()));
        Self {
            packages: packages.collect(),
            dependencies: dependencies.collect(),
        }
    }

    fn library(&self, name: &str) -> &Value {
        let local = |p: &&Value| p["name"] == name && p["source"].is_null();
        self.packages.values().find(local).expect("a library")
    }

    /// The packages that a library is built from, without itself.
    fn below(&self, library: &Value) -> Vec<&Value> {
        let (mut seen, mut next) = (BTreeSet::new(), vec![id(&library["id"])]);
        while let Some(package) = next.pop() {
            if seen.insert(package.clone()) {
                next.extend(self.dependencies[&package].iter().cloned());
            }
        }
        seen.remove(&id(&library["id"]));
        seen.iter().map(|id| &self.packages[id]).collect()
    }
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            sources(&path, found);
        } else {
            found.push(path);
        }
    }
}

#[test]
fn no_library_claims_an_older_compiler_than_its_dependencies_need() {
    let all = Metadata::read();
    for name in LIBRARIES {
        let library = all.library(name);
        let claimed = Version::of(library).expect("a library says it");
        let below = all.below(library);
        assert!(
            name != "adit-channel" || below.len() > 30,
            "{}",
            below.len()
        );
        for package in below {
            let needed = Version::of(package).unwrap_or(EDITION);
            let what = &package["name"];
            assert!(
                claimed >= needed,
                "{name} claims {claimed:?}, but its dependency {what} needs {needed:?}"
            );
        }
        assert!(claimed >= EDITION, "{name}: {claimed:?}");
        let workspace = Version::of(all.library("adit-testkit")).expect("the workspace's");
        assert!(
            claimed < workspace,
            "{name} claims what everything else does"
        );
    }
}

#[test]
fn no_library_uses_what_is_newer_than_it_claims() {
    let all = Metadata::read();
    for name in LIBRARIES {
        let library = all.library(name);
        let claimed = Version::of(library).expect("a library says it");
        let folder = PathBuf::from(id(&library["manifest_path"]));
        let mut files = Vec::new();
        sources(&folder.with_file_name("src"), &mut files);
        for file in files {
            let text = std::fs::read_to_string(&file).expect("a source file");
            let chains = text.lines().any(|line| line.contains("&& let "));
            assert!(!chains || claimed >= LET_CHAINS, "{}", file.display());
            assert!(!text.contains("incompatible_msrv"), "{}", file.display());
        }
    }
}

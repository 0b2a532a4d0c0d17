//! Checks a file against the table of keys: every mistake, with its line, in words of the product.

use std::net::SocketAddr;
use std::ops::Range;
use std::path::{Path, PathBuf};

use adit_names::VmId;
use adit_tasks::card::Labels;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::carrier::{check_cid, check_path};
use super::keys::{Key, Kind, MANY, keys};
use super::{ALLOW_MAX, Address, Config, Files};

/// One mistake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The file.
    pub file: PathBuf,
    /// From 1.
    pub line: usize,
    /// The key at fault, if one is.
    pub key: Option<String>,
    /// What is wrong.
    pub message: String,
}

/// Characters of a value that are shown.
const SHOWN_MAX: usize = 60;
/// How much a suggestion looks like what was written at least, of 1.
const ALIKE_MIN: f64 = 0.7;

/// A file, whose form is right: what it says, and where.
pub(super) struct Document<'a> {
    path: &'a Path,
    text: &'a str,
    root: Spanned<DeTable<'a>>,
}

impl<'a> Document<'a> {
    /// # Errors
    /// It is no TOML.
    pub(super) fn parse(path: &'a Path, text: &'a str) -> Result<Self, Problem> {
        let root = DeTable::parse(text).map_err(|e| of_toml(path, text, &e))?;
        Ok(Self { path, text, root })
    }

    /// Returns every mistake that can be seen in a single value; `is_part`: the file is one of `conf.d`.
    pub(super) fn check(&self, is_part: bool) -> Vec<Problem> {
        let mut problems = Vec::new();
        if is_part {
            let root = self.root.get_ref().iter();
            let others = root
                .filter(|(key, _)| MANY.iter().all(|(many, _)| *many != key.get_ref().as_ref()));
            problems.extend(others.map(|(key, _)| {
                let many: Vec<_> = MANY.iter().map(|(many, _)| format!("[[{many}]]")).collect();
                let message = format!(
                    "a file of conf.d has {} only: this belongs into aditd.toml",
                    many.join(", ")
                );
                self.problem(self.line(key.span()), key.get_ref(), message)
            }));
        }
        if problems.is_empty() {
            self.table(self.root.get_ref(), "", 1, &mut problems);
        }
        problems
    }

    fn problem(&self, line: usize, key: &str, message: String) -> Problem {
        Problem {
            file: self.path.into(),
            line,
            key: Some(key.into()),
            message,
        }
    }

    /// How many of a section there are.
    fn count(&self, section: &str) -> usize {
        let many = self.root.get_ref().get(section).map(Spanned::get_ref);
        many.and_then(DeValue::as_array)
            .map_or(0, |many| many.len())
    }

    /// Line of a key of the n-th of many sections, or of the section.
    fn line_of(&self, section: &str, nth: usize, key: &str) -> usize {
        let many = self.root.get_ref().get(section).map(Spanned::get_ref);
        let one = many
            .and_then(DeValue::as_array)
            .and_then(|many| many.get(nth));
        let Some(one) = one else { return 1 };
        let table = one.get_ref().as_table();
        match table.and_then(|t| t.get_key_value(key)) {
            Some((key, _)) => self.line(key.span()),
            None => self.line(one.span()),
        }
    }

    /// Line of a key of a section.
    fn section_line(&self, section: &str, key: &str) -> usize {
        let section = self.root.get_ref().get(section).map(Spanned::get_ref);
        let table = section.and_then(DeValue::as_table);
        let key = table.and_then(|t| t.get_key_value(key));
        key.map_or(1, |(key, _)| self.line(key.span()))
    }

    /// Line of a key before all sections.
    fn top_line(&self, key: &str) -> usize {
        let key = self.root.get_ref().get_key_value(key);
        key.map_or(1, |(key, _)| self.line(key.span()))
    }

    fn line(&self, at: Range<usize>) -> usize {
        line_at(self.text, at.start)
    }

    fn table(&self, table: &DeTable<'_>, section: &str, line: usize, to: &mut Vec<Problem>) {
        for (key, value) in table {
            let name = key.get_ref().as_ref();
            let path = match section {
                "" => name.to_owned(),
                _ => format!("{section}.{name}"),
            };
            let line = self.line(key.span());
            let mut wrong = |message| to.push(self.problem(line, name, message));
            if let Some(known) = keys().find(|k| k.path == path) {
                self.value(known, value, &mut wrong);
            } else if section.is_empty() && keys().any(|k| k.section() == name) {
                let many = MANY.iter().find(|(many, _)| *many == name);
                match (many, value.get_ref()) {
                    (Some((_, one)), DeValue::Array(all)) => {
                        for each in all {
                            match each.get_ref() {
                                DeValue::Table(table) => {
                                    self.table(table, name, self.line(each.span()), to);
                                }
                                _ => {
                                    let message = format!("each {one} is a section `[[{name}]]`");
                                    to.push(self.problem(line, name, message));
                                }
                            }
                        }
                    }
                    (Some((_, one)), _) => {
                        wrong(format!(
                            "each {one} is a section `[[{name}]]`, in double brackets"
                        ));
                    }
                    (None, DeValue::Table(inner)) => self.table(inner, name, line, to),
                    (None, _) => wrong(format!("this is a section: `[{name}]`")),
                }
            } else {
                wrong(unknown(name, section));
            }
        }
        let required = keys().filter(|k| k.section() == section && k.is_required());
        let is_said =
            |k: &&Key| table.contains_key(k.name()) || k.path == "vm.cid" && has_cid(table);
        for key in required.filter(|k| !is_said(k)) {
            let (place, limit) = (place(section), key.limit());
            let message = format!("it is missing {place}; it takes {limit}");
            to.push(self.problem(line, key.name(), message));
        }
    }

    fn value(&self, key: &Key, value: &Spanned<DeValue<'_>>, wrong: &mut impl FnMut(String)) {
        let number = |value: &DeValue<'_>| {
            let n = value.as_integer()?;
            u64::from_str_radix(n.as_str(), n.radix()).ok()
        };
        let is_right = match (key.kind, value.get_ref()) {
            (Kind::Flag, DeValue::Boolean(_)) => true,
            (Kind::Numbers { .. }, DeValue::Array(list)) => {
                if list.len() > ALLOW_MAX {
                    let len = list.len();
                    return wrong(format!("it lists {len} numbers, and may list {ALLOW_MAX}"));
                }
                let takes = |v: &&Spanned<DeValue<'_>>| {
                    number(v.get_ref()).is_some_and(|n| key.kind.takes_number(n))
                };
                match list.iter().find(|v| !takes(v)) {
                    Some(bad) => return wrong(self.is_not(bad, key)),
                    None => true,
                }
            }
            (Kind::Texts { of, max }, DeValue::Array(list)) => {
                if list.len() > max {
                    let len = list.len();
                    return wrong(format!("it lists {len} texts, and may list {max}"));
                }
                let refused = list
                    .iter()
                    .find_map(|value| match value.get_ref().as_str() {
                        Some(text) => {
                            let why = of.refuses(text)?;
                            Some(format!("{}: {why}", self.is_not(value, key)))
                        }
                        None => Some(self.is_not(value, key)),
                    });
                match refused {
                    Some(why) => return wrong(why),
                    None if list.is_empty() && key.is_required() => {
                        return wrong(format!("the list is empty; it is {}", key.limit()));
                    }
                    None => true,
                }
            }
            (Kind::Labels, DeValue::Table(table)) => {
                let mut labels = Labels::default();
                for (name, value) in table {
                    let Some(text) = value.get_ref().as_str() else {
                        return wrong(self.is_not(value, key));
                    };
                    if let Err(e) = labels.add(name.get_ref(), text) {
                        return wrong(e.to_string());
                    }
                }
                true
            }
            (Kind::Carrier, DeValue::Table(table)) => {
                let mut says_where = false;
                for (name, value) in table {
                    let is_right = match (name.get_ref().as_ref(), value.get_ref()) {
                        ("hybrid", DeValue::String(path)) => check_path(Path::new(path.as_ref())),
                        ("half_closes", DeValue::Boolean(_)) => continue,
                        ("vsock", DeValue::Table(vsock)) if table.len() == 1 => {
                            let cid = vsock.get("cid").filter(|_| vsock.len() == 1);
                            let cid = cid.and_then(|cid| number(cid.get_ref()));
                            let Some(cid) = cid else {
                                return wrong(self.is_not(value, key));
                            };
                            check_cid(cid)
                        }
                        ("auto", DeValue::Table(auto)) if table.len() == 1 => {
                            let path = auto.get("hybrid").and_then(|path| path.get_ref().as_str());
                            let has_more = auto.iter().any(|(name, value)| {
                                let is_flag = matches!(value.get_ref(), DeValue::Boolean(_));
                                let name = name.get_ref().as_ref();
                                name != "hybrid" && !(name == "half_closes" && is_flag)
                            });
                            let Some(path) = path.filter(|_| !has_more) else {
                                return wrong(self.is_not(value, key));
                            };
                            check_path(Path::new(path))
                        }
                        _ => return wrong(self.is_not(value, key)),
                    };
                    if let Err(why) = is_right {
                        return wrong(format!("{}: {why}", self.is_not(value, key)));
                    }
                    says_where = true;
                }
                says_where
            }
            (Kind::Numbers { .. } | Kind::Texts { .. } | Kind::Labels, _) => false,
            (kind, DeValue::String(text)) => kind.takes_text(text),
            (kind, value) => number(value).is_some_and(|n| kind.takes_number(n)),
        };
        if !is_right {
            wrong(self.is_not(value, key));
        }
    }

    fn is_not(&self, value: &Spanned<DeValue<'_>>, key: &Key) -> String {
        let text = self.text.get(value.span()).unwrap_or_default();
        format!("it takes {}, not `{}`", key.limit(), shown(text))
    }
}

/// Whether the section of a VM has a CID in its carrier.
fn has_cid(vm: &DeTable<'_>) -> bool {
    let carrier = vm.get("carrier").and_then(|c| c.get_ref().as_table());
    carrier.is_some_and(|carrier| carrier.contains_key("vsock"))
}

fn shown(text: &str) -> impl std::fmt::Display {
    adit_names::escape(text).at_most(SHOWN_MAX)
}

/// All files of a configuration, in which sections of which there are many are counted through.
#[derive(Default)]
pub(super) struct Documents<'a>(Vec<Document<'a>>);

impl<'a> Documents<'a> {
    /// Adds a file, and what it says to the whole.
    pub(super) fn add(&mut self, document: Document<'a>, mut part: Config, whole: &mut Config) {
        for vm in part.vm.iter_mut().filter(|vm| vm.cid == 0) {
            // The file does not say it, or it says no CID, which was found.
            vm.cid = vm.carrier.kernel().map_or(0, u64::from);
        }
        for (nth, grant) in part.grant.iter_mut().enumerate() {
            let line = document.line_of("grant", nth, "");
            grant.place = format!("{}:{line}", document.path.display());
        }
        if self.0.is_empty() {
            *whole = part;
        } else {
            whole.vm.append(&mut part.vm);
            whole.discover.append(&mut part.discover);
            whole.listen.append(&mut part.listen);
            whole.grant.append(&mut part.grant);
            whole.token.append(&mut part.token);
            whole.host.append(&mut part.host);
        }
        self.0.push(document);
    }

    /// The main file.
    fn main(&self) -> Option<&Document<'a>> {
        self.0.first()
    }

    /// A mistake in a key of a section that there is once, or of none.
    fn once(&self, section: &str, key: &str, message: String) -> Option<Problem> {
        let main = self.main()?;
        let line = match section {
            "" => main.top_line(key),
            _ => main.section_line(section, key),
        };
        Some(main.problem(line, key, message))
    }

    /// A mistake in the n-th of many sections.
    fn nth(&self, section: &str, nth: usize, key: &str, message: String) -> Option<Problem> {
        let (document, nth) = self.find(section, nth)?;
        let line = document.line_of(section, nth, key);
        Some(document.problem(line, key, message))
    }

    /// Where the n-th of many sections is written.
    fn place(&self, section: &str, nth: usize, key: &str) -> String {
        let Some((document, nth)) = self.find(section, nth) else {
            return String::new();
        };
        let line = document.line_of(section, nth, key);
        match self.0.len() {
            1 => format!("line {line}"),
            _ => format!("{}:{line}", document.path.display()),
        }
    }

    fn find(&self, section: &str, nth: usize) -> Option<(&Document<'a>, usize)> {
        let mut nth = nth;
        for document in &self.0 {
            match document.count(section) {
                count if nth < count => return Some((document, nth)),
                count => nth -= count,
            }
        }
        self.main().map(|main| (main, usize::MAX))
    }
}

fn place(section: &str) -> String {
    match section {
        "" => "before all sections".into(),
        section if MANY.iter().any(|(many, _)| *many == section) => {
            format!("in this [[{section}]]")
        }
        section => format!("in [{section}]"),
    }
}

/// What a key that does not exist was probably meant to be.
fn unknown(name: &str, section: &str) -> String {
    let elsewhere = keys().find(|k| k.name() == name);
    if let Some(key) = elsewhere {
        let place = match key.section() {
            "" => "before all sections".into(),
            section if MANY.iter().any(|(many, _)| *many == section) => {
                format!("into a section [[{section}]]")
            }
            section => format!("into [{section}]"),
        };
        return format!("it does not belong here, but {place}");
    }
    let here = keys().filter(|k| k.section() == section).map(Key::name);
    let sections = keys().filter(|_| section.is_empty()).map(Key::section);
    let others = here.chain(sections).filter(|k| !k.is_empty());
    let alike = others.map(|k| (strsim::jaro_winkler(k, name), k));
    let nearest = alike.max_by(|(a, _), (b, _)| a.total_cmp(b));
    match nearest {
        Some((likeness, key)) if likeness >= ALIKE_MIN => {
            format!(
                "there is no such key {}; did you mean `{key}`?",
                place(section)
            )
        }
        _ => format!(
            "there is no such key {}; `aditd example-config` lists them all",
            place(section)
        ),
    }
}

/// What the TOML parser says, with its line.
pub(super) fn of_toml(path: &Path, text: &str, e: &toml::de::Error) -> Problem {
    let line = line_at(text, e.span().map_or(0, |s| s.start));
    let at = text.lines().nth(line - 1).and_then(|l| l.split_once('='));
    Problem {
        file: path.into(),
        line,
        key: at.map(|(key, _)| key.trim().to_owned()),
        message: format!("this is not valid TOML: {}", e.message().replace('\n', " ")),
    }
}

fn line_at(text: &str, at: usize) -> usize {
    text.bytes().take(at).filter(|&b| b == b'\n').count() + 1
}

/// Returns every mistake that shows only when values are compared.
pub(super) fn compare(config: &Config, documents: &Documents<'_>) -> Vec<Problem> {
    let mut problems = Vec::new();
    for (section, len, max) in [
        ("vm", config.vm.len(), super::VMS_MAX),
        ("listen", config.listen.len(), super::access::LISTENS_MAX),
        (
            "grant",
            config.grant.len(),
            crate::access::grant::GRANTS_MAX,
        ),
        ("token", config.token.len(), super::access::TOKENS_MAX),
        ("host", config.host.len(), super::HOSTS_MAX),
        ("discover", config.discover.len(), super::DISCOVERS_MAX),
    ] {
        if len > max {
            let message = format!("there are {len}, and may be {max}");
            let at = documents.nth(section, max, "", message);
            problems.extend(at.map(|at| Problem {
                key: Some(section.into()),
                ..at
            }));
        }
    }
    if let Err(message) = config.proxy.check() {
        problems.extend(documents.once("proxy", "listen", message));
    }
    if let Some(Err(message)) = config.metrics.as_ref().map(|metrics| metrics.check()) {
        problems.extend(documents.once("metrics", "listen", message));
    }
    if let Some(uids) = config.ports.uids
        && uids.iter().take(config.vm.len()).count() < config.vm.len()
    {
        let vms = config.vm.len();
        let message =
            format!("{uids} are fewer users than there are VMs: {vms}, and each has its own");
        problems.extend(documents.once("ports", "uids", message));
    }
    let mut hybrids = std::collections::BTreeMap::new();
    for (nth, vm) in config.vm.iter().enumerate() {
        let Some(hybrid) = vm.carrier.hybrid() else {
            continue;
        };
        // As `Path` compares: without empty parts and `.`.
        if let Some(first) = hybrids.insert(hybrid.hybrid.as_path(), nth) {
            let first = documents.place("vm", first, "carrier");
            let message = format!(
                "another VM has the socket {}: {first}",
                hybrid.hybrid.display()
            );
            problems.extend(documents.nth("vm", nth, "carrier", message));
        }
    }
    for (nth, discover) in config.discover.iter().enumerate() {
        if let Err((key, why)) = discover.check() {
            problems.extend(documents.nth("discover", nth, key, why));
        }
        if let Some(first) = super::discover::same(&config.discover, nth) {
            let first = documents.place("discover", first, "dir");
            let message = format!("another section looks for the same: {first}");
            problems.extend(documents.nth("discover", nth, "dir", message));
        }
    }
    if let Err(e) = adit_channel::socket_path::check_len(&config.api_socket()) {
        problems.extend(documents.once("", "run_dir", e.to_string()));
        return problems;
    }
    let once = [
        ("proxy", Some(config.proxy.listen)),
        ("metrics", config.metrics.as_ref().map(|m| m.listen)),
    ];
    let once = once.map(|(section, at)| (section, at.filter(|at| at.port() != 0)));
    if let [(_, Some(proxy)), (_, Some(metrics))] = once
        && proxy == metrics
    {
        let message = format!("the proxy has the address {proxy}: `listen` of [proxy]");
        problems.extend(documents.once("metrics", "listen", message));
    }
    let mut addresses = std::collections::BTreeMap::new();
    for (nth, listen) in config.listen.iter().enumerate() {
        if let Err((key, why)) = listen.check() {
            problems.extend(documents.nth("listen", nth, key, why));
        }
        let address = listen.address.to_string();
        // Port 0 is another port each time.
        let is_any = address.ends_with(":0");
        if let Some(first) = addresses.insert(address, nth).filter(|_| !is_any) {
            let first = documents.place("listen", first, "address");
            let message = format!(
                "another listener has the address {}: {first}",
                listen.address
            );
            problems.extend(documents.nth("listen", nth, "address", message));
        }
        let is = |at: &SocketAddr| listen.address == Address::Tcp(*at);
        for (section, _) in once.iter().filter(|(_, at)| at.as_ref().is_some_and(is)) {
            let message = format!(
                "`listen` of [{section}] has the address {} already",
                listen.address
            );
            problems.extend(documents.nth("listen", nth, "address", message));
        }
    }
    let mut tokens = std::collections::BTreeMap::new();
    for (nth, token) in config.token.iter().enumerate() {
        if let Some(first) = tokens.insert(&token.name, nth) {
            let first = documents.place("token", first, "name");
            let message = format!("another token has the name `{}`: {first}", token.name);
            problems.extend(documents.nth("token", nth, "name", message));
        }
    }
    if let Some(host) = &config.names.host {
        if config.names.suffix.hides(host) {
            let message = format!("names that end with `.{host}` mean something else already");
            problems.extend(documents.once("names", "host", message));
        }
        if let Some(nth) = config.vm.iter().position(|vm| vm.name == *host) {
            let vm = documents.place("vm", nth, "name");
            let message =
                format!("a VM has the name `{host}` ({vm}), and hosts and VMs share their names");
            problems.extend(documents.once("names", "host", message));
        }
    }
    for nth in 0..config.host.len() {
        if let Some((key, why)) = config.clash_of_host(nth) {
            problems.extend(documents.nth("host", nth, key, why));
        }
    }
    for (nth, listen) in config.listen.iter().enumerate() {
        // A name with three labels or a suffix may be one by the default only.
        if listen.to.is_some() && listen.destination(&config.names.suffix).is_none() {
            let message = format!(
                "it names no VM where names end with `{}`",
                config.names.suffix
            );
            problems.extend(documents.nth("listen", nth, "to", message));
        }
    }
    let mut names = std::collections::BTreeMap::<&VmId, usize>::new();
    let mut cids = std::collections::BTreeMap::<u64, (usize, &str)>::new();
    for (nth, vm) in config.vm.iter().enumerate() {
        if let Err((key, why)) = config.check_paths(&vm.name) {
            let at = documents.nth("vm", nth, "name", why);
            problems.extend(at.map(|at| Problem {
                key: Some(key.into()),
                ..at
            }));
        }
        if let Some(first) = names.insert(&vm.name, nth) {
            let first = documents.place("vm", first, "name");
            let message = format!("another VM has the name `{}`: {first}", vm.name);
            problems.extend(documents.nth("vm", nth, "name", message));
        }
        // The key that says it.
        let key = match vm.carrier.kernel() {
            Some(_) => "carrier",
            None => "cid",
        };
        if let Some((first, key_of_first)) = cids.insert(vm.cid, (nth, key)) {
            let other = &config.vm[first].name;
            let at = documents.place("vm", first, key_of_first);
            let message = format!(
                "{} of `{}` is the CID of `{other}` already: {at}",
                vm.cid, vm.name
            );
            problems.extend(documents.nth("vm", nth, key, message));
        }
        if let Err(("cid", why)) = vm.check() {
            problems.extend(documents.nth("vm", nth, "cid", why));
        }
    }
    problems
}

/// Gives each listener, and `[peers]`, what is in their files. Returns every mistake in them.
pub(super) fn certificates(
    config: &mut Config,
    files: &Files,
    documents: &Documents<'_>,
) -> Vec<Problem> {
    let mut problems = Vec::new();
    for (nth, listen) in config.listen.iter_mut().enumerate() {
        let taken = listen.take(files).and_then(|()| listen.terms().map(drop));
        if let Err((key, why)) = taken {
            problems.extend(documents.nth("listen", nth, key, why));
        }
    }
    let taken = config.peers.take(files);
    if let Err((key, why)) = taken.and_then(|()| config.peers.identity().map(drop)) {
        problems.extend(documents.once("peers", key, why));
    }
    if let Err((key, why)) = config.take_rows(files) {
        problems.extend(documents.once("peers", key, why));
    }
    problems
}

//! Checks a file against the table of keys: every mistake, with its line, in words of the product.

use std::ops::Range;

use adit_names::VmId;
use adit_tasks::anchor::ANCHORS_MAX;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::keys::{Key, Kind, keys};
use super::{ALLOW_MAX, Config};

/// One mistake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
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
    text: &'a str,
    root: Spanned<DeTable<'a>>,
}

impl<'a> Document<'a> {
    /// # Errors
    /// It is no TOML.
    pub(super) fn parse(text: &'a str) -> Result<Self, Problem> {
        let root = DeTable::parse(text).map_err(|e| of_toml(text, &e))?;
        Ok(Self { text, root })
    }

    /// Returns every mistake that can be seen in a single value.
    pub(super) fn check(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        self.table(self.root.get_ref(), "", 1, &mut problems);
        problems
    }

    /// Line of a key of the n-th VM, or of the VM.
    pub(super) fn vm_line(&self, nth: usize, key: &str) -> usize {
        let vms = self.root.get_ref().get("vm").map(Spanned::get_ref);
        let vm = vms.and_then(DeValue::as_array).and_then(|vms| vms.get(nth));
        let Some(vm) = vm else { return 1 };
        let table = vm.get_ref().as_table();
        match table.and_then(|t| t.get_key_value(key)) {
            Some((key, _)) => self.line(key.span()),
            None => self.line(vm.span()),
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
    pub(super) fn top_line(&self, key: &str) -> usize {
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
            let mut wrong = |message| {
                let key = Some(name.to_owned());
                to.push(Problem { line, key, message });
            };
            if let Some(known) = keys().find(|k| k.path == path) {
                self.value(known, value, &mut wrong);
            } else if section.is_empty() && keys().any(|k| k.section() == name) {
                match (name, value.get_ref()) {
                    ("vm", DeValue::Array(vms)) => {
                        for vm in vms {
                            match vm.get_ref() {
                                DeValue::Table(vm_table) => {
                                    self.table(vm_table, name, self.line(vm.span()), to);
                                }
                                _ => to.push(Problem {
                                    line,
                                    key: Some(name.into()),
                                    message: "each VM is a section `[[vm]]`".into(),
                                }),
                            }
                        }
                    }
                    ("vm", _) => wrong("each VM is a section `[[vm]]`, in double brackets".into()),
                    (_, DeValue::Table(inner)) => self.table(inner, name, line, to),
                    _ => wrong(format!("this is a section: `[{name}]`")),
                }
            } else {
                wrong(unknown(name, section));
            }
        }
        let required = keys().filter(|k| k.section() == section && k.is_required());
        for key in required.filter(|k| !table.contains_key(k.name())) {
            to.push(Problem {
                line,
                key: Some(key.name().into()),
                message: format!(
                    "it is missing from {}; it is {}",
                    place(section),
                    key.limit()
                ),
            });
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
            (Kind::CardKeys, DeValue::Array(list)) => {
                if list.len() > ANCHORS_MAX {
                    let len = list.len();
                    return wrong(format!("it lists {len} keys, and may list {ANCHORS_MAX}"));
                }
                let takes = |v: &&Spanned<DeValue<'_>>| {
                    let text = v.get_ref().as_str();
                    text.is_some_and(|text| key.kind.takes_text(text))
                };
                match list.iter().find(|v| !takes(v)) {
                    Some(bad) => return wrong(self.is_not(bad, key)),
                    None => true,
                }
            }
            (Kind::Numbers { .. } | Kind::CardKeys, _) => false,
            (kind, DeValue::String(text)) => kind.takes_text(text),
            (kind, value) => number(value).is_some_and(|n| kind.takes_number(n)),
        };
        if !is_right {
            wrong(self.is_not(value, key));
        }
    }

    fn is_not(&self, value: &Spanned<DeValue<'_>>, key: &Key) -> String {
        let text = self.text.get(value.span()).unwrap_or_default();
        let text = adit_names::escape(text).at_most(SHOWN_MAX);
        format!("it takes {}, not `{text}`", key.limit())
    }
}

fn place(section: &str) -> String {
    match section {
        "" => "before all sections".into(),
        "vm" => "in this [[vm]]".into(),
        section => format!("in [{section}]"),
    }
}

/// What a key that does not exist was probably meant to be.
fn unknown(name: &str, section: &str) -> String {
    let elsewhere = keys().find(|k| k.name() == name);
    if let Some(key) = elsewhere {
        let place = match key.section() {
            "" => "before all sections".into(),
            "vm" => "into a section [[vm]]".into(),
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
pub(super) fn of_toml(text: &str, e: &toml::de::Error) -> Problem {
    let line = line_at(text, e.span().map_or(0, |s| s.start));
    let at = text.lines().nth(line - 1).and_then(|l| l.split_once('='));
    Problem {
        line,
        key: at.map(|(key, _)| key.trim().to_owned()),
        message: format!("this is not valid TOML: {}", e.message().replace('\n', " ")),
    }
}

fn line_at(text: &str, at: usize) -> usize {
    text.bytes().take(at).filter(|&b| b == b'\n').count() + 1
}

/// Returns every mistake that shows only when values are compared.
pub(super) fn compare(config: &Config, document: &Document<'_>) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut wrong = |line, key: &str, message| {
        let key = Some(key.to_owned());
        problems.push(Problem { line, key, message });
    };
    if config.vm.len() > super::VMS_MAX {
        let message = format!(
            "there are {}, and may be {}",
            config.vm.len(),
            super::VMS_MAX
        );
        wrong(document.vm_line(super::VMS_MAX, ""), "vm", message);
    }
    if let Err(message) = config.proxy.check() {
        wrong(document.section_line("proxy", "listen"), "listen", message);
    }
    if let Some(uids) = config.ports.uids
        && uids.iter().take(config.vm.len()).count() < config.vm.len()
    {
        let vms = config.vm.len();
        let message =
            format!("{uids} are fewer users than there are VMs: {vms}, and each has its own");
        wrong(document.section_line("ports", "uids"), "uids", message);
    }
    let run_dir = document.top_line("run_dir");
    if let Err(e) = adit_channel::socket_path::check_len(&config.api_socket()) {
        wrong(run_dir, "run_dir", e.to_string());
        return problems;
    }
    let mut names = std::collections::BTreeMap::<&VmId, usize>::new();
    let mut cids = std::collections::BTreeMap::<u64, &VmId>::new();
    for (nth, vm) in config.vm.iter().enumerate() {
        if let Err((key, why)) = config.check_paths(&vm.name) {
            wrong(document.vm_line(nth, "name"), key, why);
        }
        if let Some(first) = names.insert(&vm.name, nth) {
            let first = document.vm_line(first, "name");
            let message = format!("another VM has the name `{}`: line {first}", vm.name);
            wrong(document.vm_line(nth, "name"), "name", message);
        }
        if let Some(other) = cids.insert(vm.cid, &vm.name) {
            let message = format!(
                "{} of `{}` is the CID of `{other}` already",
                vm.cid, vm.name
            );
            wrong(document.vm_line(nth, "cid"), "cid", message);
        }
    }
    problems
}

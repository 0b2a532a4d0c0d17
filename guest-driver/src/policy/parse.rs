//! A policy file's text, checked whole: every mistake is told, with its line and column, in the words of whoever wrote it.

use std::fmt;
use std::ops::Range;

use adit_names::ServiceName;
use adit_tasks::{Kind, Principal};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::decide::{
    At, Exec, ExecRule, FilesRule, Line, Of, Policy, ServiceRule, StepRule, Who, is_plain,
};
use super::keys::{self, SECTIONS};

/// Longest file, bytes.
pub const FILE_MAX: usize = 64 << 10;
/// Most rules of a section.
pub const RULES_MAX: usize = 256;
/// Most entries of a list.
pub const ENTRIES_MAX: usize = 256;
/// Longest name of a kind, bytes.
const KIND_MAX: usize = 64;
/// Most mistakes that are told.
pub const PROBLEMS_MAX: usize = 64;
/// Characters of a value that are shown.
const SHOWN_MAX: usize = 60;

/// One mistake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// From 1.
    pub line: Line,
    /// In characters, from 1.
    pub column: usize,
    /// The key at fault, if one is.
    pub key: Option<String>,
    /// What is wrong, and what it takes.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: ", self.line, self.column)?;
        if let Some(key) = &self.key {
            write!(f, "key `{}`: ", adit_names::escape(key).at_most(SHOWN_MAX))?;
        }
        f.write_str(&self.message)
    }
}

/// Checks a file.
///
/// # Errors
/// Its mistakes, at most [`PROBLEMS_MAX`], in the order of their places.
pub fn parse(bytes: &[u8]) -> Result<Policy, Vec<Problem>> {
    let whole = |line, column, message: String| {
        let key = None;
        vec![Problem {
            line,
            column,
            key,
            message,
        }]
    };
    if bytes.len() > FILE_MAX {
        let message = format!("the file has more than {FILE_MAX} bytes");
        return Err(whole(1, 1, message));
    }
    let text = str::from_utf8(bytes).map_err(|e| {
        let good = String::from_utf8_lossy(&bytes[..e.valid_up_to()]);
        let (line, column) = place(&good, &line_starts(&good), good.len());
        let message = "this is not UTF-8: save the file as UTF-8 text";
        whole(line, column, message.into())
    })?;
    let mut reader = Reader {
        text,
        lines: line_starts(text),
        problems: Vec::new(),
    };
    let (root, errors) = DeTable::parse_recoverable(text);
    for e in &errors {
        let message = adit_tasks::plain(e.message());
        let at = e.span().unwrap_or_default();
        reader.wrong(at, None, format!("this is not valid TOML: {message}"));
    }
    // What is left of a text that is no TOML may mean something else.
    let policy = match errors.is_empty() {
        true => reader.policy(root.get_ref()),
        false => None,
    };
    let mut problems = reader.problems;
    match policy.filter(|_| problems.is_empty()) {
        Some(policy) => Ok(policy),
        None => {
            problems.sort_by_key(|p| (p.line, p.column));
            problems.truncate(PROBLEMS_MAX);
            Err(problems)
        }
    }
}

/// Where each line begins.
fn line_starts(text: &str) -> Vec<usize> {
    let after = text.match_indices('\n').map(|(at, _)| at + 1);
    [0].into_iter().chain(after).collect()
}

/// Line and column of an offset.
fn place(text: &str, lines: &[usize], at: usize) -> (Line, usize) {
    let at = text.floor_char_boundary(at);
    let line = lines.partition_point(|begin| *begin <= at);
    let begin = lines.get(line.wrapping_sub(1)).copied().unwrap_or(0);
    (line, text[begin..at].chars().count() + 1)
}

type Value<'t> = Spanned<DeValue<'t>>;

struct Reader<'t> {
    text: &'t str,
    lines: Vec<usize>,
    problems: Vec<Problem>,
}

impl<'t> Reader<'t> {
    fn line(&self, at: &Range<usize>) -> Line {
        self.lines.partition_point(|begin| *begin <= at.start)
    }

    fn wrong(&mut self, at: Range<usize>, key: Option<&str>, message: String) {
        // As many as are told, and one: a file of mistakes must not cost more than it says.
        if self.problems.len() > PROBLEMS_MAX {
            return;
        }
        let (line, column) = place(self.text, &self.lines, at.start);
        self.problems.push(Problem {
            line,
            column,
            key: key.map(str::to_owned),
            message,
        });
    }

    fn is_not(&mut self, value: &Value<'t>, key: &str, takes: &str) {
        let text = self.text.get(value.span()).unwrap_or_default();
        let text = adit_names::escape(text).at_most(SHOWN_MAX);
        let message = format!("it takes {takes}, not `{text}`");
        self.wrong(value.span(), Some(key), message);
    }

    fn policy(&mut self, root: &DeTable<'t>) -> Option<Policy> {
        self.unknown_keys(root, "");
        let default = self.required(root, "", "default", 0..0);
        let default = default.map(|(at, value)| {
            if value.get_ref().as_str() != Some("deny") {
                self.is_not(value, "default", "only \"deny\"");
            }
            at
        });
        let steps = self.rules(root, "step", Self::step);
        let services = self.rules(root, "service", Self::service);
        let exec = self.rules(root, "exec", Self::exec);
        self.contradictions("exec", "commands", &exec, |rule| &rule.allow);
        let files = self.rules(root, "files", Self::files);
        self.contradictions("files", "files", &files, |rule| &rule.allow);
        Some(Policy {
            default: default?,
            steps: placeless(steps),
            services: placeless(services),
            exec: placeless(exec),
            files: placeless(files),
        })
    }

    /// What says two things about a section: nobody should have to know which of them counts.
    fn contradictions<T>(
        &mut self,
        section: &str,
        what: &str,
        rules: &[(Range<usize>, T)],
        allow: impl Fn(&T) -> &At<Exec>,
    ) {
        let is_off = |(_, rule): &&(Range<usize>, T)| allow(rule).value == Exec::Off;
        let Some((_, off)) = rules.iter().find(is_off) else {
            return;
        };
        for (at, _) in rules.iter().filter(|rule| !is_off(rule)) {
            let message = format!(
                "this allows {what}, and line {} says that {section} is off: remove one of them",
                allow(off).line
            );
            self.wrong(at.clone(), Some(section), message);
        }
    }

    fn unknown_keys(&mut self, table: &DeTable<'t>, section: &str) {
        for key in table.keys() {
            let name: &str = key.get_ref();
            let is_section = section.is_empty() && SECTIONS.contains(&name);
            if is_section || keys::of(section).any(|key| key.name == name) {
                continue;
            }
            let mut here: Vec<_> = keys::of(section).map(|k| format!("`{}`", k.name)).collect();
            if section.is_empty() {
                here.extend(SECTIONS.map(|name| format!("[[{name}]]")));
            }
            let place = match section {
                "" => "a policy has".into(),
                section => format!("[[{section}]] has"),
            };
            let message = format!("there is no such key; {place} {}", here.join(", "));
            self.wrong(key.span(), Some(name), message);
        }
    }

    /// A key's line and value; `at`: where to say that it is missing.
    fn required<'v>(
        &mut self,
        table: &'v DeTable<'t>,
        section: &str,
        name: &str,
        at: Range<usize>,
    ) -> Option<(Line, &'v Value<'t>)> {
        let found = table.get_key_value(name);
        if found.is_none() {
            let takes = keys::of(section).find(|key| key.name == name);
            let takes = takes.map_or("", |key| key.takes);
            let message = format!("it is missing; it takes {takes}");
            self.wrong(at, Some(name), message);
        }
        found.map(|(key, value)| (self.line(&key.span()), value))
    }

    fn rules<T>(
        &mut self,
        root: &DeTable<'t>,
        section: &'static str,
        read: fn(&mut Self, &DeTable<'t>, Range<usize>) -> Option<T>,
    ) -> Vec<(Range<usize>, T)> {
        let Some((key, value)) = root.get_key_value(section) else {
            return Vec::new();
        };
        let DeValue::Array(list) = value.get_ref() else {
            let message = format!("each rule is a section `[[{section}]]`, in double brackets");
            self.wrong(key.span(), Some(section), message);
            return Vec::new();
        };
        if list.len() > RULES_MAX {
            let message = format!("there are {}, and may be {RULES_MAX}", list.len());
            self.wrong(key.span(), Some(section), message);
            return Vec::new();
        }
        let mut rules = Vec::new();
        for rule in list.iter() {
            let DeValue::Table(table) = rule.get_ref() else {
                let message = format!("each rule is a section `[[{section}]]`");
                self.wrong(rule.span(), Some(section), message);
                continue;
            };
            self.unknown_keys(table, section);
            if let Some(read) = read(self, table, rule.span()) {
                rules.push((rule.span(), read));
            }
        }
        rules
    }

    fn step(&mut self, table: &DeTable<'t>, at: Range<usize>) -> Option<StepRule> {
        let line = self.line(&at);
        let kinds = self.required(table, "step", "kinds", at.clone());
        let kinds = kinds.and_then(|(line, value)| {
            let takes = "a name of a kind: 1 to 64 of a-z, 0-9, `-` and `_`";
            let value = self.list(value, "kinds", takes, kind)?;
            let value: Vec<String> = value.into_iter().map(|kind| kind.value).collect();
            Some(At { line, value })
        });
        let users = self.required(table, "step", "users", at.clone());
        let users = users.and_then(|(line, value)| self.whom(value, "users", line));
        let groups = table.get_key_value("groups").map(|(key, value)| {
            let line = self.line(&key.span());
            self.whom(value, "groups", line)
        });
        let roots = table.get_key_value("roots").map(|(key, value)| {
            let line = self.line(&key.span());
            let takes = "a plain absolute path: no `.`, `..`, `//` or slash at its end";
            let root = |value: &DeValue<'_>| {
                let path = value.as_str()?;
                (path == "/" || is_plain(path)).then(|| path.to_owned())
            };
            let value = self.list(value, "roots", takes, root)?;
            let value = value.into_iter().map(|root| root.value).collect();
            Some(At { line, value })
        });
        let kinds = kinds?;
        let has = |kind: Kind| kinds.value.iter().any(|name| name == kind.name());
        if has(Kind::Script) && (has(Kind::File) || roots.is_some()) {
            let message = "a script writes wherever its user may, and no `roots` hold for it: give it a rule of its own";
            self.wrong(at, Some("kinds"), message.into());
            return None;
        }
        if has(Kind::File) && roots.is_none() {
            self.required(table, "step", "roots", at);
            return None;
        }
        // None of an inner `Option`: it is there, and a mistake was told.
        let (groups, roots) = (swap(groups)?, swap(roots)?);
        Some(StepRule {
            line,
            kinds,
            users: users?,
            groups,
            roots,
        })
    }

    fn service(&mut self, table: &DeTable<'t>, at: Range<usize>) -> Option<ServiceRule> {
        let line = self.line(&at);
        let (_, value) = self.required(table, "service", "names", at)?;
        let takes = "the whole name of a service, such as \"ping\" or \"tcp:80\"";
        let names = self.list(value, "names", takes, service)?;
        Some(ServiceRule { line, names })
    }

    fn exec(&mut self, table: &DeTable<'t>, at: Range<usize>) -> Option<ExecRule> {
        let line = self.line(&at);
        let allow = self.allow(table, "exec", at.clone())?;
        if allow.value == Exec::Off {
            self.alone(table, "exec", &["users", "commands"]);
            // They hold for nobody.
            let (users, commands) = (Of::These(Vec::new()), Of::These(Vec::new()));
            return Some(ExecRule {
                line,
                allow,
                users: At { line, value: users },
                commands: At {
                    line,
                    value: commands,
                },
            });
        }
        let users = self.required(table, "exec", "users", at.clone());
        let users = users.and_then(|(line, value)| self.whom(value, "users", line));
        let (commands_line, value) = self.required(table, "exec", "commands", at)?;
        let commands = match value.get_ref().as_str() {
            Some("any") => Of::Any,
            _ => {
                let takes = "the absolute path of a program, without arguments";
                let path = |value: &DeValue<'_>| {
                    let path = value.as_str().filter(|path| is_plain(path));
                    path.map(str::to_owned)
                };
                let list = self.list(value, "commands", takes, path)?;
                Of::These(list.into_iter().map(|path| path.value).collect())
            }
        };
        Some(ExecRule {
            line,
            allow,
            users: users?,
            commands: At {
                line: commands_line,
                value: commands,
            },
        })
    }

    /// Whether a section is off, or by whose word it is on.
    fn allow(
        &mut self,
        table: &DeTable<'t>,
        section: &'static str,
        at: Range<usize>,
    ) -> Option<At<Exec>> {
        let (line, value) = self.required(table, section, "allow", at)?;
        let value = match value.get_ref().as_str() {
            Some("off") => Exec::Off,
            Some("host") => Exec::Host,
            Some("ticket") => Exec::Ticket,
            _ => {
                self.is_not(value, "allow", "\"off\", \"ticket\" or \"host\"");
                return None;
            }
        };
        Some(At { line, value })
    }

    /// What is off has no other keys.
    fn alone(&mut self, table: &DeTable<'t>, section: &str, names: &[&str]) {
        for name in names {
            if let Some((key, _)) = table.get_key_value(*name) {
                let message = format!(
                    "{section} is off for everybody: `allow = \"off\"` is alone in its rule"
                );
                self.wrong(key.span(), Some(name), message);
            }
        }
    }

    fn files(&mut self, table: &DeTable<'t>, at: Range<usize>) -> Option<FilesRule> {
        let line = self.line(&at);
        let allow = self.allow(table, "files", at.clone())?;
        if allow.value == Exec::Off {
            self.alone(table, "files", &["users", "read", "write"]);
            let value = Of::These(Vec::new());
            return Some(FilesRule {
                line,
                allow,
                users: At { line, value },
                read: None,
                write: None,
            });
        }
        let users = self.required(table, "files", "users", at.clone());
        let users = users.and_then(|(line, value)| self.whom(value, "users", line));
        let mut paths = |name: &'static str| {
            table.get_key_value(name).map(|(key, value)| {
                let line = self.line(&key.span());
                let value = match value.get_ref().as_str() {
                    Some("any") => Of::Any,
                    _ => {
                        let takes = "a plain absolute path: no `.`, `..`, `//` or slash at its end (all of them: \"any\" without brackets)";
                        let path = |value: &DeValue<'_>| {
                            let path = value.as_str()?;
                            (path == "/" || is_plain(path)).then(|| path.to_owned())
                        };
                        let list = self.list(value, name, takes, path)?;
                        Of::These(list.into_iter().map(|path| path.value).collect())
                    }
                };
                Some(At { line, value })
            })
        };
        let (read, write) = (paths("read"), paths("write"));
        if read.is_none() && write.is_none() {
            let message = "it has neither `read` nor `write`, so it allows nothing";
            self.wrong(at, Some("files"), message.into());
            return None;
        }
        // None of an inner `Option`: it is there, and a mistake was told.
        let (read, write) = (swap(read)?, swap(write)?);
        Some(FilesRule {
            line,
            allow,
            users: users?,
            read,
            write,
        })
    }

    /// Users or groups.
    fn whom(&mut self, value: &Value<'t>, key: &str, line: Line) -> Option<At<Of<Who>>> {
        if value.get_ref().as_str() == Some("any") {
            let value = Of::Any;
            return Some(At { line, value });
        }
        let takes = "a whole name, or a number from 0 to 4294967294 (all of them: \"any\" without brackets)";
        let list = self.list(value, key, takes, who)?;
        let value = Of::These(list.into_iter().map(|who| who.value).collect());
        Some(At { line, value })
    }

    /// A list that is not empty; each entry with its line.
    fn list<T>(
        &mut self,
        value: &Value<'t>,
        key: &str,
        takes: &str,
        read: impl Fn(&DeValue<'_>) -> Option<T>,
    ) -> Option<Vec<At<T>>> {
        let DeValue::Array(list) = value.get_ref() else {
            self.is_not(value, key, "a list in brackets");
            return None;
        };
        if list.is_empty() || list.len() > ENTRIES_MAX {
            let message = format!(
                "the list has {} entries, and may have 1 to {ENTRIES_MAX}",
                list.len()
            );
            self.wrong(value.span(), Some(key), message);
            return None;
        }
        let mut all = Some(Vec::new());
        for entry in list.iter() {
            match read(entry.get_ref()) {
                Some(value) => {
                    let line = self.line(&entry.span());
                    if let Some(all) = &mut all {
                        all.push(At { line, value });
                    }
                }
                None => {
                    self.is_not(entry, key, takes);
                    all = None;
                }
            }
        }
        all
    }
}

fn placeless<T>(rules: Vec<(Range<usize>, T)>) -> Vec<T> {
    rules.into_iter().map(|(_, rule)| rule).collect()
}

fn swap<T>(found: Option<Option<T>>) -> Option<Option<T>> {
    match found {
        None => Some(None),
        Some(None) => None,
        Some(value) => Some(value),
    }
}

fn kind(value: &DeValue<'_>) -> Option<String> {
    let name = value.as_str()?;
    let allowed = |b: u8| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_');
    let is_name = !name.is_empty() && name.len() <= KIND_MAX && name.bytes().all(allowed);
    is_name.then(|| name.to_owned())
}

fn service(value: &DeValue<'_>) -> Option<ServiceName> {
    let name: ServiceName = value.as_str()?.parse().ok()?;
    // `tcp:080` would never be dialled.
    let is_tcp = name.as_str().split(':').next() == Some("tcp");
    (!is_tcp || name.tcp_port().is_some()).then_some(name)
}

fn who(value: &DeValue<'_>) -> Option<Who> {
    if let Some(number) = value.as_integer() {
        let number = u32::from_str_radix(number.as_str(), number.radix()).ok()?;
        return (number != u32::MAX).then_some(Who::Number(number));
    }
    let text = value.as_str()?;
    // `["any"]` would be a user of that name, and a pattern one that nobody has.
    if text == "any" || text.contains(['*', '?', '[', '!', '%', '#']) {
        return None;
    }
    Some(match Principal::parse(text)? {
        Principal::Number(number) => Who::Number(number),
        Principal::Name(name) => Who::Name(name.to_owned()),
    })
}

#[cfg(test)]
mod tests;

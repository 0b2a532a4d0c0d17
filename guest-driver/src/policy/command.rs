//! `adit-guest policy check` and `adit-guest policy explain`.

use std::path::{Path, PathBuf};

use adit_names::{ServiceName, escape};
use adit_tasks::Kind;
use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Value, json};

use super::accounts::{self, System, Touches};
use super::decide::{Exec, Of, Policy, Request, Who};
use super::parse::Problem;
use super::source::{self, PolicyError};
use super::standing::{Answer, Standing, file_of};
use crate::config::{Config, ConfigError, DEFAULT_PATH};
use crate::exec::file;
use crate::serve;

const CHECK: &str = "\
Without FILE it checks what the agent would use: the file that adit-guest.toml names, also its owner and mode. Of another FILE
only the text is checked. What is worth knowing and no mistake is a note: a kind of step or a user that is not known here, a
rule that allows everything.

Examples:
  adit-guest policy check
  adit-guest policy check minimal.toml -o json

Exit status: 0 it can be used; 1 it has mistakes, or others than root can change it; 2 it is not there or cannot be read.";

const EXPLAIN: &str = "\
KIND is a kind of step (`script`, `file`), `dial` for what the host may reach, `exec`, or `files`. The answer is that of the agent:
the same code decides. Both must allow: the policy and adit-guest.toml.

Examples:
  adit-guest policy explain script --user www-data
  adit-guest policy explain file --path /etc/motd --user root
  adit-guest policy explain dial --service tcp:22
  adit-guest policy explain exec --user deploy --command /usr/bin/uptime --ticket
  adit-guest policy explain files --user deploy --path /srv/app --write
  adit-guest policy explain script --policy minimal.toml        # a file that is not in force; adit-guest.toml is left out

Where a goal leaves them out, --user and --group are root, and so they are here.

Exit status: 0 allowed; 1 denied; 2 there is no answer, for example because the file has mistakes.";

/// Exit status of a command that has no answer.
pub const NO_ANSWER: u8 = 2;

#[allow(missing_docs)]
#[derive(Subcommand)]
pub enum PolicyCommand {
    /// Check a policy file: every mistake with its line and column
    #[command(after_help = CHECK)]
    Check {
        /// Policy file [default: the one that the configuration means]
        file: Option<PathBuf>,
        /// Configuration file
        #[arg(long, default_value = DEFAULT_PATH)]
        config: PathBuf,
        /// Text for people, or JSON for programs
        #[arg(short, long, value_enum, default_value_t = Format::Text)]
        output: Format,
    },
    /// Say whether something is allowed, which line decides that, and why
    #[command(after_help = EXPLAIN)]
    Explain {
        #[command(flatten)]
        what: What,
        /// Policy file that is asked, alone [default: the one that the configuration means, and the configuration]
        #[arg(long, value_name = "FILE")]
        policy: Option<PathBuf>,
        /// Configuration file
        #[arg(long, default_value = DEFAULT_PATH)]
        config: PathBuf,
        /// Text for people, or JSON for programs
        #[arg(short, long, value_enum, default_value_t = Format::Text)]
        output: Format,
    },
}

/// What is asked about.
#[derive(Args)]
pub struct What {
    /// A kind of step, `dial`, `exec` or `files`
    kind: String,
    /// Whom it runs as, or whose the file is: a name or a number
    #[arg(long, default_value = "root")]
    user: String,
    /// The file's group
    #[arg(long, default_value = "root")]
    group: String,
    /// The file
    #[arg(long)]
    path: Option<String>,
    /// What the host dials, for example tcp:80
    #[arg(long)]
    service: Option<String>,
    /// The program, by its absolute path
    #[arg(long)]
    command: Option<String>,
    /// The command comes with a signed ticket
    #[arg(long)]
    ticket: bool,
    /// The file is written, or removed
    #[arg(long)]
    write: bool,
}

/// How an answer is printed.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Text,
    Json,
}

/// What a command prints, and its exit status.
#[derive(Debug)]
pub struct Said {
    /// For standard output.
    pub text: String,
    /// Exit status.
    pub status: u8,
}

/// Why a command has no answer.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The configuration that says where the policy is.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The policy.
    #[error("{0}")]
    Policy(String),
    /// The command line.
    #[error("{0}")]
    Usage(String),
}

/// Runs a command.
///
/// # Errors
/// It has no answer.
pub fn run(command: &PolicyCommand) -> Result<Said, CommandError> {
    match command {
        PolicyCommand::Check {
            file,
            config,
            output,
        } => check(file.as_deref(), config, *output),
        PolicyCommand::Explain {
            what,
            policy,
            config,
            output,
        } => explain(what, policy.as_deref(), config, *output),
    }
}

fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}

fn check(given: Option<&Path>, config: &Path, output: Format) -> Result<Said, CommandError> {
    let (file, read) = match given {
        Some(file) => (file.to_owned(), source::read_given(file).map(|(p, _)| p)),
        None => {
            let config = Config::load(config)?;
            let (file, is_named) = file_of(&config);
            let read = source::read(file);
            if let (Err(PolicyError::Missing { .. }), false) = (&read, is_named) {
                let (file, own) = (file.display(), config.path.display());
                let text = format!("there is no policy: {file} is not there, and {own} names none");
                return Err(CommandError::Policy(text));
            }
            (file.to_owned(), read)
        }
    };
    let shown = file.display();
    let problems: &[Problem] = match &read {
        Ok(_) => &[],
        Err(PolicyError::Bad { problems, .. }) => problems,
        Err(e) if given.is_some() => return Err(CommandError::Policy(e.to_string())),
        Err(e) => return unusable(e, &file, output),
    };
    let notes = read.as_ref().map(notes).unwrap_or_default();
    let status = u8::from(!problems.is_empty());
    let text = match output {
        Format::Json => {
            let problems = problems.iter().map(
                |p| json!({"line": p.line, "column": p.column, "key": p.key, "message": p.message}),
            );
            let notes = notes
                .iter()
                .map(|(line, text)| json!({"line": line, "message": text}));
            pretty(&json!({
                "file": file,
                "ok": status == 0,
                "problems": problems.collect::<Vec<_>>(),
                "notes": notes.collect::<Vec<_>>(),
            }))
        }
        Format::Text => {
            let problems = problems.iter().map(|p| format!("{shown}:{p}\n"));
            let notes = notes
                .iter()
                .map(|(line, text)| format!("{shown}:{line}: note: {text}\n"));
            let ok = match &read {
                Ok(policy) => format!("{shown}: ok, {} rules\n", policy.rules()),
                Err(_) => String::new(),
            };
            let lines: String = problems.chain(notes).collect();
            format!("{lines}{ok}")
        }
    };
    Ok(Said { text, status })
}

/// A file that others can change has a mistake; of one that cannot be read nothing is known.
fn unusable(e: &PolicyError, file: &Path, output: Format) -> Result<Said, CommandError> {
    let text = format!("{e}; {}", e.remedy());
    if !matches!(e, PolicyError::Writable { .. }) {
        return Err(CommandError::Policy(text));
    }
    let text = match output {
        Format::Json => {
            let problem = json!({"line": null, "column": null, "key": null, "message": text});
            pretty(&json!({"file": file, "ok": false, "problems": [problem], "notes": []}))
        }
        Format::Text => format!("{text}\n"),
    };
    Ok(Said { text, status: 1 })
}

/// What is worth knowing of a policy that can be used, each with its line.
pub fn notes(policy: &Policy) -> Vec<(usize, String)> {
    let mut notes = Vec::new();
    let known = |name: &str| Kind::ALL.iter().any(|kind| kind.name() == name);
    for rule in &policy.steps {
        for kind in rule.kinds.value.iter().filter(|kind| !known(kind)) {
            let kinds: Vec<_> = Kind::ALL.iter().map(|k| k.name()).collect();
            let text = format!(
                "this agent has no kind `{kind}`: it has {}",
                kinds.join(", ")
            );
            notes.push((rule.kinds.line, text));
        }
        let scripts = rule.kinds.value.iter().any(|k| k == Kind::Script.name());
        if scripts && means_root(&rule.users.value) {
            let text = "scripts may run as root: they can do everything, and change this file";
            notes.push((rule.users.line, text.into()));
        }
    }
    for rule in &policy.exec {
        let text = match rule.allow.value {
            Exec::Off => continue,
            Exec::Ticket => "this agent takes no tickets: the rule is for a later version",
            Exec::Host if means_root(&rule.users.value) => {
                "the host may have commands run as root: they can do everything, and change this file"
            }
            Exec::Host => continue,
        };
        notes.push((rule.allow.line, text.into()));
    }
    for rule in &policy.files {
        let writes_any = rule.write.as_ref().is_some_and(|of| of.value == Of::Any);
        let text = match rule.allow.value {
            Exec::Off => continue,
            Exec::Ticket => {
                "this agent takes no tickets for files: the rule is for a later version"
            }
            Exec::Host if writes_any && means_root(&rule.users.value) => {
                "the host may write every file as root: it can do everything, and change this file"
            }
            Exec::Host => continue,
        };
        notes.push((rule.allow.line, text.into()));
    }
    let numbers = accounts::of_policy(policy, &System);
    let (users, groups) = policy.names();
    let unknown_users = users
        .into_iter()
        .filter(|n| !numbers.users.contains_key(*n));
    let unknown_groups = groups
        .into_iter()
        .filter(|n| !numbers.groups.contains_key(*n));
    for (what, name) in unknown_users
        .map(|name| ("user", name))
        .chain(unknown_groups.map(|name| ("group", name)))
    {
        let line = line_of(policy, what, name);
        let name = escape(name);
        let text = format!("this system has no {what} `{name}`: until it has, nobody is meant");
        if !notes.contains(&(line, text.clone())) {
            notes.push((line, text));
        }
    }
    notes.sort_by_key(|(line, _)| *line);
    notes
}

fn means_root(users: &Of<Who>) -> bool {
    match users {
        Of::Any => true,
        Of::These(list) => list.iter().any(|who| match who {
            Who::Number(number) => *number == 0,
            Who::Name(name) => accounts::user(name, &System).id == Some(0),
        }),
    }
}

/// The line of the first list that has a name.
fn line_of(policy: &Policy, what: &str, name: &str) -> usize {
    let has = |list: &Of<Who>| match list {
        Of::Any => false,
        Of::These(list) => list.iter().any(|who| *who == Who::Name(name.to_owned())),
    };
    let of_steps = policy.steps.iter().filter_map(|rule| match what {
        "user" => Some(&rule.users),
        _ => rule.groups.as_ref(),
    });
    let of_exec = policy.exec.iter().map(|rule| &rule.users);
    let of_files = policy.files.iter().map(|rule| &rule.users);
    let of_users = of_exec.chain(of_files).filter(|_| what == "user");
    let mut lists = of_steps.chain(of_users);
    lists
        .find(|at| has(&at.value))
        .map_or(policy.default, |at| at.line)
}

/// What the configuration says, and the key that says it.
struct Own {
    allowed: bool,
    reason: String,
}

fn explain(
    what: &What,
    policy: Option<&Path>,
    config: &Path,
    output: Format,
) -> Result<Said, CommandError> {
    let missing = |option: &str| {
        let kind = escape(&what.kind);
        CommandError::Usage(format!("`explain {kind}` needs --{option}"))
    };
    let (standing, config) = match policy {
        Some(file) => {
            let read = source::read_given(file);
            let (policy, _) = read.map_err(|e| CommandError::Policy(e.to_string()))?;
            (Standing::of(file, policy), None)
        }
        None => {
            let config = Config::load(config)?;
            (Standing::at_start(&config), Some(config))
        }
    };
    let config = config.as_ref();
    let service: ServiceName;
    let (request, own) = match what.kind.as_str() {
        "dial" => {
            let name = what.service.as_deref().ok_or_else(|| missing("service"))?;
            service = name
                .parse::<ServiceName>()
                .map_err(|e| CommandError::Usage(format!("--service: {e}")))?;
            let port = config.zip(service.tcp_port());
            let why = port.and_then(|(c, port)| serve::forbidden(port, &c.allow_ports));
            let unnamed = || serve::unnamed(&service, &config?.service);
            let why = why.or_else(unnamed);
            (Request::Dial { service: &service }, why)
        }
        "exec" => {
            let command = what.command.as_deref().ok_or_else(|| missing("command"))?;
            let request = Request::Exec {
                user: accounts::user(&what.user, &System),
                command,
                ticket: what.ticket,
            };
            (request, None)
        }
        "files" => {
            let path = what.path.as_deref().ok_or_else(|| missing("path"))?;
            let user = accounts::user(&what.user, &System);
            let write = what.write;
            (Request::Files { user, path, write }, None)
        }
        kind => {
            let touches = match (&what.path, kind == Kind::File.name()) {
                (None, true) => return Err(missing("path")),
                (Some(_), _) if kind == Kind::Script.name() => {
                    let text =
                        "a script writes wherever its user may: `explain script` takes no --path";
                    return Err(CommandError::Usage(text.into()));
                }
                (Some(path), _) => Touches::Writes {
                    kind,
                    owner: &what.user,
                    group: &what.group,
                    path,
                },
                (None, false) => Touches::RunsAs {
                    kind,
                    user: &what.user,
                },
            };
            let off = config.and_then(|c| c.switched_off(kind));
            let path = what.path.as_deref().filter(|_| kind == Kind::File.name());
            let path = config.zip(path);
            let why = off.or_else(|| path.and_then(|(c, path)| file::forbidden(path, c)));
            (touches.request(&System), why)
        }
    };
    let answer = standing.answer(&request, &System);
    let own = config.map(|_| Own {
        allowed: own.is_none(),
        reason: own.unwrap_or_else(|| "it forbids nothing of this".into()),
    });
    let allowed = answer.allowed && own.as_ref().is_none_or(|own| own.allowed);
    let text = match output {
        Format::Json => pretty(&as_json(what, allowed, &answer, config.zip(own))),
        Format::Text => as_text(what, allowed, &answer, config.zip(own)),
    };
    let status = u8::from(!allowed);
    Ok(Said { text, status })
}

fn word(allowed: bool) -> &'static str {
    match allowed {
        true => "allow",
        false => "deny",
    }
}

fn as_json(what: &What, allowed: bool, answer: &Answer, own: Option<(&Config, Own)>) -> Value {
    let own = own.map(|(config, own)| {
        json!({"file": config.path, "decision": word(own.allowed), "reason": own.reason})
    });
    json!({
        "decision": word(allowed),
        "kind": what.kind,
        "policy": {
            "file": answer.file,
            "decision": word(answer.allowed),
            "line": answer.line,
            "reason": answer.reason,
            "root": answer.root,
        },
        "configuration": own,
    })
}

fn as_text(what: &What, allowed: bool, answer: &Answer, own: Option<(&Config, Own)>) -> String {
    let kind = escape(&what.kind);
    let said = match answer.file {
        Some(_) => answer.said(),
        None => format!("none: {}", answer.reason),
    };
    let mut text = format!("{}: {kind}\n", word(allowed));
    text += &format!("{:<15} {}: {said}\n", "policy", word(answer.allowed));
    if let Some((config, own)) = own {
        let (file, reason) = (config.path.display(), &own.reason);
        let word = word(own.allowed);
        text += &format!("{:<15} {word}: {file}: {reason}\n", "configuration");
    }
    text
}

#[cfg(test)]
mod tests;

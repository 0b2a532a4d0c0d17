//! `adit access …`: who may do what with which VM, as the proxy decides it.

use adit_api::{AccessDecision, GrantShown, token};
use clap::{Args, Subcommand};
use form_urlencoded::Serializer as Query;
use serde::Serialize;

use crate::client::Client;
use crate::error::Failure;
use crate::text::{Format, escape};
use crate::{completion, output};

const CHECK_EXAMPLE: &str = "\
Examples:
  adit access check --as user:deploy reach web-1:22
  adit access check --as token:prometheus reach vsock-5000.web-1
  adit access check --as anyone forward web-1:22     # by a listener that leads there
  adit access check --as user:deploy reach docker.web-1.svc
  adit access check --as group:ops goal web-1
  adit access check --as group:ops exec root@web-1

Exit status: 0 it is allowed; 1 it is denied.";

const TOKEN_EXAMPLE: &str = "\
Example:
  adit access token prometheus > prometheus.token     # the section goes to standard error
  curl -x http://127.0.0.1:7080 --proxy-user \"x:$(cat prometheus.token)\" http://web-1:9100/metrics";

#[derive(Subcommand)]
pub enum AccessCommand {
    /// Say whether a caller may do something, and which grant decides
    #[command(after_help = CHECK_EXAMPLE)]
    Check(Check),
    /// List the grants, or those about a VM
    #[command(alias = "list")]
    Ls {
        /// Of this VM only
        #[arg(long, value_name = "VM", add = completion::vms())]
        vm: Option<String>,
    },
    /// Make a token: print it once, and the section of aditd.toml that knows it
    #[command(after_help = TOKEN_EXAMPLE)]
    Token {
        /// Its name, which grants have after `token:`
        name: String,
    },
}

#[derive(Args)]
pub struct Check {
    /// Who asks: user:NAME, group:NAME, token:NAME, cert:NAME, network:NAME, anyone or owner
    #[arg(long, value_name = "CALLER")]
    r#as: String,
    /// For what
    #[arg(value_name = "VERB", value_parser = ["reach", "forward", "see", "task", "goal", "manage", "exec", "files"])]
    verb: String,
    /// With which VM; of `reach` and `forward`, also where in it, as clients write it: VM:PORT, vsock-PORT.VM or SERVICE.VM.svc; of `exec`,
    /// also as whom: USER@VM; of `files` as whom and where: USER@VM:/PATH
    #[arg(value_name = "VM[:PORT]", add = completion::vms())]
    vm: String,
}

pub async fn run(command: &AccessCommand, client: &Client, format: Format) -> Result<(), Failure> {
    match command {
        AccessCommand::Check(check) => self::check(check, client, format).await,
        AccessCommand::Ls { vm } => ls(vm.as_deref(), client, format).await,
        AccessCommand::Token { name } => new_token(name, format),
    }
}

async fn check(check: &Check, client: &Client, format: Format) -> Result<(), Failure> {
    // Where in a VM is read by the host, as it reads what clients of the proxy write.
    let (vm, target) = match check.vm.rsplit_once('@') {
        Some((user, vm)) if check.verb == "exec" => (vm, Some(user.to_owned())),
        _ => (&*check.vm, None),
    };
    let (vm, target) = match (check.verb.as_str(), check.vm.split_once(':')) {
        ("files", Some((who, path))) => {
            let (user, vm) = who.split_once('@').unwrap_or(("root", who));
            (vm, Some(format!("{user}@{path}")))
        }
        _ => (vm, target),
    };
    let mut query = Query::new(String::new());
    query
        .append_pair("as", &check.r#as)
        .append_pair("verb", &check.verb)
        .append_pair("vm", vm);
    if let Some(target) = target {
        query.append_pair("target", &target);
    }
    let decision: AccessDecision = client
        .get(&format!("/v1/access?{}", query.finish()))
        .await?;
    let denied = (!decision.allowed).then(|| {
        let failure = Failure::new("denied", decision.text.clone());
        match decision.hidden {
            true => failure.help("the caller is told only that there is no such VM"),
            false => failure,
        }
    });
    match (format, denied) {
        (Format::Json, None) => output::json(&decision),
        (Format::Table, None) => output::line(escape(&decision.text)),
        (_, Some(denied)) => Err(denied),
    }
}

async fn ls(vm: Option<&str>, client: &Client, format: Format) -> Result<(), Failure> {
    let path = match vm {
        Some(vm) => {
            let query = Query::new(String::new()).append_pair("vm", vm).finish();
            format!("/v1/grants?{query}")
        }
        None => "/v1/grants".to_owned(),
    };
    let grants: Vec<GrantShown> = client.get(&path).await?;
    if format == Format::Json {
        return output::json(&grants);
    }
    let row = |grant: GrantShown| {
        let until = grant.until.unwrap_or_else(|| "-".into());
        let until = if grant.expired {
            format!("{until} (over)")
        } else {
            until
        };
        let limits = [
            grant
                .connections_per_s
                .map(|n| format!("{n} connections/s")),
            grant.bytes_per_s.map(|n| format!("{n} B/s")),
            grant
                .weight
                .filter(|n| *n > 1)
                .map(|n| format!("weight {n}")),
        ];
        let mut limits: Vec<_> = limits.into_iter().flatten().collect();
        if limits.is_empty() {
            limits.push("-".into());
        }
        [
            grant.to.join(" "),
            grant.may.join(" "),
            grant.vms.join(" "),
            until,
            limits.join(" "),
            grant.place,
        ]
    };
    let rows: Vec<_> = grants.into_iter().map(row).collect();
    output::table(["TO", "MAY", "VMS", "UNTIL", "LIMITS", "PLACE"], &rows)
}

#[derive(Serialize)]
struct NewToken<'a> {
    name: &'a str,
    token: &'a str,
    sha256: &'a str,
}

fn new_token(name: &str, format: Format) -> Result<(), Failure> {
    let is = |b: u8| b.is_ascii_graphic() && !b"\"',:`".contains(&b);
    if !(1..=64).contains(&name.len()) || !name.bytes().all(is) {
        let message =
            "a token's name has 1 to 64 printable characters, no space, quote, comma or colon";
        return Err(Failure::new("usage", message));
    }
    let (token, sha256) =
        token::new().map_err(|e| Failure::new("internal", format!("no random numbers: {e}")))?;
    if format == Format::Json {
        return output::json(&NewToken {
            name,
            token: &token,
            sha256: &sha256,
        });
    }
    adit_print::note(format_args!(
        "# for /etc/adit/aditd.toml, then `systemctl reload aditd`; the token is on standard output, once\n\
         [[token]]\nname = \"{name}\"\nsha256 = \"{sha256}\""
    ));
    output::line(&token)
}

//! `GET /v1/vms/{name}/wait`: answered when the VM is ready or drained, when somebody listens at a port or service of it, when it is removed,
//! or when the time is over.

use std::os::unix::net::UnixStream;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use adit_api::{Vm, VmState, doctor};
use adit_channel::hello::Extensions;
use adit_channel::refusal::{Code, Refusal};
use adit_names::ServiceName;
use adit_port::control::Target;
use axum::Json;
use axum::extract::{Path, Query, State as Shared};
use axum::http::StatusCode;
use serde::Deserialize;
use utoipa::IntoParams;

use super::{Answer, ApiError, App, Asks, find, patient};
use crate::access::{Caller, Verb};
use crate::link::{ClientEnd, Question};
use crate::reach::{self, Destination};
use crate::state::State;
use crate::vm::{StillOpen, VmEntry};

/// How long the guest may keep the question whether somebody listens.
const ASK_LIMIT: Duration = Duration::from_secs(20);
/// Between two such questions at least.
const ASK_AGAIN: Duration = Duration::from_millis(500);
/// Longest wait for a VM.
const WAIT_MAX: Duration = Duration::from_secs(3600);

/// How often a VM is looked at that is drained, and how often in a row nothing must be open: a port process says within 100 ms how many
/// streams it has.
const DRAINED_LOOK: Duration = Duration::from_millis(100);
const DRAINED_LOOKS: u32 = 5;

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct WaitQuery {
    #[serde(rename = "for")]
    #[param(pattern = "^(agent|drained|port:[1-9][0-9]{0,4}|service:[a-z0-9-]{1,40})$")]
    condition: String,
    /// How long at most.
    timeout_ms: u64,
}

/// Waits until a VM is ready, until somebody listens at a port or service of it, or until one that is locked has nothing open any more.
#[utoipa::path(
    get,
    path = "/v1/vms/{name}/wait",
    params(("name" = String, Path, description = "Name of the VM"), WaitQuery),
    responses((status = 200, body = Vm, description = "It is"))
)]
pub(super) async fn wait_vm(
    Shared(state): Shared<App>,
    asks: Asks,
    Path(name): Path<String>,
    Query(q): Query<WaitQuery>,
) -> Answer<Vm> {
    let vm = find(&state, &name)?;
    let condition: Condition = q.condition.parse().map_err(|()| {
        let message = "`for` is `agent`, `drained`, `port:N` or `service:NAME`";
        ApiError::new(StatusCode::BAD_REQUEST, "usage", message)
    })?;
    if let Condition::Listens(target) = &condition {
        may_reach(&state, asks.caller(), &vm, target)?;
    }
    let _patient = patient(&state, &asks)?;
    let mut changes = vm.watch();
    // Why nobody listens yet.
    let why = Mutex::new(None);
    let ready = async {
        match &condition {
            Condition::Agent => {
                while !vm.ready() && changes.changed().await.is_ok() {}
                Ok(())
            }
            Condition::Drained => drained(&state, &vm).await,
            Condition::Listens(target) => listens(&state, &vm, target, &why).await,
        }
    };
    let limit = Duration::from_millis(q.timeout_ms).min(WAIT_MAX);
    tokio::select! {
        // A VM that is being removed is not ready, whatever its agent says.
        biased;
        () = vm.removed.cancelled() => Err(ApiError::new(
            StatusCode::NOT_FOUND,
            "unknown-vm",
            format!("`{name}` was removed while somebody waited for it"),
        )
        .help("`adit vm ls` lists the names")),
        done = tokio::time::timeout(limit, ready) => match done {
            Ok(Ok(())) => Ok(Json(vm.show())),
            Ok(Err(e)) => Err(e),
            Err(_) => Err(match condition {
                Condition::Agent => late(&vm.show(), limit),
                Condition::Drained => not_drained(&vm, still_open(&state, &vm).await?),
                Condition::Listens(_) => {
                    let why = why.into_inner().unwrap_or_else(PoisonError::into_inner);
                    silent(&vm, &q.condition, why)
                }
            }),
        },
    }
}

/// What is waited for.
enum Condition {
    /// The agent is connected.
    Agent,
    /// It is locked, and nothing is open.
    Drained,
    /// Somebody takes what is dialled there.
    Listens(Target),
}

impl FromStr for Condition {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let service = match text.split_once(':') {
            None if text == "agent" => return Ok(Self::Agent),
            None if text == "drained" => return Ok(Self::Drained),
            Some(("port", port)) => format!("tcp:{port}").parse::<ServiceName>().ok(),
            Some(("service", name)) => format!("svc:{name}").parse().ok(),
            _ => None,
        };
        let is_one = |s: &ServiceName| s.tcp_port().is_some() || s.name().is_some();
        let service = service.filter(is_one).ok_or(())?;
        Ok(Self::Listens(Target::Service(service)))
    }
}

/// Whether they could dial it: also the operator, whose VM's own lists count.
fn may_reach(
    state: &State,
    caller: &Caller,
    vm: &Arc<VmEntry>,
    target: &Target,
) -> Result<(), Refusal> {
    let verb = Verb::Reach(target);
    let denial = match state.allow(caller, verb, vm) {
        Ok(_) => return Ok(()),
        Err(denial) => denial,
    };
    if denial.is_hidden {
        let to = Destination {
            vm: vm.name.clone(),
            host: None,
            target: target.clone(),
        };
        return Err(reach::dial::unknown(&to, caller));
    }
    let text = denial.reason.text(verb, &vm.name, caller);
    Err(Refusal::new(Code::NotAllowed, text))
}

/// Waits until the guest takes a stream to there. The agent keeps the question until it can say yes, so there are few of them.
async fn listens(
    state: &State,
    vm: &Arc<VmEntry>,
    target: &Target,
    why: &Mutex<Option<Refusal>>,
) -> Result<(), ApiError> {
    let mut changes = vm.watch();
    let to = Destination {
        vm: vm.name.clone(),
        host: None,
        target: target.clone(),
    };
    loop {
        // A stream to a guest that is not up would fail, and tell nothing.
        while !matches!(vm.state(), VmState::Up | VmState::Ready) && changes.changed().await.is_ok()
        {
        }
        let asked = Instant::now();
        let refused = match ask(state, vm, &to).await {
            Ok(()) => return Ok(()),
            Err(refused) => refused,
        };
        match refused.code() {
            // Waiting changes nothing.
            Code::Denied | Code::NotAllowed | Code::UnknownService | Code::Locked => {
                return Err(refused.into());
            }
            _ => *why.lock().unwrap_or_else(PoisonError::into_inner) = Some(refused),
        }
        // An agent of a version before answers at once.
        tokio::time::sleep(ASK_AGAIN.saturating_sub(asked.elapsed())).await;
    }
}

/// Asks the agent for a stream once. Nothing is said on it.
async fn ask(state: &State, vm: &VmEntry, to: &Destination) -> Result<(), Refusal> {
    let _share = reach::share(state, &vm.name, vm.weight())?;
    let link = vm.channel.link().ok_or_else(|| {
        let text = format!("VM `{}`: its port process does not run", vm.name);
        Refusal::new(Code::NoPortProcess, text)
    })?;
    let internal = |e| Refusal::new(Code::Internal, format!("no socket: {e}"));
    let (_ours, theirs) = UnixStream::pair().map_err(internal)?;
    if !state.room.spares(&theirs) {
        return Err(Refusal::busy("aditd has few descriptors left"));
    }
    let question = Question {
        to: to.target.clone(),
        extensions: Extensions {
            arguments: b"wait".to_vec().try_into().unwrap_or_default(),
            ..Extensions::default()
        },
        deadline: ASK_LIMIT,
        tag: None,
        note: None,
        limits: Vec::new(),
    };
    let opened = link.open(question, ClientEnd::Relayed(theirs.into())).await;
    opened.map_err(|e| reach::refusal(to, &e.into_reason()))
}

/// Nobody listens in time.
fn silent(vm: &VmEntry, condition: &str, why: Option<Refusal>) -> ApiError {
    let why = match &why {
        Some(refused) => refused.text().to_owned(),
        None => "its agent has not been heard".into(),
    };
    let message = format!("`{}`: {condition} is not there: {why}", vm.name);
    ApiError::new(StatusCode::REQUEST_TIMEOUT, "timeout", message)
        .help("`adit doctor` says what is known of the VM")
}

/// Waits until nothing is open any more in a VM that is locked.
async fn drained(state: &App, vm: &VmEntry) -> Result<(), ApiError> {
    // How many streams there are is said a little later than they are: only what stays so counts.
    let mut seen = 0;
    loop {
        if !vm.lock.is_on() {
            let message = format!("`{}` is not locked: what is open there comes anew", vm.name);
            let refused = ApiError::new(StatusCode::CONFLICT, "not-locked", message);
            return Err(refused.help("lock it first: `adit vm lock`"));
        }
        seen = match still_open(state, vm).await?.is_nothing() {
            true => seen + 1,
            false => 0,
        };
        if seen == DRAINED_LOOKS {
            return Ok(());
        }
        tokio::time::sleep(DRAINED_LOOK).await;
    }
}

async fn still_open(state: &App, vm: &VmEntry) -> Result<StillOpen, ApiError> {
    Ok(StillOpen {
        tunnels: vm.tunnels(),
        requests: state.vm_shares.taken(&vm.name),
        tasks: state.desk.leased(&vm.name).await?,
    })
}

/// Says what is still open.
fn not_drained(vm: &VmEntry, open: StillOpen) -> ApiError {
    let message = format!("`{}` still has {open} open", vm.name);
    ApiError::new(StatusCode::REQUEST_TIMEOUT, "timeout", message)
        .help("it stays locked: wait on, or `adit vm unlock` opens it again")
}

/// Says what is known of a VM that is not ready, and what to do.
fn late(vm: &Vm, limit: Duration) -> ApiError {
    // Its agent may have gone as the time was over.
    let of = match vm.state {
        VmState::Ready => VmState::Up,
        state => state,
    };
    let (what, help) = doctor::missing(of).unwrap_or_default();
    let known = match of {
        VmState::Up => doctor::absent_agent(vm),
        _ => what.to_owned(),
    };
    let fault = vm.fault.as_ref();
    let fault = fault.map_or_else(String::new, |fault| format!(" ({fault})"));
    let message = format!(
        "`{}` is not ready after {limit:?}: its channel is {of}: {known}{fault}",
        vm.name
    );
    ApiError::new(StatusCode::REQUEST_TIMEOUT, "timeout", message).help(help)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_agent_is_not_called_one_that_does_not_run() {
        let json = r#"{"name": "a", "cid": 3, "state": "up", "agent": "0.1.0", "kernel": "6", "enrolled_as": null,
            "last_seen_ms": 12340, "epoch": 1, "streams": 0, "queued": 0, "allow": [], "allow_vsock": [],
            "port_pid": 7, "vhost_socket": "", "fault": "the stream was reset"}"#;
        let mut vm: Vm = serde_json::from_str(json).unwrap();
        let said = late(&vm, Duration::from_secs(1)).1.message;
        for known in ["0.1.0", "12.3 s ago", "up", "the stream was reset"] {
            assert!(said.contains(known), "{said}");
        }
        vm.agent = None;
        let said = late(&vm, Duration::from_secs(1)).1.message;
        assert!(said.contains("no agent has been heard"), "{said}");
    }
}

//! Goals and tasks of VMs of other hosts.
//!
//! ```text
//!  adit ─► this host: where are the VMs? ─┬─ here: the desk, as ever
//!                                         └─ there: the same endpoint of that host, who asks ─► it decides, by its grants
//! ```
//! There is one hop: whoever comes by way of another host gets what is here (R126). A goal goes to other hosts before it is queued here, so that
//! what the only other one refuses is refused as a whole. What a host says counts for VMs that it may claim; one that does not answer is named
//! in the answer, because what it has is not known.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use adit_api::{ErrorBody, Goal, GoalSummary, NewGoal, Silent, Task, TaskEvent};
use adit_names::{ServiceName, VmId};
use adit_port::control::Target;
use adit_tasks::hex;
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, Request};
use axum::http::StatusCode;
use axum::middleware;
use axum::response::Response;
use axum::routing::get;
use bytes::BytesMut;
use futures_util::future::join_all;
use hyper::service::Service;
use hyper_util::service::TowerToHyperService;
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::Sender;

use super::{ApiError, App, Asks, BODY_MAX, find, lists, rules, tasks};
use super::{in_our_shape, to_its_end};
use crate::access::{Caller, Verb};
use crate::peers::Host;
use crate::peers::line::Coming;
use crate::peers::work::{Answer, NotDone};
use crate::reach::Destination;
use crate::reach::find::{Found, ambiguous, find as find_name, find_all};
use crate::reach::resolve::listed;
use crate::state::State;
use crate::vm::VmEntry;

/// Bytes of an event of another host at most.
const LINE_MAX: usize = 64 << 10;
/// Most characters of another host's text that are shown.
const SHOWN_MAX: usize = 600;

/// Answers a caller of another host.
pub async fn of_other_host(
    state: &App,
    caller: Caller,
    request: hyper::Request<Bytes>,
) -> hyper::Response<Body> {
    let router = Router::new()
        .route("/v1/goals", get(lists::goals).post(tasks::add_goal))
        .route("/v1/goals/{id}", get(tasks::show_goal))
        .route("/v1/tasks", get(tasks::list))
        .route("/v1/tasks/{id}", get(tasks::show))
        .route("/v1/tasks/{id}/output", get(tasks::output))
        .route("/v1/events", get(tasks::events))
        .layer(DefaultBodyLimit::max(BODY_MAX))
        .layer(middleware::from_fn(in_our_shape))
        .layer(middleware::from_fn(to_its_end))
        .layer(middleware::from_fn_with_state(
            state.clone(),
            rules::allowed,
        ))
        .fallback(|| async {
            let text = "other hosts are told of goals and tasks, and of nothing else";
            ApiError::new(StatusCode::NOT_FOUND, "unknown-path", text)
        })
        .with_state(state.clone());
    let mut request: Request = request.map(Body::from);
    request
        .extensions_mut()
        .insert(Asks::by_way_of_host(caller));
    match TowerToHyperService::new(router).call(request).await {
        Ok(response) => response,
        Err(never) => match never {},
    }
}

/// Where the VMs are that a goal is to be queued for.
pub(super) struct Places {
    /// Those of this host.
    pub here: Vec<Arc<VmEntry>>,
    there: Vec<(Arc<Host>, Vec<VmId>)>,
}

impl Places {
    /// Whether nothing is queued here.
    pub fn is_elsewhere(&self) -> bool {
        self.here.is_empty() && !self.there.is_empty()
    }
}

/// Finds them: of the goal's audience, unless the caller insists.
///
/// # Errors
/// One is nowhere, or the caller may not give it a goal. What only another host knows is for that one to say.
pub(super) async fn places(
    state: &App,
    asks: &Asks,
    new: &NewGoal,
    goal: &adit_tasks::Goal,
) -> Result<Places, ApiError> {
    let audience = goal.audience.vms.iter();
    let audience: Vec<Destination> = audience.map(|vm| a_vm(vm.clone(), None)).collect();
    let to = new.to.iter().map(|name| named(state, name));
    let to: Vec<Destination> = to.collect::<Result<_, _>>()?;
    let all = [&audience[..], &to[..]].concat();
    let found = match asks.is_by_way_of_host() || others(state).is_empty() {
        true => all.iter().map(|to| here(state, to)).collect(),
        false => find_all(state, &Caller::owner(), &all).await,
    };
    for (nth, (to, found)) in all.iter().zip(&found).enumerate() {
        let is_theirs = match found {
            // Its host decides, by its own grants.
            Found::There(_) => true,
            // It is named in the audience, and its host was asked.
            Found::Nowhere(_) => asks.is_by_way_of_host() && nth < audience.len(),
            Found::Here(_) | Found::Several(_) => false,
        };
        if !is_theirs {
            asks.may(state, Verb::Goal, to.vm.as_str())?;
        }
    }
    let (wanted, found) = match to.is_empty() {
        true => (audience, found),
        false => {
            let mut found = found;
            (to, found.split_off(goal.audience.vms.len()))
        }
    };
    let (mut here, mut there) = (Vec::new(), BTreeMap::<VmId, (Arc<Host>, Vec<VmId>)>::new());
    for (to, found) in wanted.into_iter().zip(found) {
        if matches!(found, Found::Nowhere(_)) {
            return Err(nowhere(state, asks, &to));
        }
        if !goal.audience.vms.contains(&to.vm) && !new.relay_unchecked {
            let vm = &to.vm;
            let message =
                format!("the goal is not for `{vm}`: its signed audience does not name it");
            return Err(ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "wrong-audience", message)
                .help("sign it again with that VM in --to; --relay-unchecked queues it anyway, and the guest refuses it"));
        }
        match found {
            Found::Here(vm) => here.push(vm),
            Found::There(host) => {
                let of_host = there.entry(host.config.name.clone());
                of_host.or_insert((host, vec![])).1.push(to.vm);
            }
            Found::Several(hosts) => return Err(several(&to, &hosts)),
            Found::Nowhere(_) => {}
        }
    }
    let there = there.into_values().collect();
    Ok(Places { here, there })
}

/// The VM that a caller has named: `VM`, or `VM.HOST`.
fn named(state: &State, name: &str) -> Result<Destination, ApiError> {
    let unknown = || ApiError::unknown_vm(name);
    if !name.contains('.') {
        return Ok(a_vm(name.parse().map_err(|_| unknown())?, None));
    }
    let to = Destination::named(&state.config.names.suffix, name, Some(1));
    let to = to.ok().filter(|to| to.target == any_target());
    to.ok_or_else(unknown)
}

fn a_vm(vm: VmId, host: Option<VmId>) -> Destination {
    let target = any_target();
    Destination { vm, host, target }
}

/// Of no account where a VM is meant.
fn any_target() -> Target {
    Target::Service(ServiceName::tcp(1))
}

fn here(state: &State, to: &Destination) -> Found {
    let is_own = to.host.is_none() || to.host.as_ref() == state.host();
    match state.registry.get(&to.vm).filter(|_| is_own) {
        Some(vm) => Found::Here(vm),
        None => Found::Nowhere("not-here"),
    }
}

/// Hosts that may be asked.
fn others(state: &State) -> Vec<Arc<Host>> {
    let hosts = state.peers.all();
    let asked = hosts.iter().filter(|host| host.is_asked());
    asked.cloned().collect()
}

/// No host says that it has the VM. Whoever might have it here hears of hosts that have said nothing.
fn nowhere(state: &State, asks: &Asks, to: &Destination) -> ApiError {
    let name = to.name();
    let peers = &state.peers;
    let mut silent = match asks.is_by_way_of_host() {
        true => vec![],
        false => peers.map().unheard(&to.vm, peers.now_ms()),
    };
    silent.retain(|host| to.host.as_ref().is_none_or(|of| of == host));
    if silent.is_empty() || !asks.sees(state, Verb::Goal, to.vm.as_str()) {
        return ApiError::unknown_vm(&name);
    }
    unanswered(
        state,
        &silent,
        &format!("whether it has VM `{name}` is not known"),
    )
}

/// Hosts have not answered, and what they have is needed.
fn unanswered(state: &State, silent: &[VmId], so: &str) -> ApiError {
    let own = own_name(state);
    let (hosts, first) = (listed(silent), &silent[0]);
    let text = format!("{own} was not answered by {hosts}: {so}");
    ApiError::new(StatusCode::GATEWAY_TIMEOUT, "no-answer", text).help(&format!(
        "see whether aditd runs there (`systemctl status aditd` on `{first}`); `adit vm ls --all-hosts` here says why it does not answer"
    ))
}

/// Nothing was found. That is an answer only where every host has given one.
fn all_spoke(state: &State, silent: &[VmId], so: &str) -> Result<(), ApiError> {
    match silent {
        [] => Ok(()),
        silent => Err(unanswered(state, silent, so)),
    }
}

fn several(to: &Destination, hosts: &[VmId]) -> ApiError {
    let said = ambiguous(&to.vm, hosts);
    ApiError::new(StatusCode::CONFLICT, "ambiguous", said.text())
        .help("`adit resolve` says what each host claims of it")
}

/// `host `alpha``, or what is said in its place.
fn own_name(state: &State) -> String {
    match state.host() {
        Some(host) => format!("host `{host}`"),
        None => "this host".into(),
    }
}

fn names(vms: &[VmId]) -> String {
    match vms {
        [] => String::new(),
        [one] => format!("VM `{one}`"),
        [first, .., last] if vms.len() > 4 => {
            format!("{} VMs from `{first}` to `{last}`", vms.len())
        }
        all => format!("VMs {}", listed(all)),
    }
}

/// What other hosts have taken of a goal.
pub(super) struct Taken {
    by: Vec<(VmId, Vec<VmId>)>,
    /// As each of them shows it.
    pub goals: Vec<Goal>,
}

impl Taken {
    /// A failure to queue the rest, for whoever is to know what is queued.
    pub fn and_then(&self, failed: ApiError) -> ApiError {
        if self.by.is_empty() {
            return failed;
        }
        let by = self.by.iter();
        let by: Vec<_> = by
            .map(|(host, vms)| format!("{} of host `{host}`", names(vms)))
            .collect();
        let text = format!(
            "the goal is queued for {}, but not for the rest: {}",
            by.join(", "),
            failed.1.message
        );
        ApiError::new(StatusCode::BAD_GATEWAY, "partly-queued", text).help(
            "what is queued stays so: sign it for the rest only (--to), or give the same signed file again, which queues nothing twice",
        )
    }
}

/// Gives a goal to the other hosts that have VMs of it, all at the same time.
///
/// # Errors
/// One has not taken it.
pub(super) async fn give(
    state: &App,
    asks: &Asks,
    places: &Places,
    new: &NewGoal,
    (goal_id, digest): (&str, &[u8; 32]),
) -> Result<Taken, ApiError> {
    let mut taken = Taken {
        by: vec![],
        goals: vec![],
    };
    if places.there.is_empty() {
        return Ok(taken);
    }
    let caller = asks.as_claimed(state).await;
    let given = places.there.iter().map(|(host, vms)| {
        let new = NewGoal {
            to: vms.iter().map(ToString::to_string).collect(),
            ..new.clone()
        };
        // Texts always serialise.
        let body = Bytes::from(serde_json::to_vec(&new).unwrap_or_default());
        let caller = &caller;
        async move {
            let answer = host.exchange(state, caller, "/v1/goals", Some(body)).await;
            let goal = answer.and_then(|answer| shown(host, &answer, goal_id, Some(digest)));
            (host, vms, goal)
        }
    });
    let mut failed = None;
    for (host, vms, goal) in join_all(given).await {
        match goal {
            Ok(goal) => {
                taken.by.push((host.config.name.clone(), vms.clone()));
                taken.goals.push(goal);
            }
            Err(e) => failed = failed.or(Some(not_done(state, host, vms, e))),
        }
    }
    match failed {
        Some(failed) => Err(taken.and_then(failed)),
        None => Ok(taken),
    }
}

/// Why another host has not done what was asked, in the words of this one: both are named.
fn not_done(state: &State, host: &Host, vms: &[VmId], e: NotDone) -> ApiError {
    let (name, own) = (&host.config.name, own_name(state));
    let which = match vms {
        [] => String::new(),
        vms => format!(", which has {},", names(vms)),
    };
    let cut = |text: &str| adit_names::escape(text).at_most(SHOWN_MAX).to_string();
    match e {
        NotDone::Silent(why) => {
            let why = cut(&why.to_string());
            let text = format!("host `{name}`{which} does not answer {own}: {why}");
            ApiError::new(StatusCode::BAD_GATEWAY, "no-answer", text).help(&format!(
                "see that aditd runs on `{name}`, and that its [[host]] here has its address and pin; the same goal may be given again, which queues nothing twice"
            ))
        }
        NotDone::Before => {
            let text = format!("host `{name}`{which} takes no goals from {own}: {e}");
            ApiError::new(StatusCode::BAD_GATEWAY, "host-before", text).help(&format!(
                "upgrade the aditd of `{name}`, or give the goal to it itself: `adit --server https://…`"
            ))
        }
        NotDone::Refused { said, .. } if said.code == "unknown-vm" => {
            for vm in vms {
                state.peers.map().forget(vm, name);
            }
            let is = |vm: &&VmId| said.message == format!("no VM is named `{vm}`");
            let vm = vms.iter().find(is).or(vms.first());
            ApiError::unknown_vm(vm.map_or("", |vm| vm.as_str()))
        }
        NotDone::Refused { status, said } => {
            let ErrorBody {
                code,
                message,
                help,
            } = said;
            let status = match status {
                StatusCode::UNAUTHORIZED => StatusCode::FORBIDDEN,
                status if status.is_client_error() => status,
                _ => StatusCode::BAD_GATEWAY,
            };
            let is_word = code.len() <= 40
                && code
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
            let code = if is_word { &*code } else { "refused" };
            let text = format!("host `{name}`, asked by {own}: {}", cut(&message));
            ApiError::new(status, code, text).help(&cut(&help))
        }
    }
}

/// A goal as another host shows it: its tasks of VMs that it may claim.
fn shown(
    host: &Host,
    answer: &Answer,
    goal_id: &str,
    digest: Option<&[u8; 32]>,
) -> Result<Goal, NotDone> {
    let wrong = |e: &str| NotDone::Silent(crate::peers::line::NoLine::Answer(e.into()));
    let mut goal: Goal = answer.json()?;
    if goal.goal_id != goal_id || digest.is_some_and(|digest| goal.digest != hex(digest)) {
        return Err(wrong("it has another goal of this id"));
    }
    goal.tasks
        .retain_mut(|task| task.goal_id == goal_id && claimed(host, task));
    Ok(goal)
}

/// Whether a host may say anything of a task's VM. It is named in it then.
pub(super) fn claimed(host: &Host, task: &mut Task) -> bool {
    task.host = Some(host.config.name.to_string());
    task.vm.parse().is_ok_and(|vm| host.config.may_claim(&vm))
}

/// Asks every other host; none is asked for whoever comes by way of one.
pub(super) async fn ask_all(
    state: &App,
    asks: &Asks,
    path: &str,
) -> Vec<(Arc<Host>, Result<Answer, NotDone>)> {
    let hosts = match asks.is_by_way_of_host() {
        true => vec![],
        false => others(state),
    };
    if hosts.is_empty() {
        return vec![];
    }
    let caller = &asks.as_claimed(state).await;
    let answers = hosts.into_iter().map(|host| async move {
        let answer = host.exchange(state, caller, path, None).await;
        (host, answer)
    });
    join_all(answers).await
}

/// Whether a host has said that it has nothing of the kind for whoever asks.
pub(super) fn says_none(e: &NotDone) -> bool {
    matches!(e, NotDone::Refused { status, .. } if status.is_client_error())
}

/// A host that has not said what it has.
pub(super) fn silent(host: &str, e: &NotDone) -> Silent {
    Silent {
        host: host.into(),
        why: adit_names::escape(&e.to_string())
            .at_most(SHOWN_MAX)
            .to_string(),
    }
}

/// What other hosts have of a goal, and those that do not say.
pub(super) async fn goal(
    state: &App,
    asks: &Asks,
    id: &str,
    digest: Option<&[u8; 32]>,
) -> (Vec<Goal>, Vec<Silent>) {
    let (mut goals, mut silent) = (Vec::new(), Vec::new());
    if !is_id(id) {
        return (goals, silent);
    }
    for (host, answer) in ask_all(state, asks, &format!("/v1/goals/{id}")).await {
        match answer.and_then(|answer| shown(&host, &answer, id, digest)) {
            Ok(goal) => goals.push(goal),
            Err(e) if says_none(&e) => {}
            Err(e) => silent.push(self::silent(host.config.name.as_str(), &e)),
        }
    }
    // Of two that differ, neither is to be believed more: the one of the first counts.
    let first = goals.first().map(|goal| goal.digest.clone());
    goals.retain(|goal| Some(&goal.digest) == first.as_ref());
    (goals, silent)
}

/// One goal of what this host and others have of it; none: nobody has it.
pub(super) fn merged(
    state: &State,
    own: Option<Goal>,
    others: Vec<Goal>,
    silent: Vec<Silent>,
) -> Option<Goal> {
    let is_alone = others.is_empty();
    let own = own.map(|mut own| {
        for task in own.tasks.iter_mut().filter(|_| !is_alone) {
            task.host = state.host().map(ToString::to_string);
        }
        own
    });
    let mut all = own.into_iter().chain(others);
    let mut goal = all.next()?;
    for other in all {
        goal.tasks.extend(other.tasks);
    }
    goal.tasks
        .sort_by(|a, b| (&a.vm, &a.host).cmp(&(&b.vm, &b.host)));
    goal.silent = silent;
    Some(goal)
}

/// A goal of which nothing is here: `refused`, unless a host that does not answer may have it.
pub(super) fn unknown_goal(state: &State, refused: ApiError, silent: &[Silent]) -> ApiError {
    let hosts: Vec<VmId> = silent.iter().filter_map(|s| s.host.parse().ok()).collect();
    match all_spoke(state, &hosts, "whether it has the goal is not known") {
        Ok(()) => refused,
        Err(unanswered) => unanswered,
    }
}

/// Goals of other hosts whose id ends so, behind those of this one.
pub(super) async fn goals_with_id(
    state: &App,
    asks: &Asks,
    ends_with: &str,
    newest: usize,
    goals: &mut Vec<GoalSummary>,
) -> Result<(), ApiError> {
    let fit = |b: u8| b.is_ascii_hexdigit() || b == b'-';
    if ends_with.is_empty() || !ends_with.bytes().all(fit) {
        return Ok(());
    }
    let path = format!("/v1/goals?newest={newest}&id={ends_with}");
    let mut silent = Vec::new();
    for (host, answer) in ask_all(state, asks, &path).await {
        match answer.and_then(|answer| answer.json::<Vec<GoalSummary>>()) {
            Ok(more) => {
                for goal in more.into_iter().take(newest) {
                    if !goals.iter().any(|known| known.goal_id == goal.goal_id) {
                        goals.push(goal);
                    }
                }
            }
            Err(e) if says_none(&e) => {}
            Err(_) => silent.push(host.config.name.clone()),
        }
    }
    match goals.is_empty() {
        true => all_spoke(state, &silent, "whether it has such a goal is not known"),
        false => Ok(()),
    }
}

/// Tasks of other hosts whose id begins so, behind those of this one.
pub(super) async fn tasks_with_id(
    state: &App,
    asks: &Asks,
    digits: &str,
    found: &mut Vec<Task>,
) -> Result<(), ApiError> {
    let path = format!("/v1/tasks?id={digits}&limit=500");
    let mut silent = Vec::new();
    for (host, answer) in ask_all(state, asks, &path).await {
        match answer.and_then(|answer| answer.json::<Vec<Task>>()) {
            Ok(mut tasks) => {
                tasks.retain_mut(|task| task.task_id.starts_with(digits) && claimed(&host, task));
                found.extend(tasks);
            }
            Err(e) if says_none(&e) => {}
            Err(_) => silent.push(host.config.name.clone()),
        }
    }
    match found.is_empty() {
        true => all_spoke(state, &silent, "whether it has such a task is not known"),
        false => Ok(()),
    }
}

/// What the first host says that has it; none: none has.
///
/// # Errors
/// None has it, of those that answer.
pub(super) async fn first(
    state: &App,
    asks: &Asks,
    path: &str,
) -> Result<Option<(Arc<Host>, Answer)>, ApiError> {
    let mut silent = Vec::new();
    for (host, answer) in ask_all(state, asks, path).await {
        match answer {
            Ok(answer) => return Ok(Some((host, answer))),
            Err(e) if says_none(&e) => {}
            Err(_) => silent.push(host.config.name.clone()),
        }
    }
    all_spoke(state, &silent, "whether it has the task is not known")?;
    Ok(None)
}

/// A task that another host has.
pub(super) async fn task(state: &App, asks: &Asks, id: &str) -> Result<Option<Task>, ApiError> {
    let Some((host, answer)) = first(state, asks, &format!("/v1/tasks/{id}")).await? else {
        return Ok(None);
    };
    let task = answer.json::<Task>();
    let mut task = task.map_err(|e| not_done(state, &host, &[], e))?;
    Ok((task.task_id == id && claimed(&host, &mut task)).then_some(task))
}

/// The host that has the VM of a filter, if it is another one, and the VM's name there and here.
///
/// # Errors
/// It is on several, or hosts that may have it do not answer.
pub(super) async fn of_vm(
    state: &App,
    asks: &Asks,
    name: &str,
) -> Result<(Option<Arc<Host>>, String), ApiError> {
    let as_it_is = (None, name.to_owned());
    let Ok(to) = named(state, name) else {
        return Ok(as_it_is);
    };
    let is_ours = to.host.is_none() || to.host.as_ref() == state.host();
    let vm = to.vm.to_string();
    if is_ours && (find(state, &vm).is_ok() || state.desk.has_tasks(vm.clone()).await?) {
        return Ok((None, vm));
    }
    if asks.is_by_way_of_host() || others(state).is_empty() {
        return Ok(as_it_is);
    }
    match find_name(state, &Caller::owner(), &to).await {
        Found::There(host) => Ok((Some(host), vm)),
        Found::Several(hosts) if asks.sees(state, Verb::Task, &vm) => Err(several(&to, &hosts)),
        Found::Here(_) => Ok((None, vm)),
        Found::Several(_) | Found::Nowhere(_) => match asks.sees(state, Verb::Task, &vm) {
            true => Err(nowhere(state, asks, &to)),
            false => Ok(as_it_is),
        },
    }
}

/// Tasks of a VM of another host, as that one lists them.
pub(super) async fn tasks_of(
    state: &App,
    asks: &Asks,
    host: &Arc<Host>,
    vm: &str,
    query: &[(&str, Option<String>)],
) -> Result<Response, ApiError> {
    let mut path = format!("/v1/tasks?vm={vm}");
    for (key, value) in query {
        let Some(value) = value else { continue };
        let is_plain = value
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b));
        if !is_plain {
            let text = format!("`{key}` makes no sense");
            return Err(ApiError::new(StatusCode::BAD_REQUEST, "usage", text));
        }
        path.push_str(&format!("&{key}={value}"));
    }
    let caller = asks.as_claimed(state).await;
    let vms: Vec<VmId> = vm.parse().into_iter().collect();
    let failed = |e| not_done(state, host, &vms, e);
    let answer = host.exchange(state, &caller, &path, None).await;
    let answer = answer.map_err(failed)?;
    let mut tasks: Vec<Task> = answer.json().map_err(failed)?;
    tasks.retain_mut(|task| task.vm == vm && claimed(host, task));
    let body = serde_json::to_vec(&tasks).unwrap_or_default();
    let mut response = Response::new(Body::from(body));
    let head = response.headers_mut();
    head.insert(
        axum::http::header::CONTENT_TYPE,
        axum::http::HeaderValue::from_static("application/json"),
    );
    for name in [adit_api::NEXT, adit_api::EARLIER] {
        let cursor = answer.head.get(name).and_then(|at| at.to_str().ok());
        // Its cursors are numbers.
        if let Some(cursor) = cursor.and_then(|at| at.parse::<i64>().ok()) {
            head.insert(name, cursor.into());
        }
    }
    Ok(response)
}

/// Changes of a goal's tasks, of each other host that has some.
pub(super) async fn changes(state: &App, asks: &Asks, goal: &str) -> Vec<(Arc<Host>, Coming)> {
    if asks.is_by_way_of_host() || !is_id(goal) {
        return vec![];
    }
    let caller = &asks.as_claimed(state).await;
    let path = &format!("/v1/events?goal={goal}");
    let streams = others(state).into_iter().map(|host| async move {
        // Whoever watches asks for the goal as well, and hears there of a host that does not answer.
        let body = host.stream(state, caller, path).await.ok()?;
        Some((host, body))
    });
    join_all(streams).await.into_iter().flatten().collect()
}

/// Passes on what another host says of a goal's tasks, to its end. A break is passed on as a break.
pub(super) async fn pass_on(
    state: App,
    asks: Asks,
    goal: String,
    (host, mut body): (Arc<Host>, Coming),
    to: Sender<io::Result<Bytes>>,
    _patient: Arc<OwnedSemaphorePermit>,
) {
    let name = &host.config.name;
    let cut_off = |why: &str| Err(io::Error::other(format!("host `{name}`: {why}")));
    let mut read = BytesMut::new();
    loop {
        let frame = tokio::select! {
            frame = body.next() => frame,
            () = to.closed() => return,
            () = state.stop.cancelled() => return drop(to.send(cut_off("aditd ends")).await),
        };
        let data = match frame {
            None if read.is_empty() => return,
            Some(Ok(data)) => data,
            None | Some(Err(_)) => return drop(to.send(cut_off("it is cut off")).await),
        };
        read.extend_from_slice(&data);
        while let Some(end) = read.iter().position(|&b| b == b'\n') {
            let line = read.split_to(end + 1);
            let Ok(TaskEvent { mut task, .. }) = serde_json::from_slice(&line) else {
                return drop(to.send(cut_off("what it says makes no sense")).await);
            };
            if !asks.is_same(&state).await {
                return drop(to.send(cut_off("who asks is not known any more")).await);
            }
            if task.goal_id != goal || !claimed(&host, &mut task) {
                continue;
            }
            let said = tasks::line(&state.desk.event(task));
            if to.send(Ok(said)).await.is_err() {
                return;
            }
        }
        if read.len() > LINE_MAX {
            return drop(to.send(cut_off("a line is too long")).await);
        }
    }
}

/// Whether a text is a goal's id, as it may be put into a path.
pub(super) fn is_id(text: &str) -> bool {
    text.len() == 36 && text.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-')
}

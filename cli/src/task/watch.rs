//! `adit task watch`: follows tasks until they have ended, and says whether their steps succeeded.
//!
//! aditd sends changes for as long as its stream lasts. That the stream ends says nothing of the tasks: aditd may have been
//! stopped. So the verdict is given when every step that was seen has ended, and never before; until then aditd is asked
//! again. A step that was cut off and tried again is judged by its last attempt.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use adit_api::{Goal, Task, TaskEvent, TaskState};

use super::{said, short};
use crate::client::Client;
use crate::error::{Failure, TASK_FAILED};
use crate::output;
use crate::text::{Format, escape};

/// How soon an aditd that has gone is looked for again.
const AGAIN: Duration = Duration::from_millis(200);

/// Goal, VM and step: what is tried until it succeeds.
type Step = (String, String, String);

struct Watch<'a> {
    client: &'a Client,
    /// Only this goal's tasks.
    goal: Option<String>,
    /// Only until this task has ended.
    only: Option<&'a str>,
    /// How changes are printed; none: not at all.
    format: Option<Format>,
    /// When aditd was heard last.
    heard: Option<Instant>,
    /// The last attempt of each step, and its state.
    steps: BTreeMap<Step, (u32, TaskState)>,
    /// The state of each task that was printed last.
    told: HashMap<String, TaskState>,
    /// Hosts that do not say what they have of a goal, and were named.
    silent: BTreeSet<String>,
    /// All hosts have said what they have, when they were asked last.
    is_whole: bool,
}

/// Watches the tasks of a goal, or all that are open.
pub async fn watch(
    client: &Client,
    goal: Option<String>,
    timeout: Option<Duration>,
    format: Format,
) -> Result<ExitCode, Failure> {
    let mut watch = Watch {
        client,
        goal,
        only: None,
        format: Some(format),
        heard: None,
        steps: BTreeMap::new(),
        told: HashMap::new(),
        silent: BTreeSet::new(),
        is_whole: true,
    };
    within(timeout, watch.run()).await?;
    let done = |&(_, state): &(u32, TaskState)| state == TaskState::Done;
    Ok(match watch.steps.values().all(done) {
        true => ExitCode::SUCCESS,
        false => ExitCode::from(TASK_FAILED),
    })
}

/// Waits until a task has ended.
pub async fn ended(client: &Client, task: &Task, timeout: Option<Duration>) -> Result<(), Failure> {
    let mut watch = Watch {
        client,
        goal: Some(task.goal_id.clone()),
        only: Some(&task.task_id),
        format: None,
        heard: None,
        steps: BTreeMap::new(),
        told: HashMap::new(),
        silent: BTreeSet::new(),
        is_whole: true,
    };
    within(timeout, watch.run()).await
}

async fn within(
    timeout: Option<Duration>,
    all: impl Future<Output = Result<(), Failure>>,
) -> Result<(), Failure> {
    let Some(limit) = timeout else {
        return all.await;
    };
    let late = |_| Failure::timeout(format!("not all tasks have ended within {limit:?}"));
    tokio::time::timeout(limit, all).await.map_err(late)?
}

impl Watch<'_> {
    /// Follows the tasks until the last one has ended.
    async fn run(&mut self) -> Result<(), Failure> {
        loop {
            match self.round().await {
                Ok(true) => break,
                Ok(false) => {}
                Err(e) if !e.passing => return Err(e),
                Err(e) => match self.heard {
                    None => return Err(e),
                    Some(at) if at.elapsed() >= self.client.limit() => return Err(self.gone(&e)),
                    Some(_) => {}
                },
            }
            tokio::time::sleep(AGAIN).await;
        }
        if self.steps.is_empty() {
            return Err(Failure::new(
                "nothing-open",
                "no task is open: there is nothing to watch",
            )
            .help("`adit task ls` lists those that have ended; --goal watches a goal even when it is over"));
        }
        Ok(())
    }

    /// Takes one stream to its end and asks for what it may have missed. Returns whether everything has ended.
    async fn round(&mut self) -> Result<bool, Failure> {
        let whole = self.follow().await?;
        self.catch_up().await?;
        self.heard = Some(Instant::now());
        // A stream that was cut off may not have named everything; a goal was asked for by its id, and is known whole.
        let all = self.only.is_some() || (self.is_whole && (whole || self.goal.is_some()));
        Ok(self.over() && all)
    }

    fn gone(&self, e: &Failure) -> Failure {
        let open = self.steps.values().filter(|(_, s)| !s.is_terminal());
        let message = format!(
            "aditd ended the stream and has not been there for {:?}: {} steps had not ended until then ({})",
            self.client.limit(),
            open.count(),
            e.message
        );
        Failure::new("unreachable", message)
            .help("the tasks go on meanwhile: watch again when aditd is up, or give it longer with --request-timeout")
    }

    /// Whether everything that is watched has ended.
    fn over(&self) -> bool {
        match self.only {
            Some(id) => self.told.get(id).is_some_and(|s| s.is_terminal()),
            None => self.steps.values().all(|(_, s)| s.is_terminal()),
        }
    }

    /// Takes changes until the stream ends. Returns whether aditd ended it by itself.
    async fn follow(&mut self) -> Result<bool, Failure> {
        let path = match &self.goal {
            Some(goal) => format!("/v1/events?goal={goal}"),
            None => "/v1/events".to_owned(),
        };
        let mut lines = self.client.stream(&path).await?;
        let whole = loop {
            match lines.next::<TaskEvent>().await.map_err(Failure::from) {
                Ok(Some(event)) => self.take(&event)?,
                Ok(None) => break true,
                Err(e) if e.passing => break false,
                Err(e) => return Err(e),
            }
            if self.only.is_some() && self.over() {
                break true;
            }
        };
        self.heard = Some(Instant::now());
        Ok(whole)
    }

    /// Asks how the goals stand of which something was open when the stream ended.
    async fn catch_up(&mut self) -> Result<(), Failure> {
        self.is_whole = true;
        let open = self.steps.iter().filter(|(_, (_, s))| !s.is_terminal());
        let goals: BTreeSet<String> = match &self.goal {
            Some(goal) => [goal.clone()].into(),
            None => open.map(|((goal, ..), _)| goal.clone()).collect(),
        };
        for goal in goals {
            let goal: Goal = self.client.get(&format!("/v1/goals/{goal}")).await?;
            self.is_whole &= goal.silent.is_empty();
            for silent in &goal.silent {
                if self.silent.insert(silent.host.clone()) {
                    adit_print::note(format_args!(
                        "host `{}` does not say what it has of the goal, and is asked again: {}",
                        escape(&silent.host),
                        escape(&silent.why)
                    ));
                }
            }
            for task in goal.tasks {
                // Of another goal than the one that was asked for, only what was open counts.
                if self.goal.is_some() || self.steps.contains_key(&step(&task)) {
                    self.take(&TaskEvent { seq: 0, task })?;
                }
            }
        }
        Ok(())
    }

    /// Notes a task's state, and prints it if it is news.
    fn take(&mut self, event: &TaskEvent) -> Result<(), Failure> {
        let task = &event.task;
        let last = self
            .steps
            .entry(step(task))
            .or_insert((task.attempt, task.state));
        if task.attempt >= last.0 {
            *last = (task.attempt, task.state);
        }
        if self.told.insert(task.task_id.clone(), task.state) == Some(task.state) {
            return Ok(());
        }
        match self.format {
            None => Ok(()),
            Some(Format::Json) => output::json(event),
            Some(Format::Table) => {
                let exit = task.exit.map_or(String::new(), |e| format!(" exit {e}"));
                output::line(format_args!(
                    "{}  {:<12} {:<16} {}{exit}  {}",
                    escape(short(&task.task_id)),
                    escape(&task.vm),
                    escape(&format!("{}#{}", task.step, task.attempt)),
                    task.state.name(),
                    escape(&said(task)),
                ))
            }
        }
    }
}

fn step(task: &Task) -> Step {
    (task.goal_id.clone(), task.vm.clone(), task.step.clone())
}

//! Whoever watches hears of everything that is on disk, in the order in which it got there, and of nothing else.

use std::future::Future;
use std::path::Path;
use std::pin::pin;
use std::task::{Context, Waker};

use super::*;
use crate::vm::Origin;

/// A desk for the VM `web-1`.
fn desk(dir: &Path) -> (Desk, Arc<VmEntry>) {
    let registry = Arc::new(Registry::new(dir));
    let vm = VmConfig::new("web-1".parse().unwrap(), 3);
    let vm = registry.add(vm, Origin::Api).unwrap();
    let db = Db::open(&dir.join("aditd.db"), &SCHEMA).unwrap();
    let metrics = Arc::new(Metrics::new(registry.clone()));
    let desk = Desk::new(db, registry, metrics, &Limits::default(), || BEFORE);
    (desk, vm)
}

/// The next changes as step and state, as far as they are there.
fn heard(events: &mut broadcast::Receiver<TaskEvent>) -> Vec<(String, TaskState)> {
    let next = std::iter::from_fn(|| events.try_recv().ok());
    next.map(|e| (e.task.step, e.task.state)).collect()
}

fn said(step: &str, state: TaskState) -> (String, TaskState) {
    (step.into(), state)
}

#[tokio::test]
async fn every_change_is_published_once_and_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let (desk, vm) = desk(dir.path());
    let mut events = desk.subscribe();
    use TaskState::{Done, Failed, Leased, Queued, Skipped, Started};
    desk.add_goal(goal(1, 5)).await.unwrap();
    assert_eq!(heard(&mut events), [said("a", Queued), said("b", Queued)]);
    // Handed over again, and handed out again: nothing has changed.
    desk.add_goal(goal(1, 5)).await.unwrap();
    let id = desk
        .hand_out(&vm.name, Wanted::default())
        .await
        .unwrap()
        .unwrap()
        .task_id;
    desk.hand_out(&vm.name, Wanted::default())
        .await
        .unwrap()
        .unwrap();
    desk.begun(&vm.name, id).await.unwrap();
    desk.begun(&vm.name, id).await.unwrap();
    assert_eq!(heard(&mut events), [said("a", Leased), said("a", Started)]);
    desk.report(&vm.name, report(id, Outcome::Done))
        .await
        .unwrap();
    desk.report(&vm.name, report(id, Outcome::Failed))
        .await
        .unwrap();
    // It begins too late: it has ended.
    desk.begun(&vm.name, id).await.unwrap();
    assert_eq!(heard(&mut events), [said("a", Done)]);
    assert_eq!(vm.show().queued, 1);
    desk.add_goal(goal(2, 6)).await.unwrap();
    let id = desk
        .hand_out(&vm.name, Wanted::default())
        .await
        .unwrap()
        .unwrap()
        .task_id;
    desk.report(&vm.name, report(id, Outcome::Done))
        .await
        .unwrap();
    let id = desk
        .hand_out(&vm.name, Wanted::default())
        .await
        .unwrap()
        .unwrap()
        .task_id;
    desk.report(&vm.name, report(id, Outcome::Failed))
        .await
        .unwrap();
    let want = [
        said("a", Queued),
        said("b", Queued),
        said("b", Leased),
        said("b", Done),
        said("a", Leased),
        said("a", Failed),
        said("b", Skipped),
    ];
    assert_eq!(heard(&mut events), want);
    assert_eq!(vm.show().queued, 0);
}

#[tokio::test]
async fn what_is_written_is_published_although_who_asked_for_it_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let (desk, vm) = desk(dir.path());
    let mut events = desk.subscribe();
    {
        // An agent's connection that is replaced is dropped wherever it waits.
        let mut asked = pin!(desk.add_goal(goal(1, 5)));
        let mut context = Context::from_waker(Waker::noop());
        assert!(asked.as_mut().poll(&mut context).is_pending());
    }
    // Behind it in the queue.
    desk.task([0; 16]).await.unwrap_err();
    use TaskState::Queued;
    assert_eq!(heard(&mut events), [said("a", Queued), said("b", Queued)]);
    assert_eq!(vm.show().queued, 2);
}

#[tokio::test]
async fn what_is_not_on_disk_is_not_published() {
    let dir = tempfile::tempdir().unwrap();
    let (desk, vm) = desk(dir.path());
    let mut events = desk.subscribe();
    let commits_nothing = desk.change::<(), _>(|c| {
        change::add_goal(c, &goal(1, 5), BEFORE, 8)?;
        let tasks = tasks(c, &Filter::default())?;
        assert_eq!(tasks.len(), 2);
        c.execute_batch("PRAGMA defer_foreign_keys = ON; UPDATE tasks SET digest = x'00'")?;
        Ok(((), tasks))
    });
    assert!(matches!(commits_nothing.await, Err(DeskError::Db(_))));
    assert_eq!((heard(&mut events), vm.show().queued), (Vec::new(), 0));
    desk.add_goal(goal(1, 5)).await.unwrap();
    assert_eq!(heard(&mut events).len(), 2);
}

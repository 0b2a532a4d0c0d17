//! The database does what the model of the rules does, event by event.

use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::desk::rules::tests::model::{Books, Model, Said};
use crate::desk::rules::tests::world::World;

/// The database and the model beside it.
struct Both {
    sql: Connection,
    model: Model,
}

fn said(tasks: Vec<Task>) -> Said {
    let said = tasks
        .into_iter()
        .map(|t| (adit_tasks::unhex(&t.task_id).unwrap(), t.state));
    said.collect()
}

/// What both said, which is the same.
fn agreed(mut sql: Said, mut model: Said) -> Said {
    sql.sort_by_key(|(id, _)| *id);
    model.sort_by_key(|(id, _)| *id);
    assert_eq!(sql, model);
    sql
}

impl Books for Both {
    fn add_goal(&mut self, new: &NewGoal, now: i64) -> Said {
        let added = change::add_goal(&self.sql, new, now, u32::MAX);
        let added = added.or_else(|e| match e {
            DeskError::GoalExpired { .. } => Ok(Vec::new()),
            e => Err(e),
        });
        agreed(said(added.unwrap()), self.model.add_goal(new, now))
    }

    fn hand_out(&mut self, vm: &str, now: i64, overtake: bool) -> (Option<TaskId>, Said) {
        let wanted = Wanted {
            overtake,
            ..Wanted::default()
        };
        let (next, changed) = change::hand_out(&self.sql, vm, now, &wanted).unwrap();
        let (model, model_said) = self.model.hand_out(vm, now, overtake);
        let id = next.map(|h| h.task_id);
        assert_eq!(id, model);
        (id, agreed(said(changed), model_said))
    }

    fn begun(&mut self, vm: &str, id: TaskId, now: i64) -> Said {
        let changed = change::begun(&self.sql, vm, &id, now).unwrap();
        agreed(said(changed), self.model.begun(vm, id, now))
    }

    fn report(&mut self, vm: &str, id: TaskId, outcome: Outcome, now: i64) -> Option<Said> {
        let model = self.model.report(vm, id, outcome, now);
        match change::report(&self.sql, vm, &super::report(id, outcome), now) {
            Ok(changed) => Some(agreed(said(changed), model.unwrap())),
            Err(DeskError::Unknown | DeskError::NotLeased) => {
                assert_eq!(model, None);
                None
            }
            Err(e) => panic!("{e}"),
        }
    }

    fn expire(&mut self, now: i64) -> (Option<i64>, Said) {
        let (next, ended) = change::expire(&self.sql, now).unwrap();
        let (model, model_said) = self.model.expire(now);
        assert_eq!(next, model);
        (next, agreed(said(ended), model_said))
    }

    fn remove_vm(&mut self, vm: &str, now: i64) -> Said {
        let ended = change::remove_vm(&self.sql, vm, now).unwrap();
        agreed(said(ended), self.model.remove_vm(vm, now))
    }

    fn killed(&mut self) {
        self.sql.execute("DELETE FROM temp.begun", []).unwrap();
        self.model.killed();
    }

    fn states(&mut self) -> BTreeMap<TaskId, TaskState> {
        let all = tasks(&self.sql, &Filter::default()).unwrap();
        let all: BTreeMap<_, _> = said(all).into_iter().collect();
        assert_eq!(all, self.model.states());
        // What queries call open is what is not terminal.
        let closed = "SELECT task_id FROM tasks WHERE closed_ms IS NOT NULL";
        let mut closed = self.sql.prepare_cached(closed).unwrap();
        let closed = closed.query_map([], |r| r.get(0)).unwrap();
        let closed: BTreeSet<TaskId> = closed.map(Result::unwrap).collect();
        let ended = all.iter().filter(|(_, s)| s.is_terminal());
        assert_eq!(closed, ended.map(|(id, _)| *id).collect());
        // A list by state is a part of that.
        for state in [TaskState::Leased, TaskState::Started] {
            let filter = Filter {
                state: Some(state.name().into()),
                ..Filter::default()
            };
            let listed = said(tasks(&self.sql, &filter).unwrap());
            let want = all.iter().filter(|(_, s)| **s == state).count();
            assert_eq!(listed.len(), want, "{state:?}");
            assert!(listed.iter().all(|(_, s)| *s == state), "{state:?}");
        }
        all
    }
}

#[test]
fn the_database_does_what_the_model_does_in_dozens_of_histories() {
    for seed in 0..48 {
        let (sql, model) = (open(), Model::default());
        World::new(seed, Both { sql, model }).run(150);
    }
}

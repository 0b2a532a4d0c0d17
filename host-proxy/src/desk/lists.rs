//! What the API reads. Each state is the one that was published last, also where it is not on disk yet.

use adit_api::{GoalSummary, Task};
use adit_tasks::wire::{Captured, TaskId};

use super::store::{
    self, goals,
    page::{self, Filter, Names, Page},
    report,
};
use super::{Accepted, Desk, DeskError};

impl Desk {
    /// A goal's digest, and the goal.
    ///
    /// # Errors
    /// There is no such goal, or the database fails.
    pub async fn goal(&self, goal_id: String) -> Result<([u8; 32], Accepted), DeskError> {
        self.db
            .run(move |c| {
                let goal = goals::goal(c, &goal_id)?;
                let (digest, accepted_ms) = goal.ok_or(DeskError::UnknownGoal)?;
                let tasks = store::of_goal(c, &goal_id)?;
                Ok((digest, Accepted { accepted_ms, tasks }))
            })
            .await
    }

    /// Refuses a goal that is not known.
    ///
    /// # Errors
    /// There is no such goal, or the database fails.
    pub async fn knows_goal(&self, goal_id: String) -> Result<(), DeskError> {
        let known = move |c: &_| Ok::<_, DeskError>(goals::goal(c, &goal_id)?);
        let known = self.db.run(known);
        known.await?.map(drop).ok_or(DeskError::UnknownGoal)
    }

    /// The newest goals: see [`goals::newest`].
    ///
    /// # Errors
    /// The database fails.
    pub async fn newest_goals(
        &self,
        ends_with: Option<String>,
        of: Option<Names>,
        before: i64,
        limit: usize,
    ) -> Result<(Vec<GoalSummary>, Option<i64>), DeskError> {
        self.db
            .run(move |c| {
                Ok(goals::newest(
                    c,
                    ends_with.as_deref(),
                    of.as_ref(),
                    before,
                    limit,
                )?)
            })
            .await
    }

    /// A page of tasks: see [`page::page`].
    ///
    /// # Errors
    /// The database fails.
    pub async fn tasks(
        &self,
        filter: &Filter,
        after: i64,
        limit: usize,
    ) -> Result<Page, DeskError> {
        let filter = filter.clone();
        self.db
            .run(move |c| Ok(page::page(c, &filter, after, limit)?))
            .await
    }

    /// The newest tasks: see [`page::newest`].
    ///
    /// # Errors
    /// The database fails.
    pub async fn newest_tasks(
        &self,
        filter: &Filter,
        before: i64,
        limit: usize,
    ) -> Result<Page, DeskError> {
        let filter = filter.clone();
        self.db
            .run(move |c| Ok(page::newest(c, &filter, before, limit)?))
            .await
    }

    /// One task.
    ///
    /// # Errors
    /// There is no such task, or the database fails.
    pub async fn task(&self, id: TaskId) -> Result<Task, DeskError> {
        let task = self
            .db
            .run::<_, DeskError, _>(move |c| Ok(store::task(c, &id)?));
        task.await?.ok_or(DeskError::Unknown)
    }

    /// What a task wrote.
    ///
    /// # Errors
    /// There is no such task, or the database fails.
    pub async fn output(&self, id: TaskId, stderr: bool) -> Result<Captured, DeskError> {
        let output = self
            .db
            .run::<_, DeskError, _>(move |c| Ok(report::output(c, &id, stderr)?));
        output.await?.ok_or(DeskError::Unknown)
    }

    /// Whether a VM has tasks here, though it may have been removed.
    ///
    /// # Errors
    /// The database fails.
    pub async fn has_tasks(&self, vm: String) -> Result<bool, DeskError> {
        self.db.run(move |c| Ok(page::has_tasks(c, &vm)?)).await
    }

    /// Names of all VMs that have tasks here: see [`page::vms`].
    ///
    /// # Errors
    /// The database fails.
    pub async fn vms_with_tasks(&self) -> Result<Vec<String>, DeskError> {
        self.db.run(|c| Ok(page::vms(c)?)).await
    }

    /// Names and settings of the VMs that were added through the API.
    ///
    /// # Errors
    /// The database fails.
    pub async fn kept_vms(&self) -> Result<Vec<(String, String)>, DeskError> {
        self.db.run(|c| Ok(store::vms::all(c)?)).await
    }
}

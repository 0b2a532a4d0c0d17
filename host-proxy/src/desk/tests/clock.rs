//! The clock looks at everything that is open.

use std::path::Path;
use std::sync::atomic::AtomicU32;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::*;

/// Open tasks of a host with many VMs.
const OPEN: u32 = 40_000;

static LOOKS: AtomicU32 = AtomicU32::new(0);

fn desk(dir: &Path) -> Desk {
    let registry = Arc::new(Registry::new(dir));
    let db = Db::open(&dir.join("aditd.db"), &SCHEMA).unwrap();
    let clock = || {
        LOOKS.fetch_add(1, Ordering::Relaxed);
        BEFORE
    };
    let metrics = Arc::new(Metrics::new(registry.clone()));
    Desk::new(db, registry, metrics, &Limits::default(), clock)
}

#[tokio::test]
async fn many_changes_in_a_row_do_not_keep_the_clock_at_the_database() {
    let dir = tempfile::tempdir().unwrap();
    let desk = desk(dir.path());
    desk.add_goal(goal(1, 5)).await.unwrap();
    let sql = "WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n WHERE i < ?2) \
         INSERT INTO tasks (task_id, digest, vm, step, step_no, attempt, idempotent, continue_on_error, state, queued_ms) \
         SELECT randomblob(16), ?1, 'vm-' || (i % 500), 's', 0, 1, 0, 0, 'queued', 0 FROM n";
    let insert =
        |c: &Connection| Ok::<_, DeskError>(c.execute(sql, rusqlite::params![[1_u8; 32], OPEN])?);
    desk.db.run(insert).await.unwrap();
    let mut look = Duration::MAX;
    for _ in 0..3 {
        let begin = Instant::now();
        let sql = "SELECT min(g.not_after_ms) FROM tasks t INDEXED BY tasks_waiting CROSS JOIN goals g USING (digest) \
             WHERE t.closed_ms IS NULL AND t.state = 'queued'";
        let read = |c: &Connection| Ok::<i64, DeskError>(c.query_row(sql, [], |r| r.get(0))?);
        desk.db.run(read).await.unwrap();
        look = look.min(begin.elapsed());
    }
    let stop = CancellationToken::new();
    LOOKS.store(0, Ordering::Relaxed);
    let begin = Instant::now();
    let changes = async {
        while begin.elapsed() < Duration::from_secs(2) {
            desk.bell.timetable.notify_one();
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        stop.cancel();
    };
    tokio::join!(desk.keep_time(&stop), changes);
    // Each look reads them several times.
    let busy = look * LOOKS.load(Ordering::Relaxed);
    assert!(busy < begin.elapsed() / 8, "{busy:?} of {look:?} each");
}

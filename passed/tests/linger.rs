//! The thread of a closer that closes again and again: alone in this process, since threads are counted.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use adit_passed::Closer;

/// Threads of closers.
fn threads() -> Vec<String> {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    let of_closers = tasks.filter_map(|task| {
        let path = task.unwrap().path();
        let name = fs::read_to_string(path.join("comm")).ok()?;
        (name.trim() == "closer").then(|| path.display().to_string())
    });
    of_closers.collect()
}

fn close_one(closer: &Closer) {
    let file = OwnedFd::from(File::open("/dev/null").unwrap());
    closer.close(file);
    let begin = Instant::now();
    while closer.pending() > 0 {
        assert!(begin.elapsed() < Duration::from_secs(20));
        std::thread::yield_now();
    }
}

#[test]
fn one_thread_closes_what_comes_within_a_second_and_ends_then() {
    let closer = Closer::lingering(4);
    close_one(&closer);
    let first = threads();
    assert_eq!(first.len(), 1);
    for _ in 0..100 {
        close_one(&closer);
    }
    assert_eq!(threads(), first);
    let begin = Instant::now();
    while !threads().is_empty() {
        assert!(begin.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(20));
    }
    // And another one comes when it is needed.
    close_one(&closer);
}

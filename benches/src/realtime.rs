//! Runs a bench so that other work on the machine does not disturb it.

use std::os::unix::process::CommandExt;
use std::process::Command;

/// Starts this program again as SCHED_FIFO (with `chrt`, which needs root), unless it runs so already. If that fails, prints
/// the reason and continues.
pub fn realtime() {
    const MARK: &str = "ADIT_BENCH_REALTIME";
    if std::env::var_os(MARK).is_some() {
        return;
    }
    let Ok(program) = std::env::current_exe() else {
        return;
    };
    let mut command = Command::new("chrt");
    command.args(["--fifo", "1"]).arg(program);
    command.args(std::env::args_os().skip(1)).env(MARK, "1");
    let e = command.exec();
    eprintln!("--realtime ignored: chrt: {e}");
}

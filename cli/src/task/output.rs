//! `adit task output`: what a task wrote. It comes with the task's report, so it is there when the task has ended.

use std::time::Duration;

use adit_api::Task;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use clap::{Args, ValueEnum};
use serde::Serialize;

use super::{resolve, said, short, watch};
use crate::client::Client;
use crate::completion;
use crate::error::Failure;
use crate::output::{self, duration};
use crate::text::{Format, escape};

pub const EXAMPLE: &str = "\
Examples:
  adit task output 3f2a --stream stderr
  adit task output 3f2a --wait > log
  adit task output 3f2a -o json | jq -r '.head + .tail'

Of a long output the first and the last bytes are kept. Between them a line says how many are missing; with -o json they are
`head` and `tail`, in the `encoding` utf-8, or base64 where the bytes are no text.

Exit status: 0 this is what it wrote, though that may be nothing; 1 the task has not ended yet; 4 there is no such task.";

#[derive(Args)]
pub struct Output {
    /// Id of the task, or the first digits of it
    #[arg(add = completion::tasks())]
    id: String,
    /// Which stream
    #[arg(long, value_enum, default_value = "stdout")]
    stream: Stream,
    /// Wait until the task has ended
    #[arg(long)]
    wait: bool,
    /// With --wait: give up after this long, for example 30s or 5m (exit status 124)
    #[arg(
        long,
        requires = "wait",
        value_parser = duration,
        value_name = "DURATION"
    )]
    timeout: Option<Duration>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Stream {
    /// Standard output
    Stdout,
    /// Standard error
    Stderr,
}

/// What `-o json` prints.
#[derive(Serialize)]
struct Written<'a> {
    task_id: &'a str,
    goal_id: &'a str,
    vm: &'a str,
    step: &'a str,
    attempt: u32,
    state: &'static str,
    stream: &'static str,
    /// All that the task wrote.
    total_bytes: u64,
    /// What is missing between head and tail.
    left_out_bytes: u64,
    /// `utf-8` or `base64`, of head and tail.
    encoding: &'static str,
    head: String,
    tail: String,
}

pub async fn run(output: &Output, client: &Client, format: Format) -> Result<(), Failure> {
    let mut task = resolve(client, &output.id).await?;
    if !task.state.is_terminal() {
        if !output.wait {
            let message = format!(
                "task {} is {}: what it writes is known when it has ended",
                short(&task.task_id),
                task.state.name()
            );
            return Err(Failure::new("not-ended", message).help("--wait waits for it"));
        }
        watch::ended(client, &task, output.timeout).await?;
        task = client.get(&format!("/v1/tasks/{}", task.task_id)).await?;
    }
    let (name, total) = match output.stream {
        Stream::Stdout => ("stdout", task.output_bytes.0),
        Stream::Stderr => ("stderr", task.output_bytes.1),
    };
    let path = format!("/v1/tasks/{}/output?stream={name}", task.task_id);
    let (bytes, left_out) = client.get_bytes(&path, adit_api::LEFT_OUT).await?;
    if format == Format::Json {
        return json(&task, name, total, &bytes, left_out.as_deref());
    }
    if bytes.is_empty() && task.output_bytes == (0, 0) {
        adit_print::note(format_args!(
            "task {} is {} and wrote nothing  {}",
            escape(short(&task.task_id)),
            task.state.name(),
            escape(&said(&task))
        ));
    }
    output::foreign_bytes(&bytes)
}

fn json(
    task: &Task,
    stream: &'static str,
    total_bytes: u64,
    bytes: &[u8],
    left_out: Option<&str>,
) -> Result<(), Failure> {
    let (head, tail, left_out_bytes) = parts(bytes, left_out).unwrap_or((bytes, &[], 0));
    let texts = (str::from_utf8(head), str::from_utf8(tail));
    let (encoding, head, tail) = match texts {
        (Ok(head), Ok(tail)) => ("utf-8", head.to_owned(), tail.to_owned()),
        _ => ("base64", BASE64.encode(head), BASE64.encode(tail)),
    };
    output::json(&Written {
        task_id: &task.task_id,
        goal_id: &task.goal_id,
        vm: &task.vm,
        step: &task.step,
        attempt: task.attempt,
        state: task.state.name(),
        stream,
        total_bytes,
        left_out_bytes,
        encoding,
        head,
        tail,
    })
}

/// Head, tail, and how many bytes are missing between them.
fn parts<'a>(bytes: &'a [u8], left_out: Option<&str>) -> Option<(&'a [u8], &'a [u8], u64)> {
    let (at, missing) = left_out?.split_once(' ')?;
    let (at, missing): (usize, u64) = (at.parse().ok()?, missing.parse().ok()?);
    let tail = at.checked_add(adit_api::left_out(missing).len())?;
    Some((bytes.get(..at)?, bytes.get(tail..)?, missing))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_out_is_cut_from_between_head_and_tail() {
        let text = format!("ab{}cd", adit_api::left_out(70));
        let want: (&[u8], &[u8], u64) = (b"ab", b"cd", 70);
        assert_eq!(parts(text.as_bytes(), Some("2 70")), Some(want));
        for bad in ["", "2", "x 70", "2 x", "99 70", "18446744073709551615 70"] {
            assert_eq!(parts(text.as_bytes(), Some(bad)), None, "{bad}");
        }
    }
}

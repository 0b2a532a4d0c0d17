//! `adit cp`: one copy, and as many attempts as it takes.

use std::ffi::OsString;
use std::io;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use adit_files::tree::{Fault, Root, Sink, Source, Stream, Target, receive, send};
use adit_files::{Begin, Message, Place, Totals, Violation, What};
use clap::Args;

use super::link;
use super::place::{End, Local, Remote};
use super::progress::Progress;
use crate::client::Client;
use crate::error::Failure;
use crate::exec::{OWN, ours};
use crate::output;
use crate::text::Format;

/// How often a copy that was cut off is gone on with, when nothing moves between two cuts.
const TRIES: u32 = 8;
/// How long the first of them waits; each other one twice as long, up to [`WAIT_MAX`].
const WAIT: Duration = Duration::from_millis(200);
const WAIT_MAX: Duration = Duration::from_secs(5);
/// Exit status: some of it is not copied.
const PARTLY: u8 = 1;

const EXAMPLES: &str = "\
Examples:
  adit cp app.conf web-1:/etc/app/            # into a directory that is there
  adit cp web-1:/var/log/app .                # a file or a tree
  adit cp src/. web-1:/srv/app                # what is in it, not itself
  pg_dump shop | adit cp - web-1:/srv/dump.sql
  adit cp --user deploy web-1:report.pdf -    # below that user's home, to standard output

A target that is a directory gets the source in it; any other one is what the copy will be. Trees need no option. Modes (but set-user-ID
and the like) and times are kept; links are copied as links, and none is followed but a source that is one itself; FIFOs, sockets
and devices are left out, with a word; files that are sparse stay so; hard links become files of their own.

A file gets its name when it is whole. When the connection breaks off, it is made again, and the copy goes on where it was.

It needs two permissions: of the host, where it is not its owner who asks, a grant with `files` or `files:/PATH`; and of the guest, whose
owner's policy (/etc/adit-guest/policy.toml) has a rule such as
  [[files]]
  allow = \"host\"
  users = [\"deploy\"]
  read = [\"/srv\", \"/var/log\"]
  write = [\"/srv\"]

Exit status: 0; 1 some of it is not copied; 125 adit, aditd or the guest refused; 255 the guest was not reached, or the
connection broke off for good.";

/// Copy a file or a tree to a VM, or from it
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct Cp {
    /// User of the guest, by name or number
    #[arg(long, default_value = "root")]
    user: String,
    /// Go on where a copy broke off: what is there already, with the same size, time and content, is not sent again
    #[arg(long)]
    resume: bool,
    /// Extended attributes of users, too
    #[arg(long)]
    xattrs: bool,
    /// Owners and groups by number, too, where root writes
    #[arg(long)]
    owners: bool,
    /// Have it on the disk before it is done
    #[arg(long)]
    sync: bool,
    /// Show no progress
    #[arg(short, long)]
    quiet: bool,
    /// As scp and cp have it; trees are copied without it
    #[arg(short, long, hide = true)]
    recursive: bool,
    /// What is copied: PATH, VM:PATH, or - for standard input
    #[arg(value_name = "SOURCE")]
    from: OsString,
    /// Where to: PATH, VM:PATH, or - for standard output
    #[arg(value_name = "TARGET")]
    to: OsString,
}

fn usage(message: impl Into<String>) -> Failure {
    Failure::new("usage", message).with_status(OWN)
}

/// What this side has of a copy.
#[derive(Clone)]
enum Here {
    Path(Local),
    Pipe,
}

/// Which way it goes.
#[derive(Clone)]
struct Way {
    here: Here,
    there: Remote,
    what: What,
}

impl Way {
    fn of(from: End, to: End) -> Result<(Self, Begin), Failure> {
        let here = |end: End| match end {
            End::Local(local) => Ok(Here::Path(local)),
            End::Pipe => Ok(Here::Pipe),
            End::Remote(_) => Err(usage("from VM to VM goes by way of this side: two copies")),
        };
        let place = |is_dir| if is_dir { Place::Within } else { Place::Auto };
        let (way, name, is_dir) = match (from, to) {
            (End::Remote(there), to) => {
                let name = there.name();
                let is_dir = matches!(&to, End::Local(to) if to.is_dir);
                let (here, what) = (here(to)?, What::Read);
                (Self { here, there, what }, name, is_dir)
            }
            (from, End::Remote(there)) => {
                let (name, is_dir) = match &from {
                    End::Local(from) => (from.name(), there.is_dir),
                    _ => (Vec::new(), false),
                };
                let (here, what) = (here(from)?, What::Write);
                (Self { here, there, what }, name, is_dir)
            }
            _ => {
                let text = "neither of the two is in a VM";
                return Err(usage(text).help("one of them is VM:PATH"));
            }
        };
        let place = place(is_dir);
        let begin = Begin {
            name,
            place,
            ..Begin::default()
        };
        Ok((way, begin))
    }
}

/// Copies.
pub async fn cp(cp: &Cp, client: &Client, format: Format) -> Result<ExitCode, Failure> {
    let (way, mut begin) = Way::of(End::parse(&cp.from)?, End::parse(&cp.to)?)?;
    begin.resume = cp.resume;
    begin.xattrs = cp.xattrs;
    begin.owners = cp.owners;
    begin.sync = cp.sync;
    let progress = Arc::new(Progress::new(cp.quiet));
    let copied = tokio::select! {
        copied = attempts(cp, client, way, begin, &progress) => copied,
        _ = tokio::signal::ctrl_c() => Err(Failure::interrupted("Ctrl-C: it is copied in part")
            .help("the same with --resume goes on from here")),
    };
    progress.end();
    let totals = copied.map_err(ours)?;
    let unnamed = progress.unnamed();
    if unnamed > 0 {
        adit_print::note(format!("adit: not copied: {unnamed} more"));
    }
    if format == Format::Json && cp.to != "-" {
        output::json(&serde_json::json!({
            "entries": totals.entries,
            "bytes": totals.bytes,
            "skipped": totals.skipped,
        }))?;
    }
    Ok(match totals.skipped {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::from(PARTLY),
    })
}

/// How an attempt failed.
struct Failed {
    why: Failure,
    /// What the target is, if that is known.
    place: Option<Place>,
    /// Another attempt may do.
    again: bool,
}

async fn attempts(
    cp: &Cp,
    client: &Client,
    way: Way,
    mut begin: Begin,
    progress: &Arc<Progress>,
) -> Result<Totals, Failure> {
    let (mut tries, mut moved, mut has_begun) = (0, 0, false);
    loop {
        let failed = match attempt(cp, client, &way, &begin, progress).await {
            Ok(totals) => return Ok(totals),
            Err(failed) => failed,
        };
        has_begun |= failed.place.is_some();
        // What comes out of a pipe, or went into one, is gone.
        if !failed.again || !has_begun || matches!(way.here, Here::Pipe) {
            return Err(failed.why);
        }
        if progress.moved() > moved {
            (moved, tries) = (progress.moved(), 0);
        }
        tries += 1;
        if tries > TRIES {
            return Err(failed.why);
        }
        if tries == 1 {
            let why = crate::text::escape(&failed.why.message);
            progress.note(&format!("adit: {why}; it goes on"));
        }
        tokio::time::sleep((WAIT * 2_u32.pow(tries - 1)).min(WAIT_MAX)).await;
        begin.resume = true;
        begin.place = match failed.place {
            Some(Place::Auto) | None => begin.place,
            Some(place) => place,
        };
        progress.again();
    }
}

async fn attempt(
    cp: &Cp,
    client: &Client,
    way: &Way,
    begin: &Begin,
    progress: &Arc<Progress>,
) -> Result<Totals, Failed> {
    let not_begun = |why: Failure| Failed {
        again: why.is_of_the_way() || why.passing,
        why,
        place: None,
    };
    // What is wrong here is said before anything is asked for.
    let end = Ends::find(way, begin).map_err(|fault| Failed {
        why: local(&fault),
        place: None,
        again: false,
    })?;
    let to = (way.there.vm.as_str(), cp.user.as_str());
    let stream = link::open(client, to, (way.what, &way.there.path));
    let (stream, _) = stream.await.map_err(not_begun)?;
    let (begin, progress) = (begin.clone(), progress.clone());
    let done = tokio::task::spawn_blocking(move || end.carry(stream, &begin, &progress));
    let (place, done) = match done.await {
        Ok(done) => done,
        Err(e) => return Err(not_begun(Failure::new("internal", e.to_string()))),
    };
    done.map_err(|fault| {
        let mut why = link::failure(&fault);
        why.message = format!("{}: {}", link::shown(&way.there), why.message);
        let again = match &fault {
            Fault::Cut(_) => true,
            // The copy before is still there, or there is no way just now.
            Fault::Refused(refused) => {
                let code = refused.reason;
                code == adit_files::refusal::BUSY || code == adit_files::refusal::UNREACHABLE
            }
            _ => false,
        };
        Failed { why, place, again }
    })
}

fn local(fault: &Fault) -> Failure {
    link::failure(fault)
}

/// This side's end of a copy.
enum Ends {
    Source(Source),
    Sink(Sink, Place),
}

impl Ends {
    fn find(way: &Way, begin: &Begin) -> Result<Self, Fault> {
        let root = || Root::own().map_err(|e| Fault::at("use the working directory", e));
        Ok(match (&way.here, way.what) {
            (Here::Path(path), What::Write) => Self::Source(Source::find(&root()?, &path.path)?),
            (Here::Pipe, What::Write) => Self::Source(Source::Pipe(Box::new(io::stdin()))),
            (Here::Path(path), _) => {
                let target = Target::find(&root()?, &path.path, begin)?;
                let place = target.place();
                Self::Sink(Sink::Target(target), place)
            }
            (Here::Pipe, _) => Self::Sink(Sink::Pipe(Box::new(io::stdout())), Place::Auto),
        })
    }

    /// Carries it; also what the target was, once the guest has said that it may be done.
    fn carry(
        self,
        mut stream: Stream,
        begin: &Begin,
        progress: &Progress,
    ) -> (Option<Place>, Result<Totals, Fault>) {
        let place = match began(&mut stream, begin) {
            Ok(place) => place,
            Err(fault) => return (None, Err(fault)),
        };
        match self {
            Self::Source(source) => (Some(place), send(&mut stream, source, begin, progress)),
            Self::Sink(sink, place) => {
                let done = receive(&mut stream, sink, begin, progress, false);
                if let Some(refused) = done.as_ref().err().and_then(Fault::refusal) {
                    let _ = stream.say(&Message::Refused(refused));
                    let _ = stream.flush();
                }
                (Some(place), done)
            }
        }
    }
}

/// Says how it is to be, and waits until it may.
fn began(stream: &mut Stream, begin: &Begin) -> Result<Place, Fault> {
    stream.say(&Message::Begin(begin.clone()))?;
    stream.flush()?;
    match stream.hear()? {
        Message::Ready(place) => Ok(place),
        Message::Refused(refused) => Err(Fault::Refused(refused)),
        _ => Err(Fault::Violation(Violation::NotDue)),
    }
}

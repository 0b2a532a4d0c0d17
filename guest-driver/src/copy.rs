//! The process of a copy, a list, a removal or a wait, as the fork server makes it. It becomes the user that was asked for before it touches a path, and then
//! the kernel decides what may be read and written; and it never leads out of the directory that it was told.
//!
//! ```text
//! agent: hello, policy ── spawns, gives it the stream ──▶ this: setuid ─▶ Root ─▶ send | receive | list | remove | wait
//! ```

use std::io::{self, Read};

use adit_files::tree::{self, Fault, Root, Sink, Source, Stream, Target};
use adit_files::{Asked, Begin, Message, Place, Refused, What, refusal};
use nix::unistd::{User, setgid, setgroups, setuid};
use serde::{Deserialize, Serialize};

use crate::exec::script::credentials;
use crate::log;
use crate::session::take_stdout;

/// Most bytes of what it is told at its start.
const SPEC_MAX: u64 = 64 << 10;

/// What it is told by the agent that starts it: the same program, so there are no versions of it.
#[derive(Debug, Serialize, Deserialize)]
pub struct Spec {
    /// As whom, a name of /etc/passwd.
    pub user: String,
    /// What was asked for.
    pub asked: Asked,
    /// Where: absolute, and plain.
    pub path: String,
    /// The directory that nothing leads out of.
    pub root: String,
}

/// Does it: what it is comes by standard input, its client is standard output.
///
/// # Errors
/// It cannot begin. Its client has heard so, if that was possible.
pub fn run() -> io::Result<()> {
    let mut spec = Vec::new();
    io::stdin().lock().take(SPEC_MAX).read_to_end(&mut spec)?;
    let spec: Spec = postcard::from_bytes(&spec).map_err(io::Error::other)?;
    let socket = take_stdout()?;
    rustix::io::ioctl_fionbio(&socket, false)?;
    let mut stream = Stream::new(socket)?;
    let done = become_user(&spec.user).and_then(|()| serve(&spec, &mut stream));
    let last = done.as_ref().err().and_then(Fault::refusal);
    if let Err(e) = &done {
        let fields: [(&str, &dyn std::fmt::Display); 2] = [("path", &spec.path), ("why", e)];
        log::event("files-ended", &fields);
    }
    stream.end(last.map(Message::Refused).as_ref());
    Ok(())
}

/// Leaves all rights behind that the user does not have, and the way to get any.
fn become_user(name: &str) -> Result<(), Fault> {
    let failed = |what: &str, e: &dyn std::fmt::Display| {
        Fault::Local(Refused::new(refusal::FAILED, format!("cannot {what}: {e}")))
    };
    let user = User::from_name(name).map_err(|e| failed("look the user up", &e))?;
    let user = user.ok_or_else(|| {
        let text = format!("this guest has no user `{name}`");
        Fault::Local(Refused::new(refusal::NO_USER, text))
    })?;
    nix::sys::prctl::set_no_new_privs().map_err(|e| failed("give up privileges", &e))?;
    let become_it = |e: nix::Error| failed("become the user", &e);
    if let Some((groups, gid, uid)) =
        credentials(&user).map_err(|e| failed("become the user", &e))?
    {
        setgroups(&groups).map_err(become_it)?;
        setgid(gid).map_err(become_it)?;
        setuid(uid).map_err(become_it)?;
    }
    Ok(())
}

fn serve(spec: &Spec, stream: &mut Stream) -> Result<(), Fault> {
    let found = Root::of(&spec.root, &spec.path);
    let (root, path) = found.map_err(|e| {
        let what = match spec.root.as_str() {
            "/" => "/".to_owned(),
            root => format!("{root}, which the rule or the grant names"),
        };
        Fault::at(&format!("enter {what}"), e)
    })?;
    match spec.asked.what {
        What::Read => {
            let begin = begin(stream)?;
            let source = Source::find(&root, path)?;
            stream.say(&Message::Ready(Place::Auto))?;
            tree::send(stream, source, &begin, &())?;
        }
        What::Write => {
            let begin = begin(stream)?;
            let target = Target::find(&root, path, &begin)?;
            stream.say(&Message::Ready(target.place()))?;
            stream.flush()?;
            tree::receive(stream, Sink::Target(target), &begin, &(), true)?;
        }
        What::List => {
            tree::list(&root, path, |rows| stream.say(&Message::Rows(rows)))?;
            stream.say(&Message::Done)?;
        }
        What::Stat => {
            let row = tree::stat(&root, path)?;
            stream.say(&Message::Rows(vec![row]))?;
            stream.say(&Message::Done)?;
        }
        What::Wait => {
            // The end of the stream is all that is to be said to one who has gone.
            if let Some(row) = tree::wait(&root, path, stream)? {
                stream.say(&Message::Rows(vec![row]))?;
                stream.say(&Message::Done)?;
            }
        }
        What::Remove { all } => {
            tree::remove(&root, path, all)?;
            stream.say(&Message::Done)?;
        }
    }
    Ok(())
}

fn begin(stream: &mut Stream) -> Result<Begin, Fault> {
    match stream.hear()? {
        Message::Begin(begin) => Ok(begin),
        _ => Err(Fault::Violation(adit_files::Violation::NotDue)),
    }
}

//! Commands: the agent as a process, its session processes, and a host that this test plays.
//!
//! Tests whose names begin with a tool's are of faults that such tools have had, and name where.

use std::collections::HashSet;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use adit_channel::refusal::{Code, Refusal};
use adit_exec::{
    Asked, Attach, Client, Decoder, Exit, Heard, How, Open, Out, Refused, Row, SPOOL_MAX, Size,
    Started, ToClient, ToGuest, What, refusal,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sha2::{Digest, Sha256};

use crate::blob::{dial, try_dial};
use crate::host::Host;
use crate::policy;

const HANG: Duration = Duration::from_secs(60);
const ANY: &str = "[[exec]]\nallow = \"host\"\nusers = \"any\"\ncommands = \"any\"\n";

/// A guest whose owner allows everything, with its own stream to the host.
pub struct Guest {
    pub host: Host,
    session: crate::host::Session,
}

/// Who this test runs as.
pub fn me() -> String {
    let uid = nix::unistd::geteuid();
    nix::unistd::User::from_uid(uid).unwrap().unwrap().name
}

pub fn guest(rules: &str) -> Guest {
    let mut host = policy::host(rules);
    host.start(None);
    let (session, _) = host.accept();
    Guest { host, session }
}

impl Guest {
    /// A killed or stopped agent is followed by another.
    pub fn another_agent(&mut self) {
        self.host.start(None);
        let (session, _) = self.host.accept();
        self.session = session;
    }

    fn asked(&self, what: What) -> Result<UnixStream, Refusal> {
        let user = Some(me());
        dial(&self.host, "exec", Asked { user, what }.encode().unwrap())
    }

    fn open(&self, open: Open) -> Running {
        let program = String::from_utf8(open.argv[0].clone()).unwrap();
        let stream = self.asked(What::Run(program)).unwrap();
        let mut running = Running::new(stream);
        running.say(&ToGuest::Open(open));
        running
    }

    pub fn run(&self, argv: &[&str]) -> Running {
        self.open(command(argv))
    }

    fn sh(&self, script: &str) -> Running {
        self.run(&["sh", "-c", script])
    }

    fn attach(&self, id: &str, attach: Attach) -> Running {
        let stream = self.asked(What::Attach(id.into())).unwrap();
        let mut running = Running::new(stream);
        running.say(&ToGuest::Attach(attach));
        running
    }

    pub fn rows(&self) -> Vec<Row> {
        let mut running = Running::new(self.asked(What::List).unwrap());
        match running.hear().unwrap() {
            Heard::Rows(rows) => rows,
            other => panic!("{other:?}"),
        }
    }

    pub fn end(&self, id: &str, signal: u8) -> Result<(), Refused> {
        let id = id.into();
        let mut running = Running::new(self.asked(What::End { id, signal }).unwrap());
        match running.hear().unwrap() {
            Heard::Done => Ok(()),
            Heard::Refused(refused) => Err(refused),
            other => panic!("{other:?}"),
        }
    }

    /// Waits until nothing of any session is left.
    pub fn until_none(&self) {
        until("all sessions have gone", || {
            let dir = self.host.path("run/exec");
            fs::read_dir(dir).unwrap().count() == 0
        });
    }
}

pub fn until(what: &str, mut is: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !is() {
        assert!(begin.elapsed() < HANG, "{what}: not after {HANG:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub fn command(argv: &[&str]) -> Open {
    Open {
        argv: argv.iter().map(|text| text.as_bytes().to_vec()).collect(),
        ..Open::default()
    }
}

/// A process is there, and no zombie.
fn lives(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !stat.is_empty() && !stat.contains(") Z ")
}

/// A client.
pub struct Running {
    pub stream: UnixStream,
    decoder: Decoder,
    half: Client,
    pub out: Vec<u8>,
    err: Vec<u8>,
    started: Option<Started>,
}

impl Running {
    pub fn new(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(HANG)).unwrap();
        stream.set_write_timeout(Some(HANG)).unwrap();
        Self {
            stream,
            decoder: Decoder::default(),
            half: Client::new(),
            out: Vec::new(),
            err: Vec::new(),
            started: None,
        }
    }

    pub fn say(&mut self, message: &ToGuest) {
        self.stream.write_all(&message.encode()).unwrap();
    }

    pub fn hear(&mut self) -> io::Result<Heard> {
        let mut piece = vec![0; 64 << 10];
        loop {
            if let Some(message) = self.decoder.poll_frame::<ToClient>().unwrap() {
                let heard = self.half.handle(message).unwrap();
                match &heard {
                    Heard::Started(started) => self.started = Some(started.clone()),
                    Heard::Output(Out::Stdout, bytes) => self.out.extend(bytes),
                    Heard::Output(Out::Stderr, bytes) => self.err.extend(bytes),
                    _ => {}
                }
                if let Some(ack) = self.half.poll_ack() {
                    self.stream.write_all(&ack)?;
                }
                return Ok(heard);
            }
            match self.stream.read(&mut piece)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => self.decoder.push(&piece[..n]),
            }
        }
    }

    pub fn started(&mut self) -> Started {
        while self.started.is_none() {
            match self.hear().unwrap() {
                Heard::Started(_) | Heard::Nothing => {}
                other => panic!("{other:?}"),
            }
        }
        self.started.clone().unwrap()
    }

    /// Hears until the output ends with this.
    fn until(&mut self, text: &str) {
        while !self.out.ends_with(text.as_bytes()) {
            let heard = self.hear().unwrap();
            assert!(
                !matches!(heard, Heard::Exit(_) | Heard::Refused(_)),
                "{heard:?}"
            );
        }
    }

    /// Gives it input, as far as it takes that, while its output is read.
    fn input(&mut self, bytes: &[u8]) {
        self.started();
        let mut rest = bytes;
        while !rest.is_empty() {
            let n = self.half.stdin_room().min(rest.len());
            if n == 0 {
                if !self.half.takes_input() {
                    return;
                }
                self.hear().unwrap();
                continue;
            }
            let frame = self.half.stdin(&rest[..n]);
            self.stream.write_all(&frame).unwrap();
            rest = &rest[n..];
        }
    }

    fn end_input(&mut self) {
        self.started();
        let frame = self.half.stdin_end();
        self.stream.write_all(&frame).unwrap();
    }

    pub fn exit(&mut self) -> (How, i32) {
        let exit = self.whole_exit();
        (How::of(exit.how).unwrap(), exit.value)
    }

    fn whole_exit(&mut self) -> Exit {
        loop {
            match self.hear().unwrap() {
                Heard::Exit(exit) => return exit,
                Heard::Refused(refused) => panic!("{refused:?}"),
                _ => {}
            }
        }
    }

    pub fn refused(&mut self) -> Refused {
        loop {
            match self.hear().unwrap() {
                Heard::Refused(refused) => return refused,
                Heard::Exit(exit) => panic!("{exit:?}"),
                _ => {}
            }
        }
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.out).into_owned()
    }

    fn pid(&mut self) -> i32 {
        while !self.out.contains(&b'\n') {
            self.hear().unwrap();
        }
        let line = self.text();
        line.lines().next().unwrap().trim().parse().unwrap()
    }
}

#[test]
fn a_command_gets_its_elements_its_environment_and_nothing_else_and_its_status_comes_back() {
    let guest = guest(ANY);
    let mut run = guest.open(Open {
        env: vec![(b"A".to_vec(), b"b $c".to_vec())],
        cwd: b"/tmp".to_vec(),
        ..command(&[
            "sh",
            "-c",
            "printf '[%s]' \"$@\"; pwd; env; cat; exit 7",
            "sh",
            "",
            "a b",
            "$(id)",
            "-x",
        ])
    });
    assert_eq!(run.exit(), (How::Code, 7));
    let said = run.text();
    assert!(said.starts_with("[][a b][$(id)][-x]/tmp\n"), "{said}");
    let names: HashSet<_> = said
        .lines()
        .skip(1)
        .filter_map(|l| l.split_once('='))
        .map(|(n, _)| n)
        .collect();
    let all = [
        "A",
        "ADIT_SESSION_ID",
        "HOME",
        "LANG",
        "LOGNAME",
        "PATH",
        "PWD",
        "SHELL",
        "USER",
    ];
    assert!(
        names
            .iter()
            .all(|n| all.contains(n) || *n == "_" || *n == "SHLVL" || *n == "OLDPWD"),
        "{said}"
    );
    assert!(said.contains("\nA=b $c\n"), "{said}");
    // R97: of the agent's descriptors it has none.
    let mut run = guest.sh("ls /proc/self/fd | wc -l; ls -l /proc/self/fd >&2");
    assert_eq!(run.exit(), (How::Code, 0));
    assert_eq!(
        run.text().trim(),
        "4",
        "{}",
        String::from_utf8_lossy(&run.err)
    );
    guest.until_none();
}

#[test]
fn ends_are_told_apart_status_signal_time_and_what_never_ran() {
    let guest = guest(ANY);
    assert_eq!(guest.sh("exit 255").exit(), (How::Code, 255));
    assert_eq!(guest.sh("kill -SEGV $$").exit(), (How::Signal, 11));
    let limited = Open {
        timeout_ms: 200,
        ..command(&[
            "sh",
            "-c",
            "echo early; trap '' TERM; while :; do sleep 0.05; done",
        ])
    };
    let mut run = guest.open(limited);
    assert_eq!(run.exit().0, How::TimedOut);
    assert_eq!(run.text(), "early\n");
    let why = |argv: &[&str]| guest.run(argv).refused().reason;
    assert_eq!(why(&["no-such-program"]), refusal::NO_PROGRAM);
    assert_eq!(why(&["/nowhere/at/all"]), refusal::NO_PROGRAM);
    assert_eq!(why(&["/etc/passwd"]), refusal::CANNOT_RUN);
    let nowhere = Open {
        cwd: b"/nowhere".to_vec(),
        ..command(&["true"])
    };
    assert_eq!(guest.open(nowhere).refused().reason, refusal::CANNOT_RUN);
    guest.until_none();
}

#[test]
fn r120_without_a_rule_of_the_guests_owner_nothing_runs() {
    // No rule; one that is off.
    for rules in [
        "",
        "[[service]]\nnames = [\"exec\"]\n",
        "[[exec]]\nallow = \"off\"\n",
    ] {
        let guest = guest(rules);
        let refused = guest.asked(What::List).map(drop).unwrap_err();
        assert_eq!(refused.code(), Code::Denied, "{rules}");
        assert!(refused.text().contains("off"), "{}", refused.text());
    }
    // No policy at all.
    let mut host = Host::new();
    host.start(None);
    let (_session, _) = host.accept();
    let asked = Asked {
        user: Some(me()),
        what: What::List,
    };
    let refused = dial(&host, "exec", asked.encode().unwrap()).map(drop);
    assert_eq!(refused.unwrap_err().code(), Code::Denied);
    // Some commands, as some users.
    let rules = format!(
        "[[exec]]\nallow = \"host\"\nusers = [\"{}\"]\ncommands = [\"/bin/echo\", \"/usr/bin/echo\"]\n",
        me()
    );
    let guest = guest(&rules);
    assert_eq!(guest.run(&["echo", "x"]).exit(), (How::Code, 0));
    let refused = guest.run(&["sh", "-c", "true"]).refused();
    assert_eq!(refused.reason, refusal::DENIED);
    assert!(refused.text.contains("policy.toml:"), "{}", refused.text);
    // Another spelling of a program that is allowed is none.
    for program in ["/bin/../bin/echo", "/usr/bin/../bin/sh", "/bin//sh"] {
        assert_ne!(guest.run(&[program]).refused().reason, 0, "{program}");
    }
    let other = Asked {
        user: Some("daemon".into()),
        what: What::Run("echo".into()),
    };
    let mut run = Running::new(dial(&guest.host, "exec", other.encode().unwrap()).unwrap());
    run.say(&ToGuest::Open(command(&["echo"])));
    assert_eq!(run.refused().reason, refusal::DENIED);
    assert!(
        !guest.host.log().contains("exec-ended session=")
            || guest.host.log().matches("exec-ended").count() == 1
    );
}

#[test]
fn r120_what_the_host_has_not_let_through_is_not_run() {
    let guest = guest(ANY);
    // The client says another program than aditd was told.
    let stream = guest.asked(What::Run("true".into())).unwrap();
    let mut run = Running::new(stream);
    run.say(&ToGuest::Open(command(&["sh", "-c", "echo ran"])));
    assert_eq!(run.refused().reason, refusal::MALFORMED);
    // A hello that says nothing, or not in the one way.
    for arguments in [&b""[..], b"\x01\x01\x00\x00sh", b"\x02\x01\x04\x00rootsh"] {
        let refused = dial(&guest.host, "exec", arguments.to_vec()).map(drop);
        assert_eq!(refused.unwrap_err().code(), Code::Denied, "{arguments:?}");
    }
    // Before the host has said who may dial, anybody could be it.
    let mut host = policy::host(ANY);
    host.start(None);
    let asked = Asked {
        user: Some(me()),
        what: What::Run("true".into()),
    };
    let refused = dial(&host, "exec", asked.encode().unwrap()).map(drop);
    assert_eq!(refused.unwrap_err().code(), Code::Busy);
    let (_session, _) = host.accept();
    assert!(dial(&host, "exec", asked.encode().unwrap()).is_ok());
}

/// smol-machines/smolvm#926 and #238: both ends wait for each other, or the guest dies, once more than a buffer goes through.
#[test]
fn smolvm_926_input_and_output_of_any_size_arrive_whole() {
    let guest = guest(ANY);
    let bytes: Vec<u8> = (0..3_000_000_u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let mut run = guest.open(Open {
        stdin: true,
        ..command(&["sh", "-c", "tee /dev/stderr"])
    });
    // Both outputs bring all of the input while more of it comes: nobody waits for anybody for ever.
    run.input(&bytes);
    run.end_input();
    assert_eq!(run.exit(), (How::Code, 0));
    assert!(
        run.out == bytes && run.err == bytes,
        "{} {}",
        run.out.len(),
        run.err.len()
    );
    // 64 MiB, by checksum.
    let mut run = guest.sh("head -c 67108864 /dev/zero | tr '\\0' 'x'; echo done >&2");
    assert_eq!(run.exit(), (How::Code, 0));
    let want = Sha256::digest(vec![b'x'; 64 << 20]);
    assert_eq!((run.out.len(), Sha256::digest(&run.out)), (64 << 20, want));
    guest.until_none();
}

#[test]
fn a_command_that_does_not_read_its_input_is_no_trouble() {
    let guest = guest(ANY);
    let mut run = guest.open(Open {
        stdin: true,
        ..command(&["sh", "-c", "exec <&-; sleep 0.2; echo over"])
    });
    run.input(&vec![b'x'; 2 << 20]);
    assert_eq!(run.exit(), (How::Code, 0));
    assert_eq!(run.text(), "over\n");
    guest.until_none();
}

/// moby/moby#49655, docker/for-mac#7632: a reader that is slow loses the rest. R121: it stops the command instead, and memory stays.
#[test]
fn moby_49655_r121_a_client_that_stops_reading_makes_the_command_wait_and_then_gets_all_of_it() {
    let guest = guest(ANY);
    let mut run = guest.sh("i=0; while [ $i -lt 20000 ]; do echo 0123456789012345678901234567890123456789012345678901234567890123; i=$((i+1)); done");
    let id = run.started().id;
    std::thread::sleep(Duration::from_millis(500));
    let row = guest.rows().into_iter().find(|row| row.id == id).unwrap();
    assert!(
        row.ended.is_none() && row.written[0] < 20_000 * 65,
        "{row:?}"
    );
    assert_eq!(run.exit(), (How::Code, 0));
    assert_eq!(run.out.len(), 20_000 * 65);
    guest.until_none();
}

/// pelagos-containers/pelagos#119: a line behind much input never arrives.
#[test]
fn pelagos_119_a_small_piece_behind_a_large_one_is_not_held_back() {
    let guest = guest(ANY);
    let mut run = guest.open(Open {
        stdin: true,
        ..command(&["sh"])
    });
    let much = "x".repeat(900_000);
    run.input(format!("cat > /dev/null <<'END'\n{much}\nEND\n").as_bytes());
    for n in 0..20 {
        run.input(format!("echo answer {n}\n").as_bytes());
        run.until(&format!("answer {n}\n"));
    }
    run.input(b"exit 8\n");
    assert_eq!(run.exit(), (How::Code, 8));
    guest.until_none();
}

/// boringcomputers/nehemiah#15: a terminal whose program reads no input hides that the client has gone.
#[test]
fn nehemiah_15_a_client_that_goes_is_seen_while_its_input_is_not_read() {
    let guest = guest(ANY);
    for tty in [None, Some(Size { rows: 24, cols: 80 })] {
        let mut run = guest.open(Open {
            stdin: true,
            tty,
            ..command(&[
                "sh",
                "-c",
                "stty raw -echo 2>/dev/null; echo $$; exec sleep 1000",
            ])
        });
        let pid = run.pid();
        run.input(&vec![b'x'; 200_000]);
        // A signal is not behind it.
        run.say(&ToGuest::Signal(18));
        drop(run);
        until("the command has ended", || !lives(pid));
    }
    guest.until_none();
}

/// opencontainers/runc#3359, moby/moby#9098: commands go on when the client is gone.
#[test]
fn runc_3359_r121_the_whole_tree_ends_when_the_client_goes() {
    let guest = guest(ANY);
    let mut run =
        guest.sh("sleep 1000 & (setsid sh -c 'echo $$; trap \"\" HUP TERM; sleep 1000') & wait");
    let pid = run.pid();
    assert!(lives(pid));
    drop(run);
    until("the daemon has ended", || !lives(pid));
    guest.until_none();
    assert!(guest.host.log().contains("exec-client-gone"));
}

#[test]
fn signals_go_to_the_command_and_all_it_has_started() {
    let guest = guest(ANY);
    for (number, name) in [(1, "HUP"), (2, "INT"), (3, "QUIT"), (15, "TERM")] {
        let script =
            format!("trap 'echo got; exit 9' {name}; echo ready; while :; do sleep 0.02; done");
        let mut run = guest.sh(&script);
        run.until("ready\n");
        run.say(&ToGuest::Signal(number));
        assert_eq!(run.exit(), (How::Code, 9), "{name}");
        assert_eq!(run.text(), "ready\ngot\n", "{name}");
    }
    // Not caught: the status says so.
    let mut run = guest.sh("echo ready; sleep 1000");
    run.until("ready\n");
    run.say(&ToGuest::Signal(15));
    assert_eq!(run.exit(), (How::Signal, 15));
    guest.until_none();
}

/// kata-containers/kata-containers#1160 and #4747: an exec hangs because something in the background holds its output.
#[test]
fn kata_4747_a_background_process_that_holds_the_output_does_not_hold_the_end() {
    let guest = guest(ANY);
    let begin = Instant::now();
    let mut run = guest.sh("sleep 1000 & echo done");
    assert_eq!(run.exit(), (How::Code, 0));
    assert_eq!(run.text(), "done\n");
    assert!(begin.elapsed() < Duration::from_secs(20));
    guest.until_none();
}

/// moby/moby#27289 and #20951: what is written right before the end is lost.
#[test]
fn moby_27289_the_last_output_before_the_end_is_never_lost() {
    let guest = guest(ANY);
    for n in 0..100 {
        let mut run = guest.sh("printf '%0200000d' 7; printf '%0100000d' 8 >&2; exit 3");
        assert_eq!(run.exit(), (How::Code, 3), "{n}");
        assert_eq!((run.out.len(), run.err.len()), (200_000, 100_000), "{n}");
    }
    guest.until_none();
}

#[test]
fn a_terminal_has_a_size_is_resized_and_takes_keys_as_signals() {
    let guest = guest(ANY);
    let mut run = guest.open(Open {
        stdin: true,
        tty: Some(Size { rows: 24, cols: 80 }),
        ..command(&["sh", "-c", "tty >/dev/null && stty size; trap 'stty size; echo changed' WINCH; echo ready; while :; do sleep 0.02; done"])
    });
    run.until("ready\r\n");
    assert_eq!(run.text(), "24 80\r\nready\r\n");
    run.say(&ToGuest::Resize(Size { rows: 33, cols: 99 }));
    run.until("33 99\r\nchanged\r\n");
    // Ctrl-C is a byte, and the terminal makes it a signal.
    run.input(b"\x03");
    assert_eq!(run.exit(), (How::Signal, 2));
    // A job in the foreground gets what is sent.
    let mut run = guest.open(Open {
        stdin: true,
        tty: Some(Size { rows: 24, cols: 80 }),
        ..command(&[
            "sh",
            "-mc",
            "sh -c \"trap 'exit 5' INT; echo in; while :; do sleep 0.02; done\"; echo out $?",
        ])
    });
    run.until("in\r\n");
    run.say(&ToGuest::Signal(2));
    assert_eq!(run.exit().0, How::Code);
    assert!(run.text().ends_with("out 5\r\n"), "{}", run.text());
    guest.until_none();
}

/// Its own name begins with a dash, by which shells know a login; which program it is, is the guest's word and its policy's decision.
#[test]
fn a_login_shell_is_the_users_own_and_the_policy_decides_on_it() {
    let guest = guest(ANY);
    let shell = |guest: &Guest, open: Open| {
        let mut running = Running::new(guest.asked(What::Shell).unwrap());
        running.say(&ToGuest::Open(open));
        running
    };
    let tty = Some(Size { rows: 24, cols: 80 });
    let mut run = shell(
        &guest,
        Open {
            stdin: true,
            tty,
            ..Open::default()
        },
    );
    run.input(b"echo name=$0 shell=$SHELL; exit 3\n");
    assert_eq!(run.exit(), (How::Code, 3));
    let uid = nix::unistd::geteuid();
    let user = nix::unistd::User::from_uid(uid).unwrap().unwrap();
    let own = user.shell.display().to_string();
    let name = own.rsplit('/').next().unwrap().to_owned();
    let said = format!("name=-{name} shell={own}");
    assert!(run.text().contains(&said), "{}", run.text());
    // Elements of the client's are not taken for a shell.
    let refused = shell(&guest, command(&["sh"])).refused();
    assert_eq!(refused.reason, refusal::MALFORMED);
    guest.until_none();
    drop(guest);
    let rules = "[[exec]]\nallow = \"host\"\nusers = \"any\"\ncommands = [\"/usr/bin/true\"]\n";
    let guest = self::guest(rules);
    let refused = shell(&guest, Open::default()).refused();
    assert_eq!(refused.reason, refusal::DENIED);
    assert!(refused.text.contains(&own), "{}", refused.text);
}

#[test]
fn r121_a_detached_session_outlives_clients_and_agents_and_loses_nothing() {
    let mut guest = guest(ANY);
    let script = "i=0; while [ $i -lt 30000 ]; do echo line $i; i=$((i+1)); done; exit 4";
    let want: String = (0..30_000).map(|i| format!("line {i}\n")).collect();
    let mut run = guest.open(Open {
        detach: true,
        ..command(&["sh", "-c", script])
    });
    let started = run.started();
    assert!(started.kept);
    let id = started.id;
    // Nobody reads: it waits, with no more than the spool.
    drop(run);
    until("the spool is full", || {
        let row = guest.rows().pop().unwrap();
        row.written[0] == SPOOL_MAX as u64 && !row.attached
    });
    // The agent is killed, and another one finds it.
    guest.host.kill();
    guest.another_agent();
    let mut all = Vec::<u8>::new();
    // Clients come, read some of it and go.
    for _ in 0..5 {
        let from = Attach {
            stdout: Some(all.len() as u64),
            ..Attach::default()
        };
        let mut run = guest.attach(&id, from);
        while run.out.len() < 20_000 {
            run.hear().unwrap();
        }
        all.extend(&run.out);
    }
    // What was read is no longer all there.
    let refused = guest
        .attach(
            &id,
            Attach {
                stdout: Some(1 << 40),
                ..Attach::default()
            },
        )
        .refused();
    assert_eq!(refused.reason, refusal::GONE);
    // An agent that is stopped in order leaves it, too.
    guest.host.stop();
    guest.another_agent();
    let from = Attach {
        stdout: Some(all.len() as u64),
        ..Attach::default()
    };
    let mut run = guest.attach(&id, from);
    assert_eq!(run.exit(), (How::Code, 4));
    all.extend(&run.out);
    assert!(all == want.as_bytes(), "{} of {}", all.len(), want.len());
    drop(run);
    guest.until_none();
    assert_eq!(
        guest.attach(&id, Attach::default()).refused().reason,
        refusal::NO_SESSION
    );
}

#[test]
fn a_stream_that_the_agent_has_given_away_outlives_it() {
    let mut guest = guest(ANY);
    let mut run = guest.open(Open {
        stdin: true,
        ..command(&["sh", "-c", "echo ready; cat; exit 6"])
    });
    run.until("ready\n");
    guest.host.kill();
    run.input(b"while no agent runs\n");
    run.until("while no agent runs\n");
    guest.another_agent();
    run.end_input();
    assert_eq!(run.exit(), (How::Code, 6));
    guest.until_none();
}

#[test]
fn sessions_are_listed_taken_over_signalled_and_ended() {
    let guest = guest(ANY);
    let mut run = guest.open(Open {
        detach: true,
        ..command(&[
            "sh",
            "-c",
            "trap 'echo usr' USR1; echo ready; while :; do sleep 0.02; done",
        ])
    });
    let id = run.started().id;
    run.until("ready\n");
    let rows = guest.rows();
    assert_eq!(rows.len(), 1);
    assert_eq!(
        (rows[0].id.as_str(), rows[0].user.clone()),
        (id.as_str(), me())
    );
    assert!(rows[0].kept && rows[0].attached && rows[0].ended.is_none());
    // Somebody else takes it over, from the beginning.
    let mut other = guest.attach(&id, Attach::default());
    other.until("ready\n");
    assert_eq!(run.refused().reason, refusal::TAKEN_OVER);
    guest.end(&id, 10).unwrap();
    other.until("usr\n");
    // Another user's name opens nothing.
    let foreign = Asked {
        user: Some("nobody".into()),
        what: What::Attach(id.clone()),
    };
    let mut foreign = Running::new(dial(&guest.host, "exec", foreign.encode().unwrap()).unwrap());
    foreign.say(&ToGuest::Attach(Attach::default()));
    assert_eq!(foreign.refused().reason, refusal::NO_SESSION);
    guest.end(&id, 0).unwrap();
    assert_eq!(other.exit().0, How::Ended);
    drop(other);
    guest.until_none();
    assert_eq!(guest.end(&id, 0).unwrap_err().reason, refusal::NO_SESSION);
    assert_eq!(
        guest.end("../../etc", 0).unwrap_err().reason,
        refusal::NO_SESSION
    );
    // One that ends with its client is not attached to.
    let mut run = guest.sh("echo $$; sleep 1000");
    let id = run.started().id;
    run.pid();
    let refused = guest.attach(&id, Attach::default()).refused();
    assert_eq!(refused.reason, refusal::NO_SESSION);
    drop(run);
    guest.until_none();
}

#[test]
fn r121_a_session_process_that_is_killed_leaves_nothing_behind() {
    let guest = guest(ANY);
    let mut run = guest.sh("echo $$; sleep 1000");
    let pid = run.pid();
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let parent: i32 = stat
        .rsplit(')')
        .next()
        .unwrap()
        .split_whitespace()
        .nth(1)
        .unwrap()
        .parse()
        .unwrap();
    kill(Pid::from_raw(parent), Signal::SIGKILL).unwrap();
    until("the command has ended", || !lives(pid));
    assert!(run.hear().is_err());
    // Its socket is found to be nobody's.
    assert_eq!(guest.rows(), vec![]);
    guest.until_none();
}

/// A hostile client: half of a frame, nonsense, more than it may. Nothing stays (R106).
#[test]
fn r106_streams_that_break_off_anywhere_leave_nothing() {
    let guest = guest(ANY);
    let open = ToGuest::Open(Open {
        stdin: true,
        ..command(&["cat"])
    })
    .encode();
    let bad = [
        vec![],
        open[..7].to_vec(),
        open[..open.len() - 1].to_vec(),
        [&open[..], &[1, 2, 3]].concat(),
        [&open[..], &[0xff; 64]].concat(),
        [
            &open[..],
            &ToGuest::Stdin {
                offset: 5,
                bytes: vec![1],
            }
            .encode(),
        ]
        .concat(),
        [
            &open[..],
            &ToGuest::Ack {
                stdout: 9,
                stderr: 9,
            }
            .encode(),
        ]
        .concat(),
        [&open[..], &open[..]].concat(),
        vec![0xff; 1000],
    ];
    let fds = || {
        fs::read_dir(format!("/proc/{}/fd", guest.host.pid()))
            .unwrap()
            .count()
    };
    guest.sh("true").exit();
    guest.until_none();
    let before = fds();
    for round in 0..20 {
        for (nth, bytes) in bad.iter().enumerate() {
            let mut stream = guest.asked(What::Run("cat".into())).unwrap();
            let _ = stream.write_all(bytes);
            if round % 2 == 0 && nth > 3 {
                // It is cut off, whatever it still waits for.
                let mut rest = Vec::new();
                let _ = stream.read_to_end(&mut rest);
            }
        }
    }
    guest.until_none();
    until("the agent's descriptors are back", || fds() <= before);
}

/// R121: thousands of sessions, some cut; descriptors, processes and files return to their start.
#[test]
fn r121_many_short_sessions_leave_nothing() {
    let many = match std::env::var_os("ADIT_TEST_FULL") {
        Some(_) => 10_000,
        None => 400,
    };
    let guest = guest(ANY);
    let pid = guest.host.pid();
    let fds = || fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let threads = || fs::read_dir(format!("/proc/{pid}/task")).unwrap().count();
    let children = || {
        let all = fs::read_dir("/proc").unwrap().flatten();
        let stats = all.filter_map(|e| fs::read_to_string(e.path().join("stat")).ok());
        let parent = |stat: &String| -> Option<i32> {
            stat.rsplit(')')
                .next()?
                .split_whitespace()
                .nth(1)?
                .parse()
                .ok()
        };
        stats.filter(|stat| parent(stat) == Some(pid)).count()
    };
    guest.sh("true").exit();
    guest.until_none();
    // What starts sessions is there from the first one on.
    until("the agent is quiet", || children() == 1);
    let before = (fds(), threads());
    std::thread::scope(|scope| {
        for worker in 0..4 {
            let guest = &guest;
            scope.spawn(move || {
                for n in 0..many / 4 {
                    let n = n * 4 + worker;
                    match n % 10 {
                        // Cut before, while and after it runs.
                        0 => drop(guest.asked(What::Run("true".into()))),
                        1 => drop(guest.sh("sleep 1000")),
                        2 => {
                            let mut run = guest.sh("yes");
                            run.hear().unwrap();
                        }
                        _ => {
                            let mut run = guest.sh("echo hi; exit 5");
                            assert_eq!(run.exit(), (How::Code, 5));
                            assert_eq!(run.text(), "hi\n");
                        }
                    }
                }
            });
        }
    });
    guest.until_none();
    until("no process is left", || children() == 1);
    until("descriptors and threads are back", || {
        fds() <= before.0 && threads() <= before.1
    });
}

/// A fork server that is killed or stopped costs the command that needed it at most, and the next one has another.
#[test]
fn the_next_command_runs_whatever_becomes_of_the_fork_server() {
    let guest = guest(ANY);
    let server = || -> i32 {
        let agent = guest.host.pid();
        let all = fs::read_dir("/proc").unwrap().flatten();
        let found = all.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
        let mut found = found.filter(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let parent = stat.rsplit(')').next().unwrap_or_default();
            let parent = parent.split_whitespace().nth(1);
            line.ends_with(b"\0fork-server\0") && parent == Some(&agent.to_string())
        });
        found.next().expect("a fork server")
    };
    assert_eq!(guest.sh("exit 3").exit(), (How::Code, 3));
    let first = server();
    kill(Pid::from_raw(first), Signal::SIGKILL).unwrap();
    until("it has gone", || !lives(first));
    assert_eq!(guest.sh("exit 4").exit(), (How::Code, 4));
    let second = server();
    kill(Pid::from_raw(second), Signal::SIGSTOP).unwrap();
    let refused = guest.sh("exit 5").refused();
    assert_eq!(refused.reason, refusal::FAILED);
    assert_eq!(guest.sh("exit 6").exit(), (How::Code, 6));
    kill(Pid::from_raw(second), Signal::SIGKILL).unwrap();
}

#[test]
fn there_are_no_more_sessions_than_there_may_be_and_others_still_end() {
    let guest = guest(ANY);
    let max = adit_guest_driver::session::place::SESSIONS_MAX;
    let mut runs: Vec<_> = (0..max).map(|_| guest.run(&["sleep", "1000"])).collect();
    for run in &mut runs {
        run.started();
    }
    assert_eq!(guest.rows().len(), max);
    assert_eq!(guest.run(&["true"]).refused().reason, refusal::BUSY);
    runs.pop();
    until("there is room again", || {
        let mut run = guest.run(&["true"]);
        loop {
            match run.hear().unwrap() {
                Heard::Exit(_) => return true,
                Heard::Refused(_) => return false,
                _ => {}
            }
        }
    });
    drop(runs);
    guest.until_none();
}

/// A task's timeout ends the task, and nothing of a session that was begun meanwhile.
#[test]
fn a_task_that_is_ended_ends_no_session() {
    use serde_json::json;
    let rules = format!("{ANY}[[step]]\nkinds = [\"script\"]\nusers = \"any\"\n");
    let Guest { host, mut session } = guest(&rules);
    let script = json!({"interpreter": "/bin/sh", "script": "sleep 1000", "timeout_s": 1});
    let goal = host.goal(1, json!([{"id": "it", "script": script}]));
    let task = crate::host::task(goal, "it", 1);
    let host = &host;
    std::thread::scope(|scope| {
        let task = scope.spawn(|| session.run(&task));
        std::thread::sleep(Duration::from_millis(300));
        let stream = dial(
            host,
            "exec",
            Asked {
                user: Some(me()),
                what: What::Run("sh".into()),
            }
            .encode()
            .unwrap(),
        );
        let mut run = Running::new(stream.unwrap());
        run.say(&ToGuest::Open(command(&[
            "sh",
            "-c",
            "echo $$; sleep 3; echo alive",
        ])));
        let report = task.join().unwrap();
        assert_eq!(report.outcome, adit_tasks::wire::Outcome::TimedOut);
        assert_eq!(run.exit(), (How::Code, 0));
        assert!(run.text().ends_with("alive\n"));
    });
}

#[test]
fn a_reload_of_the_policy_counts_for_the_next_command() {
    let guest = guest(ANY);
    assert_eq!(guest.sh("true").exit(), (How::Code, 0));
    policy::put(&guest.host, "default = \"deny\"\n");
    policy::hup(&guest.host);
    until("it is off", || {
        let asked = Asked {
            user: Some(me()),
            what: What::List,
        };
        let answered = try_dial(&guest.host, "exec", asked.encode().unwrap());
        answered.is_ok_and(|answered| answered.is_err())
    });
}

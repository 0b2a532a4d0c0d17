//! A whole aditd in a directory of its own, with the test on the other end of its control sockets: the test plays the port
//! processes, so it can also send what a hostile guest would.

use std::collections::{HashMap, VecDeque};
use std::fs;
use std::io::{self, Write};
use std::net::{SocketAddrV4, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use adit_channel::frame::{self, Header};
use adit_channel::hello::{Common, Hello, Open};
use adit_port::control::{
    Ask, CONTROL_SOCKET, Connect, Dial, Dialed, FEATURE_CONNECT, FEATURE_ENDS, FEATURE_LIMITS,
    FEATURE_TUNNELS, Features, Incoming, Status,
};
use adit_port::control_io::{ControlError, Message, receive, send};
use adit_tasks::wire::{
    Clock, Enrolment, Facts, Outcome, Program, Pull, Report, ReportAck, Task, TaskId, WireKind,
};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use serde_json::Value;

/// Longer than anything in these tests takes.
pub const HANG: Duration = Duration::from_secs(30);

/// aditd and the directory that it works in.
pub struct Host {
    dir: tempfile::TempDir,
    aditd: Option<Child>,
    /// The program that it starts as a VM's port process.
    pub port_bin: PathBuf,
}

/// The control socket of one VM.
pub struct Port {
    listener: UnixListener,
    pub name: String,
    cid: u64,
    /// aditd's API.
    api: PathBuf,
}

/// What tests that are about something else grant.
const GRANTS: &str = "[[grant]]\nto = [\"anyone\"]\nvms = [\"*\"]\nmay = [\"reach\", \"see\"]\n";
/// In the configuration of a host where nothing is granted.
pub const NO_GRANTS: &str = "# no grants";

/// How long aditd may take to hear a port process.
const HEARD_LIMIT: Duration = Duration::from_secs(5);

/// A connection of aditd to such a socket.
pub struct Control(pub OwnedFd, pub Arc<Mutex<Clients>>);

/// The clients that aditd passed, as a port process keeps them.
#[derive(Default)]
pub struct Clients {
    /// With their dials, which are not answered.
    asked: HashMap<u64, (OwnedFd, Connect)>,
    /// Whose streams are open, with what is ahead of their bytes.
    pub open: VecDeque<(UnixStream, Vec<u8>)>,
}

/// An answer of the API or of the proxy.
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Answer {
    /// A refusal is the cause, and in a second line what to do.
    pub fn assert_cause_and_remedy(&self) {
        let lines = self.body.strip_suffix('\n').map(|b| b.split('\n'));
        let lines: Vec<&str> = lines.expect("a line").collect();
        assert_eq!(lines.len(), 2, "{:?}", self.body);
        let clean = |line: &&str| !line.is_empty() && !line.contains(char::is_control);
        assert!(lines.iter().all(clean), "{:?}", self.body);
    }
}

impl Host {
    /// Makes the directory, and a socket for each VM. Does not start aditd yet.
    pub fn new(vms: &[(&str, u64)], more: &str) -> (Self, Vec<Port>) {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().display();
        let mut config = format!(
            "run_dir = \"{at}/run\"\nstate_dir = \"{at}/state\"\n{more}\n[proxy]\nlisten = \"127.0.0.1:0\"\n"
        );
        if !more.contains("[[grant]]") && !more.contains(NO_GRANTS) {
            config.push_str(GRANTS);
        }
        for (name, cid) in vms {
            config.push_str(&format!(
                "[[vm]]\nname = \"{name}\"\ncid = {cid}\nallow = [80]\n"
            ));
        }
        fs::write(dir.path().join("aditd.toml"), config).unwrap();
        let ports = vms
            .iter()
            .map(|(name, cid)| Port::new(dir.path(), name, *cid));
        let ports = ports.collect();
        let host = Self {
            dir,
            aditd: None,
            port_bin: "/bin/false".into(),
        };
        (host, ports)
    }

    /// The same with an aditd that serves.
    pub fn serving(vms: &[(&str, u64)], more: &str) -> (Self, Vec<Port>) {
        let (mut host, ports) = Self::new(vms, more);
        host.start();
        (host, ports)
    }

    /// The socket of a VM that is not in the configuration.
    pub fn port(&self, name: &str, cid: u64) -> Port {
        Port::new(self.dir.path(), name, cid)
    }

    /// Starts aditd and waits until it serves.
    pub fn start(&mut self) {
        self.start_with(20_000);
    }

    /// Starts aditd with this limit of descriptors.
    pub fn start_with(&mut self, descriptors: u32) {
        self.start_as(&["/bin/sh", "-c"], &format!("ulimit -n {descriptors}"));
    }

    /// Starts aditd by a shell that does this before it becomes aditd. `shell`: its command, as far as what it is to do.
    pub fn start_within(&mut self, shell: &[&str], before: &str) {
        self.start_as(shell, &format!("ulimit -n 20000 && {before}"));
    }

    fn start_as(&mut self, shell: &[&str], before: &str) {
        let _ = fs::remove_file(self.dir.path().join("run/proxy.addr"));
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.dir.path().join("log"))
            .unwrap();
        let mut command = Command::new(shell[0]);
        command.args(&shell[1..]);
        command.arg(format!("{before}; exec \"$@\""));
        command.arg("sh").arg(env!("CARGO_BIN_EXE_aditd"));
        command.args(["run", "--port-bin"]).arg(&self.port_bin);
        command.arg("--config");
        command.arg(self.dir.path().join("aditd.toml"));
        command.stdin(Stdio::null()).stderr(log);
        self.aditd = Some(command.spawn().unwrap());
        self.until("aditd serves", |h| {
            h.dir.path().join("run/proxy.addr").exists().then_some(())
        });
    }

    /// SIGKILL, to the monitor and its worker.
    pub fn kill(&mut self) {
        self.kill_monitor();
        self.kill_worker();
    }

    /// SIGKILL, to the monitor only.
    pub fn kill_monitor(&mut self) {
        if let Some(mut aditd) = self.aditd.take() {
            let _ = aditd.kill();
            aditd.wait().unwrap();
        }
    }

    /// SIGKILL, to the worker only, if there is one. Returns when it has ended.
    pub fn kill_worker(&self) {
        use nix::sys::socket::{getsockopt, sockopt};
        use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
        // It listens there before it serves, and has noted itself only afterwards.
        let listening = adit_port::control_io::connect(&self.dir.path().join("run/work.sock"));
        let listening = listening.ok().and_then(|socket| {
            let peer = getsockopt(&socket, sockopt::PeerCredentials).ok()?;
            Pid::from_raw(peer.pid())
        });
        let noted = || Pid::from_raw(self.noted_worker()?.cast_signed());
        let Some(pid) = listening.or_else(noted) else {
            return;
        };
        let Ok(worker) = pidfd_open(pid, PidfdFlags::empty()) else {
            return; // it has ended
        };
        // No other process has this number by now.
        let line = fs::read(format!("/proc/{}/cmdline", pid.as_raw_pid())).unwrap_or_default();
        if line.windows(6).any(|word| word == b"worker") {
            let _ = pidfd_send_signal(&worker, Signal::KILL);
            let mut fds = [rustix::event::PollFd::new(
                &worker,
                rustix::event::PollFlags::IN,
            )];
            let limit = rustix::time::Timespec::try_from(HANG).unwrap();
            assert!(
                rustix::event::poll(&mut fds, Some(&limit)).unwrap() > 0,
                "it goes on"
            );
        }
    }

    fn noted_worker(&self) -> Option<u32> {
        let text = fs::read_to_string(self.dir.path().join("run/worker.pid")).ok()?;
        text.trim().parse().ok()
    }

    /// SIGTERM, without waiting.
    pub fn terminate(&self) {
        self.signal(nix::sys::signal::Signal::SIGTERM);
    }

    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(self.pid().cast_signed());
        nix::sys::signal::kill(pid, signal).unwrap();
    }

    /// Changes the configuration, and has aditd read it again. Returns what became of it.
    pub fn reload(&self, change: impl FnOnce(String) -> String) -> Value {
        let path = self.dir.path().join("aditd.toml");
        let old = fs::read_to_string(&path).unwrap();
        fs::write(&path, change(old)).unwrap();
        let before = self.get("/v1/config")["reads"].as_u64();
        self.signal(nix::sys::signal::Signal::SIGHUP);
        self.until("the configuration is read", |h| {
            let status = h.get("/v1/config");
            (status["reads"].as_u64() > before).then_some(status)
        })
    }

    /// Waits until it has ended by itself.
    pub fn ended(&mut self) -> bool {
        self.aditd.take().unwrap().wait().unwrap().success()
    }

    /// Process id of the monitor.
    pub fn pid(&self) -> u32 {
        self.aditd.as_ref().unwrap().id()
    }

    /// Process id of whoever serves clients and guests: the worker, or the one process that there is without root.
    pub fn worker(&self) -> u32 {
        self.noted_worker().unwrap_or_else(|| self.pid())
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// Calls `look` until it returns something.
    pub fn until<T>(&self, what: &str, mut look: impl FnMut(&Self) -> Option<T>) -> T {
        let begin = std::time::Instant::now();
        loop {
            if let Some(found) = look(self) {
                return found;
            }
            assert!(
                begin.elapsed() < HANG,
                "{what}: not in time\n{}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn proxy(&self) -> TcpStream {
        self.tcp("proxy.addr", [127, 0, 0, 1])
    }

    /// Connects to the listener whose address is in this file. `from` is the client's address.
    pub fn tcp(&self, file: &str, from: [u8; 4]) -> TcpStream {
        let address = fs::read_to_string(self.dir.path().join("run").join(file)).unwrap();
        let to: SocketAddrV4 = address.trim().parse().unwrap();
        use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, socket_with};
        // CLOEXEC, because other tests start processes at the same time.
        let flags = SocketFlags::CLOEXEC;
        let sock = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None).unwrap();
        bind(&sock, &SocketAddrV4::new(from.into(), 0)).unwrap();
        connect(&sock, &to).unwrap();
        let stream = TcpStream::from(sock);
        stream.set_read_timeout(Some(HANG)).unwrap();
        stream
    }

    pub fn state_dir(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    pub fn config_file(&self) -> PathBuf {
        self.dir.path().join("aditd.toml")
    }

    /// A file in a VM's directory.
    pub fn in_vm(&self, vm: &str, file: &str) -> PathBuf {
        self.dir.path().join("run/vm").join(vm).join(file)
    }

    /// Connects to the operator's socket.
    pub fn operator(&self) -> UnixStream {
        let stream = UnixStream::connect(self.dir.path().join("run/aditd.sock")).unwrap();
        stream.set_read_timeout(Some(HANG)).unwrap();
        stream
    }

    /// Makes a request to the API. Fails if the connection fails.
    pub fn try_api(&self, method: &str, path: &str, body: &str) -> io::Result<Answer> {
        let socket = self.dir.path().join("run/aditd.sock");
        let aditd = adit_client::blocking::Client::new(&socket, HANG)?;
        let method = method.parse().unwrap();
        let answer = aditd.request(method, path, Some(body.as_bytes().to_vec()));
        let answer = answer.map_err(io::Error::other)?;
        let head = answer.head.iter().map(|(name, value)| {
            let value = value.to_str().unwrap().to_lowercase();
            format!("{name}: {value}\r\n")
        });
        Ok(Answer {
            status: answer.status,
            head: head.collect(),
            body: String::from_utf8_lossy(&answer.body).into_owned(),
        })
    }

    pub fn api(&self, method: &str, path: &str, body: &str) -> Answer {
        self.try_api(method, path, body).unwrap()
    }

    pub fn get(&self, path: &str) -> Value {
        let answer = self.api("GET", path, "");
        assert_eq!(answer.status, 200, "{path}: {}", answer.body);
        serde_json::from_str(&answer.body).unwrap()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("aditd said:\n{}", self.log());
        }
    }
}

impl Answer {
    pub fn parse(bytes: &[u8]) -> io::Result<Self> {
        let text = String::from_utf8_lossy(bytes);
        let (head, body) = text
            .split_once("\r\n\r\n")
            .ok_or_else(|| io::Error::other(format!("no answer: {text:?}")))?;
        let status = head.split(' ').nth(1).and_then(|s| s.parse().ok());
        let head = head.to_lowercase();
        let body = match head.contains("transfer-encoding: chunked") {
            true => dechunked(body).ok_or_else(|| io::Error::other("the body is cut off"))?,
            false => body.to_owned(),
        };
        Ok(Self {
            status: status.ok_or_else(|| io::Error::other("no status"))?,
            head,
            body,
        })
    }
}

/// Decodes a chunked body. `None`: its end is missing.
fn dechunked(mut chunks: &str) -> Option<String> {
    let mut body = String::new();
    loop {
        let (len, rest) = chunks.split_once("\r\n")?;
        let len = usize::from_str_radix(len, 16).ok()?;
        if len == 0 {
            return Some(body);
        }
        body.push_str(rest.get(..len)?);
        chunks = rest.get(len..)?.strip_prefix("\r\n")?;
    }
}

fn limit(sock: &OwnedFd) {
    let limit = TimeVal::seconds(i64::try_from(HANG.as_secs()).unwrap());
    setsockopt(sock, sockopt::ReceiveTimeout, &limit).unwrap();
}

impl Port {
    fn new(dir: &Path, name: &str, cid: u64) -> Self {
        let vm = dir.join("run/vm").join(name);
        fs::create_dir_all(&vm).unwrap();
        let listener = socket(
            AddressFamily::Unix,
            SockType::SeqPacket,
            SockFlag::SOCK_CLOEXEC,
            None,
        )
        .unwrap();
        let path = vm.join(CONTROL_SOCKET);
        bind(listener.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        listen(&listener, Backlog::new(8).unwrap()).unwrap();
        limit(&listener);
        Self {
            listener: listener.into(),
            name: name.into(),
            cid,
            api: dir.join("run/aditd.sock"),
        }
    }

    /// Accepts aditd's connection and closes it.
    pub fn hang_up(&self) {
        drop(self.listener.accept().unwrap());
    }

    /// The status of this port process. `session`: whether the guest's driver runs.
    pub fn status(&self, session: bool) -> Status {
        Status {
            vm: self.name.parse().unwrap(),
            cid: self.cid,
            pid: std::process::id(),
            session,
            epoch: 1,
            streams: 0,
            bytes: (0, 0),
            faults: 0,
            last_fault: String::new(),
        }
    }

    /// Accepts aditd's connection, sends the status, and waits until aditd has heard it: who connects is not who hears.
    pub fn connected(&self) -> Control {
        let control = self.connected_as(self.cid);
        self.wait_heard();
        control
    }

    /// The same with another CID.
    pub fn connected_as(&self, cid: u64) -> Control {
        self.connected_with(cid, Some(FEATURE_CONNECT))
    }

    /// The same as one that lists its tunnels, and is heard by whoever asks it.
    pub fn connected_and_lists(&self) -> Control {
        let control = self.connected_with(self.cid, Some(FEATURE_CONNECT | FEATURE_TUNNELS));
        self.wait_heard();
        control
    }

    /// The same as one that tells how its tunnels end.
    pub fn connected_and_tells(&self) -> Control {
        let features = FEATURE_CONNECT | FEATURE_TUNNELS | FEATURE_ENDS;
        let control = self.connected_with(self.cid, Some(features));
        self.wait_heard();
        control
    }

    /// The same as one that limits bytes.
    pub fn connected_and_limits(&self) -> Control {
        let features = FEATURE_CONNECT | FEATURE_TUNNELS | FEATURE_ENDS | FEATURE_LIMITS;
        let control = self.connected_with(self.cid, Some(features));
        self.wait_heard();
        control
    }

    /// The same as a port process of the build before, which says nothing of features.
    pub fn connected_older(&self) -> Control {
        let control = self.connected_with(self.cid, None);
        self.wait_heard();
        control
    }

    /// Goes on after the limit: aditd may be stopped, or hear nothing on purpose.
    fn wait_heard(&self) {
        let Ok(aditd) = adit_client::blocking::Client::new(&self.api, HEARD_LIMIT) else {
            return;
        };
        let begin = std::time::Instant::now();
        while begin.elapsed() < HEARD_LIMIT {
            let vm = aditd.get::<Value>(&format!("/v1/vms/{}", self.name));
            if vm.is_ok_and(|vm| vm["state"] != "down") {
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn connected_with(&self, cid: u64, features: Option<u64>) -> Control {
        loop {
            let (stream, _) = self.listener.accept().unwrap();
            // The std type serves only to accept; packets are sent and received by `control_io`.
            let control = Control(stream.into(), Arc::default());
            limit(&control.0);
            let status = Message::Status(Status {
                cid,
                ..self.status(true)
            });
            let features = features.map(|bits| Message::Features(Features { bits }));
            let mut frames = features.iter().chain([&status]);
            match frames.try_for_each(|frame| send(&control.0, frame, None)) {
                Ok(()) => return control,
                // The connection of an aditd that was killed; the next aditd's is behind it.
                Err(ControlError::Io(e)) if e.kind() == io::ErrorKind::BrokenPipe => {}
                Err(e) => panic!("{e}"),
            }
        }
    }
}

impl Control {
    pub fn say(&self, message: &Message, fd: Option<&UnixStream>) {
        send(&self.0, message, fd.map(AsFd::as_fd)).unwrap();
    }

    /// Receives the next frame. `None`: the connection ended.
    pub fn hear(&self) -> Option<(Message, Option<OwnedFd>)> {
        receive(&self.0).unwrap()
    }

    /// A second end of the same connection.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self(self.0.try_clone()?, self.1.clone()))
    }

    /// Receives the next dial, with its client or without.
    pub fn dial(&self) -> Dial {
        loop {
            match self.hear().unwrap() {
                (Message::Dial(dial), _) => return dial,
                (Message::Connect(connect), Some(fd)) => return self.keep(connect, fd),
                (Message::Cancel(_), _) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    /// Keeps a client for when its stream is open.
    pub fn keep(&self, connect: Connect, fd: OwnedFd) -> Dial {
        let dial = Dial {
            id: connect.id,
            to: connect.to.clone(),
            deadline_ms: connect.deadline_ms,
        };
        self.clients().asked.insert(connect.id, (fd, connect));
        dial
    }

    /// Writes to the client of a dial that is not answered, as aditd asked for.
    pub fn ask(&self, ask: &Ask) {
        if let Some((fd, _)) = self.clients().asked.get(&ask.id) {
            let flags = nix::sys::socket::MsgFlags::MSG_NOSIGNAL;
            let _ = nix::sys::socket::send(fd.as_raw_fd(), &ask.text, flags);
        }
    }

    /// Waits until a dial is given up. Returns how often its client was asked whether it is there.
    pub fn cancelled(&self, id: u64) -> usize {
        let mut asked = 0;
        loop {
            match self.hear().unwrap().0 {
                Message::Cancel(cancel) if cancel.id == id => {
                    self.clients().asked.remove(&id);
                    return asked;
                }
                Message::Ask(ask) => {
                    self.ask(&ask);
                    asked += 1;
                }
                other => panic!("{other:?}"),
            }
        }
    }

    /// The client of a dial that is not answered.
    pub fn client(&self, id: u64) -> (OwnedFd, Connect) {
        self.clients().asked.remove(&id).unwrap()
    }

    /// Sends that a dial reached the guest, and greets its client.
    pub fn dialed(&self, id: u64) {
        let boot_nonce = [1; 16];
        self.say(&Message::Dialed(Dialed { id, boot_nonce }), None);
        let mut clients = self.clients();
        if let Some((fd, connect)) = clients.asked.remove(&id) {
            let mut stream = UnixStream::from(fd);
            let _ = stream.write_all(&connect.greeting);
            clients.open.push_back((stream, connect.prefix));
        }
    }

    /// The next socket of an open stream, with its prefix.
    pub fn attached(&self) -> (UnixStream, Vec<u8>) {
        let open = self.clients().open.pop_front();
        let (stream, prefix) = open.unwrap_or_else(|| match self.hear() {
            Some((Message::Attach(attach), Some(fd))) => (UnixStream::from(fd), attach.prefix),
            other => panic!("not an attach: {other:?}"),
        });
        stream.set_nonblocking(false).unwrap();
        stream.set_read_timeout(Some(HANG)).unwrap();
        (stream, prefix)
    }

    fn clients(&self) -> std::sync::MutexGuard<'_, Clients> {
        self.1.lock().unwrap()
    }

    /// Lets the next dial reach the guest. Returns what is attached to it.
    pub fn tunnel(&self) -> (UnixStream, Vec<u8>) {
        self.dialed(self.dial().id);
        self.attached()
    }

    /// The guest dials the tasks service; `peer_port` is its own port.
    pub fn incoming(&self, peer_port: u32) -> UnixStream {
        let (guest, host) = UnixStream::pair().unwrap();
        let port = adit_channel::hello::PORT;
        self.say(
            &Message::Incoming(Incoming { port, peer_port }),
            Some(&host),
        );
        guest.set_read_timeout(Some(HANG)).unwrap();
        guest
    }

    /// An agent that was accepted and has sent its hello.
    pub fn agent(&self) -> Agent {
        self.agent_with(0)
    }

    /// An agent whose hello has these features; those that aditd has too must be the same.
    pub fn agent_with(&self, features: u64) -> Agent {
        self.agent_saying(features, "a", None)
    }

    /// An agent of a guest that says this of its enrolment, and that it is this VM. What it said is judged when this returns.
    pub fn enrolled(&self, vm_id: &str, enrolment: &Enrolment) -> Agent {
        let mut agent = self.agent_saying(0, vm_id, Some(enrolment));
        agent.heard();
        agent
    }

    /// An agent that says this of its program. What it said is heard when this returns.
    pub fn program(&self, program: &Program) -> Agent {
        let mut stream = self.incoming(700);
        open_with(&mut stream, "tasks", 0);
        let Hello::Accept(_) = adit_channel::hello::read(&mut stream).unwrap() else {
            panic!("refused")
        };
        let mut agent = Agent { stream };
        agent.say(WireKind::Program, 0, program);
        agent.facts("a", 1);
        agent.heard();
        agent
    }

    /// An agent whose hello was accepted, and that has said nothing yet.
    pub fn silent_agent(&self, features: u64) -> Agent {
        let mut stream = self.incoming(700);
        open_with(&mut stream, "tasks", features);
        let Hello::Accept(accept) = adit_channel::hello::read(&mut stream).unwrap() else {
            panic!("refused")
        };
        assert_eq!(accept.common.features, features);
        Agent { stream }
    }

    fn agent_saying(&self, features: u64, vm_id: &str, enrolment: Option<&Enrolment>) -> Agent {
        let mut agent = self.silent_agent(features);
        if let Some(enrolment) = enrolment {
            agent.say(WireKind::Enrolment, 0, enrolment);
        }
        agent.facts(vm_id, 1);
        agent
    }
}

/// Sends an opening hello.
pub fn open(stream: &mut UnixStream, service: &str) {
    open_with(stream, service, 0);
}

fn open_with(stream: &mut UnixStream, service: &str, features: u64) {
    let common = Common {
        features,
        epoch: 1,
        boot_nonce: [1; 16],
    };
    let open = Open::new(service.parse().unwrap(), common);
    stream.write_all(&Hello::Open(open).encode()).unwrap();
}

/// The guest's end of the tasks service.
pub struct Agent {
    pub stream: UnixStream,
}

impl Agent {
    pub fn say(&mut self, kind: WireKind, id: u32, body: &impl serde::Serialize) {
        let bytes = frame::encode(kind as u16, 1, id, 0, body).unwrap();
        self.stream.write_all(&bytes).unwrap();
    }

    /// Says who it is, in this boot.
    pub fn facts(&mut self, vm_id: &str, boot: u8) {
        self.say(
            WireKind::Facts,
            0,
            &Facts {
                agent_version: "1".into(),
                kernel: "6".into(),
                os: "x".into(),
                vm_id: vm_id.into(),
                anchors: 1,
                boot_nonce: [boot; 16],
            },
        );
    }

    /// Waits until everything that it has said was handled.
    pub fn heard(&mut self) {
        self.say(WireKind::Clock, 1, &Clock { unix_ms: 0 });
        self.hear_kind(WireKind::HostClock);
    }

    pub fn hear(&mut self) -> (Header, Vec<u8>) {
        frame::read(&mut self.stream, frame::LEN_MAX)
            .unwrap()
            .unwrap()
    }

    /// Receives the next frame, which must be of this kind.
    pub fn hear_kind(&mut self, kind: WireKind) -> (Header, Vec<u8>) {
        let (header, body) = self.hear();
        assert_eq!(header.kind, kind as u16);
        (header, body)
    }

    /// Asks for a task, and waits for it.
    pub fn pull(&mut self) -> Task {
        self.say(WireKind::Pull, 7, &Pull { epoch: 1 });
        self.task()
    }

    /// Waits for a task that was asked for.
    pub fn task(&mut self) -> Task {
        let (header, body) = self.hear();
        assert_eq!((header.kind, header.id), (WireKind::Task as u16, 7));
        header.decode(&body).unwrap()
    }

    /// Reports, and waits until the report is on disk.
    pub fn report(&mut self, task_id: TaskId, outcome: Outcome) {
        self.say(WireKind::Report, 9, &report(task_id, outcome));
        self.acknowledged(task_id);
    }

    /// Waits until a report is on disk.
    pub fn acknowledged(&mut self, task_id: TaskId) {
        let (header, body) = self.hear();
        assert_eq!((header.kind, header.id), (WireKind::ReportAck as u16, 9));
        let ack: ReportAck = header.decode(&body).unwrap();
        assert_eq!(ack.task_id, task_id);
    }
}

pub fn report(task_id: TaskId, outcome: Outcome) -> Report {
    Report {
        task_id,
        outcome,
        exit: Some(0),
        reason: String::new(),
        started_ms: 1,
        ended_ms: 2,
        stdout: Default::default(),
        stderr: Default::default(),
        boot_nonce: [1; 16],
    }
}

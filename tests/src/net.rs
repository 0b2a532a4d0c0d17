//! A network of a test's own: machines as network namespaces, each with an address, joined by a bridge. They have the file system
//! and the processes of this machine, so only what crosses the network is theirs. Drop ends it.

use std::fs;
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::process::{Reaped, bound, output, wait_for};

/// How long a namespace may take to be there.
const LIMIT: Duration = Duration::from_secs(10);
/// The bridge's name.
const BRIDGE: &str = "wire";

/// The network.
#[derive(Debug)]
pub struct Network {
    /// Where the bridge is, so that this machine's own network has nothing of it.
    middle: Space,
    machines: u8,
}

/// A machine of it.
#[derive(Debug)]
pub struct Machine {
    space: Space,
    /// Where the others reach it.
    pub address: Ipv4Addr,
}

/// A network namespace. It ends with its process.
#[derive(Debug)]
struct Space(Reaped);

impl Space {
    fn new() -> anyhow::Result<Self> {
        let child = bound("unshare")
            .args(["--net", "--", "sleep", "infinity"])
            .stdin(Stdio::null())
            .spawn()?;
        let space = Self(Reaped(child));
        let ours = fs::read_link("/proc/self/ns/net")?;
        wait_for("a network namespace", LIMIT, || {
            let theirs = fs::read_link(space.path())?;
            Ok((theirs != ours).then_some(()))
        })?;
        Ok(space)
    }

    fn path(&self) -> String {
        format!("/proc/{}/ns/net", self.0.pid())
    }

    fn words(&self) -> [String; 3] {
        let net = format!("--net={}", self.path());
        ["nsenter".into(), net, "--".into()]
    }

    fn ip(&self, words: &str) -> anyhow::Result<()> {
        let [program, args @ ..] = self.words();
        let mut command = Command::new(program);
        command.args(args).arg("ip").args(words.split(' '));
        output(&mut command).map(drop)
    }
}

impl Network {
    /// The reason why there can be none here, if there is one.
    pub fn missing() -> Option<&'static str> {
        if !nix::unistd::geteuid().is_root() {
            return Some("network namespaces need root");
        }
        let bridge = Space::new().and_then(|space| {
            let bridge = format!("link add name {BRIDGE} type bridge");
            space.ip(&bridge)
        });
        bridge
            .is_err()
            .then_some("this kernel makes no network namespace with a bridge")
    }

    /// A network without machines.
    ///
    /// # Errors
    /// As [`missing`](Self::missing) says.
    pub fn new() -> anyhow::Result<Self> {
        let middle = Space::new()?;
        middle.ip(&format!("link add name {BRIDGE} type bridge"))?;
        middle.ip(&format!("link set {BRIDGE} up"))?;
        Ok(Self {
            middle,
            machines: 0,
        })
    }

    /// One machine more.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn machine(&mut self) -> anyhow::Result<Machine> {
        self.machines += 1;
        let (n, space) = (self.machines, Space::new()?);
        let address = Ipv4Addr::new(10, 77, 0, n);
        let pid = space.0.pid();
        let middle = &self.middle;
        middle.ip(&format!(
            "link add name to-{n} type veth peer name eth0 netns {pid}"
        ))?;
        middle.ip(&format!("link set to-{n} master {BRIDGE} up"))?;
        space.ip("link set lo up")?;
        space.ip(&format!("addr add {address}/24 dev eth0"))?;
        space.ip("link set eth0 up")?;
        Ok(Machine { space, address })
    }
}

impl Machine {
    /// What makes a command one of this machine: program and arguments that come before it.
    pub fn words(&self) -> [String; 3] {
        self.space.words()
    }

    /// A command on it, whose arguments are yet to come. It ends with the thread that starts it.
    pub fn command(&self, program: &str) -> Command {
        let [enter, args @ ..] = self.words();
        let mut command = bound(enter);
        command.args(args).arg(program);
        command
    }

    /// Unplugs it: what is sent to it goes nowhere, and nobody hears why.
    ///
    /// # Errors
    /// It cannot be.
    pub fn unplug(&self) -> anyhow::Result<()> {
        self.space.ip("link set eth0 down")
    }
}

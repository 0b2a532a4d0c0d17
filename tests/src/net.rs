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
    number: u8,
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
        Self::numbered(0)
    }

    /// One of several, whose machines may have addresses in more than one.
    ///
    /// # Errors
    /// As [`missing`](Self::missing) says.
    pub fn numbered(number: u8) -> anyhow::Result<Self> {
        let middle = Space::new()?;
        middle.ip(&format!("link add name {BRIDGE} type bridge"))?;
        middle.ip(&format!("link set {BRIDGE} up"))?;
        Ok(Self {
            middle,
            number,
            machines: 0,
        })
    }

    /// One machine more.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn machine(&mut self) -> anyhow::Result<Machine> {
        let space = Space::new()?;
        space.ip("link set lo up")?;
        let address = self.plug(&space, "eth0")?;
        Ok(Machine { space, address })
    }

    /// Joins a machine of another network, by a device of this name. Returns where those of this one reach it.
    ///
    /// # Errors
    /// It cannot be.
    pub fn join(&mut self, machine: &Machine, device: &str) -> anyhow::Result<Ipv4Addr> {
        self.plug(&machine.space, device)
    }

    fn plug(&mut self, space: &Space, device: &str) -> anyhow::Result<Ipv4Addr> {
        self.machines += 1;
        let n = self.machines;
        let address = Ipv4Addr::new(10, 77, self.number, n);
        let pid = space.0.pid();
        let middle = &self.middle;
        middle.ip(&format!(
            "link add name to-{n} type veth peer name {device} netns {pid}"
        ))?;
        middle.ip(&format!("link set to-{n} master {BRIDGE} up"))?;
        space.ip(&format!("addr add {address}/24 dev {device}"))?;
        space.ip(&format!("link set {device} up"))?;
        Ok(address)
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

    /// Sends what is for these addresses by way of another machine.
    ///
    /// # Errors
    /// There is no way to that one.
    pub fn route(&self, to: &str, by: Ipv4Addr) -> anyhow::Result<()> {
        self.space.ip(&format!("route add {to} via {by}"))
    }

    /// Unplugs it: what is sent to it goes nowhere, and nobody hears why.
    ///
    /// # Errors
    /// It cannot be.
    pub fn unplug(&self) -> anyhow::Result<()> {
        self.space.ip("link set eth0 down")
    }
}

//! The demo's aditd and guests, and a way to run the commands that a user would type.

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use adit_tests::guest::{Guest, Identity};
use adit_tests::host::Host;
use adit_tests::image::Image;
use adit_tests::process::{output, wait_for};
use anyhow::{bail, ensure};

use super::BOOT_LIMIT;
use crate::progress;

/// The VMs.
pub const VMS: [&str; 2] = ["web-1", "web-2"];

pub struct Stage {
    pub guests: Vec<Guest>,
    pub host: Host,
    image: Image,
}

/// A command's output, stdout and stderr.
pub struct Said {
    pub code: i32,
    pub text: String,
}

impl Stage {
    /// Starts aditd and makes the manager's key. The public half goes into the guests.
    pub fn set(bins: &Path, image: Image) -> anyhow::Result<Self> {
        let host = progress::during("starting aditd", || {
            let host = Host::start(bins, &VMS)?;
            VMS.iter().try_for_each(|vm| host.wait_port(vm))?;
            Ok(host)
        })?;
        let stage = Self {
            guests: Vec::new(),
            host,
            image,
        };
        println!("\n── a manager makes a key");
        let said = stage.adit(&["key", "new", "fleet.key"])?;
        ensure!(said.code == 0, "adit key new: {}", said.text);
        Ok(stage)
    }

    /// Boots both guests. Returns how many seconds each took until it was ready.
    pub fn boot(&mut self) -> anyhow::Result<Vec<f64>> {
        let (trust, agent) = (
            self.host.dir().join("fleet.key.pub"),
            adit_tests::guest_bin("adit-guest"),
        );
        for vm in VMS {
            let socket = self.host.vhost_socket(vm);
            let who = Identity {
                name: vm,
                vhost_socket: &socket,
                agent: Some(&agent),
                trust: Some(&trust),
                script: "",
                boot_files: false,
            };
            self.guests
                .push(Guest::boot(&self.image, &who, &self.host.dir().join(vm))?);
        }
        let ready = progress::during("booting web-1 and web-2, no network device", || {
            self.guests
                .iter_mut()
                .map(|g| Ok(g.wait_ready(BOOT_LIMIT)?.as_secs_f64()))
                .collect()
        });
        for vm in VMS {
            self.wait_agent(vm)?;
        }
        ready
    }

    /// Waits until a VM's agent is connected.
    pub fn wait_agent(&self, vm: &str) -> anyhow::Result<()> {
        let said = self.adit(&["wait", vm, "--for", "agent", "--timeout", "30s"])?;
        ensure!(
            said.code == 0,
            "adit wait {vm}: {}\n{}",
            said.text,
            self.logs()
        );
        Ok(())
    }

    /// Shows and runs an `adit` command.
    pub fn adit(&self, args: &[&str]) -> anyhow::Result<Said> {
        show("adit", args);
        Ok(said(&self.host.adit(args)?))
    }

    /// Runs an `adit` command without showing it, and reads its JSON.
    pub fn adit_json(&self, args: &[&str]) -> anyhow::Result<serde_json::Value> {
        let out = self.host.adit(&[args, &["-o", "json"]].concat())?;
        ensure!(
            out.status.success(),
            "adit {}: {}",
            args.join(" "),
            String::from_utf8_lossy(&out.stderr)
        );
        Ok(serde_json::from_slice(&out.stdout)?)
    }

    /// Shows and runs a `curl` command through the proxy; header and body are printed.
    pub fn curl(&self, args: &[&str]) -> anyhow::Result<String> {
        println!(
            "$ curl -i -x http://{} {}",
            self.host.proxy(),
            args.join(" ")
        );
        Ok(said(&self.host.curl(args)?).text)
    }

    /// Starts a download through the proxy, with CONNECT if `connect`, and waits for its first bytes.
    pub fn download(&self, connect: bool, url: &str) -> anyhow::Result<Child> {
        let proxy = format!("http://{}", self.host.proxy());
        let how: &[&str] = if connect { &["-p"] } else { &[] };
        let name = if connect { "tunnel.out" } else { "relayed.out" };
        println!(
            "$ curl {}-x {proxy} {url} -o {name} &",
            how.concat() + if connect { " " } else { "" }
        );
        let path = self.host.dir().join(name);
        let _ = std::fs::remove_file(&path);
        let mut command = Command::new("curl");
        command.args(how).args([
            "-sS",
            "--max-time",
            "60",
            "--no-buffer",
            "-w",
            "%{size_download}",
            "-x",
            &proxy,
            url,
            "-o",
        ]);
        let child = command
            .arg(&path)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        wait_for("the first bytes of a download", BOOT_LIMIT, || {
            Ok(std::fs::metadata(&path)
                .is_ok_and(|m| m.len() > 0)
                .then_some(()))
        })?;
        Ok(child)
    }

    /// Writes a goal to a file and applies it.
    pub fn goal(&self, file: &str, text: &str, to: &str, more: &[&str]) -> anyhow::Result<String> {
        std::fs::write(self.host.dir().join(file), text)?;
        let args = ["apply", file, "--sign", "fleet.key", "--to", to];
        self.apply(&[&args, more].concat())
    }

    /// Applies a goal. Returns its id, which is empty with `--dry-run`.
    pub fn apply(&self, args: &[&str]) -> anyhow::Result<String> {
        let said = self.adit(&[&["goal"], args].concat())?;
        ensure!(said.code == 0, "{}", said.text);
        let id = said.text.split_whitespace().nth(1).unwrap_or_default();
        Ok(id.to_owned())
    }

    /// Waits until all tasks of a goal have ended; returns them.
    pub fn finish(&self, goal: &str) -> anyhow::Result<Vec<Ended>> {
        self.adit(&["task", "watch", "--goal", goal, "--timeout", "40s"])?;
        self.ended(goal)
    }

    /// The tasks of a goal.
    pub fn ended(&self, goal: &str) -> anyhow::Result<Vec<Ended>> {
        let tasks = self.adit_json(&["task", "ls", "--goal", goal])?;
        let text =
            |t: &serde_json::Value, key: &str| t[key].as_str().unwrap_or_default().to_owned();
        let tasks = tasks.as_array().cloned().unwrap_or_default();
        Ok(tasks
            .iter()
            .map(|t| Ended {
                vm: text(t, "vm"),
                state: text(t, "state"),
                reason: text(t, "reason"),
                output: text(t, "output_preview"),
                attempt: t["attempt"].as_u64().unwrap_or(0),
            })
            .collect())
    }

    /// Waits until a task of a goal is in a state.
    pub fn wait_state(&self, goal: &str, state: &str) -> anyhow::Result<()> {
        adit_tests::process::wait_for(&format!("a task that is {state}"), BOOT_LIMIT, || {
            Ok(self
                .ended(goal)?
                .iter()
                .any(|t| t.state == state)
                .then_some(()))
        })
    }

    /// All logs.
    pub fn logs(&self) -> String {
        let mut text = format!("aditd:\n{}", self.host.log());
        for (guest, vm) in self.guests.iter().zip(VMS) {
            text += &format!("\n{vm}:\n{}", guest.serial());
        }
        text
    }
}

/// How a task ended.
#[derive(Debug)]
pub struct Ended {
    pub vm: String,
    pub state: String,
    pub reason: String,
    pub output: String,
    pub attempt: u64,
}

fn show(program: &str, args: &[&str]) {
    println!("$ {program} {}", args.join(" "));
}

fn said(out: &Output) -> Said {
    let text =
        String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    let text = text.replace('\r', "");
    for line in text.lines().filter(|l| !l.is_empty()) {
        println!("  {line}");
    }
    Said {
        code: out.status.code().unwrap_or(-1),
        text,
    }
}

/// Checks that a text contains another one.
pub fn expect(text: &str, what: &str) -> anyhow::Result<()> {
    if !text.contains(what) {
        bail!("expected `{what}` in:\n{text}");
    }
    Ok(())
}

/// Ctrl-C ends what would survive this process: the port processes. The kernel kills aditd and QEMU when this process ends.
pub fn clean_up_on_signal(stage: &Stage) {
    use nix::sys::signal::{SigSet, Signal};
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    if signals.thread_block().is_err() {
        return;
    }
    let dir = stage.host.dir().to_owned();
    std::thread::spawn(move || {
        if signals.wait().is_ok() {
            eprintln!("\nending what was started");
            let mut stop = Command::new("curl");
            stop.args(["-sS", "-X", "POST", "--max-time", "10", "--unix-socket"])
                .arg(dir.join("run/aditd.sock"));
            if let Err(e) = output(stop.arg("http://aditd/v1/shutdown?ports=true")) {
                eprintln!("port processes may be left: {e:#}");
            }
            let _ = std::fs::remove_dir_all(&dir);
            std::process::exit(130);
        }
    });
}

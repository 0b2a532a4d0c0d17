//! Three hosts, a manager and a laptop, each on a machine of its own of one network: whose VM is meant, what a manager is told, and
//! what becomes of it when one host goes away.

use std::fs;
use std::process::Output;

use adit_api::token;
use adit_tests::agent;
use adit_tests::host::Host;
use adit_tests::net::{Machine, Network};
use adit_tests::process::wait_for;
use serde_json::Value;

use super::keys::{Keys, Pair};
use super::servers::Servers;
use super::{LIMIT, bins, shown};

const NAMES: [&str; 3] = ["alpha", "beta", "gamma"];
/// Of each host, its VMs: one of its own, and one that two of them have.
const VMS: [&[&str]; 3] = [&["web-a"], &["web-b", "twin"], &["web-c", "twin"]];
/// For clients and other hosts, and for managers. A machine's ports are its own.
const PROXY: u16 = 7443;
const MANAGEMENT: u16 = 7444;

struct Hosts {
    _network: Network,
    machines: Vec<Machine>,
    hosts: Vec<Host>,
    servers: Servers,
    keys: Keys,
    manager: (Machine, Pair),
    laptop: Machine,
    token: String,
}

impl Hosts {
    fn new() -> Option<Self> {
        let bins = bins()?;
        if let Some(why) = Network::missing() {
            println!("skipped: {why}");
            return None;
        }
        let (servers, keys) = (Servers::start(), Keys::new());
        let mut network = Network::new().unwrap();
        let mut machine = || network.machine().unwrap();
        let machines: Vec<_> = NAMES.iter().map(|_| machine()).collect();
        let (manager, laptop) = (machine(), machine());
        let pairs: Vec<_> = NAMES
            .iter()
            .zip(&machines)
            .map(|(name, machine)| keys.signs(&[name, &machine.address.to_string()]))
            .collect();
        let (token, sha256) = token::new().unwrap();
        let mut hosts = Vec::new();
        for (n, machine) in machines.iter().enumerate() {
            let pair = &pairs[n];
            let files = format!("cert = \"{}\"\nkey = \"{}\"\n", pair.cert, pair.key);
            let listen = |port: u16, more: &str| {
                format!(
                    "[[listen]]\naddress = \"{}:{port}\"\nopen = true\n{files}client_ca = \"{}\"\n{more}\n",
                    machine.address,
                    keys.ca()
                )
            };
            let mut config = format!(
                "[proxy]\nlisten = \"127.0.0.1:7080\"\n[names]\nhost = \"{}\"\n[peers]\n{files}{}{}\
                 [[token]]\nname = \"laptop\"\nsha256 = \"{sha256}\"\n\
                 [[grant]]\nto = [\"token:laptop\"]\nvms = [\"*\"]\nmay = [\"reach\", \"see\"]\n\
                 [[grant]]\nto = [\"cert:ops.example\"]\nvms = [\"*\"]\nmay = [\"see\"]\n",
                NAMES[n],
                listen(PROXY, ""),
                listen(MANAGEMENT, "role = \"management\""),
            );
            for other in (0..NAMES.len()).filter(|other| *other != n) {
                config += &format!(
                    "[[host]]\nname = \"{}\"\naddress = \"{}:{PROXY}\"\npin = \"sha256/{}\"\n",
                    NAMES[other], machines[other].address, pairs[other].digest
                );
            }
            for (cid, vm) in (3..).zip(VMS[n]) {
                config += &format!(
                    "[[vm]]\nname = \"{vm}\"\ncid = {cid}\nallow = [{}]\n",
                    servers.page
                );
            }
            let host = Host::start_at(&bins, machine, &config).unwrap();
            for vm in VMS[n] {
                agent::start(&host.vm_dir(vm), &[servers.page]).unwrap();
            }
            hosts.push(host);
        }
        let ops = keys.signs(&["ops.example"]);
        let all = Self {
            _network: network,
            machines,
            hosts,
            servers,
            keys,
            manager: (manager, ops),
            laptop,
            token,
        };
        for vms in VMS.iter().flat_map(|vms| vms.first()) {
            wait_for(vms, LIMIT, || {
                let (code, _) = all.get(vms);
                Ok((code == 200).then_some(()))
            })
            .unwrap_or_else(|e| panic!("{e:#}: {:?}\n{}", all.get(vms), all.log()));
        }
        Some(all)
    }

    /// What the laptop gets of a VM, by way of alpha: status, and all that was said.
    fn get(&self, vm: &str) -> (u16, String) {
        self.get_as(vm, &self.token)
    }

    fn get_as(&self, vm: &str, token: &str) -> (u16, String) {
        let mut curl = self.laptop.command("curl");
        curl.args(["-sS", "-i", "--max-time", "30", "-w", "\n%{http_code}"]);
        curl.arg("-x")
            .arg(format!("https://{}:{PROXY}", self.machines[0].address));
        curl.args(["--proxy-cacert", &self.keys.ca()]);
        curl.args(["--proxy-user", &format!("x:{token}")]);
        curl.arg(format!("http://{vm}:{}/files/hello", self.servers.page));
        let out = curl.output().unwrap();
        let said = String::from_utf8_lossy(&out.stdout).into_owned();
        let code = said.lines().last().and_then(|code| code.parse().ok());
        (code.unwrap_or(0), shown(&out))
    }

    /// What the manager hears of a host.
    fn adit(&self, host: usize, args: &[&str]) -> Output {
        let (machine, ops) = &self.manager;
        let adit = bins().unwrap().join("adit");
        let mut command = machine.command(&adit.display().to_string());
        command.arg("--server").arg(format!(
            "https://{}:{MANAGEMENT}",
            self.machines[host].address
        ));
        command.args([
            "--ca",
            &self.keys.ca(),
            "--cert",
            &ops.cert,
            "--key",
            &ops.key,
        ]);
        command.args(args).output().unwrap()
    }

    fn resolve(&self, host: usize, name: &str) -> Value {
        let out = self.adit(host, &["resolve", name, "-o", "json"]);
        serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{e}: {}", shown(&out)))
    }

    fn log(&self) -> String {
        self.hosts.iter().map(Host::log).collect()
    }
}

#[test]
fn a_laptop_reaches_vms_of_all_hosts_by_one_and_a_manager_hears_of_all_from_any() {
    let Some(mut all) = Hosts::new() else { return };
    // From a machine with no way into any VM, by way of alpha, into the ring of gamma's VM.
    for (vm, by) in [
        ("web-a", "alpha"),
        ("web-b", "beta, alpha"),
        ("web-c", "gamma, alpha"),
        ("web-c.gamma", "gamma, alpha"),
        ("WEB-C.gamma.adit", "gamma, alpha"),
    ] {
        let (code, said) = all.get(vm);
        assert_eq!(code, 200, "{vm}: {said}");
        assert!(said.contains("this is web-1\n"), "{said}");
        let is_there = |line: &str| line.to_lowercase() == format!("proxy-status: {by}");
        assert!(by == "alpha" || said.lines().any(is_there), "{vm}: {said}");
    }
    let (code, said) = all.get_as("web-c", "made-up");
    assert_eq!(code, 407, "{said}");
    let (code, said) = all.get("web-d");
    assert_eq!(code, 404, "{said}");

    // The manager hears the same from each.
    for host in 0..NAMES.len() {
        let out = all.adit(host, &["vm", "ls", "--all-hosts", "-o", "json"]);
        assert!(out.status.success(), "{}", shown(&out));
        let list: Value = serde_json::from_slice(&out.stdout).unwrap();
        let vms = list["vms"].as_array().unwrap().iter();
        let vms: Vec<_> = vms
            .map(|vm| (vm["name"].as_str().unwrap(), vm["host"].as_str().unwrap()))
            .collect();
        assert_eq!(
            vms,
            [
                ("twin", "beta"),
                ("twin", "gamma"),
                ("web-a", "alpha"),
                ("web-b", "beta"),
                ("web-c", "gamma")
            ]
        );
        let found = all.resolve(host, "web-c");
        assert_eq!(found["host"], "gamma", "{found}");
    }

    // A name of two.
    let (code, said) = wait_for("both are known", LIMIT, || {
        let (code, said) = all.get("twin");
        Ok((code == 409).then_some((code, said)))
    })
    .unwrap();
    assert!(said.contains("`beta` and `gamma`"), "{code}: {said}");
    // A host that has it itself waits for nobody, and hears of the other besides.
    for host in 0..NAMES.len() {
        let out = wait_for("several have it", LIMIT, || {
            let out = all.adit(host, &["resolve", "twin"]);
            Ok((out.status.code() == Some(1)).then_some(out))
        });
        let said = shown(&out.unwrap());
        assert!(said.contains("beta, gamma"), "{said}");
    }
    for vm in ["twin.beta", "twin.gamma"] {
        assert_eq!(all.get(vm).0, 200, "{vm}");
    }

    // A token that the owner of the VM does not take any more: alpha's own VM is reached as before.
    let path = all.hosts[2].dir().join("aditd.toml");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(
        &path,
        text.replace("name = \"laptop\"", "name = \"another\""),
    )
    .unwrap();
    let out = all.hosts[2].adit(&["reload"]).unwrap();
    assert!(out.status.success(), "{}", shown(&out));
    let (code, said) = all.get("web-c");
    assert!([404, 407].contains(&code), "{code}: {said}");
    assert_eq!(all.get("web-a").0, 200);
    fs::write(&path, text).unwrap();
    all.hosts[2].adit(&["reload"]).unwrap();
    assert_eq!(all.get("web-c").0, 200);

    // gamma's aditd is gone: what it has is not reached, and the answer names it; others go on.
    all.hosts[2].kill();
    gone(&all);
    all.hosts[2].launch().unwrap();
    wait_for("gamma again", LIMIT, || {
        Ok((all.get("web-c").0 == 200).then_some(()))
    })
    .unwrap();

    // Its whole machine is gone, without a word.
    all.machines[2].unplug().unwrap();
    gone(&all);
}

/// What is heard while gamma does not answer.
fn gone(all: &Hosts) {
    // It may be there, and asking again may help.
    let (code, said) = all.get("web-c.gamma");
    assert!([503, 504].contains(&code), "{code}: {said}");
    println!("gamma is gone: {said}");
    for vm in ["web-a", "web-b"] {
        let (code, said) = all.get(vm);
        assert_eq!(code, 200, "{vm}: {said}");
    }
    let out = all.adit(0, &["vm", "ls", "--all-hosts"]);
    let said = shown(&out);
    assert!(!out.status.success(), "{said}");
    assert!(said.contains("`gamma`") && said.contains("web-b"), "{said}");
    let found = all.resolve(0, "web-b");
    assert_eq!(found["host"], "beta", "{found}");
}

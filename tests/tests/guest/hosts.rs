//! Three hosts, a manager and a laptop, each on a machine of its own of one network, and on each host a real guest: what a laptop sends by
//! one host is done in the guest of another, and so is what a manager orders.

use std::fs;
use std::process::Output;

use adit_api::token;
use adit_tests::net::{Machine, Network};

use super::keys::{Keys, Pair};
use super::*;

const HOSTS: [(&str, &str); 3] = [("alpha", "web-a"), ("beta", "web-b"), ("gamma", "web-c")];
/// For clients and other hosts, and for managers. A machine's ports are its own.
const PROXY: u16 = 7443;
const MANAGEMENT: u16 = 7444;

/// What every host has, with its own certificate, and the others as it knows them.
fn config(
    nth: usize,
    machines: &[Machine],
    pairs: &[Pair],
    ca: &str,
    [laptop, manager]: [&str; 2],
) -> String {
    let (host, vm) = HOSTS[nth];
    let files = format!(
        "cert = \"{}\"\nkey = \"{}\"\n",
        pairs[nth].cert, pairs[nth].key
    );
    let listen = |port: u16, more: &str| {
        let address = machines[nth].address;
        format!(
            "[[listen]]\naddress = \"{address}:{port}\"\nopen = true\n{files}client_ca = \"{ca}\"\n{more}\n"
        )
    };
    let others = (0..HOSTS.len()).filter(|other| *other != nth);
    let others = others.map(|other| {
        format!(
            "[[host]]\nname = \"{}\"\naddress = \"{}:{PROXY}\"\npin = \"sha256/{}\"\n",
            HOSTS[other].0, machines[other].address, pairs[other].digest
        )
    });
    format!(
        "[proxy]\nlisten = \"127.0.0.1:7080\"\n[names]\nhost = \"{host}\"\n[peers]\n{files}{}{}{}\
         [[token]]\nname = \"laptop\"\nsha256 = \"{laptop}\"\n\
         [[token]]\nname = \"manager\"\nsha256 = \"{manager}\"\n\
         [[grant]]\nto = [\"token:laptop\"]\nvms = [\"*\"]\nmay = [\"reach\", \"see\"]\n\
         [[grant]]\nto = [\"token:manager\"]\nvms = [\"*\"]\nmay = [\"see\", \"task\", \"goal\"]\n\
         [[vm]]\nname = \"{vm}\"\ncid = 3\nallow = [80, 7]\n",
        listen(PROXY, ""),
        listen(MANAGEMENT, "role = \"management\""),
        others.collect::<String>(),
    )
}

/// Boots the guest of a host, which obeys the manager.
fn guest_of(host: &Host, vm: &str, image: &Image, trust: &Path) -> Guest {
    host.wait_port(vm).unwrap();
    let (socket, agent) = (host.vhost_socket(vm), adit_tests::guest_bin("adit-guest"));
    let who = Identity {
        name: vm,
        vhost_socket: &socket,
        agent: Some(&agent),
        trust: Some(trust),
        script: "",
        boot_files: false,
    };
    Guest::boot(image, &who, &host.dir().join(vm)).unwrap()
}

fn shown(out: &Output) -> String {
    let (said, why) = (&out.stdout, &out.stderr);
    format!(
        "{}{}",
        String::from_utf8_lossy(said),
        String::from_utf8_lossy(why)
    )
}

#[test]
fn guests_of_three_hosts_are_reached_by_one_and_do_what_a_manager_orders_at_any() {
    let Some(bins) = bins() else { return };
    if let Some(why) = Network::missing() {
        println!("skipped: {why}");
        return;
    }
    let image = Image::build(Kernel::V6_1, &|what| println!("{what}")).unwrap();
    let keys = Keys::new();
    let mut network = Network::new().unwrap();
    let mut machine = || network.machine().unwrap();
    let machines: Vec<_> = HOSTS.iter().map(|_| machine()).collect();
    let (manager, laptop) = (machine(), machine());
    let pairs: Vec<_> = HOSTS
        .iter()
        .zip(&machines)
        .map(|((name, _), machine)| keys.signs(&[name, &machine.address.to_string()]))
        .collect();
    let (secret, laptops) = token::new().unwrap();
    // A token goes along to the host that has the VM, which knows it too; what a certificate proves does not.
    let (own, managers) = token::new().unwrap();
    let mut hosts: Vec<Host> = machines
        .iter()
        .enumerate()
        .map(|(nth, machine)| {
            let config = config(nth, &machines, &pairs, &keys.ca(), [&laptops, &managers]);
            Host::start_at(&bins, machine, &config).unwrap()
        })
        .collect();

    // The manager, with its key, on a machine that has no VM.
    let desk = tempfile::tempdir().unwrap();
    fs::write(desk.path().join("token"), own).unwrap();
    let adit = bins.join("adit").display().to_string();
    let manage = |host: usize, args: &[&str]| {
        let server = format!("https://{}:{MANAGEMENT}", machines[host].address);
        let mut command = manager.command(&adit);
        command.current_dir(desk.path()).args(["--server", &server]);
        command.args(["--ca", &keys.ca(), "--token-file", "token"]);
        command.args(args).output().unwrap()
    };
    let made = manage(0, &["key", "new", "fleet.key"]);
    assert!(made.status.success(), "{}", shown(&made));
    let trust = desk.path().join("fleet.key.pub");
    let mut guests: Vec<_> = HOSTS
        .iter()
        .zip(&hosts)
        .map(|((_, vm), host)| guest_of(host, vm, &image, &trust))
        .collect();
    for ((guest, host), (_, vm)) in guests.iter_mut().zip(&hosts).zip(HOSTS) {
        guest.wait_ready(3 * BOOT).unwrap();
        let out = host
            .adit(&["wait", vm, "--for", "agent", "--timeout", "60s"])
            .unwrap();
        assert!(out.status.success(), "{}\n{}", shown(&out), guest.serial());
    }

    // The laptop asks alpha for everything.
    let get = |vm: &str, more: &[&str]| {
        let proxy = format!("https://{}:{PROXY}", machines[0].address);
        let mut curl = laptop.command("curl");
        curl.args(["-sS", "--max-time", "60", "-x", &proxy])
            .args(more);
        curl.args([
            "--proxy-cacert",
            &keys.ca(),
            "--proxy-user",
            &format!("x:{secret}"),
        ]);
        let out = curl.arg(format!("http://{vm}:80/")).output().unwrap();
        shown(&out)
    };
    for (_, vm) in HOSTS {
        for way in [&[][..], &["--proxytunnel"]] {
            let said = get(vm, way);
            assert!(said.contains(&format!("this is {vm}")), "{vm}: {said}");
        }
    }

    // One goal for all guests, given to beta.
    let goal =
        "steps: [{id: who, script: {interpreter: /bin/sh, script: \"echo I am $(hostname)\"}}]\n";
    fs::write(desk.path().join("run.yaml"), goal).unwrap();
    let apply = ["goal", "apply", "run.yaml", "--sign", "fleet.key"];
    let to = HOSTS.map(|(_, vm)| ["--to", vm]).concat();
    let out = manage(1, &[&apply[..], &to].concat());
    let said = shown(&out);
    assert!(out.status.success(), "{said}");
    let id = said
        .split_whitespace()
        .nth(1)
        .unwrap_or_default()
        .to_owned();
    let all = |host: usize| {
        let out = manage(host, &["task", "ls", "--all-hosts", "--goal", &id]);
        assert!(out.status.success(), "{}", shown(&out));
        shown(&out)
    };
    for (host, its) in hosts.iter().enumerate() {
        let done = |list: &str| {
            HOSTS
                .iter()
                .all(|(_, vm)| list.contains(&format!("I am {vm}")))
        };
        wait_for("every guest has done it", BOOT, || {
            let list = all(host);
            Ok(done(&list).then_some(()))
        })
        .unwrap_or_else(|e| panic!("{e:#}: {}\n{}", all(host), its.log()));
        let out = manage(host, &["goal", "show", &id]);
        let said = shown(&out);
        assert!(HOSTS.iter().all(|(_, vm)| said.contains(vm)), "{said}");
    }

    // Gamma's aditd is killed: its guest goes on, and is reached again as soon as there is another.
    hosts[2].kill();
    assert!(get("web-b", &[]).contains("this is web-b"));
    hosts[2].launch().unwrap();
    wait_for("web-c is reached again", BOOT, || {
        Ok(get("web-c", &[]).contains("this is web-c").then_some(()))
    })
    .unwrap();
}

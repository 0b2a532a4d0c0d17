//! A management listener of one network device: whoever comes in by another one finds no API, whichever of the host's addresses
//! they ask at.

use std::process::Output;

use adit_tests::host::Host;
use adit_tests::net::{Machine, Network};

use super::keys::Keys;
use super::{bins, shown};

const MANAGEMENT: u16 = 7444;

#[test]
fn the_api_answers_whoever_comes_in_by_its_device_and_nobody_else() {
    let Some(bins) = bins() else { return };
    if let Some(why) = Network::missing() {
        println!("skipped: {why}");
        return;
    }
    let keys = Keys::new();
    let (mut ordinary, mut managed) = (Network::new().unwrap(), Network::numbered(1).unwrap());
    let machine = ordinary.machine().unwrap();
    let at_managed = managed.join(&machine, "mgmt0").unwrap();
    let (neighbour, manager) = (ordinary.machine().unwrap(), managed.machine().unwrap());
    // Each has a way to the other network, by this host.
    neighbour.route("10.77.1.0/24", machine.address).unwrap();
    manager.route("10.77.0.0/24", at_managed).unwrap();
    let (at_ordinary, at_managed) = (machine.address.to_string(), at_managed.to_string());
    let own = keys.signs(&["alpha", &at_ordinary, &at_managed, "127.0.0.1"]);
    let ops = keys.signs(&["ops.example"]);
    let files = format!("cert = \"{}\"\nkey = \"{}\"\n", own.cert, own.key);
    let listen = |port: u16, more: &str| {
        format!(
            "[[listen]]\naddress = \"0.0.0.0:{port}\"\nopen = true\n{files}client_ca = \"{}\"\nrole = \"management\"\n{more}\n",
            keys.ca()
        )
    };
    let config = format!(
        "[proxy]\nlisten = \"127.0.0.1:7080\"\n{}{}\
         [[grant]]\nto = [\"cert:ops.example\"]\nvms = [\"*\"]\nmay = [\"see\"]\n\
         [[vm]]\nname = \"web-1\"\ncid = 3\n",
        listen(MANAGEMENT, "device = \"mgmt0\""),
        // The same without a device, so that it is no wire that is missing.
        listen(MANAGEMENT + 1, ""),
    );
    let _host = Host::start_at(&bins, &machine, &config).unwrap();
    let asks = |from: &Machine, at: &str, port: u16| -> Output {
        let mut adit = from.command(&bins.join("adit").display().to_string());
        adit.arg("--server").arg(format!("https://{at}:{port}"));
        adit.args(["--ca", &keys.ca(), "--cert", &ops.cert, "--key", &ops.key]);
        adit.args(["--request-timeout", "10s", "vm", "ls"]);
        adit.output().unwrap()
    };
    for (from, who) in [(&manager, "the manager"), (&neighbour, "the neighbour")] {
        for at in [&at_managed, &at_ordinary] {
            let out = asks(from, at, MANAGEMENT + 1);
            assert!(out.status.success(), "{who} at {at}: {}", shown(&out));
        }
    }
    for at in [&at_managed, &at_ordinary] {
        let out = asks(&manager, at, MANAGEMENT);
        let said = shown(&out);
        assert!(
            out.status.success() && said.contains("web-1"),
            "{at}: {said}"
        );
        let out = asks(&neighbour, at, MANAGEMENT);
        let said = shown(&out);
        assert_eq!(out.status.code(), Some(3), "{at}: {said}");
        assert!(
            said.contains("cannot reach aditd") && said.contains("help: "),
            "{said}"
        );
    }
    // Nor does a program of the host itself, unless it goes out and in by that device.
    let out = asks(&machine, "127.0.0.1", MANAGEMENT);
    assert_eq!(out.status.code(), Some(3), "{}", shown(&out));
}

//! A VM that is paused and continued (QMP `stop`, `cont`): neither the guest nor anybody who talks to it notices (R51).

use std::io::{Read, Write};
use std::time::Duration;

use adit_tests::connect::{connect, pattern};
use adit_tests::image::Kernel;
use adit_tests::process::wait_for;

use crate::{BOOT, setup};

const PAUSES: usize = 5;
/// Bytes of an echo during each pause.
const PIECE: u64 = 300_000;

fn pauses(kernel: Kernel) {
    let Some(setup) = setup(kernel, "", false) else {
        return;
    };
    let epoch = setup.vm()["epoch"].clone();
    let descriptors = || setup.ask("ls /proc/$(pidof adit-guest)/fd | wc -l");
    let mut tunnels = ["web-1:7", "vsock-5000.web-1:5000"].map(|to| {
        let mut tunnel = connect(setup.host.proxy(), to).unwrap();
        tunnel.write_all(b"!").unwrap();
        tunnel.read_exact(&mut [0]).unwrap();
        tunnel
    });
    let before = descriptors();
    for round in 0..PAUSES as u64 {
        // In flight in both directions when the VM is paused, and more is written during the pause.
        let echoes = tunnels.each_mut().map(|tunnel| {
            let mut sender = tunnel.try_clone().unwrap();
            let from = round * PIECE;
            let bytes: Vec<u8> = (from..from + PIECE).map(pattern).collect();
            let sending = std::thread::spawn(move || sender.write_all(&bytes).unwrap());
            (tunnel, sending)
        });
        setup.guest.qmp("stop").unwrap();
        wait_for("aditd sees the pause", BOOT, || {
            Ok((setup.vm()["state"] == "waiting").then_some(()))
        })
        .unwrap();
        setup.guest.qmp("cont").unwrap();
        for (at, (tunnel, sending)) in echoes.into_iter().enumerate() {
            let mut got = vec![0; PIECE as usize];
            tunnel.read_exact(&mut got).unwrap();
            let whole = (round * PIECE..)
                .map(pattern)
                .zip(&got)
                .all(|(a, &b)| a == b);
            assert!(whole, "tunnel {at}, pause {round}");
            sending.join().unwrap();
        }
        // During the pause the agent was waiting for a task.
        setup.ask("echo awake");
    }
    assert_eq!(descriptors(), before, "nothing leaked in the guest");
    let vm = setup.vm();
    assert_eq!((&vm["epoch"], &vm["state"]), (&epoch, &"ready".into()));
    let serial = setup.guest.serial();
    assert_eq!(serial.matches("connected").count(), 1, "one dial: {serial}");
    // A pause that is so long that a dial is given up. Requests afterwards work.
    setup.guest.qmp("stop").unwrap();
    std::thread::sleep(Duration::from_secs(3));
    setup.guest.qmp("cont").unwrap();
    setup.ask("echo awake");
    let page = setup.curl(&["http://web-1/"]);
    assert!(page.contains("this is web-1"), "{page}");
}

#[test]
fn r51_a_pause_ends_no_stream_6_1() {
    pauses(Kernel::V6_1);
}

#[test]
fn r51_a_pause_ends_no_stream_6_12() {
    pauses(Kernel::V6_12);
}

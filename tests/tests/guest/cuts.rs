//! A partial answer never looks complete: whichever process dies or resets, the client of a real guest gets a reset (R117).

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;

use adit_tests::connect::connect;
use adit_tests::image::Kernel;

use crate::restarts::whole_again;
use crate::{BOOT, Setup, setup};

const HALF: &[u8] = b"the first half";

/// Answers without a length that have begun, in both forms of request.
fn begun(setup: &Setup, path: &str) -> [(&'static str, TcpStream, Vec<u8>); 2] {
    ["CONNECT", "absolute-form"].map(|form| {
        let (mut client, target) = match form {
            "CONNECT" => (connect(setup.host.proxy(), "web-1:80").unwrap(), ""),
            _ => (
                TcpStream::connect(setup.host.proxy()).unwrap(),
                "http://web-1",
            ),
        };
        client.set_read_timeout(Some(BOOT)).unwrap();
        let request =
            format!("GET {target}{path} HTTP/1.1\r\nHost: web-1\r\nConnection: close\r\n\r\n");
        client.write_all(request.as_bytes()).unwrap();
        let (mut said, mut some) = (Vec::new(), [0; 512]);
        while !said.windows(HALF.len()).any(|w| w == HALF) {
            let n = client.read(&mut some).unwrap();
            assert!(n > 0, "{form} {path}: {}", String::from_utf8_lossy(&said));
            said.extend(&some[..n]);
        }
        (form, client, said)
    })
}

/// Reads to the end. Returns whether the answer looks complete.
fn looks_whole(mut client: TcpStream, mut said: Vec<u8>) -> bool {
    match client.read_to_end(&mut said) {
        Ok(_) => true,
        Err(e) if e.kind() == ErrorKind::ConnectionReset => {
            assert!(!said.ends_with(b"0\r\n\r\n"), "a last chunk, and a reset");
            false
        }
        Err(e) => panic!("{e}"),
    }
}

fn cuts(kernel: Kernel) {
    let Some(mut setup) = setup(kernel, "", false) else {
        return;
    };
    for (form, client, said) in begun(&setup, "/ended") {
        assert!(looks_whole(client, said), "{form}: it has ended");
    }
    let mut cut = |what: &str, path: &str, how: &dyn Fn(&mut Setup)| {
        let open = begun(&setup, path);
        how(&mut setup);
        for (form, client, said) in open {
            let whole = looks_whole(client, said);
            assert!(!whole, "{what}, {form}: it looks whole\n{}", setup.logs());
        }
        if what != "the VM is killed" {
            whole_again(&setup);
        }
    };
    cut("the server resets", "/cut", &|_| {});
    cut("the agent is killed", "/waits", &|setup| {
        // Not by the step's own process, which would end with it.
        let kill = "kill -9 $(pidof adit-guest)";
        setup.order(&format!(
            "steps: [{{id: kill, script: {{interpreter: /bin/sh, script: \"{kill}\"}}}}]\n"
        ));
    });
    cut("the port process is killed", "/waits", &|setup| {
        setup.kill_port()
    });
    cut("adit vm reload", "/waits", &|setup| {
        let (code, said) = setup.adit(&["vm", "reload", "web-1"]);
        assert_eq!(code, 0, "{said}");
    });
    cut("the VM is killed", "/waits", &|setup| {
        setup.guest.kill().unwrap()
    });
}

#[test]
fn r117_half_an_answer_never_looks_complete_6_1() {
    cuts(Kernel::V6_1);
}

#[test]
fn r117_half_an_answer_never_looks_complete_6_12() {
    cuts(Kernel::V6_12);
}

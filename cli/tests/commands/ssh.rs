//! The real ssh, by the file that the package of aditd puts into /etc/ssh/ssh_config.d.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Mutex;
use std::sync::mpsc::channel;

use crate::proxy::{OK, Proxy, end};
use crate::text;

/// Runs ssh as somebody who has the file, and nothing else. `None`, with the reason printed: there is no ssh.
fn ssh(proxy: &Proxy, args: &[&str]) -> Option<Output> {
    let adit = Path::new(env!("CARGO_BIN_EXE_adit")).parent().unwrap();
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new("ssh");
    command
        .args([
            "-F",
            concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/../host-proxy/dist/20-adit.conf"
            ),
        ])
        .args(["-o", "UserKnownHostsFile=/dev/null", "-o", "BatchMode=yes"])
        .args(args)
        .env("PATH", format!("{}:{path}", adit.display()))
        .env("ADIT_PROXY", &proxy.url)
        .env("SHELL", "/bin/sh");
    match command.output() {
        Ok(out) => Some(out),
        Err(e) => {
            println!("skipped: cannot start ssh: {e}");
            None
        }
    }
}

#[test]
fn ssh_gets_the_socket_and_talks_to_the_guest() {
    let (note, said) = channel();
    let note = Mutex::new(note);
    let proxy = Proxy::start(move |mut client, _| {
        // The guest's sshd speaks first.
        client
            .write_all(&[OK, b"SSH-2.0-guest\r\n"].concat())
            .unwrap();
        let mut line = String::new();
        BufReader::new(&client).read_line(&mut line).unwrap();
        client.write_all(b"what it does not understand").unwrap();
        note.lock().unwrap().send(line).unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        end(&mut client);
    });
    // ssh writes the name in lower case by itself.
    let Some(out) = ssh(&proxy, &["-v", "-p", "2222", "root@Web-1.adit", "true"]) else {
        return;
    };
    let log = text(&out.stderr);
    assert!(log.contains("remote software version guest"), "{log}");
    assert!(said.recv().unwrap().starts_with("SSH-2.0-OpenSSH"), "{log}");
    assert!(proxy.asked().starts_with("CONNECT web-1:2222 "));
}

#[test]
fn ssh_shows_why_the_proxy_refuses() {
    let proxy = Proxy::saying("HTTP/1.1 403 x\r\n\r\nport 22 is in no list\n");
    let Some(out) = ssh(&proxy, &["root@web-1.adit", "true"]) else {
        return;
    };
    assert_eq!(out.status.code(), Some(255));
    assert!(
        text(&out.stderr).contains("port 22 is in no list"),
        "{}",
        text(&out.stderr)
    );
}

//! A map of a hundred thousand VMs, read again by a running aditd.

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::host::Control;
use crate::peers::{Member, to_alpha};
use crate::proxy::head;

const ROWS: usize = 100_000;
/// Of each kind.
const TUNNELS: usize = 20;

fn tunnel(alpha: &Member, control: &Control, vm: &str) -> (TcpStream, UnixStream) {
    let mut client = alpha.host.proxy();
    write!(client, "CONNECT {vm}:80 HTTP/1.1\r\nHost: {vm}\r\n\r\n").unwrap();
    let (guest, _) = control.tunnel();
    assert!(head(&mut client).starts_with("HTTP/1.1 200 "));
    (client, guest)
}

/// Bytes go both ways.
fn goes_on((client, guest): &mut (TcpStream, UnixStream)) {
    let (mut to, mut fro) = ([0; 2], [0; 3]);
    client.write_all(b"to").unwrap();
    guest.read_exact(&mut to).unwrap();
    guest.write_all(b"fro").unwrap();
    client.read_exact(&mut fro).unwrap();
    assert_eq!((&to, &fro), (b"to", b"fro"));
}

#[test]
fn a_hundred_thousand_rows_are_read_again_while_every_tunnel_goes_on() {
    let grants = to_alpha("\"reach\", \"see\"");
    let alpha = Member::new("alpha", &[("a", 3)], &grants);
    let beta = Member::new("beta", &[("b", 3)], &grants);
    alpha.knows(&beta, "");
    beta.knows(&alpha, "");
    let (a, b) = (alpha.ports[0].connected(), beta.ports[0].connected());
    // Those of alpha's own VM are its port process's; those to beta's are carried by alpha.
    let mut tunnels: Vec<_> = (0..TUNNELS)
        .flat_map(|_| [tunnel(&alpha, &a, "a"), tunnel(&alpha, &b, "b")])
        .collect();
    let map = alpha.dir.path().join("vms.map");
    let rows = |prefix: &str, more: &str| {
        let mut text = String::new();
        for n in 0..ROWS {
            writeln!(text, "{prefix}-{n} beta").unwrap();
        }
        std::fs::write(&map, text + more).unwrap();
    };
    let reload = || {
        let begin = Instant::now();
        let answer = alpha.host.api("POST", "/v1/reload", "null");
        assert_eq!(answer.status, 200, "{}", answer.body);
        (
            serde_json::from_str::<Value>(&answer.body).unwrap(),
            begin.elapsed(),
        )
    };
    let known = |vm: &str| {
        let answer = alpha.host.api("GET", &format!("/v1/resolve/{vm}"), "");
        (answer.status == 200).then(|| {
            let found: Value = serde_json::from_str(&answer.body).unwrap();
            found["host"].as_str().unwrap().to_owned()
        })
    };
    // Those that only the map knows.
    let counted = || {
        let all = alpha.host.get("/v1/resolve");
        let vms = all["vms"].as_array().unwrap();
        let of_map = vms.iter().filter(|vm| vm["by_map_of"].is_string());
        (vms.len(), of_map.count())
    };
    rows("one", "");
    let path = alpha.host.config_file();
    let text = std::fs::read_to_string(&path).unwrap();
    let with_map = format!("[peers]\nmap = \"{}\"\n", map.display());
    std::fs::write(&path, text.replacen("[peers]\n", &with_map, 1)).unwrap();
    let mut took = Vec::<Duration>::new();
    for (prefix, gone) in [("one", "two"), ("two", "one")] {
        rows(prefix, "");
        let (status, after) = reload();
        took.push(after);
        assert!(status["error"].is_null(), "{status}");
        assert_eq!(status["restart"], serde_json::json!([]), "{status}");
        let last = format!("{prefix}-{}", ROWS - 1);
        assert_eq!(known(&last).as_deref(), Some("beta"));
        assert_eq!(known(&format!("{gone}-0")), None);
        assert_eq!(counted(), (ROWS + 2, ROWS));
        tunnels.iter_mut().for_each(goes_on);
    }
    // They come in pages for whoever does not want all of them at once.
    let all = alpha.host.get("/v1/resolve");
    let (mut seen, mut after) = (Vec::new(), String::new());
    for _ in 0..3 {
        let path = format!("/v1/resolve?limit=400{after}");
        let page = alpha.host.api("GET", &path, "");
        assert_eq!(page.status, 200, "{}", page.body);
        let listed: Value = serde_json::from_str(&page.body).unwrap();
        seen.extend(listed["vms"].as_array().unwrap().clone());
        let next = page
            .head
            .lines()
            .find_map(|l| l.strip_prefix("adit-next: "));
        let next = next.unwrap().replace(' ', "%20");
        after = format!("&after={next}");
    }
    assert_eq!(seen, all["vms"].as_array().unwrap()[..1200]);
    // One row that is none: nothing of the file is taken, and what was there stays.
    rows("three", "three-0 beta\n");
    let (status, after) = reload();
    took.push(after);
    let why = status["error"].as_str().unwrap();
    assert!(why.contains("line 100001"), "{why}");
    assert_eq!(known("two-7").as_deref(), Some("beta"));
    assert_eq!(known("three-7"), None);
    tunnels.iter_mut().for_each(goes_on);
    // And nobody was asked to end one.
    drop((a, b));
    println!("{ROWS} rows, read again by this build while other tests run: {took:?}");
}

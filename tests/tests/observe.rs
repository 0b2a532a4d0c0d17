//! What operators watch aditd with, at a real one, without a guest.
//!
//! These tests need the binaries that `cargo xtask test` builds. Without them they print that and pass.

use std::fs;
use std::io::{self, BufRead, BufReader};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use adit_tests::host::Host;
use adit_tests::image::prometheus;
use adit_tests::process::{Reaped, bound, output, wait_for};
use serde_json::Value;

/// Longer than anything in these tests takes.
const LIMIT: Duration = Duration::from_secs(60);

fn binaries() -> Option<PathBuf> {
    let bins = std::env::var_os("ADIT_TEST_BINS").map(PathBuf::from);
    if bins.is_none() {
        println!(
            "skipped: ADIT_TEST_BINS is not set; `cargo xtask test` builds what is needed and sets it"
        );
    }
    bins
}

/// What a URL answers, as JSON.
fn get(url: &str) -> anyhow::Result<Value> {
    let out = output(Command::new("curl").args(["-sS", "--noproxy", "*", url]))?;
    Ok(serde_json::from_slice(&out.stdout)?)
}

#[test]
fn promtool_takes_the_alert_rules_and_they_fire_when_they_should() {
    if binaries().is_none() {
        return;
    }
    let promtool = prometheus(&|what| println!("{what}"))
        .unwrap()
        .with_file_name("promtool");
    let rules = adit_tests::root().join("host-proxy/dist/alerts.yml");
    output(Command::new(&promtool).args(["check", "rules"]).arg(rules)).unwrap();
    let tests = adit_tests::root().join("tests/tests/alerts.yml");
    output(Command::new(&promtool).args(["test", "rules"]).arg(tests)).unwrap();
}

/// Starts Prometheus in `dir`; returns where it answers.
fn start_prometheus(program: &Path, dir: &Path) -> (Reaped, String) {
    let mut command = bound(program);
    command
        .arg(format!("--config.file={}/prometheus.yml", dir.display()))
        .arg(format!("--storage.tsdb.path={}/data", dir.display()))
        .arg("--web.listen-address=127.0.0.1:0")
        .stdin(Stdio::null())
        .stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let prometheus = Reaped(child);
    let mut said = Vec::new();
    let address = lines.by_ref().map_while(Result::ok).find_map(|line| {
        said.push(line.clone());
        let (_, rest) = line.split_once("\"Listening on\" address=")?;
        rest.split_whitespace().next().map(str::to_owned)
    });
    let address = address.unwrap_or_else(|| panic!("no address: {said:#?}"));
    // What it says later must go somewhere.
    std::thread::spawn(move || lines.for_each(drop));
    (prometheus, address)
}

#[test]
fn prometheus_finds_vms_by_http_sd_and_reads_every_metric() {
    let Some(bins) = binaries() else { return };
    let program = prometheus(&|what| println!("{what}")).unwrap();
    let host = Host::start_with(&bins, &["web-1"], "[metrics]\nlisten = \"127.0.0.1:0\"").unwrap();
    // web-1 may not be reached at this port.
    let add = ["vm", "add", "web-2", "--cid", "9", "--allow", "9100"];
    let added = host.adit(&add).unwrap();
    assert!(added.status.success(), "{added:?}");
    let metrics = fs::read_to_string(host.dir().join("run/metrics.addr")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let rules = adit_tests::root().join("host-proxy/dist/alerts.yml");
    fs::write(
        dir.path().join("prometheus.yml"),
        format!(
            r#"global: {{scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}}
rule_files: [{rules}]
scrape_configs:
  - job_name: aditd
    static_configs: [{{targets: ["{metrics}"]}}]
  - job_name: node
    proxy_url: http://{proxy}
    http_sd_configs: [{{url: "http://{metrics}/sd/prometheus", refresh_interval: 1s}}]
    relabel_configs: [{{source_labels: [__meta_adit_state], target_label: state}}]
"#,
            rules = rules.display(),
            metrics = metrics.trim(),
            proxy = host.proxy(),
        ),
    )
    .unwrap();
    let (_prometheus, at) = start_prometheus(&program, dir.path());

    // Its guest is not up, and the proxy says so: the scrape went through it, to the VM.
    let target = wait_for("a target by http_sd", LIMIT, || {
        // Until it is ready it says so in plain text.
        let Ok(all) = get(&format!("http://{at}/api/v1/targets?state=active")) else {
            return Ok(None);
        };
        let all = all["data"]["activeTargets"].as_array().cloned();
        let mut node = all.unwrap_or_default();
        node.retain(|target| target["scrapePool"] == "node");
        let scraped = node.iter().all(|target| target["health"] != "unknown");
        Ok((scraped && !node.is_empty()).then_some(node))
    })
    .unwrap();
    let [target] = target.as_slice() else {
        panic!("{target:#?}");
    };
    assert_eq!(target["labels"]["instance"], "web-2:9100", "{target:#}");
    assert_eq!(target["labels"]["vm"], "web-2", "{target:#}");
    assert_eq!(target["labels"]["state"], "waiting", "{target:#}");
    let error = target["lastError"].as_str().unwrap();
    assert!(error.contains("503"), "{error}");

    // What aditd counted of these scrapes, as Prometheus has it.
    for query in [
        r#"up{job="aditd"}==1"#,
        r#"adit_vm_ready{vm="web-2"}==0"#,
        r#"adit_vm_dials_total{vm="web-2",outcome="no-session"}>0"#,
        r#"adit_listener_accepted_total{listener=~"127.0.0.1:.*"}>0"#,
        r#"adit_listener_connections_open{listener="metrics"}>0"#,
    ] {
        wait_for(query, LIMIT, || {
            let mut command = Command::new("curl");
            command.args(["-sS", "--noproxy", "*", "-G", "--data-urlencode"]);
            command.arg(format!("query={query}"));
            let out = output(command.arg(format!("http://{at}/api/v1/query")))?;
            let answer: Value = serde_json::from_slice(&out.stdout)?;
            let found = answer["data"]["result"].as_array();
            Ok(found.is_some_and(|found| !found.is_empty()).then_some(()))
        })
        .unwrap();
    }

    // A port that is none is refused, so Prometheus keeps what it has.
    for port in ["0", "65536", "%2B1", "", "x", "1&port=2"] {
        let url = format!("http://{}/sd/prometheus?port={port}", metrics.trim());
        assert_eq!(get(&url).unwrap()["code"], "usage", "{port}");
    }
    let none = format!("http://{}/sd/prometheus?port=1", metrics.trim());
    assert_eq!(get(&none).unwrap(), serde_json::json!([]));
}

/// Passes the connections of a TCP port of this machine on to a Unix socket: the tester knows no other.
fn bridge(socket: PathBuf) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let (Ok(client), Ok(server)) = (client, UnixStream::connect(&socket)) else {
                continue;
            };
            std::thread::spawn(move || carry(&client, &server));
        }
    });
    at
}

/// Until both sides have said all. One that breaks off is no matter of the test.
fn carry(client: &TcpStream, server: &UnixStream) {
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let _ = io::copy(&mut &*client, &mut &*server);
            let _ = server.shutdown(Shutdown::Write);
        });
        let _ = io::copy(&mut &*server, &mut &*client);
        let _ = client.shutdown(Shutdown::Write);
    });
}

/// Schemathesis makes requests of the document that aditd serves, such as fit it and such as do not, and compares the answers
/// with it.
#[test]
fn the_api_does_what_its_document_says() {
    let Some(bins) = binaries() else { return };
    let Some(schemathesis) = std::env::var_os("ADIT_TEST_SCHEMATHESIS") else {
        return println!("skipped: there is no schemathesis; `cargo xtask test` says why");
    };
    let (token, digest) = adit_api::token::new().unwrap();
    let more = format!(
        "[[listen]]\naddress = \"127.0.0.1:0\"\nrole = \"management\"\n\
         [[token]]\nname = \"tester\"\nsha256 = \"{digest}\"\n\
         [[grant]]\nto = [\"token:tester\"]\nvms = [\"*\"]\nmay = [\"see\", \"task\", \"goal\", \"manage\"]\n"
    );
    let host = Host::start_without_vsock(&bins, &["web-1"], &more).unwrap();
    host.wait_port("web-1").unwrap();
    let config = adit_tests::root().join("tests/tests/schemathesis.toml");
    let config = fs::read_to_string(config).unwrap();
    let run = |at: &str, more: &[&str], config: &str| {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("schemathesis.toml"), config).unwrap();
        let out = bound(schemathesis.clone())
            .args(["--config-file", "schemathesis.toml", "--no-color", "run"])
            .args(more)
            .arg("--url")
            .arg(format!("http://{at}"))
            .arg(format!("http://{at}/v1/openapi.json"))
            .current_dir(dir.path())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&out.stdout);
        let errors = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "{said}{errors}{}", host.log());
    };
    let at = bridge(host.dir().join("run/aditd.sock"));
    run(&at.to_string(), &[], &config);
    // The same for others than the owner, who may not do all of it; and a wrong token would make the tester wait.
    let at = fs::read_to_string(host.dir().join("run/listen.addr")).unwrap();
    let of_others = config.replace("400, 404, 4", "400, 403, 404, 4")
        + "\n[checks.ignored_auth]\nenabled = false\n";
    let shown = format!("Authorization: Bearer {token}");
    run(at.trim(), &["-H", &shown], &of_others);
    // It goes on, and VMs are as before.
    let shown = host.adit(&["vm", "show", "web-1"]).unwrap();
    assert!(shown.status.success(), "{shown:?}");
}

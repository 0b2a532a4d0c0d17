//! One host, and each program with it.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use adit_api::token;
use adit_tests::agent;
use adit_tests::host::Host;
use adit_tests::process::{Reaped, bound, wait_for};
use serde_json::{Value, json as object};

use super::keys::{Keys, Pair};
use super::servers::Servers;
use super::{LIMIT, beside, bins, json, run, shown};

/// No user of the host has it.
const UID: u32 = 54_321;
const BROWSER: &str = "/usr/bin/chromium";

/// A host with the VM `web-1`, which root may reach, and whoever has the certificate or the token.
struct Setup {
    host: Host,
    servers: Servers,
    keys: Keys,
    /// Of the listener.
    proxy: Pair,
    /// Of `ci.example`.
    ci: Pair,
    token: String,
    /// The listener with TLS, and that for SOCKS5.
    tls: String,
    socks: String,
}

impl Setup {
    fn new() -> Option<Self> {
        let bins = bins()?;
        let (servers, keys) = (Servers::start(), Keys::new());
        let (proxy, ci) = (keys.signs(&["127.0.0.1"]), keys.signs(&["ci.example"]));
        let (token, sha256) = token::new().unwrap();
        let config = format!(
            "[proxy]\nlisten = \"127.0.0.1:0\"\n[log]\naccess = \"file\"\n[audit]\nallows = true\n\
             [[listen]]\naddress = \"127.0.0.1:0\"\ncert = \"{}\"\nkey = \"{}\"\nclient_ca = \"{}\"\n\
             [[listen]]\naddress = \"127.0.0.1:0\"\nspeak = \"socks5\"\n\
             [[token]]\nname = \"ci\"\nsha256 = \"{sha256}\"\n\
             [[grant]]\nto = [\"cert:ci.example\", \"token:ci\", \"user:root\"]\nvms = [\"web-1\"]\nmay = [\"reach\", \"see\"]\n\
             [[vm]]\nname = \"web-1\"\ncid = 3\nallow = {:?}\n",
            proxy.cert,
            proxy.key,
            keys.ca(),
            servers.ports()
        );
        let host = Host::start_configured(&bins, &config).unwrap();
        agent::start(&host.vm_dir("web-1"), &servers.ports()).unwrap();
        let listeners = host.listeners().unwrap();
        let [tls, socks] = &listeners[..] else {
            panic!("{listeners:?}")
        };
        let setup = Self {
            tls: format!("https://{tls}"),
            socks: format!("socks5h://{socks}"),
            host,
            servers,
            keys,
            proxy,
            ci,
            token,
        };
        let url = setup.url("hello");
        wait_for("the VM", LIMIT, || {
            let out = setup.host.curl(&["-f", &url])?;
            Ok(out.status.success().then_some(()))
        })
        .unwrap();
        Some(setup)
    }

    /// Of a file in the VM.
    fn url(&self, file: &str) -> String {
        format!("http://web-1:{}/files/{file}", self.servers.page)
    }

    /// The proxy with TLS, for whoever has the token.
    fn with_token(&self) -> String {
        self.tls
            .replace("https://", &format!("https://x:{}@", self.token))
    }

    fn plain(&self) -> String {
        format!("http://{}", self.host.proxy())
    }

    /// The line of the access log that is so, once there is one.
    fn logged(&self, what: &str, is: impl Fn(&Value) -> bool) -> Value {
        found(&self.host.dir().join("state/aditd.access"), what, &is)
    }
}

/// The line of a file that is so, once there is one.
fn found(path: &Path, what: &str, is: &dyn Fn(&Value) -> bool) -> Value {
    wait_for(what, LIMIT, || {
        let text = fs::read_to_string(path).unwrap_or_default();
        // The last line may be half there.
        let lines = text
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok());
        Ok(lines.into_iter().find(|line| is(line)))
    })
    .unwrap_or_else(|e| panic!("{e:#}: {}", fs::read_to_string(path).unwrap_or_default()))
}

/// A program of some user, without a word of this environment.
fn program(name: &str, uid: u32) -> Command {
    let mut command = Command::new(name);
    command
        .uid(uid)
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .env("HOME", "/nonexistent")
        .stdin(Stdio::null());
    command
}

/// curl as a user. Returns the status of the proxy or of the VM, or 0, and all that it said.
fn curl(uid: u32, args: &[&str]) -> (u16, String) {
    let mut curl = program("curl", uid);
    curl.args([
        "-sS",
        "--max-time",
        "60",
        "-w",
        "\n%{http_code} %{http_connect}",
    ]);
    let out = curl.args(args).output().unwrap();
    let codes = String::from_utf8_lossy(&out.stdout).into_owned();
    let codes = codes.lines().last().unwrap_or_default().split(' ');
    let codes: Vec<u16> = codes.map(|code| code.parse().unwrap()).collect();
    let code = codes.iter().find(|code| **code != 0);
    (code.copied().unwrap_or(0), shown(&out))
}

#[test]
fn an_application_tunnels_in_streams_of_http_2_over_tls_and_hears_why_it_may_not() {
    let Some(setup) = Setup::new() else { return };
    let node = |more: &Value| {
        let mut asked = object!({
            "proxy": setup.tls,
            "ca": setup.keys.ca(),
            "echo": format!("web-1:{}", setup.servers.echo),
            "page": format!("web-1:{}", setup.servers.page),
            "tunnels": 50,
            "bytes": 300_000,
        });
        let fields = asked.as_object_mut().unwrap();
        fields.extend(more.as_object().unwrap().clone());
        let mut node = program("node", UID);
        json(node.arg(beside("tunnel.mjs")).arg(asked.to_string()))
    };
    let certificate = object!({"cert": setup.ci.cert, "key": setup.ci.key});
    let token = object!({"token": setup.token});
    for (who, shown) in [("cert:ci.example", &certificate), ("token:ci", &token)] {
        let said = node(shown);
        assert_eq!(
            (&said["alpn"], &said["echoed"]),
            (&"h2".into(), &50.into()),
            "{said}"
        );
        assert_eq!(said["page"], "this is web-1\n", "{said}");
        assert_eq!(said["nobody"]["status"], 404, "{said}");
        assert_eq!(said["closed"]["status"], 403, "{said}");
        let why = said["closed"]["text"].as_str().unwrap();
        assert!(why.contains("`allow`"), "{said}");
        // Each tunnel has its line, with all of its bytes.
        let line = setup.logged(who, |line| {
            line["caller"] == who && line["bytes_from_vm"] == 300_000
        });
        assert_eq!(
            (&line["proto"], &line["method"], &line["bytes_to_vm"]),
            (&"http2".into(), &"CONNECT".into(), &300_000.into()),
            "{line}"
        );
    }
    // A user of whom nothing is granted; a token that is none; and a certificate of somebody else.
    let said = node(&object!({}));
    assert_eq!(said["status"], 404, "{said}");
    let said = node(&object!({"token": "made-up"}));
    assert_eq!(said["status"], 407, "{said}");
    let others = Keys::new();
    let stranger = others.signs(&["ci.example"]);
    let said = node(&object!({"cert": stranger.cert, "key": stranger.key}));
    // The alert may come behind the handshake, and then be lost with the connection.
    let error = said["error"].as_str().unwrap_or_default();
    assert!(
        error.contains("alert") || error.contains("ECONNRESET"),
        "{said}"
    );
}

#[test]
fn r125_a_tunnel_in_a_stream_of_http_2_ends_with_its_grant_and_others_of_its_connection_go_on() {
    let Some(setup) = Setup::new() else { return };
    let (second, sha256) = token::new().unwrap();
    let change = |change: &dyn Fn(String) -> String| {
        let path = setup.host.dir().join("aditd.toml");
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, change(text)).unwrap();
        let out = setup.host.adit(&["reload"]).unwrap();
        assert!(out.status.success(), "{}", shown(&out));
    };
    change(&|text| {
        let token = format!("[[token]]\nname = \"second\"\nsha256 = \"{sha256}\"\n");
        text.replace("\"token:ci\"", "\"token:ci\", \"token:second\"") + &token
    });
    let asked = object!({
        "proxy": setup.tls,
        "ca": setup.keys.ca(),
        "tokens": [setup.token, second],
        "echo": format!("web-1:{}", setup.servers.echo),
    });
    let mut node = program("node", UID);
    node.arg(beside("hold.mjs")).arg(asked.to_string());
    let mut node = Reaped(node.stdout(Stdio::piped()).spawn().unwrap());
    let mut lines = BufReader::new(node.0.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "open");
    change(&|text| text.replace("\"token:ci\", ", ""));
    let since = Instant::now();
    let ended = lines.next().unwrap().unwrap();
    println!("it ended {:?} after the reload", since.elapsed());
    let ended: Value = serde_json::from_str(&ended).unwrap();
    // CONNECT_ERROR.
    assert_eq!(
        (&ended["code"], &ended["goesOn"]),
        (&10.into(), &true.into()),
        "{ended}"
    );
    let line = setup.logged("its line", |line| line["caller"] == "token:ci");
    assert_eq!(
        (&line["broken_off"], &line["bytes_to_vm"], &line["status"]),
        (&true.into(), &4.into(), &200.into()),
        "{line}"
    );
    let audit = |what: &str, is: &dyn Fn(&Value) -> bool| {
        let path = setup.host.dir().join("state/aditd.audit");
        found(&path, what, is)
    };
    audit("why", &|line| {
        line["caller"] == "token:ci" && line["reason"] == "grant-gone"
    });
    let allowed = audit("what it was", &|line| {
        line["decision"] == "allow" && line["caller"] == "token:ci"
    });
    assert_eq!(allowed["trace_id"], line["trace_id"], "{allowed}");
    assert_eq!(allowed["bytes_from_vm"], 4, "{allowed}");
}

#[test]
fn a_browser_with_a_proxy_at_https_shows_a_page_of_a_vm_and_opens_its_websocket() {
    if !Path::new(BROWSER).exists() {
        return println!("skipped: there is no {BROWSER} (Debian's package `chromium`)");
    }
    let Some(setup) = Setup::new() else { return };
    let dir = tempfile::tempdir().unwrap();
    let url = format!("http://web-1:{}/", setup.servers.page);
    let mut browser = bound("timeout");
    browser.args([&LIMIT.as_secs().to_string(), BROWSER]);
    browser.args([
        "--headless",
        // It runs as root here.
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--dump-dom",
    ]);
    browser
        .arg(format!("--user-data-dir={}", dir.path().display()))
        .arg(format!("--proxy-server={}", setup.tls))
        .arg(format!(
            "--ignore-certificate-errors-spki-list={}",
            setup.proxy.digest
        ))
        .arg(&url)
        .stdin(Stdio::null());
    let out = run(&mut browser);
    let page = String::from_utf8_lossy(&out.stdout);
    assert!(
        page.contains("<p id=\"said\">1 300000 ping came back</p>"),
        "{}\n{}",
        shown(&out),
        setup.host.log()
    );
    let line = setup.logged("an upload", |line| {
        line["method"] == "POST" && line["bytes_to_vm"] == 300_000
    });
    assert_eq!(
        (&line["proto"], &line["caller"]),
        (&"http2".into(), &"user:root".into()),
        "{line}"
    );
    // A browser has a tunnel for a WebSocket.
    let line = setup.logged("the WebSocket", |line| {
        line["method"] == "CONNECT" && line["vm"] == "web-1"
    });
    assert_eq!(line["proto"], "http2", "{line}");
    // What the page asks of the world besides, it does not get.
    setup.logged("another name", |line| {
        line["vm"] != "web-1" && line["status"] != 200
    });
}

#[test]
fn grpc_calls_reach_a_vm_by_the_proxy_of_the_environment() {
    let Some(setup) = Setup::new() else { return };
    let call = |uid: u32, proxy: &str, target: &str| {
        let mut python = program("/usr/bin/python3", uid);
        // For gRPC the scheme is always http.
        python.env("http_proxy", proxy);
        json(python.arg(beside("call.py")).args([target, "50", "100000"]))
    };
    let target = format!("web-1:{}", setup.servers.grpc);
    let with_token = setup
        .plain()
        .replace("http://", &format!("http://x:{}@", setup.token));
    for (who, uid, proxy) in [
        ("user:root", 0, &setup.plain()),
        ("token:ci", UID, &with_token),
    ] {
        let said = call(uid, proxy, &target);
        assert_eq!(said["reversed"], "cba", "{who}: {said}");
        assert_eq!(said["echoed"], 50, "{who}: {said}");
        assert_eq!(said["error"][0], "FAILED_PRECONDITION", "{who}: {said}");
        setup.logged(who, |line| {
            line["caller"] == who && line["target"] == format!("tcp:{}", setup.servers.grpc)
        });
    }
    for (uid, proxy, target) in [
        (UID, &setup.plain(), &*target),
        (0, &setup.plain(), "web-1:1"),
    ] {
        let said = call(uid, proxy, target);
        assert_eq!(said["error"][0], "UNAVAILABLE", "{said}");
    }
}

#[test]
fn programs_that_know_a_proxy_at_https_show_it_a_token_or_a_certificate() {
    let Some(setup) = Setup::new() else { return };
    let (ca, url, with_token) = (setup.keys.ca(), setup.url("hello"), setup.with_token());
    let hello = |(code, said): (u16, String)| {
        assert_eq!(code, 200, "{said}");
        assert!(said.contains("this is web-1\n"), "{said}");
    };
    let certificate = ["--proxy-cert", &setup.ci.cert, "--proxy-key", &setup.ci.key];
    for form in ["-s", "-p"] {
        let all = ["-x", &with_token, "--proxy-cacert", &ca, form, &url];
        hello(curl(UID, &all));
        let mut all = vec!["-x", &setup.tls, "--proxy-cacert", &ca, form, &url];
        all.extend(certificate);
        hello(curl(UID, &all));
    }
    // A proxy that is not believed hears nothing of the token.
    let (code, said) = curl(UID, &["-x", &with_token, &url]);
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("certificate"), "{said}");

    let dir = tempfile::tempdir().unwrap();
    let mut git = program("git", 0);
    git.env("HOME", dir.path())
        .env("GIT_SSL_CAINFO", &ca)
        .args(["-c", &format!("http.proxy={with_token}")])
        .args(["-c", &format!("http.proxySSLCAInfo={ca}")])
        .args(["clone", "-q", &setup.url("site.git")])
        .arg(dir.path().join("site"));
    run(&mut git);
    let mut log = program("git", 0);
    let log = log.env("HOME", dir.path()).args(["log", "--format=%s"]);
    let out = run(log.current_dir(dir.path().join("site")));
    assert_eq!(out.stdout, b"first\n");

    let requests = |proxy: &str| {
        let mut python = program("/usr/bin/python3", UID);
        python.env("SSL_CERT_FILE", &ca).arg(beside("ask.py"));
        json(python.args([proxy, &ca, &url]))
    };
    let said = requests(&with_token);
    assert_eq!(
        (&said["status"], &said["text"]),
        (&200.into(), &"this is web-1\n".into()),
        "{said}"
    );
    let said = requests(&setup.tls);
    assert_eq!(said["status"], 404, "{said}");

    // wget speaks no TLS with a proxy.
    let mut wget = program("wget", UID);
    wget.env("http_proxy", setup.plain())
        .args(["-q", "-O", "-"]);
    wget.args([
        "--proxy-user=x",
        &format!("--proxy-password={}", setup.token),
    ]);
    assert_eq!(run(wget.arg(&url)).stdout, b"this is web-1\n");
}

#[test]
fn socks5_with_the_name_reaches_a_vm_with_a_token_and_as_a_user_and_not_by_an_address() {
    let Some(setup) = Setup::new() else { return };
    let (url, with_token) = (
        setup.url("hello"),
        setup
            .socks
            .replace("socks5h://", &format!("socks5h://x:{}@", setup.token)),
    );
    for (who, uid, proxy) in [
        ("user:root", 0, &setup.socks),
        ("token:ci", UID, &with_token),
    ] {
        let (code, said) = curl(uid, &["-x", proxy, &url]);
        assert!(code == 200 && said.contains("this is web-1"), "{said}");
        let line = setup.logged(who, |line| {
            line["proto"] == "socks5" && line["caller"] == who
        });
        assert_eq!(line["vm"], "web-1", "{line}");
    }
    // Exit status 97: the proxy refuses.
    for (uid, proxy) in [
        (UID, &setup.socks),
        (UID, &with_token.replace("x:", "x:not-")),
    ] {
        let (_, said) = curl(uid, &["-x", proxy, &url]);
        assert!(said.contains("97"), "{said}");
    }
    let by_address = url.replace("web-1", "127.0.0.1");
    let (_, said) = curl(0, &["-x", &setup.socks, &by_address]);
    assert!(said.contains("97"), "{said}");
}

#[test]
fn a_wrong_certificate_a_revoked_token_and_an_unprivileged_user_are_each_told() {
    let Some(setup) = Setup::new() else { return };
    let (ca, url) = (setup.keys.ca(), setup.url("hello"));
    let tls = |more: &[&str]| {
        let all = ["-x", &setup.tls, "--proxy-cacert", &ca, &url];
        curl(UID, &[&all[..], more].concat())
    };
    // Of an authority that nobody has named; for another name than any grant has; and with another's key.
    let others = Keys::new();
    let stranger = others.signs(&["ci.example"]);
    let (code, said) = tls(&["--proxy-cert", &stranger.cert, "--proxy-key", &stranger.key]);
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("alert"), "{said}");
    let named = setup.keys.signs(&["else.example"]);
    let (code, said) = tls(&["--proxy-cert", &named.cert, "--proxy-key", &named.key]);
    assert_eq!(code, 404, "{said}");
    assert!(said.contains("no VM is named `web-1`"), "{said}");
    // A user of this host, without and with the token.
    let plain = setup.plain();
    let (code, said) = curl(UID, &["-x", &plain, &url]);
    assert_eq!(code, 404, "{said}");
    let with_token = format!("x:{}", setup.token);
    let token = ["--proxy-user", &with_token];
    let all = [&["-x", &*plain, &*url][..], &token].concat();
    assert_eq!(curl(UID, &all).0, 200);
    assert_eq!(tls(&token).0, 200);
    // It is taken away.
    let path = setup.host.dir().join("aditd.toml");
    let text = fs::read_to_string(&path).unwrap();
    let sha256 = token::sha256(setup.token.as_bytes());
    let sha256: String = sha256.iter().map(|byte| format!("{byte:02x}")).collect();
    let (_, another) = token::new().unwrap();
    fs::write(&path, text.replace(&sha256, &another)).unwrap();
    let out = setup.host.adit(&["reload"]).unwrap();
    assert!(out.status.success(), "{}", shown(&out));
    for (code, said) in [tls(&token), curl(UID, &all)] {
        assert_eq!(code, 407, "{said}");
    }
    let audit = fs::read_to_string(setup.host.dir().join("state/aditd.audit")).unwrap();
    assert!(!audit.contains(&setup.token), "{audit}");
}

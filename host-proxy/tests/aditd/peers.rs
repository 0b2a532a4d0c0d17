//! Several hosts: whose VM is meant, who asks, and what becomes of hosts that say what is not so.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType;
use rcgen::CertificateParams;
use serde_json::{Value, json};

use crate::access::{UID, asked, audit, curl, grant, listen, serve};
use crate::dns::{addresses, ask};
use crate::host::{Answer, HANG, Host, NO_GRANTS, Port};
use crate::tls::{Pair, expired, own};

/// One of the hosts.
pub struct Member {
    pub host: Host,
    pub ports: Vec<Port>,
    pub name: &'static str,
    pub key: Pair,
    /// Its certificate.
    pub dir: tempfile::TempDir,
}

impl Member {
    /// Serves these VMs. It knows no other host yet.
    pub fn new(name: &'static str, vms: &[(&str, u64)], more: &str) -> Self {
        Self::with(name, vms, more, |_| {})
    }

    pub fn with(
        name: &'static str,
        vms: &[(&str, u64)],
        more: &str,
        change: impl FnOnce(&mut CertificateParams),
    ) -> Self {
        let (dir, key) = (tempfile::tempdir().unwrap(), own(&[name], change));
        let file = |file: &str, text: &str| {
            let path = dir.path().join(file);
            fs::write(&path, text).unwrap();
            path.display().to_string()
        };
        let (cert, private) = (file("crt", &key.cert), file("key", &key.key));
        let keys = format!("cert = \"{cert}\"\nkey = \"{private}\"\n");
        let unix = dir.path().join("proxy.sock");
        let sections = format!(
            "[names]\nhost = \"{name}\"\n[peers]\n{keys}[[listen]]\naddress = \"127.0.0.1:0\"\n{keys}\
             [[listen]]\naddress = \"unix:{}\"\n{more}",
            unix.display()
        );
        let (host, ports) = Host::serving(vms, &sections);
        Self {
            host,
            ports,
            name,
            key,
            dir,
        }
    }

    /// Address of its TLS listener.
    pub fn address(&self) -> String {
        let path = self
            .host
            .state_dir()
            .with_file_name("run")
            .join("listen.addr");
        let addresses = fs::read_to_string(path).unwrap();
        addresses.lines().next().unwrap().to_owned()
    }

    pub fn section(&self, more: &str) -> String {
        let pin = self.key.pin.strip_prefix("cert:").unwrap();
        format!(
            "[[host]]\nname = \"{}\"\naddress = \"{}\"\npin = \"{pin}\"\n{more}",
            self.name,
            self.address()
        )
    }

    /// Tells it of another host.
    pub fn knows(&self, other: &Self, more: &str) {
        self.takes(&other.section(more));
    }

    pub fn takes(&self, section: &str) {
        let status = self.host.reload(|text| text + section);
        assert_eq!(status["error"], Value::Null, "{status}");
    }

    /// A client whose user is known.
    pub fn user(&self) -> UnixStream {
        let client = UnixStream::connect(self.dir.path().join("proxy.sock")).unwrap();
        client.set_read_timeout(Some(HANG)).unwrap();
        client
    }

    pub fn get(&self, name: &str) -> Answer {
        asked(
            self.host.proxy(),
            &format!("GET http://{name}/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"),
        )
    }

    pub fn user_get(&self, name: &str) -> Answer {
        asked(
            self.user(),
            &format!("GET http://{name}/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"),
        )
    }
}

pub fn two(
    vms_of_alpha: &[(&str, u64)],
    vms_of_beta: &[(&str, u64)],
    grants: &str,
) -> (Member, Member) {
    let alpha = Member::new("alpha", vms_of_alpha, NO_GRANTS);
    let beta = Member::new("beta", vms_of_beta, grants);
    alpha.knows(&beta, "");
    beta.knows(&alpha, "");
    (alpha, beta)
}

pub fn to_alpha(may: &str) -> String {
    grant("\"anyone\"", "\"*\"", may)
}

#[test]
fn a_vm_of_another_host_is_reached_in_every_way_and_the_answer_names_both_hosts() {
    let (alpha, beta) = two(&[("a", 3)], &[("b", 3)], &to_alpha("\"reach\", \"see\""));
    let b = beta.ports[0].connected();
    for name in ["b", "b.beta", "B.beta.adit"] {
        let served = serve(&b);
        let answer = alpha.get(name);
        assert_eq!(
            (answer.status, &*answer.body),
            (200, "ok"),
            "{name}: {}",
            answer.head
        );
        assert!(
            answer.head.contains("proxy-status: beta, alpha"),
            "{}",
            answer.head
        );
        served.join().unwrap();
    }
    let resolved = alpha.host.get("/v1/resolve/b.beta.adit");
    assert_eq!(
        (&resolved["vm"], &resolved["host"], &resolved["here"]),
        (&"b".into(), &"beta".into(), &false.into())
    );
    assert_eq!(alpha.host.api("GET", "/v1/resolve/nobody", "").status, 404);
    assert_eq!(alpha.host.api("GET", "/v1/resolve/a%2Fb", "").status, 404);
    let all = alpha.host.get("/v1/resolve");
    let all: Vec<_> = all["vms"]
        .as_array()
        .unwrap()
        .iter()
        .map(|vm| (vm["name"].as_str(), vm["host"].as_str()))
        .collect();
    assert_eq!(all, [(Some("a"), Some("alpha")), (Some("b"), Some("beta"))]);
    // A tunnel, with both ends of it.
    let mut client = alpha.host.proxy();
    client
        .write_all(b"CONNECT b:80 HTTP/1.1\r\nHost: b\r\n\r\nahead")
        .unwrap();
    let (mut guest, prefix) = b.tunnel();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        client.read_exact(&mut byte).unwrap();
        head.extend(byte);
    }
    let head = String::from_utf8(head).unwrap().to_lowercase();
    assert!(
        head.starts_with("http/1.1 200") && head.contains("proxy-status: beta, alpha"),
        "{head}"
    );
    let mut heard = prefix;
    while heard.len() < 5 {
        let mut byte = [0];
        guest.read_exact(&mut byte).unwrap();
        heard.extend(byte);
    }
    assert_eq!(heard, b"ahead");
    let many = vec![7; 4 << 20];
    let sent = many.clone();
    let sending = std::thread::spawn(move || {
        guest.write_all(&sent).unwrap();
        guest.shutdown(std::net::Shutdown::Write).unwrap();
        guest
    });
    let mut heard = Vec::new();
    client.read_to_end(&mut heard).unwrap();
    assert!(heard == many);
    client.write_all(b"bye").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    let mut guest = sending.join().unwrap();
    let mut heard = Vec::new();
    guest.read_to_end(&mut heard).unwrap();
    assert_eq!(heard, b"bye");
    // A guest that breaks off is not one that ends.
    let mut client = alpha.host.proxy();
    client
        .write_all(b"CONNECT b:80 HTTP/1.1\r\nHost: b\r\n\r\n")
        .unwrap();
    let (guest, _) = b.tunnel();
    let mut head = [0; 12];
    client.read_exact(&mut head).unwrap();
    drop(guest);
    assert!(client.read_to_end(&mut Vec::new()).is_err());
    // What is refused there is refused here in the same way.
    let refused = asked(
        alpha.host.proxy(),
        "CONNECT b:22 HTTP/1.1\r\nHost: b\r\n\r\n",
    );
    assert_eq!(refused.status, 403, "{}", refused.body);
    assert!(
        refused
            .head
            .contains("proxy-status: beta; error=http_request_denied")
            && refused.head.contains(", alpha")
    );
    assert!(
        refused.body.contains("host `beta`") && refused.body.contains("`allow`"),
        "{}",
        refused.body
    );
}

#[test]
fn clients_of_other_protocols_reach_a_vm_of_another_host_too() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let sections = listen(&format!("unix:{}", at("socks")), "socks5", "")
        + &listen(&format!("unix:{}", at("any")), "any", "to = \"b:80\"")
        + NO_GRANTS;
    let alpha = Member::new("alpha", &[("a", 3)], &sections);
    let beta = Member::new("beta", &[("b", 3)], &to_alpha("\"reach\", \"see\""));
    alpha.knows(&beta, "");
    beta.knows(&alpha, "");
    let b = beta.ports[0].connected();
    let connect = |name: &str| {
        let client = UnixStream::connect(at(name)).unwrap();
        client.set_read_timeout(Some(HANG)).unwrap();
        client
    };
    let mut socks = connect("socks");
    socks
        .write_all(b"\x05\x01\x00\x05\x01\x00\x03\x01b\x00\x50ahead")
        .unwrap();
    let (mut guest, _) = b.tunnel();
    let mut said = [0; 12];
    socks.read_exact(&mut said).unwrap();
    assert_eq!((said[1], said[3]), (0, 0));
    let mut any = connect("any");
    any.write_all(b"plain").unwrap();
    let (mut other, _) = b.tunnel();
    for (client, guest, ahead) in [
        (&mut socks, &mut guest, b"ahead"),
        (&mut any, &mut other, b"plain"),
    ] {
        let mut heard = [0; 5];
        guest.read_exact(&mut heard).unwrap();
        assert_eq!(&heard, ahead);
        guest.write_all(b"bye").unwrap();
        guest.shutdown(std::net::Shutdown::Write).unwrap();
        let mut heard = Vec::new();
        client.read_to_end(&mut heard).unwrap();
        assert_eq!(heard, b"bye");
    }
    // What is refused there: a port that is not in the list.
    let mut socks = connect("socks");
    socks
        .write_all(b"\x05\x01\x00\x05\x01\x00\x03\x01b\x00\x16")
        .unwrap();
    let mut said = [0; 4];
    socks.read_exact(&mut said).unwrap();
    assert_eq!(said[3], 2);
}

#[test]
fn r126_who_asks_counts_as_far_as_the_owner_lets_that_host_vouch_and_no_further() {
    let grants = grant("\"user:root\"", "\"b\"", "\"reach\", \"see\"");
    let (alpha, beta) = two(&[("a", 3)], &[("b", 3)], &grants);
    let b = beta.ports[0].connected();
    // Nobody vouches for alpha's users, and what alpha's own certificate is granted is nothing.
    let denied = alpha.user_get("b");
    assert_eq!(denied.status, 404, "{}", denied.body);
    let nowhere = alpha.user_get("nowhere");
    assert_eq!(nowhere.body.replace("nowhere", "b"), denied.body);
    assert!(!denied.head.contains("beta"), "{}", denied.head);
    let lines = audit(&beta.host, 1);
    assert_eq!(
        (lines[0]["via"].as_str(), lines[0]["reason"].as_str()),
        (Some("alpha"), Some("not-granted"))
    );
    // Whoever is no [[host]] claims in vain.
    let proxy = format!("http://{}", beta.host.proxy().peer_addr().unwrap());
    let claim = ["-x", &proxy, "-H", "Adit-Caller: user:root", "http://b/"];
    if let Some((code, said)) = curl(UID, &claim) {
        assert_eq!(code, 404, "{said}");
    }
    let alpha_section = alpha.section("");
    let vouched = alpha.section("vouches = [\"user:root\"]\n");
    let status = beta
        .host
        .reload(|text| text.replace(&alpha_section, &vouched));
    assert_eq!(status["error"], Value::Null);
    let served = serve(&b);
    let answer = alpha.user_get("b");
    assert_eq!(answer.status, 200, "{}", answer.body);
    let heard = String::from_utf8(served.join().unwrap())
        .unwrap()
        .to_lowercase();
    assert!(
        !heard.contains("adit-caller") && !heard.contains("proxy-authorization"),
        "{heard}"
    );
}

#[test]
fn r126_there_is_one_hop_and_a_host_has_only_what_it_may_claim() {
    let reach = to_alpha("\"reach\", \"see\"");
    let (alpha, beta) = two(&[("a", 3)], &[("b", 3)], &reach);
    let gamma = Member::new("gamma", &[("c", 3)], &reach);
    beta.knows(&gamma, "");
    gamma.knows(&beta, "");
    let _b = beta.ports[0].connected();
    let c = gamma.ports[0].connected();
    // beta reaches it, and brings nobody there.
    let served = serve(&c);
    assert_eq!(beta.get("c").status, 200);
    served.join().unwrap();
    for name in ["c", "c.gamma", "c.beta"] {
        assert_eq!(alpha.get(name).status, 404, "{name}");
    }
    // Also where alpha asks beta for it all the same.
    let (crt, key) = (alpha.dir.path().join("crt"), alpha.dir.path().join("key"));
    let (crt, key) = (crt.display().to_string(), key.display().to_string());
    let by_way_of_beta = format!("https://{}", beta.address());
    let args = [
        "-x",
        &by_way_of_beta,
        "--proxy-insecure",
        "--proxy-cert",
        &crt,
        "--proxy-key",
        &key,
    ];
    for url in ["http://c/", "http://c.gamma/"] {
        for form in ["-s", "-p"] {
            let args: Vec<&str> = args.iter().copied().chain([form, url]).collect();
            if let Some((code, said)) = curl(0, &args) {
                assert_eq!(code, 404, "{url}: {said}");
                let lines = audit(&beta.host, 1);
                let is = |line: &Value| line["reason"] == "not-here" && line["via"] == "alpha";
                assert!(lines.iter().any(is), "{lines:?}");
            }
        }
    }
    // What beta may not claim, it does not have.
    let old = beta.section("");
    alpha
        .host
        .reload(|text| text.replace(&old, &beta.section("names = [\"x-*\"]\n")));
    let answer = alpha.get("b");
    assert_eq!(answer.status, 404, "{}", answer.body);
    alpha.host.until("it is logged", |host| {
        host.log()
            .contains("claims a VM that its `names` does not have")
            .then_some(())
    });
    assert_eq!(alpha.get("b.beta").status, 404);
}

#[test]
fn many_who_ask_for_a_vm_at_once_all_wait_for_the_first_answer() {
    let (alpha, beta) = two(&[("a", 3)], &[("b", 3)], &to_alpha("\"reach\", \"see\""));
    // What is refused by the host that has it: it was found.
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let asked = "CONNECT b:22 HTTP/1.1\r\nHost: b\r\n\r\n";
                let refused = asked_of(&alpha, asked);
                assert_eq!(refused.status, 403, "{}", refused.body);
            });
        }
    });
    drop(beta);
}

fn asked_of(member: &Member, request: &str) -> Answer {
    asked(member.host.proxy(), request)
}

#[test]
fn r126_the_owners_word_counts_where_the_map_is_stale() {
    let (alpha, beta) = two(&[("a", 3)], &[("b", 3)], &to_alpha("\"reach\", \"see\""));
    let b = beta.ports[0].connected();
    let served = serve(&b);
    assert_eq!(alpha.get("b").status, 200);
    served.join().unwrap();
    beta.host
        .reload(|text| text.replace("name = \"b\"", "name = \"moved\""));
    let answer = alpha.get("b");
    assert_eq!(answer.status, 404, "{}", answer.body);
    assert!(
        answer.body.contains("no VM is named `b`"),
        "{}",
        answer.body
    );
    let lines = audit(&beta.host, 1);
    assert_eq!(
        (lines[0]["via"].as_str(), lines[0]["reason"].as_str()),
        (Some("alpha"), Some("not-here"))
    );
}

#[test]
fn a_name_that_two_hosts_have_is_the_live_ones_and_of_two_live_ones_nobodys() {
    let reach = to_alpha("\"reach\", \"see\"");
    let alpha = Member::new("alpha", &[("a", 3)], &reach);
    let beta = Member::new("beta", &[("a", 3)], &reach);
    alpha.knows(&beta, "");
    beta.knows(&alpha, "");
    let there = beta.ports[0].connected();
    // alpha's entry is dead.
    let served = serve(&there);
    let answer = alpha.get("a");
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert!(answer.head.contains("proxy-status: beta, alpha"));
    served.join().unwrap();
    let here = alpha.ports[0].connected();
    let answer = alpha.host.until("both are known", |_| {
        let answer = alpha.get("a");
        (answer.status == 409).then_some(answer)
    });
    assert!(
        answer.body.contains("`alpha` and `beta`") && answer.body.contains("a.alpha"),
        "{}",
        answer.body
    );
    for _ in 0..5 {
        assert_eq!(alpha.get("a").status, 409);
    }
    let resolved = alpha.host.get("/v1/resolve/a");
    assert_eq!(resolved["host"], Value::Null);
    let hosts = resolved["claims"].as_array().unwrap().iter();
    let hosts: Vec<_> = hosts.map(|claim| claim["host"].as_str().unwrap()).collect();
    assert_eq!(hosts, ["alpha", "beta"]);
    for member in [&alpha, &beta] {
        let shown = member.host.until("both see it", |host| {
            let shown = host.get("/v1/vms/a");
            shown["faults"]
                .as_array()
                .unwrap()
                .iter()
                .any(|fault| fault["kind"] == "name")
                .then_some(shown)
        });
        assert!(
            shown["fault"]
                .as_str()
                .unwrap()
                .contains("`alpha` and `beta`"),
            "{shown}"
        );
    }
    for (name, control) in [("a.alpha", &here), ("a.beta", &there)] {
        let served = serve(control);
        assert_eq!(alpha.get(name).status, 200, "{name}");
        served.join().unwrap();
    }
}

#[test]
fn r70_a_host_that_is_not_the_one_that_is_meant_is_not_spoken_to_and_the_log_says_why() {
    let reach = to_alpha("\"reach\", \"see\"");
    let alpha = Member::new("alpha", &[("a", 3)], NO_GRANTS);
    let rogue =
        |change: fn(&mut CertificateParams)| Member::with("beta", &[("b", 3)], &reach, change);
    let plain = rogue(|_| {});
    let other = own(&["beta"], |_| {});
    let wrong_pin = plain.section("").replace(
        plain.key.pin.strip_prefix("cert:").unwrap(),
        other.pin.strip_prefix("cert:").unwrap(),
    );
    let late = rogue(expired);
    let named = rogue(|params| {
        params.subject_alt_names = vec![rcgen::SanType::DnsName("gamma".try_into().unwrap())];
    });
    let mut before = String::new();
    for (section, why) in [
        (wrong_pin, "its key is another than the `pin`"),
        (late.section(""), "its certificate has expired"),
        (named.section(""), "its certificate is for another name"),
    ] {
        let status = alpha
            .host
            .reload(|text| text.replace(&before, "") + &section);
        assert_eq!(status["error"], Value::Null, "{status}");
        let answer = alpha.get("b");
        // What it has is not known.
        assert_eq!(answer.status, 503, "{why}: {}", answer.body);
        // Of many lines of a kind in a second there is one.
        alpha.host.until(why, |host| {
            assert_eq!(alpha.get("b").status, 503, "{why}");
            host.log().contains(why).then_some(())
        });
        before = section;
    }
    // The right one.
    let status = alpha
        .host
        .reload(|text| text.replace(&before, "") + &plain.section(""));
    assert_eq!(status["error"], Value::Null, "{status}");
    plain.knows(&alpha, "");
    let b = plain.ports[0].connected();
    let served = serve(&b);
    assert_eq!(alpha.get("b").status, 200);
    served.join().unwrap();
}

#[test]
fn a_vm_that_a_silent_host_may_have_is_not_said_to_be_nowhere_and_nobody_learns_more_than_before() {
    let sees = grant("\"user:root\"", "\"b\"", "\"see\"");
    let alpha = Member::new("alpha", &[("a", 3), ("hidden", 4)], &sees);
    let mut beta = Member::new("beta", &[("b", 3)], &to_alpha("\"reach\", \"see\""));
    let section = beta.section("");
    let of_others = beta.section("names = [\"db-*\"]\n");
    alpha.takes(&section);
    beta.host.terminate();
    assert!(beta.host.ended());
    let head = |answer: &Answer| answer.head.to_lowercase();
    for name in ["b", "b.beta"] {
        let answer = alpha.user_get(name);
        assert_eq!(answer.status, 503, "{name}: {}", answer.body);
        let said = head(&answer);
        assert!(said.contains("retry-after: 1") && said.contains("error=destination_unavailable"));
        assert!(answer.body.contains("`beta`"), "{}", answer.body);
        assert_eq!(answer.body.lines().count(), 2, "{}", answer.body);
        let found = alpha.host.api("GET", &format!("/v1/resolve/{name}"), "");
        assert_eq!(found.status, 503, "{}", found.body);
        assert!(found.body.contains("silent-host") && found.body.contains("beta"));
    }
    // Whoever may not see a name hears of no host, and the same of a VM that is here and of one that is not.
    let (hidden, none) = (alpha.user_get("hidden"), alpha.user_get("nobody"));
    assert_eq!((hidden.status, none.status), (503, 503), "{}", hidden.body);
    assert_eq!(hidden.body.replace("hidden", "nobody"), none.body);
    let fields = |answer: &Answer| {
        let lines = answer.head.lines();
        lines
            .filter(|line| !line.starts_with("Date:") && !line.starts_with("Content-Length:"))
            .collect::<Vec<_>>()
            .join("\n")
    };
    assert_eq!(fields(&hidden).replace("hidden", "nobody"), fields(&none));
    assert!(!hidden.body.contains("beta"), "{}", hidden.body);
    // What it may not claim, it does not have.
    let status = alpha.host.reload(|text| text.replace(&section, &of_others));
    assert_eq!(status["error"], Value::Null, "{status}");
    assert_eq!(alpha.user_get("b").status, 404);
}

#[test]
fn a_vm_that_another_host_has_is_not_on_this_one_and_the_answer_says_where() {
    let (alpha, _beta) = two(&[("a", 3)], &[("b", 3)], &to_alpha("\"see\""));
    alpha.host.until("beta answers", |host| {
        (host.api("GET", "/v1/resolve/b", "").status == 200).then_some(())
    });
    let answer = alpha.host.api("GET", "/v1/resolve/b.alpha", "");
    assert_eq!(answer.status, 404, "{}", answer.body);
    let said: Value = serde_json::from_str(&answer.body).unwrap();
    let message = said["message"].as_str().unwrap();
    assert!(
        said["code"] == "unknown-vm" && message.contains("`beta`"),
        "{said}"
    );
    // The audit has the host that was meant.
    assert_eq!(alpha.user_get("b.alpha").status, 404);
    let lines = audit(&alpha.host, 1);
    assert_eq!(lines[0]["vm"], "b.alpha", "{lines:?}");
}

#[test]
fn dns_answers_with_the_host_that_runs_a_vm_and_says_no_only_when_every_host_has() {
    let sections = listen(
        "127.0.0.1:0",
        "dns",
        "network = \"lab\"\nanswer = [\"192.0.2.1\"]",
    ) + &grant("\"network:lab\"", "\"b*\", \"a\", \"x\"", "\"see\"");
    let alpha = Member::new("alpha", &[("a", 3)], &sections);
    let beta = Member::new("beta", &[("b", 3), ("hidden", 4), ("a", 5)], NO_GRANTS);
    alpha.knows(&beta, "");
    beta.knows(&alpha, "");
    let path = alpha.host.state_dir().with_file_name("run/listen.addr");
    let listeners = fs::read_to_string(path).unwrap();
    let dns = listeners.lines().last().unwrap().parse().unwrap();
    let of = |name: &str| {
        let addresses = addresses(dns, name, RecordType::A).into_iter();
        addresses
            .map(|ip| ip.to_string())
            .collect::<Vec<_>>()
            .join(" ")
    };
    let (here, there) = ("192.0.2.1", "127.0.0.1");
    for (name, is) in [
        ("b.adit", there),
        ("b.beta.adit", there),
        ("beta.adit", there),
        ("alpha.adit", here),
        ("a.alpha.adit", here),
        ("a.beta.adit", there),
        // beta has it, and the network may not see it.
        ("hidden.adit", ""),
        ("hidden.beta.adit", ""),
        ("x.adit", ""),
    ] {
        assert_eq!(of(name), is, "{name}");
    }
    let code = |name: &str| ask(dns, name, RecordType::AAAA).response_code;
    assert_eq!(
        code("b.adit"),
        ResponseCode::NoError,
        "it has no address of that kind"
    );
    for name in ["x.adit", "hidden.adit", "b.alpha.adit", "b.gamma.adit"] {
        assert_eq!(code(name), ResponseCode::NXDomain, "{name}");
    }
    // Both hosts have `a`; the guest of one runs.
    let _there = beta.ports[2].connected();
    alpha.host.until("it is where its guest runs", |_| {
        (of("a.adit") == there).then_some(())
    });
    let _here = alpha.ports[0].connected();
    alpha.host.until("neither has it alone", |_| {
        let answer = ask(dns, "a.adit", RecordType::A);
        assert_eq!(answer.response_code, ResponseCode::NoError);
        answer.answers.is_empty().then_some(())
    });
    // A host that does not answer has not said no: nobody is to keep that.
    drop(beta);
    alpha.host.until("what it said is old", |_| {
        (code("bx.adit") == ResponseCode::ServFail).then_some(())
    });
    assert_eq!(code("hidden.adit"), ResponseCode::NXDomain);
    assert_eq!(of("a.alpha.adit"), here);
}

#[test]
fn a_file_says_where_a_vm_is_whether_that_host_answers_or_not_and_is_read_again() {
    let sections = listen("127.0.0.1:0", "dns", "") + &grant("\"anyone\"", "\"b\"", "\"see\"");
    let alpha = Member::new("alpha", &[("a", 3)], &sections);
    let beta = Member::new("beta", &[("b", 3)], NO_GRANTS);
    let section = beta.section("");
    // Nobody can ask it.
    drop(beta);
    let path = alpha.host.state_dir().with_file_name("run/listen.addr");
    let listeners = fs::read_to_string(path).unwrap();
    let dns = listeners.lines().last().unwrap().parse().unwrap();
    let code = || ask(dns, "b.adit", RecordType::A).response_code;
    let map = alpha.dir.path().join("vms.map");
    fs::write(&map, "b beta # and nothing else\n").unwrap();
    let line = format!("[peers]\nmap = \"{}\"\n", map.display());
    let status = alpha
        .host
        .reload(|text| text.replace("[peers]\n", &line) + &section);
    assert_eq!(status["error"], Value::Null, "{status}");
    let there = || addresses(dns, "b.adit", RecordType::A).len() == 1;
    assert!(there());
    // A list of all hosts has the row, and says whose it is.
    let all = alpha.host.get("/v1/resolve");
    let row = json!({"name": "b", "host": "beta", "live": false, "generation": null, "locked": false, "by_map_of": "alpha"});
    assert_eq!(all["vms"][1], row, "{all}");
    assert_eq!(all["vms"][0].get("by_map_of"), None, "{all}");
    assert_eq!(all["silent"][0]["host"], "beta", "{all}");
    // A mistake changes nothing.
    fs::write(&map, "# hosts\nb gamma\n").unwrap();
    let status = alpha.host.reload(|text| text);
    let why = status["error"].as_str().unwrap();
    assert!(why.contains("line 2") && why.contains("`map`"), "{why}");
    assert!(there());
    fs::write(&map, "# nobody\n").unwrap();
    let status = alpha.host.reload(|text| text);
    assert_eq!(status["error"], Value::Null, "{status}");
    assert_eq!(code(), ResponseCode::ServFail);
}

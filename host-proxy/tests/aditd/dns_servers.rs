//! The DNS servers that a site has already, with the lines that docs/operate.md gives them: they ask aditd for names of VMs, and answer
//! clients by what it says.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType;

use crate::access::{grant, listen, other};
use crate::dns::{addresses, asked_once};
use crate::host::Host;

/// Where the pages have aditd.
const DOCUMENTED: &str = "192.0.2.1";
/// Private ones, which such servers may refuse to pass on.
const V4: &str = "10.9.8.7";
const V6: &str = "fd00::9";

/// A server of DNS. Drop ends it.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn started() -> (Host, SocketAddr) {
    let lab = format!("network = \"lab\"\nanswer = [\"{V4}\", \"{V6}\"]");
    let more = listen("127.0.0.1:0", "dns", &lab) + &grant("\"network:lab\"", "\"a*\"", "\"see\"");
    let (host, _ports) = Host::serving(
        &[("a", 3), ("b", 4)],
        &format!("[names]\nhost = \"alpha\"\n{more}"),
    );
    let at = other(&host).parse().unwrap();
    (host, at)
}

/// The block of the page that has this line, as it is for an aditd somewhere else.
fn documented(line: &str, at: &str) -> String {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/operate.md");
    let page = fs::read_to_string(page).unwrap();
    let blocks = page.split("\n```").skip(1).step_by(2);
    let mut found = blocks.filter(|block| block.contains(line));
    let (Some(block), None) = (found.next(), found.next()) else {
        panic!("not one block has `{line}`");
    };
    let (_language, text) = block.split_once('\n').unwrap();
    text.replace(DOCUMENTED, at) + "\n"
}

/// An address of this machine that no other process has: its last numbers are this one's.
fn own_address(nth: u8) -> IpAddr {
    let [_, _, high, low] = std::process::id().to_be_bytes();
    [127, 200 + nth, high, low].into()
}

/// Starts a program that serves DNS there. None: it is not installed.
fn serves(program: &str, args: &[&str], at: SocketAddr, host: &Host) -> Option<Server> {
    let is_there = ["/usr/sbin", "/usr/bin"]
        .iter()
        .any(|dir| Path::new(dir).join(program).exists());
    if !is_there {
        eprintln!("skipped: {program} is not installed");
        return None;
    }
    let log = fs::File::create(host.state_dir().join(program)).unwrap();
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL", "--", program])
        .args(args)
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log);
    let mut server = Server(command.spawn().unwrap());
    host.until("it answers", |host| {
        if let Some(status) = server.0.try_wait().unwrap() {
            let said = fs::read_to_string(host.state_dir().join(program)).unwrap();
            panic!("{program} has ended, {status}: {said}");
        }
        let answer = asked_once(at, "a.adit", RecordType::A);
        answer.filter(|answer| !answer.answers.is_empty())
    });
    Some(server)
}

/// What every client of such a server is to hear, more than once: the server keeps answers.
fn answers(at: SocketAddr, aditd: &Host) {
    let code = |name: &str, of: RecordType| asked_once(at, name, of).unwrap().response_code;
    for _ in 0..2 {
        for name in ["a.adit", "A.alpha.ADIT", "alpha.adit", "vsock-5000.a.adit"] {
            let found = addresses(at, name, RecordType::A);
            assert_eq!(found, [V4.parse::<IpAddr>().unwrap()], "{name}");
            let found = addresses(at, name, RecordType::AAAA);
            assert_eq!(found, [V6.parse::<IpAddr>().unwrap()], "{name}");
        }
        // Not there, and not to be seen: alike.
        for name in ["x.adit", "b.adit", "web.b.svc.adit"] {
            assert_eq!(code(name, RecordType::A), ResponseCode::NXDomain, "{name}");
        }
        assert_eq!(code("a.adit", RecordType::MX), ResponseCode::NoError);
        assert!(addresses(at, "a.adit", RecordType::MX).is_empty());
    }
    // What has changed is said once what is kept is too old: a name that nobody has asked for is at once.
    let status = aditd.reload(|text| text.replace("\"a*\"", "\"b\""));
    assert_eq!(status["error"], serde_json::Value::Null, "{status}");
    assert_eq!(addresses(at, "b.alpha.adit", RecordType::A).len(), 1);
    assert_eq!(
        code("vsock-7.a.adit", RecordType::A),
        ResponseCode::NXDomain
    );
}

fn file(host: &Host, name: &str, text: &str) -> PathBuf {
    let path = host.state_dir().join(name);
    fs::write(&path, text).unwrap();
    path
}

#[test]
fn dnsmasq_asks_aditd_for_names_of_vms_by_the_lines_of_the_page() {
    let (host, aditd) = started();
    let at = SocketAddr::new(own_address(0), 5353);
    let lines = documented("server=/adit/", &format!("{}#{}", aditd.ip(), aditd.port()));
    assert!(lines.contains("rebind-domain-ok=/adit/"), "{lines}");
    let config = file(&host, "dnsmasq.conf", &format!("{lines}stop-dns-rebind\n"));
    let (config, listen) = (
        format!("--conf-file={}", config.display()),
        format!("--listen-address={}", at.ip()),
    );
    let args = [
        "--keep-in-foreground",
        "--no-resolv",
        "--no-hosts",
        "--bind-interfaces",
        "--port=5353",
        "--user=",
        "--pid-file=",
        "--log-facility=-",
        &config,
        &listen,
    ];
    let Some(_server) = serves("dnsmasq", &args, at, &host) else {
        return;
    };
    answers(at, &host);
    // It has nobody to ask for what is outside.
    let refused = asked_once(at, "example.com", RecordType::A).unwrap();
    assert_eq!(refused.response_code, ResponseCode::Refused);
}

#[test]
fn unbound_asks_aditd_for_names_of_vms_by_the_lines_of_the_page() {
    let (host, aditd) = started();
    let at = SocketAddr::new(own_address(1), 5353);
    let lines = documented("stub-zone:", &format!("{}@{}", aditd.ip(), aditd.port()));
    // It believes the root's key, as Debian has it do, has no private address from outside, and asks in letters of both cases.
    let more = format!(
        "server:\n    interface: {}\n    port: {}\n    chroot: \"\"\n    username: \"\"\n    pidfile: \"\"\n    directory: \"{}\"\n    \
         use-syslog: no\n    do-daemonize: no\n    num-threads: 1\n    use-caps-for-id: yes\n    private-address: 10.0.0.0/8\n    \
         private-address: fd00::/8\n    trust-anchor: \". DS 20326 8 2 \
         E06D44B80B8F1D39A95C0B0D7C65D08458E880409BBC683457104237C7F8EC8D\"\n\
         remote-control:\n    control-enable: no\n",
        at.ip(),
        at.port(),
        host.state_dir().display()
    );
    let config = file(&host, "unbound.conf", &format!("{more}{lines}"));
    let config = config.display().to_string();
    let Some(_server) = serves("unbound", &["-d", "-c", &config], at, &host) else {
        return;
    };
    answers(at, &host);
}

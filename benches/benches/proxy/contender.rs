//! Whoever carries: ours, relays of Debian, and nobody at all.

use std::fmt::Write as _;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Stdio;
use std::sync::Arc;

use adit_tests::process::{Reaped, bound, wait_for};
use anyhow::Context;
use rustls::ClientConfig;

use crate::client::{Client, trusting};
use crate::host::{Host, SOON, Target, name};

/// The name of ours.
pub const OURS: &str = "adit";
/// The relay that ours is judged by.
pub const HAPROXY: &str = "haproxy";

/// One of those that are compared.
pub struct Contender {
    /// Its name.
    pub name: &'static str,
    /// Where bytes for the server go.
    pub plain: SocketAddr,
    /// The same in TLS.
    pub tls: Option<(SocketAddr, Arc<ClientConfig>)>,
    /// Where HTTP requests for the server go.
    pub http: Option<SocketAddr>,
    /// It wants CONNECT first, to this.
    pub tunnel: Option<String>,
    _process: Option<Reaped>,
}

impl Contender {
    /// A connection to the server. It begins with these bytes.
    pub fn open(&self, tls: bool, first: &[u8]) -> anyhow::Result<Client> {
        use std::io::Write;
        let mut client = match (tls, &self.tls) {
            (false, _) => Client::connect(self.plain, None)?,
            (true, Some((to, config))) => Client::connect(*to, Some(config))?,
            (true, None) => anyhow::bail!("{} speaks no TLS here", self.name),
        };
        match &self.tunnel {
            Some(to) => client.tunnel(to, first)?,
            None => client.write_all(first)?,
        }
        Ok(client)
    }
}

impl Contender {
    /// A connection that has asked for a tunnel, and waits for no answer.
    pub fn dial(&self) -> anyhow::Result<Client> {
        use std::io::Write;
        let mut client = Client::connect(self.plain, None)?;
        let to = self.tunnel.as_deref().context("it takes no CONNECT")?;
        write!(client, "CONNECT {to} HTTP/1.1\r\nHost: {to}\r\n\r\n")?;
        Ok(client)
    }
}

/// The server itself.
pub fn nobody(target: &Target) -> Contender {
    let to = SocketAddr::from(([127, 0, 0, 1], target.port));
    Contender {
        name: "nobody",
        plain: to,
        tls: None,
        http: Some(to),
        tunnel: None,
        _process: None,
    }
}

/// Ours, to VM number `n`.
pub fn ours(host: &Host, target: &Target, n: usize) -> anyhow::Result<Contender> {
    let ours = Contender {
        name: OURS,
        plain: host.plain,
        tls: Some((host.tls, trusting(&host.certificate)?)),
        http: Some(host.plain),
        tunnel: Some(format!("{}:{}", name(n), target.port)),
        _process: None,
    };
    // The agent may not be there yet.
    wait_for("a first tunnel", SOON, || Ok(ours.open(false, b"e").ok()))
        .with_context(|| host.log())?;
    Ok(ours)
}

/// haproxy in front of another, which asks for a certificate as hosts do among themselves.
pub fn two_haproxies(host: &Host, target: &Target) -> anyhow::Result<(Contender, Reaped)> {
    let (near, far) = (free()?, free()?);
    let (pem, to) = (host.pem.display(), target.port);
    let rest = "global\n nbthread 1\n tune.bufsize 65536\n maxconn 4000\n\
                defaults\n timeout connect 5s\n timeout client 1h\n timeout server 1h\n mode tcp\n";
    let second = format!(
        "{rest}listen far\n bind 127.0.0.1:{far} ssl crt {pem} verify required ca-file {pem}\n server s 127.0.0.1:{to}\n"
    );
    let first = format!(
        "{rest}listen near\n bind 127.0.0.1:{near}\n \
         server s 127.0.0.1:{far} ssl crt {pem} verify required ca-file {pem}\n"
    );
    let second = file(host, "second.cfg", &second)?;
    let second = start(HAPROXY, &["-db", "-f", &second], far)?;
    let first = file(host, "first.cfg", &first)?;
    let first = start(HAPROXY, &["-db", "-f", &first], near)?;
    let contender = Contender {
        name: HAPROXY,
        plain: at(near),
        tls: None,
        http: None,
        tunnel: None,
        _process: Some(first),
    };
    Ok((contender, second))
}

/// The relays that are installed.
pub fn relays(host: &Host, target: &Target) -> Vec<Contender> {
    type Start = fn(&Host, &Target) -> anyhow::Result<Contender>;
    let all: [(&'static str, Start); 4] = [
        (HAPROXY, haproxy),
        ("socat", socat),
        ("nginx stream", nginx),
        ("tinyproxy", tinyproxy),
    ];
    let mut there = Vec::new();
    for (name, start) in all {
        match start(host, target) {
            Ok(relay) => there.push(relay),
            Err(e) => eprintln!("skipped: {name}: {e:#}"),
        }
    }
    there
}

/// A port that was free just now: relays cannot say which one the kernel chose.
fn free() -> anyhow::Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

fn at(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

/// Starts a program and waits until it listens.
fn start(program: &str, args: &[&str], port: u16) -> anyhow::Result<Reaped> {
    let child = bound(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot start {program}"))?;
    let process = Reaped(child);
    wait_for(program, SOON, || Ok(TcpStream::connect(at(port)).ok()))?;
    Ok(process)
}

/// A configuration file beside the host's.
fn file(host: &Host, name: &str, text: &str) -> anyhow::Result<String> {
    let path = host.pem.with_file_name(name);
    std::fs::write(&path, text)?;
    Ok(path.display().to_string())
}

fn haproxy(host: &Host, target: &Target) -> anyhow::Result<Contender> {
    let (plain, tls, http) = (free()?, free()?, free()?);
    let mut config = String::from(
        "global\n nbthread 1\n tune.bufsize 65536\n maxconn 4000\n\
         defaults\n timeout connect 5s\n timeout client 1h\n timeout server 1h\n",
    );
    let (pem, to) = (host.pem.display(), target.port);
    write!(
        config,
        "listen plain\n mode tcp\n bind 127.0.0.1:{plain}\n server s 127.0.0.1:{to}\n\
         listen tls\n mode tcp\n bind 127.0.0.1:{tls} ssl crt {pem}\n server s 127.0.0.1:{to}\n\
         listen http\n mode http\n http-reuse always\n bind 127.0.0.1:{http}\n server s 127.0.0.1:{to}\n"
    )?;
    let path = file(host, "haproxy.cfg", &config)?;
    let process = start(HAPROXY, &["-db", "-f", &path], plain)?;
    Ok(Contender {
        name: HAPROXY,
        plain: at(plain),
        tls: Some((at(tls), trusting(&host.certificate)?)),
        http: Some(at(http)),
        tunnel: None,
        _process: Some(process),
    })
}

fn socat(_: &Host, target: &Target) -> anyhow::Result<Contender> {
    let plain = free()?;
    let listen = format!("TCP-LISTEN:{plain},bind=127.0.0.1,reuseaddr,fork,backlog=512,nodelay");
    let to = format!("TCP:127.0.0.1:{},nodelay", target.port);
    let process = start("socat", &["-b", "65536", &listen, &to], plain)?;
    Ok(Contender {
        name: "socat",
        plain: at(plain),
        tls: None,
        http: None,
        tunnel: None,
        _process: Some(process),
    })
}

fn nginx(host: &Host, target: &Target) -> anyhow::Result<Contender> {
    let (plain, tls, http) = (free()?, free()?, free()?);
    let dir = host.pem.with_file_name("nginx");
    std::fs::create_dir_all(&dir)?;
    let (dir, pem, to) = (dir.display(), host.pem.display(), target.port);
    let config = format!(
        "load_module /usr/lib/nginx/modules/ngx_stream_module.so;\ndaemon off;\nmaster_process off;\nworker_processes 1;\n\
         pid {dir}/pid;\nerror_log {dir}/error.log;\nevents {{ worker_connections 20000; }}\n\
         stream {{ proxy_buffer_size 64k;\n server {{ listen 127.0.0.1:{plain}; proxy_pass 127.0.0.1:{to}; tcp_nodelay on; }}\n\
         server {{ listen 127.0.0.1:{tls} ssl; ssl_certificate {pem}; ssl_certificate_key {pem}; proxy_pass 127.0.0.1:{to}; }} }}\n\
         http {{ access_log off; keepalive_requests 100000000; upstream s {{ server 127.0.0.1:{to}; keepalive 64; keepalive_requests 100000000; }}\n\
         server {{ listen 127.0.0.1:{http}; location / {{ proxy_pass http://s; proxy_http_version 1.1; proxy_set_header Connection \"\"; }} }} }}\n"
    );
    let path = file(host, "nginx.conf", &config)?;
    let process = start("nginx", &["-p", &dir.to_string(), "-c", &path], plain)?;
    Ok(Contender {
        name: "nginx stream",
        plain: at(plain),
        tls: Some((at(tls), trusting(&host.certificate)?)),
        http: Some(at(http)),
        tunnel: None,
        _process: Some(process),
    })
}

fn tinyproxy(host: &Host, target: &Target) -> anyhow::Result<Contender> {
    let plain = free()?;
    let config = format!(
        "Port {plain}\nListen 127.0.0.1\nTimeout 3600\nMaxClients 2000\nLogLevel Critical\nLogFile \"/dev/null\"\n"
    );
    let path = file(host, "tinyproxy.conf", &config)?;
    let process = start("tinyproxy", &["-d", "-c", &path], plain)?;
    Ok(Contender {
        name: "tinyproxy",
        plain: at(plain),
        tls: None,
        http: None,
        tunnel: Some(format!("127.0.0.1:{}", target.port)),
        _process: Some(process),
    })
}

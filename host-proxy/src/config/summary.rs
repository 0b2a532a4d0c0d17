//! What a configuration makes aditd serve, for people.

use std::fmt::Write as _;
use std::net::SocketAddr;

use super::access::{Role, SPEAKS};
use super::{Address, Config, is_for_this_host};

impl Config {
    /// Returns some lines that say what is served, where, and from where.
    pub fn summary(&self) -> String {
        let api = self.api_socket();
        let metrics = match &self.metrics {
            Some(metrics) => format!("{}, and the API socket", shown(metrics.listen, false)),
            None => "the API socket only".into(),
        };
        let uids = match self.ports.uids {
            Some(uids) => format!("users {uids}, one for each VM"),
            None => format!("users {}, if aditd is root", super::UidRange::default()),
        };
        let mut text = String::new();
        let listens = self.listen.iter().map(|listen| {
            let address = match &listen.address {
                Address::Tcp(at) => shown(*at, listen.cert.is_some()),
                unix => unix.to_string(),
            };
            let to = listen.to.as_ref().map(|to| format!(" to {to}"));
            let speak = match listen.role {
                Role::Proxy => SPEAKS[listen.speak as usize],
                Role::Management => "the API",
            };
            let device = listen.device.as_ref().map(|device| format!(" by {device}"));
            let device = device.unwrap_or_default();
            let over = match listen.cert {
                Some(_) => " over TLS",
                None => "",
            };
            (
                "listener",
                format!("{address}{device}, {speak}{over}{}", to.unwrap_or_default()),
            )
        });
        for (what, value) in listens.chain([
            ("proxy", shown(self.proxy.listen, false)),
            ("metrics", metrics),
            ("API socket", api.display().to_string()),
            (
                "database",
                self.state_dir.join("aditd.db").display().to_string(),
            ),
            ("port processes", uids),
            (
                "worker",
                self.worker.user.clone().map_or_else(
                    || "user `adit` or one of the same, if aditd is root".into(),
                    |user| format!("user `{user}`"),
                ),
            ),
            ("grants", match self.grant.len() {
                0 => "none: nobody reaches a VM over the proxy. To let root do so, write:\n\n    \
                      [[grant]]\n    to = [\"user:root\"]\n    vms = [\"*\"]\n    may = [\"reach\", \"see\"]\n\n  \
                      and to let every local user and program, as before there were grants, \"anyone\" in place of it".into(),
                n => n.to_string(),
            }),
            ("VMs", self.vm.len().to_string()),
        ]) {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "  {what:<15} {value}");
        }
        let width = self.vm.iter().map(|vm| vm.name.as_str().len()).max();
        let width = width.unwrap_or_default();
        for vm in &self.vm {
            let _ = write!(text, "    {:<width$}  cid {}, ", vm.name.as_str(), vm.cid);
            let lists = [
                ("TCP", list(&vm.allow)),
                ("vsock", list(&vm.allow_vsock)),
                ("services", list(&vm.allow_services)),
            ];
            let given: Vec<_> = lists
                .into_iter()
                .filter(|(_, ports)| !ports.is_empty())
                .map(|(kind, ports)| format!("{kind} {ports}"))
                .collect();
            let _ = match given.is_empty() {
                true => writeln!(text, "no port may be reached"),
                false => writeln!(text, "{}", given.join("; ")),
            };
        }
        text
    }
}

/// An address, and who else than this host's users is served there.
fn shown(listen: SocketAddr, tls: bool) -> String {
    match (is_for_this_host(listen), tls) {
        (true, _) => listen.to_string(),
        (false, true) => format!("{listen} (other machines)"),
        (false, false) => format!("{listen} (other machines, unencrypted)"),
    }
}

fn list(ports: &[impl ToString]) -> String {
    let ports: Vec<_> = ports.iter().map(ToString::to_string).collect();
    ports.join(", ")
}

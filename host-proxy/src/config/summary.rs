//! What a configuration makes aditd serve, for people.

use std::fmt::Write as _;
use std::net::SocketAddr;

use super::{Config, is_for_this_host};

impl Config {
    /// Returns some lines that say what is served, where, and from where.
    pub fn summary(&self) -> String {
        let api = self.api_socket();
        let metrics = match &self.metrics {
            Some(metrics) => format!("{}, and the API socket", shown(metrics.listen)),
            None => "the API socket only".into(),
        };
        let uids = match self.ports.uids {
            Some(uids) => format!("users {uids}, one for each VM"),
            None => format!("users {}, if aditd is root", super::UidRange::default()),
        };
        let mut text = String::new();
        for (what, value) in [
            ("proxy", shown(self.proxy.listen)),
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
            ("VMs", self.vm.len().to_string()),
        ] {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "  {what:<15} {value}");
        }
        let width = self.vm.iter().map(|vm| vm.name.as_str().len()).max();
        let width = width.unwrap_or_default();
        for vm in &self.vm {
            let _ = write!(text, "    {:<width$}  cid {}, ", vm.name.as_str(), vm.cid);
            let lists = [("TCP", list(&vm.allow)), ("vsock", list(&vm.allow_vsock))];
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
fn shown(listen: SocketAddr) -> String {
    match is_for_this_host(listen) {
        true => listen.to_string(),
        false => format!("{listen} (other machines, without a login)"),
    }
}

fn list(ports: &[impl ToString]) -> String {
    let ports: Vec<_> = ports.iter().map(ToString::to_string).collect();
    ports.join(", ")
}

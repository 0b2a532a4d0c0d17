//! Connections to other hosts. The worker can make no socket; it names a host of the configuration, and gets a connection to that
//! one's address. Whoever has taken the worker over reaches these addresses, and no other.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use adit_names::VmId;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::privileged::NotDone;
use crate::config::Config;

/// How long a host may take to accept.
const LIMIT: Duration = Duration::from_secs(3);
/// Connections that are being made at the same time.
const UNDER_WAY_MAX: usize = 64;

/// Where other hosts are.
#[derive(Debug)]
pub struct Outward {
    hosts: Mutex<BTreeMap<VmId, SocketAddr>>,
    under_way: Semaphore,
}

impl Default for Outward {
    fn default() -> Self {
        Self {
            hosts: Mutex::default(),
            under_way: Semaphore::new(UNDER_WAY_MAX),
        }
    }
}

impl Outward {
    /// Connects to those of this configuration from now on.
    pub fn set(&self, config: &Config) {
        let hosts = config.host.iter();
        *self.hosts() = hosts
            .map(|host| (host.name.clone(), host.address))
            .collect();
    }

    /// Connects to a host.
    ///
    /// # Errors
    /// It is none of the configuration, or does not accept.
    pub async fn connect(&self, host: &VmId) -> Result<OwnedFd, NotDone> {
        let address = self.hosts().get(host).copied();
        let none = || {
            io::Error::new(
                io::ErrorKind::NotFound,
                format!("there is no [[host]] `{host}`"),
            )
        };
        let address = address.ok_or_else(none)?;
        let wrong = |e: io::Error| io::Error::new(e.kind(), format!("{address}: {e}"));
        let Ok(_under_way) = self.under_way.try_acquire() else {
            return Err(
                io::Error::other("too many connections are being made to other hosts").into(),
            );
        };
        let connected = timeout(LIMIT, TcpStream::connect(address)).await;
        let connected = connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        let connected = connected.and_then(TcpStream::into_std).map_err(wrong)?;
        Ok(connected.into())
    }

    fn hosts(&self) -> MutexGuard<'_, BTreeMap<VmId, SocketAddr>> {
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[tokio::test]
    async fn only_a_host_of_the_configuration_is_connected_to_and_only_as_it_is_now() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let text = format!(
            "[[host]]\nname = \"b\"\naddress = \"{address}\"\npin = \"sha256/47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=\"\n"
        );
        let config = Config::parse(Path::new("a.toml"), &text).unwrap();
        let (outward, b, c) = (
            Outward::default(),
            "b".parse().unwrap(),
            "c".parse().unwrap(),
        );
        assert!(outward.connect(&b).await.is_err());
        outward.set(&config);
        outward.connect(&b).await.unwrap();
        assert!(outward.connect(&c).await.is_err());
        drop(listener);
        let refused = outward.connect(&b).await.unwrap_err().to_string();
        assert!(refused.contains(&address.to_string()), "{refused}");
        outward.set(&Config::default());
        assert!(outward.connect(&b).await.is_err());
    }
}

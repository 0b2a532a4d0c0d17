//! Which host has a VM, as the server's map says, and one connection to that host.
//!
//! What the server says counts for as long as it does in aditd ([`VmMap`]), and as much of it is kept. What the host itself says of a VM that it
//! does not have counts more: it is asked for again then.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use adit_api::{HostShown, Resolution};
use adit_client::server::Server;
use adit_client::{Client, ClientError};
use adit_names::VmId;
use adit_reach::Destination;
use adit_reach::map::VmMap;
use adit_reach::resolve::{Claim, Place, listed};
use hyper::StatusCode;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::HeaderValue;
use hyper_util::rt::TokioIo;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::Lead;
use super::problem::{Body, Problem};
use crate::error::Failure;

/// Questions to the server at the same time.
const QUESTIONS_MAX: usize = 16;
/// How long one may take.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// How long it may take to reach a host.
const REACH_LIMIT: Duration = Duration::from_secs(10);
/// How long the list of hosts counts.
const HOSTS_LIMIT: Duration = Duration::from_secs(30);
/// Most hosts: as many as an aditd may know, and the server itself.
const HOSTS_MAX: usize = 65;

/// The hosts that a server knows.
pub struct Hosts {
    client: Client,
    server: Server,
    known: Mutex<Known>,
    questions: Semaphore,
    begin: Instant,
}

struct Known {
    map: VmMap,
    by_name: HashMap<VmId, Server>,
    /// As the server has said it.
    said: Vec<HostShown>,
    since: Instant,
}

impl Hosts {
    /// Asks the server for them.
    pub async fn new(client: Client, server: Server) -> Result<Arc<Self>, Failure> {
        let hosts = Arc::new(Self {
            client,
            server,
            known: Mutex::new(Known {
                map: VmMap::default(),
                by_name: HashMap::new(),
                said: vec![],
                since: Instant::now(),
            }),
            questions: Semaphore::new(QUESTIONS_MAX),
            begin: Instant::now(),
        });
        let said = hosts.client.get::<Vec<HostShown>>("/v1/hosts").await?;
        if said.is_empty() {
            let message = format!(
                "the server {} knows no host whose proxy could be reached from here",
                hosts.server
            );
            return Err(Failure::new("no-host", message)
                .help("its aditd.toml needs a [[listen]] with `cert` and `key` for clients, or a [[host]]"));
        }
        hosts.take(said);
        Ok(hosts)
    }

    /// Asks the server for a VM, on each host.
    async fn ask(&self, vm: &VmId) -> Result<(), Problem> {
        let turn = timeout(ANSWER_LIMIT, self.questions.acquire()).await;
        let Ok(Ok(_question)) = turn else {
            let cause = "too many questions to the server are under way";
            return Err(Problem::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "connection_limit_reached",
                cause,
            )
            .remedy("try again"));
        };
        let now_ms = self.now_ms();
        if self.known().map.look(vm, None, None, now_ms).ask.is_empty() {
            // Somebody has asked meanwhile.
            return Ok(());
        }
        if self.known().since.elapsed() > HOSTS_LIMIT
            && let Ok(Ok(said)) =
                timeout(ANSWER_LIMIT, self.client.get::<Vec<HostShown>>("/v1/hosts")).await
        {
            self.take(said);
        }
        let path = format!("/v1/resolve/{vm}");
        let asked = timeout(ANSWER_LIMIT, self.client.get::<Resolution>(&path)).await;
        let claims = match asked {
            Ok(Ok(found)) => found.claims,
            Ok(Err(ClientError::Refused { status: 404, said })) if said.code == "unknown-vm" => {
                vec![]
            }
            Ok(Err(e)) => return Err(self.silent(&with_cause(&e))),
            Err(_) => return Err(self.silent("it takes too long")),
        };
        let now_ms = self.now_ms();
        let mut known = self.known();
        let hosts: Vec<VmId> = known.by_name.keys().cloned().collect();
        for host in hosts {
            let claim = claims.iter().find(|claim| claim.host == host.as_str());
            let claim = claim.map(|claim| Claim {
                host: host.clone(),
                live: claim.live,
                generation: claim.generation,
            });
            known.map.heard(vm, &host, claim, now_ms);
        }
        Ok(())
    }

    fn silent(&self, why: &str) -> Problem {
        let cause = format!(
            "the server {} does not say which host has the VM: {why}",
            self.server
        );
        Problem::new(StatusCode::BAD_GATEWAY, "destination_unavailable", cause)
            .remedy("`adit --server … resolve VM` asks the same; it takes `see` on all VMs there")
    }

    /// Takes the list of hosts. What was known of VMs is forgotten if it is another one.
    fn take(&self, said: Vec<HostShown>) {
        let mut known = self.known();
        known.since = Instant::now();
        if known.said == said {
            return;
        }
        known.by_name.clear();
        for host in said.iter().take(HOSTS_MAX) {
            let address = self.server.address_of(&host.address);
            let (Ok(name), Some(address)) = (host.name.parse::<VmId>(), address) else {
                continue;
            };
            match self.server.with_key(&address, &host.pin) {
                Ok(server) => drop(known.by_name.insert(name, server)),
                Err(e) => adit_print::note!("host `{name}` is not reached: {e}"),
            }
        }
        let names = known.by_name.keys().cloned().collect();
        known.map.set_hosts(names);
        known.said = said;
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The clock of the map.
    fn now_ms(&self) -> u64 {
        u64::try_from(self.begin.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

impl Lead for Arc<Hosts> {
    fn token(&self) -> Option<&HeaderValue> {
        self.server.token()
    }

    async fn find(&self, to: &Destination) -> Result<VmId, Problem> {
        let look = || {
            let now_ms = self.now_ms();
            self.known()
                .map
                .look(&to.vm, None, to.host.as_ref(), now_ms)
        };
        let mut found = look();
        if !found.ask.is_empty() {
            let (this, vm) = (self.clone(), to.vm.clone());
            let asked = tokio::spawn(async move { this.ask(&vm).await });
            if found.place.is_none() {
                let said = asked.await;
                said.unwrap_or_else(|_| Err(self.silent("its answer was not waited for")))?;
                found = look();
            }
        }
        match found.place {
            Some(Place::At(host)) => Ok(host),
            Some(Place::Ambiguous(hosts)) => Err(ambiguous(&to.vm, &hosts)),
            Some(Place::Unknown) | None => Err(Problem::unknown(&to.name())),
        }
    }

    fn forget(&self, vm: &VmId, host: &VmId) {
        self.known().map.forget(vm, host);
    }

    async fn reach(&self, host: &VmId) -> Result<SendRequest<Body>, Problem> {
        let server = self.known().by_name.get(host).cloned();
        let failed = |status, error, why: &str| {
            let cause = format!("host `{host}`, which has the VM, is not reached from here: {why}");
            Problem::new(status, error, cause).remedy(format!(
                "see that aditd runs on `{host}`, and that the address that {} has for it leads there from this machine",
                self.server
            ))
        };
        let bad = |why: &str| failed(StatusCode::BAD_GATEWAY, "destination_unavailable", why);
        let server = server.ok_or_else(|| bad("the server says no longer where it is"))?;
        let reached = async {
            let tls = server.connect().await.map_err(|e| bad(&with_cause(&e)))?;
            let shaken = http1::handshake(TokioIo::new(tls)).await;
            shaken.map_err(|e| bad(&e.to_string()))
        };
        let late = |_| {
            failed(
                StatusCode::GATEWAY_TIMEOUT,
                "connection_timeout",
                "it takes too long",
            )
        };
        let (sender, connection) = timeout(REACH_LIMIT, reached).await.map_err(late)??;
        // It ends with its request, whose failure says the same.
        tokio::spawn(connection.with_upgrades());
        Ok(sender)
    }
}

fn ambiguous(vm: &VmId, hosts: &[VmId]) -> Problem {
    let cause = format!(
        "VM `{vm}` is on the hosts {} at the same time, and nothing says which is meant",
        listed(hosts)
    );
    let example = hosts
        .first()
        .map_or_else(String::new, |host| format!("{vm}.{host}"));
    Problem::new(StatusCode::CONFLICT, "destination_not_found", cause)
        .remedy(format!("name the host too: `{example}`"))
}

fn with_cause(e: &ClientError) -> String {
    match std::error::Error::source(e) {
        Some(_) => adit_print::with_causes(e),
        None => e.to_string(),
    }
}

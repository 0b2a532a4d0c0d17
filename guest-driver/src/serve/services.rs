//! What the host may dial: the registry of services, and what each of them is.
//!
//! A service is a file in this folder and a line of [`Services::new`]. It gets the whole hello, so that arguments need no other
//! way, and it answers by what it will do with the stream: what can fail, fails before the host hears `accept`.

use std::io;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use adit_blob::Store;
use adit_channel::hello::{self, Open};
use adit_channel::refusal::{Code, Refusal};
use adit_names::ServiceName;

use super::agent::Agent;
use super::blob::Blob;
use super::exec::Exec;
use super::files::Files;
use super::freeze::Freeze;
use super::named::Named;
use super::ping::Ping;
use super::shares::Shares;
use super::tcp::Tcp;
use crate::policy::Standing;
use crate::transport::HostStream;

/// What happens on a stream once its hello is accepted. Dropped: the stream has ended before it began.
pub type Run = Box<dyn FnOnce(Box<dyn HostStream>) -> io::Result<()>>;

/// What may run on a stream that the host dialled.
pub trait Service: Send + Sync {
    /// Its name as people write it, with its arguments: `ping`, `tcp:PORT`.
    fn form(&self) -> &'static str;

    /// Whether a name is its own.
    fn takes(&self, name: &ServiceName) -> bool;

    /// Whether only the host may have it: a hello that may be somebody else's is refused.
    fn is_for_the_host(&self) -> bool {
        false
    }

    /// Whether the policy has rules for it besides those for what may be dialled; it asks them itself then.
    fn has_own_rules(&self) -> bool {
        false
    }

    /// Checks what a hello asks for, and opens what is behind it.
    ///
    /// # Errors
    /// Why the host does not get it.
    fn open(&self, open: &Open) -> Result<Run, Refusal>;
}

/// All services of this agent.
pub struct Services {
    /// Local TCP ports.
    pub tcp: Tcp,
    /// What the configuration has a name for.
    pub named: Named,
    ping: Ping,
    blob: Blob,
    agent: Option<Agent>,
    exec: OnceLock<Exec>,
    files: OnceLock<Files>,
    freeze: OnceLock<Freeze>,
    policy: RwLock<Arc<Standing>>,
}

impl Services {
    /// Those that the agent has. `ports` may be dialled, files go to `blobs`, orders to `agent` if there is one.
    pub fn new(ports: Vec<u16>, blobs: Arc<Store>, agent: Option<Agent>, shares: Shares) -> Self {
        Self {
            tcp: Tcp::new(ports, shares),
            named: Named::new(shares),
            ping: Ping,
            blob: Blob::new(blobs),
            agent,
            exec: OnceLock::new(),
            files: OnceLock::new(),
            freeze: OnceLock::new(),
            policy: RwLock::default(),
        }
    }

    /// Has this policy decide which of them may be dialled, besides what each allows by itself.
    pub fn govern(&self, policy: Arc<Standing>) {
        if let Some(exec) = self.exec.get() {
            exec.govern(policy.clone());
        }
        if let Some(files) = self.files.get() {
            files.govern(policy.clone());
        }
        *self.policy.write().unwrap_or_else(PoisonError::into_inner) = policy;
    }

    /// Has commands run, by the policy as it is now and will be. The first one counts.
    pub fn runs(&self, exec: Exec) {
        let exec = self.exec.get_or_init(|| exec);
        let policy = self.policy.read();
        exec.govern(policy.unwrap_or_else(PoisonError::into_inner).clone());
    }

    /// Has files read and written, in the same way.
    pub fn copies(&self, files: Files) {
        let files = self.files.get_or_init(|| files);
        let policy = self.policy.read();
        files.govern(policy.unwrap_or_else(PoisonError::into_inner).clone());
    }

    /// Has file systems frozen. The first one counts.
    pub fn freezes(&self, freeze: Freeze) {
        self.freeze.get_or_init(|| freeze);
    }

    /// Whether a hello asks for what only the host may have.
    pub fn is_for_the_host(&self, open: &Open) -> bool {
        let all = self.all();
        all.iter()
            .any(|s| s.is_for_the_host() && s.takes(&open.service))
    }

    /// Their order means nothing: no name belongs to two.
    fn all(&self) -> Vec<&dyn Service> {
        let agent = self.agent.iter().map(|agent| agent as &dyn Service);
        let exec = self.exec.get().map(|exec| exec as &dyn Service);
        let files = self.files.get().map(|files| files as &dyn Service);
        let all: [&dyn Service; 4] = [&self.tcp, &self.named, &self.ping, &self.blob];
        let all = all.into_iter().chain(agent).chain(exec);
        let freeze = self.freeze.get().map(|freeze| freeze as &dyn Service);
        all.chain(files).chain(freeze).collect()
    }

    /// Opens what a hello asks for; the version is what both sides speak.
    ///
    /// # Errors
    /// Why the host does not get it.
    pub fn open(&self, open: &Open) -> Result<(u16, Run), Refusal> {
        let policy = self.policy.read();
        let policy = policy.unwrap_or_else(PoisonError::into_inner).clone();
        open_one_of(&self.all(), open, &policy)
    }
}

fn open_one_of(
    all: &[&dyn Service],
    open: &Open,
    policy: &Standing,
) -> Result<(u16, Run), Refusal> {
    let version = hello::choose_version(open).ok_or_else(|| {
        let text = format!("only version {} is spoken", hello::VERSION);
        Refusal::new(Code::Version, text)
    })?;
    let Some(service) = all.iter().find(|s| s.takes(&open.service)) else {
        let forms: Vec<_> = all.iter().map(|s| s.form()).collect();
        let text = format!("this agent serves {}", forms.join(", "));
        return Err(Refusal::new(Code::UnknownService, text));
    };
    if !service.has_own_rules() {
        policy.dial(&open.service)?;
    }
    Ok((version, service.open(open)?))
}

#[cfg(test)]
mod tests {
    use adit_channel::hello::Common;
    use proptest::prelude::*;

    use super::*;

    /// A service whose names begin with a prefix.
    struct Prefixed(&'static str);

    impl Service for Prefixed {
        fn form(&self) -> &'static str {
            self.0
        }

        fn takes(&self, name: &ServiceName) -> bool {
            name.as_str().starts_with(self.0)
        }

        fn open(&self, _: &Open) -> Result<Run, Refusal> {
            // Tells which it was.
            Err(Refusal::new(Code::Denied, self.0))
        }
    }

    fn open(service: &str) -> Open {
        Open::new(service.parse().unwrap(), Common::default())
    }

    fn services() -> Services {
        let blobs = super::super::blob::store("/nowhere".as_ref());
        Services::new(vec![], blobs, None, Shares::now())
    }

    #[test]
    fn an_unknown_service_is_refused_with_those_that_there_are() {
        let longest = "t".repeat(ServiceName::MAX);
        let longest_port = format!("tcp:{}", "0".repeat(ServiceName::MAX - 4));
        for name in [
            "ssh",
            "tcp",
            "tcp:",
            "tcp:0",
            "tcp:080",
            "ping:",
            "pin",
            "blob:",
            &longest,
            &longest_port,
        ] {
            let refused = services().open(&open(name)).map(|_| ()).unwrap_err();
            assert_eq!(refused.code(), Code::UnknownService, "{name}");
            assert_eq!(
                refused.text(),
                "this agent serves tcp:PORT, svc:NAME, ping, blob"
            );
        }
    }

    #[test]
    fn a_version_that_nobody_speaks_is_said_before_the_service_is() {
        for service in ["tcp:80", "ping", "nobody"] {
            let open = Open {
                version_min: 7,
                version_max: 9,
                ..open(service)
            };
            let refused = services().open(&open).map(|_| ()).unwrap_err();
            assert_eq!(refused.code(), Code::Version, "{service}");
        }
    }

    fn name() -> impl Strategy<Value = String> {
        prop_oneof![
            "[a-z0-9:._-]{1,64}",
            "(ping|blob|tcp|svc|unix|exec):?[a-z0-9:._-]{0,58}",
            "tcp:[0-9]{1,6}"
        ]
    }

    proptest! {
        #[test]
        fn no_name_belongs_to_two_services(name in name()) {
            let name: ServiceName = name.parse().unwrap();
            prop_assert!(services().all().iter().filter(|s| s.takes(&name)).count() <= 1);
        }

        #[test]
        fn the_order_of_the_services_means_nothing(name in name(), turn in 0..6_usize) {
            let ours = services();
            let mut all = ours.all();
            all.extend([&Prefixed("unix:") as &dyn Service, &Prefixed("exec")]);
            let mut turned = all.clone();
            turned.rotate_left(turn);
            let open = open(&name);
            let none = Standing::default();
            let (a, b) = (open_one_of(&all, &open, &none), open_one_of(&turned, &open, &none));
            let text = |r: &Refusal| (r.code() != Code::UnknownService).then(|| r.text().to_owned());
            match (a, b) {
                (Ok(_), Ok(_)) => {}
                (Err(a), Err(b)) => prop_assert_eq!((a.code(), text(&a)), (b.code(), text(&b))),
                _ => prop_assert!(false, "{} is opened in one order only", name),
            }
        }
    }
}

//! The decision: from grants, caller, verb and VM alone. What is not granted is denied.
//!
//! Two rules must agree. A grant says what a caller may do; the VM's own lists (`allow`, `allow_vsock`, `allow_services`) say what of the VM
//! may be reached at all, by anybody. Services of the agent that nobody has named are the owner's.
//!
//! Whoever may not `see` a VM gets the same denial as where there is none ([`Denial::is_hidden`]).

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use adit_names::VmId;
use adit_port::control::Target;
use adit_tasks::vms::Vms;

use super::caller::Caller;
use super::grant::{Grant, May};
use super::subject::Subject;

/// Services of a guest that are dialled for requests of the API alone, which say who may: they are given files, or told to stand still.
const OWNERS: [&str; 3] = ["blob", "agent", "freeze"];

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb<'a> {
    /// A stream to the target.
    Reach(&'a Target),
    /// To be shown the VM.
    See,
    /// To be shown its tasks.
    Task,
    /// To apply a goal.
    Goal,
    /// To change its settings.
    Manage,
    /// To have commands run in it as this user; none: as any.
    Exec(Option<&'a str>),
    /// To have files read and written there.
    Files(Where<'a>),
}

/// As whom, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Where<'a> {
    /// A user of the guest.
    pub user: &'a str,
    /// An absolute, plain path; or one below the user's home, which only the guest knows.
    pub path: &'a str,
}

/// What of a VM decides.
#[derive(Clone, Copy, Debug)]
pub struct VmView<'a> {
    /// Its name.
    pub name: &'a str,
    /// TCP ports that may be reached.
    pub allow: &'a [u16],
    /// AF_VSOCK ports that may be reached.
    pub allow_vsock: &'a [u32],
    /// Services that may be reached, by the names that the guest has for them.
    pub allow_services: &'a [VmId],
    /// Labels of the configuration.
    pub labels: &'a BTreeMap<String, String>,
    /// Labels of a card that this host believes. A label of the configuration comes before one of the same name.
    pub card: Option<&'a BTreeMap<String, String>>,
}

impl<'a> VmView<'a> {
    /// A VM that is not there: nothing but its name decides.
    pub fn of_name(name: &'a str) -> Self {
        static NONE: BTreeMap<String, String> = BTreeMap::new();
        Self {
            name,
            allow: &[],
            allow_vsock: &[],
            allow_services: &[],
            labels: &NONE,
            card: None,
        }
    }
}

impl VmView<'_> {
    fn label(&self, name: &str) -> Option<&str> {
        let of_card = || self.card.and_then(|card| card.get(name));
        self.labels.get(name).or_else(of_card).map(String::as_str)
    }
}

/// What is decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access<'a> {
    /// It may be done, by this grant; none: it is the owner's right.
    Allow(Option<&'a Grant>),
    /// It may not.
    Deny(Denial),
}

/// It may not be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Denial {
    /// Why, for whoever may see the VM, and for the audit.
    pub reason: Reason,
    /// The caller may not see the VM: it is told what it would be told of a VM that is not there.
    pub is_hidden: bool,
}

/// Why it may not be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// No grant has it.
    NotGranted,
    /// A grant had it, and its time is over.
    Expired {
        /// Where it is written.
        place: String,
    },
    /// A list of the VM's settings does not have it.
    NotListed {
        /// The port.
        port: u32,
        /// Name of the list.
        list: &'static str,
    },
    /// The VM's list of services does not have it.
    NotNamed {
        /// Name of the service.
        service: String,
    },
    /// No setting is about such a service.
    NoRule {
        /// Name of the service.
        service: String,
    },
}

/// All grants of a host.
#[derive(Clone, Debug, Default)]
pub struct Grants {
    all: Vec<Grant>,
    by_subject: HashMap<Subject, OfSubject>,
    has_rates: bool,
    has_weights: bool,
    has_labels: bool,
}

impl Grants {
    /// Puts them in order.
    pub fn new(all: Vec<Grant>) -> Self {
        let mut by_subject = HashMap::<Subject, OfSubject>::new();
        for (nth, grant) in all.iter().enumerate() {
            for subject in &grant.to {
                let of_subject = by_subject.entry(subject.clone()).or_default();
                of_subject.add(nth, &grant.vms);
            }
        }
        let is_rated =
            |grant: &Grant| grant.connections_per_s.is_some() || grant.bytes_per_s.is_some();
        let has_rates = all.iter().any(is_rated);
        let has_weights = all.iter().any(|grant| grant.weight > 1);
        let mut vms = all.iter().flat_map(|grant| &grant.vms);
        let has_labels = vms.any(|vms| matches!(vms, Vms::Labelled(..)));
        Self {
            all,
            by_subject,
            has_rates,
            has_weights,
            has_labels,
        }
    }

    /// All of them, as they are written.
    pub fn all(&self) -> &[Grant] {
        &self.all
    }

    /// Whether somebody is granted something by such a name.
    pub fn any_to(&self, is: impl Fn(&Subject) -> bool) -> bool {
        self.by_subject.keys().any(is)
    }

    /// Decides at a time (Unix, ms).
    pub fn decide(
        &self,
        caller: &Caller,
        verb: Verb<'_>,
        vm: VmView<'_>,
        now_ms: i64,
    ) -> Access<'_> {
        let decided = self.granted(caller, verb, vm, now_ms);
        let decided = decided.and_then(|granted| match verb {
            Verb::Reach(target) => listed(caller, vm, target).map(|()| granted),
            _ => Ok(granted),
        });
        match decided {
            Ok(granted) => Access::Allow(granted),
            Err(reason) => Access::Deny(Denial {
                reason,
                is_hidden: self.granted(caller, Verb::See, vm, now_ms).is_err(),
            }),
        }
    }

    /// The grant that lets a caller do it, whatever the VM's lists are; none: it is the owner's right.
    ///
    /// # Errors
    /// There is none.
    pub fn granted(
        &self,
        caller: &Caller,
        verb: Verb<'_>,
        vm: VmView<'_>,
        now_ms: i64,
    ) -> Result<Option<&Grant>, Reason> {
        self.granted_for(caller, verb, About::Vm(vm), now_ms)
    }

    /// The grant for every VM, `vms = ["*"]`, by which a caller does what concerns the whole host; none: it is the owner's right.
    ///
    /// # Errors
    /// There is none.
    pub fn of_host(
        &self,
        caller: &Caller,
        verb: Verb<'_>,
        now_ms: i64,
    ) -> Result<Option<&Grant>, Reason> {
        self.granted_for(caller, verb, About::All, now_ms)
    }

    fn granted_for(
        &self,
        caller: &Caller,
        verb: Verb<'_>,
        about: About<'_>,
        now_ms: i64,
    ) -> Result<Option<&Grant>, Reason> {
        if caller.is_owner() {
            return Ok(None);
        }
        let mut reason = Reason::NotGranted;
        for grant in self.covering(caller, verb, about) {
            match grant.until_ms {
                Some(until) if now_ms >= until => {
                    reason = Reason::Expired {
                        place: grant.place.clone(),
                    };
                }
                _ => return Ok(Some(grant)),
            }
        }
        Err(reason)
    }

    /// Bytes of a path that are the directory which grants for files are for: of all that let a caller do this, that of the one which is for
    /// most; 0: all. None: no grant lets them.
    pub fn files_root(
        &self,
        caller: &Caller,
        verb: Verb<'_>,
        vm: VmView<'_>,
        now_ms: i64,
    ) -> Option<usize> {
        if caller.is_owner() {
            return Some(0);
        }
        let holds = |grant: &&Grant| grant.until_ms.is_none_or(|until| now_ms < until);
        let grants = self.covering(caller, verb, About::Vm(vm)).filter(holds);
        let covering =
            grants.flat_map(|grant| grant.may.iter().filter(|may| may.covers(verb, false)));
        covering.map(May::root_len).min()
    }

    /// Whether a caller may see any VM at all, there or not.
    pub fn sees_any(&self, caller: &Caller, now_ms: i64) -> bool {
        let is = |grant: &Grant| grant.may.iter().any(|may| may.covers(Verb::See, false));
        caller.is_owner() || self.of_caller(caller, now_ms).any(is)
    }

    /// Whether any of them has a weight.
    pub fn has_weights(&self) -> bool {
        self.has_weights
    }

    /// How many times a client's share somebody has: by whichever grant it is most.
    pub fn weight(&self, caller: &Caller, now_ms: i64) -> usize {
        let weights = self.of_caller(caller, now_ms).map(|grant| grant.weight);
        usize::try_from(weights.max().unwrap_or(1)).unwrap_or(1)
    }

    /// All grants to a caller, whatever they are about.
    fn of_caller(&self, caller: &Caller, now_ms: i64) -> impl Iterator<Item = &Grant> {
        let is_over = move |grant: &Grant| grant.until_ms.is_some_and(|until| now_ms >= until);
        let subjects = caller.subjects().iter();
        let all = subjects
            .filter_map(|subject| self.by_subject.get(subject))
            .flat_map(|of_subject| &of_subject.all);
        let all = all.filter_map(|nth| self.all.get(*nth));
        all.filter(move |grant| !is_over(grant))
    }

    /// Whether any of them has a rate.
    pub fn has_rates(&self) -> bool {
        self.has_rates
    }

    /// Whether a caller might do it if the VM had a label that it is not known to have.
    pub fn by_some_label(
        &self,
        caller: &Caller,
        verb: Verb<'_>,
        vm: VmView<'_>,
        now_ms: i64,
    ) -> bool {
        let led = caller.is_led();
        let is_open = |vms: &Vms| match vms {
            Vms::Labelled(name, _) => !vm.labels.contains_key(name),
            Vms::Named(..) => false,
        };
        self.of_caller(caller, now_ms).any(|grant| {
            grant.may.iter().any(|may| may.covers(verb, led)) && grant.vms.iter().any(is_open)
        })
    }

    /// Whether any of them is about a label.
    pub fn has_labels(&self) -> bool {
        self.has_labels
    }

    /// All grants that let a caller do it now.
    pub fn all_granted(
        &self,
        caller: &Caller,
        verb: Verb<'_>,
        vm: VmView<'_>,
        now_ms: i64,
    ) -> impl Iterator<Item = &Grant> {
        let is_over = move |grant: &&Grant| grant.until_ms.is_some_and(|until| now_ms >= until);
        self.covering(caller, verb, About::Vm(vm))
            .filter(move |grant| !is_over(grant))
    }

    /// Those that say so, also if their time is over.
    fn covering(
        &self,
        caller: &Caller,
        verb: Verb<'_>,
        about: About<'_>,
    ) -> impl Iterator<Item = &Grant> {
        let subjects = caller.subjects().iter();
        let grants = subjects
            .filter_map(|subject| self.by_subject.get(subject))
            .flat_map(move |of_subject| of_subject.about(about));
        let led = caller.is_led();
        let covers = move |grant: &&Grant| {
            grant.may.iter().any(|may| may.covers(verb, led)) && about.is_of(grant)
        };
        grants.filter_map(|nth| self.all.get(nth)).filter(covers)
    }

    /// The grants that say anything of a VM, with whoever they are to.
    pub fn about<'a>(&'a self, vm: VmView<'a>) -> impl Iterator<Item = &'a Grant> {
        self.all.iter().filter(move |grant| grant.is_about(vm))
    }
}

/// Which grants are looked for.
#[derive(Clone, Copy)]
enum About<'a> {
    /// Those about this VM.
    Vm(VmView<'a>),
    /// Those about every VM.
    All,
}

impl About<'_> {
    fn is_of(self, grant: &Grant) -> bool {
        match self {
            Self::Vm(vm) => grant.is_about(vm),
            Self::All => grant.vms.iter().any(Vms::is_all),
        }
    }
}

/// A subject's grants, by their numbers. A few are looked at one by one; of many, those that can be about a VM are found by
/// its name and its labels, and only patterns are looked at each.
#[derive(Clone, Debug, Default)]
struct OfSubject {
    all: Vec<usize>,
    by_name: HashMap<String, Vec<usize>>,
    /// By a label's name, and by its value.
    by_label: HashMap<String, HashMap<String, Vec<usize>>>,
    patterns: Vec<usize>,
}

impl OfSubject {
    /// With fewer, finding takes longer than looking.
    const MANY: usize = 8;

    fn add(&mut self, nth: usize, vms: &[Vms]) {
        if self.all.last() == Some(&nth) {
            return;
        }
        self.all.push(nth);
        for vms in vms {
            let of_kind = match vms {
                Vms::Named(name, None) => self.by_name.entry(name.clone()).or_default(),
                Vms::Named(_, Some(_)) => &mut self.patterns,
                Vms::Labelled(name, value) => {
                    let of_label = self.by_label.entry(name.clone()).or_default();
                    of_label.entry(value.clone()).or_default()
                }
            };
            of_kind.push(nth);
        }
    }

    /// All that may be meant, in their order.
    fn about(&self, about: About<'_>) -> impl Iterator<Item = usize> {
        let found = match about {
            About::Vm(vm) if self.all.len() > Self::MANY => Some(self.found(vm)),
            _ => None,
        };
        let all = match found {
            Some(_) => &[][..],
            None => &self.all,
        };
        all.iter().copied().chain(found.into_iter().flatten())
    }

    fn found(&self, vm: VmView<'_>) -> Vec<usize> {
        let mut found = self.patterns.clone();
        found.extend(self.by_name.get(vm.name).into_iter().flatten());
        let labels = vm
            .labels
            .keys()
            .chain(vm.card.into_iter().flat_map(|card| card.keys()));
        for name in labels {
            let value = vm.label(name).unwrap_or_default();
            let of_label = self.by_label.get(name).and_then(|of| of.get(value));
            found.extend(of_label.into_iter().flatten());
        }
        found.sort_unstable();
        found.dedup();
        found
    }
}

impl Grant {
    fn is_about(&self, vm: VmView<'_>) -> bool {
        let is = |vms: &Vms| vms.has(vm.name, |label| vm.label(label));
        self.vms.iter().any(is)
    }
}

/// Whether the VM's own lists have the target.
fn listed(caller: &Caller, vm: VmView<'_>, target: &Target) -> Result<(), Reason> {
    let not_listed = |port, list| Reason::NotListed { port, list };
    match target {
        Target::Service(service) => match service.tcp_port() {
            Some(port) if vm.allow.contains(&port) => Ok(()),
            Some(port) => Err(not_listed(port.into(), "allow")),
            None if caller.is_owner() && OWNERS.contains(&service.as_str()) => Ok(()),
            None => match service.name() {
                Some(name) if vm.allow_services.iter().any(|one| one.as_str() == name) => Ok(()),
                Some(name) => Err(Reason::NotNamed {
                    service: name.to_owned(),
                }),
                None => Err(Reason::NoRule {
                    service: service.to_string(),
                }),
            },
        },
        Target::VsockPort(port) if vm.allow_vsock.contains(port) => Ok(()),
        Target::VsockPort(port) => Err(not_listed(*port, "allow_vsock")),
    }
}

impl Verb<'_> {
    /// The verb and the target for programs.
    pub fn words(self) -> (&'static str, String) {
        match self {
            Self::Reach(Target::Service(service)) => ("reach", service.to_string()),
            Self::Reach(Target::VsockPort(port)) => ("reach", format!("vsock:{port}")),
            Self::See => ("see", String::new()),
            Self::Task => ("task", String::new()),
            Self::Goal => ("goal", String::new()),
            Self::Manage => ("manage", String::new()),
            Self::Exec(user) => ("exec", user.unwrap_or("*").to_owned()),
            Self::Files(Where { user, path }) => ("files", format!("{user}@{path}")),
        }
    }
}

impl Reason {
    /// In a word, for programs.
    pub fn word(&self) -> &'static str {
        match self {
            Self::NotGranted => "not-granted",
            Self::Expired { .. } => "expired",
            Self::NotListed { .. } | Self::NotNamed { .. } => "not-listed",
            Self::NoRule { .. } => "no-rule",
        }
    }

    /// The same for people: whole, about `verb` and the VM.
    pub fn text(&self, verb: Verb<'_>, vm: impl fmt::Display, caller: &Caller) -> String {
        match self {
            Self::NotGranted => {
                format!(
                    "no grant lets {caller} {verb} VM `{vm}`: `adit access ls --vm {vm}` on its host lists those there are"
                )
            }
            Self::Expired { place } => {
                format!(
                    "the grant at {place} lets {caller} no longer {verb} VM `{vm}`: its time is over"
                )
            }
            Self::NotListed { port, list } => {
                format!("port {port} of VM `{vm}` is not in its `{list}` list")
            }
            Self::NotNamed { service } => {
                format!("service `{service}` of VM `{vm}` is not in its `allow_services` list")
            }
            Self::NoRule { service } => format!("nothing allows service `{service}` of VM `{vm}`"),
        }
    }
}

impl fmt::Display for Verb<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reach(Target::Service(service)) => match service.tcp_port() {
                Some(port) => write!(f, "reach port {port} of"),
                None => write!(f, "reach service `{service}` of"),
            },
            Self::Reach(Target::VsockPort(port)) => write!(f, "reach vsock port {port} of"),
            Self::See => f.pad("see"),
            Self::Task => f.pad("see tasks of"),
            Self::Goal => f.pad("apply goals to"),
            Self::Manage => f.pad("manage"),
            Self::Exec(Some(user)) => write!(f, "run commands as `{user}` in"),
            Self::Exec(None) => f.pad("run commands as any user in"),
            Self::Files(Where { user, path }) => {
                let path = match *path {
                    "" => "the home",
                    path => path,
                };
                write!(f, "read and write `{path}` as `{user}` in")
            }
        }
    }
}

#[cfg(test)]
mod tests;

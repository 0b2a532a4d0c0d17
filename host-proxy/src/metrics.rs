//! Counters, gauges and histograms, in the text format of OpenMetrics.
//!
//! Every label is bounded. What a VM or a listener has seen is kept by itself and read when it is asked for (`scrape`), so its
//! series end with it.

mod listener;
mod scrape;

use std::fmt::Write as _;
use std::sync::{Arc, Mutex, PoisonError};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Metric as Encode, Registry as Prometheus};

use crate::registry::Registry;
use crate::state::State;
use listener::Listeners;
use scrape::Scrape;

pub use listener::{Listener, Turned};

/// What is known of a metric.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    /// As it is scraped: a counter ends in `_total`.
    pub name: &'static str,
    /// Labels. All are bounded: names of registered VMs, and words of ours.
    pub labels: &'static [&'static str],
    /// What it counts or shows.
    pub help: &'static str,
}

const REQUESTS: Metric = Metric {
    name: "adit_proxy_requests_total",
    labels: &["method", "status"],
    help: "Requests that the proxy answered",
};
const TASKS: Metric = Metric {
    name: "adit_tasks_ended_total",
    labels: &["state"],
    help: "Tasks that reached a terminal state",
};
const READY: Metric = Metric {
    name: "adit_vm_ready",
    labels: &["vm"],
    help: "1 while the VM's agent is connected, else 0",
};
const LOCKED: Metric = Metric {
    name: "adit_vm_locked",
    labels: &["vm"],
    help: "1 while the VM is locked: no new task and no new tunnel goes there, else 0",
};
const STREAMS: Metric = Metric {
    name: "adit_vm_streams",
    labels: &["vm"],
    help: "Open streams of the VM",
};
const FAULT: Metric = Metric {
    name: "adit_vm_fault",
    labels: &["vm", "kind"],
    help: "1 while the VM has a fault of that kind: power-cycle, port-process, transport, carrier, enrolment, clone, card, trust, agent, \
           policy or journal",
};
const DIALS: Metric = Metric {
    name: "adit_vm_dials_total",
    labels: &["vm", "outcome"],
    help: "Dials into the VM that ended, by how: opened, given-up, or why it was refused",
};
const DIAL_TIME: Metric = Metric {
    name: "adit_vm_dial_seconds",
    labels: &["vm"],
    help: "How long dials took that opened a stream",
};
const FIRST_BYTE: Metric = Metric {
    name: "adit_vm_first_byte_seconds",
    labels: &["vm"],
    help: "From a request's head to the head of its answer, where aditd relays",
};
const QUEUED: Metric = Metric {
    name: "adit_vm_tasks_open",
    labels: &["vm"],
    help: "Tasks of the VM that have not ended",
};
const CLOCK: Metric = Metric {
    name: "adit_vm_clock_ahead_seconds",
    labels: &["vm"],
    help: "How far the guest's clock was ahead of this host's when the agent told it last; negative: behind",
};
const CARD: Metric = Metric {
    name: "adit_vm_card_expiry_timestamp_seconds",
    labels: &["vm"],
    help: "When the card ends that this host believes, as Unix time",
};
const ACCEPTED: Metric = Metric {
    name: "adit_listener_accepted_total",
    labels: &["listener"],
    help: "Connections that were let in",
};
const OPEN: Metric = Metric {
    name: "adit_listener_connections_open",
    labels: &["listener"],
    help: "Connections that are open",
};
const OPEN_MAX: Metric = Metric {
    name: "adit_listener_connections_max",
    labels: &["listener"],
    help: "Connections that may be open at a time",
};
const TURNED: Metric = Metric {
    name: "adit_listener_turned_away_total",
    labels: &["listener", "reason"],
    help: "Connections that were turned away: few descriptors left (descriptors), the client has its share (client-share), or it \
           was silent when another needed its place (silent)",
};
const ANSWERS: Metric = Metric {
    name: "adit_dns_answers_total",
    labels: &["listener", "answer"],
    help: "Questions that a listener for DNS was asked, by what became of them: found, no-data, no-name, failed, refused, malformed, \
           not-implemented, or over the rate of their address: truncated, dropped",
};
const GUESTS: Metric = Metric {
    name: "adit_guest_streams_refused_total",
    labels: &["reason"],
    help: "Streams that guests have dialled through the host's kernel and that were closed: no VM has the CID (unknown), its VM is reached by \
           another carrier (carrier), its port process takes none (port-process), or it dials too much (rate)",
};
const CONFIG: Metric = Metric {
    name: "adit_config_last_reload_successful",
    labels: &[],
    help: "0 if the configuration was refused when it was last read, else 1",
};

/// All metrics.
pub const METRICS: &[Metric] = &[
    REQUESTS, TASKS, READY, LOCKED, STREAMS, FAULT, DIALS, DIAL_TIME, FIRST_BYTE, QUEUED, CLOCK,
    CARD, ACCEPTED, OPEN, OPEN_MAX, TURNED, ANSWERS, GUESTS, CONFIG,
];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Status {
    method: &'static str,
    status: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

/// Why streams of guests are refused.
const REFUSED: [&str; 4] = ["unknown", "carrier", "port-process", "rate"];

/// The values of all metrics.
pub struct Metrics {
    registry: Mutex<Prometheus>,
    requests: Family<Status, Counter>,
    tasks: Family<Outcome, Counter>,
    listeners: Listeners,
    guests: Family<Reason, Counter>,
    config: Gauge,
}

impl Metrics {
    /// All at zero; `vms` are those whose series there are.
    pub fn new(vms: Arc<Registry>) -> Self {
        let metrics = Self {
            registry: Mutex::default(),
            requests: Family::default(),
            tasks: Family::default(),
            listeners: Listeners::default(),
            guests: Family::default(),
            config: Gauge::default(),
        };
        metrics.register(REQUESTS, &metrics.requests);
        metrics.register(TASKS, &metrics.tasks);
        // From the beginning on: the first stream that is refused is then an increase.
        for reason in REFUSED {
            drop(metrics.guests.get_or_create(&Reason { reason }));
        }
        metrics.register(GUESTS, &metrics.guests);
        metrics.register(CONFIG, &metrics.config);
        let listeners = metrics.listeners.clone();
        let scrape = Box::new(Scrape { vms, listeners });
        metrics.lock().register_collector(scrape);
        metrics
    }

    fn register(&self, metric: Metric, value: &(impl Encode + Clone)) {
        self.lock()
            .register(metric.bare_name(), metric.help, value.clone());
    }

    /// A listener is open. Its series are there until the last reference to it is dropped; `name` is one of the
    /// configuration's.
    pub fn listener(&self, name: &str, max: usize) -> Arc<Listener> {
        self.listeners.add(name, max)
    }

    /// Counts an answered request.
    pub fn request(&self, connect: bool, status: u16) {
        let method = if connect { "connect" } else { "absolute" };
        self.requests
            .get_or_create(&Status { method, status })
            .inc();
    }

    /// Counts a connection of another listener, by what its clients speak there.
    pub fn tunnel(&self, method: &'static str, status: u16) {
        self.requests
            .get_or_create(&Status { method, status })
            .inc();
    }

    /// Counts a stream that a guest has dialled and that was closed.
    pub fn guest_refused(&self, reason: &'static str) {
        self.guests.get_or_create(&Reason { reason }).inc();
    }

    /// Counts a task that ended.
    pub fn task_ended(&self, state: &'static str) {
        self.tasks.get_or_create(&Outcome { state }).inc();
    }

    /// Writes all of them, with the VMs and listeners as they are now.
    pub fn render(&self, state: &State) -> String {
        let is_refused = state.reloads.error().is_some();
        self.config.set(i64::from(!is_refused));
        self.text()
    }

    fn text(&self) -> String {
        let mut text = String::new();
        if let Err(e) = encode(&mut text, &self.lock()) {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "# {e}");
        }
        text
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Prometheus> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Metric {
    /// Its name without what the encoder adds to every counter.
    fn bare_name(&self) -> &'static str {
        self.name.trim_end_matches("_total")
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Instant;

    use adit_channel::refusal::Refusal;
    use adit_port::control::{DialFailed, Target};

    use super::*;
    use crate::config::VmConfig;
    use crate::vm::Origin;

    fn with_a_vm() -> (Arc<Registry>, Metrics) {
        let vms = Arc::new(Registry::new(Path::new("/run/adit")));
        let config = VmConfig::new("web-1".parse().unwrap(), 3);
        vms.add(config, Origin::Api).unwrap();
        let metrics = Metrics::new(vms.clone());
        (vms, metrics)
    }

    #[test]
    fn a_removed_vm_has_no_series_left_and_none_of_the_time_before_when_it_comes_back() {
        let (vms, metrics) = with_a_vm();
        let name = "web-1".parse().unwrap();
        let vm = vms.get(&name).unwrap();
        let to = Target::VsockPort(1);
        vm.dials.begin(&to).ended(None);
        let refused = DialFailed::new(1, &Refusal::busy("no"));
        vm.dials.begin(&to).ended(Some(&refused));
        vm.dials.first_byte(Instant::now());
        let text = metrics.text();
        for line in [
            "adit_vm_ready{vm=\"web-1\"} 0",
            "adit_vm_dials_total{vm=\"web-1\",outcome=\"opened\"} 1",
            "adit_vm_dials_total{vm=\"web-1\",outcome=\"busy\"} 1",
            // Only what opened is timed.
            "adit_vm_dial_seconds_count{vm=\"web-1\"} 1",
            "adit_vm_first_byte_seconds_count{vm=\"web-1\"} 1",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}: {text}");
        }
        vms.remove(&name);
        // A dial that was under way ends now.
        vm.dials.begin(&Target::VsockPort(1)).ended(None);
        assert!(!metrics.text().contains("web-1"));
        let config = VmConfig::new(name, 3);
        vms.add(config, Origin::Api).unwrap();
        let text = metrics.text();
        assert!(text.contains("adit_vm_ready{vm=\"web-1\"}"), "{text}");
        assert!(!text.contains("adit_vm_dials_total{"), "{text}");
    }

    #[test]
    fn a_listener_has_series_while_it_is_open_and_one_that_is_bound_again_has_its_own() {
        let (_vms, metrics) = with_a_vm();
        let before = metrics.listener("proxy", 10);
        before.opened();
        before.opened();
        before.closed();
        before.turned(Turned::Share);
        let text = metrics.text();
        for line in [
            "adit_listener_accepted_total{listener=\"proxy\"} 2",
            "adit_listener_connections_open{listener=\"proxy\"} 1",
            "adit_listener_connections_max{listener=\"proxy\"} 10",
            "adit_listener_turned_away_total{listener=\"proxy\",reason=\"client-share\"} 1",
            "adit_listener_turned_away_total{listener=\"proxy\",reason=\"silent\"} 0",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}: {text}");
        }
        let after = metrics.listener("proxy", 10);
        drop(before);
        let line = "adit_listener_accepted_total{listener=\"proxy\"} 0";
        assert_eq!(metrics.text().matches(line).count(), 1);
        drop(after);
        assert!(!metrics.text().contains("listener=\"proxy\""));
    }

    /// Of a family that is there, Prometheus wants the type once, and lines in one place.
    #[test]
    fn every_metric_is_described_once_with_the_labels_that_it_has() {
        let (vms, metrics) = with_a_vm();
        let listener = metrics.listener("dns", 1);
        listener.answers();
        metrics.request(true, 200);
        metrics.task_ended("done");
        let vm = vms.get(&"web-1".parse().unwrap()).unwrap();
        vm.dials.begin(&Target::VsockPort(1)).ended(None);
        vm.agent.clock(5000, 0);
        vm.channel.set_trouble("none".into());
        let text = metrics.text();
        for metric in METRICS {
            let name = metric.bare_name();
            let described = format!("# TYPE {name} ");
            assert_eq!(text.matches(&described).count(), 1, "{name}: {text}");
            let first = text.lines().find(|l| {
                let rest = l.strip_prefix(name);
                rest.is_some_and(|rest| rest.starts_with(['{', ' ', '_']))
            });
            let Some(first) = first else {
                assert_eq!(metric.name, CARD.name, "{text}");
                continue;
            };
            for label in metric.labels {
                assert!(first.contains(&format!("{label}=\"")), "{first}");
            }
        }
        assert!(text.ends_with("# EOF\n"));
    }
}

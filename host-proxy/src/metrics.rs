//! Counters and gauges, in Prometheus' text format.

use std::fmt::Write as _;
use std::sync::{Mutex, PoisonError};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Metric as Encode, Registry as Prometheus};

use crate::state::State;

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
const STREAMS: Metric = Metric {
    name: "adit_vm_streams",
    labels: &["vm"],
    help: "Open streams of the VM",
};
const FAULT: Metric = Metric {
    name: "adit_vm_fault",
    labels: &["vm", "kind"],
    help: "1 while the VM has a fault of that kind: power-cycle, port-process, transport, enrolment, clone, card, trust, agent, \
           policy or journal",
};
const CONFIG: Metric = Metric {
    name: "adit_config_last_reload_successful",
    labels: &[],
    help: "0 if the configuration was refused when it was last read, else 1",
};

/// All metrics.
pub const METRICS: &[Metric] = &[REQUESTS, TASKS, READY, STREAMS, FAULT, CONFIG];

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
struct VmLabel {
    vm: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FaultLabels {
    vm: String,
    kind: &'static str,
}

/// The values of all metrics.
pub struct Metrics {
    registry: Mutex<Prometheus>,
    requests: Family<Status, Counter>,
    tasks: Family<Outcome, Counter>,
    ready: Family<VmLabel, Gauge>,
    streams: Family<VmLabel, Gauge>,
    fault: Family<FaultLabels, Gauge>,
    config: Gauge,
}

impl Default for Metrics {
    fn default() -> Self {
        let metrics = Self {
            registry: Mutex::default(),
            requests: Family::default(),
            tasks: Family::default(),
            ready: Family::default(),
            streams: Family::default(),
            fault: Family::default(),
            config: Gauge::default(),
        };
        metrics.register(REQUESTS, &metrics.requests);
        metrics.register(TASKS, &metrics.tasks);
        metrics.register(READY, &metrics.ready);
        metrics.register(STREAMS, &metrics.streams);
        metrics.register(FAULT, &metrics.fault);
        metrics.register(CONFIG, &metrics.config);
        metrics
    }
}

impl Metrics {
    fn register(&self, metric: Metric, value: &(impl Encode + Clone)) {
        let mut registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        // The encoder adds it to every counter.
        let name = metric.name.trim_end_matches("_total");
        registry.register(name, metric.help, value.clone());
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

    /// Counts a task that ended.
    pub fn task_ended(&self, state: &'static str) {
        self.tasks.get_or_create(&Outcome { state }).inc();
    }

    /// Writes all of them, with the VMs as they are now.
    pub fn render(&self, state: &State) -> String {
        let registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        self.ready.clear();
        self.streams.clear();
        self.fault.clear();
        for vm in state.registry.all() {
            let shown = vm.show();
            let label = VmLabel { vm: shown.name };
            let ready = i64::from(shown.state == adit_api::VmState::Ready);
            self.ready.get_or_create(&label).set(ready);
            let streams = i64::from(shown.streams);
            self.streams.get_or_create(&label).set(streams);
            for fault in vm.faults() {
                let (vm, kind) = (label.vm.clone(), fault.kind.label());
                self.fault.get_or_create(&FaultLabels { vm, kind }).set(1);
            }
        }
        let is_refused = state.reloads.error().is_some();
        self.config.set(i64::from(!is_refused));
        let mut text = String::new();
        if let Err(e) = encode(&mut text, &registry) {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "# {e}");
        }
        text
    }
}

//! Counters, in Prometheus' text format.

use std::fmt::Write as _;
use std::sync::{Mutex, PoisonError};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry as Prometheus;

use crate::registry::Registry;

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

/// All of them. Labels are bounded: methods and states of ours, names of registered VMs.
pub struct Metrics {
    registry: Mutex<Prometheus>,
    requests: Family<Status, Counter>,
    tasks: Family<Outcome, Counter>,
    ready: Family<VmLabel, Gauge>,
    streams: Family<VmLabel, Gauge>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Prometheus::with_prefix("adit");
        let (requests, tasks) = (Family::default(), Family::default());
        let (ready, streams) = (Family::default(), Family::default());
        registry.register(
            "proxy_requests",
            "Requests answered by the proxy",
            Clone::clone(&requests),
        );
        registry.register(
            "tasks_ended",
            "Tasks that reached a terminal state",
            Clone::clone(&tasks),
        );
        registry.register(
            "vm_ready",
            "1 while the VM's agent is connected",
            Clone::clone(&ready),
        );
        registry.register(
            "vm_streams",
            "Open streams of the VM",
            Clone::clone(&streams),
        );
        Self {
            registry: Mutex::new(registry),
            requests,
            tasks,
            ready,
            streams,
        }
    }
}

impl Metrics {
    /// Counts an answered request.
    pub fn request(&self, connect: bool, status: u16) {
        let method = if connect { "connect" } else { "absolute" };
        self.requests
            .get_or_create(&Status { method, status })
            .inc();
    }

    /// Counts a task that ended.
    pub fn task_ended(&self, state: &'static str) {
        self.tasks.get_or_create(&Outcome { state }).inc();
    }

    /// Writes all of them, with the VMs as they are now.
    pub fn render(&self, vms: &Registry) -> String {
        self.ready.clear();
        self.streams.clear();
        for vm in vms.all() {
            let shown = vm.show();
            let label = VmLabel { vm: shown.name };
            self.ready
                .get_or_create(&label)
                .set(i64::from(shown.state == adit_api::VmState::Ready));
            self.streams
                .get_or_create(&label)
                .set(i64::from(shown.streams));
        }
        let mut text = String::new();
        let registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(e) = encode(&mut text, &registry) {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "# {e}");
        }
        text
    }
}

//! Series of VMs and listeners, read from them when they are asked for.

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

use super::listener::Listeners;
use super::{
    ACCEPTED, ANSWERS, CARD, CLOCK, DIAL_TIME, DIALS, FAULT, FIRST_BYTE, LOCKED, Metric, OPEN,
    OPEN_MAX, QUEUED, READY, STREAMS, TURNED, Turned,
};
use crate::front::dns::Kind;
use crate::registry::Registry;

/// Whose series.
#[derive(Debug)]
pub(super) struct Scrape {
    pub(super) vms: Arc<Registry>,
    pub(super) listeners: Listeners,
}

/// Writes a metric: a line for each value that `each` passes on, with the values of its labels.
fn family<'a>(
    encoder: &mut DescriptorEncoder<'_>,
    metric: &Metric,
    kind: MetricType,
    each: impl FnOnce(&mut dyn FnMut(&[&str], &dyn Encoded) -> fmt::Result) -> fmt::Result + 'a,
) -> fmt::Result {
    let mut family = encoder.encode_descriptor(metric.bare_name(), metric.help, None, kind)?;
    each(&mut |values, value| {
        let pairs = metric.labels.iter().copied().zip(values.iter().copied());
        let labels: Vec<(&str, &str)> = pairs.collect();
        value.put(family.encode_family(&labels.as_slice())?)
    })
}

/// A value. `EncodeMetric` takes itself by value in its other half, so it cannot be passed on as it is.
trait Encoded {
    fn put(&self, encoder: MetricEncoder<'_>) -> fmt::Result;
}

impl<M: EncodeMetric> Encoded for M {
    fn put(&self, encoder: MetricEncoder<'_>) -> fmt::Result {
        self.encode(encoder)
    }
}

impl Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        self.of_vms(&mut encoder)?;
        self.of_listeners(&mut encoder)
    }
}

impl Scrape {
    fn of_vms(&self, to: &mut DescriptorEncoder<'_>) -> fmt::Result {
        // One look at each, so that its lines belong together.
        let vms = self.vms.all();
        let shown: Vec<_> = vms.iter().map(|vm| vm.show()).collect();
        let gauge = MetricType::Gauge;
        family(to, &READY, gauge, |put| {
            shown.iter().try_for_each(|vm| {
                let ready = i64::from(vm.state == adit_api::VmState::Ready);
                put(&[&vm.name], &ConstGauge::new(ready))
            })
        })?;
        family(to, &LOCKED, gauge, |put| {
            let mut all = shown.iter();
            all.try_for_each(|vm| put(&[&vm.name], &ConstGauge::new(i64::from(vm.lock.is_some()))))
        })?;
        family(to, &STREAMS, gauge, |put| {
            let mut all = shown.iter();
            all.try_for_each(|vm| put(&[&vm.name], &ConstGauge::new(i64::from(vm.streams))))
        })?;
        family(to, &QUEUED, gauge, |put| {
            let mut all = shown.iter();
            all.try_for_each(|vm| put(&[&vm.name], &ConstGauge::new(i64::from(vm.queued))))
        })?;
        family(to, &CLOCK, gauge, |put| {
            let told = shown
                .iter()
                .filter_map(|vm| Some((&vm.name, vm.clock_ahead_ms?)));
            let mut told = told.map(|(name, ms)| (name, ms as f64 / 1000.0));
            told.try_for_each(|(name, s)| put(&[name], &ConstGauge::new(s)))
        })?;
        family(to, &CARD, gauge, |put| {
            let mut all = vms.iter();
            all.try_for_each(|vm| match vm.agent.card_ends() {
                Some(at) => put(&[vm.name.as_str()], &ConstGauge::new(at.as_second())),
                None => Ok(()),
            })
        })?;
        family(to, &FAULT, gauge, |put| {
            vms.iter().try_for_each(|vm| {
                let faults = vm.faults();
                let mut kinds = faults.iter().map(|fault| fault.kind.label());
                kinds.try_for_each(|kind| put(&[vm.name.as_str(), kind], &ConstGauge::new(1_i64)))
            })
        })?;
        let dialled = || {
            vms.iter()
                .filter_map(|vm| Some((vm.name.as_str(), vm.dials.seen()?)))
        };
        family(to, &DIALS, MetricType::Counter, |put| {
            dialled().try_for_each(|(name, seen)| {
                let counts = seen.counts();
                let mut counts = counts.iter();
                counts.try_for_each(|(end, n)| put(&[name, end], &ConstCounter::new(*n)))
            })
        })?;
        family(to, &DIAL_TIME, MetricType::Histogram, |put| {
            dialled().try_for_each(|(name, seen)| put(&[name], &seen.dial))
        })?;
        family(to, &FIRST_BYTE, MetricType::Histogram, |put| {
            dialled().try_for_each(|(name, seen)| put(&[name], &seen.first_byte))
        })
    }

    fn of_listeners(&self, to: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let all = self.listeners.all();
        family(to, &ACCEPTED, MetricType::Counter, |put| {
            all.iter()
                .try_for_each(|(name, l)| put(&[name], &ConstCounter::new(l.accepted())))
        })?;
        family(to, &OPEN, MetricType::Gauge, |put| {
            all.iter()
                .try_for_each(|(name, l)| put(&[name], &ConstGauge::new(l.open())))
        })?;
        family(to, &OPEN_MAX, MetricType::Gauge, |put| {
            all.iter().try_for_each(|(name, l)| {
                let max = i64::try_from(l.max).unwrap_or(i64::MAX);
                put(&[name], &ConstGauge::new(max))
            })
        })?;
        family(to, &TURNED, MetricType::Counter, |put| {
            all.iter().try_for_each(|(name, l)| {
                let mut reasons = Turned::ALL.iter();
                reasons.try_for_each(|why| {
                    put(&[name, why.label()], &ConstCounter::new(l.turned_by(*why)))
                })
            })
        })?;
        family(to, &ANSWERS, MetricType::Counter, |put| {
            all.iter().try_for_each(|(name, l)| {
                let mut counted = Kind::ALL.iter().filter_map(|kind| {
                    let count = l.answered_by(*kind)?;
                    Some((kind.word(), count))
                });
                counted.try_for_each(|(word, n)| put(&[name, word], &ConstCounter::new(n)))
            })
        })
    }
}

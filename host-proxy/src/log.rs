//! Log lines to stderr: of each kind one a second for each VM, and how many were left out (R111).
//!
//! A kind is the place in the code that logs, with the line's field `kind` if it has one. What a guest, a client or a port
//! process makes happen a million times becomes one line a second, and no VM's lines are lost because of another's.

use std::collections::HashMap;
use std::fmt::Debug;
use std::io::Write;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::callsite::Identifier;
use tracing::field::{Field, Visit};
use tracing::{Event, Metadata, Subscriber};
use tracing_subscriber::layer::{Context, Filter, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

/// Kinds, times VMs, that are counted separately; those beyond count as one.
const KINDS_MAX: usize = 16_384;
/// Most characters of a VM's name, and of a kind, that are looked at.
const NAME_MAX: usize = 64;
/// In this time a kind has one line.
const PERIOD: Duration = Duration::from_secs(1);

/// Starts logging.
pub fn start(json: bool) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let limit = Limit {
        json,
        kinds: Mutex::default(),
    };
    let all = tracing_subscriber::registry().with(filter);
    if json {
        all.with(log.json().with_filter(limit)).init();
    } else {
        all.with(log.with_ansi(false).with_filter(limit)).init();
    }
}

/// Where it is logged, and of which VM and kind; none: what does not fit into the map.
type Kind = Option<(Identifier, String)>;

#[derive(Debug, Default)]
struct Kinds(HashMap<Kind, (Instant, u64)>);

impl Kinds {
    /// Whether a line may be written now, and how many were left out before it.
    fn admit(&mut self, kind: Kind, now: Instant) -> Option<u64> {
        let over = |since: Instant| now.duration_since(since) >= PERIOD;
        let mut kind = kind;
        if self.0.len() >= KINDS_MAX && !self.0.contains_key(&kind) {
            // An entry whose second is over and that left nothing out is not needed.
            self.0.retain(|_, (since, left)| *left > 0 || !over(*since));
            if self.0.len() >= KINDS_MAX {
                kind = None;
            }
        }
        match self.0.get_mut(&kind) {
            Some((since, left)) if !over(*since) => {
                *left += 1;
                None
            }
            Some((since, left)) => {
                *since = now;
                Some(std::mem::take(left))
            }
            None => {
                self.0.insert(kind, (now, 0));
                Some(0)
            }
        }
    }
}

struct Limit {
    json: bool,
    kinds: Mutex<Kinds>,
}

impl<S: Subscriber> Filter<S> for Limit {
    fn enabled(&self, _: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        true
    }

    fn event_enabled(&self, event: &Event<'_>, _: &Context<'_, S>) -> bool {
        let mut of = Of::default();
        event.record(&mut of);
        let meta = event.metadata();
        let kind = Some((meta.callsite(), format!("{} {}", of.vm, of.kind)));
        let admitted = {
            let mut kinds = self.kinds.lock().unwrap_or_else(PoisonError::into_inner);
            kinds.admit(kind, Instant::now())
        };
        if let Some(left @ 1..) = admitted {
            let line = left_out(self.json, left, meta.target(), &of.vm);
            // A line that cannot be written is dropped.
            let _ = std::io::stderr().write_all(line.as_bytes());
        }
        admitted.is_some()
    }
}

/// The line that goes ahead of the next one of its kind.
fn left_out(json: bool, left: u64, target: &str, vm: &str) -> String {
    match json {
        true => {
            let line = serde_json::json!({"left_out": left, "target": target, "vm": vm});
            format!("{line}\n")
        }
        false if vm.is_empty() => format!("({left} lines like the next one left out)\n"),
        false => format!(
            "({left} lines like the next one left out, vm={})\n",
            adit_names::escape(vm)
        ),
    }
}

/// The fields `vm` and `kind` of an event.
#[derive(Default)]
struct Of {
    vm: String,
    kind: String,
}

impl Visit for Of {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let kept = match field.name() {
            "vm" => &mut self.vm,
            "kind" => &mut self.kind,
            _ => return,
        };
        *kept = format!("{value:?}").chars().take(NAME_MAX).collect();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Site(Metadata<'static>);
    impl tracing::callsite::Callsite for Site {
        fn set_interest(&self, _: tracing::subscriber::Interest) {}
        fn metadata(&self) -> &Metadata<'_> {
            &self.0
        }
    }
    static SITE: Site = Site(Metadata::new(
        "a",
        "a",
        tracing::Level::INFO,
        None,
        None,
        None,
        tracing::field::FieldSet::new(&[], tracing::callsite::Identifier(&SITE)),
        tracing::metadata::Kind::EVENT,
    ));

    fn of(vm: &str) -> Kind {
        Some((Identifier(&SITE), vm.into()))
    }

    #[test]
    fn r111_a_kind_has_a_line_a_second_and_its_count_and_takes_nobody_elses() {
        let (mut kinds, now) = (Kinds::default(), Instant::now());
        let written = (0..100_000)
            .filter(|_| kinds.admit(of("a"), now).is_some())
            .count();
        assert_eq!(written, 1);
        assert_eq!(kinds.admit(of("b"), now), Some(0));
        assert_eq!(kinds.admit(of("a"), now + PERIOD), Some(99_999));
        assert_eq!(kinds.admit(of("a"), now + 2 * PERIOD), Some(0));
    }

    #[test]
    fn r111_kinds_beyond_the_limit_share_one() {
        let (mut kinds, now) = (Kinds::default(), Instant::now());
        let written = (0..2 * KINDS_MAX)
            .filter(|n| kinds.admit(of(&n.to_string()), now).is_some())
            .count();
        assert_eq!(written, KINDS_MAX + 1);
        assert!(kinds.0.len() <= KINDS_MAX + 1);
        // The second after, there is room again.
        assert_eq!(kinds.admit(of("new"), now + PERIOD), Some(0));
    }
}

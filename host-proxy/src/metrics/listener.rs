//! Counters of one listener. They are there for as long as it is, and a configuration has so many of them.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use crate::front::dns::Kind;

/// Why a connection was not served, or no longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turned {
    /// aditd has few descriptors left.
    Descriptors,
    /// The client has as many connections as it may.
    Share,
    /// It was silent, and another one needed its place.
    Silent,
}

impl Turned {
    /// All reasons.
    pub const ALL: [Self; 3] = [Self::Descriptors, Self::Share, Self::Silent];

    /// Label of the metric.
    pub fn label(self) -> &'static str {
        match self {
            Self::Descriptors => "descriptors",
            Self::Share => "client-share",
            Self::Silent => "silent",
        }
    }
}

/// What is counted of a listener.
#[derive(Debug, Default)]
pub struct Listener {
    /// Its name.
    pub name: String,
    /// Connections that it may have at a time.
    pub max: usize,
    accepted: AtomicU64,
    open: AtomicI64,
    turned: [AtomicU64; Turned::ALL.len()],
    /// Answers of one for DNS.
    answers: OnceLock<[AtomicU64; Kind::ALL.len()]>,
}

impl Listener {
    /// Of a listener that may have so many connections at a time.
    pub fn new(max: usize) -> Arc<Self> {
        Arc::new(Self {
            max,
            ..Self::default()
        })
    }

    /// A connection has a place.
    pub fn opened(&self) {
        self.accepted.fetch_add(1, Ordering::Relaxed);
        self.open.fetch_add(1, Ordering::Relaxed);
    }

    /// Its place is free.
    pub fn closed(&self) {
        self.open.fetch_sub(1, Ordering::Relaxed);
    }

    /// A connection was turned away.
    pub fn turned(&self, why: Turned) {
        self.turned[why as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// It is one for DNS: its answers are counted from here on.
    pub fn answers(&self) {
        self.answers.get_or_init(Default::default);
    }

    /// A question had this answer.
    pub fn answered(&self, kind: Kind) {
        let answers = self.answers.get_or_init(Default::default);
        answers[kind as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn answered_by(&self, kind: Kind) -> Option<u64> {
        let answers = self.answers.get()?;
        Some(answers[kind as usize].load(Ordering::Relaxed))
    }

    pub(super) fn accepted(&self) -> u64 {
        self.accepted.load(Ordering::Relaxed)
    }

    pub(super) fn open(&self) -> i64 {
        self.open.load(Ordering::Relaxed)
    }

    pub(super) fn turned_by(&self, why: Turned) -> u64 {
        self.turned[why as usize].load(Ordering::Relaxed)
    }
}

/// Those that there are, by name. One that is bound again under its name takes the place of the one before: two series with one
/// label would make Prometheus refuse all of them.
#[derive(Clone, Debug, Default)]
pub(super) struct Listeners(Arc<Mutex<BTreeMap<String, Weak<Listener>>>>);

impl Listeners {
    pub(super) fn add(&self, name: &str, max: usize) -> Arc<Listener> {
        let listener = Arc::new(Listener {
            name: name.to_owned(),
            max,
            ..Listener::default()
        });
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, listener| listener.strong_count() > 0);
        all.insert(name.to_owned(), Arc::downgrade(&listener));
        listener
    }

    pub(super) fn all(&self) -> Vec<(String, Arc<Listener>)> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let there = all
            .iter()
            .filter_map(|(name, listener)| Some((name.clone(), listener.upgrade()?)));
        there.collect()
    }
}

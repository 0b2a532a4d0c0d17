//! A request or a tunnel from its beginning to its end, and the lines that say what it was: in the access log, and in the audit.
//!
//! ```text
//! a front end ─ Visit ─ caller, destination, grant, dial, first byte, status ─ dropped ─► one line each
//!                 └─ handed to a port process: Note ───────► … it ends there ─► Ended ─► the same lines
//! ```
//! A visit is written when the last copy of it is dropped: whoever still carries bytes of it has one. A tunnel that goes to its
//! VM's port process leaves aditd; what is known of it then goes along as a note, and comes back with what it came to, also
//! to the next aditd. A port process may be in its guest's hands, so a note is sealed: what another process says of a caller
//! counts for nothing. Which VM it was is known by who says it.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use adit_api::token::sha256;
use adit_channel::hello::Extensions;
use adit_names::VmId;
use adit_port::control::{Ends, NOTE_MAX, TunnelEnd};
use serde::{Deserialize, Serialize};

use crate::access::Caller;
use crate::access::audit::{Allowed, Audit, Moved, counted_as};
use crate::config::AccessLog;
use crate::lines::{Lines, Output, at};
use crate::reach::Destination;
use crate::trace::{RANDOM, Trace};

/// Name of the access log.
pub const FILE: &str = "aditd.access";
/// Lines of one caller in a second.
pub const LINES_MAX: u32 = 1000;
/// Most characters of a text in a line.
const TEXT_MAX: usize = 120;
/// Bytes of a note's seal.
const SEAL: usize = 16;

/// Where visits are written.
#[derive(Debug)]
pub struct Visits {
    access: Option<Lines>,
    audit: Arc<Audit>,
    /// Known to this host's aditd only.
    key: [u8; 16],
}

/// A request or a tunnel. A copy is the same one.
#[derive(Clone, Debug)]
pub struct Visit(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    of: Arc<Visits>,
    began_ms: i64,
    since: Instant,
    trace: Trace,
    said: Mutex<Said>,
    to_vm: AtomicU64,
    from_vm: AtomicU64,
    /// It is written elsewhere, or not at all.
    left: AtomicBool,
}

/// What is known of a visit. It is also what a note has, so that an aditd of another version may read it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct Said {
    #[serde(rename = "l")]
    listener: String,
    #[serde(rename = "p")]
    proto: String,
    #[serde(rename = "m")]
    method: String,
    #[serde(rename = "c")]
    caller: String,
    #[serde(rename = "f")]
    from: String,
    #[serde(rename = "v")]
    vm: String,
    #[serde(rename = "t")]
    target: String,
    #[serde(rename = "g")]
    grant: String,
    #[serde(skip)]
    status: u16,
    #[serde(skip)]
    error: &'static str,
    #[serde(skip)]
    dial: Option<Duration>,
    #[serde(skip)]
    first_byte: Option<Duration>,
    #[serde(skip)]
    has_ended: bool,
}

/// What goes along with a tunnel.
#[derive(Debug, Serialize, Deserialize)]
struct Note {
    #[serde(rename = "a")]
    began_ms: i64,
    #[serde(rename = "i")]
    trace_id: String,
    #[serde(rename = "s")]
    said: Said,
}

/// A line of the access log.
#[derive(Debug, Serialize)]
struct Line<'a> {
    at: String,
    listener: &'a str,
    proto: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    method: &'a str,
    caller: &'a str,
    from: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    vm: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    target: &'a str,
    /// As the client heard it. 0: it heard nothing.
    status: u16,
    #[serde(skip_serializing_if = "str::is_empty")]
    error: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    dial_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    first_byte_ms: Option<f64>,
    #[serde(flatten)]
    moved: Option<&'a Moved>,
    /// It did not end in order.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    broken_off: bool,
    trace_id: &'a str,
}

/// A line for tunnels whose ends nobody has noted.
#[derive(Debug, Serialize)]
struct LostTunnels<'a> {
    at: String,
    vm: &'a str,
    lost_tunnels: u64,
}

impl Visits {
    /// Writes into that directory, as it is wanted.
    ///
    /// # Errors
    /// There can be no thread.
    pub fn start(dir: &Path, log: AccessLog, audit: Arc<Audit>, key: [u8; 16]) -> io::Result<Self> {
        let output = match log {
            AccessLog::Off => None,
            AccessLog::Journal => Some(Output::Journal),
            AccessLog::File => Some(Output::File(dir.join(FILE))),
        };
        let access = output.map(|output| Lines::start("access log", output));
        Ok(Self {
            access: access.transpose()?,
            audit,
            key,
        })
    }

    /// Something is asked at that listener. `parent`: what the client says of the trace that it belongs to.
    pub fn begin(
        self: &Arc<Self>,
        listener: &str,
        proto: &str,
        parent: Option<Trace>,
        now_ms: i64,
    ) -> Visit {
        let mut random = [0; RANDOM];
        // Without random numbers its trace is one that others have as well.
        let _ = getrandom::fill(&mut random);
        let trace = match parent {
            Some(parent) => parent.child(random),
            None => Trace::new(random),
        };
        let said = Said {
            listener: listener.into(),
            proto: proto.into(),
            caller: Caller::NOBODY.into(),
            ..Said::default()
        };
        Visit(Arc::new(Inner {
            of: self.clone(),
            began_ms: now_ms,
            since: Instant::now(),
            trace,
            said: Mutex::new(said),
            to_vm: AtomicU64::new(0),
            from_vm: AtomicU64::new(0),
            left: AtomicBool::new(false),
        }))
    }

    /// Whether anybody wants to know how visits that are allowed end.
    fn wants_ends(&self) -> bool {
        self.access.is_some() || self.audit.allows()
    }

    /// What was decided.
    pub fn audit(&self) -> &Audit {
        &self.audit
    }

    /// A port process of that VM says how tunnels have ended.
    pub fn ended_all(&self, vm: &VmId, ends: &Ends) {
        for end in &ends.ends {
            self.ended(vm.as_str(), end);
        }
        if ends.lost > 0 {
            tracing::warn!(%vm, tunnels = ends.lost, "tunnels have ended faster than that could be noted");
            let line = LostTunnels {
                at: at(jiff::Timestamp::now().as_millisecond()),
                vm: vm.as_str(),
                lost_tunnels: ends.lost,
            };
            if let Some(access) = &self.access {
                access.note("lost", vm.as_str(), LINES_MAX, &line);
            }
            self.audit.lost(vm.as_str(), &line);
        }
    }

    fn ended(&self, vm: &str, end: &TunnelEnd) {
        let Some((seal, json)) = end.note.split_at_checked(SEAL) else {
            return;
        };
        // Whoever makes one up has no time to measure here: it guesses 128 bits.
        if seal != self.seal(vm, json) {
            return tracing::warn!(vm, "a port process says of a tunnel what aditd never noted");
        }
        let Ok(Note {
            began_ms,
            trace_id,
            said,
        }) = serde_json::from_slice(json)
        else {
            return;
        };
        let us = |us: Option<u64>| us.map(Duration::from_micros);
        let said = Said {
            vm: vm.into(),
            status: 200,
            dial: us(end.dial_us),
            first_byte: us(end.first_byte_us),
            ..said
        };
        let moved = Moved {
            bytes_to_vm: end.to_guest,
            bytes_from_vm: end.from_guest,
            duration_ms: end.lasted_us / 1000,
        };
        self.write(&said, began_ms, &trace_id, Some(&moved), end.broken_off);
    }

    /// Nested, so that nothing can be put behind it.
    fn seal(&self, vm: &str, json: &[u8]) -> [u8; SEAL] {
        let inner = sha256(&[&self.key[..], vm.as_bytes(), &[0], json].concat());
        let outer = sha256(&[&self.key[..], &inner].concat());
        let mut seal = [0; SEAL];
        seal.copy_from_slice(&outer[..SEAL]);
        seal
    }

    fn write(
        &self,
        said: &Said,
        began_ms: i64,
        trace_id: &str,
        moved: Option<&Moved>,
        broken_off: bool,
    ) {
        if !said.grant.is_empty() {
            let allowed = Allowed {
                caller: (&said.caller, &said.from),
                verb: "reach",
                vm: &said.vm,
                target: &said.target,
                reason: &said.grant,
                moved,
                trace_id,
            };
            self.audit.allowed(allowed, began_ms);
        }
        let Some(access) = &self.access else { return };
        let ms = |time: Option<Duration>| Some((time?.as_secs_f64() * 1e6).round() / 1e3);
        let line = Line {
            at: at(began_ms),
            listener: &said.listener,
            proto: &said.proto,
            method: &said.method,
            caller: &said.caller,
            from: &said.from,
            vm: &said.vm,
            target: &said.target,
            status: said.status,
            error: said.error,
            dial_ms: ms(said.dial),
            first_byte_ms: ms(said.first_byte),
            moved,
            broken_off,
            trace_id,
        };
        access.note("", &counted_as(&said.caller, &said.from), LINES_MAX, &line);
    }
}

impl Visit {
    /// It is no client's, and nothing is written of it.
    #[must_use]
    pub fn unwritten(self) -> Self {
        self.0.left.store(true, Ordering::Relaxed);
        self
    }

    /// What is asked, in the client's protocol.
    pub fn method(&self, method: &str) {
        self.said().method = shown(method);
    }

    /// Who asks.
    pub fn caller(&self, caller: &Caller) {
        let mut said = self.said();
        (said.caller, said.from) = (shown(&caller.to_string()), shown(caller.from()));
    }

    /// For what.
    pub fn to(&self, to: &Destination) {
        let mut said = self.said();
        (said.vm, said.target) = (to.vm.to_string(), to.what());
    }

    /// About which VM, where nothing in it is meant.
    pub fn about(&self, vm: &VmId) {
        self.said().vm = vm.to_string();
    }

    /// It is allowed, by this grant.
    pub fn allowed(&self, by: Option<&str>) {
        self.said().grant = shown(by.unwrap_or("owner"));
    }

    /// Its stream is open, or was not opened, after so long.
    pub fn dialed(&self, took: Duration) {
        self.said().dial = Some(took);
    }

    /// The VM has begun its answer, so long after it was asked.
    pub fn first_byte(&self, took: Duration) {
        self.said().first_byte = Some(took);
    }

    /// What the client hears: a status, and the error of `Proxy-Status` if it is one.
    pub fn answered(&self, status: u16, error: &'static str) {
        let mut said = self.said();
        (said.status, said.error) = (status, error);
    }

    /// Bytes of the client went to the VM.
    pub fn add_to_vm(&self, bytes: usize) {
        self.0.to_vm.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Bytes of the VM went to the client.
    pub fn add_from_vm(&self, bytes: usize) {
        self.0.from_vm.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// It has ended in order.
    pub fn ended(&self) {
        self.said().has_ended = true;
    }

    /// Name of the VM that is meant.
    pub fn vm(&self) -> String {
        self.said().vm.clone()
    }

    /// Its trace, under the span that it has from here on.
    pub fn trace(&self) -> Trace {
        self.0.trace
    }

    /// What a guest's agent is told of it.
    pub fn extensions(&self) -> Extensions {
        let trace = self.0.trace.to_string().into_bytes();
        Extensions {
            // It fits.
            trace: trace.try_into().unwrap_or_default(),
            ..Extensions::default()
        }
    }

    /// What a port process keeps for the line that is written when the tunnel ends; none: nobody wants one.
    pub fn note(&self) -> Option<Vec<u8>> {
        let visits = &self.0.of;
        if !visits.wants_ends() {
            return None;
        }
        let said = self.said();
        let note = Note {
            began_ms: self.0.began_ms,
            trace_id: self.0.trace.id(),
            said: said.clone(),
        };
        let json = serde_json::to_vec(&note).ok()?;
        let mut bytes = visits.seal(&said.vm, &json).to_vec();
        bytes.extend_from_slice(&json);
        (bytes.len() <= NOTE_MAX).then_some(bytes)
    }

    /// It is a port process's from now on. `noted`: that says how it ends; else it is written as it is now.
    pub fn handed(&self, noted: bool) {
        self.answered(200, "");
        if !noted {
            let said = self.said().clone();
            let inner = &self.0;
            let id = inner.trace.id();
            inner.of.write(&said, inner.began_ms, &id, None, false);
        }
        self.0.left.store(true, Ordering::Relaxed);
    }

    fn said(&self) -> MutexGuard<'_, Said> {
        self.0.said.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.left.load(Ordering::Relaxed) {
            return;
        }
        let said = self.said.get_mut().unwrap_or_else(PoisonError::into_inner);
        let took = u64::try_from(self.since.elapsed().as_millis());
        let moved = Moved {
            bytes_to_vm: self.to_vm.load(Ordering::Relaxed),
            bytes_from_vm: self.from_vm.load(Ordering::Relaxed),
            duration_ms: took.unwrap_or(u64::MAX),
        };
        let said = std::mem::take(said);
        let is_refused = said.status != 0 && !said.error.is_empty();
        let broken_off = !is_refused && !said.has_ended;
        let (began_ms, id) = (self.began_ms, self.trace.id());
        self.of
            .write(&said, began_ms, &id, Some(&moved), broken_off);
    }
}

/// A client's text, bounded, in one line.
fn shown(text: &str) -> String {
    adit_names::escape(text).at_most(TEXT_MAX).to_string()
}

#[cfg(test)]
mod tests;

//! The whole of it over the ring: the agent's services by name, a signed goal, and what happens when somebody is killed.

use std::time::{Duration, Instant};

use adit_tests::host::Host;
use adit_tests::image::Kernel;
use adit_tests::process::wait_for;

use crate::{RING, Setup, bins, boot_with, echo, run_goal};

const LIMIT: Duration = Duration::from_secs(20);
const HELLO: &str =
    "steps: [{id: hi, script: {interpreter: /bin/sh, script: \"echo over the ring\"}}]\n";

impl Setup {
    /// Waits until the agent is attached (again), and the carriers were measured; returns how long it took.
    fn wait_ring(&self) -> Duration {
        let begin = Instant::now();
        let mut attached = None;
        let waited = wait_for("the ring", LIMIT, || {
            let ring = &self.vm()["carrier"];
            if ring["kind"] == "ring" {
                attached.get_or_insert(begin.elapsed());
            }
            Ok(ring["vsock_dial_ns"].is_u64().then_some(()))
        });
        waited.unwrap_or_else(|e| panic!("{e:#}\n{:#}\n{}", self.vm(), self.logs()));
        attached.unwrap_or_default()
    }

    /// Bytes that went through each carrier's streams cannot be told apart from outside: what can is that a tunnel ends with
    /// the ring, and another does not. Here: the job is done, and over the ring.
    fn job(&self) {
        assert!(self.curl(&["http://web-1/"]).contains("this is web-1"));
        for len in [1, 4096, 65_537, 4 << 20] {
            echo(&self.host, "web-1:7", len);
        }
        let list = run_goal(self, HELLO);
        assert!(list.contains("over the ring"), "{list}");
        assert_eq!(self.vm()["carrier"]["kind"], "ring");
    }
}

fn setup(kernel: Kernel, iommu: bool) -> Option<Setup> {
    let host = Host::start_with(&bins()?, &["web-1"], RING).unwrap();
    Some(boot_with(kernel, host, "", false, Some(iommu)))
}

fn job(kernel: Kernel, iommu: bool, doorbell: &str) {
    let Some(setup) = setup(kernel, iommu) else {
        return;
    };
    setup.wait_ring();
    let (_, shown) = setup.adit(&["vm", "show", "web-1"]);
    println!("{shown}");
    assert!(shown.contains(doorbell), "{shown}");
    setup.job();
}

#[test]
fn the_job_is_done_over_a_ring_that_a_byte_rings() {
    job(Kernel::V6_1, false, "a byte over vsock");
}

#[test]
fn the_job_is_done_over_a_ring_with_interrupts() {
    job(Kernel::V6_12, true, "interrupt");
}

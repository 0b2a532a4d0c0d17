//! Two partitions at native speed: this process, and a guest without an operating system in user mode on KVM. A second process
//! runs the same code for comparison: the difference is the cost of the partition.

use std::fs::File;
use std::path::Path;

use adit_bare::abi::{REGION_UNIT, Task, Verdict};
use adit_bare::ring;
use adit_benches::duel::{self, Home, check, stamp};
use adit_ringbuf::region::{Lane, Spec};
use adit_ringbuf::session::{Ends, Event, Host};
use adit_ringbuf::{Mapped, Pace};
use adit_vmm_sample::bare::Bare;

const BYTES: usize = REGION_UNIT as usize;
const SIZE: usize = 64;

/// Median and 99th percentile of a round trip of 64 bytes over the ring, ns. Both sides poll. `image` is the guest's; `None`:
/// another process echoes.
pub fn round_trip(image: Option<&Path>) -> [f64; 2] {
    let (memory, fd) = Mapped::memfd(BYTES).expect("memory");
    let lane = Lane {
        to_guest: 256 << 10,
        to_host: 256 << 10,
    };
    let mut host = Host::offer(memory.clone(), Spec::new(&[lane]), 1).expect("a region");
    // The guest is made before anybody polls. A VM belongs to the process that made it, so the guest runs on a thread.
    let guest = image.map(|image| {
        let region = (File::from(fd), BYTES as u64);
        Bare::new(image, Task::Echo, Some(region)).expect("a guest")
    });
    let home = match guest {
        Some(_) => Home::Threads,
        None => Home::Processes,
    };
    let far = move || {
        match guest {
            None => {
                ring::echo(memory).expect("an honest host");
            }
            Some(mut guest) => {
                let (verdict, said) = guest.run().expect("a verdict");
                assert_eq!(verdict, Verdict::Done, "{said}");
            }
        }
        Vec::new()
    };
    let near = || {
        let mut ends = attached(&mut host);
        let (mut message, mut pace) = ([9; SIZE], Pace::default());
        let said = duel::trips(|n| {
            stamp(&mut message, n);
            let _ = ends.producer.try_push(&message).expect("room");
            let _ = ends.producer.publish();
            while ends.consumer.pop(&mut message).expect("honest").is_none() {
                let _ = ends.consumer.release();
                pace.missed();
            }
            pace.came(SIZE);
            check(&message, n);
        });
        let _ = host.close();
        said
    };
    let (said, _) = duel::run(home, near, far);
    [said[0], said[1]]
}

fn attached(host: &mut Host<Mapped>) -> Ends<Mapped> {
    loop {
        if let Some(Event::Attached { .. }) = host.poll().event {
            return host.ends(0, false).expect("its own region");
        }
        std::hint::spin_loop();
    }
}

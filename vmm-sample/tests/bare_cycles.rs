//! R12 with a guest without Linux: guests that end in the middle of a copy leave no descriptor and no mapping behind. This test
//! counts those of its process, so it has a file, and with it a process, of its own. `cargo xtask test` builds the image and
//! names it.

use std::fs::File;
use std::io::{Read, Write};
use std::thread;
use std::time::{Duration, Instant};

use adit_bare::abi::{REGION_UNIT, Task, Verdict};
use adit_bare::streams;
use adit_channel::dial::DialError;
use adit_channel::ring::{self, RingBells, RingCarrier};
use adit_channel::shard::Shard;
use adit_channel::stream::Target;
use adit_engine::EngineConfig;
use adit_ringbuf::Mapped;
use adit_vmm_sample::bare::Bare;

const REGION_BYTES: u64 = 2 * REGION_UNIT;
const LIMIT: Duration = Duration::from_secs(20);
const CYCLES: u32 = 40;
/// Mappings that the allocator may add meanwhile.
const ARENAS: usize = 8;

fn counts() -> [usize; 2] {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    [
        std::fs::read_dir("/proc/self/fd").unwrap().count(),
        maps.lines().count(),
    ]
}

#[test]
fn r12_guests_that_end_in_the_middle_of_a_copy_leave_nothing() {
    let Some(image) = std::env::var_os("ADIT_BARE_IMAGE") else {
        println!("skipped: ADIT_BARE_IMAGE is not set; `cargo xtask test` builds the image");
        return;
    };
    if let Err(e) = File::options().read(true).write(true).open("/dev/kvm") {
        println!("skipped: /dev/kvm: {e}");
        return;
    }
    let cycle = || {
        let (memory, fd) = Mapped::memfd(REGION_BYTES as usize).unwrap();
        let spec = ring::spec(REGION_BYTES as usize).unwrap();
        let carrier = RingCarrier::host(memory, spec, 1, RingBells::polled()).unwrap();
        let region = (File::from(fd), REGION_BYTES);
        let mut guest = Bare::new(image.as_ref(), Task::Streams, Some(region)).unwrap();
        let guest = thread::spawn(move || guest.run().unwrap());
        let mut shard = Shard::new().unwrap();
        let port = shard.add(carrier, EngineConfig::default(), 7).unwrap();
        let dialer = shard.handle(port).dialer();
        let host = shard.spawn("ring").unwrap();
        let target = Target {
            port: streams::PORT,
            hello: None,
        };
        let stream = loop {
            match dialer.dial(&target, LIMIT) {
                Err(DialError::NoSession) => thread::sleep(Duration::from_millis(1)),
                stream => break stream.unwrap(),
            }
        };
        stream.set_deadline(Some(Instant::now() + LIMIT));
        thread::scope(|scope| {
            // The write fails when the host ends.
            scope.spawn(|| while (&stream).write_all(&[7; 1 << 16]).is_ok() {});
            (&stream).read_exact(&mut vec![0; 1 << 18]).unwrap();
            drop((dialer, host));
        });
        let (verdict, said) = guest.join().unwrap();
        assert_eq!(verdict, Verdict::Done, "{said}");
    };
    (0..4).for_each(|_| cycle());
    let before = counts();
    (0..CYCLES).for_each(|_| cycle());
    let [fds, maps] = counts();
    assert!(
        fds <= before[0] && maps <= before[1] + ARENAS,
        "{before:?} descriptors and mappings, then {fds} and {maps}"
    );
}

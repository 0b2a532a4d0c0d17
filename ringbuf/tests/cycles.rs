//! Creates and drops many rings: no descriptor and no mapping is left over. The test counts those of its process, so
//! it is the only test in this file.

use adit_ringbuf::{Consumer, Geometry, Mapped, Producer};

#[test]
fn r12_ten_thousand_rings_leak_nothing() {
    let counts = || {
        let fds = std::fs::read_dir("/proc/self/fd").unwrap().count();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        (fds, maps.matches("adit-ring").count())
    };
    let before = counts();
    let geometry = Geometry::alone(4096, 8);
    for _ in 0..10_000 {
        let (ours, fd) = Mapped::memfd(geometry.bytes()).unwrap();
        let theirs = Mapped::from_memfd(fd, geometry.bytes()).unwrap();
        let mut producer = Producer::new(ours, geometry, false).unwrap();
        let mut consumer = Consumer::new(theirs, geometry, false).unwrap();
        let _ = producer.try_push(b"through another mapping").unwrap();
        let mut buf = [0; 64];
        assert_eq!(consumer.pop(&mut buf).unwrap(), Some(23));
        assert_eq!(&buf[..23], b"through another mapping");
    }
    assert_eq!(counts().1, before.1);
    assert!(
        counts().0 <= before.0 + 8,
        "other tests run in the same process"
    );
}

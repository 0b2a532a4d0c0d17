//! Keys of listeners and of descriptors: each is used only once at a time, and none is ever truncated.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::pair::Pair;
use super::threads;
use crate::shard::{KEY_MAX, News, Shard};
use crate::stream::{ListenError, Listener};

/// The first listener keeps the port; a second gets an error.
#[test]
fn a_port_has_one_listener_until_that_is_dropped() {
    let (a, b, _threads) = threads();
    let target = crate::stream::Target {
        port: 7,
        hello: None,
    };
    let listener = b.listen(7).unwrap();
    assert_eq!(b.listen(7).unwrap_err(), ListenError::Taken { port: 7 });
    let reaches = |listener: &Listener| {
        std::thread::scope(|s| {
            let accepted = s.spawn(|| listener.accept().unwrap().accept().unwrap());
            a.dialer().dial(&target, Duration::from_secs(30)).unwrap();
            accepted.join().unwrap()
        })
    };
    reaches(&listener);
    drop(listener);
    reaches(&b.listen(7).unwrap());
}

/// A truncated key would name another descriptor.
#[test]
fn r118_a_key_that_does_not_fit_is_refused() {
    let mut pair = Pair::new();
    let (bell, _) = UnixStream::pair().unwrap();
    let watch = |shard: &Shard<_>, key| shard.watch(bell.as_fd(), key);
    for key in [KEY_MAX + 1, u32::MAX] {
        let refused = watch(&pair.a, key).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
    }
    watch(&pair.a, KEY_MAX).unwrap();
    drop(bell.shutdown(std::net::Shutdown::Both));
    let mut key = None;
    for _ in 0..100 {
        pair.a.turn(Some(Duration::ZERO)).unwrap();
        while let Some(news) = pair.a.poll_news() {
            if let News::Ready { key: ready } = news {
                key = Some(ready);
            }
        }
    }
    assert_eq!(key, Some(KEY_MAX));
}

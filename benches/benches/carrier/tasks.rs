//! Streams between tokio tasks: the shard runs on a thread, and the task sleeps until the shard wakes it, once a burst.

use std::time::Duration;

use adit_benches::duel::{self, Home, check, stamp};
use adit_channel::dial::DialError;
use adit_channel::ring::RingCarrier;
use adit_channel::shard::{Handle, Shard, ShardThread};
use adit_channel::stream::Target;
use adit_engine::EngineConfig;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::SMALL;
use super::streams::{PORT, carriers};

fn spawn(carrier: RingCarrier) -> (Handle, ShardThread) {
    let mut shard = Shard::new().expect("an epoll set");
    let port = shard.add(carrier, EngineConfig::default(), 7);
    let handle = shard.handle(port.expect("a port"));
    (handle, shard.spawn("ring").expect("a thread"))
}

fn block_on<T>(task: impl Future<Output = T>) -> T {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_time().build();
    runtime.expect("a runtime").block_on(task)
}

/// Median and 99th percentile of a round trip, ns.
pub fn trips() -> Vec<f64> {
    let (near, far) = carriers();
    let (said, _) = duel::run(
        Home::Processes,
        || {
            let (handle, _thread) = spawn(near);
            block_on(async {
                let target = Target {
                    port: PORT,
                    hello: None,
                };
                let limit = Duration::from_secs(5);
                let mut stream = loop {
                    match handle.dialer().dial_async(&target, limit).await {
                        Err(DialError::NoSession | DialError::Refused) => {
                            tokio::time::sleep(Duration::from_millis(1)).await;
                        }
                        stream => break stream.expect("a stream"),
                    }
                };
                let mut message = [9; SMALL];
                let mut times = Vec::new();
                for n in 0..duel::trip_count() / 4 {
                    let begin = std::time::Instant::now();
                    stamp(&mut message, n);
                    stream.write_all(&message).await.expect("room");
                    stream.read_exact(&mut message).await.expect("an answer");
                    check(&message, n);
                    times.push(begin.elapsed().as_nanos() as f64);
                }
                duel::warm(&mut times)
            })
        },
        || {
            let (handle, _thread) = spawn(far);
            let listener = handle.listen(PORT).expect("a free port");
            let mut stream = listener
                .accept()
                .expect("a request")
                .accept()
                .expect("open");
            block_on(async {
                let mut message = [0; SMALL];
                while stream.read_exact(&mut message).await.is_ok() {
                    let _ = stream.write_all(&message).await;
                }
            });
            Vec::new()
        },
    );
    said
}

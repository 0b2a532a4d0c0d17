//! Contenders of the ring bench that need more than Rust to build: `ring-peers --cell stream NAME SIZE` prints messages per
//! second. Two pinned processes; each message is copied in and out and checked, as in [`adit_benches::duel`].

use std::fs::File;
use std::sync::OnceLock;

use adit_benches::duel::{self, Ends, Home, RING, Receive1, Send1};
use iceoryx2::port::publisher::Publisher;
use iceoryx2::port::subscriber::Subscriber;
use iceoryx2::port::update_connections::UpdateConnections;
use iceoryx2::prelude::*;
use shmem_ipc::sharedring;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let [_, flag, kind, name, size] = &args[..] else {
        panic!("--cell stream NAME SIZE");
    };
    assert_eq!((flag.as_str(), kind.as_str()), ("--cell", "stream"));
    let size = size.parse().expect("a size");
    let ends = match name.as_str() {
        "iceoryx2" => iceoryx2(size),
        "shmem-ipc" => shmem_ipc(),
        "ipmpsc" => ipmpsc(size),
        _ => panic!("no contender {name:?}"),
    };
    println!("{}", duel::stream(Home::Processes, ends, size)[0]);
}

/// An end that is made in the process that uses it, because the library does not survive a fork.
struct Late<T>(OnceLock<T>, Box<dyn Fn() -> T + Send>);

impl<T> Late<T> {
    fn new(make: impl Fn() -> T + Send + 'static) -> Self {
        Self(OnceLock::new(), Box::new(make))
    }

    fn get(&mut self) -> &mut T {
        if self.0.get().is_none() {
            let _ = self.0.set((self.1)());
        }
        self.0.get_mut().expect("just made")
    }
}

/// A name that no other cell has.
fn unique(what: &str) -> String {
    format!("adit-bench-{what}-{}", std::process::id())
}

type Service = ipc::Service;

struct Publishing {
    _node: Node<Service>,
    publisher: Publisher<Service, [u8], ()>,
}

struct Subscribed {
    _node: Node<Service>,
    subscriber: Subscriber<Service, [u8], ()>,
}

struct Iceoryx<T>(Late<T>);

// SAFETY: each end is made, used and dropped by one process, which has one thread.
#[allow(unsafe_code)]
unsafe impl<T> Send for Iceoryx<T> {}

fn service(
    node: &Node<Service>,
    name: &str,
) -> iceoryx2::service::port_factory::publish_subscribe::PortFactory<Service, [u8], ()> {
    node.service_builder(&name.try_into().expect("a name"))
        .publish_subscribe::<[u8]>()
        .enable_safe_overflow(false)
        .subscriber_max_buffer_size(1024)
        .max_publishers(1)
        .max_subscribers(1)
        .open_or_create()
        .expect("a service")
}

fn iceoryx2(size: usize) -> Ends {
    let name = unique("iceoryx2");
    let same = name.clone();
    let publisher = Late::new(move || {
        let node = NodeBuilder::new().create::<Service>().expect("a node");
        let service = service(&node, &name);
        let publisher = service
            .publisher_builder()
            .initial_max_slice_len(size)
            .backpressure_strategy(BackpressureStrategy::RetryUntilDelivered)
            .create()
            .expect("a publisher");
        // A message published before the subscriber exists would be lost.
        while service.dynamic_config().number_of_subscribers() == 0 {
            std::thread::yield_now();
        }
        let _ = publisher.update_connections();
        Publishing {
            _node: node,
            publisher,
        }
    });
    let subscriber = Late::new(move || {
        let node = NodeBuilder::new().create::<Service>().expect("a node");
        let service = service(&node, &same);
        let subscriber = service.subscriber_builder().create().expect("a subscriber");
        Subscribed {
            _node: node,
            subscriber,
        }
    });
    (Box::new(Iceoryx(publisher)), Box::new(Iceoryx(subscriber)))
}

impl Send1 for Iceoryx<Publishing> {
    fn send(&mut self, message: &[u8]) {
        let publisher = &self.0.get().publisher;
        let sample = publisher
            .loan_slice_uninit(message.len())
            .expect("a sample");
        sample
            .write_from_slice(message)
            .send()
            .expect("a subscriber");
    }
}

impl Receive1 for Iceoryx<Subscribed> {
    fn receive(&mut self, message: &mut [u8]) {
        let subscriber = &self.0.get().subscriber;
        loop {
            if let Some(sample) = subscriber.receive().expect("a publisher") {
                return message.copy_from_slice(&sample);
            }
            std::hint::spin_loop();
        }
    }
}

struct Shared<T>(T);

/// Bytes as elements. It never sleeps, so nothing must be woken.
fn shmem_ipc() -> Ends {
    let sender = sharedring::Sender::<u8>::new(RING).expect("a ring");
    let copy = |file: &File| file.try_clone().expect("a descriptor");
    let receiver = sharedring::Receiver::<u8>::open(
        RING,
        copy(sender.memfd().as_file()),
        copy(sender.empty_signal()),
        copy(sender.full_signal()),
    );
    let receiver = receiver.expect("the same ring");
    (Box::new(Shared(sender)), Box::new(Shared(receiver)))
}

impl Send1 for Shared<sharedring::Sender<u8>> {
    fn send(&mut self, message: &[u8]) {
        let mut rest = message;
        while !rest.is_empty() {
            let mut sent = 0;
            let status = self.0.sender_mut().send(|to, room| {
                sent = room.min(rest.len());
                // SAFETY: the ring has `room` bytes there, which belong to the sender until this returns.
                #[allow(unsafe_code)]
                unsafe {
                    std::ptr::copy_nonoverlapping(rest.as_ptr(), to, sent);
                }
                sent
            });
            status.expect("an honest receiver");
            rest = &rest[sent..];
            if sent == 0 {
                std::hint::spin_loop();
            }
        }
    }
}

impl Receive1 for Shared<sharedring::Receiver<u8>> {
    fn receive(&mut self, message: &mut [u8]) {
        let mut at = 0;
        while at < message.len() {
            let mut taken = 0;
            let status = self.0.receiver_mut().recv(|from, there| {
                taken = there.min(message.len() - at);
                // SAFETY: the ring has `there` bytes there, which belong to the receiver until this returns.
                #[allow(unsafe_code)]
                unsafe {
                    std::ptr::copy_nonoverlapping(from, message[at..].as_mut_ptr(), taken);
                }
                taken
            });
            status.expect("an honest sender");
            at += taken;
            if taken == 0 {
                std::hint::spin_loop();
            }
        }
    }
}

struct Mpsc<T>(Late<T>);

fn ipmpsc(size: usize) -> Ends {
    use ipmpsc::{Receiver, Sender, SharedRingBuffer};
    let path = std::env::temp_dir().join(unique("ipmpsc"));
    let path = path.display().to_string();
    let ring = SharedRingBuffer::create(&path, RING.max(8 * size) as u32).expect("a ring");
    // It stays open on both sides of the fork; its name is not needed any more.
    let (to, from) = (ring.clone(), ring);
    let sender = Late::new(move || Sender::new(to.clone()));
    let receiver = Late::new(move || Receiver::new(from.clone()));
    let _ = std::fs::remove_file(path);
    (Box::new(Mpsc(sender)), Box::new(Mpsc(receiver)))
}

impl Send1 for Mpsc<ipmpsc::Sender> {
    fn send(&mut self, message: &[u8]) {
        let message = serde_bytes::Bytes::new(message);
        self.0.get().send(&message).expect("a receiver");
    }
}

impl Receive1 for Mpsc<ipmpsc::Receiver> {
    fn receive(&mut self, message: &mut [u8]) {
        let receiver = self.0.get();
        let mut context = receiver.zero_copy_context();
        let bytes: &serde_bytes::Bytes = context.recv().expect("a sender");
        message.copy_from_slice(bytes);
    }
}

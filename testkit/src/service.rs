//! Services of the host that most tests and benches have.

use adit_channel::sink::{Service, ServiceEvent, StreamIo};

/// Sends back what it gets.
pub struct Echo;

impl Service for Echo {
    fn on_event(&mut self, event: ServiceEvent<'_>, io: &mut StreamIo<'_>) {
        if let ServiceEvent::Data(bytes) = event {
            let n = io.write(bytes);
            io.take(n);
        }
    }
}

/// Takes what it gets, and sends nothing.
pub struct Drain;

impl Service for Drain {
    fn on_event(&mut self, event: ServiceEvent<'_>, io: &mut StreamIo<'_>) {
        if let ServiceEvent::Data(bytes) = event {
            io.take(bytes.len());
        }
    }
}

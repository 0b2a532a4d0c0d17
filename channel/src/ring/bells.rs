//! One side's doorbells: two that it rings, two that it hears.

use adit_ringbuf_io::attach::Bells;
use adit_ringbuf_io::doorbell::{Doorbell, Polled, Waiter};

/// A doorbell that this side rings: an eventfd, a register of a device, a byte on some socket.
pub type Ring = Box<dyn Doorbell + Send>;
/// A doorbell that this side hears.
pub type Hear = Box<dyn Waiter + Send>;

/// One side's doorbells.
pub struct RingBells {
    /// Tells the other side of data, and of a session that begins or ends.
    pub data: Ring,
    /// Tells the other side of space.
    pub space: Ring,
    /// The other side has data, or its session changed.
    pub data_heard: Hear,
    /// The other side made space; it may never ring where `data_heard` rings for both.
    pub space_heard: Hear,
}

impl std::fmt::Debug for RingBells {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RingBells")
    }
}

impl RingBells {
    /// Of two that this side rings, and two that it hears: data, then space.
    pub fn new<R, H>([data, space]: [R; 2], [data_heard, space_heard]: [H; 2]) -> Self
    where
        R: Doorbell + Send + 'static,
        H: Waiter + Send + 'static,
    {
        Self {
            data: Box::new(data),
            space: Box::new(space),
            data_heard: Box::new(data_heard),
            space_heard: Box::new(space_heard),
        }
    }

    /// The host's of four.
    pub fn of_host(bells: Bells) -> Self {
        let rings = [bells.guest_data, bells.guest_space];
        Self::new(rings, [bells.host_data, bells.host_space])
    }

    /// The guest's of four.
    pub fn of_guest(bells: Bells) -> Self {
        let rings = [bells.host_data, bells.host_space];
        Self::new(rings, [bells.guest_data, bells.guest_space])
    }

    /// None: the other side looks by itself, and so does this one.
    pub fn polled() -> Self {
        Self::new([Polled; 2], [Polled; 2])
    }

    /// Tells whether this side hears nothing, and so must look by itself.
    pub(super) fn deaf(&self) -> bool {
        self.data_heard.fd().is_none()
    }
}

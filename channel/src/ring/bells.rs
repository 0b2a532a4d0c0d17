//! One side's doorbells: two that it signals, and two that it waits on.

use adit_ringbuf_io::attach::Bells;
use adit_ringbuf_io::doorbell::{Doorbell, Polled, Waiter};

/// A doorbell that this side signals: an eventfd, a register of a device, a byte on a socket.
pub type BoxedDoorbell = Box<dyn Doorbell + Send>;
/// A doorbell that this side waits on.
pub type BoxedWaiter = Box<dyn Waiter + Send>;

/// One side's doorbells.
pub struct RingBells {
    /// Signals the other side that there is data, or that a session begins or ends.
    pub data: BoxedDoorbell,
    /// Signals the other side that there is space.
    pub space: BoxedDoorbell,
    /// The other side has data, or its session changed.
    pub data_heard: BoxedWaiter,
    /// The other side has made space. It may never be signalled if `data_heard` is used for both.
    pub space_heard: BoxedWaiter,
}

impl std::fmt::Debug for RingBells {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RingBells")
    }
}

impl RingBells {
    /// Makes doorbells from two that this side signals and two that it waits on. Data first, then space.
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

    /// The host's side of the four doorbells.
    pub fn of_host(bells: Bells) -> Self {
        let rings = [bells.guest_data, bells.guest_space];
        Self::new(rings, [bells.host_data, bells.host_space])
    }

    /// The guest's side of the four doorbells.
    pub fn of_guest(bells: Bells) -> Self {
        let rings = [bells.host_data, bells.host_space];
        Self::new(rings, [bells.guest_data, bells.guest_space])
    }

    /// No doorbells: both sides poll.
    pub fn polled() -> Self {
        Self::new([Polled; 2], [Polled; 2])
    }

    /// Returns true if this side waits on no doorbell, and so must poll.
    pub(super) fn must_poll(&self) -> bool {
        self.data_heard.fd().is_none()
    }
}

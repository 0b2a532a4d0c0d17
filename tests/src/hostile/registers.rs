//! The registers that a driver of any transport writes.

/// What each transport has, at a place of its own.
#[derive(Clone, Copy, Debug)]
pub enum Register {
    FeaturesSelect,
    Features,
    Status,
    QueueSelect,
    QueueSize,
    QueueEnable,
    /// Halves of descriptors, available and used ring, low ones first: 0 to 5.
    QueueAddress(usize),
}

/// The socket device's.
pub trait Registers {
    /// Writes one.
    fn write(&self, register: Register, value: u32);
    /// The status.
    fn status(&self) -> u8;
    /// The CID that the device tells.
    fn guest_cid(&self) -> u64;
    /// Kicks a queue.
    fn kick(&self, queue: u16);
}

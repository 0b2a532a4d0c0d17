//! The registers that a driver writes, independent of the transport.

/// A register that every transport has, each at its own offset.
#[derive(Clone, Copy, Debug)]
pub enum Register {
    FeaturesSelect,
    Features,
    Status,
    QueueSelect,
    QueueSize,
    QueueEnable,
    /// Half of an address: descriptors, available ring and used ring, the low half first: 0 to 5.
    QueueAddress(usize),
}

/// Access to the socket device's registers.
pub trait Registers {
    /// Writes a register.
    fn write(&self, register: Register, value: u32);
    /// Reads the status.
    fn status(&self) -> u8;
    /// Reads the CID.
    fn guest_cid(&self) -> u64;
    /// Kicks a queue.
    fn kick(&self, queue: u16);
}

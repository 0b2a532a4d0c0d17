//! Why a device does not become active.

/// Feature negotiation failed: the driver's or the bus's fault.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// The driver acknowledged a feature that was not offered.
    #[error("features {acked:#x} contain {unknown:#x}, which was not offered")]
    FeatureNotOffered {
        /// The features that the driver acknowledged.
        acked: u64,
        /// The bits that were not offered.
        unknown: u64,
    },
    /// Features are fixed while the device is active.
    #[error("features cannot change while the device is active")]
    Active,
}

/// The queues cannot be used: the driver's or the bus's fault.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ActivateError {
    /// The device is active already; it must be reset first.
    #[error("device is active already")]
    Active,
    /// The driver is a legacy driver.
    #[error("driver did not acknowledge VIRTIO_F_VERSION_1 (features {acked:#x})")]
    Legacy {
        /// The features that the driver acknowledged.
        acked: u64,
    },
    /// A queue's size is not a power of two, or too large.
    #[error("queue {queue}: size {size} is not a power of two in 1..={max}")]
    QueueSize {
        /// Index of the queue.
        queue: u16,
        /// The size the driver chose.
        size: u16,
        /// The largest size.
        max: u16,
    },
    /// A part of a queue is not aligned (virtio 1.3 §2.7).
    #[error("queue {queue}: {part} at {addr:#x} is not a multiple of {align}")]
    QueueAlign {
        /// Index of the queue.
        queue: u16,
        /// Name of the part.
        part: &'static str,
        /// Guest address of the part.
        addr: u64,
        /// The alignment that virtio demands.
        align: u64,
    },
    /// A queue is not ready, or is not in guest memory.
    #[error(
        "queue {queue}: not ready or not in guest memory (descriptors {desc:#x}, available {avail:#x}, used {used:#x})"
    )]
    QueueAddress {
        /// Index of the queue.
        queue: u16,
        /// Guest address of the descriptor table.
        desc: u64,
        /// Guest address of the available ring.
        avail: u64,
        /// Guest address of the used ring.
        used: u64,
    },
}

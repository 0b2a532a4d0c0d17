//! A function through vfio-pci: its memory, its doorbell register, and MSI-X vectors as eventfds. Needs an IOMMU.

use std::sync::Arc;

use adit_ringbuf::region::Region;
use adit_ringbuf_io::doorbell::event_fd;
use vfio_ioctls::{VfioContainer, VfioDevice, VfioError};

use super::map::{self, Registers};
use super::pci::Function;
use super::{Access, Device, Interrupt, OpenError, doorbell_values};

/// vfio's numbers for what a PCI function has (Linux `include/uapi/linux/vfio.h`).
const REGISTERS: u32 = 0;
const SHARED: u32 = 2;
const CONFIG: u32 = 7;
/// In configuration space: the command register, and its bits "memory" and "bus master".
const COMMAND: u64 = 4;
const MEMORY_AND_MASTER: u16 = 0b110;
/// The driver.
pub const DRIVER: &str = "vfio-pci";

/// Opens it.
///
/// # Errors
/// There is no vfio here, or it refuses the function.
pub fn open(function: &Function, register: usize) -> Result<Device, OpenError> {
    function.with_driver(DRIVER, || take(function, register))
}

fn take(function: &Function, register: usize) -> Result<Device, OpenError> {
    let container = Arc::new(VfioContainer::new(None)?);
    let device = Arc::new(VfioDevice::new(&function.dir, container, false)?);
    // vfio switches bus mastering off, and an MSI is a write on the bus.
    let mut command = [0; 2];
    device.region_read(CONFIG, &mut command, COMMAND);
    let command = u16::from_le_bytes(command) | MEMORY_AND_MASTER;
    device.region_write(CONFIG, &command.to_le_bytes(), COMMAND);

    let bytes = |region| usize::try_from(device.get_region_size(region)).unwrap_or(0);
    let at = |region| device.get_region_offset(region);
    let fd = map::descriptor(&device);
    let memory = map::memory(fd, at(SHARED), bytes(SHARED))?;
    Region::read(&memory)?;
    let registers = Registers::map(fd, at(REGISTERS), bytes(REGISTERS))?;
    let [data, space] = registers.doorbells(register, doorbell_values())?;
    let (data_interrupt, space_interrupt) = (event_fd()?, event_fd()?);
    device.enable_msix(vec![&data_interrupt, &space_interrupt])?;
    Ok(Device {
        function: function.address.clone(),
        memory,
        data,
        space,
        data_interrupt: Interrupt::Event(data_interrupt),
        space_interrupt: Interrupt::Event(space_interrupt),
        access: Access::Msix,
        why: String::new(),
        vfio: Some(device),
    })
}

impl From<VfioError> for OpenError {
    fn from(e: VfioError) -> Self {
        Self::Vfio(Box::new(e))
    }
}

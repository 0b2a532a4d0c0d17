//! ACPI tables: processors, interrupts, power, and the addresses of the devices.
//!
//! ```text
//! RSDP ─► XSDT ─┬► FADT (reduced hardware: sleep and reset registers) ─► DSDT: _S5, COM1, one LNRO0005 a virtio device
//!               ├► MADT: local APICs, one IOAPIC
//!               └► MCFG: PCI, if the VM has a ring; the rest of PCI is in the DSDT
//! ```
//! Debian's kernels are built without `virtio_mmio.device=`, so they find virtio-mmio devices only here.

use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use adit_ring_pci::kvm::Place;
use anyhow::ensure;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::layout;

const OEM: [u8; 6] = *b"ADIT  ";
const TABLE: [u8; 8] = *b"ADITVMM ";
const REVISION: u32 = 1;
/// Sleep type of "off". Any value would do; the DSDT tells it to the guest.
pub const SLEEP_TYPE_OFF: u8 = 5;
/// Notification of the generation id: it changed.
const GENERATION_CHANGED: u8 = 0x80;
/// Value that resets, as for the i8042.
const RESET: u8 = 0xfe;
/// FADT boot flags: no VGA, no CMOS clock.
const BOOT_FLAGS: u16 = 1 << 2 | 1 << 5;

/// A virtio-mmio window and its interrupt.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    pub base: u64,
    pub gsi: u32,
}

fn bytes(aml: &dyn Aml) -> Vec<u8> {
    let mut table = Vec::new();
    aml.to_aml_bytes(&mut table);
    table
}

/// Writes all tables into guest memory.
///
/// # Errors
/// They do not fit.
pub fn write(
    memory: &GuestMemoryMmap,
    cpus: u8,
    windows: &[Window],
    ring: Option<&Place>,
) -> anyhow::Result<()> {
    let mut at = layout::ACPI_TABLES;
    let mut put = |table: Vec<u8>| -> anyhow::Result<u64> {
        let here = at;
        at = (at + table.len() as u64).next_multiple_of(16);
        ensure!(at <= layout::RESET_VECTOR, "ACPI tables do not fit");
        memory.write_slice(&table, GuestAddress(here))?;
        Ok(here)
    };
    let dsdt = put(dsdt(windows, ring))?;
    let fadt = put(fadt(dsdt))?;
    let madt = put(madt(cpus))?;
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    if let Some(place) = ring {
        let mut mcfg = MCFG::new(OEM, TABLE, REVISION);
        place.add_ecam(&mut mcfg);
        xsdt.add_entry(put(bytes(&mcfg))?);
    }
    let xsdt = put(bytes(&xsdt))?;
    memory.write_slice(&bytes(&Rsdp::new(OEM, xsdt)), layout::RSDP)?;
    Ok(())
}

fn port(at: u16) -> GAS {
    GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        at.into(),
    )
}

fn fadt(dsdt: u64) -> Vec<u8> {
    let mut fadt = FADTBuilder::new(OEM, TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = BOOT_FLAGS.into();
    fadt.reset_reg = port(layout::I8042_COMMAND);
    fadt.reset_value = RESET;
    fadt.sleep_control_reg = port(layout::SLEEP_CONTROL);
    fadt.sleep_status_reg = port(layout::SLEEP_STATUS);
    bytes(&fadt.finalize())
}

fn madt(cpus: u8) -> Vec<u8> {
    let local = LocalInterruptController::Address(layout::LAPIC);
    let mut madt = MADT::new(OEM, TABLE, REVISION, local);
    for id in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    // The id must differ from those of the processors. Input 0 is GSI 0.
    madt.add_structure(IoApic::new(cpus, layout::IOAPIC, 0));
    bytes(&madt)
}

fn dsdt(windows: &[Window], ring: Option<&Place>) -> Vec<u8> {
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM, TABLE, REVISION);
    let off = aml::Package::new(vec![&SLEEP_TYPE_OFF, &aml::ZERO, &aml::ZERO, &aml::ZERO]);
    dsdt.append_slice(&bytes(&aml::Name::new("_S5_".into(), &off)));
    let ports = aml::IO::new(layout::SERIAL_PORT, layout::SERIAL_PORT, 0, 8);
    let serial = device(
        "COM1",
        &aml::EISAName::new("PNP0501"),
        0,
        &ports,
        layout::SERIAL_GSI,
    );
    dsdt.append_slice(&serial);
    dsdt.append_slice(&generation());
    for (n, window) in windows.iter().enumerate() {
        // Windows are below 4 GiB.
        let registers = aml::Memory32Fixed::new(true, window.base as u32, layout::MMIO_LEN as u32);
        let name = format!("V{n:03}");
        dsdt.append_slice(&device(&name, &"LNRO0005", n, &registers, window.gsi));
    }
    dsdt.append_slice(&ring.map(Place::aml).unwrap_or_default());
    bytes(&dsdt)
}

/// The generation id (Microsoft's "Virtual Machine Generation ID"), and the event device (ACPI 6.5 §5.6.9) whose interrupt
/// says that the id changed. The kernel of a clone then draws new random numbers.
fn generation() -> Vec<u8> {
    let address = layout::GENERATION.0;
    let hid = aml::Name::new("_HID".into(), &"ADITGENI");
    let cid = aml::Name::new("_CID".into(), &"VM_Gen_Counter");
    let ddn = aml::Name::new("_DDN".into(), &"VM_Gen_Counter");
    let (low, high) = (address as u32, (address >> 32) as u32);
    let parts = aml::Package::new(vec![&low, &high]);
    let parts = aml::Name::new("ADDR".into(), &parts);
    let id = aml::Device::new("_SB_.VGEN".into(), vec![&hid, &cid, &ddn, &parts]);

    let interrupt = aml::Interrupt::new(true, true, false, false, layout::EVENT_GSI);
    let resources = aml::ResourceTemplate::new(vec![&interrupt]);
    let hid = aml::Name::new("_HID".into(), &"ACPI0013");
    let uid = aml::Name::new("_UID".into(), &aml::ZERO);
    let resources = aml::Name::new("_CRS".into(), &resources);
    let id_path = aml::Path::new("\\_SB_.VGEN");
    let notify = aml::Notify::new(&id_path, &GENERATION_CHANGED);
    let method = aml::Method::new("_EVT".into(), 1, true, vec![&notify]);
    let event = aml::Device::new("_SB_.GED0".into(), vec![&hid, &uid, &resources, &method]);
    [bytes(&id), bytes(&event)].concat()
}

/// A device of the system bus: its kind, its number within that kind, its registers, and its edge-triggered interrupt.
fn device(name: &str, hid: &dyn Aml, uid: usize, registers: &dyn Aml, gsi: u32) -> Vec<u8> {
    let interrupt = aml::Interrupt::new(true, true, false, false, gsi);
    let resources = aml::ResourceTemplate::new(vec![registers, &interrupt]);
    let hid = aml::Name::new("_HID".into(), hid);
    let uid = aml::Name::new("_UID".into(), &uid);
    // DMA is coherent, as always on x86.
    let coherent = aml::Name::new("_CCA".into(), &aml::ONE);
    let resources = aml::Name::new("_CRS".into(), &resources);
    let path = format!("_SB_.{name}");
    let inside: Vec<&dyn Aml> = vec![&hid, &uid, &coherent, &resources];
    bytes(&aml::Device::new(path.as_str().into(), inside))
}

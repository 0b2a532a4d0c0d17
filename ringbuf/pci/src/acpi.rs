//! ACPI tables for a VMM without PCI: they describe a bus with only this function on it.
//!
//! | object | what |
//! |---|---|
//! | `\_SB.PCI0` | the bus: number 0, both windows, and in `_PRT` the function's pin |
//! | `\_SB.LNKR` | the pin's interrupt: an input of the IOAPIC, edge-triggered |
//! | `\_SB.ECAM` | reserves configuration space: Linux does not use the address in MCFG unless it is reserved |
//!
//! There is no firmware. The guest's kernel finds BARs without addresses, and assigns them.

use acpi_tables::mcfg::MCFG;
use acpi_tables::{Aml, aml};

use crate::kvm::Place;

/// Bytes of configuration space of one bus.
const BUS_BYTES: u64 = 1 << 20;
/// In an address of `_PRT`: all functions of a device.
const ANY_FUNCTION: u32 = 0xffff;

impl Place {
    /// Address of the bus's configuration space, and the device number of the function.
    fn bus(&self) -> (u64, u32) {
        let device = (self.config_at % BUS_BYTES) >> 15;
        (self.config_at - self.config_at % BUS_BYTES, device as u32)
    }

    /// Adds the entry of the bus to MCFG.
    pub fn add_ecam(&self, mcfg: &mut MCFG) {
        mcfg.add_ecam(self.bus().0, 0, 0, 0);
    }

    /// The bytes of the bus for the DSDT.
    ///
    /// # Panics
    /// The first window or the configuration space is not below 4 GiB.
    pub fn aml(&self) -> Vec<u8> {
        let below = |address: u64| u32::try_from(address).expect("an address below 4 GiB");
        let (ecam, device) = self.bus();
        let [low, high] = &self.windows;
        let hid = |id| aml::Name::new("_HID".into(), &aml::EISAName::new(id));

        let interrupt = aml::Interrupt::new(true, true, false, false, self.line);
        let resources = aml::ResourceTemplate::new(vec![&interrupt]);
        let (possible, current) = (
            aml::Name::new("_PRS".into(), &resources),
            aml::Name::new("_CRS".into(), &resources),
        );
        // The interrupt cannot be changed, so `_SRS` does nothing.
        let set = aml::Method::new("_SRS".into(), 1, false, vec![]);
        let inside: Vec<&dyn Aml> = vec![&possible, &current, &set];
        let link = device_with("_SB_.LNKR", &hid("PNP0C0F"), inside);

        let numbers = aml::AddressSpace::new_bus_number(0u16, 0);
        let plain = aml::AddressSpaceCacheable::NotCacheable;
        let prefetchable = aml::AddressSpaceCacheable::PreFetchable;
        let (start, last) = (below(low.start), below(low.end - 1));
        let registers = aml::AddressSpace::new_memory(plain, true, start, last, None);
        let (start, last) = (high.start, high.end - 1);
        let memory = aml::AddressSpace::new_memory(prefetchable, true, start, last, None);
        let resources = aml::ResourceTemplate::new(vec![&numbers, &registers, &memory]);
        let resources = aml::Name::new("_CRS".into(), &resources);
        let (address, source) = (device << 16 | ANY_FUNCTION, aml::Path::new("\\_SB_.LNKR"));
        // Pin A.
        let pin = aml::Package::new(vec![&address, &aml::ZERO, &source, &aml::ZERO]);
        let pins = aml::Name::new("_PRT".into(), &aml::Package::new(vec![&pin]));
        let inside: Vec<&dyn Aml> = vec![&resources, &pins];
        let bus = device_with("_SB_.PCI0", &hid("PNP0A03"), inside);

        let space = aml::Memory32Fixed::new(true, below(ecam), BUS_BYTES as u32);
        let resources = aml::ResourceTemplate::new(vec![&space]);
        let resources = aml::Name::new("_CRS".into(), &resources);
        let reserved = device_with("_SB_.ECAM", &hid("PNP0C02"), vec![&resources]);
        [link, bus, reserved].concat()
    }
}

fn device_with(path: &str, hid: &dyn Aml, inside: Vec<&dyn Aml>) -> Vec<u8> {
    let uid = aml::Name::new("_UID".into(), &aml::ZERO);
    let mut all: Vec<&dyn Aml> = vec![hid, &uid];
    all.extend(inside);
    let mut bytes = Vec::new();
    aml::Device::new(path.into(), all).to_aml_bytes(&mut bytes);
    bytes
}

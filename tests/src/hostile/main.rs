//! `adit-hostile CASE [PART]`: root in the guest takes the socket device from its kernel and drives it from user space, as no kernel
//! would. PART makes storms smaller by that factor, for slow machines. The verdict is printed on the serial line. `adit-hostile
//! list` prints the cases.

mod cases;
mod driver;
mod memory;
mod pci;
mod registers;
mod window;

use anyhow::Context;

fn main() {
    let name = std::env::args().nth(1).unwrap_or_default();
    if name == "list" {
        cases::CASES.iter().for_each(|(name, _)| println!("{name}"));
        return;
    }
    let part = std::env::args().nth(2).and_then(|n| n.parse().ok());
    match run(&name, part.unwrap_or(1)) {
        Ok(seen) => println!("HOSTILE-OK {name}: {seen}"),
        Err(e) => println!("HOSTILE-FAILED {name}: {e:#}"),
    }
}

fn run(name: &str, part: u32) -> anyhow::Result<String> {
    let case = cases::CASES.iter().find(|(n, _)| *n == name);
    let (_, case) = case.with_context(|| format!("no case `{name}`: see `adit-hostile list`"))?;
    let mut driver = driver::Driver::new(part)?;
    driver.honest().context("before the attack")?;
    let seen = case(&mut driver)?;
    driver.honest().context("after the attack")?;
    Ok(seen)
}

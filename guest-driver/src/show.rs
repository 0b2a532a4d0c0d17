//! What a configuration means, for people: `adit-guest check-config` and `adit-guest status`.

use std::fmt::{self, Display, Write as _};

use adit_tasks::Kind;

use crate::config::{ClockSource, Config};
use crate::trust::Anchors;

/// Every key with its value in force, and the trust anchors.
pub fn in_force(config: &Config) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = write(&mut text, config);
    text
}

fn write(out: &mut String, config: &Config) -> fmt::Result {
    let none = |text: String, meaning: &str| match text.is_empty() {
        true => format!("none: {meaning}"),
        false => text,
    };
    let clock = match config.clock {
        ClockSource::Own => "own",
        ClockSource::Host => "host",
    };
    let roots = config.file.roots.iter().map(|root| root.display());
    for (key, value) in [
        ("vm_id", config.vm_id.to_string()),
        ("trust_dir", config.trust_dir.display().to_string()),
        ("state_dir", config.state_dir.display().to_string()),
        ("run_dir", config.run_dir.display().to_string()),
        (
            "allow_ports",
            none(list(&config.allow_ports), "the host reaches no port"),
        ),
        ("clock", clock.into()),
    ] {
        writeln!(out, "{key:<15} {value}")?;
    }
    for &kind in Kind::ALL {
        let key = format!("{}.enabled", kind.name());
        writeln!(out, "{key:<15} {}", config.enabled(kind))?;
    }
    let roots = none(list(roots), "no file is written");
    writeln!(out, "{:<15} {roots}", "file.roots")?;
    anchors(out, &Anchors::read(config))
}

fn anchors(out: &mut String, anchors: &Anchors) -> fmt::Result {
    for key in anchors.keys.keys() {
        writeln!(out, "{:<15} {} {}", "trusted key", key.id(), key.comment())?;
    }
    for error in anchors.skipped.iter().chain(&anchors.distrusted) {
        writeln!(out, "{:<15} {error}", "not trusted")?;
    }
    if anchors.keys.is_empty() {
        writeln!(out, "{:<15} none: no task runs", "trusted key")?;
    }
    Ok(())
}

fn list(items: impl IntoIterator<Item = impl Display>) -> String {
    let items: Vec<String> = items.into_iter().map(|item| item.to_string()).collect();
    items.join(", ")
}

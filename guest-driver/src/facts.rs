//! What the agent says of its guest: kernel, distribution, boot.

use std::fs;

/// Most bytes of one fact.
const FACT_MAX: usize = 128;

/// A random number that the kernel draws at each boot; zero where /proc is not mounted.
pub fn boot_nonce() -> [u8; 16] {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let hex: Vec<u8> = text
        .bytes()
        .filter_map(|b| (b as char).to_digit(16))
        .map(|d| d as u8)
        .collect();
    let mut nonce = [0; 16];
    for (out, pair) in nonce.iter_mut().zip(hex.chunks_exact(2)) {
        *out = pair[0] << 4 | pair[1];
    }
    nonce
}

/// Kernel release, as `uname -r`.
pub fn kernel() -> String {
    cut(&fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default())
}

/// Distribution name and version.
pub fn os() -> String {
    let text = ["/etc/os-release", "/usr/lib/os-release"]
        .iter()
        .find_map(|p| fs::read_to_string(p).ok());
    cut(&pretty_name(&text.unwrap_or_default()))
}

fn pretty_name(os_release: &str) -> String {
    let value = os_release
        .lines()
        .find_map(|l| l.strip_prefix("PRETTY_NAME="));
    value.map_or_else(|| "Linux".into(), |v| v.trim_matches(['"', '\'']).into())
}

fn cut(s: &str) -> String {
    adit_names::escape(s.trim()).at_most(FACT_MAX).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_of_this_machine_are_there() {
        assert_ne!(boot_nonce(), [0; 16]);
        assert!(!kernel().is_empty() && !os().is_empty());
    }

    #[test]
    fn a_hostile_os_release_yields_one_short_line() {
        assert_eq!(
            pretty_name("ID=x\nPRETTY_NAME=\"Debian GNU/Linux 12\"\n"),
            "Debian GNU/Linux 12"
        );
        assert_eq!(
            cut(&pretty_name(&format!(
                "PRETTY_NAME={}\x1b[2J",
                "a".repeat(500)
            )))
            .len(),
            FACT_MAX
        );
    }
}

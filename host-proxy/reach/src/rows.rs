//! A file that says which host has a VM, for hosts that are not to be asked: `VM HOST`, one a line. Pure.
//!
//! ```text
//! # shared by all hosts
//! web-1  alpha
//! db-1   beta
//! ```
//! `#` begins a comment; empty lines say nothing. A VM has one row.

use std::collections::BTreeMap;

use adit_names::VmId;

/// Hosts by the VMs that they have.
pub type Rows = BTreeMap<VmId, VmId>;

/// What is wrong with a line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {why}")]
pub struct RowError {
    /// From 1.
    pub line: usize,
    /// Why it is no row.
    pub why: String,
}

/// Reads a file. `knows`: whether a host may have a VM, and why not.
///
/// # Errors
/// The first line that is no row.
pub fn parse(
    text: &str,
    knows: impl Fn(&VmId, &VmId) -> Result<(), String>,
) -> Result<Rows, RowError> {
    let mut rows = Rows::new();
    for (nth, line) in text.lines().enumerate() {
        let wrong = |why: String| RowError { line: nth + 1, why };
        let row = line.split('#').next().unwrap_or_default();
        let words: Vec<_> = row.split_whitespace().collect();
        let [vm, host] = words[..] else {
            if words.is_empty() {
                continue;
            }
            let why = format!(
                "a line has two words, a VM and its host, and this one has {}",
                words.len()
            );
            return Err(wrong(why));
        };
        let name = |text: &str| {
            let shown = adit_names::escape(text).at_most(80).to_string();
            let name = text.parse::<VmId>();
            name.map_err(|e| wrong(format!("`{shown}` is no name: {e}")))
        };
        let (vm, host) = (name(vm)?, name(host)?);
        knows(&vm, &host).map_err(wrong)?;
        if rows.contains_key(&vm) {
            return Err(wrong(format!("VM `{vm}` has a row already")));
        }
        rows.insert(vm, host);
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<String>, usize> {
        let knows = |_: &VmId, host: &VmId| match host.as_str() {
            "nobody" => Err("there is no such host".into()),
            _ => Ok(()),
        };
        let rows = parse(text, knows).map_err(|e| e.line)?;
        Ok(rows
            .iter()
            .map(|(vm, host)| format!("{vm} {host}"))
            .collect())
    }

    #[test]
    fn a_row_has_a_vm_and_its_host_and_what_is_none_has_its_line() {
        let text = "# a map\n\nweb-1 alpha\n\tdb-1\tbeta # its disk is there\r\n  # end";
        assert_eq!(
            read(text),
            Ok(vec!["db-1 beta".into(), "web-1 alpha".into()])
        );
        assert_eq!(read(""), Ok(vec![]));
        for (text, line) in [
            ("web-1", 1),
            ("web-1 alpha beta", 1),
            ("web-1 alpha\nWEB-2 alpha", 2),
            ("web-1 alpha.adit", 1),
            ("web-1 alpha\n\nweb-1 beta", 3),
            ("#\nweb-1 nobody", 2),
            ("web-1\u{a0}alpha x", 1),
            ("\0", 1),
        ] {
            assert_eq!(read(text), Err(line), "{text:?}");
        }
    }
}

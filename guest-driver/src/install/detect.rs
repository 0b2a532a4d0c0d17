//! Which init system an image has.
//!
//! | init | by |
//! |---|---|
//! | systemd | `systemd` in `lib/systemd` or `usr/lib/systemd` |
//! | OpenRC | `openrc-run` in `sbin` or `usr/sbin` |
//! | either | where it has both, as Debian with OpenRC mostly has: systemd if `sbin/init` is a link to it, else OpenRC |
//! | busybox | `etc/init.d/rcS`, which runs `S??*`, where neither of the others is |

use std::path::{Path, PathBuf};

use adit_image::Root;

use super::Init;

const SYSTEMD: [&str; 2] = ["lib/systemd/systemd", "usr/lib/systemd/systemd"];
const OPENRC: [&str; 2] = ["sbin/openrc-run", "usr/sbin/openrc-run"];
/// What the kernel starts.
const FIRST: &str = "sbin/init";
const BUSYBOX: [&str; 1] = ["etc/init.d/rcS"];

/// The image does not show it.
#[derive(Debug, thiserror::Error)]
pub enum Unknown {
    /// It has none of those that are looked for.
    #[error(
        "{}: no init system is recognised (none of {}): name it with --init, or --init none to start the agent by other means",
        root.display(), sought()
    )]
    None {
        /// The image.
        root: PathBuf,
    },
    /// It has two, and no `/sbin/init`.
    #[error("{}: has both systemd and OpenRC, and no /sbin/init: name the one that starts it with --init", root.display())]
    Both {
        /// The image.
        root: PathBuf,
    },
}

fn sought() -> String {
    let all = SYSTEMD.iter().chain(&OPENRC).chain(&BUSYBOX);
    let all: Vec<String> = all.map(|path| format!("/{path}")).collect();
    all.join(", ")
}

/// Looks for it.
///
/// # Errors
/// It has none that is known, or two and nothing that says which.
pub(super) fn init(image: &dyn Root, root: &Path) -> Result<Init, Unknown> {
    let has = |paths: &[&str]| paths.iter().any(|path| image.has(path));
    match (has(&SYSTEMD), has(&OPENRC)) {
        (true, true) if !image.has(FIRST) => Err(Unknown::Both { root: root.into() }),
        (true, true) if SYSTEMD.iter().any(|it| image.is_same(FIRST, it)) => Ok(Init::Systemd),
        (true, true) => Ok(Init::Openrc),
        (true, false) => Ok(Init::Systemd),
        (false, true) => Ok(Init::Openrc),
        (false, false) if has(&BUSYBOX) => Ok(Init::Busybox),
        (false, false) => Err(Unknown::None { root: root.into() }),
    }
}

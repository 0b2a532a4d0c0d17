//! An SSH server in a guest's image, as images have one: dropbear, at its loopback only.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::nested::Nested;

/// Starts it. For a guest's script.
pub const START: &str = "dropbear -R -E -p 127.0.0.1:22\n";

/// Puts it below `root`, with a key with which root may log in. Intermediate files go to `dir`.
///
/// # Errors
/// There is no dropbear, or a file cannot be written.
pub fn install(root: &Path, public: &Path, dir: &Path) -> anyhow::Result<()> {
    for (file, to) in Nested::with_libraries(Path::new("/usr/sbin/dropbear"), dir)? {
        let to = root.join(to.trim_start_matches('/'));
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::copy(file, to)?;
    }
    // It refuses keys in a directory that others could write.
    for private in ["root", "root/.ssh", "etc/dropbear"] {
        let private = root.join(private);
        fs::create_dir_all(&private)?;
        fs::set_permissions(&private, fs::Permissions::from_mode(0o700))?;
    }
    fs::copy(public, root.join("root/.ssh/authorized_keys"))?;
    Ok(())
}

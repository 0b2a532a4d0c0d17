//! Options that are refused because of their form alone.

use std::os::unix::fs::PermissionsExt;
use std::process::Command;

#[test]
fn r116_a_vm_name_that_is_a_path_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (run, kernel) = (dir.path().join("run"), dir.path().join("absent"));
    std::fs::create_dir_all(run.join("vm")).unwrap();
    let said = |name: &str| {
        let mut vmm = Command::new(env!("CARGO_BIN_EXE_adit-vmm"));
        vmm.args(["run", "--vsock", "cid=3", "--kernel"])
            .arg(&kernel);
        vmm.arg("--aditd").arg(run.join("aditd.sock"));
        let out = vmm.arg(format!("--name={name}")).output().unwrap();
        (
            out.status.code(),
            String::from_utf8_lossy(&out.stderr).into_owned(),
        )
    };
    // A good name passes, and the command fails for another reason.
    let (code, text) = said("web-1");
    assert!(code == Some(1) && !text.contains("--name"), "{text}");
    let mode = || std::fs::metadata(dir.path()).unwrap().permissions().mode();
    let open = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(dir.path(), open).unwrap();
    let before = mode();
    for name in [
        "..", ".", "../..", "a/b", "/etc", "", "a.b", "-a", "A", "a\n",
    ] {
        let (code, text) = said(name);
        assert!(
            code == Some(2) && text.contains("--name"),
            "{name:?}: {text}"
        );
        assert_eq!(mode(), before, "{name:?}");
    }
}

#[test]
fn what_cannot_be_printed_is_no_panic() {
    let vmm = |args: &[&str]| {
        let mut vmm = Command::new(env!("CARGO_BIN_EXE_adit-vmm"));
        vmm.args(args);
        vmm
    };
    let full = || {
        std::fs::File::options()
            .write(true)
            .open("/dev/full")
            .unwrap()
    };
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let out = vmm(&["--help"]).stdout(writer).output().unwrap();
    assert_eq!((out.status.code(), out.stderr.len()), (Some(141), 0));
    let out = vmm(&["--help"]).stdout(full()).output().unwrap();
    assert_eq!(out.status.code(), Some(1));
    assert!(!out.stderr.is_empty());
    // An error keeps its status where nobody can be told of it.
    let absent = ["run", "--kernel", "/absent"];
    assert_eq!(
        vmm(&absent).stderr(full()).status().unwrap().code(),
        Some(1)
    );
}

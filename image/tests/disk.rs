//! Disk images as people have them, and what must leave them as they were.
#![cfg(feature = "disk")]

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use adit_image::{Disk, DiskError, Ext4Error, Root};

const MIB: u64 = 1 << 20;

/// Runs a program, and returns what it wrote to standard output.
fn run(program: &str, args: &[&str]) -> String {
    let done = Command::new(program).args(args).output().unwrap();
    assert!(
        done.status.success(),
        "{program} {args:?}: {}",
        String::from_utf8_lossy(&done.stderr)
    );
    String::from_utf8(done.stdout).unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A root as a distribution has it: `/lib` and `/sbin` are links.
fn root(dir: &Path) -> PathBuf {
    let root = dir.join("root");
    for path in ["etc", "usr/sbin", "usr/lib/systemd", "var"] {
        fs::create_dir_all(root.join(path)).unwrap();
    }
    fs::write(root.join("usr/lib/systemd/systemd"), "").unwrap();
    fs::write(root.join("etc/old"), "old").unwrap();
    symlink("usr/sbin", root.join("sbin")).unwrap();
    symlink("/usr/lib", root.join("lib")).unwrap();
    root
}

/// An image of one file system.
fn whole(dir: &Path, root: &Path) -> PathBuf {
    let image = dir.join("an image ?offset=7.raw");
    File::create(&image).unwrap().set_len(16 * MIB).unwrap();
    let link = dir.join("mke2fs-target");
    let _ = fs::remove_file(&link);
    symlink(&image, &link).unwrap();
    run(
        "mke2fs",
        &["-q", "-t", "ext4", "-F", "-d", text(root), text(&link)],
    );
    image
}

/// The same in a partition of a disk, as `sfdisk` lays it out.
fn with_table(dir: &Path, root: &Path, name: &str, table: &str, begin: u64) -> PathBuf {
    let fs = whole(dir, root);
    let image = dir.join(name);
    let file = File::create_new(&image).unwrap();
    file.set_len(20 * MIB).unwrap();
    let mut sfdisk = Command::new("sfdisk");
    let mut sfdisk = sfdisk
        .args(["-q", "--no-reread", text(&image)])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    sfdisk
        .stdin
        .take()
        .unwrap()
        .write_all(table.as_bytes())
        .unwrap();
    assert!(sfdisk.wait().unwrap().success());
    file.write_all_at(&fs::read(fs).unwrap(), begin).unwrap();
    image
}

/// As Debian's cloud images: the root is not the first, and numbers are left out.
fn with_gpt(dir: &Path, root: &Path) -> PathBuf {
    let table = "label: gpt\n\
        7: start=4096, size=32768, type=linux\n\
        14: start=2048, size=1024, type=uefi\n";
    with_table(dir, root, "gpt.raw", table, 2 * MIB)
}

fn with_mbr(dir: &Path, root: &Path) -> PathBuf {
    let table = "label: dos\n2: start=2048, size=32768, type=83\n";
    with_table(dir, root, "mbr.raw", table, MIB)
}

fn as_qcow2(raw: &Path) -> PathBuf {
    let image = raw.with_extension("qcow2");
    run(
        "qemu-img",
        &[
            "convert",
            "-f",
            "raw",
            "-O",
            "qcow2",
            text(raw),
            text(&image),
        ],
    );
    image
}

/// What debugfs prints of an image's file.
fn debugfs(image: &Path, offset: u64, command: &str) -> String {
    let link = image.with_file_name("debugfs-target");
    let _ = fs::remove_file(&link);
    symlink(image, &link).unwrap();
    run(
        "debugfs",
        &["-R", command, &format!("{}?offset={offset}", text(&link))],
    )
}

fn fill(disk: &Disk) -> adit_image::Ext4 {
    let mut root = disk.root().unwrap();
    assert!(root.has("lib/systemd/systemd") && !root.has("sbin/openrc-run"));
    assert!(root.place("sbin/agent", &[7; 300_000], 0o755).unwrap());
    assert!(
        root.place("etc/adit-guest/trust/a.pub", b"key", 0o600)
            .unwrap()
    );
    assert!(root.place("etc/old", b"new", 0o644).unwrap());
    assert!(
        root.place_link("etc/systemd/system/x.wants/a", "../a")
            .unwrap()
    );
    root
}

fn check_filled(image: &Path, offset: u64) {
    assert_eq!(debugfs(image, offset, "cat /etc/old"), "new");
    assert_eq!(
        debugfs(image, offset, "cat /etc/adit-guest/trust/a.pub"),
        "key"
    );
    let agent = debugfs(image, offset, "stat /usr/sbin/agent");
    assert!(
        agent.contains("Mode:  0755") && agent.contains("User:     0"),
        "{agent}"
    );
    assert!(debugfs(image, offset, "stat /etc/adit-guest/trust").contains("Mode:  0700"));
    assert!(debugfs(image, offset, "stat /etc/systemd/system").contains("Mode:  0755"));
    let link = debugfs(image, offset, "stat /etc/systemd/system/x.wants/a");
    assert!(link.contains("Fast link dest: \"../a\""), "{link}");
}

#[test]
fn files_go_into_every_kind_of_image_and_a_second_time_changes_nothing() {
    type Make = fn(&Path, &Path) -> PathBuf;
    let kinds: [(Make, u64); 3] = [(whole, 0), (with_gpt, 2 * MIB), (with_mbr, MIB)];
    for (make, offset) in kinds {
        for qcow2 in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let root = root(dir.path());
            let raw = make(dir.path(), &root);
            let image = if qcow2 { as_qcow2(&raw) } else { raw.clone() };
            fs::set_permissions(&image, fs::Permissions::from_mode(0o640)).unwrap();
            let disk = Disk::open(&image, None).unwrap();
            let root = fill(&disk);
            disk.commit(root).unwrap();
            assert_eq!(
                fs::metadata(&image).unwrap().permissions().mode() & 0o777,
                0o640
            );
            if qcow2 {
                assert_eq!(&fs::read(&image).unwrap()[..4], b"QFI\xfb");
                run(
                    "qemu-img",
                    &[
                        "convert",
                        "-f",
                        "qcow2",
                        "-O",
                        "raw",
                        text(&image),
                        text(&raw),
                    ],
                );
            }
            check_filled(&raw, offset);
            let disk = Disk::open(&image, None).unwrap();
            let mut root = disk.root().unwrap();
            assert!(!root.place("sbin/agent", &[7; 300_000], 0o755).unwrap());
            assert!(
                !root
                    .place_link("etc/systemd/system/x.wants/a", "../a")
                    .unwrap()
            );
            assert!(
                root.place("sbin/agent", &[7; 300_000], 0o700).unwrap(),
                "another mode"
            );
            drop(disk);
            let left = fs::read_dir(dir.path()).unwrap();
            let left = left.filter(|e| {
                e.as_ref()
                    .unwrap()
                    .file_name()
                    .to_string_lossy()
                    .starts_with(".adit")
            });
            assert_eq!(left.count(), 0);
        }
    }
}

#[test]
fn r113_no_link_in_an_image_leads_out_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let root = root(dir.path());
    let outside = dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    // Absolute and with `..`, as a directory and as the file itself.
    symlink(&outside, root.join("etc/absolute")).unwrap();
    symlink("../../../../../../../../../etc", root.join("var/up")).unwrap();
    symlink(outside.join("file"), root.join("etc/file")).unwrap();
    let image = whole(dir.path(), &root);
    let disk = Disk::open(&image, None).unwrap();
    let mut root = disk.root().unwrap();
    let missing = root.place("etc/absolute/a", b"x", 0o600).unwrap_err();
    assert!(
        missing
            .to_string()
            .contains("a directory that the image does not have")
    );
    assert!(root.place("var/up/b", b"in", 0o600).unwrap());
    assert!(
        root.place("etc/file", b"own", 0o600).unwrap(),
        "the link itself is replaced"
    );
    for bad in [
        "etc/../x",
        "/etc/x",
        "etc//x",
        "etc/a\nrm x",
        "etc/\"",
        "etc/a b",
        "",
        "etc",
    ] {
        assert!(root.place(bad, b"", 0o600).is_err(), "{bad:?}");
    }
    disk.commit(root).unwrap();
    assert_eq!(debugfs(&image, 0, "cat /etc/b"), "in");
    assert_eq!(debugfs(&image, 0, "cat /etc/file"), "own");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
}

#[test]
fn an_image_that_cannot_be_written_whole_stays_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let image = whole(dir.path(), &root(dir.path()));
    let before = fs::read(&image).unwrap();
    let disk = Disk::open(&image, None).unwrap();
    let mut root = disk.root().unwrap();
    assert!(root.place("etc/first", b"fits", 0o600).unwrap());
    assert!(
        root.place("usr/sbin/agent", &vec![7; 17 << 20], 0o755)
            .unwrap()
    );
    let full = disk.commit(root).unwrap_err();
    assert!(
        matches!(&full, DiskError::Ext4 { source: Ext4Error::NotWritten { path, .. }, .. } if path == "usr/sbin/agent"),
        "{full}"
    );
    assert!(fs::read(&image).unwrap() == before);
}

#[test]
fn images_that_must_not_be_written_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let root = root(dir.path());
    let image = whole(dir.path(), &root);
    let file = File::options().read(true).write(true).open(&image).unwrap();
    let open = |image: &Path| Disk::open(image, None).and_then(|disk| disk.root().map(drop));

    // Mounted when it was copied; marked as damaged by the kernel.
    let (mut clean, mut features) = ([0; 2], [0; 4]);
    file.read_exact_at(&mut clean, 1024 + 0x3a).unwrap();
    file.read_exact_at(&mut features, 1024 + 0x60).unwrap();
    let recovery = (u32::from_le_bytes(features) | 4).to_le_bytes();
    file.write_all_at(&recovery, 1024 + 0x60).unwrap();
    let unclean = |image: &Path| {
        matches!(
            open(image),
            Err(DiskError::Ext4 {
                source: Ext4Error::Unclean,
                ..
            })
        )
    };
    assert!(unclean(&image));
    file.write_all_at(&features, 1024 + 0x60).unwrap();
    file.write_all_at(&[3, 0], 1024 + 0x3a).unwrap();
    assert!(unclean(&image));
    file.write_all_at(&clean, 1024 + 0x3a).unwrap();
    open(&image).unwrap();

    // A VM runs from it: QEMU's kind of lock, on a byte of its own.
    let lock = nix::libc::flock {
        l_type: nix::libc::F_RDLCK as _,
        l_whence: 0,
        l_start: 100,
        l_len: 1,
        l_pid: 0,
    };
    nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_OFD_SETLK(&lock)).unwrap();
    assert!(matches!(open(&image), Err(DiskError::InUse(_))));
    // Not by closing it: a program that another test starts has it until it runs.
    let unlock = nix::libc::flock {
        l_type: nix::libc::F_UNLCK as _,
        ..lock
    };
    nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_OFD_SETLK(&unlock)).unwrap();
    open(&image).unwrap();

    // A qcow2 whose data is elsewhere.
    let base = as_qcow2(&image);
    let overlay = dir.path().join("overlay.qcow2");
    run(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            text(&base),
            "-F",
            "qcow2",
            text(&overlay),
        ],
    );
    assert!(matches!(open(&overlay), Err(DiskError::Backed { .. })));
    // No program has looked at it before: with no more than a header, each would fail.
    let mut head = vec![0; 104];
    head[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    head[79] = 4;
    let data_file = dir.path().join("data-file.qcow2");
    fs::write(&data_file, &head).unwrap();
    assert!(matches!(open(&data_file), Err(DiskError::Backed { .. })));
    fs::write(&data_file, &head[..20]).unwrap();
    assert!(matches!(open(&data_file), Err(DiskError::Io { .. })));

    for (name, at, magic) in [
        ("xfs", 0, &b"XFSB"[..]),
        ("btrfs", 0x1_0040, b"_BHRfS_M"),
        ("iso", 0x8001, b"CD001"),
    ] {
        let other = dir.path().join(name);
        let file = File::create(&other).unwrap();
        file.set_len(MIB).unwrap();
        file.write_all_at(magic, at).unwrap();
        assert!(
            matches!(open(&other), Err(DiskError::Unsupported { .. })),
            "{name}"
        );
    }
    let zeros = dir.path().join("zeros");
    File::create(&zeros).unwrap().set_len(MIB).unwrap();
    assert!(matches!(open(&zeros), Err(DiskError::Unknown(_))));
    let empty = dir.path().join("empty");
    File::create(&empty).unwrap();
    assert!(matches!(open(&empty), Err(DiskError::Unknown(_))));
    assert!(matches!(
        open(Path::new("/dev/null")),
        Err(DiskError::NoFile(_))
    ));
}

#[test]
fn an_image_that_lies_about_its_sizes_costs_no_memory() {
    let dir = tempfile::tempdir().unwrap();
    let root = root(dir.path());
    // A link's target of 2 TiB, and one of links without an end.
    let image = whole(dir.path(), &root);
    let link = dir.path().join("debugfs-target");
    symlink(&image, &link).unwrap();
    for command in [
        "sif /lib size 2199023255552",
        "symlink /round /round/round",
        "sif /etc size 2199023255552",
    ] {
        run("debugfs", &["-w", "-R", command, text(&link)]);
    }
    let mut lies = Disk::open(&image, None).unwrap().root().unwrap();
    for path in ["lib/systemd/systemd", "round/a", "etc/old"] {
        assert!(!lies.has(path), "{path}");
        assert!(lies.place(path, b"", 0o600).is_err(), "{path}");
    }
    assert!(!lies.is_same("lib", "lib"));
    assert!(lies.has("sbin/.././lib/systemd/systemd"));

    // Blocks of 1 GiB; a group for each of 2^32 blocks. Checksums are no hindrance: an image can do without.
    for lie in [&[(0x18, 20_u32)][..], &[(0x04, u32::MAX), (0x20, 1)]] {
        let image = whole(dir.path(), &root);
        run("tune2fs", &["-O", "^metadata_csum", text(&link)]);
        let file = File::options().write(true).open(&image).unwrap();
        for (at, number) in lie {
            file.write_all_at(&number.to_le_bytes(), 1024 + at).unwrap();
        }
        let lies = Disk::open(&image, None).and_then(|disk| disk.root().map(drop));
        assert!(
            matches!(
                lies,
                Err(DiskError::Ext4 {
                    source: Ext4Error::Damaged(_),
                    ..
                })
            ),
            "{lie:x?}"
        );
    }
}

#[test]
fn of_several_roots_the_caller_names_one() {
    let dir = tempfile::tempdir().unwrap();
    let image = with_gpt(dir.path(), &root(dir.path()));
    assert!(matches!(
        Disk::open(&image, Some(1)),
        Err(DiskError::NoPartition { wanted: 1, .. })
    ));
    Disk::open(&image, Some(7)).unwrap();
    // The second in an MBR over the same file system.
    let mbr = with_mbr(dir.path(), &dir.path().join("root"));
    let file = File::options().read(true).write(true).open(&mbr).unwrap();
    let mut entry = [0; 16];
    file.read_exact_at(&mut entry, 446 + 16).unwrap();
    file.write_all_at(&entry, 446).unwrap();
    assert!(
        matches!(Disk::open(&mbr, None), Err(DiskError::ManyRoots { found, .. }) if found == [1, 2])
    );
    assert!(Disk::open(&mbr, Some(2)).is_ok());
}

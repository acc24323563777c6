//! The mount namespace of a host: the machine's root file system with the host's own /proc, /sys,
//! cgroups and tmpfs folders over it.

use crate::{Error, Result};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change, unmount,
};
use std::ffi::CStr;
use std::fs;
use std::path::Path;

/// Folders that each host has for itself, empty at first.
const OWN_FOLDERS: [&str; 5] = [
    "/run",
    "/dev/shm",
    "/var/lib/haulier",
    "/var/log/haulier",
    "/srv",
];

/// Builds it. Runs in PID 1 of the host, in new mount, PID, network and cgroup namespaces: what is
/// mounted here shows the namespaces of the caller.
pub(crate) fn build(hosts_file: &str) -> Result<()> {
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )
    .map_err(Error::file_errno("make private", "/"))?;
    let plain = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    over("/proc", "proc", plain, c"")?;
    over("/sys", "sysfs", plain, c"")?;
    over("/sys/fs/cgroup", "cgroup2", plain, c"")?;
    for folder in OWN_FOLDERS {
        let mode = if folder == "/dev/shm" {
            c"mode=1777"
        } else {
            c"mode=755"
        };
        over(
            folder,
            "tmpfs",
            MountFlags::NOSUID | MountFlags::NODEV,
            mode,
        )?;
    }
    fs::create_dir("/run/lock").map_err(Error::file("create", "/run/lock"))?;
    // Hosts know each other by name. On /run, because a file system of the host must hold it.
    fs::write("/run/hosts", hosts_file).map_err(Error::file("write", "/run/hosts"))?;
    mount_bind("/run/hosts", "/etc/hosts").map_err(Error::file_errno("mount", "/etc/hosts"))
}

/// Mounts on `target` in place of what the machine has there, rather than on top of it: covered
/// mounts would still be listed in mountinfo, where CRIU and haulier would trip over them.
fn over(target: &'static str, kind: &str, flags: MountFlags, data: &CStr) -> Result<()> {
    loop {
        match unmount(target, UnmountFlags::DETACH) {
            Ok(()) => {}
            // Not a mount point, or not there at all.
            Err(Errno::INVAL | Errno::NOENT) => break,
            Err(other) => return Err(Error::file_errno("unmount", target)(other)),
        }
    }
    if !Path::new(target).is_dir() {
        fs::create_dir_all(target).map_err(Error::file("create", target))?;
    }
    mount(kind, target, kind, flags, data).map_err(Error::file_errno("mount", target))
}

//! What a host is and has: architecture, kernel, processor, memory, free process numbers.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// What matters of a host for a target that comes from, or goes to, another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// Its name.
    pub name: String,
    /// Machine architecture, as `uname -m` prints it.
    pub architecture: String,
    /// Kernel release.
    pub kernel: String,
    /// Features of its processor.
    pub cpu_flags: BTreeSet<String>,
}

impl Host {
    /// This host.
    pub fn this() -> Host {
        let uname = rustix::system::uname();
        Host {
            name: uname.nodename().to_string_lossy().into_owned(),
            architecture: uname.machine().to_string_lossy().into_owned(),
            kernel: uname.release().to_string_lossy().into_owned(),
            cpu_flags: cpu_flags(),
        }
    }

    /// Processor features of `other` that this host lacks: a program may have chosen its code
    /// by them when it started.
    pub fn lacks(&self, other: &BTreeSet<String>) -> Vec<String> {
        other.difference(&self.cpu_flags).cloned().collect()
    }
}

/// Whether this process may do what CRIU needs: it runs as root.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Memory that could be had without swapping, in bytes.
pub fn available_memory() -> u64 {
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = info
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let kibibytes = line.and_then(|text| text.split_whitespace().next()?.parse::<u64>().ok());
    kibibytes.unwrap_or(0) * 1024
}

/// Which of the numbers are taken on this host, with the name of the process or thread that has
/// each.
pub fn taken_numbers(numbers: &[i32]) -> Vec<(i32, String)> {
    let name_of = |number: &i32| {
        let name = fs::read_to_string(format!("/proc/{number}/comm")).ok()?;
        Some((*number, name.trim_end().to_owned()))
    };
    numbers.iter().filter_map(name_of).collect()
}

/// The largest process number this host gives out, plus one.
pub fn number_limit() -> i32 {
    let text = fs::read_to_string("/proc/sys/kernel/pid_max").unwrap_or_default();
    text.trim().parse().unwrap_or(i32::MAX)
}

/// Whether a path lies on a file system in memory.
pub fn is_in_memory(path: &Path) -> bool {
    // From statfs(2): TMPFS_MAGIC and RAMFS_MAGIC.
    const IN_MEMORY: [i128; 2] = [0x0102_1994, 0x8584_58f6];
    rustix::fs::statfs(path).is_ok_and(|found| IN_MEMORY.contains(&i128::from(found.f_type)))
}

fn cpu_flags() -> BTreeSet<String> {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    info.lines()
        .filter_map(|line| line.split_once(':'))
        // x86 says "flags", arm64 "Features", s390x "features".
        .find(|(name, _)| matches!(name.trim(), "flags" | "Features" | "features"))
        .map(|(_, flags)| flags.split_whitespace().map(str::to_owned).collect())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_lacks_nothing_of_itself() {
        let host = Host::this();
        assert!(!host.architecture.is_empty() && !host.kernel.is_empty());
        assert_eq!(host.lacks(&host.cpu_flags), Vec::<String>::new());
        let other = BTreeSet::from(["a-feature-of-tomorrow".to_owned()]);
        assert_eq!(host.lacks(&other), ["a-feature-of-tomorrow"]);
    }

    #[test]
    fn numbers_in_use_are_found_with_their_names() {
        let own = std::process::id() as i32;
        let taken = taken_numbers(&[own, i32::MAX]);
        assert_eq!(taken.len(), 1);
        assert_eq!(taken[0].0, own);
        assert!(number_limit() > own);
    }

    #[test]
    fn memory_file_systems_are_recognised() {
        assert!(is_in_memory(Path::new("/dev/shm")));
        assert!(!is_in_memory(Path::new("/proc")));
        assert!(available_memory() > 0);
    }
}

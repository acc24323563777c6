//! Tasks that have memory of a userfaultfd and are nobody's child any more.
//!
//! The kernel does not say whose memory a userfaultfd is for. But it lets a registered mapping be
//! registered for write protection too, which changes nothing but what `smaps` shows of it. So mappings that
//! show this, once each of the descriptors was asked for it, belong to one of them: others can have
//! registered mappings at the same addresses, a copy of the same program for one, but theirs are not marked.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};

use haulier_sys::pidfd::{PidfdFlags, pidfd_open};
use haulier_sys::userfaultfd::Userfaultfd;
use rustix::process::{Pid, Signal, pidfd_send_signal};

/// Looks for them, again and again: marks are for good, and are inherited.
#[derive(Debug, Default)]
pub(super) struct Strays {
    /// What was marked: first address, and the one after the last.
    marked: Vec<(u64, u64)>,
}

impl Strays {
    /// Kills every task that has memory of one of these.
    pub(super) fn kill(&mut self, held: &[Userfaultfd]) {
        let Ok(all) = fs::read_dir("/proc") else {
            return;
        };
        let task = |name: &str| {
            let pid = Pid::from_raw(name.parse().ok()?)?;
            // First of all: one that takes its number later is not meant.
            Some((pid, pidfd_open(pid, PidfdFlags::empty()).ok()?))
        };
        let mut tasks: Vec<_> = all
            .flatten()
            .filter_map(|entry| task(entry.file_name().to_str()?))
            .collect();
        // All are seen before any is marked: descriptors of a family mark at the same addresses.
        let mut places = Vec::new();
        tasks.retain(|(pid, _)| match registered(*pid) {
            Ok(found) => {
                places.extend(found.iter().filter(|m| !m.marked).map(|m| (m.start, m.end)));
                !found.is_empty()
            }
            // It has ended.
            Err(_) => false,
        });
        self.mark(places, held);
        for (pid, task) in tasks {
            if self.is_marked(pid) {
                tracing::warn!(%pid, "a task that was forked meanwhile is killed");
                // It has ended already, or ends.
                let _ = pidfd_send_signal(&task, Signal::KILL);
            }
        }
    }

    fn mark(&mut self, mut places: Vec<(u64, u64)>, held: &[Userfaultfd]) {
        places.sort_unstable();
        places.dedup();
        for (start, end) in places {
            // Refused where it has nothing registered, or is of memory that is gone.
            let marked = held.iter().filter(|of| of.mark(start, end - start).is_ok());
            if marked.count() > 0 {
                self.marked.push((start, end));
            }
        }
    }

    /// Whether a task has memory that was marked.
    fn is_marked(&self, pid: Pid) -> bool {
        let overlaps = |mapping: &Mapping| {
            let mut marked = self.marked.iter();
            marked.any(|(start, end)| mapping.start < *end && *start < mapping.end)
        };
        let mappings = registered(pid).unwrap_or_default();
        mappings.iter().any(|m| m.marked && overlaps(m))
    }
}

/// A mapping that is registered for faults on missing pages.
struct Mapping {
    start: u64,
    end: u64,
    /// Registered for write protection too.
    marked: bool,
}

/// Those of a task, as `smaps` shows them.
fn registered(pid: Pid) -> io::Result<Vec<Mapping>> {
    let path = format!("/proc/{}/smaps", pid.as_raw_nonzero());
    let mut mappings = Vec::new();
    let mut range = None;
    for line in BufReader::new(File::open(path)?).lines() {
        let line = line?;
        let Some(flags) = line.strip_prefix("VmFlags:") else {
            range = addresses(&line).or(range);
            continue;
        };
        let has = |wanted: &str| flags.split_whitespace().any(|flag| flag == wanted);
        if let Some((start, end)) = range.filter(|_| has("um")) {
            let marked = has("uw");
            mappings.push(Mapping { start, end, marked });
        }
    }
    Ok(mappings)
}

/// Of the line that begins a mapping: `START-END PERMISSIONS ...`.
fn addresses(line: &str) -> Option<(u64, u64)> {
    let (start, end) = line.split_whitespace().next()?.split_once('-')?;
    let number = |text: &str| u64::from_str_radix(text, 16).ok();
    Some((number(start)?, number(end)?)).filter(|(start, end)| start < end)
}

#[cfg(test)]
mod tests {
    use haulier_sys::userfaultfd::{CRIU_FEATURES, Region};

    use super::*;

    #[test]
    fn a_task_is_known_by_its_memory() {
        let region = || Region::map(16 * 4096).unwrap();
        let (ours, others) = (region(), region());
        let [ours, others] = [&ours, &others].map(|region| {
            let userfaultfd = Userfaultfd::create(CRIU_FEATURES).unwrap();
            userfaultfd.register_missing(region).unwrap();
            let place = (region.address(), region.address() + region.len() as u64);
            (place, userfaultfd)
        });
        let pid = |number: u32| Pid::from_raw(i32::try_from(number).unwrap()).unwrap();
        let me = pid(std::process::id());
        let mut strays = Strays::default();
        // Registered, but not by what is held.
        strays.mark(vec![others.0], std::slice::from_ref(&ours.1));
        assert!(strays.marked.is_empty() && !strays.is_marked(me));
        let both = vec![others.0, ours.0, ours.0];
        strays.mark(both, std::slice::from_ref(&ours.1));
        assert_eq!(strays.marked, [ours.0]);
        assert!(strays.is_marked(me));
        let marks = registered(me).unwrap();
        let marks = marks.iter().filter(|m| m.marked);
        assert_eq!(marks.count(), 1);
        // Somebody else's marks are nothing to us.
        let other = Strays {
            marked: vec![others.0],
        };
        assert!(!other.is_marked(me));
        assert!(!strays.is_marked(pid(std::os::unix::process::parent_id())));
    }

    #[test]
    fn lines_of_smaps_that_begin_a_mapping_are_told_from_others() {
        let line = "7f12a000-7f12b000 rw-p 00000000 00:00 0    [heap]";
        assert_eq!(addresses(line), Some((0x7f12_a000, 0x7f12_b000)));
        for other in [
            "Rss:        4 kB",
            "VmFlags: rd wr um",
            "",
            "b-a rw-p",
            "x-y",
        ] {
            assert_eq!(addresses(other), None, "{other}");
        }
    }
}

//! Where in a process a `syscall` instruction is.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use super::RemoteError;

/// Bytes looked at in one mapping.
const LIMIT: u64 = 4 << 20;
const SYSCALL: [u8; 2] = [0x0F, 0x05];

/// Address of two bytes that are executed as a system call. The vdso has them on every kernel (for
/// the clocks it cannot read by itself); if the process has none, any other code has.
pub(super) fn find_syscall(pid: i32) -> Result<u64, RemoteError> {
    let maps = fs::read(format!("/proc/{pid}/maps"))
        .map_err(RemoteError::io("read the mappings of the process"))?;
    if maps.is_empty() {
        return Err(RemoteError::Gone);
    }
    let memory = File::open(format!("/proc/{pid}/mem"))
        .map_err(RemoteError::io("open the memory of the process"))?;
    let mut code: Vec<(u64, u64, bool)> = maps
        .split(|byte| *byte == b'\n')
        .filter_map(parse)
        .collect();
    code.sort_by_key(|(_, _, vdso)| !vdso);
    code.iter()
        .find_map(|&(start, end, _)| find(&memory, start, end))
        .ok_or(RemoteError::NoInstruction)
}

/// Start, end, and whether it is the vdso, of a mapping that is code.
fn parse(line: &[u8]) -> Option<(u64, u64, bool)> {
    let text = String::from_utf8_lossy(line);
    let mut fields = text.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let permissions = fields.next()?;
    let name = fields.nth(3).unwrap_or_default();
    let code = permissions.starts_with("r-x") && name != "[vsyscall]" && name != "[uprobes]";
    let address = |text| u64::from_str_radix(text, 16).ok();
    code.then_some((address(start)?, address(end)?, name == "[vdso]"))
}

fn find(memory: &File, start: u64, end: u64) -> Option<u64> {
    let mut bytes = vec![0; end.checked_sub(start)?.min(LIMIT) as usize];
    let len = memory.read_at(&mut bytes, start).ok()?;
    let at = bytes[..len].windows(2).position(|two| two == SYSCALL)?;
    Some(start + at as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_has_a_system_call_instruction() {
        let pid = std::process::id() as i32;
        let at = find_syscall(pid).unwrap();
        let mut bytes = [0; 2];
        let memory = File::open("/proc/self/mem").unwrap();
        memory.read_exact_at(&mut bytes, at).unwrap();
        assert_eq!(bytes, SYSCALL);
    }

    #[test]
    fn only_code_is_looked_at() {
        let code = parse(b"7ffd0000-7ffd2000 r-xp 00000000 00:00 0    [vdso]");
        assert_eq!(code, Some((0x7ffd_0000, 0x7ffd_2000, true)));
        let code = parse(b"1000-2000 r-xp 00000000 fe:00 12    /bin/true");
        assert_eq!(code, Some((0x1000, 0x2000, false)));
        assert_eq!(parse(b"1000-2000 rw-p 00000000 00:00 0 "), None);
        let gate = b"ffffffffff600000-ffffffffff601000 r-xp 00000000 00:00 0 [vsyscall]";
        assert_eq!(parse(gate), None);
        assert_eq!(parse(b""), None);
    }
}

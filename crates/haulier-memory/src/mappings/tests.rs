use haulier_sys::userfaultfd::Region;

use super::*;
use crate::page::PAGE;

const MAPS: &str = "\
55d0c0a00000-55d0c0a02000 r-xp 00001000 fe:00 1234                       /usr/bin/my prog
55d0c0a02000-55d0c0a03000 rw-p 00002000 fe:00 1234                       /usr/bin/my prog
55d0c1000000-55d0c1021000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0000400000 rw-p 00000000 00:10 7                          /anon_hugepage (deleted)
7f1000000000-7f1000001000 rw-s 00000000 00:01 2051                       /dev/zero (deleted)
7f1000001000-7f1000002000 rw-s 00003000 00:01 9                          /memfd:x y (deleted)
7f1000002000-7f1000003000 rw-s 00000000 00:01 0                          /SYSV00000000 (deleted)
7f1000003000-7f1000004000 rw-s 00000000 00:0f 77                         /[aio] (deleted)
7f1000004000-7f1000005000 rw-s 00000000 00:05 88                         /dev/dri/card0
7f1000005000-7f1000006000 rw-s 00000000 00:19 89                         /dev/shm/ring
7f2000000000-7f2000001000 ---p 00000000 00:00 0 
7f2000001000-7f2000002000 rw-p 00000000 00:00 0                          [anon:arena]
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0                          [stack]
7ffd00030000-7ffd00034000 r--p 00000000 00:00 0                          [vvar]
7ffd00034000-7ffd00036000 r--p 00000000 00:00 0                          [vvar_vclock]
7ffd00036000-7ffd00038000 r-xp 00000000 00:00 0                          [vdso]
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
";

#[test]
fn the_kinds_of_mappings_are_told_apart() {
    let mappings = parse(MAPS.as_bytes()).unwrap();
    let kinds: Vec<MappingKind> = mappings.iter().map(|mapping| mapping.kind).collect();
    let origin = |device, inode, offset| Origin {
        device,
        inode,
        offset,
    };
    use MappingKind::*;
    assert_eq!(
        kinds,
        [
            PrivateFile(origin((0xfe, 0), 1234, 0x1000)),
            PrivateFile(origin((0xfe, 0), 1234, 0x2000)),
            Lazy,
            Eager,
            Shared(origin((0, 1), 2051, 0)),
            Shared(origin((0, 1), 9, 0x3000)),
            Shared(origin((0, 1), 0, 0)),
            Special,
            Special,
            Shared(origin((0, 0x19), 89, 0)),
            Lazy,
            Lazy,
            Lazy,
            Special,
            Special,
            Special,
        ]
    );
    assert_eq!(mappings[0].path, PathBuf::from("/usr/bin/my prog"));
    assert!(mappings[0].executable && !mappings[0].writable);
    assert!(!mappings[10].readable && mappings[10].path.as_os_str().is_empty());
    assert_eq!(mappings[10].range.pages, 1);
    assert_eq!(lazy(&mappings).pages(), 0x21 + 2 + 0x21);
}

#[test]
fn locked_memory_is_not_lazy() {
    let smaps = "\
7f2000001000-7f2000002000 rw-p 00000000 00:00 0 
Size:                  4 kB
Locked:                4 kB
VmFlags: rd wr mr mw me lo ac 
7f2000002000-7f2000003000 rw-p 00000000 00:00 0 
Size:                  4 kB
VmFlags: rd wr mr mw me ac 
";
    let mappings = parse(smaps.as_bytes()).unwrap();
    assert_eq!(mappings[0].kind, MappingKind::Eager);
    assert_eq!(mappings[1].kind, MappingKind::Lazy);
}

#[test]
fn our_own_mappings_are_found() {
    let region = Region::map(3 * PAGE as usize).unwrap();
    let mappings = read(std::process::id() as i32).unwrap();
    let range = PageRange {
        start: region.address(),
        pages: 3,
    };
    assert!(lazy(&mappings).covers(range));
    assert!(
        mappings
            .windows(2)
            .all(|two| two[0].range.end() <= two[1].range.start)
    );
    let vdso = mappings
        .iter()
        .find(|mapping| mapping.path.as_os_str() == "[vdso]");
    assert!(vdso.is_some_and(|vdso| vdso.kind == MappingKind::Special));
}

#[test]
fn a_list_that_is_not_understood_is_an_error() {
    assert!(parse(b"7f2000001000 rw-p 0 0").is_none());
    assert!(parse(b"VmFlags: lo").is_none());
    assert_eq!(parse(b""), Some(Vec::new()));
}

//! `haulier inspect`.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytesize::ByteSize;
use clap::Args;
use haulier_criu::inspect::{Descriptor, FileKind, ImageSize, InspectedTask, OpenFile};
use haulier_imagecast::inspect::{Inspected, Origin, inspect};
use haulier_sys::wait::Wait;

/// Longest time that an image-cache may take.
const LONGEST: Duration = Duration::from_secs(600);

/// Show what is in a dump: processes, their memory, open files and sockets, and the images
///
/// Nothing is restored for it: of an image-cache it is one more reader, also of a dump whose memory is
/// still at its source (--lazy-pages). Exit code 1 means that there is no such dump, or that its images
/// are damaged; the text says which.
#[derive(Debug, Args)]
pub(crate) struct Inspect {
    /// The directory that a running image-cache serves, a directory of CRIU's images, or a tar file of
    /// them ("haulier image-cache save")
    #[arg(value_name = "DIR|FILE")]
    path: PathBuf,
    /// Which dump of an image-cache [default: the newest that is complete]
    #[arg(long, value_name = "N")]
    snapshot: Option<u64>,
    /// As JSON: everything, bytes as numbers. Later versions only add to it
    #[arg(long)]
    json: bool,
}

/// Does it.
pub(crate) fn run(arguments: &Inspect) -> anyhow::Result<()> {
    let wait = Wait::uncancellable(LONGEST);
    let inspected = inspect(&arguments.path, arguments.snapshot, &wait)?;
    let mut out = io::BufWriter::new(io::stdout().lock());
    if arguments.json {
        serde_json::to_writer(&mut out, &inspected)?;
        writeln!(out)?;
    } else {
        write(&mut out, &arguments.path, &inspected)?;
    }
    Ok(out.flush()?)
}

fn write(out: &mut dyn Write, path: &Path, inspected: &Inspected) -> io::Result<()> {
    let dump = &inspected.dump;
    let what = if dump.criu.pre_dump {
        "pre-dump"
    } else {
        "dump"
    };
    let path = path.display();
    match &inspected.origin {
        Origin::Cache { snapshot, state } => {
            writeln!(out, "{what} {snapshot} of {path}: {}", plain(state))?;
        }
        Origin::Directory | Origin::Archive => writeln!(out, "{what} in {path}")?,
    }
    let format = match dump.criu.image_format {
        2 => "1.1".to_owned(),
        other => format!("of number {other}"),
    };
    let version = match dump.criu.wide_page_counts {
        Some(true) => ", as from CRIU 4.2 on",
        Some(false) => ", as before CRIU 4.2",
        None => "",
    };
    let run = dump.criu.run_id.as_deref();
    let run = run.map_or_else(String::new, |id| format!(", dumped by run {}", plain(id)));
    writeln!(out, "format      {format}{version}{run}")?;
    let pages = |image: &&ImageSize| image.name.starts_with("pages-");
    let bytes = |image: &ImageSize| image.bytes;
    writeln!(
        out,
        "images      {}, {}, of which memory {}",
        dump.images.len(),
        size(sum(dump.images.iter().map(bytes))),
        size(sum(dump.images.iter().filter(pages).map(bytes)))
    )?;
    if !dump.shared_memory.is_empty() {
        let bytes = dump.shared_memory.iter().map(|shared| shared.in_images);
        writeln!(
            out,
            "shared      {} pieces of memory, {} in the images",
            dump.shared_memory.len(),
            size(sum(bytes))
        )?;
    }
    let namespaces = dump.namespaces.iter();
    let namespaces = namespaces.map(|namespace| format!("{} {}", namespace.kind, namespace.id));
    let namespaces: Vec<String> = namespaces.collect();
    let namespaces = match namespaces.is_empty() {
        true => "none".to_owned(),
        false => namespaces.join(", "),
    };
    writeln!(out, "namespaces  {namespaces}")?;

    writeln!(out)?;
    write_tasks(out, &dump.tasks)?;
    for task in &dump.tasks {
        write_descriptors(out, task)?;
    }

    writeln!(out)?;
    let mut rows = vec![["images", "files", "size"].map(str::to_owned).to_vec()];
    for (kind, (files, bytes)) in by_kind(&dump.images) {
        rows.push(vec![kind, files.to_string(), size(bytes)]);
    }
    write_table(out, &rows, &[0])
}

fn write_tasks(out: &mut dyn Write, tasks: &[InspectedTask]) -> io::Result<()> {
    let all = |of: fn(&haulier_criu::inspect::TaskMemory) -> u64| {
        let memory = tasks.iter().filter_map(|task| task.memory.as_ref());
        sum(memory.map(of))
    };
    // Rarely there, and then worth a column.
    let at_source = all(|memory| memory.left_at_source) > 0;
    let in_parent = all(|memory| memory.in_parent) > 0;
    let mut head = vec!["pid", "parent", "state", "threads"];
    head.extend(["mapped", "in images", "zero", "shared"]);
    head.extend(at_source.then_some("at source"));
    head.extend(in_parent.then_some("in parent"));
    head.push("command");
    let last = head.len() - 1;
    let mut rows = vec![head.into_iter().map(str::to_owned).collect::<Vec<_>>()];
    let mut depths = BTreeMap::new();
    for task in tasks {
        let depth = depths
            .get(&task.parent)
            .map_or(0, |depth: &usize| depth + 1);
        depths.insert(task.pid, depth);
        let parent = match task.parent {
            0 => "-".to_owned(),
            parent => parent.to_string(),
        };
        let mut row = vec![task.pid.to_string(), parent, task.state.word().to_owned()];
        row.push(task.threads.len().to_string());
        let memory = task.memory.as_ref();
        let bytes = |of: fn(&haulier_criu::inspect::TaskMemory) -> u64| {
            memory.map_or_else(|| "-".to_owned(), |memory| size(of(memory)))
        };
        row.extend([
            bytes(|memory| memory.mapped),
            bytes(|memory| memory.in_images),
            bytes(|memory| memory.zero),
            bytes(|memory| memory.shared),
        ]);
        row.extend(at_source.then(|| bytes(|memory| memory.left_at_source)));
        row.extend(in_parent.then(|| bytes(|memory| memory.in_parent)));
        // Deeper ones than fit a line are shown as deep as that.
        let indent = "  ".repeat(depth.min(20));
        row.push(format!("{indent}{}", plain(&task.command)));
        rows.push(row);
    }
    write_table(out, &rows, &[2, last])
}

fn write_descriptors(out: &mut dyn Write, task: &InspectedTask) -> io::Result<()> {
    writeln!(out)?;
    let executable = task.executable.as_deref().unwrap_or_default();
    let (command, executable) = (plain(&task.command), plain(executable));
    writeln!(out, "{}  {command}  {executable}", task.pid)?;
    let mut rows = Vec::new();
    let mut others: BTreeMap<FileKind, Vec<u32>> = BTreeMap::new();
    for Descriptor { fd, file } in &task.descriptors {
        match describe(file) {
            Some(text) => {
                let kind = file.kind.word().to_owned();
                rows.push(vec![format!("  {fd}"), kind, text]);
            }
            None => others.entry(file.kind).or_default().push(*fd),
        }
    }
    for (kind, fds) in others {
        let fds: Vec<String> = fds.iter().map(u32::to_string).collect();
        let text = match fds.len() {
            1 => String::new(),
            count => format!("{count} of them"),
        };
        rows.push(vec![
            format!("  {}", fds.join(" ")),
            kind.word().to_owned(),
            text,
        ]);
    }
    if rows.is_empty() {
        return writeln!(out, "  nothing is open");
    }
    write_table(out, &rows, &[0, 1, 2])
}

/// What is known of it beside its kind.
fn describe(file: &OpenFile) -> Option<String> {
    let mut text: Vec<String> = Vec::new();
    text.extend(file.path.as_deref().map(plain));
    text.extend(file.deleted.then(|| "(deleted)".to_owned()));
    text.extend(file.position.filter(|p| *p > 0).map(|p| format!("at {p}")));
    match (file.local, file.remote) {
        (Some(local), Some(remote)) => text.push(format!("{local} - {remote}")),
        (Some(local), None) => text.push(local.to_string()),
        _ => {}
    }
    text.extend(file.state.map(str::to_owned));
    text.extend(file.number.map(|number| format!("#{number}")));
    text.extend(file.peer.map(|peer| format!("to #{peer}")));
    text.extend(file.end.map(|end| format!("{end} end")));
    Some(text.join(" ")).filter(|text| !text.is_empty())
}

/// Images without their numbers, how many, and their bytes.
fn by_kind(images: &[ImageSize]) -> BTreeMap<String, (usize, u64)> {
    let mut kinds: BTreeMap<String, (usize, u64)> = BTreeMap::new();
    for image in images {
        let name = image.name.strip_suffix(".img").unwrap_or(&image.name);
        let kind = match name.rsplit_once('-') {
            Some((kind, number)) if number.bytes().all(|b| b.is_ascii_hexdigit()) => kind,
            _ => name,
        };
        let entry = kinds.entry(plain(kind)).or_default();
        entry.0 += 1;
        entry.1 = entry.1.saturating_add(image.bytes);
    }
    kinds
}

/// Columns of text, two blanks apart; those named begin where they begin, others end where they end.
fn write_table(out: &mut dyn Write, rows: &[Vec<String>], to_the_left: &[usize]) -> io::Result<()> {
    let mut widths: Vec<usize> = Vec::new();
    for row in rows {
        for (column, cell) in row.iter().enumerate() {
            let width = cell.chars().count();
            match widths.get_mut(column) {
                Some(widest) => *widest = width.max(*widest),
                None => widths.push(width),
            }
        }
    }
    for row in rows {
        let cells = row.iter().zip(&widths).enumerate();
        let cells = cells.map(
            |(column, (cell, &width))| match to_the_left.contains(&column) {
                true => format!("{cell:<width$}"),
                false => format!("{cell:>width$}"),
            },
        );
        let line = cells.collect::<Vec<_>>().join("  ");
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}

/// Of numbers that somebody may have made up.
fn sum(numbers: impl Iterator<Item = u64>) -> u64 {
    numbers.fold(0, u64::saturating_add)
}

fn size(bytes: u64) -> String {
    ByteSize(bytes).display().iec().to_string()
}

/// Without anything that a terminal would take for a command.
fn plain(text: &str) -> String {
    text.chars()
        .flat_map(|c| {
            let escaped = c.is_control().then(|| c.escape_default());
            let itself = escaped.is_none().then_some(c);
            escaped.into_iter().flatten().chain(itself)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use clap::Parser;
    use haulier_criu::inspect::{Dump, Namespace, TaskMemory, TaskState, Thread, Writer};

    use super::*;
    use crate::cli::Cli;

    fn task(pid: u32, parent: u32, command: &str) -> InspectedTask {
        InspectedTask {
            pid,
            parent,
            group: 7,
            session: 7,
            state: TaskState::Running,
            command: command.to_owned(),
            executable: Some("/usr/bin/sh".to_owned()),
            threads: vec![Thread {
                tid: pid,
                name: None,
            }],
            memory: Some(TaskMemory {
                mapped: 8 << 20,
                in_images: 40960,
                ..TaskMemory::default()
            }),
            descriptors: Vec::new(),
        }
    }

    fn file(kind: FileKind) -> OpenFile {
        OpenFile {
            kind,
            path: None,
            deleted: false,
            position: None,
            state: None,
            local: None,
            remote: None,
            number: None,
            peer: None,
            end: None,
        }
    }

    fn image(name: &str, bytes: u64) -> ImageSize {
        let name = name.to_owned();
        ImageSize { name, bytes }
    }

    #[test]
    fn a_dump_is_told_in_columns() {
        let mut child = task(812, 7, "io\u{1b}[2J");
        child.state = TaskState::Stopped;
        let listening = OpenFile {
            local: Some("127.0.0.1:80".parse().unwrap()),
            state: Some("listening"),
            ..file(FileKind::Tcp)
        };
        let log = OpenFile {
            path: Some("/srv/log".to_owned()),
            deleted: true,
            position: Some(9),
            ..file(FileKind::File)
        };
        let files = [
            log,
            listening,
            file(FileKind::Eventpoll),
            file(FileKind::Eventpoll),
        ];
        let descriptors = files.into_iter().zip([1, 12, 3, 4]);
        child.descriptors = descriptors
            .map(|(file, fd)| Descriptor {
                fd,
                file: Arc::new(file),
            })
            .collect();
        let inspected = Inspected {
            origin: Origin::Cache {
                snapshot: 2,
                state: "released".to_owned(),
            },
            dump: Dump {
                criu: Writer {
                    image_format: 2,
                    pre_dump: false,
                    run_id: None,
                    wide_page_counts: Some(true),
                },
                tasks: vec![task(7, 0, "sh"), child],
                shared_memory: Vec::new(),
                namespaces: vec![Namespace {
                    kind: "net",
                    id: 10,
                }],
                images: vec![
                    image("core-7.img", 2048),
                    image("core-812.img", 1024),
                    image("inventory.img", 30),
                    image("pages-1.img", 81920),
                ],
            },
        };
        let mut out = Vec::new();
        write(&mut out, Path::new("/run/r"), &inspected).unwrap();
        let expected = "\
dump 2 of /run/r: released
format      1.1, as from CRIU 4.2 on
images      4, 83.0 KiB, of which memory 80.0 KiB
namespaces  net 10

pid  parent  state    threads   mapped  in images  zero  shared  command
  7       -  running        1  8.0 MiB   40.0 KiB   0 B     0 B  sh
812       7  stopped        1  8.0 MiB   40.0 KiB   0 B     0 B    io\\u{1b}[2J

7  sh  /usr/bin/sh
  nothing is open

812  io\\u{1b}[2J  /usr/bin/sh
  1    file       /srv/log (deleted) at 9
  12   tcp        127.0.0.1:80 listening
  3 4  eventpoll  2 of them

images     files      size
core           2   3.0 KiB
inventory      1      30 B
pages          1  80.0 KiB
";
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }

    #[test]
    fn inspect_takes_a_path_and_what_to_show() {
        let parse = |line: &str| Cli::try_parse_from(line.split(' ')).map(drop);
        for good in [
            "haulier inspect /run/restore",
            "haulier inspect /run/restore --snapshot 3 --json",
            "haulier inspect dump.tar",
        ] {
            assert!(parse(good).is_ok(), "{good}");
        }
        assert!(parse("haulier inspect").is_err());
        assert!(parse("haulier inspect x --snapshot one").is_err());
    }
}

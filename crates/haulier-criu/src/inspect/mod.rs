//! What is in a dump: its processes, what they have open, and where their memory is.
//!
//! Nothing is restored for it, and images of pages are not read. The images may come from anybody:
//! sizes and counts are bounded, and what does not fit together is an error.

mod entries;
mod fields;
mod files;
mod memory;
mod source;

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;

use serde::{Serialize, Serializer};
use thiserror::Error;

pub use self::files::{FileKind, OpenFile};
pub use self::memory::TaskMemory;
pub use self::source::{ImageDirectory, ImageSize, ImageSource};
use crate::image::{ImageError, ImageKind, PstreeEntry};
use entries::{CoreEntry, FdinfoEntry, IdsEntry, InventoryEntry};
use files::{Files, text};
use source::Images;

/// Longest name of a task: the kernel's are 15 bytes.
const LONGEST_NAME: usize = 64;

/// A dump cannot be inspected.
#[derive(Debug, Error)]
pub enum InspectError {
    /// Its images cannot be listed.
    #[error("cannot list the images")]
    List(#[source] io::Error),
    /// An image is not there, or is damaged.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// It is no dump, or was not finished.
    #[error("there is no {0}: this is no complete dump of CRIU")]
    NoDump(&'static str),
    /// There is more of something than is read.
    #[error("the dump has more than {most} {what}, which is more than is read here")]
    TooMuch {
        /// Of what.
        what: &'static str,
        /// The limit.
        most: u64,
    },
}

/// What is in a dump. As JSON it only ever gains fields.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Dump {
    /// What is known of the CRIU that wrote it.
    pub criu: Writer,
    /// Its tasks, parents first; none of a pre-dump.
    pub tasks: Vec<InspectedTask>,
    /// Shared memory whose contents are in the images.
    pub shared_memory: Vec<SharedMemory>,
    /// The namespaces that a restore makes anew.
    pub namespaces: Vec<Namespace>,
    /// The images.
    pub images: Vec<ImageSize>,
}

/// The CRIU that wrote a dump: its images do not name a version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Writer {
    /// Version of the image format; 2 is what CRIU calls 1.1.
    pub image_format: u32,
    /// Whether it was `criu pre-dump`: memory and nothing else.
    pub pre_dump: bool,
    /// Names the run that made the dump.
    pub run_id: Option<String>,
    /// Whether pages are counted in 64 bits, as from CRIU 4.2 on. `None`: nothing is counted.
    pub wide_page_counts: Option<bool>,
}

/// A task of a dump.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct InspectedTask {
    /// Process number.
    pub pid: u32,
    /// Its parent's; 0 for the root of the tree.
    pub parent: u32,
    /// Its process group.
    pub group: u32,
    /// Its session.
    pub session: u32,
    /// What it was doing.
    pub state: TaskState,
    /// Its name.
    pub command: String,
    /// What it executes.
    pub executable: Option<String>,
    /// Its threads, the first one included.
    pub threads: Vec<Thread>,
    /// `None` for one that has none, as a zombie.
    pub memory: Option<TaskMemory>,
    /// What it has open, by descriptor.
    pub descriptors: Vec<Descriptor>,
}

/// What a task was doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TaskState {
    /// It runs, or sleeps.
    Running,
    /// A signal has stopped it.
    Stopped,
    /// It has ended, and its parent has not looked yet.
    Zombie,
    /// It has ended.
    Dead,
    /// CRIU has a state that is not known here.
    Unknown,
}

impl TaskState {
    fn of(number: u32) -> TaskState {
        match number {
            1 => TaskState::Running,
            2 => TaskState::Dead,
            3 => TaskState::Stopped,
            6 => TaskState::Zombie,
            _ => TaskState::Unknown,
        }
    }

    /// Its name, as in JSON.
    pub fn word(self) -> &'static str {
        match self {
            TaskState::Running => "running",
            TaskState::Stopped => "stopped",
            TaskState::Zombie => "zombie",
            TaskState::Dead => "dead",
            TaskState::Unknown => "unknown",
        }
    }
}

impl Serialize for TaskState {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.word())
    }
}

/// A thread of a task.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Thread {
    /// Its number.
    pub tid: u32,
    /// Its name.
    pub name: Option<String>,
}

/// A descriptor of a task.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Descriptor {
    /// Its number.
    pub fd: u32,
    /// What it is of. Several may share it.
    #[serde(flatten)]
    pub file: Arc<OpenFile>,
}

/// Shared anonymous memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SharedMemory {
    /// CRIU's number for it.
    pub id: u64,
    /// Bytes of it that are in the images.
    pub in_images: u64,
}

/// A namespace, or the like, that was dumped.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Namespace {
    /// `mount`, `net`, `uts`, `ipc`, `user`, `pid` or `time`.
    pub kind: &'static str,
    /// CRIU's number for it.
    pub id: u32,
}

/// Reads what is in a dump.
///
/// # Errors
/// See [`InspectError`].
pub fn inspect(source: &mut dyn ImageSource) -> Result<Dump, InspectError> {
    let mut images = Images::new(source)?;
    let inventory: InventoryEntry = images
        .open("inventory.img", ImageKind::Inventory)?
        .ok_or(InspectError::NoDump("inventory.img"))?
        .expect()?;
    let mut criu = Writer {
        image_format: inventory.image_format,
        pre_dump: inventory.pre_dump_mode.is_some(),
        run_id: inventory.run_id.as_deref().map(text),
        wide_page_counts: None,
    };
    let mut pstree = images.open("pstree.img", ImageKind::Pstree)?;
    if pstree.is_none() && !criu.pre_dump {
        return Err(InspectError::NoDump("pstree.img"));
    }
    let files = Files::read(&mut images)?;
    let mut tasks = Vec::new();
    let mut known = BTreeSet::new();
    // A pre-dump has none: its tasks cannot be told.
    while let Some(pstree) = &mut pstree {
        let Some(entry) = pstree.next::<PstreeEntry>()? else {
            break;
        };
        images.count(1 + entry.threads.len())?;
        // Each has images of its own: no two read the same.
        if !known.insert(entry.pid) {
            let why = format!("task {} is in it twice", entry.pid);
            return Err(pstree.invalid(why).into());
        }
        let per_id = inventory.fdinfo_per_id.unwrap_or(false);
        tasks.push(task(entry, per_id, &files, &mut images, &mut criu)?);
    }
    let mut shared_memory = Vec::new();
    for (name, id) in images.numbered("pagemap-shmem-") {
        shared_memory.push(SharedMemory {
            id,
            in_images: memory::of_shared(&name, &mut images, &mut criu.wide_page_counts)?,
        });
    }
    Ok(Dump {
        criu,
        tasks,
        shared_memory,
        namespaces: namespaces(&images),
        images: images.into_sizes(),
    })
}

fn task(
    entry: PstreeEntry,
    per_id: bool,
    files: &Files,
    images: &mut Images<'_>,
    criu: &mut Writer,
) -> Result<InspectedTask, InspectError> {
    let pid = entry.pid;
    let core = core(pid, images)?;
    let core = core.ok_or_else(|| images.missing(&format!("core-{pid}.img")))?;
    let of_task = core.task.clone().unwrap_or_default();
    let mut threads = Vec::with_capacity(entry.threads.len());
    for tid in entry.threads {
        let of_thread = match tid == pid {
            true => core.thread.clone().and_then(|thread| thread.name),
            false => {
                self::core(tid, images)?.and_then(|core| core.thread.and_then(|thread| thread.name))
            }
        };
        let name = of_thread.as_deref().map(name);
        threads.push(Thread { tid, name });
    }
    let memory = memory::of_task(pid, images, &mut criu.wide_page_counts)?;
    let executable = memory
        .as_ref()
        .and_then(|(_, executable)| files.path(*executable));
    let ids = match images.open(&format!("ids-{pid}.img"), ImageKind::Ids)? {
        Some(mut image) => Some(image.expect::<IdsEntry>()?),
        None => core.ids,
    };
    let fdinfo = match ids {
        Some(ids) if per_id => Some(ids.files),
        _ => Some(pid).filter(|_| !per_id),
    };
    let descriptors = match fdinfo {
        Some(number) => descriptors(number, files, images)?,
        None => Vec::new(),
    };
    Ok(InspectedTask {
        pid,
        parent: entry.parent,
        group: entry.group,
        session: entry.session,
        state: TaskState::of(of_task.state),
        command: name(&of_task.name),
        executable,
        threads,
        memory: memory.map(|(memory, _)| memory),
        descriptors,
    })
}

fn core(tid: u32, images: &mut Images<'_>) -> Result<Option<CoreEntry>, InspectError> {
    match images.open(&format!("core-{tid}.img"), ImageKind::Core)? {
        Some(mut image) => Ok(Some(image.expect()?)),
        None => Ok(None),
    }
}

fn descriptors(
    number: u32,
    files: &Files,
    images: &mut Images<'_>,
) -> Result<Vec<Descriptor>, InspectError> {
    let Some(mut image) = images.open(&format!("fdinfo-{number}.img"), ImageKind::Fdinfo)? else {
        // A zombie has none.
        return Ok(Vec::new());
    };
    let mut descriptors = Vec::new();
    while let Some(entry) = image.next::<FdinfoEntry>()? {
        images.count(1)?;
        descriptors.push(Descriptor {
            fd: entry.fd,
            file: files.get(entry.kind, entry.file),
        });
    }
    descriptors.sort_by_key(|descriptor| descriptor.fd);
    Ok(descriptors)
}

fn namespaces(images: &Images<'_>) -> Vec<Namespace> {
    let kinds = [
        ("mountpoints-", "mount"),
        ("netns-", "net"),
        ("utsns-", "uts"),
        ("ipcns-var-", "ipc"),
        ("userns-", "user"),
        ("pidns-", "pid"),
        ("timens-", "time"),
    ];
    let mut all: Vec<Namespace> = kinds
        .into_iter()
        .flat_map(|(prefix, kind)| {
            let numbered = images.numbered(prefix).into_iter();
            numbered.filter_map(move |(_, id)| {
                let id = u32::try_from(id).ok()?;
                Some(Namespace { kind, id })
            })
        })
        .collect();
    all.sort();
    all
}

/// The name of a task.
fn name(bytes: &[u8]) -> String {
    text(&bytes[..bytes.len().min(LONGEST_NAME)])
}

#[cfg(test)]
mod tests;

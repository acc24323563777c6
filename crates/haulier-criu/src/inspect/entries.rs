//! Entries of CRIU's images, by their field numbers (CRIU 4.0 to 4.2). prost skips the rest.
//!
//! What CRIU calls strings are bytes here: paths and names need not be UTF-8.

use prost::Message;

/// `inventory.img`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct InventoryEntry {
    #[prost(uint32, required, tag = "1")]
    pub(super) image_format: u32,
    /// Whether `fdinfo-*.img` are numbered by [`IdsEntry::files`], not by process.
    #[prost(bool, optional, tag = "2")]
    pub(super) fdinfo_per_id: Option<bool>,
    #[prost(uint32, optional, tag = "9")]
    pub(super) pre_dump_mode: Option<u32>,
    #[prost(bytes = "vec", optional, tag = "13")]
    pub(super) run_id: Option<Vec<u8>>,
}

/// `core-TID.img`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct CoreEntry {
    /// Only the first thread's has it.
    #[prost(message, optional, tag = "3")]
    pub(super) task: Option<TaskCoreEntry>,
    #[prost(message, optional, tag = "4")]
    pub(super) ids: Option<IdsEntry>,
    #[prost(message, optional, tag = "5")]
    pub(super) thread: Option<ThreadCoreEntry>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct TaskCoreEntry {
    #[prost(uint32, required, tag = "1")]
    pub(super) state: u32,
    #[prost(bytes = "vec", required, tag = "6")]
    pub(super) name: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct ThreadCoreEntry {
    #[prost(bytes = "vec", optional, tag = "13")]
    pub(super) name: Option<Vec<u8>>,
}

/// `ids-PID.img`: numbers for what several tasks may share.
#[derive(Clone, Copy, PartialEq, Message)]
pub(super) struct IdsEntry {
    #[prost(uint32, required, tag = "2")]
    pub(super) files: u32,
}

/// A descriptor, in `fdinfo-*.img`.
#[derive(Clone, Copy, PartialEq, Message)]
pub(super) struct FdinfoEntry {
    #[prost(uint32, required, tag = "1")]
    pub(super) file: u32,
    /// See [`super::FileKind`].
    #[prost(uint32, required, tag = "3")]
    pub(super) kind: u32,
    #[prost(uint32, required, tag = "4")]
    pub(super) fd: u32,
}

/// Something that descriptors or mappings are of, in `files.img`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct FileEntry {
    #[prost(uint32, required, tag = "1")]
    pub(super) kind: u32,
    #[prost(uint32, required, tag = "2")]
    pub(super) id: u32,
    #[prost(message, optional, tag = "3")]
    pub(super) regular: Option<RegularEntry>,
    #[prost(message, optional, tag = "4")]
    pub(super) inet: Option<InetEntry>,
    #[prost(message, optional, tag = "16")]
    pub(super) unix: Option<UnixEntry>,
    #[prost(message, optional, tag = "17")]
    pub(super) fifo: Option<FifoEntry>,
    #[prost(message, optional, tag = "18")]
    pub(super) pipe: Option<PipeEntry>,
    #[prost(message, optional, tag = "19")]
    pub(super) terminal: Option<TerminalEntry>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct RegularEntry {
    #[prost(uint64, required, tag = "3")]
    pub(super) position: u64,
    #[prost(bytes = "vec", required, tag = "6")]
    pub(super) path: Vec<u8>,
    /// As of stat(2).
    #[prost(uint32, optional, tag = "10")]
    pub(super) mode: Option<u32>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct InetEntry {
    #[prost(uint32, required, tag = "3")]
    pub(super) family: u32,
    #[prost(uint32, required, tag = "4")]
    pub(super) kind: u32,
    #[prost(uint32, required, tag = "5")]
    pub(super) protocol: u32,
    #[prost(uint32, required, tag = "6")]
    pub(super) state: u32,
    #[prost(uint32, required, tag = "7")]
    pub(super) local_port: u32,
    #[prost(uint32, required, tag = "8")]
    pub(super) remote_port: u32,
    /// One word or four, as they lie in memory.
    #[prost(uint32, repeated, packed = "false", tag = "11")]
    pub(super) local: Vec<u32>,
    #[prost(uint32, repeated, packed = "false", tag = "12")]
    pub(super) remote: Vec<u32>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct UnixEntry {
    #[prost(uint32, required, tag = "2")]
    pub(super) inode: u32,
    #[prost(uint32, required, tag = "4")]
    pub(super) state: u32,
    /// The other end's inode.
    #[prost(uint32, required, tag = "8")]
    pub(super) peer: u32,
    #[prost(bytes = "vec", required, tag = "11")]
    pub(super) name: Vec<u8>,
    /// Where a name that is no full path was meant.
    #[prost(bytes = "vec", optional, tag = "14")]
    pub(super) directory: Option<Vec<u8>>,
}

#[derive(Clone, Copy, PartialEq, Message)]
pub(super) struct FifoEntry {
    /// The file of its name.
    #[prost(uint32, optional, tag = "3")]
    pub(super) file: Option<u32>,
}

#[derive(Clone, Copy, PartialEq, Message)]
pub(super) struct PipeEntry {
    /// The same for both ends.
    #[prost(uint32, required, tag = "2")]
    pub(super) pipe: u32,
    /// As of open(2).
    #[prost(uint32, required, tag = "3")]
    pub(super) flags: u32,
}

#[derive(Clone, Copy, PartialEq, Message)]
pub(super) struct TerminalEntry {
    /// The file of its name.
    #[prost(uint32, optional, tag = "6")]
    pub(super) file: Option<u32>,
}

/// A file whose name is gone, in `remap-fpath.img`.
#[derive(Clone, Copy, PartialEq, Message)]
pub(super) struct RemapEntry {
    #[prost(uint32, required, tag = "1")]
    pub(super) file: u32,
    /// 0: it has another name, 1: it is in the images, 2: it belongs to a task.
    #[prost(uint32, optional, tag = "3")]
    pub(super) kind: Option<u32>,
}

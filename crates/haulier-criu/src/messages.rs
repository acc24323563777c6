//! CRIU's RPC messages, defined by their field numbers (CRIU 4.0 to 4.2, `images/rpc.proto`).
//!
//! Only what haulier sends or reads is here; prost skips the rest.

/// Kinds of request and response.
#[derive(Debug, Clone, Copy, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum Kind {
    /// An error before the request was understood.
    Empty = 0,
    /// Dump a process tree.
    Dump = 1,
    /// Restore a process tree.
    Restore = 2,
    /// A hook of a running dump or restore, and the answer to it.
    Notify = 6,
    /// Which optional kernel features CRIU can use.
    FeatureCheck = 9,
    /// CRIU's version.
    Version = 10,
}

/// How CRIU treats cgroups: not at all. The hand-over's freeze is a cgroup of haulier's own, and a
/// task restored into a frozen cgroup would hang CRIU.
pub const CGROUPS_IGNORE: i32 = 0;
/// How CRIU locks the network: not at all. haulier locks it itself, for as long as it needs.
pub const NETWORK_LOCK_SKIP: i32 = 3;

/// A request to `criu swrk`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Request {
    /// What is asked.
    #[prost(enumeration = "Kind", required, tag = "1")]
    pub kind: i32,
    /// Options of a dump or restore.
    #[prost(message, optional, tag = "2")]
    pub options: Option<Options>,
    /// The answer to a notification.
    #[prost(bool, optional, tag = "3")]
    pub notify_success: Option<bool>,
    /// Whether more requests follow on the same connection.
    #[prost(bool, optional, tag = "4")]
    pub keep_open: Option<bool>,
    /// Features to ask for.
    #[prost(message, optional, tag = "5")]
    pub features: Option<Features>,
}

/// Options of a dump or restore.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Options {
    /// Always -1: the directory is given by path, since a number is looked up in `/proc` of the
    /// client, which needs a shared PID namespace.
    #[prost(int32, required, tag = "1")]
    pub images_dir_fd: i32,
    /// Root of the tree to dump.
    #[prost(int32, optional, tag = "2")]
    pub pid: Option<i32>,
    /// Keep established TCP connections.
    #[prost(bool, optional, tag = "5")]
    pub tcp_established: Option<bool>,
    /// Allow a tree whose session leader or terminal is outside of it.
    #[prost(bool, optional, tag = "7")]
    pub shell_job: Option<bool>,
    /// Keep file locks.
    #[prost(bool, optional, tag = "8")]
    pub file_locks: Option<bool>,
    /// 1 errors, 2 warnings, 3 information, 4 everything.
    #[prost(int32, optional, tag = "9")]
    pub log_level: Option<i32>,
    /// Name of the log in the image directory.
    #[prost(string, optional, tag = "10")]
    pub log_file: Option<String>,
    /// Whether hooks are sent as notifications.
    #[prost(bool, optional, tag = "12")]
    pub notify_scripts: Option<bool>,
    /// Give files that are open under a removed name, but still linked elsewhere, a temporary one.
    #[prost(bool, optional, tag = "18")]
    pub link_remap: Option<bool>,
    /// Largest unlinked file that is put into the images, in bytes.
    #[prost(uint32, optional, tag = "35")]
    pub ghost_limit: Option<u32>,
    /// See [`CGROUPS_IGNORE`].
    #[prost(int32, optional, tag = "34")]
    pub manage_cgroups_mode: Option<i32>,
    /// Seconds that tasks may take to freeze.
    #[prost(uint32, optional, tag = "45")]
    pub timeout: Option<u32>,
    /// Leave private anonymous memory out of the images (dump), fill it by userfaultfd (restore).
    #[prost(bool, optional, tag = "48")]
    pub lazy_pages: Option<bool>,
    /// A file of further options.
    #[prost(string, optional, tag = "51")]
    pub config_file: Option<String>,
    /// See [`NETWORK_LOCK_SKIP`].
    #[prost(int32, optional, tag = "64")]
    pub network_lock: Option<i32>,
    /// The image directory.
    #[prost(string, optional, tag = "68")]
    pub images_dir: Option<String>,
}

/// Optional features of kernel and CRIU.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct Features {
    /// Soft-dirty tracking.
    #[prost(bool, optional, tag = "1")]
    pub memory_tracking: Option<bool>,
    /// Lazy restore.
    #[prost(bool, optional, tag = "2")]
    pub lazy_pages: Option<bool>,
}

/// A response or notification of `criu swrk`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Response {
    /// The kind of request it answers, or [`Kind::Notify`].
    #[prost(enumeration = "Kind", required, tag = "1")]
    pub kind: i32,
    /// Whether it succeeded.
    #[prost(bool, required, tag = "2")]
    pub success: bool,
    /// The result of a restore.
    #[prost(message, optional, tag = "4")]
    pub restored: Option<RestoredPid>,
    /// The hook of a notification.
    #[prost(message, optional, tag = "5")]
    pub notify: Option<Notification>,
    /// An errno that CRIU chose to report.
    #[prost(int32, optional, tag = "7")]
    pub errno: Option<i32>,
    /// The features asked for.
    #[prost(message, optional, tag = "8")]
    pub features: Option<Features>,
    /// The first error line of the log, which is rarely the cause.
    #[prost(string, optional, tag = "9")]
    pub message: Option<String>,
    /// The version asked for.
    #[prost(message, optional, tag = "10")]
    pub version: Option<VersionNumbers>,
}

/// The result of a restore.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct RestoredPid {
    /// Root task of the restored tree.
    #[prost(int32, required, tag = "1")]
    pub pid: i32,
}

/// A hook of a running dump or restore.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Notification {
    /// The hook's name.
    #[prost(string, optional, tag = "1")]
    pub script: Option<String>,
    /// The task it is about, at some hooks.
    #[prost(int32, optional, tag = "2")]
    pub pid: Option<i32>,
}

/// CRIU's version.
#[derive(Clone, PartialEq, prost::Message)]
pub struct VersionNumbers {
    /// Major number.
    #[prost(int32, required, tag = "1")]
    pub major: i32,
    /// Minor number.
    #[prost(int32, required, tag = "2")]
    pub minor: i32,
    /// Git description of an unreleased build.
    #[prost(string, optional, tag = "3")]
    pub git: Option<String>,
    /// Sub-level.
    #[prost(int32, optional, tag = "4")]
    pub sublevel: Option<i32>,
}

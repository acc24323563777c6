use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::nf_tables::{Change, Family, tables};
use super::nft::{ArmedNft, Batch, Ending};
use super::{Capture, Connection, Error, MoveIp, ruleset};

/// An `nft` that takes longer is killed. It needs 2 ms; a host that reloads large rule sets
/// at the moment makes it wait.
const DEADLINE: Duration = Duration::from_secs(5);

const MAX_ID: usize = 64;

/// What is to be silenced.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LockScope {
    /// Addresses that move: every packet to or from them, and every ARP or neighbour
    /// discovery message about them.
    pub addresses: Vec<IpAddr>,
    /// TCP connections of addresses that stay with the host.
    pub connections: Vec<Connection>,
}

impl LockScope {
    /// The addresses, and those connections that none of them covers.
    pub fn new(addresses: &[MoveIp], connections: &[Connection]) -> Self {
        let addresses: Vec<IpAddr> = addresses.iter().map(MoveIp::ip).collect();
        let covered = |connection: &&Connection| {
            !addresses.contains(&connection.local.ip())
                && !addresses.contains(&connection.remote.ip())
        };
        let connections = connections.iter().filter(covered).copied().collect();
        Self {
            addresses,
            connections,
        }
    }
}

/// A network lock that is ready: engaging it costs no start of a process.
///
/// All of it acts on the network namespace of the thread that arms it.
#[derive(Debug)]
pub struct ArmedLock {
    table: String,
    engage: ArmedNft,
    lift: ArmedNft,
    log: Option<u16>,
}

impl ArmedLock {
    /// Starts the two `nft` processes that will engage and lift the lock of migration `id`
    /// (1 to 64 hexadecimal digits). Nothing is locked; dropped, it leaves nothing.
    ///
    /// They are ready some 20 ms later: arm before the freeze.
    ///
    /// # Errors
    /// [`Error::BadLockId`], [`Error::NftMissing`], [`Error::NftProcess`].
    pub fn arm(id: &str) -> Result<Self, Error> {
        let table = table(id)?;
        Ok(Self {
            table,
            engage: ArmedNft::spawn()?,
            lift: ArmedNft::spawn()?,
            log: None,
        })
    }

    /// Has the incoming packets that the lock will drop go to `capture`, opened in the same
    /// network namespace.
    pub fn capture_to(&mut self, capture: &Capture) {
        self.log = Some(capture.group());
    }

    /// Drops, from when this returns on, what `scope` covers. A lock of the same id that is
    /// there already is replaced, without a moment between.
    ///
    /// # Errors
    /// [`Error::Nft`], [`Error::NftTimeout`], [`Error::NftProcess`]: nothing is locked then, as
    /// far as the lock could be lifted again.
    pub fn engage(self, scope: &LockScope) -> Result<EngagedLock, Error> {
        let Self {
            table,
            engage,
            lift,
            log,
        } = self;
        let (text, families) = ruleset::engage(&table, scope, log);
        let mut lock = EngagedLock {
            table,
            families,
            lift: Some(lift),
            ending: Vec::new(),
            engaged: true,
        };
        let expected = lock
            .families
            .iter()
            .map(|family| (*family, Change::Created))
            .collect();
        let batch = Batch {
            operation: "engage the network lock",
            text: &text,
            table: &lock.table,
            expected,
        };
        match engage.run(batch, DEADLINE) {
            Ok(process) => lock.ending.push(process),
            Err(error) => {
                // nft is atomic, so its own refusal has left nothing; a batch that ran into
                // the deadline may have taken effect since.
                if matches!(error, Error::Nft { .. }) {
                    lock.engaged = false;
                }
                return Err(error);
            }
        }
        Ok(lock)
    }
}

/// A network lock in effect. Dropped, it is lifted.
#[derive(Debug)]
pub struct EngagedLock {
    table: String,
    families: Vec<Family>,
    lift: Option<ArmedNft>,
    /// Batches that hold, to be cleaned up after when there is time.
    ending: Vec<Ending>,
    engaged: bool,
}

impl EngagedLock {
    /// Lets packets pass again, from when this returns on; the second time it does nothing.
    /// Someone else having deleted the tables is no error.
    ///
    /// The kernel frees the rules behind our back, and dropping the object waits for it, up to
    /// 20 ms: in a switchover, drop it after the thaw.
    ///
    /// # Errors
    /// [`Error::Nft`], [`Error::NftTimeout`], [`Error::NftProcess`]: the lock may still be in
    /// effect, and may be lifted again.
    pub fn lift(&mut self) -> Result<(), Error> {
        if !self.engaged {
            return Ok(());
        }
        let armed = match self.lift.take() {
            Some(armed) => {
                let result = lift_with(armed, &self.table, &self.families);
                if let Err(error) = &result {
                    // The armed process may have been killed in the meantime.
                    tracing::warn!(%error, "lifting the network lock again");
                }
                result.ok()
            }
            None => None,
        };
        let process = match armed {
            Some(process) => process,
            None => lift_with(ArmedNft::spawn()?, &self.table, &self.families)?,
        };
        self.engaged = false;
        self.ending.push(process);
        Ok(())
    }

    /// Leaves the lock in effect beyond this object and this process: whether the target may
    /// run is in doubt. [`lift_by_id`] lifts it.
    pub fn keep(mut self) {
        self.engaged = false;
    }
}

impl Drop for EngagedLock {
    fn drop(&mut self) {
        if let Err(error) = self.lift() {
            tracing::error!(
                %error, table = self.table,
                "the network lock stays; `nft delete table inet NAME` and `arp NAME` lift it"
            );
        }
    }
}

/// Lifts the lock of migration `id`, if there is one, whoever engaged it.
///
/// # Errors
/// [`Error::BadLockId`], and those of [`EngagedLock::lift`].
pub fn lift_by_id(id: &str) -> Result<(), Error> {
    let table = table(id)?;
    let mut families = all_tables()?;
    families.retain(|(_, name)| *name == table);
    let families: Vec<Family> = families.into_iter().map(|(family, _)| family).collect();
    if !families.is_empty() {
        lift_with(ArmedNft::spawn()?, &table, &families)?;
    }
    Ok(())
}

/// Locks addresses that have no lock any more, until [`lift_by_id`]: a task that is killed must not say
/// goodbye to its peers while another copy of it may go on.
///
/// # Errors
/// [`Error::Nft`], [`Error::Netlink`].
pub fn silence(id: &str, addresses: &[MoveIp]) -> Result<(), Error> {
    let table = table(id)?;
    let is_locked = all_tables()?.iter().any(|(_, name)| *name == table);
    if !is_locked && !addresses.is_empty() {
        let scope = LockScope::new(addresses, &[]);
        ArmedLock::arm(id)?.engage(&scope)?.keep();
    }
    Ok(())
}

/// The names of the tables of network locks here, each `haulier_<id>`, once for both families.
///
/// # Errors
/// [`Error::Netlink`].
pub fn tables_of_haulier() -> Result<Vec<String>, Error> {
    let names = all_tables()?.into_iter().map(|(_, name)| name);
    let ours: BTreeSet<String> = names.filter(|name| id_of(name).is_some()).collect();
    Ok(ours.into_iter().collect())
}

/// The migration whose lock a table is, if it is one.
pub fn id_of(table: &str) -> Option<&str> {
    table.strip_prefix(ruleset::PREFIX).filter(|id| is_id(id))
}

/// Whether this host can have a network lock: `nft` runs, and the kernel takes tables of both
/// families with all that the lock's rules are made of. Nothing of it ever meets a packet.
///
/// # Errors
/// [`Error::NftMissing`]; [`Error::LockUnsupported`] with the family that is refused.
pub fn probe() -> Result<(), Error> {
    for family in [Family::Inet, Family::Arp] {
        probe_family(family, None).map_err(|error| match error {
            Error::Nft { message, .. } => Error::LockUnsupported {
                family: family.name(),
                message,
            },
            error => error,
        })?;
    }
    Ok(())
}

/// Whether a lock here can also log to that group.
pub(super) fn probe_log(group: u16) -> Result<(), Error> {
    probe_family(Family::Inet, Some(group)).map_err(|error| match error {
        Error::Nft { message, .. } => Error::CaptureUnsupported(std::io::Error::other(message)),
        error => error,
    })
}

fn probe_family(family: Family, log: Option<u16>) -> Result<(), Error> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let table = format!("{}probe_{}_{count}", ruleset::PREFIX, std::process::id());
    let text = ruleset::probe(&table, family, log);
    let batch = Batch {
        operation: "try a network lock",
        text: &text,
        table: &table,
        expected: vec![(family, Change::Deleted)],
    };
    ArmedNft::spawn()?.run(batch, DEADLINE).map(drop)
}

fn all_tables() -> Result<Vec<(Family, String)>, Error> {
    tables(Instant::now() + DEADLINE).map_err(|source| Error::Netlink {
        operation: "list",
        subject: "the nftables tables".to_owned(),
        source,
    })
}

fn lift_with(nft: ArmedNft, table: &str, families: &[Family]) -> Result<Ending, Error> {
    let text = ruleset::lift(table, families);
    let expected = families
        .iter()
        .map(|family| (*family, Change::Deleted))
        .collect();
    nft.run(
        Batch {
            operation: "lift the network lock",
            text: &text,
            table,
            expected,
        },
        DEADLINE,
    )
}

fn table(id: &str) -> Result<String, Error> {
    if is_id(id) {
        Ok(format!("{}{id}", ruleset::PREFIX))
    } else {
        Err(Error::BadLockId(id.to_owned()))
    }
}

fn is_id(id: &str) -> bool {
    let digit = |byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    (1..=MAX_ID).contains(&id.len()) && id.bytes().all(digit)
}

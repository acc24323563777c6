//! Migrations on a server's host whose haulier has died, of whichever side: what is to be done about
//! them is done when the server starts, and as long as it runs.

use std::collections::HashMap;
use std::io;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use haulier_proto::id::MigrationId;
use haulier_targets::cgroup::CgroupFs;
use haulier_transport::wait::Cancel;
use tracing::warn;

use crate::journal::{self, Mark};
use crate::recovery::{self, Found};
use crate::source::again::{Asking, Unsettled};

/// How often it is looked for them.
const LOOK: Duration = Duration::from_secs(3);
/// When it is asked again about one whose asking has come to nothing.
const ASK_AGAIN: Duration = Duration::from_secs(60);

/// Recovers what there is, and begins to look after what comes, until `stop` is cancelled.
///
/// # Errors
/// If a thread cannot be started.
pub(super) fn look_after(
    cgroups: &CgroupFs,
    asking: &Asking,
    stop: &Cancel,
) -> io::Result<JoinHandle<()>> {
    let mut watch = Watch {
        cgroups: cgroups.clone(),
        asking: asking.clone(),
        stop: stop.clone(),
        seen: HashMap::new(),
    };
    watch.look();
    recovery::sweep_homes(cgroups);
    thread::Builder::new()
        .name("orphans".to_owned())
        .spawn(move || {
            while !watch.stop.sleep(LOOK) {
                watch.look();
            }
        })
}

struct Watch {
    cgroups: CgroupFs,
    asking: Asking,
    stop: Cancel,
    /// What needs no second look, or not now.
    seen: HashMap<MigrationId, Seen>,
}

struct Seen {
    mark: Mark,
    what: What,
}

enum What {
    /// Nothing can be done about it.
    Nothing,
    /// It was tried, and is tried again; it is told once.
    Failed(String),
    /// Its destination was asked.
    Asked(Instant),
}

impl Watch {
    /// Recovers what has come to need it. Empty cgroups stay: a migration that begins at this moment
    /// may be about to use one.
    fn look(&mut self) {
        let ids = journal::all();
        self.seen.retain(|id, _| ids.contains(id));
        for id in ids {
            self.look_at(id);
        }
    }

    fn look_at(&mut self, id: MigrationId) {
        // One that is gone was brought to its end.
        let Ok(mark) = journal::mark(id) else { return };
        let before = self.seen.get(&id).filter(|seen| seen.mark == mark);
        let told = match before.map(|seen| &seen.what) {
            // Its lock is left alone, and nothing is told twice.
            Some(What::Nothing) => return,
            Some(What::Asked(at)) if at.elapsed() < ASK_AGAIN => return,
            Some(What::Failed(told)) => Some(told),
            Some(What::Asked(_)) | None => None,
        };
        let what = match recovery::recover(id, &self.cgroups) {
            Ok(Found::UnderWay) => return,
            Ok(Found::Unsettled(unsettled)) => {
                self.ask(unsettled);
                What::Asked(Instant::now())
            }
            Ok(Found::Nothing) => What::Nothing,
            Err(error) => {
                let error = error.to_string();
                if told != Some(&error) {
                    warn!(%id, error, "recovering");
                }
                What::Failed(error)
            }
        };
        // As it was before: what has changed it meanwhile is looked at.
        self.seen.insert(id, Seen { mark, what });
    }

    /// On a thread of its own, which goes on until the destination has answered.
    fn ask(&self, unsettled: Unsettled) {
        let (cgroups, asking, stop) =
            (self.cgroups.clone(), self.asking.clone(), self.stop.clone());
        thread::spawn(move || recovery::ask(unsettled, &cgroups, &asking, &stop));
    }
}

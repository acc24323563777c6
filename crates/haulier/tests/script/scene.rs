//! A real source and a scripted destination.

use haulier_lab::{Captured, Process};

use super::Destination;
use crate::stage::sight::{goes_on, journals};
use crate::stage::{Stage, start};

/// A process on host 1 that does nothing but make progress, and a scripted destination on host 2.
pub(crate) struct Scene {
    pub(crate) stage: Stage,
    pub(crate) counter: Process,
    pub(crate) destination: Destination,
}

impl Scene {
    pub(crate) fn set() -> Scene {
        let stage = Stage::set(2, env!("CARGO_BIN_EXE_haulier"));
        let counter = start(stage.host(1), &["sh", "-c", "while :; do :; done"]);
        let destination = Destination::open(&stage);
        Scene {
            stage,
            counter,
            destination,
        }
    }

    pub(crate) fn migrate(&self, options: &[&str]) -> Captured {
        let migration = self.stage.migration(1, self.counter.pid(), 2, options);
        migration.spawn_captured().unwrap()
    }

    /// It runs on host 1, and nothing of the migration is left there.
    #[track_caller]
    pub(crate) fn assert_back(&self) {
        goes_on(&self.stage, self.counter.pid());
        self.stage.assert_clean(1, &[]);
        assert_eq!(journals(&self.stage, 1), "");
    }
}

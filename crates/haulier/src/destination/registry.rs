//! The migrations to this host: who may open which connection.

use std::collections::HashMap;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Duration;

use haulier_proto::id::{MigrationId, Secret};
use haulier_proto::message::{Role, control};
use haulier_transport::channel::Channel;
use haulier_transport::greeting::Purpose;

use crate::journal;

/// Most connections of one role that a migration may have.
const MOST_STREAMS: u32 = 64;
/// Most migrations under way at a time.
const MOST_MIGRATIONS: usize = 64;
/// Most secrets of ended migrations that are kept, for commits that are sent again.
const MOST_ENDED: usize = 4096;

/// The migrations that this server knows.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    inner: Mutex<Inner>,
    idle: Condvar,
}

#[derive(Debug, Default)]
struct Inner {
    known: HashMap<MigrationId, Known>,
    ended: Vec<MigrationId>,
}

#[derive(Debug)]
struct Known {
    secret: Secret,
    streams: Option<Sender<Stream>>,
    /// The target is this host's: its source may come back over a new command connection.
    settled: bool,
}

/// A connection that belongs to a migration.
#[derive(Debug)]
pub(crate) struct Stream {
    pub(crate) role: Role,
    pub(crate) channel: Channel,
    /// What has been heard over a command connection already.
    pub(crate) first: Option<control::Body>,
}

/// What a command connection is.
#[derive(Debug)]
pub(crate) enum Entry {
    /// A new migration; its further connections come in here.
    New(Receiver<Stream>),
    /// One that is known, asked about again.
    Again,
    /// Not acceptable.
    Refused(String),
}

impl Registry {
    /// Takes in a command connection.
    pub(crate) fn begin(&self, purpose: &Purpose) -> Entry {
        let mut inner = self.lock();
        if let Some(known) = inner.known.get(&purpose.migration) {
            return if known.secret.matches(purpose.secret.bytes()) {
                Entry::Again
            } else {
                Entry::Refused("the secret is wrong".to_owned())
            };
        }
        match journal::decision(purpose.migration) {
            Ok(None) => {}
            Ok(Some(_)) => return Entry::Again,
            Err(error) => return Entry::Refused(format!("its journal cannot be read: {error}")),
        }
        let running = inner
            .known
            .values()
            .filter(|known| known.streams.is_some())
            .count();
        if running >= MOST_MIGRATIONS {
            return Entry::Refused(format!("{running} migrations are under way already"));
        }
        let (sender, streams) = mpsc::channel();
        let known = Known {
            secret: purpose.secret.clone(),
            streams: Some(sender),
            settled: false,
        };
        inner.known.insert(purpose.migration, known);
        Entry::New(streams)
    }

    /// How many migrations are under way whose target is not this host's yet.
    pub(crate) fn undecided(&self) -> usize {
        let inner = self.lock();
        let known = inner.known.values();
        known
            .filter(|known| known.streams.is_some() && !known.settled)
            .count()
    }

    /// Whether another connection fits a migration under way.
    pub(crate) fn check_stream(&self, purpose: &Purpose) -> Result<(), String> {
        let inner = self.lock();
        let known = inner
            .known
            .get(&purpose.migration)
            .filter(|known| known.streams.is_some());
        let Some(known) = known else {
            return Err("there is no such migration".to_owned());
        };
        if !known.secret.matches(purpose.secret.bytes()) {
            return Err("the secret is wrong".to_owned());
        }
        if purpose.index >= MOST_STREAMS {
            return Err(format!(
                "at most {MOST_STREAMS} connections of a role are accepted"
            ));
        }
        Ok(())
    }

    /// Hands a checked connection to its migration. If that has ended meanwhile, it is closed.
    pub(crate) fn deliver(&self, purpose: &Purpose, channel: Channel) {
        let inner = self.lock();
        if let Some(Known {
            streams: Some(sender),
            ..
        }) = inner.known.get(&purpose.migration)
        {
            let _ = sender.send(Stream {
                role: purpose.role,
                channel,
                first: None,
            });
        }
    }

    /// The target has become this host's.
    pub(crate) fn settle(&self, migration: MigrationId) {
        if let Some(known) = self.lock().known.get_mut(&migration) {
            known.settled = true;
        }
    }

    /// Hands a new command connection, and the question that came over it, to its migration, if the
    /// target is this host's and pages are still coming. Returns it otherwise.
    pub(crate) fn rejoin(
        &self,
        migration: MigrationId,
        channel: Channel,
        question: &control::Body,
    ) -> Option<Channel> {
        let inner = self.lock();
        let known = inner.known.get(&migration).filter(|known| known.settled);
        let Some(sender) = known.and_then(|known| known.streams.as_ref()) else {
            return Some(channel);
        };
        let sent = sender.send(Stream {
            role: Role::Command,
            channel,
            first: Some(question.clone()),
        });
        sent.err().map(|unsent| unsent.0.channel)
    }

    /// The migration has come to its end; its secret is kept for questions.
    pub(crate) fn end(&self, migration: MigrationId) {
        let mut inner = self.lock();
        if let Some(known) = inner.known.get_mut(&migration) {
            known.streams = None;
        }
        inner.ended.push(migration);
        if inner.ended.len() > MOST_ENDED {
            let oldest = inner.ended.remove(0);
            inner.known.remove(&oldest);
        }
        self.idle.notify_all();
    }

    /// Whether a migration is still under way.
    pub(crate) fn is_running(&self, migration: MigrationId) -> bool {
        self.lock()
            .known
            .get(&migration)
            .is_some_and(|known| known.streams.is_some())
    }

    /// Waits until none is under way; false if the time was too short.
    pub(crate) fn wait_until_idle(&self, time: Duration) -> bool {
        let busy = |inner: &mut Inner| inner.known.values().any(|known| known.streams.is_some());
        let (_guard, result) = self
            .idle
            .wait_timeout_while(self.lock(), time, busy)
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        !result.timed_out()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn purpose(secret: u8, role: Role, index: u32) -> Purpose {
        Purpose {
            migration: MigrationId::from_random([0xee; 8]),
            secret: Secret::from_random([secret; 32]),
            role,
            index,
        }
    }

    #[test]
    fn only_who_knows_the_secret_joins_a_migration() {
        let registry = Registry::default();
        assert!(registry.check_stream(&purpose(1, Role::Memory, 0)).is_err());
        assert!(matches!(
            registry.begin(&purpose(1, Role::Command, 0)),
            Entry::New(_)
        ));
        assert!(matches!(
            registry.begin(&purpose(2, Role::Command, 0)),
            Entry::Refused(_)
        ));
        assert!(matches!(
            registry.begin(&purpose(1, Role::Command, 0)),
            Entry::Again
        ));
        assert!(registry.check_stream(&purpose(1, Role::Memory, 0)).is_ok());
        assert!(registry.check_stream(&purpose(2, Role::Memory, 0)).is_err());
        assert!(
            registry
                .check_stream(&purpose(1, Role::Memory, MOST_STREAMS))
                .is_err()
        );
    }

    #[test]
    fn an_ended_migration_takes_no_connection_but_answers() {
        let registry = Registry::default();
        let command = purpose(1, Role::Command, 0);
        assert!(matches!(registry.begin(&command), Entry::New(_)));
        assert!(!registry.wait_until_idle(Duration::from_millis(1)));
        registry.end(command.migration);
        assert!(registry.wait_until_idle(Duration::from_secs(5)));
        assert!(!registry.is_running(command.migration));
        assert!(registry.check_stream(&purpose(1, Role::Images, 0)).is_err());
        assert!(matches!(registry.begin(&command), Entry::Again));
    }
}

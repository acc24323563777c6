//! What comes before the target is touched: looking, connecting, asking.

use std::io;
use std::time::{Duration, Instant};

use haulier_engine::phase::Phase;
use haulier_proto::id::{MigrationId, Secret};
use haulier_proto::message::{Findings, control};
use haulier_proto::text::plain;
use haulier_targets::cgroup::CgroupFs;
use haulier_transport::error::TransportError;
use haulier_transport::greeting::Identity;
use haulier_transport::tcp;
use haulier_transport::wait::Cancel;

use super::again::Asking;
use super::link::{Dialer, Link};
use super::plan::{Options, Plan};
use crate::SOFTWARE;
use crate::commands::Incoming;
use crate::failure::Failure;
use crate::journal::{Holding, Journal, Side};
use crate::recovery;
use crate::report::Progress;
use crate::timeline::Timeline;
use haulier_sys::random;

/// How long the destination of an earlier migration, whose haulier was killed, may take to answer.
const ASKING_TIME: Duration = Duration::from_secs(2);

/// Most problems of a destination that are shown.
const MOST_SHOWN: usize = 50;

/// Everything that can be known and made before the target is touched.
pub(super) struct Ready {
    pub(super) plan: Plan,
    pub(super) dialer: Dialer,
    pub(super) link: Link,
    pub(super) peer: String,
    pub(super) journal: Journal,
}

impl Ready {
    pub(super) fn make(
        options: &Options,
        stop: &Cancel,
        progress: &mut dyn Progress,
        timeline: &mut Timeline,
    ) -> Result<Ready, Failure> {
        timeline.enter(Phase::Examine);
        // A target that a killed haulier left frozen runs on first, and can move then. That there
        // are no cgroups is the examination's to say.
        if let Ok(cgroups) = CgroupFs::find() {
            let asking = Asking {
                patience: ASKING_TIME,
                bring: false,
                link_time: options.link_time,
            };
            for unsettled in recovery::recover_all(&cgroups) {
                recovery::ask(unsettled, &cgroups, &asking, stop);
            }
        }
        let plan = Plan::examine(options)?;
        progress.examined(
            &plan.tree,
            plan.memory_bytes,
            &plan.criu,
            &options.destination,
        );

        timeline.enter(Phase::Connect);
        let host = plan.host.name.clone();
        let id = MigrationId::from_random(random::bytes());
        let dialer = Dialer {
            address: options.destination.clone(),
            me: Identity {
                software: SOFTWARE.to_owned(),
                host: host.clone(),
            },
            migration: id,
            secret: Secret::from_random(random::bytes()),
            link_time: options.link_time,
        };
        let wait = stop.wait(options.step_time);
        let mut link = dialer
            .command(Some(stop), &wait)
            .map_err(|e| Failure::from_error(&host, Phase::Connect, &e))?;
        refuse_moving_own_link(&host, &link, options)?;
        let peer = link.agreed.host.clone();

        timeline.enter(Phase::Check);
        let wait = stop.wait(options.step_time);
        let sent = link.send(control::Body::Check(plan.requirements(options)?), &wait);
        match sent {
            // By the user, or by what the destination said or by its end: that is heard below.
            Err(TransportError::Cancelled { .. }) => {}
            sent => sent.map_err(|e| Failure::from_error(&host, Phase::Check, &e))?,
        }
        let found = findings(&link, &host, stop, options)?;
        if !found.problems.is_empty() {
            return Err(unfit(&peer, &found));
        }
        progress.checked(&peer, &found);
        let journal = begin_journal(id, &dialer).map_err(|e| {
            let failure = Failure::from_error(&host, Phase::Check, &e);
            match failure.remedy {
                Some(_) => failure,
                None => failure.remedy("make /var/lib/haulier writable"),
            }
        })?;
        Ok(Ready {
            plan,
            dialer,
            link,
            peer,
            journal,
        })
    }
}

/// Begins the journal with whom to ask should this haulier be killed.
fn begin_journal(id: MigrationId, dialer: &Dialer) -> io::Result<Journal> {
    let mut journal = Journal::begin(id, Side::Source)?;
    let peer = Holding::Peer {
        address: dialer.address.clone(),
        secret: dialer.secret.clone(),
    };
    match journal.hold(&peer) {
        Ok(()) => Ok(journal),
        Err(error) => {
            journal.remove();
            Err(error)
        }
    }
}

/// The connection to the destination must not run over an address that is about to be locked.
fn refuse_moving_own_link(host: &str, link: &Link, options: &Options) -> Result<(), Failure> {
    let ends = [
        tcp::local_address(link.channel()),
        tcp::peer_address(link.channel()),
    ];
    for end in ends.into_iter().flatten() {
        if let Some(moved) = options
            .move_addresses
            .iter()
            .find(|moved| moved.ip() == end.ip())
        {
            let what = format!("the connection to the destination itself runs over {moved}");
            return Err(Failure::new(host, Phase::Connect, what).remedy(
                "name the destination by an address that is reached from another one of this host",
            ));
        }
    }
    Ok(())
}

fn findings(
    link: &Link,
    host: &str,
    stop: &Cancel,
    options: &Options,
) -> Result<Findings, Failure> {
    let deadline = Instant::now() + options.step_time;
    loop {
        match link.receive(Duration::from_millis(100)) {
            Some(Incoming::Message(control::Body::Findings(findings))) => return Ok(findings),
            Some(Incoming::Message(control::Body::Failed(failure))) => return Err(failure.into()),
            Some(Incoming::Message(other)) => {
                let what = format!("the destination sent {} instead of findings", other.name());
                return Err(Failure::new(host, Phase::Check, what));
            }
            Some(Incoming::Lost(error)) => {
                return Err(Failure::from_error(host, Phase::Check, &error));
            }
            None if stop.is_cancelled() => return Err(interrupted(host, Phase::Check)),
            None if Instant::now() > deadline => {
                let what = "the destination did not finish its checks in time";
                return Err(
                    Failure::new(host, Phase::Check, what).remedy("allow more with --step-time")
                );
            }
            None => {}
        }
    }
}

fn unfit(peer: &str, found: &Findings) -> Failure {
    let problems = || found.problems.iter().take(MOST_SHOWN);
    let what: Vec<String> = problems().map(|problem| plain(&problem.what)).collect();
    let mut remedies: Vec<String> = problems().map(|problem| plain(&problem.remedy)).collect();
    remedies.dedup();
    Failure::new(peer, Phase::Check, what.join("\n    ")).remedy(remedies.join("\n    "))
}

pub(super) fn interrupted(host: &str, phase: Phase) -> Failure {
    Failure::new(host, phase, "it was interrupted")
}

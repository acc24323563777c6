//! A PostgreSQL at work moves to another host and back, and nobody's transaction fails.
//!
//! It refuses to run as root. A real other user cannot be dumped by a CRIU without CAP_SYS_RESOURCE,
//! and CRIU restores a user namespace only together with the mount, PID and network namespaces that
//! belong to it. So it is root, and told otherwise by a preloaded library. It has an IPC namespace
//! of its own, without which CRIU does not dump its SysV segment.

mod stage;

use haulier_lab::Signal;
use stage::database::{Cluster, ended};
use stage::play::{Mode, tree_moves};
use stage::{LONG, MOVING_V4, Stage};

const HAULIER: &str = env!("CARGO_BIN_EXE_haulier");

#[test]
fn pgbench_goes_on_while_postgres_moves_in_stop_and_copy() {
    pgbench_goes_on(Mode::StopAndCopy);
}

#[test]
fn pgbench_goes_on_while_postgres_moves_in_pre_copy() {
    pgbench_goes_on(Mode::PreCopy);
}

#[test]
fn pgbench_goes_on_while_postgres_moves_in_post_copy() {
    pgbench_goes_on(Mode::PostCopy);
}

#[test]
fn pgbench_goes_on_while_postgres_moves_in_hybrid() {
    pgbench_goes_on(Mode::Hybrid);
}

fn pgbench_goes_on(mode: Mode) {
    let Some(cluster) = Cluster::create() else {
        return;
    };
    let stage = Stage::set(3, HAULIER);
    drop((stage.serve(1), stage.serve(2)));
    stage.give_addresses(1);
    let postgres = cluster.start(stage.host(1));
    let client = stage.host(3);
    cluster.fill(client);
    let bench = cluster.bench(client);

    let moving = format!("{MOVING_V4}/24@eth0");
    let options = [mode.options(), vec!["--move-ip", &moving]].concat();
    for (from, to) in [(1, 2), (2, 1)] {
        cluster.goes_on(client);
        tree_moves(&stage, from, postgres.pid(), to, &options);
        cluster.goes_on(client);
    }
    let transactions = ended(bench);
    cluster.assert_whole(client, transactions);
    stage.host(1).signal(postgres.pid(), Signal::INT).unwrap();
    stage.host(1).wait_gone(postgres.pid(), LONG).unwrap();
}

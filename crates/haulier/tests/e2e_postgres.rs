//! A PostgreSQL at work moves to another host and back, and nobody's transaction fails.
//!
//! It refuses to run as root. A real other user cannot be dumped by a CRIU without CAP_SYS_RESOURCE,
//! and CRIU restores a user namespace only together with the mount, PID and network namespaces that
//! belong to it. So it is root, and told otherwise by a preloaded library. It has an IPC namespace
//! of its own, without which CRIU does not dump its SysV segment.

mod stage;

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use haulier_lab::{Captured, Host, Process, Signal};
use stage::play::{Mode, compiled, missing, shared_folder, succeeds, tree_moves};
use stage::{LONG, MOVING_V4, Stage, eventually};
use tempfile::TempDir;

const HAULIER: &str = env!("CARGO_BIN_EXE_haulier");
/// The user that it takes itself for.
const USER: u32 = 1;

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
    let sums = "select (select sum(abalance) from pgbench_accounts), \
                (select sum(tbalance) from pgbench_tellers), \
                (select sum(bbalance) from pgbench_branches), \
                (select sum(delta) from pgbench_history), \
                (select count(*) from pgbench_history)";
    let sums = cluster.ask(client, sums);
    let sums: Vec<i64> = sums.split('|').map(|n| n.parse().unwrap()).collect();
    assert!(sums[..4].iter().all(|sum| *sum == sums[0]), "{sums:?}");
    assert_eq!(sums[4], transactions);
    // Every page of every table and index is looked at, and is whole.
    let damaged = "create extension amcheck; \
                   select count(bt_index_check(indexrelid, true)) from pg_index \
                   join pg_class on pg_class.oid = indexrelid \
                   where relname like 'pgbench%'";
    assert!(cluster.ask(client, damaged).ends_with('3'));
    stage.host(1).signal(postgres.pid(), Signal::INT).unwrap();
    stage.host(1).wait_gone(postgres.pid(), LONG).unwrap();
}

/// A database on a path that all hosts see.
struct Cluster {
    folder: TempDir,
    programs: PathBuf,
    library: PathBuf,
}

impl Cluster {
    fn create() -> Option<Cluster> {
        let Some(programs) = programs() else {
            missing("PostgreSQL");
            return None;
        };
        let folder = shared_folder();
        let library = compiled("other_user", folder.path(), &["-shared", "-fPIC"])?;
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let data = folder.path().join("data");
        fs::create_dir(&data).unwrap();
        fs::set_permissions(&data, fs::Permissions::from_mode(0o700)).unwrap();
        chown(&data, Some(USER), Some(USER)).unwrap();
        let user = format!("--reuid={USER}");
        let group = format!("--regid={USER}");
        let mut initdb = Command::new("setpriv");
        initdb.args([&user, &group, "--clear-groups"]);
        initdb.arg(programs.join("initdb")).arg("-D").arg(&data);
        initdb.args(["-A", "trust", "-U", "bench", "-E", "UTF8", "--locale=C"]);
        succeeds(initdb.args(["--no-sync", "--no-instructions"]));
        let access = data.join("pg_hba.conf");
        fs::write(access, "host all all all trust\n").unwrap();
        Some(Cluster {
            folder,
            programs,
            library,
        })
    }

    fn start(&self, host: &Host) -> Process {
        let data = self.folder.path().join("data");
        let settings = [
            "listen_addresses=*",
            "shared_buffers=64MB",
            "fsync=off",
            "unix_socket_directories=",
            // Not in /dev/shm, which each host has for itself.
            "dynamic_shared_memory_type=mmap",
        ];
        let settings = settings.iter().flat_map(|setting| ["-c", setting]);
        let process = host
            .command("unshare")
            .arg("--ipc")
            .arg(self.programs.join("postgres"))
            .arg("-D")
            .arg(data)
            .args(settings)
            .env("LD_PRELOAD", &self.library)
            .setsid()
            .spawn()
            .unwrap();
        let ready = self.programs.join("pg_isready");
        eventually("PostgreSQL answers", || {
            let ready = host.run([&*ready, Path::new("-h"), Path::new(MOVING_V4)]);
            ready.is_ok_and(|output| output.status.success())
        });
        process
    }

    fn fill(&self, client: &Host) {
        let pgbench = self.programs.join("pgbench");
        let command = client.command(pgbench).args(SERVER);
        let command = command.args(["-i", "-q", "-s", "1", "postgres"]);
        command.output(LONG).unwrap().success();
    }

    /// Clients that go on until they are told to end.
    fn bench(&self, client: &Host) -> Captured {
        let pgbench = self.programs.join("pgbench");
        let command = client.command(pgbench).args(SERVER);
        let command = command.args(["-n", "-c", "4", "-T", "1000", "postgres"]);
        command.spawn_captured().unwrap()
    }

    fn ask(&self, client: &Host, query: &str) -> String {
        let psql = self.programs.join("psql");
        let command = client.command(psql).args(SERVER);
        let command = command.args(["-X", "-q", "-A", "-t", "-c", query, "postgres"]);
        command.output(LONG).unwrap().success().trim().to_owned()
    }

    fn goes_on(&self, client: &Host) {
        let count = || -> u64 {
            let count = "select count(*) from pgbench_history";
            self.ask(client, count).parse().unwrap()
        };
        let seen = count();
        eventually("transactions are committed", || count() > seen + 200);
    }
}

const SERVER: [&str; 4] = ["-h", MOVING_V4, "-U", "bench"];

/// Tells pgbench to end, as its own clock would, and returns how many transactions it counted.
fn ended(bench: Captured) -> i64 {
    bench.process.kill(Signal::ALARM).unwrap();
    let output = bench.finish(LONG).unwrap();
    assert!(output.status.success(), "{output:?}");
    eprintln!("{}", output.stdout);
    assert!(
        output.stdout.contains("failed transactions: 0 "),
        "{output:?}"
    );
    assert!(!output.stderr.contains("error"), "{output:?}");
    let label = "actually processed: ";
    let line = output
        .stdout
        .lines()
        .find_map(|line| line.split_once(label));
    line.unwrap().1.parse().unwrap()
}

/// Where the newest version's programs are: Debian has them aside.
fn programs() -> Option<PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql").ok()?;
    let folders = versions.flatten().map(|version| version.path().join("bin"));
    folders.filter(|bin| bin.join("postgres").exists()).max()
}

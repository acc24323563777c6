//! A PostgreSQL with pgbench at work on it, which tests move.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use haulier_lab::{Captured, Host, Process, Signal};
use tempfile::TempDir;

use super::play::{compiled, missing, shared_folder, succeeds};
use super::{LONG, MOVING_V4, eventually};

/// The user that it takes itself for.
const USER: u32 = 1;

/// A database on a path that all hosts see.
pub struct Cluster {
    folder: TempDir,
    programs: PathBuf,
    library: PathBuf,
}

impl Cluster {
    pub fn create() -> Option<Cluster> {
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

    pub fn start(&self, host: &Host) -> Process {
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

    pub fn fill(&self, client: &Host) {
        let pgbench = self.programs.join("pgbench");
        let command = client.command(pgbench).args(SERVER);
        let command = command.args(["-i", "-q", "-s", "1", "postgres"]);
        command.output(LONG).unwrap().success();
    }

    /// Clients that go on until they are told to end.
    pub fn bench(&self, client: &Host) -> Captured {
        let pgbench = self.programs.join("pgbench");
        let command = client.command(pgbench).args(SERVER);
        let command = command.args(["-n", "-c", "4", "-T", "100000", "postgres"]);
        command.spawn_captured().unwrap()
    }

    pub fn ask(&self, client: &Host, query: &str) -> String {
        let psql = self.programs.join("psql");
        let command = client.command(psql).args(SERVER);
        let command = command.args(["-X", "-q", "-A", "-t", "-c", query, "postgres"]);
        command.output(LONG).unwrap().success().trim().to_owned()
    }

    /// Whether every committed transaction is there, as many as `transactions`, and every page of
    /// every table and index is whole.
    pub fn assert_whole(&self, client: &Host, transactions: i64) {
        let sums = "select (select sum(abalance) from pgbench_accounts), \
                    (select sum(tbalance) from pgbench_tellers), \
                    (select sum(bbalance) from pgbench_branches), \
                    (select sum(delta) from pgbench_history), \
                    (select count(*) from pgbench_history)";
        let sums = self.ask(client, sums);
        let sums: Vec<i64> = sums.split('|').map(|n| n.parse().unwrap()).collect();
        assert!(sums[..4].iter().all(|sum| *sum == sums[0]), "{sums:?}");
        assert_eq!(sums[4], transactions);
        let damaged = "create extension if not exists amcheck; \
                       select count(bt_index_check(indexrelid, true)) from pg_index \
                       join pg_class on pg_class.oid = indexrelid \
                       where relname like 'pgbench%'";
        assert!(self.ask(client, damaged).ends_with('3'));
    }

    pub fn goes_on(&self, client: &Host) {
        assert!(self.commits(client), "transactions are not committed");
    }

    /// Whether clients get on within a time that is long enough for every one of them.
    pub fn commits(&self, client: &Host) -> bool {
        let count = || -> u64 {
            let count = "select count(*) from pgbench_history";
            self.ask(client, count).parse().unwrap()
        };
        let (seen, deadline) = (count(), Instant::now() + LONG);
        while count() <= seen + 200 {
            if Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        true
    }

    /// What each of its backends does, and waits for.
    pub fn activity(&self, client: &Host) -> String {
        let columns = "pid, client_port, state, wait_event_type, wait_event, xact_start, query";
        self.ask(client, &format!("select {columns} from pg_stat_activity"))
    }
}

const SERVER: [&str; 4] = ["-h", MOVING_V4, "-U", "bench"];

/// Tells pgbench to end, as its own clock would, and returns how many transactions it counted.
pub fn ended(bench: Captured) -> i64 {
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

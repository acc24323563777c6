//! The command, as a person uses it.

use haulier_lab::program;
use std::io::Write;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::Duration;

/// A lab that is stopped even if the test fails.
struct Up(String);

impl Up {
    fn new(what: &str) -> Up {
        let name = format!("cli-{what}-{}", std::process::id());
        let said = lab(&["up", "--hosts", "2", "--name", &name], "");
        assert!(said.status.success(), "{said:?}");
        let said = String::from_utf8(said.stdout).unwrap();
        assert!(
            said.contains("10.77.0.2") && said.contains("exec --name"),
            "{said}"
        );
        Up(name)
    }

    fn exec(&self, host: &str, command: &[&str], input: &str) -> Output {
        let arguments = ["exec", "--name", &self.0, host, "--"];
        lab(&[&arguments, command].concat(), input)
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        lab(&["down", "--name", &self.0], "");
    }
}

fn lab(arguments: &[&str], input: &str) -> Output {
    let mut command = Command::new(program().unwrap());
    command
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(input.as_bytes())
        .unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn exec_passes_streams_and_exit_code() {
    let up = Up::new("exec");
    let said = up.exec(
        "host2",
        &["sh", "-c", "cat; hostname; echo bad >&2; exit 9"],
        "in ",
    );
    assert_eq!(said.status.code(), Some(9));
    assert_eq!(String::from_utf8_lossy(&said.stdout), "in host2\n");
    assert_eq!(String::from_utf8_lossy(&said.stderr), "bad\n");
    assert_eq!(
        up.exec("1", &["sh", "-c", "kill -9 $$"], "").status.code(),
        Some(137)
    );
    let missing = up.exec("host7", &["true"], "");
    assert!(!missing.status.success());
    assert!(
        String::from_utf8_lossy(&missing.stderr).contains("no host `host7`"),
        "{missing:?}"
    );
}

#[test]
fn exec_passes_signals_on() {
    let up = Up::new("signal");
    // The shell acts on its trap when the child is gone: the signal has to reach both.
    let script = "trap 'exit 5' TERM; echo > /srv/trapped; sleep 1000";
    let mut running = Command::new(program().unwrap())
        .args(["exec", "--name", &up.0, "host1", "--", "sh", "-c", script])
        .spawn()
        .unwrap();
    while !up
        .exec("host1", &["test", "-e", "/srv/trapped"], "")
        .status
        .success()
    {
        thread::sleep(Duration::from_millis(20));
    }
    let pid = running.id().to_string();
    assert!(
        Command::new("kill")
            .args(["-TERM", &pid])
            .status()
            .unwrap()
            .success()
    );
    assert_eq!(running.wait().unwrap().code(), Some(5));
}

#[test]
fn a_detached_program_outlives_the_command() {
    let up = Up::new("detach");
    let said = lab(
        &[
            "exec", "--name", &up.0, "host1", "-d", "--", "sleep", "1000",
        ],
        "",
    );
    let pid = String::from_utf8(said.stdout).unwrap().trim().to_owned();
    let shown = up.exec("host1", &["ps", "-o", "sid=,args=", &pid], "");
    let shown = String::from_utf8(shown.stdout).unwrap();
    assert_eq!(
        shown.split_whitespace().collect::<Vec<_>>(),
        [&pid, "sleep", "1000"]
    );
    let status = String::from_utf8(lab(&["status"], "").stdout).unwrap();
    assert!(
        status.contains(&format!("lab {}", up.0)) && status.contains("sleep 1000"),
        "{status}"
    );
}

#[test]
fn the_network_verbs_do_what_they_say() {
    let up = Up::new("network");
    let ping = || {
        up.exec("host1", &["ping", "-c1", "-W1", "10.77.0.2"], "")
            .status
            .success()
    };
    let verb = |verb: &str, argument: &str| {
        let said = lab(&[verb, "--name", &up.0, argument], "");
        assert!(said.status.success(), "{said:?}");
    };
    verb("shape", "100mbit");
    assert!(ping());
    verb("cut", "host1");
    assert!(!ping());
    verb("mend", "host1");
    assert!((0..20).any(|_| ping()));
    verb("shape", "off");
}

#[test]
fn the_redis_client_reports_in_json() {
    let up = Up::new("client");
    let redis = [
        "redis-server",
        "--bind",
        "0.0.0.0",
        "--protected-mode",
        "no",
        "--save",
        "",
    ];
    lab(
        &[
            &["exec", "--name", &up.0, "host1", "-d", "--"],
            redis.as_slice(),
        ]
        .concat(),
        "",
    );
    while !up
        .exec("host1", &["redis-cli", "ping"], "")
        .status
        .success()
    {
        thread::sleep(Duration::from_millis(20));
    }
    let program = program().unwrap();
    let client = program.to_str().unwrap();
    let said = up.exec(
        "host2",
        &[
            client,
            "client",
            "redis",
            "--addr",
            "10.77.0.1:6379",
            "--for",
            "1",
            "--json",
        ],
        "",
    );
    assert!(said.status.success(), "{said:?}");
    let report: serde_json::Value = serde_json::from_slice(&said.stdout).unwrap();
    assert!(
        report["operations"].as_u64().unwrap() > 0 && report["error_count"] == 0,
        "{report}"
    );
    assert!(report["longest_gap_ms"].as_f64().unwrap() > 0.0, "{report}");
}

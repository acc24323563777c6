//! What `scripts/demo` shows is true: the same program, built with the tests.

use std::env;
use std::process::Command;

#[test]
fn the_demo_moves_a_redis_there_and_back() {
    // Cargo builds examples with the tests, beside them.
    let tests = env::current_exe().unwrap();
    let demo = tests.ancestors().nth(2).unwrap().join("examples/demo");
    assert!(
        demo.exists(),
        "{} is missing: cargo build --examples",
        demo.display()
    );
    let output = Command::new(&demo).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}\n{said}");
    assert_eq!(
        text.matches("  moved: redis-server runs on host").count(),
        2,
        "{text}"
    );
    assert_eq!(text.matches("; 0 errors").count(), 2, "{text}");
    assert!(text.contains("every byte is right"), "{text}");
}

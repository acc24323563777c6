//! How a command of haulier ends.

use haulier_lab::{Captured, Output};

use super::LONG;

pub const MOVED: i32 = 0;
pub const NOTHING_TOUCHED: i32 = 3;
pub const ROLLED_BACK: i32 = 4;
pub const NEEDS_YOU: i32 = 5;

/// Waits until it ends like that, and returns what it said.
#[track_caller]
pub fn ended(command: Captured, code: i32, words: &[&str]) -> String {
    said(&command.finish(LONG).unwrap(), code, words)
}

/// It ended like that, and told why.
#[track_caller]
pub fn said(output: &Output, code: i32, words: &[&str]) -> String {
    let text = format!("{}{}", output.stdout, output.stderr);
    assert_eq!(output.status.code(), Some(code), "{text}");
    for word in words {
        assert!(text.contains(word), "no {word:?} in: {text}");
    }
    text
}

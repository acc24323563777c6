//! The haulier-lab command.

mod cli;

use std::process::ExitCode;

/// Parts of a running lab, which start this program themselves.
const PARTS: [&str; 4] = ["supervisor", "host-launch", "host-init", "host-exec"];

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    if let Some(part) = arguments
        .next()
        .filter(|part| PARTS.contains(&part.as_str()))
    {
        let config = arguments.next().unwrap_or_default();
        return match haulier_lab::play_part(&part, &config) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{part}: {:#}", anyhow::Error::from(error));
                ExitCode::FAILURE
            }
        };
    }
    match cli::run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("haulier-lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

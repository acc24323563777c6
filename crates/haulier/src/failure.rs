//! What failed, for people and for the peer.

use std::error::Error;
use std::fmt;
use std::io;

use haulier_criu::CriuFailure;
use haulier_engine::phase::Phase;
use haulier_proto::message;
use haulier_proto::text::plain;
use haulier_transport::error::TransportError;

/// What is said where nothing better is known.
const NO_REMEDY: &str = "try again; with -v, both sides say more";

const FREE_SPACE: &str = "free disk space on that host, then try again";

/// What failed: where, in which phase, why, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Name of the host.
    pub host: String,
    /// The phase, as people see it.
    pub phase: String,
    /// What failed.
    pub what: String,
    /// CRIU's or the kernel's own reason.
    pub reason: Option<String>,
    /// What to do about it.
    pub remedy: Option<String>,
}

impl Failure {
    /// A failure found by haulier itself.
    pub fn new(host: &str, phase: Phase, what: impl Into<String>) -> Failure {
        Failure {
            host: host.to_owned(),
            phase: phase.name().to_owned(),
            what: what.into(),
            reason: None,
            remedy: None,
        }
    }

    /// The same with what to do about it.
    pub fn remedy(self, remedy: impl Into<String>) -> Failure {
        Failure {
            remedy: Some(remedy.into()),
            ..self
        }
    }

    /// A failure from an error: its outermost layer says what, the others why. A failure of CRIU
    /// brings the cause from CRIU's log; known causes bring a remedy.
    pub fn from_error(host: &str, phase: Phase, error: &(dyn Error + 'static)) -> Failure {
        let mut failure = Failure::new(host, phase, error.to_string());
        let mut reasons: Vec<String> = Vec::new();
        let mut next = Some(error);
        while let Some(error) = next {
            if let Some(criu) = error.downcast_ref::<CriuFailure>() {
                failure.what = criu.to_string();
                reasons.extend(criu.reason().map(|reason| reason.line.clone()));
                failure.remedy = criu
                    .reason()
                    .and_then(|reason| reason.remedy)
                    .map(str::to_owned);
                break;
            }
            if let Some(transport) = error.downcast_ref::<TransportError>() {
                failure.remedy = remedy_for(transport).map(str::to_owned);
            }
            if let Some(remedy) = error.downcast_ref().and_then(remedy_for_io) {
                failure.remedy = Some(remedy.to_owned());
            }
            next = error.source();
            reasons.extend(next.map(ToString::to_string));
        }
        // Many errors tell their source themselves.
        reasons.retain(|reason| !failure.what.contains(reason.as_str()));
        failure.reason = Some(reasons.join(": ")).filter(|reason| !reason.is_empty());
        failure
    }
}

impl Failure {
    /// The same, with this for the reason if none is known.
    pub(crate) fn or_for_lack_of_space(self, fullness: Option<String>) -> Failure {
        match (self.reason.is_some(), fullness) {
            (false, Some(reason)) => Failure {
                reason: Some(reason),
                ..self.remedy(FREE_SPACE)
            },
            _ => self,
        }
    }
}

fn remedy_for(error: &TransportError) -> Option<&'static str> {
    match error {
        TransportError::Connect { .. } => Some(
            "start \"haulier serve\" there, and check address, port and firewall between the hosts",
        ),
        TransportError::Listen { .. } => Some("choose another address or port, or free this one"),
        TransportError::Frame { .. } => {
            Some("check that a haulier of a fitting version listens there")
        }
        TransportError::Deadline { .. } | TransportError::Broken { .. } => {
            Some("check the link between the hosts, then try again")
        }
        TransportError::Closed { .. } => Some("see the log of haulier serve there"),
        _ => None,
    }
}

fn remedy_for_io(error: &io::Error) -> Option<&'static str> {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            Some(FREE_SPACE)
        }
        io::ErrorKind::ReadOnlyFilesystem => Some("make that file system writable, then try again"),
        io::ErrorKind::OutOfMemory => Some("free memory on that host, then try again"),
        _ => None,
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "on {}, in phase \"{}\": {}",
            self.host, self.phase, self.what
        )?;
        if let Some(reason) = &self.reason {
            write!(f, "\n  reason: {reason}")?;
        }
        let remedy = self.remedy.as_deref().unwrap_or(NO_REMEDY);
        write!(f, "\n  what to do: {remedy}")
    }
}

impl From<message::Failure> for Failure {
    fn from(failure: message::Failure) -> Failure {
        let some = |text: String| Some(plain(&text)).filter(|text| !text.is_empty());
        Failure {
            host: plain(&failure.host),
            phase: plain(&failure.phase),
            what: plain(&failure.what),
            reason: some(failure.reason),
            remedy: some(failure.remedy),
        }
    }
}

impl From<&Failure> for message::Failure {
    fn from(failure: &Failure) -> message::Failure {
        message::Failure {
            host: failure.host.clone(),
            phase: failure.phase.clone(),
            what: failure.what.clone(),
            reason: failure.reason.clone().unwrap_or_default(),
            remedy: failure.remedy.clone().unwrap_or_default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn an_error_becomes_what_why_and_what_to_do() {
        let source = io::Error::from(io::ErrorKind::ConnectionRefused);
        let error = TransportError::Connect {
            address: "web2:7000".into(),
            source,
        };
        let failure = Failure::from_error("web1", Phase::Connect, &error);
        let text = failure.to_string();
        assert!(text.starts_with("on web1, in phase \"connect\": cannot connect to web2:7000"));
        assert!(text.contains("reason: connection refused"), "{text}");
        assert!(
            text.contains("what to do: start \"haulier serve\" there"),
            "{text}"
        );
    }

    #[test]
    fn a_full_disk_brings_its_remedy_wherever_it_is_in_the_chain() {
        #[derive(Debug, thiserror::Error)]
        #[error("writing")]
        struct Outer(#[source] io::Error);
        for kind in [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded] {
            let text = Failure::from_error("web1", Phase::Send, &Outer(kind.into())).to_string();
            assert!(text.contains("what to do: free disk space"), "{text}");
        }
        let text = Failure::from_error("web1", Phase::Send, &Outer(io::ErrorKind::Other.into()));
        assert!(text.to_string().contains(NO_REMEDY), "{text}");
    }

    #[test]
    fn a_failure_survives_the_wire() {
        let failure = Failure::new("web2", Phase::Restore, "no").remedy("yes");
        assert_eq!(Failure::from(message::Failure::from(&failure)), failure);
    }
}

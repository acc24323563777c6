//! The first frames of a connection: who it is for and which version both speak.

use haulier_proto::frame::{FrameError, Kind};
use haulier_proto::id::{MigrationId, Secret};
use haulier_proto::message::{Hello, Role, Welcome};
use haulier_proto::text::plain;
use haulier_proto::version::Version;

use crate::channel::Channel;
use crate::error::TransportError;
use crate::wait::Wait;

/// What this side says of itself.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Program and version.
    pub software: String,
    /// Host name.
    pub host: String,
}

/// What a connection is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Purpose {
    /// The migration it belongs to.
    pub migration: MigrationId,
    /// The migration's secret, as shown by whoever connects.
    pub secret: Secret,
    /// Its role.
    pub role: Role,
    /// Which of the connections of that role.
    pub index: u32,
}

/// What the accepting side said of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agreed {
    /// The version both speak from here on.
    pub version: Version,
    /// The peer's program and version.
    pub software: String,
    /// The peer's host name.
    pub host: String,
}

/// Says hello on a new connection and waits for the welcome.
///
/// # Errors
/// [`TransportError::Refused`] with the peer's reason, or any other [`TransportError`].
pub fn introduce(
    channel: &mut Channel,
    me: &Identity,
    purpose: &Purpose,
    wait: &Wait,
) -> Result<Agreed, TransportError> {
    let hello = Hello {
        oldest_version: Version::OLDEST as u32,
        newest_version: Version::NEWEST as u32,
        role: purpose.role as i32,
        migration: purpose.migration.bytes().to_vec(),
        secret: purpose.secret.bytes().to_vec(),
        index: purpose.index,
        software: me.software.clone(),
        host: me.host.clone(),
    };
    channel.send_message(Kind::Hello, &hello, wait)?;
    let mut welcome: Welcome = channel.receive_message(Kind::Welcome, wait)?;
    for text in [
        &mut welcome.refusal,
        &mut welcome.software,
        &mut welcome.host,
    ] {
        *text = plain(text);
    }
    let refused = |reason| TransportError::Refused {
        peer: channel.peer().to_owned(),
        reason,
    };
    if !welcome.refusal.is_empty() {
        return Err(refused(welcome.refusal));
    }
    let version = Version::agree(welcome.version, welcome.version).ok_or_else(|| {
        refused(format!(
            "{} chose protocol version {}, which this haulier does not speak",
            welcome.software, welcome.version
        ))
    })?;
    Ok(Agreed {
        version,
        software: welcome.software,
        host: welcome.host,
    })
}

/// Reads the hello of a new connection. Answer it with [`accept`] or [`refuse`].
///
/// # Errors
/// Any [`TransportError`]; a hello that is not well-formed has been answered with its refusal.
pub fn receive_hello(
    channel: &mut Channel,
    me: &Identity,
    wait: &Wait,
) -> Result<(Hello, Purpose, Version), TransportError> {
    let mut hello: Hello = channel.receive_message(Kind::Hello, wait)?;
    for text in [&mut hello.software, &mut hello.host] {
        *text = plain(text);
    }
    match purpose_of(&hello) {
        Ok((purpose, version)) => Ok((hello, purpose, version)),
        Err(reason) => {
            refuse(channel, me, &reason, wait)?;
            Err(channel.frame_error(FrameError::Body {
                kind: Kind::Hello,
                reason,
            }))
        }
    }
}

/// Welcomes a connection.
///
/// # Errors
/// Any [`TransportError`].
pub fn accept(
    channel: &mut Channel,
    me: &Identity,
    version: Version,
    wait: &Wait,
) -> Result<(), TransportError> {
    let welcome = Welcome {
        version: version as u32,
        refusal: String::new(),
        software: me.software.clone(),
        host: me.host.clone(),
    };
    channel.send_message(Kind::Welcome, &welcome, wait)
}

/// Turns a connection away with a reason that the peer shows to its user.
///
/// # Errors
/// Any [`TransportError`].
pub fn refuse(
    channel: &mut Channel,
    me: &Identity,
    reason: &str,
    wait: &Wait,
) -> Result<(), TransportError> {
    let welcome = Welcome {
        version: 0,
        refusal: reason.to_owned(),
        software: me.software.clone(),
        host: me.host.clone(),
    };
    channel.send_message(Kind::Welcome, &welcome, wait)
}

fn purpose_of(hello: &Hello) -> Result<(Purpose, Version), String> {
    let version = Version::agree(hello.oldest_version, hello.newest_version).ok_or_else(|| {
        format!(
            "this haulier speaks protocol versions {} to {}, {} speaks {} to {}",
            Version::OLDEST as u32,
            Version::NEWEST as u32,
            hello.software,
            hello.oldest_version,
            hello.newest_version
        )
    })?;
    let role = match Role::try_from(hello.role) {
        Ok(Role::Unset) | Err(_) => return Err(format!("unknown role {}", hello.role)),
        Ok(role) => role,
    };
    let migration =
        MigrationId::try_from(&hello.migration[..]).map_err(|error| error.to_string())?;
    let secret: [u8; 32] = hello.secret[..]
        .try_into()
        .map_err(|_| "the secret is not 32 bytes".to_owned())?;
    let secret = Secret::from_random(secret);
    Ok((
        Purpose {
            migration,
            secret,
            role,
            index: hello.index,
        },
        version,
    ))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::thread;
    use std::time::Duration;

    use super::*;

    fn identity(host: &str) -> Identity {
        Identity {
            software: "haulier test".into(),
            host: host.into(),
        }
    }

    fn purpose() -> Purpose {
        Purpose {
            migration: MigrationId::from_random([3; 8]),
            secret: Secret::from_random([9; 32]),
            role: Role::Memory,
            index: 1,
        }
    }

    fn pair() -> (Channel, Channel, Wait) {
        let (a, b) = UnixStream::pair().unwrap();
        let wait = Wait::uncancellable(Duration::from_secs(10));
        (
            Channel::new(a, "b").unwrap(),
            Channel::new(b, "a").unwrap(),
            wait,
        )
    }

    #[test]
    fn both_sides_agree() {
        let (mut a, mut b, wait) = pair();
        let server = thread::spawn(move || {
            let wait = Wait::uncancellable(Duration::from_secs(10));
            let (hello, purpose, version) = receive_hello(&mut b, &identity("two"), &wait).unwrap();
            accept(&mut b, &identity("two"), version, &wait).unwrap();
            (hello.host, purpose)
        });
        let agreed = introduce(&mut a, &identity("one"), &purpose(), &wait).unwrap();
        assert_eq!(agreed.version, Version::V1);
        assert_eq!(agreed.host, "two");
        assert_eq!(server.join().unwrap(), ("one".to_owned(), purpose()));
    }

    #[test]
    fn a_refusal_carries_its_reason() {
        let (mut a, mut b, wait) = pair();
        let server = thread::spawn(move || {
            let wait = Wait::uncancellable(Duration::from_secs(10));
            receive_hello(&mut b, &identity("two"), &wait).unwrap();
            refuse(&mut b, &identity("two"), "too many migrations", &wait).unwrap();
        });
        let error = introduce(&mut a, &identity("one"), &purpose(), &wait).unwrap_err();
        assert!(
            matches!(&error, TransportError::Refused { reason, .. } if reason == "too many migrations"),
            "{error}"
        );
        server.join().unwrap();
    }

    #[test]
    fn versions_roles_ids_and_secrets_are_checked() {
        let good = Hello {
            oldest_version: 1,
            newest_version: 1,
            role: Role::Command as i32,
            migration: vec![1; 8],
            secret: vec![2; 32],
            ..Default::default()
        };
        assert!(purpose_of(&good).is_ok());
        for bad in [
            Hello {
                oldest_version: 7,
                newest_version: 8,
                ..good.clone()
            },
            Hello {
                role: 0,
                ..good.clone()
            },
            Hello {
                role: 77,
                ..good.clone()
            },
            Hello {
                migration: b"../../../etc".to_vec(),
                ..good.clone()
            },
            Hello {
                secret: vec![],
                ..good.clone()
            },
        ] {
            assert!(purpose_of(&bad).is_err(), "{bad:?}");
        }
    }
}

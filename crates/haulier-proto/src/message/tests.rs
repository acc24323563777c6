//! Messages come through as they were.

use super::*;

fn every_control() -> Vec<control::Body> {
    let phase = PhaseTime {
        name: "restore".into(),
        micros: 7,
    };
    vec![
        control::Body::Check(Requirements {
            pids: vec![4, 5],
            files: vec![FileNeeded {
                path: b"/a".to_vec(),
                size: Some(0),
                ..Default::default()
            }],
            ..Default::default()
        }),
        control::Body::Findings(Findings {
            problems: vec![Problem {
                what: "w".into(),
                remedy: "r".into(),
            }],
            ..Default::default()
        }),
        control::Body::Begin(Begin {
            memory_streams: 2,
            faults: true,
            packets: false,
        }),
        control::Body::Prepared(Prepared {}),
        control::Body::Frozen(Frozen {}),
        control::Body::Offer(Offer {
            pages: 9,
            images: 3,
            left_behind: 5,
            rounds: 2,
        }),
        control::Body::Held(Held {
            phases: vec![phase.clone()],
        }),
        control::Body::Commit(Commit {}),
        control::Body::Resumed(Resumed {
            pid: 4,
            phases: vec![phase],
        }),
        control::Body::Failed(Failure {
            host: "h".into(),
            ..Default::default()
        }),
    ]
}

#[test]
fn every_control_message_survives_the_wire() {
    for body in every_control() {
        let message = Control::from(body);
        let bytes = message.encode_to_vec();
        assert_eq!(decode::<Control>(Kind::Control, &bytes), Ok(message));
    }
}

#[test]
fn a_cut_message_is_an_error_and_a_later_one_is_none() {
    let bytes = Control::from(every_control().remove(0)).encode_to_vec();
    let cut = &bytes[..bytes.len() - 1];
    assert!(matches!(
        decode::<Control>(Kind::Control, cut),
        Err(FrameError::Body { .. })
    ));
    // Field 100, length-delimited, empty: a message of a later version.
    let later = decode::<Control>(Kind::Control, &[0xa2, 0x06, 0x00]).unwrap();
    assert_eq!(later.body, None);
}

use super::*;

fn ends(family: u8) -> (SocketAddr, SocketAddr) {
    match family {
        4 => (
            "10.0.0.1:1000".parse().unwrap(),
            "10.0.0.5:80".parse().unwrap(),
        ),
        _ => (
            "[fd00::1]:1000".parse().unwrap(),
            "[fd00::5]:80".parse().unwrap(),
        ),
    }
}

/// A segment with a FIN, and the right checksum.
fn segment(family: u8, data: &[u8]) -> Vec<u8> {
    let (from, to) = ends(family);
    // The headers of a datagram, with another protocol and payload.
    let mut body = vec![0; 20];
    body[0..2].copy_from_slice(&from.port().to_be_bytes());
    body[2..4].copy_from_slice(&to.port().to_be_bytes());
    body[12] = 0x50;
    body[13] = 0x19;
    body.extend(data);
    let mut packet = datagram(from, to, &body[8..]).unwrap();
    let at = packet.len() - body.len();
    packet[if family == 4 { 9 } else { 6 }] = TCP;
    packet[at..].copy_from_slice(&body);
    if family == 4 {
        packet[10..12].fill(0);
        let mut sum = Sum::default();
        sum.add(&packet[..at]);
        let sum = !sum.fold();
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
    }
    let outline = Outline::of(&packet).unwrap();
    let mut sum = outline.pseudo_header(TCP, body.len());
    sum.add(&body);
    packet[at + 16..at + 18].copy_from_slice(&checksum_field(TCP, sum).to_be_bytes());
    packet
}

fn field(packet: &[u8]) -> usize {
    let outline = Outline::of(packet).unwrap();
    outline.payload
        + if outline.transport == Some(TCP) {
            16
        } else {
            6
        }
}

/// As the kernel leaves it between virtual interfaces.
fn partial(packet: &[u8]) -> Vec<u8> {
    let outline = Outline::of(packet).unwrap();
    let length = packet.len() - outline.payload;
    let sum = outline.pseudo_header(outline.transport.unwrap(), length);
    let mut packet = packet.to_vec();
    let at = field(&packet);
    packet[at..at + 2].copy_from_slice(&sum.fold().to_be_bytes());
    packet
}

#[test]
fn checksums_are_completed_and_right_ones_left() {
    for family in [4, 6] {
        let (from, to) = ends(family);
        for data in [&b""[..], b"x", b"even", b"of odd length"] {
            for packet in [segment(family, data), datagram(from, to, data).unwrap()] {
                for mut given in [packet.clone(), partial(&packet)] {
                    complete(&mut given, 1500).unwrap();
                    assert_eq!(given, packet);
                }
                let mut padded = partial(&packet);
                padded.extend([0; 6]);
                complete(&mut padded, 1500).unwrap();
                assert_eq!(padded, packet);
                let mut corrupt = packet.clone();
                let at = field(&corrupt);
                corrupt[at] ^= 0x40;
                assert_eq!(complete(&mut corrupt, 1500), Err(Unusable::Corrupt));
            }
        }
    }
}

/// Sums made by hand.
#[test]
fn a_datagram_is_summed_up() {
    let (from, to) = (
        "127.0.0.1:1".parse().unwrap(),
        "127.0.0.1:2".parse().unwrap(),
    );
    let packet = datagram(from, to, b"ab").unwrap();
    assert_eq!(packet[10..12], [0x3c, 0xcd]);
    // 0x7f00 + 1 + 0x7f00 + 1 + 17 + 10, and 1 + 2 + 10 + 0x6162, complemented.
    assert_eq!(packet[26..28], (!0x5f8d_u16).to_be_bytes());
}

#[test]
fn a_datagram_without_a_checksum_is_left_alone() {
    let (from, to) = ends(4);
    let mut packet = datagram(from, to, b"ab").unwrap();
    let at = field(&packet);
    packet[at..at + 2].fill(0);
    let given = packet.clone();
    complete(&mut packet, 1500).unwrap();
    assert_eq!(packet, given);
}

#[test]
fn merged_segments_pass_and_merged_datagrams_do_not() {
    let data = vec![7; 40_000];
    for family in [4, 6] {
        let (from, to) = ends(family);
        let mut merged = partial(&segment(family, &data));
        complete(&mut merged, 1500).unwrap();
        assert!(merged == segment(family, &data));
        let whole = datagram(from, to, &data).unwrap();
        assert_eq!(complete(&mut partial(&whole), 1500), Err(Unusable::Merged));
        complete(&mut partial(&whole), 65_536).unwrap();
        // Put together again from fragments.
        complete(&mut whole.clone(), 1500).unwrap();
    }
}

#[test]
fn a_segment_that_was_cut_off_ends_earlier() {
    let data = vec![7; 10_001];
    for family in [4, 6] {
        let (from, to) = ends(family);
        let mut cut = partial(&segment(family, &data));
        cut.truncate(cut.len() - 1000);
        complete(&mut cut, 1500).unwrap();
        let mut expected = segment(family, &data[..9001]);
        let flags = field(&expected) - 3;
        expected[flags] = 0x10;
        let expected = partial(&expected);
        let mut completed = expected.clone();
        complete(&mut completed, 1500).unwrap();
        assert!(cut == completed, "family {family}");
        let mut cut = datagram(from, to, &data).unwrap();
        cut.truncate(9000);
        assert_eq!(complete(&mut cut, 1500), Err(Unusable::TooLong));
    }
}

#[test]
fn fragments_are_left_alone() {
    let (from, to) = ends(4);
    let mut packet = datagram(from, to, b"ab").unwrap();
    packet[6] = 0x20;
    let given = packet.clone();
    complete(&mut packet, 1500).unwrap();
    assert_eq!(packet, given);
    let (from, to) = ends(6);
    let mut packet = datagram(from, to, b"abcdefgh").unwrap();
    packet[6] = 44;
    let given = packet.clone();
    complete(&mut packet, 1500).unwrap();
    assert_eq!(packet, given);
}

#[test]
fn what_is_no_packet_is_refused() {
    for family in [4, 6] {
        let (from, to) = ends(family);
        for packet in [
            segment(family, b"data"),
            datagram(from, to, b"data").unwrap(),
        ] {
            for length in 0..packet.len() {
                let mut cut = packet[..length].to_vec();
                assert!(complete(&mut cut, 1500).is_err(), "{length}");
            }
        }
    }
    assert_eq!(complete(&mut vec![0; 100], 1500), Err(Unusable::Malformed));
    assert_eq!(datagram(ends(4).0, ends(6).1, b""), None);
    assert_eq!(datagram(ends(4).0, ends(4).1, &vec![0; 65_508]), None);
    assert!(datagram(ends(4).0, ends(4).1, &vec![0; 65_507]).is_some());
}

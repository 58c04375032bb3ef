//! What a node that has a key sends, whatever it is: it changes its own name and nothing else, with addresses that are free.

use std::sync::OnceLock;

use dns64::zone::{
    Algorithm, Config, Key, Keys, NodeRecord, State, Step, Updates, Zone,
    keys::KeyError,
    tsig::{self, Verdict},
};
use hickory_proto::{
    op::Message,
    rr::{Name, RecordType, rdata::tsig::TsigAlgorithm},
};

const NOW: u64 = 1_760_000_000;
const SECRET: [u8; 32] = [7; 32];

/// `bytes` are a message, or two with the length of the first before it; node1 signs them.
pub fn run(bytes: &[u8]) {
    let mut updates = updates().clone();
    let _ = tsig::verify(updates.keys(), bytes, NOW);
    assert!(
        !matches!(updates.receive(bytes, NOW), Step::Store(_)),
        "it is not signed"
    );
    let Some((length, rest)) = bytes.split_first() else {
        return;
    };
    let (one, two) = rest.split_at(usize::from(*length).min(rest.len()));
    for message in [one, two] {
        let signed = sign(message);
        if let Verdict::Good(signed, _) = tsig::verify(updates.keys(), &signed, NOW) {
            assert_eq!(signed.node.to_string(), "node1.fleet.");
        }
        let before = others(&updates);
        let step = match updates.receive(&signed, NOW) {
            Step::Store(change) => {
                assert_eq!(change.node.to_string(), "node1.fleet.");
                for record in &change.records {
                    if let NodeRecord::Aaaa { address, .. } = record {
                        let text = address.to_string();
                        assert!(
                            text.starts_with("fd0d::") && !["fd0d::1", "fd0d::2"].contains(&text.as_str()),
                            "{text}"
                        );
                    }
                }
                let kept = serde_json::to_string(&change).expect("text");
                assert_eq!(
                    serde_json::from_str::<dns64::zone::Change>(&kept).expect("the same"),
                    change
                );
                updates.stored(NOW)
            }
            step => step,
        };
        assert_eq!(others(&updates), before, "what is not its own has changed");
        match step {
            Step::Answer { response, .. } => drop(Message::from_vec(&response).expect("an answer that can be read")),
            Step::Silent => {}
            step => panic!("{step:?}"),
        }
    }
    // What it has come to can be loaded again, whole.
    let zone = updates.zones().first().expect("the zone");
    let again = Zone::new(&config(), zone.state().clone()).expect("the same zone");
    assert!(again.left_out().is_empty(), "{:?}", again.left_out());
}

/// The names of others, as they are.
fn others(updates: &Updates) -> Vec<String> {
    let zone = updates.zones().first().expect("the zone");
    let shown = |owner: &str, kind| {
        let answer = zone
            .answer(&Name::from_ascii(owner).expect("a name"), kind)
            .expect("of the zone");
        let data: Vec<String> = answer.answers.iter().map(|record| record.data.to_string()).collect();
        format!("{owner} {kind} {} {data:?}", answer.code)
    };
    let pointer = |last: u8| format!("{last}.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.d.0.d.f.ip6.arpa.");
    vec![
        shown("node2.fleet.", RecordType::AAAA),
        shown("edge.fleet.", RecordType::AAAA),
        shown("ns.fleet.", RecordType::AAAA),
        shown("fleet.", RecordType::NS),
        shown("x.node1.fleet.", RecordType::TXT),
        shown(&pointer(1), RecordType::PTR),
        shown(&pointer(2), RecordType::PTR),
    ]
}

fn updates() -> &'static Updates {
    static UPDATES: OnceLock<Updates> = OnceLock::new();
    UPDATES.get_or_init(|| {
        let state: State =
            serde_json::from_str(r#"{"nodes":{"node2.fleet.":[{"type":"AAAA","ttl":300,"address":"fd0d::2"}]}}"#)
                .expect("a state");
        let zone = Zone::new(&config(), state).expect("a zone");
        Updates::new(vec![zone], keys().expect("keys"))
    })
}

fn config() -> Config {
    let origin = Name::from_ascii("fleet.").expect("a name");
    let below = |label: &str| origin.prepend_label(label).expect("a short one");
    let edge = ["fd0d::1".parse().expect("an address")];
    Config::new(&origin, vec!["fd0d::/64".parse().expect("a prefix")])
        .with_addresses(&below("edge"), &edge)
        .with_addresses(&below("ns"), &edge)
}

fn keys() -> Result<Keys, KeyError> {
    let mut keys = Keys::default();
    for (node, secret) in [("node1.fleet", SECRET), ("node2.fleet", [8; 32])] {
        let owner: dns64::zone::Owner = node.parse().expect("a name");
        keys.add(Key::mint(owner.clone(), Algorithm::HmacSha256, owner, &secret)?)?;
    }
    Ok(keys)
}

/// `message` with a TSIG of node1 (RFC 8945 §4.2).
fn sign(message: &[u8]) -> Vec<u8> {
    let owner = b"\x05node1\x05fleet\0";
    let algorithm = b"\x0bhmac-sha256\0";
    let time = &NOW.to_be_bytes()[2..];
    let mut data = message.to_vec();
    data.extend(owner);
    data.extend([0, 255, 0, 0, 0, 0]);
    data.extend(algorithm);
    data.extend(time);
    data.extend([1, 44, 0, 0, 0, 0]);
    let mac = TsigAlgorithm::HmacSha256.mac_data(&SECRET, &data).expect("a MAC");
    let mut signed = message.to_vec();
    let Some(count) = signed.get_mut(10..12) else {
        return signed;
    };
    let additionals = u16::from_be_bytes([count[0], count[1]]).wrapping_add(1);
    count.copy_from_slice(&additionals.to_be_bytes());
    signed.extend(owner);
    signed.extend([0, 250, 0, 255, 0, 0, 0, 0, 0, 61]);
    signed.extend(algorithm);
    signed.extend(time);
    signed.extend([1, 44, 0, 32]);
    signed.extend(&mac);
    signed.extend(&message[..2]);
    signed.extend([0; 4]);
    signed
}

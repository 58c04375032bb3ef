//! What a worker or a supervisor gone bad can send: packets of any content. A message stays within its limit and is all of
//! its packets; what is understood is understood again when it is sent on.

use serde::{Serialize, de::DeserializeOwned};

use crate::appliance::{
    channel::assembly::{Assembly, CHUNK, Fault, LAST, MAX_MESSAGE, MORE, Step},
    worker::message::{Bytes, FromWorker, ToWorker},
};

/// A packet's length is its first two bytes, of which the highest bit says that descriptors come with it; the last packet
/// is what is left.
pub fn run(mut bytes: &[u8]) {
    let mut assembly = Assembly::default();
    let mut all = Vec::new();
    let mut begun = false;
    while let Some((&[high, low], rest)) = bytes.split_first_chunk() {
        let length = usize::from(u16::from_be_bytes([high & 0x7f, low]));
        let (packet, rest) = rest.split_at_checked(length).unwrap_or((rest, b""));
        bytes = rest;
        let step = assembly.push(packet, high & 0x80 != 0);
        let (header, chunk) = packet
            .split_first()
            .map_or((None, packet), |(header, chunk)| (Some(*header), chunk));
        all.extend_from_slice(chunk);
        match step {
            Ok(Step::More) => assert!(header == Some(MORE) && all.len() <= MAX_MESSAGE),
            Ok(Step::Message(json)) => {
                assert!(header == Some(LAST) && json == all && json.len() <= MAX_MESSAGE);
                return content(&json);
            }
            Ok(Step::End) => return assert!(header.is_none() && !begun),
            Err(Fault::Cut) => return assert!(header.is_none() && begun),
            Err(Fault::TooLong) => return assert!(chunk.len() > CHUNK || all.len() > MAX_MESSAGE),
            Err(Fault::Header) => return assert!(header.is_some_and(|header| header != LAST)),
        }
        begun = true;
    }
}

fn content(json: &[u8]) {
    again::<ToWorker>(json);
    again::<FromWorker>(json);
    if let Ok(bytes) = serde_json::from_slice::<Bytes>(json) {
        // Hexadecimal digits, two per byte, between two quotes; each may have been written as an escape.
        assert!(bytes.0.len() * 2 + 2 <= json.len());
    }
}

/// What was read can be written, and reads as the same.
fn again<M: Serialize + DeserializeOwned>(json: &[u8]) {
    let Ok(message) = serde_json::from_slice::<M>(json) else {
        return;
    };
    let written = serde_json::to_string(&message).expect("what was read can be written");
    match serde_json::from_str::<M>(&written) {
        Ok(read) => assert_eq!(serde_json::to_string(&read).expect("written once more"), written),
        Err(error) => panic!("{error}: {written}"),
    }
}

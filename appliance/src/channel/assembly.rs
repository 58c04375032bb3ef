//! Packets put together to a message: what the channel makes of bytes, whoever sent them. Pure, so that it can be fuzzed.

/// Most bytes of one message.
pub const MAX_MESSAGE: usize = 16 << 20;
/// Most bytes of a message in one packet.
pub(crate) const CHUNK: usize = 60 << 10;

/// Header of the last packet of a message.
pub(crate) const LAST: u8 = 0;
/// Header of all others.
pub(crate) const MORE: u8 = 1;

/// A message of which some packets have arrived.
#[derive(Debug, Default)]
pub(crate) struct Assembly {
    json: Vec<u8>,
    begun: bool,
}

/// What a packet leads to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// More of them.
    More,
    /// A whole message, not yet looked into.
    Message(Vec<u8>),
    /// No message: the other side has ended.
    End,
}

/// Why a packet is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The packet or the message is longer than allowed.
    TooLong,
    /// No header, or one that means nothing.
    Header,
    /// The other side ended in the middle of a message.
    Cut,
}

impl Assembly {
    /// Takes in one packet, empty at the end of the channel. `brought` says whether descriptors came with it.
    ///
    /// # Errors
    ///
    /// The other side is broken; nothing must be pushed after that, nor after a message.
    pub(crate) fn push(&mut self, packet: &[u8], brought: bool) -> Result<Step, Fault> {
        let Some((header, chunk)) = packet.split_first() else {
            // An empty packet is not distinguishable from the end; neither is ever sent.
            return if self.begun { Err(Fault::Cut) } else { Ok(Step::End) };
        };
        self.begun = true;
        if chunk.len() > CHUNK || self.json.len() + chunk.len() > MAX_MESSAGE {
            return Err(Fault::TooLong);
        }
        self.json.extend_from_slice(chunk);
        match *header {
            LAST => Ok(Step::Message(std::mem::take(&mut self.json))),
            // Packets that bring nothing would never reach the limit.
            MORE if chunk.is_empty() && !brought => Err(Fault::Header),
            MORE => Ok(Step::More),
            _ => Err(Fault::Header),
        }
    }
}

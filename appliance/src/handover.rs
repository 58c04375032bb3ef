//! How a worker hands what it holds to its successor, descriptors included: a conversation over a socket pair that the
//! supervisor makes and gives one end each.
//!
//! ```text
//! old                                new
//!  Hello {format, role, build}  ->
//!                               <-   Welcome | Refuse {reason}
//!  (the service freezes)
//!  Part + descriptors           ->
//!                               <-   Took          each before the next is sent
//!  End                          ->
//!                               <-   Ready         all is taken in, nothing was touched
//!  Commit                       ->
//!                               <-   Committed     from here on the new one serves
//! ```
//! Whoever fails, falls silent or talks nonsense before `Committed` leaves the old one serving. The new one serves only
//! once its `Committed` is in the socket; the old one that waits for it in vain closes the socket for writing first and
//! looks once more, so that both know the same, even if one of them was only slow.
//!
//! What a part holds is the service's own business, its version included. Descriptors under way count against the limit
//! of open files of the sender (unix(7), `ETOOMANYREFS`), which is why each part is acknowledged.

use std::{
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::time::{Instant, timeout_at};

use crate::{
    build,
    channel::{self, Channel, MAX_DESCRIPTORS},
    worker::message::Bytes,
};

/// Of this conversation; the other side must speak the same.
pub const FORMAT: u32 = 1;
/// Most bytes of one part: twice as long in hexadecimal digits, it still fits a message.
pub const MAX_BODY: usize = 1 << 20;
/// Most parts of one hand-over.
pub const MAX_PARTS: u64 = 1 << 16;
/// Parts on their way before a receipt is waited for.
const WINDOW: u64 = 4;
/// For the first message of the other side, which may still be starting. Nothing is frozen then.
pub const START: Duration = Duration::from_secs(5);
/// For each further message of the other side, and for each step of a service.
pub const STEP: Duration = Duration::from_secs(2);
/// From Hello to the end.
pub const TOTAL: Duration = Duration::from_secs(10);
/// Names the message before which the new side ends itself, for tests: `welcome`, `part`, `end`, `ready`, `commit`
/// (before it answers it), `committed` (after); or `adopt`, at which the new supervisor gives up. A path names a file with
/// one of these.
pub const TEST_DIE: &str = "EDGED_TEST_HANDOVER_DIE";

/// One piece of what is handed over.
#[derive(Debug)]
pub struct Part {
    /// In the service's own format.
    pub body: Vec<u8>,
    /// What the body refers to, in its order; at most [`MAX_DESCRIPTORS`].
    pub descriptors: Vec<OwnedFd>,
}

/// Why nothing was handed over.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The channel failed, or the other side sent what is no message.
    #[error("at {step}: {source}")]
    Channel {
        /// What was being done.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: channel::Error,
    },
    /// The other side ended.
    #[error("the other side ended at {0}")]
    Ended(&'static str),
    /// Nothing came in time.
    #[error("the other side was silent at {0}")]
    Silent(&'static str),
    /// The other side does not want to.
    #[error("refused: {0}")]
    Refused(String),
    /// A message that is not the next one.
    #[error("the other side said something else at {0}")]
    Order(&'static str),
    /// A part above [`MAX_BODY`], [`MAX_DESCRIPTORS`] or [`MAX_PARTS`].
    #[error("a part is larger than the protocol allows, or there are too many")]
    TooLarge,
    /// The service itself gave up.
    #[error("the service {0}")]
    Service(&'static str),
}

/// From the old one.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum FromOld {
    Hello { format: u32, role: String, build: String },
    Part { number: u64, body: Bytes },
    End { parts: u64 },
    Commit,
}

/// From the new one.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum FromNew {
    Welcome { build: String },
    Refuse { reason: String },
    Took { number: u64 },
    Ready,
    Committed,
}

/// The old one's side. Each step is the next after the one before; after an error only dropping it is left.
#[derive(Debug)]
pub struct Giver {
    link: Link,
    /// Sent.
    parts: u64,
    /// Acknowledged.
    taken: u64,
    /// Who takes over.
    pub successor: String,
}

/// The new one's side, likewise.
#[derive(Debug)]
pub struct Taker {
    link: Link,
    parts: u64,
    /// A part that is not yet acknowledged.
    owed: bool,
    /// Who hands over.
    pub predecessor: String,
}

impl Giver {
    /// Greets the new one; nothing is frozen yet. `role` must be the same on both sides.
    ///
    /// # Errors
    ///
    /// [`Error`]; a reason that the new one gave is in it.
    pub async fn begin(socket: OwnedFd, role: &str) -> Result<Self, Error> {
        let mut link = Link::new(socket, 0)?;
        let hello = FromOld::Hello {
            format: FORMAT,
            role: role.into(),
            build: build::own().build,
        };
        link.send("hello", &hello, &[]).await?;
        match link.receive("welcome", START).await?.0 {
            FromNew::Welcome { build } => {
                link.until = Instant::now() + TOTAL;
                let successor = short(&build);
                Ok(Self {
                    link,
                    parts: 0,
                    taken: 0,
                    successor,
                })
            }
            FromNew::Refuse { reason } => Err(Error::Refused(short(&reason))),
            _ => Err(Error::Order("welcome")),
        }
    }

    /// Sends one part. Up to [`WINDOW`] of them are on their way before it waits for receipts: descriptors on their way
    /// count against a limit of the kernel, and every wait is time in which clients wait, too.
    ///
    /// # Errors
    ///
    /// [`Error`]
    pub async fn part(&mut self, part: Part) -> Result<(), Error> {
        if part.body.len() > MAX_BODY || part.descriptors.len() > MAX_DESCRIPTORS || self.parts >= MAX_PARTS {
            return Err(Error::TooLarge);
        }
        let number = self.parts;
        let message = FromOld::Part {
            number,
            body: Bytes(part.body),
        };
        self.link.send("a part", &message, &part.descriptors).await?;
        self.parts += 1;
        while self.parts - self.taken >= WINDOW {
            self.receipt().await?;
        }
        Ok(())
    }

    /// Waits until one more part is taken.
    async fn receipt(&mut self) -> Result<(), Error> {
        match self.link.receive("a part", STEP).await?.0 {
            FromNew::Took { number } if number == self.taken => {
                self.taken += 1;
                Ok(())
            }
            FromNew::Refuse { reason } => Err(Error::Refused(short(&reason))),
            _ => Err(Error::Order("a part")),
        }
    }

    /// Says that this was all, and waits until the new one has made sense of it.
    ///
    /// # Errors
    ///
    /// [`Error`]
    pub async fn end(&mut self) -> Result<(), Error> {
        let message = FromOld::End { parts: self.parts };
        self.link.send("the end", &message, &[]).await?;
        while self.taken < self.parts {
            self.receipt().await?;
        }
        match self.link.receive("ready", STEP).await?.0 {
            FromNew::Ready => Ok(()),
            FromNew::Refuse { reason } => Err(Error::Refused(short(&reason))),
            _ => Err(Error::Order("ready")),
        }
    }

    /// Leaves everything to the new one: after `Ok` not a byte may be read or written here.
    ///
    /// # Errors
    ///
    /// [`Error`]: the new one will not serve, whatever becomes of it.
    pub async fn commit(mut self) -> Result<(), Error> {
        self.link.send("commit", &FromOld::Commit, &[]).await?;
        let answer = match self.link.receive("commit", STEP).await {
            Err(Error::Silent(_)) => {
                // What it sends from now on is refused by the kernel, and it does not serve; what it has sent is here.
                self.link.close();
                self.link.until = Instant::now() + STEP;
                self.link.receive("commit", STEP).await
            }
            other => other,
        };
        match answer?.0 {
            FromNew::Committed => Ok(()),
            FromNew::Refuse { reason } => Err(Error::Refused(short(&reason))),
            _ => Err(Error::Order("commit")),
        }
    }
}

impl Taker {
    /// Waits for the old one's greeting and answers it. The service must be all set by then: soon after, clients wait.
    ///
    /// # Errors
    ///
    /// [`Error`]; the old one is told if it is of another kind.
    pub async fn begin(socket: OwnedFd, role: &str) -> Result<Self, Error> {
        let mut link = Link::new(socket, MAX_DESCRIPTORS)?;
        let (hello, _) = link.receive("hello", START).await?;
        let FromOld::Hello {
            format,
            role: theirs,
            build,
        } = hello
        else {
            return Err(Error::Order("hello"));
        };
        let reason = if format != FORMAT {
            Some(format!(
                "the old one hands over in format {format}, the new one takes {FORMAT}"
            ))
        } else if theirs != role {
            Some(format!("the old one is {}, the new one {role}", short(&theirs)))
        } else {
            None
        };
        if let Some(reason) = reason {
            link.send("hello", &FromNew::Refuse { reason: reason.clone() }, &[])
                .await?;
            return Err(Error::Refused(reason));
        }
        die("welcome");
        let welcome = FromNew::Welcome {
            build: build::own().build,
        };
        link.send("welcome", &welcome, &[]).await?;
        link.until = Instant::now() + TOTAL;
        Ok(Self {
            link,
            parts: 0,
            owed: false,
            predecessor: short(&build),
        })
    }

    /// The next part; `None` after the last. Says of the one before that it was taken.
    ///
    /// # Errors
    ///
    /// [`Error`]
    pub async fn part(&mut self) -> Result<Option<Part>, Error> {
        if std::mem::take(&mut self.owed) {
            let took = FromNew::Took { number: self.parts };
            self.parts += 1;
            self.link.send("a part", &took, &[]).await?;
        }
        match self.link.receive("a part", STEP).await? {
            (FromOld::Part { number, body }, descriptors) if number == self.parts => {
                die("part");
                if body.0.len() > MAX_BODY || self.parts >= MAX_PARTS {
                    return Err(Error::TooLarge);
                }
                self.owed = true;
                Ok(Some(Part {
                    body: body.0,
                    descriptors,
                }))
            }
            (FromOld::End { parts }, none) if parts == self.parts && none.is_empty() => {
                die("end");
                Ok(None)
            }
            _ => Err(Error::Order("a part")),
        }
    }

    /// Says that all was taken in and understood, waits for the commit and answers it. After `Ok` this side serves, and
    /// only then.
    ///
    /// # Errors
    ///
    /// [`Error`]: the old one goes on; nothing may be touched.
    pub async fn commit(mut self) -> Result<(), Error> {
        die("ready");
        self.link.send("ready", &FromNew::Ready, &[]).await?;
        match self.link.receive("commit", STEP).await? {
            (FromOld::Commit, none) if none.is_empty() => {}
            _ => return Err(Error::Order("commit")),
        }
        die("commit");
        self.link.send("commit", &FromNew::Committed, &[]).await?;
        die("committed");
        Ok(())
    }

    /// Tells the old one why there will be no hand-over.
    pub async fn refuse(mut self, reason: &str) {
        let _ = self
            .link
            .send("refuse", &FromNew::Refuse { reason: reason.into() }, &[])
            .await;
    }
}

/// A channel on which nobody waits for ever.
#[derive(Debug)]
struct Link {
    channel: Channel,
    until: Instant,
}

impl Link {
    fn new(socket: OwnedFd, most_descriptors: usize) -> Result<Self, Error> {
        let channel = Channel::new(socket, most_descriptors).map_err(|error| Error::Channel {
            step: "the beginning",
            source: error.into(),
        })?;
        Ok(Self {
            channel,
            until: Instant::now() + START + TOTAL,
        })
    }

    fn within(&self, time: Duration) -> Instant {
        self.until.min(Instant::now() + time)
    }

    async fn send<M: Serialize>(
        &mut self,
        step: &'static str,
        message: &M,
        descriptors: &[OwnedFd],
    ) -> Result<(), Error> {
        let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        let sent = timeout_at(self.within(STEP), self.channel.send(message, &descriptors)).await;
        sent.map_err(|_| Error::Silent(step))?.map_err(|source| match source {
            channel::Error::Socket(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Error::Ended(step),
            source => Error::Channel { step, source },
        })
    }

    async fn receive<M: DeserializeOwned>(
        &mut self,
        step: &'static str,
        within: Duration,
    ) -> Result<(M, Vec<OwnedFd>), Error> {
        let received = timeout_at(self.within(within), self.channel.receive()).await;
        let received = received.map_err(|_| Error::Silent(step))?;
        received
            .map_err(|source| Error::Channel { step, source })?
            .ok_or(Error::Ended(step))
    }

    fn close(&self) {
        let _ = rustix::net::shutdown(self.channel.socket(), rustix::net::Shutdown::Both);
    }
}

/// Words of the other side, for people.
fn short(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(300).collect()
}

/// What [`TEST_DIE`] says now.
pub(crate) fn test_die() -> Option<std::ffi::OsString> {
    let value = std::env::var_os(TEST_DIE)?;
    if value.as_encoded_bytes().starts_with(b"/") {
        return std::fs::read_to_string(&value).ok().map(|at| at.trim().into());
    }
    Some(value)
}

/// What a crash at this point would do; the same message may be gone or not.
fn die(at: &str) {
    if std::env::var_os(TEST_DIE).is_some_and(|wanted| wanted == at) {
        std::process::abort();
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    fn null() -> OwnedFd {
        File::open("/dev/null").expect("/dev/null").into()
    }

    fn part(body: &[u8], descriptors: usize) -> Part {
        Part {
            body: body.to_vec(),
            descriptors: (0..descriptors).map(|_| null()).collect(),
        }
    }

    fn hello() -> FromOld {
        FromOld::Hello {
            format: FORMAT,
            role: "lb".into(),
            build: "0123456789ab".into(),
        }
    }

    fn welcome() -> FromNew {
        FromNew::Welcome {
            build: "0123456789ab".into(),
        }
    }

    /// The old one's whole side with two parts.
    async fn give(socket: OwnedFd) -> Result<(), Error> {
        let mut giver = Giver::begin(socket, "lb").await?;
        giver.part(part(b"one", 0)).await?;
        giver.part(part(b"two", 1)).await?;
        giver.end().await?;
        giver.commit().await
    }

    /// The new one's whole side.
    async fn take(socket: OwnedFd) -> Result<Vec<(Vec<u8>, usize)>, Error> {
        let mut taker = Taker::begin(socket, "lb").await?;
        let mut parts = Vec::new();
        while let Some(part) = taker.part().await? {
            parts.push((part.body, part.descriptors.len()));
        }
        taker.commit().await?;
        Ok(parts)
    }

    fn scripted(socket: OwnedFd) -> Channel {
        Channel::new(socket, MAX_DESCRIPTORS).expect("a channel")
    }

    /// What a new one would send, up to `steps` messages, each after the message that asks for it.
    async fn new_one(channel: &Channel, steps: usize) {
        let script = [
            welcome(),
            FromNew::Took { number: 0 },
            FromNew::Took { number: 1 },
            FromNew::Ready,
            FromNew::Committed,
        ];
        for message in script.iter().take(steps) {
            let _ = channel.receive::<FromOld>().await.expect("good").expect("a message");
            channel.send(message, &[]).await.expect("sent");
        }
    }

    /// What an old one would send, up to `steps` messages.
    async fn old_one(channel: &Channel, steps: usize) {
        let body = |text: &[u8]| Bytes(text.to_vec());
        let script = [
            hello(),
            FromOld::Part {
                number: 0,
                body: body(b"one"),
            },
            FromOld::Part {
                number: 1,
                body: body(b"two"),
            },
            FromOld::End { parts: 2 },
            FromOld::Commit,
        ];
        for message in script.iter().take(steps) {
            channel.send(message, &[]).await.expect("sent");
            let _ = channel.receive::<FromNew>().await.expect("good").expect("an answer");
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn every_part_arrives_in_order_with_its_descriptors_and_both_sides_know_it() {
        let (old, new) = channel::pair().expect("a pair");
        let (gave, took) = tokio::join!(give(old), take(new));
        gave.expect("given");
        assert_eq!(took.expect("taken"), [(b"one".to_vec(), 0), (b"two".to_vec(), 1)]);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_part_of_the_largest_size_fits_and_a_larger_one_is_refused() {
        let (old, new) = channel::pair().expect("a pair");
        let giving = async {
            let mut giver = Giver::begin(old, "lb").await.expect("welcome");
            giver.part(part(&vec![0xff; MAX_BODY], 600)).await.expect("it fits");
            let refused = giver.part(part(&vec![0; MAX_BODY + 1], 0)).await;
            assert!(matches!(refused, Err(Error::TooLarge)), "{refused:?}");
        };
        let taking = async {
            let mut taker = Taker::begin(new, "lb").await.expect("hello");
            let part = taker.part().await.expect("good").expect("a part");
            assert_eq!((part.body.len(), part.descriptors.len()), (MAX_BODY, 600));
            assert!(taker.part().await.is_err());
        };
        tokio::join!(giving, taking);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_new_one_that_ends_at_any_message_leaves_the_old_one_serving() {
        for steps in 0..5 {
            let (old, new) = channel::pair().expect("a pair");
            let dies = async {
                let channel = scripted(new);
                new_one(&channel, steps).await;
                if steps > 0 {
                    // The next message is there before the end is.
                    let _ = channel.receive::<FromOld>().await;
                }
            };
            let (gave, ()) = tokio::join!(give(old), dies);
            assert!(matches!(gave, Err(Error::Ended(_))), "{steps}: {gave:?}");
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn an_old_one_that_ends_at_any_message_keeps_the_new_one_from_serving() {
        for steps in 0..5 {
            let (old, new) = channel::pair().expect("a pair");
            let dies = async {
                let channel = scripted(old);
                old_one(&channel, steps).await;
            };
            let (took, ()) = tokio::join!(take(new), dies);
            assert!(took.is_err(), "{steps}");
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_new_one_that_says_something_else_at_any_message_leaves_the_old_one_serving() {
        for steps in 0..5 {
            for wrong in [
                "\"ready\"",
                "\"committed\"",
                "{\"took\":{\"number\":9}}",
                "[]",
                "nonsense",
            ] {
                let right = steps == 3 && wrong == "\"ready\"" || steps == 4 && wrong == "\"committed\"";
                if right {
                    continue;
                }
                let (old, new) = channel::pair().expect("a pair");
                let lies = async {
                    let channel = scripted(new);
                    new_one(&channel, steps).await;
                    let _ = channel.receive::<FromOld>().await;
                    let packet = [b"\x00".as_slice(), wrong.as_bytes()].concat();
                    rustix::net::send(channel.socket(), &packet, rustix::net::SendFlags::empty()).expect("sent");
                    // It stays until the old one has turned away.
                    while let Ok(Some(_)) = channel.receive::<FromOld>().await {}
                };
                let (gave, ()) = tokio::join!(give(old), lies);
                assert!(
                    matches!(gave, Err(Error::Order(_) | Error::Channel { .. })),
                    "{steps} {wrong}: {gave:?}"
                );
            }
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn an_old_one_that_says_something_else_at_any_message_keeps_the_new_one_from_serving() {
        for steps in 0..5 {
            for wrong in [
                "\"commit\"",
                "{\"end\":{\"parts\":7}}",
                "{\"part\":{\"number\":9,\"body\":\"\"}}",
                "{\"part\":{\"number\":0,\"body\":\"xy\"}}",
                "{\"hello\":{\"format\":1}}",
                "null",
            ] {
                if steps == 4 && wrong == "\"commit\"" {
                    continue;
                }
                let (old, new) = channel::pair().expect("a pair");
                let lies = async {
                    let channel = scripted(old);
                    old_one(&channel, steps).await;
                    let packet = [b"\x00".as_slice(), wrong.as_bytes()].concat();
                    rustix::net::send(channel.socket(), &packet, rustix::net::SendFlags::empty()).expect("sent");
                    while let Ok(Some((answer, _))) = channel.receive::<FromNew>().await {
                        assert!(!matches!(answer, FromNew::Committed), "{steps} {wrong}");
                    }
                };
                let (took, ()) = tokio::join!(take(new), lies);
                assert!(took.is_err(), "{steps} {wrong}");
            }
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn another_format_or_role_is_refused_with_the_reason_on_both_sides() {
        let (old, new) = channel::pair().expect("a pair");
        let channel = scripted(old);
        let later = FromOld::Hello {
            format: FORMAT + 1,
            role: "lb".into(),
            build: "x".into(),
        };
        channel.send(&later, &[]).await.expect("sent");
        let refused = Taker::begin(new, "lb").await.expect_err("refused");
        assert!(refused.to_string().contains("format 2"), "{refused}");
        let (answer, _) = channel.receive::<FromNew>().await.expect("good").expect("an answer");
        assert!(matches!(answer, FromNew::Refuse { reason } if reason.contains("format 2")));

        let (old, new) = channel::pair().expect("a pair");
        let (gave, took) = tokio::join!(Giver::begin(old, "lb"), Taker::begin(new, "web"));
        let why = gave.expect_err("refused").to_string();
        assert!(why.contains("refused: the old one is lb, the new one web"), "{why}");
        assert!(took.is_err());
    }

    #[tokio::test(flavor = "current_thread")]
    async fn descriptors_with_a_message_that_has_none_are_refused() {
        let (old, new) = channel::pair().expect("a pair");
        let lies = async {
            let channel = scripted(old);
            old_one(&channel, 3).await;
            let end = null();
            channel
                .send(&FromOld::End { parts: 2 }, &[end.as_fd()])
                .await
                .expect("sent");
            let _ = channel.receive::<FromNew>().await;
        };
        let (took, ()) = tokio::join!(take(new), lies);
        assert!(matches!(took, Err(Error::Order(_))), "{took:?}");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_new_one_that_falls_silent_at_any_message_is_given_up_in_time() {
        // One after the other would take the sum of all limits.
        let mut silences = tokio::task::JoinSet::new();
        for steps in 0..5 {
            silences.spawn(async move {
                let (old, new) = channel::pair().expect("a pair");
                let silent = async {
                    let channel = scripted(new);
                    new_one(&channel, steps).await;
                    tokio::time::sleep(START + STEP + STEP).await;
                    drop(channel);
                };
                let begun = Instant::now();
                tokio::select! {
                    gave = give(old) => {
                        assert!(matches!(gave, Err(Error::Silent(_) | Error::Ended(_))), "{steps}: {gave:?}");
                        assert!(begun.elapsed() < START + STEP, "{steps}: {:?}", begun.elapsed());
                    }
                    () = silent => panic!("{steps}: the old one waits for ever"),
                }
            });
        }
        while let Some(ended) = silences.join_next().await {
            ended.expect("no panic");
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn an_answer_to_the_commit_that_comes_too_late_cannot_be_given() {
        let (old, new) = channel::pair().expect("a pair");
        let late = async {
            let channel = scripted(new);
            new_one(&channel, 4).await;
            let _ = channel.receive::<FromOld>().await.expect("good").expect("commit");
            tokio::time::sleep(STEP + Duration::from_millis(500)).await;
            channel.send(&FromNew::Committed, &[]).await
        };
        let (gave, sent) = tokio::join!(give(old), late);
        assert!(gave.is_err(), "the old one goes on");
        assert!(sent.is_err(), "so the new one must not serve");
    }
}

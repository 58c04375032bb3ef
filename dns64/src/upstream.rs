//! Asking other resolvers: where they are, which is asked, what counts as its reply.
//!
//! ```text
//! url      where a server is and how it is spoken to
//! choice   which server, how long one waits for it, whether it is down
//! inquiry  one question's course: the next server, once more, by TCP, without EDNS
//! wire     one query's bytes and the judgement on every message that comes in
//! pending  what waits for replies: a socket of its own, or a connection shared by many
//! ```
//!
//! Pure; `io/upstream.rs` has the sockets, the clock and the randomness.
//!
//! What keeps an off-path attacker out (RFC 5452): each query has a socket of its own, connected, so that the kernel
//! drops what comes from elsewhere and draws the port; an id and letters' cases from a CSPRNG; the question must come
//! back to the bit; a question is under way once, however many ask it; it is never open at two ports for one server; and
//! a query that too many datagrams pretend to answer goes on by TCP.

pub mod choice;
pub mod inquiry;
pub mod pending;
pub mod url;
pub mod wire;

pub use inquiry::Failure;
pub use url::{Transport, Url, UrlError};

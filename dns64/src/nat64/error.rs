//! Why a packet does not go on, and the ICMP error that says so to its sender (RFC 792, RFC 1812 §4.3, RFC 4443).

use std::net::{Ipv4Addr, Ipv6Addr};

use super::{
    checksum::Sum,
    icmp,
    ip::{V4, V6, protocol, set_word},
    packet::{Headers, Packet},
};

/// Octets of an ICMPv4 error at most (RFC 1812 §4.3.2.3).
pub(super) const LONGEST_V4: usize = 576;
/// Octets of an ICMPv6 error at most: IPv6's smallest MTU (RFC 4443 §2.4 c).
pub(super) const LONGEST_V6: usize = icmp::IPV6_MINIMUM_MTU as usize;
/// Hops that an error made here may go.
const HOPS: u8 = 64;
/// Precedence internetwork control, as routers mark their errors (RFC 1812 §4.3.2.5).
const ERROR_CLASS_V4: u8 = 0xc0;

/// Why a packet was dropped; also the name of its counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum DropReason {
    /// Not a whole packet: headers cut short or that contradict each other.
    Malformed,
    /// An IPv4 header whose checksum is wrong (RFC 1812 §5.2.2).
    HeaderChecksum,
    /// A source that no packet has, such as a multicast address (RFC 1812 §5.3.7).
    Source,
    /// A destination that is not translated, such as a multicast address.
    Destination,
    /// Neither map, prefix nor session knows an address.
    NotMapped,
    /// From who is not to be translated (RFC 6146 §3.5).
    NotClient,
    /// From an IPv6 address under the prefix, so that it would come back (RFC 6146 §3.5).
    Loop,
    /// From IPv4, from an address of the pool itself.
    Spoofed,
    /// To or from an IPv4 address that is not to be reached from here.
    Forbidden,
    /// To a port that no host has (RFC 6146 §3.5).
    NoBinding,
    /// Of a connection that is not known, and does not begin one.
    NoSession,
    /// To a host that has not spoken to its sender (RFC 6146 §3.5.1.2, address-dependent filtering).
    Filtered,
    /// What would begin a connection from IPv4.
    Unsolicited,
    /// There is no port left (RFC 6146 §3.5.1.1).
    Exhausted,
    /// There is no room for another binding or session.
    Full,
    /// The host has as many bindings or sessions as it may (RFC 6888 REQ-4).
    Quota,
    /// The host begins more sessions per second than it may (RFC 6888 REQ-4).
    Rate,
    /// Neither TCP, UDP nor an echo, or a fragment whose first one is not known: nothing tells whose it is (RFC 6146 §3.4).
    NoPorts,
    /// Under the well-known prefix, an address that is not global (RFC 6052 §3.1).
    NotGlobal,
    /// Its time to live or hop limit ended here.
    HopLimit,
    /// An IPv4 source route that has not come to its end (RFC 7915 §4.1).
    SourceRoute,
    /// An IPv6 routing header that has not come to its end (RFC 7915 §5.1).
    RoutingHeader,
    /// An IPv6 extension header behind the Fragment header (RFC 7915 §5.1.1).
    ExtensionHeader,
    /// A protocol that means something else in the other version: ICMP of the wrong version, IPv6 extension headers.
    Protocol,
    /// An ICMP message that the other version has no word for (RFC 7915 §4.2, §5.2).
    IcmpType,
    /// A fragment of an ICMP message: its checksum covers what is not here (RFC 7915 §1.2).
    IcmpFragment,
    /// An ICMP error that quotes an ICMP error, or what cannot be translated (RFC 7915 §4.3, §5.3).
    IcmpQuotation,
    /// UDP over IPv4 without a checksum, which IPv6 does not have (RFC 7915 §4.5), or over IPv6 without one.
    UdpChecksum,
    /// More than the next hop takes, and not to be fragmented.
    TooBig,
    /// A fragment other than the last that is not a multiple of 8 octets long, or one of nothing (RFC 791 §3.2,
    /// RFC 8200 §4.5).
    FragmentLength,
    /// A fragment that reaches beyond the longest packet there is.
    FragmentEnd,
    /// A first fragment without all of the TCP or UDP header (RFC 1858 §3, RFC 7112 §5).
    FragmentTiny,
    /// One of the fragments of a packet of which two overlapped, or contradicted each other about its end (RFC 5722 §4).
    FragmentOverlap,
    /// A fragment that came before.
    FragmentDuplicate,
    /// No room to wait for the first fragment, or more fragments of one packet than anybody needs.
    FragmentsFull,
    /// UDP datagrams as one packet that would have to be fragmented one by one: whoever asked cuts them apart first.
    NeedsSegmentation,
    /// Segments to be cut in a way that is not known here.
    UnknownOffload,
}

impl DropReason {
    /// All of them, each at its own number.
    pub const ALL: [Self; 37] = [
        Self::Malformed,
        Self::HeaderChecksum,
        Self::Source,
        Self::Destination,
        Self::NotMapped,
        Self::NotClient,
        Self::Loop,
        Self::Spoofed,
        Self::Forbidden,
        Self::NoBinding,
        Self::NoSession,
        Self::Filtered,
        Self::Unsolicited,
        Self::Exhausted,
        Self::Full,
        Self::Quota,
        Self::Rate,
        Self::NoPorts,
        Self::NotGlobal,
        Self::HopLimit,
        Self::SourceRoute,
        Self::RoutingHeader,
        Self::ExtensionHeader,
        Self::Protocol,
        Self::IcmpType,
        Self::IcmpFragment,
        Self::IcmpQuotation,
        Self::UdpChecksum,
        Self::TooBig,
        Self::FragmentLength,
        Self::FragmentEnd,
        Self::FragmentTiny,
        Self::FragmentOverlap,
        Self::FragmentDuplicate,
        Self::FragmentsFull,
        Self::NeedsSegmentation,
        Self::UnknownOffload,
    ];

    /// As in a metric.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::HeaderChecksum => "header_checksum",
            Self::Source => "source",
            Self::Destination => "destination",
            Self::NotMapped => "not_mapped",
            Self::NotClient => "not_client",
            Self::Loop => "loop",
            Self::Spoofed => "spoofed",
            Self::Forbidden => "forbidden",
            Self::NoBinding => "no_binding",
            Self::NoSession => "no_session",
            Self::Filtered => "filtered",
            Self::Unsolicited => "unsolicited",
            Self::Exhausted => "exhausted",
            Self::Full => "full",
            Self::Quota => "quota",
            Self::Rate => "rate",
            Self::NoPorts => "no_ports",
            Self::NotGlobal => "not_global",
            Self::HopLimit => "hop_limit",
            Self::SourceRoute => "source_route",
            Self::RoutingHeader => "routing_header",
            Self::ExtensionHeader => "extension_header",
            Self::Protocol => "protocol",
            Self::IcmpType => "icmp_type",
            Self::IcmpFragment => "icmp_fragment",
            Self::IcmpQuotation => "icmp_quotation",
            Self::UdpChecksum => "udp_checksum",
            Self::TooBig => "too_big",
            Self::FragmentLength => "fragment_length",
            Self::FragmentEnd => "fragment_end",
            Self::FragmentTiny => "fragment_tiny",
            Self::FragmentOverlap => "fragment_overlap",
            Self::FragmentDuplicate => "fragment_duplicate",
            Self::FragmentsFull => "fragments_full",
            Self::NeedsSegmentation => "needs_segmentation",
            Self::UnknownOffload => "unknown_offload",
        }
    }
}

/// A packet that does not go on, and what its sender is told of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What is counted.
    pub reason: DropReason,
    /// What is said, if anything, and if errors may be sent about the packet at all.
    pub problem: Option<Problem>,
}

/// What a sender is told, in whichever version it speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Problem {
    /// Hops ran out: 11/0, or 3/0 in IPv6.
    HopLimit,
    /// 3/5; IPv6 has its own, see [`Problem::SegmentsLeft`].
    SourceRoute,
    /// The MTU that would have done, in octets: 3/4, or 2/0.
    TooBig(u16),
    /// Not allowed: 3/13, or 1/1.
    Prohibited,
    /// Nobody there, or no address left to be seen under: 3/1, or 1/3.
    Address,
    /// No such port, or no binding for it: 3/3, or 1/4.
    Port,
    /// A routing header that is not followed: 4/0, with the octet at fault.
    SegmentsLeft(u16),
}

impl Refusal {
    /// With an ICMP error.
    pub const fn told(reason: DropReason, problem: Problem) -> Self {
        Self {
            reason,
            problem: Some(problem),
        }
    }

    /// Without one.
    pub(super) const fn untold(self) -> Self {
        Self {
            reason: self.reason,
            problem: None,
        }
    }
}

impl From<DropReason> for Refusal {
    fn from(reason: DropReason) -> Self {
        Self { reason, problem: None }
    }
}

impl Problem {
    /// Type, code and what comes second, of ICMPv4.
    fn v4(self) -> Option<(u8, u8, [u8; 4])> {
        Some(match self {
            Self::HopLimit => (icmp::v4::TIME_EXCEEDED, 0, [0; 4]),
            Self::SourceRoute => (icmp::v4::UNREACHABLE, 5, [0; 4]),
            Self::TooBig(mtu) => (icmp::v4::UNREACHABLE, 4, u32::from(mtu).to_be_bytes()),
            Self::Prohibited => (icmp::v4::UNREACHABLE, 13, [0; 4]),
            Self::Address => (icmp::v4::UNREACHABLE, 1, [0; 4]),
            Self::Port => (icmp::v4::UNREACHABLE, 3, [0; 4]),
            Self::SegmentsLeft(_) => return None,
        })
    }

    /// The same of ICMPv6.
    fn v6(self) -> Option<(u8, u8, [u8; 4])> {
        Some(match self {
            Self::HopLimit => (icmp::v6::TIME_EXCEEDED, 0, [0; 4]),
            Self::TooBig(mtu) => (icmp::v6::TOO_BIG, 0, u32::from(mtu).to_be_bytes()),
            Self::Prohibited => (icmp::v6::UNREACHABLE, 1, [0; 4]),
            Self::Address => (icmp::v6::UNREACHABLE, 3, [0; 4]),
            Self::Port => (icmp::v6::UNREACHABLE, 4, [0; 4]),
            Self::SegmentsLeft(pointer) => (icmp::v6::PARAMETER, 0, u32::from(pointer).to_be_bytes()),
            Self::SourceRoute => return None,
        })
    }
}

/// Whether a source names one host, that may be sent to and written about (RFC 1812 §5.3.7, §4.3.2.7).
pub(super) fn is_source_v4(address: Ipv4Addr) -> bool {
    // 0/8, 127/8, and all from 224/4 on: multicast, reserved, broadcast.
    !matches!(address.octets()[0], 0 | 127 | 224..)
}

/// Whether a destination is translated: unicast, and of this world.
pub(super) fn is_destination_v4(address: Ipv4Addr) -> bool {
    is_source_v4(address)
}

/// The same for IPv6; link-local addresses never leave their link (RFC 4291 §2.5.6).
pub(super) fn is_source_v6(address: Ipv6Addr) -> bool {
    !(address.is_multicast() || address.is_unspecified() || address.is_loopback() || address.is_unicast_link_local())
}

/// Turns a packet into the ICMPv4 error that tells its sender of `problem`, from `own`, numbered by `id`; `None` if there must not be one
/// (RFC 1812 §4.3.2.7), or there is none.
pub(super) fn answer_v4(
    packet: &mut Packet<'_>,
    ip: &V4,
    problem: Problem,
    own: Ipv4Addr,
    id: impl FnOnce() -> u16,
) -> Option<()> {
    let transport = packet.bytes().get(ip.header..)?;
    let about_error = ip.protocol == protocol::ICMP && transport.first().is_none_or(|kind| icmp::is_error_v4(*kind));
    if about_error || ip.offset > 0 || !is_source_v4(ip.source) || !is_destination_v4(ip.destination) {
        return None;
    }
    let (kind, code, rest) = problem.v4()?;
    let quoted = packet.bytes().len().min(LONGEST_V4 - 28);
    let header = V4 {
        class: ERROR_CLASS_V4,
        total: u16::try_from(quoted + 28).ok()?,
        // It may be fragmented, so that its number must not be another's (RFC 6864 §4.1).
        id: id(),
        dont_fragment: false,
        more: false,
        offset: 0,
        ttl: HOPS,
        protocol: protocol::ICMP,
        source: own,
        destination: ip.source,
        header: 20,
    };
    let headers = Headers::new()
        .then(&header.octets())
        .then(&[kind, code, 0, 0])
        .then(&rest);
    packet.rebuild(headers.as_slice(), 0..quoted, 0, 0)?;
    seal(packet, 20, Sum::default())
}

/// Turns a packet into the ICMPv6 error that tells its sender of `problem`, from `own`; `None` if there must not be one
/// (RFC 4443 §2.4 e), or there is none.
pub(super) fn answer_v6(packet: &mut Packet<'_>, ip: &V6, problem: Problem, own: Ipv6Addr) -> Option<()> {
    let transport = packet.bytes().get(ip.header..)?;
    let about_error = ip.protocol == protocol::ICMPV6 && transport.first().is_none_or(|kind| icmp::is_error_v6(*kind));
    let later = ip.fragment.is_some_and(|fragment| fragment.offset > 0);
    if about_error || later || !is_source_v6(ip.source) || ip.destination.is_multicast() {
        return None;
    }
    let (kind, code, rest) = problem.v6()?;
    let quoted = packet.bytes().len().min(LONGEST_V6 - 48);
    let header = V6 {
        class: 0,
        payload: u16::try_from(quoted + 8).ok()?,
        hop_limit: HOPS,
        source: own,
        destination: ip.source,
        fragment: None,
        protocol: protocol::ICMPV6,
        header: 40,
        obstacle: None,
    };
    let headers = header.headers().then(&[kind, code, 0, 0]).then(&rest);
    packet.rebuild(headers.as_slice(), 0..quoted, 0, 0)?;
    seal(packet, 40, Sum::pseudo_v6(own, ip.source, quoted + 8, protocol::ICMPV6))
}

/// Writes the checksum of an ICMP message that begins at `at` and was made here, so that nothing is left to the device.
fn seal(packet: &mut Packet<'_>, at: usize, pseudo: Sum) -> Option<()> {
    let message = packet.bytes_mut().get_mut(at..)?;
    let checksum = Sum::of(message).plus(pseudo).checksum();
    set_word(message, 2, checksum)?;
    packet.offload = super::Offload::default();
    packet.transport = at;
    Some(())
}

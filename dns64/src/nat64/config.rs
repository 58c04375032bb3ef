//! The `[nat64]` section: its types, its defaults and the rules that its values keep.

use std::{
    collections::BTreeSet,
    fmt,
    net::{Ipv4Addr, Ipv6Addr, SocketAddrV4, SocketAddrV6},
    ops::RangeInclusive,
    str::FromStr,
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, de};
use settings::{At, Cidr, Fault, Faults, Need, What, string_schema};

use super::{
    Map, MapError, Maps, Settings, Stateless,
    state::{self, Fixed, Lifetimes, Policy, PoolRange, Protocol, Table},
};
use crate::Pref64;

/// Who reports when nothing better is configured: an address that is nobody's (RFC 7600 §4.8, RFC 8155).
const NOBODY: Ipv4Addr = Ipv4Addr::new(192, 0, 0, 8);
/// Addresses of the pool. Each takes room for its ports.
const LARGEST_POOL: usize = 256;
/// Of an interface's name, without the zero that ends it (IFNAMSIZ).
const LONGEST_NAME: usize = 15;

/// Packets between IPv6 and IPv4: NAT64, on a TUN device that `edged` makes.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// With sessions, so that many share one IPv4 address (RFC 6146), or address by address (RFC 7915). Default: "stateful".
    #[serde(default = "usual_mode")]
    pub mode: At<Mode>,
    /// The prefix under which IPv4 addresses appear, one of `dns64.prefixes`; "none" leaves only `maps`. Default: "64:ff9b::/96".
    #[serde(default = "usual_prefix")]
    pub prefix: At<Prefix>,
    /// Name of the TUN device, at most 15 octets. Default: "nat64".
    #[serde(default = "usual_device")]
    pub device: At<Device>,
    /// Addresses that have one of their own in the other version (RFC 7757). Default: none.
    #[serde(default)]
    pub maps: Vec<At<MapEntry>>,
    /// IPv4 addresses and ports that sessions are seen under, with mode = "stateful".
    #[serde(default)]
    pub pool: Vec<At<Pool>>,
    /// IPv6 networks that may open sessions; needed with mode = "stateful".
    #[serde(default)]
    pub clients: Vec<At<Cidr>>,
    /// Whose packets reach a port that a session uses, with mode = "stateful". Default: "endpoint-independent".
    #[serde(default)]
    pub filtering: Filtering,
    /// Whether TCP connections and pings may begin in IPv4, towards a port that a session uses, with mode = "stateful".
    /// Default: false.
    #[serde(default)]
    pub inbound_new: bool,
    /// Ports of the pool's addresses that are always one host's, for connections that begin in IPv4, with
    /// mode = "stateful". Default: none.
    #[serde(default)]
    pub static_bindings: Vec<At<StaticBinding>>,
    /// Sessions, and as many bindings, that there may be at once, 1024 to 2097152. Takes effect when edged starts.
    /// Default: 262144.
    #[serde(default = "usual_sessions")]
    pub max_sessions: At<u32>,
    /// How many leading bits of an IPv6 address make a host, for the limits below, 32 to 128. Default: 128.
    #[serde(default = "usual_host_bits")]
    pub host_prefix_length: At<u8>,
    /// Bindings that a host may have of each protocol. Default: an eighth of the pool's ports, at least 64.
    #[serde(default)]
    pub bindings_per_host: Option<At<u32>>,
    /// Sessions that a host may have. Default: an eighth of `max_sessions`.
    #[serde(default)]
    pub sessions_per_host: Option<At<u32>>,
    /// Sessions that a host may begin per second; ten times as many at once after a rest. Default: 1000.
    #[serde(default = "usual_rate")]
    pub new_sessions_per_second: At<u32>,
    /// Private IPv4 networks that may be reached all the same, with mode = "stateful". Default: none.
    #[serde(default)]
    pub allow_private: Vec<At<Cidr>>,
    /// Source of the ICMPv4 errors that edged sends itself. Default: the first address of `pool`, else 192.0.0.8.
    #[serde(default)]
    pub address_v4: Option<At<Ipv4Addr>>,
    /// Source of the ICMPv6 errors that edged sends itself. Default: `address_v4` under `prefix`.
    #[serde(default)]
    pub address_v6: Option<At<Ipv6Addr>>,
    /// IPv4 addresses that report for IPv6 routers without one (RFC 6791). Default: `address_v4`.
    #[serde(default)]
    pub reporters_v4: Vec<At<Ipv4Addr>>,
    /// The IPv6 address that reports for IPv4 routers without one. Default: `address_v6`.
    #[serde(default)]
    pub reporter_v6: Option<At<Ipv6Addr>>,
    /// MTU towards IPv4, in octets, 68 to 65535. Default: 1500.
    #[serde(default = "usual_mtu")]
    pub mtu_v4: At<u16>,
    /// MTU towards IPv6, in octets, 1280 to 65535. Default: 1500.
    #[serde(default = "usual_mtu")]
    pub mtu_v6: At<u16>,
    /// Octets that every link of the IPv6 network takes: longer packets are fragmented, if they may be. Default: 1280.
    #[serde(default = "smallest_mtu")]
    pub lowest_ipv6_mtu: At<u16>,
    /// What becomes of UDP over IPv4 without a checksum, which IPv6 does not have. Default: "compute".
    #[serde(default)]
    pub udp_zero_checksum: ZeroChecksum,
    /// Whether the segment size that a TCP connection begins with is lowered to what both MTUs carry. Default: true.
    #[serde(default = "yes")]
    pub clamp_mss: bool,
    /// Whether the traffic class goes over as it is, or only its marks of congestion. Default: "copy".
    #[serde(default)]
    pub traffic_class: TrafficClass,
}

/// How addresses are translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// With sessions: many IPv6 addresses share one IPv4 address (RFC 6146).
    Stateful,
    /// Address by address (RFC 7915).
    Stateless,
}

impl Mode {
    /// As it is written.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Stateful => "stateful",
            Self::Stateless => "stateless",
        }
    }
}

/// What becomes of UDP over IPv4 without a checksum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ZeroChecksum {
    /// It gets one, unless it is a fragment (RFC 7915 §4.5).
    #[default]
    Compute,
    /// It is dropped, and its sender told.
    Refuse,
}

/// What becomes of the traffic class (RFC 7915 §4.1, §5.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum TrafficClass {
    /// It stays.
    #[default]
    Copy,
    /// Only the two bits that mark congestion stay.
    Zero,
}

/// Whose packets reach a port that a session uses (RFC 6146 §3.5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Filtering {
    /// Everyone's.
    #[default]
    EndpointIndependent,
    /// Those of addresses that the client has written to.
    AddressDependent,
}

/// Two networks whose addresses stand for each other, by their suffix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MapEntry {
    /// The IPv4 network; without a length one address.
    #[schemars(with = "String")]
    pub ipv4: Whole<Ipv4Net>,
    /// The IPv6 network; without a length one address.
    #[schemars(with = "String")]
    pub ipv6: Whole<Ipv6Net>,
}

/// An IPv4 address and what sessions may use of its ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Pool {
    /// The address.
    pub address: Ipv4Addr,
    /// Ports, "FIRST-LAST" or one. Default: "61001-65535".
    #[serde(default)]
    pub ports: PortRange,
}

/// A port that is always one host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StaticBinding {
    /// "tcp" or "udp".
    pub protocol: Transport,
    /// As what it is seen: an address of the pool and any port of it.
    pub ipv4: SocketAddrV4,
    /// The host, and its port.
    pub ipv6: SocketAddrV6,
}

/// What has ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// Ports from the first to the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortRange {
    first: u16,
    last: u16,
}

/// A prefix, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prefix {
    /// Addresses without a map are not translated.
    None,
    /// Addresses without a map lie under it.
    Of(Pref64),
}

/// A network interface's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device(String);

/// A network without bits beyond its length; written without a length it is one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Whole<N>(N);

impl Config {
    /// What the translator does where RFC 7915 leaves a choice.
    pub fn settings(&self) -> Settings {
        Settings {
            address_v4: self.address_v4(),
            address_v6: self.address_v6().unwrap_or(Ipv6Addr::UNSPECIFIED),
            mtu_v4: self.mtu_v4.value,
            mtu_v6: self.mtu_v6.value,
            lowest_ipv6_mtu: self.lowest_ipv6_mtu.value,
            copy_class: self.traffic_class == TrafficClass::Copy,
            sum_udp: self.udp_zero_checksum == ZeroChecksum::Compute,
            clamp_mss: self.clamp_mss,
            answer: true,
        }
    }

    /// Whose address stands for whose, without state.
    ///
    /// # Errors
    ///
    /// A configuration with faults that [`Config::check`] tells.
    pub fn stateless(&self) -> Result<Stateless, MapError> {
        let maps: Result<Vec<Map>, MapError> = self.maps.iter().map(|at| at.map()).collect();
        let reporters: Vec<Ipv4Addr> = self.reporters_v4.iter().map(|at| at.value).collect();
        Ok(Stateless {
            prefix: self.prefix(),
            maps: Maps::new(maps?)?,
            reporters_v4: match reporters.is_empty() {
                true => vec![self.address_v4()],
                false => reporters,
            },
            reporter_v6: self.reporter_v6.as_ref().map(|at| at.value).or(self.address_v6()),
        })
    }

    /// What sessions keep to, with mode = "stateful"; `own` are the machine's IPv4 addresses, which hosts do not reach.
    pub fn policy(&self, own: Vec<Ipv4Addr>) -> Option<Policy> {
        let prefix = self.prefix().filter(|_| self.mode.value == Mode::Stateful)?;
        let pool: Vec<PoolRange> = self
            .pool
            .iter()
            .map(|at| PoolRange {
                address: at.address,
                ports: at.ports.range(),
            })
            .collect();
        let ports: usize = pool.iter().map(|range| range.ports.len()).sum();
        let ports = u32::try_from(ports).unwrap_or(u32::MAX);
        let or = |given: &Option<At<u32>>, usual: u32| given.as_ref().map_or(usual, |at| at.value);
        Some(Policy {
            prefix,
            pool,
            fixed: self.static_bindings.iter().map(|at| at.fixed()).collect(),
            clients: self.clients.iter().filter_map(|at| v6(at.net())).collect(),
            filtering: match self.filtering {
                Filtering::EndpointIndependent => state::Filtering::EndpointIndependent,
                Filtering::AddressDependent => state::Filtering::AddressDependent,
            },
            inbound_new: self.inbound_new,
            denied: own.into_iter().map(Ipv4Net::from).collect(),
            allow_private: self.allow_private.iter().filter_map(|at| v4(at.net())).collect(),
            reporter_v6: self
                .reporter_v6
                .as_ref()
                .map(|at| at.value)
                .or(self.address_v6())
                .unwrap_or(Ipv6Addr::UNSPECIFIED),
            host_bits: self.host_prefix_length.value,
            bindings_per_host: or(&self.bindings_per_host, (ports / 8).max(64)),
            sessions_per_host: or(&self.sessions_per_host, (self.max_sessions.value / 8).max(1)),
            new_per_second: self.new_sessions_per_second.value,
            lifetimes: Lifetimes::default(),
        })
    }

    /// The prefix, if there is one.
    pub fn prefix(&self) -> Option<Pref64> {
        match self.prefix.value {
            Prefix::None => None,
            Prefix::Of(prefix) => Some(prefix),
        }
    }

    /// The TUN device's name.
    pub fn device(&self) -> &str {
        &self.device.0
    }

    /// What the machine has to send into the device: the prefix, and the IPv4 addresses that stand for others.
    pub fn routes(&self) -> BTreeSet<IpNet> {
        let prefix = self
            .prefix()
            .and_then(|prefix| Ipv6Net::new(prefix.network(), prefix.length()).ok());
        let maps = self.maps.iter().map(|at| IpNet::from(at.ipv4.0));
        let pool = self.pool.iter().map(|at| IpNet::from(Ipv4Net::from(at.address)));
        prefix.map(IpNet::from).into_iter().chain(maps).chain(pool).collect()
    }

    /// What the supervisor is asked to open. As many `threads` translate.
    pub fn needs(&self, threads: u16) -> Vec<Need> {
        let sessions = self.max_sessions.value as usize;
        vec![Need {
            what: What::Tun {
                name: self.device().to_owned(),
                queues: threads,
                routes: self.routes(),
                memory: 8 * Table::words(sessions, sessions) as u64,
            },
            key: "nat64.device".into(),
            span: self.device.span.clone(),
        }]
    }

    /// Checks what parsing cannot see.
    pub fn check(&self) -> Vec<Fault> {
        let mut faults = Faults::default();
        if self.prefix.value == Prefix::None && self.mode.value == Mode::Stateful {
            faults.error(
                &self.prefix,
                "mode = \"stateful\" finds IPv4 servers under a prefix only",
                "write prefix = \"64:ff9b::/96\"",
            );
        }
        if self.address_v6().is_none() {
            faults.error(
                &self.prefix,
                "without a prefix edged has no address to send ICMPv6 errors from",
                "write address_v6 = \"...\" with an IPv6 address of this machine",
            );
        }
        self.check_maps(&mut faults);
        self.check_pool(&mut faults);
        for (at, least) in [(&self.mtu_v4, 68), (&self.mtu_v6, 1280), (&self.lowest_ipv6_mtu, 1280)] {
            if at.value < least {
                faults.error(
                    at,
                    format!("an MTU of {} octets is out of range", at.value),
                    format!("write {least} to 65535"),
                );
            }
        }
        for at in self.address_v4.iter().chain(&self.reporters_v4) {
            if !super::error::is_source_v4(at.value) {
                faults.error(
                    at,
                    format!("{} cannot be the source of a packet", at.value),
                    "write an address of this machine, or leave the key out",
                );
            }
        }
        for at in self.address_v6.iter().chain(&self.reporter_v6) {
            if !super::error::is_source_v6(at.value) {
                faults.error(
                    at,
                    format!("{} cannot be the source of a packet that is routed", at.value),
                    "write an address of this machine, or leave the key out",
                );
            }
        }
        self.check_sessions(&mut faults);
        for at in &self.clients {
            if matches!(at.net(), IpNet::V4(_)) {
                faults.error(
                    at,
                    format!("{} is no IPv6 network, and sessions are opened from IPv6", at.value),
                    "write the nodes' IPv6 prefix, such as \"fd0d::/64\"",
                );
            }
        }
        for at in &self.allow_private {
            if matches!(at.net(), IpNet::V6(_)) {
                faults.error(
                    at,
                    format!("{} is no IPv4 network", at.value),
                    "write a network such as \"10.0.0.0/8\"",
                );
            }
        }
        faults.sorted()
    }

    fn check_sessions(&self, faults: &mut Faults) {
        for (at, least, most) in [
            (Some(&self.max_sessions), 1024, 2_097_152),
            (Some(&self.new_sessions_per_second), 1, 10_000_000),
            (self.bindings_per_host.as_ref(), 1, u32::MAX),
            (self.sessions_per_host.as_ref(), 1, u32::MAX),
        ] {
            if let Some(at) = at.filter(|at| !(least..=most).contains(&at.value)) {
                faults.error(
                    at,
                    format!("{} is out of range", at.value),
                    format!("write {least} to {most}"),
                );
            }
        }
        if !(32..=128).contains(&self.host_prefix_length.value) {
            faults.error(
                &self.host_prefix_length,
                format!("{} bits make no host", self.host_prefix_length.value),
                "write 128 if each address is a host, 64 if each network is one",
            );
        }
        if self.mode.value == Mode::Stateless {
            return;
        }
        if self.pool.is_empty() {
            faults.error(
                &self.mode,
                "mode = \"stateful\" needs an IPv4 address under which sessions are seen",
                "write pool = [{ address = \"203.0.113.7\", ports = \"1024-65535\" }] with an address that is routed to this machine",
            );
        }
        if self.clients.is_empty() {
            faults.error(
                &self.mode,
                "without clients nobody may open a session, and with everybody this machine would hide the whole internet",
                "write clients = [\"2001:db8:1::/48\"] with the nodes' IPv6 networks",
            );
        }
        if let Some(at) = self.maps.first() {
            faults.warn(
                at,
                "mode = \"stateful\" does not look at maps",
                "write static_bindings for services of hosts, or mode = \"stateless\"",
            );
        }
        let mut seen: Vec<Fixed> = Vec::new();
        for at in &self.static_bindings {
            let fixed = at.fixed();
            if !self.pool.iter().any(|pool| pool.address == fixed.v4.0) {
                faults.error(
                    at,
                    format!("{} is no address of the pool", fixed.v4.0),
                    "write one of the pool's addresses",
                );
            }
            let taken =
                |other: &Fixed| other.protocol == fixed.protocol && (other.v4 == fixed.v4 || other.v6 == fixed.v6);
            if seen.iter().any(taken) {
                faults.error(
                    at,
                    "another static binding has that port, or is of that host's port",
                    "leave one of them out",
                );
            }
            seen.push(fixed);
        }
        for at in &self.allow_private {
            let hidden =
                v4(at.net()).is_some_and(|net| self.prefix().is_some_and(|prefix| !prefix.may_embed(net.addr())));
            if hidden {
                faults.error(
                    at,
                    format!(
                        "{} must not appear under 64:ff9b::/96, which is for global addresses only",
                        at.value
                    ),
                    "write a prefix of your own, such as prefix = \"64:ff9b:1::/96\"",
                );
            }
        }
    }

    fn check_maps(&self, faults: &mut Faults) {
        let mut good = Vec::new();
        for at in &self.maps {
            let added = at.map().and_then(|map| {
                good.push(map);
                Maps::new(good.iter().copied())
            });
            if let Err(error) = added {
                faults.error(
                    at,
                    error.to_string(),
                    "write one such as { ipv4 = \"192.0.2.0/24\", ipv6 = \"2001:db8:1::/120\" }",
                );
                if matches!(error, MapError::Twice(_)) {
                    good.pop();
                }
            }
        }
    }

    fn check_pool(&self, faults: &mut Faults) {
        if let Some(at) = self.pool.get(LARGEST_POOL) {
            faults.error(
                at,
                format!("the pool has {} addresses", self.pool.len()),
                format!("write at most {LARGEST_POOL}"),
            );
        }
        let mut seen: Vec<&Pool> = Vec::new();
        for at in &self.pool {
            if !super::error::is_source_v4(at.address) {
                faults.error(
                    at,
                    format!("{} cannot be the source of a packet", at.address),
                    "write an IPv4 address that is routed to this machine",
                );
            }
            let overlaps = |other: &&&Pool| other.address == at.address && other.ports.overlaps(at.ports);
            if seen.iter().find(overlaps).is_some() {
                faults.error(
                    at,
                    format!("ports {} of {} are in the pool twice", at.ports, at.address),
                    "leave one of them out",
                );
            }
            let again = |other: &&Pool| other.address == at.address && !other.ports.overlaps(at.ports);
            if self.mode.value == Mode::Stateful && seen.iter().any(again) {
                faults.error(
                    at,
                    format!(
                        "{} is in the pool already, and an address has one range of ports",
                        at.address
                    ),
                    "write one range for both",
                );
            }
            seen.push(&at.value);
        }
        if self.mode.value == Mode::Stateless
            && let Some(at) = self.pool.first()
        {
            faults.warn(
                at,
                "mode = \"stateless\" has no sessions, so the pool only names where errors come from",
                "leave pool out and write address_v4",
            );
        }
    }

    fn address_v4(&self) -> Ipv4Addr {
        let pool = self.pool.first().map(|at| at.address);
        self.address_v4.as_ref().map(|at| at.value).or(pool).unwrap_or(NOBODY)
    }

    fn address_v6(&self) -> Option<Ipv6Addr> {
        let own = self.address_v6.as_ref().map(|at| at.value);
        own.or_else(|| Some(self.prefix()?.embed(self.address_v4())))
    }
}

impl MapEntry {
    fn map(&self) -> Result<Map, MapError> {
        Map::new(self.ipv4.0, self.ipv6.0)
    }
}

impl StaticBinding {
    fn fixed(&self) -> Fixed {
        Fixed {
            protocol: match self.protocol {
                Transport::Tcp => Protocol::Tcp,
                Transport::Udp => Protocol::Udp,
            },
            v4: (*self.ipv4.ip(), self.ipv4.port()),
            v6: (*self.ipv6.ip(), self.ipv6.port()),
        }
    }
}

fn v4(net: IpNet) -> Option<Ipv4Net> {
    match net {
        IpNet::V4(net) => Some(net),
        IpNet::V6(_) => None,
    }
}

fn v6(net: IpNet) -> Option<Ipv6Net> {
    match net {
        IpNet::V6(net) => Some(net),
        IpNet::V4(_) => None,
    }
}

impl PortRange {
    /// All of it.
    pub const fn range(self) -> RangeInclusive<u16> {
        self.first..=self.last
    }

    const fn overlaps(self, other: Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }
}

/// Above what Linux gives to its own connections.
impl Default for PortRange {
    fn default() -> Self {
        Self {
            first: 61_001,
            last: 65_535,
        }
    }
}

const fn usual_sessions() -> At<u32> {
    At::unwritten(262_144)
}

const fn usual_host_bits() -> At<u8> {
    At::unwritten(128)
}

const fn usual_rate() -> At<u32> {
    At::unwritten(1000)
}

const fn yes() -> bool {
    true
}

const fn usual_mode() -> At<Mode> {
    At::unwritten(Mode::Stateful)
}

const fn usual_prefix() -> At<Prefix> {
    At::unwritten(Prefix::Of(Pref64::WELL_KNOWN))
}

fn usual_device() -> At<Device> {
    At::unwritten(Device("nat64".into()))
}

const fn usual_mtu() -> At<u16> {
    At::unwritten(1500)
}

const fn smallest_mtu() -> At<u16> {
    At::unwritten(1280)
}

impl FromStr for Prefix {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self::None),
            text => text
                .parse()
                .map(Self::Of)
                .map_err(|error: crate::PrefixError| error.to_string()),
        }
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Of(prefix) => prefix.fmt(f),
        }
    }
}

impl FromStr for Device {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        // As the kernel has it (dev_valid_name), but without what is hard to read; a percent sign would ask for a number.
        let good = |octet: u8| octet.is_ascii_alphanumeric() || matches!(octet, b'-' | b'_' | b'.');
        if text.is_empty() || text.len() > LONGEST_NAME || !text.bytes().all(good) || matches!(text, "." | "..") {
            return Err(format!(
                "\"{text}\" is no name for a network interface; write 1 to {LONGEST_NAME} letters, digits, dots and dashes, such as \"nat64\""
            ));
        }
        Ok(Self(text.to_owned()))
    }
}

impl FromStr for PortRange {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        match (first.parse(), last.parse()) {
            (Ok(first), Ok(last)) if (1..=last).contains(&first) => Ok(Self { first, last }),
            _ => Err(format!(
                "\"{text}\" is no range of ports; write one such as \"61001-65535\""
            )),
        }
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

impl FromStr for Whole<Ipv4Net> {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let net = text.parse::<Ipv4Addr>().map(Ipv4Net::from).or_else(|_| text.parse());
        let net = net.map_err(|_| format!("\"{text}\" is no IPv4 network; write one such as \"192.0.2.0/24\""))?;
        whole(text, net, net.trunc())
    }
}

impl FromStr for Whole<Ipv6Net> {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let net = text.parse::<Ipv6Addr>().map(Ipv6Net::from).or_else(|_| text.parse());
        let net = net.map_err(|_| format!("\"{text}\" is no IPv6 network; write one such as \"2001:db8:1::/120\""))?;
        whole(text, net, net.trunc())
    }
}

fn whole<N: PartialEq + fmt::Display>(text: &str, net: N, trunc: N) -> Result<Whole<N>, String> {
    if net == trunc {
        Ok(Whole(net))
    } else {
        Err(format!("\"{text}\" has bits set beyond its length; write \"{trunc}\""))
    }
}

macro_rules! from_text {
    ($($type:ty),*) => {$(
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
            }
        }
    )*};
}

from_text!(Prefix, Device, PortRange, Whole<Ipv4Net>, Whole<Ipv6Net>);

string_schema!(
    Prefix,
    "Prefix",
    "A NAT64 prefix of 32, 40, 48, 56, 64 or 96 bits, such as \"64:ff9b::/96\", or \"none\".",
    r"^(none|[0-9a-fA-F:.]+/(32|40|48|56|64|96))$"
);
string_schema!(
    Device,
    "Device",
    "The name of a network interface, such as \"nat64\".",
    r"^[0-9A-Za-z_.-]{1,15}$"
);
string_schema!(
    PortRange,
    "PortRange",
    "A range of ports such as \"61001-65535\".",
    r"^[0-9]+(-[0-9]+)?$"
);

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
mode = "stateless"
prefix = "2001:db8:100::/40"
maps = [
  { ipv4 = "1.0.0.0/24", ipv6 = "2001:db8:3::/120" },
  { ipv4 = "192.0.2.7", ipv6 = "fd0d::7" },
]
address_v4 = "198.51.100.1"
address_v6 = "2001:db8:1c0:2:1::"
reporters_v4 = ["203.0.113.8"]
"#;

    #[test]
    fn every_key_reaches_the_core() {
        let config = parse(GOOD);
        assert_eq!(config.check(), []);
        let settings = config.settings();
        assert_eq!(
            (settings.mtu_v4, settings.mtu_v6, settings.lowest_ipv6_mtu),
            (1500, 1500, 1280)
        );
        assert!(settings.copy_class && settings.sum_udp && settings.answer);
        assert_eq!(settings.address_v6, address("2001:db8:1c0:2:1::"));
        let stateless = config.stateless().expect("without fault");
        assert_eq!(stateless.maps.to_v4(address("fd0d::7")), Some([192, 0, 2, 7].into()));
        assert_eq!(stateless.reporters_v4, [Ipv4Addr::new(203, 0, 113, 8)]);
        assert_eq!(stateless.reporter_v6, Some(settings.address_v6));
        let routes: Vec<String> = config.routes().iter().map(ToString::to_string).collect();
        assert_eq!(routes, ["1.0.0.0/24", "192.0.2.7/32", "2001:db8:100::/40"]);
        let other = parse(
            r#"
mode = "stateless"
prefix = "none"
address_v6 = "2001:db8::1"
reporter_v6 = "2::2"
mtu_v4 = 2153
mtu_v6 = 1400
lowest_ipv6_mtu = 1300
udp_zero_checksum = "refuse"
traffic_class = "zero"
device = "siit0"
"#,
        );
        assert_eq!(other.check(), []);
        let settings = other.settings();
        assert_eq!(
            (settings.mtu_v4, settings.mtu_v6, settings.lowest_ipv6_mtu),
            (2153, 1400, 1300)
        );
        assert!(!settings.copy_class && !settings.sum_udp);
        let stateless = other.stateless().expect("without fault");
        assert_eq!((stateless.prefix, stateless.reporter_v6), (None, Some(address("2::2"))));
        assert_eq!(stateless.reporters_v4, [NOBODY]);
        assert!(other.routes().is_empty());
        assert_eq!(other.device(), "siit0");
    }

    #[test]
    fn what_is_not_written_has_the_documented_default() {
        let config = parse("mode = \"stateless\"");
        assert_eq!(config.check(), []);
        assert_eq!((config.prefix(), config.device()), (Some(Pref64::WELL_KNOWN), "nat64"));
        assert_eq!(config.settings().address_v4, NOBODY);
        assert_eq!(config.settings().address_v6, address("64:ff9b::c000:8"));
        let pool = parse("pool = [{ address = \"203.0.113.7\" }]");
        assert_eq!(pool.settings().address_v4, Ipv4Addr::new(203, 0, 113, 7));
        assert_eq!(pool.settings().address_v6, address("64:ff9b::cb00:7107"));
        assert_eq!(pool.pool[0].ports.range(), 61_001..=65_535);
        assert!((pool.filtering, pool.inbound_new) == (Filtering::EndpointIndependent, false));
        let routes: Vec<String> = pool.routes().iter().map(ToString::to_string).collect();
        assert_eq!(routes, ["203.0.113.7/32", "64:ff9b::/96"]);
    }

    #[test]
    fn what_cannot_work_is_told_where_it_stands() {
        for (text, at, said) in [
            (
                "mode = \"stateful\"\nclients = [\"fd00::/64\"]",
                "\"stateful\"",
                "needs an IPv4 address",
            ),
            (
                "mode = \"stateful\"\npool = [{ address = \"203.0.113.7\" }]",
                "\"stateful\"",
                "hide the whole internet",
            ),
            ("max_sessions = 7", "7", "1024 to 2097152"),
            ("new_sessions_per_second = 0", "0", "1 to 10000000"),
            ("host_prefix_length = 16", "16", "make no host"),
            (
                "allow_private = [\"10.0.0.0/8\"]",
                "\"10.0.0.0/8\"",
                "global addresses only",
            ),
            (
                "pool = [{ address = \"203.0.113.7\" }]\nstatic_bindings = [{ protocol = \"tcp\", ipv4 = \"203.0.113.8:80\", ipv6 = \"[fd00::1]:80\" }]",
                "{ protocol = \"tcp\", ipv4 = \"203.0.113.8:80\", ipv6 = \"[fd00::1]:80\" }",
                "no address of the pool",
            ),
            (
                "pool = [{ address = \"192.0.2.1\", ports = \"1024-2000\" }, { address = \"192.0.2.1\", ports = \"3000\" }]",
                "{ address = \"192.0.2.1\", ports = \"3000\" }",
                "one range",
            ),
            ("mode = \"stateless\"\nprefix = \"none\"", "\"none\"", "ICMPv6 errors"),
            (
                "mode = \"stateless\"\nmaps = [{ ipv4 = \"192.0.2.0/24\", ipv6 = \"2001:db8::/121\" }]",
                "{ ipv4 = \"192.0.2.0/24\", ipv6 = \"2001:db8::/121\" }",
                "too long",
            ),
            (
                "mode = \"stateless\"\nmaps = [{ ipv4 = \"192.0.2.1\", ipv6 = \"fd00::1\" }, { ipv4 = \"192.0.2.1\", ipv6 = \"fd00::2\" }]",
                "{ ipv4 = \"192.0.2.1\", ipv6 = \"fd00::2\" }",
                "mapped twice",
            ),
            ("mode = \"stateless\"\nmtu_v6 = 1279", "1279", "1280 to 65535"),
            ("mode = \"stateless\"\nlowest_ipv6_mtu = 68", "68", "1280 to 65535"),
            ("mode = \"stateless\"\nmtu_v4 = 67", "67", "68 to 65535"),
            (
                "mode = \"stateless\"\naddress_v4 = \"224.0.0.1\"",
                "\"224.0.0.1\"",
                "cannot be the source",
            ),
            (
                "mode = \"stateless\"\naddress_v6 = \"fe80::1\"",
                "\"fe80::1\"",
                "cannot be the source",
            ),
            (
                "mode = \"stateless\"\nclients = [\"10.0.0.0/8\"]",
                "\"10.0.0.0/8\"",
                "no IPv6 network",
            ),
            (
                "mode = \"stateless\"\nallow_private = [\"fd00::/8\"]",
                "\"fd00::/8\"",
                "no IPv4 network",
            ),
            (
                "mode = \"stateless\"\npool = [{ address = \"0.0.0.1\" }]",
                "{ address = \"0.0.0.1\" }",
                "cannot be the source",
            ),
            (
                "mode = \"stateless\"\npool = [{ address = \"192.0.2.1\", ports = \"1024-2000\" }, { address = \"192.0.2.1\", ports = \"2000\" }]",
                "{ address = \"192.0.2.1\", ports = \"2000\" }",
                "twice",
            ),
        ] {
            let faults = parse(text).check();
            let found = faults.iter().find(|fault| &text[fault.span.clone()] == at);
            let found = found.unwrap_or_else(|| panic!("{text}: {faults:?}"));
            let whole = format!("{} {}", found.message, found.help);
            assert!(whole.contains(said), "{text}: {whole}");
        }
    }

    #[test]
    fn malformed_values_say_what_to_write() {
        for (text, said) in [
            ("prefix = \"64:ff9b::/95\"", "RFC 6052 allows"),
            ("device = \"\"", "no name for a network interface"),
            ("device = \"sixteen-octets-x\"", "1 to 15"),
            ("device = \"nat%d\"", "1 to 15"),
            (
                "maps = [{ ipv4 = \"192.0.2.1/24\", ipv6 = \"fd00::/120\" }]",
                "write \"192.0.2.0/24\"",
            ),
            (
                "maps = [{ ipv4 = \"192.0.2.1\", ipv6 = \"fd00::1/120\" }]",
                "write \"fd00::/120\"",
            ),
            ("maps = [{ ipv4 = \"fd00::1\", ipv6 = \"fd00::1\" }]", "no IPv4 network"),
            (
                "pool = [{ address = \"192.0.2.1\", ports = \"0-7\" }]",
                "no range of ports",
            ),
            (
                "pool = [{ address = \"192.0.2.1\", ports = \"9-7\" }]",
                "no range of ports",
            ),
            ("filtering = \"none\"", "endpoint-independent"),
            ("udp_zero = 1", "unknown field"),
        ] {
            let error = toml::from_str::<Config>(text).expect_err(text);
            assert!(error.message().contains(said), "{text}: {error}");
        }
    }

    fn parse(text: &str) -> Config {
        toml::from_str(text).expect("well-formed")
    }

    fn address(text: &str) -> Ipv6Addr {
        text.parse().expect("an address")
    }
}

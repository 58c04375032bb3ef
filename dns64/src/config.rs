//! The `[dns64]` section: its types, its defaults and the rules that its values keep.
//!
//! Parsing refuses unknown keys and malformed values; [`Config::check`] refuses what is well-formed but cannot work, or
//! would make an edge that is open to the world.

use std::{
    collections::BTreeMap,
    fmt,
    marker::PhantomData,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    str::FromStr,
    time::Duration,
};

use hickory_proto::rr::{Name, RData, Record, rdata::CNAME};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, de};
use settings::{At, Cidr, Fault, Faults, Span, Timeout, string_schema};

use crate::{
    Pref64,
    rate::Limit,
    reverse::Form,
    synthesis::{Mapping, Rules},
    upstream::Url,
    zone,
};

/// Where the roots of TLS upstreams come from unless `ca_file` says otherwise.
pub const DEFAULT_CA: &str = "/etc/ssl/certs/ca-certificates.crt";

/// Answers per second that can be counted.
const MOST_RATE: u32 = 1_000_000;
const DAY: Duration = Duration::from_secs(86_400);
const WEEK: Duration = Duration::from_secs(7 * 86_400);

/// DNS for nodes without IPv4: a resolver that makes AAAA records of A records, and the zone that nodes register in.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Addresses to answer on, over UDP and TCP.
    #[serde(deserialize_with = "some")]
    pub listen: Vec<At<SocketAddr>>,
    /// The prefixes under which IPv4 addresses appear (RFC 6052), one AAAA each; `[]` = no synthesis. Default: ["64:ff9b::/96"].
    #[serde(default)]
    #[schemars(extend("default" = ["64:ff9b::/96"]))]
    pub prefixes: Option<Vec<At<Pref64>>>,
    /// Sources that are answered, as CIDRs; others get silence by UDP and REFUSED by TCP. Default: this machine and the
    /// prefixes of all zones.
    #[serde(default)]
    pub allow: Option<Vec<At<Cidr>>>,
    /// Servers that are asked for everything else: "udp://192.0.2.53", "tcp://[2001:db8::53]:5353",
    /// "tls://192.0.2.54#dns.example.org". Default: none.
    #[serde(default)]
    pub upstreams: Vec<At<Url>>,
    /// Servers for the names at and below a domain, instead of `upstreams`.
    #[serde(default, deserialize_with = "once")]
    pub forward: BTreeMap<At<Domain>, Vec<At<Url>>>,
    /// Addresses of single names, as in /etc/hosts; a name without AAAA gets synthesised ones too.
    #[serde(default, deserialize_with = "once")]
    pub hosts: BTreeMap<At<Domain>, Vec<IpAddr>>,
    /// AAAA records within these networks do not count and are not passed on. Default: ["::ffff:0:0/96"].
    #[serde(default)]
    #[schemars(extend("default" = ["::ffff:0:0/96"]))]
    pub exclude_aaaa: Option<Vec<At<Cidr>>>,
    /// IPv4 networks for which nothing is synthesised, beside those that the well-known prefix must not have. Default: none.
    #[serde(default)]
    pub exclude_a: Vec<At<Cidr>>,
    /// Domains at and below which nothing is synthesised. Default: none.
    #[serde(default)]
    pub exclude_names: Vec<At<Domain>>,
    /// Domains at and below which AAAA records do not count, so that they are reached through NAT64. Default: none.
    #[serde(default)]
    pub ignore_aaaa: Vec<At<Domain>>,
    /// What a question for AAAA that fails leads to. Default: "synthesise".
    #[serde(default)]
    pub on_aaaa_failure: OnFailure,
    /// How the address of a synthesised record is given its name. Default: "ptr".
    #[serde(default)]
    pub reverse: ReverseForm,
    /// How long after its TTL an answer may be given while upstreams do not answer, or "none". Default: 1d.
    #[serde(default)]
    pub stale: Option<At<Timeout>>,
    /// Memory for answers in MiB, 1 to 1024. Default: 32.
    #[serde(default)]
    pub cache_mib: Option<At<u32>>,
    /// The longest that an answer is kept, whatever its TTL. Default: 1d.
    #[serde(default)]
    pub max_ttl: Option<At<Span>>,
    /// The longest that a name is known not to exist. Default: 1h.
    #[serde(default)]
    pub max_negative_ttl: Option<At<Span>>,
    /// Answers per second to one network (IPv6 /56, IPv4 /24) that has no cookie; above it every second answer asks to come
    /// by TCP, the others are not given.
    #[serde(default = "usual_rate")]
    pub rate_limit: At<RateLimit>,
    /// Certificates (PEM) that TLS upstreams are verified with. Default: "/etc/ssl/certs/ca-certificates.crt".
    #[serde(default)]
    pub ca_file: Option<At<PathBuf>>,
    /// One zone of nodes, with its reverse zones.
    #[serde(default)]
    pub zone: Vec<At<Zone>>,
}

/// A zone whose names nodes register themselves (RFC 2136), each with a key of its own.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Zone {
    /// Its name. Default: "fleet".
    #[serde(default = "fleet")]
    pub name: At<Domain>,
    /// Networks that nodes have their addresses in; their reverse zones are served too.
    pub prefixes: Vec<At<Cidr>>,
    /// The edge's own name in the zone. Default: "edge".
    #[serde(default)]
    pub edge: Option<At<Domain>>,
    /// The edge's addresses, which its own name, `ns` and `api` get. Default: those of `listen` within `prefixes`.
    #[serde(default)]
    pub addresses: Option<Vec<IpAddr>>,
    /// Further names, below the zone, and their addresses; no node may have them.
    #[serde(default, deserialize_with = "once")]
    pub hosts: BTreeMap<At<Domain>, Vec<IpAddr>>,
    /// Further names, below the zone, and the name that each stands for: below the zone, or with a final dot anywhere.
    #[serde(default, deserialize_with = "once")]
    pub aliases: BTreeMap<At<Domain>, At<Target>>,
    /// TTL of the records in it. Default: 30m.
    #[serde(default)]
    pub ttl: Option<At<Span>>,
    /// How long others may take a name for unknown. Default: 60s.
    #[serde(default)]
    pub negative_ttl: Option<At<Span>>,
}

/// What a question for AAAA that fails leads to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OnFailure {
    /// To A, as if there were no AAAA (RFC 6147 §5.1.2).
    #[default]
    Synthesise,
    /// To the failure: what has IPv6 is never reached through NAT64 by mistake.
    Fail,
}

/// How the address of a synthesised record is given its name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ReverseForm {
    /// By the PTR records of the IPv4 address.
    #[default]
    Ptr,
    /// By a CNAME to the name of the IPv4 address.
    Cname,
}

/// Answers per second to one network that has no cookie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RateLimit {
    /// To one question, up to 1000000; 0 = without limit. Default: 1000.
    pub same: u32,
    /// To all questions, up to 1000000; 0 = without limit. Default: 20000.
    pub all: u32,
    /// Seconds' worth that may come at once, 1 to 60. Default: 5.
    pub burst: u32,
}

/// A domain name, in lower case, without an origin.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Domain(pub Name);

/// Where an alias leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A name below the zone.
    Below(Name),
    /// A name written with its final dot.
    Anywhere(Name),
}

impl Default for RateLimit {
    fn default() -> Self {
        Self {
            same: 1000,
            all: 20_000,
            burst: 5,
        }
    }
}

impl From<RateLimit> for Limit {
    fn from(limit: RateLimit) -> Self {
        Self {
            same: limit.same,
            all: limit.all,
            burst: limit.burst,
        }
    }
}

impl Config {
    /// What is synthesised.
    pub fn rules(&self) -> Rules {
        let prefixes = match &self.prefixes {
            Some(prefixes) => prefixes.iter().map(|at| at.value).collect(),
            None => vec![Pref64::WELL_KNOWN],
        };
        let names = |domains: &[At<Domain>]| domains.iter().map(|at| at.0.clone()).collect();
        let mut rules = Rules::new(prefixes);
        if let Some(networks) = &self.exclude_aaaa {
            rules.exclude_aaaa = networks.iter().filter_map(|at| v6(at.net())).collect();
        }
        let except: Vec<Ipv4Net> = self.exclude_a.iter().filter_map(|at| v4(at.net())).collect();
        for mapping in &mut rules.mappings {
            let Mapping { except: networks, .. } = mapping;
            networks.extend(&except);
        }
        rules.exclude_names = names(&self.exclude_names);
        rules.ignore_aaaa = names(&self.ignore_aaaa);
        rules.despite_failure = self.on_aaaa_failure == OnFailure::Synthesise;
        rules
    }

    /// How PTR questions are answered.
    pub const fn form(&self) -> Form {
        match self.reverse {
            ReverseForm::Ptr => Form::Ptr,
            ReverseForm::Cname => Form::Cname,
        }
    }

    /// Who is answered.
    pub fn allowed(&self) -> Vec<IpNet> {
        match &self.allow {
            Some(networks) => networks.iter().map(|at| at.net()).collect(),
            None => {
                let own = ["127.0.0.0/8", "::1/128"]
                    .into_iter()
                    .filter_map(|net| net.parse().ok());
                let nodes = self.zone.iter().flat_map(|zone| &zone.prefixes).map(|at| at.net());
                own.chain(nodes).collect()
            }
        }
    }

    /// How long past its TTL an answer may be given.
    pub fn stale(&self) -> Duration {
        self.stale.as_ref().map_or(DAY, |at| at.0.unwrap_or_default())
    }

    /// Octets that the cache may take.
    pub fn cache(&self) -> usize {
        self.cache_mib.as_ref().map_or(32, |at| at.value as usize) << 20
    }

    /// Bounds on how long answers are kept.
    pub fn lifetimes(&self) -> crate::packed::Lifetimes {
        let seconds = |span: &Option<At<Span>>, usual: u32| {
            span.as_ref()
                .map_or(usual, |at| u32::try_from(at.0.as_secs()).unwrap_or(u32::MAX))
        };
        let usual = crate::packed::Lifetimes::default();
        crate::packed::Lifetimes {
            longest: seconds(&self.max_ttl, usual.longest),
            longest_negative: seconds(&self.max_negative_ttl, usual.longest_negative),
            ..usual
        }
    }

    /// The file with the certificates of authorities.
    pub fn ca_file(&self) -> At<PathBuf> {
        self.ca_file
            .clone()
            .unwrap_or_else(|| At::unwritten(PathBuf::from(DEFAULT_CA)))
    }

    /// Whether any upstream needs certificates to be verified with.
    pub fn uses_tls(&self) -> bool {
        let tls = |url: &At<Url>| url.transport() == crate::upstream::Transport::Tls;
        self.upstreams.iter().chain(self.forward.values().flatten()).any(tls)
    }

    /// Whether every answer is the same as with `other`, whoever gets it and however long it is kept.
    pub fn answers_as(&self, other: &Self) -> bool {
        let mut as_other = self.clone();
        as_other.allow.clone_from(&other.allow);
        as_other.rate_limit.clone_from(&other.rate_limit);
        as_other.cache_mib.clone_from(&other.cache_mib);
        as_other.stale.clone_from(&other.stale);
        as_other == *other
    }

    /// What each zone is made of.
    pub fn zones(&self) -> Vec<zone::Config> {
        let listen: Vec<IpAddr> = self.listen.iter().map(|at| at.ip()).collect();
        self.zone.iter().map(|zone| zone.config(&listen)).collect()
    }

    /// Checks what parsing cannot see.
    pub fn check(&self) -> Vec<Fault> {
        let mut faults = Faults::default();
        let mut listeners = BTreeMap::new();
        for at in &self.listen {
            faults.listener(at, "the resolver", &mut listeners);
        }
        self.check_prefixes(&mut faults);
        for at in self.allow.iter().flatten() {
            if at.net().prefix_len() == 0 {
                faults.warn(
                    at,
                    format!("{} lets everyone ask: open resolvers are found and abused", at.value),
                    "name the networks of nodes, mesh and VPN",
                );
            }
        }
        if self.upstreams.is_empty()
            && let Some(at) = self.listen.first()
        {
            faults.warn(
                at,
                "there are no upstreams: only zones, hosts and forwarded domains get answers, all else SERVFAIL",
                "write upstreams = [\"udp://192.0.2.53\"] with the resolvers of your provider",
            );
        }
        for (domain, servers) in &self.forward {
            if servers.is_empty() {
                faults.error(
                    domain,
                    format!("\"{}\" is forwarded to nobody", domain.value),
                    "name at least one server, or remove the key",
                );
            }
            if let Some(zone) = self.zone.iter().find(|zone| zone.name.0.zone_of(&domain.0)) {
                faults.error(
                    domain,
                    format!(
                        "\"{}\" is answered here, by zone \"{}\": nothing would be forwarded",
                        domain.value, zone.name.value
                    ),
                    "remove the key, or give the zone another name",
                );
            }
        }
        let is_own = |address: SocketAddr| {
            let all = |own: IpAddr| own.is_unspecified() && address.ip().is_loopback();
            let same =
                |own: &At<SocketAddr>| own.port() == address.port() && (own.ip() == address.ip() || all(own.ip()));
            self.listen.iter().any(same)
        };
        for url in self.upstreams.iter().chain(self.forward.values().flatten()) {
            if is_own(url.address()) {
                faults.error(
                    url,
                    format!(
                        "{} is edged itself: every question would go round in circles",
                        url.address()
                    ),
                    "write another resolver",
                );
            }
        }
        for at in &self.exclude_a {
            if v4(at.net()).is_none() {
                faults.error(
                    at,
                    format!(
                        "{} is no IPv4 network, and only IPv4 addresses are synthesised",
                        at.value
                    ),
                    "for IPv6 networks: exclude_aaaa",
                );
            }
        }
        for at in self.exclude_aaaa.iter().flatten() {
            if v6(at.net()).is_none() {
                faults.error(
                    at,
                    format!("{} is no IPv6 network, so no AAAA record lies in it", at.value),
                    "for IPv4 networks: exclude_a",
                );
            }
        }
        within(&mut faults, &self.cache_mib, 1..=1024, "MiB of cache");
        lasts(&mut faults, &self.max_ttl, WEEK);
        lasts(&mut faults, &self.max_negative_ttl, DAY);
        if !(1..=60).contains(&self.rate_limit.burst) {
            faults.error(
                &self.rate_limit,
                format!("a burst of {} seconds is out of range", self.rate_limit.burst),
                "write burst = 1 to 60",
            );
        }
        for limit in [self.rate_limit.same, self.rate_limit.all] {
            if limit > MOST_RATE {
                faults.error(
                    &self.rate_limit,
                    format!("{limit} answers per second are out of range"),
                    format!("write 0, for no limit, to {MOST_RATE}"),
                );
            }
        }
        if let Some(at) = self.ca_file.as_ref().filter(|at| !at.is_absolute()) {
            faults.error(
                at,
                "a certificate file needs an absolute path",
                format!("write {DEFAULT_CA}"),
            );
        }
        self.check_zones(&mut faults);
        faults.sorted()
    }

    fn check_prefixes(&self, faults: &mut Faults) {
        let mut seen: Vec<Pref64> = Vec::new();
        for at in self.prefixes.iter().flatten() {
            let overlaps =
                |other: &&Pref64| at.contains(other.embed([0; 4].into())) || other.contains(at.embed([0; 4].into()));
            if let Some(other) = seen.iter().find(overlaps) {
                faults.error(
                    at,
                    format!("{} and {other} overlap: an address would mean two", at.value),
                    "leave one of them out",
                );
            }
            seen.push(at.value);
        }
    }

    fn check_zones(&self, faults: &mut Faults) {
        let mut names: Vec<&Name> = Vec::new();
        let mut prefixes: Vec<(Ipv6Net, &Domain)> = Vec::new();
        for zone in &self.zone {
            let name = &zone.name;
            if names
                .iter()
                .any(|other| other.zone_of(&name.0) || name.0.zone_of(other))
            {
                faults.error(
                    name,
                    format!("\"{}\" lies in another zone, or another one in it", name.value),
                    "give each zone a name of its own",
                );
            }
            if name.0.is_root() {
                faults.error(name, "the root is no zone of nodes", "write name = \"fleet\"");
            }
            let nets: Vec<Ipv6Net> = zone.prefixes.iter().filter_map(|at| v6(at.net())).collect();
            let inside = |address: IpAddr| match address {
                IpAddr::V6(address) => nets.iter().any(|net| net.contains(&address)),
                IpAddr::V4(_) => false,
            };
            if zone.addresses.is_none() && !nets.is_empty() && !self.listen.iter().any(|at| inside(at.ip())) {
                faults.warn(
                    name,
                    "no address of `listen` lies in its prefixes: the edge's names (edge, ns, api) have none, and a node may take the edge's",
                    "write addresses = [\"fd0d::1\"] with the edge's own, or addresses = [] if it has none there",
                );
            }
            lasts(faults, &zone.ttl, WEEK);
            lasts(faults, &zone.negative_ttl, DAY);
            zone.check_names(faults);
            names.push(&name.0);
            for at in &zone.prefixes {
                let Some(net) = v6(at.net()) else {
                    faults.error(
                        at,
                        format!("{} is no IPv6 network, and nodes register IPv6 addresses", at.value),
                        "write the nodes' IPv6 prefix, such as \"fd0d::/64\"",
                    );
                    continue;
                };
                if !net.prefix_len().is_multiple_of(4) {
                    faults.error(
                        at,
                        format!("{net} does not end at a digit, so it has no reverse zone of its own"),
                        "write a length that is a multiple of 4",
                    );
                }
                if let Some((other, owner)) = prefixes
                    .iter()
                    .find(|(other, _)| other.contains(&net) || net.contains(other))
                {
                    faults.error(
                        at,
                        format!("{net} overlaps {other} of zone \"{owner}\": their reverse zones would too"),
                        "leave the shorter one out",
                    );
                }
                prefixes.push((net, &zone.name));
            }
            if zone.prefixes.is_empty() {
                faults.error(
                    name,
                    format!(
                        "zone \"{}\" has no prefixes, so no node could have an address",
                        name.value
                    ),
                    "write prefixes = [\"fd0d::/64\"] with the nodes' prefix",
                );
            }
        }
    }
}

impl Zone {
    /// Checks the names that are the edge's.
    fn check_names(&self, faults: &mut Faults) {
        let keys = || self.hosts.keys().chain(self.aliases.keys());
        for at in keys().chain(&self.edge) {
            if at.0.clone().append_domain(&self.name.0).is_err() {
                faults.error(
                    at,
                    format!(
                        "\"{}\" is too long for a name in zone \"{}\"",
                        at.value, self.name.value
                    ),
                    "write a shorter one",
                );
            }
        }
        let twice = |at: &&At<Domain>| self.name.0.zone_of(&at.0);
        for at in keys().chain(&self.edge).filter(twice) {
            faults.error(
                at,
                format!(
                    "\"{}\" would be \"{}.{}\": names here are below the zone",
                    at.value, at.value, self.name.value
                ),
                format!("write it without \".{}\"", self.name.value),
            );
        }
        let empty = |at: &&At<Domain>| at.0.is_root();
        for at in keys().filter(empty) {
            faults.error(
                at,
                "the zone's own name has the records that the edge gives it",
                "write a name below it",
            );
        }
        // What the core has to say of prefixes and of the zone's own name is said above.
        let Err(error) = zone::Zone::new(&self.config(&[]), zone::State::default()) else {
            return;
        };
        let (zone::ConfigError::Alias(name) | zone::ConfigError::Kind { name, .. }) = &error else {
            return;
        };
        let own = |at: &&At<Domain>| at.0.clone().append_domain(&self.name.0).is_ok_and(|own| own == *name);
        // Of the two that do not go together, the one that is written last.
        let at = keys().filter(own).max_by_key(|at| at.span.start);
        faults.error(
            at.unwrap_or(&self.name),
            error.to_string(),
            "give each name either addresses or one alias",
        );
    }

    /// As the zone's core wants it. `listen` are the addresses of the resolver.
    fn config(&self, listen: &[IpAddr]) -> zone::Config {
        let prefixes: Vec<Ipv6Net> = self.prefixes.iter().filter_map(|at| v6(at.net())).collect();
        let addresses = self.addresses.clone().unwrap_or_else(|| {
            let own = listen.iter().filter(|address| match address {
                IpAddr::V6(address) => prefixes.iter().any(|prefix| prefix.contains(address)),
                IpAddr::V4(_) => false,
            });
            own.copied().collect()
        });
        let below = |name: &Name| {
            name.clone()
                .append_domain(&self.name.0)
                .unwrap_or_else(|_| self.name.0.clone())
        };
        let label = |text: &str| self.name.0.prepend_label(text).unwrap_or_else(|_| self.name.0.clone());
        let mut config = zone::Config::new(&self.name.0, prefixes);
        if let Some(at) = &self.ttl {
            config.ttl = u32::try_from(at.0.as_secs()).unwrap_or(u32::MAX);
        }
        if let Some(at) = &self.negative_ttl {
            config.negative_ttl = u32::try_from(at.0.as_secs()).unwrap_or(u32::MAX);
        }
        let edge = self.edge.as_ref().map_or_else(|| label("edge"), |at| below(&at.0));
        config.reserved.push(edge.clone());
        for name in [edge, label("ns"), label("api")] {
            // Who names them otherwise means it.
            let own = |at: &At<Domain>| below(&at.0) == name;
            if !self.hosts.keys().chain(self.aliases.keys()).any(own) {
                config = config.with_addresses(&name, &addresses);
            }
        }
        for (name, addresses) in &self.hosts {
            config = config.with_addresses(&below(&name.0), addresses);
        }
        for (name, target) in &self.aliases {
            let target = match &target.value {
                Target::Below(target) => below(target),
                Target::Anywhere(target) => target.clone(),
            };
            let record = Record::from_rdata(below(&name.0), config.ttl, RData::CNAME(CNAME(target)));
            config.records.push(record);
        }
        config
    }
}

/// A list that is not empty.
fn some<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<At<SocketAddr>>, D::Error> {
    let all = Vec::<At<SocketAddr>>::deserialize(deserializer)?;
    if all.is_empty() {
        return Err(de::Error::custom(
            "no address to answer on; write one such as \"[::1]:53\", or remove the section",
        ));
    }
    Ok(all)
}

/// A table in which no name is written twice: upper and lower case are the same, which TOML does not know.
fn once<'de, D, V>(deserializer: D) -> Result<BTreeMap<At<Domain>, V>, D::Error>
where
    D: Deserializer<'de>,
    V: Deserialize<'de>,
{
    struct Once<V>(PhantomData<V>);

    impl<'de, V: Deserialize<'de>> de::Visitor<'de> for Once<V> {
        type Value = BTreeMap<At<Domain>, V>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a table of names")
        }

        fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut all = BTreeMap::new();
            while let Some((name, value)) = map.next_entry::<At<Domain>, V>()? {
                if all.contains_key(&name) {
                    return Err(de::Error::custom(format!(
                        "\"{}\" is written twice: names that differ in case only are the same; leave one of them out",
                        name.value
                    )));
                }
                all.insert(name, value);
            }
            Ok(all)
        }
    }

    deserializer.deserialize_map(Once(PhantomData))
}

fn within(
    faults: &mut Faults,
    at: &Option<At<impl Into<u64> + Copy>>,
    range: std::ops::RangeInclusive<u64>,
    what: &str,
) {
    let Some(at) = at else { return };
    let value: u64 = at.value.into();
    if !range.contains(&value) {
        faults.error(
            at,
            format!("{value} {what} are out of range"),
            format!("write {} to {}", range.start(), range.end()),
        );
    }
}

/// Whole seconds, and not so many that nobody remembers why.
fn lasts(faults: &mut Faults, at: &Option<At<Span>>, most: Duration) {
    let Some(at) = at else { return };
    if !(Duration::from_secs(1)..=most).contains(&at.0) {
        faults.error(
            at,
            format!("{} is out of range", humantime::format_duration(at.0)),
            format!("write 1s to {}", humantime::format_duration(most)),
        );
    }
}

const fn v6(net: IpNet) -> Option<Ipv6Net> {
    match net {
        IpNet::V6(net) => Some(net),
        IpNet::V4(_) => None,
    }
}

const fn v4(net: IpNet) -> Option<Ipv4Net> {
    match net {
        IpNet::V4(net) => Some(net),
        IpNet::V6(_) => None,
    }
}

fn usual_rate() -> At<RateLimit> {
    At::unwritten(RateLimit::default())
}

const fn fleet_name() -> &'static str {
    "fleet"
}

fn fleet() -> At<Domain> {
    At::unwritten(fleet_name().parse().unwrap_or_else(|_| Domain(Name::root())))
}

impl FromStr for Domain {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("\"{text}\" is no domain name; write one such as \"example.org\"");
        let mut name = Name::from_ascii(text).map_err(|_| wrong())?.to_lowercase();
        if text.is_empty() {
            return Err(wrong());
        }
        name.set_fqdn(true);
        Ok(Self(name))
    }
}

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = self.0.to_ascii();
        f.write_str(text.strip_suffix('.').filter(|text| !text.is_empty()).unwrap_or(&text))
    }
}

impl<'de> Deserialize<'de> for Domain {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

impl<'de> Deserialize<'de> for Target {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let Domain(name) = text.parse().map_err(de::Error::custom)?;
        Ok(if text.ends_with('.') {
            Self::Anywhere(name)
        } else {
            Self::Below(name)
        })
    }
}

impl<'de> Deserialize<'de> for Pref64 {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

string_schema!(Domain, "Domain", "A domain name such as \"example.org\".", r"^[^\s]+$");
string_schema!(
    Target,
    "Target",
    "A name below the zone, or with a final dot anywhere.",
    r"^[^\s]+$"
);
string_schema!(
    Pref64,
    "Pref64",
    "A NAT64 prefix of 32, 40, 48, 56, 64 or 96 bits, such as \"64:ff9b::/96\".",
    r"^[0-9a-fA-F:.]+/(32|40|48|56|64|96)$"
);

#[cfg(test)]
mod tests {
    use hickory_proto::rr::RecordType;

    use super::*;
    use crate::{question::Question, testing::name};

    /// What the issue that asked for all this shows.
    const EXAMPLE: &str = r#"
listen = ["[fd0d::1]:53", "[::1]:53"]
prefixes = ["64:ff9b::/96"]
allow = ["fd0d::/64"]
upstreams = ["udp://192.0.2.53", "tls://192.0.2.54#dns.example.org"]
forward = { "cluster.local" = ["udp://[fd00:10:96::a]"] }
[[zone]]
name = "fleet"
prefixes = ["fd0d::/64"]
"#;
    const GOOD: &str = "listen = [\"[::1]:53\"]\nupstreams = [\"udp://192.0.2.53\"]\n";

    #[test]
    fn the_example_is_without_fault_and_means_what_it_says() {
        let config = parse(EXAMPLE);
        assert_eq!(config.check(), []);
        assert!(config.uses_tls());
        let allowed: Vec<String> = config.allowed().iter().map(ToString::to_string).collect();
        assert_eq!(allowed, ["fd0d::/64"], "and nobody else, not even this machine");
        let rules = config.rules();
        let prefixes: Vec<Pref64> = rules.mappings.iter().map(|mapping| mapping.prefix).collect();
        assert_eq!(prefixes, [Pref64::WELL_KNOWN]);
        let forward: Vec<String> = config.forward.keys().map(|at| at.value.to_string()).collect();
        assert_eq!(forward, ["cluster.local"]);
        let needs = crate::needs(&config, 2);
        let shown: Vec<String> = needs
            .iter()
            .map(|need| format!("{} {}", need.key, &EXAMPLE[need.span.clone()]))
            .collect();
        assert_eq!(
            shown,
            [
                "dns64.listen \"[fd0d::1]:53\"",
                "dns64.listen \"[fd0d::1]:53\"",
                "dns64.listen \"[::1]:53\"",
                "dns64.listen \"[::1]:53\"",
                "dns64.ca_file ",
            ]
        );
        assert!(matches!(needs[0].what, settings::What::Datagrams { copies: 2, .. }));
        assert_eq!(needs[4].what, settings::What::File(DEFAULT_CA.into()));
    }

    #[test]
    fn of_the_example_the_zone_has_the_edge_ns_and_api_at_the_listener_within_its_prefix() {
        let config = parse(EXAMPLE).zones().remove(0);
        let zone = zone::Zone::new(&config, zone::State::default()).expect("a zone");
        for owner in ["edge.fleet", "ns.fleet", "api.fleet"] {
            let answer = zone.answer(&name(owner), RecordType::AAAA).expect("its name");
            let data: Vec<String> = answer.answers.iter().map(|record| record.data.to_string()).collect();
            assert_eq!(data, ["fd0d::1"], "{owner}");
            assert_eq!(answer.answers[0].ttl, 1800);
            assert!(zone.may_be_node(&name(owner)).is_err());
        }
        let reverse = Name::from("fd0d::1".parse::<std::net::Ipv6Addr>().expect("an address"));
        let answer = zone.answer(&reverse, RecordType::PTR).expect("its name");
        assert_eq!(answer.answers[0].data.to_string(), "edge.fleet.");
        assert_eq!(config.negative_ttl, 60);
    }

    #[test]
    fn what_is_not_written_has_the_documented_default() {
        let config = parse("listen = [\"[::1]:53\"]");
        assert_eq!(config.rules().mappings.len(), 1);
        assert_eq!(
            config.rules().exclude_aaaa,
            ["::ffff:0:0/96".parse().expect("a network")]
        );
        assert!(config.rules().despite_failure && config.rules().exclude_names.is_empty());
        let allowed: Vec<String> = config.allowed().iter().map(ToString::to_string).collect();
        assert_eq!(allowed, ["127.0.0.0/8", "::1/128"]);
        assert_eq!(config.stale(), DAY);
        assert_eq!(config.cache(), 32 << 20);
        assert_eq!(config.lifetimes(), crate::packed::Lifetimes::default());
        assert_eq!(config.form(), Form::Ptr);
        assert_eq!(
            config.rate_limit.value,
            RateLimit {
                same: 1000,
                all: 20_000,
                burst: 5
            }
        );
        assert!(!config.uses_tls() && config.zones().is_empty() && crate::needs(&config, 4).len() == 2);
        let zone = parse("listen = [\"[::1]:53\"]\n[[zone]]\nprefixes = [\"fd0d::/64\", \"fd0e::/64\"]");
        assert_eq!(zone.zone[0].name.to_string(), "fleet");
        let allowed: Vec<String> = zone.allowed().iter().map(ToString::to_string).collect();
        assert_eq!(allowed, ["127.0.0.0/8", "::1/128", "fd0d::/64", "fd0e::/64"]);
    }

    #[test]
    fn every_rule_reaches_the_core() {
        let config = parse(
            r#"
listen = ["[::1]:53"]
prefixes = ["64:ff9b::/96", "2001:db8:64::/48"]
exclude_aaaa = ["2001:db8:bad::/48"]
exclude_a = ["198.51.100.0/24", "203.0.113.7"]
exclude_names = ["Raw.Example.ORG"]
ignore_aaaa = ["old.example.org"]
on_aaaa_failure = "fail"
reverse = "cname"
stale = "none"
cache_mib = 64
max_ttl = "10m"
max_negative_ttl = "30s"
rate_limit = { same = 7, all = 0 }
ca_file = "/etc/ca.pem"
"#,
        );
        assert!(config.check().iter().all(|fault| fault.warning));
        let rules = config.rules();
        assert_eq!(rules.exclude_aaaa, ["2001:db8:bad::/48".parse().expect("a network")]);
        for mapping in &rules.mappings {
            assert!(mapping.has("8.8.8.8".parse().expect("an address")));
            assert!(!mapping.has("198.51.100.9".parse().expect("an address")));
            assert!(!mapping.has("203.0.113.7".parse().expect("an address")));
        }
        let asked = |owner: &str| Question::new(&name(owner), RecordType::AAAA);
        assert!(rules.synthesis(&asked("x.raw.example.org")).is_none());
        assert!(rules.synthesis(&asked("example.org")).is_some());
        assert_eq!(rules.ignore_aaaa, [name("old.example.org")]);
        assert!(!rules.despite_failure);
        assert_eq!(config.form(), Form::Cname);
        assert_eq!(config.stale(), Duration::ZERO);
        assert_eq!(config.cache(), 64 << 20);
        let lifetimes = config.lifetimes();
        assert_eq!((lifetimes.longest, lifetimes.longest_negative), (600, 30));
        let limit = Limit::from(config.rate_limit.value);
        assert_eq!((limit.same, limit.all, limit.burst), (7, 0, 5));
        assert_eq!(config.ca_file().value, PathBuf::from("/etc/ca.pem"));
        assert!(
            parse("listen = [\"[::1]:53\"]\nprefixes = []")
                .rules()
                .mappings
                .is_empty()
        );
        assert!(
            parse("listen = [\"[::1]:53\"]\nexclude_aaaa = []")
                .rules()
                .exclude_aaaa
                .is_empty()
        );
    }

    #[test]
    fn names_of_a_zone_lie_below_it_and_an_alias_may_lead_anywhere() {
        let config = parse(
            r#"
listen = ["[fd0d::1]:53"]
[[zone]]
name = "Fleet.Example.ORG"
prefixes = ["fd0d::/64"]
edge = "gate"
addresses = ["fd0d::5", "192.0.2.5"]
ttl = "1m"
negative_ttl = "5s"
hosts = { "nas" = ["fd0d::6"], "api" = ["fd0d::7"] }
aliases = { "www" = "nas", "out" = "www.example.net." }
"#,
        );
        assert_eq!(config.check().iter().filter(|fault| !fault.warning).count(), 0);
        let config = config.zones().remove(0);
        assert_eq!((config.ttl, config.negative_ttl), (60, 5));
        let mut records: Vec<String> = config
            .records
            .iter()
            .map(|record| format!("{} {} {}", record.name, record.ttl, record.data))
            .collect();
        records.sort();
        assert_eq!(
            records,
            [
                "api.fleet.example.org. 60 fd0d::7",
                "gate.fleet.example.org. 60 192.0.2.5",
                "gate.fleet.example.org. 60 fd0d::5",
                "nas.fleet.example.org. 60 fd0d::6",
                "ns.fleet.example.org. 60 192.0.2.5",
                "ns.fleet.example.org. 60 fd0d::5",
                "out.fleet.example.org. 60 www.example.net.",
                "www.fleet.example.org. 60 nas.fleet.example.org.",
            ]
        );
    }

    #[test]
    fn keys_of_tables_know_their_places_and_differ_in_nothing_but_their_value() {
        let text = "listen = [\"[::1]:53\"]\n[hosts]\n\"b.example\" = [\"192.0.2.1\"]\n\"A.example\" = [\"192.0.2.2\", \"2001:db8::1\"]";
        let config = parse(text);
        let hosts: Vec<(String, &str)> = config
            .hosts
            .keys()
            .map(|at| (at.value.to_string(), &text[at.span.clone()]))
            .collect();
        assert_eq!(
            hosts,
            [
                ("a.example".to_owned(), "\"A.example\""),
                ("b.example".to_owned(), "\"b.example\"")
            ]
        );
        let first = config.hosts.values().next().expect("the first");
        assert_eq!(first.len(), 2);
        let wanted = At::unwritten("B.EXAMPLE".parse::<Domain>().expect("a name"));
        assert!(config.hosts.contains_key(&wanted));
    }

    #[test]
    fn every_fault_says_where_it_is_and_what_to_write() {
        let zone = |text: &str| format!("[[zone]]\nprefixes = [\"fd0d::/64\"]\n{text}");
        for (text, place, says) in [
            (
                "prefixes = [\"64:ff9b::/96\", \"64:ff9b::/64\"]",
                "\"64:ff9b::/64\"",
                "overlap",
            ),
            (
                "prefixes = [\"64:ff9b::/96\", \"64:ff9b::/96\"]",
                "\"64:ff9b::/96\"",
                "overlap",
            ),
            ("allow = [\"::/0\"]", "\"::/0\"", "warning: ::/0 lets everyone ask"),
            (
                "forward = { \"a.example\" = [] }",
                "\"a.example\"",
                "forwarded to nobody",
            ),
            (
                "forward = { \"a.example\" = [\"udp://[::1]\"] }",
                "\"udp://[::1]\"",
                "round in circles",
            ),
            ("exclude_a = [\"fd0d::/64\"]", "\"fd0d::/64\"", "no IPv4 network"),
            (
                "exclude_aaaa = [\"192.0.2.0/24\"]",
                "\"192.0.2.0/24\"",
                "no IPv6 network",
            ),
            ("cache_mib = 0", "0", "0 MiB of cache are out of range"),
            ("cache_mib = 1025", "1025", "1025 MiB of cache are out of range"),
            ("max_ttl = \"8d\"", "\"8d\"", "out of range"),
            ("max_ttl = \"500ms\"", "\"500ms\"", "out of range"),
            ("max_negative_ttl = \"2d\"", "\"2d\"", "out of range"),
            ("ca_file = \"ca.pem\"", "\"ca.pem\"", "absolute path"),
            ("rate_limit = { burst = 0 }", "{ burst = 0 }", "burst of 0 seconds"),
            ("rate_limit = { burst = 61 }", "{ burst = 61 }", "burst of 61 seconds"),
            (
                "rate_limit = { all = 1000001 }",
                "{ all = 1000001 }",
                "1000001 answers per second",
            ),
            (
                "[[zone]]\nname = \".\"\nprefixes = [\"fd0d::/64\"]",
                "\".\"",
                "the root is no zone",
            ),
            (
                "[[zone]]\nname = \"bare\"\nprefixes = []",
                "\"bare\"",
                "has no prefixes",
            ),
            (
                "[[zone]]\nname = \"a\"\nprefixes = [\"192.0.2.0/24\"]",
                "\"192.0.2.0/24\"",
                "no IPv6 network",
            ),
            (
                "[[zone]]\nname = \"a\"\nprefixes = [\"fd0d::/63\"]",
                "\"fd0d::/63\"",
                "does not end at a digit",
            ),
            (
                "[[zone]]\nname = \"a\"\nprefixes = [\"fd0d::/64\", \"fd0d::/60\"]",
                "\"fd0d::/60\"",
                "overlaps fd0d::/64 of zone \"a\"",
            ),
            (
                "[[zone]]\nname = \"a\"\nprefixes = [\"fd0d::/64\"]\n[[zone]]\nname = \"b.a\"\nprefixes = [\"fd0e::/64\"]",
                "\"b.a\"",
                "lies in another zone",
            ),
            (&zone("ttl = \"100y\""), "\"100y\"", "out of range"),
            (&zone("negative_ttl = \"0s\""), "\"0s\"", "out of range"),
            (
                &zone("hosts = { \"a\" = [\"fd0d::2\"] }\naliases = { \"a\" = \"edge\" }"),
                "\"a\"",
                "an alias stands alone",
            ),
            (
                &zone("hosts = { \".\" = [\"fd0d::2\"] }"),
                "\".\"",
                "the zone's own name has the records",
            ),
            (
                &zone("hosts = { \"nas.fleet\" = [\"fd0d::2\"] }"),
                "\"nas.fleet\"",
                "would be \"nas.fleet.fleet\"",
            ),
            (
                &format!("forward = {{ \"fleet\" = [\"udp://192.0.2.54\"] }}\n{}", zone("")),
                "\"fleet\"",
                "nothing would be forwarded",
            ),
            (
                &zone("hosts = { \"*\" = [\"fd0d::2\"] }"),
                "\"*\"",
                "cannot have a static AAAA",
            ),
        ] {
            let text = format!("{GOOD}{text}");
            let mut faults = parse(&text).check();
            faults.retain(|fault| !fault.message.contains("no address of `listen`"));
            let [fault] = faults.as_slice() else {
                panic!("{text}: {faults:?}")
            };
            let message = if fault.warning {
                format!("warning: {}", fault.message)
            } else {
                fault.message.clone()
            };
            assert!(message.contains(says), "{text}: {message}");
            assert_eq!(&text[fault.span.clone()], place, "{text}");
            assert!(!fault.help.is_empty());
            assert_eq!(fault.warning, says.starts_with("warning"), "{text}");
        }
        for (listen, warns) in [("[::1]:53", true), ("[::]:53", true), ("[fd0d::1]:53", false)] {
            let text = format!(
                "listen = [\"{listen}\"]\nupstreams = [\"udp://192.0.2.53\"]\n{}",
                zone("")
            );
            let faults = parse(&text).check();
            assert!(faults.iter().all(|fault| fault.warning), "{faults:?}");
            assert_eq!(
                !faults.is_empty(),
                warns,
                "{listen}: a node could take the edge's address"
            );
            let told = format!("{text}addresses = [\"fd0d::1\"]\n");
            assert_eq!(parse(&told).check(), [], "{listen}");
        }
        let long = "a.".repeat(126);
        let text = format!("{GOOD}{}", zone(&format!("hosts = {{ \"{long}\" = [\"fd0d::2\"] }}")));
        let faults = parse(&text).check();
        assert!(
            faults.iter().any(|fault| fault.message.contains("too long")),
            "{faults:?}"
        );
    }

    #[test]
    fn listeners_are_checked_and_none_is_its_own_upstream() {
        let faults = |text: &str| -> Vec<String> {
            let faults = parse(text).check();
            faults
                .into_iter()
                .map(|fault| format!("{} {}", &text[fault.span], fault.message))
                .collect()
        };
        let up = "upstreams = [\"udp://192.0.2.53\"]";
        for (listen, says) in [
            ("\"[::1]:0\"", "\"[::1]:0\" port 0"),
            ("\"[::ffff:192.0.2.1]:53\"", "in IPv6 clothes"),
            ("\"[::1]:53\", \"[::1]:53\"", "already the listener"),
        ] {
            let found = faults(&format!("listen = [{listen}]\n{up}"));
            assert!(found.len() == 1 && found[0].contains(says), "{found:?}");
        }
        let found = faults("listen = [\"[::1]:53\"]");
        assert!(found.len() == 1 && found[0].contains("no upstreams"), "{found:?}");
        for (listen, upstream, own) in [
            ("[::1]:53", "udp://[::1]", true),
            ("[::1]:53", "udp://[::1]:5353", false),
            ("[::]:53", "tcp://127.0.0.1", true),
            ("0.0.0.0:53", "udp://127.0.0.1", true),
            ("127.0.0.1:853", "tls://127.0.0.1#dns.example", true),
            ("127.0.0.1:53", "tls://127.0.0.1#dns.example", false),
        ] {
            let found = faults(&format!("listen = [\"{listen}\"]\nupstreams = [\"{upstream}\"]"));
            assert_eq!(!found.is_empty(), own, "{listen} {upstream}: {found:?}");
        }
    }

    #[test]
    fn what_has_no_form_is_refused_where_it_stands() {
        for (text, place) in [
            ("listen = [\"somewhere\"]", "\"somewhere\""),
            (
                "listen = [\"[::1]:53\"]\nprefixes = [\"64:ff9b::/95\"]",
                "\"64:ff9b::/95\"",
            ),
            (
                "listen = [\"[::1]:53\"]\nupstreams = [\"192.0.2.53\"]",
                "\"192.0.2.53\"",
            ),
            ("listen = [\"[::1]:53\"]\nallow = [\"all\"]", "\"all\""),
            ("listen = [\"[::1]:53\"]\nforward = { \"a..b\" = [] }", "\"a..b\""),
            ("listen = [\"[::1]:53\"]\nexclude_names = [\"\"]", "\"\""),
            ("listen = [\"[::1]:53\"]\nmax_ttl = \"soon\"", "\"soon\""),
            ("listen = []", "[]"),
            (
                "listen = [\"[::1]:53\"]\nhosts = { nas = [], NAS = [] }",
                "{ nas = [], NAS = [] }",
            ),
            (
                "listen = [\"[::1]:53\"]\n[[zone]]\nprefixes = []\naliases = { a = \"b\", A = \"c\" }",
                "{ a = \"b\", A = \"c\" }",
            ),
            ("listen = [\"[::1]:53\"]\nunknown = 1", "unknown"),
            ("listen = [\"[::1]:53\"]\nrate_limit = { sme = 1 }", "sme"),
            ("listen = [\"[::1]:53\"]\n[[zone]]\nprefix = []", "prefix"),
        ] {
            let error = toml::from_str::<Config>(text).expect_err(text);
            let span = error.span().expect("a place");
            assert!(text[span].contains(place), "{error}");
        }
        assert!(toml::from_str::<Config>("prefixes = []").is_err(), "listen is missing");
        let label = "a".repeat(64);
        for bad in ["", "a..b", label.as_str(), &"a.".repeat(128)] {
            assert!(bad.parse::<Domain>().is_err(), "{bad}");
        }
        assert_eq!(
            "Example.ORG.".parse::<Domain>().expect("a name").to_string(),
            "example.org"
        );
        assert_eq!(".".parse::<Domain>().expect("the root").to_string(), ".");
    }

    #[test]
    fn the_schema_has_every_key_with_its_explanation() {
        let schema = serde_json::to_value(schemars::schema_for!(Config)).expect("JSON");
        let properties = schema["properties"].as_object().expect("keys");
        for key in [
            "listen",
            "prefixes",
            "forward",
            "hosts",
            "zone",
            "rate_limit",
            "stale",
            "ca_file",
        ] {
            let property = &properties[key];
            assert!(
                property["description"].as_str().is_some_and(|text| text.len() > 20),
                "{key}: {property}"
            );
        }
        assert_eq!(schema["required"], serde_json::json!(["listen"]));
        assert_eq!(schema["additionalProperties"], serde_json::json!(false));
        let text = schema.to_string();
        assert!(text.contains("(32|40|48|56|64|96)"), "the form of a prefix");
    }

    fn parse(text: &str) -> Config {
        toml::from_str(text).expect(text)
    }
}

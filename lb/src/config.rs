//! The `[lb]` section: its types, its defaults and the rules that its values keep.
//!
//! Parsing refuses unknown keys and malformed values; [`Config::check`] refuses what is well-formed but cannot work.
//! Every value that can be at fault carries its place in the file ([`At`]), so that a message can show the line.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    str::FromStr,
    time::Duration,
};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, de};
use settings::string_schema;
pub use settings::{At, Cidr, Fault, Faults, Span, Timeout};

/// TCP load balancing: frontends, their backends, and the health endpoint.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where `GET /healthz` is answered: 200 while an API backend is healthy, else 503. Default: nowhere.
    #[serde(default)]
    pub health: Vec<At<SocketAddr>>,
    /// Sources that may ask the health endpoint, as CIDRs. Default: everyone who can reach it.
    #[serde(default)]
    pub health_allow: Vec<At<Cidr>>,
    /// The health endpoint tells of this backend alone: `HOST:PORT`, as among the backends. Default: of any API backend.
    #[serde(default)]
    pub health_backend: Option<At<Address>>,
    /// Data threads; each has its own listener socket (SO_REUSEPORT). Default: one per core.
    #[serde(default)]
    pub threads: Option<At<u16>>,
    /// One listener group and its backends.
    #[serde(default)]
    pub frontend: Vec<At<Frontend>>,
}

/// One listener group and its backends.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Frontend {
    /// Its name in status, metrics and commands: letters, digits, `-` and `_`.
    pub name: At<String>,
    /// What is balanced; sets the defaults of `idle_timeout`, `on_down` and `shed`. Default: "tcp".
    #[serde(default)]
    pub kind: Kind,
    /// Addresses to accept on. IPv4 and IPv6 are separate listeners.
    pub listen: Vec<At<SocketAddr>>,
    /// How a backend is chosen among the healthy ones. Default: "least-connections".
    #[serde(default)]
    pub balance: Balance,
    /// How long one backend may take to accept a connection before the next one is tried. Default: 1s.
    #[serde(default)]
    pub connect_timeout: Option<At<Span>>,
    /// Sessions without a byte in either direction for this long are closed. Default: "none" for api, "10m" for tcp, "1h" for ingress.
    #[serde(default)]
    pub idle_timeout: Option<At<Timeout>>,
    /// After one side has closed its sending half, how long the other may stay silent. Default: 30s.
    #[serde(default)]
    pub half_close_timeout: Option<At<Span>>,
    /// What happens to the sessions of a backend that goes down. Default: "reset" for api, "keep" otherwise.
    #[serde(default)]
    pub on_down: Option<OnDown>,
    /// Where connections go: `"[fd00::11]:6443"`, or `{ address = "cp3.fleet:6443", weight = 5, backup = true }`.
    pub backends: At<Vec<At<Backend>>>,
    /// The PROXY header that each connection to a backend begins with, so that it learns the client's address. Default: none.
    #[serde(default)]
    pub proxy_protocol: Option<At<ProxyVersion>>,
    /// Bytes that a version 2 header may take, 107 to 536. The name a TLS client asks for is told where it fits. More than
    /// 107 only if the backends take it: nginx before 1.23.2 does not. Default: 107.
    #[serde(default)]
    pub proxy_header_limit: Option<At<u16>>,
    /// Connections begin with a PROXY header, which names the client. Default: they do not.
    #[serde(default)]
    pub accept_proxy: Option<At<AcceptProxy>>,
    /// When a backend is silent for this long on a connect, the next one is tried at the same time and the first to
    /// accept wins; or "none". Default: 250ms.
    #[serde(default)]
    pub hedge: Option<At<Timeout>>,
    /// Moves surplus sessions off loaded backends after another one has come back; not with balance "source". Default:
    /// true for api, else false.
    #[serde(default)]
    pub shed: Option<At<bool>>,
    /// Who may connect, and how much.
    #[serde(default)]
    pub limits: Limits,
    /// When a backend is healthy.
    #[serde(default)]
    pub health: Health,
}

/// A version of the PROXY protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ProxyVersion {
    /// One line of text.
    V1,
    /// Binary, with TLVs.
    V2,
}

/// Whose connections begin with a PROXY header.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AcceptProxy {
    /// The proxies in front of this listener, as CIDRs; connections from elsewhere are refused.
    pub from: At<Vec<At<Cidr>>>,
    /// What is done about a missing header. Default: "required".
    #[serde(default)]
    pub mode: AcceptMode,
    /// How long the whole header may take. Default: 3s.
    #[serde(default)]
    pub timeout: Option<At<Span>>,
}

/// What is done about a missing PROXY header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum AcceptMode {
    /// The connection is refused. There is no mode that guesses: a client could write itself a header.
    #[default]
    Required,
}

/// Who may connect, and how much. A client is judged by its address, IPv4 mapped into IPv6 as the IPv4 address it is;
/// behind `accept_proxy` by the one its header names.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Sessions at the same time. Default: no limit.
    #[serde(default)]
    pub sessions: Option<At<u32>>,
    /// Connections per second from one source: an IPv4 address or an IPv6 /64. Default: no limit.
    #[serde(default)]
    pub source_rate: Option<At<u32>>,
    /// Connections at once from a source that was quiet. Default: twice `source_rate`.
    #[serde(default)]
    pub source_burst: Option<At<u32>>,
    /// Sessions of one source at the same time. Default: no limit.
    #[serde(default)]
    pub source_sessions: Option<At<u32>>,
    /// Networks (CIDR) that may connect. Default: everyone.
    #[serde(default)]
    pub allow: Vec<At<Cidr>>,
    /// Networks (CIDR) that may not, even if `allow` has them. Default: none.
    #[serde(default)]
    pub deny: Vec<At<Cidr>>,
}

/// What a frontend balances.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Kubernetes API servers: no idle cut (watches are quiet), sessions of a down backend are reset.
    Api,
    /// Web traffic for the cluster's ingress: idle cut after 1 h.
    Ingress,
    /// Any other TCP service: idle cut after 10 min.
    #[default]
    Tcp,
}

/// How a backend is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Balance {
    /// The fewest sessions by weight.
    #[default]
    LeastConnections,
    /// Smooth weighted round robin.
    RoundRobin,
    /// Rendezvous hash of the client's address: the same client stays, a lost backend moves only its own clients.
    Source,
    /// The less loaded of two drawn at random.
    RandomTwo,
}

/// What happens to the sessions of a backend that goes down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OnDown {
    /// Reset within half a second, spread at random, so that clients go to a live backend.
    Reset,
    /// Left to keepalive and the peers.
    Keep,
}

/// One place connections go to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    /// Address or name, with port.
    pub address: Address,
    /// Share of the connections, 1 to 256. Default: 1.
    pub weight: u16,
    /// Used only while no other backend is healthy. Default: false.
    pub backup: bool,
}

/// `HOST:PORT`, where the host is an IP address or a DNS name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Address {
    /// A fixed address.
    Ip(SocketAddr),
    /// A name, resolved again as its records expire; while it does not resolve the backend is down.
    Name {
        /// The DNS name, without the port.
        host: String,
        /// The TCP port.
        port: u16,
    },
}

/// When a backend is healthy.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Health {
    /// Failed connects within `fail_timeout` that ban a backend; 0 switches passive health off. Default: 2.
    #[serde(default)]
    pub max_fails: Option<At<u32>>,
    /// The window in which failures are counted, and how long the first ban lasts. Default: 10s.
    #[serde(default)]
    pub fail_timeout: Option<At<Span>>,
    /// The longest ban: each ban in a row is twice as long as the one before. Only for profile "sliding"; nginx's bans
    /// stay as long as they are. Default: 60s, or `fail_timeout` if that is longer.
    #[serde(default)]
    pub max_ban: Option<At<Span>>,
    /// How long a backend that was out and comes back takes to get its full share of the connections; or "none". Default: 30s,
    /// "none" with nginx's profiles.
    #[serde(default)]
    pub slow_start: Option<At<Timeout>>,
    /// Sets what is not set here. Default: "sliding".
    #[serde(default)]
    pub profile: Profile,
    /// Checks made by the balancer itself. Default: none.
    #[serde(default)]
    pub active: Option<At<Active>>,
}

/// A named set of health rules.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Profile {
    /// A true sliding window: 2 failures in 10 s.
    #[default]
    Sliding,
    /// nginx's counter to the letter: 1 failure, 10 s, whole seconds.
    Nginx,
    /// What the k8s-master-lb image ships: nginx's counter, 1 failure, 5 s; without its 3 s idle cut.
    K8sMasterLb,
}

/// Checks made by the balancer itself.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Active {
    /// What is checked.
    pub kind: CheckKind,
    /// The path asked for by an https check. Default: "/readyz".
    #[serde(default)]
    pub path: Option<At<String>>,
    /// Time between two checks, spread by 20 %. Default: 2s.
    #[serde(default)]
    pub interval: Option<At<Span>>,
    /// Time one check may take. Default: 1s.
    #[serde(default)]
    pub timeout: Option<At<Span>>,
    /// Good checks in a row that bring a backend up. Default: 2.
    #[serde(default)]
    pub rise: Option<At<u32>>,
    /// Bad checks in a row that take a backend down. Default: 3.
    #[serde(default)]
    pub fall: Option<At<u32>>,
    /// The CA (PEM) that signed the backends' certificates; required for https.
    #[serde(default)]
    pub ca_file: Option<At<PathBuf>>,
    /// The name the certificate must carry. Default: the backend's own host or address.
    #[serde(default)]
    pub server_name: Option<At<String>>,
}

/// What an active check does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum CheckKind {
    /// A TCP connect.
    Tcp,
    /// A TLS handshake and `GET path`: 2xx, 401 and 403 are alive, 5xx drains, anything else is a failure.
    Https,
}

/// The rules of passive health with profile and explicit keys folded together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Passive {
    /// Failures that ban; 0 = never.
    pub max_fails: u32,
    /// Window and length of the first ban.
    pub fail_timeout: Duration,
    /// Length of the longest ban; not for nginx's counter, whose bans are all `fail_timeout`.
    pub max_ban: Duration,
    /// nginx's counter instead of the sliding window.
    pub nginx: bool,
}

impl Frontend {
    /// A frontend without listeners and backends, all else by default.
    pub fn bare(name: &str) -> Self {
        Self {
            name: At::unwritten(name.to_owned()),
            kind: Kind::default(),
            listen: Vec::new(),
            balance: Balance::default(),
            connect_timeout: None,
            idle_timeout: None,
            half_close_timeout: None,
            on_down: None,
            proxy_protocol: None,
            proxy_header_limit: None,
            accept_proxy: None,
            hedge: None,
            shed: None,
            limits: Limits::default(),
            backends: At::unwritten(Vec::new()),
            health: Health::default(),
        }
    }

    /// Time one backend may take to accept.
    pub fn connect_timeout(&self) -> Duration {
        self.connect_timeout.as_ref().map_or(Duration::from_secs(1), |at| at.0)
    }

    /// Silence after which a session is closed; `None` = never.
    pub fn idle_timeout(&self) -> Option<Duration> {
        match (&self.idle_timeout, self.kind) {
            (Some(at), _) => at.0,
            (None, Kind::Api) => None,
            (None, Kind::Tcp) => Some(Duration::from_secs(600)),
            (None, Kind::Ingress) => Some(Duration::from_secs(3600)),
        }
    }

    /// Silence after which a half-closed session is reset.
    pub fn half_close_timeout(&self) -> Duration {
        self.half_close_timeout
            .as_ref()
            .map_or(Duration::from_secs(30), |at| at.0)
    }

    /// What happens to the sessions of a backend that goes down.
    pub fn on_down(&self) -> OnDown {
        self.on_down.unwrap_or(if self.kind == Kind::Api {
            OnDown::Reset
        } else {
            OnDown::Keep
        })
    }

    /// Bytes that a PROXY header may take.
    pub fn proxy_header_limit(&self) -> u16 {
        self.proxy_header_limit.as_ref().map_or(107, |at| at.value)
    }

    /// Silence of a backend on a connect after which a second one is tried; `None` = never.
    pub fn hedge(&self) -> Option<Duration> {
        self.hedge.as_ref().map_or(Some(Duration::from_millis(250)), |at| at.0)
    }

    /// Whether surplus sessions are moved to a backend that has come back. Never by source hash: the client would come
    /// back to the backend it was moved away from.
    pub fn shed(&self) -> bool {
        let wanted = self.shed.as_ref().map_or(self.kind == Kind::Api, |at| at.value);
        wanted && self.balance != Balance::Source
    }
}

impl AcceptProxy {
    /// Whether `peer` is one of the proxies; an IPv4-mapped address is judged as the IPv4 address it is.
    pub fn trusts(&self, peer: IpAddr) -> bool {
        self.from.iter().any(|network| network.contains(peer))
    }

    /// How long the whole header may take.
    pub fn timeout(&self) -> Duration {
        self.timeout.as_ref().map_or(Duration::from_secs(3), |at| at.0)
    }
}

impl Limits {
    /// Whether each client has to be judged by its address; the number of all sessions is known without.
    pub fn judge_clients(&self) -> bool {
        let Self {
            sessions: _,
            source_rate,
            source_burst: _,
            source_sessions,
            allow,
            deny,
        } = self;
        source_rate.is_some() || source_sessions.is_some() || !allow.is_empty() || !deny.is_empty()
    }

    /// Connections per second of one source and how many it may make at once; `None` = no limit.
    pub fn source_rate(&self) -> Option<(u32, u32)> {
        let rate = self.source_rate.as_ref()?.value;
        let burst = self.source_burst.as_ref().map_or(rate.saturating_mul(2), |at| at.value);
        Some((rate, burst))
    }
}

impl Health {
    /// Profile and explicit keys folded together; explicit keys win.
    pub fn passive(&self) -> Passive {
        let (max_fails, seconds, nginx) = match self.profile {
            Profile::Sliding => (2, 10, false),
            Profile::Nginx => (1, 10, true),
            Profile::K8sMasterLb => (1, 5, true),
        };
        let fail_timeout = self
            .fail_timeout
            .as_ref()
            .map_or(Duration::from_secs(seconds), |at| at.0);
        let max_ban = self.max_ban.as_ref().map_or(Duration::from_secs(60), |at| at.0);
        Passive {
            max_fails: self.max_fails.as_ref().map_or(max_fails, |at| at.value),
            fail_timeout,
            max_ban: if nginx { fail_timeout } else { max_ban.max(fail_timeout) },
            nginx,
        }
    }

    /// How long a backend that comes back takes to get its full share; `None` = no time.
    pub fn slow_start(&self) -> Option<Duration> {
        let usual = (self.profile == Profile::Sliding).then_some(Duration::from_secs(30));
        self.slow_start.as_ref().map_or(usual, |at| at.0)
    }
}

impl Active {
    /// Checks of this kind, all else by default.
    pub const fn new(kind: CheckKind) -> Self {
        Self {
            kind,
            path: None,
            interval: None,
            timeout: None,
            rise: None,
            fall: None,
            ca_file: None,
            server_name: None,
        }
    }

    /// The path an https check asks for.
    pub fn path(&self) -> &str {
        self.path.as_ref().map_or("/readyz", |at| at.as_str())
    }
    /// Time between two checks.
    pub fn interval(&self) -> Duration {
        self.interval.as_ref().map_or(Duration::from_secs(2), |at| at.0)
    }
    /// Time one check may take.
    pub fn timeout(&self) -> Duration {
        self.timeout.as_ref().map_or(Duration::from_secs(1), |at| at.0)
    }
    /// Good checks in a row that bring a backend up.
    pub fn rise(&self) -> u32 {
        self.rise.as_ref().map_or(2, |at| at.value)
    }
    /// Bad checks in a row that take a backend down.
    pub fn fall(&self) -> u32 {
        self.fall.as_ref().map_or(3, |at| at.value)
    }
}

impl Config {
    /// Everything that is well-formed but cannot work, in the order of the file.
    pub fn check(&self) -> Vec<Fault> {
        let mut check = Check(Faults::default());
        let mut names: BTreeMap<&str, ()> = BTreeMap::new();
        let mut listeners: BTreeMap<SocketAddr, String> = BTreeMap::new();
        for at in &self.health {
            check.0.listener(at, "the health endpoint", &mut listeners);
        }
        if let Some(at) = self.threads.as_ref().filter(|at| at.value == 0 || at.value > 64) {
            check.0.error(
                at,
                format!("{} data threads cannot work", at.value),
                "write 1 to 64, or leave the key out for one per core",
            );
        }
        for frontend in &self.frontend {
            check.frontend(frontend, &mut names, &mut listeners);
        }
        let mut backends = self.frontend.iter().flat_map(|frontend| frontend.backends.iter());
        if let Some(at) = &self.health_backend
            && !backends.any(|backend| backend.address == at.value)
        {
            check.0.error(
                at,
                format!(
                    "no frontend has the backend {}: /healthz would always answer 503",
                    at.value
                ),
                "write one of the backends, or remove the key",
            );
        }
        check.0.sorted()
    }
}

/// The largest number that a key of `limits` takes.
const MOST: u32 = 1_000_000;

/// Checks frontends; one method per thing that can be at fault.
struct Check(Faults);

impl Check {
    fn frontend<'a>(
        &mut self,
        frontend: &'a Frontend,
        names: &mut BTreeMap<&'a str, ()>,
        listeners: &mut BTreeMap<SocketAddr, String>,
    ) {
        let name = &frontend.name;
        if name.is_empty()
            || name.len() > 63
            || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_')
        {
            self.0.error(
                name,
                format!("\"{}\" is no frontend name", name.value.escape_debug()),
                "use 1 to 63 letters, digits, \"-\" or \"_\"",
            );
        }
        if names.insert(name, ()).is_some() {
            self.0.error(
                name,
                format!("there are two frontends named \"{}\"", name.value),
                "name them apart: status and commands go by the name",
            );
        }
        if frontend.listen.is_empty() {
            self.0.error(
                name,
                format!("frontend \"{}\" listens nowhere", name.value),
                "add listen = [\"[::1]:16443\", \"127.0.0.1:16443\"]",
            );
        }
        for at in &frontend.listen {
            self.0.listener(at, &format!("frontend \"{}\"", name.value), listeners);
        }
        self.duration(
            frontend.connect_timeout.as_ref(),
            Duration::from_millis(10)..=Duration::from_secs(60),
        );
        self.duration(
            frontend.half_close_timeout.as_ref(),
            Duration::from_secs(1)..=Duration::from_secs(86_400),
        );
        self.idle(frontend);
        self.backends(frontend);
        self.proxy(frontend);
        self.hedge(frontend);
        if let Some(at) = &frontend.shed
            && at.value
            && frontend.balance == Balance::Source
        {
            self.0.warn(
                at,
                "nothing is shed: by source hash a client comes back to the backend it was moved away from",
                "remove the key, or choose another balance",
            );
        }
        self.limits(&frontend.limits);
        self.health(frontend);
    }

    fn proxy(&mut self, frontend: &Frontend) {
        if let Some(at) = frontend.proxy_protocol.as_ref().filter(|_| frontend.kind == Kind::Api) {
            self.0.error(
                at,
                "kube-apiserver cannot parse a PROXY header: it would refuse every connection",
                "remove the key, or write kind = \"ingress\" or \"tcp\" if these are no API servers",
            );
        }
        if let Some(at) = &frontend.proxy_header_limit {
            if !(107..=536).contains(&at.value) {
                self.0
                    .error(at, format!("{} is out of range", at.value), "write 107 to 536");
            } else if frontend.proxy_protocol.as_deref() != Some(&ProxyVersion::V2) {
                self.0.warn(
                    at,
                    "only headers of version 2 have a length to limit: the key changes nothing",
                    "remove the key, or write proxy_protocol = \"v2\"",
                );
            }
        }
        let Some(accept) = &frontend.accept_proxy else { return };
        if accept.from.is_empty() {
            self.0.error(
                &accept.from,
                "nobody may connect: no proxy is trusted",
                "list the proxies in front of this listener: from = [\"192.0.2.0/24\"]",
            );
        }
        for at in accept.from.iter().filter(|at| at.net().prefix_len() == 0) {
            self.0.warn(
                at,
                "anyone may say here who they are: addresses in limits and logs can be forged",
                "list the proxies in front of this listener only",
            );
        }
        self.duration(
            accept.timeout.as_ref(),
            Duration::from_millis(100)..=Duration::from_secs(60),
        );
    }

    fn hedge(&mut self, frontend: &Frontend) {
        let Some(at) = &frontend.hedge else { return };
        let (Some(hedge), timeout) = (at.0, frontend.connect_timeout()) else {
            return;
        };
        if !(Duration::from_millis(10)..=Duration::from_secs(60)).contains(&hedge) {
            self.0.error(
                at,
                format!("{} is out of range", humantime::format_duration(hedge)),
                "write 10ms to 60s, or \"none\"",
            );
        } else if hedge >= timeout {
            self.0.warn(
                at,
                format!(
                    "a second backend is never tried: the first one is given up after the connect_timeout of {}",
                    humantime::format_duration(timeout)
                ),
                "write less than connect_timeout, or \"none\"",
            );
        }
    }

    fn limits(&mut self, limits: &Limits) {
        let Limits {
            sessions,
            source_rate,
            source_burst,
            source_sessions,
            ..
        } = limits;
        for at in [sessions, source_rate, source_burst, source_sessions]
            .into_iter()
            .flatten()
        {
            if at.value == 0 {
                self.0.error(
                    at,
                    "a limit of 0 refuses everyone",
                    "write 1 or more, or remove the key",
                );
            } else if at.value > MOST {
                self.0.error(
                    at,
                    format!("{} is out of range", at.value),
                    format!("write 1 to {MOST}"),
                );
            }
        }
        if let (Some(at), None) = (source_burst, source_rate) {
            self.0.error(
                at,
                "source_burst without source_rate limits nothing",
                "add source_rate = 10, or remove the key",
            );
        }
    }

    fn duration(&mut self, at: Option<&At<Span>>, range: std::ops::RangeInclusive<Duration>) {
        if let Some(at) = at.filter(|at| !range.contains(&at.0)) {
            let (low, high) = (
                humantime::format_duration(*range.start()),
                humantime::format_duration(*range.end()),
            );
            self.0.error(
                at,
                format!("{} is out of range", humantime::format_duration(at.0)),
                format!("write {low} to {high}"),
            );
        }
    }

    fn idle(&mut self, frontend: &Frontend) {
        let Some(at) = &frontend.idle_timeout else { return };
        match at.0 {
            Some(idle) if idle < Duration::from_secs(1) => {
                self.0.error(
                    at,
                    format!("{} cuts sessions in mid-sentence", humantime::format_duration(idle)),
                    "write at least 1s, or \"none\"",
                );
            }
            Some(idle) if frontend.kind == Kind::Api && idle < Duration::from_secs(600) => self.0.warn(
                at,
                format!(
                    "{} cuts quiet watches: every client then lists everything again",
                    humantime::format_duration(idle)
                ),
                "write \"none\"; dead peers are found by keepalive",
            ),
            _ => {}
        }
    }

    fn backends(&mut self, frontend: &Frontend) {
        if frontend.backends.is_empty() {
            self.0.error(
                &frontend.backends,
                format!(
                    "frontend \"{}\" has no backends: every connection would be reset",
                    frontend.name.value
                ),
                "add backends = [\"[fd00::11]:6443\"]",
            );
        }
        let mut seen = BTreeMap::new();
        for at in &frontend.backends.value {
            if !(1..=256).contains(&at.weight) {
                self.0.error(
                    at,
                    format!("weight {} is out of range", at.weight),
                    "write 1 to 256; to send a backend nothing, use edgectl lb drain",
                );
            }
            if at.address.port() == 0 {
                self.0
                    .error(at, "a backend needs a port other than 0", "write HOST:PORT");
            }
            if seen.insert(&at.address, ()).is_some() {
                self.0.error(
                    at,
                    format!("backend {} is listed twice", at.address),
                    "remove one; for a larger share use weight",
                );
            }
            if let Address::Ip(address) = at.address
                && frontend.listen.iter().any(|listen| listen.value == address)
            {
                self.0.error(
                    at,
                    format!("backend {address} is this frontend's own listener: connections would go in circles"),
                    "write the server's address",
                );
            }
        }
    }

    fn bans(&mut self, frontend: &Frontend) {
        let health = &frontend.health;
        let passive = health.passive();
        self.duration(
            health.max_ban.as_ref(),
            Duration::from_secs(1)..=Duration::from_secs(86_400),
        );
        if let Some(at) = &health.max_ban {
            if passive.nginx {
                self.0.warn(
                    at,
                    "nginx's bans do not grow: max_ban changes nothing",
                    "remove the key, or write profile = \"sliding\"",
                );
            } else if at.0 < passive.fail_timeout {
                self.0.error(
                    at,
                    format!(
                        "the longest ban would be shorter than the first, the fail_timeout of {}",
                        humantime::format_duration(passive.fail_timeout)
                    ),
                    "write at least fail_timeout",
                );
            }
        }
        if let Some(at) = health.max_fails.as_ref().filter(|at| at.value > 0)
            && let [only] = frontend.backends.as_slice()
            && matches!(only.address, Address::Ip(_))
        {
            self.0.warn(
                at,
                "a lone backend is never banned: max_fails changes nothing",
                "add a second backend, or remove the key",
            );
        }
    }

    fn health(&mut self, frontend: &Frontend) {
        let health = &frontend.health;
        self.duration(
            health.fail_timeout.as_ref(),
            Duration::from_secs(1)..=Duration::from_secs(3600),
        );
        self.bans(frontend);
        if let Some(at) = &health.slow_start
            && at.0.is_some_and(|ramp| !(1..=3600).contains(&ramp.as_secs()))
        {
            self.0.error(
                at,
                "a backend cannot come back that fast or slowly",
                "write 1s to 1h, or \"none\"",
            );
        }
        let Some(active) = &health.active else { return };
        self.duration(
            active.interval.as_ref(),
            Duration::from_millis(100)..=Duration::from_secs(3600),
        );
        self.duration(
            active.timeout.as_ref(),
            Duration::from_millis(50)..=Duration::from_secs(60),
        );
        for at in [&active.rise, &active.fall]
            .into_iter()
            .flatten()
            .filter(|at| at.value == 0 || at.value > 100)
        {
            self.0.error(
                at,
                format!("{} checks in a row cannot decide anything", at.value),
                "write 1 to 100",
            );
        }
        if let Some(at) = active
            .path
            .as_ref()
            .filter(|at| !at.starts_with('/') || at.contains(|c: char| c.is_ascii_control() || c == ' '))
        {
            self.0.error(
                at,
                format!("\"{}\" is no request path", at.value.escape_debug()),
                "write a path such as \"/readyz\"",
            );
        }
        match active.kind {
            CheckKind::Https if active.ca_file.is_none() => self.0.error(
                active,
                "an https check without ca_file could be answered by anyone",
                "add ca_file = \"/etc/edged/cluster-ca.crt\" (on a control plane: /etc/kubernetes/pki/ca.crt)",
            ),
            CheckKind::Tcp => {
                for (key, at) in [("path", &active.path), ("server_name", &active.server_name)] {
                    if let Some(at) = at {
                        self.0.error(
                            at,
                            format!("a tcp check has no {key}"),
                            "write kind = \"https\", or remove the key",
                        );
                    }
                }
                if let Some(at) = &active.ca_file {
                    self.0.error(
                        at,
                        "a tcp check has no ca_file",
                        "write kind = \"https\", or remove the key",
                    );
                }
            }
            CheckKind::Https => {}
        }
    }
}

impl Address {
    /// The TCP port.
    pub fn port(&self) -> u16 {
        match self {
            Self::Ip(address) => address.port(),
            Self::Name { port, .. } => *port,
        }
    }

    /// The host as a certificate names it.
    pub fn host(&self) -> String {
        match self {
            Self::Ip(address) => address.ip().to_string(),
            Self::Name { host, .. } => host.clone(),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(address) => address.fmt(f),
            Self::Name { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

impl FromStr for Address {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(address) = text.parse::<SocketAddr>() {
            return Ok(Self::Ip(address));
        }
        let bare = text
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'))
            .unwrap_or(text);
        if bare.parse::<IpAddr>().is_ok() {
            return Err(format!(
                "\"{text}\" has no port; write HOST:PORT, an IPv6 address in brackets: \"[fd00::11]:6443\""
            ));
        }
        let (host, port) = text
            .rsplit_once(':')
            .ok_or_else(|| format!("\"{text}\" has no port; write HOST:PORT such as \"cp1.fleet:6443\""))?;
        let port = port
            .parse()
            .map_err(|_| format!("\"{port}\" is no port; write 1 to 65535 after the colon"))?;
        // RFC 1123 §2.1 host names; a name of digits and dots only would be a mistyped IPv4 address.
        let label = |l: &str| {
            (1..=63).contains(&l.len())
                && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
                && !l.starts_with('-')
                && !l.ends_with('-')
        };
        let name = host.strip_suffix('.').unwrap_or(host);
        if name.len() > 253 || !name.split('.').all(label) || name.bytes().all(|b| b.is_ascii_digit() || b == b'.') {
            return Err(format!(
                "\"{host}\" is neither an IP address nor a host name; write \"192.0.2.11:6443\", \"[fd00::11]:6443\" or \"cp1.fleet:6443\""
            ));
        }
        Ok(Self::Name {
            host: name.to_ascii_lowercase(),
            port,
        })
    }
}

impl<'de> Deserialize<'de> for Backend {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Table {
            address: String,
            #[serde(default = "one")]
            weight: u16,
            #[serde(default)]
            backup: bool,
        }
        fn one() -> u16 {
            1
        }
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Backend;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"HOST:PORT\" or { address = \"HOST:PORT\", weight = 1, backup = false }")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Backend, E> {
                Ok(Backend {
                    address: text.parse().map_err(E::custom)?,
                    weight: 1,
                    backup: false,
                })
            }
            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<Backend, A::Error> {
                let table = Table::deserialize(de::value::MapAccessDeserializer::new(map))?;
                let address = table.address.parse().map_err(de::Error::custom)?;
                Ok(Backend {
                    address,
                    weight: table.weight,
                    backup: table.backup,
                })
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

impl JsonSchema for Backend {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Backend".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "One place connections go to.",
            "oneOf": [
                { "type": "string", "description": "HOST:PORT" },
                {
                    "type": "object",
                    "properties": {
                        "address": { "type": "string", "description": "HOST:PORT" },
                        "weight": { "type": "integer", "minimum": 1, "maximum": 256, "default": 1 },
                        "backup": { "type": "boolean", "default": false }
                    },
                    "required": ["address"],
                    "additionalProperties": false
                }
            ]
        })
    }
}

string_schema!(
    Address,
    "Address",
    "HOST:PORT, where the host is an IP address or a DNS name.",
    r"^.+:[0-9]+$"
);

impl<'de> Deserialize<'de> for Address {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Config {
        toml::from_str(text).expect("the example parses")
    }

    fn faults(text: &str) -> Vec<(String, String)> {
        parse(text)
            .check()
            .into_iter()
            .map(|fault| (text[fault.span].to_owned(), fault.message))
            .collect()
    }

    const GOOD: &str = r#"
health = ["[::1]:6080"]
[[frontend]]
name = "api"
kind = "api"
listen = ["[::1]:16443", "127.0.0.1:16443"]
connect_timeout = "1s"
idle_timeout = "none"
backends = ["[fd00::11]:6443", { address = "[fd00::12]:6443", weight = 5 }, { address = "cp3.fleet:6443", backup = true }]
[frontend.health]
max_fails = 2
fail_timeout = "10s"
profile = "sliding"
active = { kind = "https", path = "/readyz", interval = "2s", rise = 2, fall = 3, ca_file = "/etc/ca.crt" }
"#;

    #[test]
    fn the_names_of_the_configuration_are_kept() {
        let config = parse(GOOD);
        assert_eq!(config.check(), []);
        let api = &config.frontend[0];
        assert_eq!(api.balance, Balance::LeastConnections);
        assert_eq!(api.idle_timeout(), None);
        assert_eq!(api.backends[1].weight, 5);
        assert!(api.backends[2].backup);
        assert_eq!(
            api.backends[2].address,
            Address::Name {
                host: "cp3.fleet".into(),
                port: 6443
            }
        );
        assert_eq!(api.on_down(), OnDown::Reset);
        assert_eq!(
            api.health.passive(),
            Passive {
                max_fails: 2,
                fail_timeout: Duration::from_secs(10),
                max_ban: Duration::from_secs(60),
                nginx: false
            }
        );
        assert_eq!(api.hedge(), Some(Duration::from_millis(250)));
        assert!(api.shed());
        assert_eq!(api.health.slow_start(), Some(Duration::from_secs(30)));
        assert_eq!(api.limits.source_rate(), None);
    }

    const INGRESS: &str = r#"
[[frontend]]
name = "https"
kind = "ingress"
listen = ["[::]:443", "0.0.0.0:443"]
backends = ["[fd00::21]:31443", "[fd00::22]:31443"]
proxy_protocol = "v2"
accept_proxy = { from = ["10.0.0.0/8", "fd00::/8"], mode = "required" }
hedge = "none"
shed = true
[frontend.limits]
sessions = 10000
source_rate = 20
source_sessions = 100
deny = ["192.0.2.0/24"]
[frontend.health]
slow_start = "none"
max_ban = "5m"
"#;

    #[test]
    fn the_backend_that_healthz_follows_has_to_be_one() {
        let text = format!("health_backend = \"[fd00::22]:31443\"\n{INGRESS}");
        assert_eq!(faults(&text), []);
        let text = text.replacen("[fd00::22]", "[fd00::23]", 1);
        assert!(faults(&text)[0].1.contains("503"), "{:?}", faults(&text));
    }

    #[test]
    fn an_ingress_names_its_proxies_and_limits() {
        let config = parse(INGRESS);
        assert_eq!(config.check(), []);
        let https = &config.frontend[0];
        assert_eq!(https.idle_timeout(), Some(Duration::from_secs(3600)));
        assert_eq!(https.on_down(), OnDown::Keep);
        assert_eq!(https.proxy_protocol.as_deref(), Some(&ProxyVersion::V2));
        let accept = https.accept_proxy.as_ref().expect("it is there");
        assert_eq!(
            (accept.mode, accept.timeout()),
            (AcceptMode::Required, Duration::from_secs(3))
        );
        assert!(accept.trusts("::ffff:10.1.2.3".parse().expect("an address")));
        assert!(!accept.trusts("192.0.2.1".parse().expect("an address")));
        assert_eq!((https.hedge(), https.shed()), (None, true));
        assert_eq!(https.limits.source_rate(), Some((20, 40)));
        assert_eq!(https.health.slow_start(), None);
        assert_eq!(https.health.passive().max_ban, Duration::from_secs(300));
        let plain = parse(&INGRESS.replace("shed = true", ""));
        assert!(!plain.frontend[0].shed());
    }

    #[test]
    fn what_cannot_work_in_front_of_an_ingress_is_a_fault_and_what_bit_others_a_warning() {
        let one = |from: &str, to: &str| {
            let text = INGRESS.replace(from, to);
            assert_ne!(text, INGRESS, "{from} is in the example");
            let found = parse(&text).check();
            assert_eq!(found.len(), 1, "{to}: {found:?}");
            let fault = found[0].clone();
            (text[fault.span].to_owned(), fault.message, fault.warning)
        };
        let told = |(at, message, warning): (String, String, bool), place: &str, words: &str, is_warning: bool| {
            assert!(at == place && message.contains(words), "{at}: {message}");
            assert_eq!(warning, is_warning, "{message}");
        };
        told(
            one("kind = \"ingress\"", "kind = \"api\""),
            "\"v2\"",
            "kube-apiserver",
            false,
        );
        told(
            one("[\"10.0.0.0/8\", \"fd00::/8\"]", "[]"),
            "[]",
            "no proxy is trusted",
            false,
        );
        told(one("fd00::/8", "::/0"), "\"::/0\"", "forged", true);
        told(
            one("shed = true", "shed = true\nbalance = \"source\""),
            "true",
            "nothing is shed",
            true,
        );
        told(
            one("mode = \"required\"", "timeout = \"2m\""),
            "\"2m\"",
            "out of range",
            false,
        );
        told(one("hedge = \"none\"", "hedge = \"1s\""), "\"1s\"", "never tried", true);
        told(
            one("hedge = \"none\"", "hedge = \"1ms\""),
            "\"1ms\"",
            "out of range",
            false,
        );
        told(
            one("hedge = \"none\"", "proxy_header_limit = 60"),
            "60",
            "out of range",
            false,
        );
        told(
            one(
                "proxy_protocol = \"v2\"",
                "proxy_protocol = \"v1\"\nproxy_header_limit = 200",
            ),
            "200",
            "changes nothing",
            true,
        );
        told(
            one("sessions = 10000\n", "sessions = 0\n"),
            "0",
            "refuses everyone",
            false,
        );
        told(
            one("source_rate = 20", "source_burst = 7"),
            "7",
            "without source_rate",
            false,
        );
        told(
            one("max_ban = \"5m\"", "max_ban = \"5s\""),
            "\"5s\"",
            "shorter than the first",
            false,
        );
        told(
            one("max_ban = \"5m\"", "max_ban = \"5m\"\nprofile = \"nginx\""),
            "\"5m\"",
            "do not grow",
            true,
        );
        told(
            one("slow_start = \"none\"", "slow_start = \"2h\""),
            "\"2h\"",
            "that fast",
            false,
        );
        let text = INGRESS.replace(", \"[fd00::22]:31443\"", "") + "max_fails = 3\n";
        assert!(faults(&text)[0].1.contains("a lone backend"), "{:?}", faults(&text));
    }

    #[test]
    fn explicit_keys_win_over_the_profile() {
        let of = |health: &str| {
            let text = format!(
                "[[frontend]]\nname='a'\nlisten=['[::1]:1']\nbackends=['[::2]:1']\n[frontend.health]\n{health}"
            );
            let passive = parse(&text).frontend[0].health.passive();
            (passive.max_fails, passive.fail_timeout.as_secs(), passive.nginx)
        };
        assert_eq!(of(""), (2, 10, false));
        assert_eq!(of("profile='nginx'"), (1, 10, true));
        assert_eq!(of("profile='k8s-master-lb'"), (1, 5, true));
        assert_eq!(of("profile='k8s-master-lb'\nmax_fails=3"), (3, 5, true));
        assert_eq!(of("profile='nginx'\nfail_timeout='7s'"), (1, 7, true));
    }

    #[test]
    fn a_fault_points_at_its_own_words() {
        let one = |from: &str, to: &str| {
            let text = GOOD.replace(from, to);
            assert_ne!(text, GOOD, "{from} is in the example");
            let found = faults(&text);
            assert_eq!(found.len(), 1, "{to}: {found:?}");
            found[0].clone()
        };
        assert_eq!(one("\"127.0.0.1:16443\"", "\"[::1]:6080\"").0, "\"[::1]:6080\"");
        assert_eq!(
            one("\"127.0.0.1:16443\"", "\"[::ffff:127.0.0.1]:16443\"").0,
            "\"[::ffff:127.0.0.1]:16443\""
        );
        assert!(one("name = \"api\"", "name = \"a b\"").1.contains("no frontend name"));
        assert!(one("weight = 5", "weight = 0").1.contains("weight 0"));
        assert!(one("[fd00::12]:6443", "[fd00::11]:6443").1.contains("listed twice"));
        assert!(one("[fd00::12]:6443", "[::1]:16443").1.contains("in circles"));
        assert!(one(", ca_file = \"/etc/ca.crt\"", "").1.contains("without ca_file"));
        assert!(
            one("\"https\", path = \"/readyz\"", "\"https\", path = \"readyz\"")
                .1
                .contains("no request path")
        );
        assert!(
            one("idle_timeout = \"none\"", "idle_timeout = \"3s\"")
                .1
                .contains("quiet watches")
        );
        assert!(
            one("connect_timeout = \"1s\"", "connect_timeout = \"2h\"")
                .1
                .contains("out of range")
        );
    }

    #[test]
    fn a_frontend_without_backends_is_refused() {
        let found = faults("[[frontend]]\nname='a'\nlisten=['[::1]:1']\nbackends=[]\n");
        assert_eq!(found[0].0, "[]");
        assert!(found[0].1.contains("no backends"));
    }

    #[test]
    fn addresses_are_read_with_a_reason_when_they_cannot_be() {
        assert!("cp1.fleet:6443".parse::<Address>().is_ok());
        for (text, reason) in [
            ("fd00::11", "no port"),
            ("[fd00::11]", "no port"),
            ("cp1", "no port"),
            ("cp1:http", "no port;"),
            ("300.1.1.1:6443", "neither an IP"),
            ("-cp1:6443", "neither an IP"),
            (":6443", "neither an IP"),
        ] {
            let message = text.parse::<Address>().expect_err(text);
            assert!(
                message.contains(reason.trim_end_matches(';')) || message.contains("is no port"),
                "{text}: {message}"
            );
        }
    }
}

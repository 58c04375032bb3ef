//! RFC 6146 and what else a stateful translator owes its users, on a virtual clock; each test names what it shows.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, Ipv6Addr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use super::{
    Filtering, Fixed, Lifetimes, Policy, PoolRange, Probe, Protocol, SessionView, Stateful, Table, TcpState,
    records::zeros,
};
use crate::{
    Pref64,
    nat64::{
        DropReason, Ends, Exit, Flow, Mapper, Ports, Problem, Quotation, Refusal,
        ip::protocol,
        testing::{Random, ip4, ip6},
    },
};

const SYN: u8 = 0x02;
const SYN_ACK: u8 = 0x12;
const ACK: u8 = 0x10;
const FIN: u8 = 0x11;
const RST: u8 = 0x04;
const POOL: &str = "203.0.113.7";
const SERVER: &str = "198.51.100.80";
const NODE: &str = "2001:db8:1::10";
const SECOND: u64 = 1000;
const MINUTE: u64 = 60 * SECOND;

/// A translator without packets.
struct World {
    table: Arc<Mutex<Table>>,
    memory: &'static [AtomicU64],
    bindings: usize,
    sessions: usize,
    now: u64,
}

type Answer<A> = Result<(A, u16), DropReason>;

fn policy() -> Policy {
    Policy {
        prefix: "2001:db8:64::/96".parse().expect("a prefix"),
        pool: vec![range(POOL, 61_001, 65_535)],
        fixed: Vec::new(),
        clients: vec!["2001:db8:1::/48".parse().expect("a net")],
        filtering: Filtering::EndpointIndependent,
        inbound_new: false,
        denied: vec!["198.51.100.254/32".parse().expect("a net")],
        // Documentation is not global either.
        allow_private: vec!["198.51.100.0/24".parse().expect("a net")],
        reporter_v6: ip6("2001:db8:1::1"),
        host_bits: 128,
        bindings_per_host: 500,
        sessions_per_host: 1000,
        new_per_second: 100,
        lifetimes: Lifetimes::default(),
    }
}

fn range(address: &str, first: u16, last: u16) -> PoolRange {
    PoolRange {
        address: ip4(address),
        ports: first..=last,
    }
}

impl World {
    fn new() -> Self {
        Self::of(policy())
    }

    fn of(policy: Policy) -> Self {
        Self::sized(policy, 20_000, 20_000)
    }

    fn sized(policy: Policy, bindings: usize, sessions: usize) -> Self {
        let memory = zeros(Table::words(bindings, sessions));
        let now = 5 * MINUTE;
        let table = Table::new(policy, memory, bindings, sessions, [1, 2], now).expect("room");
        Self {
            table: Arc::new(Mutex::new(table)),
            memory,
            bindings,
            sessions,
            now,
        }
    }

    /// What another process makes of the memory.
    fn again(&self, policy: Policy) -> Self {
        let table = Table::new(policy, self.memory, self.bindings, self.sessions, [3, 4], self.now).expect("room");
        Self {
            table: Arc::new(Mutex::new(table)),
            ..*self
        }
    }

    fn mapper(&self) -> Stateful {
        Stateful::new(Arc::clone(&self.table), self.now)
    }

    fn prefix(&self) -> Pref64 {
        self.table.lock().expect("a lock").policy().prefix
    }

    /// From a host to IPv4: as what it is seen.
    fn out(&self, number: u8, flags: u8, host: (&str, u16), remote: (&str, u16)) -> Result<(Ipv4Addr, u16), Refusal> {
        let ports = match number {
            protocol::ICMPV6 => Ports::Echo {
                id: host.1,
                reply: false,
            },
            _ => Ports::Pair {
                source: host.1,
                destination: remote.1,
            },
        };
        match self.send(number, flags, ip6(host.0), ip4(remote.0), ports)? {
            Exit::V4(Ends {
                source,
                destination,
                ports,
            }) => {
                assert_eq!(destination, ip4(remote.0));
                Ok((source, port_sent(ports)))
            }
            Exit::V6(ends) => panic!("turned back: {ends:?}"),
        }
    }

    fn send(
        &self,
        number: u8,
        flags: u8,
        host: Ipv6Addr,
        remote: Ipv4Addr,
        ports: Ports,
    ) -> Result<Exit<Ends<Ipv4Addr>, Ends<Ipv6Addr>>, Refusal> {
        self.mapper().to_v4(&Flow {
            ends: Ends {
                source: host,
                destination: self.prefix().embed(remote),
                ports,
            },
            protocol: number,
            tcp_flags: flags,
            fragment: None,
        })
    }

    /// From IPv4: which host gets it.
    fn back(
        &self,
        number: u8,
        flags: u8,
        remote: (&str, u16),
        ours: (Ipv4Addr, u16),
    ) -> Result<(Ipv6Addr, u16), Refusal> {
        let ports = match number {
            protocol::ICMP => Ports::Echo {
                id: ours.1,
                reply: true,
            },
            _ => Ports::Pair {
                source: remote.1,
                destination: ours.1,
            },
        };
        let ends = self.mapper().to_v6(&Flow {
            ends: Ends {
                source: ip4(remote.0),
                destination: ours.0,
                ports,
            },
            protocol: number,
            tcp_flags: flags,
            fragment: None,
        })?;
        assert_eq!(ends.source, self.prefix().embed(ip4(remote.0)));
        let port = match ends.ports {
            Ports::Pair { source, destination } => {
                assert_eq!(source, remote.1);
                destination
            }
            Ports::Echo { id, .. } => id,
            Ports::None => panic!("no ports"),
        };
        Ok((ends.destination, port))
    }

    fn udp(&self, port: u16) -> (Ipv4Addr, u16) {
        self.out(protocol::UDP, 0, (NODE, port), (SERVER, 53))
            .expect("a binding")
    }

    /// A connection from NODE and that port to SERVER and port 443, established.
    fn connect(&self, port: u16) -> (Ipv4Addr, u16) {
        let ours = self.tcp(SYN, port).expect("a binding");
        self.tcp_back(SYN_ACK, ours).expect("the way back");
        ours
    }

    fn tcp(&self, flags: u8, port: u16) -> Answer<Ipv4Addr> {
        self.out(protocol::TCP, flags, (NODE, port), (SERVER, 443))
            .map_err(|refusal| refusal.reason)
    }

    fn tcp_back(&self, flags: u8, ours: (Ipv4Addr, u16)) -> Answer<Ipv6Addr> {
        self.back(protocol::TCP, flags, (SERVER, 443), ours)
            .map_err(|refusal| refusal.reason)
    }

    /// Goes on by `time`, second by second as a process does; whom the table wants probed.
    fn pass(&mut self, time: u64) -> Vec<Probe> {
        let end = self.now + time;
        let mut probes = Vec::new();
        while self.now < end {
            self.now = end.min(self.now + SECOND);
            let mut table = self.table.lock().expect("a lock");
            while table.expire(self.now, 100, |probe| probes.push(probe)) {}
        }
        probes
    }

    fn counts(&self) -> (u64, u64) {
        let counts = self.table.lock().expect("a lock").counts();
        (counts.bindings, counts.sessions)
    }

    fn all(&self) -> Vec<SessionView> {
        let mut all = Vec::new();
        let table = self.table.lock().expect("a lock");
        let mut from = Some(0);
        while let Some(next) = from {
            from = table.sessions(self.now, next, 7, |session| all.push(session));
        }
        all
    }

    fn state(&self) -> Option<TcpState> {
        self.all().first().and_then(|session| session.state)
    }
}

fn port_sent(ports: Ports) -> u16 {
    match ports {
        Ports::Pair { source, .. } => source,
        Ports::Echo { id, .. } => id,
        Ports::None => panic!("no ports"),
    }
}

fn reason<T: std::fmt::Debug>(result: Result<T, Refusal>) -> DropReason {
    result.expect_err("a refusal").reason
}

#[test]
fn rfc6146_section_3_1_each_protocol_has_bindings_of_its_own_that_live_as_long_as_their_sessions() {
    let mut world = World::new();
    for number in [protocol::TCP, protocol::UDP, protocol::ICMPV6] {
        world.out(number, SYN, (NODE, 7000), (SERVER, 7)).expect("a binding");
    }
    assert_eq!(world.counts(), (3, 3));
    let protocols: BTreeSet<Protocol> = world.all().iter().map(|session| session.binding.protocol).collect();
    assert_eq!(protocols, Protocol::ALL.into());
    world
        .out(protocol::UDP, 0, (NODE, 7000), (SERVER, 8))
        .expect("another session");
    assert_eq!(world.counts(), (3, 4));
    world.pass(4 * MINUTE);
    world.out(protocol::UDP, 0, (NODE, 7000), (SERVER, 8)).expect("renewed");
    world.pass(2 * MINUTE);
    assert_eq!(world.counts(), (1, 1), "the second session keeps the binding");
    world.pass(4 * MINUTE);
    assert_eq!(world.counts(), (0, 0));
}

#[test]
fn rfc4787_req_1_a_port_of_a_host_is_seen_as_the_same_by_all() {
    let world = World::new();
    let seen: BTreeSet<_> = [("198.51.100.1", 53), ("198.51.100.2", 53), ("198.51.100.2", 54)]
        .map(|remote| world.out(protocol::UDP, 0, (NODE, 4000), remote).expect("a binding"))
        .into();
    assert_eq!(seen.len(), 1);
    assert_eq!(world.counts(), (1, 3));
}

#[test]
fn rfc6146_section_3_5_1_endpoint_independent_filtering_lets_any_remote_answer_by_udp() {
    let world = World::new();
    let ours = world.udp(4000);
    assert_eq!(
        world.back(protocol::UDP, 0, ("198.51.100.99", 9), ours),
        Ok((ip6(NODE), 4000))
    );
    assert_eq!(world.counts(), (1, 2));
    assert_eq!(
        reason(world.back(protocol::UDP, 0, ("10.1.2.3", 9), ours)),
        DropReason::Forbidden,
        "nobody that the host could not answer"
    );
}

#[test]
fn rfc6146_section_3_5_1_2_address_dependent_filtering_lets_only_known_addresses_in_and_tells_others() {
    let mut world = World::of(Policy {
        filtering: Filtering::AddressDependent,
        ..policy()
    });
    let ours = world.udp(4000);
    let stranger = world.back(protocol::UDP, 0, ("198.51.100.99", 53), ours);
    assert_eq!(stranger, Err(Refusal::told(DropReason::Filtered, Problem::Prohibited)));
    assert!(
        world.back(protocol::UDP, 0, (SERVER, 9), ours).is_ok(),
        "another port of the same"
    );
    world.pass(4 * MINUTE);
    world.udp(4000);
    world.pass(2 * MINUTE);
    assert_eq!(world.counts().1, 1, "the other port's session has ended");
    assert!(world.back(protocol::UDP, 0, (SERVER, 10), ours).is_ok());
    world.pass(6 * MINUTE);
    let ours = world
        .out(protocol::UDP, 0, (NODE, 4000), ("198.51.100.99", 1))
        .expect("a binding");
    assert_eq!(
        reason(world.back(protocol::UDP, 0, (SERVER, 53), ours)),
        DropReason::Filtered
    );
}

#[test]
fn rfc4787_req_2_all_that_a_host_sends_comes_from_one_address() {
    let world = World::of(Policy {
        pool: vec![range(POOL, 1024, 65_535), range("203.0.113.8", 1024, 65_535)],
        ..policy()
    });
    let mut by_host: BTreeMap<String, BTreeSet<Ipv4Addr>> = BTreeMap::new();
    for host in 0..40 {
        let name = format!("2001:db8:1::{host:x}");
        for port in 0..30 {
            for number in [protocol::TCP, protocol::UDP, protocol::ICMPV6] {
                let (address, _) = world
                    .out(number, SYN, (&name, 5000 + port), (SERVER, 80))
                    .expect("a binding");
                by_host.entry(name.clone()).or_default().insert(address);
            }
        }
    }
    assert!(by_host.values().all(|addresses| addresses.len() == 1));
    let all: BTreeSet<Ipv4Addr> = by_host.into_values().flatten().collect();
    assert_eq!(all.len(), 2, "and hosts are spread over both");
}

#[test]
fn rfc6146_section_3_5_1_1_no_two_hosts_have_one_port() {
    let world = World::of(Policy {
        pool: vec![range(POOL, 1024, 65_535)],
        ..policy()
    });
    let mut seen = BTreeSet::new();
    for host in 0..900 {
        for port in 0..10 {
            let name = format!("2001:db8:1::{host:x}");
            let ours = world
                .out(protocol::UDP, 0, (&name, 5000 + port), (SERVER, 53))
                .expect("a binding");
            assert!(seen.insert(ours), "{ours:?} twice");
        }
    }
    assert!(seen.iter().all(|(_, port)| *port >= 1024));
}

#[test]
fn rfc6146_section_3_5_1_1_without_a_port_left_a_host_is_told_and_recovers_when_ports_have_rested() {
    let mut world = World::of(Policy {
        pool: vec![range(POOL, 1024, 1087)],
        ..policy()
    });
    for host in 0..64 {
        let name = format!("2001:db8:1::{host:x}");
        world
            .out(protocol::UDP, 0, (&name, 5000), (SERVER, 53))
            .expect("a binding");
    }
    let refused = world.out(protocol::UDP, 0, (NODE, 5000), (SERVER, 53));
    assert!(refused.is_ok(), "NODE is one of them");
    let refused = world.out(protocol::UDP, 0, ("2001:db8:1::ffff", 5000), (SERVER, 53));
    assert_eq!(refused, Err(Refusal::told(DropReason::Exhausted, Problem::Address)));
    assert!(
        world
            .out(protocol::TCP, SYN, ("2001:db8:1::ffff", 5000), (SERVER, 53))
            .is_ok(),
        "TCP has its own"
    );
    world.pass(6 * MINUTE);
    assert_eq!(world.counts(), (0, 0));
    let refused = world.out(protocol::UDP, 0, ("2001:db8:1::ffff", 5000), (SERVER, 53));
    assert_eq!(reason(refused), DropReason::Exhausted, "RFC 6888 REQ-8: they rest");
    world.pass(2 * MINUTE);
    assert!(
        world
            .out(protocol::UDP, 0, ("2001:db8:1::ffff", 5000), (SERVER, 53))
            .is_ok()
    );
}

#[test]
fn rfc6146_section_3_5_a_packet_to_a_port_of_nobody_is_refused_with_port_unreachable() {
    let world = World::new();
    let nobody = world.back(protocol::UDP, 0, (SERVER, 53), (ip4(POOL), 62_000));
    assert_eq!(nobody, Err(Refusal::told(DropReason::NoBinding, Problem::Port)));
    let beside = world.back(protocol::UDP, 0, (SERVER, 53), (ip4(POOL), 22));
    assert_eq!(reason(beside), DropReason::NoBinding);
    let elsewhere = world.back(protocol::UDP, 0, (SERVER, 53), (ip4("203.0.113.9"), 62_000));
    assert_eq!(reason(elsewhere), DropReason::NotMapped);
}

#[test]
fn rfc6146_section_3_5_2_2_a_connection_lives_through_its_states_on_the_clock() {
    let mut world = World::new();
    // V6 INIT: four minutes.
    let ours = world.tcp(SYN, 1).expect("a binding");
    assert_eq!(world.state(), Some(TcpState::V6Init));
    world.pass(4 * MINUTE - SECOND);
    assert_eq!(world.counts(), (1, 1));
    world.pass(2 * SECOND);
    assert_eq!(world.counts(), (0, 0));
    assert_eq!(world.tcp_back(SYN_ACK, ours), Err(DropReason::NoBinding));
    // ESTABLISHED: two hours and four minutes after the last packet of either side.
    let ours = world.connect(2);
    assert_eq!(world.state(), Some(TcpState::Established));
    world.pass(124 * MINUTE - SECOND);
    world.tcp(ACK, 2).expect("data");
    world.pass(124 * MINUTE - SECOND);
    world.tcp_back(ACK, ours).expect("data");
    assert_eq!(world.state(), Some(TcpState::Established));
    // One side's FIN: it may go on listening for as long.
    world.tcp_back(FIN, ours).expect("FIN");
    assert_eq!(world.state(), Some(TcpState::V4Fin));
    world.pass(100 * MINUTE);
    world.tcp(ACK, 2).expect("data");
    world.pass(100 * MINUTE);
    assert_eq!(world.state(), Some(TcpState::V4Fin));
    // Both: four minutes, however much comes.
    world.tcp(FIN, 2).expect("FIN");
    assert_eq!(world.state(), Some(TcpState::BothFin));
    world.pass(3 * MINUTE);
    world.tcp(ACK, 2).expect("the last word");
    world.pass(MINUTE + SECOND);
    assert_eq!(world.counts(), (0, 0));
}

#[test]
fn rfc6146_section_3_5_2_2_a_reset_connection_ends_in_four_minutes_unless_data_shows_that_it_lives() {
    let mut world = World::new();
    let ours = world.connect(1);
    world.tcp_back(RST, ours).expect("RST");
    assert_eq!(world.state(), Some(TcpState::Transitory));
    world.pass(3 * MINUTE);
    world.tcp(ACK, 1).expect("data");
    assert_eq!(world.state(), Some(TcpState::Established), "somebody else's RST");
    world.pass(60 * MINUTE);
    world.tcp(RST, 1).expect("RST");
    world.tcp_back(RST, ours).expect("RST");
    world.pass(4 * MINUTE + SECOND);
    assert_eq!(world.counts(), (0, 0));
}

#[test]
fn rfc5382_req_5_a_silent_connection_is_asked_once_before_it_ends() {
    let mut world = World::new();
    world.connect(1);
    let probes = world.pass(124 * MINUTE + SECOND);
    let probe = Probe {
        host: (ip6(NODE), 1),
        remote: (ip4(SERVER), 443),
    };
    assert_eq!(probes, [probe]);
    assert_eq!(world.state(), Some(TcpState::Transitory));
    world.tcp(ACK, 1).expect("the answer");
    assert_eq!(world.state(), Some(TcpState::Established));
    assert_eq!(world.pass(124 * MINUTE + SECOND), [probe]);
    assert!(world.pass(4 * MINUTE + SECOND).is_empty());
    assert_eq!(world.counts(), (0, 0));
}

#[test]
fn rfc6146_section_3_5_2_2_what_does_not_begin_a_connection_makes_no_session() {
    let world = World::new();
    for flags in [ACK, FIN, RST, SYN_ACK] {
        assert_eq!(world.tcp(flags, 1), Err(DropReason::NoSession), "{flags:02x}");
    }
    assert_eq!(world.counts(), (0, 0));
    let ours = world.connect(1);
    let other = world.out(protocol::TCP, ACK, (NODE, 1), ("198.51.100.9", 80));
    assert_eq!(other, Ok(ours), "with a binding it goes on");
    assert_eq!(world.counts(), (1, 1), "and leaves nothing behind");
    let forbidden = world.out(protocol::TCP, ACK, (NODE, 1), ("10.0.0.1", 80));
    assert_eq!(reason(forbidden), DropReason::Forbidden);
}

#[test]
fn connections_and_pings_from_ipv4_need_leave() {
    let stranger = ("198.51.100.99", 40_000);
    let ping = |world: &World, ours: (Ipv4Addr, u16)| {
        world.mapper().to_v6(&Flow {
            ends: Ends {
                source: ip4(stranger.0),
                destination: ours.0,
                ports: Ports::Echo {
                    id: ours.1,
                    reply: false,
                },
            },
            protocol: protocol::ICMP,
            tcp_flags: 0,
            fragment: None,
        })
    };
    let world = World::new();
    let ours = world.connect(1);
    let pinged = world
        .out(protocol::ICMPV6, 0, (NODE, 5), (SERVER, 0))
        .expect("a binding");
    assert_eq!(
        reason(world.back(protocol::TCP, SYN, stranger, ours)),
        DropReason::Unsolicited
    );
    assert_eq!(reason(ping(&world, pinged)), DropReason::Unsolicited);

    let mut world = World::of(Policy {
        inbound_new: true,
        ..policy()
    });
    let ours = world.connect(1);
    assert_eq!(world.back(protocol::TCP, SYN, stranger, ours), Ok((ip6(NODE), 1)));
    assert_eq!(
        reason(world.back(protocol::TCP, ACK, ("198.51.100.98", 1), ours)),
        DropReason::NoSession
    );
    assert_eq!(world.all()[1].state, Some(TcpState::V4Init));
    world
        .out(protocol::TCP, SYN_ACK, (NODE, 1), stranger)
        .expect("the answer");
    assert_eq!(world.all()[1].state, Some(TcpState::Established));
    let pinged = world
        .out(protocol::ICMPV6, 0, (NODE, 5), (SERVER, 0))
        .expect("a binding");
    assert!(ping(&world, pinged).is_ok());
    world.pass(MINUTE + SECOND);
    assert_eq!(world.counts(), (1, 2), "RFC 5508 REQ-2: 60 s for pings");
}

#[test]
fn rfc4787_req_5_and_6_udp_lives_five_minutes_after_the_last_packet_of_either_side() {
    let mut world = World::new();
    let ours = world.udp(4000);
    for _ in 0..3 {
        world.pass(5 * MINUTE - SECOND);
        world.udp(4000);
        world.pass(5 * MINUTE - SECOND);
        world.back(protocol::UDP, 0, (SERVER, 53), ours).expect("the way back");
    }
    world.pass(5 * MINUTE + SECOND);
    assert_eq!(world.counts(), (0, 0));
}

#[test]
fn rfc5508_section_4_errors_go_to_who_sent_what_they_quote_and_change_nothing() {
    let mut world = World::new();
    let ours = world.udp(4000);
    world.pass(4 * MINUTE);
    let left = world.all()[0].left;
    let about = |port: u16| Flow {
        ends: Ends {
            source: ours.0,
            destination: ip4(SERVER),
            ports: Ports::Pair {
                source: port,
                destination: 53,
            },
        },
        protocol: protocol::UDP,
        tcp_flags: 0,
        fragment: None,
    };
    let told = world.mapper().error_to_v6(ip4("198.51.100.1"), ours.0, &about(ours.1));
    let expected = Quotation {
        source: ip6("2001:db8:64::198.51.100.1"),
        destination: ip6(NODE),
        quoted: Ends {
            source: ip6(NODE),
            destination: ip6("2001:db8:64::198.51.100.80"),
            ports: Ports::Pair {
                source: 4000,
                destination: 53,
            },
        },
    };
    assert_eq!(told, Ok(expected));
    let of_nobody = world
        .mapper()
        .error_to_v6(ip4("198.51.100.1"), ours.0, &about(ours.1 ^ 1));
    assert_eq!(reason(of_nobody), DropReason::NoSession);
    let to_another = world
        .mapper()
        .error_to_v6(ip4("198.51.100.1"), ip4("203.0.113.9"), &about(ours.1));
    assert_eq!(reason(to_another), DropReason::IcmpQuotation);
    assert_eq!(world.all()[0].left, left);

    // And from IPv6, about what came from IPv4.
    let about = Flow {
        ends: Ends {
            source: ip6("2001:db8:64::198.51.100.80"),
            destination: ip6(NODE),
            ports: Ports::Pair {
                source: 53,
                destination: 4000,
            },
        },
        protocol: protocol::UDP,
        tcp_flags: 0,
        fragment: None,
    };
    let router = ip6("2001:db8:99::1");
    let told = world
        .mapper()
        .error_to_v4(router, ip6("2001:db8:64::198.51.100.80"), &about);
    let expected = Quotation {
        source: ours.0,
        destination: ip4(SERVER),
        quoted: Ends {
            source: ip4(SERVER),
            destination: ours.0,
            ports: Ports::Pair {
                source: 53,
                destination: ours.1,
            },
        },
    };
    assert_eq!(told, Ok(Exit::V4(expected)));
    assert_eq!(world.all()[0].left, left);
}

#[test]
fn a_private_router_is_shown_as_the_translator_under_the_well_known_prefix() {
    let world = World::of(Policy {
        prefix: Pref64::WELL_KNOWN,
        allow_private: Vec::new(),
        ..policy()
    });
    let server = ip4("192.88.98.1");
    let ports = Ports::Pair {
        source: 4000,
        destination: 33_434,
    };
    let exit = world
        .send(protocol::UDP, 0, ip6(NODE), server, ports)
        .expect("a binding");
    let Exit::V4(ends) = exit else { panic!("turned back") };
    let about = Flow {
        ends,
        protocol: protocol::UDP,
        tcp_flags: 0,
        fragment: None,
    };
    let told = world
        .mapper()
        .error_to_v6(ip4("10.0.0.1"), ends.source, &about)
        .expect("told");
    assert_eq!(told.source, ip6("2001:db8:1::1"));
    assert_eq!(told.destination, ip6(NODE));
}

#[test]
fn rfc6146_section_3_8_hosts_reach_each_other_by_their_addresses_in_ipv4() {
    let world = World::new();
    let other = "2001:db8:1::20";
    let theirs = world
        .out(protocol::UDP, 0, (other, 6000), (SERVER, 1))
        .expect("a binding");
    let ports = Ports::Pair {
        source: 4000,
        destination: theirs.1,
    };
    let exit = world
        .send(protocol::UDP, 0, ip6(NODE), theirs.0, ports)
        .expect("turned back");
    let Exit::V6(ends) = exit else { panic!("{exit:?}") };
    let ours = world.udp(4000);
    assert_eq!(
        ends.source,
        world.prefix().embed(ours.0),
        "RFC 4787 REQ-9: by its external address"
    );
    assert_eq!(ends.destination, ip6(other));
    assert_eq!(
        ends.ports,
        Ports::Pair {
            source: ours.1,
            destination: 6000
        }
    );
    // The answer.
    let ports = Ports::Pair {
        source: 6000,
        destination: ours.1,
    };
    let exit = world
        .send(protocol::UDP, 0, ip6(other), ours.0, ports)
        .expect("turned back");
    let Exit::V6(ends) = exit else { panic!("{exit:?}") };
    assert_eq!(
        (ends.source, ends.destination),
        (world.prefix().embed(theirs.0), ip6(NODE))
    );
    // And an error about it: the receiver of the answer says that it does not want it.
    let about = Flow {
        ends,
        protocol: protocol::UDP,
        tcp_flags: 0,
        fragment: None,
    };
    let told = world
        .mapper()
        .error_to_v4(ip6(NODE), ends.source, &about)
        .expect("told");
    let expected = Quotation {
        source: world.prefix().embed(ours.0),
        destination: ip6(other),
        quoted: Ends {
            source: ip6(other),
            destination: world.prefix().embed(ours.0),
            ports: Ports::Pair {
                source: 6000,
                destination: ours.1,
            },
        },
    };
    assert_eq!(told, Exit::V6(expected));
}

#[test]
fn rfc6146_section_3_5_loops_and_forged_sources_are_dropped() {
    let world = World::of(Policy {
        clients: vec!["::/0".parse().expect("a net")],
        ..policy()
    });
    let loops = world.out(protocol::UDP, 0, ("2001:db8:64::192.0.2.1", 1), (SERVER, 53));
    assert_eq!(loops, Err(DropReason::Loop.into()));
    let ours = world.udp(4000);
    assert_eq!(
        reason(world.back(protocol::UDP, 0, (POOL, 9), ours)),
        DropReason::Spoofed
    );
}

#[test]
fn who_is_no_client_gets_no_state_and_no_answer() {
    let world = World::new();
    let stranger = world.out(protocol::UDP, 0, ("2001:db8:2::1", 1), (SERVER, 53));
    assert_eq!(stranger, Err(DropReason::NotClient.into()));
    assert_eq!(world.table.lock().expect("a lock").counts().hosts, 0);
}

#[test]
fn what_is_not_global_and_what_is_the_edges_own_is_not_reached_unless_allowed() {
    let world = World::new();
    for forbidden in [
        "10.0.0.1",
        "127.0.0.1",
        "169.254.169.254",
        "100.64.0.1",
        "198.51.100.254",
        "192.168.1.1",
    ] {
        let refused = world.out(protocol::TCP, SYN, (NODE, 1), (forbidden, 80));
        assert_eq!(
            refused,
            Err(Refusal::told(DropReason::Forbidden, Problem::Prohibited)),
            "{forbidden}"
        );
    }
    assert!(world.out(protocol::TCP, SYN, (NODE, 1), ("9.9.9.9", 80)).is_ok());
    assert_eq!(world.counts(), (1, 1));
}

#[test]
fn other_protocols_have_no_session_and_their_hosts_are_told() {
    let world = World::new();
    let sctp = world.mapper().to_v4(&Flow {
        ends: Ends {
            source: ip6(NODE),
            destination: world.prefix().embed(ip4(SERVER)),
            ports: Ports::None,
        },
        protocol: 132,
        tcp_flags: 0,
        fragment: None,
    });
    assert_eq!(sctp, Err(Refusal::told(DropReason::NoPorts, Problem::Port)));
}

#[test]
fn rfc6888_req_4_one_host_cannot_take_what_others_need() {
    let mut world = World::of(Policy {
        new_per_second: 1_000_000,
        ..policy()
    });
    let mut refused = BTreeMap::new();
    for flow in 0..60_000_u32 {
        let port = (flow % 50_000) as u16;
        let remote = Ipv4Addr::new(198, 51, 100, (flow % 200) as u8).to_string();
        if let Err(refusal) = world.out(protocol::UDP, 0, (NODE, port), (&remote, 53)) {
            *refused.entry(refusal.reason).or_insert(0) += 1;
        }
    }
    assert_eq!(refused.keys().copied().collect::<Vec<_>>(), [DropReason::Quota]);
    let (bindings, sessions) = world.counts();
    assert!(bindings <= 504 && sessions <= 1000, "{bindings} {sessions}");
    for host in 0x100..0x180 {
        let name = format!("2001:db8:1::{host:x}");
        for port in 0..8 {
            world
                .out(protocol::UDP, 0, (&name, 1000 + port), (SERVER, 53))
                .expect("others are not touched");
        }
    }
    world.pass(5 * MINUTE + SECOND);
    assert_eq!(world.counts(), (0, 0));
    world.pass(2 * MINUTE);
    assert_eq!(
        world.table.lock().expect("a lock").counts().hosts,
        0,
        "and all is forgotten"
    );
}

#[test]
fn rfc6888_req_4_a_host_begins_no_more_sessions_per_second_than_it_may() {
    let mut world = World::of(Policy {
        new_per_second: 10,
        ..policy()
    });
    let begin = |world: &World, count: u16| {
        (0..count)
            .filter(|remote| world.out(protocol::UDP, 0, (NODE, 1), (SERVER, 1000 + remote)).is_ok())
            .count()
    };
    assert_eq!(begin(&world, 300), 100, "ten seconds' worth after a rest");
    world.pass(SECOND);
    let refused = world.out(protocol::UDP, 0, (NODE, 1), (SERVER, 5000));
    assert!(refused.is_ok());
    assert_eq!(begin(&world, 300), 100 + 9, "those that there are go on");
    let refused = world.out(protocol::UDP, 0, (NODE, 1), (SERVER, 6000));
    assert_eq!(reason(refused), DropReason::Rate);
    assert!(
        world.out(protocol::UDP, 0, ("2001:db8:1::20", 1), (SERVER, 1)).is_ok(),
        "others may"
    );
}

#[test]
fn a_full_table_refuses_new_sessions_keeps_the_old_and_recovers() {
    let mut world = World::sized(policy(), 50, 50);
    for port in 0..50 {
        world.udp(1000 + port);
    }
    let refused = world.out(protocol::UDP, 0, (NODE, 2000), (SERVER, 53));
    assert_eq!(reason(refused), DropReason::Full);
    world.udp(1000);
    world.pass(5 * MINUTE + SECOND);
    assert_eq!(world.counts(), (0, 0));
    world.udp(2000);
}

#[test]
fn a_new_process_goes_on_with_bindings_and_sessions_where_the_old_one_was() {
    let mut world = World::new();
    let ours = world.connect(1);
    let udp = world.udp(4000);
    world.pass(3 * MINUTE);
    let before = world.all();
    let mut world = world.again(policy());
    assert_eq!(world.all(), before);
    assert_eq!(world.counts(), (2, 2));
    assert_eq!(world.tcp_back(ACK, ours), Ok((ip6(NODE), 1)));
    assert_eq!(world.tcp(ACK, 1), Ok(ours));
    assert_eq!(world.udp(4000), udp);
    assert!(
        !before.iter().any(|session| session.binding.v4 == world.udp(4001)),
        "no port is given twice"
    );
    world.pass(5 * MINUTE + SECOND);
    assert_eq!(world.counts(), (1, 1), "timers go on, too");
}

#[test]
fn what_another_configuration_does_not_allow_is_not_taken_over() {
    let world = World::new();
    world.connect(1);
    let kept = world
        .out(protocol::UDP, 0, (NODE, 4000), ("198.51.100.7", 53))
        .expect("a binding");
    let without = |policy: Policy| world.again(policy).counts();
    let denied = Policy {
        denied: vec!["198.51.100.80/32".parse().expect("a net")],
        ..policy()
    };
    let after = world.again(denied);
    assert_eq!(after.counts(), (1, 1));
    assert_eq!(
        after.out(protocol::UDP, 0, (NODE, 4000), ("198.51.100.7", 53)),
        Ok(kept)
    );
    let other_clients = Policy {
        clients: Vec::new(),
        ..policy()
    };
    assert_eq!(without(other_clients), (0, 0));
}

#[test]
fn memory_that_lost_any_one_word_is_taken_over_without_a_port_twice_or_a_session_without_end() {
    let mut random = Random::new(8);
    let world = World::sized(policy(), 64, 64);
    for round in 0..300 {
        let host = format!("2001:db8:1::{:x}", random.below(5));
        let remote = Ipv4Addr::new(198, 51, 100, random.below(4) as u8).to_string();
        let port = 1000 + random.below(4) as u16;
        let _ = world.out(protocol::UDP, 0, (&host, port), (&remote, 53));
        let _ = world.out(protocol::TCP, SYN, (&host, port), (&remote, 80));
        let torn = zeros(world.memory.len());
        for (from, to) in world.memory.iter().zip(torn) {
            to.store(from.load(Relaxed), Relaxed);
        }
        let cut = 3 + random.below(torn.len() - 3);
        torn[cut].store(0, Relaxed);
        let table = Table::new(policy(), torn, 64, 64, [9, round], world.now).expect("room");
        let mut next = World {
            table: Arc::new(Mutex::new(table)),
            memory: torn,
            bindings: 64,
            sessions: 64,
            now: world.now,
        };
        let all = next.all();
        let ends: BTreeSet<_> = all
            .iter()
            .map(|session| (session.binding.protocol, session.binding.v4, session.remote))
            .collect();
        assert_eq!(ends.len(), all.len());
        let hosts: BTreeMap<_, _> = all
            .iter()
            .map(|session| ((session.binding.protocol, session.binding.v4), session.binding.v6))
            .collect();
        assert!(
            all.iter()
                .all(|session| hosts[&(session.binding.protocol, session.binding.v4)] == session.binding.v6)
        );
        assert_eq!(next.counts().1, all.len() as u64);
        next.pass(6 * MINUTE);
        assert_eq!(next.counts(), (0, 0));
    }
}

#[test]
fn whatever_memory_holds_is_taken_over_without_harm() {
    let mut random = Random::new(10);
    for round in 0..200 {
        let memory = zeros(Table::words(32, 32));
        drop(Table::new(policy(), memory, 32, 32, [1, 1], 0));
        for word in &memory[1..] {
            let live = if random.below(2) == 0 { 0xa5 << 56 } else { 0 };
            word.store(random.next() >> 8 | live, Relaxed);
        }
        let table = Table::new(policy(), memory, 32, 32, [1, round], 1000).expect("room");
        let world = World {
            table: Arc::new(Mutex::new(table)),
            memory,
            bindings: 32,
            sessions: 32,
            now: 1000,
        };
        let _ = world.out(protocol::UDP, 0, (NODE, 4000), (SERVER, 53));
        world.table.lock().expect("a lock").expire(u64::MAX / 2, 1000, |_| {});
    }
}

#[test]
fn any_traffic_keeps_the_books_in_order() {
    let mut random = Random::new(12);
    let mut world = World::sized(
        Policy {
            pool: vec![range(POOL, 1024, 1100), range("203.0.113.8", 2000, 2050)],
            inbound_new: true,
            new_per_second: 1000,
            bindings_per_host: 20,
            ..policy()
        },
        100,
        300,
    );
    for _ in 0..30_000 {
        let host = format!("2001:db8:1::{:x}", random.below(12));
        let remote = Ipv4Addr::new(198, 51, 100, random.below(9) as u8).to_string();
        let flags = [SYN, SYN_ACK, ACK, FIN, RST][random.below(5)];
        let port = 1000 + random.below(30) as u16;
        match random.below(4) {
            0 => drop(world.out(protocol::UDP, 0, (&host, port), (&remote, 53))),
            1 => drop(world.out(protocol::TCP, flags, (&host, port), (&remote, 80))),
            2 => drop(world.out(protocol::ICMPV6, 0, (&host, port), (&remote, 0))),
            _ => {
                let ours = (
                    ip4([POOL, "203.0.113.8"][random.below(2)]),
                    1024 + random.below(1100) as u16,
                );
                let _ = world.back(protocol::TCP, flags, (&remote, 80), ours);
                let _ = world.back(protocol::UDP, 0, (&remote, 53), ours);
            }
        }
        if random.below(50) == 0 {
            world.pass(random.below(100_000) as u64);
        }
        if random.below(500) == 0 {
            let all = world.all();
            assert_eq!(world.counts().1, all.len() as u64);
            let bindings: BTreeSet<_> = all.iter().map(|s| (s.binding.protocol, s.binding.v4)).collect();
            assert_eq!(world.counts().0, bindings.len() as u64);
        }
    }
    world.pass(200 * MINUTE);
    assert_eq!(world.counts(), (0, 0));
    let table = world.table.lock().expect("a lock");
    for address in [POOL, "203.0.113.8"] {
        for protocol in Protocol::ALL {
            let (free, all) = table.free_ports(ip4(address), protocol).expect("ours");
            assert_eq!(free, all, "every port has come back");
        }
    }
}

#[test]
fn rfc6146_section_3_1_a_fixed_binding_is_open_to_all_and_stays() {
    let web = |port: u16| Fixed {
        protocol: Protocol::Tcp,
        v4: (ip4(POOL), port),
        v6: (ip6(NODE), 443),
    };
    // Inside the pool's range, and outside.
    for port in [62_000, 443] {
        let fixed = Policy {
            fixed: vec![web(port)],
            filtering: Filtering::AddressDependent,
            ..policy()
        };
        let mut world = World::of(fixed.clone());
        let ours = (ip4(POOL), port);
        let client = ("198.51.100.99", 40_000);
        assert_eq!(world.counts(), (1, 0));
        assert_eq!(world.back(protocol::TCP, SYN, client, ours), Ok((ip6(NODE), 443)));
        assert_eq!(world.out(protocol::TCP, SYN_ACK, (NODE, 443), client), Ok(ours));
        assert_eq!(world.state(), Some(TcpState::Established));
        assert!(
            world.out(protocol::TCP, SYN, (NODE, 1), client).is_ok(),
            "and the host has others"
        );
        let mut again = world.again(fixed.clone());
        assert_eq!(again.counts(), (2, 2));
        again.pass(300 * MINUTE);
        assert_eq!(again.counts(), (1, 0), "it stays");
        world.pass(300 * MINUTE);
        assert_eq!(
            world.again(policy()).counts(),
            (0, 0),
            "until it is not configured any more"
        );
        // Whoever had the port loses it, and nobody else gets it.
        let world = World::new();
        let held = world.connect(443);
        let fixed = Policy {
            fixed: vec![Fixed {
                v6: (ip6("2001:db8:1::77"), 443),
                v4: held,
                protocol: Protocol::Tcp,
            }],
            ..policy()
        };
        let world = world.again(fixed);
        assert_eq!(world.counts(), (1, 0));
        assert_eq!(
            world.back(protocol::TCP, SYN, client, held),
            Ok((ip6("2001:db8:1::77"), 443))
        );
    }
}

//! The address plan of the nodes: one network, and in it etcd from .1, control planes from .11, workers from .21.
//!
//! The ranges are where a group begins, not where it must end: an eleventh etcd member takes the next free address among
//! the workers instead of the first control plane's. Pure: the same nodes in the same order get the same addresses.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

/// A network in CIDR notation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    address: IpAddr,
    length: u8,
}

/// What a node is; decides where in the network its address is looked for first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// A member of an etcd of its own: numbers 1 to 10.
    Etcd,
    /// A control plane: numbers 11 to 20.
    ControlPlane,
    /// A worker: numbers from 21.
    Worker,
}

/// Which node has which address in one network.
///
/// Node number n has the n-th address of an IPv4 network. In an IPv6 network the decimal digits of n are the last group:
/// control plane 1 is `10.0.1.11` and `fd00::11`.
#[derive(Clone, Debug)]
pub struct Plan {
    network: Network,
    taken: BTreeMap<IpAddr, String>,
}

/// Why the plan does not hold.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// No network.
    #[error("\"{0}\" is no network; write one such as \"10.0.1.0/24\" or \"fd00::/64\"")]
    Form(String),
    /// Two networks have addresses in common.
    #[error("the node network {network} overlaps {what} {other}: packets for one would go to the other")]
    Overlap {
        /// The nodes' network.
        network: Network,
        /// What the other one is for.
        what: String,
        /// The other one.
        other: Network,
    },
    /// Too few addresses, or more digits than the last group of an IPv6 address has.
    #[error(
        "the node network {0} is of the wrong size; write an IPv4 network of /8 to /29 or an IPv6 network of /8 to /112"
    )]
    Size(Network),
    /// A fixed address outside the network.
    #[error("{address} of {node} is no node address in {network}")]
    Outside {
        /// The address.
        address: IpAddr,
        /// Whose it was to be.
        node: String,
        /// The nodes' network.
        network: Network,
    },
    /// A fixed address that is another node's.
    #[error("{address} cannot be {node}'s: it is {owner}'s")]
    Taken {
        /// The address.
        address: IpAddr,
        /// Who was to have it.
        node: String,
        /// Who has it.
        owner: String,
    },
    /// A node that has another address.
    #[error("{node} has {has} and cannot have {wanted} too")]
    Second {
        /// The node.
        node: String,
        /// Its address.
        has: IpAddr,
        /// The other one.
        wanted: IpAddr,
    },
    /// No address is left.
    #[error("the node network {network} is full: its {addresses} addresses are taken, and {node} gets none")]
    Full {
        /// The nodes' network.
        network: Network,
        /// How many it has.
        addresses: u32,
        /// Who comes away empty.
        node: String,
    },
}

impl Role {
    /// The first number of the group and, if another group follows, the last.
    const fn numbers(self) -> (u32, u32) {
        match self {
            Self::Etcd => (1, 10),
            Self::ControlPlane => (11, 20),
            Self::Worker => (21, u32::MAX),
        }
    }
}

impl Plan {
    /// An empty plan of `network`, which must not overlap any of `others` (what it is for, and the network), such as
    /// the pods' and the services'.
    ///
    /// # Errors
    ///
    /// [`PlanError::Size`] or [`PlanError::Overlap`].
    pub fn new(network: Network, others: &[(&str, Network)]) -> Result<Self, PlanError> {
        let sizes = if network.address.is_ipv4() { 8..=29 } else { 8..=112 };
        if !sizes.contains(&network.length) {
            return Err(PlanError::Size(network));
        }
        if let Some((what, other)) = others.iter().find(|(_, other)| network.overlaps(*other)) {
            return Err(PlanError::Overlap {
                network,
                what: (*what).to_owned(),
                other: *other,
            });
        }
        Ok(Self {
            network,
            taken: BTreeMap::new(),
        })
    }

    /// Gives `node` the address that it has or must have. Asked again for the same, it changes nothing.
    ///
    /// # Errors
    ///
    /// [`PlanError::Outside`], [`PlanError::Taken`] or [`PlanError::Second`].
    pub fn reserve(&mut self, node: &str, address: IpAddr) -> Result<(), PlanError> {
        let node = node.to_owned();
        if !self.network.has_node(address) {
            return Err(PlanError::Outside {
                address,
                node,
                network: self.network,
            });
        }
        if let Some(owner) = self.taken.get(&address).filter(|owner| **owner != node) {
            return Err(PlanError::Taken {
                address,
                node,
                owner: owner.clone(),
            });
        }
        if let Some(has) = self.address(&node).filter(|has| *has != address) {
            return Err(PlanError::Second {
                node,
                has,
                wanted: address,
            });
        }
        self.taken.insert(address, node);
        Ok(())
    }

    /// Gives `node` the first free address of its group, or, once that is full, the first free one of the workers, or,
    /// in a small network, any that is free. A node that has one keeps it.
    ///
    /// # Errors
    ///
    /// [`PlanError::Full`].
    pub fn assign(&mut self, role: Role, node: &str) -> Result<IpAddr, PlanError> {
        if let Some(address) = self.address(node) {
            return Ok(address);
        }
        let last = self.network.last();
        let free = [role.numbers(), Role::Worker.numbers(), (1, last)]
            .into_iter()
            .find_map(|(from, to)| {
                (from..=to.min(last))
                    .map(|number| self.network.node(number))
                    .find(|address| !self.taken.contains_key(address))
            });
        let Some(address) = free else {
            return Err(PlanError::Full {
                network: self.network,
                addresses: last,
                node: node.to_owned(),
            });
        };
        self.taken.insert(address, node.to_owned());
        Ok(address)
    }

    /// The address of `node`.
    pub fn address(&self, node: &str) -> Option<IpAddr> {
        self.taken
            .iter()
            .find(|(_, owner)| *owner == node)
            .map(|(address, _)| *address)
    }

    /// Every address that is given away, with its node, in ascending order.
    pub fn addresses(&self) -> impl Iterator<Item = (IpAddr, &str)> {
        self.taken.iter().map(|(address, node)| (*address, node.as_str()))
    }
}

impl Network {
    /// Whether it has an address in common with `other`.
    pub fn overlaps(self, other: Self) -> bool {
        let length = self.length.min(other.length);
        self.address.is_ipv4() == other.address.is_ipv4()
            && masked(self.address, length) == masked(other.address, length)
    }

    /// Whether `address` may be a node's: inside, and neither the first nor, in IPv4, the last (subnet-router anycast,
    /// RFC 4291 §2.6.1; broadcast, RFC 919).
    fn has_node(self, address: IpAddr) -> bool {
        let broadcast = match self.address {
            IpAddr::V4(first) => Some(IpAddr::V4(Ipv4Addr::from_bits(
                first.to_bits() | (u32::MAX >> self.length),
            ))),
            IpAddr::V6(_) => None,
        };
        address.is_ipv4() == self.address.is_ipv4()
            && masked(address, self.length) == self.address
            && address != self.address
            && Some(address) != broadcast
    }

    /// The highest node number.
    fn last(self) -> u32 {
        match self.address {
            IpAddr::V4(_) => (1 << (32 - self.length)) - 2,
            IpAddr::V6(_) => 9999,
        }
    }

    /// The address of node `number`, which is at most [`Network::last`].
    fn node(self, number: u32) -> IpAddr {
        match self.address {
            IpAddr::V4(first) => Ipv4Addr::from_bits(first.to_bits() + number).into(),
            IpAddr::V6(first) => {
                let digits = [1000, 100, 10, 1]
                    .iter()
                    .fold(0, |group, ten| (group << 4) | (number / ten % 10));
                Ipv6Addr::from_bits(first.to_bits() | u128::from(digits)).into()
            }
        }
    }
}

/// `address` without its bits beyond `length`.
fn masked(address: IpAddr, length: u8) -> IpAddr {
    match address {
        IpAddr::V4(v4) => Ipv4Addr::from_bits(v4.to_bits() & !u32::MAX.checked_shr(length.into()).unwrap_or(0)).into(),
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() & !u128::MAX.checked_shr(length.into()).unwrap_or(0)).into(),
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.length)
    }
}

impl FromStr for Network {
    type Err = PlanError;

    fn from_str(text: &str) -> Result<Self, PlanError> {
        let form = || PlanError::Form(text.to_owned());
        let (address, length) = text.split_once('/').ok_or_else(form)?;
        let address: IpAddr = address.parse().map_err(|_| form())?;
        let length: u8 = length.parse().map_err(|_| form())?;
        if length > if address.is_ipv4() { 32 } else { 128 } {
            return Err(form());
        }
        Ok(Self {
            address: masked(address, length),
            length,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_begin_at_1_11_and_21_in_both_families() {
        for (network, addresses) in [
            (
                "10.0.1.0/24",
                [
                    "10.0.1.1",
                    "10.0.1.2",
                    "10.0.1.11",
                    "10.0.1.12",
                    "10.0.1.21",
                    "10.0.1.22",
                ],
            ),
            (
                "fd00::/64",
                ["fd00::1", "fd00::2", "fd00::11", "fd00::12", "fd00::21", "fd00::22"],
            ),
        ] {
            let mut plan = plan(network);
            let roles = [
                Role::Etcd,
                Role::Etcd,
                Role::ControlPlane,
                Role::ControlPlane,
                Role::Worker,
                Role::Worker,
            ];
            for (i, (role, address)) in roles.into_iter().zip(addresses).enumerate() {
                assert_eq!(
                    plan.assign(role, &format!("node-{i}")).map(|given| given.to_string()),
                    Ok(address.to_owned())
                );
            }
        }
    }

    #[test]
    fn past_ten_no_group_takes_what_is_another_groups() {
        for network in ["10.0.1.0/24", "fd00::/64"] {
            let mut plan = plan(network);
            for i in 1..=30 {
                for (role, name) in [
                    (Role::Etcd, "etcd"),
                    (Role::ControlPlane, "cp"),
                    (Role::Worker, "worker"),
                ] {
                    plan.assign(role, &format!("{name}-{i}")).expect("there is room for 90");
                }
            }
            assert_eq!(plan.addresses().count(), 90);
            let first = |name: &str| {
                plan.address(name)
                    .map(|address| address.to_string())
                    .expect("it was given one")
            };
            assert!(
                first("cp-1").ends_with("11") && first("cp-10").ends_with("20") && first("worker-1").ends_with("21")
            );
        }
    }

    #[test]
    fn an_ipv6_number_reads_as_in_decimal() {
        let mut plan = plan("2001:db8:1::/64");
        for i in 1..=1200 {
            plan.assign(Role::Worker, &format!("worker-{i}"))
                .expect("there is room for 9999");
        }
        assert_eq!(
            plan.address("worker-80").map(|a| a.to_string()),
            Some("2001:db8:1::100".into())
        );
        assert_eq!(
            plan.address("worker-1200").map(|a| a.to_string()),
            Some("2001:db8:1::1220".into())
        );
    }

    #[test]
    fn a_node_keeps_its_address_and_a_reserved_one_is_passed_over() {
        let mut plan = plan("10.0.1.0/24");
        plan.reserve("dedicated-7", address("10.0.1.11")).expect("it is free");
        plan.reserve("dedicated-7", address("10.0.1.11"))
            .expect("it is its own");
        assert_eq!(plan.assign(Role::ControlPlane, "cp-1"), Ok(address("10.0.1.12")));
        assert_eq!(plan.assign(Role::ControlPlane, "cp-1"), Ok(address("10.0.1.12")));
        assert_eq!(plan.assign(Role::Worker, "dedicated-7"), Ok(address("10.0.1.11")));
    }

    #[test]
    fn what_cannot_be_reserved_is_refused_with_the_reason() {
        let mut plan = plan("10.0.1.0/24");
        plan.reserve("cp-1", address("10.0.1.11")).expect("it is free");
        for (node, fixed, message) in [
            ("cp-2", "10.0.1.11", "10.0.1.11 cannot be cp-2's: it is cp-1's"),
            ("cp-1", "10.0.1.12", "cp-1 has 10.0.1.11 and cannot have 10.0.1.12 too"),
            (
                "cp-2",
                "10.0.2.11",
                "10.0.2.11 of cp-2 is no node address in 10.0.1.0/24",
            ),
            ("cp-2", "10.0.1.0", "10.0.1.0 of cp-2 is no node address in 10.0.1.0/24"),
            (
                "cp-2",
                "10.0.1.255",
                "10.0.1.255 of cp-2 is no node address in 10.0.1.0/24",
            ),
            ("cp-2", "fd00::11", "fd00::11 of cp-2 is no node address in 10.0.1.0/24"),
        ] {
            assert_eq!(
                plan.reserve(node, address(fixed)).expect_err(fixed).to_string(),
                message
            );
        }
    }

    #[test]
    fn a_full_network_says_so() {
        let mut plan = plan("192.0.2.8/29");
        for i in 1..=6 {
            plan.assign(Role::Worker, &format!("worker-{i}"))
                .expect("there is room for 6");
        }
        let full = "the node network 192.0.2.8/29 is full: its 6 addresses are taken, and cp-1 gets none";
        assert_eq!(
            plan.assign(Role::ControlPlane, "cp-1")
                .expect_err("none is left")
                .to_string(),
            full
        );
    }

    #[test]
    fn networks_that_overlap_or_are_of_no_use_are_refused() {
        let refusal =
            |text: &str, others: &[(&str, Network)]| Plan::new(network(text), others).expect_err(text).to_string();
        assert_eq!(
            refusal(
                "10.0.1.0/24",
                &[
                    ("the service network", network("fd00:1::/112")),
                    ("the pod network", network("10.0.0.0/16"))
                ]
            ),
            "the node network 10.0.1.0/24 overlaps the pod network 10.0.0.0/16: packets for one would go to the other"
        );
        assert!(
            refusal("fd00::/64", &[("the service network", network("fd00::5:0/112"))])
                .contains("overlaps the service network")
        );
        assert!(refusal("10.0.1.0/30", &[]).contains("wrong size"));
        assert!(refusal("fd00::/120", &[]).contains("wrong size"));
        assert!(Plan::new(network("10.0.1.0/24"), &[("the pod network", network("10.244.0.0/16"))]).is_ok());
        for text in ["10.0.1.0", "10.0.1.0/33", "fd00::/129", "nodes/24"] {
            assert!(
                text.parse::<Network>()
                    .expect_err(text)
                    .to_string()
                    .contains("is no network")
            );
        }
    }

    fn plan(text: &str) -> Plan {
        Plan::new(network(text), &[]).expect("a network of the right size")
    }

    fn network(text: &str) -> Network {
        text.parse().expect("a network")
    }

    fn address(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }
}

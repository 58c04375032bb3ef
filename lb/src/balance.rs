//! Choice among the backends that may be chosen: fewest sessions, smooth weighted round robin (nginx's), rendezvous
//! hash of the client, the better of two drawn at random.
//!
//! Pure: the caller opens the candidates' [`Share`]s, [`choose`] names one of them. Nothing is allocated, and every
//! method is linear in the number of backends.

use std::{
    cmp::Ordering,
    net::{IpAddr, SocketAddr},
};

use crate::config::Balance;

/// The scale of a backend whose whole weight counts.
pub const FULL: u32 = 1024;

/// What the choice knows of one backend, and what it remembers of it.
#[derive(Clone, Debug)]
pub struct Share {
    /// A candidate in this choice; set by the caller before each one.
    pub open: bool,
    /// Sessions running now, connects in flight included.
    pub sessions: u64,
    weight: u32,
    /// How much of its weight counts, of [`FULL`]: less while it starts slowly.
    scale: u32,
    /// Below `weight` for a while after failures (nginx's effective_weight).
    effective: u32,
    /// How far the rotation owes it a turn.
    current: i64,
    /// Hash of its address.
    key: u64,
}

impl Share {
    /// The share of the backend at `address`. `weight` is 1 to 256; 0 is taken as 1.
    pub fn new(weight: u16, address: Option<SocketAddr>) -> Self {
        let weight = u32::from(weight).max(1);
        let key = address.map_or(0, |address| {
            hash(octets(address.ip()).into_iter().chain(address.port().to_be_bytes()))
        });
        Self {
            open: false,
            sessions: 0,
            weight,
            scale: FULL,
            effective: weight,
            current: 0,
            key,
        }
    }

    /// Another weight from now on; the rotation goes on from where it is.
    pub fn set_weight(&mut self, weight: u16) {
        let weight = u32::from(weight).max(1);
        if weight != self.weight {
            self.weight = weight;
            self.effective = weight;
        }
    }

    /// How much of its weight counts from now on: 1 to [`FULL`]. [`Balance::Source`] does not mind it: a client that was
    /// sent elsewhere for a while would change its backend twice.
    pub const fn set_scale(&mut self, scale: u32) {
        self.scale = scale;
    }

    /// The weight that counts; a whole one is a multiple of [`FULL`].
    const fn scaled(&self) -> u32 {
        self.weight.saturating_mul(self.scale)
    }

    /// Fewer turns after a failure, regained one by one with each choice it takes part in (nginx's effective_weight:
    /// a failure costs weight / `max_fails`).
    pub fn weaken(&mut self, max_fails: u32) {
        self.effective = self.effective.saturating_sub(self.weight / max_fails.max(1));
    }

    /// Compares the load each would have with one session more, by weight, without division.
    ///
    /// While one starts slowly its sessions weigh more, but not the one more: with few sessions around it would get none
    /// at all otherwise.
    fn load(&self, other: &Self) -> Ordering {
        let cross = |of: &Self, by: &Self| {
            let sessions = of.sessions.saturating_mul(u64::from(FULL));
            sessions
                .saturating_add(u64::from(of.scale))
                .saturating_mul(u64::from(by.scaled()))
        };
        cross(self, other).cmp(&cross(other, self))
    }

    /// Waiting time of an exponential draw with rate `weight`, seeded by client and backend: the shortest wins with
    /// probability weight / sum of weights, whoever else takes part (the logarithmic method of weighted rendezvous
    /// hashing: Schindelhauer and Schomaker, "Weighted distributed hash tables", 2005).
    fn wait(&self, client: u64) -> f64 {
        // 53 bits and a half: never 0, never 1.
        let uniform = ((mix(client ^ self.key) >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
        -uniform.ln() / f64::from(self.weight)
    }
}

/// Names one of the open backends; `None` if none is open.
///
/// `client` matters to [`Balance::Source`] alone, and an IPv4-mapped address counts as the IPv4 address it is: the same
/// client gets the same backend in every process, after every reload and in whatever order the backends are listed.
/// `random` is drawn from by [`Balance::RandomTwo`] alone.
pub fn choose<B>(how: Balance, backends: &mut [B], client: IpAddr, random: &mut Random) -> Option<usize>
where
    B: AsRef<Share> + AsMut<Share>,
{
    match how {
        Balance::RoundRobin => rotate(backends, |share| share.open),
        Balance::LeastConnections => least(backends),
        Balance::Source => rendezvous(backends, client),
        Balance::RandomTwo => two(backends, random),
    }
}

/// Smooth weighted round robin among those that `takes_part` lets in: each gains its weight, the richest is chosen and
/// pays what all gained. Weights 5, 1, 1 give a a b a c a a.
fn rotate<B>(backends: &mut [B], takes_part: impl Fn(&Share) -> bool) -> Option<usize>
where
    B: AsMut<Share>,
{
    let mut total = 0_i64;
    let mut best: Option<(usize, i64)> = None;
    for (index, backend) in backends.iter_mut().enumerate() {
        let share = backend.as_mut();
        if !takes_part(share) {
            continue;
        }
        let gain = i64::from(share.effective.saturating_mul(share.scale));
        share.current = share.current.saturating_add(gain);
        total = total.saturating_add(gain);
        share.effective = share.weight.min(share.effective.saturating_add(1));
        if best.is_none_or(|(_, most)| share.current > most) {
            best = Some((index, share.current));
        }
    }
    let (index, _) = best?;
    let share = backends.get_mut(index)?.as_mut();
    share.current = share.current.saturating_sub(total);
    Some(index)
}

/// The least loaded; equals take turns.
fn least<B>(backends: &mut [B]) -> Option<usize>
where
    B: AsRef<Share> + AsMut<Share>,
{
    let open = backends.iter().map(AsRef::as_ref).filter(|share| share.open);
    let best = open.min_by(|a, b| a.load(b))?.clone();
    rotate(backends, |share| share.open && share.load(&best) == Ordering::Equal)
}

fn rendezvous<B: AsRef<Share>>(backends: &[B], client: IpAddr) -> Option<usize> {
    let client = hash(octets(client));
    let open = backends
        .iter()
        .map(AsRef::as_ref)
        .enumerate()
        .filter(|(_, share)| share.open);
    let waits = open.map(|(index, share)| (index, share.wait(client), share.key));
    waits
        .min_by(|a, b| a.1.total_cmp(&b.1).then(a.2.cmp(&b.2)))
        .map(|(index, ..)| index)
}

/// Draws two different ones by weight and takes the less loaded; the first drawn if they are equal.
fn two<B: AsRef<Share>>(backends: &[B], random: &mut Random) -> Option<usize> {
    let mut draw = |except: Option<usize>| {
        let open = || {
            let shares = backends.iter().map(AsRef::as_ref).enumerate();
            shares.filter(move |(index, share)| share.open && Some(*index) != except)
        };
        let total = open().map(|(_, share)| u64::from(share.scaled())).sum();
        let mut left = random.below(total);
        for (index, share) in open() {
            let weight = u64::from(share.scaled());
            if left < weight {
                return Some((index, share));
            }
            left -= weight;
        }
        None
    };
    let first = draw(None)?;
    let better = draw(Some(first.0)).filter(|second| second.1.load(first.1) == Ordering::Less);
    Some(better.unwrap_or(first).0)
}

/// Numbers from a seed: SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The same seed gives the same numbers.
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A number below `bound`; 0 if `bound` is 0. Biased by at most `bound` / 2^64.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let wide = u128::from(mix(self.0)) * u128::from(bound);
        u64::try_from(wide >> 64).unwrap_or(0)
    }
}

/// SplitMix64's finalizer: every bit of the input moves about half of the output's.
pub(crate) const fn mix(mut value: u64) -> u64 {
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// FNV-1a, then [`mix`]: the standard library's hashers promise no stability between versions, and a client's backend
/// must not change with the compiler.
fn hash(bytes: impl IntoIterator<Item = u8>) -> u64 {
    let fnv = bytes.into_iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    mix(fnv)
}

/// An address as 16 bytes, IPv4 mapped into IPv6, so that both forms of one address are one.
fn octets(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use super::*;

    #[test]
    fn round_robin_with_weights_5_1_1_gives_the_smooth_sequence() {
        let mut shares = shares(&[5, 1, 1]);
        let sequence: String = (0..14)
            .map(|_| letter(pick(Balance::RoundRobin, &mut shares)))
            .collect();
        assert_eq!(sequence, "aabacaaaabacaa");
    }

    #[test]
    fn a_weakened_backend_regains_one_turn_with_each_choice() {
        let mut shares = shares(&[4, 4]);
        shares[0].weaken(1);
        assert_eq!(shares[0].effective, 0);
        for regained in 1..=4 {
            pick(Balance::RoundRobin, &mut shares);
            assert_eq!(shares[0].effective, regained);
        }
        pick(Balance::RoundRobin, &mut shares);
        assert_eq!(shares[0].effective, 4);
        shares[0].weaken(3);
        assert_eq!(
            shares[0].effective, 3,
            "weight / max_fails in whole numbers, as nginx divides"
        );
    }

    #[test]
    fn equally_loaded_backends_take_turns() {
        let mut shares = shares(&[1, 1, 1]);
        // Every session ends before the next begins: the loads are always equal.
        let sequence: String = (0..6)
            .map(|_| letter(pick(Balance::LeastConnections, &mut shares)))
            .collect();
        assert_eq!(sequence, "abcabc");
    }

    #[test]
    fn least_connections_fills_by_weight() {
        let mut shares = shares(&[5, 1, 2]);
        for _ in 0..80 {
            let index = pick(Balance::LeastConnections, &mut shares);
            shares[index].sessions += 1;
        }
        let sessions: Vec<u64> = shares.iter().map(|share| share.sessions).collect();
        assert_eq!(sessions, [50, 10, 20]);
    }

    #[test]
    fn the_source_hash_moves_only_the_clients_of_a_lost_backend() {
        let mut shares = shares(&[1, 1, 1, 1, 1]);
        let before: Vec<usize> = clients().map(|client| of(client, &mut shares)).collect();
        shares[2].open = false;
        let mut moved = 0;
        for (client, old) in clients().zip(before) {
            let now = of(client, &mut shares);
            if old == 2 {
                assert_ne!(now, 2);
                moved += 1;
            } else {
                assert_eq!(now, old);
            }
        }
        assert!((150..250).contains(&moved), "a fifth of 1000 clients, not {moved}");
    }

    #[test]
    fn the_source_hash_honours_weights() {
        let mut shares = shares(&[3, 1]);
        let first = clients().filter(|client| of(*client, &mut shares) == 0).count();
        assert!(
            (700..800).contains(&first),
            "three quarters of 1000 clients, not {first}"
        );
    }

    #[test]
    fn the_source_hash_does_not_depend_on_the_order_of_the_backends() {
        let mut forth = shares(&[1, 2, 3]);
        let mut back = forth.clone();
        back.reverse();
        for client in clients() {
            assert_eq!(of(client, &mut forth), 2 - of(client, &mut back));
        }
    }

    #[test]
    fn the_source_hash_never_changes_and_sees_through_mapped_addresses() {
        let mut shares = shares(&[1, 1, 1, 1, 1]);
        let sequence: String = clients()
            .take(12)
            .map(|client| letter(of(client, &mut shares)))
            .collect();
        assert_eq!(sequence, GOLDEN, "clients would move at an upgrade");
        for client in ["192.0.2.1", "192.0.2.2", "192.0.2.3"] {
            let mapped = format!("::ffff:{client}").parse().expect("an address");
            assert_eq!(
                of(client.parse().expect("an address"), &mut shares),
                of(mapped, &mut shares)
            );
        }
    }

    #[test]
    fn the_better_of_two_is_never_the_most_loaded_of_all() {
        let mut shares = shares(&[1, 1, 1]);
        shares[1].sessions = 100;
        let mut random = Random::new(7);
        for _ in 0..1000 {
            assert_ne!(choose(Balance::RandomTwo, &mut shares, CLIENT, &mut random), Some(1));
        }
    }

    #[test]
    fn random_two_honours_weights_and_repeats_with_its_seed() {
        let run = |seed| {
            let mut shares = shares(&[6, 3, 1]);
            let mut random = Random::new(seed);
            let mut draw = || {
                let index = choose(Balance::RandomTwo, &mut shares, CLIENT, &mut random).expect("all are open");
                shares[index].sessions += 1;
                index
            };
            (0..1000).map(|_| draw()).collect::<Vec<usize>>()
        };
        let drawn = run(1);
        assert_eq!(drawn, run(1));
        assert_ne!(drawn, run(2));
        for (index, fair) in [600, 300, 100].into_iter().enumerate() {
            let sessions = drawn.iter().filter(|drawn| **drawn == index).count();
            assert!(sessions.abs_diff(fair) < 50, "{sessions} is far from {fair}");
        }
    }

    #[test]
    fn a_backend_that_starts_slowly_gets_as_much_less_as_its_scale_says() {
        for how in [Balance::LeastConnections, Balance::RoundRobin, Balance::RandomTwo] {
            let mut shares = shares(&[1, 1, 1]);
            shares[2].set_scale(FULL / 8);
            let mut random = Random::new(1);
            for _ in 0..1700 {
                let index = choose(how, &mut shares, CLIENT, &mut random).expect("all are open");
                shares[index].sessions += 1;
            }
            let slow = shares[2].sessions;
            assert!((90..=110).contains(&slow), "{how:?}: {slow} of 1700 are no 1 of 17");
        }
        let mut shares = shares(&[1, 1]);
        shares[0].set_scale(FULL / 8);
        let mut random = Random::new(1);
        let idle = (0..90).filter(|_| {
            let index = choose(Balance::LeastConnections, &mut shares, CLIENT, &mut random);
            index == Some(0)
        });
        assert_eq!(idle.count(), 10, "also while there are no sessions");
        let mut shares = self::shares(&[1, 1, 1]);
        let before: Vec<usize> = clients().map(|client| of(client, &mut shares)).collect();
        shares[2].set_scale(FULL / 8);
        let after: Vec<usize> = clients().map(|client| of(client, &mut shares)).collect();
        assert_eq!(before, after, "clients stay with their backend");
    }

    #[test]
    fn a_closed_backend_is_never_chosen() {
        for how in [
            Balance::RoundRobin,
            Balance::LeastConnections,
            Balance::Source,
            Balance::RandomTwo,
        ] {
            let mut shares = shares(&[1, 9, 1]);
            shares[1].open = false;
            for client in clients() {
                let index = choose(how, &mut shares, client, &mut Random::new(1)).expect("two are open");
                assert_ne!(index, 1);
            }
            shares.iter_mut().for_each(|share| share.open = false);
            assert_eq!(choose(how, &mut shares, CLIENT, &mut Random::new(1)), None);
        }
    }

    const CLIENT: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);
    const GOLDEN: &str = "bedebeeccecc";

    impl AsRef<Self> for Share {
        fn as_ref(&self) -> &Self {
            self
        }
    }

    impl AsMut<Self> for Share {
        fn as_mut(&mut self) -> &mut Self {
            self
        }
    }

    fn shares(weights: &[u16]) -> Vec<Share> {
        let share = |(index, weight): (usize, &u16)| {
            let address = format!("[2001:db8::{index:x}]:6443").parse().expect("an address");
            Share {
                open: true,
                ..Share::new(*weight, Some(address))
            }
        };
        weights.iter().enumerate().map(share).collect()
    }

    fn clients() -> impl Iterator<Item = IpAddr> {
        (0..1000_u32).map(|n| IpAddr::from([198, 51, (n / 250) as u8, (n % 250) as u8]))
    }

    fn pick(how: Balance, shares: &mut [Share]) -> usize {
        choose(how, shares, CLIENT, &mut Random::new(1)).expect("one is open")
    }

    fn of(client: IpAddr, shares: &mut [Share]) -> usize {
        choose(Balance::Source, shares, client, &mut Random::new(1)).expect("one is open")
    }

    fn letter(index: usize) -> char {
        char::from(b'a' + index as u8)
    }
}

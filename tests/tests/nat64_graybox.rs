//! The packets of Jool's graybox suite, its stateless half, through the running translator.
//!
//! ```text
//! packet socket on the TUN device ── edge: edged, worker nat64
//! ```
//! Nobody here wrote the packets, and they are not part of this project: `EDGE_SHARED` names a directory with
//! `jool-graybox/cases.tsv` and the files that it speaks of. Without it there is nothing to run, which is said aloud.

use std::{collections::BTreeSet, env, fs, path::Path, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use tests::{Edge, Lab, packets::PacketSocket};

const DEVICE: &str = "nat64";
/// For what a packet becomes.
const PATIENCE: Duration = Duration::from_secs(2);

#[test]
fn every_packet_of_the_suite_becomes_what_it_should() -> Result<()> {
    let Some(shared) = env::var_os("EDGE_SHARED") else {
        println!("NOT RUN: EDGE_SHARED names no directory with jool-graybox/cases.tsv, so no packet was translated");
        return Ok(());
    };
    // From the project's root, as who sets it sees it: tests run elsewhere.
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let folder = root.join(shared).join("jool-graybox");
    let cases = cases(&folder)?;
    ensure!(!cases.is_empty(), "{} has no cases", folder.display());
    let lab = Lab::new()?;
    let node = lab.node("edge", 10)?;
    // The suite has this network elsewhere.
    node.netns().ip("addr flush dev eth0")?;
    let mut running = Setup::default().text();
    let edge = Edge::start(&node, &running)?;
    let socket = PacketSocket::open(&node, DEVICE)?;
    let mut failed = Vec::new();
    for case in &cases {
        let wanted = Setup::of(&case.differs)
            .with_context(|| format!("{}: {}", case.name, case.differs))?
            .text();
        if wanted != running {
            let said = edge.apply(&wanted)?;
            ensure!(said.code == Some(0), "{}: {said}", case.name);
            running = wanted;
        }
        if let Err(why) = case.run(&socket) {
            eprintln!("{}: {why:#}", case.name);
            failed.push(case.name.clone());
        }
    }
    println!("{} of {}", cases.len() - failed.len(), cases.len());
    let drops = edge.ctl(&["nat64", "status"])?;
    ensure!(failed.is_empty(), "{failed:?} failed\n{drops}");
    Ok(())
}

/// What the translator is told; by default what the suite assumes.
struct Setup {
    prefix: &'static str,
    maps: Vec<(String, String)>,
    own_maps: bool,
    reporters_v4: Option<String>,
    reporter_v6: Option<String>,
    mtu_v4: u16,
    mtu_v6: u16,
    lowest_ipv6_mtu: u16,
    zero_checksum: &'static str,
}

impl Default for Setup {
    fn default() -> Self {
        let map = |v4: &str, v6: &str| (v4.to_owned(), v6.to_owned());
        Self {
            prefix: "2001:db8:100::/40",
            maps: vec![
                map("1.0.0.0/24", "2001:db8:3::/120"),
                map("10.0.0.0/24", "2001:db8:2::/120"),
            ],
            own_maps: false,
            reporters_v4: Some("203.0.113.8".into()),
            reporter_v6: None,
            mtu_v4: 1500,
            mtu_v6: 1500,
            lowest_ipv6_mtu: 1280,
            zero_checksum: "refuse",
        }
    }
}

impl Setup {
    /// With what a case changes, in the words of the table.
    fn of(differs: &str) -> Result<Self> {
        let mut setup = Self::default();
        for one in differs.split(';').map(str::trim).filter(|one| !one.is_empty()) {
            let (what, value) = one.split_once('=').context("no value")?;
            match what {
                "opt pool6" => setup.prefix = "none",
                "opt rfc6791v4-prefix" => setup.reporters_v4 = Some(value.to_owned()).filter(|value| value != "null"),
                "opt rfc6791v6-prefix" => setup.reporter_v6 = Some(value.to_owned()),
                "opt lowest-ipv6-mtu" => setup.lowest_ipv6_mtu = value.parse()?,
                "opt amend-udp-checksum-zero" => setup.zero_checksum = "compute",
                "mtu joolns/to_client_v4" => setup.mtu_v4 = value.parse()?,
                "mtu joolns/to_client_v6" => setup.mtu_v6 = value.parse()?,
                // A neighbour's, which is not there.
                "mtu client4ns/to_jool_v4" => {}
                map => {
                    let v4 = map.strip_prefix("eam ").with_context(|| format!("unknown: {one}"))?;
                    if !setup.own_maps {
                        setup.maps.clear();
                        setup.own_maps = true;
                    }
                    setup.maps.push((v4.to_owned(), value.to_owned()));
                }
            }
        }
        Ok(setup)
    }

    /// As a configuration.
    fn text(&self) -> String {
        let maps: Vec<String> = self
            .maps
            .iter()
            .map(|(v4, v6)| format!("{{ ipv4 = \"{v4}\", ipv6 = \"{v6}\" }}"))
            .collect();
        let reporters_v4 = self.reporters_v4.as_ref().map(|address| format!("\"{address}\""));
        let reporter_v6 = self.reporter_v6.as_ref();
        let reporter_v6 = reporter_v6.map(|address| format!("reporter_v6 = \"{address}\"\n"));
        format!(
            "version = 1\n[nat64]\nmode = \"stateless\"\nprefix = \"{}\"\ndevice = \"{DEVICE}\"\nmaps = [{}]\n\
             address_v4 = \"198.51.100.1\"\naddress_v6 = \"2001:db8:1c0:2:1::\"\nreporters_v4 = [{}]\n{}\
             mtu_v4 = {}\nmtu_v6 = {}\nlowest_ipv6_mtu = {}\nudp_zero_checksum = \"{}\"\n",
            self.prefix,
            maps.join(", "),
            reporters_v4.unwrap_or_default(),
            reporter_v6.unwrap_or_default(),
            self.mtu_v4,
            self.mtu_v6,
            self.lowest_ipv6_mtu,
            self.zero_checksum,
        )
    }
}

/// One line of the table.
struct Case {
    name: String,
    sent: Vec<Vec<u8>>,
    expected: Vec<Vec<u8>>,
    /// Octets that are not compared.
    ignored: BTreeSet<usize>,
    differs: String,
}

fn cases(folder: &Path) -> Result<Vec<Case>> {
    let table = folder.join("cases.tsv");
    let table = fs::read_to_string(&table).with_context(|| table.display().to_string())?;
    let files = |names: &str| -> Result<Vec<Vec<u8>>> {
        let names = names.split(';').map(str::trim).filter(|name| !name.is_empty());
        names
            .map(|name| {
                let file = folder.join("packets").join(name);
                fs::read(&file).with_context(|| file.display().to_string())
            })
            .collect()
    };
    let mut cases = Vec::new();
    for line in table.lines().skip(1) {
        let fields: Vec<&str> = line.split('\t').collect();
        let field = |number: usize| fields.get(number).copied().unwrap_or_default();
        if field(1) != "siit" {
            continue;
        }
        let ignored = field(7).split(',').filter(|number| !number.is_empty());
        cases.push(Case {
            name: field(0).into(),
            sent: files(field(4))?,
            expected: files(field(6))?,
            ignored: ignored.map(str::parse).collect::<Result<_, _>>()?,
            differs: field(8).into(),
        });
    }
    Ok(cases)
}

impl Case {
    fn run(&self, socket: &PacketSocket) -> Result<()> {
        let first = self.expected.first().context("nothing is expected")?;
        socket.drain()?;
        for packet in &self.sent {
            socket.send(packet)?;
        }
        let between = ends(first);
        let mut found = socket.collect(self.expected.len(), PATIENCE, |packet| ends(packet) == between)?;
        for expected in &self.expected {
            let place = found.iter().position(|found| self.same(expected, found));
            let Some(place) = place else {
                let shown: Vec<String> = found.iter().map(|found| self.difference(expected, found)).collect();
                bail!("{} packets came; {}", found.len(), shown.join("; "));
            };
            found.remove(place);
        }
        Ok(())
    }

    fn same(&self, expected: &[u8], found: &[u8]) -> bool {
        expected.len() == found.len() && self.differing(expected, found).is_empty()
    }

    fn differing(&self, expected: &[u8], found: &[u8]) -> Vec<usize> {
        let pairs = expected.iter().zip(found).enumerate();
        let differing = pairs.filter(|(at, (expected, found))| expected != found && !self.ignored.contains(at));
        differing.map(|(at, _)| at).collect()
    }

    fn difference(&self, expected: &[u8], found: &[u8]) -> String {
        let differing = self.differing(expected, found);
        let hex = |bytes: &[u8]| -> String { bytes.iter().take(120).map(|byte| format!("{byte:02x}")).collect() };
        format!(
            "{} octets for {}, others at {differing:?}\n  expected {}\n  found    {}",
            found.len(),
            expected.len(),
            hex(expected),
            hex(found)
        )
    }
}

/// Version, source and destination.
fn ends(packet: &[u8]) -> Option<(u8, &[u8])> {
    let version = packet.first()? >> 4;
    let ends = match version {
        4 => packet.get(12..20)?,
        _ => packet.get(8..40)?,
    };
    Some((version, ends))
}

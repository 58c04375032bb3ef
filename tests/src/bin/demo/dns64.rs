//! Part `dns64`: a node without IPv4 finds what has IPv4 only, and registers itself.
//!
//! ```text
//! node1 (fd00::21), node2 (fd00::22): no IPv4 ── edge (fd00::10): edged ── upstream (fd00::11): named, example.org
//!   getent, dig, nsupdate                          zone fleet of fd00::/64
//! ```

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context, Result};
use tests::{
    Edge, Lab, Node,
    dns::{self, Key, Named, Queries, Reply, dig, nsupdate, nsupdate_patient, summary, with_resolver},
    edge::{Said, say},
};

use crate::{Story, human};

/// An address that is in nobody's documentation: those the well-known prefix must not stand for (RFC 6052 §3.1).
const RECORDS: &str = "shop A 8.8.4.4\nboth A 8.8.4.4\nboth AAAA 2001:db8::46\nintranet A 10.1.2.3";
const SHOP: &str = "64:ff9b::808:404";

pub(crate) fn run(story: &mut Story) -> Result<()> {
    let stage = Stage::build(story)?;
    stage.resolve(story)?;
    let keys = stage.register(story)?;
    stage.refuse(story, &keys)?;
    stage.restart(story, &keys)
}

struct Stage {
    edge: Edge,
    server: SocketAddr,
    nodes: [Node; 2],
    _named: Named,
    _lab: Lab,
}

impl Stage {
    fn build(story: &mut Story) -> Result<Self> {
        let lab = Lab::alone()?;
        let (upstream, edge) = (lab.node("upstream", 11)?, lab.node("edge", 10)?);
        let nodes = [lab.node("node1", 21)?, lab.node("node2", 22)?];
        story.event("named starts as the authority of example.org, on a machine of its own");
        let named = Named::start(&upstream, &[("example.org", "", RECORDS)])?;
        let server = edge.at(dns::PORT);
        story.event(format!("edged starts: DNS64 and the zone fleet on {server}"));
        let config = format!(
            "version = 1\n\n[dns64]\nlisten = [\"{server}\"]\nprefixes = [\"64:ff9b::/96\"]\nupstreams = [\"udp://{}\"]\n\n\
             [[dns64.zone]]\nname = \"fleet\"\nprefixes = [\"fd00::/64\"]\n",
            upstream.at(dns::PORT)
        );
        let edge = Edge::start(&edge, &config)?;
        story.event("two nodes lose their IPv4 addresses, that of the loopback included");
        for node in &nodes {
            let gone = format!("addr del {}/24 dev eth0\naddr del 127.0.0.1/8 dev lo", node.ip4());
            node.netns().ip(&gone)?;
        }
        let mut left = nodes[0].command("ip");
        left.args(["-4", "addr", "show"]);
        let left = say(&mut left, Duration::from_secs(5))?;
        story.claim(left.out.is_empty(), "ip -4 addr shows nothing on node1");
        Ok(Self {
            edge,
            server,
            nodes,
            _named: named,
            _lab: lab,
        })
    }

    fn dig(&self, arguments: &[&str]) -> Result<Reply> {
        dig(&self.nodes[0], self.server, arguments)
    }

    fn update(&self, node: usize, key: &Key, lines: &str) -> Result<Said> {
        nsupdate(
            &self.nodes[node],
            self.server,
            Some(key),
            &[],
            &format!("zone fleet\n{lines}"),
        )
    }

    fn resolve(&self, story: &mut Story) -> Result<()> {
        story.event("(a) node1 looks up shop.example.org, which has IPv4 only");
        let a = self.dig(&["shop.example.org", "A"])?;
        story.note(format!("A     {}", a.data("A").join(" ")));
        let aaaa = self.dig(&["shop.example.org", "AAAA"])?;
        story.claim(
            aaaa.data("AAAA") == [SHOP],
            format!("dig: AAAA is {}", aaaa.data("AAAA").join(" ")),
        );
        let getent = say(
            &mut with_resolver(&self.nodes[0], self.server, &["getent", "ahostsv6", "shop.example.org"])?,
            Duration::from_secs(15),
        )?;
        story.claim(
            getent.out.contains(SHOP),
            format!(
                "so does its C library: {}",
                getent.out.lines().next().unwrap_or(&getent.err)
            ),
        );
        let both = self.dig(&["both.example.org", "AAAA"])?;
        story.claim(
            both.data("AAAA") == ["2001:db8::46"],
            format!(
                "both.example.org has IPv6 and is left alone: {}",
                both.data("AAAA").join(" ")
            ),
        );
        let intranet = self.dig(&["intranet.example.org", "AAAA"])?;
        story.claim(
            intranet.status == "NOERROR" && intranet.answers.is_empty(),
            "intranet.example.org is 10.1.2.3, for which the well-known prefix must not stand: no AAAA",
        );
        let found = self.dig(&["ipv4only.arpa", "AAAA"])?;
        story.claim(
            found.data("AAAA") == ["64:ff9b::c000:aa", "64:ff9b::c000:ab"],
            "ipv4only.arpa tells the prefix to those who look for it (RFC 7050)",
        );
        let why = self.edge.ctl(&["dns", "trace", "shop.example.org"])?;
        story.event("edgectl dns trace shop.example.org");
        story.note(&why.out);
        story.claim(
            why.code == Some(0) && why.out.contains(SHOP),
            "the operator is told why",
        );
        Ok(())
    }

    fn register(&self, story: &mut Story) -> Result<[Key; 2]> {
        story.event("(b) edgectl dns key add node1, node2; each node registers itself with nsupdate");
        let keys = [
            Key::add(&self.edge, "node1", "hmac-sha256")?,
            Key::add(&self.edge, "node2", "hmac-sha512")?,
        ];
        for (index, key) in keys.iter().enumerate() {
            let (name, address) = (name(index), self.nodes[index].ip().to_string());
            let said = self.update(index, key, &format!("update add {name} 1800 AAAA {address}"))?;
            story.claim(
                said.code == Some(0),
                format!("nsupdate: {name} AAAA {address}, {}", human(said.took)),
            );
            self.claim_name(story, index, "")?;
        }
        story.note(self.edge.ctl(&["dns", "zone", "show"])?.out);
        Ok(keys)
    }

    /// Both directions of a node's registration.
    fn claim_name(&self, story: &mut Story, index: usize, when: &str) -> Result<()> {
        let (name, address) = (name(index), self.nodes[index].ip().to_string());
        let forward = self.dig(&[&name, "AAAA"])?;
        let back = self.dig(&["-x", &address])?;
        story.claim(
            forward.data("AAAA") == [address.as_str()] && back.data("PTR") == [format!("{name}.")],
            format!(
                "{when}{name} is {}, and {address} is {}",
                forward.data("AAAA").join(" "),
                back.data("PTR").join(" ")
            ),
        );
        Ok(())
    }

    fn refuse(&self, story: &mut Story, keys: &[Key; 2]) -> Result<()> {
        story.event("(c) node2 tries what is not its own");
        let before = self.edge.json(&["dns", "zone", "show"])?;
        let stolen = self.nodes[0].ip();
        for (what, lines) in [
            (
                "node1's name, with its own key",
                "update add node1.fleet 1800 AAAA fd00::66".to_owned(),
            ),
            ("node1's address", format!("update add node2.fleet 1800 AAAA {stolen}")),
            (
                "an address outside the zone",
                "update add node2.fleet 1800 AAAA 2001:db8::66".into(),
            ),
            (
                "the API server's name",
                "update add api.fleet 1800 AAAA fd00::66".into(),
            ),
        ] {
            let said = self.update(1, &keys[1], &lines)?;
            let word = said.err.trim();
            story.claim(
                said.code == Some(2) && word.contains("REFUSED"),
                format!("{what}: {word}"),
            );
        }
        let unsigned = nsupdate(
            &self.nodes[1],
            self.server,
            None,
            &[],
            "zone fleet\nupdate add node2.fleet 1800 AAAA fd00::66",
        )?;
        story.claim(
            unsigned.err.contains("REFUSED"),
            format!("no key at all: {}", unsigned.err.trim()),
        );
        let after = self.edge.json(&["dns", "zone", "show"])?;
        story.claim(before == after, "the zone is as it was, to the serial");
        Ok(())
    }

    fn restart(&self, story: &mut Story, keys: &[Key; 2]) -> Result<()> {
        let serial = |stage: &Self| -> Result<u32> {
            let reply = stage.dig(&["fleet", "SOA"])?;
            reply.serial().with_context(|| reply.text.clone())
        };
        let expected = [SHOP.parse()?];
        let before = serial(self)?;
        for how in [
            "edged is stopped and started again",
            "kill -9 of the supervisor, and a start",
        ] {
            story.event(format!("(d) {how}"));
            if how.starts_with("kill") {
                self.edge.crash()?;
            } else {
                self.edge.restart()?;
            }
            for index in 0..2 {
                self.claim_name(story, index, "still ")?;
            }
            let after = serial(self)?;
            story.claim(
                after >= before,
                format!("the serial does not go back: {before}, {after}"),
            );
        }
        story.event("(e) kill -9 of the worker, under 200 queries a second");
        let queries = Queries::start(&self.nodes[0], self.server, 200, &["shop.example.org"], &expected);
        queries.more(50)?;
        let worker = self.edge.worker("dns64")?;
        tests::process::signal(worker, rustix::process::Signal::KILL)?;
        self.edge.wait_for_new_worker("dns64", worker, Duration::from_secs(5))?;
        queries.more(100)?;
        let asked = queries.stop();
        story.claim(
            asked.iter().all(|asked| asked.outcome.is_ok()),
            format!("every client was answered: {}", summary(&asked)),
        );
        let lines = "zone fleet\nupdate add node1.fleet 1800 TXT \"rack 7\"";
        let said = nsupdate_patient(&self.nodes[0], self.server, &keys[0], &[], lines)?;
        story.claim(said.code == Some(0), "node1's key is good still");
        Ok(())
    }
}

fn name(index: usize) -> String {
    format!("node{}.fleet", index + 1)
}

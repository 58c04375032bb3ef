//! Nodes register themselves with nsupdate, each with its key, and get no further than their own name.
//!
//! ```text
//! client (fd00::2): nsupdate, dig ── edge (fd00::10): edged, zone fleet of fd00::/64 and its reverse zone
//! ```

use std::{fs, net::SocketAddr, thread};

use anyhow::{Context, Result, ensure};
use tests::{
    Edge, Node, World,
    dns::{self, Key, Reply, dig, nsupdate, nsupdate_patient},
    edge::Said,
};

/// The zone of the addresses `fd00::/64`.
const REVERSE: &str = "0.0.0.0.0.0.0.0.0.0.0.0.0.0.d.f.ip6.arpa";

#[test]
fn a_node_registers_with_every_algorithm_over_udp_and_tcp_and_its_ptr_follows() -> Result<()> {
    let stage = Stage::set()?;
    let cases = [
        ("n1", "hmac-sha256", &[][..], "fd00::101"),
        ("n2", "hmac-sha384", &["-v"], "fd00::102"),
        ("n3", "hmac-sha512", &[], "fd00::103"),
        ("n4", "hmac-sha512", &["-v"], "fd00::104"),
    ];
    for (node, algorithm, options, address) in cases {
        let key = Key::add(&stage.edge, node, algorithm)?;
        let name = format!("{node}.fleet");
        let (serial, reverse) = stage.serials()?;
        // Without "zone" nsupdate finds out by itself which zone the name is in.
        let said = stage.update(&key, options, &format!("update add {name} 1800 AAAA {address}"))?;
        ensure!(said.code == Some(0), "{name}: {said}");
        let reply = stage.dig(&[&name, "AAAA"])?;
        assert_eq!(reply.data("AAAA"), [address], "{}", reply.text);
        assert!(reply.has("aa") && !reply.has("ad"), "{}", reply.text);
        assert_eq!(reply.answers[0].ttl, 1800, "{}", reply.text);
        assert_eq!(stage.dig(&["-x", address])?.data("PTR"), [format!("{name}.")]);
        let after = stage.serials()?;
        assert!(
            after.0 > serial && after.1 > reverse,
            "{name}: {serial} {reverse} {after:?}"
        );
        // Another address: the name of the one before is gone.
        let moved = address.replace("::1", "::2");
        let lines = format!("zone fleet\nupdate delete {name} AAAA\nupdate add {name} 600 AAAA {moved}");
        let said = stage.update(&key, options, &lines)?;
        ensure!(said.code == Some(0), "{name}: {said}");
        assert_eq!(stage.dig(&[&name, "AAAA"])?.data("AAAA"), [moved.as_str()]);
        assert_eq!(stage.dig(&["-x", address])?.status, "NXDOMAIN");
        assert_eq!(stage.dig(&["-x", &moved])?.data("PTR"), [format!("{name}.")]);
        let said = stage.update(&key, options, &format!("update delete {name}"))?;
        ensure!(said.code == Some(0), "{name}: {said}");
        assert_eq!(stage.dig(&[&name, "AAAA"])?.status, "NXDOMAIN");
        assert_eq!(stage.dig(&["-x", &moved])?.status, "NXDOMAIN");
        // What changes nothing does not change the serial either.
        let before = stage.serials()?;
        let said = stage.update(&key, options, &format!("update delete {name}"))?;
        ensure!(said.code == Some(0), "{name}: {said}");
        assert_eq!(stage.serials()?, before);
    }
    Ok(())
}

#[test]
fn a_key_changes_its_own_name_and_takes_only_free_addresses_of_the_zone() -> Result<()> {
    let stage = Stage::set()?;
    let (one, two) = (
        Key::add(&stage.edge, "n1", "hmac-sha256")?,
        Key::add(&stage.edge, "n2", "hmac-sha256")?,
    );
    for (key, line) in [
        (&one, "update add n1.fleet 1800 AAAA fd00::101"),
        (&two, "update add n2.fleet 1800 AAAA fd00::102"),
    ] {
        let said = stage.update(key, &[], line)?;
        ensure!(said.code == Some(0), "{line}: {said}");
    }
    let serials = stage.serials()?;
    let zone = stage.edge.json(&["dns", "zone", "show"])?;
    let reversed = "2.0.1.0.0.0.0.0.0.0.0.0.0.0.0.0";
    let refused = [
        // Another's name, also to delete it, and with prerequisites that hold.
        "update add n2.fleet 1800 AAAA fd00::103".to_owned(),
        "update delete n2.fleet".into(),
        "prereq yxdomain n2.fleet\nupdate delete n2.fleet AAAA fd00::102".into(),
        "update add new.fleet 1800 AAAA fd00::103".into(),
        "update add sub.n1.fleet 1800 AAAA fd00::103".into(),
        // Another's address, the edge's, one from elsewhere, none at all.
        "update add n1.fleet 1800 AAAA fd00::102".into(),
        "update add n1.fleet 1800 AAAA fd00::10".into(),
        "update add n1.fleet 1800 AAAA 2001:db8::1".into(),
        "update add n1.fleet 1800 AAAA fd00:0:0:1::1".into(),
        "update add n1.fleet 1800 AAAA fe80::1".into(),
        "update add n1.fleet 1800 AAAA 64:ff9b::808:404".into(),
        "update add n1.fleet 1800 AAAA fd00::".into(),
        // The edge's own names, and the apex.
        "update add edge.fleet 1800 AAAA fd00::103".into(),
        "update add api.fleet 1800 AAAA fd00::103".into(),
        "update delete ns.fleet AAAA".into(),
        "update add fleet 1800 AAAA fd00::103".into(),
        "update add fleet 1800 NS n1.fleet.".into(),
        // Other types, which would lead clients elsewhere.
        "update add n1.fleet 1800 A 192.0.2.1".into(),
        "update add n1.fleet 1800 CNAME n2.fleet.".into(),
        "update add n1.fleet 1800 NS n2.fleet.".into(),
        // Half of it is permitted, so none of it is done.
        "update add n1.fleet 1800 AAAA fd00::103\nupdate add n2.fleet 1800 AAAA fd00::104".into(),
        // Its neighbour's reverse name.
        format!("zone {REVERSE}\nupdate add {reversed}.{REVERSE} 1800 PTR n1.fleet."),
        format!("zone {REVERSE}\nupdate delete {reversed}.{REVERSE} PTR"),
    ];
    for lines in &refused {
        // The zone is named, so that nsupdate does not think before it asks.
        let lines = if lines.starts_with("zone") {
            lines.clone()
        } else {
            format!("zone fleet\n{lines}")
        };
        let said = stage.update(&one, &[], &lines)?;
        ensure!(
            said.code == Some(2) && said.err.contains("update failed: REFUSED"),
            "{lines}: {said}"
        );
    }
    // Without a key, with a wrong secret, with a key that was taken back, with one that never was.
    let line = "zone fleet\nupdate add n1.fleet 1800 AAAA fd00::103";
    let said = nsupdate(&stage.client, stage.server, None, &[], line)?;
    ensure!(said.err.contains("REFUSED"), "{said}");
    for (what, forged) in [
        ("a wrong secret", forge(&one, "secret")?),
        ("an unknown key", forge(&one, "name")?),
    ] {
        for options in [&[][..], &["-v"]] {
            let said = stage.update(&forged, options, line)?;
            ensure!(said.code != Some(0) && !said.err.contains("REFUSED"), "{what}: {said}");
            ensure!(
                ["BADSIG", "BADKEY", "NOTAUTH", "tsig"]
                    .iter()
                    .any(|word| said.err.contains(word)),
                "{what}: {said}"
            );
        }
    }
    let said = stage.update(
        &one,
        &[],
        "zone example.org\nupdate add n1.example.org 1800 AAAA fd00::103",
    )?;
    ensure!(said.err.contains("NOTAUTH"), "{said}");
    assert_eq!(stage.serials()?, serials, "nothing was changed");
    assert_eq!(stage.edge.json(&["dns", "zone", "show"])?, zone, "nothing was changed");
    // A key that is taken back takes its node's records along.
    let keys = stage.edge.json(&["dns", "key", "list"])?;
    let name = keys["keys"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|key| key["node"].as_str().is_some_and(|node| node.starts_with("n2.")));
    let name = name
        .and_then(|key| key["name"].as_str())
        .with_context(|| keys.to_string())?;
    let said = stage.edge.ctl(&["dns", "key", "rm", name])?;
    ensure!(said.code == Some(0), "{said}");
    assert_eq!(stage.dig(&["n2.fleet", "AAAA"])?.status, "NXDOMAIN");
    let said = stage.update(&two, &[], "zone fleet\nupdate add n2.fleet 1800 AAAA fd00::102")?;
    ensure!(said.code != Some(0), "{said}");
    // Its address is free for others now.
    let said = stage.update(&one, &[], "zone fleet\nupdate add n1.fleet 1800 AAAA fd00::102")?;
    ensure!(said.code == Some(0), "{said}");
    Ok(())
}

#[test]
fn each_prerequisite_of_rfc_2136_decides_on_the_whole_update() -> Result<()> {
    let stage = Stage::set()?;
    let key = Key::add(&stage.edge, "n1", "hmac-sha256")?;
    let update = |prerequisite: &str, add: &str| {
        stage.update(
            &key,
            &[],
            &format!("zone fleet\nprereq {prerequisite}\nupdate add n1.fleet 1800 {add}"),
        )
    };
    let steps = [
        ("yxdomain n1.fleet", "AAAA fd00::101", "NXDOMAIN"),
        ("yxrrset n1.fleet AAAA", "AAAA fd00::101", "NXRRSET"),
        ("nxdomain n1.fleet", "AAAA fd00::101", ""),
        ("nxdomain n1.fleet", "AAAA fd00::102", "YXDOMAIN"),
        ("nxrrset n1.fleet AAAA", "AAAA fd00::102", "YXRRSET"),
        ("nxrrset n1.fleet TXT", "TXT \"rack 7\"", ""),
        ("yxrrset n1.fleet AAAA fd00::109", "AAAA fd00::102", "NXRRSET"),
        ("yxrrset n1.fleet AAAA fd00::101", "AAAA fd00::102", ""),
        ("yxrrset n1.fleet AAAA", "AAAA fd00::103", ""),
        ("yxdomain n1.fleet", "AAAA fd00::104", ""),
        // Also a name that is not its own may be asked about.
        ("yxdomain api.fleet", "AAAA fd00::105", ""),
        ("nxdomain api.fleet", "AAAA fd00::106", "YXDOMAIN"),
    ];
    for (prerequisite, add, failure) in steps {
        let before = stage.serials()?;
        let said = update(prerequisite, add)?;
        if failure.is_empty() {
            ensure!(said.code == Some(0), "{prerequisite}: {said}");
            ensure!(stage.serials()?.0 > before.0, "{prerequisite}");
        } else {
            ensure!(
                said.err.contains(&format!("update failed: {failure}")),
                "{prerequisite}: {said}"
            );
            ensure!(stage.serials()? == before, "{prerequisite}");
        }
    }
    let known = stage.dig(&["n1.fleet", "AAAA"])?;
    assert_eq!(
        known.data("AAAA"),
        ["fd00::101", "fd00::102", "fd00::103", "fd00::104", "fd00::105"],
        "{}",
        known.text
    );
    Ok(())
}

#[test]
fn of_two_nodes_that_want_one_address_at_once_exactly_one_gets_it() -> Result<()> {
    const ROUNDS: usize = 12;
    let stage = Stage::set()?;
    let keys = [
        Key::add(&stage.edge, "n1", "hmac-sha256")?,
        Key::add(&stage.edge, "n2", "hmac-sha256")?,
    ];
    let mut wins = [0; 2];
    for round in 0..ROUNDS {
        let address = format!("fd00::3:{round:x}");
        let options: &[&str] = if round % 2 == 0 { &[] } else { &["-v"] };
        let race = |node: usize| {
            let name = format!("n{}.fleet", node + 1);
            let lines = format!("zone fleet\nupdate delete {name} AAAA\nupdate add {name} 1800 AAAA {address}");
            stage.update(&keys[node], options, &lines)
        };
        let said = thread::scope(|scope| {
            let both = [0, 1].map(|node| scope.spawn(move || race(node)));
            both.map(|thread| thread.join().expect("no panic in there"))
        });
        let won: Vec<usize> = said
            .into_iter()
            .enumerate()
            .map(|(node, said)| Ok((node, said?)))
            .collect::<Result<Vec<_>>>()?
            .into_iter()
            .filter(|(_, said)| said.code == Some(0))
            .map(|(node, _)| node)
            .collect();
        ensure!(won.len() == 1, "round {round}: {won:?} won");
        wins[won[0]] += 1;
        let holder = format!("n{}.fleet.", won[0] + 1);
        assert_eq!(
            stage.dig(&["-x", &address])?.data("PTR"),
            [holder.as_str()],
            "round {round}"
        );
        assert_eq!(
            stage.dig(&[&holder, "AAAA"])?.data("AAAA"),
            [address.as_str()],
            "round {round}"
        );
    }
    println!("of {ROUNDS} races n1 won {} and n2 {}", wins[0], wins[1]);
    Ok(())
}

#[test]
fn names_and_keys_outlive_a_restart_and_a_kill_of_the_supervisor() -> Result<()> {
    let stage = Stage::set()?;
    let key = Key::add(&stage.edge, "n1", "hmac-sha384")?;
    let said = stage.update(&key, &[], "zone fleet\nupdate add n1.fleet 1800 AAAA fd00::101")?;
    ensure!(said.code == Some(0), "{said}");
    for (number, how) in ["a restart", "a kill"].into_iter().enumerate() {
        let serials = stage.serials()?;
        if number == 0 {
            stage.edge.restart()?;
        } else {
            stage.edge.crash()?;
        }
        assert!(
            stage.dig(&["n1.fleet", "AAAA"])?.data("AAAA").contains(&"fd00::101"),
            "after {how}"
        );
        assert_eq!(
            stage.dig(&["-x", "fd00::101"])?.data("PTR"),
            ["n1.fleet."],
            "after {how}"
        );
        let after = stage.serials()?;
        assert!(
            after.0 >= serials.0 && after.1 >= serials.1,
            "after {how}: {serials:?} {after:?}"
        );
        let lines = format!("zone fleet\nupdate add n1.fleet 1800 AAAA fd00::20{number}");
        let said = stage.update(&key, &[], &lines)?;
        ensure!(said.code == Some(0), "after {how}: {said}");
        assert!(stage.serials()?.0 > serials.0, "after {how}");
    }
    Ok(())
}

/// An edge with an empty zone, and a client that may write to it.
struct Stage {
    edge: Edge,
    client: Node,
    server: SocketAddr,
    _world: World,
}

impl Stage {
    fn set() -> Result<Self> {
        let world = World::new(0)?;
        let server = world.edge.at(dns::PORT);
        let config = format!(
            "version = 1\n\n[dns64]\nlisten = [\"{server}\"]\nupstreams = [\"udp://[fd00::11]\"]\n\n[[dns64.zone]]\n\
             name = \"fleet\"\nprefixes = [\"fd00::/64\"]\n"
        );
        Ok(Self {
            edge: Edge::start(&world.edge, &config)?,
            client: world.client.clone(),
            server,
            _world: world,
        })
    }

    fn dig(&self, arguments: &[&str]) -> Result<Reply> {
        dig(&self.client, self.server, arguments)
    }

    fn update(&self, key: &Key, options: &[&str], lines: &str) -> Result<Said> {
        nsupdate_patient(&self.client, self.server, key, options, lines)
    }

    /// Of the zone and of its reverse zone.
    fn serials(&self) -> Result<(u32, u32)> {
        let serial = |zone: &str| -> Result<u32> {
            let reply = self.dig(&[zone, "SOA"])?;
            reply.serial().with_context(|| reply.text.clone())
        };
        Ok((serial("fleet")?, serial(REVERSE)?))
    }
}

/// A copy of a key with another secret or another name.
fn forge(key: &Key, what: &str) -> Result<Key> {
    let text = fs::read_to_string(key.file())?;
    let forged = if what == "secret" {
        let (head, rest) = text.split_once("secret \"").context("a secret")?;
        let first = if rest.starts_with('A') { 'B' } else { 'A' };
        format!("{head}secret \"{first}{}", &rest[1..])
    } else {
        text.replacen("key \"", "key \"x", 1)
    };
    ensure!(forged != text, "a key file as named writes it: {text}");
    let file = key.file().with_extension(what);
    fs::write(&file, forged)?;
    Ok(Key::at(&file))
}

//! The resolver between real peers: dig and delv before it, named and unbound behind it.
//!
//! ```text
//! client (fd00::2): dig, delv ── edge (fd00::10): edged, worker dns64 ─┬─ cp1 (fd00::11): named, authority of example.org
//!                                                                      └─ cp2 (fd00::12): unbound, UDP, TCP and TLS
//! ```

use std::{fs, net::SocketAddr, time::Duration};

use anyhow::{Context, Result, ensure};
use tests::{
    Edge, Node, World,
    dns::{self, Named, Queries, Reply, Unbound, dig, dig_says},
    edge::say,
    lab::need_tool,
    tls::{Ca, Files},
    wait_for, wait_until,
};

const PATIENCE: Duration = Duration::from_secs(10);
/// `v4.example.org` under the well-known prefix.
const MAPPED: &str = "64:ff9b::808:404";

/// The zone that named serves.
const RECORDS: &str = "\
ns AAAA fd00::11
v4 A 8.8.4.4
v6 AAAA 2001:db8::6
both A 8.8.4.4
both AAAA 2001:db8::46
mapped A 8.8.4.4
mapped AAAA ::ffff:8.8.4.4
private A 10.1.2.3
documentation A 192.0.2.1
alias CNAME middle
middle CNAME v4
tree DNAME below
x.below A 8.8.4.4
short 30 A 8.8.4.4
brief 1 A 8.8.4.4
text TXT \"only\"
*.wild A 8.8.4.4";

/// The same in words of unbound, as far as that can be said there.
const DATA: &str = "\
  local-zone: \"example.org.\" static
  local-data: \"example.org. 300 IN SOA ns.example.org. admin.example.org. 1 3600 600 86400 60\"
  local-data: \"v4.example.org. 300 IN A 8.8.4.4\"
  local-data: \"v6.example.org. 300 IN AAAA 2001:db8::6\"
  local-data: \"both.example.org. 300 IN A 8.8.4.4\"
  local-data: \"both.example.org. 300 IN AAAA 2001:db8::46\"
  local-data: \"mapped.example.org. 300 IN A 8.8.4.4\"
  local-data: \"mapped.example.org. 300 IN AAAA ::ffff:8.8.4.4\"
  local-data: \"private.example.org. 300 IN A 10.1.2.3\"
  local-data: \"documentation.example.org. 300 IN A 192.0.2.1\"
  local-zone: \"wild.example.org.\" redirect
  local-data: \"wild.example.org. 300 IN A 8.8.4.4\"
  local-zone: \"example.net.\" static
  local-data: \"v4.example.net. 300 IN A 8.8.8.8\"
";

#[test]
fn every_upstream_and_transport_gives_the_same_synthesised_answers() -> Result<()> {
    let world = World::new(2)?;
    let ca = Ca::new("lab")?;
    let identity = ca.issue("unbound", None, &[], &["dns.example.org"])?;
    let files: Files = identity.write(&world.cp[1].file("unbound"))?;
    let trusted = world.edge.file("roots.crt");
    ca.write(&trusted)?;
    let _named = Named::start(&world.cp[0], &[("example.org", "", RECORDS)])?;
    let _unbound = Unbound::start(&world.cp[1], DATA, Some(&files))?;
    let config = |upstream: &str| {
        let more = format!("ca_file = \"{}\"", trusted.display());
        configuration(&world.edge, &[upstream], &more)
    };
    let edge = Edge::start(&world.edge, &config("udp://[fd00::11]"))?;
    let stage = Stage::of(&world);
    for upstream in [
        "udp://[fd00::11]",
        "tcp://[fd00::11]",
        "udp://[fd00::12]",
        "tcp://[fd00::12]",
        "tls://[fd00::12]#dns.example.org",
    ] {
        let said = edge.apply(&config(upstream))?;
        ensure!(said.code == Some(0), "{upstream}: {said}");
        for transport in ["+notcp", "+tcp"] {
            stage
                .judge_synthesis(transport)
                .with_context(|| format!("{upstream}, dig {transport}"))?;
        }
    }
    // A server that shows a certificate for another name is not asked anything.
    let said = edge.apply(&config("tls://[fd00::12]#dns.example.net"))?;
    ensure!(said.code == Some(0), "{said}");
    assert_eq!(stage.dig(&["v4.example.org", "AAAA", "+time=8"])?.status, "SERVFAIL");
    let status = edge.json(&["dns", "status"])?.to_string();
    assert!(status.contains("certificate"), "the status says why: {status}");
    Ok(())
}

#[test]
fn chains_are_followed_and_a_ttl_is_no_longer_than_that_of_the_denial() -> Result<()> {
    let (world, _named, _edge) = with_named("")?;
    let stage = Stage::of(&world);
    let alias = stage.dig(&["alias.example.org", "AAAA"])?;
    assert_eq!(alias.data("AAAA"), [MAPPED], "{}", alias.text);
    let kinds: Vec<&str> = alias.answers.iter().map(|record| record.kind.as_str()).collect();
    assert_eq!(kinds, ["CNAME", "CNAME", "AAAA"], "{}", alias.text);
    assert_eq!(alias.answers[2].name, "v4.example.org.", "{}", alias.text);
    let tree = stage.dig(&["x.tree.example.org", "AAAA"])?;
    assert_eq!(tree.data("AAAA"), [MAPPED], "{}", tree.text);
    assert_eq!(tree.data("DNAME"), ["below.example.org."], "{}", tree.text);
    // RFC 6147 §5.1.7: 300 of the A, 60 of the SOA in the denial; and 30 of the A.
    for (name, most) in [("v4", 60), ("short", 30)] {
        let reply = stage.dig(&[&format!("{name}.example.org"), "AAAA"])?;
        let ttl = reply.answers[0].ttl;
        assert!((most - 20..=most).contains(&ttl), "{name}: {}", reply.text);
    }
    Ok(())
}

#[test]
fn who_checks_signatures_gets_what_was_signed_and_nobody_is_told_ad() -> Result<()> {
    let (world, named, _edge) = with_named("dnssec-policy default; inline-signing yes;")?;
    let stage = Stage::of(&world);
    let server = world.cp[0].at(dns::PORT);
    wait_until("the zone is signed", PATIENCE, || {
        let signed = dig(&world.client, server, &["v4.example.org", "A", "+dnssec"]);
        signed.is_ok_and(|reply| !reply.data("RRSIG").is_empty())
    })?;
    // RFC 6147 §5.5: without CD the asker leaves the checks to others, and gets what it can use.
    for options in [&[][..], &["+dnssec"], &["+adflag"], &["+adflag", "+dnssec"]] {
        let reply = stage.dig(&[&["v4.example.org", "AAAA"], options].concat())?;
        assert_eq!(reply.data("AAAA"), [MAPPED], "{options:?}: {}", reply.text);
        assert!(reply.data("RRSIG").is_empty(), "nobody signed it: {}", reply.text);
        assert!(!reply.has("ad"), "{options:?}: {}", reply.text);
    }
    // With DO and CD it checks by itself, and what was made up would fail.
    let raw = stage.dig(&["v4.example.org", "AAAA", "+dnssec", "+cd"])?;
    assert!(raw.status == "NOERROR" && raw.answers.is_empty(), "{}", raw.text);
    assert!(
        raw.authorities.iter().any(|record| record.kind == "RRSIG"),
        "{}",
        raw.text
    );
    let a = stage.dig(&["v4.example.org", "A", "+dnssec", "+cd"])?;
    assert!(!a.data("RRSIG").is_empty() && !a.has("ad"), "{}", a.text);

    let anchor = trust_anchor(&named, &stage)?;
    let validate = |arguments: &[&str]| -> Result<String> {
        let mut delv = world.client.command(need_tool("delv", "bind9-dnsutils")?);
        delv.args(["@fd00::10", "-a", &anchor, "+root=example.org", "+multiline"])
            .args(arguments);
        let said = say(&mut delv, PATIENCE)?;
        Ok(format!("{}{}", said.out, said.err))
    };
    let said = validate(&["v6.example.org", "AAAA"])?;
    assert!(
        said.contains("; fully validated") && said.contains("2001:db8::6"),
        "{said}"
    );
    let said = validate(&["+cdflag", "v4.example.org", "AAAA"])?;
    assert!(said.contains("; negative response, fully validated"), "{said}");
    // Whoever validates without saying so gets what nobody signed, and notices (RFC 6147 §5.5, §6.2).
    let said = validate(&["v4.example.org", "AAAA"])?;
    assert!(said.contains("insecurity proof failed"), "{said}");
    // Who does not validate sees the synthesised address, in an answer that claims nothing.
    let said = validate(&["-i", "v4.example.org", "AAAA"])?;
    assert!(said.contains(MAPPED) && !said.contains("fully validated"), "{said}");
    Ok(())
}

#[test]
fn an_answer_fits_the_size_that_was_asked_for_and_tcp_has_all_of_it() -> Result<()> {
    let many: String = (0..80).map(|n| format!("many A 8.8.{n}.1\n")).collect();
    let (world, _named, _edge) = with_zone("", &format!("{RECORDS}\n{many}"))?;
    let stage = Stage::of(&world);
    let size = |reply: &Reply| -> Result<usize> {
        let (_, rest) = reply
            .text
            .split_once(";; MSG SIZE  rcvd: ")
            .context("dig tells the size")?;
        Ok(rest.lines().next().unwrap_or_default().trim().parse()?)
    };
    for (options, most) in [
        (&["+noedns"][..], 512),
        (&["+bufsize=512"], 512),
        (&["+bufsize=900"], 900),
        (&["+bufsize=1232"], 1232),
        (&["+bufsize=4096"], 1232),
        (&["+bufsize=1"], 512),
    ] {
        let reply = stage.dig(&[&["many.example.org", "AAAA", "+notcp", "+ignore"], options].concat())?;
        assert!(reply.has("tc"), "{options:?}: {}", reply.text);
        assert!(size(&reply)? <= most, "{options:?}: {}", reply.text);
        let whole = stage.dig(&[&["many.example.org", "AAAA"], options].concat())?;
        assert_eq!(whole.data("AAAA").len(), 80, "{options:?}: dig comes again by TCP");
    }
    let whole = stage.dig(&["many.example.org", "AAAA", "+tcp"])?;
    assert_eq!((whole.data("AAAA").len(), whole.has("tc")), (80, false));
    // Several questions on one connection.
    let kept = stage.dig_says(&["+tcp", "+keepopen", "v4.example.org", "AAAA", "v6.example.org", "AAAA"])?;
    assert!(kept.out.contains(MAPPED) && kept.out.contains("2001:db8::6"), "{kept}");
    Ok(())
}

#[test]
fn digs_options_are_answered_as_their_rfcs_say() -> Result<()> {
    let (world, _named, edge) = with_named("")?;
    let stage = Stage::of(&world);
    // RFC 7873: dig verifies the server's half of the cookie itself.
    let cookie = stage.dig(&["v4.example.org", "AAAA", "+cookie"])?;
    assert!(
        cookie.text.contains("; COOKIE: ") && cookie.text.contains("(good)"),
        "{}",
        cookie.text
    );
    // RFC 6891 §6.1.3.
    let version = stage.dig(&["v4.example.org", "AAAA", "+edns=7", "+noednsneg"])?;
    assert_eq!(version.status, "BADVERS", "{}", version.text);
    // What is not understood is ignored: options, and flags of EDNS.
    let odd = stage.dig(&[
        "v4.example.org",
        "AAAA",
        "+ednsopt=65001:c0ffee",
        "+ednsflags=0x40",
        "+nsid",
        "+subnet=192.0.2.0/24",
    ])?;
    assert_eq!(
        (odd.status.as_str(), odd.data("AAAA")),
        ("NOERROR", vec![MAPPED]),
        "{}",
        odd.text
    );
    let asked = |edge: &Edge| -> Result<u64> {
        let status = edge.json(&["dns", "status"])?;
        tests::edge::find(&status, "asked")
            .and_then(serde_json::Value::as_u64)
            .context("a count")
    };
    // Without RD what is known is told, and nobody else is asked.
    let before = asked(&edge)?;
    let known = stage.dig(&["v4.example.org", "AAAA", "+norec"])?;
    assert_eq!(
        (known.data("AAAA"), known.has("rd"), known.has("ra")),
        (vec![MAPPED], false, true),
        "{}",
        known.text
    );
    let unknown = stage.dig(&["one.wild.example.org", "AAAA", "+norec"])?;
    assert!(unknown.answers.is_empty(), "{}", unknown.text);
    assert_eq!(asked(&edge)?, before, "nobody was asked");
    // RFC 8482, classes and opcodes that are not served.
    assert!(stage.dig(&["v4.example.org", "ANY", "+notcp"])?.answers.len() <= 1);
    assert_ne!(stage.dig(&["version.bind", "CH", "TXT"])?.status, "NOERROR");
    assert_eq!(
        stage.dig(&["v4.example.org", "AAAA", "+opcode=STATUS"])?.status,
        "NOTIMP"
    );
    for zone in ["fleet", "example.org"] {
        let transfer = stage.dig_says(&[zone, "AXFR", "+tcp"])?;
        assert!(transfer.out.contains("Transfer failed"), "{transfer}");
    }
    // The case of the question comes back as it was, and does not matter.
    let mixed = stage.dig(&["V4.eXample.ORG", "AAAA"])?;
    assert!(
        mixed.text.contains("V4.eXample.ORG.") && mixed.data("AAAA") == [MAPPED],
        "{}",
        mixed.text
    );
    Ok(())
}

#[test]
fn an_address_under_the_prefix_has_the_name_of_its_ipv4_address() -> Result<()> {
    let world = World::new(2)?;
    let zones = [
        ("example.org", "", RECORDS),
        ("8.8.in-addr.arpa", "", "4.4 PTR v4.example.org."),
    ];
    let _named = Named::start(&world.cp[0], &zones)?;
    let edge = Edge::start(&world.edge, &configuration(&world.edge, &["udp://[fd00::11]"], ""))?;
    let stage = Stage::of(&world);
    let ptr = stage.dig(&["-x", MAPPED])?;
    assert_eq!(ptr.data("PTR"), ["v4.example.org."], "{}", ptr.text);
    let nobody = stage.dig(&["-x", "64:ff9b::808:405"])?;
    assert_eq!(nobody.status, "NXDOMAIN", "{}", nobody.text);
    // A shorter question exists, without data.
    let between = stage.dig(&[
        "8.0.8.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.b.9.f.f.4.6.0.0.ip6.arpa",
        "PTR",
    ])?;
    assert!(between.answers.is_empty(), "{}", between.text);
    let edge_name = stage.dig(&["-x", "fd00::10"])?;
    assert_eq!(edge_name.data("PTR").len(), 1, "{}", edge_name.text);
    let said = edge.apply(&configuration(
        &world.edge,
        &["udp://[fd00::11]"],
        "reverse = \"cname\"",
    ))?;
    ensure!(said.code == Some(0), "{said}");
    let cname = stage.dig(&["-x", MAPPED])?;
    assert_eq!(cname.data("CNAME"), ["4.4.8.8.in-addr.arpa."], "{}", cname.text);
    assert_eq!(cname.data("PTR"), ["v4.example.org."], "{}", cname.text);
    Ok(())
}

#[test]
fn with_every_upstream_dead_the_prefix_is_still_found_and_stale_answers_are_given() -> Result<()> {
    let (world, mut named, edge) = with_named("")?;
    let stage = Stage::of(&world);
    assert_eq!(stage.dig(&["brief.example.org", "AAAA"])?.data("AAAA"), [MAPPED]);
    named.kill();
    // RFC 7050 and RFC 8880: answered here, whatever happens elsewhere.
    let found = stage.dig(&["ipv4only.arpa", "AAAA"])?;
    assert_eq!(
        found.data("AAAA"),
        ["64:ff9b::c000:aa", "64:ff9b::c000:ab"],
        "{}",
        found.text
    );
    let four = stage.dig(&["ipv4only.arpa", "A"])?;
    assert_eq!(four.data("A"), ["192.0.0.170", "192.0.0.171"], "{}", four.text);
    assert_eq!(stage.dig(&["ipv4only.arpa", "TXT"])?.status, "NOERROR");
    for address in ["192.0.0.170", "64:ff9b::c000:aa"] {
        let reply = stage.dig(&["-x", address])?;
        assert_eq!(reply.data("PTR"), ["ipv4only.arpa."], "{}", reply.text);
    }
    assert_eq!(stage.dig(&["edge.fleet", "AAAA"])?.data("AAAA"), ["fd00::10"]);
    // RFC 8767: old is better than none.
    let stale = wait_for("a stale answer", PATIENCE, || {
        let reply = stage.dig(&["brief.example.org", "AAAA", "+time=5"]).ok()?;
        let served = tests::edge::find(&edge.json(&["dns", "status"]).ok()?, "stale")?.as_u64()?;
        (served > 0).then_some(reply)
    })
    .with_context(|| {
        let asked = stage.dig_says(&["brief.example.org", "AAAA", "+time=5"]);
        format!("{:?}\n{:?}\n{}", edge.ctl(&["dns", "status"]), asked, edge.log())
    })?;
    assert_eq!(stale.data("AAAA"), [MAPPED], "{}", stale.text);
    let never = stage.dig(&["unknown.example.org", "AAAA", "+time=8"])?;
    assert_eq!(never.status, "SERVFAIL", "{}", never.text);
    Ok(())
}

#[test]
fn of_two_upstreams_one_may_die_and_every_question_is_answered_at_the_first_try() -> Result<()> {
    let world = World::alone(2)?;
    let mut named = Named::start(&world.cp[0], &[("example.org", "", RECORDS)])?;
    let _unbound = Unbound::start(&world.cp[1], DATA, None)?;
    let upstreams = ["udp://[fd00::11]", "udp://[fd00::12]"];
    let _edge = Edge::start(&world.edge, &configuration(&world.edge, &upstreams, ""))?;
    // Each name once, so that nothing is known.
    let names: Vec<String> = (0..5000).map(|n| format!("n{n}.wild.example.org")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let queries = Queries::start(&world.client, world.edge.at(dns::PORT), 200, &names, &[MAPPED.parse()?]);
    queries.more(200)?;
    named.kill();
    queries.more(400)?;
    let asked = queries.stop();
    println!("{}", dns::summary(&asked));
    assert!(
        asked.iter().all(|asked| asked.outcome.is_ok() && asked.sent == 1),
        "{}",
        dns::summary(&asked)
    );
    Ok(())
}

#[test]
fn a_domain_has_its_own_servers_and_names_of_the_configuration_are_synthesised_for() -> Result<()> {
    let world = World::new(2)?;
    let _named = Named::start(&world.cp[0], &[("example.org", "", RECORDS)])?;
    let _unbound = Unbound::start(&world.cp[1], DATA, None)?;
    let more = "forward = { \"example.net\" = [\"udp://[fd00::12]\"] }\n\
                hosts = { \"registry.example.org\" = [\"8.8.4.4\"], \"both.example.org\" = [\"2001:db8::99\"] }\n\
                exclude_names = [\"wild.example.org\"]\nprefixes = [\"64:ff9b::/96\", \"2001:db8:64::/96\"]";
    let _edge = Edge::start(&world.edge, &configuration(&world.edge, &["udp://[fd00::11]"], more))?;
    let stage = Stage::of(&world);
    let cases = [
        ("v4.example.net", &["2001:db8:64::808:808", "64:ff9b::808:808"][..]),
        ("v4.example.org", &["2001:db8:64::808:404", MAPPED]),
        ("registry.example.org", &["2001:db8:64::808:404", MAPPED]),
        ("both.example.org", &["2001:db8::99"]),
        // A prefix of one's own may stand for private addresses.
        ("private.example.org", &["2001:db8:64::a01:203"]),
        ("a.wild.example.org", &[]),
    ];
    for (name, addresses) in cases {
        let reply = stage.dig(&[name, "AAAA"])?;
        assert_eq!(reply.data("AAAA"), addresses, "{name}: {}", reply.text);
        assert_eq!(reply.status, "NOERROR", "{name}: {}", reply.text);
    }
    let found = stage.dig(&["ipv4only.arpa", "AAAA"])?;
    assert_eq!(found.data("AAAA").len(), 4, "{}", found.text);
    Ok(())
}

#[test]
fn strangers_get_silence_by_udp_and_refused_by_tcp() -> Result<()> {
    let (world, _named, _edge) = with_named("")?;
    let inside = Stage::of(&world);
    assert_eq!(inside.dig(&["v4.example.org", "AAAA"])?.data("AAAA"), [MAPPED]);
    // The same machine by an address that is in no zone.
    world
        .client
        .netns()
        .ip("addr add fd99::2/64 dev eth0 nodad\nroute add fd00::10/128 dev eth0 src fd99::2")?;
    world.edge.netns().ip("addr add fd99::10/64 dev eth0 nodad")?;
    let silence = inside.dig_says(&[
        "-b",
        "fd99::2",
        "v4.example.org",
        "AAAA",
        "+notcp",
        "+time=1",
        "+tries=1",
    ])?;
    assert!(
        silence.out.contains("no servers could be reached") || silence.out.contains("timed out"),
        "{silence}"
    );
    let refused = inside.dig(&["-b", "fd99::2", "v4.example.org", "AAAA", "+tcp"])?;
    assert_eq!(refused.status, "REFUSED", "{}", refused.text);
    Ok(())
}

/// The client and the server it asks.
struct Stage {
    client: Node,
    server: SocketAddr,
}

impl Stage {
    fn of(world: &World) -> Self {
        Self {
            client: world.client.clone(),
            server: world.edge.at(dns::PORT),
        }
    }

    fn dig(&self, arguments: &[&str]) -> Result<Reply> {
        dig(&self.client, self.server, arguments)
    }

    fn dig_says(&self, arguments: &[&str]) -> Result<tests::edge::Said> {
        dig_says(&self.client, self.server, arguments)
    }

    /// The rules of RFC 6147 §5.1 that a client sees.
    fn judge_synthesis(&self, transport: &str) -> Result<()> {
        let cases = [
            ("v4", "NOERROR", &[MAPPED][..]),
            ("v6", "NOERROR", &["2001:db8::6"]),
            ("both", "NOERROR", &["2001:db8::46"]),
            // ::ffff:0:0/96 does not count as IPv6.
            ("mapped", "NOERROR", &[MAPPED]),
            // The well-known prefix stands for global addresses alone (RFC 6052 §3.1).
            ("private", "NOERROR", &[]),
            ("documentation", "NOERROR", &[]),
            ("missing", "NXDOMAIN", &[]),
        ];
        for (name, status, addresses) in cases {
            let reply = self.dig(&[&format!("{name}.example.org"), "AAAA", transport])?;
            ensure!(
                reply.status == status && reply.data("AAAA") == addresses,
                "{name}: {}",
                reply.text
            );
            ensure!(
                reply.has("ra") && !reply.has("aa") && !reply.has("ad"),
                "{name}: {}",
                reply.text
            );
        }
        let a = self.dig(&["v4.example.org", "A", transport])?;
        ensure!(a.data("A") == ["8.8.4.4"], "{}", a.text);
        Ok(())
    }
}

/// A configuration with a zone `fleet`; `more` are further lines of `[dns64]`.
fn configuration(edge: &Node, upstreams: &[&str], more: &str) -> String {
    format!(
        "version = 1\n\n[dns64]\nlisten = [\"{}\"]\nupstreams = {upstreams:?}\n{more}\n\n[[dns64.zone]]\nname = \"fleet\"\n\
         prefixes = [\"fd00::/64\"]\n",
        edge.at(dns::PORT)
    )
}

fn with_named(lines: &str) -> Result<(World, Named, Edge)> {
    with_zone(lines, RECORDS)
}

fn with_zone(lines: &str, records: &str) -> Result<(World, Named, Edge)> {
    let world = World::new(1)?;
    let named = Named::start(&world.cp[0], &[("example.org", lines, records)])?;
    let edge = Edge::start(&world.edge, &configuration(&world.edge, &["udp://[fd00::11]"], ""))?;
    Ok((world, named, edge))
}

/// The zone's key-signing key as the trust anchor of delv.
fn trust_anchor(named: &Named, stage: &Stage) -> Result<String> {
    let keys = stage.dig(&["example.org", "DNSKEY"])?;
    let key = keys
        .data("DNSKEY")
        .into_iter()
        .find(|key| key.starts_with("257 "))
        .context("a key")?;
    let mut fields = key.splitn(4, ' ');
    let mut next = || fields.next().unwrap_or_default();
    let (flags, protocol, algorithm, public) = (next(), next(), next(), next());
    let file = named.folder().join("anchor");
    fs::write(
        &file,
        format!("trust-anchors {{ \"example.org.\" static-key {flags} {protocol} {algorithm} \"{public}\"; }};\n"),
    )?;
    Ok(file.display().to_string())
}

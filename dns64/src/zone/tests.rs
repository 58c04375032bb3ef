use hickory_proto::{
    op::{MessageType, Query},
    rr::rdata::{CNAME, MX, SSHFP, TXT, sshfp},
};

use super::{
    vectors::{CONDITIONS, EMPTY, POINTER, REGISTER, SIGNED, bytes},
    *,
};

const REVERSE: &str = "0.0.0.0.0.0.0.0.0.0.0.0.d.0.d.f.ip6.arpa.";

#[test]
fn nsupdate_registers_a_node_and_its_address_points_back() {
    let mut zone = zone();
    let change = received(&zone, REGISTER, SIGNED).expect("permitted").expect("a change");
    assert_eq!(
        serde_json::to_string(&change).expect("text"),
        format!(
            "{{\"zone\":\"fleet.\",\"base\":1,\"node\":\"node1.fleet.\",\
             \"records\":[{{\"type\":\"AAAA\",\"ttl\":1800,\"address\":\"fd0d::11\"}}],\
             \"serials\":{{\"{REVERSE}\":2,\"fleet.\":2}},\"signed\":[\"node1.fleet.\",{SIGNED}]}}"
        )
    );
    assert_eq!(shown(&zone, "node1.fleet.", RecordType::AAAA), "NXDOMAIN fleet. SOA 1");
    assert_eq!(zone.apply(change), Ok(()));
    assert_eq!(shown(&zone, "NODE1.fleet.", RecordType::AAAA), "AAAA fd0d::11 1800");
    assert_eq!(pointer(&zone, "fd0d::11"), "PTR node1.fleet. 1800");
    assert_eq!(received(&zone, REGISTER, SIGNED), Ok(None));
}

#[test]
fn nsupdate_may_ask_for_all_five_prerequisites_at_once() {
    let mut zone = zone();
    assert_eq!(code(received(&zone, CONDITIONS, SIGNED)), Err(ResponseCode::NXDomain));
    perform(&mut zone, "node1", &[add("node1", 60, aaaa("fd0d::11"))]);
    let change = received(&zone, CONDITIONS, SIGNED)
        .expect("permitted")
        .expect("a change");
    assert_eq!(zone.apply(change), Ok(()));
    assert_eq!(shown(&zone, "node1.fleet.", RecordType::AAAA), "NODATA fleet. SOA 3");
    assert_eq!(shown(&zone, "node1.fleet.", RecordType::TXT), "TXT hello 300");
    assert_eq!(pointer(&zone, "fd0d::11"), format!("NXDOMAIN {REVERSE} SOA 3"));
    assert_eq!(code(received(&zone, CONDITIONS, SIGNED)), Err(ResponseCode::NXRRSet));
}

#[test]
fn a_node_may_say_of_its_pointer_what_is_so_and_nothing_else() {
    let mut zone = zone();
    let at = SIGNED + 0x548;
    assert_eq!(
        code(received(&zone, POINTER, at)),
        Err(ResponseCode::Refused),
        "a free address"
    );
    perform(&mut zone, "node1", &[add("node1", 1800, aaaa("fd0d::11"))]);
    assert_eq!(received(&zone, POINTER, at), Ok(None));

    let own = |address: &str| Record::from_rdata(reverse(address), 77, RData::PTR(PTR(name("node1.fleet."))));
    let other = |address: &str| Record::from_rdata(reverse(address), 77, RData::PTR(PTR(name("node2.fleet."))));
    let delete = |address: &str| any(&reverse(address), RecordType::PTR);
    let ask = |node: &str, updates: &[Record]| code(zone.update(&request(REVERSE, &[], updates), &signed(node)));
    assert_eq!(
        ask("node1", &[own("fd0d::11")]),
        Ok(()),
        "another TTL is that of the AAAA"
    );
    assert_eq!(ask("node1", &[delete("fd0d::99")]), Ok(()), "of what it had before");
    for (what, node, updates) in [
        ("its AAAA has it", "node1", vec![delete("fd0d::11")]),
        ("another's name", "node1", vec![other("fd0d::11")]),
        (
            "a second one",
            "node1",
            vec![delete("fd0d::11"), own("fd0d::11"), other("fd0d::11")],
        ),
        ("another's address", "node2", vec![delete("fd0d::11")]),
        ("another's, taken", "node2", vec![delete("fd0d::11"), other("fd0d::11")]),
        ("another's, as it is", "node2", vec![own("fd0d::11")]),
        ("the edge's address", "node1", vec![delete("fd0d::1")]),
        (
            "no PTR",
            "node1",
            vec![Record::from_rdata(reverse("fd0d::11"), 60, text("x"))],
        ),
        ("all", "node1", vec![any(&reverse("fd0d::11"), RecordType::ANY)]),
        ("the apex", "node1", vec![any(&name(REVERSE), RecordType::NS)]),
    ] {
        assert_eq!(ask(node, &updates), Err(ResponseCode::Refused), "{what}");
    }
    let elsewhere = ask("node1", &[own("fd0e::11")]);
    assert_eq!(elsewhere, Err(ResponseCode::NotZone));
}

#[test]
fn an_empty_update_and_one_without_a_change_are_noerror_and_raise_no_serial() {
    let mut zone = zone();
    assert_eq!(received(&zone, EMPTY, SIGNED), Ok(None));
    let all = [
        add("node1", 1800, aaaa("fd0d::11")),
        add("node1", 1800, aaaa("fd0d::12")),
        add("node1", 60, text("x")),
    ];
    perform(&mut zone, "node1", &all);
    let serial = zone.forward.serial();
    let delete = |kind| any(&name("node1.fleet."), kind);
    for updates in [
        all.to_vec(),
        vec![all[1].clone()],
        vec![delete(RecordType::AAAA), all[1].clone(), all[0].clone()],
        vec![delete(RecordType::ANY), all[2].clone(), all[1].clone(), all[0].clone()],
        vec![delete(RecordType::A), delete(RecordType::CNAME), delete(RecordType::NS)],
        vec![
            none("node1", aaaa("fd0d::13")),
            none("node1", RData::CNAME(CNAME(name("x.")))),
        ],
    ] {
        assert_eq!(
            zone.update(&request("fleet.", &[], &updates), &signed("node1")),
            Ok(None),
            "{updates:?}"
        );
    }
    assert_eq!(zone.forward.serial(), serial);
}

#[test]
fn a_node_takes_its_own_address_with_it_to_another_set_of_addresses() {
    let mut zone = zone();
    perform(
        &mut zone,
        "node1",
        &[add("node1", 60, aaaa("fd0d::11")), add("node1", 60, aaaa("fd0d::12"))],
    );
    let updates = [
        any(&name("node1.fleet."), RecordType::AAAA),
        add("node1", 60, aaaa("fd0d::12")),
        add("node1", 60, aaaa("fd0d::13")),
    ];
    perform(&mut zone, "node1", &updates);
    assert_eq!(pointer(&zone, "fd0d::11"), format!("NXDOMAIN {REVERSE} SOA 3"));
    assert_eq!(pointer(&zone, "fd0d::12"), "PTR node1.fleet. 60");
    assert_eq!(pointer(&zone, "fd0d::13"), "PTR node1.fleet. 60");
    perform(&mut zone, "node2", &[add("node2", 60, aaaa("fd0d::11"))]);
    assert_eq!(pointer(&zone, "fd0d::11"), "PTR node2.fleet. 60");
}

#[test]
fn a_key_changes_no_name_but_its_nodes() {
    let zone = zone();
    for owner in [
        "node2.fleet.",
        "x.node1.fleet.",
        "*.fleet.",
        "*.node1.fleet.",
        "free.fleet.",
        "fleet.",
        "ns.fleet.",
        "api.fleet.",
        "API.Fleet.",
        "hostmaster.fleet.",
        "edge1.fleet.",
        "www.fleet.",
    ] {
        let owner = name(owner);
        let mut deletion = Record::from_rdata(owner.clone(), 0, aaaa("fd0d::1"));
        deletion.dns_class = DNSClass::NONE;
        for update in [
            Record::from_rdata(owner.clone(), 60, aaaa("fd0d::11")),
            any(&owner, RecordType::AAAA),
            any(&owner, RecordType::ANY),
            deletion,
        ] {
            let answer = zone.update(&request("fleet.", &[], &[update]), &signed("node1"));
            let refused = answer.expect_err("it is not its name");
            assert!(
                matches!(&refused, Refused::OtherName(name) | Refused::Reserved(name) if *name == owner),
                "{refused}"
            );
            assert_eq!(refused.code(), ResponseCode::Refused);
        }
    }
}

#[test]
fn a_node_has_addresses_fingerprints_and_text_and_no_other_types() {
    let zone = zone();
    let ask = |data: RData| zone.update(&request("fleet.", &[], &[add("node1", 60, data)]), &signed("node1"));
    for data in [
        aaaa("fd0d::11"),
        fingerprint(2, 32),
        fingerprint(1, 20),
        text("~ printable ~"),
        text(&"x".repeat(255)),
    ] {
        assert!(ask(data).expect("permitted").is_some());
    }
    let two = RData::TXT(TXT::new(vec!["x".repeat(200), "x".repeat(56)]));
    for (data, refused) in [
        (RData::A(A::new(192, 0, 2, 1)), Refused::Kind(RecordType::A)),
        (RData::CNAME(CNAME(name("x.fleet."))), Refused::Kind(RecordType::CNAME)),
        (RData::NS(NS(name("x.fleet."))), Refused::Kind(RecordType::NS)),
        (RData::PTR(PTR(name("x.fleet."))), Refused::Kind(RecordType::PTR)),
        (RData::MX(MX::new(1, name("x.fleet."))), Refused::Kind(RecordType::MX)),
        (
            RData::SOA(zone.forward.soa().expect("a SOA").0.clone()),
            Refused::Kind(RecordType::SOA),
        ),
        (fingerprint(2, 20), Refused::Fingerprint),
        (fingerprint(1, 32), Refused::Fingerprint),
        (fingerprint(3, 48), Refused::Fingerprint),
        (text("a\nb"), Refused::Text),
        (text("ä"), Refused::Text),
        (RData::TXT(TXT::new(vec![String::new(); 257])), Refused::Text),
        (two, Refused::Text),
    ] {
        assert_eq!(ask(data), Err(refused));
    }
}

#[test]
fn a_node_has_no_more_records_than_its_limits_whatever_the_message_does_in_between() {
    let mut zone = zone();
    let many = |count: usize| -> Vec<Record> {
        (0..count)
            .map(|i| add("node1", 60, aaaa(&format!("fd0d::1:{i:x}"))))
            .collect()
    };
    let answer = zone.update(&request("fleet.", &[], &many(9)), &signed("node1"));
    let refused = answer.expect_err("too many");
    assert_eq!(refused.to_string(), "a node may have 8 AAAA records");
    perform(&mut zone, "node1", &many(8));
    let one_more = zone.update(&request("fleet.", &[], &many(9)[8..]), &signed("node1"));
    assert_eq!(code(one_more), Err(ResponseCode::Refused));
    let mut exchange = many(9);
    exchange.push(none("node1", aaaa("fd0d::1:0")));
    perform(&mut zone, "node1", &exchange);
    let texts: Vec<_> = (0..5).map(|i| add("node1", 60, text(&i.to_string()))).collect();
    let answer = zone.update(&request("fleet.", &[], &texts), &signed("node1"));
    assert_eq!(answer.expect_err("too many").name(), "too-many");
}

#[test]
fn a_message_has_at_most_so_many_updates_as_nobody_needs() {
    let zone = zone();
    let ask = |count| {
        zone.update(
            &request("fleet.", &[], &vec![add("node1", 60, aaaa("fd0d::11")); count]),
            &signed("node1"),
        )
    };
    assert!(ask(policy::LONGEST_UPDATE).expect("permitted").is_some());
    assert_eq!(ask(policy::LONGEST_UPDATE + 1), Err(Refused::TooLong));
}

#[test]
fn an_address_lies_inside_the_prefixes_and_is_free_or_its_own() {
    let mut zone = zone();
    perform(&mut zone, "node2", &[add("node2", 60, aaaa("fd0d::12"))]);
    for (address, expected) in [
        ("fd0d::11", None),
        ("fd0d::ffff:ffff:ffff:ffff", None),
        ("fd0e:0:0:3:ffff::1", None),
        ("fd0d::", Some("outside")),
        ("fd0d:0:0:1::1", Some("outside")),
        ("fd0e:0:0:4::1", Some("outside")),
        ("2001:db8::1", Some("outside")),
        ("::1", Some("outside")),
        ("::", Some("outside")),
        ("64:ff9b::c000:201", Some("outside")),
        ("fd0d::12", Some("held")),
        ("fd0d::1", Some("held")),
    ] {
        let update = add("node1", 60, aaaa(address));
        let answer = zone.update(&request("fleet.", &[], &[update]), &signed("node1"));
        assert_eq!(answer.err().map(|refused| refused.name()), expected, "{address}");
    }
    let answer = zone.update(
        &request("fleet.", &[], &[add("node1", 60, aaaa("fd0d::12"))]),
        &signed("node1"),
    );
    assert_eq!(answer.expect_err("held").to_string(), "node2.fleet. has fd0d::12");
    let deletion = none("node1", aaaa("fd0d::12"));
    assert_eq!(
        zone.update(&request("fleet.", &[], &[deletion]), &signed("node1")),
        Ok(None)
    );
}

#[test]
fn an_update_of_which_one_part_is_refused_changes_nothing() {
    let zone = zone();
    for bad in [add("node2", 60, text("x")), add("node1", 60, aaaa("2001:db8::1"))] {
        let updates = [add("node1", 60, aaaa("fd0d::11")), bad];
        assert_eq!(
            code(zone.update(&request("fleet.", &[], &updates), &signed("node1"))),
            Err(ResponseCode::Refused)
        );
    }
    let malformed = [
        add("node1", 60, aaaa("fd0d::11")),
        any(&name("node1.fleet."), RecordType::AXFR),
    ];
    assert_eq!(
        code(zone.update(&request("fleet.", &[], &malformed), &signed("node1"))),
        Err(ResponseCode::FormErr)
    );
}

#[test]
fn of_two_nodes_that_want_one_address_the_first_gets_it_and_the_second_is_refused() {
    let mut zone = zone();
    let ask = |zone: &Zone, node: &str| {
        zone.update(
            &request("fleet.", &[], &[add(node, 60, aaaa("fd0d::11"))]),
            &signed(node),
        )
    };
    let first = ask(&zone, "node1").expect("permitted").expect("a change");
    let second = ask(&zone, "node2").expect("permitted").expect("a change");
    assert_eq!(zone.apply(first), Ok(()));
    assert_eq!(zone.apply(second), Err(Stale { is: 2, made_from: 1 }));
    assert_eq!(ask(&zone, "node2").expect_err("held").name(), "held");
    assert_eq!(pointer(&zone, "fd0d::11"), "PTR node1.fleet. 60");
}

#[test]
fn ttls_are_cut_to_what_is_permitted_and_a_whole_set_has_the_last() {
    let mut zone = zone();
    for (asked, given) in [
        (0, 30),
        (30, 30),
        (1800, 1800),
        (86_401, 86_400),
        (0x7fff_ffff, 86_400),
        (u32::MAX, 30),
    ] {
        perform(&mut zone, "node1", &[add("node1", asked, aaaa("fd0d::11"))]);
        assert_eq!(
            shown(&zone, "node1.fleet.", RecordType::AAAA),
            format!("AAAA fd0d::11 {given}")
        );
        assert_eq!(pointer(&zone, "fd0d::11"), format!("PTR node1.fleet. {given}"));
        perform(&mut zone, "node1", &[any(&name("node1.fleet."), RecordType::ANY)]);
    }
}

#[test]
fn serials_go_on_beyond_32_bits_and_only_those_of_zones_that_change() {
    let state = State {
        serials: [(owner("fleet."), u32::MAX), (owner(REVERSE), 7)].into(),
        ..State::default()
    };
    let mut zone = Zone::new(&config(), state).expect("a zone");
    perform(&mut zone, "node1", &[add("node1", 60, text("x"))]);
    assert_eq!(zone.zones().map(Data::serial).collect::<Vec<_>>(), [1, 7, 1, 1, 1, 1]);
    perform(&mut zone, "node1", &[add("node1", 60, aaaa("fd0d::11"))]);
    assert_eq!(zone.zones().map(Data::serial).collect::<Vec<_>>(), [2, 8, 1, 1, 1, 1]);
    perform(&mut zone, "node1", &[any(&name("node1.fleet."), RecordType::TXT)]);
    assert_eq!(zone.zones().map(Data::serial).collect::<Vec<_>>(), [3, 8, 1, 1, 1, 1]);
    perform(&mut zone, "node1", &[add("node1", 90, aaaa("fd0d::11"))]);
    assert_eq!(zone.zones().map(Data::serial).collect::<Vec<_>>(), [4, 9, 1, 1, 1, 1]);
}

#[test]
fn a_node_with_two_keys_is_one_node_and_goes_with_the_last_of_them() {
    let mut zone = zone();
    let by = |key: &str, time| Signed {
        key: owner(key),
        time,
        ..signed("node1")
    };
    for (key, address) in [("node1.fleet.", "fd0d::11"), ("key2.node1.fleet.", "fd0d::12")] {
        let updates = [
            any(&name("node1.fleet."), RecordType::AAAA),
            add("node1", 60, aaaa(address)),
        ];
        let change = zone
            .update(&request("fleet.", &[], &updates), &by(key, 5))
            .expect("permitted");
        assert_eq!(zone.apply(change.expect("a change")), Ok(()));
    }
    assert_eq!(shown(&zone, "node1.fleet.", RecordType::AAAA), "AAAA fd0d::12 60");
    assert_eq!(
        zone.state().signed,
        [(owner("node1.fleet."), 5), (owner("key2.node1.fleet."), 5)].into()
    );

    let change = zone.remove(&owner("node1.fleet.")).expect("a change");
    assert_eq!((change.records.as_slice(), &change.signed), (&[][..], &None));
    assert_eq!(zone.apply(change), Ok(()));
    assert_eq!(shown(&zone, "node1.fleet.", RecordType::AAAA), "NXDOMAIN fleet. SOA 4");
    assert_eq!(pointer(&zone, "fd0d::12"), format!("NXDOMAIN {REVERSE} SOA 4"));
    assert_eq!(zone.remove(&owner("node1.fleet.")), None);
    perform(&mut zone, "node2", &[add("node2", 60, aaaa("fd0d::12"))]);
    zone.forget_key(&owner("node1.fleet."));
    assert_eq!(zone.state().signed.len(), 2);
}

#[test]
fn a_zone_from_what_was_stored_answers_as_the_one_that_was_stored() {
    let mut zone = zone();
    let mut stored = State::default();
    for (node, address) in [("node1", "fd0d::11"), ("node2", "fd0e:0:0:2::12")] {
        let updates = [
            add(node, 60, aaaa(address)),
            add(node, 90, text(node)),
            add(node, 90, fingerprint(2, 32)),
        ];
        let change = zone.update(&request("fleet.", &[], &updates), &signed(node));
        let change = change.expect("permitted").expect("a change");
        stored.apply(serde_json::from_str(&serde_json::to_string(&change).expect("text")).expect("the change"));
        assert_eq!(zone.apply(change), Ok(()));
    }
    assert_eq!(&stored, zone.state());
    let again = Zone::new(&config(), stored).expect("a zone");
    assert!(again.left_out().is_empty());
    for (before, after) in zone.zones().zip(again.zones()) {
        assert!(before.names().eq(after.names()), "{}", before.origin());
    }
}

#[test]
fn what_the_configuration_forbids_since_is_kept_but_not_served_until_the_node_speaks_again() {
    let mut zone = zone();
    perform(
        &mut zone,
        "node1",
        &[add("node1", 60, aaaa("fd0d::11")), add("node1", 60, aaaa("fd0d::21"))],
    );
    perform(&mut zone, "node2", &[add("node2", 60, aaaa("fd0d::12"))]);
    perform(
        &mut zone,
        "node3",
        &[add("node3", 60, aaaa("fd0e::13")), add("node3", 60, text("x"))],
    );
    let mut config = config()
        .with_addresses(&name("new.fleet."), &["fd0d::11".parse().expect("an address")])
        .with_addresses(&name("node2.fleet."), &["fd0d::99".parse().expect("an address")]);
    config.prefixes.truncate(1);
    let mut again = Zone::new(&config, zone.state().clone()).expect("a zone");
    let left_out: Vec<_> = again
        .left_out()
        .iter()
        .map(|(node, why)| format!("{node} {why}"))
        .collect();
    assert_eq!(
        left_out,
        [
            "node1.fleet. new.fleet. has fd0d::11",
            "node2.fleet. node2.fleet. is the edge's own",
            "node3.fleet. fd0e::13 is no address of a node in this zone"
        ]
    );
    assert_eq!(again.state(), zone.state());
    assert_eq!(shown(&again, "node1.fleet.", RecordType::AAAA), "AAAA fd0d::21 60");
    assert_eq!(shown(&again, "node2.fleet.", RecordType::AAAA), "AAAA fd0d::99 1800");
    assert_eq!(shown(&again, "node3.fleet.", RecordType::TXT), "TXT x 60");
    assert_eq!(pointer(&again, "fd0d::11"), "PTR new.fleet. 1800");
    perform(&mut again, "node1", &[add("node1", 60, aaaa("fd0d::22"))]);
    assert_eq!(again.left_out().len(), 2);
    assert_eq!(again.state().nodes[&owner("node1.fleet.")].len(), 2);
    let other = [add("node9", 60, aaaa("fd0d::12"))];
    assert!(
        matches!(
            again.update(&request("fleet.", &[], &other), &signed("node9")),
            Err(Refused::Held { .. })
        ),
        "it is node2's when the static record goes"
    );
    perform(&mut again, "node3", &[add("node3", 60, text("x"))]);
    assert_eq!(
        again.state().nodes[&owner("node3.fleet.")].len(),
        1,
        "what it says now is all"
    );
}

#[test]
fn rfc2136_3_1_another_zone_than_ours_is_notauth() {
    let zone = zone();
    for other in [
        "example.",
        ".",
        "node1.fleet.",
        "d.f.ip6.arpa.",
        "1.0.0.0.0.0.0.0.0.0.0.0.d.0.d.f.ip6.arpa.",
    ] {
        let answer = zone.update(&request(other, &[], &[]), &signed("node1"));
        assert_eq!(code(answer), Err(ResponseCode::NotAuth), "{other}");
    }
    let elsewhere = Record::from_rdata(name("node1.example."), 60, aaaa("fd0d::11"));
    let answer = zone.update(&request("fleet.", &[], &[elsewhere]), &signed("node1"));
    assert_eq!(code(answer), Err(ResponseCode::NotZone));
    let mut query = request("fleet.", &[], &[]);
    query.metadata.op_code = OpCode::Query;
    assert_eq!(code(zone.update(&query, &signed("node1"))), Err(ResponseCode::NotImp));
}

#[test]
fn rfc2136_3_2_prerequisites_are_looked_at_before_permission() {
    let zone = zone();
    let wanted = [any(&name("node9.fleet."), RecordType::ANY)];
    let answer = zone.update(
        &request("fleet.", &wanted, &[add("api", 60, text("x"))]),
        &signed("node1"),
    );
    assert_eq!(code(answer), Err(ResponseCode::NXDomain));
    let wanted = [any(&name("api.fleet."), RecordType::AAAA)];
    let answer = zone.update(
        &request("fleet.", &wanted, &[add("api", 60, text("x"))]),
        &signed("node1"),
    );
    assert_eq!(code(answer), Err(ResponseCode::Refused));
}

#[test]
fn a_name_that_exists_without_the_type_is_no_data_and_one_that_does_not_is_nxdomain_with_the_soa() {
    let mut zone = zone();
    perform(&mut zone, "a.b", &[add("a.b", 60, aaaa("fd0d::11"))]);
    for (name, kind, expected) in [
        ("a.b.fleet.", RecordType::A, "NODATA fleet. SOA 2"),
        ("b.fleet.", RecordType::AAAA, "NODATA fleet. SOA 2"),
        ("B.FLEET.", RecordType::ANY, "NODATA fleet. SOA 2"),
        ("c.fleet.", RecordType::AAAA, "NXDOMAIN fleet. SOA 2"),
        ("x.a.b.fleet.", RecordType::ANY, "NXDOMAIN fleet. SOA 2"),
        ("fleet.", RecordType::AAAA, "NODATA fleet. SOA 2"),
        ("fleet.", RecordType::DS, "NODATA fleet. SOA 2"),
        ("a.b.fleet.", RecordType::ANY, "HINFO RFC8482  1800"),
        ("fleet.", RecordType::NS, "NS ns.fleet. 1800"),
        ("fleet.", RecordType::AXFR, "REFUSED"),
        ("a.b.fleet.", RecordType::IXFR, "REFUSED"),
    ] {
        assert_eq!(shown(&zone, name, kind), expected, "{name} {kind}");
    }
    let apex = zone.answer(&name("fleet."), RecordType::NS).expect("ours");
    assert_eq!(apex.additionals.len(), 2);
    let negative = zone.answer(&name("c.fleet."), RecordType::AAAA).expect("ours");
    assert_eq!((negative.negative_ttl(), negative.authoritative), (Some(60), true));
    assert_eq!(
        shown(&zone, REVERSE, RecordType::PTR),
        format!("NODATA {REVERSE} SOA 2")
    );
    let above = format!("0.0.{REVERSE}");
    assert_eq!(shown(&zone, &above, RecordType::PTR), format!("NODATA {REVERSE} SOA 2"));
    for elsewhere in ["example.", ".", "xfleet.", "d.f.ip6.arpa."] {
        assert!(zone.answer(&name(elsewhere), RecordType::A).is_none() && !zone.contains(&name(elsewhere)));
    }
}

#[test]
fn an_alias_is_followed_inside_the_zones_and_ends_where_it_leaves_them() {
    let alias = |owner: &str, target: &str| Record::from_rdata(name(owner), 60, RData::CNAME(CNAME(name(target))));
    let mut config = config();
    config.records.extend([
        alias("one.fleet.", "two.fleet."),
        alias("two.fleet.", "EDGE1.fleet."),
        alias("out.fleet.", "example.org."),
        alias("gone.fleet.", "nobody.fleet."),
        alias("loop.fleet.", "pool.fleet."),
        alias("pool.fleet.", "loop.fleet."),
    ]);
    let zone = Zone::new(&config, State::default()).expect("a zone");
    assert_eq!(
        shown(&zone, "one.fleet.", RecordType::AAAA),
        "CNAME two.fleet. 60, CNAME EDGE1.fleet. 60, AAAA fd0d::1 1800"
    );
    assert_eq!(shown(&zone, "one.fleet.", RecordType::CNAME), "CNAME two.fleet. 60");
    assert_eq!(shown(&zone, "one.fleet.", RecordType::SRV), "NODATA fleet. SOA 1");
    assert_eq!(shown(&zone, "out.fleet.", RecordType::AAAA), "CNAME example.org. 60");
    assert_eq!(shown(&zone, "gone.fleet.", RecordType::AAAA), "NXDOMAIN fleet. SOA 1");
    let looped = zone.answer(&name("loop.fleet."), RecordType::AAAA).expect("ours");
    assert_eq!(looped.answers.len(), LINKS + 1);
}

#[test]
fn each_prefix_has_the_reverse_zones_that_its_length_takes() {
    for (prefix, zones) in [
        ("fd0d::/64", vec![REVERSE]),
        ("fd00::/8", vec!["d.f.ip6.arpa."]),
        (
            "fd80::/9",
            vec!["8.d.f.ip6.arpa.", "9.d.f.ip6.arpa.", "a.d.f.ip6.arpa."],
        ),
        (
            "fd0e:0:0:2::/63",
            vec![
                "2.0.0.0.0.0.0.0.0.0.0.0.e.0.d.f.ip6.arpa.",
                "3.0.0.0.0.0.0.0.0.0.0.0.e.0.d.f.ip6.arpa.",
            ],
        ),
    ] {
        let prefix: Ipv6Net = prefix.parse().expect("a prefix");
        let origins = reverse_origins(&prefix);
        assert_eq!(
            origins.len(),
            1 << (prefix.prefix_len().div_ceil(4) * 4 - prefix.prefix_len()),
            "{prefix}"
        );
        for (origin, expected) in origins.iter().zip(zones) {
            assert_eq!(origin, &name(expected));
        }
    }
    let mut config = config();
    config.prefixes = vec!["fd0d::7/128".parse().expect("a prefix")];
    let mut zone = Zone::new(&config, State::default()).expect("a zone");
    perform(&mut zone, "node1", &[add("node1", 60, aaaa("fd0d::7"))]);
    assert_eq!(pointer(&zone, "fd0d::7"), "PTR node1.fleet. 60");
    perform(&mut zone, "node1", &[any(&name("node1.fleet."), RecordType::ANY)]);
    let apex = reverse("fd0d::7");
    assert_eq!(pointer(&zone, "fd0d::7"), format!("NODATA {apex} SOA 3"));
}

#[test]
fn a_configuration_that_makes_no_zone_is_refused_with_the_reason() {
    let with = |change: &dyn Fn(&mut Config)| {
        let mut config = config();
        change(&mut config);
        Zone::new(&config, State::default())
            .err()
            .map(|error| error.to_string())
    };
    let record = |owner: &str, data: RData| Record::from_rdata(name(owner), 60, data);
    let alias = RData::CNAME(CNAME(name("x.fleet.")));
    assert_eq!(with(&|_| ()), None);
    for (records, expected) in [
        (
            vec![record("x.example.", text("x"))],
            "\"x.example.\" lies outside the zone",
        ),
        (
            vec![record("*.fleet.", text("x"))],
            "\"*.fleet.\" cannot have a static TXT record",
        ),
        (
            vec![record("x.fleet.", RData::NS(NS(name("y."))))],
            "\"x.fleet.\" cannot have a static NS record",
        ),
        (
            vec![record("edge1.fleet.", alias.clone())],
            "\"edge1.fleet.\" has a CNAME and other records; an alias stands alone",
        ),
        (
            vec![record("x.fleet.", alias), record("x.fleet.", text("x"))],
            "\"x.fleet.\" has a CNAME and other records; an alias stands alone",
        ),
    ] {
        let error = with(&|config| config.records.extend(records.clone()));
        assert_eq!(error.as_deref(), Some(expected));
    }
    let overlap = with(&|config| config.prefixes.push("fd0d::/80".parse().expect("a prefix")));
    assert_eq!(
        overlap.as_deref(),
        Some("the prefixes fd0d::/64 and fd0d::/80 overlap; leave the longer one out")
    );
    let root = with(&|config| config.origin = Name::root());
    assert_eq!(
        root.as_deref(),
        Some("the root is no zone of nodes; choose a name such as \"fleet\"")
    );
}

#[test]
fn only_host_names_inside_the_zone_that_are_not_the_edges_can_have_keys() {
    let zone = zone();
    for good in ["node1.fleet.", "NODE-1.fleet.", "a.b.fleet.", "1.fleet."] {
        assert_eq!(zone.may_be_node(&name(good)), Ok(()), "{good}");
    }
    for bad in [
        "fleet.",
        "api.fleet.",
        "NS.fleet.",
        "edge1.fleet.",
        "www.fleet.",
        "node1.example.",
        "*.fleet.",
        "a-.fleet.",
        "a_b.fleet.",
        "a\\.b.fleet.",
        ".",
    ] {
        assert!(zone.may_be_node(&name(bad)).is_err(), "{bad}");
    }
    let hyphen = Name::from_labels([&b"-a"[..], b"fleet"]).expect("a name");
    assert!(zone.may_be_node(&hyphen).is_err());
}

#[test]
fn no_message_however_mangled_makes_it_panic_or_change_another_name() {
    let mut zone = zone();
    perform(&mut zone, "node1", &[add("node1", 1800, aaaa("fd0d::11"))]);
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut changes = 0;
    for round in 0..60_000 {
        let mut message = bytes([REGISTER, CONDITIONS, POINTER][round % 3]);
        for _ in 0..1 + round % 4 {
            random = random
                .wrapping_mul(0x5851_f42d_4c95_7f2d)
                .wrapping_add(0x1405_7b7e_f767_814f);
            let at = (random >> 33) as usize % message.len();
            message[at] = (random >> 24) as u8;
        }
        let Ok(message) = Message::from_vec(&message) else {
            continue;
        };
        if let Ok(Some(change)) = zone.update(&message, &signed("node1")) {
            assert_eq!(change.node, owner("node1.fleet."));
            let mut changed = zone.clone();
            assert_eq!(changed.apply(change), Ok(()));
            assert_eq!(shown(&changed, "api.fleet.", RecordType::AAAA), "AAAA fd0d::1 1800");
            assert_eq!(pointer(&changed, "fd0d::1"), "PTR edge1.fleet. 1800");
            changes += 1;
        }
    }
    assert!(changes > 1000, "{changes}");
}

/// fleet with fd0d::/64 and fd0e::/62; edge1, ns and api are fd0d::1, ns is 192.0.2.1 too, www is an alias.
fn zone() -> Zone {
    Zone::new(&config(), State::default()).expect("a zone")
}

fn config() -> Config {
    let addresses: [IpAddr; 2] = ["fd0d::1", "192.0.2.1"].map(|text| text.parse().expect("an address"));
    let prefixes = ["fd0d::/64", "fd0e::/62"].map(|text| text.parse().expect("a prefix"));
    let mut config = Config::new(&name("Fleet"), prefixes.to_vec())
        .with_addresses(&name("edge1.fleet."), &addresses[..1])
        .with_addresses(&name("ns.fleet."), &addresses)
        .with_addresses(&name("api.fleet."), &addresses[..1]);
    let alias = RData::CNAME(CNAME(name("edge1.fleet.")));
    config.records.push(Record::from_rdata(name("www.fleet."), 60, alias));
    config
}

/// What `hex` comes to, from its signature on.
fn received(zone: &Zone, hex: &str, now: u64) -> Result<Option<Change>, Refused> {
    let node = owner("node1.fleet.");
    let random: Vec<u8> = (0..32).collect();
    let mut keys = Keys::default();
    keys.add(Key::mint(node.clone(), Algorithm::HmacSha256, node, &random).expect("a key"))
        .expect("its place");
    let Verdict::Good(signed, _) = tsig::verify(&keys, &bytes(hex), now) else {
        panic!("it is signed");
    };
    assert_eq!(Replay::default().check(&signed), Seen::First);
    zone.update(&Message::from_vec(&bytes(hex)).expect("a message"), &signed)
}

/// Carries out what must be a change.
fn perform(zone: &mut Zone, node: &str, updates: &[Record]) {
    let change = zone.update(&request("fleet.", &[], updates), &signed(node));
    let change = change.expect("permitted").expect("a change");
    assert_eq!(zone.apply(change), Ok(()));
}

fn code(answer: Result<Option<Change>, Refused>) -> Result<(), ResponseCode> {
    answer.map(drop).map_err(|refused| refused.code())
}

fn request(origin: &str, wanted: &[Record], updates: &[Record]) -> Message {
    let mut message = Message::new(1, MessageType::Query, OpCode::Update);
    message.add_query(Query::query(name(origin), RecordType::SOA));
    message.add_answers(wanted.iter().cloned());
    message.add_authorities(updates.iter().cloned());
    message
}

fn signed(node: &str) -> Signed {
    let node = owner(&format!("{node}.fleet."));
    Signed {
        key: node.clone(),
        node,
        time: SIGNED,
        mac: vec![0; 32],
    }
}

/// An answer in one line: its records, or NODATA or NXDOMAIN with the zone and its serial.
fn shown(zone: &Zone, at: &str, kind: RecordType) -> String {
    let answer = zone.answer(&name(at), kind).expect("a name of the zone");
    let negative = |what: &str| match &answer.authorities[..] {
        [soa] => match &soa.data {
            RData::SOA(data) => format!("{what} {} SOA {}", soa.name, data.serial),
            other => panic!("{other}"),
        },
        other => panic!("{other:?}"),
    };
    match answer.code {
        ResponseCode::NXDomain => negative("NXDOMAIN"),
        ResponseCode::NoError if !answer.authorities.is_empty() => negative("NODATA"),
        ResponseCode::NoError => {
            let one = |record: &Record| format!("{} {} {}", record.record_type(), record.data, record.ttl);
            answer.answers.iter().map(one).collect::<Vec<_>>().join(", ")
        }
        _ => "REFUSED".to_owned(),
    }
}

fn pointer(zone: &Zone, address: &str) -> String {
    shown(zone, &reverse(address).to_ascii(), RecordType::PTR)
}

fn reverse(address: &str) -> Name {
    Name::from(address.parse::<Ipv6Addr>().expect("an address"))
}

fn add(label: &str, ttl: u32, data: RData) -> Record {
    Record::from_rdata(name(&format!("{label}.fleet.")), ttl, data)
}

fn none(label: &str, data: RData) -> Record {
    let mut record = add(label, 0, data);
    record.dns_class = DNSClass::NONE;
    record
}

fn any(name: &Name, kind: RecordType) -> Record {
    let mut record = Record::update0(name.clone(), 0, kind);
    record.dns_class = DNSClass::ANY;
    record
}

fn aaaa(address: &str) -> RData {
    RData::AAAA(AAAA(address.parse().expect("an address")))
}

fn text(text: &str) -> RData {
    RData::TXT(TXT::new(vec![text.to_owned()]))
}

fn fingerprint(kind: u8, length: u8) -> RData {
    RData::SSHFP(SSHFP::new(
        sshfp::Algorithm::Ed25519,
        kind.into(),
        (0..length).collect(),
    ))
}

fn owner(text: &str) -> Owner {
    text.parse().expect("a name")
}

fn name(text: &str) -> Name {
    Name::from_ascii(text).expect("a name")
}

//! Records and answers as tests write them.

use hickory_proto::{
    op::ResponseCode,
    rr::{
        Name, RData, Record, RecordType,
        rdata::{A, AAAA, CNAME, MX, NS, NULL, PTR, SOA},
    },
    serialize::binary::{BinDecodable, BinDecoder},
};

use crate::{Answer, Question};

/// `www.example.org.`, the dot at the end left out or not.
pub(crate) fn name(text: &str) -> Name {
    let mut name = Name::from_ascii(text).expect("a name");
    name.set_fqdn(true);
    name
}

/// A question of a stub resolver, such as `www.example.org AAAA`.
pub(crate) fn question(text: &str) -> Question {
    let (owner, kind) = text.split_once(' ').expect("a name and a type");
    Question::new(&name(owner), kind.parse().expect("a type"))
}

/// A record such as `www.example.org 300 A 192.0.2.1`; of SOA data there is the minimum only, of RRSIG data the type that
/// it covers.
pub(crate) fn record(text: &str) -> Record {
    let fields: Vec<&str> = text.split_whitespace().collect();
    let [owner, ttl, kind, data] = fields[..] else {
        panic!("\"{text}\" has not four fields");
    };
    let (owner, ttl) = (name(owner), ttl.parse().expect("a TTL"));
    let data = match kind {
        "A" => RData::A(A(data.parse().expect("an address"))),
        "AAAA" => RData::AAAA(AAAA(data.parse().expect("an address"))),
        "CNAME" => RData::CNAME(CNAME(name(data))),
        "DNAME" => RData::Unknown {
            code: RecordType::DNAME,
            rdata: NULL::with(data.as_bytes().to_vec()),
        },
        "MX" => RData::MX(MX::new(10, name(data))),
        "NS" => RData::NS(NS(name(data))),
        "PTR" => RData::PTR(PTR(name(data))),
        "SOA" => {
            let minimum = data.parse().expect("a minimum");
            RData::SOA(SOA::new(
                name("ns.example.org"),
                name("root.example.org"),
                1,
                2,
                3,
                4,
                minimum,
            ))
        }
        "RRSIG" => return signature(owner, ttl, data.parse().expect("a type")),
        _ => panic!("{kind} is not known here"),
    };
    Record::from_rdata(owner, ttl, data)
}

/// An answer with `code`, of which `answers` and `authorities` have a record per line.
pub(crate) fn answer(code: ResponseCode, answers: &str, authorities: &str) -> Answer {
    let records = |text: &str| {
        text.lines()
            .map(str::trim)
            .filter(|line| !line.is_empty())
            .map(record)
            .collect()
    };
    Answer {
        answers: records(answers),
        authorities: records(authorities),
        ..Answer::empty(code)
    }
}

/// An answer without an error.
pub(crate) fn noerror(answers: &str, authorities: &str) -> Answer {
    answer(ResponseCode::NoError, answers, authorities)
}

/// The records of a section as [`record`] reads them, of those types that need it.
pub(crate) fn lines(records: &[Record]) -> Vec<String> {
    let line = |record: &Record| {
        let data = match &record.data {
            RData::SOA(soa) => soa.minimum.to_string(),
            RData::MX(mx) => mx.exchange.to_string(),
            RData::DNSSEC(_) | RData::Unknown { .. } => String::new(),
            data => data.to_string(),
        };
        let line = format!("{} {} {} {data}", record.name, record.ttl, record.record_type());
        line.trim_end().to_owned()
    };
    records.iter().map(line).collect()
}

fn signature(owner: Name, ttl: u32, covered: RecordType) -> Record {
    let mut wire = vec![0, 0, 46, 0, 1];
    wire.extend(ttl.to_be_bytes());
    wire.extend([0, 23]);
    wire.extend(u16::from(covered).to_be_bytes());
    // Algorithm, labels, TTL, end, begin, key tag, the root as its signer, four octets of signature.
    wire.extend([13, 2, 0, 0, 1, 44, 0x70, 0, 0, 0, 0x60, 0, 0, 0, 0, 1, 0, 1, 2, 3, 4]);
    let mut record = Record::read(&mut BinDecoder::new(&wire)).expect("a record");
    record.name = owner;
    record
}

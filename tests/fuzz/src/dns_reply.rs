//! What an upstream says, or who pretends to be one: what is accepted can be made an answer of, with AAAA records made of A
//! records, and that can be read.

use dns64::{
    Answer, Question,
    chain::{Chain, Link},
    packed::{Age, Lifetimes, Packed},
    query::{MOST_TCP, Parsed, Terms},
    synthesis::{Rules, Step},
    upstream::wire::{Entropy, Form, Reply, Sent},
};
use hickory_proto::{
    op::{Message, ResponseCode},
    rr::{Name, RecordType},
};

/// The first octet says which form the query had; then come, with their lengths before them, a reply to AAAA, to A and to
/// PTR, each without its id and its question.
pub fn run(bytes: &[u8]) {
    let Some((choice, mut rest)) = bytes.split_first() else {
        return;
    };
    let form = Form {
        edns: choice & 1 != 0,
        case: choice & 2 != 0,
        padded: choice & 4 != 0,
    };
    let mut take = || {
        let (length, after) = rest.split_first().unwrap_or((&0, &[]));
        let (part, after) = after.split_at(usize::from(*length).min(after.len()));
        rest = after;
        part
    };
    let name = Name::from_ascii("www.example.org.").expect("a name");
    let mut question = Question::new(&name, RecordType::AAAA);
    question.dnssec_ok = choice & 8 != 0;
    let six = judged(&question, form, take());
    let in_four = question.with_kind(RecordType::A);
    let four = judged(&in_four, form, take());
    let pointer = question.with_kind(RecordType::PTR);
    if let Some(answer) = judged(&pointer, form, take()) {
        packed(&pointer, &answer);
    }
    for answer in six.iter().chain(&four) {
        if let Link::Ask(next, chain) = Chain::new(question.clone()).on(answer.clone())
            && let Link::End(whole) = chain.on(Answer::empty(ResponseCode::NXDomain))
        {
            packed(&next, &whole);
        }
    }
    let rules = Rules::new(["64:ff9b::/96", "2001:db8::/32"].map(|prefix| prefix.parse().expect("a prefix")));
    let Some(synthesis) = rules.synthesis(&question) else {
        return;
    };
    let outcome = match synthesis.on_aaaa(six.ok_or(())) {
        Step::Done(outcome) => outcome,
        Step::AskA(waiting) => waiting.on_a(four.ok_or(())),
    };
    if let Ok(outcome) = outcome {
        packed(&question, &outcome.answer);
    }
}

/// `bytes`, as they are and as a reply with the right id and question; what the query takes of that.
fn judged(question: &Question, form: Form, bytes: &[u8]) -> Option<Answer> {
    let entropy = Entropy {
        id: 0x1234,
        case: [0x5a5a; 4],
    };
    let sent = Sent::new(question, form, &entropy).expect("a query");
    assert!(
        !matches!(sent.judge(bytes), Reply::Good(_)) || bytes.starts_with(&[0x12, 0x34]),
        "another id"
    );
    let (flags, rest) = bytes.split_at_checked(8)?;
    let end = 12 + question.name.to_ascii().len() + 1 + 4;
    let mut message = sent.bytes()[..end].to_vec();
    message[2..4].copy_from_slice(&flags[..2]);
    message[6..12].copy_from_slice(&flags[2..]);
    message.extend(rest);
    match sent.judge(&message) {
        Reply::Good(answer) => {
            packed(question, &answer);
            Some(answer)
        }
        _ => None,
    }
}

/// Packs an answer and writes it out in every size.
fn packed(question: &Question, answer: &Answer) {
    let lifetimes = Lifetimes::default();
    let Ok(packed) = Packed::new(question, answer, &lifetimes) else {
        return;
    };
    assert!(packed.lifetime() <= lifetimes.longest.max(lifetimes.failure));
    packed.unpack().expect("what was packed can be read");
    let asked = Sent::new(
        question,
        Form {
            edns: true,
            ..Form::default()
        },
        &Entropy { id: 7, case: [0; 4] },
    );
    let asked = asked.expect("a query");
    let Parsed::Query(query) = Parsed::of(asked.bytes()) else {
        panic!("a query of ours")
    };
    let mut out = vec![0; MOST_TCP];
    for (limit, age) in [
        (512, Age::Fresh(1)),
        (1232, Age::Stale),
        (MOST_TCP, Age::Fresh(u32::MAX)),
    ] {
        let terms = Terms {
            limit,
            cookie: Some([1; 24]),
        };
        if let Some(length) = packed.write(&query, age, &terms, &mut out) {
            assert!(length <= limit);
            Message::from_vec(&out[..length]).expect("an answer that can be read");
        }
    }
}

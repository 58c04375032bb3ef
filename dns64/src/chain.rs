//! Chains of aliases that an upstream did not follow to their end: [`Chain`] says what to ask next and joins the pieces.
//!
//! A recursive resolver answers with the whole chain. A CNAME of a zone of ours, or of a domain that is forwarded to an
//! authoritative server, may lead to a name that somebody else knows. A DNAME needs nothing of its own: whoever sends one
//! sends the CNAME that follows from it, too (RFC 6672 §3.1).

use hickory_proto::{
    op::ResponseCode,
    rr::{Name, RData, RecordType},
};

use crate::{Answer, question::Question};

/// Questions that one chain may take. A longer one ends where it has come to, without an error: that is no worse than
/// what the one who wrote it deserves.
const MOST: usize = 8;

/// One question and the part of its answer that is there.
#[derive(Debug)]
pub struct Chain {
    question: Question,
    so_far: Option<Answer>,
    asked: usize,
}

/// What follows from one more answer.
#[derive(Debug)]
pub enum Link {
    /// The chain goes on at another name: ask this, and give the answer to the chain.
    Ask(Question, Chain),
    /// The whole answer.
    End(Answer),
}

impl Chain {
    /// Where `question` itself is asked first.
    pub fn new(question: Question) -> Self {
        Self {
            question,
            so_far: None,
            asked: 1,
        }
    }

    /// Goes on with the answer to what was asked last.
    pub fn on(mut self, answer: Answer) -> Link {
        let next = open_end(&answer, &self.question.name, self.question.kind);
        let whole = match self.so_far.take() {
            Some(so_far) => join(so_far, answer),
            None => answer,
        };
        match next {
            // A name that is there already leads in a circle.
            Some(next) if self.asked < MOST && whole.answers.iter().all(|record| record.name != next) => {
                self.question = self.question.with_name(&next);
                self.asked += 1;
                self.so_far = Some(whole);
                Link::Ask(self.question.clone(), self)
            }
            _ => Link::End(whole),
        }
    }
}

/// The name at which an answer breaks off: its chain ends there, without a record of `kind` and without the SOA that
/// would say that there is none (RFC 2308 §2.2).
fn open_end(answer: &Answer, name: &Name, kind: RecordType) -> Option<Name> {
    let end = answer.end_of_chain(name);
    let denied = answer
        .authorities
        .iter()
        .any(|record| matches!(record.data, RData::SOA(_)));
    let open = answer.code == ResponseCode::NoError
        && !matches!(kind, RecordType::CNAME | RecordType::ANY)
        && end != name
        && !denied
        && answer.records(end, kind).next().is_none();
    open.then(|| end.to_lowercase())
}

/// One answer of two: code and the other sections speak of the chain's end (RFC 2308 §2.1), AA of its beginning (RFC 1035
/// §4.1.1).
fn join(first: Answer, rest: Answer) -> Answer {
    let mut answers = first.answers;
    answers.extend(rest.answers);
    Answer {
        authoritative: first.authoritative,
        ages: first.ages || rest.ages || first.authoritative != rest.authoritative,
        answers,
        ..rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{answer, lines, name, noerror, question};

    #[test]
    fn an_alias_that_breaks_off_is_followed_and_the_pieces_are_one_answer() {
        let mut zone = noerror("api.fleet 300 CNAME www.example.org", "");
        zone.authoritative = true;
        let (asked, chain) = ask(Chain::new(question("api.fleet AAAA")).on(zone));
        assert_eq!(asked, question("www.example.org AAAA"));
        let (asked, chain) = ask(chain.on(noerror("www.example.org 60 CNAME cdn.example.net", "")));
        assert_eq!(asked, question("cdn.example.net AAAA"));
        let whole = end(chain.on(noerror(
            "cdn.example.net 30 AAAA 2001:db8::1",
            "example.net 60 NS ns.example.net",
        )));
        assert_eq!(
            lines(&whole.answers),
            [
                "api.fleet. 300 CNAME www.example.org.",
                "www.example.org. 60 CNAME cdn.example.net.",
                "cdn.example.net. 30 AAAA 2001:db8::1"
            ]
        );
        assert_eq!(lines(&whole.authorities), ["example.net. 60 NS ns.example.net."]);
        assert!(whole.authoritative, "AA speaks of the name that was asked for");
        assert!(whole.ages, "and the rest is somebody else's");
    }

    #[test]
    fn the_code_of_the_chains_end_is_that_of_the_whole() {
        let (_, chain) =
            ask(Chain::new(question("a.example.org A")).on(noerror("a.example.org 9 CNAME b.example.org", "")));
        let whole = end(chain.on(answer(ResponseCode::NXDomain, "", "example.org 60 SOA 60")));
        assert_eq!(whole.code, ResponseCode::NXDomain);
        assert_eq!(lines(&whole.answers), ["a.example.org. 9 CNAME b.example.org."]);
    }

    #[test]
    fn what_is_whole_is_not_asked_again() {
        let alias = "a.example.org 9 CNAME b.example.org";
        for (asked, whole) in [
            ("a.example.org A", noerror("a.example.org 9 A 192.0.2.1", "")),
            (
                "a.example.org A",
                noerror(&format!("{alias}\nb.example.org 9 A 192.0.2.1"), ""),
            ),
            ("a.example.org A", noerror(alias, "example.org 60 SOA 60")),
            ("a.example.org A", noerror("", "")),
            ("a.example.org CNAME", noerror(alias, "")),
            ("a.example.org A", answer(ResponseCode::NXDomain, alias, "")),
            ("a.example.org A", answer(ResponseCode::ServFail, alias, "")),
        ] {
            assert_eq!(end(Chain::new(question(asked)).on(whole.clone())), whole, "{asked}");
        }
    }

    #[test]
    fn a_circle_ends() {
        let (asked, chain) =
            ask(Chain::new(question("a.example.org A")).on(noerror("a.example.org 9 CNAME b.example.org", "")));
        assert_eq!(asked.name, name("b.example.org"));
        end(chain.on(noerror("b.example.org 9 CNAME A.EXAMPLE.org", "")));
        end(Chain::new(question("a.example.org A")).on(noerror("a.example.org 9 CNAME a.example.org", "")));
        let circle = "a.example.org 9 CNAME b.example.org\nb.example.org 9 CNAME a.example.org";
        end(Chain::new(question("a.example.org A")).on(noerror(circle, "")));
    }

    #[test]
    fn a_chain_takes_eight_questions_at_most() {
        let mut chain = Chain::new(question("0.example.org A"));
        for hop in 0.. {
            let alias = noerror(&format!("{hop}.example.org 9 CNAME {}.example.org", hop + 1), "");
            match chain.on(alias) {
                Link::Ask(_, on) => chain = on,
                Link::End(whole) => {
                    assert_eq!((hop, whole.answers.len()), (7, 8));
                    return;
                }
            }
        }
    }

    fn ask(link: Link) -> (Question, Chain) {
        match link {
            Link::Ask(question, chain) => (question, chain),
            Link::End(answer) => panic!("ended with {answer:?}"),
        }
    }

    fn end(link: Link) -> Answer {
        match link {
            Link::Ask(question, _) => panic!("asks {question:?}"),
            Link::End(answer) => answer,
        }
    }
}

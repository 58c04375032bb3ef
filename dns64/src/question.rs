//! What is asked, apart from who asks and how: the key under which an answer is known.

use hickory_proto::{
    op::Query,
    rr::{DNSClass, Name, RecordType},
};

/// One question with the flags of its message that can change the answer.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Question {
    /// In lower case: names differ in nothing but their case are the same (RFC 4343).
    pub name: Name,
    /// QTYPE.
    pub kind: RecordType,
    /// QCLASS.
    pub class: DNSClass,
    /// The DO bit (RFC 3225): DNSSEC records are wanted.
    pub dnssec_ok: bool,
    /// The CD bit (RFC 4035 §3.2.2): the asker validates, nothing may be synthesised if DO is set, too (RFC 6147 §5.5).
    pub checking_disabled: bool,
    /// The RD bit. Without it only what is held here is an answer.
    pub recursion_desired: bool,
}

impl Question {
    /// A question for `kind` at `name` as a stub resolver asks it: class IN, RD, neither DO nor CD.
    pub fn new(name: &Name, kind: RecordType) -> Self {
        Self {
            name: name.to_lowercase(),
            kind,
            class: DNSClass::IN,
            dnssec_ok: false,
            checking_disabled: false,
            recursion_desired: true,
        }
    }

    /// The same for another type, as DNS64 asks for A to answer AAAA.
    #[must_use]
    pub fn with_kind(&self, kind: RecordType) -> Self {
        Self { kind, ..self.clone() }
    }

    /// The same for another name, as whoever follows a chain of CNAMEs asks.
    #[must_use]
    pub fn with_name(&self, name: &Name) -> Self {
        Self {
            name: name.to_lowercase(),
            ..self.clone()
        }
    }

    /// As it stands in a question section.
    pub fn query(&self) -> Query {
        let mut query = Query::query(self.name.clone(), self.kind);
        query.set_query_class(self.class);
        query
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_differ_in_case_alone_are_one_question() {
        let of = |name: &str| Question::new(&Name::from_ascii(name).expect("a name"), RecordType::AAAA);
        assert_eq!(of("WWW.Example.ORG."), of("www.example.org."));
        let other = Name::from_ascii("Other.Example.ORG.").expect("a name");
        assert_eq!(of("www.example.org.").with_name(&other), of("other.example.org."));
        let asked = of("www.example.org.").with_kind(RecordType::A).query();
        assert_eq!(asked.to_string(), "www.example.org. IN A");
    }
}

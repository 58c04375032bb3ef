//! What the sections of the one configuration file have in common: values with their place in the text, faults that point
//! there, durations and networks with the schema of each, and what a section needs to be opened.
//!
//! Vocabulary only: no section, no file, no rule of any service.

mod fault;
mod need;
mod network;
mod place;
mod time;

pub use self::{
    fault::{Fault, Faults},
    need::{Need, What},
    network::Cidr,
    place::At,
    time::{Span, Timeout},
};

#[doc(hidden)]
pub use schemars;

/// Schema of a type that is written as a string of a certain form: its name, what it is, and a regular expression.
#[macro_export]
macro_rules! string_schema {
    ($type:ty, $name:literal, $description:literal, $pattern:literal) => {
        impl $crate::schemars::JsonSchema for $type {
            fn inline_schema() -> bool {
                true
            }
            fn schema_name() -> std::borrow::Cow<'static, str> {
                $name.into()
            }
            fn json_schema(_: &mut $crate::schemars::SchemaGenerator) -> $crate::schemars::Schema {
                $crate::schemars::json_schema!({ "type": "string", "description": $description, "pattern": $pattern })
            }
        }
    };
}

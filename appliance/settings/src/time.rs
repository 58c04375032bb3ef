//! Durations as they are written.

use std::time::Duration;

use serde::{Deserialize, Deserializer, de};

/// A duration such as `"500ms"`, `"1s"` or `"10m"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span(pub Duration);

/// A duration, or `"none"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeout(pub Option<Duration>);

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        humantime::parse_duration(&text).map(Self).map_err(|_| {
            de::Error::custom(format!(
                "\"{text}\" is no duration; write a number and a unit such as \"500ms\", \"1s\" or \"10m\""
            ))
        })
    }
}

impl<'de> Deserialize<'de> for Timeout {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text == "none" {
            return Ok(Self(None));
        }
        humantime::parse_duration(&text)
            .map(|duration| Self(Some(duration)))
            .map_err(|_| {
                de::Error::custom(format!(
                    "\"{text}\" is no timeout; write \"none\", or a number and a unit such as \"10m\""
                ))
            })
    }
}

crate::string_schema!(
    Span,
    "Span",
    "A duration such as \"500ms\", \"1s\" or \"10m\".",
    r"^([0-9]+ *[a-zA-Z]+ *)+$"
);
crate::string_schema!(
    Timeout,
    "Timeout",
    "A duration such as \"10m\", or \"none\".",
    r"^(none|([0-9]+ *[a-zA-Z]+ *)+)$"
);

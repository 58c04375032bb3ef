//! TCP load balancer for Kubernetes API servers and other TCP services.
//!
//! ```text
//! accept -> Pool::pick (healthy, fewest sessions) -> connect (next backend on failure) -> copy, then splice, both ways
//! ```
//! Everything outside [`io`] is pure: values and `now` in, values out.

pub mod balance;
pub mod config;
pub mod health;
#[cfg(feature = "io")]
pub mod io;
pub mod limits;
pub mod moment;
pub mod pool;
pub mod proxy;
pub mod sni;
pub mod status;
pub mod wheel;

pub use config::Config;
pub use settings::{Need, What};

/// A drain that an operator asked for and that outlives restarts.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct Drain {
    /// The frontend.
    pub frontend: String,
    /// The backend as configured, `HOST:PORT`.
    pub backend: String,
}

/// What `config` asks the supervisor to open, each with the config line it comes from. `cores` is the number of data
/// threads when the configuration does not say.
pub fn needs(config: &Config, cores: u16) -> Vec<Need> {
    let threads = threads(config, cores);
    let mut needs = Vec::new();
    for at in &config.health {
        let what = What::Listener {
            address: at.value,
            copies: 1,
        };
        needs.push(Need {
            what,
            key: "lb.health".into(),
            span: at.span.clone(),
        });
    }
    for frontend in &config.frontend {
        for at in &frontend.listen {
            let what = What::Listener {
                address: at.value,
                copies: threads,
            };
            needs.push(Need {
                what,
                key: format!("lb.frontend.{}.listen", frontend.name.value),
                span: at.span.clone(),
            });
        }
        if let Some(at) = frontend
            .health
            .active
            .as_ref()
            .and_then(|active| active.ca_file.as_ref())
        {
            let key = format!("lb.frontend.{}.health.active.ca_file", frontend.name.value);
            needs.push(Need {
                what: What::File(at.value.clone()),
                key,
                span: at.span.clone(),
            });
        }
    }
    needs
}

/// Data threads of `config` on a machine with `cores` cores.
pub fn threads(config: &Config, cores: u16) -> u16 {
    config.threads.as_ref().map_or(cores, |at| at.value).max(1)
}

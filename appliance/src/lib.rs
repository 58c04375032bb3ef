//! The appliance: `edged` (supervisor and workers) and `edgectl`.

pub mod api;

//! Placeholder header; see README.md.

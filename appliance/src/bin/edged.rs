//! edged
fn main() {}

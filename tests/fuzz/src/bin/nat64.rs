#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz::nat64::run(bytes));

//! libFuzzer on `fuzzing::TARGETS`: lower.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    fuzzing::run("lower", data);
});

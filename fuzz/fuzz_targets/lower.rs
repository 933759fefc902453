//! libFuzzer on `fuzzing::TARGETS`: lower.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    (fuzzing::TARGETS[1].run)(data);
});

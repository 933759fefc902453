//! libFuzzer on `fuzzing::TARGETS`: http1.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    (fuzzing::TARGETS[0].run)(data);
});

//! libFuzzer on `fuzzing::TARGETS`: http1.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    fuzzing::run("http1", data);
});

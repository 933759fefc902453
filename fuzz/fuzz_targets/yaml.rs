//! libFuzzer on `fuzzing::TARGETS`: yaml.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    fuzzing::run("yaml", data);
});

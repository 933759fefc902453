//! libFuzzer on `fuzzing::TARGETS`: yaml.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    (fuzzing::TARGETS[2].run)(data);
});

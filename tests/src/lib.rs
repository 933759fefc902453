//! Tests of the whole: real processes, real TLS, real manifests. They live in `tests/`.

//! End-to-end, simulated and golden tests.

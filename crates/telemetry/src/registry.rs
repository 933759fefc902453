//! Metrics of the control plane: off the request path, so one lock is enough.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::text;

/// Bounds, in seconds, of the control plane's histograms.
const SECONDS: [f64; 8] = [0.01, 0.1, 0.5, 1.0, 3.0, 5.0, 10.0, 20.0];

#[derive(Clone)]
enum Value {
    Counter(f64),
    Gauge(f64),
    Histogram { buckets: [u64; SECONDS.len() + 1], sum: f64 },
}

/// Named counters, gauges and histograms with labels.
#[derive(Clone, Default)]
pub struct Registry {
    families: Arc<Mutex<BTreeMap<&'static str, BTreeMap<String, Value>>>>,
}

impl Registry {
    /// Empty.
    pub fn new() -> Self {
        Self::default()
    }

    fn change(&self, name: &'static str, labels: &[(&str, &str)], start: Value, change: impl FnOnce(&mut Value)) {
        let mut families = self.families.lock().unwrap_or_else(PoisonError::into_inner);
        let labels = text::labels(labels.iter().copied());
        change(families.entry(name).or_default().entry(labels).or_insert(start));
    }

    /// Adds `by` to a counter.
    pub fn add(&self, name: &'static str, labels: &[(&str, &str)], by: f64) {
        self.change(name, labels, Value::Counter(0.0), |value| {
            if let Value::Counter(total) = value {
                *total += by;
            }
        });
    }

    /// Adds one to a counter.
    pub fn count(&self, name: &'static str, labels: &[(&str, &str)]) {
        self.add(name, labels, 1.0);
    }

    /// Sets a gauge.
    pub fn set(&self, name: &'static str, labels: &[(&str, &str)], to: f64) {
        self.change(name, labels, Value::Gauge(to), |value| *value = Value::Gauge(to));
    }

    /// Records seconds into a histogram.
    pub fn observe(&self, name: &'static str, labels: &[(&str, &str)], seconds: f64) {
        let start = Value::Histogram { buckets: [0; SECONDS.len() + 1], sum: 0.0 };
        self.change(name, labels, start, |value| {
            if let Value::Histogram { buckets, sum } = value {
                buckets[SECONDS.partition_point(|bound| *bound < seconds)] += 1;
                *sum += seconds;
            }
        });
    }

    /// A counter's or gauge's value, 0 when it was never touched.
    pub fn value(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let families = self.families.lock().unwrap_or_else(PoisonError::into_inner);
        match families.get(name).and_then(|family| family.get(&text::labels(labels.iter().copied()))) {
            Some(Value::Counter(value) | Value::Gauge(value)) => *value,
            Some(Value::Histogram { .. }) | None => 0.0,
        }
    }

    /// Writes everything in Prometheus' text format.
    pub fn render(&self, out: &mut String) {
        let families = self.families.lock().unwrap_or_else(PoisonError::into_inner);
        for (name, family) in families.iter() {
            let kind = match family.values().next() {
                Some(Value::Gauge(_)) => "gauge",
                Some(Value::Histogram { .. }) => "histogram",
                Some(Value::Counter(_)) | None => "counter",
            };
            text::type_line(out, name, kind);
            for (labels, value) in family {
                match value {
                    Value::Counter(value) | Value::Gauge(value) => text::sample(out, name, labels, value),
                    Value::Histogram { buckets, sum } => {
                        let comma = if labels.is_empty() { "" } else { "," };
                        let mut count = 0;
                        for (index, bucket) in buckets.iter().enumerate() {
                            count += bucket;
                            let bound = SECONDS.get(index).map_or_else(|| "+Inf".to_owned(), ToString::to_string);
                            text::sample(
                                out,
                                &format!("{name}_bucket"),
                                &format!("{labels}{comma}le=\"{bound}\""),
                                count,
                            );
                        }
                        text::sample(out, &format!("{name}_sum"), labels, sum);
                        text::sample(out, &format!("{name}_count"), labels, count);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_have_one_type_line() {
        let registry = Registry::new();
        registry.count("pilot_xds_pushes", &[("type", "cds")]);
        registry.count("pilot_xds_pushes", &[("type", "eds")]);
        registry.set("pilot_services", &[], 3.0);
        registry.observe("pilot_proxy_convergence_time", &[], 0.2);
        let mut out = String::new();
        registry.render(&mut out);
        assert_eq!(out.matches("# TYPE pilot_xds_pushes counter").count(), 1);
        assert!(out.contains("pilot_services 3\n"));
        assert!(out.contains("pilot_proxy_convergence_time_bucket{le=\"0.1\"} 0\n"));
        assert!(out.contains("pilot_proxy_convergence_time_bucket{le=\"0.5\"} 1\n"));
        assert!((registry.value("pilot_xds_pushes", &[("type", "eds")]) - 1.0).abs() < f64::EPSILON);
    }
}

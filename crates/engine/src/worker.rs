//! What one worker keeps between requests: built balancers, caches. Never shared between threads.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use crate::balance::Balancer;
use crate::cluster::Cluster;
use crate::config::{Name, NameHasher, RuntimeConfig};
use crate::facts::Now;
use crate::shared::{SharedCluster, SharedTable};

/// A worker's own state.
#[derive(Debug)]
pub struct Worker {
    shared: Arc<SharedTable>,
    live: RefCell<HashMap<Name, Rc<LiveCluster>, NameHasher>>,
    date: Cell<(u64, [u8; 29])>,
    /// Tokens whose signatures were good.
    pub(crate) tokens: RefCell<crate::jwt::TokenCache>,
}

/// A cluster that this worker has used: counters and balancer at hand.
#[derive(Debug)]
pub struct LiveCluster {
    /// The cluster, in the version it was built from.
    pub cluster: Arc<Cluster>,
    /// Its counters.
    pub shared: Arc<SharedCluster>,
    /// `None` where hosts come from the connection or the request.
    pub balancer: Option<RefCell<Balancer>>,
}

impl Worker {
    /// The state of a new worker over the proxy's shared counters.
    pub fn new(shared: Arc<SharedTable>) -> Self {
        Self { shared, live: RefCell::default(), date: Cell::new((u64::MAX, [0; 29])), tokens: RefCell::default() }
    }

    /// The proxy's shared counters.
    pub fn shared(&self) -> &Arc<SharedTable> {
        &self.shared
    }

    /// The cluster as `config` has it, ready to pick from. Built on first use and when cluster or
    /// endpoints have changed; balancers of clusters nobody asks for are never built.
    pub fn live(&self, config: &RuntimeConfig, cluster: &Arc<Cluster>, now: Instant) -> Rc<LiveCluster> {
        let endpoints = config.endpoints_of(cluster);
        let mut live = self.live.borrow_mut();
        if let Some(found) = live.get(&cluster.name) {
            let same_endpoints = match (&found.balancer, endpoints) {
                (Some(balancer), Some(endpoints)) => Arc::ptr_eq(balancer.borrow().endpoints(), endpoints),
                (None, None) => true,
                _ => false,
            };
            if same_endpoints && Arc::ptr_eq(&found.cluster, cluster) {
                return Rc::clone(found);
            }
        }
        let shared = self.shared.cluster(&cluster.name);
        let balancer = endpoints.map(|set| RefCell::new(Balancer::new(cluster, set, &shared, now)));
        let made = Rc::new(LiveCluster { cluster: Arc::clone(cluster), shared, balancer });
        live.insert(Name::clone(&cluster.name), Rc::clone(&made));
        made
    }

    /// The counters of the cluster of this name, whatever version of it is at hand; of the table (a lock) only
    /// where this worker keeps none.
    pub fn counters(&self, name: &Name) -> Arc<SharedCluster> {
        let kept = self.live.borrow().get(name).map(|live| Arc::clone(&live.shared));
        kept.unwrap_or_else(|| self.shared.cluster(name))
    }

    /// Forgets clusters that `config` no longer has; for the worker, when it takes a new generation.
    pub fn reconcile(&self, config: &RuntimeConfig) {
        self.live.borrow_mut().retain(|name, _| config.clusters.get(name).is_some());
    }

    /// `date` of a response: IMF-fixdate, made once a second.
    pub fn date(&self, now: Now) -> [u8; 29] {
        let second = now.wall_seconds();
        let (known, text) = self.date.get();
        if known == second {
            return text;
        }
        let text = imf_fixdate(second);
        self.date.set((second, text));
        text
    }
}

/// `Sun, 06 Nov 1994 08:49:37 GMT` of a Unix time.
///
/// *Source*: RFC 9110, 5.6.7; days to civil date after the proleptic Gregorian calendar.
pub fn imf_fixdate(seconds: u64) -> [u8; 29] {
    const DAYS: [&[u8; 3]; 7] = [b"Thu", b"Fri", b"Sat", b"Sun", b"Mon", b"Tue", b"Wed"];
    const MONTHS: [&[u8; 3]; 12] =
        [b"Jan", b"Feb", b"Mar", b"Apr", b"May", b"Jun", b"Jul", b"Aug", b"Sep", b"Oct", b"Nov", b"Dec"];
    let days = seconds / 86_400;
    let rest = seconds % 86_400;
    let (year, month, day) = civil(days);
    let mut text = *b"Thu, 00 Jan 0000 00:00:00 GMT";
    let two = |text: &mut [u8; 29], at: usize, n: u64| {
        text[at] = b'0' + u8::try_from(n / 10 % 10).unwrap_or(0);
        text[at + 1] = b'0' + u8::try_from(n % 10).unwrap_or(0);
    };
    text[0..3].copy_from_slice(DAYS[usize::try_from(days % 7).unwrap_or(0)]);
    two(&mut text, 5, day);
    text[8..11].copy_from_slice(MONTHS[usize::try_from(month - 1).unwrap_or(0) % 12]);
    two(&mut text, 12, year / 100);
    two(&mut text, 14, year % 100);
    two(&mut text, 17, rest / 3600);
    two(&mut text, 20, rest / 60 % 60);
    two(&mut text, 23, rest % 60);
    text
}

/// Year, month and day of a day counted from 1970-01-01.
pub(crate) fn civil(days: u64) -> (u64, u64, u64) {
    let z = days + 719_468;
    let era = z / 146_097;
    let day_of_era = z % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        assert_eq!(&imf_fixdate(784_111_777), b"Sun, 06 Nov 1994 08:49:37 GMT");
        assert_eq!(&imf_fixdate(0), b"Thu, 01 Jan 1970 00:00:00 GMT");
        assert_eq!(&imf_fixdate(951_782_400), b"Tue, 29 Feb 2000 00:00:00 GMT");
        assert_eq!(&imf_fixdate(1_795_564_799), b"Tue, 24 Nov 2026 23:59:59 GMT");
    }
}

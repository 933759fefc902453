//! Files of resources: read at the start, and again whenever one is replaced.
//!
//! A file that cannot be read or does not fit keeps what it gave before; the reason is logged. Clusters and listeners
//! that a file gave and gives no more are gone; other resources go with what names them, as in Envoy.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use engine::config::Name;
use engine::lower::Raw;
use types::wellknown::type_urls;

use crate::bootstrap::{FileContent, Referred, read_file};
use crate::file_secrets::{Failure, Known, Stamp, may_pass, stamp};

/// What changed, by type, in an order in which nothing refers to what is not there yet.
pub(crate) type Changes = Vec<(&'static str, Vec<Raw>, Vec<Name>)>;

/// The files that are watched.
#[derive(Default)]
pub(crate) struct Files {
    followed: BTreeMap<PathBuf, Followed>,
    /// What the bootstrap refers to.
    bootstrap: Referred,
    /// Names of resources that come from files, by type.
    names: BTreeSet<(&'static str, Name)>,
}

#[derive(Default)]
struct Followed {
    known: Known<Stamp>,
    gave: BTreeMap<(&'static str, Name), Raw>,
    /// What it refers to.
    referred: Referred,
}

const ORDER: [&str; 5] =
    [type_urls::SECRET, type_urls::CLUSTER, type_urls::ENDPOINT, type_urls::ROUTE, type_urls::LISTENER];

impl Files {
    pub(crate) fn new(referred: Referred) -> Self {
        let mut made = Self { names: referred.names.clone(), ..Self::default() };
        made.follow(referred.paths.clone());
        made.bootstrap = referred;
        made
    }

    /// Whether there is any.
    pub(crate) fn is_empty(&self) -> bool {
        self.followed.is_empty()
    }

    /// Whether who refers to this resource refers to a file.
    pub(crate) fn names(&self, url: &'static str, name: &Name) -> bool {
        self.names.contains(&(url, Name::clone(name)))
    }

    /// Follows these files as well; answers those that were not known.
    fn follow(&mut self, paths: BTreeSet<PathBuf>) -> Vec<PathBuf> {
        let new: Vec<PathBuf> = paths.into_iter().filter(|path| !self.followed.contains_key(path)).collect();
        self.followed.extend(new.iter().map(|path| (path.clone(), Followed::default())));
        new
    }

    /// Lets go of the files that nothing refers to any more; answers the resources that only these gave.
    fn let_go(&mut self) -> BTreeSet<(&'static str, Name)> {
        let mut reached = self.bootstrap.clone();
        let mut todo: Vec<PathBuf> = reached.paths.iter().cloned().collect();
        while let Some(path) = todo.pop() {
            let Some(followed) = self.followed.get(&path) else { continue };
            reached.names.extend(followed.referred.names.iter().cloned());
            for further in &followed.referred.paths {
                if reached.paths.insert(further.clone()) {
                    todo.push(further.clone());
                }
            }
        }
        let Referred { paths, names } = reached;
        self.names = names;
        let mut gone = BTreeSet::new();
        self.followed.retain(|path, followed| {
            let stays = paths.contains(path);
            if !stays {
                gone.extend(std::mem::take(&mut followed.gave).into_keys());
            }
            stays
        });
        gone.retain(|key| !self.followed.values().any(|followed| followed.gave.contains_key(key)));
        gone
    }

    /// Looks at every file; says what changed since the last look.
    pub(crate) fn look(&mut self) -> Changes {
        let mut changed: BTreeMap<&'static str, (Vec<Raw>, Vec<Name>)> = BTreeMap::new();
        let mut todo: Vec<PathBuf> = self.followed.keys().cloned().collect();
        let mut refers_anew = false;
        while let Some(path) = todo.pop() {
            let Some(followed) = self.followed.get_mut(&path) else { continue };
            let Some(now) = stamp(&path).filter(|now| !followed.known.is_of(now)) else { continue };
            let content = match followed.known.note(now, read(&path)) {
                Some(Ok(content)) => content,
                Some(Err(reason)) => {
                    tracing::warn!(path = %path.display(), reason, "a file of resources is refused; what it gave before stays");
                    continue;
                }
                None => continue,
            };
            let mut gone = std::mem::take(&mut followed.gave);
            // A resource that is now asked for elsewhere looks the same: its source reads as ADS in both cases.
            let is_anew = followed.referred != content.referred;
            for (url, raw) in content.resources {
                let key = (url, Name::clone(&raw.name));
                if gone.remove(&key).as_ref() != Some(&raw) || is_anew {
                    changed.entry(url).or_default().0.push(raw.clone());
                }
                followed.gave.insert(key, raw);
            }
            for (url, name) in gone.into_keys() {
                if matches!(url, type_urls::CLUSTER | type_urls::LISTENER) {
                    changed.entry(url).or_default().1.push(name);
                }
            }
            if is_anew {
                refers_anew = true;
                followed.referred = content.referred.clone();
                todo.extend(self.follow(content.referred.paths));
            }
        }
        let gone = if refers_anew { self.let_go() } else { BTreeSet::new() };
        for (url, name) in gone {
            if matches!(url, type_urls::CLUSTER | type_urls::LISTENER) {
                let (raws, removed) = changed.entry(url).or_default();
                raws.retain(|raw| raw.name != name);
                removed.push(name);
            }
        }
        ORDER.into_iter().filter_map(|url| changed.remove(url).map(|(raws, removed)| (url, raws, removed))).collect()
    }
}

fn read(path: &Path) -> Result<FileContent, Failure> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| Failure { may_pass: may_pass(&error), reason: error.to_string() })?;
    read_file(&text).map_err(|error| Failure { may_pass: false, reason: error.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(resources: &str) -> String {
        format!("version_info: '1'\nresources: [{resources}]")
    }

    fn resource(kind: &str, name: &str) -> String {
        let field = if kind.ends_with("ClusterLoadAssignment") { "cluster_name" } else { "name" };
        format!("{{ '@type': type.googleapis.com/{kind}, {field}: {name} }}")
    }

    #[test]
    fn only_clusters_and_listeners_go_when_they_are_absent() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("all.yaml");
        let put = |text: &str| {
            std::fs::write(dir.path().join("new"), text).unwrap();
            std::fs::rename(dir.path().join("new"), &path).unwrap();
        };
        let mut files = Files::new(Referred { paths: BTreeSet::from([path.clone()]), ..Referred::default() });
        assert!(files.look().is_empty(), "nothing is there");
        let kinds = [
            ("envoy.extensions.transport_sockets.tls.v3.Secret", type_urls::SECRET),
            ("envoy.config.cluster.v3.Cluster", type_urls::CLUSTER),
            ("envoy.config.endpoint.v3.ClusterLoadAssignment", type_urls::ENDPOINT),
            ("envoy.config.route.v3.RouteConfiguration", type_urls::ROUTE),
            ("envoy.config.listener.v3.Listener", type_urls::LISTENER),
        ];
        let all = file(&kinds.map(|(kind, _)| resource(kind, "a")).join(", "));
        put(&all);
        let given: Vec<_> = files.look().into_iter().map(|(url, raws, gone)| (url, raws.len(), gone.len())).collect();
        assert_eq!(given, kinds.map(|(_, url)| (url, 1, 0)));
        // What is no such file, or empty before it is written, takes nothing away.
        for bad in
            ["", "resource: []", "[]", "resources: {}", "resources: []\nmore: 1", "version_info: 1\nresources: ["]
        {
            put(bad);
            assert!(files.look().is_empty(), "{bad:?}");
        }
        put(&file(""));
        let given = files.look();
        let gone: Vec<_> = given.iter().map(|(url, raws, gone)| (*url, raws.len(), gone.len())).collect();
        assert_eq!(gone, [(type_urls::CLUSTER, 0, 1), (type_urls::LISTENER, 0, 1)]);
        put(&all);
        assert_eq!(files.look().len(), 5);
    }

    #[test]
    fn a_source_that_moves_out_of_files_is_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let put = |name: &str, text: &str| {
            std::fs::write(path("new"), text).unwrap();
            std::fs::rename(path("new"), path(name)).unwrap();
        };
        let cluster = |source: &str| {
            file(&format!(
                "{{ '@type': type.googleapis.com/envoy.config.cluster.v3.Cluster, name: a, type: EDS, eds_cluster_config: {{ eds_config: {{ {source} }} }} }}"
            ))
        };
        let mut files = Files::new(Referred { paths: BTreeSet::from([path("cds")]), ..Referred::default() });
        put("cds", &cluster(&format!("path_config_source: {{ path: {} }}", path("eds").display())));
        put("eds", &file(&resource("envoy.config.endpoint.v3.ClusterLoadAssignment", "a")));
        assert_eq!(files.look().len(), 2);
        assert!(files.names(type_urls::ENDPOINT, &"a".into()));
        put("cds", &cluster("ads: {}, resource_api_version: V3"));
        assert_eq!(files.look().len(), 1);
        assert!(!files.names(type_urls::ENDPOINT, &"a".into()));
        assert_eq!(files.followed.keys().collect::<Vec<_>>(), [&path("cds")]);
    }

    #[test]
    fn a_file_that_cannot_be_read_for_now_is_read_later() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lds.yaml");
        std::fs::create_dir(&path).unwrap();
        let mut files = Files::new(Referred { paths: BTreeSet::from([path.clone()]), ..Referred::default() });
        assert!(files.look().is_empty(), "a folder");
        let now = stamp(&path).unwrap();
        assert!(!files.followed[&path].known.is_of(&now), "it is tried again");
    }
}

//! What a container sees of the file system: the machine's, with its own `/etc` and volumes.
//!
//! Nothing is ever created on the machine. Where a mount point is missing, the nearest existing
//! folder is replaced, for this container only:
//! - below `/etc`: an overlay whose upper folder holds the pod's files and the new mount points. It
//!   survives that the machine replaces `/etc/resolv.conf` by rename, which a bind mount does not;
//! - elsewhere: a *mimic*, a folder in memory with every entry of the original bound into it;
//! - directly below `/`: the same for `/` itself, which the container then has as its root.
//!
//! All content lives on one tmpfs that is mounted in the manager's mount namespace only, so it is
//! gone with the mesh, and never on disk.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};

use crate::spec::{Mount, Volume, VolumeFile, VolumeSource};
use crate::wire::Refusal;

/// Mounts the scratch tmpfs over the run folder; private to the manager's mount namespace.
pub(crate) fn mount_scratch(run_dir: &Path) -> Result<(), Refusal> {
    rustix::mount::mount("lateen", run_dir, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, Some(c"mode=0700"))
        .map_err(Refusal::step(format!("mounting a tmpfs over {}", run_dir.display())))
}

/// A pod's folder on the scratch tmpfs.
#[derive(Debug)]
pub(crate) struct PodFiles {
    dir: PathBuf,
    volumes: Vec<Volume>,
    etc: Vec<(String, String)>,
    generation: u64,
}

impl PodFiles {
    /// Writes the volumes of a pod.
    pub(crate) fn create(dir: PathBuf, volumes: Vec<Volume>, etc: Vec<(String, String)>) -> Result<Self, Refusal> {
        let mut files = Self { dir, volumes: Vec::new(), etc, generation: 0 };
        make_dir(&files.dir)?;
        for volume in volumes {
            let path = files.volume_dir(&volume.name)?;
            match &volume.source {
                VolumeSource::Files(contents) => {
                    make_dir(&path)?;
                    files.write_files(&path, contents)?;
                }
                VolumeSource::Empty => make_dir(&path)?,
                VolumeSource::Host(host) => {
                    fs::metadata(host).map_err(Refusal::io(format!("volume {:?}: {}", volume.name, host.display())))?;
                }
            }
            files.volumes.push(Volume { name: volume.name, source: keep_kind(volume.source) });
        }
        Ok(files)
    }

    /// Replaces the files of a volume as one.
    pub(crate) fn update(&mut self, volume: &str, contents: &[VolumeFile]) -> Result<(), Refusal> {
        let known =
            self.volumes.iter().any(|known| known.name == volume && matches!(known.source, VolumeSource::Files(_)));
        if !known {
            return Err(Refusal::Step {
                step: format!("updating volume {volume:?}, which the pod lacks"),
                errno: libc::ENOENT,
            });
        }
        let path = self.volume_dir(volume)?;
        self.write_files(&path, contents)
    }

    /// Removes everything from memory.
    pub(crate) fn remove(self) {
        // Only memory of a tmpfs that ends with the mesh; mounts in dying namespaces hold no lock on it.
        crate::tolerate(fs::remove_dir_all(&self.dir));
    }

    fn volume_dir(&self, name: &str) -> Result<PathBuf, Refusal> {
        Ok(self.dir.join("volumes").join(inside(name)?))
    }

    /// As the kubelet does: a folder for each version, `..data` points to the current one, and each
    /// file is a link through it. Renaming `..data` switches all of them at once.
    fn write_files(&mut self, volume: &Path, contents: &[VolumeFile]) -> Result<(), Refusal> {
        let failed = || Refusal::io(format!("writing {}", volume.display()));
        self.generation += 1;
        let version = format!("..{}", self.generation);
        let dir = volume.join(&version);
        make_dir(&dir)?;
        let mut tops = BTreeSet::new();
        for file in contents {
            let path = inside(&file.path)?;
            let whole = dir.join(&path);
            if let Some(parent) = whole.parent() {
                make_dir(parent)?;
            }
            write_file(&whole, &file.contents, file.mode).map_err(failed())?;
            tops.extend(path.components().next().map(|top| PathBuf::from(top.as_os_str())));
        }
        let previous = fs::read_link(volume.join("..data")).ok();
        let fresh = volume.join("..data_tmp");
        std::os::unix::fs::symlink(&version, &fresh).map_err(failed())?;
        fs::rename(&fresh, volume.join("..data")).map_err(failed())?;
        for top in &tops {
            match std::os::unix::fs::symlink(Path::new("..data").join(top), volume.join(top)) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed()(error)),
                _ => {}
            }
        }
        for entry in fs::read_dir(volume).map_err(failed())? {
            let entry = entry.map_err(failed())?;
            let name = PathBuf::from(entry.file_name());
            if !tops.contains(&name) && !entry.file_name().as_encoded_bytes().starts_with(b"..") {
                fs::remove_file(entry.path()).map_err(failed())?;
            }
        }
        if let Some(previous) = previous {
            fs::remove_dir_all(volume.join(previous)).map_err(failed())?;
        }
        Ok(())
    }

    /// Sets up the mounts of one container in the calling thread's own, fresh mount namespace.
    pub(crate) fn mount(&self, container: &str, mounts: &[Mount], hidden: &[PathBuf]) -> Result<(), Refusal> {
        let dir = self.dir.join("containers").join(inside(container)?);
        // What an earlier run of the container left. Its mounts were in its own namespace only: here
        // the folder holds nothing but memory of ours.
        if dir.exists() {
            fs::remove_dir_all(&dir).map_err(Refusal::io("clearing the container's folder"))?;
        }
        make_dir(&dir)?;
        let scratch_device = fs::metadata(&dir).map_err(Refusal::io("reading the scratch folder"))?.dev();
        let mut view = View { dir, own_devices: vec![scratch_device], mimics: 0 };
        let mut sources = Vec::new();
        for mount in mounts {
            sources.push((self.source(mount)?, mount));
        }
        // A mount inside another one comes after it.
        sources.sort_by_key(|(_, mount)| mount.path.components().count());
        if mounts.iter().any(|mount| needs_root(&mount.path)) {
            view.replace_root()?;
        }
        view.overlay_etc(&self.etc)?;
        // From here on by descriptor: a volume may cover the folder that the others lie below (`/tmp`).
        let own = Held::open(&view.dir)?;
        view.dir.clone_from(&own.path);
        let mut held = Vec::new();
        for (source, mount) in sources {
            held.push((Held::open(&source)?, mount));
        }
        for (source, mount) in &held {
            view.bind(&source.path, &mount.path, mount.read_only)?;
        }
        // What a mount covers is hidden already. After the mounts: one of them may show a folder that is to be hidden.
        for path in hidden.iter().filter(|path| !mounts.iter().any(|mount| mount.path == **path)) {
            View::hide(path)?;
        }
        Ok(())
    }

    fn source(&self, mount: &Mount) -> Result<PathBuf, Refusal> {
        let missing = |what: String| Refusal::Step { step: what, errno: libc::ENOENT };
        if !mount.path.is_absolute() || mount.path.components().any(|part| part == Component::ParentDir) {
            return Err(Refusal::Step {
                step: format!("mount path {} is not absolute", mount.path.display()),
                errno: libc::EINVAL,
            });
        }
        let volume = self
            .volumes
            .iter()
            .find(|volume| volume.name == mount.volume)
            .ok_or_else(|| missing(format!("mounting volume {:?}, which the pod lacks", mount.volume)))?;
        let root = match &volume.source {
            VolumeSource::Host(path) => path.clone(),
            _ => self.volume_dir(&volume.name)?,
        };
        let Some(sub_path) = &mount.sub_path else { return Ok(root) };
        let path = root.join(inside(sub_path)?);
        if matches!(volume.source, VolumeSource::Empty) && !path.exists() {
            make_dir(&path)?;
        }
        // A file of a ConfigMap is a link; what is bound is the file it means now.
        fs::canonicalize(&path).map_err(Refusal::io(format!("subPath {sub_path:?} of volume {:?}", volume.name)))
    }
}

/// Contents are on the tmpfs; only the kind is remembered.
fn keep_kind(source: VolumeSource) -> VolumeSource {
    match source {
        VolumeSource::Files(_) => VolumeSource::Files(Vec::new()),
        other => other,
    }
}

/// A relative path that stays below where it is joined.
fn inside(path: &str) -> Result<PathBuf, Refusal> {
    let path = Path::new(path);
    let fine = path.components().all(|part| matches!(part, Component::Normal(_)));
    if fine && path.components().next().is_some() {
        Ok(path.to_owned())
    } else {
        Err(Refusal::Step { step: format!("path {} leaves its volume", path.display()), errno: libc::EINVAL })
    }
}

/// Whether the first part of a mount path is missing on the machine.
fn needs_root(path: &Path) -> bool {
    path.components().nth(1).is_some_and(|first| fs::metadata(Path::new("/").join(first)).is_err())
}

/// A file or folder by a path that leads to it whatever is mounted over its own.
struct Held {
    path: PathBuf,
    _file: OwnedFd,
}

impl Held {
    fn open(path: &Path) -> Result<Self, Refusal> {
        let file = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
            .map_err(Refusal::step(format!("opening {}", path.display())))?;
        Ok(Self { path: format!("/proc/thread-self/fd/{}", file.as_raw_fd()).into(), _file: file })
    }
}

/// The mounts of one container while they are made.
struct View {
    /// Folder on the scratch tmpfs for this container.
    dir: PathBuf,
    /// Devices whose folders may get new entries: scratch and overlays.
    own_devices: Vec<u64>,
    mimics: u32,
}

impl View {
    fn overlay_etc(&mut self, files: &[(String, String)]) -> Result<(), Refusal> {
        let (upper, work) = (self.dir.join("etc"), self.dir.join("etc-work"));
        make_dir(&upper)?;
        make_dir(&work)?;
        for (name, content) in files {
            let path = upper.join(inside(name)?);
            write_file(&path, content.as_bytes(), 0o644).map_err(Refusal::io(format!("writing /etc/{name}")))?;
        }
        if !Path::new("/etc").is_dir() {
            return Ok(());
        }
        let options = format!("lowerdir=/etc,upperdir={},workdir={}", upper.display(), work.display());
        let attempts = [format!("{options},userxattr"), options];
        let mounted = attempts.iter().any(|options| {
            std::ffi::CString::new(options.as_str()).is_ok_and(|options| {
                rustix::mount::mount(
                    "lateen-etc",
                    "/etc",
                    "overlay",
                    MountFlags::NOSUID | MountFlags::NODEV,
                    Some(options.as_c_str()),
                )
                .is_ok()
            })
        });
        if mounted {
            let device = fs::metadata("/etc").map_err(Refusal::io("reading /etc"))?.dev();
            self.own_devices.push(device);
            return Ok(());
        }
        // A kernel before 5.11, or a file system that cannot be below an overlay: bind what can be bound.
        for (name, _) in files {
            self.bind(&upper.join(name), &Path::new("/etc").join(name), false)?;
        }
        Ok(())
    }

    /// Makes `source` seen at `path`, whatever must be made for it.
    fn bind(&mut self, source: &Path, path: &Path, read_only: bool) -> Result<(), Refusal> {
        let source_is_dir =
            fs::metadata(source).map_err(Refusal::io(format!("reading {}", source.display())))?.is_dir();
        let target = self.mount_point(path, source_is_dir)?;
        let failed = || Refusal::step(format!("mounting {}", path.display()));
        rustix::mount::mount_bind_recursive(source, &target).map_err(failed())?;
        if read_only {
            let flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
            rustix::mount::mount_remount(&target, flags, "").map_err(failed())?;
        }
        Ok(())
    }

    /// An existing path of the right kind for `path`, with links resolved.
    fn mount_point(&mut self, path: &Path, dir: bool) -> Result<PathBuf, Refusal> {
        let (existing, missing) = split(path);
        let failed = || Refusal::io(format!("making the mount point {}", path.display()));
        let kind = fs::metadata(&existing).map_err(failed())?;
        if missing.as_os_str().is_empty() {
            if kind.is_dir() != dir {
                let step = format!("mounting {} over {}", if dir { "a folder" } else { "a file" }, path.display());
                return Err(Refusal::Step { step, errno: if dir { libc::ENOTDIR } else { libc::EISDIR } });
            }
            return Ok(existing);
        }
        if !kind.is_dir() {
            return Err(Refusal::Step {
                step: format!("making the mount point {}", path.display()),
                errno: libc::ENOTDIR,
            });
        }
        if !self.own_devices.contains(&kind.dev()) {
            self.mimic(&existing)?;
        }
        let whole = existing.join(&missing);
        if dir {
            make_dir(&whole)?;
        } else {
            if let Some(parent) = whole.parent() {
                make_dir(parent)?;
            }
            write_file(&whole, b"", 0o644).map_err(failed())?;
        }
        Ok(whole)
    }

    /// Replaces a folder by one in memory that shows the same.
    fn mimic(&mut self, original: &Path) -> Result<(), Refusal> {
        let copy = self.copy(original)?;
        rustix::mount::mount_bind_recursive(&copy, original)
            .map_err(Refusal::step(format!("replacing {} in the container", original.display())))
    }

    /// The same for `/`, which becomes the root of the container.
    fn replace_root(&mut self) -> Result<(), Refusal> {
        let failed = || Refusal::step("giving the container its own root folder");
        let copy = self.copy(Path::new("/"))?;
        // Only a mount can become a root.
        rustix::mount::mount_bind_recursive(&copy, &copy).map_err(failed())?;
        rustix::process::chdir(&copy).map_err(failed())?;
        if rustix::process::pivot_root(".", ".").is_ok() {
            // The old root lies on top of the new one now.
            rustix::mount::unmount(".", UnmountFlags::DETACH).map_err(failed())?;
        } else {
            // An initial RAM file system cannot be pivoted away from.
            rustix::mount::mount_move(".", "/").map_err(failed())?;
            rustix::process::chroot(".").map_err(failed())?;
        }
        rustix::process::chdir("/").map_err(failed())
    }

    fn copy(&mut self, original: &Path) -> Result<PathBuf, Refusal> {
        let failed = || Refusal::io(format!("copying the entries of {}", original.display()));
        self.mimics += 1;
        let copy = self.dir.join(format!("mimic{}", self.mimics));
        make_dir(&copy)?;
        for entry in fs::read_dir(original).map_err(failed())? {
            let entry = entry.map_err(failed())?;
            let place = copy.join(entry.file_name());
            let kind = entry.file_type().map_err(failed())?;
            if kind.is_symlink() {
                let to = fs::read_link(entry.path()).map_err(failed())?;
                std::os::unix::fs::symlink(to, &place).map_err(failed())?;
                continue;
            }
            if kind.is_dir() {
                make_dir(&place)?;
            } else {
                write_file(&place, b"", 0o600).map_err(failed())?;
            }
            // What cannot be bound (gone meanwhile, locked) shows as an empty placeholder.
            crate::tolerate(rustix::mount::mount_bind_recursive(entry.path(), &place));
        }
        Ok(copy)
    }

    fn hide(path: &Path) -> Result<(), Refusal> {
        if !path.is_dir() {
            return Ok(());
        }
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::RDONLY;
        rustix::mount::mount("lateen-hidden", path, "tmpfs", flags, Some(c"size=4k,mode=0555"))
            .map_err(Refusal::step(format!("hiding {}", path.display())))
    }
}

/// The longest existing beginning of a path, resolved, and the rest.
fn split(path: &Path) -> (PathBuf, PathBuf) {
    let mut existing = PathBuf::from("/");
    let mut parts = path.components();
    // The root itself.
    parts.next();
    while let Some(part) = parts.next() {
        match fs::canonicalize(existing.join(part)) {
            Ok(resolved) => existing = resolved,
            Err(_) => return (existing, Path::new(part.as_os_str()).join(parts.as_path())),
        }
    }
    (existing, PathBuf::new())
}

fn make_dir(path: &Path) -> Result<(), Refusal> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(path)
        .map_err(Refusal::io(format!("making {}", path.display())))
}

fn write_file(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    use std::io::Write as _;
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(path)?;
    file.write_all(content)?;
    // The mode given to open is cut by the umask.
    file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(mode))
}

/// Keeps mounts of a container from travelling anywhere.
pub(crate) fn make_private() -> Result<(), Refusal> {
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(Refusal::step("making the mounts private"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, text: &str) -> VolumeFile {
        VolumeFile { path: path.into(), mode: 0o640, contents: text.as_bytes().to_vec() }
    }

    #[test]
    fn volumes_change_as_one_and_forget_what_is_gone() {
        let dir = std::env::temp_dir().join(format!("lateen-volume-{}", std::process::id()));
        let volume =
            Volume { name: "config".into(), source: VolumeSource::Files(vec![file("a", "1"), file("sub/b", "2")]) };
        let mut pod = PodFiles::create(dir.clone(), vec![volume], Vec::new()).unwrap();
        let root = dir.join("volumes/config");
        assert_eq!(fs::read_to_string(root.join("a")).unwrap(), "1");
        assert_eq!(fs::read_to_string(root.join("sub/b")).unwrap(), "2");
        assert_eq!(fs::metadata(root.join("a")).unwrap().mode() & 0o777, 0o640);
        let before = fs::canonicalize(root.join("a")).unwrap();
        pod.update("config", &[file("a", "one"), file("c", "3")]).unwrap();
        assert_eq!(fs::read_to_string(root.join("a")).unwrap(), "one");
        assert_eq!(fs::read_to_string(root.join("c")).unwrap(), "3");
        assert!(!root.join("sub").exists() && fs::symlink_metadata(root.join("sub")).is_err());
        assert!(!before.exists(), "the old version is gone");
        assert!(pod.update("other", &[]).is_err());
        pod.remove();
        assert!(!dir.exists());
    }

    #[test]
    fn paths_cannot_leave_their_volume() {
        for bad in ["../x", "/etc/passwd", "a/../../b", "", "."] {
            assert!(inside(bad).is_err(), "{bad:?}");
        }
        assert_eq!(inside("a/b.txt").unwrap(), Path::new("a/b.txt"));
    }

    #[test]
    fn the_missing_rest_of_a_path_is_found() {
        let check = |path: &str, existing: &str, missing: &str| {
            assert_eq!(split(Path::new(path)), (existing.into(), missing.into()), "{path}");
        };
        check(
            "/proc/self/nothing/here",
            &fs::canonicalize("/proc/self").unwrap().display().to_string(),
            "nothing/here",
        );
        check("/usr", &fs::canonicalize("/usr").unwrap().display().to_string(), "");
        check("/not-there/x", "/", "not-there/x");
    }
}

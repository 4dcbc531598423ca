//! The small JSON files that belong to a set of clusters: the nodes file and the layout.
//!
//! Written to a temporary name beside the target, fsynced, then renamed over it: a reader, and a
//! crash, see the old file or the new one, never half of one.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::ManagerError;
use crate::kvclient::Endpoints;

/// Replaces `path` by `value` as JSON, atomically and durably. Creates the directory it is in.
pub(super) fn write_json(path: &Path, value: &impl Serialize) -> Result<(), ManagerError> {
    let failed = |source| ManagerError::Write { path: path.into(), source };
    let mut text = serde_json::to_string(value).expect("strings and numbers always serialise");
    text.push('\n');
    let parent = directory_of(path);
    fs::create_dir_all(&parent).map_err(failed)?;
    // The process id keeps two processes that write the same file out of each other's way.
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = PathBuf::from(name);
    let replaced = replace(&temporary, path, text.as_bytes());
    if replaced.is_err() {
        // Best effort: the error that is reported is the one that matters.
        let _ = fs::remove_file(&temporary);
    }
    replaced.map_err(failed)?;
    // The rename itself is durable only once the directory is.
    File::open(&parent).and_then(|directory| directory.sync_all()).map_err(failed)
}

fn replace(temporary: &Path, path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = File::create(temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(temporary, path)
}

/// The text of a file, `None` when there is none.
pub(super) fn read_if_there(path: &Path) -> Result<Option<String>, ManagerError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(source) => Err(ManagerError::Read { path: path.into(), source }),
    }
}

/// Writes the nodes file: a JSON list of clusters, each a list of its nodes' HTTP addresses. What
/// [`read_nodes_file`] would refuse is refused: the file that is there still leads somewhere.
pub fn write_nodes_file(path: &Path, clusters: &[Vec<String>]) -> Result<(), ManagerError> {
    check(path, clusters)?;
    write_json(path, &clusters)
}

/// Reads the nodes file. A list that names nobody, or a cluster without nodes, is an error, and so is
/// what is no address.
pub fn read_nodes_file(path: &Path) -> Result<Vec<Vec<String>>, ManagerError> {
    let text = fs::read_to_string(path)
        .map_err(|source| ManagerError::Read { path: path.into(), source })?;
    let bad = |message: String| ManagerError::BadFile { path: path.into(), message };
    let clusters: Vec<Vec<String>> =
        serde_json::from_str(&text).map_err(|error| bad(error.to_string()))?;
    check(path, &clusters)?;
    Ok(clusters)
}

fn check(path: &Path, clusters: &[Vec<String>]) -> Result<(), ManagerError> {
    let bad = |message| ManagerError::BadFile { path: path.into(), message };
    Endpoints::from(clusters.to_vec()).check().map_err(bad)
}

/// Makes sure that the nodes file can be written later, without touching it: whoever finds out only when
/// everything runs has to stop it all again. `taken` are files and directories of the data, which it must
/// not replace, nor lie in.
pub(super) fn check_nodes_file(path: &Path, taken: &[PathBuf]) -> Result<(), ManagerError> {
    let bad = |message: &str| {
        Err(ManagerError::BadFile { path: path.into(), message: format!("`nodes_file` {message}") })
    };
    if path.file_name().is_none() || path.as_os_str().as_encoded_bytes().ends_with(b"/") {
        return bad("must name a file");
    }
    if path.is_dir() {
        return bad("is a directory; name a file");
    }
    let wanted = resolve(path);
    if taken.iter().any(|taken| wanted.starts_with(resolve(taken))) {
        return bad("is where the nodes keep their data; choose another place");
    }
    // Directories that are not there yet will be made.
    let parent = directory_of(&wanted);
    let existing = parent.ancestors().find(|directory| directory.exists()).unwrap_or(&parent);
    try_to_write_in(existing).map_err(|source| ManagerError::Write { path: path.into(), source })
}

/// Makes a file in a directory, and removes it again.
fn try_to_write_in(directory: &Path) -> std::io::Result<()> {
    let name = directory.join(format!(".nodes-file.{}.tmp", std::process::id()));
    File::create(&name)?;
    fs::remove_file(&name)
}

/// A path without links, as far as it exists.
fn resolve(path: &Path) -> PathBuf {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.into());
    for existing in absolute.ancestors() {
        if let (Ok(real), Ok(rest)) = (existing.canonicalize(), absolute.strip_prefix(existing)) {
            return real.join(rest);
        }
    }
    absolute
}

fn directory_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.into(),
        _ => PathBuf::from("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nodes_file_comes_back_as_written_and_leaves_no_temporary() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/nodes.json");
        let clusters = vec![vec!["127.0.0.1:1".to_owned(), "127.0.0.1:2".to_owned()]];
        write_nodes_file(&path, &[vec!["127.0.0.1:9".to_owned()]]).unwrap();
        write_nodes_file(&path, &clusters).unwrap();
        assert_eq!(read_nodes_file(&path).unwrap(), clusters);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    /// Nothing of it is made or changed; what is in the way is told.
    #[test]
    fn a_nodes_file_that_cannot_be_written_is_found_out_before() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        let taken = [data.join("layout.json"), data.join("c1-n1")];
        fs::create_dir_all(&taken[1]).unwrap();
        fs::write(&taken[0], "{}").unwrap();
        std::os::unix::fs::symlink(&data, dir.path().join("link")).unwrap();
        for bad in ["", "..", "data", "x/", "data/layout.json", "link/layout.json", "data/c1-n1/x"]
        {
            let path = if bad.is_empty() { PathBuf::new() } else { dir.path().join(bad) };
            let refused = check_nodes_file(&path, &taken);
            assert!(matches!(refused, Err(ManagerError::BadFile { .. })), "{bad}: {refused:?}");
        }
        for bad in
            [&dir.path().join("data/layout.json/nodes.json"), Path::new("/proc/no/nodes.json")]
        {
            let refused = check_nodes_file(bad, &[]);
            assert!(matches!(refused, Err(ManagerError::Write { .. })), "{bad:?}: {refused:?}");
        }
        let before = fs::read_dir(dir.path()).unwrap().count();
        for good in ["nodes.json", "deep/er/nodes.json", "data/nodes.json", "link/nodes.json"] {
            check_nodes_file(&dir.path().join(good), &taken).unwrap();
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), before);
        assert_eq!(fs::read_to_string(&taken[0]).unwrap(), "{}");
    }

    #[test]
    fn a_list_that_names_nobody_replaces_no_nodes_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nodes.json");
        let clusters = vec![vec!["127.0.0.1:1".to_owned()]];
        write_nodes_file(&path, &clusters).unwrap();
        for nobody in [vec![], vec![vec![]], vec![clusters[0].clone(), vec![]]] {
            let refused = write_nodes_file(&path, &nobody);
            assert!(matches!(refused, Err(ManagerError::BadFile { .. })), "{nobody:?}");
            assert_eq!(read_nodes_file(&path).unwrap(), clusters);
        }
    }

    #[test]
    fn a_nodes_file_that_names_nobody_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nodes.json");
        for text in
            ["", "[]", "[[]]", r#"["127.0.0.1:1"]"#, r#"[["127.0.0.1:1"],[]]"#, r#"[["h"]]"#]
        {
            fs::write(&path, text).unwrap();
            assert!(matches!(read_nodes_file(&path), Err(ManagerError::BadFile { .. })), "{text}");
        }
    }
}

//! The control socket's place in the filesystem.

use std::{
    fs::{DirBuilder, Permissions},
    io,
    os::unix::{
        fs::{DirBuilderExt, FileTypeExt, PermissionsExt},
        net::UnixStream,
    },
    path::{Path, PathBuf},
};

use tokio::net::UnixListener;

/// Makes the socket, open to everyone: who may do what is decided by who connects.
///
/// What an earlier run left behind is replaced; what somebody else put there is not.
///
/// # Errors
///
/// Cause and remedy, to be shown at the line that names the path.
pub(super) fn bind(path: &Path) -> Result<UnixListener, (String, String)> {
    let shown = path.display();
    if let Some(directory) = path.parent().filter(|directory| !directory.as_os_str().is_empty()) {
        make(directory).map_err(|error| {
            let help = "make it, or let the unit do so: RuntimeDirectory=edged; RuntimeDirectoryMode=0755";
            (
                format!("the directory of the control socket {shown} cannot be made: {error}"),
                help.to_owned(),
            )
        })?;
    }
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err((
                format!("{shown} exists and is no socket"),
                format!("move it away, or write another path: ls -l {shown}"),
            ));
        }
        // Nobody answers on what an earlier run left.
        Ok(_) if UnixStream::connect(path).is_ok() => {
            let help =
                format!("see which one: ss -xlp src {shown}; give each edged its own [control] socket and --state");
            return Err((format!("another process serves the control socket {shown}"), help));
        }
        _ => {}
    }
    place(path).map_err(|error| {
        let help = format!(
            "edged must be able to write there; look at: ls -ld {}",
            path.parent().unwrap_or(path).display()
        );
        (format!("the control socket {shown} cannot be made: {error}"), help)
    })
}

/// A directory that everyone may enter, whatever the umask; one that is there stays as it is.
fn make(directory: &Path) -> io::Result<()> {
    if directory.is_dir() {
        return Ok(());
    }
    DirBuilder::new().recursive(true).mode(0o755).create(directory)?;
    std::fs::set_permissions(directory, Permissions::from_mode(0o755))
}

/// Under another name first, so that at every moment the path is a socket that can be used by all.
fn place(path: &Path) -> io::Result<UnixListener> {
    let mut fresh = path.as_os_str().to_owned();
    fresh.push(".new");
    let fresh = PathBuf::from(fresh);
    match std::fs::remove_file(&fresh) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&fresh)?;
    std::fs::set_permissions(&fresh, Permissions::from_mode(0o666))?;
    std::fs::rename(&fresh, path)?;
    Ok(listener)
}

/// Takes the socket away at the end.
pub(super) fn remove(path: &Path) {
    let _ = std::fs::remove_file(path);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let directory = std::env::temp_dir().join(format!("edged-socket-{}", std::process::id()));
        let path = directory.join("made/edged.sock");
        let first = bind(&path).expect("bound");
        assert_eq!(
            std::fs::metadata(&path).expect("made").permissions().mode() & 0o777,
            0o666
        );
        let (message, _) = bind(&path).expect_err("a live one");
        assert!(message.contains("another process serves"), "{message}");
        drop(first);
        let second = bind(&path).expect("replaced");
        drop(second);
        std::fs::remove_file(&path).expect("removed");
        std::fs::write(&path, "precious").expect("written");
        let (message, _) = bind(&path).expect_err("no socket");
        assert!(message.contains("is no socket"), "{message}");
        let _ = std::fs::remove_dir_all(directory);
    }
}

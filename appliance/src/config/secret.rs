//! Secrets come by reference: from a file that nobody but its owner can read.

use std::{
    fs::OpenOptions,
    io::{self, Read},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

/// A key, a token or a password is shorter than this; anything longer is the wrong file.
const MOST: u64 = 64 * 1024;

/// Why a secret file is not used.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// Others can read it.
    #[error("{path} has mode {mode:04o}: others on this machine can read the secret, so it is not used; chmod 600 {path}", path = path.display())]
    Readable {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// It cannot be opened or read.
    #[error("{path} cannot be read: {source}", path = path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It holds no secret.
    #[error("{path} {what}, so it holds no secret; write the secret alone into it", path = path.display())]
    Empty {
        /// The file.
        path: PathBuf,
        /// What it is instead.
        what: &'static str,
    },
}

/// The content of a secret file, without the line break at its end.
///
/// Its mode is read from the opened file, so that it cannot be exchanged between check and use.
///
/// # Errors
///
/// [`SecretError`] if the file is missing, readable by group or others, empty, or no regular file.
pub fn secret_file(path: &Path) -> Result<Vec<u8>, SecretError> {
    let unreadable = |source| SecretError::Unreadable {
        path: path.to_owned(),
        source,
    };
    // Without O_NONBLOCK a FIFO would hold up the start for ever.
    let nonblock = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(nonblock)
        .open(path)
        .map_err(unreadable)?;
    let metadata = file.metadata().map_err(unreadable)?;
    if !metadata.is_file() {
        return Err(SecretError::Empty {
            path: path.to_owned(),
            what: "is no regular file",
        });
    }
    let mode = metadata.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(SecretError::Readable {
            path: path.to_owned(),
            mode,
        });
    }
    let mut secret = Vec::new();
    file.take(MOST + 1).read_to_end(&mut secret).map_err(unreadable)?;
    if secret.len() as u64 > MOST {
        return Err(SecretError::Empty {
            path: path.to_owned(),
            what: "is larger than 64 KiB",
        });
    }
    while secret.last().is_some_and(u8::is_ascii_whitespace) {
        secret.pop();
    }
    if secret.is_empty() {
        return Err(SecretError::Empty {
            path: path.to_owned(),
            what: "is empty",
        });
    }
    Ok(secret)
}

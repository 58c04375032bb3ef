//! What a configuration refers to and does not hold: secrets and certificates, each in a file of its own.

use std::ops::Range;

use crate::config::{Faulty, Loaded, Report, SecretError, Secrets, secret_file};

impl Loaded {
    /// Reads every secret the configuration refers to.
    ///
    /// # Errors
    ///
    /// [`Faulty`], pointing at the keys whose file is missing, readable by others, or empty.
    pub fn secrets(&self) -> Result<Secrets, Faulty> {
        let mut secrets = Secrets::default();
        let mut faults = Vec::new();
        if let Some(at) = &self.config.control.metrics_token_file {
            match secret_file(&at.value) {
                Ok(token) => secrets.metrics_token = Some(token),
                Err(error) => faults.push(self.secret_fault(at.span.clone(), &error)),
            }
        }
        if faults.is_empty() {
            Ok(secrets)
        } else {
            Err(Faulty {
                faults,
                warnings: Vec::new(),
            })
        }
    }

    /// Checks every file the configuration refers to, as a start would; returns what this user cannot check.
    ///
    /// # Errors
    ///
    /// [`Faulty`], pointing at the keys whose file cannot be used.
    pub fn check_files(&self) -> Result<Vec<Report>, Faulty> {
        let (mut faults, mut warnings) = (Vec::new(), Vec::new());
        let root = rustix::process::geteuid().is_root();
        if let Some(at) = &self.config.control.metrics_token_file {
            match secret_file(&at.value) {
                Ok(_) => {}
                Err(SecretError::Unreadable { source, path })
                    if !root && source.kind() == std::io::ErrorKind::PermissionDenied =>
                {
                    let message = format!("{} cannot be checked: this user may not read it", path.display());
                    let help = "to check it too: sudo edgectl config check";
                    warnings
                        .push(Report::new(&self.text, &self.origin, at.span.clone(), &message, help).into_warning());
                }
                Err(error) => faults.push(self.secret_fault(at.span.clone(), &error)),
            }
        }
        for need in lb::needs(&self.config.lb, 1) {
            let lb::What::File(path) = &need.what else { continue };
            let (message, help) = match std::fs::read(path) {
                Ok(content) => match lb::io::check_file(&content) {
                    Ok(()) => continue,
                    Err(error) => (
                        format!("{} {error}", path.display()),
                        format!("{} names the CA to use", need.key),
                    ),
                },
                Err(error) => (
                    format!("{} cannot be read: {error}", path.display()),
                    format!("ls -l {}", path.display()),
                ),
            };
            faults.push(Report::new(&self.text, &self.origin, need.span, &message, &help));
        }
        if faults.is_empty() {
            Ok(warnings)
        } else {
            Err(Faulty { faults, warnings })
        }
    }

    fn secret_fault(&self, span: Range<usize>, error: &SecretError) -> Report {
        let text = error.to_string();
        let (message, help) = text.split_once("; ").unwrap_or((&text, ""));
        let help = match error {
            SecretError::Unreadable { path, .. } => format!("it must exist, with mode 0600: ls -l {}", path.display()),
            _ => help.to_owned(),
        };
        Report::new(&self.text, &self.origin, span, message, &help)
    }
}

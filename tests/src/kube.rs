//! Real Kubernetes API servers over an [`Etcd`] cluster, one beside each member; the programs come from outside.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use rcgen::KeyPair;
use rustls::ClientConfig;

use crate::{
    Node, Process,
    etcd::{CLIENT_PORT, Etcd},
    http, netns,
    tls::{self, Ca, Files, Identity},
    wait_until,
};

/// Port of the API servers.
pub const API_PORT: u16 = 6443;

/// API servers and what their clients need.
#[derive(Debug)]
pub struct Kube {
    /// One beside each member of etcd, in the same order.
    pub servers: Vec<Server>,
    /// For [`tls::connect`]: a member of `system:masters`.
    pub client: Arc<ClientConfig>,
    /// The authority's certificate.
    pub ca_file: PathBuf,
    client_files: Files,
    programs: PathBuf,
    cache: PathBuf,
    /// What they store in.
    pub etcd: Etcd,
}

/// One API server.
#[derive(Debug)]
pub struct Server {
    /// Where it runs.
    pub node: Node,
    identity: Identity,
    program: PathBuf,
    arguments: Vec<String>,
    process: Option<Process>,
}

impl Kube {
    /// Starts `kube-apiserver` of the directory `programs` beside each member of `etcd`, with a certificate that is also
    /// valid for `front`.
    ///
    /// # Errors
    ///
    /// If a program is missing or a server does not become ready.
    pub fn start(etcd: Etcd, programs: &Path, front: &Node) -> Result<Self> {
        for name in ["kube-apiserver", "kubectl"] {
            ensure!(
                programs.join(name).is_file(),
                "there is no {name} in KUBE_BIN_DIR ({})",
                programs.display()
            );
        }
        let directory = etcd.ca_file().parent().context("a file is in a directory")?;
        let ca = Ca::new("kubernetes")?;
        let ca_file = directory.join("kube-ca.crt");
        ca.write(&ca_file)?;
        // Signs service account tokens; nobody asks for one here, but there is no server without it.
        let (signer, verifier) = (
            directory.join("service-accounts.key"),
            directory.join("service-accounts.pub"),
        );
        let key = KeyPair::generate()?;
        fs::write(&signer, key.serialize_pem())?;
        fs::write(&verifier, key.public_key_pem())?;
        let admin = ca.issue("admin", Some("system:masters"), &[], &[])?;
        let client_files = admin.write(&directory.join("kube-admin"))?;
        let members: Vec<String> = etcd
            .members
            .iter()
            .map(|member| format!("https://{}", member.node.at(CLIENT_PORT)))
            .collect();
        let mut servers = Vec::new();
        for member in &etcd.members {
            let node = member.node.clone();
            let identity = ca.issue(node.name(), None, &[node.ip(), front.ip()], &["kubernetes"])?;
            let files = identity.write(&node.file("kube-apiserver"))?;
            let arguments = [
                ("etcd-servers", members.join(",")),
                ("etcd-cafile", etcd.ca_file().display().to_string()),
                ("etcd-certfile", etcd.client_files().cert.display().to_string()),
                ("etcd-keyfile", etcd.client_files().key.display().to_string()),
                ("bind-address", node.ip().to_string()),
                ("advertise-address", node.ip().to_string()),
                ("secure-port", API_PORT.to_string()),
                ("tls-cert-file", files.cert.display().to_string()),
                ("tls-private-key-file", files.key.display().to_string()),
                ("client-ca-file", ca_file.display().to_string()),
                ("authorization-mode", "RBAC".to_owned()),
                ("service-cluster-ip-range", "fd00:1::/112".to_owned()),
                ("service-account-issuer", "https://kubernetes.default.svc".to_owned()),
                ("service-account-key-file", verifier.display().to_string()),
                ("service-account-signing-key-file", signer.display().to_string()),
            ];
            servers.push(Server {
                node,
                identity,
                program: programs.join("kube-apiserver"),
                arguments: arguments
                    .into_iter()
                    .map(|(key, value)| format!("--{key}={value}"))
                    .collect(),
                process: None,
            });
        }
        let cache = directory.join("kubectl-cache");
        let client = ca.client(Some(&admin))?;
        let mut kube = Self {
            servers,
            client,
            ca_file,
            client_files,
            programs: programs.to_owned(),
            cache,
            etcd,
        };
        for server in &mut kube.servers {
            server.start()?;
        }
        for index in 0..kube.servers.len() {
            kube.wait_until_ready(index)?;
        }
        Ok(kube)
    }

    /// Waits until a server answers `/readyz` well.
    ///
    /// # Errors
    ///
    /// If it does not; the message has its last words.
    pub fn wait_until_ready(&mut self, index: usize) -> Result<()> {
        let Self { servers, client, .. } = self;
        let server = &mut servers[index];
        let (node, target) = (server.node.clone(), server.node.at(API_PORT));
        let process = server.process.as_mut().context("it was started")?;
        let ready = || -> Result<bool> {
            let stream = node.enter(|| tls::connect(target, client, Duration::from_secs(5)))?;
            Ok(http::request(stream, "GET", "/readyz", &target.to_string(), "")?.status == 200)
        };
        // Three of them start at once on the same few cores.
        let what = format!("kube-apiserver on {} is ready", node.name());
        let waited = wait_until(&what, Duration::from_secs(120), || {
            ready().is_ok_and(|ready| ready) || !process.running()
        });
        waited.with_context(|| crate::process::tail(&process.log(), 15))?;
        ensure!(
            process.running(),
            "kube-apiserver ended:\n{}",
            crate::process::tail(&process.log(), 15)
        );
        Ok(())
    }

    /// `kubectl` on `node`, speaking to `endpoint` as an administrator, without a command yet.
    pub fn kubectl(&self, node: &Node, endpoint: SocketAddr) -> Command {
        let mut command = node.command(self.programs.join("kubectl"));
        command
            .arg("--kubeconfig=/dev/null")
            .arg(format!("--server=https://{endpoint}"))
            .arg(format!("--certificate-authority={}", self.ca_file.display()))
            .arg(format!("--client-certificate={}", self.client_files.cert.display()))
            .arg(format!("--client-key={}", self.client_files.key.display()))
            .arg(format!("--cache-dir={}", self.cache.display()));
        command
    }

    /// What the programs call themselves.
    ///
    /// # Errors
    ///
    /// If `kube-apiserver` does not say.
    pub fn version(&self) -> Result<String> {
        let said = netns::run(Command::new(self.programs.join("kube-apiserver")).arg("--version"))?;
        Ok(said.trim().to_owned())
    }
}

impl Server {
    /// Starts it, or starts it again.
    ///
    /// # Errors
    ///
    /// If it cannot be started.
    pub fn start(&mut self) -> Result<()> {
        let mut command = self.node.command(&self.program);
        command.args(&self.arguments);
        self.process = Some(self.node.spawn("kube-apiserver", command)?);
        Ok(())
    }

    /// Kills it: signal 9.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill();
        }
    }

    /// The certificate it shows.
    pub fn certificate(&self) -> &rustls::pki_types::CertificateDer<'static> {
        self.identity.certificate()
    }
}

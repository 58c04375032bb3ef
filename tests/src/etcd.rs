//! A cluster of three etcd members with TLS and client certificates, each on a node of its own.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    process::Command,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use rustls::{ClientConfig, pki_types::CertificateDer};
use serde_json::Value;

use crate::{
    Lab, Node, Process,
    edge::find,
    http,
    lab::need_tool,
    tls::{self, Ca, Files, Identity},
    wait_until,
};

/// Port for clients.
pub const CLIENT_PORT: u16 = 2379;
const PEER_PORT: u16 = 2380;

/// The cluster and what its clients need.
#[derive(Debug)]
pub struct Etcd {
    /// In the order of their names: cp1, cp2, cp3.
    pub members: Vec<Member>,
    /// For [`tls::connect`].
    pub client: Arc<ClientConfig>,
    /// What signed everything.
    pub ca: Ca,
    ca_file: PathBuf,
    client_files: Files,
}

/// One member.
#[derive(Debug)]
pub struct Member {
    /// Where it runs.
    pub node: Node,
    identity: Identity,
    arguments: Vec<String>,
    process: Option<Process>,
    id: u64,
}

impl Etcd {
    /// Starts three members on nodes cp1, cp2, cp3 (numbers 11, 12, 13); their certificates are also valid for
    /// `front`, where clients will look for them.
    ///
    /// # Errors
    ///
    /// If etcd is not installed or the cluster does not come up.
    pub fn start(lab: &Lab, front: &[IpAddr]) -> Result<Self> {
        need_tool("etcd", "etcd-server")?;
        need_tool("etcdctl", "etcd-client")?;
        let ca = Ca::new("lab")?;
        let ca_file = lab.dir().join("ca.crt");
        ca.write(&ca_file)?;
        let nodes: Vec<Node> = (1..=3)
            .map(|number| lab.node(&format!("cp{number}"), 10 + number))
            .collect::<Result<_>>()?;
        let url = |address: SocketAddr| format!("https://{address}");
        let cluster: Vec<String> = nodes
            .iter()
            .map(|node| format!("{}={}", node.name(), url(node.at(PEER_PORT))))
            .collect();
        let mut members = Vec::new();
        for node in &nodes {
            let identity = ca.issue(node.name(), None, &[&[node.ip(), node.ip4()], front].concat(), &[])?;
            let files = identity.write(&node.file("etcd"))?;
            let (clients, peers) = (url(node.at(CLIENT_PORT)), url(node.at(PEER_PORT)));
            let arguments = [
                ("name", node.name().to_owned()),
                ("data-dir", node.file("etcd-data").display().to_string()),
                ("listen-client-urls", clients.clone()),
                ("advertise-client-urls", clients),
                ("listen-peer-urls", peers.clone()),
                ("initial-advertise-peer-urls", peers),
                ("initial-cluster", cluster.join(",")),
                ("initial-cluster-token", "lab".to_owned()),
                ("trusted-ca-file", ca_file.display().to_string()),
                ("cert-file", files.cert.display().to_string()),
                ("key-file", files.key.display().to_string()),
                ("peer-trusted-ca-file", ca_file.display().to_string()),
                ("peer-cert-file", files.cert.display().to_string()),
                ("peer-key-file", files.key.display().to_string()),
                // A tenth of the defaults' caution: the network is a bridge in memory.
                ("heartbeat-interval", "50".to_owned()),
                ("election-timeout", "500".to_owned()),
                ("logger", "zap".to_owned()),
            ];
            let mut arguments: Vec<String> = arguments
                .into_iter()
                .map(|(key, value)| format!("--{key}={value}"))
                .collect();
            arguments.extend(["--client-cert-auth".to_owned(), "--peer-client-cert-auth".to_owned()]);
            members.push(Member {
                node: node.clone(),
                identity,
                arguments,
                process: None,
                id: 0,
            });
        }
        let user = ca.issue("root", None, &[], &[])?;
        let client_files = user.write(&lab.dir().join("client"))?;
        let client = ca.client(Some(&user))?;
        let mut etcd = Self {
            members,
            client,
            ca,
            ca_file,
            client_files,
        };
        for index in 0..etcd.members.len() {
            etcd.members[index].start()?;
        }
        for index in 0..etcd.members.len() {
            etcd.wait_until_serving(index)?;
        }
        Ok(etcd)
    }

    /// Waits until the member takes part in the cluster.
    ///
    /// # Errors
    ///
    /// If it does not; the message has its last words.
    pub fn wait_until_serving(&mut self, index: usize) -> Result<()> {
        let target = self.members[index].node.at(CLIENT_PORT);
        let mut id = None;
        let node = self.members[index].node.clone();
        wait_until(
            &format!("etcd on {} serves", node.name()),
            Duration::from_secs(15),
            || {
                // A range read is linearizable: it is answered only by a member that reaches the leader.
                let answer = node.enter(|| call(&self.client, target, "/v3/kv/range", r#"{"key":"AA=="}"#));
                id = answer.ok().and_then(|answer| member_id(&answer));
                id.is_some()
            },
        )
        .with_context(|| {
            self.members[index]
                .process
                .as_ref()
                .map(Process::log)
                .unwrap_or_default()
        })?;
        self.members[index].id = id.context("an id was read")?;
        Ok(())
    }

    /// The member that leads.
    ///
    /// # Errors
    ///
    /// If no member says.
    pub fn leader(&self) -> Result<usize> {
        let asked = self
            .members
            .iter()
            .find(|member| member.process.is_some())
            .context("no member runs")?;
        let target = asked.node.at(CLIENT_PORT);
        let answer = asked
            .node
            .enter(|| call(&self.client, target, "/v3/maintenance/status", "{}"))?;
        let id = answer["leader"].as_str().and_then(|id| id.parse::<u64>().ok());
        self.members
            .iter()
            .position(|member| Some(member.id) == id)
            .with_context(|| format!("no leader in {answer}"))
    }

    /// `etcdctl` on `node`, speaking to `endpoint`, without a command yet.
    pub fn etcdctl(&self, node: &Node, endpoint: SocketAddr) -> Command {
        let mut command = node.command("etcdctl");
        command
            .env("ETCDCTL_API", "3")
            .arg(format!("--endpoints=https://{endpoint}"))
            .arg(format!("--cacert={}", self.ca_file.display()))
            .arg(format!("--cert={}", self.client_files.cert.display()))
            .arg(format!("--key={}", self.client_files.key.display()));
        command
    }

    /// The authority's certificate.
    pub fn ca_file(&self) -> &PathBuf {
        &self.ca_file
    }

    /// The client's certificate and key.
    pub fn client_files(&self) -> &Files {
        &self.client_files
    }
}

impl Member {
    /// Starts it, or starts it again with its data.
    ///
    /// # Errors
    ///
    /// If it cannot be started.
    pub fn start(&mut self) -> Result<()> {
        let mut command = self.node.command("etcd");
        // etcd reads its options from the environment too; what the caller's shell has is not meant for it.
        for (key, _) in std::env::vars_os().filter(|(key, _)| key.to_string_lossy().starts_with("ETCD_")) {
            command.env_remove(key);
        }
        command.args(&self.arguments);
        self.process = Some(self.node.spawn("etcd", command)?);
        Ok(())
    }

    /// Its id, by which answers name it; 0 until it has served.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The certificate it shows.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        self.identity.certificate()
    }

    /// Kills it: signal 9.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill();
        }
    }
}

/// One call of etcd's JSON API over a connection of its own.
///
/// # Errors
///
/// What the socket says, or what etcd says instead of an answer.
pub fn call(client: &Arc<ClientConfig>, target: SocketAddr, path: &str, body: &str) -> io::Result<Value> {
    let stream = tls::connect(target, client, Duration::from_secs(5))?;
    let mut response = http::request(stream, "POST", path, &target.to_string(), body)?;
    let text = response.text()?;
    if response.status != 200 {
        return Err(io::Error::other(format!(
            "{path} was answered {}: {}",
            response.status,
            text.trim()
        )));
    }
    serde_json::from_str(&text).map_err(io::Error::other)
}

/// Which member sent an answer.
fn member_id(answer: &Value) -> Option<u64> {
    find(answer, "member_id")?.as_str()?.parse().ok()
}

/// `text` as etcd's JSON API wants its keys and values.
pub fn base64(text: &str) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for chunk in text.as_bytes().chunks(3) {
        let bits = chunk.iter().fold(0_u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for digit in 0..4 {
            let value = (bits >> (18 - 6 * digit)) & 63;
            out.push(if digit <= chunk.len() {
                DIGITS[value as usize].into()
            } else {
                '='
            });
        }
    }
    out
}

/// Reads a number that etcd writes as a string.
///
/// # Errors
///
/// If there is none at `key`.
pub fn number(value: &Value, key: &str) -> Result<u64> {
    let found = find(value, key).with_context(|| format!("no {key} in {value}"))?;
    let text = found.as_str().map_or_else(|| found.to_string(), ToOwned::to_owned);
    ensure!(!text.is_empty(), "{key} is empty");
    text.parse().with_context(|| format!("{key} = {text}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rfc4648_section_10_examples() {
        let examples = [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("foobar", "Zm9vYmFy"),
        ];
        for (text, encoded) in examples {
            assert_eq!(base64(text), encoded);
        }
    }
}

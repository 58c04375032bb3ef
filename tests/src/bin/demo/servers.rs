//! What stands behind `edged` in the demo, and how its clients speak to it: etcd, or the API servers of `KUBE_BIN_DIR`.

use std::{net::SocketAddr, path::PathBuf, process::Command};

use anyhow::{Context, Result};
use rustls::pki_types::CertificateDer;
use serde_json::Value;
use tests::{
    Lab, Node,
    edge::find,
    etcd::{self, Etcd, base64, number},
    http,
    kube::{self, Kube},
    tls,
};

use crate::clients::{PATIENCE, Way};

/// Three servers, each on a node of its own.
#[derive(Debug)]
pub(crate) enum Servers {
    /// The members themselves.
    Etcd(Etcd),
    /// API servers over such members, which nothing is done to.
    Kubernetes(Kube),
}

/// The protocol that clients speak with [`Servers`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Speech {
    Etcd,
    Kubernetes,
}

/// One event that a watch was told.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen {
    /// Its place in the order of all writes: etcd's revision, or the number in the object's name.
    pub(crate) number: u64,
    /// Who told it, where the answer says.
    pub(crate) server: Option<u64>,
}

impl Servers {
    /// Starts them; their certificates are also valid for `front`.
    pub(crate) fn start(lab: &Lab, front: &Node) -> Result<Self> {
        let etcd = Etcd::start(lab, &[front.ip()])?;
        match std::env::var_os("KUBE_BIN_DIR").map(PathBuf::from) {
            Some(programs) => Ok(Self::Kubernetes(Kube::start(etcd, &programs, front)?)),
            None => Ok(Self::Etcd(etcd)),
        }
    }

    pub(crate) fn speech(&self) -> Speech {
        match self {
            Self::Etcd(_) => Speech::Etcd,
            Self::Kubernetes(_) => Speech::Kubernetes,
        }
    }

    pub(crate) fn node(&self, index: usize) -> Node {
        match self {
            Self::Etcd(etcd) => etcd.members[index].node.clone(),
            Self::Kubernetes(kube) => kube.servers[index].node.clone(),
        }
    }

    /// Where the three listen for clients.
    pub(crate) fn addresses(&self) -> Vec<SocketAddr> {
        (0..3).map(|index| self.node(index).at(self.speech().port())).collect()
    }

    /// The certificate of each, with its node's name.
    pub(crate) fn certificates(&self) -> Vec<(CertificateDer<'static>, String)> {
        let certificate = |index: usize| match self {
            Self::Etcd(etcd) => etcd.members[index].certificate().clone(),
            Self::Kubernetes(kube) => kube.servers[index].certificate().clone(),
        };
        (0..3)
            .map(|index| (certificate(index), self.node(index).name().to_owned()))
            .collect()
    }

    /// For a client.
    pub(crate) fn way(&self, node: Node, front: SocketAddr) -> Way {
        let tls = match self {
            Self::Etcd(etcd) => &etcd.client,
            Self::Kubernetes(kube) => &kube.client,
        };
        Way {
            node,
            front,
            tls: tls.clone(),
            speech: self.speech(),
            certificates: self.certificates().into(),
        }
    }

    /// `kill -9`.
    pub(crate) fn kill(&mut self, index: usize) {
        match self {
            Self::Etcd(etcd) => etcd.members[index].kill(),
            Self::Kubernetes(kube) => kube.servers[index].kill(),
        }
    }

    /// Starts one again and waits until it serves.
    pub(crate) fn bring_back(&mut self, index: usize) -> Result<()> {
        match self {
            Self::Etcd(etcd) => {
                etcd.members[index].start()?;
                etcd.wait_until_serving(index)
            }
            Self::Kubernetes(kube) => {
                kube.servers[index].start()?;
                kube.wait_until_ready(index)
            }
        }
    }

    /// The one whose death would stop writes for a while.
    pub(crate) fn leader(&self) -> Result<Option<usize>> {
        match self {
            Self::Etcd(etcd) => etcd.leader().map(Some),
            Self::Kubernetes(_) => Ok(None),
        }
    }

    /// The one that told an event.
    pub(crate) fn teller(&self, seen: Seen) -> Option<usize> {
        match self {
            Self::Etcd(etcd) => etcd.members.iter().position(|member| Some(member.id()) == seen.server),
            Self::Kubernetes(_) => None,
        }
    }

    /// A process that watches every write, from after `last` on; each line of its output is for [`Speech::told`].
    pub(crate) fn watch(&self, way: &Way, last: Option<u64>) -> Command {
        match self {
            Self::Etcd(etcd) => {
                let mut command = etcd.etcdctl(&way.node, way.front);
                let next = last.map_or(1, |last| last + 1);
                command.args(["watch", "--prefix", "demo/", "-w", "json", &format!("--rev={next}")]);
                command
            }
            Self::Kubernetes(kube) => {
                // It lists first, as every client of an API server does that comes again.
                let mut command = kube.kubectl(&way.node, way.front);
                command.args(["get", "configmaps", "--watch", "--output=name"]);
                command
            }
        }
    }

    /// What the balancer is to check: a port that opens says enough of etcd, and too little of an API server.
    pub(crate) fn check(&self) -> String {
        match self {
            Self::Etcd(_) => "kind = \"tcp\"".to_owned(),
            Self::Kubernetes(kube) => format!("kind = \"https\", ca_file = \"{}\"", kube.ca_file.display()),
        }
    }

    /// What they are, for the reader.
    pub(crate) fn describe(&self) -> Result<String> {
        Ok(match self {
            Self::Etcd(_) => {
                "etcd stands where API servers stand; with KUBE_BIN_DIR, those of that directory do".to_owned()
            }
            Self::Kubernetes(kube) => format!("{}, of KUBE_BIN_DIR, over the three etcd members", kube.version()?),
        })
    }
}

impl Speech {
    /// A server's program.
    pub(crate) fn server(self) -> &'static str {
        match self {
            Self::Etcd => "etcd",
            Self::Kubernetes => "kube-apiserver",
        }
    }

    /// The long-lived client.
    pub(crate) fn watcher(self) -> &'static str {
        match self {
            Self::Etcd => "etcdctl watch",
            Self::Kubernetes => "kubectl get --watch",
        }
    }

    pub(crate) fn port(self) -> u16 {
        match self {
            Self::Etcd => etcd::CLIENT_PORT,
            Self::Kubernetes => kube::API_PORT,
        }
    }

    /// What [`Seen::number`] counts.
    pub(crate) fn unit(self) -> &'static str {
        match self {
            Self::Etcd => "revision",
            Self::Kubernetes => "object",
        }
    }

    /// The first [`Seen::number`]: an empty etcd is at revision 1.
    pub(crate) fn first(self) -> u64 {
        match self {
            Self::Etcd => 2,
            Self::Kubernetes => 1,
        }
    }

    /// Writes `key` over a connection of its own; returns its [`Seen::number`].
    pub(crate) fn put(self, way: &Way, key: u64) -> Result<u64> {
        match self {
            Self::Etcd => {
                let (name, value) = (base64(&format!("demo/{key:06}")), base64(&key.to_string()));
                let body = format!(r#"{{"key":"{name}","value":"{value}"}}"#);
                number(&etcd::call(&way.tls, way.front, "/v3/kv/put", &body)?, "revision")
            }
            Self::Kubernetes => {
                let body = format!(r#"{{"apiVersion":"v1","kind":"ConfigMap","metadata":{{"name":"demo-{key:06}"}}}}"#);
                let stream = tls::connect(way.front, &way.tls, PATIENCE)?;
                let path = "/api/v1/namespaces/default/configmaps";
                let mut response = http::request(stream, "POST", path, &way.front.to_string(), &body)?;
                match response.status {
                    // 409: an attempt before was done, and only its answer lost.
                    201 | 409 => Ok(key),
                    status => anyhow::bail!("answered {status}: {}", response.text()?),
                }
            }
        }
    }

    /// A watch on what nobody writes: method, path, body.
    pub(crate) fn idle(self) -> (&'static str, &'static str, String) {
        match self {
            Self::Etcd => (
                "POST",
                "/v3/watch",
                format!(r#"{{"create_request":{{"key":"{}"}}}}"#, base64("quiet")),
            ),
            Self::Kubernetes => (
                "GET",
                "/api/v1/namespaces/default/podtemplates?watch=1&timeoutSeconds=3600",
                String::new(),
            ),
        }
    }

    /// Whether a watch is confirmed by a first line; else the head of the answer confirms it.
    pub(crate) fn confirms_by_a_line(self) -> bool {
        self == Self::Etcd
    }

    /// Events in one line of the watching process.
    pub(crate) fn told(self, line: &str) -> Result<Vec<Seen>> {
        match self {
            Self::Etcd => {
                let answer: Value = serde_json::from_str(line)?;
                let server = Some(number(&answer, "member_id")?);
                let events = find(&answer, "Events").and_then(Value::as_array).into_iter().flatten();
                events
                    .map(|event| {
                        Ok(Seen {
                            number: number(event, "mod_revision")?,
                            server,
                        })
                    })
                    .collect()
            }
            Self::Kubernetes => {
                let Some((_, digits)) = line.split_once("/demo-") else {
                    return Ok(Vec::new());
                };
                let number = digits.trim().parse().with_context(|| line.to_owned())?;
                Ok(vec![Seen { number, server: None }])
            }
        }
    }
}

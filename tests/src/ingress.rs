//! Ingresses that expect a PROXY header, nginx and HAProxy as Debian has them, each on a node; and HAProxy in front, which
//! sends one. What they log is what they believe of their clients.

use std::{
    fmt::Write,
    fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, ensure};

use crate::{
    Node, Process,
    lab::need_tool,
    netns::run,
    process::{listeners, tail},
    tls::Files,
    wait_for, wait_until,
};

/// The NodePort of HTTP.
pub const HTTP: u16 = 31080;
/// The NodePort of HTTPS.
pub const HTTPS: u16 = 31443;

/// Which program it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `listen ... proxy_protocol`, `real_ip_header proxy_protocol`.
    Nginx,
    /// `bind ... accept-proxy`.
    Haproxy,
}

/// A web server on a node's IPv6 address that wants a PROXY header in front of everything, and answers each request with
/// its node's name.
#[derive(Debug)]
pub struct Ingress {
    /// Where it runs.
    pub node: Node,
    /// What it is.
    pub kind: Kind,
    process: Process,
    /// Where requests are logged, and complaints.
    logs: [PathBuf; 2],
}

/// A request as an [`Ingress`] logged it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Whom it takes for the client.
    pub client: IpAddr,
    /// The header's source.
    pub source: SocketAddr,
    /// The header's destination.
    pub destination: SocketAddr,
    /// The header's unique id; nginx of Debian 12 does not tell.
    pub unique_id: Option<String>,
    /// The header's authority, a name in a TLS greeting; nginx of Debian 12 does not tell.
    pub authority: Option<String>,
    /// What was asked for.
    pub path: String,
}

impl Ingress {
    /// Starts one on `node`, HTTP on [`HTTP`] and HTTPS, with the certificate of `tls`, on [`HTTPS`]; it takes a client's
    /// address from a header of `edge` alone.
    ///
    /// # Errors
    ///
    /// If the program is not installed or does not come to listen; the message has its words.
    pub fn start(node: &Node, kind: Kind, tls: &Files, edge: IpAddr) -> Result<Self> {
        let (access, errors) = (node.file("access.log"), node.file("error.log"));
        let process = match kind {
            Kind::Nginx => {
                let config = nginx(node, tls, edge, &access, &errors);
                let mut nginx = node.command(need_tool("nginx", "nginx")?);
                nginx
                    .arg("-c")
                    .arg(put(node, "nginx.conf", &config)?)
                    .arg("-e")
                    .arg(&errors);
                node.spawn("nginx", nginx)?
            }
            Kind::Haproxy => start_haproxy(node, &haproxy(node, tls)?)?,
        };
        let logs = match kind {
            Kind::Nginx => [access, errors],
            Kind::Haproxy => [node.file("haproxy.log"), node.file("haproxy.log")],
        };
        let mut ingress = Self {
            node: node.clone(),
            kind,
            process,
            logs,
        };
        wait_for_ports(&mut ingress.process, &[HTTP, HTTPS])?;
        Ok(ingress)
    }

    /// The request for `path`, which has to be logged soon.
    ///
    /// # Errors
    ///
    /// If it is not; the message has the log.
    pub fn seen(&self, path: &str) -> Result<Seen> {
        wait_for(
            &format!("{path} is in the log of {:?} on {}", self.kind, self.node.name()),
            Duration::from_secs(10),
            || self.requests().into_iter().find(|seen| seen.path == path),
        )
        .with_context(|| tail(&read(&self.logs[0]), 20))
    }

    /// Every request logged so far.
    pub fn requests(&self) -> Vec<Seen> {
        read(&self.logs[0]).lines().filter_map(parse).collect()
    }

    /// What it has said of connections that did not begin with a header.
    pub fn complaints(&self) -> Vec<String> {
        let log = read(&self.logs[1]);
        let says = |line: &str| match self.kind {
            // The first line of a complaint that quotes what came instead.
            Kind::Nginx => line.contains("broken header"),
            Kind::Haproxy => line.contains("PROXY protocol header"),
        };
        log.lines().filter(|line| says(line)).map(str::to_owned).collect()
    }
}

/// HAProxy on `node` as the balancer in front, which connects to `target` with a header of `version` ("v1", "v2"), a
/// listener of its own on both of the node's addresses for each.
///
/// # Errors
///
/// If it is not installed or does not come to listen.
pub fn haproxy_in_front(node: &Node, ways: &[(u16, &str, SocketAddr)]) -> Result<Process> {
    let mut config = GLOBAL.replace("MODE", "tcp");
    for (port, version, target) in ways {
        let option = match *version {
            "v1" => "send-proxy",
            _ => "send-proxy-v2",
        };
        let _ = write!(
            config,
            "listen way{port}\n  bind {}\n  bind {}\n  server edge {target} {option}\n",
            node.at(*port),
            node.at4(*port),
        );
    }
    let mut process = start_haproxy(node, &config)?;
    let ports: Vec<u16> = ways.iter().map(|(port, _, _)| *port).collect();
    wait_for_ports(&mut process, &ports)?;
    Ok(process)
}

/// Makes `node`'s eth0 a network of IPv6 alone.
///
/// # Errors
///
/// If `ip` fails.
pub fn ipv6_only(node: &Node) -> Result<()> {
    node.netns().ip(&format!("addr del {}/24 dev eth0", node.ip4()))
}

/// The line that both log for a request.
const LINE: &str = "seen CLIENT SOURCE PORT DESTINATION PORT ID AUTHORITY PATH";

fn parse(line: &str) -> Option<Seen> {
    let fields: Vec<&str> = line.split(' ').collect();
    if fields.len() != LINE.split(' ').count() || fields[0] != "seen" {
        return None;
    }
    let socket = |ip: &str, port: &str| Some(SocketAddr::new(ip.parse().ok()?, port.parse().ok()?));
    let text = |field: &str| (field != "-").then(|| field.to_owned());
    Some(Seen {
        client: fields[1].parse().ok()?,
        source: socket(fields[2], fields[3])?,
        destination: socket(fields[4], fields[5])?,
        unique_id: text(fields[6]),
        authority: text(fields[7]),
        path: fields[8].to_owned(),
    })
}

fn nginx(node: &Node, tls: &Files, edge: IpAddr, access: &Path, errors: &Path) -> String {
    let temp = |kind: &str| format!("{kind}_temp_path {};", node.file(&format!("nginx-{kind}")).display());
    let temps = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(temp)
        .join("\n  ");
    format!(
        "daemon off;\nuser root;\nworker_processes 1;\npid {pid};\nerror_log {errors} info;\n\
         events {{ worker_connections 4096; }}\nhttp {{\n  {temps}\n  \
         log_format seen 'seen $remote_addr $proxy_protocol_addr $proxy_protocol_port $proxy_protocol_server_addr \
         $proxy_protocol_server_port - - $uri';\n  access_log {access} seen;\n  \
         set_real_ip_from {edge};\n  real_ip_header proxy_protocol;\n  \
         server {{\n    listen {http} proxy_protocol;\n    listen {https} ssl proxy_protocol;\n    \
         ssl_certificate {cert};\n    ssl_certificate_key {key};\n    \
         location / {{ return 200 '{name}'; }}\n  }}\n}}\n",
        pid = node.file("nginx.pid").display(),
        errors = errors.display(),
        access = access.display(),
        http = node.at(HTTP),
        https = node.at(HTTPS),
        cert = tls.cert.display(),
        key = tls.key.display(),
        name = node.name(),
    )
}

/// Connections that say nothing are logged, too: nothing is to be hidden from the tests.
const GLOBAL: &str = "\
global
  log stdout format raw local0
  maxconn 4096
defaults
  mode MODE
  log global
  timeout connect 1s
  timeout client 30s
  timeout server 30s
";

fn haproxy(node: &Node, tls: &Files) -> Result<String> {
    let pem = node.file("haproxy.pem");
    fs::write(&pem, [fs::read(&tls.cert)?, fs::read(&tls.key)?].concat())?;
    Ok(format!(
        "{}frontend ingress\n  bind {} accept-proxy\n  bind {} accept-proxy ssl crt {}\n  \
         log-format \"seen %ci %ci %cp %[dst] %[dst_port] %[fc_pp_unique_id] %[fc_pp_authority] %HP\"\n  \
         http-request return status 200 content-type text/plain string \"{}\"\n",
        GLOBAL.replace("MODE", "http"),
        node.at(HTTP),
        node.at(HTTPS),
        pem.display(),
        node.name(),
    ))
}

fn start_haproxy(node: &Node, config: &str) -> Result<Process> {
    let file = put(node, "haproxy.cfg", config)?;
    let program = need_tool("haproxy", "haproxy")?;
    run(Command::new(&program).arg("-c").arg("-f").arg(&file)).with_context(|| config.to_owned())?;
    let mut haproxy = node.command(program);
    haproxy.arg("-db").arg("-f").arg(&file);
    node.spawn("haproxy", haproxy)
}

fn wait_for_ports(process: &mut Process, ports: &[u16]) -> Result<()> {
    wait_until("the peer listens", Duration::from_secs(10), || {
        let open = listeners(process.pid()).unwrap_or_default();
        let all = ports
            .iter()
            .all(|port| open.iter().any(|address| address.port() == *port));
        all || !process.running()
    })?;
    ensure!(process.running(), "it ended: {}", tail(&process.log(), 20));
    Ok(())
}

fn put(node: &Node, name: &str, content: &str) -> Result<PathBuf> {
    let file = node.file(name);
    fs::write(&file, content).with_context(|| file.display().to_string())?;
    Ok(file)
}

fn read(file: &Path) -> String {
    fs::read(file)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_log_is_read_field_by_field() {
        let seen = parse("seen fd00::2 fd00::2 40000 fd00::10 80 00ff - /a").unwrap();
        assert_eq!(seen.source, "[fd00::2]:40000".parse().unwrap());
        assert_eq!(seen.destination, "[fd00::10]:80".parse().unwrap());
        assert_eq!((seen.unique_id.as_deref(), seen.authority), (Some("00ff"), None));
        assert_eq!(
            parse("seen 10.0.0.2 - - fd00::10 80 - - /a"),
            None,
            "no header was read"
        );
        assert_eq!(parse("fd00::2:1 [date] http/1: Received something"), None);
    }
}

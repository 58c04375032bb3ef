//! A cluster's own nodes ask for the cluster's public name, as cert-manager does before it lets an HTTP-01 challenge be
//! checked from outside; the answer comes from the ingress on that very node, with PROXY on.
//!
//! ```text
//!        198.51.100.10, 2001:db8::10            default route of the node
//!                  edge: edged  <──────────────────────────── w1: the asking node
//!                        80, 443 ─── PROXY header ──────────> w1: nginx, NodePort 31080, fd00::21
//! ```

use std::{
    fs,
    net::{SocketAddr, TcpStream},
    path::Path,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use tests::{
    Edge, Lab, Node, http,
    ingress::{HTTP, Ingress, Kind},
    tls::Ca,
};

const PATIENCE: Duration = Duration::from_secs(3);
const NAME: &str = "shop.example.org";
/// What a node connects to: the edge's public addresses, which are not in the nodes' network.
const PUBLIC: [&str; 2] = ["198.51.100.10:80", "[2001:db8::10]:80"];
const CHALLENGE: &str = "/.well-known/acme-challenge/LoqXcYV8q5ONbJQxbmR7SCTNo3tiAXDfowyjxAjEuX0";

#[test]
fn a_node_behind_the_edge_reaches_its_own_ingress_by_the_public_address_and_is_logged_as_the_client() -> Result<()> {
    let site = Site::new()?;
    for version in ["v2", "v1"] {
        let said = site.edged.apply(&site.shipped(version)?)?;
        ensure!(said.code == Some(0), "{said}");
        for public in PUBLIC {
            let public: SocketAddr = public.parse()?;
            let path = format!("{CHALLENGE}/{version}/{}", public.is_ipv4());
            let (by, node) = site.ask(public, &path)?;
            assert_eq!(by, site.node.name());
            let own = if public.is_ipv4() {
                site.node.ip4()
            } else {
                site.node.ip()
            };
            assert_eq!(node.ip(), own, "the kernel's choice for {public}");
            let seen = site.ingress.seen(&path)?;
            assert_eq!(
                (seen.client, seen.source, seen.destination),
                (own, node, public),
                "{version}"
            );
        }
    }
    assert!(site.ingress.complaints().is_empty(), "{:?}", site.ingress.complaints());
    Ok(())
}

#[test]
fn a_node_that_short_cuts_the_public_address_fails_until_the_short_cut_is_gone() -> Result<()> {
    let site = Site::new()?;
    let public: SocketAddr = PUBLIC[1].parse()?;
    site.ask(public, "/before")?;
    // What kube-proxy makes of a LoadBalancer status with `ipMode: VIP`, or of an external IP: the node's own packets
    // to the public address go to the ingress at once, without the edge and so without a header.
    site.node.netns().nft(&format!(
        "table ip6 short {{ chain output {{ type nat hook output priority -100;\n\
         ip6 daddr {} tcp dport 80 dnat to [{}]:{HTTP}\n}}\n}}\n",
        public.ip(),
        site.node.ip()
    ))?;
    ensure!(
        site.ask(public, "/short").is_err(),
        "the ingress takes requests without a header"
    );
    assert_eq!(site.ingress.complaints().len(), 1, "{:?}", site.ingress.complaints());
    site.node.netns().nft("delete table ip6 short\n")?;
    site.ask(public, "/after")?;
    Ok(())
}

struct Site {
    edged: Edge,
    ingress: Ingress,
    node: Node,
    _lab: Lab,
}

impl Site {
    fn new() -> Result<Self> {
        let lab = Lab::new()?;
        let (edge, node) = (lab.node("edge", 10)?, lab.node("w1", 21)?);
        let [public4, public6] = PUBLIC.map(|public| public.parse::<SocketAddr>().expect("an address").ip());
        edge.netns().ip(&format!(
            "addr add {public4}/32 dev eth0\naddr add {public6}/128 dev eth0 nodad"
        ))?;
        node.netns().ip(&format!(
            "route add 0.0.0.0/0 via {} dev eth0\nroute add ::/0 via {} dev eth0",
            edge.ip4(),
            edge.ip()
        ))?;
        let tls = Ca::new("site")?
            .issue(NAME, None, &[], &[NAME])?
            .write(&lab.dir().join("site"))?;
        let ingress = Ingress::start(&node, Kind::Nginx, &tls, edge.ip())?;
        let edged = Edge::start(&edge, &shipped("v2", &node)?)?;
        Ok(Self {
            edged,
            ingress,
            node,
            _lab: lab,
        })
    }

    fn shipped(&self, version: &str) -> Result<String> {
        shipped(version, &self.node)
    }

    /// Asks from the node; says who answered and from where it was asked.
    fn ask(&self, public: SocketAddr, path: &str) -> Result<(String, SocketAddr)> {
        let stream = self.node.enter(|| TcpStream::connect_timeout(&public, PATIENCE))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let own = stream.local_addr()?;
        let mut answer = http::request(stream, "GET", path, NAME, "").with_context(|| format!("{path} of {public}"))?;
        ensure!(answer.status == 200, "{path} of {public}: {}", answer.status);
        Ok((answer.text()?, own))
    }
}

/// The shipped example with this node as the only worker: whatever is asked for comes back to where it was asked.
fn shipped(version: &str, node: &Node) -> Result<String> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/examples/ingress.toml");
    let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
    let adapted: Vec<&str> = text
        .lines()
        .filter(|line| !["::22]", "::23]"].iter().any(|other| line.contains(other)))
        .collect();
    let adapted = adapted
        .join("\n")
        .replace("[2001:db8:0:1::21]", &format!("[{}]", node.ip()))
        .replace("proxy_protocol = \"v2\"", &format!("proxy_protocol = \"{version}\""));
    ensure!(
        !adapted.contains("2001:db8"),
        "other addresses than expected: {adapted}"
    );
    Ok(adapted)
}

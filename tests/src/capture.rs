//! What was really on the wire: tcpdump on a node's `eth0`, and a reader of what it wrote.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket},
    path::PathBuf,
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;

use crate::{Node, Process, wait_for, wait_until};

/// A capture in progress; ended on drop.
#[derive(Debug)]
pub struct Capture {
    node: Node,
    process: Process,
    file: PathBuf,
}

/// The TCP packets of a capture, in the order of time.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    /// As captured: a packet that was sent again appears again.
    pub packets: Vec<Packet>,
}

/// One TCP packet.
#[derive(Clone, Debug)]
pub struct Packet {
    /// When it passed the interface, by the wall clock.
    pub at: SystemTime,
    /// Its sender.
    pub from: SocketAddr,
    /// Its receiver.
    pub to: SocketAddr,
    /// Its sequence number.
    pub seq: u32,
    /// Bytes of payload.
    pub payload: usize,
    flags: u8,
}

/// One TCP connection.
#[derive(Clone, Debug)]
pub struct Flow {
    /// Who sent the first SYN.
    pub client: SocketAddr,
    /// Whom it was sent to.
    pub server: SocketAddr,
    /// When the first SYN was seen.
    pub opened: SystemTime,
    /// SYNs of the client, those sent again included.
    pub syns: usize,
    /// When the server's SYN-ACK was seen.
    pub accepted: Option<SystemTime>,
    /// The first FIN or RST of either side.
    pub ended: Option<End>,
    /// Bytes of payload from the client, those sent again included.
    pub up: usize,
    /// Bytes of payload from the server, those sent again included.
    pub down: usize,
}

/// How a connection began to end.
#[derive(Clone, Debug)]
pub struct End {
    /// When.
    pub at: SystemTime,
    /// Who sent it.
    pub by: SocketAddr,
    /// RST; else FIN.
    pub reset: bool,
}

impl Node {
    /// Starts to capture the TCP packets on `eth0` that match a pcap `filter`; returns once it listens.
    ///
    /// # Errors
    ///
    /// If tcpdump does not start; its words are in the message.
    pub fn capture(&self, filter: &str) -> Result<Capture> {
        let file = self.fresh_file("capture.pcap");
        let mut tcpdump = self.command("tcpdump");
        // 128 bytes hold every header; without -Z root, Debian's tcpdump becomes another user and may not write the file.
        tcpdump.args([
            "-Z",
            "root",
            "-i",
            "eth0",
            "-U",
            "--immediate-mode",
            "-n",
            "-s",
            "128",
            "-B",
            "16384",
            "-w",
        ]);
        tcpdump
            .arg(&file)
            .arg(format!("({filter}) or (ip6 and udp dst port {MARK_PORT})"));
        let log = self.fresh_file("tcpdump.log");
        let mut process = Process::start(&format!("tcpdump on {}", self.name()), tcpdump, &log)?;
        wait_until("tcpdump listens", Duration::from_secs(10), || {
            process.log().contains("listening on") || !process.running()
        })?;
        ensure!(process.running(), "tcpdump: {}", process.log());
        Ok(Capture {
            node: self.clone(),
            process,
            file,
        })
    }
}

/// Where marks go: the discard port of a multicast group that nobody has joined.
const MARK_PORT: u16 = 9;

impl Capture {
    /// Everything captured so far, up to this very moment.
    ///
    /// # Errors
    ///
    /// If tcpdump has ended or its file cannot be read.
    pub fn so_far(&mut self) -> Result<Trace> {
        // What has passed the interface may still be on its way to the file: send a mark and wait until it is there.
        static SERIAL: AtomicU32 = AtomicU32::new(0);
        let mark = format!("mark {} {}", std::process::id(), SERIAL.fetch_add(1, Ordering::Relaxed));
        let socket = self.node.enter(|| -> Result<(UdpSocket, SocketAddrV6)> {
            let name = std::ffi::CString::new("eth0").expect("no NUL");
            // SAFETY: the name is a C string that outlives the call.
            let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
            let group = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 0xe7);
            Ok((
                UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))?,
                SocketAddrV6::new(group, MARK_PORT, 0, index),
            ))
        })?;
        let found = wait_for("the capture's file holds the mark", Duration::from_secs(10), || {
            let _ = socket.0.send_to(mark.as_bytes(), socket.1);
            let bytes = fs::read(&self.file).ok()?;
            let marked = bytes.windows(mark.len()).any(|window| window == mark.as_bytes());
            (marked || !self.process.running()).then_some(bytes)
        });
        let bytes = found.with_context(|| self.process.log())?;
        ensure!(self.process.running(), "tcpdump ended: {}", self.process.log());
        parse(&bytes)
    }

    /// Ends the capture and reads it.
    ///
    /// # Errors
    ///
    /// As [`Capture::so_far`].
    pub fn stop(mut self) -> Result<Trace> {
        let trace = self.so_far()?;
        self.process.signal(Signal::TERM)?;
        self.process.wait(Duration::from_secs(10))?;
        let log = self.process.log();
        // A capture with holes proves nothing.
        ensure!(
            log.contains("\n0 packets dropped by kernel"),
            "tcpdump lost packets: {log}"
        );
        Ok(trace)
    }
}

impl Packet {
    /// The first packet of a connection.
    pub fn syn(&self) -> bool {
        self.flags & (SYN | ACK) == SYN
    }

    /// The server's answer to it.
    pub fn syn_ack(&self) -> bool {
        self.flags & (SYN | ACK) == SYN | ACK
    }

    /// The sender sends no more.
    pub fn fin(&self) -> bool {
        self.flags & FIN != 0
    }

    /// The connection is no more.
    pub fn rst(&self) -> bool {
        self.flags & RST != 0
    }
}

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

impl Trace {
    /// The packets seen from `from` until before `until`.
    #[must_use]
    pub fn between(&self, from: SystemTime, until: SystemTime) -> Self {
        self.filter(|packet| packet.at >= from && packet.at < until)
    }

    /// The packets between two sockets, both ways.
    #[must_use]
    pub fn socket(&self, one: SocketAddr, other: SocketAddr) -> Self {
        self.filter(|packet| (packet.from == one && packet.to == other) || (packet.from == other && packet.to == one))
    }

    /// The packets to or from `address`.
    #[must_use]
    pub fn with(&self, address: SocketAddr) -> Self {
        self.filter(|packet| packet.from == address || packet.to == address)
    }

    /// The packets that `keep` keeps.
    #[must_use]
    pub fn filter(&self, keep: impl Fn(&Packet) -> bool) -> Self {
        Self {
            packets: self.packets.iter().filter(|packet| keep(packet)).cloned().collect(),
        }
    }

    /// The connections, in the order of their first SYNs; one whose SYN is not in the trace is left out.
    pub fn flows(&self) -> Vec<Flow> {
        let mut flows: Vec<Flow> = Vec::new();
        // The latest flow of each pair of sockets, with its initial sequence number: a port used again is another flow.
        let mut latest = std::collections::HashMap::new();
        for packet in &self.packets {
            if packet.syn() {
                let known = latest.get(&(packet.from, packet.to));
                match known {
                    Some((seq, index)) if *seq == packet.seq => {
                        let flow: &mut Flow = &mut flows[*index];
                        flow.syns += 1;
                    }
                    _ => {
                        latest.insert((packet.from, packet.to), (packet.seq, flows.len()));
                        flows.push(Flow::new(packet));
                    }
                }
            } else if let Some((_, index)) = latest.get(&(packet.from, packet.to)) {
                flows[*index].add(packet, true);
            } else if let Some((_, index)) = latest.get(&(packet.to, packet.from)) {
                flows[*index].add(packet, false);
            }
        }
        flows
    }

    /// The connections that `from` tried to open to `server`.
    pub fn connects(&self, from: IpAddr, server: SocketAddr) -> Vec<Flow> {
        self.flows()
            .into_iter()
            .filter(|flow| flow.client.ip() == from && flow.server == server)
            .collect()
    }
}

impl Flow {
    fn new(syn: &Packet) -> Self {
        Self {
            client: syn.from,
            server: syn.to,
            opened: syn.at,
            syns: 1,
            accepted: None,
            ended: None,
            up: 0,
            down: 0,
        }
    }

    fn add(&mut self, packet: &Packet, up: bool) {
        if packet.syn_ack() {
            self.accepted.get_or_insert(packet.at);
        }
        *(if up { &mut self.up } else { &mut self.down }) += packet.payload;
        if packet.fin() || packet.rst() {
            self.ended.get_or_insert(End {
                at: packet.at,
                by: packet.from,
                reset: packet.rst(),
            });
        }
    }

    /// The server (or what stands before it) answered the SYN with an RST.
    pub fn refused(&self) -> bool {
        self.accepted.is_none()
            && self
                .ended
                .as_ref()
                .is_some_and(|end| end.reset && end.by == self.server)
    }

    /// Whether it was open at `at`: accepted before, and not begun to end.
    pub fn open_at(&self, at: SystemTime) -> bool {
        self.accepted.is_some_and(|accepted| accepted <= at) && self.ended.as_ref().is_none_or(|end| end.at > at)
    }
}

/// Reads a capture file as tcpdump writes it: the classic format, microseconds, Ethernet. A packet cut short at the end
/// of the file is left out: tcpdump is still writing it.
fn parse(file: &[u8]) -> Result<Trace> {
    let header = file.get(..24).context("the capture has no header")?;
    let word = |bytes: &[u8], at: usize| -> Option<u32> {
        Some(u32::from_ne_bytes(
            bytes.get(at..at + 4)?.try_into().expect("four bytes"),
        ))
    };
    if word(header, 0) != Some(0xa1b2_c3d4) || word(header, 20) != Some(1) {
        bail!("the capture is not pcap with microseconds over Ethernet");
    }
    let mut rest = &file[24..];
    let mut packets = Vec::new();
    while let (Some(seconds), Some(micros), Some(length)) = (word(rest, 0), word(rest, 4), word(rest, 8)) {
        let Some(frame) = rest.get(16..16 + length as usize) else {
            break;
        };
        let at = UNIX_EPOCH + Duration::from_secs(seconds.into()) + Duration::from_micros(micros.into());
        packets.extend(packet(frame, at));
        rest = &rest[16 + length as usize..];
    }
    Ok(Trace { packets })
}

/// A TCP packet from an Ethernet frame; `None` for anything else.
fn packet(frame: &[u8], at: SystemTime) -> Option<Packet> {
    let short = |bytes: &[u8], at: usize| Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
    let ip = frame.get(14..)?;
    let (from, to, tcp, length): (IpAddr, IpAddr, &[u8], usize) = match short(frame, 12)? {
        0x0800 if *ip.get(9)? == 6 => {
            let header = usize::from(ip[0] & 15) * 4;
            let address = |at: usize| Some(Ipv4Addr::from(<[u8; 4]>::try_from(ip.get(at..at + 4)?).ok()?).into());
            (
                address(12)?,
                address(16)?,
                ip.get(header..)?,
                usize::from(short(ip, 2)?).checked_sub(header)?,
            )
        }
        // No extension headers: none of the lab's kernels sends any with TCP.
        0x86dd if *ip.get(6)? == 6 => {
            let address = |at: usize| Some(Ipv6Addr::from(<[u8; 16]>::try_from(ip.get(at..at + 16)?).ok()?).into());
            (address(8)?, address(24)?, ip.get(40..)?, short(ip, 4)?.into())
        }
        _ => return None,
    };
    let header = usize::from(*tcp.get(12)? >> 4) * 4;
    Some(Packet {
        at,
        from: (from, short(tcp, 0)?).into(),
        to: (to, short(tcp, 2)?).into(),
        seq: u32::from_be_bytes(tcp.get(4..8)?.try_into().ok()?),
        payload: length.saturating_sub(header),
        flags: *tcp.get(13)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_over_ipv6_is_read_from_its_packets() {
        let (client, server): (SocketAddr, SocketAddr) =
            ("[fd00::2]:40000".parse().unwrap(), "[fd00::10]:6443".parse().unwrap());
        let file = file(&[
            (0, frame(client, server, 7, SYN, 0)),
            (1, frame(client, server, 7, SYN, 0)),
            (2, frame(server, client, 9, SYN | ACK, 0)),
            (3, frame(client, server, 8, ACK, 5)),
            (4, frame(server, client, 10, RST, 0)),
        ]);
        let flows = parse(&file).unwrap().flows();
        assert_eq!(flows.len(), 1);
        assert_eq!((flows[0].client, flows[0].server), (client, server));
        assert_eq!((flows[0].syns, flows[0].up, flows[0].down), (2, 5, 0));
        let end = flows[0].ended.as_ref().unwrap();
        assert!(end.reset && end.by == server && !flows[0].refused());
        assert_eq!(end.at.duration_since(flows[0].opened).unwrap(), Duration::from_secs(4));
    }

    #[test]
    fn a_port_used_again_is_another_flow_and_a_cut_last_packet_is_left_out() {
        let (client, server): (SocketAddr, SocketAddr) =
            ("[fd00::2]:40000".parse().unwrap(), "[fd00::10]:6443".parse().unwrap());
        let mut file = file(&[
            (0, frame(client, server, 7, SYN, 0)),
            (0, frame(server, client, 0, RST | ACK, 0)),
            (1, frame(client, server, 8, SYN, 0)),
            (2, frame(server, client, 9, SYN | ACK, 0)),
        ]);
        file.truncate(file.len() - 3);
        let flows = parse(&file).unwrap().flows();
        assert_eq!(flows.len(), 2);
        assert!(flows[0].refused());
        assert!(flows[1].accepted.is_none() && !flows[1].refused());
    }

    fn file(packets: &[(u32, Vec<u8>)]) -> Vec<u8> {
        let mut file = Vec::new();
        for word in [0xa1b2_c3d4, 0x0004_0002, 0, 0, 128, 1] {
            file.extend(u32::to_ne_bytes(word));
        }
        for (second, frame) in packets {
            for word in [*second, 0, frame.len() as u32, frame.len() as u32] {
                file.extend(word.to_ne_bytes());
            }
            file.extend(frame);
        }
        file
    }

    fn frame(from: SocketAddr, to: SocketAddr, seq: u32, flags: u8, payload: u16) -> Vec<u8> {
        let (IpAddr::V6(source), IpAddr::V6(target)) = (from.ip(), to.ip()) else {
            panic!("IPv6 only")
        };
        let mut frame = vec![0; 12];
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        frame.extend((20 + payload).to_be_bytes());
        frame.extend([6, 64]);
        frame.extend(source.octets());
        frame.extend(target.octets());
        frame.extend(from.port().to_be_bytes());
        frame.extend(to.port().to_be_bytes());
        frame.extend(seq.to_be_bytes());
        frame.extend([0, 0, 0, 0, 0x50, flags]);
        frame.extend([0; 6]);
        frame
    }
}

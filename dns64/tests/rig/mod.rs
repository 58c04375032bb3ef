//! One service in a thread, and what stands around it: upstreams that say what a test wants, a store that keeps or refuses,
//! clients on std sockets.
//!
//! ```text
//! client (std) -> 127.0.0.1:P -> dns64::io::service::run -> 127.0.0.1:U upstream (std thread)
//!                                        \-> commits -> store (std thread)
//! ```

use std::{
    collections::BTreeSet,
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU16, Ordering::Relaxed},
        mpsc as std_mpsc,
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime},
};

use dns64::{
    Config,
    io::service::{self, Command, Commit, Links, Opened},
    status::{Answer, Request, Resolved, Status},
    zone::{Algorithm, Durable, Key, Memory},
};
use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query, ResponseCode},
    rr::{
        DNSClass, Name, RData, Record, RecordType, TSigVerifier, TSigner,
        rdata::{A, AAAA, CNAME, MX, PTR, SOA, TXT, tsig::TsigAlgorithm},
    },
};
use tokio::sync::{mpsc, oneshot};

/// Long enough for anything that is to happen at all.
pub(crate) const SOON: Duration = Duration::from_secs(10);
/// Where IPv4 appears in these tests; not the well-known prefix, which must not have the addresses of documentation.
pub(crate) const PREFIX: &str = "prefixes = [\"2001:db8:64::/96\"]";

/// What an upstream does about a question.
#[derive(Clone, Debug)]
pub(crate) enum Reaction {
    /// These records, one a line; a SOA stands in the authority section.
    Say(ResponseCode, String),
    /// Nothing.
    Silence,
    /// The same, later.
    After(Duration, Box<Self>),
}

/// NOERROR with `records`, one a line such as `www.example.org 300 A 192.0.2.1`.
pub(crate) fn say(records: &str) -> Reaction {
    Reaction::Say(ResponseCode::NoError, records.to_owned())
}

/// NOERROR without a record of the type.
pub(crate) fn nothing() -> Reaction {
    say("example.org 300 SOA 300")
}

/// NXDOMAIN.
pub(crate) fn no_name() -> Reaction {
    Reaction::Say(ResponseCode::NXDomain, "example.org 300 SOA 300".to_owned())
}

pub(crate) fn fail() -> Reaction {
    Reaction::Say(ResponseCode::ServFail, String::new())
}

pub(crate) fn after(ms: u64, reaction: Reaction) -> Reaction {
    Reaction::After(Duration::from_millis(ms), Box::new(reaction))
}

type Script = Arc<Mutex<Box<dyn Fn(&str, RecordType) -> Reaction + Send>>>;

/// A server of others.
pub(crate) struct Upstream {
    pub(crate) address: SocketAddr,
    script: Script,
    asked: Arc<Mutex<Vec<String>>>,
    thread: Option<JoinHandle<()>>,
}

impl Upstream {
    /// One that follows `script`, which gets names in lower case without a final dot, and of a check of the server the root.
    pub(crate) fn start(script: impl Fn(&str, RecordType) -> Reaction + Send + 'static) -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("a socket");
        let address = socket.local_addr().expect("its address");
        let script: Script = Arc::new(Mutex::new(Box::new(script)));
        let asked = Arc::new(Mutex::default());
        let thread = Some(upstream(socket, Arc::clone(&script), Arc::clone(&asked)));
        Self {
            address,
            script,
            asked,
            thread,
        }
    }

    /// From now on.
    pub(crate) fn set(&self, script: impl Fn(&str, RecordType) -> Reaction + Send + 'static) {
        *lock(&self.script) = Box::new(script);
    }

    /// Questions so far, such as `www.example.org A`. What was sent again because the answer did not come soon is no other
    /// question, and a check of the server is nobody's.
    pub(crate) fn asked(&self) -> Vec<String> {
        lock(&self.asked).clone()
    }

    /// As the configuration has it.
    pub(crate) fn line(&self) -> String {
        format!("upstreams = [\"udp://{}\"]", self.address)
    }

    /// Closes its port: whoever asks is told so by the kernel.
    pub(crate) fn close(&mut self) {
        let own = UdpSocket::bind("127.0.0.1:0").expect("a socket");
        own.send_to(b"", self.address).expect("the word to end");
        let thread = self.thread.take().expect("it runs");
        thread.join().expect("it ends");
    }
}

fn upstream(socket: UdpSocket, script: Script, asked: Arc<Mutex<Vec<String>>>) -> JoinHandle<()> {
    thread::spawn(move || {
        let mut octets = [0; 4096];
        let mut heard = BTreeSet::new();
        loop {
            let (length, client) = socket.recv_from(&mut octets).expect("a datagram");
            if length == 0 {
                return;
            }
            let query = Message::from_vec(&octets[..length]).expect("our own query");
            let asking = query.queries.first().expect("a question").clone();
            let name = asking.name().to_lowercase().to_ascii();
            let name = match name.trim_end_matches('.') {
                "" => ".",
                name => name,
            };
            if name != "." && heard.insert((client, octets[..length].to_vec())) {
                lock(&asked).push(format!("{name} {}", asking.query_type()));
            }
            let reaction = lock(&script)(name, asking.query_type());
            react(&socket, client, query, reaction);
        }
    })
}

fn react(socket: &UdpSocket, client: SocketAddr, query: Message, reaction: Reaction) {
    match reaction {
        Reaction::Silence => {}
        Reaction::After(time, reaction) => {
            let socket = socket.try_clone().expect("a second descriptor");
            thread::spawn(move || {
                thread::sleep(time);
                react(&socket, client, query, *reaction);
            });
        }
        Reaction::Say(code, records) => {
            let mut reply = Message::response(query.metadata.id, OpCode::Query);
            reply.metadata.response_code = code;
            reply.metadata.recursion_desired = true;
            reply.metadata.recursion_available = true;
            reply.add_queries(query.queries);
            for record in records
                .lines()
                .map(str::trim)
                .filter(|line| !line.is_empty())
                .map(record)
            {
                if record.record_type() == RecordType::SOA {
                    reply.add_authority(record);
                } else {
                    reply.add_answer(record);
                }
            }
            let _ = socket.send_to(&reply.to_vec().expect("a message"), client);
        }
    }
}

/// A record such as `www.example.org 300 A 192.0.2.1`; of a SOA there is its minimum only.
pub(crate) fn record(line: &str) -> Record {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let [owner, ttl, kind, data] = fields[..] else {
        panic!("\"{line}\" has not four fields");
    };
    let data = match kind {
        "A" => RData::A(A(data.parse().expect("an address"))),
        "AAAA" => RData::AAAA(AAAA(data.parse().expect("an address"))),
        "CNAME" => RData::CNAME(CNAME(name(data))),
        "MX" => RData::MX(MX::new(10, name(data))),
        "PTR" => RData::PTR(PTR(name(data))),
        "TXT" => RData::TXT(TXT::new(vec![data.to_owned()])),
        "SOA" => {
            let minimum = data.parse().expect("a minimum");
            RData::SOA(SOA::new(name("ns"), name("root"), 1, 2, 3, 4, minimum))
        }
        _ => panic!("{kind} is not known here"),
    };
    Record::from_rdata(name(owner), ttl.parse().expect("a TTL"), data)
}

pub(crate) fn name(text: &str) -> Name {
    let mut name = Name::from_ascii(text).expect("a name");
    name.set_fqdn(true);
    name
}

/// What the store does with what it is to keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Disk {
    Good,
    Full,
    /// It takes until the test says so.
    Slow,
}

/// The store of the supervisor.
#[derive(Default)]
struct Store {
    disk: Option<Disk>,
    kept: Vec<Durable>,
    waiting: Vec<Commit>,
}

/// A running service.
pub(crate) struct Dns {
    pub(crate) address: SocketAddr,
    pub(crate) commands: mpsc::Sender<Command>,
    store: Arc<Mutex<Store>>,
    thread: Option<JoinHandle<Result<(), service::Error>>>,
}

impl Dns {
    /// With a configuration of `text`, to which the address to listen on comes.
    pub(crate) fn start(text: &str) -> Self {
        Self::start_with(text, Memory::default())
    }

    pub(crate) fn start_with(text: &str, memory: Memory) -> Self {
        let (address, opened) = sockets();
        let config = config(&[address], text);
        let (commands, commanded) = mpsc::channel(16);
        let (commit, mut commits) = mpsc::channel::<Commit>(16);
        let store = Arc::new(Mutex::new(Store::default()));
        let keeper = Arc::clone(&store);
        thread::spawn(move || {
            while let Some(commit) = commits.blocking_recv() {
                let mut store = lock(&keeper);
                match store.disk.unwrap_or(Disk::Good) {
                    Disk::Good => {
                        store.kept.push(commit.durable);
                        let _ = commit.done.send(Ok(()));
                    }
                    Disk::Full => {
                        let _ = commit.done.send(Err("no space left on device".into()));
                    }
                    Disk::Slow => store.waiting.push(commit),
                }
            }
        });
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime");
            let links = Links {
                commands: commanded,
                commits: commit,
                successor: false,
            };
            runtime.block_on(service::run(Box::new(config), opened, memory, links))
        });
        let dns = Self {
            address,
            commands,
            store,
            thread: Some(thread),
        };
        let (reply, pong) = oneshot::channel();
        dns.tell(Command::Ping(reply));
        pong.blocking_recv().expect("it answers");
        dns
    }

    pub(crate) fn tell(&self, command: Command) {
        self.commands.blocking_send(command).expect("it listens");
    }

    pub(crate) fn request(&self, request: Request) -> Answer {
        let (reply, answer) = oneshot::channel();
        self.tell(Command::Ask { request, reply });
        answer.blocking_recv().expect("an answer")
    }

    pub(crate) fn status(&self) -> Status {
        match self.request(Request::Status) {
            Answer::Status(status) => *status,
            other => panic!("{other:?}"),
        }
    }

    /// What an operator sees of a name.
    pub(crate) fn query(&self, name: &str, kind: &str, trace: bool) -> Resolved {
        let request = Request::Query {
            name: name.into(),
            kind: kind.into(),
            trace,
        };
        match self.request(request) {
            Answer::Query(resolved) => *resolved,
            other => panic!("{other:?}"),
        }
    }

    /// Another configuration on `addresses`, with the sockets of those that are new.
    pub(crate) fn reload(&self, addresses: &[SocketAddr], opened: Opened, text: &str) -> Result<(), String> {
        let (done, is_done) = oneshot::channel();
        self.tell(Command::Reload {
            config: Box::new(config(addresses, text)),
            opened,
            done,
        });
        is_done.blocking_recv().expect("an end")
    }

    pub(crate) fn set_disk(&self, disk: Disk) {
        lock(&self.store).disk = Some(disk);
    }

    /// What was kept so far.
    pub(crate) fn kept(&self) -> Vec<Durable> {
        lock(&self.store).kept.clone()
    }

    /// What waits for the slow disk.
    pub(crate) fn waiting(&self) -> usize {
        lock(&self.store).waiting.len()
    }

    /// The slow disk has kept all.
    pub(crate) fn disk_done(&self) {
        let mut store = lock(&self.store);
        for commit in std::mem::take(&mut store.waiting) {
            store.kept.push(commit.durable);
            let _ = commit.done.send(Ok(()));
        }
    }

    /// What the next service gets of this one.
    pub(crate) fn memory(&self) -> Memory {
        let mut memory = Memory::default();
        for durable in self.kept() {
            let change = match durable {
                Durable::Zone(change) => Some(change),
                Durable::Key(key) => {
                    memory.keys.add(key).expect("a new key");
                    None
                }
                Durable::KeyRemoved { name, change } => {
                    memory.keys.remove(&name);
                    change
                }
            };
            if let Some(change) = change {
                memory.zones.entry(change.zone.clone()).or_default().apply(change);
            }
        }
        // As it is after it was written down and read.
        let text = serde_json::to_string(&memory).expect("text");
        serde_json::from_str(&text).expect("the same")
    }

    /// Ends it and waits for that.
    pub(crate) fn stop(mut self) -> Result<(), service::Error> {
        self.tell(Command::Stop { grace: SOON });
        let thread = self.thread.take().expect("it runs");
        thread.join().expect("no panic")
    }

    /// The answer to a question over UDP, as [`shown`] has it.
    pub(crate) fn shows(&self, asked: &str) -> String {
        shown(&self.ask(asked))
    }

    /// The answer to a question such as `www.example.org AAAA`.
    pub(crate) fn ask(&self, asked: &str) -> Message {
        self.exchange(&question(asked))
    }

    pub(crate) fn exchange(&self, query: &Message) -> Message {
        let octets = self.exchange_octets(&query.to_vec().expect("a query"));
        let reply = Message::from_vec(&octets).expect("a message");
        assert_eq!(reply.metadata.id, query.metadata.id);
        reply
    }

    pub(crate) fn exchange_octets(&self, query: &[u8]) -> Vec<u8> {
        let client = self.client();
        client.send(query).expect("sent");
        received(&client)
    }

    /// A socket that hears only the service.
    pub(crate) fn client(&self) -> UdpSocket {
        client(self.address)
    }

    pub(crate) fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).expect("a connection");
        stream.set_read_timeout(Some(SOON)).expect("a timeout");
        stream
    }

    /// Until `done`.
    pub(crate) fn wait(&self, what: &str, done: impl Fn(&Status) -> bool) {
        wait(what, || done(&self.status()));
    }
}

impl Drop for Dns {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            // It may have ended already.
            let _ = self.commands.blocking_send(Command::Stop { grace: SOON });
            let panicked = thread.join().is_err();
            assert!(!panicked || thread::panicking(), "the service has panicked");
        }
    }
}

pub(crate) fn client(address: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").expect("a socket");
    socket.connect(address).expect("connected");
    socket.set_read_timeout(Some(SOON)).expect("a timeout");
    socket
}

pub(crate) fn received(client: &UdpSocket) -> Vec<u8> {
    let mut octets = vec![0; 4096];
    let length = loop {
        match client.recv(&mut octets) {
            // With a time limit the kernel does not begin again by itself when a signal interrupts it (signal(7)).
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            length => break length.expect("an answer"),
        }
    };
    octets.truncate(length);
    octets
}

/// Both sockets of an address.
pub(crate) fn sockets() -> (SocketAddr, Opened) {
    loop {
        let datagrams = UdpSocket::bind("127.0.0.1:0").expect("a socket");
        let address = datagrams.local_addr().expect("its address");
        let Ok(listener) = TcpListener::bind(address) else {
            continue;
        };
        let opened = Opened {
            datagrams: vec![(address, vec![datagrams.into()])],
            listeners: vec![(address, vec![listener.into()])],
            ..Opened::default()
        };
        return (address, opened);
    }
}

fn config(addresses: &[SocketAddr], text: &str) -> Config {
    let addresses: Vec<String> = addresses.iter().map(|address| format!("\"{address}\"")).collect();
    let text = format!("listen = [{}]\n{text}", addresses.join(", "));
    let config: Config = toml::from_str(&text).expect("it parses");
    let faults = config.check();
    assert!(faults.iter().all(|fault| fault.warning), "{faults:?}");
    config
}

/// A question of a stub resolver, such as `www.example.org AAAA`.
pub(crate) fn question(asked: &str) -> Message {
    static ID: AtomicU16 = AtomicU16::new(1);
    let (owner, kind) = asked.split_once(' ').expect("a name and a type");
    let mut message = Message::new(ID.fetch_add(1, Relaxed), MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(name(owner), kind.parse().expect("a type")));
    message
}

/// With EDNS, so many octets.
pub(crate) fn with_edns(mut message: Message, payload: u16) -> Message {
    let mut edns = Edns::new();
    edns.set_max_payload(payload);
    message.set_edns(edns);
    message
}

/// Code and answers without TTLs, such as `NOERROR www.example.org AAAA 2001:db8::1`.
pub(crate) fn shown(message: &Message) -> String {
    let code = match message.metadata.response_code {
        ResponseCode::NoError => "NOERROR",
        ResponseCode::NXDomain => "NXDOMAIN",
        ResponseCode::ServFail => "SERVFAIL",
        ResponseCode::Refused => "REFUSED",
        ResponseCode::NotAuth => "NOTAUTH",
        ResponseCode::FormErr => "FORMERR",
        ResponseCode::NotImp => "NOTIMP",
        code => panic!("{code}"),
    };
    let mut text = code.to_owned();
    for record in &message.answers {
        let data = record.data.to_string();
        let data = data.trim_end_matches('.');
        let owner = record.name.to_ascii();
        text += &format!(" {} {} {data}", owner.trim_end_matches('.'), record.record_type());
    }
    text
}

/// Sends messages over TCP in one piece.
pub(crate) fn write(stream: &mut TcpStream, messages: &[Message]) {
    let mut octets = Vec::new();
    for message in messages {
        let message = message.to_vec().expect("a query");
        octets.extend(u16::try_from(message.len()).expect("a short one").to_be_bytes());
        octets.extend(message);
    }
    stream.write_all(&octets).expect("sent");
}

/// The next message over TCP; `None` at the end.
pub(crate) fn read(stream: &mut TcpStream) -> Option<Message> {
    let mut length = [0; 2];
    stream.read_exact(&mut length).ok()?;
    let mut octets = vec![0; u16::from_be_bytes(length).into()];
    stream.read_exact(&mut octets).expect("a whole message");
    Some(Message::from_vec(&octets).expect("a message"))
}

/// A key of `node` below fleet, in a memory and for a client.
pub(crate) fn keyed(node: &str, memory: &mut Memory) -> TSigner {
    let owner = format!("{node}.fleet").parse().expect("a name");
    let secret: Vec<u8> = node.bytes().cycle().take(64).collect();
    let key = Key::mint(
        owner,
        Algorithm::HmacSha256,
        format!("{node}.fleet").parse().expect("a name"),
        &secret,
    );
    memory.keys.add(key.expect("a key")).expect("its place");
    signer(&format!("{node}.fleet"), &secret[..32])
}

pub(crate) fn signer(key: &str, secret: &[u8]) -> TSigner {
    TSigner::new(secret.to_vec(), TsigAlgorithm::HmacSha256, name(key), 300).expect("a signer")
}

/// The signer of a file for `nsupdate -k`.
pub(crate) fn signer_of(file: &str) -> TSigner {
    let quoted = |word: &str| {
        let (_, rest) = file.split_once(word).expect("the word");
        let mut parts = rest.split('"');
        parts.nth(1).expect("its value").to_owned()
    };
    let digits = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut secret = Vec::new();
    let (mut bits, mut count) = (0_u32, 0);
    for digit in quoted("secret").bytes().filter(|digit| *digit != b'=') {
        let value = digits.iter().position(|known| *known == digit).expect("base64");
        bits = bits << 6 | u32::try_from(value).expect("six bits");
        count += 6;
        if count >= 8 {
            count -= 8;
            secret.push(u8::try_from(bits >> count & 0xff).expect("eight bits"));
            bits &= (1 << count) - 1;
        }
    }
    signer(&quoted("key "), &secret)
}

/// An update of zone fleet with `updates`, one record a line; `delete NAME TYPE` takes a set away.
pub(crate) fn update(updates: &str) -> Message {
    let mut message = question("fleet SOA");
    message.metadata.op_code = OpCode::Update;
    message.metadata.recursion_desired = false;
    for line in updates.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let record = match line.strip_prefix("delete ") {
            Some(set) => {
                let (owner, kind) = set.split_once(' ').expect("a name and a type");
                let mut record = Record::update0(name(owner), 0, kind.parse().expect("a type"));
                record.dns_class = DNSClass::ANY;
                record
            }
            None => record(line),
        };
        message.add_authority(record);
    }
    message
}

/// Signs now.
pub(crate) fn signed(mut message: Message, signer: &TSigner) -> (Message, TSigVerifier) {
    let now = SystemTime::UNIX_EPOCH.elapsed().expect("after 1970").as_secs();
    let verifier = message.finalize(signer, now).expect("signed").expect("a verifier");
    (message, verifier)
}

impl Dns {
    /// Sends a signed message; its answer, whose signature is good.
    pub(crate) fn signed(&self, message: Message, signer: &TSigner) -> Message {
        let (message, mut verifier) = signed(message, signer);
        let octets = self.exchange_octets(&message.to_vec().expect("a message"));
        verifier.verify(&octets).expect("the answer is signed");
        Message::from_vec(&octets).expect("a message")
    }
}

/// Until `done`, but not for ever.
pub(crate) fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    loop {
        // Taken before the look: who was held up since the last one looks once more.
        let late = begun.elapsed() > SOON;
        if done() {
            return;
        }
        assert!(!late, "{what}: not in time");
        thread::sleep(Duration::from_millis(5));
    }
}

/// What `run` does in a thread of its own.
pub(crate) fn background<T: Send + 'static>(run: impl FnOnce() -> T + Send + 'static) -> std_mpsc::Receiver<T> {
    let (done, result) = std_mpsc::channel();
    thread::spawn(move || done.send(run()));
    result
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no panic elsewhere")
}

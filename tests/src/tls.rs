//! Certificates of a lab, and TLS over std's sockets.

use std::{
    fs,
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, ServerConfig, StreamOwned,
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
};

/// A certificate authority.
#[derive(Debug)]
pub struct Ca {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
    der: CertificateDer<'static>,
}

/// A certificate for servers and clients alike, with its key.
#[derive(Debug)]
pub struct Identity {
    cert_pem: String,
    key_pem: String,
    cert: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
}

/// Where an [`Identity`] was written to.
#[derive(Clone, Debug)]
pub struct Files {
    /// The certificate.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

/// A TLS client's stream.
pub type TlsStream = StreamOwned<ClientConnection, TcpStream>;

impl Ca {
    /// A new authority.
    ///
    /// # Errors
    ///
    /// If no key can be made.
    pub fn new(name: &str) -> Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(Vec::new())?;
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![
            KeyUsagePurpose::KeyCertSign,
            KeyUsagePurpose::CrlSign,
            KeyUsagePurpose::DigitalSignature,
        ];
        let cert = params.self_signed(&key)?;
        Ok(Self {
            pem: cert.pem(),
            der: cert.der().clone(),
            issuer: Issuer::new(params, key),
        })
    }

    /// A certificate of `name`, valid for `addresses` and `names`; `group` becomes its organization.
    ///
    /// # Errors
    ///
    /// If no key can be made.
    pub fn issue(&self, name: &str, group: Option<&str>, addresses: &[IpAddr], names: &[&str]) -> Result<Identity> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>())?;
        params
            .subject_alt_names
            .extend(addresses.iter().copied().map(SanType::IpAddress));
        params.distinguished_name.push(DnType::CommonName, name);
        if let Some(group) = group {
            params.distinguished_name.push(DnType::OrganizationName, group);
        }
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        // Both: etcd's JSON gateway shows its server certificate to itself as a client.
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let cert = params.signed_by(&key, &self.issuer)?;
        Ok(Identity {
            cert_pem: cert.pem(),
            key_pem: key.serialize_pem(),
            cert: cert.der().clone(),
            key: PrivateKeyDer::try_from(key.serialize_der()).map_err(anyhow::Error::msg)?,
        })
    }

    /// Writes the authority's certificate.
    ///
    /// # Errors
    ///
    /// If the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        fs::write(path, &self.pem).with_context(|| path.display().to_string())
    }

    /// A client that trusts this authority alone, and shows `identity` if asked for a certificate.
    ///
    /// # Errors
    ///
    /// If the identity is unusable.
    pub fn client(&self, identity: Option<&Identity>) -> Result<Arc<ClientConfig>> {
        let mut roots = RootCertStore::empty();
        roots.add(self.der.clone())?;
        let config = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots);
        let mut config = match identity {
            Some(identity) => config.with_client_auth_cert(vec![identity.cert.clone()], identity.key.clone_key())?,
            None => config.with_no_client_auth(),
        };
        // Every connection makes the whole handshake, as a client does that has just started.
        config.resumption = rustls::client::Resumption::disabled();
        Ok(Arc::new(config))
    }
}

impl Identity {
    /// Writes `STEM.crt` and `STEM.key`, the key for its owner only.
    ///
    /// # Errors
    ///
    /// If a file cannot be written.
    pub fn write(&self, stem: &Path) -> Result<Files> {
        use std::os::unix::fs::OpenOptionsExt;
        let files = Files {
            cert: stem.with_extension("crt"),
            key: stem.with_extension("key"),
        };
        fs::write(&files.cert, &self.cert_pem).with_context(|| files.cert.display().to_string())?;
        let mut key = fs::File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&files.key)?;
        key.write_all(self.key_pem.as_bytes())?;
        Ok(files)
    }

    /// A server with this certificate that asks clients for none.
    ///
    /// # Errors
    ///
    /// If the identity is unusable.
    pub fn server(&self) -> Result<Arc<ServerConfig>> {
        let config = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(vec![self.cert.clone()], self.key.clone_key())?;
        Ok(Arc::new(config))
    }

    /// The certificate itself.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.cert
    }
}

impl Files {
    /// A server with the certificate in these files that asks clients for none.
    ///
    /// # Errors
    ///
    /// If they cannot be read or are unusable.
    pub fn server(&self) -> Result<Arc<ServerConfig>> {
        let (cert, key) = (
            CertificateDer::from_pem_file(&self.cert)?,
            PrivateKeyDer::from_pem_file(&self.key)?,
        );
        let config = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(vec![cert], key)?;
        Ok(Arc::new(config))
    }
}

/// Connects and shakes hands; every single step may take `timeout`.
///
/// # Errors
///
/// What the socket says; a failure of TLS itself is `InvalidData`.
pub fn connect(target: SocketAddr, config: &Arc<ClientConfig>, timeout: Duration) -> io::Result<TlsStream> {
    let tcp = TcpStream::connect_timeout(&target, timeout)?;
    tcp.set_nodelay(true)?;
    tcp.set_read_timeout(Some(timeout))?;
    tcp.set_write_timeout(Some(timeout))?;
    handshake(tcp, target, config)
}

/// Shakes hands on a connection to `target`.
///
/// # Errors
///
/// As [`connect`].
pub fn handshake(tcp: TcpStream, target: SocketAddr, config: &Arc<ClientConfig>) -> io::Result<TlsStream> {
    shake(tcp, ServerName::IpAddress(target.ip().into()), config)
}

/// Shakes hands on a connection with the server `name`, which the greeting says aloud (SNI).
///
/// # Errors
///
/// As [`connect`].
pub fn handshake_with(tcp: TcpStream, name: &str, config: &Arc<ClientConfig>) -> io::Result<TlsStream> {
    let name = ServerName::try_from(name.to_owned()).map_err(io::Error::other)?;
    shake(tcp, name, config)
}

fn shake(tcp: TcpStream, name: ServerName<'static>, config: &Arc<ClientConfig>) -> io::Result<TlsStream> {
    let connection = ClientConnection::new(Arc::clone(config), name).map_err(io::Error::other)?;
    let mut stream = StreamOwned::new(connection, tcp);
    while stream.conn.is_handshaking() {
        stream.conn.complete_io(&mut stream.sock)?;
    }
    Ok(stream)
}

/// The server's certificate on a stream that has shaken hands.
pub fn peer(stream: &TlsStream) -> Option<CertificateDer<'static>> {
    Some(stream.conn.peer_certificates()?.first()?.clone().into_owned())
}

/// Reads until `buffer` holds one more line, which is taken out of it; `None` at the end.
///
/// # Errors
///
/// What the stream says.
pub fn read_line(stream: &mut impl Read, buffer: &mut Vec<u8>) -> io::Result<Option<String>> {
    loop {
        if let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = buffer.drain(..=end).collect();
            return Ok(Some(String::from_utf8_lossy(&line).trim_end().to_owned()));
        }
        let mut chunk = [0; 4096];
        match read_some(stream, &mut chunk)? {
            0 => return Ok(None),
            count => buffer.extend_from_slice(&chunk[..count]),
        }
    }
}

/// One read that goes on after an interruption: a read with a time limit is interrupted whenever the machine was paused.
///
/// # Errors
///
/// What the stream says.
pub fn read_some(stream: &mut impl Read, out: &mut [u8]) -> io::Result<usize> {
    loop {
        match stream.read(out) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}
